//! Reading pages in: insert first, read then.
//!
//! The size is checked when the page is inserted, under the lock; what is read beyond that size is zeroed before the
//! page is up to date. If the file shrinks meanwhile to before the page's end, the page is marked `GOING`, and taken
//! out; who completes it makes it up to date only if it is not, in one step. So nothing read before a truncation is seen
//! after it. Completing takes no lock and frees nothing, so that it can be done in an interrupt.
//!
//! **Errors.** A page that could not be read is `FAILED`, and stays in the index until its failure is told of:
//! - A fault that comes again with its ticket ([`retry`](crate::space::AddressSpace::retry)) is told if the page of its
//!   ticket failed, and is what it needs still, once: the ticket is spent. That holds for each ticket, whether the page
//!   is in the index still or not.
//! - Who meets a failed page without handing over a ticket (a fault, a read or write of the file) is told if it was he who
//!   began the read, or somebody keeps a ticket for it, as he may himself. If nobody does, as of a page read ahead, it is
//!   read anew.
//! - Who is told takes the page out, if it is in the index still. So whoever comes after that reads it anew: nobody is
//!   told twice of one failure.
//!
//! A folio of several pages is read page by page, and up to date when all of them are. If one of them cannot be read
//! that is nobody's error yet: the folio goes, and the page that is wanted is read by itself.

use super::ahead::Wanted;
use super::cache::{FileCache, Lookup, Outs, pages_of};
use super::error::{IoError, ReadError};
use super::index::{Found, Nodes, Short};
use super::making::Making;
use super::{File as _, Io};
use crate::fault::Ticket;
use crate::frame::{Filling, Frame, FrameFlags, Part};
use crate::limit::Payer;
use crate::platform::Platform;
use crate::sync::atomic::Relaxed;
use crate::sync::epoch::Pin;
use crate::types::PAGE_SIZE;
use core::fmt;
use core::ops::{Deref, DerefMut};

/// A page to be filled, owned: its bytes, zero at first. Possession proves that nobody else reads or maps them yet.
///
/// It can be kept for as long as the read takes, and completed anywhere, in an interrupt too. Dropped without, it could
/// not be read.
pub struct Fill {
    /// There until the end.
    page: Option<Filling>,
    /// Bytes below the size the file had when the page was inserted.
    below: usize,
}

impl Fill {
    /// The page holds what the file says, or could not be read. Who waits for it is woken. Takes no lock.
    pub fn complete(mut self, result: Result<(), IoError>) {
        self.end(result);
    }
    fn end(&mut self, result: Result<(), IoError>) {
        let Some(mut page) = self.page.take() else { return };
        let state = match result {
            Ok(()) => {
                if self.below < PAGE_SIZE as usize {
                    page.bytes_mut()[self.below..].fill(0);
                }
                FrameFlags::UP_TO_DATE
            }
            Err(IoError) => FrameFlags::FAILED,
        };
        page.end(state);
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        self.end(Err(IoError));
    }
}

impl Deref for Fill {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.page.as_ref().map_or(&[], Filling::bytes)
    }
}

impl DerefMut for Fill {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.page.as_mut().map_or(&mut [], Filling::bytes_mut)
    }
}

impl fmt::Debug for Fill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fill").field("below", &self.below).finish()
    }
}

/// A page to be filled at once, or to be kept: its bytes, zero at first.
#[derive(Debug)]
pub struct FillGuard<'a>(&'a mut Option<Fill>);

impl FillGuard<'_> {
    /// The page, to be completed later.
    pub fn keep(self) -> Fill {
        self.0.take().unwrap_or(Fill { page: None, below: 0 })
    }
}

impl Deref for FillGuard<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}

impl DerefMut for FillGuard<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().unwrap_or(&mut [])
    }
}

/// How often one attempt to read a page looks again: without others in its way a few times, for more nodes and smaller
/// folios.
const TURNS: u32 = 32;

/// What there is to tell of a page that was asked for.
#[derive(Default)]
pub(crate) struct Told {
    /// There was no memory for a larger folio.
    pub short: bool,
    /// The file was asked for it.
    pub began: bool,
}

/// Why a page was not inserted.
pub(super) enum Refused {
    /// More nodes are needed.
    Short(Short),
    /// The file ends before it, or there is one: look again.
    Again,
    /// It is being removed, in this turn.
    Removing(u64),
}

impl<P: Platform> FileCache<P> {
    /// The page at `index`, up to date; read in if it is not in memory. Called unpinned, with no lock held; may sleep.
    ///
    /// # Errors
    /// [`ReadError`]; nothing has changed then.
    pub(crate) fn read(&self, p: &'static P, index: u64) -> Result<Part<P>, ReadError<P>> {
        loop {
            let told = &mut Told::default();
            if let Some(page) = self.read_wanted(p, index, Wanted::default(), &Payer::Caller, told)? {
                return Ok(page);
            }
            // Who is in the way may have to wait himself, as for a mapping call.
            self.wait_for_removal(p);
        }
    }
    /// The same for who says how it is wanted, which file and read-ahead go by, and who pays; `None` when others were
    /// [faster](TURNS) again and again.
    ///
    /// # Errors
    /// [`ReadError`]; nothing has changed then.
    pub(crate) fn read_wanted(
        &self,
        p: &'static P,
        index: u64,
        wanted: Wanted,
        payer: &Payer<'_, P>,
        told: &mut Told,
    ) -> Result<Option<Part<P>>, ReadError<P>> {
        let mut making = Making::new(self, wanted.hint, payer);
        for _ in 0..TURNS {
            let found = {
                let pin = Pin::new(p);
                self.lookup(p, &pin, index)
            };
            match found {
                Lookup::Page(page) => {
                    if page.meta().take_mark() {
                        self.ahead_of_mark(p, index, wanted, payer);
                    }
                    return Ok(Some(page));
                }
                Lookup::Filling(folio) => {
                    if folio.meta().take_mark() {
                        self.ahead_of_mark(p, index, wanted, payer);
                    }
                    return Err(ReadError::Blocked(self.ticket(folio)));
                }
                Lookup::Failed(folio) => {
                    // The cache's reference, and ours, and the ticket's. Others may look it up.
                    let is_waited_for =
                        folio.meta().flags().contains(FrameFlags::AWAITED) && folio.meta().counts().refs > 2;
                    let is_taken = self.take_failed(&folio);
                    match folio.order() {
                        0 if is_taken && is_waited_for => return Err(ReadError::Io),
                        0 => {}
                        // It may have been another page of it.
                        _ => making.most = 0,
                    }
                    continue;
                }
                Lookup::Removing(turn) => return Err(ReadError::Removing(turn)),
                Lookup::Poisoned => {
                    self.drop_bad(index)?;
                    p.relax();
                    continue;
                }
                Lookup::BeyondEnd => return Err(ReadError::BeyondEnd),
                Lookup::Missing => {}
            }
            let made = making.get(index, self.size());
            told.short = making.short;
            let Some((folio, first)) = made? else { continue };
            let order = folio.order();
            self.prepare(&folio, first, FrameFlags::FILLING);
            let early = cfg!(mutant = "read_before_insert");
            if early {
                self.fill(&folio, first, self.size());
            }
            match self.insert_filling(p, index, &folio, &mut making.nodes) {
                Ok(size) => {
                    told.began = true;
                    if !early {
                        self.fill(&folio, first, size);
                    }
                    self.ahead_of_miss(p, first + (1 << order) - 1, wanted, payer);
                    let flags = folio.meta().flags();
                    if flags.contains(FrameFlags::UP_TO_DATE) {
                        if self.owns(folio.meta(), first) {
                            let page = folio.pfn().add((index - first) as u32);
                            return Ok(Some(Part::of(folio, page)));
                        }
                    } else if flags.contains(FrameFlags::FAILED) {
                        self.take_failed(&folio);
                        if order == 0 {
                            return Err(ReadError::Io);
                        }
                        making.most = 0;
                    } else if flags & (FrameFlags::FILLING | FrameFlags::GOING) == FrameFlags::FILLING {
                        return Err(ReadError::Blocked(self.ticket(folio)));
                    }
                }
                Err(Refused::Short(short)) => {
                    making.more(folio, short)?;
                    told.short = making.short;
                }
                Err(Refused::Again) => making.again(folio),
                Err(Refused::Removing(turn)) => return Err(ReadError::Removing(turn)),
            }
        }
        Ok(None)
    }

    /// A ticket for a folio of this file that is being read in.
    pub(crate) fn ticket(&self, folio: Frame<P>) -> Ticket<'static, P> {
        folio.meta().set(FrameFlags::AWAITED);
        Ticket::for_page(folio, self.file.id())
    }

    /// Attaches a folio that is to be filled, for the page at `index`; answers with the file's size at that moment.
    pub(super) fn insert_filling(
        &self,
        p: &'static P,
        index: u64,
        folio: &Frame<P>,
        nodes: &mut Nodes<P>,
    ) -> Result<u64, Refused> {
        // Not the last reference wherever it goes, so it may be dropped under the lock.
        let held = folio.another();
        let part = (index & ((1 << held.order()) - 1)) as u32;
        let found = Found { pfn: held.pfn().add(part), order: held.order() };
        let mut w = self.writer.lock(p);
        let (size, indexes) = (self.size.load(Relaxed), found.indexes(index));
        let has_room = self.index.room(&w, index, found.order) == Some(found.order);
        let is_beyond = index >= pages_of(size) && !cfg!(mutant = "insert_beyond_end");
        if is_beyond || !has_room && !cfg!(mutant = "insert_over_another") {
            return Err(Refused::Again);
        }
        if self.is_removing(&w, &indexes) && !cfg!(mutant = "insert_while_removing") {
            return Err(Refused::Removing(self.turn()));
        }
        let whole = Found { pfn: held.pfn(), ..found };
        self.index.insert(&mut w, indexes.start, whole, nodes).map_err(Refused::Short)?;
        held.into_held();
        Ok(size)
    }

    /// Has the file fill the pages of a folio that was inserted when it had `size` bytes: now, or later.
    pub(super) fn fill(&self, folio: &Frame<P>, first: u64, size: u64) {
        let below = |index: u64| (size - index * PAGE_SIZE).min(PAGE_SIZE) as usize;
        if folio.order() == 0 {
            self.fill_page(Filling::new(folio.another()), first, below(first));
            return;
        }
        let pages = (pages_of(size) - first).min(1 << folio.order()) as u32;
        // Whatever happens, it ends.
        let mut rest =
            Fill { page: Some(Filling::of_several(folio.another(), pages)), below: PAGE_SIZE as usize };
        for i in 0..pages {
            let Some(page) = rest.page.as_mut().map(|rest| rest.split_off(i)) else { return };
            let index = first + u64::from(i);
            if self.fill_page(page, index, below(index)) == Io::Error {
                return;
            }
        }
        rest.complete(Ok(()));
    }

    fn fill_page(&self, page: Filling, index: u64, below: usize) -> Io {
        let mut fill = Some(Fill { page: Some(page), below });
        let io = self.file.read(index, FillGuard(&mut fill));
        if let Some(fill) = fill {
            let done = io == Io::Ready;
            fill.complete(if done { Ok(()) } else { Err(IoError) });
            return if done { Io::Ready } else { Io::Error };
        }
        Io::Pending
    }

    /// Takes out a folio that could not be read, so that it will be read anew; false if another did.
    pub(crate) fn take_failed(&self, folio: &Frame<P>) -> bool {
        let meta = folio.meta();
        let first = meta.index();
        let mut outs = Outs::new();
        let mut w = self.writer.lock(self.p);
        if !self.owns(meta, first) || !meta.flags().contains(FrameFlags::FAILED) {
            return false;
        }
        meta.set(FrameFlags::GOING);
        self.detach(&mut w, first, meta, &mut outs);
        drop(w);
        true
    }
}
