//! Remap: shrink, grow, move (`mremap`).
//!
//! A move retires the source, so that no table comes into use there any more, and reserves every table it can need; if
//! it cannot have them, the source's VMAs are published anew and nothing has changed. Then it takes a part of the source's entries out
//! under their table's lock, flushes the source, and installs them at the destination by protocol 1, every page
//! validated again, until the source is empty (CVE-2018-18281: a page must not be reachable through the source
//! after it was freed at the destination). Tables are never moved. Meanwhile faults on either side wait.

use super::change::Change;
use super::{AddressSpace, Backing, MapError, Place, Vma, Writing};
use crate::arch::{Attrs, Format};
use crate::fault::HUGE_LEVEL;
use crate::file::FileCache;
use crate::frame::{self, FrameFlags};
use crate::platform::Platform;
use crate::sync::epoch::Pin;
use crate::table::{
    Batch, Counted, FaultKind, Flow, Guard, NewEntry, PageTable, Pieces, Refused, Reserve, Stock, Visitor,
    Walk, install,
};
use crate::tlb::{Gather, NOTHING};
use crate::types::{PAGE_SIZE, VirtAddr, VirtRange};

/// Where a mapping that is remapped may go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RemapTo {
    /// Nowhere: grow in place or fail.
    InPlace,
    /// Anywhere, if it cannot grow in place (`MREMAP_MAYMOVE`).
    Anywhere,
    /// To this address; what is mapped there goes (`MREMAP_FIXED`).
    Fixed(VirtAddr),
}

impl<P: Platform> AddressSpace<P> {
    /// Makes the mapping of `old_len` bytes at `start` one of `new_len` bytes, moving it if need be; returns where
    /// it is then.
    ///
    /// # Errors
    /// [`MapError`]; nothing has changed then. The old range must lie in one mapping, and not be empty: of what is shared there is
    /// no second mapping to be had by this (Linux makes one then), but by mapping it again.
    pub fn remap(
        &self,
        start: VirtAddr,
        old_len: u64,
        new_len: u64,
        to: RemapTo,
    ) -> Result<VirtAddr, MapError> {
        let old = self.check_range(start, old_len)?;
        let new_len = VirtAddr(new_len).align_up(PAGE_SIZE).filter(|l| l.0 > 0);
        let new_len = new_len.ok_or(MapError::Invalid(VirtRange::new(start, start)))?.0;
        let mut writing = self.write();
        let vma = self.tree.overlapping(old).next().filter(|v| v.range.covers(old));
        let vma = vma.ok_or(MapError::NotMapped(old))?;
        if let RemapTo::Fixed(at) = to {
            let new = self.check_range(at, new_len)?;
            if new.overlaps(old) {
                return Err(MapError::Invalid(new));
            }
            if matches!(vma.backing, Backing::Physical(_)) && new_len > old.len() {
                return Err(MapError::Denied(old));
            }
            return writing.relocate(&vma, old, new);
        }
        if new_len <= old.len() {
            if new_len < old.len() {
                writing.unmap(VirtRange::new(VirtAddr(start.0 + new_len), old.end))?;
            }
            return Ok(start);
        }
        if matches!(vma.backing, Backing::Physical(_)) {
            return Err(MapError::Denied(old));
        }
        let tail = VirtRange::new(old.end, VirtAddr(start.0.saturating_add(new_len)));
        if old.end == vma.range.end && self.usable().covers(tail) && self.tree.is_free(tail) {
            let mut more = vma.part(tail, vma.prot, vma.flags);
            if cfg!(mutant = "growth_repeats_file") {
                more.backing = vma.backing_at(start);
            }
            writing.insert(more)?;
            return Ok(start);
        }
        if to == RemapTo::InPlace {
            return Err(MapError::NoRoom(tail.len()));
        }
        let large = matches!(vma.backing, Backing::Anonymous);
        let new = self.place(new_len, Place::Anywhere, large)?;
        writing.relocate(&vma, old, new)
    }
}

impl<P: Platform> Writing<'_, P> {
    /// Moves `old`, a part of `vma`, to `new`, which may be shorter or longer and does not overlap it.
    fn relocate(&mut self, vma: &Vma<P>, old: VirtRange, new: VirtRange) -> Result<VirtAddr, MapError> {
        let space = self.space;
        let moved = VirtRange::new(old.start, VirtAddr(old.start.0 + old.len().min(new.len())));
        let mut change = Change::cut(self, old);
        change.cut_also(new, &mut self.state)?;
        let piece = vma.moved(old.start, new);
        if !piece.has_indexes() {
            return Err(MapError::Invalid(new));
        }
        change.push(piece, &mut self.state)?;
        let ready = change.finish(&mut self.state)?;
        let undo = ready.undo()?;
        let ends = [old.start, moved.end, old.end, new.start, new.end];
        let memory = if cfg!(mutant = "move_unannounced") { NOTHING } else { ready.announce() };
        let needed = tables_needed::<P>(space.page_table(), moved, new);
        let (stock, mut cuts) = match (Stock::new(space.p, needed), space.cuts(&ends)) {
            (Ok(stock), Ok(cuts)) => (stock, cuts),
            (Err(error), _) | (_, Err(error)) => {
                ready.take_back(&undo);
                return Err(error.into());
            }
        };
        // From here nothing can fail.
        let file = match &vma.backing {
            Backing::File { file, .. } => Some(&**file),
            Backing::Anonymous | Backing::Physical(_) => None,
        };
        let mut relocation =
            Relocation::new(space.page_table(), file, vma.index_of(old.start), old.start, new.start, stock);
        let mut gather = Gather::new(space.page_table());
        space.page_table().zap(new, None, &mut cuts, &mut gather);
        gather.flush();
        let unneeded = ready.unneeded(old);
        relocation.carry(moved, &mut cuts, &mut gather);
        space.page_table().zap(old, unneeded, &mut cuts, &mut gather);
        gather.touch_within(memory, old);
        gather.touch_within(memory, new);
        gather.flush();
        ready.publish(&mut self.state);
        Ok(new.start)
    }
}

/// No more tables than this are missing at `new` for what is mapped in `from`: two leaf tables for each in use there,
/// and for each huge page.
fn tables_needed<P: Platform>(table: &PageTable<P>, from: VirtRange, new: VirtRange) -> u64 {
    struct Leaves(u64);
    impl<P: Platform> Visitor<P> for Leaves {
        fn leaf(&mut self, _: &mut Guard<'_, P>, _: VirtRange, _: &mut Gather<'_, P>) -> Flow {
            self.0 += 1;
            Flow::Done
        }
        fn splits(&self, _: VirtRange, _: VirtRange) -> bool {
            false
        }
    }
    let mut leaves = Leaves(0);
    table.visit(from, &mut leaves, &mut Stock::empty(table.platform()), &mut Gather::new(table));
    let mut at_level = 2 * leaves.0;
    let mut sum = 0;
    for level in 1..P::Format::LEVELS {
        at_level = at_level.min(new.len() / P::Format::span(level) + 2);
        sum += at_level;
    }
    sum
}

const BATCH: usize = 64;

/// An entry on its way, taken from a table at `level`.
#[derive(Clone, Copy)]
struct Taken {
    from: VirtAddr,
    raw: u64,
    level: u8,
}

/// Entries on their way: taken from the source, not yet at the destination, their mappings still counted.
pub(super) struct Relocation<'a, P: Platform> {
    table: &'a PageTable<P>,
    file: Option<&'a FileCache<P>>,
    /// Index in the file of the page at `from`.
    indexes: u64,
    from: VirtAddr,
    to: VirtAddr,
    /// In the order of addresses.
    entries: [Taken; BATCH],
    len: usize,
    stock: Stock<P>,
    /// Taken from the stock and not used yet. Kept from batch to batch: what a page that went away does not use, the
    /// stock lacks.
    reserve: Reserve<P>,
}

impl<P: Platform> Visitor<P> for Relocation<'_, P> {
    fn leaf(&mut self, guard: &mut Guard<'_, P>, range: VirtRange, gather: &mut Gather<'_, P>) -> Flow {
        let (p, level) = (guard.table().platform(), guard.table().level());
        let mut va = range.start;
        while va < range.end && guard.entries() > 0 {
            if self.len == BATCH {
                return Flow::Full(va);
            }
            if let Some(raw) = guard.take(P::Format::index(va, level)) {
                guard.count(Counted::of(p, raw, level), -1);
                gather.touch(P::Format::span_of(va, level));
                // Physical memory is mapped anew where it is, by entries that fit there.
                if !P::Format::attrs(raw).contains(Attrs::SPECIAL)
                    || P::Format::frame(raw, level) == Some(p.vm().zero_page())
                {
                    self.entries[self.len] = Taken { from: va, raw, level };
                    self.len += 1;
                }
            }
            va = VirtAddr(va.0 + P::Format::span(level));
        }
        Flow::Done
    }
    fn between(&mut self) {
        self.settle();
    }
}

impl<'a, P: Platform> Relocation<'a, P> {
    /// One from `from` to `to`, with the tables that it may need; of a mapping of `file`, the page at `from` being that with
    /// this index, or of private memory.
    pub(super) fn new(
        table: &'a PageTable<P>,
        file: Option<&'a FileCache<P>>,
        indexes: u64,
        from: VirtAddr,
        to: VirtAddr,
        stock: Stock<P>,
    ) -> Self {
        let entries = [Taken { from: VirtAddr(0), raw: 0, level: 0 }; BATCH];
        Relocation {
            table,
            file,
            indexes,
            from,
            to,
            entries,
            len: 0,
            stock,
            reserve: Reserve::new(table.platform()),
        }
    }
    /// Moves what is mapped in `range`: takes it, flushes, and only then installs it.
    pub(super) fn carry(&mut self, range: VirtRange, cuts: &mut Stock<P>, gather: &mut Gather<'_, P>) {
        let table = self.table;
        table.visit(range, self, cuts, gather);
        if cfg!(mutant = "move_before_flush") {
            self.settle();
        }
        gather.flush();
        self.settle();
    }

    /// Installs what was taken. The source is flushed.
    fn settle(&mut self) {
        let mut gather = Gather::new(self.table);
        for i in 0..self.len {
            let taken = self.entries[i];
            if self.install(taken, &mut gather) {
                continue;
            }
            // No room for a huge page there: it goes on as small ones.
            let p = self.table.platform();
            let (pieces, below) = (Pieces::of(p, taken.raw, taken.level), taken.level - 1);
            for index in 0..P::Format::ENTRIES {
                let from = VirtAddr(taken.from.0 + index as u64 * P::Format::span(below));
                let piece = Taken { from, raw: pieces.entry(p, index), level: below };
                let installed = self.install(piece, &mut gather);
                assert!(installed, "a destination that is taken");
            }
            pieces.settle(p);
        }
        self.len = 0;
        gather.flush();
    }

    /// Installs one entry; false when it is huge and there is no room for it.
    fn install(&mut self, taken: Taken, gather: &mut Gather<'_, P>) -> bool {
        let p = self.table.platform();
        let Taken { from, raw, level } = taken;
        let va = VirtAddr(self.to.0 + (from.0 - self.from.0));
        if !va.is_aligned(P::Format::span(level)) {
            return false;
        }
        let index = self.indexes + (from.0 - self.from.0) / PAGE_SIZE;
        let mut batch = One { p, file: self.file, index, va, level, raw: Some(raw) };
        loop {
            let done = {
                let pin = Pin::new(p);
                match self.table.walk(&pin, va) {
                    Walk::Nothing(slot) => {
                        install(self.table, &pin, slot, &mut batch, &mut self.reserve, gather)
                    }
                    // Nobody else maps here: the destination is not published and was zapped.
                    Walk::Seen(_) | Walk::Huge(_) => Err(Refused::Raced),
                }
            };
            match done {
                Err(Refused::Short(n)) => {
                    self.stock.refill(&mut self.reserve, n);
                    assert!(self.reserve.len() >= n, "fewer tables than a move needs");
                }
                Err(Refused::Unflushed(taken)) => {
                    gather.flush_before(P::Format::span_of(va, level.max(HUGE_LEVEL)), taken);
                }
                Err(Refused::Raced) if level > 0 => return false,
                _ => break,
            }
        }
        if let Some(raw) = batch.raw
            && Counted::of(p, raw, level) != Counted::Nothing
            && let Some(pfn) = P::Format::frame(raw, level)
        {
            // The page went away meanwhile: its mapping ends here. It may be a part of one that stays, or be bad.
            let head = frame::head_of(p, pfn);
            if Counted::of(p, raw, level) == Counted::File
                && P::Format::attrs(raw).contains(Attrs::DIRTY)
                && !cfg!(mutant = "move_loses_dirty")
            {
                p.meta(head).set(FrameFlags::DIRTY);
            }
            frame::unmap(p, head);
        }
        true
    }
}

/// One entry that moves; its mapping is counted already.
struct One<'a, P: Platform> {
    p: &'static P,
    file: Option<&'a FileCache<P>>,
    index: u64,
    va: VirtAddr,
    level: u8,
    raw: Option<u64>,
}

impl<P: Platform> Batch for One<'_, P> {
    fn va(&self) -> VirtAddr {
        self.va
    }
    fn level(&self) -> u8 {
        self.level
    }
    fn is_current(&self) -> bool {
        true // the destination is not published yet: nobody can take it away
    }
    fn entry(&mut self, _: VirtAddr) -> Option<NewEntry> {
        let raw = self.raw?;
        let counted = Counted::of(self.p, raw, self.level);
        if counted == Counted::File
            && let Some(pfn) = P::Format::frame(raw, self.level)
            && !self.file.is_some_and(|f| {
                let (folio, meta, _) = frame::folio_of(self.p, pfn);
                match P::Format::order(self.level) {
                    0 => f.is_attached(folio, pfn, self.index),
                    order => f.is_span_attached(meta, pfn.0 - folio.0, self.index, 1 << order),
                }
            })
        {
            return None;
        }
        self.raw = None;
        Some(NewEntry { raw, counted })
    }
    fn kind(&self) -> Option<FaultKind> {
        Some(FaultKind::Populated)
    }
}
