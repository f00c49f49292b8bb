//! Pages that are being stored: for who writes files, and completes that in interrupts.

use super::anywhere::Work;
use super::{Frame, FrameFlags};
use crate::platform::Platform;
use crate::types::Pfn;

/// Possession proves a reference to a folio that is [`STORING`](FrameFlags::STORING), and to the copy of one of its pages,
/// which nobody else uses.
pub(crate) struct Storing {
    work: Work,
    copy: Option<Pfn>,
}

impl Storing {
    /// Begins to store a folio, which is up to date: a page by itself, or the first `pages` of several, to be
    /// [split off](Self::split_off). `None` if it is being stored already.
    pub fn begin<P: Platform>(folio: &Frame<P>, pages: u32) -> Option<Self> {
        if !folio.meta().begin(FrameFlags::STORING) {
            return None;
        }
        let work = match folio.order() {
            0 => Work::whole(folio.another()),
            _ => Work::of_several(folio.another(), pages),
        };
        Some(Storing { work, copy: None })
    }
    /// With a copy of the page by itself, which nobody else has.
    pub fn with_copy<P: Platform>(self, copy: Frame<P>) -> Storing {
        Storing { copy: Some(copy.into_held()), ..self }
    }
    /// One of the pages of several, each of them once, with a copy of it that nobody else has.
    pub fn split_off<P: Platform>(&mut self, copy: Frame<P>) -> Storing {
        Storing { work: self.work.split_off(), copy: Some(copy.into_held()) }
    }
    /// The copy, to be given up.
    pub fn take_copy(&mut self) -> Option<Pfn> {
        self.copy.take()
    }
    pub fn bytes(&self) -> &[u8] {
        let Some(copy) = self.copy else { return &[] };
        // SAFETY: only the handle has the copy, and it does not change it.
        unsafe { self.work.bytes(copy) }
    }
    /// The page was stored, or is dirty again. If it was the last part of its folio, who waits for that is told. Takes no
    /// lock, and frees nothing.
    pub fn end(mut self, failed: bool) {
        if let Some(copy) = self.copy.take() {
            self.work.of.put(copy);
        }
        let each = |folio: &super::FrameMeta| {
            if failed {
                folio.set(FrameFlags::DIRTY | FrameFlags::UNTOLD);
            }
        };
        self.work.end(each, |folio| folio.clear(FrameFlags::STORING));
    }
}
