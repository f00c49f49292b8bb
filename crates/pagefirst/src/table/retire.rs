//! Dead tables: unlinked by whoever meets them, flushed, past the grace period, reused.
//!
//! Protocol 3. A table is dead from the store that unlocked it empty. The slot that points to it is cleared under
//! the parent's lock, by the zap that killed it or by anyone who meets it; who cleared the slot hands the table to a
//! [`Gather`], which flushes and then retires it.

use super::record::Table;
use super::{PageTable, reserve};
use crate::arch::Format;
use crate::mem::{Chain, Few};
use crate::platform::Platform;
use crate::tlb::Gather;
use crate::types::{Pfn, VirtAddr};

struct ByFrame<P: Platform>(&'static P);
impl<P: Platform> Chain for ByFrame<P> {
    type At = Pfn;
    fn next(&self, at: Pfn) -> Option<Pfn> {
        let next = self.0.meta(at).link();
        (next != 0).then_some(Pfn(next))
    }
    fn set_next(&self, at: Pfn, next: Option<Pfn>) {
        self.0.meta(at).set_link(next.map_or(0, |n| n.0));
    }
}

/// Clears the slot of `parent` that points to the dead table `child`, if it still does.
pub(super) fn unlink<P: Platform>(
    space: &PageTable<P>,
    parent: Table<'_, P>,
    child: Table<'_, P>,
    va: VirtAddr,
    gather: &mut Gather<'_, P>,
) {
    // A dead parent has no entry: the slot is cleared already.
    let Some(mut guard) = parent.lock() else { return };
    let index = P::Format::index(va, parent.level());
    if P::Format::child(guard.entry(index), parent.level()) == Some(child.pfn()) {
        unlink_locked(space, &mut guard, index, child, va, gather);
    }
}

/// The same with the parent locked and the slot known to point to `child`.
pub(super) fn unlink_locked<P: Platform>(
    space: &PageTable<P>,
    parent: &mut super::Guard<'_, P>,
    index: usize,
    child: Table<'_, P>,
    va: VirtAddr,
    gather: &mut Gather<'_, P>,
) {
    debug_assert!(child.record().is_dead());
    space.count_unlinked(child);
    if !cfg!(mutant = "unlink_keeps_slot") {
        parent.take(index);
    }
    gather.table(child.pfn(), P::Format::span_of(va, parent.table().level()));
}

/// Tables that were unlinked and are to be flushed, in a chain through their frames' links. Whoever has it owns them.
pub(crate) struct Unlinked {
    ends: Option<(Pfn, Pfn)>,
    len: usize,
}

impl Unlinked {
    /// No tables.
    pub const fn new() -> Self {
        Unlinked { ends: None, len: 0 }
    }
    /// A table; nobody uses its link.
    pub fn one(pfn: Pfn) -> Self {
        Unlinked { ends: Some((pfn, pfn)), len: 1 }
    }
    /// Adds one.
    pub fn push<P: Platform>(&mut self, p: &'static P, pfn: Pfn) {
        ByFrame(p).set_next(pfn, self.ends.map(|(first, _)| first));
        self.ends = Some((pfn, self.ends.map_or(pfn, |(_, last)| last)));
        self.len += 1;
    }
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }
}

/// Retires tables that were unlinked and flushed: their owner gives them up.
pub(crate) fn retire<P: Platform>(p: &'static P, tables: Unlinked) {
    let Some(ends) = tables.ends else { return };
    if cfg!(mutant = "retire_without_grace") {
        let mut next = Some(ends.0);
        while let Some(pfn) = next {
            next = ByFrame(p).next(pfn).filter(|_| pfn != ends.1);
            reserve::give_zeroed(p, &[pfn]);
        }
        return;
    }
    let epoch = &p.vm().epoch;
    let early = cfg!(mutant = "retire_tag_early").then(|| epoch.frozen());
    let epoch = early.as_ref().unwrap_or(epoch);
    p.vm().tables_in_limbo.push(p, &ByFrame(p), ends, tables.len, epoch);
}

/// Hands up to `most` tables whose grace period is over to this CPU's cache; returns how many.
pub(crate) fn collect<P: Platform>(p: &'static P, now: u64, most: usize) -> usize {
    let mut done = 0;
    loop {
        let mut batch = Few::new();
        p.vm().tables_in_limbo.take(p, &ByFrame(p), now, most - done, &mut batch);
        let (is_full, tables) = (batch.is_full(), batch.take());
        done += tables.len();
        reserve::give_zeroed(p, tables);
        if !is_full {
            return done;
        }
    }
}
