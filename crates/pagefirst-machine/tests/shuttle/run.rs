//! Runs a test under one schedule after another, and says how to run one that failed again.

use super::scheduler::{Dice, Now, Seeds};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};
use std::io::Write;
use std::str::FromStr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

fn variable<T: FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is `{text}`")))
}

/// What the threads of the schedule under way did.
static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn told() -> MutexGuard<'static, Vec<String>> {
    TOLD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes what a thread does, to be told if the schedule fails.
pub fn tell(what: impl FnOnce() -> String) {
    told().push(what());
}

pub fn explore(name: &'static str, test: impl Fn(&mut Dice, usize) + Send + Sync + 'static) {
    let first = variable("PAGEFIRST_SEED").unwrap_or(1);
    let runs = variable("PAGEFIRST_RUNS").unwrap_or(1000);
    let minutes: Option<f64> = variable("PAGEFIRST_MINUTES");
    let fixed = variable("PAGEFIRST_THREADS");
    let start = Instant::now();
    let now = Arc::new(Now::default());
    let deadline = minutes.map(|minutes| start + Duration::from_secs_f64(minutes * 60.0));
    let mut config = Config::new();
    config.stack_size = 256 << 10;
    config.silence_warnings = true;
    config.failure_persistence = FailurePersistence::None;
    config.max_steps = MaxSteps::FailAfter(10_000_000);
    let seeds = Seeds::new(first, runs, deadline, now.clone());
    let failing = now.clone();
    std::panic::set_hook(Box::new(move |info| {
        let (seed, steps) = (failing.seed.load(Relaxed), failing.steps.load(Relaxed));
        let text = format!(
            "{}\n{info}\nfailed: {name}, schedule {seed}, after {steps} steps ({:016x})\nagain: cargo xtask shuttle --seed {seed} --runs 1 {name}\n",
            told().join("\n"),
            failing.hash.load(Relaxed)
        );
        // Past the capture of tests; and nothing is unwound, which would call the library again.
        let _ = std::io::stderr().write_all(text.as_bytes());
        std::process::exit(101);
    }));
    let (all, inside) = (Arc::new(std::sync::atomic::AtomicU64::new(0)), now.clone());
    let sum = all.clone();
    let n = Runner::new(seeds, config).run(move || {
        told().clear();
        let mut dice = Dice::new(!inside.seed.load(Relaxed));
        let threads = fixed.unwrap_or_else(|| [2, 2, 2, 3, 3, 4, 6, 8][dice.below(8) as usize]);
        test(&mut dice, threads);
        sum.fetch_add(inside.steps.load(Relaxed), Relaxed);
    });
    let _ = std::panic::take_hook();
    let steps = all.load(Relaxed) / (n as u64).max(1);
    println!(
        "{name}: {n} schedules from seed {first}, {steps} steps each, {:.1} s",
        start.elapsed().as_secs_f64()
    );
}
