//! A folio to be put where none is.
//!
//! It is made as large as the file wants, there is room, and there is memory: if one of the two last fails, a smaller one is
//! tried. Memory is had with no lock held, so by the time of the insert there may be less room, or more nodes be needed: then
//! it is tried again, with what is in hand.

use super::cache::FileCache;
use super::index::{MAX_FOLIO_ORDER, Nodes, Short};
use super::{File as _, Hint};
use crate::frame::Frame;
use crate::limit::{Payer, Unavailable};
use crate::platform::Platform;
use crate::types::NoMemory;

/// What is in hand from one attempt to the next. All of it is owned: dropped, it returns.
pub(super) struct Making<'a, P: Platform> {
    cache: &'a FileCache<P>,
    hint: Hint,
    payer: &'a Payer<'a, P>,
    /// Only memory is taken that is free: nothing is pushed out for it.
    at_hand: bool,
    spare: Option<Frame<P>>,
    pub nodes: Nodes<P>,
    /// log2 of the most pages.
    pub most: u8,
    /// There was no memory for a larger one.
    pub short: bool,
}

impl<'a, P: Platform> Making<'a, P> {
    pub fn new(cache: &'a FileCache<P>, hint: Hint, payer: &'a Payer<'a, P>) -> Self {
        let (spare, nodes) = (None, Nodes::new());
        Making { cache, hint, payer, at_hand: false, spare, nodes, most: MAX_FOLIO_ORDER, short: false }
    }
    /// The same, of memory that is free.
    pub fn at_hand(cache: &'a FileCache<P>, hint: Hint, payer: &'a Payer<'a, P>) -> Self {
        Making { at_hand: true, ..Self::new(cache, hint, payer) }
    }

    /// A folio for the missing page at `index` of a file of `size` bytes, cleared once, and its first index; `None` when the
    /// page is not missing any more. Called unpinned, with no lock held.
    pub fn get(&mut self, index: u64, size: u64) -> Result<Option<(Frame<P>, u64)>, Unavailable> {
        loop {
            let Some(order) = self.order(index, size) else { return Ok(None) };
            let spare = self.spare.take_if(|spare| spare.order() == order);
            let folio = match spare.map_or_else(|| self.cleared(order), Ok) {
                Ok(folio) => folio,
                Err(_) if order > 0 => {
                    (self.short, self.most) = (true, order - 1);
                    continue;
                }
                Err(why) => return Err(why),
            };
            return Ok(Some((folio, index >> order << order)));
        }
    }
    fn order(&self, index: u64, size: u64) -> Option<u8> {
        let (file, p) = (&self.cache.file, self.cache.p);
        let most = self.most.min(file.max_folio_order());
        let wanted = if most == 0 { 0 } else { file.folio_order(index, size, self.hint).min(most) };
        if wanted == 0 { Some(0) } else { self.cache.index.room(&self.cache.writer.lock(p), index, wanted) }
    }
    /// A small one is had if there is any memory; a larger one if such a block is free.
    fn cleared(&self, order: u8) -> Result<Frame<P>, Unavailable> {
        let p = self.cache.p;
        let mut folio = match order {
            _ if self.at_hand => self.payer.block_at_hand(p, order)?,
            0 => self.payer.frame(p)?,
            _ => self.payer.block(p, order)?,
        };
        folio.clear();
        Ok(folio)
    }

    /// It was not inserted: it is kept for the next attempt.
    pub fn again(&mut self, folio: Frame<P>) {
        self.spare = Some(folio);
    }
    /// The same, for more nodes are needed. Without them, small pages are tried.
    pub fn more(&mut self, folio: Frame<P>, Short(n): Short) -> Result<(), NoMemory> {
        let p = self.cache.p;
        match if self.at_hand { self.nodes.reserve_at_hand(p, n) } else { self.nodes.reserve(p, n) } {
            Ok(()) => self.again(folio),
            Err(NoMemory) if folio.order() > 0 => (self.short, self.most) = (true, 0),
            Err(NoMemory) => return Err(NoMemory),
        }
        Ok(())
    }
}
