//! The paging-structure cache of one CPU: entries that point to tables, so that a walk can start further down; and,
//! on machines that keep them, entries that were not present.
//!
//! Intel SDM volume 3A, 4.10.3: an entry of each level is kept by the upper bits of the address, with the rights of
//! all levels above it, and used without a look at memory. RISC-V calls them non-leaf entries of the
//! address-translation cache, Arm ARM section D8.16 intermediate entries. RISC-V without Svvptc lets the same cache
//! hold invalid entries of every level.

use crate::tlb::{Change, Mapped, Rights};
use pagefirst::arch::MAX_LEVELS;
use pagefirst::types::{PAGE_SHIFT, Pfn, VirtAddr, VirtRange};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

/// What a cached entry says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Points {
    /// There is a table one level down, below which so much is allowed.
    Table(Pfn, Rights),
    /// Nothing is present.
    Nothing,
}

/// One entry, of a table at the level of its list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inner {
    pub tag: u64,
    /// The address divided by what the entry spans.
    pub prefix: u64,
    /// The machine's clock of shootdowns when the walk for it began.
    pub stamp: u64,
    pub to: Points,
}

pub(crate) struct InnerCache {
    /// By level, the latest used first.
    levels: [Vec<Inner>; MAX_LEVELS],
    /// Entries of each level.
    most: usize,
    bits: u32,
    mapped: Mapped,
}

impl InnerCache {
    /// `most` entries of each level, for tables of 2^`bits` entries.
    pub fn new(most: usize, bits: u32, mapped: Mapped) -> Self {
        InnerCache { levels: Default::default(), most, bits, mapped }
    }

    /// log2 of what an entry at `level` spans.
    fn shift(&self, level: usize) -> u32 {
        PAGE_SHIFT + self.bits * level as u32
    }

    /// The lowest entry known for an address, and its level.
    pub fn look_up(&mut self, tag: u64, va: VirtAddr) -> Option<(u8, Points)> {
        for level in 0..MAX_LEVELS {
            let prefix = va.0 >> self.shift(level);
            let list = &mut self.levels[level];
            if let Some(at) = list.iter().position(|e| e.prefix == prefix && e.tag == tag) {
                list[..=at].rotate_right(1);
                return Some((level as u8, list[0].to));
            }
        }
        None
    }

    /// Keeps the entry at `level` for an address; the least recently used of its level gives way.
    pub fn insert(&mut self, tag: u64, va: VirtAddr, level: u8, stamp: u64, to: Points) {
        if self.most == 0 {
            return;
        }
        let prefix = va.0 >> self.shift(level as usize);
        self.retain(level as usize, |e| e.tag != tag || e.prefix != prefix);
        let list = &mut self.levels[level as usize];
        if list.len() == self.most
            && let Some(oldest) = list.pop()
        {
            count(self.mapped, &oldest, AtomicU32::fetch_sub);
        }
        let entry = Inner { tag, prefix, stamp, to };
        list.insert(0, entry);
        count(self.mapped, &entry, AtomicU32::fetch_add);
    }

    /// Forgets the entries of the lowest `levels` levels that would be used for a range.
    pub fn drop_range(&mut self, tag: u64, range: VirtRange, levels: usize) {
        for level in 0..levels {
            let shift = self.shift(level);
            let prefixes = range.start.0 >> shift..range.end.0.div_ceil(1 << shift);
            self.retain(level, |e| e.tag != tag || !prefixes.contains(&e.prefix));
        }
    }

    /// Forgets a space.
    pub fn drop_tag(&mut self, tag: u64) {
        (0..MAX_LEVELS).for_each(|level| self.retain(level, |e| e.tag != tag));
    }

    /// The entries of a space, each with what it spans.
    pub fn of_tag(&self, tag: u64) -> impl Iterator<Item = (VirtRange, &Inner)> {
        self.levels.iter().enumerate().flat_map(move |(level, list)| {
            let shift = self.shift(level);
            let span = move |e: &Inner| VirtRange {
                start: VirtAddr(e.prefix << shift),
                end: VirtAddr((e.prefix << shift).saturating_add(1 << shift)),
            };
            list.iter().filter(move |e| e.tag == tag).map(move |e| (span(e), e))
        })
    }

    /// The space and the address for which an entry leads to the table in this frame.
    pub fn to_table(&self, pfn: Pfn) -> Option<(u64, VirtAddr)> {
        self.levels.iter().enumerate().find_map(|(level, list)| {
            let leads = |e: &&Inner| matches!(e.to, Points::Table(table, _) if table == pfn);
            list.iter().find(leads).map(|e| (e.tag, VirtAddr(e.prefix << self.shift(level))))
        })
    }

    fn retain(&mut self, level: usize, keep: impl Fn(&Inner) -> bool) {
        let mapped = self.mapped;
        self.levels[level].retain(|e| {
            let kept = keep(e);
            if !kept {
                count(mapped, e, AtomicU32::fetch_sub);
            }
            kept
        });
    }
}

/// Changes the count of entries that lead to the entry's table.
fn count(mapped: Mapped, e: &Inner, by: Change) {
    if let (Points::Table(pfn, _), Some(mapped)) = (e.to, mapped) {
        by(&mapped[pfn.0 as usize], 1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Rights = Rights { write: true, exec: true, dirty: false };

    fn table(pfn: u32) -> Points {
        Points::Table(Pfn(pfn), ALL)
    }

    #[test]
    fn machine_the_lowest_inner_entry_is_found_and_a_flush_takes_what_covers_its_range() {
        let mapped: &'static [AtomicU32] = Box::leak((0..9).map(|_| AtomicU32::new(0)).collect());
        let mut cache = InnerCache::new(2, 9, Some(mapped));
        let at = |mib: u64| VirtAddr(mib << 20);
        cache.insert(7, at(4), 2, 1, table(3));
        cache.insert(7, at(4), 1, 1, table(4));
        assert_eq!(cache.look_up(7, at(5)), Some((1, table(4))));
        assert_eq!(cache.look_up(7, at(6)), Some((2, table(3))), "the next 2 MiB");
        assert_eq!(cache.look_up(8, at(5)), None, "another space");
        assert_eq!(cache.to_table(Pfn(4)), Some((7, at(4))));
        // The oldest of a level gives way.
        cache.insert(7, at(8), 1, 1, table(5));
        cache.insert(7, at(10), 1, 1, table(6));
        assert_eq!(cache.look_up(7, at(5)), Some((2, table(3))));
        assert_eq!(mapped[4].load(Relaxed), 0);
        cache.drop_range(7, VirtRange::new(at(8), at(9)), 1);
        assert_eq!(cache.look_up(7, at(8)), Some((1, table(5))), "a flush of leaf entries alone");
        cache.drop_range(7, VirtRange::new(at(8), at(9)), 2);
        assert_eq!(cache.look_up(7, at(8)), Some((2, table(3))));
        assert_eq!(cache.look_up(7, at(10)), Some((1, table(6))));
        // A page that is not there.
        cache.insert(7, at(10), 0, 1, Points::Nothing);
        assert_eq!(cache.look_up(7, at(10)), Some((0, Points::Nothing)));
        cache.drop_range(7, VirtRange::page_of(at(10)), 1);
        assert_eq!(cache.look_up(7, at(10)), Some((1, table(6))));
        cache.insert(7, at(10), 1, 1, table(6));
        cache.drop_tag(7);
        assert!(mapped.iter().all(|n| n.load(Relaxed) == 0));
    }
}
