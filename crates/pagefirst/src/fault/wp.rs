//! A write to a page that is mapped read-only.

use super::hand::Need;
use super::{Bus, Fault, FaultError, Look, Outcome};
use crate::arch::{Attrs, Format};
use crate::frame::{Frame, FrameFlags};
use crate::platform::Platform;
use crate::space::{Backing, Vma};
use crate::table::{FaultKind, Seen, Slot};

impl<'f, 'a, P: Platform> Fault<'f, 'a, P> {
    #[inline(never)]
    pub(super) fn write_protected(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Seen>) -> Look<'a, P> {
        let p = self.pin.platform();
        let raw = slot.raw();
        let level = slot.level();
        let Some(pfn) = P::Format::frame(raw, level) else { return Look::Done(Outcome::Spurious) };
        let meta = p.meta(pfn);
        // The page first, before the lock: a zero page is one for ever.
        let special = P::Format::attrs(raw).contains(Attrs::SPECIAL);
        if special && !self.hand.has_cleared(level) {
            return Look::Need(Need::Cleared(level));
        }
        let Ok(mut slot) = slot.lock(|| !vma.is_retired()) else { return Look::Again };
        // A reference taken under the table's lock: the page is mapped, so it is not free.
        let held = || Frame::try_get(p, pfn);
        // Somebody's copy is stored and not flushed: its old page may still be cached on other CPUs.
        let flushed = self.hand.flushed.as_ref().is_some_and(|f| f.pfn() == pfn);
        if self.space.page_table().is_unflushed() && !flushed {
            return held().map_or(Look::Again, |page| Look::Need(Need::Flush(page)));
        }
        if special || meta.flags().contains(FrameFlags::ZERO) {
            if level > 0 && self.hand.small {
                return self.take_huge_zero(slot);
            }
            if !self.hand.has_cleared(level) {
                return Look::Need(Need::Cleared(level));
            }
        } else if !vma.is_private() || meta.flags().contains(FrameFlags::ANON | FrameFlags::EXCLUSIVE) {
            if let Backing::File { file, .. } = &vma.backing
                && !vma.is_private()
            {
                // The file may have shrunk since the page was mapped.
                if !file.is_attached(meta, vma.index_of(self.addr)) {
                    return Look::error(FaultError::Bus(Bus::BeyondEnd));
                }
                meta.set(FrameFlags::DIRTY);
            }
            slot.widen(Attrs::WRITE | Attrs::ACCESSED | Attrs::DIRTY);
            slot.tally(FaultKind::Reuse);
            return Look::mapped(self.hand.major, level > 0, 0);
        } else if self.hand.copied().is_none_or(|source| source.pfn() != pfn) {
            return held().map_or(Look::Again, |page| Look::Need(Need::Copy(page)));
        }
        match self.hand.fresh.take() {
            Some(fresh) => self.replace(vma, slot, pfn, fresh),
            None => Look::Again,
        }
    }
}
