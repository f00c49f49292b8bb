//! One walk by range: visit every deepest live table that intersects it, unlink what died (protocols 2 and 3).
//!
//! A table of tables is locked once before its entries are read without the lock. Whoever came before the caller's
//! announcement has published by then, and is found; who comes after it sees the announcement. So what is read is all
//! there is, also where the walk stops and goes on later, and no slot needs a second look. Children are visited first;
//! those that died of it, or were dead, are unlinked together, under the lock. The cost follows the tables in use, not
//! the addresses. Nobody stays pinned for long: after [`AT_ONCE`] tables the walk begins anew where it is.
//!
//! A huge page is an entry like others, of a table further up. One that reaches beyond the range is split first.

use super::record::{Guard, Table};
use super::{PageTable, Stock, retire};
use crate::arch::Format;
use crate::platform::{Note, Platform};
use crate::sync::atomic::Relaxed;
use crate::sync::epoch::Pin;
use crate::tlb::Gather;
use crate::types::{VirtAddr, VirtRange};
use core::ops::Range;

/// How a visit to a table ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flow {
    /// The range was visited.
    Done,
    /// The gather is full: unlock, unpin, flush, and go on at this address.
    Full(VirtAddr),
    /// Unlock, unpin, split the huge page at this address, and go on there.
    Split(VirtAddr),
    /// Unlock, unpin, and go on at this address: it took long. Seen to by [`PageTable::descend`].
    Rest(VirtAddr),
}

/// Tables visited with one pin, on a CPU that nothing else runs on meanwhile.
const AT_ONCE: u32 = 64;

/// What is done to the entries of a range.
pub(crate) trait Visitor<P: Platform> {
    /// Visits the leaf entries of a locked table that intersect `range`, which lies in its span: small pages, or one
    /// huge page and all of it, unless [`splits`](Visitor::splits) said otherwise.
    fn leaf(&mut self, guard: &mut Guard<'_, P>, range: VirtRange, gather: &mut Gather<'_, P>) -> Flow;
    /// Whether a huge page that spans `span` must be split before `range` of it can be visited.
    fn splits(&self, span: VirtRange, range: VirtRange) -> bool {
        !range.covers(span)
    }
    /// Whether tables that span only addresses of this range need no longer be kept while empty.
    fn unpins(&self) -> Option<VirtRange> {
        None
    }
    /// Called between parts of the range, with nothing locked or pinned.
    fn between(&mut self) {}
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Visit {
    /// Locked alive, visited, still alive.
    Alive,
    /// Locked alive and visited; died of it.
    Died,
    /// Was dead when met.
    WasDead,
}

/// Slots of one table.
struct Slots([u64; 8]);

impl Slots {
    fn insert(&mut self, i: usize) {
        self.0[i / 64] |= 1 << (i % 64);
    }
    /// Calls `f` with each of those within `slots`.
    fn for_each(&self, slots: Range<usize>, mut f: impl FnMut(usize)) {
        for w in slots.start / 64..slots.end.div_ceil(64) {
            let mut bits = self.0[w];
            while bits != 0 {
                f(w * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }
}

impl<P: Platform> PageTable<P> {
    /// Visits `range`; whatever was to be announced is announced. Called with no lock and no pin held; flushes when
    /// the visitor cannot take more, and leaves the last flush to the gather's owner. Huge pages are split with the
    /// tables of `cuts`: one for each end of the range that may cut one.
    pub(crate) fn visit<V: Visitor<P>>(
        &self,
        mut range: VirtRange,
        visitor: &mut V,
        cuts: &mut Stock<P>,
        gather: &mut Gather<'_, P>,
    ) {
        while !range.is_empty() {
            match self.descend(range, visitor, gather) {
                Flow::Done | Flow::Rest(_) => return,
                Flow::Full(at) => {
                    gather.flush();
                    visitor.between();
                    range.start = at;
                }
                Flow::Split(at) => {
                    self.split(at, cuts, gather);
                    range.start = at;
                }
            }
        }
    }
}

impl<P: Platform> PageTable<P> {
    /// Visits `range`, which is not empty, until the visitor cannot go on: what it says then is seen to by the caller.
    pub(crate) fn descend<V: Visitor<P>>(
        &self,
        mut range: VirtRange,
        visitor: &mut V,
        gather: &mut Gather<'_, P>,
    ) -> Flow {
        loop {
            let pin = Pin::new(self.platform());
            let mut descent = Descent { space: self, visitor, gather, flow: Flow::Done, left: AT_ONCE };
            descent.table(self.root(&pin), VirtAddr(0), range);
            match descent.flow {
                Flow::Rest(at) => range.start = at,
                flow => return flow,
            }
        }
    }
}

struct Descent<'a, 'g, P: Platform, V> {
    space: &'a PageTable<P>,
    visitor: &'a mut V,
    gather: &'a mut Gather<'g, P>,
    flow: Flow,
    /// Tables to be visited before it rests.
    left: u32,
}

impl<P: Platform, V: Visitor<P>> Descent<'_, '_, P, V> {
    /// Visits what of `range` lies in `table`, whose first address is `base`.
    fn table(&mut self, table: Table<'_, P>, base: VirtAddr, range: VirtRange) -> Visit {
        let level = table.level();
        let mut pinned = false;
        if !cfg!(mutant = "zap_skips_empty") {
            let Some(guard) = table.lock() else { return Visit::WasDead };
            pinned = guard.is_pinned() && level + 1 < P::Format::LEVELS;
        }
        let (slots, mut dead) = (P::Format::slots(range, level), None);
        match self.below(table, base, range, slots.clone(), &mut dead) {
            Visit::Alive => {}
            dead => return dead, // with its last huge page, or before
        }
        if dead.is_none() && !pinned {
            return Visit::Alive;
        }
        let Some(mut guard) = table.lock() else { return Visit::WasDead };
        if let Some(dead) = dead {
            dead.for_each(slots, |i| {
                if cfg!(mutant = "unlink_counted_by_finder") && guard.entry(i) == 0 {
                    self.space.changing.published[level as usize - 1].fetch_sub(1, Relaxed);
                }
                if let Some(child) = table.child(guard.entry(i))
                    && (child.record().is_dead() || cfg!(mutant = "unlink_without_looking"))
                {
                    let va = slot_base::<P>(base, level, i);
                    retire::unlink_locked(self.space, &mut guard, i, child, va, self.gather);
                }
            });
        }
        self.leave(guard, base)
    }

    /// Visits what is below `slots` of `table`: tables without its lock, huge pages with it. Tells which tables are dead.
    fn below(
        &mut self,
        table: Table<'_, P>,
        base: VirtAddr,
        range: VirtRange,
        mut slots: Range<usize>,
        dead: &mut Option<Slots>,
    ) -> Visit {
        self.space.platform().note(Note::TableScanned(table.pfn(), table.level()));
        while self.flow == Flow::Done && !slots.is_empty() {
            let (i, raw) = (slots.start, table.entry(slots.start));
            if raw == 0 {
                slots.start += 1;
                continue;
            }
            let Some(child) = table.child(raw) else {
                match self.huge(table, base, range, &mut slots) {
                    Visit::Alive => continue,
                    dead => return dead,
                }
            };
            let start = slot_base::<P>(base, table.level(), i);
            let end = VirtAddr(start.0 + P::Format::span(table.level()));
            let part = VirtRange { start: range.start.max(start), end: range.end.min(end) };
            let visit = match child.level() {
                0 => self.leaf(child, start, part),
                _ => self.table(child, start, part),
            };
            if visit != Visit::Alive {
                dead.get_or_insert(Slots([0; 8])).insert(i);
            }
            slots.start += 1;
            self.left = self.left.saturating_sub(1);
            if self.left == 0 && self.flow == Flow::Done && end < range.end {
                self.flow = Flow::Rest(end);
            }
        }
        Visit::Alive
    }

    /// Visits huge pages side by side, from the first of `slots` on, with one lock; leaves the slots behind them.
    #[inline(never)]
    fn huge(
        &mut self,
        table: Table<'_, P>,
        base: VirtAddr,
        range: VirtRange,
        slots: &mut Range<usize>,
    ) -> Visit {
        let Some(mut guard) = table.lock() else { return Visit::WasDead };
        let before = guard.entries();
        while slots.start < slots.end {
            let i = slots.start;
            let raw = guard.entry(i);
            if raw == 0 || table.child(raw).is_some() {
                break;
            }
            let span = P::Format::span_of(slot_base::<P>(base, table.level(), i), table.level());
            let part = range.intersect(span);
            if self.visitor.splits(span, range) {
                self.flow = Flow::Split(part.start);
            } else {
                self.flow = self.visitor.leaf(&mut guard, part, self.gather);
            }
            if self.flow != Flow::Done {
                break;
            }
            slots.start += 1;
        }
        if guard.entries() < before && !cfg!(mutant = "zap_huge_untold") {
            self.gather.taken(before - guard.entries());
        }
        if guard.unlock() { Visit::Died } else { Visit::Alive }
    }

    /// The same for a table whose entries map small pages.
    #[inline(never)]
    fn leaf(&mut self, table: Table<'_, P>, base: VirtAddr, range: VirtRange) -> Visit {
        let Some(mut guard) = table.lowest().lock() else { return Visit::WasDead };
        self.space.platform().note(Note::TableScanned(table.pfn(), 0));
        let before = guard.entries();
        self.flow = self.visitor.leaf(&mut guard, range, self.gather);
        if P::Format::BREAK_BEFORE_MAKE && guard.entries() < before {
            self.gather.taken(before - guard.entries());
        }
        self.leave(guard, base)
    }

    /// Unlocks a table that was visited; it is kept while empty if what it was kept for is still there.
    #[inline]
    fn leave(&self, mut guard: Guard<'_, P>, base: VirtAddr) -> Visit {
        let level = guard.table().level();
        if guard.is_pinned()
            && level + 1 < P::Format::LEVELS
            && self.flow == Flow::Done
            && self.visitor.unpins().is_some_and(|r| r.covers(P::Format::span_of(base, level + 1)))
        {
            guard.unpin();
        }
        if guard.unlock() { Visit::Died } else { Visit::Alive }
    }
}

fn slot_base<P: Platform>(base: VirtAddr, level: u8, index: usize) -> VirtAddr {
    VirtAddr(base.0 + index as u64 * P::Format::span(level))
}

/// Leaves everything as it is: to cut huge pages at the ends of a range, or, without cuts, to see to dead tables.
pub(crate) struct Pass {
    pub cuts: bool,
}

impl<P: Platform> Visitor<P> for Pass {
    fn leaf(&mut self, _: &mut Guard<'_, P>, _: VirtRange, _: &mut Gather<'_, P>) -> Flow {
        Flow::Done
    }
    fn splits(&self, span: VirtRange, range: VirtRange) -> bool {
        self.cuts && !range.covers(span)
    }
}
