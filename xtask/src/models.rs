//! `cargo xtask models`: the loom models of the library, and the planted mistakes that each must catch.
//!
//! A model is a test of the library, compiled under `cfg(loom)`, with `model` in its path. Directly above its attributes
//! stands what it must catch, one or more names of mistakes planted in the sources (`cfg!(mutant = "NAME")`):
//!
//! ```text
//! // catches: publish_relaxed, skip_alive
//! #[test]
//! fn r02_two_faults_same_empty_range() { … }
//! ```
//!
//! First every model must pass. Then, for each mistake, the library is compiled with it, and every model that names it
//! must fail, one by one (mistakes that only `cargo xtask plants` looks for aside): a model and the same model with its roles rotated are two tests, and both must catch it
//! (loom may never show a new value to one of the threads). A model that names nothing, and a mistake that nobody
//! names, fail the task.
//!
//! Only the library's own test program is compiled again for a mistake, and while the models of one run, the next is
//! compiled.

mod plan;

pub(crate) use plan::reason;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Result;
use crate::cmd::{self, End};
use crate::plants;
use crate::rust_source::{Source, rust_files};
use plan::Plan;

/// How long one model may run.
const MODEL_LIMIT: Duration = Duration::from_secs(90);
/// How long everything together should take at most.
const BUDGET: Duration = Duration::from_secs(240);
/// How many models run at a time beside the compiler.
const RUNNERS: usize = 2;

/// What happened to one model in one variant of the library.
enum Verdict {
    Passed,
    /// Why, in one line.
    Failed(String),
    TimedOut,
}

/// One model that ran.
struct Run {
    model: String,
    /// The planted mistake, or none.
    mutant: Option<String>,
    verdict: Verdict,
    time: Duration,
}

/// One variant of the library that is compiled, and the models that run on it.
struct Job {
    mutant: Option<String>,
    program: PathBuf,
    model: String,
}

/// Runs the models whose path contains `filter`, or all, plain and with their mistakes.
pub(crate) fn run(filter: Option<&str>) -> Result {
    let start = Instant::now();
    let mut plan = Plan::of(&sources()?, plants::caught()?);
    let plain = compile(None)?;
    plan.keep_existing(&list(&plain)?, filter)?;
    println!("compiled the models in {:.1} s", start.elapsed().as_secs_f64());

    let (send, receive) = mpsc::channel();
    let queue = Mutex::new(receive);
    let (runs, compiled) = std::thread::scope(|scope| {
        let runners: Vec<_> = (0..RUNNERS).map(|_| scope.spawn(|| run_jobs(&queue))).collect();
        let compiled = feed(&plan, plain, send);
        let runs = runners.into_iter().flat_map(|runner| runner.join().unwrap_or_default());
        (runs.collect::<Vec<_>>(), compiled)
    });
    let mut problems = plan.problems();
    problems.extend(compiled.err());
    report(&plan, &runs, &mut problems);
    let time = start.elapsed();
    if time > BUDGET {
        println!(
            "this took {:.0} s, more than the {} s that models may take",
            time.as_secs_f64(),
            BUDGET.as_secs()
        );
    }
    if problems.is_empty() { Ok(()) } else { Err(format!("models:\n  {}", problems.join("\n  "))) }
}

fn sources() -> Result<Vec<Source>> {
    let root = cmd::root();
    rust_files(&root, "crates/pagefirst/src")?.iter().map(|path| Source::read(&root, path)).collect()
}

/// The mistakes that are planted in the library.
pub(crate) fn planted() -> Result<BTreeSet<String>> {
    Ok(sources()?.iter().flat_map(Source::mutants).collect())
}

/// Compiles each variant in turn and hands its models to the runners.
fn feed(plan: &Plan, plain: PathBuf, jobs: mpsc::Sender<Job>) -> Result {
    let send = |mutant: Option<&str>, program: &Path, models: &[String]| -> Result {
        for model in models {
            let job =
                Job { mutant: mutant.map(str::to_owned), program: program.into(), model: model.clone() };
            jobs.send(job).map_err(|_| "the threads that run the models have ended")?;
        }
        Ok(())
    };
    send(None, &plain, &plan.models())?;
    for (mutant, models) in plan.by_mutant() {
        send(Some(mutant), &compile(Some(mutant))?, &models)?;
    }
    Ok(())
}

fn run_jobs(queue: &Mutex<mpsc::Receiver<Job>>) -> Vec<Run> {
    let mut runs = Vec::new();
    loop {
        let Ok(Ok(job)) = queue.lock().map(|queue| queue.recv()) else { return runs };
        let start = Instant::now();
        let verdict = judge(&job).unwrap_or_else(Verdict::Failed);
        runs.push(Run { model: job.model, mutant: job.mutant, verdict, time: start.elapsed() });
    }
}

fn judge(job: &Job) -> Result<Verdict> {
    let mut command = test_program(&job.program);
    let output = cmd::capture(command.args(["--exact", &job.model, "--nocapture"]), Some(MODEL_LIMIT))?;
    Ok(match output.end {
        End::TimedOut => Verdict::TimedOut,
        End::Exited(status) if status.success() => Verdict::Passed,
        End::Exited(status) => Verdict::Failed(reason(&output.stderr).unwrap_or_else(|| status.to_string())),
    })
}

/// Compiles the library's tests under loom, with one planted mistake or none, and keeps a copy of the program: the next
/// variant is written to the same place.
fn compile(mutant: Option<&str>) -> Result<PathBuf> {
    let target = cmd::target_dir().join("loom");
    let mut command =
        cmd::cargo(&["rustc", "--package", "pagefirst", "--lib", "--profile", "test", "--quiet"]);
    command.args(["--message-format", "json-render-diagnostics"]);
    if let Some(mutant) = mutant {
        // To the library alone, not by RUSTFLAGS, which would compile loom again as well.
        command.args(["--", "--cfg", &format!("mutant=\"{mutant}\""), "--allow", "warnings"]);
    }
    command
        .env("RUSTFLAGS", "--cfg loom")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_DIR", &target);
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
    let what = mutant
        .map_or("compiling the models".to_owned(), |name| format!("compiling the models with `{name}`"));
    let program = executable(&cmd::capture(&mut command, None)?.into_stdout(&what)?)
        .ok_or_else(|| format!("{what}: cargo named no test program"))?;
    let copy = target.join(format!("models-{}", mutant.unwrap_or("plain")));
    std::fs::copy(&program, &copy).map_err(|e| format!("cannot copy {}: {e}", program.display()))?;
    Ok(copy)
}

pub(crate) fn executable(messages: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from)).next_back()
}

/// The paths of the models in a test program.
fn list(program: &Path) -> Result<Vec<String>> {
    let text = cmd::capture(test_program(program).arg("--list"), Some(MODEL_LIMIT))?
        .into_stdout("listing the models")?;
    let tests = text.lines().filter_map(|line| line.strip_suffix(": test"));
    Ok(tests.filter(|path| path.contains("model")).map(str::to_owned).collect())
}

/// A command that runs a test program without what a person may have set for loom.
fn test_program(program: &Path) -> Command {
    let mut command = Command::new(program);
    let is_loom = |name: &OsString| name.to_string_lossy().starts_with("LOOM_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_loom(name)) {
        command.env_remove(name);
    }
    command.current_dir(cmd::root().join("crates/pagefirst")).env("RUST_BACKTRACE", "0");
    command
}

/// Prints what each model did, and adds what was wrong to `problems`.
fn report(plan: &Plan, runs: &[Run], problems: &mut Vec<String>) {
    let mut by_model: BTreeMap<&str, Vec<&Run>> = BTreeMap::new();
    for run in runs {
        by_model.entry(&run.model).or_default().push(run);
        problems.extend(problem(run));
    }
    let width = by_model.keys().map(|model| model.len()).max().unwrap_or(0);
    for (model, runs) in &by_model {
        let plain = runs.iter().find(|run| run.mutant.is_none());
        let time = plain.map_or(0.0, |run| run.time.as_secs_f64());
        let caught =
            runs.iter().filter(|run| run.mutant.is_some() && matches!(run.verdict, Verdict::Failed(_)));
        println!("{model:width$}  {time:6.1} s  {} of {} caught", caught.count(), plan.catches(model).len());
        for run in runs {
            if let (Some(mutant), Verdict::Failed(why)) = (&run.mutant, &run.verdict) {
                println!("    {mutant} ({:.1} s): {why}", run.time.as_secs_f64());
            }
        }
    }
    let caught = runs.iter().filter(|run| run.mutant.is_some()).count();
    println!(
        "{} models; {} planted mistakes; {caught} runs with one",
        by_model.len(),
        plan.by_mutant().len()
    );
}

fn problem(run: &Run) -> Option<String> {
    let Run { model, mutant, verdict, time } = run;
    let limit = time.as_secs();
    match (mutant, verdict) {
        (None, Verdict::Passed) | (Some(_), Verdict::Failed(_)) => None,
        (None, Verdict::Failed(why)) => Some(format!("{model} fails: {why}")),
        (None, Verdict::TimedOut) => Some(format!("{model} was stopped after {limit} s")),
        (Some(mutant), Verdict::Passed) => Some(format!("{model} does not catch `{mutant}`")),
        (Some(mutant), Verdict::TimedOut) => {
            Some(format!("{model} with `{mutant}` was stopped after {limit} s"))
        }
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
    fn a_mistake_must_fail_and_nothing_else_may() {
        let run = |mutant: Option<&str>, verdict| {
            let mutant = mutant.map(str::to_owned);
            problem(&Run { model: "m".into(), mutant, verdict, time: Duration::from_secs(1) })
        };
        assert_eq!(run(None, Verdict::Passed), None);
        assert_eq!(run(Some("x"), Verdict::Failed("why".into())), None);
        assert_eq!(run(Some("x"), Verdict::Passed).as_deref(), Some("m does not catch `x`"));
        assert_eq!(run(None, Verdict::Failed("why".into())).as_deref(), Some("m fails: why"));
        assert!(run(None, Verdict::TimedOut).is_some() && run(Some("x"), Verdict::TimedOut).is_some());
    }
}
