//! Write-back: dirty pages are stored, while programs go on writing to them.
//!
//! A page is stored from a copy. In which order it is marked clean, and copied, decides whether a write is lost:
//!
//! 1. its flag `DIRTY` is cleared;
//! 2. every entry that maps it is made read-only and clean, and that is flushed (`rmap`);
//! 3. only then the file's size is read, and as much of it copied, and the copy stored.
//!
//! A write before the flush is in the copy, also one by a stale translation. One after it takes a fault, which sets
//! `DIRTY`, under the lock of the table, before it makes the entry writable: after step 1, so it stays set. Where an entry
//! may have been missed, being on the move, the page is dirty afterwards.
//!
//! Of a file that does not track writes, entries stay writable, and are made clean alone: hardware marks them again when the
//! page is written to after the flush. So every page of it that is mapped may have to be stored; its entries tell.
//!
//! | | store | write fault | `write_at` | evict | removal |
//! |---|---|---|---|---|---|
//! | store | `STORING`: one at a time for a folio | the table's lock, and the order above | sets `DIRTY` after it wrote | the reference | the lock under which it is begun; none begins of what a removal lies across |
//!
//! A file that stores later keeps the copy; the page is `STORING` until that ends, and may be written to and be dirty
//! again. If it could not be stored it is dirty again, and `UNTOLD`: whoever stores, waits or takes it out next notes the
//! error in the cache, where everybody learns of it who syncs (`sync`). Stable pages are not promised, but the copy is one.

use super::cache::{FileCache, LOOKED_AT, Lookup, pages_of};
use super::error::{IoError, WriteBackError};
use super::index::LAST_INDEX;
use super::sync::behind;
use super::{File as _, Io};
use crate::fault::Ticket;
use crate::frame::{Frame, FrameFlags, FrameMeta, Part, Storing};
use crate::platform::Platform;
use crate::rmap::Clean;
use crate::sync::epoch::Pin;
use crate::types::{NoMemory, PAGE_SIZE};
use core::fmt;
use core::ops::ControlFlow::{Break, Continue};
use core::ops::{Deref, Range};

/// What is to be stored of a page, owned: a copy of its bytes, as far as they lie below the file's size.
///
/// It can be kept for as long as the write takes, and completed anywhere, in an interrupt too. Dropped without, it was
/// not stored.
pub struct Store {
    /// There until the end.
    page: Option<Storing>,
    len: usize,
}

impl Store {
    /// The bytes are stored, or could not be: then the page is dirty again. Who waits for it is woken. Takes no lock.
    pub fn complete(mut self, result: Result<(), IoError>) {
        self.end(result);
    }
    fn end(&mut self, result: Result<(), IoError>) {
        if let Some(page) = self.page.take() {
            page.end(result.is_err());
        }
    }
    /// Gives the copy's frame back, to be used again.
    fn take_copy<P: Platform>(&mut self, p: &'static P) -> Option<Frame<P>> {
        let copy = self.page.as_mut().and_then(Storing::take_copy);
        copy.map(|copy| Frame::from_held(p, copy))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.end(Err(IoError));
    }
}

impl Deref for Store {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.page.as_ref().map_or(&[], |page| &page.bytes()[..self.len])
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("len", &self.len).finish()
    }
}

/// What is to be stored of a page, at once, or to be kept.
#[derive(Debug)]
pub struct StoreGuard<'a>(&'a mut Option<Store>);

impl StoreGuard<'_> {
    /// The bytes, to be completed later.
    pub fn keep(self) -> Store {
        self.0.take().unwrap_or(Store { page: None, len: 0 })
    }
}

impl Deref for StoreGuard<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}

/// What is known of the entries that mapped a folio.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Entries {
    /// None was dirty, and none can be written by unless that is told.
    Clean,
    /// Some were dirty, by now none is.
    Dirty,
    /// One may have been missed.
    Missed,
}

/// Marks a folio clean, and reads it as far as the file goes, in the order in which no write is lost, one that lets the file
/// grow included. `protect` makes the entries clean, and flushes. `None` if it was clean.
pub(crate) fn clean_then_read<R>(
    meta: &FrameMeta,
    size: impl Fn() -> u64,
    protect: impl FnOnce() -> Entries,
    read: impl FnOnce(u64) -> R,
) -> Option<R> {
    let clean = || meta.take_flag(FrameFlags::DIRTY);
    let before = if cfg!(mutant = "size_before_cleaning") { Some(size()) } else { None };
    let late = cfg!(mutant = "clean_after_protecting") || cfg!(mutant = "clean_after_reading");
    let was_dirty = late || clean();
    let entries = protect();
    if cfg!(mutant = "clean_after_protecting") {
        clean();
    }
    // The last: what an entry said that was taken out meanwhile.
    if !was_dirty && entries == Entries::Clean && !meta.flags().contains(FrameFlags::DIRTY) {
        return None;
    }
    let read = read(before.unwrap_or_else(size));
    if cfg!(mutant = "clean_after_reading") {
        clean();
    }
    if entries == Entries::Missed {
        meta.set(FrameFlags::DIRTY);
    }
    Some(read)
}

impl<P: Platform> FileCache<P> {
    /// Stores the dirty pages, as far as they lie below the size; returns how many. Called unpinned, with no lock
    /// held; may sleep. A page that is being stored already is passed over, and one of which some is being removed:
    /// [`sync`](Self::sync) waits for it.
    ///
    /// A page is clean afterwards, mapped or not, until it is written to again. It may be dirty still where a mapping call was
    /// at work.
    ///
    /// # Errors
    /// [`WriteBackError`]; what was not stored is dirty still. An error of what the file stores later is told by
    /// [`sync`](Self::sync).
    pub fn write_back(&self, p: &'static P) -> Result<u64, WriteBackError> {
        let mut work = WriteBack::new(self);
        let mut failed = Ok(());
        let mut rest = 0..LAST_INDEX + 1;
        while let Some(folio) = self.next_to_store(&rest) {
            rest.start = behind(&folio);
            match work.store(folio) {
                Err(WriteBackError::NoMemory(why)) => return Err(why.into()),
                Err(why) => failed = Err(why),
                Ok(_) => {}
            }
        }
        // Pages that nobody has any more, and copies of what others stored.
        p.vm().collect_much(p);
        failed.map(|()| work.stored)
    }

    /// A ticket for a page that is being stored, if there is one.
    pub fn storing(&self, _: &'static P) -> Option<Ticket<'static, P>> {
        let is_storing = |meta: &FrameMeta| meta.flags().contains(FrameFlags::STORING);
        self.next_with(&(0..LAST_INDEX + 1), is_storing).map(Ticket::for_store)
    }

    /// The first folio of these pages that may have to be stored, or of which an error is to be noted.
    pub(super) fn next_to_store(&self, pages: &Range<u64>) -> Option<Frame<P>> {
        if !self.file.is_stored() {
            return None;
        }
        let tracks = self.file.tracks_writes();
        self.next_with(pages, |meta| {
            // What is mapped may be dirty as an entry alone says.
            meta.flags().intersects(FrameFlags::DIRTY | FrameFlags::UNTOLD)
                || !tracks && meta.counts().maps > 0
        })
    }

    /// The first folio of these pages that is up to date and `is_it`.
    pub(super) fn next_with(
        &self,
        pages: &Range<u64>,
        is_it: impl Fn(&FrameMeta) -> bool,
    ) -> Option<Frame<P>> {
        let (p, mut next) = (self.p, pages.start);
        let last = pages.end.checked_sub(1)?;
        loop {
            let (pin, mut left) = (Pin::new(p), LOOKED_AT);
            let found = self.index.scan(&pin, next, last, &mut |index, found| {
                if left == 0 {
                    return Break(Err(index));
                }
                left -= 1;
                if !is_it(p.meta(found.folio())) {
                    return Continue(());
                }
                let folio = match self.lookup(p, &pin, index) {
                    Lookup::Page(page) => Some(Frame::from(page)),
                    // It cannot be stored, and whoever asks for that is told.
                    Lookup::Poisoned => Frame::try_get(p, found.folio()),
                    _ => None,
                };
                let still = |folio: &Frame<P>| {
                    is_it(folio.meta()) && self.owns(folio.meta(), found.indexes(index).start)
                };
                folio.filter(still).map_or(Continue(()), |folio| Break(Ok(folio)))
            });
            match found.break_value()? {
                Ok(folio) => return Some(folio),
                Err(index) => next = index,
            }
        }
    }

    /// Makes every entry that maps the folio clean, and read-only if the file tracks writes, and flushes. A mapping that comes
    /// after this, to be written by, has set `DIRTY` after that was cleared; or it says itself, later, that it was.
    fn protect(&self, folio: &Frame<P>) -> Entries {
        let meta = folio.meta();
        if meta.maps_ordered() == 0 {
            return Entries::Clean;
        }
        let mut clean = Clean::new(folio.pfn(), self.file.tracks_writes());
        let (first, pages) = (meta.index(), 1 << folio.order());
        let all = self.for_each_mapping(first, first + pages - 1, |vma, table, range| {
            clean.visit(vma.is_live(), table, range);
        });
        match all && clean.is_all(meta.maps_ordered()) {
            false => Entries::Missed,
            true if clean.found_dirty() => Entries::Dirty,
            true => Entries::Clean,
        }
    }
}

/// Write-back at work.
pub(super) struct WriteBack<'a, P: Platform> {
    cache: &'a FileCache<P>,
    p: &'static P,
    /// For the next copy.
    copy: Option<Frame<P>>,
    stored: u64,
}

impl<'a, P: Platform> WriteBack<'a, P> {
    pub fn new(cache: &'a FileCache<P>) -> Self {
        WriteBack { cache, p: cache.p, copy: None, stored: 0 }
    }
    fn copy(&mut self) -> Result<Frame<P>, NoMemory> {
        self.copy.take().map_or_else(|| self.p.vm().frame(self.p), Ok)
    }

    /// Stores a folio, or will; or it was clean, or is not the file's any more. A ticket if somebody is in the way: it is being
    /// stored already, or some of it is being removed.
    pub fn store(&mut self, folio: Frame<P>) -> Result<Option<Ticket<'static, P>>, WriteBackError> {
        let (cache, meta, first) = (self.cache, folio.meta(), folio.meta().index());
        cache.note_error(meta);
        // A removal waits for what is being stored; afterwards that is not to be stored any more.
        let one = cache.stores.lock(self.p);
        let is_going = !cache.owns(meta, first) || meta.flags().contains(FrameFlags::GOING);
        if is_going {
            return Ok(None);
        }
        if let Some(turn) = cache.removal_across(first..behind(&folio))
            && !cfg!(mutant = "store_beside_removal")
        {
            let file = cache.name.share(&Pin::new(self.p));
            return Ok(file.map(|file| Ticket::for_removal(file, turn)));
        }
        // Before the page is clean: there may be none.
        self.copy = Some(self.copy()?);
        let Some(rest) = Storing::begin(&folio, 1 << folio.order()) else {
            return Ok(Some(Ticket::for_store(folio)));
        };
        // Whatever happens, it ends.
        let mut rest = Store { page: Some(rest), len: 0 };
        let store = |size| self.store_pages(&folio, size, &mut rest);
        let result =
            clean_then_read(meta, || cache.size(), || cache.protect(&folio), store).unwrap_or(Ok(()));
        if result.is_err() {
            meta.set(FrameFlags::DIRTY);
        }
        cache.note_error(meta);
        drop(one); // who waits for the folio is told with no lock held
        rest.complete(Ok(()));
        result.map(|()| None)
    }

    fn store_pages(&mut self, folio: &Frame<P>, size: u64, rest: &mut Store) -> Result<(), WriteBackError> {
        let first = folio.meta().index();
        let pages = pages_of(size).saturating_sub(first).min(1 << folio.order()) as u32;
        let mut result = Ok(());
        for i in 0..pages {
            let index = first + u64::from(i);
            let page = folio.pfn().add(i);
            if self.cache.is_bad(page) {
                if !self.cache.is_spared(page) {
                    folio.meta().set(FrameFlags::UNTOLD);
                    result = Err(IoError.into());
                }
                continue;
            }
            let mut copy = self.copy()?;
            copy.copy_of(&Part::of(folio.another(), page));
            let page = match folio.order() {
                0 => rest.page.take().map(|page| page.with_copy(copy)),
                _ => rest.page.as_mut().map(|rest| rest.split_off(copy)),
            };
            let len = (size - index * PAGE_SIZE).min(PAGE_SIZE) as usize;
            let mut store = Some(Store { page, len });
            let io = self.cache.file.write(index, StoreGuard(&mut store));
            if io == Io::Ready || store.is_none() {
                self.stored += 1;
            } else {
                folio.meta().set(FrameFlags::UNTOLD);
                result = Err(IoError.into());
            }
            let Some(mut store) = store else { continue };
            self.copy = store.take_copy(self.p);
            // A page by itself ends with the rest.
            match folio.order() {
                0 => rest.page = store.page.take(),
                _ => store.complete(Ok(())),
            }
        }
        result
    }
}
