//! A write to a page that is mapped read-only.
//!
//! Private memory that is exclusive is made writable where it is. What is not was shared by a fork: it is made exclusive
//! again, and writable, if by now nothing but this mapping refers to it, no more references than are known; a reference
//! may be somebody's who reads by it, after the process that it was taken from has unmapped the page (CVE-2020-29374).
//! Otherwise it is copied. A huge page that is shared is copied whole if a huge page can be had, and if not its entry is
//! split, and the small page copied.
//!
//! A page that is to be pinned is made exclusive in the same way, though nobody writes, and be it that the mapping may not
//! be written to: the entry stays read-only then.

use super::anon::{WRITTEN, owned};
use super::hand::{Fresh, Need, Why};
use super::{Bus, Fault, FaultError, Look, Outcome};
use crate::arch::{Attrs, Format};
use crate::file::FileCache;
use crate::frame::{FrameFlags, Part, folio_of, head_of, is_bad};
use crate::platform::Platform;
use crate::space::{Backing, Vma};
use crate::table::{FaultKind, Locked, Seen, Slot};
use crate::types::Pfn;

/// What a private page that may be written where it is has.
const OURS: FrameFlags = FrameFlags::ANON.union(FrameFlags::EXCLUSIVE);

impl<'f, 'a, P: Platform> Fault<'f, 'a, P> {
    /// Whether it is the one or the other is looked at here without the lock, and seen to again under it.
    #[inline]
    pub(super) fn write_protected(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Seen>) -> Look<'a, P> {
        let Some(pfn) = P::Format::frame(slot.raw(), slot.level()) else {
            return Look::Done(Outcome::Spurious);
        };
        if P::Format::attrs(slot.raw()).contains(Attrs::SPECIAL) {
            return match vma.backing {
                Backing::Physical(_) => self.write_frame(vma, slot),
                Backing::File { ref file, .. } if pfn != self.pin.platform().vm().zero_page() => {
                    self.write_direct(vma, file, slot)
                }
                _ => self.replace_zero(vma, slot, pfn),
            };
        }
        let p = self.pin.platform();
        let (_, _, flags) = folio_of(p, pfn);
        // Nobody uses what is lost, nor copies it. Of a file's page its cache says so.
        if flags.contains(FrameFlags::ANON) && is_bad(p, flags, pfn, P::Format::order(slot.level())) {
            return cannot_be_used(slot.level());
        }
        match flags.contains(FrameFlags::ZERO) {
            true => self.replace_zero(vma, slot, pfn),
            false if !vma.is_private() || flags.contains(OURS) => self.reuse(vma, slot, pfn),
            false => self.unshare(vma, slot, pfn),
        }
    }

    /// A page of private memory that others may see is made exclusive, for a pin.
    #[cold]
    pub(super) fn make_exclusive(
        &mut self,
        vma: &'f Vma<P>,
        slot: Slot<'f, P, Seen>,
        pfn: Pfn,
    ) -> Look<'a, P> {
        let p = self.pin.platform();
        // What is not counted may be no memory that anything is known of.
        let is_counted = !P::Format::attrs(slot.raw()).contains(Attrs::SPECIAL);
        if !is_counted || p.meta(head_of(p, pfn)).flags() & OURS != FrameFlags::ANON {
            return Look::Done(Outcome::Spurious);
        }
        self.unshare(vma, slot, pfn)
    }

    /// The page is made writable where it is.
    #[inline]
    fn reuse(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Seen>, pfn: Pfn) -> Look<'a, P> {
        let (asks, page) = (vma.asks_to_write(), pfn.add(P::Format::pages_into(self.addr, slot.level())));
        if asks && let Some(look) = self.ask_first(vma, page) {
            return look;
        }
        let Ok(slot) = slot.lock(|| !vma.is_retired()) else { return Look::Again };
        let p = self.pin.platform();
        let (folio, meta, flags) = folio_of(p, pfn);
        if vma.is_private() {
            if let Some(look) = self.flushes(&slot, pfn) {
                return look;
            }
            if !flags.contains(OURS) && !cfg!(mutant = "reuse_looks_once") {
                return Look::Again;
            }
        } else if let Backing::File { file, .. } = &vma.backing {
            // No copy was ever in the place of a shared page, so nothing need be flushed. It may be on its way out of the
            // file.
            if !file.is_attached(folio, page, vma.index_of(self.addr)) {
                drop(slot);
                return self.not_there(vma, file);
            }
            if asks && !self.has_leave(file, folio) {
                return Look::Again;
            }
            meta.set(FrameFlags::DIRTY);
        }
        self.widen(slot, FaultKind::Reuse)
    }

    /// Whether its file gave leave to write to this folio, and took nothing away since.
    fn has_leave(&self, file: &FileCache<P>, folio: Pfn) -> bool {
        self.hand.holds(Why::Leave(file.turn())).is_some_and(|page| page.folio().pfn() == folio)
    }
    /// The file is asked first, whether its page may be written to; `None` when that was done, and when the page is the
    /// file's no more.
    #[cold]
    pub(super) fn ask_first(&mut self, vma: &'f Vma<P>, pfn: Pfn) -> Option<Look<'a, P>> {
        let (p, index) = (self.pin.platform(), vma.index_of(self.addr));
        let Backing::File { file, .. } = &vma.backing else { return None };
        if self.has_leave(file, head_of(p, pfn)) {
            return None;
        }
        let page = Part::try_get(p, pfn, 0).filter(|page| file.has(page, index))?;
        Some(Look::Need(Need::Leave(file.clone(), page)))
    }

    /// A cleared page takes the place of a zero page.
    #[inline]
    fn replace_zero(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Seen>, pfn: Pfn) -> Look<'a, P> {
        let level = slot.level();
        let take_out = level > 0 && self.hand.small;
        // The page first, and then the lock.
        if !take_out {
            let page = self.hand.cleared(self.pin.platform(), self.space.limit_of(self.pin), level);
            if page.is_none() {
                return Look::Need(Need::Cleared(level));
            }
            self.hand.fresh = page;
        }
        let Ok(slot) = slot.lock(|| !vma.is_retired()) else { return Look::Again };
        if let Some(look) = self.flushes(&slot, pfn) {
            return look;
        }
        match take_out {
            true => self.take_huge(slot),
            false => self.replace(vma, slot, pfn),
        }
    }

    /// A copy takes the place of a page that others see, unless nobody does any more.
    #[inline]
    fn unshare(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Seen>, pfn: Pfn) -> Look<'a, P> {
        let (p, level, seen) = (self.pin.platform(), slot.level(), slot);
        loop {
            let Ok(slot) = seen.lock(|| !vma.is_retired()) else { return Look::Again };
            if let Some(look) = self.flushes(&slot, pfn) {
                return look;
            }
            let (_, meta, flags) = folio_of(p, pfn);
            if flags.contains(FrameFlags::ANON)
                && meta.counts().maps == 1
                && meta.try_reuse(self.hand.references_to(meta))
            {
                return self.widen_to(owned(vma), slot, FaultKind::Reuse);
            }
            if self.hand.has_copy(pfn, level) {
                return self.replace(vma, slot, pfn);
            }
            if level > 0 && flags.contains(FrameFlags::FILE) {
                return self.take_huge(slot);
            }
            if level > 0 && self.hand.small {
                return Look::Need(Need::Split);
            }
            let Some(source) = self.held(&slot, pfn) else { return Look::Again };
            drop(slot);
            if source.is_bad() {
                return cannot_be_used(level);
            }
            if level > 0 {
                return Look::Need(Need::Copy(source));
            }
            match Fresh::copy_now(p, self.space.limit_of(self.pin), source) {
                Ok(copy) => self.hand.fresh = Some(copy),
                Err(need) => return Look::Need(need),
            }
        }
    }

    /// Makes what the locked slot maps writable, and counts that as `kind`.
    pub(super) fn widen(&self, slot: Slot<'f, P, Locked<'f, P>>, kind: FaultKind) -> Look<'a, P> {
        self.widen_to(WRITTEN, slot, kind)
    }
    fn widen_to(&self, more: Attrs, mut slot: Slot<'f, P, Locked<'f, P>>, kind: FaultKind) -> Look<'a, P> {
        slot.widen(more | Attrs::ACCESSED);
        slot.tally(kind);
        Look::mapped(self.hand.major, slot.level() > 0, 0)
    }

    /// What the locked slot maps, at `pfn`, and a reference to it: it is mapped, so it is not free.
    pub(super) fn held(&self, slot: &Slot<'f, P, Locked<'f, P>>, pfn: Pfn) -> Option<Part<P>> {
        Part::try_get(self.pin.platform(), pfn, P::Format::order(slot.level()))
    }

    /// Asks for a flush while somebody's copy is stored and not flushed: its old page may still be cached on other CPUs.
    #[inline]
    fn flushes(&self, slot: &Slot<'f, P, Locked<'f, P>>, pfn: Pfn) -> Option<Look<'a, P>> {
        let was_flushed = || self.hand.holds(Why::Flushed).is_some_and(|page| page.pfn() == pfn);
        if !self.space.page_table().is_unflushed() || was_flushed() {
            return None;
        }
        Some(self.held(slot, pfn).map_or(Look::Again, |page| Look::Need(Need::Flush(page))))
    }
}

/// Of a huge page, the good parts can.
#[cold]
fn cannot_be_used<'a, P: Platform>(level: u8) -> Look<'a, P> {
    if level > 0 { Look::Need(Need::Split) } else { Look::error(FaultError::Bus(Bus::Poison)) }
}
