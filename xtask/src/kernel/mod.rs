//! `cargo xtask kernel`: the tiny kernel (`examples/tiny-kernel`) on QEMU's software emulation.
//!
//! 1. The *test run*: two CPUs run the user programs.
//! 2. The *counts*: one CPU counts the instructions of each kind of fault, twice, and both times the same. A third run
//!    has the plugin that says which code they belong to.
//! 3. The *lines*: two CPUs run the same case at the same time, and the plugin says which cache lines both store to.
//! 4. The *stress*: two CPUs do all that the library does, at once.
//!
//! All of them end by themselves, with a word of their own from the kernel.

mod counts;
mod lines;
mod peers;
mod plugin;
mod profile;
mod run;
mod symbols;

use crate::Result;

/// What was asked for.
#[derive(Default, PartialEq, Eq, Debug)]
struct Options {
    only: Option<Only>,
    is_kvm: bool,
    repeat: Option<run::Repeat>,
    profile: Option<String>,
    seed: Option<u64>,
}

/// Seconds of a short stress.
const SHORT: u64 = 10;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Only {
    Test,
    Count,
    Lines,
    Stress,
}

/// Builds the kernel and runs it.
pub(crate) fn run(args: &[&str]) -> Result {
    let options = parse(args)?;
    let built = run::build("boot")?;
    if let Some(case) = &options.profile {
        return profile::run(&built, case);
    }
    if let Some(repeat) = options.repeat.filter(|_| options.only != Some(Only::Stress)) {
        return run::repeat(&built, options.is_kvm, repeat);
    }
    let is_wanted = |only| options.only.is_none_or(|wanted| wanted == only);
    if is_wanted(Only::Test) {
        run::test(&built, options.is_kvm)?;
    }
    if is_wanted(Only::Count) {
        counts::run(&built)?;
    }
    if is_wanted(Only::Lines) {
        lines::run(&built, options.only.is_some())?;
    }
    if is_wanted(Only::Stress) {
        let seconds = match options.repeat {
            Some(run::Repeat::Minutes(minutes)) => (minutes * 60.0).ceil() as u64,
            Some(run::Repeat::Boots(_)) => return Err("the stress runs for `--minutes`".into()),
            None => SHORT,
        };
        run::stress(&run::build("boot,stress")?, options.is_kvm, options.seed.unwrap_or(1), seconds)?;
    }
    Ok(())
}

/// The test run with five levels of page tables.
pub(crate) fn la57() -> Result {
    run::test(&run::build("boot,la57")?, false)
}

fn parse(args: &[&str]) -> Result<Options> {
    let mut options = Options::default();
    let mut args = args.iter();
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("`{name}` needs a value"))?;
        let bad = || format!("`{value}` will not do for `{name}`");
        match (*name, *value) {
            ("--only", "test") => options.only = Some(Only::Test),
            ("--only", "count") => options.only = Some(Only::Count),
            ("--only", "lines") => options.only = Some(Only::Lines),
            ("--only", "stress") => options.only = Some(Only::Stress),
            ("--seed", seed) => options.seed = Some(seed.parse().map_err(|_| bad())?),
            ("--accel", "tcg") => options.is_kvm = false,
            ("--accel", "kvm") => options.is_kvm = true,
            ("--boots", boots) => {
                let boots = boots.parse().ok().filter(|boots| *boots > 0).ok_or_else(bad)?;
                options.repeat = Some(run::Repeat::Boots(boots));
            }
            ("--minutes", minutes) => {
                let minutes = minutes.parse().ok().filter(|m: &f64| m.is_finite() && *m > 0.0);
                options.repeat = Some(run::Repeat::Minutes(minutes.ok_or_else(bad)?));
            }
            ("--profile", case) => options.profile = Some(case.into()),
            _ => return Err(format!("the kernel has no option `{name} {value}`")),
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read() {
        let options = parse(&["--only", "lines", "--accel", "kvm"]).expect("they are valid");
        assert_eq!(options, Options { only: Some(Only::Lines), is_kvm: true, ..Options::default() });
        let options = parse(&["--boots", "1000"]).expect("they are valid");
        assert_eq!(options.repeat, Some(run::Repeat::Boots(1000)));
        let options = parse(&["--only", "stress", "--minutes", "10", "--seed", "7"]).expect("they are valid");
        assert_eq!((options.only, options.seed), (Some(Only::Stress), Some(7)));
        for wrong in [["--seed", "x"], ["--boots", "0"], ["--minutes", "nan"], ["--minutes", "-5"]] {
            assert!(parse(&wrong).is_err());
        }
        assert!(parse(&["--boots", "x"]).is_err() && parse(&["--boots"]).is_err());
        assert!(parse(&["--only", "some"]).is_err());
    }
}
