//! What a fault has in hand between two looks, and what it may need.

use super::direct::Answer;
use super::{Bus, FaultError, Outcome, Ticket, huge};
use crate::arch::Format;
use crate::file::{File as _, FileCache, MayWrite, ReadError, Told, Wanted};
use crate::frame::{Frame, FrameMeta, Part};
use crate::limit::{Limit, OverLimit};
use crate::mem::Shared;
use crate::platform::Platform;
use crate::space::{AddressSpace, Grown};
use crate::sync::atomic::Relaxed;
use crate::table::{Pass, Reserve, Stock};
use crate::tlb::{Gather, SmallGather};
use crate::types::{NoMemory, Pfn, VirtAddr, VirtRange};

/// What is missing.
pub(crate) enum Need<P: Platform> {
    /// A cleared page for an entry of a table at this level.
    Cleared(u8),
    /// The huge zero page.
    HugeZero,
    /// A copy of this page.
    Copy(Part<P>),
    /// This page of a file.
    Page(Shared<P, FileCache<P>>, u64, Wanted),
    /// The file's leave to write to this page of it.
    Leave(Shared<P, FileCache<P>>, Part<P>),
    /// Where a file that is memory itself has a page, and a copy of it.
    Direct { file: Shared<P, FileCache<P>>, index: u64, write: bool, copies: bool },
    /// So many tables.
    Tables(u8),
    /// The huge page at the address in small ones: there is no other for a copy.
    Split,
    /// A flush of what an entry at this level, or a huge page, spans around the address: something that maps it in the
    /// other size was taken out and is not flushed yet. See [`Refused::Unflushed`](crate::table::Refused::Unflushed).
    FlushBefore(u64, u8),
    /// A flush of the address, since this page was seen mapped there while copies were not flushed.
    Flush(Part<P>),
    /// A stack that covers the address.
    Stack,
    /// The flush of what was gathered, and then the end of it.
    Settle,
    /// The same, and the end of tables that lost their last entry in this range.
    Tidy(VirtRange),
}

/// A page that only this fault has.
pub(super) struct Fresh<P: Platform> {
    pub page: Frame<P>,
    /// What it is a copy of, held so that it stays what was copied; `None` for a cleared page.
    pub copy_of: Option<Part<P>>,
    /// The level of the table that its entry goes into.
    pub level: u8,
}

impl<P: Platform> Fresh<P> {
    /// A small page, which is cleared.
    #[inline]
    fn cleared(mut page: Frame<P>) -> Self {
        page.clear_small();
        Fresh { page, copy_of: None, level: 0 }
    }
    /// A small page, which becomes a copy.
    #[inline]
    fn copy(mut page: Frame<P>, of: Part<P>) -> Self {
        page.copy_of_small(&of);
        Fresh { page, copy_of: Some(of), level: 0 }
    }
    /// A copy of a small page if that can be had at once; else what is needed. Pinned, with no lock held.
    #[inline(always)]
    pub fn copy_now(p: &'static P, limit: Option<&Limit<P>>, of: Part<P>) -> Result<Self, Need<P>> {
        match frame_now(p, limit) {
            Ok(page) => Ok(Fresh::copy(page, of)),
            Err(NoMemory) => Err(Need::Copy(of)),
        }
    }
}

/// A small page that can be had at once, charged to whoever pays.
#[inline]
fn frame_now<P: Platform>(p: &'static P, limit: Option<&Limit<P>>) -> Result<Frame<P>, NoMemory> {
    match limit {
        Some(limit) => limit.frame_now(),
        None => Frame::new(p),
    }
}

/// Why a page is held: so that it is there, and no other page can take its number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// It was read from its file: it is to be there when the fault looks again (X20).
    Read,
    /// It was seen at the address before that was flushed.
    Flushed,
    /// It is a copy stored read-only, whose flush has to be done before it is made writable.
    Unflushed,
    /// Its file gave leave to write to it, in this turn.
    Leave(u64),
    /// It is the huge zero page, for an entry.
    HugeZero,
}

/// A page, and why it is held.
pub(super) struct Held<P: Platform> {
    page: Part<P>,
    why: Why,
}

/// What a fault has in hand. All of it is owned: dropped, it returns.
pub(crate) struct Hand<'a, P: Platform> {
    pub fresh: Option<Fresh<P>>,
    pub reserve: Reserve<P>,
    pub gather: SmallGather<'a, P>,
    /// A page held beside that.
    pub held: Option<Held<P>>,
    /// Where a file that is memory itself has a page.
    pub answer: Option<Answer<P>>,
    /// No huge page can be had, or there is no room for one: the small path goes on.
    pub small: bool,
    /// A page was read from its file.
    pub major: bool,
    /// Tables were published.
    pub published: bool,
    /// A stack was looked for and cannot grow.
    pub grown: bool,
    /// A page of private memory is to become this mapping's alone, for a pin.
    pub unshares: bool,
}

impl<'a, P: Platform> Hand<'a, P> {
    pub fn new(space: &'a AddressSpace<P>) -> Self {
        Hand {
            fresh: None,
            reserve: Reserve::new(space.platform()),
            gather: SmallGather::small(space.page_table()),
            held: None,
            answer: None,
            small: false,
            major: false,
            published: false,
            grown: false,
            unshares: false,
        }
    }

    /// Whether a copy of what an entry at `level` maps at `pfn` is in hand.
    pub fn has_copy(&self, pfn: Pfn, level: u8) -> bool {
        let fits = |fresh: &Fresh<P>| {
            fresh.level == level && fresh.copy_of.as_ref().is_some_and(|of| of.pfn() == pfn)
        };
        self.fresh.as_ref().is_some_and(fits)
    }
    /// How many references to this page are in hand.
    pub fn references_to(&self, page: &FrameMeta) -> u32 {
        let held = self.held.as_ref().map(|held| &held.page);
        let is_it = |part: &&Part<P>| core::ptr::eq(part.folio().meta(), page);
        [held, self.copied()].into_iter().flatten().filter(is_it).count() as u32
    }
    /// What a copy is in hand of.
    pub fn copied(&self) -> Option<&Part<P>> {
        self.fresh.as_ref()?.copy_of.as_ref()
    }
    /// Holds a page until it is not needed, or another is. Each is for what the next look does.
    pub fn hold(&mut self, page: Part<P>, why: Why) {
        self.held = Some(Held { page, why });
    }
    /// The page held for this reason.
    #[inline]
    pub fn holds(&self, why: Why) -> Option<&Part<P>> {
        self.held.as_ref().filter(|held| held.why == why).map(|held| &held.page)
    }
    /// The same, given up.
    pub fn take(&mut self, why: Why) -> Option<Part<P>> {
        self.held.take_if(|held| held.why == why).map(|held| held.page)
    }
    /// Whether a cleared page for an entry of a table at `level` is in hand.
    pub fn has_cleared(&self, level: u8) -> bool {
        self.fresh.as_ref().is_some_and(|f| f.copy_of.is_none() && f.level == level)
    }

    /// A cleared page for an entry of a table at `level`: the one in hand, or a small one that can be had at once, out of
    /// this CPU's cache or the allocator, with nothing drained for it. Pinned, with no lock held.
    #[inline(always)]
    pub fn cleared(&mut self, p: &'static P, limit: Option<&Limit<P>>, level: u8) -> Option<Fresh<P>> {
        if self.has_cleared(level) {
            return self.fresh.take();
        }
        if level > 0 {
            return None;
        }
        frame_now(p, limit).ok().map(Fresh::cleared)
    }
    /// Gets what is missing, unpinned and unlocked.
    #[inline]
    pub fn fetch(
        &mut self,
        space: &'a AddressSpace<P>,
        addr: VirtAddr,
        need: Need<P>,
    ) -> Result<(), Outcome<'a, P>> {
        let p = space.platform();
        match need {
            Need::Cleared(0) => {
                self.fresh = Some(Fresh::cleared(self.page(space)?));
            }
            Need::Cleared(level) => self.huge_page(space, level),
            Need::HugeZero => match p.vm().huge_zero_page(p) {
                Some(page) => self.hold(page.into(), Why::HugeZero),
                None => self.fall_back(space),
            },
            Need::FlushBefore(taken, level) => {
                self.gather.flush_before(P::Format::span_of(addr, level.max(huge::LEVEL)), taken);
            }
            Need::Copy(source) if source.order() == 0 => {
                self.fresh = Some(Fresh::copy(self.page(space)?, source));
            }
            Need::Copy(source) => self.huge_copy(space, source),
            Need::Split => self.split(space, addr)?,
            Need::Page(file, index, wanted) => self.read(space, file, index, wanted)?,
            Need::Leave(file, page) => self.ask(file, page)?,
            Need::Direct { file, index, write, copies } => {
                self.ask_direct(space, file, index, write, copies)?
            }
            Need::Tables(n) => self.tables(p, n)?,
            Need::Flush(seen) => {
                let level = seen.order() / P::Format::BITS as u8;
                self.gather.touch(P::Format::span_of(addr, level));
                self.gather.flush();
                self.hold(seen, Why::Flushed);
            }
            Need::Settle => self.gather.flush(),
            Need::Tidy(span) => {
                self.gather.flush();
                tidy(space, span);
            }
            Need::Stack => self.grow(space, addr)?,
        }
        Ok(())
    }

    /// A page, in place of the one in hand.
    #[inline]
    fn page(&mut self, space: &AddressSpace<P>) -> Result<Frame<P>, Outcome<'a, P>> {
        self.fresh = None;
        space.payer().frame(space.platform()).map_err(|why| Outcome::Error(why.into()))
    }

    #[cold]
    fn huge_page(&mut self, space: &AddressSpace<P>, level: u8) {
        self.fresh = None;
        match space.payer().block(space.platform(), P::Format::order(level)) {
            Ok(mut page) => {
                page.clear();
                self.fresh = Some(Fresh { page, copy_of: None, level });
            }
            Err(_) => self.fall_back(space),
        }
    }

    #[cold]
    fn huge_copy(&mut self, space: &AddressSpace<P>, source: Part<P>) {
        self.fresh = None;
        match space.payer().block(space.platform(), source.order()) {
            Ok(mut page) => {
                page.copy_of(&source);
                let level = source.order() / P::Format::BITS as u8;
                self.fresh = Some(Fresh { page, copy_of: Some(source), level });
            }
            Err(_) => self.fall_back(space),
        }
    }

    #[cold]
    fn split(&mut self, space: &'a AddressSpace<P>, addr: VirtAddr) -> Result<(), Outcome<'a, P>> {
        match space.split_huge(addr) {
            Some(Ok(())) => Ok(()),
            Some(Err(NoMemory)) => Err(Outcome::Error(FaultError::NoMemory)),
            None => self.wait_for_writer(space),
        }
    }

    /// A mapping call is at work.
    fn wait_for_writer(&self, space: &'a AddressSpace<P>) -> Result<(), Outcome<'a, P>> {
        if let Some(ticket) = Ticket::for_writer(space.page_table()) {
            return Err(Outcome::Blocked(ticket));
        }
        space.platform().relax();
        Ok(())
    }

    /// Asks a file that is memory itself where a page is.
    #[cold]
    fn ask_direct(
        &mut self,
        space: &'a AddressSpace<P>,
        file: Shared<P, FileCache<P>>,
        index: u64,
        write: bool,
        copies: bool,
    ) -> Result<(), Outcome<'a, P>> {
        let failed = |bus| Err(Outcome::Error(FaultError::Bus(bus)));
        let turn = quiet_turn(&file)?;
        // A private write leaves the file as it is.
        let Ok(run) = file.file().direct(index, write && !copies).and_then(|run| run.checked(index)) else {
            return failed(Bus::Io);
        };
        let copy = match run.frame(index, 1) {
            Some(from) if copies => {
                let mut page = self.page(space)?;
                if !page.copy_of_memory(from) {
                    return failed(Bus::Io);
                }
                Some(page)
            }
            _ => None,
        };
        self.answer = Some(Answer { file, index, write, turn, run, copy });
        Ok(())
    }

    /// A huge page was wanted and none can be had.
    #[cold]
    fn fall_back(&mut self, space: &AddressSpace<P>) {
        self.small = true;
        space.failures.no_huge.fetch_add(1, Relaxed);
    }

    #[cold]
    fn tables(&mut self, p: &'static P, n: u8) -> Result<(), Outcome<'a, P>> {
        let refilled = p.vm().or_drain(p, || self.reserve.refill(n));
        if refilled.is_err() && cfg!(mutant = "no_memory_keeps_page") {
            core::mem::forget(self.fresh.take());
        }
        refilled.map_err(|_| Outcome::Error(FaultError::NoMemory))
    }

    #[cold]
    fn read(
        &mut self,
        space: &AddressSpace<P>,
        file: Shared<P, FileCache<P>>,
        index: u64,
        wanted: Wanted,
    ) -> Result<(), Outcome<'a, P>> {
        let mut told = Told::default();
        let read = file.read_wanted(space.platform(), index, wanted, &space.payer(), &mut told);
        if told.short {
            space.failures.no_huge.fetch_add(1, Relaxed);
        }
        match read {
            Ok(page) => {
                if let Some(page) = page {
                    self.hold(page, Why::Read);
                }
                self.major |= told.began;
                Ok(())
            }
            Err(ReadError::BeyondEnd) => Err(Outcome::Error(FaultError::Bus(Bus::BeyondEnd))),
            Err(ReadError::Poisoned) => Err(Outcome::Error(FaultError::Bus(Bus::Poison))),
            Err(ReadError::Io) => Err(Outcome::Error(FaultError::Bus(Bus::Io))),
            Err(ReadError::OverLimit(OverLimit(id))) => Err(Outcome::Error(FaultError::OverLimit(id))),
            Err(ReadError::NoMemory) => Err(Outcome::Error(FaultError::NoMemory)),
            Err(ReadError::Blocked(ticket)) => Err(Outcome::Blocked(ticket)),
            Err(ReadError::Removing(turn)) => Err(Outcome::Blocked(Ticket::for_removal(file, turn))),
        }
    }

    #[cold]
    fn ask(&mut self, file: Shared<P, FileCache<P>>, page: Part<P>) -> Result<(), Outcome<'a, P>> {
        let turn = quiet_turn(&file)?;
        match file.may_write(page.folio(), page.index()) {
            MayWrite::Yes => self.hold(page, Why::Leave(turn)),
            MayWrite::No => return Err(Outcome::Error(FaultError::Bus(Bus::Refused))),
            MayWrite::Later(ticket) => return Err(Outcome::Blocked(ticket)),
        }
        Ok(())
    }

    #[cold]
    fn grow(&mut self, space: &'a AddressSpace<P>, addr: VirtAddr) -> Result<(), Outcome<'a, P>> {
        match space.grow_stack(addr) {
            Grown::Again => {}
            Grown::No => self.grown = true,
            Grown::NoMemory => return Err(Outcome::Error(FaultError::NoMemory)),
            Grown::Busy => return self.wait_for_writer(space),
        }
        Ok(())
    }
}

/// The file's turn, in which nothing of it is being removed.
fn quiet_turn<'a, P: Platform>(file: &Shared<P, FileCache<P>>) -> Result<u64, Outcome<'a, P>> {
    let turn = file.turn();
    match turn % 2 {
        0 => Ok(turn),
        _ => Err(Outcome::Blocked(Ticket::for_removal(file.clone(), turn))),
    }
}

/// Ends the tables of `span` that lost their last entry.
#[cold]
fn tidy<P: Platform>(space: &AddressSpace<P>, span: VirtRange) {
    let table = space.page_table();
    table.visit(
        span,
        &mut Pass { cuts: false },
        &mut Stock::empty(space.platform()),
        &mut Gather::new(table),
    );
}
