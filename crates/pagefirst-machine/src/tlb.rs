//! The translation look-aside buffer of one vCPU: tagged by space, set-associative, least recently used gives way.
//!
//! A translation is of a small page; one of a huge page is kept in pieces, as on CPUs without huge TLB entries.
//! Not-present entries are never cached (x86).

use crate::config::TlbShape;
use pagefirst::types::{PAGE_SHIFT, Pfn, VirtRange};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

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
    pub page: u64,
    /// The machine's clock of shootdowns when the walk for it began.
    pub stamp: u64,
    pub frame: u32,
    pub rights: Rights,
}

/// Beyond so many pages a flush looks at every translation instead of every page.
const ONE_BY_ONE: u64 = 64;

pub(crate) struct Tlb {
    entries: Box<[Entry]>,
    sets: usize,
    ways: usize,
    /// For each frame, the number of translations to it in all TLBs; kept when the machine checks.
    mapped: Option<&'static [AtomicU32]>,
}

impl Tlb {
    pub fn new(shape: TlbShape, mapped: Option<&'static [AtomicU32]>) -> Self {
        assert!(shape.sets.is_power_of_two() && shape.ways > 0, "a TLB needs 2^n sets and at least one way");
        let entries = vec![Entry::default(); shape.sets * shape.ways].into_boxed_slice();
        Tlb { entries, sets: shape.sets, ways: shape.ways, mapped }
    }

    #[inline]
    fn set(&mut self, page: u64) -> &mut [Entry] {
        let first = (page as usize & (self.sets - 1)) * self.ways;
        &mut self.entries[first..first + self.ways]
    }

    /// The translation, which becomes the latest of its set.
    #[inline]
    pub fn look_up(&mut self, tag: u64, page: u64) -> Option<Entry> {
        let set = self.set(page);
        if set[0].page == page && set[0].tag == tag {
            return Some(set[0]);
        }
        let at = set.iter().position(|e| e.page == page && e.tag == tag)?;
        set[..=at].rotate_right(1);
        Some(set[0])
    }

    /// Keeps a translation; the least recently used of its set gives way.
    pub fn insert(&mut self, entry: Entry) {
        self.drop_page(entry.tag, entry.page);
        let mapped = self.mapped;
        let set = self.set(entry.page);
        // A hole anywhere takes the place of the oldest.
        let last = set.iter().position(|e| e.tag == 0).unwrap_or(set.len() - 1);
        forget(mapped, &mut set[last]);
        set[..=last].rotate_right(1);
        set[0] = entry;
        if let Some(mapped) = mapped {
            mapped[entry.frame as usize].fetch_add(1, Relaxed);
        }
    }

    /// Forgets the translation of one page.
    pub fn drop_page(&mut self, tag: u64, page: u64) {
        let mapped = self.mapped;
        for e in self.set(page).iter_mut().filter(|e| e.tag == tag && e.page == page) {
            forget(mapped, e);
        }
    }

    /// Forgets what it knows of a range; of the whole space when the range is large.
    pub fn drop_range(&mut self, tag: u64, range: VirtRange) {
        if range.pages() > ONE_BY_ONE {
            return self.drop_tag(tag);
        }
        for page in pages(range) {
            self.drop_page(tag, page);
        }
    }

    /// Forgets a space.
    pub fn drop_tag(&mut self, tag: u64) {
        let mapped = self.mapped;
        for e in self.entries.iter_mut().filter(|e| e.tag == tag) {
            forget(mapped, e);
        }
    }

    /// A translation of the range from a walk that began before `stamp`.
    pub fn older_than(&self, tag: u64, range: VirtRange, stamp: u64) -> Option<Entry> {
        let pages = pages(range);
        self.entries.iter().find(|e| e.tag == tag && pages.contains(&e.page) && e.stamp < stamp).copied()
    }

    /// A translation to this frame.
    pub fn to_frame(&self, pfn: Pfn) -> Option<Entry> {
        self.entries.iter().find(|e| e.tag != 0 && e.frame == pfn.0).copied()
    }
}

fn forget(mapped: Option<&'static [AtomicU32]>, e: &mut Entry) {
    if e.tag != 0
        && let Some(mapped) = mapped
    {
        mapped[e.frame as usize].fetch_sub(1, Relaxed);
    }
    *e = Entry::default();
}

fn pages(range: VirtRange) -> std::ops::Range<u64> {
    range.start.0 >> PAGE_SHIFT..range.end.0.div_ceil(1 << PAGE_SHIFT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagefirst::types::VirtAddr;

    fn entry(tag: u64, page: u64) -> Entry {
        Entry { tag, page, stamp: 1, frame: page as u32, rights: Rights::default() }
    }
    fn range(from: u64, to: u64) -> VirtRange {
        VirtRange::new(VirtAddr(from << PAGE_SHIFT), VirtAddr(to << PAGE_SHIFT))
    }

    #[test]
    fn the_least_recently_used_gives_way() {
        let mut tlb = Tlb::new(TlbShape { sets: 2, ways: 2 }, None);
        tlb.insert(entry(1, 0));
        tlb.insert(entry(1, 2));
        assert!(tlb.look_up(1, 0).is_some());
        tlb.insert(entry(1, 4));
        assert!(tlb.look_up(1, 2).is_none() && tlb.look_up(1, 0).is_some() && tlb.look_up(1, 4).is_some());
        tlb.insert(entry(1, 1));
        assert!(tlb.look_up(1, 0).is_some(), "the other set");
    }

    #[test]
    fn spaces_live_side_by_side_and_are_flushed_apart() {
        let mapped: &'static [AtomicU32] = Box::leak((0..200).map(|_| AtomicU32::new(0)).collect());
        let mut tlb = Tlb::new(TlbShape { sets: 16, ways: 4 }, Some(mapped));
        for page in 0..8 {
            tlb.insert(entry(1, page));
            tlb.insert(entry(2, page));
        }
        assert_eq!(mapped[3].load(Relaxed), 2);
        tlb.drop_range(1, range(2, 4));
        assert!(tlb.look_up(1, 2).is_none() && tlb.look_up(1, 3).is_none());
        assert!(tlb.look_up(1, 4).is_some() && tlb.look_up(2, 3).is_some());
        assert!(tlb.older_than(1, range(0, 8), 2).is_some() && tlb.older_than(1, range(0, 8), 1).is_none());
        tlb.drop_range(2, range(0, 1 << 30));
        assert!((0..8).all(|p| tlb.look_up(2, p).is_none()));
        assert!(tlb.to_frame(Pfn(5)).is_some());
        tlb.drop_tag(1);
        assert!(tlb.to_frame(Pfn(5)).is_none());
        assert!(mapped.iter().all(|m| m.load(Relaxed) == 0));
    }
}
