//! Who watches the time, and tells how it goes.

use super::host::Bench;
use indicatif::{ProgressBar, ProgressStyle};
use pagefirst_stress::{Op, Stress, Sums};
use std::io::IsTerminal;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Between two quiet points.
const QUIET: Duration = Duration::from_secs(1);
/// Between two lines where there is no terminal.
const LINE: Duration = Duration::from_secs(10);
/// Without any operation for so long, it hangs.
const PATIENCE: Duration = Duration::from_secs(120);
const TICK: Duration = Duration::from_millis(50);

pub struct Watch {
    time: Duration,
    bar: ProgressBar,
    is_seen: bool,
}

impl Watch {
    pub fn new(time: Duration) -> Self {
        let is_seen = std::io::stderr().is_terminal();
        let bar = if is_seen { ProgressBar::new(time.as_secs()) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("[{bar:30}] {elapsed} of {len} s  {msg}") {
            bar.set_style(style);
        }
        Watch { time, bar, is_seen }
    }

    /// Asks for quiet points, and for the end when it is time; comes back when all workers have ended.
    pub fn until_all(
        &self,
        bench: &Bench,
        stress: &Stress<'_, Bench>,
        workers: usize,
        ended: impl Fn() -> bool,
    ) {
        let start = Instant::now();
        let (mut quiet, mut line) = (start, start);
        let (mut before, mut moved) = (0, start);
        while !ended() {
            std::thread::sleep(TICK);
            let now = Instant::now();
            if now - start >= self.time {
                bench.over.store(true, Relaxed);
            } else if now - quiet >= QUIET {
                quiet = now;
                bench.quiet.store(true, Relaxed);
            }
            let sums = stress.sums();
            self.bar.set_position((now - start).as_secs());
            self.bar.set_message(text(&sums, now - start));
            if !self.is_seen && now - line >= LINE {
                line = now;
                println!("{:4} s  {}", (now - start).as_secs(), text(&sums, now - start));
            }
            if sums.all() != before {
                (before, moved) = (sums.all(), now);
            } else if now - moved > PATIENCE {
                hangs(stress, workers);
            }
        }
        self.bar.finish_and_clear();
    }
}

fn text(sums: &Sums, time: Duration) -> String {
    let rate = sums.all() as f64 / time.as_secs_f64();
    let (all, short, quiet) = (sums.all(), sums.short, sums.of(Op::Quiet));
    format!("{all} operations, {rate:.0} a second, {short} without memory, {quiet} quiet points")
}

/// Nothing moves: says where everybody is, and ends the program.
fn hangs(stress: &Stress<'_, Bench>, workers: usize) -> ! {
    eprintln!("pagefirst: stress: nothing has moved for {} s", PATIENCE.as_secs());
    for worker in 0..workers {
        let (op, n) = stress.doing(worker);
        eprintln!("worker {worker}: operation {n} ({})", op.name());
    }
    std::process::exit(2)
}
