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
const TICK: Duration = Duration::from_millis(50);
/// Whoever is at one operation for so many ticks hangs: two minutes, or longer on a machine so busy that ticks are late too.
const PATIENCE: u32 = 2400;

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
        let mut moves = vec![Move { n: 0, ticks: 0 }; workers];
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
            let hanging = hanging(&mut moves, |worker| stress.doing(worker));
            if !hanging.is_empty() {
                self.bar.finish_and_clear();
                give_up(&hanging);
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

/// The number of a worker's operation, and for how many ticks it has been that.
#[derive(Clone, Copy, Debug)]
struct Move {
    n: u64,
    ticks: u32,
}

/// Who hangs, and at what; not who has stopped for the others.
fn hanging(moves: &mut [Move], doing: impl Fn(usize) -> (Op, u64)) -> Vec<(usize, Op, u64)> {
    let mut hanging = Vec::new();
    for (worker, last) in moves.iter_mut().enumerate() {
        let (op, n) = doing(worker);
        if n != last.n || op == Op::Stop {
            *last = Move { n, ticks: 0 };
            continue;
        }
        last.ticks += 1;
        if last.ticks > PATIENCE {
            hanging.push((worker, op, n));
        }
    }
    hanging
}

/// Says where they are, and ends the program.
fn give_up(hanging: &[(usize, Op, u64)]) -> ! {
    eprintln!("pagefirst: stress found a violation");
    for (worker, op, n) in hanging {
        let time = PATIENCE * TICK;
        eprintln!("violation: worker {worker} hangs in operation {n} ({}) for {time:?}", op.name());
    }
    std::process::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_who_hangs_is_told_whatever_the_others_do() {
        let mut moves = [Move { n: 0, ticks: 0 }; 3];
        let mut after = |ticks, doing: [(Op, u64); 3]| {
            (0..ticks).map(|_| hanging(&mut moves, |worker| doing[worker])).last().unwrap_or_default()
        };
        assert_eq!(after(1, [(Op::Pin, 7), (Op::Load, 1), (Op::Stop, 5)]), []);
        assert_eq!(after(PATIENCE, [(Op::Pin, 7), (Op::Load, 2), (Op::Stop, 5)]), []);
        assert_eq!(after(1, [(Op::Pin, 7), (Op::Load, 3), (Op::Stop, 5)]), [(0, Op::Pin, 7)]);
        assert_eq!(after(1, [(Op::Load, 8), (Op::Load, 3), (Op::Load, 6)]), []);
        assert_eq!(after(PATIENCE, [(Op::Load, 9), (Op::Load, 3), (Op::Load, 6)]), [(1, Op::Load, 3)]);
    }
}
