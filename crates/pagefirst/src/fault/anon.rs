//! Private memory where nothing is mapped: the zero page for a read, a cleared page for a write; huge ones where they
//! fit (`huge`).

use super::hand::{Fresh, Need};
use super::{Fault, Look};
use crate::arch::{Attrs, Format};
use crate::frame::{Frame, Part};
use crate::mem::Shared;
use crate::platform::Platform;
use crate::rmap::Root;
use crate::space::Vma;
use crate::table::{Batch, Counted, FaultKind, NewEntry, Nothing, Slot};
use crate::types::{Pfn, Prot, VirtAddr};

/// The attributes of an entry for a page of this VMA, used at once, not writable.
pub(super) fn readable<P: Platform>(vma: &Vma<P>) -> Attrs {
    let exec = if vma.prot.contains(Prot::EXEC) { Attrs::EXEC } else { Attrs::empty() };
    Attrs::ACCESSED | exec
}

/// What an entry has besides when its page is this mapping's alone: it is not writable where only a pin made it so.
pub(super) fn owned<P: Platform>(vma: &Vma<P>) -> Attrs {
    if vma.prot.contains(Prot::WRITE) { WRITTEN } else { Attrs::empty() }
}

/// The zero page, not counted anywhere.
struct Zero<'f, P: Platform> {
    vma: &'f Vma<P>,
    va: VirtAddr,
    zero: Pfn,
}

impl<P: Platform> Batch for Zero<'_, P> {
    fn va(&self) -> VirtAddr {
        self.va
    }
    fn is_current(&self) -> bool {
        !self.vma.is_retired()
    }
    fn entry(&mut self, _: VirtAddr) -> Option<NewEntry> {
        let raw = P::Format::leaf(self.zero, 0, readable(self.vma) | Attrs::SPECIAL);
        Some(NewEntry { raw, counted: Counted::Nothing })
    }
    fn kind(&self) -> Option<FaultKind> {
        Some(FaultKind::AnonRead)
    }
}

/// A page that only this fault has, cleared or a copy, on its way to becoming private memory.
struct Private<'f, P: Platform, V, const LEVEL: u8> {
    root: &'f Shared<P, Root<P>>,
    vma: &'f Vma<P>,
    va: VirtAddr,
    page: Option<Fresh<P>>,
    /// Whether the page it is a copy of is still what was copied.
    source_is_valid: V,
    kind: FaultKind,
}

/// What the entry of a page has that is written at once.
pub(super) const WRITTEN: Attrs = Attrs::WRITE.union(Attrs::DIRTY);

/// Makes a page private memory that is mapped at `va`. Its reference becomes the mapping's.
#[inline]
pub(super) fn private_page<P: Platform>(
    root: &Shared<P, Root<P>>,
    vma: &Vma<P>,
    va: VirtAddr,
    page: Frame<P>,
) -> Pfn {
    if vma.prot.contains(Prot::EXEC) {
        page.frames().for_each(|pfn| page.platform().sync_instructions(pfn));
    }
    page.into_anonymous(root.name(), vma.anon_index(va))
}

/// The same, and its entry in a table at `level`.
#[inline]
pub(super) fn private_entry<P: Platform>(
    root: &Shared<P, Root<P>>,
    vma: &Vma<P>,
    va: VirtAddr,
    page: Frame<P>,
    level: u8,
    attrs: Attrs,
) -> u64 {
    P::Format::leaf(private_page(root, vma, va, page), level, readable(vma) | attrs)
}

impl<P: Platform, V: Fn(&Part<P>) -> bool, const LEVEL: u8> Batch for Private<'_, P, V, LEVEL> {
    #[inline]
    fn va(&self) -> VirtAddr {
        self.va
    }
    #[inline]
    fn level(&self) -> u8 {
        LEVEL
    }
    #[inline]
    fn is_current(&self) -> bool {
        !self.vma.is_retired()
    }
    #[inline(always)]
    fn entry(&mut self, _: VirtAddr) -> Option<NewEntry> {
        let fresh = self.page.take()?;
        if let Some(source) = &fresh.copy_of
            && !(self.source_is_valid)(source)
        {
            return None;
        }
        Some(NewEntry {
            raw: private_entry(self.root, self.vma, self.va, fresh.page, LEVEL, WRITTEN),
            counted: Counted::Anon,
        })
    }
    #[inline]
    fn kind(&self) -> Option<FaultKind> {
        Some(self.kind)
    }
}

impl<'f, 'a, P: Platform> Fault<'f, 'a, P> {
    #[inline]
    pub(super) fn zero_page(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Nothing>) -> Look<'a, P> {
        if self.is_room_for_huge(vma, &slot) {
            return self.huge_zero_page(vma, slot);
        }
        let zero = self.pin.platform().vm().zero_page();
        self.install(slot, &mut Zero { vma, va: self.addr.page(), zero })
    }

    #[inline]
    pub(super) fn fresh_page(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Nothing>) -> Look<'a, P> {
        if self.is_room_for_huge(vma, &slot) {
            return self.huge_page(vma, slot);
        }
        match self.hand.cleared(self.pin.platform(), self.space.limit_of(self.pin), 0) {
            Some(page) => self.install_private::<0>(vma, slot, page, FaultKind::AnonWrite, |_| true),
            None => Look::Need(Need::Cleared(0)),
        }
    }

    /// Installs a private page. It is in hand afterwards if it could not be.
    #[inline(always)]
    pub(super) fn install_private<const LEVEL: u8>(
        &mut self,
        vma: &'f Vma<P>,
        slot: Slot<'f, P, Nothing>,
        page: Fresh<P>,
        kind: FaultKind,
        source_is_valid: impl Fn(&Part<P>) -> bool,
    ) -> Look<'a, P> {
        let va = P::Format::span_of(self.addr, LEVEL).start;
        let mut batch: Private<'_, P, _, LEVEL> =
            Private { root: self.space.root(), vma, va, page: Some(page), source_is_valid, kind };
        let look = self.install(slot, &mut batch);
        if let Some(page) = batch.page {
            if cfg!(mutant = "refused_install_keeps_page") {
                core::mem::forget(page);
            } else {
                self.hand.fresh = Some(page);
            }
        }
        look
    }
}
