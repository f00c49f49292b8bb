//! Reading and writing files through the cache, write-back, and dropping what nobody uses.

use super::File as _;
use super::cache::{FileCache, LOOKED_AT, Lookup, Outs, pages_of};
use super::error::{IoError, ReadError, SizeError, WriteBackError, WriteError};
use super::index::{LAST_INDEX, Nodes, Short};
use super::size::Left;
use crate::frame::{Frame, FrameFlags, bytes};
use crate::platform::Platform;
use crate::sync::atomic::{Relaxed, Release};
use crate::sync::epoch::Pin;
use crate::types::PAGE_SIZE;
use core::ops::ControlFlow::{Break, Continue};

/// The page of a byte, the byte's place in it, and how many of `most` bytes from there lie in it.
fn part(at: u64, most: usize) -> (u64, usize, usize) {
    let (index, from) = (at / PAGE_SIZE, (at % PAGE_SIZE) as usize);
    (index, from, most.min(PAGE_SIZE as usize - from))
}

impl<P: Platform> FileCache<P> {
    /// Copies bytes of the file to `to`, like `pread(2)`: as many as there are before the end, or before a page that
    /// could not be had. Called unpinned, with no lock held.
    ///
    /// # Errors
    /// [`ReadError`], never `BeyondEnd`, when the first page could not be had.
    pub fn read_at(&self, p: &'static P, offset: u64, to: &mut [u8]) -> Result<usize, ReadError<P>> {
        let mut done = 0;
        while done < to.len() {
            let at = offset.saturating_add(done as u64);
            let Some(below) = self.size().checked_sub(at).filter(|below| *below > 0) else { break };
            let most = usize::try_from(below).unwrap_or(usize::MAX).min(to.len() - done);
            let (index, from, n) = part(at, most);
            let frame = match self.read(p, index) {
                Ok(frame) => frame,
                Err(ReadError::BeyondEnd) => break,
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            };
            bytes::read(frame.words(), from, &mut to[done..done + n]);
            done += n;
        }
        Ok(done)
    }

    /// Copies `from` into the file at `offset`, like `pwrite(2)`, growing it as far as was written: as many bytes as
    /// could be written before a page that could not be had. Called unpinned, with no lock held.
    ///
    /// # Errors
    /// [`WriteError`] when nothing was written.
    pub fn write_at(&self, p: &'static P, offset: u64, from: &[u8]) -> Result<usize, WriteError<P>> {
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
            let frame = match self.read(p, index) {
                Ok(frame) => frame,
                Err(ReadError::BeyondEnd) => continue,
                Err(e) => return Err(e.into()),
            };
            // Grown first: growing zeroes what was beyond the end.
            self.grow_to(p, end)?;
            bytes::write(frame.words(), place, from);
            frame.meta().set(FrameFlags::DIRTY);
            // A shrink that came between has taken the page out: what was written is gone with it.
            if self.is_attached(frame.meta(), index) {
                return Ok(());
            }
        }
    }

    /// Sees that the file has `end` bytes at least.
    fn grow_to(&self, p: &'static P, end: u64) -> Result<(), SizeError> {
        while self.size() < end {
            let mut outs = Outs::new();
            let pin = Pin::new(p);
            let mut w = self.writer.lock(p);
            if self.size.load(Relaxed) >= end {
                break;
            }
            match self.clear_beyond(p, &pin, &mut w, &mut outs) {
                Ok(()) => self.size.store(end, Release),
                Err(Left::More(_)) => {}
                Err(Left::Mapped(index)) => return Err(SizeError::StillMapped { index }),
            }
            drop((w, pin));
        }
        Ok(())
    }

    /// Writes bytes of a page that lies wholly beyond the end, so that nothing need be read: the page is there with
    /// its contents in the moment in which the file grows. False when the page is not beyond the end any more.
    fn append(&self, p: &'static P, at: u64, from: &[u8]) -> Result<bool, WriteError<P>> {
        let (index, place, _) = part(at, from.len());
        let mut frame = p.vm().frame(p)?;
        frame.clear();
        frame.bytes()[place..place + from.len()].copy_from_slice(from);
        // Valid only once it is in the index: a stale neighbour of a fault may have this frame's number.
        self.prepare(&frame, index, FrameFlags::DIRTY);
        let mut nodes = Nodes::new();
        let mut need = 0;
        loop {
            nodes.reserve(p, need)?;
            let mut outs = Outs::new();
            // Not the last reference wherever it goes, so it may be dropped under the lock.
            let held = frame.another();
            let pin = Pin::new(p);
            let mut w = self.writer.lock(p);
            if index < pages_of(self.size.load(Relaxed)) {
                return Ok(false);
            }
            match self.clear_beyond(p, &pin, &mut w, &mut outs) {
                Ok(()) => {}
                Err(Left::More(_)) => continue,
                Err(Left::Mapped(index)) => return Err(SizeError::StillMapped { index }.into()),
            }
            if let Err(Short(n)) = self.index.insert(&mut w, index, held.pfn(), &mut nodes) {
                need = n;
                continue;
            }
            held.into_held();
            frame.meta().set(FrameFlags::UP_TO_DATE);
            self.size.store(at + from.len() as u64, Release);
            return Ok(true);
        }
    }

    /// Stores the dirty pages, as far as they lie below the size; returns how many. Called unpinned, with no lock
    /// held.
    ///
    /// A page that is mapped afterwards is dirty still: it may be written to without anybody being told.
    ///
    /// # Errors
    /// [`WriteBackError`]; what was not stored is dirty still.
    pub fn write_back(&self, p: &'static P) -> Result<u64, WriteBackError> {
        let mut stored = 0;
        let mut failed = Ok(());
        let mut next = 0;
        let mut copy = None;
        while let Some((index, frame)) = self.next_dirty(p, next) {
            let copy = match &mut copy {
                Some(copy) => copy,
                None => copy.insert(p.vm().frame(p)?),
            };
            match self.store(index, &frame, copy) {
                Ok(true) => stored += 1,
                Ok(false) => {}
                Err(e) => failed = Err(e.into()),
            }
            next = index + 1;
        }
        failed.map(|()| stored)
    }

    /// The first dirty page from `first` on.
    fn next_dirty(&self, p: &'static P, first: u64) -> Option<(u64, Frame<P>)> {
        let pin = Pin::new(p);
        let dirty = |pfn| p.meta(pfn).flags().contains(FrameFlags::DIRTY);
        let found = self.index.scan(&pin, first, LAST_INDEX, &mut |index, pfn| {
            if dirty(pfn)
                && let Lookup::Page(frame) = self.lookup(p, &pin, index)
                && dirty(frame.pfn())
            {
                return Break((index, frame));
            }
            Continue(())
        });
        found.break_value()
    }

    /// Stores one page, by way of a copy: it may be written to meanwhile.
    fn store(&self, index: u64, frame: &Frame<P>, copy: &mut Frame<P>) -> Result<bool, IoError> {
        let meta = frame.meta();
        // Cleared before it is read: who writes after that, sets it again.
        meta.clear(FrameFlags::DIRTY);
        copy.copy_from(frame);
        let below = self.size().saturating_sub(index * PAGE_SIZE).min(PAGE_SIZE) as usize;
        let result = match below {
            0 => Ok(()),
            below => self.file.write(index, &copy.bytes()[..below]),
        };
        if result.is_err() || meta.maps_ordered() > 0 {
            meta.set(FrameFlags::DIRTY);
        }
        result.map(|()| below > 0)
    }

    /// Drops the pages that nobody maps or refers to and that need not be stored; returns how many. Called unpinned,
    /// with no lock held.
    pub fn evict(&self, p: &'static P) -> u64 {
        let (mut dropped, mut next) = (0, 0);
        loop {
            let mut outs = Outs::new();
            let mut left = LOOKED_AT;
            let pin = Pin::new(p);
            let mut w = self.writer.lock(p);
            let end = pages_of(self.size.load(Relaxed));
            let stopped = self.index.scan(&pin, next, LAST_INDEX, &mut |index, pfn| {
                if outs.is_full() || left == 0 {
                    return Break(index);
                }
                left -= 1;
                let meta = p.meta(pfn);
                if meta.flags().contains(FrameFlags::POISON) || !meta.freeze() {
                    return Continue(());
                }
                // Read only now that nobody can write to it any more. Beyond the end nothing is stored.
                let is_dirty = meta.flags().contains(FrameFlags::DIRTY) && !cfg!(mutant = "evict_dirty");
                if is_dirty && index < end {
                    meta.thaw();
                    return Continue(());
                }
                meta.set(FrameFlags::GOING);
                let out = self.detach(&mut w, index, meta);
                meta.thaw();
                outs.push(out);
                Continue(())
            });
            drop((w, pin));
            dropped += outs.len() as u64;
            match stopped {
                Break(index) => next = index,
                Continue(()) => return dropped,
            }
        }
    }
}
