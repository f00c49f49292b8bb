//! Tables that are owned and not yet published, and where zeroed tables wait.
//!
//! [`Reserve`] is filled before any lock is taken; `install` takes from it and cannot allocate, for no allocator is
//! in its reach. What is not used returns when the reserve is dropped.

use super::record::TableRecord;
use crate::arch::MAX_LEVELS;
use crate::frame::{self, Frame, FrameFlags};
use crate::mem::{Few, Room, ask};
use crate::platform::{Note, Platform};
use crate::sync::atomic::Relaxed;
use crate::sync::held;
use crate::types::{NoMemory, Pfn};
use core::ptr::NonNull;

const CACHED: usize = 32;

/// One CPU's zeroed tables, each with its record.
pub(crate) struct TableCache {
    tables: [Pfn; CACHED],
    len: usize,
}

impl TableCache {
    pub const fn new() -> Self {
        TableCache { tables: [Pfn(0); CACHED], len: 0 }
    }
    fn pop(&mut self) -> Option<Pfn> {
        self.len = self.len.checked_sub(1)?;
        Some(self.tables[self.len])
    }
    /// Adds a table; `None` when the cache is full.
    fn push(&mut self, pfn: Pfn) -> Option<()> {
        *self.tables.get_mut(self.len)? = pfn;
        self.len += 1;
        Some(())
    }
}

/// A table with its record from this CPU's cache, or a fresh one; all its entries are zero.
#[cfg_attr(debug_assertions, track_caller)]
pub(super) fn take_zeroed<P: Platform>(p: &'static P) -> Result<Pfn, NoMemory> {
    held::no_lock(p, "a table is reserved");
    ask(p)?;
    let local = p.local(p.enter());
    let cached = {
        let mut cache = local.tables.lock(p);
        let pfn = cache.pop();
        local.cached_tables.store(cache.len as u32, Relaxed);
        pfn
    };
    p.leave();
    let pfn = match cached {
        Some(pfn) => pfn,
        None => fresh(p)?,
    };
    p.note(Note::TableAllocated(pfn));
    Ok(pfn)
}

fn fresh<P: Platform>(p: &'static P) -> Result<Pfn, NoMemory> {
    let mut frame = Frame::new(p)?;
    let record = p.vm().records.take_one(p)?;
    frame.clear();
    // SAFETY: the slot is ours and uninitialised.
    unsafe { record.write(TableRecord::new()) };
    frame.meta().set_owner(record.as_ptr().cast());
    Ok(frame.into_held())
}

/// Keeps all-zero tables that nobody can reach for the next reserve, or frees them.
pub(super) fn give_zeroed<P: Platform>(p: &'static P, tables: &[Pfn]) {
    if tables.is_empty() {
        return;
    }
    let is_any_bad = tables.iter().any(|pfn| p.meta(*pfn).flags().contains(FrameFlags::POISON));
    tables.iter().for_each(|pfn| p.note(Note::TableFreed(*pfn)));
    if is_any_bad {
        return free(p, tables); // the good ones with them, for once
    }
    let local = p.local(p.enter());
    let kept = {
        let mut cache = local.tables.lock(p);
        let kept = tables.iter().map_while(|pfn| cache.push(*pfn)).count();
        local.cached_tables.store(cache.len as u32, Relaxed);
        kept
    };
    p.leave();
    free(p, &tables[kept..]);
}

fn free<P: Platform>(p: &'static P, tables: &[Pfn]) {
    for pfn in tables {
        let Some(record) = NonNull::new(p.meta(*pfn).owner().cast::<TableRecord>()) else {
            unreachable!("{pfn:?} is a table without a record")
        };
        // SAFETY: the pointer that this slab gave to `fresh`, as it was; the table is past its grace period or was never
        // published, so nobody reads the record any more.
        unsafe { p.vm().records.give(p, &[record]) };
        p.meta(*pfn).set_link(0);
    }
    frame::put_all(p, tables);
}

/// Frees the zeroed tables of every CPU; returns how many frames that were.
pub(crate) fn drain<P: Platform>(p: &'static P) -> usize {
    let mut freed = 0;
    for cpu in 0..p.cpus() {
        let local = p.local(cpu);
        loop {
            let popped = {
                let mut cache = local.tables.lock(p);
                let popped = cache.pop();
                local.cached_tables.store(cache.len as u32, Relaxed);
                popped
            };
            let Some(pfn) = popped else { break };
            free(p, &[pfn]);
            freed += 1;
        }
    }
    freed
}

/// Zeroed tables in all caches.
pub(crate) fn cached<P: Platform>(p: &'static P) -> u64 {
    (0..p.cpus()).map(|c| p.local(c).cached_tables.load(Relaxed) as u64).sum()
}

/// Zeroed tables, owned, not visible to anybody.
///
/// They end published, by `install`, or return to their pool when the reserve is dropped; nothing else can be done
/// with them. So each reserve has one owner,
/// ```compile_fail,E0382
/// # use pagefirst::{platform::Platform, table::Reserve};
/// fn c01_a_reserve_is_owned_once<P: Platform>(reserve: Reserve<P>) {
///     drop(reserve); // its tables return
///     drop(reserve);
/// }
/// ```
/// whoever is lent one has it alone, and it is not refilled meanwhile,
/// ```compile_fail,E0499
/// # use pagefirst::{platform::Platform, table::Reserve};
/// # fn use_up<P: Platform>(_: &mut Reserve<P>, _: impl FnMut()) {}
/// fn c01_a_reserve_that_is_in_use_is_not_filled<P: Platform>(mut reserve: Reserve<P>) {
///     let lent = &mut reserve;
///     use_up(lent, || drop(reserve.refill(1).is_ok()));
/// }
/// ```
/// and a table leaves it one way.
/// ```compile_fail,E0624
/// # use pagefirst::{platform::Platform, table::Reserve};
/// fn c01_nobody_else_takes_a_table_from_a_reserve<P: Platform>(reserve: &mut Reserve<P>) {
///     let table = reserve.take();
/// }
/// ```
/// What can be done with one:
/// ```
/// # use pagefirst::{platform::Platform, table::Reserve, types::NoMemory};
/// fn three_tables<P: Platform>(platform: &'static P) -> Result<Reserve<P>, NoMemory> {
///     let mut reserve = Reserve::new(platform);
///     reserve.refill(3)?; // two that it had already would stay
///     Ok(reserve)
/// }
/// ```
pub struct Reserve<P: Platform> {
    p: &'static P,
    tables: Few<Pfn, Room<Pfn, MAX_LEVELS>>,
}

impl<P: Platform> Reserve<P> {
    /// An empty reserve.
    pub fn new(p: &'static P) -> Self {
        Reserve { p, tables: Few::new() }
    }
    /// Makes sure that `n` tables are there. Called with no lock held.
    ///
    /// # Errors
    /// [`NoMemory`]; the tables already there stay.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn refill(&mut self, n: u8) -> Result<(), NoMemory> {
        while self.len() < n {
            let pfn = take_zeroed(self.p)?;
            self.put(pfn);
        }
        Ok(())
    }
    /// The number of tables there.
    pub fn len(&self) -> u8 {
        self.tables.len() as u8
    }
    /// Whether none is there.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }
    pub(super) fn take(&mut self) -> Option<Pfn> {
        self.tables.pop()
    }
    pub(super) fn put(&mut self, pfn: Pfn) {
        self.tables.push(pfn);
    }
}

/// Any number of zeroed tables, owned, in a list through their frames' links: what a call that must not fail
/// half-way takes before it announces anything.
pub(crate) struct Stock<P: Platform> {
    p: &'static P,
    head: Option<Pfn>,
}

impl<P: Platform> Stock<P> {
    /// `n` tables. Called with no lock held.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn new(p: &'static P, n: u64) -> Result<Self, NoMemory> {
        let mut stock = Stock::empty(p);
        for _ in 0..n {
            // Not `or_drain`: a closure would hide who wants it.
            let table = match take_zeroed(p) {
                Ok(table) => table,
                Err(NoMemory) => {
                    p.vm().drain(p);
                    take_zeroed(p)?
                }
            };
            stock.put(table);
        }
        Ok(stock)
    }
    /// A stock without tables.
    pub fn empty(p: &'static P) -> Self {
        Stock { p, head: None }
    }
    pub(super) fn put(&mut self, pfn: Pfn) {
        self.p.meta(pfn).set_link(self.head.map_or(0, |h| h.0));
        self.head = Some(pfn);
    }
    pub(super) fn take(&mut self) -> Option<Pfn> {
        let pfn = self.head?;
        let next = self.p.meta(pfn).link();
        self.head = (next != 0).then_some(Pfn(next));
        Some(pfn)
    }
    /// Moves tables into `reserve` until it has `n`, or the stock is empty.
    pub fn refill(&mut self, reserve: &mut Reserve<P>, n: u8) {
        while reserve.len() < n
            && let Some(pfn) = self.take()
        {
            reserve.put(pfn);
        }
    }
}

impl<P: Platform> Drop for Stock<P> {
    fn drop(&mut self) {
        while let Some(pfn) = self.take() {
            give_zeroed(self.p, &[pfn]);
        }
    }
}

impl<P: Platform> Reserve<P> {
    #[cold]
    fn give_back(&mut self) {
        while let Some(pfn) = self.take() {
            give_zeroed(self.p, &[pfn]);
        }
    }
}

impl<P: Platform> Drop for Reserve<P> {
    #[inline]
    fn drop(&mut self) {
        if !self.is_empty() {
            self.give_back();
        }
    }
}
