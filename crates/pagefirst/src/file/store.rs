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
//! may have been missed, being on the move, and where the file does not track writes, so that its entries stay writable,
//! the page is dirty afterwards.
//!
//! | | store | write fault | `write_at` | evict | removal |
//! |---|---|---|---|---|---|
//! | store | `STORING`: one at a time for a folio | the table's lock, and the order above | sets `DIRTY` after it wrote | the reference | the lock under which it is begun; the storage forgets after that |
//!
//! A file that stores later keeps the copy; the page is `STORING` until that ends, and may be written to and be dirty
//! again. If it could not be stored it is dirty again. Stable pages are not promised, but the copy is one.

use super::cache::{FileCache, Lookup, pages_of};
use super::error::{IoError, WriteBackError};
use super::index::LAST_INDEX;
use super::{File as _, Io};
use crate::fault::Ticket;
use crate::frame::{Frame, FrameFlags, FrameMeta, Part, Storing};
use crate::platform::Platform;
use crate::rmap::Clean;
use crate::sync::epoch::Pin;
use crate::types::{NoMemory, PAGE_SIZE};
use core::fmt;
use core::ops::ControlFlow::{Break, Continue};
use core::ops::Deref;

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
    /// The same; the copy's frame is given back, to be used again.
    fn finish<P: Platform>(mut self, p: &'static P, result: Result<(), IoError>) -> Option<Frame<P>> {
        let copy = self.page.as_mut().and_then(Storing::take_copy);
        self.end(result);
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

/// Marks a folio clean, and reads it as far as the file goes, in the order in which no write is lost, one that lets the file
/// grow included; `protect` tells whether every entry is read-only, and flushed.
pub(crate) fn clean_then_read<R>(
    meta: &FrameMeta,
    size: impl Fn() -> u64,
    protect: impl FnOnce() -> bool,
    read: impl FnOnce(u64) -> R,
) -> R {
    let before = if cfg!(mutant = "size_before_cleaning") { Some(size()) } else { None };
    if !cfg!(mutant = "clean_after_protecting") && !cfg!(mutant = "clean_after_reading") {
        meta.clear(FrameFlags::DIRTY);
    }
    let is_clean = protect();
    if cfg!(mutant = "clean_after_protecting") {
        meta.clear(FrameFlags::DIRTY);
    }
    let read = read(before.unwrap_or_else(size));
    if cfg!(mutant = "clean_after_reading") {
        meta.clear(FrameFlags::DIRTY);
    }
    if !is_clean {
        meta.set(FrameFlags::DIRTY);
    }
    read
}

impl<P: Platform> FileCache<P> {
    /// Stores the dirty pages, as far as they lie below the size; returns how many. Called unpinned, with no lock
    /// held; may sleep. A page that is being stored already is passed over.
    ///
    /// A page of a file that tracks writes is clean afterwards, mapped or not, until it is written to again, which takes a
    /// fault. Of a file that does not, what is mapped is dirty still: it may be written to without anybody being told.
    ///
    /// # Errors
    /// [`WriteBackError`]; what was not stored is dirty still. What the file stores later is no error here: it knows.
    pub fn write_back(&self, p: &'static P) -> Result<u64, WriteBackError> {
        let mut work = WriteBack { cache: self, p, copy: None, stored: 0 };
        if !self.file.is_stored() {
            return Ok(0);
        }
        let mut failed = Ok(());
        let mut next = 0;
        while let Some(folio) = self.next_with(p, next, FrameFlags::DIRTY) {
            next = folio.meta().index() + (1 << folio.order());
            match work.store(&folio) {
                Err(WriteBackError::NoMemory(why)) => return Err(why.into()),
                Err(why) => failed = Err(why),
                Ok(()) => {}
            }
        }
        failed.map(|()| work.stored)
    }

    /// A ticket for a page that is being stored, if there is one: who wants to know that all is stored, writes back, and
    /// waits until there is none.
    pub fn storing(&self, p: &'static P) -> Option<Ticket<'static, P>> {
        self.next_with(p, 0, FrameFlags::STORING).map(Ticket::for_store)
    }

    /// The first folio from `first` on that is up to date and has this flag.
    fn next_with(&self, p: &'static P, first: u64, flag: FrameFlags) -> Option<Frame<P>> {
        let pin = Pin::new(p);
        let has = |folio| p.meta(folio).flags().contains(flag);
        let found = self.index.scan(&pin, first, LAST_INDEX, &mut |index, found| {
            if !has(found.folio()) {
                return Continue(());
            }
            let folio = match self.lookup(p, &pin, index) {
                Lookup::Page(page) => Some(Frame::from(page)),
                // It cannot be stored, and whoever asks for that is told.
                Lookup::Poisoned => Frame::try_get(p, found.folio()),
                _ => None,
            };
            let is_it =
                |folio: &Frame<P>| has(folio.pfn()) && self.owns(folio.meta(), found.indexes(index).start);
            folio.filter(is_it).map_or(Continue(()), Break)
        });
        found.break_value()
    }

    /// Makes every entry that maps the folio read-only and clean, and flushes; false if some may be writable. A mapping
    /// that comes after this, to be written by, has set `DIRTY` after that was cleared.
    fn protect(&self, folio: &Frame<P>) -> bool {
        let meta = folio.meta();
        if meta.maps_ordered() == 0 {
            return true;
        }
        if !self.file.tracks_writes() {
            return false;
        }
        let mut clean = Clean::new(folio.pfn());
        let (first, pages) = (meta.index(), 1 << folio.order());
        let all = self.for_each_mapping(first, first + pages - 1, |vma, table, range| {
            clean.visit(vma.is_live(), table, range);
        });
        all && clean.is_all(meta.maps_ordered())
    }
}

/// Write-back at work.
struct WriteBack<'a, P: Platform> {
    cache: &'a FileCache<P>,
    p: &'static P,
    /// For the next copy.
    copy: Option<Frame<P>>,
    stored: u64,
}

impl<P: Platform> WriteBack<'_, P> {
    fn copy(&mut self) -> Result<Frame<P>, NoMemory> {
        self.copy.take().map_or_else(|| self.p.vm().frame(self.p), Ok)
    }

    /// Stores a folio, unless that is being done.
    fn store(&mut self, folio: &Frame<P>) -> Result<(), WriteBackError> {
        let (cache, meta, first) = (self.cache, folio.meta(), folio.meta().index());
        // A removal waits for what is being stored; afterwards that is not to be stored any more.
        let _one = cache.stores.lock(self.p);
        let is_going = !cache.owns(meta, first) || meta.flags().contains(FrameFlags::GOING);
        if is_going {
            return Ok(());
        }
        // Before the page is clean: there may be none.
        self.copy = Some(self.copy()?);
        let Some(rest) = Storing::begin(folio, 1 << folio.order()) else { return Ok(()) };
        // Whatever happens, it ends.
        let mut rest = Store { page: Some(rest), len: 0 };
        let store = |size| self.store_pages(folio, size, &mut rest);
        let result = clean_then_read(meta, || cache.size(), || cache.protect(folio), store);
        if result.is_err() {
            meta.set(FrameFlags::DIRTY);
        }
        rest.complete(Ok(()));
        result
    }

    fn store_pages(&mut self, folio: &Frame<P>, size: u64, rest: &mut Store) -> Result<(), WriteBackError> {
        let first = folio.meta().index();
        let pages = pages_of(size).saturating_sub(first).min(1 << folio.order()) as u32;
        let mut result = Ok(());
        for i in 0..pages {
            let index = first + u64::from(i);
            if self.cache.is_bad(folio.pfn().add(i)) {
                result = Err(IoError.into());
                continue;
            }
            let mut copy = self.copy()?;
            copy.copy_of(&Part::of(folio.another(), folio.pfn().add(i)));
            let page = match folio.order() {
                0 => rest.page.take().map(|page| page.with_copy(copy)),
                _ => rest.page.as_mut().map(|rest| rest.split_off(copy)),
            };
            let len = (size - index * PAGE_SIZE).min(PAGE_SIZE) as usize;
            let mut store = Some(Store { page, len });
            let io = self.cache.file.write(index, StoreGuard(&mut store));
            let done = if io == Io::Ready || store.is_none() { Ok(()) } else { Err(IoError) };
            self.copy = store.and_then(|store| store.finish(self.p, done));
            match done {
                Ok(()) => self.stored += 1,
                Err(error) => result = Err(error.into()),
            }
        }
        result
    }
}
