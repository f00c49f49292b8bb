//! One walk by range: visit every deepest live table that intersects it, unlink what died (protocols 2 and 3).
//!
//! Tables are visited from the bottom up: first a table's children, found by a scan without the lock, then the table
//! itself, locked once: dead children's slots are cleared, and whatever has appeared since the scan is visited next.
//! Every child was locked alive after the caller's announcement, or had died of itself and its slot was looked at
//! again; so an install that came before is found, and one that comes after sees the announcement. If the table holds
//! no more entries than were seen, no slot needs a second look. The cost follows the tables in use, not the addresses.
//!
//! A huge page is an entry like others, of a table further up. One that reaches beyond the range is split first.

use super::record::{Guard, Table};
use super::{PageTable, Stock, retire};
use crate::arch::Format;
use crate::platform::{Note, Platform};
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
}

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

/// The slots of one table that were visited since the announcement.
struct Seen {
    slots: [u64; 8],
    /// Tables among them.
    tables: usize,
    /// One of these died of the visit.
    died: bool,
}

impl Seen {
    const fn none() -> Self {
        Seen { slots: [0; 8], tables: 0, died: false }
    }
    fn insert(&mut self, i: usize) {
        self.slots[i / 64] |= 1 << (i % 64);
    }
    fn contains(&self, i: usize) -> bool {
        self.slots[i / 64] >> (i % 64) & 1 == 1
    }
    /// Calls `f` with each of those within `slots`.
    fn for_each(&self, slots: &Range<usize>, mut f: impl FnMut(usize)) {
        for w in slots.start / 64..slots.end.div_ceil(64) {
            let mut bits = self.slots[w];
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
                Flow::Done => return,
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
        range: VirtRange,
        visitor: &mut V,
        gather: &mut Gather<'_, P>,
    ) -> Flow {
        let pin = Pin::new(self.platform());
        let mut descent = Descent { space: self, visitor, gather, flow: Flow::Done };
        descent.table(self.root(&pin), VirtAddr(0), range);
        descent.flow
    }
}

struct Descent<'a, 'g, P: Platform, V> {
    space: &'a PageTable<P>,
    visitor: &'a mut V,
    gather: &'a mut Gather<'g, P>,
    flow: Flow,
}

impl<P: Platform, V: Visitor<P>> Descent<'_, '_, P, V> {
    /// Visits what of `range` lies in `table`, whose first address is `base`.
    fn table(&mut self, table: Table<'_, P>, base: VirtAddr, range: VirtRange) -> Visit {
        let level = table.level();
        let slots = P::Format::slots(range, level);
        let mut seen = Seen::none();
        loop {
            match self.below(table, base, range, &slots, &mut seen) {
                Visit::Alive => {}
                dead => return dead, // with its last huge page, or before
            }
            if self.flow == Flow::Done && seen.tables == slots.len() && !seen.died {
                return Visit::Alive; // nothing empty to look at, nothing to clear
            }
            let Some(mut guard) = table.lock() else { return Visit::WasDead };
            let mut occupied = 0;
            seen.for_each(&slots, |i| match guard.entry(i) {
                0 => {}
                raw => match table.child(raw) {
                    Some(child) if child.record().is_dead() => {
                        let va = slot_base::<P>(base, level, i);
                        retire::unlink_locked(self.space, &mut guard, i, child, va, self.gather);
                    }
                    _ => occupied += 1,
                },
            });
            // More entries than those seen: something may have come into the range since the scan.
            if self.flow == Flow::Done && guard.entries() != occupied && !cfg!(mutant = "zap_skips_empty") {
                self.space.platform().note(Note::TableScanned(table.pfn(), level));
                if slots.clone().any(|i| guard.entry(i) != 0 && !seen.contains(i)) {
                    drop(guard);
                    continue;
                }
            }
            return self.leave(guard, base);
        }
    }

    /// Visits what is below the slots of `table` that were not seen yet: tables without its lock, huge pages with it.
    fn below(
        &mut self,
        table: Table<'_, P>,
        base: VirtAddr,
        range: VirtRange,
        slots: &Range<usize>,
        seen: &mut Seen,
    ) -> Visit {
        self.space.platform().note(Note::TableScanned(table.pfn(), table.level()));
        for i in slots.clone() {
            while self.flow == Flow::Done && !seen.contains(i) {
                let raw = table.entry(i);
                if raw == 0 {
                    break;
                }
                let Some(child) = table.child(raw) else {
                    match self.huge(table, base, range, i..slots.end, seen) {
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
                match visit {
                    // Somebody may put another table here without having seen the announcement: look again.
                    Visit::WasDead if !cfg!(mutant = "zap_trusts_dead") => {
                        retire::unlink(self.space, table, child, start, self.gather);
                    }
                    visit => {
                        seen.insert(i);
                        seen.tables += 1;
                        seen.died |= visit != Visit::Alive;
                    }
                }
            }
        }
        Visit::Alive
    }

    /// Visits huge pages side by side, from the first of `slots` on, with one lock.
    #[inline(never)]
    fn huge(
        &mut self,
        table: Table<'_, P>,
        base: VirtAddr,
        range: VirtRange,
        slots: Range<usize>,
        seen: &mut Seen,
    ) -> Visit {
        let Some(mut guard) = table.lock() else { return Visit::WasDead };
        let before = guard.entries();
        for i in slots {
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
            seen.insert(i);
        }
        if guard.entries() < before {
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

/// Leaves everything as it is: to cut huge pages at the ends of a range, to see to dead tables, to have held the lock of
/// every table once.
pub(crate) struct Pass;

impl<P: Platform> Visitor<P> for Pass {
    fn leaf(&mut self, _: &mut Guard<'_, P>, _: VirtRange, _: &mut Gather<'_, P>) -> Flow {
        Flow::Done
    }
}
