//! Running models, and what their ends say.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::{Options, plan, test_program};
use crate::Result;
use crate::cmd::{self, End};

/// How many models run at a time.
const RUNNERS: usize = 2;
/// Says to the test program how many preemptions more are allowed.
const DEEPER: &str = "PAGEFIRST_DEEPER";
/// And how many seconds it looks at most.
const SECONDS: &str = "PAGEFIRST_SECONDS";
/// Asks it for the roles to be played in turn.
const IN_TURN: &str = "PAGEFIRST_IN_TURN";
/// Asks it which mistakes could have been made, each told in a line that begins so.
const TELL: &str = "PAGEFIRST_TELL_MUTANTS";
const TOLD: &str = "a place for ";

/// What happened to one model.
#[derive(Debug)]
pub(super) enum Verdict {
    Passed,
    /// A check of the model, or loom's of its accesses, failed: which, in one line.
    Caught(String),
    /// It ended by anything else.
    Died(String),
    TimedOut,
}

/// A model to run, with a planted mistake or none.
#[derive(Clone)]
pub(super) struct Job {
    pub(super) model: String,
    pub(super) mutant: Option<String>,
    /// The model says that it catches the mistake.
    pub(super) must_fail: bool,
    /// Its roles do not race.
    pub(super) in_turn: bool,
}

/// One that ran.
pub(super) struct Run {
    pub(super) job: Job,
    pub(super) verdict: Verdict,
    /// The mistakes whose places it came to, if it ran without one.
    pub(super) passed: BTreeSet<String>,
    pub(super) time: Duration,
}

impl Run {
    /// The mistake that was caught, how, and when.
    pub(super) fn catch(&self) -> Option<(&str, &str, Duration)> {
        match (&self.job.mutant, &self.verdict) {
            (Some(mutant), Verdict::Caught(why)) => Some((mutant, why, self.time)),
            _ => None,
        }
    }
}

/// Runs the jobs, some at a time.
pub(super) fn run_jobs(jobs: Vec<Job>, program: &Path, options: &Options<'_>) -> Result<Vec<Run>> {
    let bar = ProgressBar::new(jobs.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{pos} of {len} runs [{bar:40}] {eta}  {msg}") {
        bar.set_style(style);
    }
    let queue = Mutex::new(jobs.into_iter());
    let runner = || {
        let mut runs = Vec::new();
        while let Some(job) = queue.lock().ok().and_then(|mut queue| queue.next()) {
            let start = Instant::now();
            bar.set_message(job.model.clone());
            let (verdict, passed) =
                judge(&job, program, options).unwrap_or_else(|why| (Verdict::Died(why), BTreeSet::new()));
            bar.inc(1);
            runs.push(Run { job, verdict, passed, time: start.elapsed() });
        }
        runs
    };
    std::thread::scope(|scope| {
        let runners: Vec<_> = (0..RUNNERS).map(|_| scope.spawn(runner)).collect();
        let runs =
            runners.into_iter().map(|runner| runner.join().map_err(|_| "a runner panicked".to_owned()));
        let runs = runs.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        bar.finish_and_clear();
        Ok(runs)
    })
}

/// Runs one; tells as well to the places of which mistakes it came, if it makes none.
fn judge(job: &Job, program: &Path, options: &Options<'_>) -> Result<(Verdict, BTreeSet<String>)> {
    let mut command = test_program(program, job.mutant.as_deref());
    if options.deep {
        command.env(DEEPER, "1").env(SECONDS, options.looks().as_secs().to_string());
    }
    if job.in_turn {
        command.env(IN_TURN, "1");
    }
    if job.mutant.is_none() {
        command.env(TELL, "1");
    }
    let output = cmd::capture(command.args(["--exact", &job.model, "--nocapture"]), Some(options.limit()))?;
    // Behind what the test program itself has begun to say in that line.
    let told = |line: &str| line.split_once(TOLD).map(|(_, mutant)| mutant.to_owned());
    let verdict = match output.end {
        End::TimedOut => Verdict::TimedOut,
        End::Exited(status) => verdict(status, &output.stderr),
    };
    Ok((verdict, output.stdout.lines().filter_map(told).collect()))
}

fn verdict(status: ExitStatus, stderr: &str) -> Verdict {
    const FAILED: i32 = 101;
    /// The signal by which a process ends that panics while it unwinds.
    const ABORTED: i32 = 6;
    if status.success() {
        return Verdict::Passed;
    }
    let ended = status.code() == Some(FAILED) || status.signal() == Some(ABORTED);
    let why = plan::reason(stderr);
    match why {
        Some(why) if ended && plan::is_meant(stderr) => Verdict::Caught(why),
        Some(why) if ended => Verdict::Died(why),
        _ => Verdict::Died(status.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_models_own_word_is_a_catch() {
        let status = |raw| ExitStatus::from_raw(raw);
        let meant = "thread 'a' panicked at crates/pagefirst/src/table/model/huge.rs:1:2:\na page is lost\n";
        let limit = "thread 'a' panicked at x/loom-0.7.3/src/rt/path.rs:1:2:\nModel exceeded\n";
        assert!(matches!(verdict(status(0), ""), Verdict::Passed));
        assert!(matches!(verdict(status(101 << 8), meant), Verdict::Caught(_)));
        assert!(matches!(verdict(status(6), meant), Verdict::Caught(_)));
        assert!(matches!(verdict(status(101 << 8), limit), Verdict::Died(_)));
        assert!(matches!(verdict(status(11), meant), Verdict::Died(_)));
        assert!(matches!(verdict(status(11), ""), Verdict::Died(_)));
    }
}
