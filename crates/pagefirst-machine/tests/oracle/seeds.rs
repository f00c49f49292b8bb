//! Runs cases from a seed that is printed, and shrinks the one that fails.

use proptest::prelude::*;
use proptest::test_runner::{
    FailurePersistence, FileFailurePersistence, RngAlgorithm, TestError, TestRng, TestRunner,
};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::{self, Debug};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::panic;
use std::str::FromStr;
use std::sync::Once;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// So often, at most, a case that fails is made smaller; `PAGEFIRST_SHRINK` says otherwise, and 0 also that it is not to
/// be remembered.
const SHRINK: u32 = 1500;
/// How often a long run says where it is.
const NEWS: Duration = Duration::from_secs(10);

pub type End = Result<(), Box<dyn Error>>;

fn variable<T: FromStr>(name: &str) -> Result<Option<T>, Box<dyn Error>>
where
    T::Err: Error + 'static,
{
    std::env::var(name).ok().map(|text| text.parse().map_err(Into::into)).transpose()
}

/// Tests at work: a panic in a case is printed once, with the shrunk case, and not each time one is tried.
static AT_WORK: AtomicU64 = AtomicU64::new(0);

struct Quiet;

impl Quiet {
    fn new() -> Quiet {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let usual = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                if AT_WORK.load(Relaxed) == 0 {
                    usual(info);
                }
            }));
        });
        AT_WORK.fetch_add(1, Relaxed);
        Quiet
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        AT_WORK.fetch_sub(1, Relaxed);
    }
}

/// What cases came to, counted, so that one sees what they reach.
#[derive(Default)]
pub struct Tally(BTreeMap<String, u64>);

impl Tally {
    pub fn add(&mut self, what: impl Into<String>, n: u64) {
        *self.0.entry(what.into()).or_default() += n;
    }
    pub fn merge(&mut self, other: Tally) {
        other.0.into_iter().for_each(|(what, n)| self.add(what, n));
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sep = "";
        for (what, n) in &self.0 {
            write!(f, "{sep}{what} {n}")?;
            sep = ", ";
        }
        Ok(())
    }
}

/// Runs `cases` cases of a seed, or seeds for so many minutes as were asked for.
pub fn run<S: Strategy>(
    name: &'static str,
    cases: u32,
    strategy: &S,
    case: impl Fn(S::Value) -> Result<Tally, TestCaseError>,
) -> End
where
    S::Value: Debug,
{
    let cases = variable("PAGEFIRST_CASES")?.unwrap_or(cases);
    let asked = variable("PAGEFIRST_SEED")?;
    let time = Duration::from_secs_f64(variable::<f64>("PAGEFIRST_MINUTES")?.unwrap_or(0.0) * 60.0);
    let start = Instant::now();
    let (mut all, mut tally) = (0, Tally::default());
    let mut told = start;
    loop {
        let seed: u64 = asked.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        tally.merge(run_seed(name, cases, seed, strategy, &case)?);
        all += cases;
        let is_last = asked.is_some() || start.elapsed() >= time;
        if is_last || told.elapsed() >= NEWS {
            told = Instant::now();
            let seconds = start.elapsed().as_secs();
            println!("{name}: {all} cases in {seconds} s, up to PAGEFIRST_SEED={seed}");
        }
        if is_last {
            println!("{name} reached: {tally}");
            return Ok(());
        }
    }
}

fn run_seed<S: Strategy>(
    name: &'static str,
    cases: u32,
    seed: u64,
    strategy: &S,
    case: &impl Fn(S::Value) -> Result<Tally, TestCaseError>,
) -> Result<Tally, Box<dyn Error>>
where
    S::Value: Debug,
{
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let shrink = variable("PAGEFIRST_SHRINK")?.unwrap_or(SHRINK);
    let regressions: Option<Box<dyn FailurePersistence>> = match shrink {
        0 => None,
        _ => Some(Box::new(FileFailurePersistence::Direct("proptest-regressions/oracle.txt"))),
    };
    let config = ProptestConfig {
        cases,
        max_shrink_iters: shrink,
        failure_persistence: regressions,
        test_name: Some(name),
        ..ProptestConfig::default()
    };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let (tally, failed, passed) = (RefCell::new(Tally::default()), Cell::new(false), Cell::new(0));
    let outcome = {
        let _quiet = Quiet::new();
        runner.run(strategy, |value| {
            let first = !failed.replace(true);
            tally.borrow_mut().merge(case(value)?);
            if first {
                failed.set(false);
                passed.set(passed.get() + 1);
            }
            Ok(())
        })
    };
    let (why, value) = match outcome {
        Ok(()) => return Ok(tally.into_inner()),
        Err(TestError::Fail(why, value)) => (why, format!("{value:#?}")),
        Err(TestError::Abort(why)) => (why, String::new()),
    };
    let passed = passed.get();
    eprintln!("the oracle disagrees: {name}, after {passed} cases: {why}\n{value}");
    Err(format!(
        "rerun with PAGEFIRST_SEED={seed} PAGEFIRST_CASES={cases} cargo test --test {} {name}",
        env!("CARGO_CRATE_NAME")
    )
    .into())
}
