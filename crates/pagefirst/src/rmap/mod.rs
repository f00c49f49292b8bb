//! From a page to every place where it is mapped.
//!
//! Who takes pages away, or write-protects them, walks the mappings of their owner and visits the tables of each by space
//! and range (protocol 2). It holds no lock meanwhile: what it found stays, for it is counted, tables included, and what
//! it does there is harmless if something else is mapped there by now, for it looks at each entry's page.

mod clean;
mod file;

pub(crate) use clean::Clean;
pub(crate) use file::{Mappings, Spot};

use crate::file::FileCache;
use crate::mem::Shared;
use crate::platform::Platform;
use crate::space::{Backing, Vma};
use crate::table::PageTable;
use crate::types::{PAGE_SHIFT, VirtAddr, VirtRange};

impl<P: Platform> FileCache<P> {
    /// Calls `f` with each mapping that shows pages of `first..=last`, the tables of its space, and the addresses of these
    /// pages. Called unpinned, with no lock held; so is `f`.
    ///
    /// The mapping may be retired, or not published yet, and its space be exiting. False when mappings came meanwhile: some
    /// of them may have been missed.
    pub(crate) fn for_each_mapping(
        &self,
        first: u64,
        last: u64,
        mut f: impl FnMut(&Vma<P>, &PageTable<P>, VirtRange),
    ) -> bool {
        let (mut came, mut after) = (None, None);
        loop {
            let (now, next) = {
                let mappings = self.mappings.lock(self.p);
                (mappings.came(), mappings.next(after, first, last))
            };
            let came = *came.get_or_insert(now);
            let Some((place, vma)) = next else { return came == now };
            after = Some(place);
            if let Some(spot) = vma.spot() {
                f(&vma, &spot.table, part(&vma, first, last));
            }
        }
    }
}

/// Puts a mapping into the tree of the file that it shows, if it shows one. Called with no lock held but the writer's.
pub(crate) fn insert<P: Platform>(vma: &Shared<P, Vma<P>>) {
    if let Backing::File { file, .. } = &vma.backing {
        file.mappings.lock(file.p).insert(vma);
    }
}

/// Takes a mapping out of it. It has no entries any more, or another mapping has them.
pub(crate) fn remove<P: Platform>(vma: &Vma<P>) {
    if let Backing::File { file, .. } = &vma.backing {
        let out = file.mappings.lock(file.p).remove(vma);
        drop(out);
    }
}

/// The addresses of the pages of `first..=last` that a mapping shows.
fn part<P: Platform>(vma: &Vma<P>, first: u64, last: u64) -> VirtRange {
    let start = vma.index_of(vma.range.start);
    let at = |index: u64| VirtAddr(vma.range.start.0 + ((index - start) << PAGE_SHIFT));
    let end = start + vma.range.pages();
    VirtRange::new(at(first.max(start)), at(last.saturating_add(1).min(end)))
}
