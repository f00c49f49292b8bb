//! What is done to pages in interrupts, whatever platform they are of: who reads and writes files need not know it.
//!
//! It takes no lock and frees nothing: a last reference is put aside.

use super::{Frame, FrameFlags, FrameMeta, put_anywhere};
use crate::fault::page_key;
use crate::platform::Platform;
use crate::sync::held;
use crate::types::{PAGE_SIZE, Pfn};
use core::ptr::NonNull;

/// What that needs of a platform.
pub(super) trait Pages: Sync {
    fn page(&'static self, pfn: Pfn) -> NonNull<u8>;
    fn meta(&'static self, pfn: Pfn) -> &'static FrameMeta;
    /// Runs `f`, which takes no lock.
    fn unlocked(&'static self, f: &mut dyn FnMut());
    /// Tells who waits for a folio.
    fn ready(&'static self, folio: Pfn);
    /// Gives a reference back.
    fn put(&'static self, pfn: Pfn);
}

impl<P: Platform> Pages for P {
    fn page(&'static self, pfn: Pfn) -> NonNull<u8> {
        Platform::page(self, pfn)
    }
    fn meta(&'static self, pfn: Pfn) -> &'static FrameMeta {
        Platform::meta(self, pfn)
    }
    fn unlocked(&'static self, f: &mut dyn FnMut()) {
        held::nothing_more(self, f);
    }
    fn ready(&'static self, folio: Pfn) {
        Platform::ready(self, page_key(folio));
    }
    fn put(&'static self, pfn: Pfn) {
        held::nothing_more(self, || put_anywhere(self, pfn));
    }
}

/// Possession proves a reference to a folio, for work on it that others wait for, in parts if it has several pages.
pub(super) struct Work {
    pub of: &'static dyn Pages,
    pub folio: Pfn,
    /// How many parts end with this.
    parts: u32,
}

impl Work {
    /// All of it.
    pub fn whole<P: Platform>(folio: Frame<P>) -> Self {
        Work { of: folio.platform(), folio: folio.into_held(), parts: 1 }
    }
    /// On a folio of several, so many of whose pages are to be [split off](Self::split_off), one by one.
    pub fn of_several<P: Platform>(folio: Frame<P>, pages: u32) -> Self {
        debug_assert!(folio.order() > 0);
        let this = Work { parts: pages + 1, ..Work::whole(folio) };
        this.left().begin_parts(this.parts);
        this
    }
    /// One part, for one of its pages.
    pub fn split_off(&mut self) -> Work {
        assert!(self.parts > 1);
        self.parts -= 1;
        let taken = self.of.meta(self.folio).try_get();
        debug_assert!(taken);
        Work { parts: 1, ..*self }
    }
    /// Who keeps count of the parts that have not ended: the folio's first tail.
    fn left(&self) -> &'static FrameMeta {
        self.of.meta(self.folio.add(1))
    }
    /// This part has ended: `each` is done to the folio's metadata, and `last` if no other part is left; then who waits for
    /// the folio is told.
    pub fn end(self, each: impl Fn(&FrameMeta), last: impl Fn(&FrameMeta)) {
        let mut ended = false;
        self.of.unlocked(&mut || {
            let meta = self.of.meta(self.folio);
            each(meta);
            ended = meta.order() == 0 || self.left().end_parts(self.parts);
            if ended {
                last(meta);
            }
        });
        if ended {
            self.of.ready(self.folio);
        }
        self.of.put(self.folio);
    }
    /// The bytes of a page.
    ///
    /// # Safety
    /// Nobody changes them while they are borrowed.
    pub unsafe fn bytes(&self, page: Pfn) -> &[u8] {
        // SAFETY: the frame's 4 KiB in the direct map; the caller's promise.
        unsafe { core::slice::from_raw_parts(self.of.page(page).as_ptr(), PAGE_SIZE as usize) }
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
    /// The state ends, and who waits for that is told.
    fn drop(&mut self) {
        self.of.meta(self.folio).clear(self.state);
        self.of.ready(self.folio);
        self.of.put(self.folio);
    }
}
