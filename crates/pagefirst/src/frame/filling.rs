//! Pages that are being filled, whatever platform they are of: for who reads files, and completes them in interrupts.

use super::{Frame, FrameFlags, put_anywhere};
use crate::fault::page_key;
use crate::platform::Platform;
use crate::sync::held;
use crate::types::{PAGE_SIZE, Pfn};
use core::ptr::NonNull;

/// Possession proves a reference to a folio that is [`FILLING`](FrameFlags::FILLING), and that nobody else uses the bytes
/// of one of its pages.
pub(crate) struct Filling {
    of: &'static dyn Pages,
    folio: Pfn,
    page: Pfn,
    /// How many parts of the folio end with this.
    parts: u32,
}

/// What filling pages needs of a platform.
trait Pages: Sync {
    fn page(&'static self, pfn: Pfn) -> NonNull<u8>;
    fn another(&'static self, folio: Pfn);
    fn end(&'static self, folio: Pfn, parts: u32, with: FrameFlags);
    fn clear(&'static self, folio: Pfn, state: FrameFlags);
}

impl<P: Platform> Pages for P {
    fn page(&'static self, pfn: Pfn) -> NonNull<u8> {
        Platform::page(self, pfn)
    }
    fn another(&'static self, folio: Pfn) {
        let taken = self.meta(folio).try_get();
        debug_assert!(taken);
    }
    fn end(&'static self, folio: Pfn, parts: u32, with: FrameFlags) {
        let ended = held::nothing_more(self, || {
            let meta = self.meta(folio);
            // One part that fails is enough.
            if meta.order() > 0 && with == FrameFlags::FAILED {
                meta.set(with);
            }
            let ended = meta.order() == 0 || left(self, folio).end_parts(parts);
            if ended {
                meta.end_filling(with);
            }
            ended
        });
        if ended {
            self.ready(page_key(folio));
        }
        held::nothing_more(self, || put_anywhere(self, folio));
    }
    fn clear(&'static self, folio: Pfn, state: FrameFlags) {
        self.meta(folio).clear(state);
        self.ready(page_key(folio));
        held::nothing_more(self, || put_anywhere(self, folio));
    }
}

/// Possession proves a reference to a folio, and that it is in a state that others wait for.
pub(crate) struct During {
    of: &'static dyn Pages,
    folio: Pfn,
    state: FrameFlags,
}

impl During {
    /// Puts the folio into this state; `None` if it is in it already.
    pub fn begin<P: Platform>(folio: &Frame<P>, state: FrameFlags) -> Option<Self> {
        let begun = folio.meta().begin(state);
        begun.then(|| During { of: folio.platform(), folio: folio.another().into_held(), state })
    }
}

impl Drop for During {
    /// The state ends, and who waits for that is told. Takes no lock, and frees nothing.
    fn drop(&mut self) {
        self.of.clear(self.folio, self.state);
    }
}

/// Who keeps count of the parts of a folio of several that are being filled: its first tail.
pub(super) fn left<P: Platform>(p: &'static P, folio: Pfn) -> &'static super::FrameMeta {
    p.meta(folio.add(1))
}

impl Filling {
    /// A page by itself, which the caller has prepared to be filled, and lets nobody else fill.
    pub fn new<P: Platform>(page: Frame<P>) -> Self {
        debug_assert!(page.meta().flags().contains(FrameFlags::FILLING) && page.order() == 0);
        Filling { of: page.platform(), folio: page.pfn(), page: page.into_held(), parts: 1 }
    }
    /// The same for a folio of several, whose pages are to be filled one by one, the first `pages` of them, and for what
    /// is left of it when they have been [split off](Self::split_off).
    pub fn of_several<P: Platform>(folio: Frame<P>, pages: u32) -> Self {
        debug_assert!(folio.meta().flags().contains(FrameFlags::FILLING) && folio.order() > 0);
        let parts = pages + 1;
        left(folio.platform(), folio.pfn()).begin_parts(parts);
        Filling { of: folio.platform(), folio: folio.pfn(), page: folio.into_held(), parts }
    }
    /// One of the folio's pages, each of them once.
    pub fn split_off(&mut self, page: u32) -> Filling {
        assert!(self.parts > 1);
        self.parts -= 1;
        self.of.another(self.folio);
        Filling { of: self.of, folio: self.folio, page: self.folio.add(page), parts: 1 }
    }
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the frame's 4 KiB in the direct map; others use the bytes of a page only when it is up to date, which
        // it becomes when this is given up; the lifetime is bound to the handle.
        unsafe { core::slice::from_raw_parts(self.of.page(self.page).as_ptr(), PAGE_SIZE as usize) }
    }
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes it the only borrow.
        unsafe { core::slice::from_raw_parts_mut(self.of.page(self.page).as_ptr(), PAGE_SIZE as usize) }
    }
    /// The page is `with`, up to date or failed, unless it is going. If it is the last part of its folio, that is so, and
    /// who waits for it is told. Takes no lock, and frees nothing.
    pub fn end(self, with: FrameFlags) {
        self.of.end(self.folio, self.parts, with);
    }
}
