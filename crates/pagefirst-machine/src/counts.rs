//! Counting by the machine itself: what the library told it, and what the hardware did.

use pagefirst::arch::MAX_LEVELS;
use pagefirst::platform::Note;
use std::ops::Sub;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// What happened on the machine up to one moment. The difference of two is what happened between them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Frames that left the allocator.
    pub frames_allocated: u64,
    /// Frames that came back.
    pub frames_freed: u64,
    /// Tables taken into reserves.
    pub tables_allocated: u64,
    /// Tables given back.
    pub tables_freed: u64,
    /// Times a table was locked, by level, the lowest first.
    pub tables_locked: [u64; MAX_LEVELS],
    /// Times a table's entries were read in a scan, by level, the lowest first.
    pub tables_scanned: [u64; MAX_LEVELS],
    /// Shootdowns asked for.
    pub shootdowns: u64,
    /// CPUs other than the one that asked which a shootdown interrupted.
    pub ipis: u64,
    /// Accesses whose translation was not in the TLB.
    pub tlb_misses: u64,
    /// Accesses that trapped into the library.
    pub faults: u64,
    /// Looks of faults beyond the first of each.
    pub looks_again: u64,
    /// The most looks of one fault that needed more than one; of a difference, up to the later moment.
    pub most_looks: u64,
}

impl Counts {
    /// Frames allocated and not freed. Wraps in the difference of two counts when frames went back.
    pub fn live_frames(&self) -> u64 {
        self.frames_allocated.wrapping_sub(self.frames_freed)
    }
    /// Tables allocated and not freed; likewise.
    pub fn live_tables(&self) -> u64 {
        self.tables_allocated.wrapping_sub(self.tables_freed)
    }
    /// Times a table of any level was locked.
    pub fn locked(&self) -> u64 {
        self.tables_locked.iter().sum()
    }
    /// Times the entries of a table of any level were read in a scan.
    pub fn scanned(&self) -> u64 {
        self.tables_scanned.iter().sum()
    }
}

impl Sub for Counts {
    type Output = Counts;
    fn sub(self, before: Counts) -> Counts {
        Counts {
            frames_allocated: self.frames_allocated - before.frames_allocated,
            frames_freed: self.frames_freed - before.frames_freed,
            tables_allocated: self.tables_allocated - before.tables_allocated,
            tables_freed: self.tables_freed - before.tables_freed,
            tables_locked: std::array::from_fn(|l| self.tables_locked[l] - before.tables_locked[l]),
            tables_scanned: std::array::from_fn(|l| self.tables_scanned[l] - before.tables_scanned[l]),
            shootdowns: self.shootdowns - before.shootdowns,
            ipis: self.ipis - before.ipis,
            tlb_misses: self.tlb_misses - before.tlb_misses,
            faults: self.faults - before.faults,
            looks_again: self.looks_again - before.looks_again,
            most_looks: self.most_looks,
        }
    }
}

/// One CPU's counters: written by its thread alone, read by anybody.
#[derive(Default)]
pub(crate) struct Counters {
    frames_allocated: AtomicU64,
    frames_freed: AtomicU64,
    tables_allocated: AtomicU64,
    tables_freed: AtomicU64,
    tables_locked: [AtomicU64; MAX_LEVELS],
    tables_scanned: [AtomicU64; MAX_LEVELS],
    shootdowns: AtomicU64,
    ipis: AtomicU64,
    tlb_misses: AtomicU64,
    faults: AtomicU64,
    looks_again: AtomicU64,
    most_looks: AtomicU64,
}

/// A load and a store, not a read-modify-write: only the CPU's own thread writes.
#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed) + n, Relaxed);
}

impl Counters {
    #[inline]
    pub fn note(&self, note: Note) {
        let (counter, n) = match note {
            Note::FrameAllocated(_, order) => (&self.frames_allocated, 1 << order),
            Note::FrameFreed(_, order) => (&self.frames_freed, 1 << order),
            Note::TableAllocated(_) => (&self.tables_allocated, 1),
            Note::TableFreed(_) => (&self.tables_freed, 1),
            Note::TableLocked(_, level) => (&self.tables_locked[level as usize], 1),
            Note::TableScanned(_, level) => (&self.tables_scanned[level as usize], 1),
            Note::FaultLooked(looks) => {
                let most = self.most_looks.load(Relaxed).max(looks.into());
                self.most_looks.store(most, Relaxed);
                (&self.looks_again, u64::from(looks) - 1)
            }
        };
        add(counter, n);
    }
    pub fn shootdown(&self, ipis: u64) {
        add(&self.shootdowns, 1);
        add(&self.ipis, ipis);
    }
    pub fn miss(&self) {
        add(&self.tlb_misses, 1);
    }
    pub fn fault(&self) {
        add(&self.faults, 1);
    }

    /// Adds these counters to a sum.
    pub fn add_to(&self, sum: &mut Counts) {
        let get = |a: &AtomicU64| a.load(Relaxed);
        sum.frames_allocated += get(&self.frames_allocated);
        sum.frames_freed += get(&self.frames_freed);
        sum.tables_allocated += get(&self.tables_allocated);
        sum.tables_freed += get(&self.tables_freed);
        for level in 0..MAX_LEVELS {
            sum.tables_locked[level] += get(&self.tables_locked[level]);
            sum.tables_scanned[level] += get(&self.tables_scanned[level]);
        }
        sum.shootdowns += get(&self.shootdowns);
        sum.ipis += get(&self.ipis);
        sum.tlb_misses += get(&self.tlb_misses);
        sum.faults += get(&self.faults);
        sum.looks_again += get(&self.looks_again);
        sum.most_looks = sum.most_looks.max(get(&self.most_looks));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagefirst::types::Pfn;

    #[test]
    fn counts_can_be_subtracted() {
        let c = Counters::default();
        c.note(Note::FrameAllocated(Pfn(1), 0));
        c.note(Note::TableLocked(Pfn(1), 3));
        let mut before = Counts::default();
        c.add_to(&mut before);
        c.note(Note::FrameFreed(Pfn(1), 0));
        c.note(Note::TableLocked(Pfn(1), 0));
        c.shootdown(2);
        let mut after = Counts::default();
        c.add_to(&mut after);
        let between = after - before;
        assert_eq!((before.live_frames(), after.live_frames()), (1, 0));
        assert_eq!((between.frames_allocated, between.frames_freed, between.ipis), (0, 1, 2));
        assert_eq!(between.tables_locked, [1, 0, 0, 0, 0]);
    }
}
