//! Chance that is the same for the same seed.

use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

pub(crate) struct Dice(SplitMix64);

impl Dice {
    pub fn new(seed: u64, worker: usize) -> Self {
        let seed = seed ^ (worker as u64 + 1).wrapping_mul(0xd134_2543_de82_ef95);
        let mut random = SplitMix64::seed_from_u64(seed);
        random.next_u64();
        Dice(random)
    }
    /// A number below `sides`.
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0.next_u64() % sides
    }
    /// True once in so many times.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.roll(times) == 0
    }
    /// Some pages in a row, of so many: the first and how many. Few more often than many.
    pub fn pages(&mut self, of: u64) -> (u64, u64) {
        let first = self.roll(of);
        let most = if self.once_in(4) { of } else { 4 };
        (first, 1 + self.roll((of - first).min(most)))
    }
}
