//! Marking a folio clean, and write-protecting it, wherever it is mapped.

use crate::arch::{Attrs, Format};
use crate::frame::head_of;
use crate::platform::Platform;
use crate::table::{Flow, Guard, PageTable, Stock, Visitor};
use crate::tlb::{Gather, NOTHING};
use crate::types::{Pfn, VirtAddr, VirtRange};

/// Makes the entries of a folio clean, and read-only if it is to be known who writes to it next, and counts them.
pub(crate) struct Clean {
    /// Of memory that is a file itself if of none.
    folio: Option<Pfn>,
    marks: Attrs,
    found: u32,
    /// An entry was dirty.
    dirty: bool,
    /// Something was on the move.
    missed: bool,
}

impl Clean {
    /// For the folio with this head, which the caller holds.
    pub fn new(folio: Pfn, read_only: bool) -> Self {
        let marks = Attrs::DIRTY | if read_only { Attrs::WRITE } else { Attrs::empty() };
        Clean { folio: Some(folio), marks, found: 0, dirty: false, missed: false }
    }
    /// For the entries that lead to the memory of a file that is memory itself. That they are dirty says nothing of it.
    pub fn of_memory() -> Self {
        Clean { folio: None, marks: Attrs::WRITE, found: 0, dirty: false, missed: false }
    }
    /// Visits the addresses of a mapping, and flushes. If the mapping is not live, entries may come and go there by other
    /// ways than a fault. Answers whether it saw all that there was.
    pub fn visit<P: Platform>(&mut self, is_live: bool, table: &PageTable<P>, range: VirtRange) -> bool {
        let before = core::mem::replace(&mut self.missed, !is_live);
        let mut gather = Gather::new(table);
        table.visit(range, self, &mut Stock::empty(table.platform()), &mut gather);
        if self.folio.is_none() {
            // Whoever has taken an entry out there may not have flushed yet, and nothing counts it meanwhile.
            gather.touch(range);
        }
        match cfg!(mutant = "clean_without_flush") {
            true => core::mem::forget(gather),
            false => gather.flush(),
        }
        let all = !self.missed;
        self.missed |= before;
        all
    }
    /// Whether any of them was dirty.
    pub fn found_dirty(&self) -> bool {
        self.dirty
    }
    /// Whether those were all, of so many.
    pub fn is_all(&self, mappings: u32) -> bool {
        !self.missed && self.found >= mappings
    }
}

impl<P: Platform> Visitor<P> for Clean {
    fn leaf(&mut self, guard: &mut Guard<'_, P>, range: VirtRange, gather: &mut Gather<'_, P>) -> Flow {
        let (p, level) = (guard.table().platform(), guard.table().level());
        let (mut va, size) = (P::Format::span_of(range.start, level).start, P::Format::span(level));
        let mut touched = NOTHING;
        for index in P::Format::slots(range, level) {
            let raw = guard.entry(index);
            let frame = P::Format::frame(raw, level);
            // A huge page that is being split; a small one is a private copy that is lost.
            self.missed |= level > 0 && raw != 0 && frame.is_none();
            if let Some(pfn) = frame
                && let special = P::Format::attrs(raw).contains(Attrs::SPECIAL)
                && self.folio.map_or(special, |folio| !special && head_of(p, pfn) == folio)
            {
                self.found += 1;
                let clean = |raw| P::Format::with_attrs(raw, P::Format::attrs(raw) - self.marks);
                let old = guard.update(index, clean);
                self.dirty |= P::Format::attrs(old).contains(Attrs::DIRTY);
                if clean(old) != old {
                    touched = VirtRange { start: touched.start.min(va), end: VirtAddr(va.0 + size) };
                }
            }
            va.0 += size;
        }
        gather.touch(touched);
        Flow::Done
    }
    fn splits(&self, _: VirtRange, _: VirtRange) -> bool {
        false
    }
}
