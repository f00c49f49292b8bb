//! A table for small pages that is filled before anybody sees it, entry by entry, and then published whole: the copy of
//! another space's. It comes into the tables as every entry does, by [`install`].

use super::publish::{Batch, NewEntry, Refused, install};
use super::record::{Counted, FaultKind, Guard};
use super::slot::Walk;
use super::{PageTable, Reserve};
use crate::arch::Format;
use crate::platform::Platform;
use crate::sync::epoch::Pin;
use crate::tlb::Gather;
use crate::types::VirtAddr;

/// A table for small pages in the making. It is opened for an entry, and ends published.
#[must_use = "its entries are counted"]
pub(crate) struct NewLeaf<P: Platform> {
    guard: Guard<'static, P>,
    base: VirtAddr,
    /// Entries that are not counted yet.
    entries: i32,
}

impl<P: Platform> NewLeaf<P> {
    /// One for the addresses from `base` on; `None` when the reserve has no table.
    pub fn open(p: &'static P, base: VirtAddr, reserve: &mut Reserve<P>) -> Option<Self> {
        Some(NewLeaf { guard: Guard::private(p, reserve.take()?, 0, false), base, entries: 0 })
    }
    /// Its first address.
    pub fn base(&self) -> VirtAddr {
        self.base
    }
    /// Puts in an entry; its mapping is counted.
    #[inline]
    pub fn set(&mut self, va: VirtAddr, entry: NewEntry) {
        self.guard.set(P::Format::index(va, 0), entry.raw);
        self.entries += (entry.counted == Counted::Anon) as i32;
    }
    /// Makes it visible, with what tables are missing above it, which are in `reserve`. Called with no lock and no pin held.
    pub fn publish(self, space: &PageTable<P>, reserve: &mut Reserve<P>, gather: &mut Gather<'_, P>) {
        let NewLeaf { guard, base, entries } = self;
        debug_assert!(guard.entries() > 0, "no table without an entry");
        let raw = P::Format::table(guard.table().pfn());
        guard.count(Counted::Anon, entries);
        drop(guard);
        // Before it is visible: who takes its last entry out counts it off.
        space.count_published(0, 1);
        space.put(base, 1, NewEntry { raw, counted: Counted::Nothing }, reserve, gather);
    }
}

/// An entry that rests on nothing that could go away.
struct One {
    va: VirtAddr,
    level: u8,
    entry: Option<NewEntry>,
}

impl Batch for One {
    fn va(&self) -> VirtAddr {
        self.va
    }
    fn level(&self) -> u8 {
        self.level
    }
    fn is_current(&self) -> bool {
        true
    }
    fn entry(&mut self, _: VirtAddr) -> Option<NewEntry> {
        self.entry.take()
    }
    fn kind(&self) -> Option<FaultKind> {
        None
    }
}

impl<P: Platform> PageTable<P> {
    /// Installs an entry at `level` where nothing is mapped and nobody else maps anything; others may take away what was
    /// put there before, tables too, by a reverse map. Called with no lock and no pin held.
    pub(crate) fn put(
        &self,
        va: VirtAddr,
        level: u8,
        entry: NewEntry,
        reserve: &mut Reserve<P>,
        gather: &mut Gather<'_, P>,
    ) {
        let mut batch = One { va, level, entry: Some(entry) };
        loop {
            let done = {
                let pin = Pin::new(self.p);
                let Walk::Nothing(slot) = self.walk(&pin, va) else {
                    unreachable!("something is mapped at {va}")
                };
                install(self, &pin, slot, &mut batch, reserve, gather)
            };
            match done {
                Ok(_) => return,
                Err(Refused::Unflushed(taken)) => {
                    gather.flush_before(P::Format::span_of(va, level.max(1)), taken);
                }
                Err(why) => unreachable!("nothing is in the way at {va}: {why:?}"),
            }
        }
    }
}
