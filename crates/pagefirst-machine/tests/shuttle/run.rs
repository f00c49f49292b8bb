//! Runs a test under one schedule after another, and says how to run one that failed again.

use super::scheduler::{Dice, Now, Seeds};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};
use std::io::Write;
use std::str::FromStr;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Bytes of a thread's stack.
const STACK: usize = 256 << 10;
/// A schedule that takes more steps does not end.
const STEPS: usize = 10_000_000;

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

/// Runs the test under as many schedules as are asked for, each so many times, which must not differ. It is given chance, and
/// a number of threads.
pub fn explore(name: &'static str, times: u64, test: impl Fn(&mut Dice, usize) + Send + Sync + 'static) {
    let first = variable("PAGEFIRST_SEED").unwrap_or(1);
    let runs = variable("PAGEFIRST_RUNS").unwrap_or(500);
    let fixed: Option<usize> = variable("PAGEFIRST_THREADS");
    let (start, now) = (Instant::now(), Arc::new(Now::default()));
    let mut config = Config::new();
    config.stack_size = STACK;
    config.silence_warnings = true;
    config.failure_persistence = FailurePersistence::None;
    config.max_steps = MaxSteps::FailAfter(STEPS);
    let failing = now.clone();
    std::panic::set_hook(Box::new(move |info| {
        let (seed, steps, hash) = (&failing.seed, &failing.steps, &failing.hash);
        let (seed, steps, hash) = (seed.load(Relaxed), steps.load(Relaxed), hash.load(Relaxed));
        let threads = fixed.map(|threads| format!(" --threads {threads}")).unwrap_or_default();
        let text = format!(
            "{}\n{info}\nfailed: {name}, schedule {seed}, after {steps} steps ({hash:016x})\n\
             again: cargo xtask shuttle --seed {seed}{threads} {name}\n",
            told().join("\n"),
        );
        // Past the capture of tests. Nothing is unwound, which would call the library again.
        let _ = std::io::stderr().write_all(text.as_bytes());
        std::process::exit(101);
    }));
    let (inside, sum) = (now.clone(), Arc::new(AtomicU64::new(0)));
    let all = sum.clone();
    let n = Runner::new(Seeds::new(first..first + runs, times, now), config).run(move || {
        told().clear();
        let mut dice = Dice::new(!inside.seed.load(Relaxed));
        let threads = [2, 2, 2, 3, 3, 4, 6, 8][dice.below(8) as usize];
        test(&mut dice, fixed.unwrap_or(threads));
        sum.fetch_add(inside.steps.load(Relaxed), Relaxed);
    });
    drop(std::panic::take_hook());
    let steps = all.load(Relaxed) / n.max(1) as u64;
    let seconds = start.elapsed().as_secs_f64();
    println!("{name}: {n} schedules from seed {first} on, {steps} steps each, {seconds:.1} s");
}
