//! One schedule for each seed: who goes on at each point at which several threads could.

use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use shuttle::scheduler::{Schedule, Scheduler, Task, TaskId};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// Numbers by chance, the same for the same seed.
pub struct Dice(SplitMix64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Dice(SplitMix64::seed_from_u64(seed))
    }
    pub fn next(&mut self) -> u64 {
        self.0.next_u64()
    }
    /// A number below `sides`; 0 for none.
    pub fn below(&mut self, sides: u64) -> u64 {
        (self.next() >> 32) * sides >> 32
    }
    pub fn one_in(&mut self, sides: u64) -> bool {
        self.below(sides) == 0
    }
}

/// How the next thread is chosen.
enum Choice {
    /// By chance; one time in 2^`stay` it is asked at all, otherwise the thread goes on.
    Random { stay: u32 },
    /// The one with the highest priority; at each of these steps the running one becomes the last.
    Priority { of: Vec<u64>, last: u64, change_at: Vec<u64> },
}

impl Choice {
    fn by(dice: &mut Dice) -> Self {
        if dice.below(2) == 0 {
            return Choice::Random { stay: dice.below(8) as u32 };
        }
        let steps = 64 << dice.below(10);
        let changes = dice.below(12);
        let change_at = (0..changes).map(|_| dice.below(steps)).collect();
        Choice::Priority { of: Vec::new(), last: u64::MAX / 2, change_at }
    }
}

/// What is known of the schedule under way, outside the scheduler too.
#[derive(Default)]
pub struct Now {
    pub seed: AtomicU64,
    /// Decisions between several threads.
    pub steps: AtomicU64,
    /// A hash of all that was decided.
    pub hash: AtomicU64,
}

/// Schedules for seeds one after another, each so many times.
pub struct Seeds {
    now: Arc<Now>,
    next: u64,
    end: u64,
    times: u64,
    /// How often the schedule was run, and what was decided.
    run: u64,
    decided: (u64, u64),
    dice: Dice,
    choice: Choice,
}

impl Seeds {
    pub fn new(seeds: Range<u64>, times: u64, now: Arc<Now>) -> Self {
        let (next, end) = (seeds.start, seeds.end);
        let (dice, choice) = (Dice::new(0), Choice::Random { stay: 0 });
        Seeds { now, next, end, times, run: 0, decided: (0, 0), dice, choice }
    }

    /// A schedule has ended: it was what it was before.
    fn ended(&mut self) {
        let decided = (self.now.steps.load(Relaxed), self.now.hash.load(Relaxed));
        match self.run {
            0 => {}
            1 => self.decided = decided,
            _ => assert_eq!(decided, self.decided, "the schedule was another one the first time"),
        }
        if self.run == self.times {
            self.run = 0;
            self.next += 1;
        }
    }
}

impl Scheduler for Seeds {
    fn new_execution(&mut self) -> Option<Schedule> {
        self.ended();
        if self.next == self.end {
            return None;
        }
        self.run += 1;
        self.dice = Dice::new(self.next);
        self.choice = Choice::by(&mut self.dice);
        self.now.seed.store(self.next, Relaxed);
        self.now.steps.store(0, Relaxed);
        self.now.hash.store(0, Relaxed);
        Some(Schedule::new(self.next))
    }

    fn next_task(&mut self, runnable: &[&Task], current: Option<TaskId>, yields: bool) -> Option<TaskId> {
        let [first, .., _] = runnable else { return runnable.first().map(|task| task.id()) };
        let step = self.now.steps.fetch_add(1, Relaxed);
        let current = current.filter(|current| runnable.iter().any(|task| task.id() == *current));
        let chosen = match &mut self.choice {
            Choice::Random { stay } => match current {
                Some(current) if !yields && self.dice.below(1 << *stay) > 0 => current,
                _ => {
                    let others = runnable.iter().filter(|task| !yields || Some(task.id()) != current);
                    let n = runnable.len() - usize::from(yields && current.is_some());
                    let nth = self.dice.below(n as u64) as usize;
                    others.map(|task| task.id()).nth(nth).unwrap_or(first.id())
                }
            },
            Choice::Priority { of, last, change_at } => {
                let known = runnable.iter().map(|task| usize::from(task.id()) + 1).max().unwrap_or(0);
                while of.len() < known {
                    of.push(self.dice.next() | 1 << 63);
                }
                if let Some(current) = current.filter(|_| yields || change_at.contains(&step)) {
                    *last -= 1;
                    of[usize::from(current)] = *last;
                }
                runnable
                    .iter()
                    .map(|task| task.id())
                    .max_by_key(|id| of[usize::from(*id)])
                    .unwrap_or(first.id())
            }
        };
        let hash = self.now.hash.load(Relaxed) ^ usize::from(chosen) as u64 ^ (runnable.len() as u64) << 8;
        self.now.hash.store(hash.wrapping_mul(0x0000_0100_0000_01b3).rotate_left(5), Relaxed);
        Some(chosen)
    }

    fn next_u64(&mut self) -> u64 {
        self.dice.next()
    }
}
