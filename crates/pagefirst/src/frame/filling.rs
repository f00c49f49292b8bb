//! Pages that are being filled: for who reads files, and completes them in interrupts.

use super::anywhere::Work;
use super::{Frame, FrameFlags};
use crate::platform::Platform;
use crate::types::{PAGE_SIZE, Pfn};

/// Possession proves a reference to a folio that is [`FILLING`](FrameFlags::FILLING), and that nobody else uses the bytes
/// of one of its pages.
pub(crate) struct Filling {
    work: Work,
    page: Pfn,
}

impl Filling {
    /// A page by itself, which the caller has prepared to be filled, and lets nobody else fill.
    pub fn new<P: Platform>(page: Frame<P>) -> Self {
        debug_assert!(page.meta().flags().contains(FrameFlags::FILLING) && page.order() == 0);
        Filling { page: page.pfn(), work: Work::whole(page) }
    }
    /// The same for a folio of several, whose pages are to be filled one by one, the first `pages` of them, and for what
    /// is left of it when they have been [split off](Self::split_off).
    pub fn of_several<P: Platform>(folio: Frame<P>, pages: u32) -> Self {
        debug_assert!(folio.meta().flags().contains(FrameFlags::FILLING));
        Filling { page: folio.pfn(), work: Work::of_several(folio, pages) }
    }
    /// One of the folio's pages, each of them once.
    pub fn split_off(&mut self, page: u32) -> Filling {
        Filling { page: self.work.folio.add(page), work: self.work.split_off() }
    }
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: others use the bytes of a page only when it is up to date, which it becomes when this is given up; they
        // are changed by `&mut self` alone.
        unsafe { self.work.bytes(self.page) }
    }
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes it the only borrow.
        unsafe { core::slice::from_raw_parts_mut(self.work.of.page(self.page).as_ptr(), PAGE_SIZE as usize) }
    }
    /// The page is `with`, up to date or failed, unless it is going. If it is the last part of its folio, that is so, and
    /// who waits for it is told. Takes no lock, and frees nothing.
    pub fn end(self, with: FrameFlags) {
        // One part that fails is enough.
        let each = |folio: &super::FrameMeta| {
            if folio.order() > 0 && with == FrameFlags::FAILED {
                folio.set(with);
            }
        };
        self.work.end(each, |folio| folio.end_filling(with));
    }
}
