//! Reading pages in: insert first, read then.
//!
//! The size is checked when the page is inserted, under the lock; what is read beyond that size is zeroed again.
//! If the file shrinks meanwhile to before the page's end, the page is taken out, and read anew if it is still
//! wanted: so nothing read before a truncation is seen after it.

use super::cache::{FileCache, Lookup, Outs, pages_of};
use super::error::ReadError;
use super::index::{Found, MAX_FOLIO_ORDER, Nodes, Short};
use super::{File as _, FillGuard, Hint, Io};
use crate::fault::page_key;
use crate::frame::{Frame, FrameFlags, Part};
use crate::limit::{Payer, Unavailable};
use crate::platform::Platform;
use crate::sync::atomic::Relaxed;
use crate::sync::epoch::Pin;
use crate::types::{NoMemory, PAGE_SIZE};

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
    pub(crate) fn read(&self, p: &'static P, index: u64) -> Result<Part<P>, ReadError<P>> {
        self.read_hinted(p, index, Hint::None, &Payer::Caller, &mut false)
    }
    /// The same with a hint for the file, which may want a larger folio, and with who pays. `short` says afterwards whether there was no
    /// memory for one.
    ///
    /// # Errors
    /// [`ReadError`]; nothing has changed then.
    pub(crate) fn read_hinted(
        &self,
        p: &'static P,
        index: u64,
        hint: Hint,
        payer: &Payer<'_, P>,
        short: &mut bool,
    ) -> Result<Part<P>, ReadError<P>> {
        let mut nodes = Nodes::new();
        let mut spare = None;
        let mut most = MAX_FOLIO_ORDER;
        loop {
            let found = {
                let pin = Pin::new(p);
                self.lookup(p, &pin, index)
            };
            match found {
                Lookup::Page(page) => return Ok(page),
                Lookup::Filling(folio) => return Err(ReadError::Filling(folio)),
                Lookup::Poisoned => return Err(ReadError::Poisoned),
                Lookup::BeyondEnd => return Err(ReadError::BeyondEnd),
                Lookup::Missing => {}
            }
            let Some(order) = self.order_for(p, index, self.size(), hint, most) else { continue };
            let folio = match spare.take_if(|spare: &mut Frame<P>| spare.order() == order) {
                Some(folio) => folio,
                None => match self.cleared(p, payer, order) {
                    Ok(folio) => folio,
                    Err(_) if order > 0 => {
                        (*short, most) = (true, order - 1);
                        continue;
                    }
                    Err(why) => return Err(why.into()),
                },
            };
            let first = index >> order << order;
            self.prepare(&folio, first, FrameFlags::FILLING);
            match self.insert_filling(p, first, &folio, &mut nodes) {
                Ok(size) => {
                    let mut filling = Filling { cache: self, index: first, folio: Some(folio) };
                    match filling.fill(size) {
                        Io::Ready => {}
                        // It may have been another page of it.
                        Io::Error if order > 0 => {
                            filling.give_up(FrameFlags::empty());
                            most = 0;
                            continue;
                        }
                        Io::Error => {
                            filling.give_up(FrameFlags::FAILED);
                            return Err(ReadError::Io);
                        }
                    }
                    if let Some(folio) = filling.finish() {
                        let page = folio.pfn().add((index - first) as u32);
                        return Ok(Part::of(folio, page));
                    }
                }
                Err(Refused::Short(Short(n))) => match nodes.reserve(p, n) {
                    Ok(()) => spare = Some(folio),
                    Err(NoMemory) if order > 0 => (*short, most) = (true, 0),
                    Err(NoMemory) => return Err(ReadError::NoMemory),
                },
                Err(Refused::Again) => spare = Some(folio),
            }
        }
    }

    /// The order of the folio to make for the missing page at `index` of a file of `size` bytes, at most `most`; `None`
    /// when it is not missing any more.
    pub(super) fn order_for(&self, p: &'static P, index: u64, size: u64, hint: Hint, most: u8) -> Option<u8> {
        let wanted = self.file.folio_order(index, size, hint).min(most);
        if wanted == 0 { Some(0) } else { self.index.room(&self.writer.lock(p), index, wanted) }
    }

    /// A cleared folio, charged. A small one is had if there is any memory; a larger one if such a block is free.
    pub(super) fn cleared(
        &self,
        p: &'static P,
        payer: &Payer<'_, P>,
        order: u8,
    ) -> Result<Frame<P>, Unavailable> {
        let mut folio = if order == 0 { payer.frame(p)? } else { payer.block(p, order)? };
        folio.clear();
        Ok(folio)
    }

    /// Attaches a folio that is to be filled; answers with the file's size at that moment.
    fn insert_filling(
        &self,
        p: &'static P,
        index: u64,
        folio: &Frame<P>,
        nodes: &mut Nodes<P>,
    ) -> Result<u64, Refused> {
        // Not the last reference wherever it goes, so it may be dropped under the lock.
        let held = folio.another();
        let found = Found { pfn: held.pfn(), order: held.order() };
        let mut w = self.writer.lock(p);
        let size = self.size.load(Relaxed);
        if index >= pages_of(size) || self.index.room(&w, index, found.order) != Some(found.order) {
            return Err(Refused::Again);
        }
        self.index.insert(&mut w, index, found, nodes).map_err(Refused::Short)?;
        held.into_held();
        Ok(size)
    }
}

/// A folio that this CPU is reading in. It is finished, or taken out when dropped.
struct Filling<'a, P: Platform> {
    cache: &'a FileCache<P>,
    index: u64,
    /// There until the end.
    folio: Option<Frame<P>>,
}

impl<P: Platform> Filling<'_, P> {
    /// Reads the contents of the pages of a file that had `size` bytes when they were inserted.
    fn fill(&mut self, size: u64) -> Io {
        let Some(folio) = &mut self.folio else { return Io::Error };
        for (index, i) in (self.index..pages_of(size)).zip(0..1 << folio.order()) {
            let bytes = folio.bytes_of(i);
            if self.cache.file.read(index, FillGuard(&mut *bytes)) == Io::Error {
                return Io::Error;
            }
            let below = (size - index * PAGE_SIZE).min(PAGE_SIZE);
            bytes[below as usize..].fill(0);
        }
        Io::Ready
    }

    /// The folio is up to date; `None` when it was taken out meanwhile.
    fn finish(mut self) -> Option<Frame<P>> {
        let folio = self.folio.take()?;
        let meta = folio.meta();
        let attached = {
            let w = self.cache.writer.lock(self.cache.p);
            let attached = meta.owner() == self.cache.owner();
            let there = || self.cache.index.get(&w, self.index).map(|found| found.pfn);
            debug_assert!(!attached || there() == Some(folio.pfn()));
            if attached {
                meta.set(FrameFlags::UP_TO_DATE);
            }
            attached
        };
        meta.clear(FrameFlags::FILLING);
        self.cache.p.ready(page_key(folio.pfn()));
        attached.then_some(folio)
    }

    /// Takes the folio out, if nobody did yet, and tells those who wait for it.
    fn give_up(&mut self, why: FrameFlags) {
        let Some(folio) = self.folio.take() else { return };
        let meta = folio.meta();
        let mut outs = Outs::new();
        {
            let mut w = self.cache.writer.lock(self.cache.p);
            if meta.owner() == self.cache.owner() {
                meta.set(FrameFlags::GOING);
                self.cache.detach(&mut w, self.index, meta, &mut outs);
            }
        }
        meta.set(why);
        meta.clear(FrameFlags::FILLING);
        self.cache.p.ready(page_key(folio.pfn()));
    }
}

impl<P: Platform> Drop for Filling<'_, P> {
    fn drop(&mut self) {
        self.give_up(FrameFlags::empty());
    }
}
