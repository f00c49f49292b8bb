//! `pagefirst stress`: all that the library does, by many threads at once, its contents verified while it runs.
//!
//! What is done is the crate `pagefirst-stress`; here are the machine that it runs on, its looks at everything when all is
//! quiet (`host`), progress (`watch`), and the end.

mod host;
mod watch;

use crate::replay::parse_size;
use host::Bench;
use pagefirst::fault::MOST_LOOKS;
use pagefirst_machine::{Config as Hardware, Counts, FaultCounts, GAVE_UP, Machine};
use pagefirst_stress::{Board, Config, MAX_WORKERS, Op, Stress, Sums};
use std::fmt::Write as _;
use std::panic;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Do all that the library does, on many CPUs at once, and verify it.
#[derive(clap::Args, Debug, Clone)]
pub struct StressArgs {
    /// How many threads, each a CPU of the machine
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=MAX_WORKERS as i64))]
    pub threads: u16,
    /// How long: a number and s, m or h
    #[arg(long = "for", value_name = "T", default_value = "10s", value_parser = parse_time)]
    pub time: Duration,
    /// Where chance starts [default: the clock]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// The machine's memory, from 4M to 64G; some 24M make it short
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_memory)]
    pub memory: u64,
    /// The machine's hardware
    #[arg(long, value_enum, default_value = "x86")]
    pub hardware: Kind,
}

/// What the hardware does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Kind {
    /// What x86 does
    X86,
    /// All at once that a manual allows
    Harsh,
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time: a number above 0, and s, m or h behind it");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    let time = number.checked_mul(seconds).filter(|time| (1..=366 * 24 * 3600).contains(time));
    time.map(Duration::from_secs).ok_or_else(wrong)
}

fn parse_memory(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    let fits = (4 << 20..=64 << 30).contains(&bytes);
    if fits { Ok(bytes) } else { Err(format!("{text:?} is not from 4M to 64G")) }
}

/// Whether what goes wrong is a violation.
static RUNS: AtomicBool = AtomicBool::new(false);

/// Runs it; the exit status is 0, or 1 when something was wrong: a violation, or that it could not be run.
pub fn run(args: StressArgs) -> ExitCode {
    let seed = args.seed.unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.subsec_nanos().into())
    });
    let again = command(&args, seed);
    // A thread that finds something wrong panics. That is the end, at once: others may wait for it. Before anything runs it
    // is the host that has not what it takes.
    let first = Mutex::new(());
    let told = again.clone();
    panic::set_hook(Box::new(move |info| {
        let what = info.payload_as_str().unwrap_or("a panic without words");
        if what == GAVE_UP {
            // Whoever has found something is about to say so.
            std::thread::sleep(Duration::from_secs(60));
        }
        let _first = first.lock();
        let place = info.location().map(|at| format!(" ({at})")).unwrap_or_default();
        if RUNS.load(Relaxed) {
            eprintln!("\npagefirst: stress found a violation\n{what}{place}\nagain: {told}");
        } else {
            eprintln!("pagefirst: stress: {what}");
        }
        std::process::exit(1)
    }));
    match stress(&args, seed) {
        Ok(report) => {
            println!("{report}again: {again}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("pagefirst: stress: {why}");
            ExitCode::FAILURE
        }
    }
}

/// What runs the same again, as far as threads allow.
fn command(args: &StressArgs, seed: u64) -> String {
    let StressArgs { threads, time, memory, hardware, .. } = args;
    let hardware = if *hardware == Kind::Harsh { " --hardware harsh" } else { "" };
    let (memory, time) = (memory >> 10, time.as_secs());
    format!("pagefirst stress --threads {threads} --for {time}s --seed {seed} --memory {memory}K{hardware}")
}

fn stress(args: &StressArgs, seed: u64) -> Result<String, String> {
    let threads = usize::from(args.threads);
    let hardware = match args.hardware {
        Kind::X86 => Hardware { keep_tags: true, late_shootdown: 20, seed, ..Hardware::default() },
        Kind::Harsh => Hardware::harsh(seed),
    };
    // One more for this thread, and one for each file whose reads end later.
    let cpus = threads + 1 + Bench::LATE_FILES;
    let machine = Machine::new(Hardware { memory: args.memory, cpus, checks: true, ..hardware });
    let bench = Bench::new(machine);
    let board: &'static Board = Box::leak(Box::default());
    let config = Config { workers: threads, seed };
    let start = Instant::now();
    let stress = Stress::new(&bench, board, config)
        .map_err(|_| format!("{} bytes of memory are too few to start with", args.memory))?;
    let watch = watch::Watch::new(args.time);
    RUNS.store(true, Relaxed);
    let faults = std::thread::scope(|scope| {
        let stress = &stress;
        let work = |me| {
            move || {
                let mut cpu = host::Cpu(machine.vcpu());
                stress.work(me, &mut cpu);
                cpu.0.counts()
            }
        };
        let spawn = |me| {
            std::thread::Builder::new().spawn_scoped(scope, work(me)).unwrap_or_else(|error| {
                eprintln!("pagefirst: stress: no thread {me}: {error}");
                std::process::exit(1)
            })
        };
        let workers: Vec<_> = (0..threads).map(spawn).collect();
        watch.until_all(&bench, stress, threads, || workers.iter().all(|worker| worker.is_finished()));
        workers
            .into_iter()
            .map(|worker| worker.join().expect("it did not panic"))
            .collect::<Vec<FaultCounts>>()
    });
    let took = start.elapsed();
    let sums = stress.sums();
    bench.settle(stress.files());
    drop(stress);
    machine.nothing_left().unwrap_or_else(|left| panic!("violation: {left}"));
    Ok(report(&sums, &faults, machine.counts(), took))
}

fn report(sums: &Sums, faults: &[FaultCounts], counts: Counts, took: Duration) -> String {
    let mut text = String::new();
    let seconds = took.as_secs_f64();
    let mut line = |what: &str, n: u64| {
        let _ = writeln!(text, "{what:24} {n:>14} {:>12.0} a second", n as f64 / seconds);
    };
    for op in Op::ALL.iter().filter(|op| **op != Op::Quiet) {
        line(op.name(), sums.of(*op));
    }
    line("operations", sums.all());
    line("refused: not mapped", sums.refused);
    line("refused: no memory", sums.short);
    let sum = |of: fn(&FaultCounts) -> u64| faults.iter().map(of).sum();
    line("faults", sum(|f| f.faults));
    line("  mapped", sum(|f| f.mapped));
    line("  huge", sum(|f| f.huge));
    line("  read from a file", sum(|f| f.major));
    line("  spurious", sum(|f| f.spurious));
    line("  blocked", sum(|f| f.blocked));
    line("  looked again", counts.looks_again);
    let most = faults.iter().map(|f| f.most).max().unwrap_or_default();
    let _ = writeln!(text, "the most looks of a fault: {}, of {MOST_LOOKS} at most", counts.most_looks);
    let _ = writeln!(text, "the most faults of an access: {most}");
    let quiet = sums.of(Op::Quiet);
    let _ = writeln!(text, "{seconds:.1} s, {quiet} quiet points, 0 violations, nothing left over");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_refused() {
        assert_eq!(parse_time("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_time("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(parse_time("2h"), Ok(Duration::from_secs(7200)));
        for wrong in ["", "s", "10", "0s", "-1s", "1d", "1.5s", "99999999999h", "10µ"] {
            assert!(parse_time(wrong).is_err(), "{wrong:?}");
        }
        assert!(parse_memory("16M").is_ok() && parse_memory("1M").is_err() && parse_memory("1T").is_err());
    }
}
