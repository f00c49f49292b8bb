//! Fork, as the oracle sees it: what the child has, whose pages are whose, and who copies which.

use super::model::{Entry, LEAF, Level, Space, leaf};
use pagefirst::space::VmaFlags;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

/// What is counted of a page of private memory, or of a huge one: whether it is one process's alone. Clones are the same
/// page; there is one for each small page that maps any of it.
#[derive(Clone, Debug)]
pub struct Folio(Arc<AtomicBool>);

impl Folio {
    pub fn new(exclusive: bool) -> Folio {
        Folio(Arc::new(AtomicBool::new(exclusive)))
    }
    pub fn is_exclusive(&self) -> bool {
        self.0.load(Relaxed)
    }
    fn set_exclusive(&self, exclusive: bool) {
        self.0.store(exclusive, Relaxed);
    }
    /// Whether so many small pages are all that map it.
    fn is_mapped_by(&self, pages: u64) -> bool {
        Arc::strong_count(&self.0) as u64 == pages
    }
}

impl PartialEq for Folio {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
impl Eq for Folio {}

impl Space {
    /// A child: private memory is shared from now on, page by page; all else it has yet to touch.
    pub fn fork(&self, level: Level) -> Space {
        let areas = self.areas.inherited();
        let mut entries = self.entries.clone();
        entries.retain(|page, entry| {
            let area = areas.at(*page);
            matches!(entry, Entry::Own { .. })
                && area.is_some_and(|area| !area.flags.contains(VmaFlags::WIPE_ON_FORK))
        });
        for entry in entries.values() {
            if let Entry::Own { folio, .. } = entry {
                folio.set_exclusive(false);
            }
        }
        let huge = self.huge.iter().copied().filter(|first| entries.contains_key(first)).collect();
        let mut child = self.another(level);
        (child.areas, child.entries, child.huge) = (areas, entries, huge);
        child
    }

    /// Makes small pages of a huge one, if there is one. They stay one folio if others have it too.
    pub fn scatter(&mut self, first: u64) {
        let Some(Entry::Own { folio, .. }) = self.entries.get(&first) else {
            self.huge.remove(&first);
            return;
        };
        let (alone, exclusive) = (folio.is_mapped_by(LEAF), folio.is_exclusive());
        if !self.huge.remove(&first) || !alone {
            return;
        }
        for (_, entry) in self.entries.range_mut(first..first + LEAF) {
            if let Entry::Own { folio, .. } = entry {
                *folio = Folio::new(exclusive);
            }
        }
    }

    /// Whether a page is private memory, and to be made this process's alone before it is written to.
    pub fn is_shared_own(&self, page: u64) -> bool {
        matches!(self.entries.get(&page), Some(Entry::Own { folio, .. }) if !folio.is_exclusive())
    }

    /// A write to such a page: whoever has it alone uses it where it is, others copy it; a huge one whole, or, if no other
    /// can be had, the small page alone.
    pub fn unshare(&mut self, page: u64) {
        let first = leaf(page);
        let is_huge = self.huge.contains(&first);
        let Some(Entry::Own { bytes, folio }) = self.entries.get(&page) else {
            unreachable!("{page:#x} is not its own")
        };
        if folio.is_mapped_by(if is_huge { LEAF } else { 1 }) {
            folio.set_exclusive(true);
            self.faults.reuse += 1;
            return;
        }
        self.faults.copy += 1;
        if is_huge && (self.level)(page) == Some(1) {
            self.faults.huge += 1;
            let copy = Folio::new(true);
            for (_, entry) in self.entries.range_mut(first..first + LEAF) {
                if let Entry::Own { folio, .. } = entry {
                    *folio = copy.clone();
                }
            }
            return;
        }
        let copy = Entry::own(bytes.clone());
        if is_huge {
            self.faults.no_huge += 1;
            self.scatter(first);
        }
        self.entries.insert(page, copy);
    }
}
