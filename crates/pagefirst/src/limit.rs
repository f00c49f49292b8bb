//! Limits: how much memory those that share one may use (Linux's memory cgroups).
//!
//! A space may have a [`Limit`], and a limit may have one above it; what is charged to one is charged to all above. Charged
//! are pages of private memory, huge ones and copies included, and pages of files: those that a fault brings in to its
//! space's limit, those that a read or write of a file does to the caller's ([`Platform::limit`]). Who brought a page in
//! pays for it until it is freed, whoever uses it. The zero pages, page tables and objects of the library are not charged.
//!
//! A `Charge` is taken before the page, with no lock held; the frame remembers in its metadata to which limit it is
//! charged, and gives that back when it is freed. Each CPU has some pages of one limit charged in advance, so that CPUs that
//! share a limit do not write to one cache line for every page. Before anybody is told [`OverLimit`], these are given back.
//!
//! A limit may be lowered to less than is charged. Then nothing is charged in advance until that is less again: who lowers it
//! says so first, then looks at what is charged, and takes back what CPUs have; who charges does it first, and then looks at
//! what is allowed; and freed pages are not kept where more is charged than that.
//!
//! What is counted lies in frames of its own, found by the limit's number: one word has the pages charged and how many refer
//! to the limit (its object, and the limits below it). When that is zero the number is free again.

use crate::frame::{self, Frame, words};
use crate::mem::{Link, Pooled, Shared};
use crate::platform::Platform;
use crate::sync::Spin;
use crate::sync::atomic::plain::{AtomicU32, AtomicU64};
use crate::sync::atomic::{AcqRel, Acquire, Relaxed, Release, SeqCst, fence};
use crate::sync::epoch::Pin;
use crate::sync::held;
use crate::types::{NoMemory, Pfn};

/// The number of a limit: it names the limit for as long as there is one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct LimitId(u16);

/// A limit is reached: this one, or one below it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("over the limit {}", .0.0)]
pub struct OverLimit(pub LimitId);

/// Why a page cannot be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unavailable {
    NoMemory,
    OverLimit(OverLimit),
}

impl From<NoMemory> for Unavailable {
    fn from(NoMemory: NoMemory) -> Self {
        Unavailable::NoMemory
    }
}
impl From<OverLimit> for Unavailable {
    fn from(over: OverLimit) -> Self {
        Unavailable::OverLimit(over)
    }
}

/// A limit on memory. Its numbers are pages.
///
/// ```
/// use pagefirst::fault::{FaultError, Outcome};
/// use pagefirst::limit::Limit;
/// use pagefirst::policy::Policy;
/// use pagefirst::space::{AddressSpace, Map};
/// use pagefirst::types::{Access, Prot};
/// use pagefirst_machine::{Config, Machine};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let machine: &'static Machine = Machine::new(Config::default());
/// let limit = Limit::new(machine, None, 0)?;
/// let space = AddressSpace::new(machine, Policy::default())?;
/// space.set_limit(Some(limit.clone()));
/// let at = space.map(Map::anonymous(4096, Prot::READ | Prot::WRITE))?.range.start;
/// let over = space.fault(at, Access::Write).error();
/// assert_eq!(over, Some(FaultError::OverLimit(limit.id())));
/// limit.set_max(1);
/// assert!(matches!(space.fault(at, Access::Write), Outcome::Mapped { .. }));
/// assert_eq!(limit.charged(), 1);
/// # Ok(())
/// # }
/// ```
pub struct Limit<P: Platform> {
    p: &'static P,
    id: u16,
}

impl<P: Platform> Pooled for Limit<P> {}

impl<P: Platform> Limit<P> {
    /// A limit of `max` pages, below another if there is to be one.
    ///
    /// # Errors
    /// [`NoMemory`], also when there are as many limits as there can be (32,767).
    pub fn new(
        p: &'static P,
        above: Option<&Shared<P, Limit<P>>>,
        max: u64,
    ) -> Result<Shared<P, Self>, NoMemory> {
        let slot = p.vm().or_drain(p, || p.vm().limits.reserve())?;
        let above = above.map_or(0, |limit| limit.id);
        let id = p.vm().limit_records.claim(p, above, max)?;
        Ok(slot.fill(Limit { p, id }))
    }
    /// Its number.
    pub fn id(&self) -> LimitId {
        LimitId(self.id)
    }
    /// Pages it allows.
    pub fn max(&self) -> u64 {
        self.record().max.load(Relaxed)
    }
    /// Allows so many from now on. What is charged already stays.
    pub fn set_max(&self, pages: u64) {
        self.record().max.store(pages, Relaxed);
        fence(SeqCst); // as in `charge`
        // What was charged in advance is given out without a look at it.
        if self.charged() > pages {
            drain(self.p);
        }
    }
    /// Pages charged, those in advance included: at most 64 for each CPU.
    pub fn charged(&self) -> u64 {
        self.record().used.load(Relaxed) & PAGES
    }
    /// The most that were charged at once.
    pub fn peak(&self) -> u64 {
        self.record().peak.load(Relaxed)
    }
    /// How often it refused.
    pub fn refused(&self) -> u64 {
        self.record().refused.load(Relaxed)
    }
    /// A frame that can be had at once, charged. Pinned, with no lock held.
    #[cold]
    #[inline(never)]
    pub(crate) fn frame_now(&self) -> Result<Frame<P>, NoMemory> {
        let Ok(charge) = Charge::now(self, 1) else { return Err(NoMemory) };
        let frame = Frame::new(self.p)?;
        charge.commit(&frame);
        Ok(frame)
    }
    fn record(&self) -> Record {
        self.p.vm().limit_records.record(self.p, self.id)
    }
}

impl<P: Platform> Drop for Limit<P> {
    fn drop(&mut self) {
        self.p.vm().limit_records.take_off(self.p, self.id, REF);
    }
}

/// In the word of what is used: pages, and above them references.
const PAGES: u64 = REF - 1;
const REF: u64 = 1 << 32;

const RECORD: usize = 8;
const RECORDS: usize = frame::WORDS / RECORD;

/// A limit's words, on a cache line of their own.
#[derive(Clone, Copy)]
struct Record {
    used: &'static AtomicU64,
    max: &'static AtomicU64,
    peak: &'static AtomicU64,
    above: &'static AtomicU64,
    refused: &'static AtomicU64,
}

/// The records of all limits, by number; number 0 is none.
pub(crate) struct Records<P: Platform> {
    /// The frame that names the frames of records; 0 while there is none.
    directory: AtomicU32,
    changing: Spin<P, ()>,
}

impl<P: Platform> Records<P> {
    pub fn new() -> Self {
        Records { directory: AtomicU32::new(0), changing: Spin::new(()) }
    }
    fn directory(&self, p: &'static P) -> Option<&'static [AtomicU64; frame::WORDS]> {
        let pfn = self.directory.load(Acquire);
        (pfn != 0).then(|| words(p, Pfn(pfn)))
    }
    fn frame(&self, p: &'static P, i: usize) -> Option<Pfn> {
        let pfn = self.directory(p)?[i].load(Acquire);
        (pfn != 0).then_some(Pfn(pfn as u32))
    }
    /// The record of a limit that there is: it is charged something, or referred to.
    fn record(&self, p: &'static P, id: u16) -> Record {
        let (i, at) = (id as usize / RECORDS, id as usize % RECORDS);
        let Some(frame) = self.frame(p, i) else { unreachable!("limit {id} is used and gone") };
        Record::at(p, frame, at)
    }

    /// Makes a record, referred to once.
    fn claim(&self, p: &'static P, above: u16, max: u64) -> Result<u16, NoMemory> {
        let mut fresh: Option<Frame<P>> = None;
        loop {
            {
                let _changing = self.changing.lock(p);
                if let Some(id) = self.claim_free(p, above, max) {
                    return Ok(id);
                }
                if fresh.is_some() {
                    self.add(p, &mut fresh)?;
                    continue;
                }
            }
            let mut frame = p.vm().frame(p)?;
            frame.clear();
            fresh = Some(frame);
        }
    }
    fn claim_free(&self, p: &'static P, above: u16, max: u64) -> Option<u16> {
        let frames = (0..frame::WORDS).map_while(|i| Some((i, self.frame(p, i)?)));
        let (id, record) = frames
            .flat_map(|(i, frame)| (0..RECORDS).map(move |at| (i * RECORDS + at, Record::at(p, frame, at))))
            .find(|(id, record)| *id != 0 && record.used.load(Acquire) == 0)?;
        if above != 0 {
            self.record(p, above).used.fetch_add(REF, Relaxed);
        }
        record.above.store(above.into(), Relaxed);
        record.max.store(max, Relaxed);
        record.peak.store(0, Relaxed);
        record.refused.store(0, Relaxed);
        record.used.store(REF, Release);
        Some(id as u16)
    }
    /// Adds a frame of zeros: the directory first, then records. If there are as many as can be, it stays the caller's.
    fn add(&self, p: &'static P, fresh: &mut Option<Frame<P>>) -> Result<(), NoMemory> {
        let free = self.directory(p).map(|d| d.iter().find(|word| word.load(Relaxed) == 0).ok_or(NoMemory));
        let free = free.transpose()?;
        if let Some(Pfn(pfn)) = fresh.take().map(Frame::into_held) {
            match free {
                Some(word) => word.store(pfn.into(), Release),
                None => self.directory.store(pfn, Release),
            }
        }
        Ok(())
    }
    /// Gives frames back whose records are not used: from the last one on. Returns how many.
    pub fn trim(&self, p: &'static P) -> usize {
        let mut count = 0;
        loop {
            let _free = {
                let _changing = self.changing.lock(p);
                let Some(directory) = self.directory(p) else { return count };
                match directory.iter().rfind(|word| word.load(Relaxed) != 0) {
                    None => Frame::from_held(p, Pfn(self.directory.swap(0, Relaxed))),
                    Some(word) => {
                        let frame = Pfn(word.load(Relaxed) as u32);
                        if (0..RECORDS).any(|at| Record::at(p, frame, at).used.load(Acquire) != 0) {
                            return count;
                        }
                        word.store(0, Relaxed);
                        Frame::from_held(p, frame)
                    }
                }
            };
            count += 1;
        }
    }

    /// Charges a limit and all above it, or none.
    fn charge(&self, p: &'static P, id: u16, pages: u32) -> Result<(), OverLimit> {
        let mut at = id;
        while at != 0 {
            let record = self.record(p, at);
            if !record.add(pages) {
                if !cfg!(mutant = "refusal_charges_below") {
                    self.take_off_until(p, id, at, pages.into());
                }
                return Err(OverLimit(LimitId(at)));
            }
            at = record.above();
        }
        // Lowered meanwhile: this sees it, or who did it sees what is charged.
        fence(SeqCst);
        if let Some(over) = self.over(p, id) {
            self.take_off(p, id, pages.into());
            return Err(OverLimit(LimitId(over)));
        }
        Ok(())
    }
    /// The limit, this one or one above, to which more is charged than it allows.
    fn over(&self, p: &'static P, id: u16) -> Option<u16> {
        let mut at = id;
        while at != 0 {
            let record = self.record(p, at);
            if record.used.load(Relaxed) & PAGES > record.max.load(Relaxed) {
                return Some(at);
            }
            at = record.above();
        }
        None
    }
    /// Takes pages, and references to the limit itself, off it, and the pages off all above.
    fn take_off(&self, p: &'static P, id: u16, amount: u64) {
        self.take_off_until(p, id, 0, amount);
    }
    fn take_off_until(&self, p: &'static P, id: u16, end: u16, amount: u64) {
        let (mut at, mut refs) = (id, amount & !PAGES);
        while at != end {
            let record = self.record(p, at);
            at = record.above();
            let amount = refs | amount & PAGES;
            if amount == 0 {
                return;
            }
            // With the last of it the record is gone, and its reference to the one above.
            let before = record.used.fetch_sub(amount, AcqRel);
            debug_assert!(before >= amount && before & PAGES >= amount & PAGES, "given back and not charged");
            refs = if before == amount { REF } else { 0 };
        }
    }
}

impl Record {
    fn at<P: Platform>(p: &'static P, frame: Pfn, at: usize) -> Record {
        let [used, max, peak, above, refused, ..] = &words(p, frame)[at * RECORD..] else {
            unreachable!("a record is {RECORD} words")
        };
        Record { used, max, peak, above, refused }
    }
    fn above(&self) -> u16 {
        self.above.load(Relaxed) as u16
    }
    /// Charges pages, if that many are allowed.
    fn add(&self, pages: u32) -> bool {
        let max = self.max.load(Relaxed);
        let fits = |used: u64| (used & PAGES) + u64::from(pages) <= max;
        let charged =
            self.used.fetch_update(Relaxed, Relaxed, |used| fits(used).then(|| used + u64::from(pages)));
        let Ok(before) = charged else { return false };
        let now = (before & PAGES) + u64::from(pages);
        if now > self.peak.load(Relaxed) {
            self.peak.fetch_max(now, Relaxed);
        }
        true
    }
}

/// Pages that a CPU charges at once.
const BATCH: u32 = 32;

/// Pages charged in advance to one limit, with each CPU's cache of frames.
pub(crate) struct Stock {
    limit: u16,
    pages: u32,
}

impl Stock {
    pub const fn new() -> Self {
        Stock { limit: 0, pages: 0 }
    }
    fn take(&mut self, limit: u16, pages: u32) -> bool {
        let has = self.limit == limit && self.pages >= pages;
        if has {
            self.pages -= pages;
        }
        has
    }
    /// Keeps what was charged, or gives it back if that is too much, or more is charged than is allowed.
    #[cold]
    pub fn keep<P: Platform>(&mut self, p: &'static P, limit: u16, pages: u32) {
        if self.limit != limit {
            self.drain(p);
            self.limit = limit;
        }
        self.pages += pages;
        let records = &p.vm().limit_records;
        if records.over(p, limit).is_some() && !cfg!(mutant = "stock_over_limit") {
            self.drain(p);
        } else if self.pages > 2 * BATCH {
            let rest = self.pages - BATCH;
            self.pages = BATCH;
            records.take_off(p, limit, rest.into());
        }
    }
    fn drain<P: Platform>(&mut self, p: &'static P) -> u32 {
        let pages = core::mem::take(&mut self.pages);
        if pages > 0 {
            p.vm().limit_records.take_off(p, self.limit, pages.into());
        }
        pages
    }
}

/// Gives back what all CPUs have charged in advance; returns how many pages that was.
pub(crate) fn drain<P: Platform>(p: &'static P) -> u32 {
    (0..p.cpus()).map(|cpu| frame::with_stock(p, cpu, |stock| stock.drain(p))).sum()
}

fn with_stock<P: Platform, R>(p: &'static P, f: impl FnOnce(&mut Stock) -> R) -> R {
    let cpu = p.enter();
    let result = frame::with_stock(p, cpu, f);
    p.leave();
    result
}

/// Pages charged and not used yet. Dropped, they are given back.
#[must_use]
pub(crate) struct Charge<P: Platform> {
    p: &'static P,
    limit: u16,
    pages: u32,
}

impl<P: Platform> Charge<P> {
    /// Charges `pages` to a limit, which is there until this returns: it is pinned, or the caller has it. Takes nothing back
    /// from other CPUs.
    #[cold]
    fn now(limit: &Limit<P>, pages: u32) -> Result<Self, OverLimit> {
        let (p, id) = (limit.p, limit.id);
        held::no_lock(p, "a page is charged");
        let records = &p.vm().limit_records;
        let has = with_stock(p, |stock| stock.take(id, pages));
        if !has && pages < BATCH && records.charge(p, id, BATCH).is_ok() {
            with_stock(p, |stock| stock.keep(p, id, BATCH - pages));
        } else if !has {
            records.charge(p, id, pages)?;
        }
        Ok(Charge { p, limit: id, pages })
    }
    /// The same; a refusal that is told to the caller is counted.
    #[cold]
    fn take(limit: &Limit<P>, pages: u32, is_told: bool) -> Result<Self, OverLimit> {
        Charge::now(limit, pages).inspect_err(|OverLimit(over)| {
            if is_told {
                limit.p.vm().limit_records.record(limit.p, over.0).refused.fetch_add(1, Relaxed);
            }
        })
    }
    /// The folio, owned by the caller alone, is what the pages were charged for.
    pub fn commit(mut self, folio: &Frame<P>) {
        debug_assert_eq!(self.pages, 1 << folio.order());
        folio.meta().set_limit(self.limit);
        self.pages = 0;
    }
}

impl<P: Platform> Drop for Charge<P> {
    fn drop(&mut self) {
        if self.pages > 0 {
            with_stock(self.p, |stock| stock.keep(self.p, self.limit, self.pages));
        }
    }
}

/// Who pays for a page.
pub(crate) enum Payer<'a, P: Platform> {
    /// The limit of a space.
    Space(&'a Link<P, Limit<P>>),
    /// The limit of who calls.
    Caller,
}

impl<P: Platform> Payer<'_, P> {
    /// A folio of 2^order frames, charged; for the frames nothing is drained. Called unpinned, with no lock held.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn block(&self, p: &'static P, order: u8) -> Result<Frame<P>, Unavailable> {
        let charge = self.charge(p, order)?;
        Ok(committed(charge, Frame::block(p, order)?))
    }
    /// The same with nothing given back for it, and nobody told that he was refused.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn block_at_hand(&self, p: &'static P, order: u8) -> Result<Frame<P>, Unavailable> {
        let charge = self.try_charge(p, order, false)?;
        Ok(committed(charge, Frame::block(p, order)?))
    }
    /// A frame, charged; what is held back is drained before this gives up. Called unpinned, with no lock held.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn frame(&self, p: &'static P) -> Result<Frame<P>, Unavailable> {
        let charge = self.charge(p, 0)?;
        Ok(committed(charge, p.vm().frame(p)?))
    }
    /// Charges 2^order pages, if there is a limit. Before it refuses, what was charged for pages that are about to be freed,
    /// or in advance, is given back: until nothing is.
    fn charge(&self, p: &'static P, order: u8) -> Result<Option<Charge<P>>, OverLimit> {
        if let Ok(charge) = self.try_charge(p, order, false) {
            return Ok(charge);
        }
        p.vm().settle(p);
        loop {
            let given_back = !cfg!(mutant = "charges_in_advance_stay") && drain(p) > 0;
            match self.try_charge(p, order, !given_back) {
                Err(_) if given_back => {}
                charge => return charge,
            }
        }
    }
    fn try_charge(&self, p: &'static P, order: u8, is_told: bool) -> Result<Option<Charge<P>>, OverLimit> {
        let take = |limit: &Limit<P>| Charge::take(limit, 1 << order, is_told);
        match self {
            Payer::Space(link) if link.is_none() => Ok(None),
            Payer::Space(link) => link.load(&Pin::new(p)).map(take).transpose(),
            Payer::Caller => p.limit().map(|limit| take(&limit)).transpose(),
        }
    }
}

fn committed<P: Platform>(charge: Option<Charge<P>>, folio: Frame<P>) -> Frame<P> {
    if let Some(charge) = charge {
        charge.commit(&folio);
    }
    folio
}
