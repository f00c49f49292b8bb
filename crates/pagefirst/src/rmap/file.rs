//! Where a file is mapped: its mappings, by the pages of it that they show.
//!
//! What a walk may miss: a mapping that comes behind it, and entries that go there. Who takes something away has announced
//! that before, so no page comes there anew; and [`Tree::came`] tells that what was there before may have to be looked for
//! once more (`file::truncate`).

use super::anon::{Moved, Space};
use super::tree::{Links, Order, Place, Tree};
use crate::file::FileCache;
use crate::mem::{Pooled, Shared};
use crate::platform::Platform;
use crate::space::{Backing, Vma};
use crate::sync::Keyed;
use crate::table::PageTable;
use crate::types::{PAGE_SHIFT, VirtAddr, VirtRange};

/// The mappings of one file. A space takes its own out before it lets go of its VMAs.
pub(crate) type Mappings<P> = Tree<P, OfFile>;

/// The mappings of a file, by the indexes that they show.
pub(crate) struct OfFile;

impl<P: Platform> Order<P> for OfFile {
    type Node = Vma<P>;
    fn links(vma: &Vma<P>) -> &Keyed<Links<P, Self>> {
        match vma.spot() {
            Some(spot) => &spot.of_file,
            None => unreachable!("a mapping of no file in a file's tree"),
        }
    }
    fn place(vma: &Vma<P>) -> Place {
        Place { first: vma.index_of(vma.range.start), id: vma.id }
    }
    fn last(vma: &Vma<P>) -> u64 {
        vma.index_of(vma.range.start) + vma.range.pages() - 1
    }
}

/// What a mapping has that the reverse map finds by its own: the space it is in, and its places there.
pub(crate) struct Spot<P: Platform> {
    pub space: Shared<P, Space<P>>,
    of_file: Keyed<Links<P, OfFile>>,
    pub(super) moved: Keyed<Links<P, Moved>>,
}

impl<P: Platform> Spot<P> {
    /// For a mapping of this space.
    pub fn new(space: Shared<P, Space<P>>) -> Self {
        Spot { space, of_file: Keyed::new(Links::new()), moved: Keyed::new(Links::new()) }
    }
}

impl<P: Platform> Pooled for Spot<P> {}

impl<P: Platform> FileCache<P> {
    /// Calls `f` with each mapping that shows pages of `first..=last`, the tables of its space, and the addresses of these
    /// pages. Called unpinned, with no lock held; so is `f`.
    ///
    /// The mapping may be retired, or not published yet, and its space be exiting: then it is not [live](Vma::is_live).
    /// False when mappings came meanwhile: some of them may have been missed.
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
                let range = part(&vma, first, last);
                range.into_iter().for_each(|range| f(&vma, &spot.space.table, range));
            }
        }
    }
}

/// The addresses of the pages of `first..=last` that a mapping shows, if it shows any.
pub(crate) fn part<P: Platform>(vma: &Vma<P>, first: u64, last: u64) -> Option<VirtRange> {
    let start = vma.index_of(vma.range.start);
    let at = |index: u64| VirtAddr(vma.range.start.0 + ((index - start) << PAGE_SHIFT));
    let (first, end) = (first.max(start), last.saturating_add(1).min(start + vma.range.pages()));
    (first < end).then(|| VirtRange::new(at(first), at(end)))
}

/// Takes out of the tables of a mapping of a file, which has become live, what is being removed from the file: every mapping
/// call does that for the mappings that it has made (`file::truncate`). Called by the space's writer, with nothing else
/// locked or pinned.
pub(crate) fn help<P: Platform>(vma: &Vma<P>) {
    if let Backing::File { file, .. } = &vma.backing {
        file.help_removal(vma);
    }
}

/// Puts a mapping where the reverse map finds it, if it has to be found by its own. Called with no lock held but the
/// writer's.
pub(crate) fn insert<P: Platform>(vma: &Shared<P, Vma<P>>) {
    let Some(spot) = vma.spot() else { return };
    if let Backing::File { file, .. } = &vma.backing {
        file.mappings.lock(file.p).insert(vma);
    }
    if vma.is_moved() {
        spot.space.moved().insert(vma);
    }
}

/// Takes it out of there. It has no entries any more, or another mapping has them.
pub(crate) fn remove<P: Platform>(vma: &Vma<P>) {
    let Some(spot) = vma.spot() else { return };
    if let Backing::File { file, .. } = &vma.backing {
        let out = file.mappings.lock(file.p).remove(vma);
        drop(out);
    }
    if vma.is_moved() {
        let out = spot.space.moved().remove(vma);
        drop(out);
    }
}
