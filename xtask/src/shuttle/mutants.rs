//! `cargo xtask shuttle --mutants`: schedules that find mistakes planted in the library, and find them again.
//!
//! A test of `crates/pagefirst-machine/tests/shuttle.rs` names above its attributes those that it must find, as the models
//! do (`catches: NAME, …`). With each it must fail within so many schedules, and the seed that it tells must fail again:
//! after as many steps, by the same decisions, with the same words.

use std::path::Path;

use super::{LIMIT, ROUND, program};
use crate::rust_source::Source;
use crate::{Result, cmd, model};

/// Within so many schedules a mistake must be found.
const SCHEDULES: u64 = 6000;
const TESTS: &str = "crates/pagefirst-machine/tests/shuttle.rs";

/// How a schedule failed.
#[derive(PartialEq, Eq, Debug)]
struct Failure {
    seed: u64,
    /// What the test says of the schedule: the seed, the steps, a hash of all decisions.
    schedule: String,
    /// Why it failed.
    why: String,
}

/// Runs the tests that name a mistake which contains `filter`, or all, with each; prints what found it.
pub(crate) fn run(program: &Path, filter: Option<&str>) -> Result {
    let source = Source::read(&cmd::root(), Path::new(TESTS))?;
    let planted = model::planted()?;
    let (mut problems, mut n) = (source.stray_catches(), 0);
    for test in source.tests() {
        let lines = test.comments.iter().filter_map(|line| line.strip_prefix("catches: "));
        for mutant in lines.flat_map(|list| list.split(',')).map(str::trim) {
            if !filter.is_none_or(|filter| mutant.contains(filter)) {
                continue;
            }
            if !planted.contains(mutant) {
                return Err(format!("{} names `{mutant}`, which is not planted", test.name));
            }
            n += 1;
            problems.extend(find(program, &test.name, mutant).err());
        }
    }
    println!("{n} mistakes");
    if n == 0 {
        problems.push(format!("no test names a mistake `{}`", filter.unwrap_or_default()));
    }
    if problems.is_empty() { Ok(()) } else { Err(format!("shuttle:\n  {}", problems.join("\n  "))) }
}

/// The test finds the mistake, twice.
fn find(path: &Path, test: &str, mutant: &str) -> Result {
    let mut rounds = (1..=SCHEDULES).step_by(ROUND as usize);
    let first = rounds
        .find_map(|seed| fails(path, test, mutant, seed, ROUND).transpose())
        .transpose()?
        .ok_or_else(|| format!("{test} does not find `{mutant}` in {SCHEDULES} schedules"))?;
    let again = fails(path, test, mutant, first.seed, 1)?;
    if again.as_ref() != Some(&first) {
        return Err(format!("{test} with `{mutant}`: {first:?} did not come again: {again:?}"));
    }
    let why: String = first.why.chars().take(110).collect();
    println!("{mutant}: {}, and again\n    {why}", first.schedule);
    Ok(())
}

fn fails(path: &Path, test: &str, mutant: &str, seed: u64, runs: u64) -> Result<Option<Failure>> {
    let mut command = program(path, test, seed, runs);
    let output = cmd::capture(command.env(model::MUTANT, mutant), Some(LIMIT))?;
    if output.success() {
        return Ok(None);
    }
    Failure::read(&output.stderr).map(Some).ok_or_else(|| {
        let tail: Vec<&str> = output.stderr.lines().rev().take(8).collect();
        format!("{test} with `{mutant}` ended without telling of a schedule: {tail:?}")
    })
}

impl Failure {
    fn read(text: &str) -> Option<Self> {
        let schedule = text.lines().find_map(|line| line.strip_prefix("failed: "))?;
        let (_, rest) = schedule.split_once("schedule ")?;
        let seed = rest.split(',').next()?.parse().ok()?;
        let why = text.lines().skip_while(|line| !line.starts_with("panicked at ")).take(2);
        Some(Failure { seed, schedule: schedule.to_owned(), why: why.collect::<Vec<_>>().join(" ") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_read_from_what_a_test_says() {
        let text = "thread 1: x\npanicked at world.rs:1:2:\nno\nfailed: one, schedule 7, after 12 steps (ab)\nagain: x\n";
        let failure = Failure {
            seed: 7,
            schedule: "one, schedule 7, after 12 steps (ab)".into(),
            why: "panicked at world.rs:1:2: no".into(),
        };
        assert_eq!(Failure::read(text), Some(failure));
        assert_eq!(Failure::read("error: x"), None);
    }
}
