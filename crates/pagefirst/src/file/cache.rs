//! The cache of one file: look-ups, and the validation of a fault. Neither takes a lock.

use super::File as _;
use super::index::{Cursor, Cut, Index, Writer};
use crate::frame::{Frame, FrameFlags, FrameMeta};
use crate::mem::{Pooled, Shared};
use crate::platform::Platform;
use crate::sync::Spin;
use crate::sync::atomic::{Acquire, AtomicU64};
use crate::sync::epoch::Pin;
use crate::types::{NoMemory, PAGE_SIZE};
use core::fmt;

/// The pages of a file that are in memory. It goes away with its last [`Shared`], and its pages with it.
pub struct FileCache<P: Platform> {
    pub(super) p: &'static P,
    pub(super) file: P::File,
    /// Bytes; changed under the lock.
    pub(super) size: AtomicU64,
    pub(super) index: Index<P>,
    pub(super) writer: Spin<P, Writer>,
}

impl<P: Platform> Pooled for FileCache<P> {}

/// What a look-up found.
pub(crate) enum Lookup<P: Platform> {
    /// The page, up to date and attached at that moment.
    Page(Frame<P>),
    /// The page, which another is reading in.
    Filling(Frame<P>),
    /// A page in which hardware reported a memory error.
    Poisoned,
    /// The file ends before it.
    BeyondEnd,
    /// It is not in memory.
    Missing,
}

/// The number of pages, the last one perhaps in part, of a file of `size` bytes.
pub(super) const fn pages_of(size: u64) -> u64 {
    size.div_ceil(PAGE_SIZE)
}

impl<P: Platform> FileCache<P> {
    /// An empty cache for a file of `size` bytes. Called unpinned.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn new(p: &'static P, file: P::File, size: u64) -> Result<Shared<P, Self>, NoMemory> {
        let slot = p.vm().or_drain(p, || p.vm().files.reserve())?;
        Ok(slot.fill(FileCache {
            p,
            file,
            size: AtomicU64::new(size),
            index: Index::new(),
            writer: Spin::new(Writer::new()),
        }))
    }
    /// The file.
    pub fn file(&self) -> &P::File {
        &self.file
    }
    /// The file's size in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Acquire)
    }
    /// Pages in memory, those that are being read in and those beyond the end that are still mapped included.
    pub fn pages(&self) -> u64 {
        self.writer.lock(self.p).pages()
    }

    /// Who the pages belong to: what their frames name as owner.
    pub(crate) fn owner(&self) -> *mut () {
        core::ptr::from_ref(self).cast_mut().cast()
    }
    /// Whether the frame is this cache's page at `index`. Its owner is set after its index, and read before.
    fn owns(&self, meta: &FrameMeta, index: u64) -> bool {
        meta.owner() == self.owner() && meta.index() == index
    }

    /// Looks the page at `index` up.
    ///
    /// The reference is taken on what may be any frame by then; the slot, the owner and the index, read after it,
    /// say whether it is the page.
    pub(crate) fn lookup(&self, p: &'static P, pin: &Pin<P>, index: u64) -> Lookup<P> {
        loop {
            if index >= pages_of(self.size()) {
                return Lookup::BeyondEnd;
            }
            let Some(slot) = self.index.slot(pin, index) else { return Lookup::Missing };
            let Some(pfn) = slot.load() else { return Lookup::Missing };
            if let Some(frame) = p.meta(pfn).try_get().then(|| Frame::from_held(p, pfn))
                && slot.load() == Some(pfn)
                && self.owns(frame.meta(), index)
            {
                let flags = frame.meta().flags();
                if flags.contains(FrameFlags::POISON) {
                    return Lookup::Poisoned;
                }
                let state = flags & (FrameFlags::UP_TO_DATE | FrameFlags::FILLING | FrameFlags::GOING);
                if state - FrameFlags::FILLING == FrameFlags::UP_TO_DATE {
                    return Lookup::Page(frame);
                }
                if state == FrameFlags::FILLING {
                    return Lookup::Filling(frame);
                }
            }
            // It is being taken out: a few instructions of whoever holds the lock.
            p.relax();
        }
    }

    /// Whether the frame is this file's page at `index`, and may be mapped.
    ///
    /// Called under the table's lock with the page's map count raised before (protocol 1), so that whoever takes
    /// pages away sees the mapping, or this sees that it is being taken away. The size comes first: a size that
    /// has grown again is stored after the pages from before were taken out.
    #[inline]
    pub(crate) fn is_attached(&self, meta: &FrameMeta, index: u64) -> bool {
        let valid = FrameFlags::FILE | FrameFlags::UP_TO_DATE;
        index * PAGE_SIZE < self.size()
            && self.owns(meta, index)
            && meta.flags() & (valid | FrameFlags::GOING | FrameFlags::POISON) == valid
    }

    /// A cursor to look at pages one after the other.
    ///
    /// Nothing is held for what it answers: any frame may be another's by the time it is seen. So who maps one raises
    /// the map count ([`FrameMeta::try_map`]), asks [`is_attached`](Self::is_attached), and gives up what fails
    /// (`frame::unmap`).
    #[inline]
    pub(crate) fn cursor<'e>(&'e self, pin: &'e Pin<P>) -> Cursor<'e, P> {
        Cursor::new(&self.index, pin)
    }

    /// Makes a frame that nobody else refers to a page of this file, not attached yet.
    pub(super) fn prepare(&self, frame: &Frame<P>, index: u64, state: FrameFlags) {
        let meta = frame.meta();
        meta.set_index(index);
        meta.set_owner(self.owner());
        meta.reset(FrameFlags::FILE | state, 0);
    }

    /// Takes the page at `index` out; it is `GOING`, so nobody maps it any more.
    pub(super) fn detach(&self, w: &mut Writer, index: u64, meta: &FrameMeta) -> Option<Out<P>> {
        debug_assert!(meta.flags().contains(FrameFlags::GOING) && self.owns(meta, index));
        meta.clear(FrameFlags::UP_TO_DATE);
        meta.set_owner(core::ptr::null_mut());
        let (pfn, cut) = self.index.remove(w, index)?;
        Some(Out { page: Frame::from_held(self.p, pfn), cut })
    }
}

/// A page taken out, with the cache's reference; dropped with no lock held.
#[must_use]
pub(super) struct Out<P: Platform> {
    #[expect(dead_code, reason = "owned until it is dropped")]
    page: Frame<P>,
    #[expect(dead_code, reason = "owned until it is dropped")]
    cut: Cut<P>,
}

/// How many pages are looked at in one locked section, at most.
pub(super) const LOOKED_AT: usize = 64;
/// How many pages are taken out in one locked section, at most.
const BATCH: usize = 16;

/// Pages taken out in one locked section.
pub(super) struct Outs<P: Platform> {
    outs: [Option<Out<P>>; BATCH],
    len: usize,
}

impl<P: Platform> Outs<P> {
    pub const fn new() -> Self {
        Outs { outs: [const { None }; BATCH], len: 0 }
    }
    pub const fn is_full(&self) -> bool {
        self.len == BATCH
    }
    pub const fn len(&self) -> usize {
        self.len
    }
    /// Keeps a page; there must be room.
    pub fn push(&mut self, out: Option<Out<P>>) {
        debug_assert!(out.is_some() && !self.is_full());
        self.outs[self.len] = out;
        self.len += 1;
    }
}

impl<P: Platform> Drop for FileCache<P> {
    fn drop(&mut self) {
        let p = self.p;
        self.index.empty(|pfn| {
            let meta = p.meta(pfn);
            meta.set(FrameFlags::GOING);
            meta.clear(FrameFlags::UP_TO_DATE);
            meta.set_owner(core::ptr::null_mut());
            drop(Frame::from_held(p, pfn));
        });
    }
}

impl<P: Platform> fmt::Debug for FileCache<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileCache").field("id", &self.file.id()).field("size", &self.size()).finish()
    }
}
