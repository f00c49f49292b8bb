//! `cargo xtask model`: the loom models of the library, and the planted mistakes that each must catch.
//!
//! A model is a test of the library, compiled under `cfg(loom)`, with `model` in its path. Directly above its attributes
//! stand the mistakes that it catches, of those that are planted in the sources (`cfg!(mutant = "NAME")`):
//!
//! ```text
//! // catches: publish_relaxed, lock_ignores_dead
//! #[test]
//! fn r02_two_faults_same_empty_range_main_0() { … }
//! ```
//!
//! First every model must pass. Then each must fail with each mistake that it names: a model and the same model with its
//! roles rotated are two tests, and both must catch it (loom may never show a new value to one of the threads). A model that
//! names nothing, and a mistake that nobody names, models or `cargo xtask plants`, fail the task. The library is compiled
//! once: all mistakes are in its test program, and one is chosen when it runs (`pagefirst::planted`).
//!
//! `--mutants` asks besides what each mistake that models name does to the others. It must live in all of them: so a mistake
//! whose models are taken away is found by none, and what a model names is all that it catches. Whether the library's plain
//! tests find it as well is said, and is no failure: they run one schedule, and a model all.
//!
//! `--deep` lets each model preempt its threads once more often, and gives it more time. It is not part of CI.

mod plan;

pub(crate) use plan::reason;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Result;
use crate::cmd::{self, End};
use crate::plants;
use crate::rust_source::{Source, rust_files};
use plan::Plan;

/// How long the short form should take at most.
const BUDGET: Duration = Duration::from_secs(240);
/// How many models run at a time.
const RUNNERS: usize = 2;
/// Names the mistake to make to the library's test program.
pub(crate) const MUTANT: &str = "PAGEFIRST_MUTANT";
/// Says there how many preemptions more are allowed.
const DEEPER: &str = "PAGEFIRST_DEEPER";

/// What was asked for.
#[derive(Default, PartialEq, Eq, Debug)]
struct Options<'a> {
    /// What the path of a model has in it.
    filter: Option<&'a str>,
    /// Each mistake against every model.
    mutants: bool,
    deep: bool,
}

impl<'a> Options<'a> {
    fn parse(args: &[&'a str]) -> Result<Self> {
        let mut options = Options::default();
        for arg in args {
            match *arg {
                "--mutants" => options.mutants = true,
                "--deep" => options.deep = true,
                name if !name.starts_with('-') && options.filter.is_none() => options.filter = Some(name),
                other => return Err(format!("model: what is `{other}`?")),
            }
        }
        Ok(options)
    }
    /// How long one model may run.
    fn limit(&self) -> Duration {
        Duration::from_secs(if self.deep { 3600 } else { 200 })
    }
}

/// What happened to one model.
enum Verdict {
    Passed,
    /// Why, in one line.
    Failed(String),
    TimedOut,
}

/// A model to run, with a planted mistake or none.
struct Job {
    model: String,
    mutant: Option<String>,
    /// The model says that it catches the mistake.
    must_fail: bool,
}

/// One that ran.
struct Run {
    job: Job,
    verdict: Verdict,
    time: Duration,
}

/// Runs the models.
pub(crate) fn run(args: &[&str]) -> Result {
    let options = Options::parse(args)?;
    let start = Instant::now();
    let mut plan = Plan::of(&sources()?, plants::caught()?);
    let program = compile(true)?;
    let mut models = list(test_program(&program, None))?;
    models.retain(|path| path.contains("model"));
    plan.keep_existing(&models, options.filter)?;
    println!("compiled the models in {:.1} s", start.elapsed().as_secs_f64());

    let mut problems = plan.problems();
    let runs = run_jobs(jobs(&plan, options.mutants), &program, &options)?;
    report(&plan, &runs, &mut problems);
    if options.mutants {
        report_plain_tests(&plan, &options)?;
    }
    let time = start.elapsed();
    println!("{:.0} s", time.as_secs_f64());
    if time > BUDGET && !options.mutants && !options.deep {
        println!("that is more than the {} s that models may take", BUDGET.as_secs());
    }
    if problems.is_empty() { Ok(()) } else { Err(format!("model:\n  {}", problems.join("\n  "))) }
}

fn sources() -> Result<Vec<Source>> {
    let root = cmd::root();
    rust_files(&root, "crates/pagefirst/src")?.iter().map(|path| Source::read(&root, path)).collect()
}

/// The mistakes that are planted in the library.
pub(crate) fn planted() -> Result<BTreeSet<String>> {
    Ok(sources()?.iter().flat_map(Source::mutants).collect())
}

/// All models without a mistake, and each with those that it names; if asked for, with all others as well.
fn jobs(plan: &Plan, all: bool) -> Vec<Job> {
    let plain = plan.models().into_iter().map(|model| Job { model, mutant: None, must_fail: false });
    let with = plan.by_mutant().into_iter().flat_map(|(mutant, catching)| {
        let models = plan.models().into_iter().filter_map(move |model| {
            let must_fail = catching.contains(&model);
            (must_fail || all).then(|| Job { model, mutant: Some(mutant.to_owned()), must_fail })
        });
        models.collect::<Vec<_>>()
    });
    plain.chain(with).collect()
}

/// Runs the jobs, some at a time.
fn run_jobs(jobs: Vec<Job>, program: &Path, options: &Options<'_>) -> Result<Vec<Run>> {
    let queue = Mutex::new(jobs.into_iter());
    let runner = || {
        let mut runs = Vec::new();
        while let Some(job) = queue.lock().ok().and_then(|mut queue| queue.next()) {
            let start = Instant::now();
            let verdict = judge(&job, program, options).unwrap_or_else(Verdict::Failed);
            runs.push(Run { job, verdict, time: start.elapsed() });
        }
        runs
    };
    std::thread::scope(|scope| {
        let runners: Vec<_> = (0..RUNNERS).map(|_| scope.spawn(runner)).collect();
        let runs =
            runners.into_iter().map(|runner| runner.join().map_err(|_| "a runner panicked".to_owned()));
        Ok(runs.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    })
}

fn judge(job: &Job, program: &Path, options: &Options<'_>) -> Result<Verdict> {
    let mut command = test_program(program, job.mutant.as_deref());
    if options.deep {
        command.env(DEEPER, "1");
    }
    let output = cmd::capture(command.args(["--exact", &job.model, "--nocapture"]), Some(options.limit()))?;
    Ok(match output.end {
        End::TimedOut => Verdict::TimedOut,
        End::Exited(status) if status.success() => Verdict::Passed,
        End::Exited(status) => Verdict::Failed(reason(&output.stderr).unwrap_or_else(|| status.to_string())),
    })
}

/// Compiles the library's tests, the models or the plain ones.
fn compile(loom: bool) -> Result<PathBuf> {
    let mut command =
        cmd::cargo(&["rustc", "--package", "pagefirst", "--lib", "--profile", "test", "--quiet"]);
    command.args(["--message-format", "json-render-diagnostics"]).env_remove("CARGO_ENCODED_RUSTFLAGS");
    if loom {
        command.env("RUSTFLAGS", "--cfg loom").env("CARGO_TARGET_DIR", cmd::target_dir().join("loom"));
        // As `--release`, which `cargo rustc` cannot combine with tests; the models run no faster with more optimisation.
        for (name, value) in [
            ("OPT_LEVEL", "1"),
            ("DEBUG", "0"),
            ("DEBUG_ASSERTIONS", "false"),
            ("OVERFLOW_CHECKS", "false"),
            ("INCREMENTAL", "false"),
        ] {
            command.env(format!("CARGO_PROFILE_TEST_{name}"), value);
        }
    }
    executable(&cmd::capture(&mut command, None)?.into_stdout("compiling the library's tests")?)
        .ok_or_else(|| "cargo named no test program".into())
}

/// The program among what cargo tells of a build.
pub(crate) fn executable(messages: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from)).next_back()
}

/// The paths of the tests in a test program, which this command runs.
pub(crate) fn list(mut program: Command) -> Result<Vec<String>> {
    let text = cmd::capture(program.arg("--list"), Some(Duration::from_secs(60)))?
        .into_stdout("listing the tests")?;
    Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// A command that runs a test program with a mistake or without, and without what a person may have set for loom.
fn test_program(program: &Path, mutant: Option<&str>) -> Command {
    let mut command = Command::new(program);
    let is_ours = |name: &OsString| {
        let name = name.to_string_lossy();
        name.starts_with("LOOM_") || name.starts_with("PAGEFIRST_")
    };
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_ours(name)) {
        command.env_remove(name);
    }
    command.current_dir(cmd::root().join("crates/pagefirst")).env("RUST_BACKTRACE", "0");
    command.envs(mutant.map(|mutant| (MUTANT, mutant)));
    command
}

/// Prints what each model did, and adds what was wrong to `problems`.
fn report(plan: &Plan, runs: &[Run], problems: &mut Vec<String>) {
    let mut by_model: BTreeMap<&str, Vec<&Run>> = BTreeMap::new();
    for run in runs {
        by_model.entry(&run.job.model).or_default().push(run);
        problems.extend(problem(run));
    }
    let width = by_model.keys().map(|model| model.len()).max().unwrap_or(0);
    for (model, runs) in &by_model {
        let plain = runs.iter().find(|run| run.job.mutant.is_none());
        let time = plain.map_or(0.0, |run| run.time.as_secs_f64());
        let caught: Vec<_> = runs.iter().filter_map(|run| run.catch()).collect();
        println!("{model:width$}  {time:6.1} s  {} of {} caught", caught.len(), plan.catches(model).len());
        for (mutant, why, time) in caught {
            println!("    {mutant} ({:.1} s): {why}", time.as_secs_f64());
        }
    }
    println!("each mistake, and how many models of how many that ran with it catch it:");
    for mutant in plan.by_mutant().keys() {
        let with = || runs.iter().filter(|run| run.job.mutant.as_deref() == Some(*mutant));
        println!(
            "    {mutant}: {} of {}",
            with().filter(|run| run.catch().is_some()).count(),
            with().count()
        );
    }
    println!(
        "{} models; {} planted mistakes; {} runs with one",
        by_model.len(),
        plan.by_mutant().len(),
        runs.iter().filter(|run| run.job.mutant.is_some()).count()
    );
}

/// Prints which mistakes the library's plain tests find.
fn report_plain_tests(plan: &Plan, options: &Options<'_>) -> Result {
    let program = compile(false)?;
    let mut lives = Vec::new();
    for mutant in plan.by_mutant().keys() {
        let output = cmd::capture(&mut test_program(&program, Some(mutant)), Some(options.limit()))?;
        match output.end {
            End::Exited(status) if status.success() => lives.push(*mutant),
            End::Exited(_) | End::TimedOut => println!("plain tests of the library find `{mutant}` as well"),
        }
    }
    println!("no plain test of the library finds {}: {}", lives.len(), lives.join(", "));
    Ok(())
}

impl Run {
    /// The mistake that was caught, how, and when.
    fn catch(&self) -> Option<(&str, &str, Duration)> {
        match (&self.job.mutant, &self.verdict) {
            (Some(mutant), Verdict::Failed(why)) => Some((mutant, why, self.time)),
            _ => None,
        }
    }
}

fn problem(Run { job: Job { model, mutant, must_fail }, verdict, time }: &Run) -> Option<String> {
    let limit = time.as_secs();
    match (mutant, verdict) {
        (None, Verdict::Failed(why)) => Some(format!("{model} fails: {why}")),
        (None, Verdict::TimedOut) => Some(format!("{model} was stopped after {limit} s")),
        (Some(mutant), Verdict::Passed) if *must_fail => Some(format!("{model} does not catch `{mutant}`")),
        (Some(mutant), Verdict::Failed(why)) if !must_fail => {
            Some(format!("{model} catches `{mutant}` and does not say so: {why}"))
        }
        (Some(mutant), Verdict::TimedOut) => {
            Some(format!("{model} with `{mutant}` was stopped after {limit} s"))
        }
        (_, Verdict::Passed) | (Some(_), Verdict::Failed(_)) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_program_is_found_among_cargos_messages() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\nnoise\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":\"/x/pagefirst-1\"}\n{\"reason\":\"build-finished\"}";
        assert_eq!(executable(messages), Some(PathBuf::from("/x/pagefirst-1")));
        assert_eq!(executable(""), None);
    }

    #[test]
    fn a_named_mistake_must_fail_and_nothing_else_may() {
        let run = |mutant: Option<&str>, must_fail, verdict| {
            let job = Job { model: "m".into(), mutant: mutant.map(str::to_owned), must_fail };
            problem(&Run { job, verdict, time: Duration::from_secs(1) })
        };
        let failed = || Verdict::Failed("why".into());
        assert_eq!(run(None, false, Verdict::Passed), None);
        assert_eq!(run(Some("x"), true, failed()), None);
        assert_eq!(run(Some("x"), false, Verdict::Passed), None);
        assert_eq!(run(Some("x"), true, Verdict::Passed).as_deref(), Some("m does not catch `x`"));
        assert_eq!(
            run(Some("x"), false, failed()).as_deref(),
            Some("m catches `x` and does not say so: why")
        );
        assert_eq!(run(None, false, failed()).as_deref(), Some("m fails: why"));
        assert!(run(None, false, Verdict::TimedOut).is_some());
        assert!(run(Some("x"), true, Verdict::TimedOut).is_some());
    }

    #[test]
    fn options_come_in_any_order() {
        let parsed = Options::parse(&["--deep", "r14", "--mutants"]);
        assert_eq!(parsed, Ok(Options { filter: Some("r14"), mutants: true, deep: true }));
        assert!(Options::parse(&["a", "b"]).is_err() && Options::parse(&["--dep"]).is_err());
    }
}
