//! `cargo xtask shuttle`: random schedules of the whole stack, each known by its seed.
//!
//! The tests of `crates/pagefirst-machine/tests/shuttle.rs` are compiled under `cfg(shuttle)`, in a folder of their own.
//! A process runs so many schedules of a test, from one seed on, and two run at a time: a schedule is one thread of the
//! host, and its machine is not given back. The first failure ends all, and tells the seed that runs it again.

mod mutants;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::cmd::{self, End};
use crate::{Result, model};

/// Schedules that one process runs.
const ROUND: u64 = 500;
/// Schedules of each test in the short form, which CI runs.
const SHORT: u64 = 3000;
/// Processes at a time.
const RUNNERS: usize = 2;
/// How long one process may run.
const LIMIT: Duration = Duration::from_secs(300);

/// What was asked for.
#[derive(Default, PartialEq, Eq, Debug)]
struct Options {
    seed: Option<u64>,
    runs: Option<u64>,
    time: Option<Duration>,
    threads: Option<u64>,
    test: Option<String>,
}

impl Options {
    fn parse(args: &[&str]) -> Result<Self> {
        let mut options = Options::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut number = || {
                let value = args.next().ok_or_else(|| format!("{arg} wants a number"))?;
                value.parse::<u64>().map_err(|_| format!("{arg} {value}: that is no number"))
            };
            match *arg {
                "--seed" => options.seed = Some(number()?),
                "--runs" => options.runs = Some(number()?),
                "--minutes" => options.time = Some(Duration::from_secs(60 * number()?)),
                "--threads" => options.threads = Some(number()?),
                test if !test.starts_with('-') && options.test.is_none() => options.test = Some(test.into()),
                other => return Err(format!("cannot do `shuttle {other}`")),
            }
        }
        if options.time.is_some() && options.runs.is_some() {
            return Err("either --runs or --minutes".into());
        }
        Ok(options)
    }
}

/// So many schedules of one test, from a seed on.
struct Job {
    test: String,
    seed: u64,
    runs: u64,
}

/// Runs what the arguments ask for; without any, the short form, and the mistakes that must be found.
pub(crate) fn run(args: &[&str]) -> Result {
    match args {
        ["--mutants"] => return mutants::run(&compile()?, None),
        ["--mutants", filter] => return mutants::run(&compile()?, Some(filter)),
        _ => {}
    }
    let options = Options::parse(args)?;
    let program = compile()?;
    let mut tests = model::list(Command::new(&program))?;
    if let Some(test) = &options.test {
        tests.retain(|name| name == test);
    }
    if tests.is_empty() {
        return Err(format!("there is no test `{}`", options.test.unwrap_or_default()));
    }
    let deadline = options.time.map(|time| Instant::now() + time);
    // Fresh where time is given; what CI runs is the same each time.
    let fresh = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs() << 20);
    let seed = options.seed.unwrap_or(if deadline.is_some() { fresh } else { 1 });
    let runs = match (options.runs, options.seed, deadline) {
        (Some(runs), _, _) => runs,
        (None, Some(_), None) => 1,
        (None, _, Some(_)) => ROUND,
        (None, None, None) => SHORT,
    };
    let mut seed = seed;
    loop {
        all(&program, &jobs(&tests, seed, runs), options.threads, deadline)?;
        seed += runs;
        if deadline.is_none_or(|deadline| Instant::now() >= deadline) {
            break;
        }
    }
    if args.is_empty() { mutants::run(&program, None) } else { Ok(()) }
}

fn jobs(tests: &[String], seed: u64, runs: u64) -> VecDeque<Job> {
    let rounds = move |test: &String| {
        let test = test.clone();
        let round = move |at: u64| Job { test: test.clone(), seed: seed + at, runs: ROUND.min(runs - at) };
        (0..runs).step_by(ROUND as usize).map(round)
    };
    tests.iter().flat_map(rounds).collect()
}

/// Runs all of these; no more of them are begun after the deadline, or after one has failed.
fn all(program: &Path, jobs: &VecDeque<Job>, threads: Option<u64>, deadline: Option<Instant>) -> Result {
    let queue = Mutex::new(jobs.iter());
    let failed = AtomicBool::new(false);
    let runner = || -> Result {
        loop {
            let next = queue.lock().map_err(|_| "the other runner ended")?.next();
            let is_over = deadline.is_some_and(|deadline| Instant::now() >= deadline) || failed.load(Relaxed);
            let Some(job) = next.filter(|_| !is_over) else { return Ok(()) };
            one(program, job, threads).inspect_err(|_| failed.store(true, Relaxed))?;
        }
    };
    std::thread::scope(|scope| {
        let runners: Vec<_> = (0..RUNNERS).map(|_| scope.spawn(runner)).collect();
        let ends = runners.into_iter().map(|runner| runner.join().unwrap_or(Err("a runner ended".into())));
        ends.collect::<Vec<_>>().into_iter().collect()
    })
}

/// A command that runs so many schedules of a test, from a seed on.
fn program(path: &Path, test: &str, seed: u64, runs: u64) -> Command {
    let mut command = Command::new(path);
    command
        .args(["--exact", test, "--nocapture"])
        .current_dir(cmd::root())
        .env("RUST_BACKTRACE", "0")
        .env("PAGEFIRST_SEED", seed.to_string())
        .env("PAGEFIRST_RUNS", runs.to_string());
    command
}

fn one(path: &Path, Job { test, seed, runs }: &Job, threads: Option<u64>) -> Result {
    let mut command = program(path, test, *seed, *runs);
    if let Some(threads) = threads {
        command.env("PAGEFIRST_THREADS", threads.to_string());
    }
    let output = cmd::capture(&mut command, Some(LIMIT))?;
    let said = |text: &str| text.lines().find(|line| line.starts_with(test.as_str())).map(str::to_owned);
    if output.success() {
        println!("{}", said(&output.stdout).ok_or_else(|| format!("there is no test `{test}`"))?);
        return Ok(());
    }
    eprintln!("{}{}", output.stdout, output.stderr);
    Err(match output.end {
        End::Exited(_) => format!("{test} failed: see above for the seed that runs it again"),
        End::TimedOut => format!("{test} was stopped after {} s, seeds from {seed} on", LIMIT.as_secs()),
    })
}

/// Compiles the tests.
fn compile() -> Result<PathBuf> {
    let start = Instant::now();
    let mut command = cmd::cargo(&["test", "--no-run", "--quiet", "--package", "pagefirst-machine"]);
    command
        .args(["--test", "shuttle", "--message-format", "json-render-diagnostics"])
        .env("RUSTFLAGS", "--cfg shuttle")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_DIR", cmd::target_dir().join("shuttle"))
        .env("CARGO_PROFILE_DEV_OPT_LEVEL", "2")
        .env("CARGO_PROFILE_DEV_DEBUG", "0");
    let what = "compiling the tests for shuttle";
    let messages = cmd::capture(&mut command, None)?.into_stdout(what)?;
    println!("compiled the tests in {:.1} s", start.elapsed().as_secs_f64());
    model::executable(&messages).ok_or_else(|| format!("{what}: cargo named no test program"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_understood_or_refused() {
        let parsed = Options::parse(&["--seed", "7", "--threads", "3", "one"]);
        let expected =
            Options { seed: Some(7), threads: Some(3), test: Some("one".into()), ..Options::default() };
        assert_eq!(parsed, Ok(expected));
        for wrong in [&["--seed"][..], &["--seed", "x"], &["--what"], &["--runs", "1", "--minutes", "1"]] {
            assert!(Options::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn schedules_are_run_in_rounds_without_a_gap() {
        let jobs = jobs(&["a".into(), "b".into()], 5, ROUND + 1);
        let spans: Vec<_> = jobs.iter().map(|job| (job.test.as_str(), job.seed, job.runs)).collect();
        let second = 5 + ROUND;
        assert_eq!(spans, [("a", 5, ROUND), ("a", second, 1), ("b", 5, ROUND), ("b", second, 1)]);
    }
}
