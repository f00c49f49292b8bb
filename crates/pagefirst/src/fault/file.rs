//! A file's page where nothing is mapped: for a read, for an instruction fetch, for a shared write.

use super::anon::readable;
use super::around::window;
use super::hand::Need;
use super::{Bus, Fault, FaultError, Look, Outcome, Ticket, huge};
use crate::arch::{Attrs, Format};
use crate::file::{Cursor, FileCache, Found, Lookup};
use crate::frame::{self, FrameFlags};
use crate::mem::Shared;
use crate::platform::Platform;
use crate::space::Vma;
use crate::sync::atomic::{AtomicU64, Relaxed};
use crate::table::{Batch, Counted, FaultKind, NewEntry, Nothing, Slot};
use crate::types::{Access, PAGE_SHIFT, Pfn, Prot, VirtAddr, VirtRange};

/// The entry, in a table at `level`, of a page whose mapping is counted.
#[inline(always)]
fn entry<P: Platform>(p: &'static P, pfn: Pfn, level: u8, attrs: Attrs) -> NewEntry {
    if attrs.contains(Attrs::EXEC) && !cfg!(mutant = "exec_without_sync") {
        (0..P::Format::pages(level) as u32).for_each(|i| p.sync_instructions(pfn.add(i)));
    }
    NewEntry { raw: P::Format::leaf(pfn, level, attrs), counted: Counted::File }
}

/// A page of a file by one entry, without neighbours: a huge page, all of it of one folio; or a small one that is written
/// to, for neighbours would have to be written to be worth it.
struct Alone<'f, P: Platform, const LEVEL: u8> {
    p: &'static P,
    vma: &'f Vma<P>,
    file: &'f FileCache<P>,
    va: VirtAddr,
    /// Its first frame and its index.
    first: Found,
    index: u64,
    write: bool,
    /// The file's turn in which it gave leave, if it was asked.
    leave: Option<u64>,
    attrs: Attrs,
}

impl<P: Platform, const LEVEL: u8> Batch for Alone<'_, P, LEVEL> {
    fn va(&self) -> VirtAddr {
        self.va
    }
    fn level(&self) -> u8 {
        LEVEL
    }
    fn is_current(&self) -> bool {
        !self.vma.is_retired() && self.leave.is_none_or(|turn| self.file.turn() == turn)
    }
    #[inline(always)]
    fn entry(&mut self, _: VirtAddr) -> Option<NewEntry> {
        let Alone { p, file, first, index, .. } = *self;
        let (folio, pages) = (first.folio(), P::Format::pages(LEVEL));
        let meta = p.meta(folio);
        let is_valid = || match LEVEL {
            0 => file.is_attached(folio, first.pfn, index),
            _ => file.is_span_attached(meta, first.part(), index, pages),
        };
        if !meta.try_map_valid(is_valid)? {
            frame::unmap(p, folio);
            return None;
        }
        if LEVEL > 0 && cfg!(mutant = "huge_counts_pages") {
            meta.map_more(pages as u32 - 1);
        }
        if self.write {
            meta.set(FrameFlags::DIRTY);
        }
        Some(entry(p, first.pfn, LEVEL, self.attrs))
    }
    fn kind(&self) -> Option<FaultKind> {
        Some(if self.write { FaultKind::SharedWrite } else { FaultKind::FileRead })
    }
}

/// A page of a file that is read, and its neighbours.
struct Pages<'f, P: Platform> {
    p: &'static P,
    vma: &'f Vma<P>,
    file: &'f FileCache<P>,
    pages: Cursor<'f, P>,
    va: VirtAddr,
    window: VirtRange,
    /// What is added to a page's number to give its index in the file.
    offset: u64,
    attrs: Attrs,
    /// Those of neighbours.
    around: Attrs,
    /// The run that was counted: its first address and frame.
    run: (VirtAddr, Pfn),
    /// log2 of the window's pages, if it adapts.
    remembers: Option<u8>,
}

impl<P: Platform> Pages<'_, P> {
    #[inline(always)]
    fn index_of(&self, va: VirtAddr) -> u64 {
        (va.0 >> PAGE_SHIFT).wrapping_add(self.offset)
    }

    /// The entry of a page that is a folio by itself.
    #[inline(always)]
    fn single(&self, found: Found, index: u64, attrs: Attrs) -> Option<NewEntry> {
        let meta = self.p.meta(found.pfn);
        let is_valid =
            || cfg!(mutant = "file_without_validation") || self.file.is_single_attached(meta, index);
        if !meta.try_map_valid(is_valid)? {
            frame::unmap(self.p, found.pfn);
            return None;
        }
        Some(entry(self.p, found.pfn, 0, attrs))
    }
    /// A page of a larger folio, if pages of it have to be looked at one by one: hardware reported an error in one of them.
    #[cold]
    fn part(&self, found: Found, index: u64, attrs: Attrs) -> Option<NewEntry> {
        let folio = found.folio();
        if !self.is_hurt(found) || !self.p.meta(folio).try_map() {
            return None;
        }
        if !self.file.is_attached(folio, found.pfn, index) {
            frame::unmap(self.p, folio);
            return None;
        }
        Some(entry(self.p, found.pfn, 0, attrs))
    }
    fn is_hurt(&self, found: Found) -> bool {
        self.p.meta(found.folio()).flags().contains(FrameFlags::HURT)
    }
}

impl<P: Platform> Batch for Pages<'_, P> {
    fn va(&self) -> VirtAddr {
        self.va
    }
    fn window(&self) -> Option<VirtRange> {
        Some(self.window)
    }
    fn remembers(&self) -> Option<u8> {
        self.remembers
    }
    fn is_current(&self) -> bool {
        !self.vma.is_retired()
    }
    #[inline(always)]
    fn entry(&mut self, va: VirtAddr) -> Option<NewEntry> {
        let index = self.index_of(va);
        let found = self.pages.look(index)?;
        match found.order {
            0 => self.single(found, index, self.attrs),
            _ => self.part(found, index, self.attrs),
        }
    }
    #[inline(always)]
    fn around(
        &mut self,
        va: VirtAddr,
        _span: u64,
        cells: &[AtomicU64],
        mut set: impl FnMut(&AtomicU64, u64),
    ) -> usize {
        let (first, mut done) = (self.index_of(va), 0);
        while done < cells.len() {
            let (slots, n) = self.pages.slots(first + done as u64);
            let cells = &cells[done..cells.len().min(done + n)];
            let Some(slots) = slots else {
                done += cells.len();
                continue;
            };
            for (cell, slot) in cells.iter().zip(slots) {
                if (cell.load(Relaxed) == 0 || cfg!(mutant = "around_overwrites"))
                    && let Some(found) = slot.load()
                {
                    let index = first + done as u64;
                    if found.order == 0 {
                        if let Some(entry) = self.single(found, index, self.around) {
                            set(cell, entry.raw);
                        }
                    } else if let Some(entry) = self.part(found, index, self.around) {
                        set(cell, entry.raw);
                    } else {
                        return done;
                    }
                }
                done += 1;
            }
        }
        done
    }
    fn run(&mut self, va: VirtAddr, window: VirtRange) -> Option<VirtRange> {
        let index = self.index_of(va);
        let found = self.pages.look(index).filter(|found| found.order > 0 && !self.is_hurt(*found))?;
        let indexes = found.indexes(index);
        let end = indexes.end.min(self.file.pages_below());
        let before = (index - indexes.start).min((va.0 - window.start.0) >> PAGE_SHIFT);
        let after = end.checked_sub(index)?.min((window.end.0 - va.0) >> PAGE_SHIFT);
        let at = |pages: u64| pages << PAGE_SHIFT;
        let run = VirtRange::new(VirtAddr(va.0 - at(before)), VirtAddr(va.0 + at(after)));
        (after > 0).then_some(run)
    }
    fn count(&mut self, run: VirtRange, mappings: u32) -> bool {
        let index = self.index_of(run.start);
        let Some(found) = self.pages.look(index) else { return false };
        let folio = self.p.meta(found.folio());
        if !folio.try_map_many(mappings) {
            return false;
        }
        if !self.file.is_span_attached(folio, found.part(), index, run.pages()) {
            frame::unmap_many(self.p, found.folio(), mappings);
            return false;
        }
        self.run = (run.start, found.pfn);
        true
    }
    fn of_run(&mut self, va: VirtAddr) -> Option<NewEntry> {
        let (start, first) = self.run;
        let pfn = first.add(((va.0 - start.0) >> PAGE_SHIFT) as u32);
        Some(entry(self.p, pfn, 0, if va == self.va { self.attrs } else { self.around }))
    }
    fn kind(&self) -> Option<FaultKind> {
        Some(FaultKind::FileRead)
    }
}

impl<'f, 'a, P: Platform> Fault<'f, 'a, P> {
    #[inline(never)]
    pub(super) fn file_page(
        &mut self,
        vma: &'f Vma<P>,
        file: &'f Shared<P, FileCache<P>>,
        slot: Slot<'f, P, Nothing>,
    ) -> Look<'a, P> {
        let (p, va, index) = (self.pin.platform(), self.addr.page(), vma.index_of(self.addr));
        let mut pages = file.cursor(self.pin);
        // What is there is validated under the lock. What is not, or not as it has to be, has its reasons.
        let Some(found) = pages.look(index) else { return self.not_there(vma, file) };
        let mut huge = None;
        let is_there = match found.order {
            0 => file.is_single_attached(p.meta(found.pfn), index),
            _ => {
                huge = self.huge_span(vma, file, &slot, found, index);
                huge.is_some() || file.is_attached(found.folio(), found.pfn, index)
            }
        };
        if !is_there {
            return self.not_there(vma, file);
        }
        let (policy, write) = (self.space.policy(), self.access == Access::Write);
        // Before the leave is looked at, and again under the lock.
        let leave = (write && vma.asks_to_write()).then(|| file.turn());
        if leave.is_some()
            && let Some(look) = self.ask_first(vma, found.pfn)
        {
            return look;
        }
        let in_place = vma.prot.contains(Prot::WRITE) && vma.is_written_in_place();
        let around = readable(vma) | if in_place { Attrs::WRITE } else { Attrs::empty() };
        let attrs = around | if write { Attrs::WRITE | Attrs::DIRTY } else { Attrs::empty() };
        if let Some((va, first, index)) = huge {
            let mut batch: Alone<'_, P, { huge::LEVEL }> =
                Alone { p, vma, file, va, first, index, write, leave, attrs };
            return self.install(slot, &mut batch);
        }
        if write {
            let mut batch: Alone<'_, P, 0> =
                Alone { p, vma, file, va, first: found, index, write, leave, attrs };
            return self.install(slot, &mut batch);
        }
        let (window, order) = window(policy.fault_around, vma, va, &slot);
        let mut batch = Pages {
            p,
            vma,
            file,
            pages,
            va,
            window,
            offset: index.wrapping_sub(va.0 >> PAGE_SHIFT),
            attrs,
            around: around - if policy.prefault_young { Attrs::empty() } else { Attrs::ACCESSED },
            run: (va, found.pfn),
            remembers: (!policy.fault_around.is_fixed()).then_some(order),
        };
        self.install(slot, &mut batch)
    }

    /// Where a huge page goes that has the page found for the faulting address, and the first small page of it, with its
    /// index; `None` where there is a table, the folio is not as large, or lies otherwise in the file than in the mapping,
    /// or not all of it may be mapped: beyond the mapping, beyond the end, with an error that hardware reported.
    fn huge_span(
        &self,
        vma: &Vma<P>,
        file: &FileCache<P>,
        slot: &Slot<'f, P, Nothing>,
        found: Found,
        index: u64,
    ) -> Option<(VirtAddr, Found, u64)> {
        let order = huge::order::<P::Format>();
        if slot.level() < huge::LEVEL || found.order < order {
            return None;
        }
        let (span, inside) =
            (P::Format::span_of(self.addr, huge::LEVEL), P::Format::pages_into(self.addr, huge::LEVEL));
        if !vma.takes_huge_of_file(span) {
            return None;
        }
        let (first, index) = (Found { pfn: Pfn(found.pfn.0 - inside), ..found }, index - inside as u64);
        let folio = self.pin.platform().meta(first.folio());
        let is_whole = file.is_span_attached(folio, first.part(), index, 1 << order);
        is_whole.then_some((span.start, first, index))
    }

    /// The file's page for the faulting address was not found, or not as it has to be: why, or what to do about it.
    #[cold]
    pub(super) fn not_there(&self, vma: &'f Vma<P>, file: &'f Shared<P, FileCache<P>>) -> Look<'a, P> {
        let index = vma.index_of(self.addr);
        match file.lookup(self.pin.platform(), self.pin, index) {
            Lookup::Page(page) if !page.meta().flags().contains(FrameFlags::AHEAD) => Look::Again,
            Lookup::Filling(page) if !page.meta().flags().contains(FrameFlags::AHEAD) => {
                Look::Done(Outcome::Blocked(file.ticket(page)))
            }
            Lookup::Removing(turn) => Look::Done(Outcome::Blocked(Ticket::for_removal(file.clone(), turn))),
            Lookup::BeyondEnd => Look::error(FaultError::Bus(Bus::BeyondEnd)),
            // What is there is marked: more is to be read. Or it is bad, and perhaps nothing is lost with it.
            Lookup::Missing | Lookup::Failed(_) | Lookup::Page(_) | Lookup::Filling(_) | Lookup::Poisoned => {
                Look::Need(Need::Page(file.clone(), index, vma.wanted()))
            }
        }
    }
}
