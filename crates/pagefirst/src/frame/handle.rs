//! An owned reference to a frame.

use super::{FrameFlags, FrameMeta, allocate, release};
use crate::platform::Platform;
use crate::sync::atomic::{Relaxed, plain};
use crate::types::{NoMemory, PAGE_SIZE, Pfn};
use core::fmt;
use core::mem::ManuallyDrop;

/// 64-bit words in a frame.
pub(crate) const WORDS: usize = PAGE_SIZE as usize / 8;

/// The contents of a frame that the caller holds a reference to, for pages that others may use at the same time.
pub(crate) fn words<P: Platform>(p: &'static P, pfn: Pfn) -> &'static [plain::AtomicU64; WORDS] {
    // SAFETY: `Platform::page` answers with the frame's 4 KiB, page-aligned, at one address for ever; the reference
    // keeps the frame a page; atomics may be shared with whoever else uses it, and user code's own accesses are
    // outside the language.
    unsafe { p.page(pfn).cast().as_ref() }
}

/// Possession proves a reference: the frame stays what it is until the handle is dropped.
pub struct Frame<P: Platform> {
    p: &'static P,
    pfn: Pfn,
}

impl<P: Platform> Frame<P> {
    /// A frame owned by the caller alone, its contents unspecified.
    ///
    /// # Errors
    /// [`NoMemory`] when neither this CPU's cache nor the allocator has one; nothing is drained for it.
    pub fn new(p: &'static P) -> Result<Self, NoMemory> {
        allocate(p).map(|pfn| Frame { p, pfn })
    }
    /// Wraps a reference the caller holds.
    pub(crate) fn from_held(p: &'static P, pfn: Pfn) -> Self {
        Frame { p, pfn }
    }
    /// Takes a reference to a frame that might be free or somebody else's by now: the caller checks afterwards
    /// that it is the frame it meant.
    pub(crate) fn try_get(p: &'static P, pfn: Pfn) -> Option<Self> {
        p.meta(pfn).try_get().then(|| Frame { p, pfn })
    }
    /// Another reference to the same frame.
    pub(crate) fn another(&self) -> Self {
        let got = self.meta().try_get();
        debug_assert!(got);
        Frame { p: self.p, pfn: self.pfn }
    }
    /// Gives up the handle and keeps its reference.
    pub(crate) fn into_held(self) -> Pfn {
        ManuallyDrop::new(self).pfn
    }
    /// The platform.
    pub(crate) fn platform(&self) -> &'static P {
        self.p
    }
    /// The frame's number.
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }
    /// The frame's metadata.
    pub fn meta(&self) -> &'static FrameMeta {
        self.p.meta(self.pfn)
    }
    /// Zeroes the frame. Runs unlocked and unpinned.
    pub(crate) fn clear(&mut self) {
        // SAFETY: `Platform::page` answers with the frame's 4 KiB in the direct map; the frame is not yet mapped or
        // shared (callers hold the only reference), so nobody else uses the bytes.
        unsafe { core::ptr::write_bytes(self.p.page(self.pfn).as_ptr(), 0, PAGE_SIZE as usize) }
    }
    /// Copies the contents of another frame. Runs unlocked and unpinned.
    ///
    /// User code may write to `from` meanwhile (a shared file page): such a racing copy is torn exactly as it
    /// would be on hardware.
    pub(crate) fn copy_from(&mut self, from: &Frame<P>) {
        for (to, from) in self.words().iter().zip(from.words()) {
            to.store(from.load(Relaxed), Relaxed);
        }
    }
    /// The frame's contents, for pages that others may use at the same time.
    pub(crate) fn words(&self) -> &[plain::AtomicU64; WORDS] {
        words(self.p, self.pfn)
    }
    /// The frame's bytes; for a frame that is not yet mapped or shared.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: as in `clear`; the lifetime is bound to the exclusive handle.
        unsafe { core::slice::from_raw_parts_mut(self.p.page(self.pfn).as_ptr(), PAGE_SIZE as usize) }
    }
    /// Marks the frame as a page of private memory, reachable through one mapping.
    pub(crate) fn make_anonymous(&self, index: u64) {
        self.meta().set_index(index);
        self.meta().reset(FrameFlags::ANON | FrameFlags::EXCLUSIVE | FrameFlags::UP_TO_DATE, 0);
    }
}

impl<P: Platform> Drop for Frame<P> {
    fn drop(&mut self) {
        if self.meta().put() {
            release(self.p, self.pfn);
            if cfg!(mutant = "clear_after_free") {
                self.clear();
            }
        }
    }
}

impl<P: Platform> fmt::Debug for Frame<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.pfn, f)
    }
}
