//! `install`: the only way an entry comes into being (protocol 1).
//!
//! The life of an install: take the lock of the deepest live table; ask the batch whether anything it rests on was
//! announced to go away; look at the slot. Free and deep enough: set the page's entry, then its neighbours'. Free and
//! tables missing: build them privately, bottom up, the entries in the leaf, and make the whole chain visible with
//! one store. Taken by a table that has appeared: descend with the same page. A dead table: unlink it, walk again.

use super::record::{Counted, FaultKind, Guard, Last};
use super::slot::{Nothing, Slot, Walk, walk};
use super::{PageTable, Reserve, retire};
use crate::arch::Format;
use crate::platform::Platform;
use crate::sync::atomic::{AtomicU64, Relaxed};
use crate::sync::epoch::Pin;
use crate::tlb::Gather;
use crate::types::{VirtAddr, VirtRange};

/// An entry to be made visible. Its mapping is counted and its page validated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewEntry {
    /// The entry's bits.
    pub raw: u64,
    /// As what it counts.
    pub counted: Counted,
}

/// What is to be mapped: one page, a range, a fault with its neighbours.
///
/// Called with the lock held of the table that holds the slot.
pub(crate) trait Batch {
    /// The address of the page that must be mapped; its neighbours only may.
    fn va(&self) -> VirtAddr;
    /// The level of the table the entries go into.
    fn level(&self) -> u8 {
        0
    }
    /// The page and the neighbours that may be mapped with it, all in one table; `None` for the page alone.
    #[inline]
    fn window(&self) -> Option<VirtRange> {
        None
    }
    /// log2 of the pages of the window, if the table is to keep in mind that it was one.
    fn remembers(&self) -> Option<u8> {
        None
    }
    /// Whether all of the window is mapped, or nothing: an occupied slot makes the install fail.
    fn is_whole(&self) -> bool {
        false
    }
    /// Whether nothing the batch rests on was announced to go away.
    fn is_current(&self) -> bool;
    /// Counts the mapping of the page at `va`, then validates the page, and gives its entry; `None`, with the count
    /// as before, when there is none or it is not valid any more. All entries are counted as the same.
    fn entry(&mut self, va: VirtAddr) -> Option<NewEntry>;
    /// The same for neighbours: those of pages from `va` on, whose slots are `cells`, as far as these are free. `set` puts an
    /// entry into its slot. Tells how many slots it dealt with: all, or up to a free one whose page is one of a
    /// [run](Batch::run).
    #[inline(always)]
    fn around(
        &mut self,
        va: VirtAddr,
        span: u64,
        cells: &[AtomicU64],
        mut set: impl FnMut(&AtomicU64, u64),
    ) -> usize {
        let mut at = va;
        for cell in cells {
            // An occupied neighbour is skipped, never a reason to fail (X8); so is the page itself.
            if cell.load(Relaxed) == 0
                && let Some(entry) = self.entry(at)
            {
                set(cell, entry.raw);
            }
            at.0 += span;
        }
        cells.len()
    }
    /// The part of `window` that one count maps, when [`entry`](Batch::entry) gives none for `va`, or
    /// [`around`](Batch::around) stopped there, since its page is part of a larger folio: so many of its pages as lie in
    /// there, without a look at whether they are valid.
    fn run(&mut self, _va: VirtAddr, _window: VirtRange) -> Option<VirtRange> {
        None
    }
    /// Counts mappings of so many pages of that run, then validates them all; false, with the count as before, when one of
    /// them is not valid any more.
    fn count(&mut self, _run: VirtRange, _mappings: u32) -> bool {
        false
    }
    /// The entry of a page of that run.
    fn of_run(&mut self, va: VirtAddr) -> Option<NewEntry> {
        self.entry(va)
    }
    /// As what the entry at [`va`](Batch::va) is counted; `None` when neither it nor its neighbours are.
    fn kind(&self) -> Option<FaultKind>;
}

/// What an install did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Installed {
    /// Neighbours mapped beside the page.
    pub around: u32,
    /// Tables published.
    pub tables: u8,
}

/// Why an install did nothing. The page is still the batch's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refused {
    /// The reserve has fewer tables than the number given: drop every lock, refill, again.
    Short(u8),
    /// Another fault has filled the slot, or mapped a huge page over it.
    Raced,
    /// Something was announced to go away, or the page is not valid any more: look again, page in hand.
    Again,
    /// Where the entry goes, translations of the other size may be cached: small ones under a huge page, for a table was
    /// taken out and is not flushed yet; or a huge one over small pages; or, where the format forbids that, one to another
    /// page. Drop every lock, flush, again. The number says how much was taken out so far.
    Unflushed(u64),
}

/// Maps the batch's page at `slot`, and what it can of its neighbours.
#[inline]
pub(crate) fn install<'e, P: Platform, B: Batch>(
    space: &PageTable<P>,
    pin: &'e Pin<P>,
    mut slot: Slot<'e, P, Nothing>,
    batch: &mut B,
    reserve: &mut Reserve<P>,
    gather: &mut Gather<'_, P>,
) -> Result<Installed, Refused> {
    let first = slot.level();
    loop {
        let level = if cfg!(mutant = "install_counts_levels_once") { first } else { slot.level() };
        let Some(missing) = level.checked_sub(batch.level()) else { return Err(Refused::Raced) };
        if reserve.len() < missing {
            return Err(Refused::Short(missing));
        }
        let early = cfg!(mutant = "install_validates_unlocked") && batch.is_current();
        let Some(mut guard) = slot.at.lock() else {
            slot = around_dead(space, pin, slot, gather).ok_or(Refused::Raced)?;
            continue;
        };
        if !early && !batch.is_current() && !cfg!(mutant = "install_without_validation") {
            return Err(Refused::Again);
        }
        let index = slot.index();
        let taken = guard.entry(index);
        if taken != 0 && !cfg!(mutant = "install_overwrites") {
            drop(guard);
            slot = deeper(slot, taken).ok_or(Refused::Raced)?;
            continue;
        }
        let waits = P::Format::BREAK_BEFORE_MAKE && !cfg!(mutant = "make_before_flush");
        if (guard.table().level() > 0 || waits)
            && let Some(taken) = space.taken_unflushed(batch.level())
            && !gather.is_flushed_before(batch.va(), taken)
            && !cfg!(mutant = "install_over_unflushed")
        {
            return Err(Refused::Unflushed(taken));
        }
        if missing == 0 {
            let around = fill(&mut guard, batch).ok_or(Refused::Again)?;
            return Ok(Installed { around, tables: 0 });
        }
        let Some((top, around)) = chain(guard.table().platform(), batch, missing, reserve) else {
            return Err(Refused::Again);
        };
        for level in 0..missing {
            space.count_published(batch.level() + level, 1);
        }
        guard.set(index, top);
        return Ok(Installed { around, tables: missing });
    }
}

/// The slot's table is dead: unlinks it and walks again; `None` when something is mapped by now.
#[cold]
fn around_dead<'e, P: Platform>(
    space: &PageTable<P>,
    pin: &'e Pin<P>,
    slot: Slot<'e, P, Nothing>,
    gather: &mut Gather<'_, P>,
) -> Option<Slot<'e, P, Nothing>> {
    if let Some(parent) = slot.parent() {
        retire::unlink(space, parent, slot.at, slot.va, gather);
    }
    match space.walk(pin, slot.va) {
        Walk::Nothing(found) => Some(found),
        Walk::Seen(_) | Walk::Huge(_) => None,
    }
}

/// The slot was taken by `entry`: the one further down if that is a table; `None` when something is mapped.
#[cold]
fn deeper<P: Platform>(slot: Slot<'_, P, Nothing>, entry: u64) -> Option<Slot<'_, P, Nothing>> {
    match walk(slot.at.child(entry)?, Some(slot.at.pfn()), slot.va) {
        Walk::Nothing(deeper) => Some(deeper),
        Walk::Seen(_) | Walk::Huge(_) => None,
    }
}

/// Builds `missing` tables, the lowest one filled from the batch; returns the entry for the topmost.
#[cold]
fn chain<P: Platform, B: Batch>(
    p: &'static P,
    batch: &mut B,
    missing: u8,
    reserve: &mut Reserve<P>,
) -> Option<(u64, u32)> {
    let leaf = reserve.take()?;
    let mut guard = Guard::private(p, leaf, batch.level(), false);
    let Some(around) = fill(&mut guard, batch) else {
        guard.abandon();
        reserve.put(leaf);
        return None;
    };
    drop(guard);
    let mut entry = P::Format::table(leaf);
    for level in 1..missing {
        let table = reserve.take()?; // there: `install` counted `missing` tables before
        let level = batch.level() + level;
        let mut guard = Guard::private(p, table, level, false);
        guard.set(P::Format::index(batch.va(), level), entry);
        drop(guard);
        entry = P::Format::table(table);
    }
    Some((entry, around))
}

/// Sets the entries of a batch; `None`, with nothing set, when the page itself is not valid any more, or one of the
/// slots is not free and all must be.
#[inline(always)]
fn fill<P: Platform, B: Batch>(guard: &mut Guard<'_, P>, batch: &mut B) -> Option<u32> {
    let (level, va) = (batch.level(), batch.va());
    debug_assert_eq!(level, guard.table().level());
    let page = P::Format::index(va, level);
    let window = batch.window().map(|window| (window.start, P::Format::slots(window, level)));
    debug_assert!(window.as_ref().is_none_or(|(start, slots)| *start <= va && slots.contains(&page)));
    let whole = batch.is_whole() || cfg!(mutant = "around_needs_all");
    if let Some((_, slots)) = &window
        && whole
        && guard.entries() > 0
        && slots.clone().any(|i| guard.entry(i) != 0)
    {
        return None;
    }
    let before = guard.entries();
    let mut run = page..page;
    let counted = match batch.entry(va) {
        Some(NewEntry { raw, counted }) => {
            guard.set(page, raw);
            counted
        }
        None => {
            let (range, counted) = fill_run(guard, batch, va)?;
            run = P::Format::slots(range, level);
            counted
        }
    };
    if let Some((start, slots)) = window {
        let first = slots.start;
        // What is before the page's own run, if it is one of a run, and what is behind it.
        for mut slots in [slots.start..run.start, run.end..slots.end] {
            while !slots.is_empty() {
                let at = VirtAddr(start.0 + ((slots.start - first) as u64) * P::Format::span(level));
                let cells = guard.cells(slots.clone());
                slots.start +=
                    batch.around(at, P::Format::span(level), cells, |cell, raw| guard.set_cell(cell, raw));
                if !slots.is_empty() {
                    slots.start = around_run(guard, batch, slots.start, at);
                }
            }
        }
    }
    if let Some(order) = batch.remembers() {
        guard.remember(Last { slot: page, order });
    }
    let around = (guard.entries() - before) as u32 - 1;
    guard.count(counted, 1 + around as i32);
    if let Some(kind) = batch.kind() {
        guard.tally(kind, 1);
        if around > 0 {
            guard.tally(FaultKind::Around, around);
        }
    }
    Some(around)
}

/// Sets the entries of the run that fault-around has come to, at slot `slot` of those that begin with the one for `at`;
/// tells with which slot to go on.
#[inline(never)]
fn around_run<P: Platform, B: Batch>(
    guard: &mut Guard<'_, P>,
    batch: &mut B,
    slot: usize,
    at: VirtAddr,
) -> usize {
    let level = batch.level();
    let va = VirtAddr(at.0 + (slot - P::Format::index(at, level)) as u64 * P::Format::span(level));
    match fill_run(guard, batch, va) {
        Some((run, _)) => P::Format::slots(run, level).end,
        None => slot + 1,
    }
}

/// Sets the entries of pages of one folio around `va`, as many as are free, with one count; tells which pages those are, and
/// as what they count.
#[inline(never)]
fn fill_run<P: Platform, B: Batch>(
    guard: &mut Guard<'_, P>,
    batch: &mut B,
    va: VirtAddr,
) -> Option<(VirtRange, Counted)> {
    let level = batch.level();
    let window = batch.window().unwrap_or(P::Format::span_of(va, level));
    let run = batch.run(va, window)?;
    debug_assert!(window.covers(run) && run.contains(va));
    let mut counted = None;
    let cells = guard.cells(P::Format::slots(run, level));
    let free = cells.iter().filter(|cell| cell.load(Relaxed) == 0).count();
    if free == 0 || !batch.count(run, free as u32) {
        return None;
    }
    let mut at = run.start;
    for cell in cells {
        if cell.load(Relaxed) == 0
            && let Some(entry) = batch.of_run(at)
        {
            guard.set_cell(cell, entry.raw);
            counted = Some(entry.counted);
        }
        at.0 += P::Format::span(level);
    }
    counted.map(|counted| (run, counted))
}

pub(super) fn set<P: Platform>(guard: &mut Guard<'_, P>, index: usize, entry: NewEntry) {
    guard.count(entry.counted, 1);
    guard.set(index, entry.raw);
}

/// Tables first, as before 2016: publishes empty tables down to level `lowest` for `va`. They are pinned, and die
/// when the mapping call that removes their range unpins them.
///
/// # Errors
/// The number of tables the reserve lacks.
#[cfg(feature = "__baseline")]
pub(crate) fn publish_empty<P: Platform>(
    space: &PageTable<P>,
    pin: &Pin<P>,
    va: VirtAddr,
    lowest: u8,
    reserve: &mut Reserve<P>,
    gather: &mut Gather<'_, P>,
) -> Result<(), u8> {
    while let Walk::Nothing(slot) = space.walk(pin, va) {
        let missing = slot.level().saturating_sub(lowest);
        if reserve.len() < missing {
            return Err(missing);
        }
        let Some(mut guard) = slot.at.lock() else {
            if let Some(parent) = slot.parent() {
                retire::unlink(space, parent, slot.at, va, gather);
            }
            continue;
        };
        if missing == 0 {
            return Ok(());
        }
        if guard.entry(slot.index()) != 0 {
            continue;
        }
        let mut entry = 0;
        for level in lowest..lowest + missing {
            let Some(table) = reserve.take() else { return Err(missing) };
            let mut private = Guard::private(pin.platform(), table, level, true);
            if entry != 0 {
                private.set(P::Format::index(va, level), entry);
            }
            drop(private);
            entry = P::Format::table(table);
            space.count_published(level, 1);
        }
        guard.set(slot.index(), entry);
    }
    Ok(())
}
