//! The epoch: readers pin, writers retire, memory is reused after a grace period.
//!
//! Protocol. A reader *pins*: it stores the global epoch into its CPU's word, `fence(SeqCst)`, and only then loads
//! a root. A writer unlinks an object, `fence(SeqCst)`, and retires it under the epoch it then reads. The epoch
//! advances from `e` to `e + 1` when no CPU is pinned in another epoch than `e`. An object retired in `e` may be
//! reused once the epoch is `e + 2`: every reader that could have found it has unpinned.
//!
//! | | pin | retire | advance |
//! |---|---|---|---|
//! | pin | own word each | two fences: the reader misses the object or is seen by the advance | the advance reads every word after its fence |
//! | retire | | the limbo's lock | tag read after the fence is never too new |
//! | advance | | | compare-exchange: one wins |
//!
//! After Fraser, "Practical lock-freedom" (2004), section 5.2.3.

use super::atomic::{Acquire, AtomicU64, Relaxed, Release, SeqCst, fence};
use super::held;
use crate::platform::Platform;
use core::marker::PhantomData;

/// The global epoch, on a line of its own.
#[repr(align(128))]
pub struct Epoch {
    now: AtomicU64,
}

impl Epoch {
    /// Starts at 1.
    pub fn new() -> Self {
        Epoch { now: AtomicU64::new(1) }
    }

    /// The epoch under which something just unlinked is retired.
    pub fn retire_tag(&self) -> u64 {
        if !cfg!(mutant = "retire_without_fence") {
            fence(SeqCst);
        }
        // Acquire: limbo takes what is three epochs older for past, and hands it on by its lock alone.
        self.now.load(Acquire)
    }

    /// This epoch as it is now, standing still: a mistake to make.
    pub(crate) fn frozen(&self) -> Self {
        Epoch { now: AtomicU64::new(self.retire_tag()) }
    }

    /// The epoch from which on something retired under `tag` may be reused.
    pub fn past(tag: u64) -> u64 {
        tag + 2
    }

    /// Moves the epoch on if every pinned CPU has seen it; returns the epoch that is current now.
    pub fn advance<P: Platform>(&self, p: &'static P) -> u64 {
        let now = self.now.load(Relaxed);
        if !cfg!(mutant = "advance_without_fence") {
            fence(SeqCst);
        }
        if !cfg!(mutant = "epoch_ignores_pins") {
            for cpu in 0..p.cpus() {
                // Acquire: who unpinned has read what is freed next. (By a fence behind the loop it would do as well, but
                // ThreadSanitizer does not know fences.)
                let word = p.local(cpu).epoch.load(Acquire);
                if word & 1 == 1 && word >> 1 != now {
                    return now;
                }
            }
        }
        // Acquire: who is told a newer epoch reuses what readers have let go that only the other one's advance saw.
        let lost = if cfg!(mutant = "advance_relaxed") { Relaxed } else { Acquire };
        match self.now.compare_exchange(now, now + 1, Release, lost) {
            Ok(_) => now + 1,
            Err(newer) => newer,
        }
    }
}

impl Default for Epoch {
    fn default() -> Self {
        Self::new()
    }
}

/// Possession proves that this CPU is pinned: what is reachable now stays readable until the pin is dropped.
///
/// Preemption is off while it lives; it is not held while a page is cleared or copied, nor over a flush.
pub struct Pin<P: Platform> {
    p: &'static P,
    /// This CPU's.
    word: &'static AtomicU64,
    not_send: PhantomData<*mut ()>,
}

impl<P: Platform> Pin<P> {
    /// Pins this CPU. Pins do not nest.
    pub fn new(p: &'static P) -> Self {
        held::take(p, held::PIN);
        let word = &p.local(p.enter()).epoch;
        // The word is this CPU's own; were it set, dropping this pin would unpin the other too soon.
        assert!(word.load(Relaxed) & 1 == 0, "pins do not nest");
        // Release: an advance that finds this CPU pinned again must have seen the end of its last pin; a plain store
        // does not continue the release sequence of the one in `drop`.
        let order = if cfg!(mutant = "repin_relaxed") { Relaxed } else { Release };
        word.store(p.vm().epoch.now.load(Relaxed) << 1 | 1, order);
        if !cfg!(mutant = "pin_without_fence") {
            fence(SeqCst);
        }
        Pin { p, word, not_send: PhantomData }
    }
    /// The platform.
    pub fn platform(&self) -> &'static P {
        self.p
    }
}

impl<P: Platform> Drop for Pin<P> {
    fn drop(&mut self) {
        let order = if cfg!(mutant = "unpin_relaxed") { Relaxed } else { Release };
        self.word.store(0, order);
        self.p.leave();
        held::give(self.p, held::PIN);
    }
}
