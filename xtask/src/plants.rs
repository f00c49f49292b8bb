//! `cargo xtask plants`: each check of the embedded machine sees the mistake in the library that it is there for, and the
//! oracle those that no check is there for.
//!
//! A test of `crates/pagefirst-machine/tests/plants.rs` names above its attributes a mistake that is planted in the
//! library (`cfg!(mutant = "NAME")`), and the words in which the machine's check tells of it:
//!
//! ```text
//! // catches: free_before_flush
//! // says: is freed while 1 translations lead to it
//! #[test]
//! fn a_frame_to_be_used_again_before_the_flush() -> Result { … }
//! ```
//!
//! A test of `oracle.rs`, `huge_file.rs`, `huge_file_order.rs`, `limits.rs`, `rmap.rs`, `truncate_order.rs`, `walk_order.rs`,
//! `write_back.rs` or `write_back_order.rs` there, or of `crates/pagefirst-cli/tests/stress.rs`, names several, and it does not
//! matter how they come to light.
//!
//! First all of them must pass. Then the library is compiled with each mistake, and each test that names it must fail,
//! with the words of its check.
//!
//! The mistake is given to the library alone, so that nothing but what rests on it is compiled again: this program is
//! the compiler's wrapper for the packages of the workspace ([`as_compiler`]).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use crate::Result;
use crate::cmd::{self, End};
use crate::model;
use crate::rust_source::Source;

/// A program of tests.
#[derive(PartialEq, Eq, Debug)]
struct Program {
    name: &'static str,
    package: &'static str,
    /// What it says first when it has found something.
    found: &'static str,
    /// Each test must name a mistake, and the words in which it tells of it.
    is_exact: bool,
    /// For a short run, the same each time, that does not look for a shorter one when it fails.
    env: &'static [(&'static str, &'static str)],
}

const MACHINE: &str = "pagefirst-machine";
const EQUAL: &str = "assertion `left == right` failed";

static PROGRAMS: [Program; 11] = [
    Program {
        name: "plants",
        package: MACHINE,
        found: "the machine found a mistake: ",
        is_exact: true,
        env: &[],
    },
    Program {
        name: "oracle",
        package: MACHINE,
        found: "the oracle disagrees: ",
        is_exact: false,
        env: &[("PAGEFIRST_SEED", "1"), ("PAGEFIRST_CASES", "400"), ("PAGEFIRST_SHRINK", "0")],
    },
    Program { name: "huge_file", package: MACHINE, found: "assertion ", is_exact: false, env: &[] },
    Program { name: "huge_file_order", package: MACHINE, found: "page 1", is_exact: false, env: &[] },
    Program { name: "limits", package: MACHINE, found: EQUAL, is_exact: false, env: &[] },
    Program { name: "rmap", package: MACHINE, found: EQUAL, is_exact: false, env: &[] },
    Program { name: "truncate_order", package: MACHINE, found: EQUAL, is_exact: false, env: &[] },
    Program { name: "walk_order", package: MACHINE, found: EQUAL, is_exact: false, env: &[] },
    Program { name: "write_back", package: MACHINE, found: EQUAL, is_exact: false, env: &[] },
    Program { name: "write_back_order", package: MACHINE, found: EQUAL, is_exact: false, env: &[] },
    Program {
        name: "stress",
        package: "pagefirst-cli",
        found: "pagefirst: stress found a violation",
        is_exact: false,
        env: &[("PAGEFIRST_ALL_SEEDS", "1")],
    },
];

impl Program {
    fn path(&self) -> PathBuf {
        Path::new("crates").join(self.package).join("tests").join(self.name).with_extension("rs")
    }
}

/// Names the mistake to the wrapper.
const MUTANT: &str = "PAGEFIRST_MUTANT";
/// How long one test may run. One of the stress takes 36 s when it has the CPUs for itself.
const LIMIT: Duration = Duration::from_secs(240);

/// A test, the mistake it must catch, and how.
#[derive(PartialEq, Eq, Debug)]
struct Plant {
    program: &'static Program,
    test: String,
    mutant: String,
    says: String,
}

/// The mistakes that these tests catch.
pub(crate) fn caught() -> Result<BTreeSet<String>> {
    Ok(all()?.into_iter().map(|plant| plant.mutant).collect())
}

/// Runs the tests whose mistake contains `filter`, or all, without and with it.
pub(crate) fn run(filter: Option<&str>) -> Result {
    let start = Instant::now();
    let mut plants = all()?;
    plants.retain(|plant| filter.is_none_or(|filter| plant.mutant.contains(filter)));
    let planted = model::planted()?;
    if let Some(unknown) = plants.iter().find(|plant| !planted.contains(&plant.mutant)) {
        return Err(format!("{} names `{}`, which is not planted", unknown.test, unknown.mutant));
    }
    let mut problems = Vec::new();
    for program in &PROGRAMS {
        let plants: Vec<&Plant> = plants.iter().filter(|plant| plant.program == program).collect();
        if !plants.is_empty() {
            try_all(program, &plants, &mut problems)?;
        }
    }
    println!("{} mistakes, {:.0} s", plants.len(), start.elapsed().as_secs_f64());
    if problems.is_empty() { Ok(()) } else { Err(format!("plants:\n  {}", problems.join("\n  "))) }
}

/// Runs a program's tests without a mistake and with each; adds what is wrong to `problems`.
fn try_all(program: &Program, plants: &[&Plant], problems: &mut Vec<String>) -> Result {
    let plain = compile(program, None)?;
    let tests: BTreeSet<&str> = plants.iter().map(|plant| plant.test.as_str()).collect();
    for test in tests {
        if let Err(why) = outcome(program, &plain, test)? {
            problems.push(format!("{test} fails without a mistake: {}", first_panic(&why)));
        }
    }
    let mut by_mutant: BTreeMap<&str, Vec<&Plant>> = BTreeMap::new();
    plants.iter().for_each(|plant| by_mutant.entry(&plant.mutant).or_default().push(plant));
    for (mutant, plants) in by_mutant {
        let began = Instant::now();
        let with = compile(program, Some(mutant))?;
        println!("{mutant} ({:.1} s to compile)", began.elapsed().as_secs_f64());
        for plant in plants {
            match judge(plant, outcome(program, &with, &plant.test)?) {
                Ok(how) => println!("    {}: {how}", plant.test),
                Err(problem) => problems.push(problem),
            }
        }
    }
    Ok(())
}

/// Compiles as cargo asks, with the planted mistake if it is the library; `None` when this program was not started as a
/// compiler.
pub(crate) fn as_compiler(args: &[String]) -> Option<ExitCode> {
    let mutant = std::env::var(MUTANT).ok()?;
    let (compiler, args) = args.split_first()?;
    let mut command = Command::new(compiler);
    command.args(args);
    if !mutant.is_empty() && args.windows(2).any(|pair| pair[0] == "--crate-name" && pair[1] == "pagefirst") {
        command.args(["--cfg", &format!("mutant=\"{mutant}\""), "--allow", "warnings"]);
    }
    Some(match command.status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) | Err(_) => ExitCode::FAILURE,
    })
}

fn all() -> Result<Vec<Plant>> {
    let root = cmd::root();
    let mut all = Vec::new();
    for program in &PROGRAMS {
        let source = Source::read(&root, &program.path())?;
        if let Some(stray) = source.stray_catches().into_iter().next() {
            return Err(stray);
        }
        all.extend(plants(program, &source)?);
    }
    Ok(all)
}

fn plants(program: &'static Program, source: &Source) -> Result<Vec<Plant>> {
    let mut plants = Vec::new();
    for test in source.tests() {
        let lines = |key| test.comments.iter().filter_map(move |line| line.strip_prefix(key));
        let mutants: Vec<&str> = lines("catches: ").flat_map(|list| list.split(',')).map(str::trim).collect();
        let says = lines("says: ").next().map(str::trim);
        if program.is_exact && (mutants.len() != 1 || says.is_none()) {
            let (path, test) = (&source.path, &test.name);
            return Err(format!("{path}: {test} does not say what it catches, and in which words"));
        }
        let says = says.unwrap_or_default();
        let plant = |mutant: &str| Plant {
            program,
            test: test.name.clone(),
            mutant: mutant.into(),
            says: says.into(),
        };
        plants.extend(mutants.into_iter().map(plant));
    }
    Ok(plants)
}

/// Compiles the tests on the library with a mistake or none.
fn compile(program: &Program, mutant: Option<&str>) -> Result<PathBuf> {
    let what = format!("compiling the library with {}", mutant.unwrap_or("no mistake"));
    let cargo = |args: &[&str]| {
        let mut command = cmd::cargo(args);
        command.env("CARGO_TARGET_DIR", cmd::target_dir().join("plants"));
        command.env("CARGO_PROFILE_DEV_OPT_LEVEL", "0").env("CARGO_PROFILE_DEV_DEBUG", "0");
        // With each mistake all that rests on the library is compiled again.
        command.env("CARGO_INCREMENTAL", "1");
        command
    };
    let args = ["test", "--no-run", "--quiet", "--package", program.package, "--test", program.name];
    let mut command = planted(mutant, cargo, &args)?;
    command.args(["--message-format", "json-render-diagnostics"]);
    let messages = cmd::capture(&mut command, None)?.into_stdout(&what)?;
    // Beside it cargo may name a program that it calls.
    let tests: Vec<&str> = messages.lines().filter(|line| line.contains(r#""kind":["test"]"#)).collect();
    model::executable(&tests.join("\n")).ok_or_else(|| format!("{what}: cargo named no test program"))
}

/// A command of cargo that compiles the library with a mistake or none.
pub(crate) fn planted(
    mutant: Option<&str>,
    cargo: impl Fn(&[&str]) -> Command,
    args: &[&str],
) -> Result<Command> {
    let wrapper = std::env::current_exe().map_err(|e| format!("where is xtask? {e}"))?;
    // Cargo does not know that the wrapper does something else each time.
    cmd::check(&mut cargo(&["clean", "--quiet", "--package", "pagefirst"]))?;
    let mut command = cargo(args);
    command.env("RUSTC_WORKSPACE_WRAPPER", wrapper).env(MUTANT, mutant.unwrap_or_default());
    Ok(command)
}

/// Runs one test; what it printed if it failed.
fn outcome(program: &Program, path: &Path, test: &str) -> Result<std::result::Result<(), String>> {
    let mut command = Command::new(path);
    command
        .args(["--exact", test, "--nocapture"])
        .env("RUST_BACKTRACE", "0")
        .envs(program.env.iter().copied());
    let output = cmd::capture(&mut command, Some(LIMIT))?;
    Ok(match output.end {
        End::Exited(status) if status.success() && output.stdout.contains("1 passed") => Ok(()),
        End::Exited(_) => Err(output.stderr),
        End::TimedOut => Err(format!("stopped after {} s", LIMIT.as_secs())),
    })
}

/// Whether a test failed as it must with its mistake: in which words, or what is wrong.
fn judge(plant: &Plant, outcome: std::result::Result<(), String>) -> Result<String> {
    let Plant { program, test, mutant, says } = plant;
    let Err(text) = outcome else { return Err(format!("{test} does not catch `{mutant}`")) };
    let told = text.lines().find_map(|line| line.strip_prefix(program.found));
    match told {
        Some(told) if told.contains(says.as_str()) => Ok(told.chars().take(120).collect()),
        _ => Err(format!("{test} fails with `{mutant}`, but not by its check: {}", first_panic(&text))),
    }
}

fn first_panic(text: &str) -> String {
    model::reason(text).unwrap_or_else(|| text.lines().last().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEST: &str = "// catches: a\n// says: is free\n#[test]\nfn one() {}\n";

    fn plant(program: &'static Program, mutant: &str, says: &str) -> Plant {
        Plant { program, test: "one".into(), mutant: mutant.into(), says: says.into() }
    }

    #[test]
    fn a_test_says_what_it_catches_and_in_which_words() {
        let [exact, oracle, ..] = &PROGRAMS;
        let source = Source::parse("tests.rs", TEST).expect("Rust");
        assert_eq!(plants(exact, &source), Ok(vec![plant(exact, "a", "is free")]));
        let text = "// catches: a, b\n// catches: c\n#[test]\nfn one() {}\n#[test]\nfn other() {}\n";
        let source = Source::parse("tests.rs", text).expect("Rust");
        assert!(plants(exact, &source).is_err());
        assert_eq!(plants(oracle, &source), Ok(["a", "b", "c"].map(|name| plant(oracle, name, "")).into()));
    }

    #[test]
    fn a_test_must_fail_and_by_its_check() {
        let plant = plant(&PROGRAMS[0], "a", "is free");
        let said = |text: &str| judge(&plant, Err(text.into()));
        assert_eq!(said("x\nthe machine found a mistake: it is free\n"), Ok("it is free".into()));
        assert!(said("the machine found a mistake: it is empty").is_err());
        assert!(said("assertion failed: it is free").is_err());
        assert!(judge(&plant, Ok(())).is_err());
    }
}
