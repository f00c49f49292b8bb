//! Dead tables: unlinked by whoever meets them, flushed, past the grace period, reused.
//!
//! Protocol 3. A table is dead from the store that unlocked it empty. The slot that points to it is cleared under
//! the parent's lock, by the zap that killed it or by anyone who meets it; who cleared the slot hands the table to a
//! [`Gather`], which flushes and then retires it.

use super::record::Table;
use super::{PageTable, reserve};
use crate::arch::Format;
use crate::mem::Chain;
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

/// Retires a table that was unlinked and flushed: its owner gives it up.
pub(crate) fn retire<P: Platform>(p: &'static P, pfn: Pfn) {
    if cfg!(mutant = "retire_without_grace") {
        return reserve::give_zeroed(p, pfn);
    }
    let epoch = &p.vm().epoch;
    #[cfg(mutant = "retire_tag_early")]
    let epoch = &epoch.frozen();
    p.vm().tables_in_limbo.lock(p).push(&ByFrame(p), pfn, epoch);
}

/// Hands up to `most` tables whose grace period is over to this CPU's cache; returns how many.
pub(crate) fn collect<P: Platform>(p: &'static P, now: u64, most: usize) -> usize {
    for done in 0..most {
        let Some(pfn) = p.vm().tables_in_limbo.lock(p).pop(&ByFrame(p), now) else { return done };
        reserve::give_zeroed(p, pfn);
    }
    most
}
