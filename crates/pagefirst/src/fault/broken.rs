//! Copy-on-write where nothing may take a page's place before that is flushed ([`Format::BREAK_BEFORE_MAKE`]).
//!
//! The entry is broken: not present for hardware, and otherwise as it was, so that mapping calls take it out or change it
//! as ever, and nobody installs anything there. Then it is flushed, and then made anew, for the copy, writable at once.
//! While that is under way other faults come again. Should it not come to its end (a mapping call came between), the next
//! fault finds nobody at work and makes the entry again what it was.
//!
//! | | break and make | fault | mapping call |
//! |---|---|---|---|
//! | break and make | the later one finds another page, or flushes as well | comes again | the entry is not what it was: look again |

use super::anon::{owned, private_entry};
use super::hand::{Need, Why};
use super::{Fault, Look, Outcome};
use crate::arch::{Attrs, Format};
use crate::frame;
use crate::platform::Platform;
use crate::space::Vma;
use crate::sync::atomic::{SeqCst, fence};
use crate::table::{Counted, FaultKind, Locked, Seen, Slot, Walk};
use crate::types::Pfn;

impl<'f, 'a, P: Platform> Fault<'f, 'a, P> {
    /// A broken entry: somebody is at work on it, or gave up.
    #[cold]
    pub(super) fn broken(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Seen>) -> Look<'a, P> {
        if self.space.page_table().is_unflushed() {
            return Look::Done(Outcome::Spurious);
        }
        self.mark(vma, slot, Attrs::ACCESSED)
    }

    /// The page at `old` is mapped read-only and the one in hand is to take its place; the slot is locked.
    #[cold]
    pub(super) fn break_up(
        &mut self,
        vma: &'f Vma<P>,
        mut slot: Slot<'f, P, Locked<'f, P>>,
        old: Pfn,
    ) -> Look<'a, P> {
        let (p, table) = (self.pin.platform(), self.space.page_table());
        let Some(held) = self.held(&slot, old) else { return Look::Again };
        slot.break_up();
        fence(SeqCst);
        if table.cpus().is_only(p.cpu(), p.cpus()) {
            // This CPU's own stale translation.
            p.sync_local(table.tag(), self.addr, false);
            return self.make(vma, slot, old);
        }
        table.begin_unflushed();
        self.hand.hold(held, Why::Unflushed);
        self.hand.gather.taken(1);
        self.hand.gather.touch(P::Format::span_of(self.addr, slot.level()));
        Look::Need(Need::Settle)
    }

    /// The flush of what was broken is done: makes it anew, if it is still there and nobody used it meanwhile.
    #[cold]
    pub(super) fn make_anew(&mut self) -> Look<'a, P> {
        let table = self.space.page_table();
        let old = self.hand.holds(Why::Unflushed).map(|page| page.pfn());
        let mut look = Look::Again;
        if let Some(vma) = self.space.find(self.pin, self.addr)
            && vma.is_private()
            && vma.prot.allows(self.access)
            && let Walk::Seen(slot) | Walk::Huge(slot) = table.walk(self.pin, self.addr)
            && let Some(page) = P::Format::frame(slot.raw(), slot.level())
            && Some(page) == old
            && P::Format::attrs(slot.raw()).contains(Attrs::NONE)
            && let Ok(slot) = slot.lock(|| !vma.is_retired())
        {
            if let Some(taken) = table.taken_unflushed(0)
                && !self.hand.gather.is_flushed_before(self.addr, taken)
            {
                return Look::Need(Need::FlushBefore(taken, slot.level()));
            }
            look = self.make(vma, slot, page);
        }
        drop(self.hand.take(Why::Unflushed));
        table.end_unflushed();
        look
    }

    /// The entry is broken and flushed: it becomes that of the page in hand.
    fn make(&mut self, vma: &'f Vma<P>, mut slot: Slot<'f, P, Locked<'f, P>>, old: Pfn) -> Look<'a, P> {
        let p = self.pin.platform();
        let Some(fresh) = self.hand.fresh.take() else { return Look::Again };
        let level = slot.level();
        debug_assert_eq!(level, fresh.level);
        let span = P::Format::span_of(self.addr, level);
        let special = old == p.vm().zero_page();
        let (old, _, flags) = frame::folio_of(p, old);
        let entry = private_entry(self.space.root(), vma, span.start, fresh.page, level, owned(vma));
        slot.replace(Counted::page(flags), entry);
        slot.tally(FaultKind::Copy);
        drop(slot);
        if !special {
            frame::unmap(p, old);
        }
        Look::mapped(self.hand.major, level > 0, 0)
    }
}
