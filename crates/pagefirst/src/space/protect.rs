//! Protect.

use super::change::Change;
use super::{AddressSpace, Backing, MapError};
use crate::arch::{Attrs, Format};
use crate::frame::{FrameFlags, folio_of};
use crate::platform::Platform;
use crate::table::{Flow, Guard, PageTable, Visitor};
use crate::tlb::Gather;
use crate::types::{Prot, VirtAddr, VirtRange};

/// Gives the entries of one VMA its new rights. Write is given at once where a write fault would give it without
/// looking at anything but the page.
struct Protect<'a, P: Platform> {
    table: &'a PageTable<P>,
    prot: Prot,
    writable_in_place: bool,
    /// Frames that are not counted are physical memory, which is written in place; else they are the zero page.
    is_physical: bool,
}

impl<P: Platform> Protect<'_, P> {
    fn attrs(&self, p: &'static P, raw: u64, level: u8) -> Attrs {
        let mut attrs = P::Format::attrs(raw);
        attrs.set(Attrs::NONE, self.prot.is_empty());
        let may_execute = !attrs.intersects(Attrs::UNCACHED | Attrs::DEVICE);
        attrs.set(Attrs::EXEC, self.prot.contains(Prot::EXEC) && may_execute);
        if !self.prot.contains(Prot::WRITE) {
            attrs.remove(Attrs::WRITE);
        } else if self.is_physical {
            attrs.insert(Attrs::WRITE | Attrs::DIRTY);
        } else if !attrs.contains(Attrs::SPECIAL)
            // A copy that is not flushed must not become writable yet: the write fault sees to it.
            && !self.table.is_unflushed()
            && let Some(pfn) = P::Format::frame(raw, level)
        {
            let (_, _, flags) = folio_of(p, pfn);
            let own = flags.contains(FrameFlags::ANON | FrameFlags::EXCLUSIVE);
            let in_place = self.writable_in_place || cfg!(mutant = "protect_writes_to_file");
            if own || (in_place && flags.contains(FrameFlags::FILE)) {
                attrs.insert(Attrs::WRITE);
            }
        }
        attrs
    }
}

impl<P: Platform> Visitor<P> for Protect<'_, P> {
    fn leaf(&mut self, guard: &mut Guard<'_, P>, range: VirtRange, gather: &mut Gather<'_, P>) -> Flow {
        let (p, level) = (guard.table().platform(), guard.table().level());
        let mut va = range.start;
        while va < range.end {
            let index = P::Format::index(va, level);
            let raw = guard.entry(index);
            // Poison stays what it is.
            if P::Format::frame(raw, level).is_some() {
                let attrs = P::Format::attrs(raw);
                let gains = self.prot.contains(Prot::EXEC) && !attrs.intersects(Attrs::EXEC | Attrs::SPECIAL);
                if let Some(pfn) = P::Format::frame(raw, level).filter(|_| gains) {
                    // Before another CPU can see that it may fetch from there.
                    let pages = P::Format::pages(level) as u32;
                    (0..pages).for_each(|i| p.sync_instructions(pfn.add(i)));
                }
                let new = |raw| P::Format::with_attrs(raw, self.attrs(p, raw, level));
                let old = guard.update(index, new);
                if new(old) != old && !cfg!(mutant = "protect_without_flush") {
                    gather.touch(P::Format::span_of(va, level));
                }
            }
            va = VirtAddr(va.0 + P::Format::span(level));
        }
        Flow::Done
    }
}

impl<P: Platform> AddressSpace<P> {
    /// Gives `len` bytes from `start`, rounded up to whole pages, other rights.
    ///
    /// # Errors
    /// [`MapError`], [`NotMapped`](MapError::NotMapped) with the first hole among them; nothing has changed then.
    pub fn protect(&self, start: VirtAddr, len: u64, prot: Prot) -> Result<(), MapError> {
        let range = self.check_range(start, len)?;
        let mut writing = self.write();
        self.check_mapped(range)?;
        for vma in self.tree.overlapping(range) {
            self.check_prot(prot, vma.flags, &vma.backing, vma.range.intersect(range))?;
        }
        if self.tree.overlapping(range).all(|v| v.prot == prot) {
            return Ok(());
        }
        let mut change = Change::cut(&writing, range);
        for vma in self.tree.overlapping(range) {
            let part = vma.range.intersect(range);
            let piece = vma.part(part, prot, vma.flags);
            change.push(piece, &mut writing.state)?;
        }
        let ready = change.finish(&mut writing.state)?;
        let mut cuts = self.cuts(&[range.start, range.end])?;
        ready.announce();
        let mut gather = Gather::new(self.page_table());
        for vma in self.tree.overlapping(range) {
            let writable_in_place = vma.is_written_in_place();
            let is_physical = matches!(vma.backing, Backing::Physical(_));
            let mut visitor = Protect { table: self.page_table(), prot, writable_in_place, is_physical };
            self.page_table().visit(vma.range.intersect(range), &mut visitor, &mut cuts, &mut gather);
        }
        gather.flush();
        ready.publish(&mut writing.state);
        Ok(())
    }

    /// An error that names the first hole in `range`, if there is one.
    pub(super) fn check_mapped(&self, range: VirtRange) -> Result<(), MapError> {
        let mut at = range.start;
        for vma in self.tree.overlapping(range) {
            if vma.range.start > at {
                return Err(MapError::NotMapped(VirtRange::new(at, vma.range.start)));
            }
            at = vma.range.end;
        }
        if at < range.end { Err(MapError::NotMapped(VirtRange::new(at, range.end))) } else { Ok(()) }
    }
}
