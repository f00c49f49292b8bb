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
//! roles rotated are two tests, and both must catch it (loom may never show a new value to one of the threads). A model fails
//! by a check of its own (the model's machine has some, one of them of how often a role spins), or because loom saw two accesses
//! race or all threads wait. If it dies otherwise (the library panics, a loop has no end for loom, the process is killed), that is no
//! catch, and is told.
//!
//! A mistake that shows whatever the order of a model's roles needs no race. So each model is run once more, with its roles
//! played in turn and the mistake made, and must pass in one rotation at least. (What shows in some order a plain test can
//! find as well, if it knows the order.) A few are named all the same, by a line of their own (`// catches in turn: NAME`):
//! those that leave out a whole step.
//!
//! A model that names nothing, and a mistake that nobody names, models or `cargo xtask plants`, fail the task; so does one
//! that runs all models and takes more than four minutes for them. The library is compiled once: all mistakes are in its test
//! program, and one is chosen when it runs (`pagefirst::planted`).
//!
//! `--mutants` asks besides what each mistake that models name does to the others. It must live in all of them, unless it
//! shows there in turn (in every order, or in one if some model names it so): what a model names is all that its race catches,
//! and a mistake whose models are taken away is found by none. A model that never comes to the place of a mistake is not run
//! with it: it would do what it does without. This takes most of an hour on two CPUs; a filter keeps some of the models, with
//! the mistakes that those name. Whether the library's plain tests find a mistake as well is said, and is no failure: they run
//! one schedule, and a model all.
//!
//! `--deep` lets each model preempt its threads once more often. Of some that is too much to see the end of: they go on for five
//! minutes, and are told. It is not part of CI.

mod plan;
mod run;

pub(crate) use plan::reason;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Result;
use crate::cmd::{self, End};
use crate::plants;
use crate::rust_source::{Source, rust_files};
use plan::Plan;
use run::{Job, Run, Verdict, run_jobs};

/// How long all models may take, each with the mistakes that it names.
const BUDGET: Duration = Duration::from_secs(240);
/// Names the mistake to make to the library's test program.
pub(crate) const MUTANT: &str = "PAGEFIRST_MUTANT";

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
        Duration::from_secs(if self.deep { 600 } else { 200 })
    }
    /// How long one model looks, if there are too many orders.
    fn looks(&self) -> Duration {
        self.limit() / 2
    }
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

    let start = Instant::now();
    let mut runs = run_jobs(plain_jobs(&plan), &program, &options)?;
    runs.extend(run_jobs(mutant_jobs(&plan, &runs, options.mutants), &program, &options)?);
    let in_turn = run_jobs(jobs_in_turn(&plan, &runs), &program, &options)?;
    let time = start.elapsed();

    let mut problems = plan.problems();
    report(&plan, &runs, &in_turn, &mut problems);
    if options.deep {
        let is_cut = |run: &&Run| run.job.mutant.is_none() && run.time >= options.looks();
        let cut: Vec<&str> = runs.iter().filter(is_cut).map(|run| run.job.model.as_str()).collect();
        println!("not to their ends, in {} s: {}: {}", options.looks().as_secs(), cut.len(), cut.join(", "));
    }
    if options.mutants {
        report_plain_tests(&plan, &options)?;
    }
    println!("{:.0} s", time.as_secs_f64());
    if time > BUDGET && options == Options::default() {
        problems.push(format!("all took {} s, and may take {}", time.as_secs(), BUDGET.as_secs()));
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

/// All models without a mistake.
fn plain_jobs(plan: &Plan) -> Vec<Job> {
    let job = |model| Job { model, mutant: None, must_fail: false, in_turn: false };
    plan.models().into_iter().map(job).collect()
}

/// Each model with the mistakes that it names; if asked for, with all others as well to whose places it came in `plain` runs.
fn mutant_jobs(plan: &Plan, plain: &[Run], all: bool) -> Vec<Job> {
    let mut jobs = Vec::new();
    for mutant in plan.by_mutant().keys() {
        for Run { job: Job { model, .. }, passed, .. } in plain {
            let must_fail = plan.catches(model).contains(mutant);
            if must_fail || all && passed.contains(*mutant) {
                let (model, mutant) = (model.clone(), Some((*mutant).to_owned()));
                jobs.push(Job { model, mutant, must_fail, in_turn: false });
            }
        }
    }
    jobs
}

/// All rotations of the models that failed with a mistake or should have, with their roles in turn.
fn jobs_in_turn(plan: &Plan, runs: &[Run]) -> Vec<Job> {
    let mut pairs = BTreeSet::new();
    for Run { job, verdict, .. } in runs {
        if let Some(mutant) = &job.mutant
            && (job.must_fail || !matches!(verdict, Verdict::Passed))
        {
            pairs.extend(plan.rotations(&job.model).iter().map(|model| (model.clone(), mutant.clone())));
        }
    }
    let job = |(model, mutant)| Job { model, mutant: Some(mutant), must_fail: false, in_turn: true };
    pairs.into_iter().map(job).collect()
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
fn report(plan: &Plan, runs: &[Run], in_turn: &[Run], problems: &mut Vec<String>) {
    let mut by_model: BTreeMap<&str, Vec<&Run>> = BTreeMap::new();
    for run in runs {
        by_model.entry(&run.job.model).or_default().push(run);
        let excused =
            run.job.mutant.as_deref().is_some_and(|mutant| is_excused(plan, &run.job.model, mutant, in_turn));
        problems.extend(problem(run, excused));
        problems.extend(problem_in_turn(plan, &run.job, in_turn));
    }
    let width = by_model.keys().map(|model| model.len()).max().unwrap_or(0);
    for (model, runs) in &by_model {
        let plain = runs.iter().find(|run| run.job.mutant.is_none());
        let time = plain.map_or(0.0, |run| run.time.as_secs_f64());
        let caught: Vec<_> = runs.iter().filter_map(|run| run.catch()).collect();
        println!(
            "{model:width$}  {time:6.1} s  {} of {} caught",
            caught.len(),
            plan.catches(model).all().count()
        );
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

/// In which rotations of a model, with its roles in turn, a mistake shows.
fn shows_in_turn(rotations: &[String], mutant: &str, in_turn: &[Run]) -> Vec<bool> {
    let shows = |model: &String| {
        in_turn.iter().any(|Run { job, verdict, .. }| {
            job.model == *model
                && job.mutant.as_deref() == Some(mutant)
                && !matches!(verdict, Verdict::Passed)
        })
    };
    rotations.iter().map(shows).collect()
}

/// Whether a mistake shows in every rotation of a model with its roles in turn.
fn needs_no_race(rotations: &[String], mutant: &str, in_turn: &[Run]) -> bool {
    shows_in_turn(rotations, mutant, in_turn).into_iter().all(|shows| shows)
}

/// Whether a model need not name a mistake that it catches: it needs no race there. For one that is known to need none
/// somewhere, one order of the roles is enough to show that.
fn is_excused(plan: &Plan, model: &str, mutant: &str, in_turn: &[Run]) -> bool {
    let rotations = plan.rotations(model);
    needs_no_race(rotations, mutant, in_turn)
        || plan.is_known_in_turn(mutant) && shows_in_turn(rotations, mutant, in_turn).contains(&true)
}

/// What is wrong with one that ran, with a mistake that needs no race or that does.
fn problem(
    Run { job: Job { model, mutant, must_fail, .. }, verdict, time, .. }: &Run,
    excused: bool,
) -> Option<String> {
    let limit = time.as_secs();
    match (mutant, verdict) {
        (None, Verdict::Caught(why) | Verdict::Died(why)) => Some(format!("{model} fails: {why}")),
        (None, Verdict::TimedOut) => Some(format!("{model} was stopped after {limit} s")),
        (Some(mutant), Verdict::Passed) if *must_fail => Some(format!("{model} does not catch `{mutant}`")),
        (Some(mutant), Verdict::Died(why)) if *must_fail => {
            Some(format!("{model} dies with `{mutant}`, and not by a check of its own: {why}"))
        }
        (Some(mutant), Verdict::TimedOut) if *must_fail || !excused => {
            Some(format!("{model} with `{mutant}` was stopped after {limit} s"))
        }
        (Some(mutant), Verdict::Caught(why) | Verdict::Died(why)) if !must_fail && !excused => {
            Some(format!("{model} catches `{mutant}` and does not say so: {why}"))
        }
        (_, Verdict::Passed) | (Some(_), Verdict::Caught(_) | Verdict::Died(_) | Verdict::TimedOut) => None,
    }
}

/// Whether a mistake that a model names shows in turn, and it says so, or does not, and it says that.
fn problem_in_turn(plan: &Plan, job: &Job, in_turn: &[Run]) -> Option<String> {
    let (model, mutant) = (&job.model, job.mutant.as_deref()?);
    let shows = needs_no_race(plan.rotations(model), mutant, in_turn);
    let catches = plan.catches(model);
    if catches.racing.contains(mutant) && shows {
        return Some(format!(
            "{model} catches `{mutant}` without a race, in all rotations (`catches in turn`?)"
        ));
    }
    (catches.in_turn.contains(mutant) && !shows)
        .then(|| format!("{model} with `{mutant}` passes in turn, and says that it does not"))
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

    fn ran(model: &str, mutant: Option<&str>, must_fail: bool, verdict: Verdict) -> Run {
        let mutant = mutant.map(str::to_owned);
        let job = Job { model: model.into(), mutant, must_fail, in_turn: false };
        Run { job, verdict, passed: BTreeSet::new(), time: Duration::from_secs(1) }
    }

    #[test]
    fn a_named_mistake_must_fail_and_nothing_else_may() {
        let run = |mutant, must_fail, verdict| problem(&ran("m", mutant, must_fail, verdict), false);
        let caught = || Verdict::Caught("why".into());
        let died = || Verdict::Died("why".into());
        assert_eq!(run(None, false, Verdict::Passed), None);
        assert_eq!(run(Some("x"), true, caught()), None);
        assert_eq!(run(Some("x"), false, Verdict::Passed), None);
        assert_eq!(run(Some("x"), true, Verdict::Passed).as_deref(), Some("m does not catch `x`"));
        assert_eq!(
            run(Some("x"), false, caught()).as_deref(),
            Some("m catches `x` and does not say so: why")
        );
        assert_eq!(
            run(Some("x"), true, died()).as_deref(),
            Some("m dies with `x`, and not by a check of its own: why")
        );
        assert!(run(Some("x"), false, died()).is_some());
        assert_eq!(run(None, false, caught()).as_deref(), Some("m fails: why"));
        assert_eq!(run(None, false, died()).as_deref(), Some("m fails: why"));
        assert!(run(None, false, Verdict::TimedOut).is_some());
        assert!(run(Some("x"), true, Verdict::TimedOut).is_some());
    }

    #[test]
    fn a_mistake_that_needs_no_race_need_not_be_named() {
        let in_turn = |verdict| {
            [
                ran("m_main_0", Some("x"), false, Verdict::Caught("why".into())),
                ran("m_main_1", Some("x"), false, verdict),
            ]
        };
        let rotations = ["m_main_0".to_owned(), "m_main_1".to_owned()];
        assert!(needs_no_race(&rotations, "x", &in_turn(Verdict::Died("why".into()))));
        assert!(!needs_no_race(&rotations, "x", &in_turn(Verdict::Passed)));
        assert!(!needs_no_race(&rotations, "y", &in_turn(Verdict::Died("why".into()))));
        let caught = |must_fail| ran("m_main_0", Some("x"), must_fail, Verdict::Died("why".into()));
        assert_eq!(problem(&caught(false), true), None);
        assert!(problem(&caught(true), true).is_some());
    }

    #[test]
    fn options_come_in_any_order() {
        let parsed = Options::parse(&["--deep", "r14", "--mutants"]);
        assert_eq!(parsed, Ok(Options { filter: Some("r14"), mutants: true, deep: true }));
        assert!(Options::parse(&["a", "b"]).is_err() && Options::parse(&["--dep"]).is_err());
    }
}
