//! One look-aside buffer of translations of one size: tagged by space, set-associative, least recently used gives way.
//!
//! A *unit* is what one translation spans, a small page or a huge one. Where there is no buffer for huge pages the
//! small one keeps a huge translation in pieces, as software cannot tell (Intel SDM volume 3A, 4.10.4.1): what takes
//! one piece takes all.

use crate::config::TlbShape;
use pagefirst::types::{PAGE_SHIFT, Pfn, VirtAddr, VirtRange};
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, Ordering};

/// What a translation allows, and whether the page is known to be marked dirty.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Rights {
    pub write: bool,
    pub exec: bool,
    pub dirty: bool,
}

/// One translation; tag 0 stands for none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Entry {
    pub tag: u64,
    /// The number of the unit: its address divided by its size.
    pub unit: u64,
    /// The machine's clock of shootdowns when the walk for it began.
    pub stamp: u64,
    /// The unit's first frame.
    pub frame: u32,
    /// The table that holds the entry this was made from, and its level.
    pub table: u32,
    pub level: u8,
    pub rights: Rights,
}

/// For each frame, the number of cached entries that lead to it, on all CPUs; kept when the machine checks.
pub(crate) type Mapped = Option<&'static [AtomicU32]>;
/// How such a number changes.
pub(crate) type Change = fn(&AtomicU32, u32, Ordering) -> u32;

/// Beyond so many units a flush looks at every translation instead of every unit.
const ONE_BY_ONE: u64 = 64;

pub(crate) struct Tlb {
    entries: Box<[Entry]>,
    sets: usize,
    ways: usize,
    /// log2 of a unit's small pages, and of what a table has of entries.
    order: u32,
    bits: u32,
    mapped: Mapped,
    /// Translations that are pieces of larger ones.
    pieces: usize,
}

impl Tlb {
    /// A buffer of units of 2^`order` small pages, for tables of 2^`bits` entries.
    pub fn new(shape: TlbShape, order: u32, bits: u32, mapped: Mapped) -> Self {
        assert!(shape.sets.is_power_of_two() && shape.ways > 0, "a TLB needs 2^n sets and at least one way");
        let entries = vec![Entry::default(); shape.sets * shape.ways].into_boxed_slice();
        Tlb { entries, sets: shape.sets, ways: shape.ways, order, bits, mapped, pieces: 0 }
    }

    #[inline]
    fn set(&self, unit: u64) -> Range<usize> {
        let first = (unit as usize & (self.sets - 1)) * self.ways;
        first..first + self.ways
    }

    /// The translation, which becomes the latest of its set.
    #[inline]
    pub fn look_up(&mut self, tag: u64, unit: u64) -> Option<&Entry> {
        let set = self.set(unit);
        let set = &mut self.entries[set];
        if set[0].unit != unit || set[0].tag != tag {
            let at = set.iter().position(|e| e.unit == unit && e.tag == tag)?;
            set[..=at].rotate_right(1);
        }
        Some(&set[0])
    }

    /// Keeps a translation; the least recently used of its set gives way.
    pub fn insert(&mut self, entry: Entry) {
        self.drop_unit(entry.tag, entry.unit);
        let set = self.set(entry.unit);
        // A hole anywhere takes the place of the oldest.
        let hole = self.entries[set.clone()].iter().position(|e| e.tag == 0);
        let last = set.start + hole.unwrap_or(self.ways - 1);
        self.forget(last);
        self.entries[set.start..=last].rotate_right(1);
        self.entries[set.start] = entry;
        self.pieces += self.is_piece(&entry) as usize;
        self.count(&entry, AtomicU32::fetch_add);
    }

    /// Forgets the translation of one unit, pieces of larger ones aside.
    pub fn drop_unit(&mut self, tag: u64, unit: u64) {
        for i in self.set(unit) {
            if self.entries[i].unit == unit && self.entries[i].tag == tag {
                self.forget(i);
            }
        }
    }

    /// Forgets what it knows of a range; of the whole space when the range is large.
    pub fn drop_range(&mut self, tag: u64, range: VirtRange) {
        let units = self.units(range);
        if units.end - units.start > ONE_BY_ONE {
            return self.drop_tag(tag);
        }
        for unit in units.clone() {
            self.drop_unit(tag, unit);
        }
        if self.pieces > 0 {
            for i in 0..self.entries.len() {
                let e = &self.entries[i];
                let whole = self.whole(e);
                if e.tag == tag && whole.start < units.end && units.start < whole.end {
                    self.forget(i);
                }
            }
        }
    }

    /// Forgets a space.
    pub fn drop_tag(&mut self, tag: u64) {
        for i in 0..self.entries.len() {
            if self.entries[i].tag == tag {
                self.forget(i);
            }
        }
    }

    /// The translations of a space.
    pub fn of_tag(&self, tag: u64) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(move |e| e.tag == tag)
    }

    /// The translations of a range.
    pub fn of_range(&self, tag: u64, range: VirtRange) -> impl Iterator<Item = &Entry> {
        let units = self.units(range);
        self.of_tag(tag).filter(move |e| units.contains(&e.unit))
    }

    /// A translation to this frame.
    pub fn to_frame(&self, pfn: Pfn) -> Option<&Entry> {
        self.entries.iter().find(|e| e.tag != 0 && (e.frame..e.frame + (1 << self.order)).contains(&pfn.0))
    }

    /// The first address of a translation's unit.
    pub fn address(&self, e: &Entry) -> VirtAddr {
        VirtAddr(e.unit << (PAGE_SHIFT + self.order))
    }

    fn units(&self, range: VirtRange) -> Range<u64> {
        let shift = PAGE_SHIFT + self.order;
        range.start.0 >> shift..range.end.0.div_ceil(1 << shift)
    }

    fn is_piece(&self, e: &Entry) -> bool {
        e.level as u32 * self.bits > self.order
    }

    /// The units of the entry that a translation was made from.
    fn whole(&self, e: &Entry) -> Range<u64> {
        let shift = (e.level as u32 * self.bits).saturating_sub(self.order);
        let first = e.unit >> shift << shift;
        first..first + (1 << shift)
    }

    fn forget(&mut self, i: usize) {
        let e = std::mem::take(&mut self.entries[i]);
        if e.tag != 0 {
            self.pieces -= self.is_piece(&e) as usize;
            self.count(&e, AtomicU32::fetch_sub);
        }
    }

    fn count(&self, e: &Entry, by: Change) {
        if let Some(mapped) = self.mapped {
            for n in &mapped[e.frame as usize..][..1 << self.order] {
                by(n, 1, Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tag: u64, unit: u64, level: u8) -> Entry {
        Entry { tag, unit, stamp: 1, frame: unit as u32, level, ..Entry::default() }
    }
    fn range(from: u64, to: u64) -> VirtRange {
        VirtRange::new(VirtAddr(from << PAGE_SHIFT), VirtAddr(to << PAGE_SHIFT))
    }
    fn counters() -> &'static [AtomicU32] {
        Box::leak((0..200).map(|_| AtomicU32::new(0)).collect())
    }

    #[test]
    fn the_least_recently_used_gives_way() {
        let mut tlb = Tlb::new(TlbShape { sets: 2, ways: 2 }, 0, 9, None);
        tlb.insert(entry(1, 0, 0));
        tlb.insert(entry(1, 2, 0));
        assert!(tlb.look_up(1, 0).is_some());
        tlb.insert(entry(1, 4, 0));
        assert!(tlb.look_up(1, 2).is_none() && tlb.look_up(1, 0).is_some() && tlb.look_up(1, 4).is_some());
        tlb.insert(entry(1, 1, 0));
        assert!(tlb.look_up(1, 0).is_some(), "the other set");
    }

    #[test]
    fn spaces_live_side_by_side_and_are_flushed_apart() {
        let mapped = counters();
        let mut tlb = Tlb::new(TlbShape { sets: 16, ways: 4 }, 0, 9, Some(mapped));
        for page in 0..8 {
            tlb.insert(entry(1, page, 0));
            tlb.insert(entry(2, page, 0));
        }
        assert_eq!(mapped[3].load(Relaxed), 2);
        tlb.drop_range(1, range(2, 4));
        assert!(tlb.look_up(1, 2).is_none() && tlb.look_up(1, 3).is_none());
        assert!(tlb.look_up(1, 4).is_some() && tlb.look_up(2, 3).is_some());
        assert_eq!(tlb.of_range(1, range(0, 8)).count(), 6);
        tlb.drop_range(2, range(0, 1 << 30));
        assert!((0..8).all(|p| tlb.look_up(2, p).is_none()));
        assert!(tlb.to_frame(Pfn(5)).is_some());
        tlb.drop_tag(1);
        assert!(tlb.to_frame(Pfn(5)).is_none());
        assert!(mapped.iter().all(|m| m.load(Relaxed) == 0));
    }

    #[test]
    fn machine_a_huge_translation_goes_whole_also_when_it_is_kept_in_pieces() {
        let mapped = counters();
        let shape = TlbShape { sets: 4, ways: 4 };
        // Pieces of the 4-page units 1 and 2, and a small page beside them.
        let mut tlb = Tlb::new(shape, 0, 2, Some(mapped));
        for page in [4, 6, 7, 8] {
            tlb.insert(entry(1, page, 1));
        }
        tlb.insert(entry(1, 3, 0));
        tlb.drop_range(1, range(5, 6));
        assert!([4, 6, 7].into_iter().all(|page| tlb.look_up(1, page).is_none()));
        assert!(tlb.look_up(1, 8).is_some() && tlb.look_up(1, 3).is_some());
        // The same unit as one translation.
        let mut huge = Tlb::new(shape, 2, 2, Some(mapped));
        huge.insert(Entry { frame: 100, ..entry(1, 1, 1) });
        assert!((100..104).all(|frame| mapped[frame].load(Relaxed) == 1));
        assert_eq!(huge.to_frame(Pfn(103)).map(|e| huge.address(e)), Some(VirtAddr(4 << PAGE_SHIFT)));
        huge.drop_range(1, range(5, 6));
        assert!(huge.look_up(1, 1).is_none());
        assert!((100..104).all(|frame| mapped[frame].load(Relaxed) == 0));
    }
}
