//! Counting.

use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::{AtomicU8, AtomicU64};

macro_rules! ops {
    ($($op:ident $name:literal,)+) => {
        /// What a worker does.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Op {
            $(#[doc = $name] $op,)+
        }
        impl Op {
            /// All of them.
            pub const ALL: &[Op] = &[$(Op::$op),+];
            /// In words.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Op::$op => $name,)+
                }
            }
        }
    };
}

ops! {
    Load "load", Store "store", CopyIn "copy in", CopyOut "copy out", Exchange "compare and exchange",
    MapAnonymous "map anonymous", MapPrivate "map private", MapShared "map shared", MapPhysical "map physical",
    MapStack "map a stack", MapDirect "map direct", CutDirect "cut direct",
    Clean "clean direct", Brk "move the break", MapAnywhere "map anywhere", Populate "populate", Unmap "unmap", Protect "protect", Discard "discard",
    Remap "remap", Advise "advise", Huge "huge page", Pin "pin", Device "device write", Fork "fork", Space "new space",
    Exit "exit", Read "read file", Write "write file", Resize "set size", Punch "punch", Evict "evict",
    WriteBack "write back", Sync "sync", Ahead "read ahead", Limit "limit", Poison "poison",
    PoisonFile "poison of a file", Hunt "hunt", Prey "be hunted",
    Verify "verify", Stop "stop for others", Quiet "quiet point",
}

const OPS: usize = Op::ALL.len();

/// What one worker did. It writes, others read.
pub(crate) struct Tally {
    done: [AtomicU64; OPS],
    short: AtomicU64,
    refused: AtomicU64,
    doing: AtomicU8,
    all: AtomicU64,
}

/// A load and a store: only the worker itself writes.
fn add(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed) + 1, Relaxed);
}

impl Tally {
    pub const fn new() -> Self {
        Tally {
            done: [const { AtomicU64::new(0) }; OPS],
            short: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            doing: AtomicU8::new(0),
            all: AtomicU64::new(0),
        }
    }
    pub fn begin(&self, op: Op) {
        self.doing.store(op as u8, Relaxed);
        add(&self.done[op as usize]);
        add(&self.all);
    }
    /// Memory, or a limit, did not allow it.
    pub fn short(&self) {
        add(&self.short);
    }
    /// Something else did not, as it should.
    pub fn refused(&self) {
        add(&self.refused);
    }
    /// How many of either.
    pub fn not_done(&self) -> (u64, u64) {
        (self.short.load(Relaxed), self.refused.load(Relaxed))
    }
    pub fn doing(&self) -> (Op, u64) {
        (Op::ALL[usize::from(self.doing.load(Relaxed))], self.all.load(Relaxed))
    }
    pub fn add_to(&self, sums: &mut Sums) {
        for (sum, done) in sums.done.iter_mut().zip(&self.done) {
            *sum += done.load(Relaxed);
        }
        sums.short += self.short.load(Relaxed);
        sums.refused += self.refused.load(Relaxed);
    }
}

/// What all workers did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sums {
    done: [u64; OPS],
    /// Operations that memory, or a limit, did not allow.
    pub short: u64,
    /// Operations that what was mapped did not allow.
    pub refused: u64,
}

impl Default for Sums {
    fn default() -> Self {
        Sums { done: [0; OPS], short: 0, refused: 0 }
    }
}

impl Sums {
    /// How often this was done.
    pub fn of(&self, op: Op) -> u64 {
        self.done[op as usize]
    }
    /// How much was done.
    pub fn all(&self) -> u64 {
        self.done.iter().sum()
    }
}
