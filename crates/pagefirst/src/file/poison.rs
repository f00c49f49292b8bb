//! A page of a file in which hardware reported a memory error.
//!
//! It is marked (`frame/poison.rs`), so nobody maps it any more, nor looks it up; then its mappings are taken away, as for a
//! removal, but for one page. A large folio is never mapped by a huge entry again; its other pages are used as before. The
//! page stays in the cache. Whoever asks for it next drops it, if what is stored is the same, and reads it anew, to another
//! frame; it has to be a folio by itself that nobody refers to. Else he gets SIGBUS, until the page is removed. If it was
//! written and not stored, that is lost, and stays so: the page is dirty for ever, and storing it fails.

use super::FileCache;
use super::truncate::Removal;
use crate::frame::{FrameFlags, Part, with_file};
use crate::platform::Platform;
use crate::space::Backing;
use crate::types::Pfn;

/// Takes the mappings of a marked page away; tells whether something that was not stored is lost with it. Called unpinned,
/// with no lock held; may sleep.
pub(crate) fn lose<P: Platform>(p: &'static P, page: &Part<P>) -> bool {
    let index = page.index();
    // Who is mapped has the file.
    let mapped = with_file(p, page.folio(), |file| file.mappings.lock(p).next(None, index, index)).flatten();
    if let Some((_, vma)) = mapped
        && let Backing::File { file, .. } = &vma.backing
    {
        file.lose(page, index);
    }
    page.meta().flags().contains(FrameFlags::DIRTY)
}

impl<P: Platform> FileCache<P> {
    /// As a removal: it waits for mapping calls that have the page's entries in hand.
    fn lose(&self, page: &Part<P>, index: u64) {
        let _alone = self.changes.lock(self.p);
        let removal = Removal::bad(index, page.pfn());
        self.begin_removal(&mut self.writer.lock(self.p), &removal);
        self.unmap(&removal);
        self.end_removal(self.p);
    }
    /// Whether hardware reported an error in the frame.
    pub(super) fn is_bad(&self, pfn: Pfn) -> bool {
        self.p.meta(pfn).flags().contains(FrameFlags::POISON)
    }
}
