//! What workers tell each other, without locks.

use crate::cuts::Cuts;
use crate::files::Kind;
use crate::layout::PAGES;
use crate::tally::{Sums, Tally};
use crate::{HOMES, SPACES};
use core::sync::atomic::Ordering::{Acquire, Release};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

/// The most workers: as many as have a word of their own in a page, on a line of its own.
pub const MAX_WORKERS: usize = 64;

/// A write that was seen: it was there at some time after so many cuts of the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub write: u32,
    pub cuts: u32,
}

/// What workers tell each other. Large, so it is made where it stays.
pub struct Board {
    /// By worker, the number of the last write that was begun.
    begun: [AtomicU32; MAX_WORKERS],
    /// By file, page and worker, the newest write of that worker that anybody has seen there ([`Seen`]).
    newest: [[[AtomicU64; MAX_WORKERS]; PAGES as usize]; Kind::COUNT],
    /// By file.
    pub(crate) cuts: [Cuts; Kind::COUNT],
    /// By space, the address that somebody is about to touch.
    pub(crate) aims: [AtomicU64; SPACES],
    /// By home, what a worker offers of its stretch (`own/prey.rs`).
    pub(crate) prey: [AtomicU64; HOMES],
    /// Quiet points so far.
    pub(crate) rounds: AtomicU32,
    /// Pages of stretches in which an error was reported.
    pub(crate) poisoned: AtomicU32,
    /// The same of files, and in which.
    pub(crate) bad_pages: AtomicU32,
    pub(crate) bad: [AtomicBool; PAGES as usize],
    pub(crate) tallies: [Tally; MAX_WORKERS],
    /// Workers that have stopped at a quiet point, or ended.
    pub(crate) parked: AtomicU32,
    /// 1 while a quiet point is asked for, 2 when all is over.
    pub(crate) state: AtomicU32,
}

impl Board {
    /// An empty board, for one run.
    pub const fn new() -> Self {
        Board {
            begun: [const { AtomicU32::new(0) }; MAX_WORKERS],
            newest: [const { [const { [const { AtomicU64::new(0) }; MAX_WORKERS] }; PAGES as usize] };
                Kind::COUNT],
            cuts: [const { Cuts::new() }; Kind::COUNT],
            aims: [const { AtomicU64::new(0) }; SPACES],
            prey: [const { AtomicU64::new(0) }; HOMES],
            rounds: AtomicU32::new(0),
            poisoned: AtomicU32::new(0),
            bad_pages: AtomicU32::new(0),
            bad: [const { AtomicBool::new(false) }; PAGES as usize],
            tallies: [const { Tally::new() }; MAX_WORKERS],
            parked: AtomicU32::new(0),
            state: AtomicU32::new(0),
        }
    }
    pub(crate) fn begin(&self, worker: usize, write: u32) {
        self.begun[worker].store(write, Release);
    }
    pub(crate) fn begun(&self, worker: usize) -> u32 {
        self.begun[worker].load(Acquire)
    }
    pub(crate) fn all_begun(&self) -> [u32; MAX_WORKERS] {
        self.begun.each_ref().map(|begun| begun.load(Acquire))
    }
    pub(crate) fn newest(&self, file: Kind, page: u64, worker: usize) -> Seen {
        let newest = self.newest[file as usize][page as usize][worker].load(Acquire);
        Seen { write: (newest >> 32) as u32, cuts: newest as u32 }
    }
    pub(crate) fn seen(&self, file: Kind, page: u64, worker: usize, seen: Seen) {
        let seen = u64::from(seen.write) << 32 | u64::from(seen.cuts);
        self.newest[file as usize][page as usize][worker].fetch_max(seen, Release);
    }
    /// What was done so far.
    pub fn sums(&self) -> Sums {
        let mut sums = Sums::default();
        self.tallies.iter().for_each(|tally| tally.add_to(&mut sums));
        sums
    }
}

impl Default for Board {
    fn default() -> Self {
        Board::new()
    }
}
