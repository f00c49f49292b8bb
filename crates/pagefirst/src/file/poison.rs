//! A page of a file in which hardware reported a memory error.
//!
//! It is marked (`frame/poison.rs`), so nobody maps it any more, nor looks it up; then its mappings are taken away, as for a
//! removal, but for one page. A large folio is never mapped by a huge entry again; its other pages are used as before. The
//! page stays in the cache. Whoever asks for it next takes it out, if what is stored is the same, and reads it anew, to another
//! frame; it has to be a folio by itself, that nobody has pinned, and whose counts are not full. Else he gets SIGBUS, until the
//! page is removed. If it was written and not stored, that is lost, and stays so: the page is dirty for ever, and storing it
//! fails. A part of a large folio of which nothing was lost is not stored with the others.
//!
//! Who takes it out says so first (`GOING`), and then asks whether it is dirty; who writes to it by `write_at` says that it is
//! dirty, and then asks whether it is still the file's. So what is written is lost with it and that is seen, or is written again.

use super::FileCache;
use super::cache::Outs;
use super::error::ReadError;
use super::truncate::{Removal, storing};
use crate::fault::Ticket;
use crate::frame::{FrameFlags, Part, with_file};
use crate::platform::Platform;
use crate::space::Backing;
use crate::sync::atomic::{Acquire, fence};
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
    let (meta, has_pins) = (page.meta(), page.meta().pins() > 0);
    fence(Acquire); // as in `drop_bad`
    let flags = meta.flags();
    // Being stored, it was dirty until then.
    let is_stored = !has_pins && !flags.intersects(FrameFlags::DIRTY | FrameFlags::STORING);
    if is_stored && page.folio().order() > 0 {
        p.meta(page.pfn()).set(FrameFlags::SPARED);
    }
    flags.contains(FrameFlags::DIRTY)
}

impl<P: Platform> FileCache<P> {
    /// As a removal: it waits for mapping calls that have the page's entries in hand.
    fn lose(&self, page: &Part<P>, index: u64) {
        let alone = self.changes.lock(self.p);
        let removal = Removal::bad(index, page.pfn());
        self.begin_removal(&mut self.writer.lock(self.p), &removal);
        self.unmap(&removal);
        self.end_removal(self.p, alone);
    }
    /// Takes the page at `index` out, which was found to be bad, if nothing is lost with it. Called unpinned, with no lock held.
    /// Who is told nothing looks again: it is the file's no longer, or whoever reported the error has yet to unmap it.
    ///
    /// # Errors
    /// [`ReadError::Poisoned`]: its contents are nowhere else, or somebody has it pinned, or its counts are full, or it is part
    /// of a larger folio.
    /// Others, for what has to come first: a store, or a removal, perhaps its own.
    pub(super) fn drop_bad(&self, index: u64) -> Result<(), ReadError<P>> {
        let (p, mut outs) = (self.p, Outs::new());
        let mut w = self.writer.lock(p);
        let Some(found) = self.index.get(&w, index).filter(|found| self.is_bad(found.pfn)) else {
            return Ok(());
        };
        let meta = p.meta(found.folio());
        let is_dirty = || meta.flags().contains(FrameFlags::DIRTY);
        // A count that is full does not say whether it is mapped.
        if found.order > 0 || meta.pins() > 0 || meta.is_saturated() || is_dirty() {
            return Err(ReadError::Poisoned);
        }
        if let Some(page) = storing(p, found.folio()) {
            return Err(ReadError::Blocked(Ticket::for_store(page)));
        }
        let turn = self.turn();
        if !turn.is_multiple_of(2) {
            return Err(ReadError::Removing(turn));
        }
        fence(Acquire); // a pin that has ended has said that the page is dirty
        meta.set(FrameFlags::GOING);
        let is_mapped = meta.maps_ordered() > 0;
        if is_mapped || is_dirty() {
            meta.clear(FrameFlags::GOING);
            return if is_mapped { Ok(()) } else { Err(ReadError::Poisoned) };
        }
        self.detach(&mut w, index, meta, &mut outs);
        Ok(())
    }
    /// Whether what is stored is all that is left of the bad page in this frame, and what it held.
    pub(super) fn is_spared(&self, pfn: Pfn) -> bool {
        self.p.meta(pfn).flags().contains(FrameFlags::SPARED)
    }
    /// Whether hardware reported an error in the frame.
    pub(super) fn is_bad(&self, pfn: Pfn) -> bool {
        self.p.meta(pfn).flags().contains(FrameFlags::POISON)
    }
}
