//! Chance that is the same for the same seed.

/// SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
pub(crate) struct Dice(u64);

impl Dice {
    pub fn new(seed: u64, worker: usize) -> Self {
        let mut dice = Dice(seed ^ (worker as u64 + 1).wrapping_mul(0xd134_2543_de82_ef95));
        dice.next();
        dice
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// A number below `sides`.
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.next() % sides
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
