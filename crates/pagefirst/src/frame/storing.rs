//! Pages that are being stored, whatever platform they are of: for who writes files, and completes that in interrupts.

use super::filling::left;
use super::{Frame, FrameFlags, put_anywhere};
use crate::fault::page_key;
use crate::platform::Platform;
use crate::sync::held;
use crate::types::{PAGE_SIZE, Pfn};
use core::ptr::NonNull;

/// Possession proves a reference to a folio that is [`STORING`](FrameFlags::STORING), and to the copy of one of its pages,
/// which nobody else uses.
pub(crate) struct Storing {
    of: &'static dyn Pages,
    folio: Pfn,
    copy: Option<Pfn>,
    /// How many parts of the folio end with this.
    parts: u32,
}

/// What storing pages needs of a platform.
trait Pages: Sync {
    fn page(&'static self, pfn: Pfn) -> NonNull<u8>;
    fn another(&'static self, folio: Pfn);
    fn end(&'static self, folio: Pfn, parts: u32, failed: bool);
    fn put(&'static self, pfn: Pfn);
}

impl<P: Platform> Pages for P {
    fn page(&'static self, pfn: Pfn) -> NonNull<u8> {
        Platform::page(self, pfn)
    }
    fn another(&'static self, folio: Pfn) {
        let taken = self.meta(folio).try_get();
        debug_assert!(taken);
    }
    fn end(&'static self, folio: Pfn, parts: u32, failed: bool) {
        let ended = held::nothing_more(self, || {
            let meta = self.meta(folio);
            if failed {
                meta.set(FrameFlags::DIRTY);
            }
            let ended = meta.order() == 0 || left(self, folio).end_parts(parts);
            if ended {
                meta.clear(FrameFlags::STORING);
            }
            ended
        });
        if ended {
            self.ready(page_key(folio));
        }
        self.put(folio);
    }
    fn put(&'static self, pfn: Pfn) {
        held::nothing_more(self, || put_anywhere(self, pfn));
    }
}

impl Storing {
    /// Begins to store a folio, which is up to date: a page by itself, or the first `pages` of several, to be
    /// [split off](Self::split_off). `None` if it is being stored already.
    pub fn begin<P: Platform>(folio: &Frame<P>, pages: u32) -> Option<Self> {
        if !folio.meta().begin(FrameFlags::STORING) {
            return None;
        }
        let parts = if folio.order() > 0 { pages + 1 } else { 1 };
        if folio.order() > 0 {
            left(folio.platform(), folio.pfn()).begin_parts(parts);
        }
        let this = folio.another().into_held();
        Some(Storing { of: folio.platform(), folio: this, copy: None, parts })
    }
    /// With a copy of the page by itself, which nobody else has.
    pub fn with_copy<P: Platform>(self, copy: Frame<P>) -> Storing {
        Storing { copy: Some(copy.into_held()), ..self }
    }
    /// One of the pages of several, each of them once, with a copy of it that nobody else has.
    pub fn split_off<P: Platform>(&mut self, copy: Frame<P>) -> Storing {
        assert!(self.parts > 1);
        self.parts -= 1;
        self.of.another(self.folio);
        Storing { of: self.of, folio: self.folio, copy: Some(copy.into_held()), parts: 1 }
    }
    /// The copy, to be given up.
    pub fn take_copy(&mut self) -> Option<Pfn> {
        self.copy.take()
    }
    pub fn bytes(&self) -> &[u8] {
        let Some(copy) = self.copy else { return &[] };
        // SAFETY: the frame's 4 KiB in the direct map, which only the handle has; the lifetime is bound to it.
        unsafe { core::slice::from_raw_parts(self.of.page(copy).as_ptr(), PAGE_SIZE as usize) }
    }
    /// The page was stored, or is dirty again. If it was the last part of its folio, who waits for that is told. Takes no
    /// lock, and frees nothing.
    pub fn end(mut self, failed: bool) {
        if let Some(copy) = self.copy.take() {
            self.of.put(copy);
        }
        self.of.end(self.folio, self.parts, failed);
    }
}
