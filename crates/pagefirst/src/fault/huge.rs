//! Huge pages of private memory: where one fits, it goes one level up, and no table below it.
//!
//! It fits where the tables leave room for it, its span lies in one VMA, and policy and advice want it. If it cannot be
//! had, or the room is taken meanwhile, the fault goes on with a small page. A read maps the huge zero page. A write
//! replaces it by a huge page, whatever advice says by then; when none can be had it is taken out, and the small pages
//! that come in its place read as zero as well.

use super::anon::readable;
use super::hand::{Need, Why};
use super::{Fault, Look};
use crate::arch::Format;
use crate::frame::{Frame, head_of};
use crate::platform::Platform;
use crate::space::Vma;
use crate::table::{Batch, Counted, FaultKind, Locked, NewEntry, Nothing, Slot};
use crate::types::VirtAddr;

/// The level of the tables that hold the entries of huge pages.
pub(crate) const LEVEL: u8 = 1;

/// log2 of the number of small pages in a huge one.
pub(crate) fn order<F: Format>() -> u8 {
    F::order(LEVEL)
}

/// The huge zero page. Its reference becomes the mapping's.
struct HugeZero<'f, P: Platform> {
    vma: &'f Vma<P>,
    va: VirtAddr,
    page: &'f mut Option<Frame<P>>,
}

impl<P: Platform> Batch for HugeZero<'_, P> {
    fn va(&self) -> VirtAddr {
        self.va
    }
    fn level(&self) -> u8 {
        LEVEL
    }
    fn is_current(&self) -> bool {
        !self.vma.is_retired()
    }
    fn entry(&mut self, _: VirtAddr) -> Option<NewEntry> {
        let page = self.page.take()?;
        page.meta().map_held();
        let raw = P::Format::leaf(page.into_held(), LEVEL, readable(self.vma));
        Some(NewEntry { raw, counted: Counted::Nothing })
    }
    fn kind(&self) -> Option<FaultKind> {
        Some(FaultKind::AnonRead)
    }
}

impl<'f, 'a, P: Platform> Fault<'f, 'a, P> {
    /// Whether a huge page goes where nothing is mapped: there is no table for small ones.
    pub(super) fn is_room_for_huge(&self, vma: &Vma<P>, slot: &Slot<'_, P, Nothing>) -> bool {
        slot.level() >= LEVEL
            && !self.hand.small
            && vma.takes_huge(self.space.policy().huge, P::Format::span_of(self.addr, LEVEL))
    }

    #[inline(never)]
    pub(super) fn huge_page(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Nothing>) -> Look<'a, P> {
        match self.hand.cleared(self.pin.platform(), None, LEVEL) {
            Some(page) => self.install_private::<LEVEL>(vma, slot, page, FaultKind::AnonWrite, |_| true),
            None => Look::Need(Need::Cleared(LEVEL)),
        }
    }

    #[inline(never)]
    pub(super) fn huge_zero_page(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Nothing>) -> Look<'a, P> {
        let mut page = self.hand.take(Why::HugeZero).map(Frame::from);
        if page.is_none() {
            return Look::Need(Need::HugeZero);
        }
        let va = P::Format::span_of(self.addr, LEVEL).start;
        let mut batch = HugeZero { vma, va, page: &mut page };
        let look = self.install(slot, &mut batch);
        if let Some(page) = page {
            self.hand.hold(page.into(), Why::HugeZero);
        }
        look
    }

    /// Takes a huge page out of the locked slot: the huge zero page, when there is no huge page to replace it, or a file's,
    /// which a small page of private memory is to replace a part of. Small ones come in its place when the fault looks
    /// again. (So they may for other faults; all of them flush before.)
    #[cold]
    pub(super) fn take_huge(&mut self, slot: Slot<'f, P, Locked<'f, P>>) -> Look<'a, P> {
        let (level, span) = (slot.level(), P::Format::span_of(self.addr, slot.level()));
        self.hand.gather.taken(1);
        if let Some(page) = P::Format::frame(slot.take(), level) {
            self.hand.gather.page(span, head_of(self.pin.platform(), page));
        }
        Look::Need(Need::Tidy(span))
    }
}
