//! The cache of one file: look-ups, and the validation of a fault. Neither takes a lock.

use super::File as _;
use super::index::{Cursor, Cut, Found, Index, Writer};
use super::sync::Errors;
use crate::frame::{self, Frame, FrameFlags, FrameMeta, Part};
use crate::mem::{Name, Pooled, Shared};
use crate::platform::Platform;
use crate::rmap::Mappings;
use crate::sync::atomic::{Acquire, AtomicU64};
use crate::sync::epoch::Pin;
use crate::sync::{Lock, Spin};
use crate::types::{NoMemory, PAGE_SIZE, Pfn};
use core::fmt;

/// The pages of a file that are in memory. It goes away with its last [`Shared`], and its pages with it, those that are dirty
/// too: who still has it then [syncs](FileCache::sync) it first.
pub struct FileCache<P: Platform> {
    pub(crate) p: &'static P,
    /// For tickets of its own.
    pub(super) name: Name<P, Self>,
    pub(super) file: P::File,
    /// Bytes; changed under the lock.
    pub(super) size: AtomicU64,
    pub(super) index: Index<P>,
    pub(super) writer: Spin<P, Writer>,
    /// Held while the size changes or pages are removed.
    pub(super) changes: Lock<P, P::WriterLock, ()>,
    /// Held while a page is stored.
    pub(super) stores: Lock<P, P::WriterLock, ()>,
    /// Of storing.
    pub(super) errors: Errors,
    /// Removals begun and ended: odd while one is at work.
    pub(super) turn: AtomicU64,
    pub(crate) mappings: Spin<P, Mappings<P>>,
}

impl<P: Platform> Pooled for FileCache<P> {
    /// Its pages are no way to it any more (`frame::with_file`).
    fn ending(&self) {
        self.index.each(|folio| {
            let meta = self.p.meta(folio);
            meta.set(FrameFlags::GOING);
            meta.clear(FrameFlags::UP_TO_DATE);
            meta.set_owner(core::ptr::null_mut());
        });
        // Who found it by one of them uses it no more.
        drop(self.p.vm().ending_files.lock(self.p));
    }
}

/// What a look-up found.
pub(crate) enum Lookup<P: Platform> {
    /// The page, up to date and attached at that moment.
    Page(Part<P>),
    /// The page's folio, which is being read in.
    Filling(Frame<P>),
    /// The page's folio, which could not be read, and nobody has told of that yet.
    Failed(Frame<P>),
    /// A page on its way out, in this turn of the file ([`FileCache::turn`]).
    Removing(u64),
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
        let name = slot.name();
        Ok(slot.fill(FileCache {
            p,
            name,
            file,
            size: AtomicU64::new(size),
            index: Index::new(),
            writer: Spin::new(Writer::new()),
            changes: Lock::ranked(0, ()),
            stores: Lock::ranked(0, ()),
            errors: Errors::new(),
            turn: AtomicU64::new(0),
            mappings: Spin::new(Mappings::new()),
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
    /// The number of pages below the size.
    pub(crate) fn pages_below(&self) -> u64 {
        pages_of(self.size())
    }
    /// Pages in memory, those that are being read in included.
    pub fn pages(&self) -> u64 {
        self.writer.lock(self.p).pages()
    }

    /// Who the pages belong to: what their frames name as owner.
    pub(crate) fn owner(&self) -> *mut () {
        core::ptr::from_ref(self).cast_mut().cast()
    }
    /// Whether a folio is this cache's, the first page of it at `index`. Its owner is set after its index, and read before.
    #[inline]
    pub(super) fn owns(&self, folio: &FrameMeta, index: u64) -> bool {
        folio.owner() == self.owner() && folio.index() == index
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
            let Some(found) = slot.load() else { return Lookup::Missing };
            if let Some(folio) = Frame::try_get(p, found.folio())
                && slot.load() == Some(found)
                && folio.order() == found.order
                && self.owns(folio.meta(), found.indexes(index).start)
            {
                let state = folio.meta().flags() & STATE;
                if p.meta(found.pfn).flags().contains(FrameFlags::POISON) {
                    return Lookup::Poisoned;
                }
                if state - FrameFlags::FILLING == FrameFlags::UP_TO_DATE {
                    return Lookup::Page(Part::of(folio, found.pfn));
                }
                if state - FrameFlags::FAILED == FrameFlags::FILLING {
                    return Lookup::Filling(folio);
                }
                if state == FrameFlags::FAILED {
                    return Lookup::Failed(folio);
                }
                let turn = self.turn();
                if state.contains(FrameFlags::GOING) && turn % 2 == 1 {
                    return Lookup::Removing(turn);
                }
            }
            // It is being taken out: a few instructions of whoever holds the lock.
            p.relax();
        }
    }

    /// Whether the frame `pfn` of a folio is this file's page at `index`, and may be mapped.
    ///
    /// Called under the table's lock with the folio's map count raised before (protocol 1), so that whoever takes
    /// pages away sees the mapping, or this sees that it is being taken away. The size comes first: a size that
    /// has grown again is stored after the pages from before were taken out.
    #[inline]
    pub(crate) fn is_attached(&self, folio: Pfn, pfn: Pfn, index: u64) -> bool {
        folio == pfn && self.is_single_attached(self.p.meta(folio), index)
            || self.is_part_attached(folio, pfn, index)
    }
    #[cold]
    fn is_part_attached(&self, folio: Pfn, pfn: Pfn, index: u64) -> bool {
        let meta = self.p.meta(folio);
        let (part, found) = (pfn.0.wrapping_sub(folio.0), Found { pfn, order: meta.order() });
        let indexes = found.indexes(index);
        index * PAGE_SIZE < self.size()
            && found.folio() == folio
            && index - indexes.start == part as u64
            && self.owns(meta, indexes.start)
            && meta.flags() & LOOKED_FOR == VALID
            && !self.p.meta(pfn).flags().contains(FrameFlags::POISON)
    }
    /// The same for a page that is a folio by itself; no for all others.
    #[inline(always)]
    pub(crate) fn is_single_attached(&self, page: &FrameMeta, index: u64) -> bool {
        index * PAGE_SIZE < self.size()
            && self.owns(page, index)
            && page.is_single_with(LOOKED_FOR | FrameFlags::POISON, VALID)
    }
    /// Whether so many pages may be mapped with one count, or by one entry: all of them part of this folio, from its frame
    /// number `part` and from `index` on, below the size, none of them with an error that hardware reported.
    #[inline]
    pub(crate) fn is_span_attached(&self, meta: &FrameMeta, part: u32, index: u64, pages: u64) -> bool {
        let part = u64::from(part);
        let is_valid = || {
            let (flags, order) = meta.flags_and_order();
            part + pages <= 1 << order
                && flags & (LOOKED_FOR | FrameFlags::HURT | FrameFlags::POISON) == VALID
        };
        // As for a page, the size comes first.
        ((index + pages - 1) * PAGE_SIZE < self.size() || cfg!(mutant = "huge_past_end"))
            && index.checked_sub(part).is_some_and(|first| self.owns(meta, first))
            && is_valid()
    }
    /// [`is_attached`](Self::is_attached) for a page that is referred to.
    pub(crate) fn has(&self, page: &Part<P>, index: u64) -> bool {
        self.is_attached(page.folio().pfn(), page.pfn(), index)
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

    /// Makes a folio that nobody else refers to one of this file, not attached yet.
    pub(super) fn prepare(&self, folio: &Frame<P>, index: u64, state: FrameFlags) {
        let (meta, order) = (folio.meta(), folio.order());
        debug_assert!(index.is_multiple_of(1 << order));
        meta.set_index(index);
        meta.set_owner(self.owner());
        meta.restate(FrameFlags::FILE | state, order);
        frame::link_tails(self.p, folio.pfn());
    }

    /// Takes a folio out, the first page of it at `index`; it is `GOING`, so nobody maps it any more. An error of storing it
    /// stays the file's.
    pub(super) fn detach(&self, w: &mut Writer, index: u64, folio: &FrameMeta, outs: &mut Outs<P>) {
        debug_assert!(folio.flags().contains(FrameFlags::GOING) && self.owns(folio, index));
        folio.clear(FrameFlags::UP_TO_DATE);
        self.note_error(folio);
        folio.set_owner(core::ptr::null_mut());
        let found = self.index.remove(w, index, &mut outs.cut);
        debug_assert!(found.is_some_and(|found| found.order == folio.order()));
        if let Some(found) = found {
            outs.push(Frame::from_held(self.p, found.pfn));
        }
    }

    /// Makes a folio into small pages, if only the cache refers to it; the first page of it is at `index`.
    #[must_use]
    pub(super) fn split(&self, w: &mut Writer, index: u64, folio: Found) -> bool {
        let split = frame::split_cached(self.p, folio.pfn);
        if split {
            self.index.split(w, index, folio);
        }
        split
    }
}

/// What the flags of a folio say whose pages may be mapped.
const VALID: FrameFlags = FrameFlags::FILE.union(FrameFlags::UP_TO_DATE);
const LOOKED_FOR: FrameFlags = VALID.union(FrameFlags::GOING).union(FrameFlags::AHEAD);
/// What tells where a folio is between being read in and being taken out.
const STATE: FrameFlags =
    FrameFlags::UP_TO_DATE.union(FrameFlags::FILLING).union(FrameFlags::FAILED).union(FrameFlags::GOING);

/// How many pages are looked at in one locked section, at most.
pub(super) const LOOKED_AT: usize = 64;
/// How many pages are taken out in one locked section, at most.
const BATCH: usize = 16;

/// Folios taken out in one locked section, with the cache's references, and nodes of the index; dropped with no lock
/// held.
#[must_use]
pub(super) struct Outs<P: Platform> {
    folios: [Option<Frame<P>>; BATCH],
    len: usize,
    pages: u64,
    cut: Cut<P>,
}

impl<P: Platform> Outs<P> {
    pub const fn new() -> Self {
        Outs { folios: [const { None }; BATCH], len: 0, pages: 0, cut: Cut::new() }
    }
    pub const fn is_full(&self) -> bool {
        self.len == BATCH || !self.cut.has_room()
    }
    /// Small pages taken out.
    pub const fn pages(&self) -> u64 {
        self.pages
    }
    /// Keeps a folio; there must be room.
    fn push(&mut self, folio: Frame<P>) {
        debug_assert!(self.len < BATCH);
        self.pages += 1 << folio.order();
        self.folios[self.len] = Some(folio);
        self.len += 1;
    }
}

impl<P: Platform> Drop for FileCache<P> {
    fn drop(&mut self) {
        self.index.each(|folio| drop(Frame::from_held(self.p, folio)));
    }
}

impl<P: Platform> fmt::Debug for FileCache<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileCache").field("id", &self.file.id()).field("size", &self.size()).finish()
    }
}
