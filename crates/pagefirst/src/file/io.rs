//! Reading and writing files through the cache, and dropping what nobody uses.

use super::cache::{FileCache, LOOKED_AT, Lookup, Outs, pages_of};
use super::error::{ReadError, SizeError, WriteError};
use super::index::{Found, LAST_INDEX, Nodes, Short};
use super::making::Making;
use super::{File as _, Hint};
use crate::frame::{Frame, FrameFlags, bytes, words};
use crate::limit::Payer;
use crate::platform::Platform;
use crate::sync::atomic::{Relaxed, Release};
use crate::sync::epoch::Pin;
use crate::types::PAGE_SIZE;
use core::ops::ControlFlow::{Break, Continue};
use core::ops::Range;

/// The page of a byte, the byte's place in it, and how many of `most` bytes from there lie in it.
fn part(at: u64, most: usize) -> (u64, usize, usize) {
    let (index, from) = (at / PAGE_SIZE, (at % PAGE_SIZE) as usize);
    (index, from, most.min(PAGE_SIZE as usize - from))
}

/// What came of an attempt to append.
enum Appended {
    Yes,
    /// The page is not beyond the end any more.
    No,
    /// So many nodes are needed.
    Short(Short),
    /// Look again.
    Again,
}

impl<P: Platform> FileCache<P> {
    /// Copies bytes of the file to `to`, like `pread(2)`: as many as there are before the end, or before a page that
    /// could not be had. Called unpinned, with no lock held.
    ///
    /// # Errors
    /// [`ReadError`], never `BeyondEnd`, when the first page could not be had.
    pub fn read_at(&self, p: &'static P, offset: u64, to: &mut [u8]) -> Result<usize, ReadError<P>> {
        self.not_direct()?;
        let mut done = 0;
        while done < to.len() {
            let at = offset.saturating_add(done as u64);
            let Some(below) = self.size().checked_sub(at).filter(|below| *below > 0) else { break };
            let most = usize::try_from(below).unwrap_or(usize::MAX).min(to.len() - done);
            let (index, from, n) = part(at, most);
            if self.is_hole(index) {
                to[done..done + n].fill(0);
                done += n;
                continue;
            }
            let page = match self.read(p, index) {
                Ok(page) => page,
                Err(ReadError::BeyondEnd) => break,
                Err(ReadError::Removing(_)) => {
                    self.wait_for_removal(p);
                    continue;
                }
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            };
            bytes::read(page.words(), from, &mut to[done..done + n]);
            done += n;
        }
        Ok(done)
    }

    /// Whether a page is not in memory, and zero: it need not be there to be read.
    fn is_hole(&self, index: u64) -> bool {
        !self.file.is_stored() && matches!(self.lookup(self.p, &Pin::new(self.p), index), Lookup::Missing)
    }

    /// Copies `from` into the file at `offset`, like `pwrite(2)`, growing it as far as was written: as many bytes as
    /// could be written before a page that could not be had. Called unpinned, with no lock held.
    ///
    /// # Errors
    /// [`WriteError`] when nothing was written.
    pub fn write_at(&self, p: &'static P, offset: u64, from: &[u8]) -> Result<usize, WriteError<P>> {
        self.not_direct()?;
        if offset.checked_add(from.len() as u64).is_none() {
            return Err(SizeError::TooLarge.into());
        }
        let mut done = 0;
        while done < from.len() {
            let at = offset + done as u64;
            let (_, _, n) = part(at, from.len() - done);
            match self.write_part(p, at, &from[done..done + n]) {
                Ok(()) => done += n,
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    /// Writes bytes that lie in one page.
    fn write_part(&self, p: &'static P, at: u64, from: &[u8]) -> Result<(), WriteError<P>> {
        let (index, place, _) = part(at, from.len());
        let end = at + from.len() as u64;
        loop {
            if index >= pages_of(self.size()) {
                if self.append(p, at, from)? {
                    return Ok(());
                }
                continue;
            }
            let page = match self.read(p, index) {
                Ok(page) => page,
                Err(ReadError::BeyondEnd) => continue,
                Err(ReadError::Removing(_)) => {
                    self.wait_for_removal(p);
                    continue;
                }
                Err(e) => return Err(e.into()),
            };
            // Grown first: growing zeroes what was beyond the end.
            self.grow_to(p, end);
            bytes::write(page.words(), place, from);
            page.meta().set(FrameFlags::DIRTY);
            // A shrink that came between has taken the page out: what was written is gone with it.
            if self.has(&page, index) {
                return Ok(());
            }
        }
    }

    /// Sees that the file has `end` bytes at least.
    fn grow_to(&self, p: &'static P, end: u64) {
        if self.size() < end {
            let _alone = self.changes.lock(p);
            if self.size() < end {
                self.grow(p, end);
            }
        }
    }

    /// Writes bytes of a page that lies wholly beyond the end, so that nothing need be read: the page is there with
    /// its contents in the moment in which the file grows. False when the page is not beyond the end any more.
    ///
    /// Its folio is zero around them, so nothing else may be stored of it: of a file that is stored it lies beyond the end
    /// whole.
    fn append(&self, p: &'static P, at: u64, from: &[u8]) -> Result<bool, WriteError<P>> {
        let (index, place, _) = part(at, from.len());
        let size = at + from.len() as u64;
        let payer = Payer::Caller;
        let mut making = Making::new(self, Hint::None, &payer);
        loop {
            while making.most > 0 && self.may_be_stored(index >> making.most << making.most) {
                making.most -= 1;
            }
            let Some((mut folio, first)) = making.get(index, size)? else {
                // A folio across the end has it.
                making.most = 0;
                continue;
            };
            folio.bytes_of((index - first) as u32)[place..place + from.len()].copy_from_slice(from);
            // Valid only once it is in the index: a stale neighbour of a fault may have its number.
            self.prepare(&folio, first, FrameFlags::DIRTY);
            match self.try_append(p, at, from, &folio, &mut making.nodes)? {
                Appended::Yes => return Ok(true),
                Appended::No => return Ok(false),
                Appended::Short(short) => making.more(folio, short)?,
                Appended::Again => making.again(folio),
            }
        }
    }

    /// Puts a folio there that has these bytes; if one across the end has the page already, all zero, the bytes go there.
    fn try_append(
        &self,
        p: &'static P,
        at: u64,
        from: &[u8],
        folio: &Frame<P>,
        nodes: &mut Nodes<P>,
    ) -> Result<Appended, WriteError<P>> {
        let (index, place, _) = part(at, from.len());
        // Not the last reference wherever it goes, so it may be dropped under the lock.
        let held = folio.another();
        let found = Found { pfn: held.pfn(), order: held.order() };
        let _alone = self.changes.lock(p);
        if index < pages_of(self.size()) {
            return Ok(Appended::No);
        }
        self.clear_tail(at + from.len() as u64);
        let mut w = self.writer.lock(p);
        let mut written = folio.meta();
        if let Some(there) = self.index.get(&w, index) {
            written = p.meta(there.folio());
            if !written.flags().contains(FrameFlags::UP_TO_DATE) {
                let reading = Frame::try_get(p, there.folio());
                drop(w);
                let Some(folio) = reading.filter(|folio| !self.take_failed(folio)) else {
                    return Ok(Appended::Again);
                };
                return Err(ReadError::Blocked(self.ticket(folio)).into());
            }
            if self.is_bad(there.pfn) {
                return Err(ReadError::Poisoned.into());
            }
            bytes::write(words(p, there.pfn), place, from);
        } else {
            let first = found.indexes(index).start;
            if self.index.room(&w, index, found.order) != Some(found.order) || self.may_be_stored(first) {
                return Ok(Appended::Again);
            }
            if let Err(short) = self.index.insert(&mut w, first, found, nodes) {
                return Ok(Appended::Short(short));
            }
            held.into_held();
            folio.meta().set(FrameFlags::UP_TO_DATE);
        }
        self.size.store(at + from.len() as u64, Release);
        // Last: who stores the page marks it clean, and then reads the size.
        written.set(FrameFlags::DIRTY);
        Ok(Appended::Yes)
    }

    /// Whether something may be stored of the page at `index`.
    fn may_be_stored(&self, index: u64) -> bool {
        self.file.is_stored() && index < pages_of(self.size())
    }

    /// Drops the pages that nobody maps or refers to and that need not be stored; returns how many. Called unpinned,
    /// with no lock held.
    pub fn evict(&self, _: &'static P) -> u64 {
        self.evict_range(0..LAST_INDEX + 1)
    }

    /// The same of these pages alone (`POSIX_FADV_DONTNEED`): a folio of which others are part stays.
    pub fn evict_range(&self, pages: Range<u64>) -> u64 {
        let (p, mut dropped, mut next) = (self.p, 0, pages.start);
        let Some(last) = pages.end.checked_sub(1) else { return 0 };
        loop {
            let mut outs = Outs::new();
            let mut left = LOOKED_AT;
            let pin = Pin::new(p);
            let mut w = self.writer.lock(p);
            let end = pages_of(self.size.load(Relaxed));
            let stopped = self.index.scan(&pin, next, last, &mut |index, found| {
                if outs.is_full() || left == 0 {
                    return Break(index);
                }
                left -= 1;
                let (meta, indexes) = (p.meta(found.folio()), found.indexes(index));
                if indexes.start < pages.start || pages.end < indexes.end || !meta.freeze() {
                    return Continue(());
                }
                // Read only now that nobody can write to it any more. Beyond the end nothing is stored.
                let is_lost =
                    cfg!(mutant = "evict_dirty") || cfg!(mutant = "evict_memory") && !self.file.is_stored();
                let is_dirty = meta.flags().contains(FrameFlags::DIRTY) && !is_lost;
                if is_dirty && indexes.start < end {
                    meta.thaw();
                    // What of it lies beyond the end goes when it is by itself. What a removal has looked at stays whole.
                    let whole = Found { pfn: found.folio(), ..found };
                    let may_split = end < indexes.end && !self.is_removing(&w, &indexes);
                    let cut = may_split && self.split(&mut w, indexes.start, whole);
                    return if cut { Break(end) } else { Continue(()) };
                }
                meta.set(FrameFlags::GOING);
                self.detach(&mut w, indexes.start, meta, &mut outs);
                meta.thaw();
                Continue(())
            });
            drop((w, pin));
            dropped += outs.pages();
            match stopped {
                Break(index) => next = index,
                Continue(()) => break,
            }
        }
        p.vm().collect_much(p);
        dropped
    }
}
