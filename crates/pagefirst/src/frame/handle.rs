//! An owned reference to a frame.

use super::{FrameFlags, FrameMeta, Part, allocate, allocate_block, release};
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

/// Zeroes a page: what [`Platform::clear_page`] does if the platform has nothing better.
///
/// # Safety
/// As for [`Platform::clear_page`].
pub(crate) unsafe fn clear_page<P: Platform>(p: &'static P, pfn: Pfn) {
    // SAFETY: `Platform::page` answers with the frame's 4 KiB in the direct map, and nobody else uses them.
    unsafe { core::ptr::write_bytes(p.page(pfn).as_ptr(), 0, PAGE_SIZE as usize) }
}

/// Copies a page word by word: what [`Platform::copy_page`] does if the platform has nothing better.
///
/// # Safety
/// As for [`Platform::copy_page`].
pub(crate) unsafe fn copy_page<P: Platform>(p: &'static P, to: Pfn, from: Pfn) {
    // SAFETY: the frame's 4 KiB, aligned, which the caller has alone, and which are not those of `from`.
    let to: &mut [u64; WORDS] = unsafe { p.page(to).cast().as_mut() };
    for (to, from) in to.iter_mut().zip(words(p, from)) {
        *to = from.load(Relaxed);
    }
}

/// Possession proves a reference: the frame, or the folio that begins with it, stays what it is until the handle is
/// dropped.
pub struct Frame<P: Platform> {
    p: &'static P,
    pfn: Pfn,
}

impl<P: Platform> Frame<P> {
    /// A frame owned by the caller alone, its contents unspecified.
    ///
    /// # Errors
    /// [`NoMemory`] when neither this CPU's cache nor the allocator has one; nothing is drained for it.
    #[cfg_attr(debug_assertions, track_caller)]
    #[inline]
    pub fn new(p: &'static P) -> Result<Self, NoMemory> {
        allocate(p).map(|pfn| Frame { p, pfn })
    }
    /// A folio of 2^order frames owned by the caller alone, its contents unspecified.
    ///
    /// # Errors
    /// [`NoMemory`] when no such block is free; nothing is drained for it.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn block(p: &'static P, order: u8) -> Result<Self, NoMemory> {
        allocate_block(p, order).map(|pfn| Frame { p, pfn })
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
    /// log2 of the number of frames.
    pub(crate) fn order(&self) -> u8 {
        self.meta().order()
    }
    /// The numbers of all its frames.
    pub(crate) fn frames(&self) -> impl Iterator<Item = Pfn> + use<P> {
        let first = self.pfn;
        (0..1 << self.order()).map(move |i| first.add(i))
    }
    /// Zeroes the folio. Runs unlocked, and unpinned unless it is small.
    pub(crate) fn clear(&mut self) {
        for pfn in self.frames() {
            // SAFETY: the folio is not yet mapped or shared (callers hold the only reference).
            unsafe { self.p.clear_page(pfn) }
        }
    }
    /// The same for a frame that is a folio by itself.
    #[inline]
    pub(crate) fn clear_small(&mut self) {
        debug_assert_eq!(self.order(), 0);
        // SAFETY: as in `clear`.
        unsafe { self.p.clear_page(self.pfn) }
    }
    /// Copies the contents of what an entry maps, of the same order. Runs unlocked, and unpinned unless it is small.
    ///
    /// User code may write to `from` meanwhile (a shared file page): such a racing copy is torn exactly as it
    /// would be on hardware.
    pub(crate) fn copy_of(&mut self, from: &Part<P>) {
        debug_assert_eq!(self.order(), from.order());
        for (to, from) in self.frames().zip(from.frames()) {
            // SAFETY: as in `clear`; `from` is referred to by its handle, and is another folio than one owned alone.
            unsafe { self.p.copy_page(to, from) }
        }
    }
    /// The same for a frame that is a folio by itself.
    #[inline]
    pub(crate) fn copy_of_small(&mut self, from: &Part<P>) {
        debug_assert_eq!((self.order(), from.order()), (0, 0));
        // SAFETY: as in `copy_of`.
        unsafe { self.p.copy_page(self.pfn, from.pfn()) }
    }
    /// The bytes of the folio's small page with this number; for a folio that is not yet mapped or shared.
    pub(crate) fn bytes_of(&mut self, page: u32) -> &mut [u8] {
        assert!(page >> self.order() == 0);
        // SAFETY: as in `clear`, for a frame of the folio; the lifetime is bound to the exclusive handle.
        unsafe {
            core::slice::from_raw_parts_mut(self.p.page(self.pfn.add(page)).as_ptr(), PAGE_SIZE as usize)
        }
    }
    /// A copy of memory that is not the library's; false if it is none. A file that is memory itself has said where it has
    /// a page ([`File::direct`](crate::file::File::direct)), and may have given it to another since: the copy is of use
    /// only if the same answer, asked under the table's lock, still holds.
    pub(crate) fn copy_of_memory(&mut self, from: Pfn) -> bool {
        let is_memory = self.p.is_memory(from) && self.order() == 0;
        if is_memory {
            // SAFETY: as in `clear`; the platform reaches the other frame, which a file says is its own.
            unsafe { self.p.copy_page(self.pfn, from) }
        }
        is_memory
    }
    /// Makes the folio private memory, mapped once, by an entry that is to come, whose reference the handle's becomes: the
    /// page at this index of its owner, a [root](crate::rmap).
    #[inline]
    pub(crate) fn into_anonymous(self, owner: *mut (), index: u64) -> Pfn {
        let meta = self.meta();
        // Before it is private memory: who finds that it is, and mapped nowhere, has nothing to wait for.
        meta.map_first();
        meta.set_owner(owner);
        meta.set_index(index);
        meta.restate(FrameFlags::ANON | FrameFlags::EXCLUSIVE | FrameFlags::UP_TO_DATE, meta.order());
        if cfg!(mutant = "entry_without_reference") { self.pfn } else { self.into_held() }
    }
}

impl<P: Platform> Frame<P> {
    /// Gives the reference back.
    #[inline(never)]
    fn put(&mut self) {
        if self.meta().put() {
            self.free();
        }
    }
    /// That was the last one.
    #[cold]
    fn free(&mut self) {
        release(self.p, self.pfn);
        if cfg!(mutant = "clear_after_free") {
            self.clear();
        }
    }
}

impl<P: Platform> Drop for Frame<P> {
    // Most drops are of an `Option` that is `None`: they are to be a look at it and no call.
    #[inline(always)]
    fn drop(&mut self) {
        self.put();
    }
}

impl<P: Platform> fmt::Debug for Frame<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.pfn, f)
    }
}
