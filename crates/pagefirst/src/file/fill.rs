//! Reading pages in: insert first, read then.
//!
//! The size is checked when the page is inserted, under the lock; what is read beyond that size is zeroed again.
//! If the file shrinks meanwhile to before the page's end, the page is taken out, and read anew if it is still
//! wanted: so nothing read before a truncation is seen after it.

use super::cache::{FileCache, Lookup, Outs, pages_of};
use super::error::ReadError;
use super::index::{Nodes, Short};
use super::{File as _, FillGuard, Io};
use crate::fault::page_key;
use crate::frame::{Frame, FrameFlags};
use crate::platform::Platform;
use crate::sync::atomic::Relaxed;
use crate::sync::epoch::Pin;
use crate::types::PAGE_SIZE;

/// Why a page was not inserted.
enum Refused {
    /// More nodes are needed.
    Short(Short),
    /// The file ends before it, or there is one: look again.
    Again,
}

impl<P: Platform> FileCache<P> {
    /// The page at `index`, up to date; read in if it is not in memory. Called unpinned, with no lock held.
    ///
    /// # Errors
    /// [`ReadError`]; nothing has changed then.
    pub(crate) fn read(&self, p: &'static P, index: u64) -> Result<Frame<P>, ReadError<P>> {
        let mut nodes = Nodes::new();
        let mut spare = None;
        loop {
            let found = {
                let pin = Pin::new(p);
                self.lookup(p, &pin, index)
            };
            match found {
                Lookup::Page(frame) => return Ok(frame),
                Lookup::Filling(frame) => return Err(ReadError::Filling(frame)),
                Lookup::Poisoned => return Err(ReadError::Poisoned),
                Lookup::BeyondEnd => return Err(ReadError::BeyondEnd),
                Lookup::Missing => {}
            }
            let frame = match spare.take() {
                Some(frame) => frame,
                None => {
                    let mut frame = p.vm().frame(p)?;
                    frame.clear();
                    frame
                }
            };
            self.prepare(&frame, index, FrameFlags::FILLING);
            match self.insert_filling(p, index, &frame, &mut nodes) {
                Ok(size) => {
                    let mut page = Filling { cache: self, index, frame: Some(frame) };
                    if page.fill(size) == Io::Error {
                        page.give_up(FrameFlags::FAILED);
                        return Err(ReadError::Io);
                    }
                    if let Some(frame) = page.finish() {
                        return Ok(frame);
                    }
                }
                Err(Refused::Short(Short(n))) => {
                    nodes.reserve(p, n)?;
                    spare = Some(frame);
                }
                Err(Refused::Again) => spare = Some(frame),
            }
        }
    }

    /// Attaches a page that is to be filled; answers with the file's size at that moment.
    fn insert_filling(
        &self,
        p: &'static P,
        index: u64,
        frame: &Frame<P>,
        nodes: &mut Nodes<P>,
    ) -> Result<u64, Refused> {
        // Not the last reference wherever it goes, so it may be dropped under the lock.
        let held = frame.another();
        let mut w = self.writer.lock(p);
        let size = self.size.load(Relaxed);
        if index >= pages_of(size) || self.index.get(&w, index).is_some() {
            return Err(Refused::Again);
        }
        self.index.insert(&mut w, index, held.pfn(), nodes).map_err(Refused::Short)?;
        held.into_held();
        Ok(size)
    }
}

/// A page that this CPU is reading in. It is finished, or taken out when dropped.
struct Filling<'a, P: Platform> {
    cache: &'a FileCache<P>,
    index: u64,
    /// There until the end.
    frame: Option<Frame<P>>,
}

impl<P: Platform> Filling<'_, P> {
    /// Reads the contents of a page of a file that had `size` bytes when it was inserted.
    fn fill(&mut self, size: u64) -> Io {
        let Some(frame) = &mut self.frame else { return Io::Error };
        let bytes = frame.bytes();
        let io = self.cache.file.read(self.index, FillGuard(&mut *bytes));
        let below = size.saturating_sub(self.index * PAGE_SIZE).min(PAGE_SIZE);
        bytes[below as usize..].fill(0);
        io
    }

    /// The page is up to date; `None` when it was taken out meanwhile.
    fn finish(mut self) -> Option<Frame<P>> {
        let frame = self.frame.take()?;
        let meta = frame.meta();
        let attached = {
            let w = self.cache.writer.lock(self.cache.p);
            let attached = meta.owner() == self.cache.owner();
            debug_assert!(!attached || self.cache.index.get(&w, self.index) == Some(frame.pfn()));
            if attached {
                meta.set(FrameFlags::UP_TO_DATE);
            }
            attached
        };
        meta.clear(FrameFlags::FILLING);
        self.cache.p.ready(page_key(frame.pfn()));
        attached.then_some(frame)
    }

    /// Takes the page out, if nobody did yet, and tells those who wait for it.
    fn give_up(&mut self, why: FrameFlags) {
        let Some(frame) = self.frame.take() else { return };
        let meta = frame.meta();
        let mut outs = Outs::new();
        {
            let mut w = self.cache.writer.lock(self.cache.p);
            if meta.owner() == self.cache.owner() {
                meta.set(FrameFlags::GOING);
                outs.push(self.cache.detach(&mut w, self.index, meta));
            }
        }
        meta.set(why);
        meta.clear(FrameFlags::FILLING);
        self.cache.p.ready(page_key(frame.pfn()));
    }
}

impl<P: Platform> Drop for Filling<'_, P> {
    fn drop(&mut self) {
        self.give_up(FrameFlags::empty());
    }
}
