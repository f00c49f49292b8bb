//! Copy-on-write: a private write to a page that is not ours.
//!
//! Where nothing is mapped the copy is installed like any page. Where the page itself is mapped read-only, other CPUs
//! may have that translation cached: the copy is stored read-only, flushed, and only then made writable, or else they
//! could read the old page after somebody wrote the copy. When no other CPU can have the space's translations, read
//! after the read-only store and a fence, all of it is done in one locked section.

use super::anon::{WRITTEN, owned, private_page, readable};
use super::hand::{Fresh, Need, Why};
use super::{Fault, Look};
use crate::arch::{Attrs, Format};
use crate::file::FileCache;
use crate::frame::{self, Frame, Part, folio_of};
use crate::mem::Shared;
use crate::platform::Platform;
use crate::space::Vma;
use crate::sync::atomic::{SeqCst, fence};
use crate::table::{Counted, FaultKind, Locked, Nothing, Slot, Walk};
use crate::types::{Access, Pfn};

impl<'f, 'a, P: Platform> Fault<'f, 'a, P> {
    /// Nothing is mapped: a copy of the file's page.
    #[inline]
    pub(super) fn private_copy(
        &mut self,
        vma: &'f Vma<P>,
        file: &'f Shared<P, FileCache<P>>,
        slot: Slot<'f, P, Nothing>,
    ) -> Look<'a, P> {
        let index = vma.index_of(self.addr);
        let is_it = |page: &Part<P>| file.has(page, index);
        let in_hand = self.hand.fresh.take_if(|fresh| fresh.copy_of.as_ref().is_some_and(is_it));
        let copy = match in_hand {
            Some(copy) => copy,
            None => {
                let p = self.pin.platform();
                let page = file.cursor(self.pin).look(index).and_then(|found| Part::try_get(p, found.pfn, 0));
                let Some(page) = page.filter(is_it) else { return self.not_there(vma, file) };
                match Fresh::copy_now(p, self.space.limit_of(self.pin), page) {
                    Ok(copy) => copy,
                    Err(need) => return Look::Need(need),
                }
            }
        };
        self.install_private::<0>(vma, slot, copy, FaultKind::FileCopy, is_it)
    }

    /// The page at `old` is mapped read-only and the one in hand takes its place; the slot is locked.
    #[inline]
    pub(super) fn replace(
        &mut self,
        vma: &'f Vma<P>,
        mut slot: Slot<'f, P, Locked<'f, P>>,
        old: Pfn,
    ) -> Look<'a, P> {
        if P::Format::BREAK_BEFORE_MAKE && !cfg!(mutant = "copy_without_break") {
            return self.break_up(vma, slot, old);
        }
        let p = self.pin.platform();
        let Some(fresh) = self.hand.fresh.take() else { return Look::Again };
        let table = self.space.page_table();
        let special = old == p.vm().zero_page();
        let (old, _, flags) = folio_of(p, old);
        let level = slot.level();
        debug_assert_eq!(level, fresh.level);
        let span = P::Format::span_of(self.addr, level);
        let copy = private_page(self.space.root(), vma, span.start, fresh.page);
        table.begin_unflushed();
        let at_once = if cfg!(mutant = "copy_writable_at_once") { owned(vma) } else { Attrs::empty() };
        slot.replace(Counted::page(flags), P::Format::leaf(copy, level, readable(vma) | at_once));
        slot.tally(FaultKind::Copy);
        fence(SeqCst);
        let alone = table.cpus().is_only(p.cpu(), p.cpus());
        if alone {
            // This CPU's own stale translation goes before another thread can run here, in this space or, by tag, out of it.
            p.sync_local(table.tag(), self.addr, false);
            slot.put(P::Format::leaf(copy, level, readable(vma) | owned(vma)));
            table.end_unflushed();
        } else {
            // Mapped and locked, so it is not free.
            let Some(copy) = Frame::try_get(p, copy) else { unreachable!("{copy:?} is mapped and free") };
            self.hand.hold(copy.into(), Why::Unflushed);
        }
        drop(slot);
        // The old page's mapping ends after the flush, which was this CPU's own if it is alone.
        match special {
            true if alone => {}
            true => self.hand.gather.touch(span),
            false if alone => frame::unmap(p, old),
            false if cfg!(mutant = "copy_drops_old_before_flush") => {
                self.hand.gather.touch(span);
                frame::unmap(p, old);
            }
            false => self.hand.gather.page(span, old),
        }
        if alone {
            return Look::mapped(self.hand.major, level > 0, 0);
        }
        Look::Need(Need::Settle)
    }

    /// The flush of a copy that was stored read-only is done: makes it writable, if it is still there and may be. It may
    /// not if a fork has shared it since.
    #[cold]
    pub(super) fn settle_copy(&mut self) -> Look<'a, P> {
        let table = self.space.page_table();
        let mut huge = false;
        if let Some(copy) = self.hand.take(Why::Unflushed)
            && let Some(vma) = self.space.find(self.pin, self.addr)
            && vma.prot.allows(Access::Write)
            && let Walk::Seen(slot) | Walk::Huge(slot) = table.walk(self.pin, self.addr)
            && P::Format::frame(slot.raw(), slot.level()) == Some(copy.pfn())
            && let Ok(mut slot) = slot.lock(|| !vma.is_retired())
            && (copy.is_exclusive() || cfg!(mutant = "settle_shared_copy"))
        {
            slot.widen(WRITTEN);
            huge = slot.level() > 0;
        }
        table.end_unflushed();
        Look::mapped(self.hand.major, huge, 0)
    }
}
