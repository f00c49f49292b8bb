//! A file's page where nothing is mapped: for a read, for an instruction fetch, for a shared write.

use super::anon::readable;
use super::around::{Neighbours, window};
use super::hand::Need;
use super::outcome::For;
use super::{Bus, Fault, FaultError, Look, Outcome, Ticket};
use crate::arch::{Attrs, Format};
use crate::file::{FileCache, Lookup};
use crate::frame::{self, Frame, FrameFlags};
use crate::mem::Shared;
use crate::platform::Platform;
use crate::space::Vma;
use crate::table::{Batch, Counted, FaultKind, NewEntry, Nothing, Slot};
use crate::types::{Access, Pfn, Prot, VirtAddr, VirtRange};

/// A page of a file and its neighbours.
struct Pages<'f, P: Platform> {
    p: &'static P,
    vma: &'f Vma<P>,
    file: &'f FileCache<P>,
    va: VirtAddr,
    page: Pfn,
    window: VirtRange,
    neighbours: Neighbours<'f, P>,
    write: bool,
    young: bool,
}

impl<P: Platform> Batch for Pages<'_, P> {
    fn va(&self) -> VirtAddr {
        self.va
    }
    fn window(&self) -> VirtRange {
        self.window
    }
    fn is_current(&self) -> bool {
        !self.vma.is_retired()
    }
    fn entry(&mut self, va: VirtAddr) -> Option<NewEntry> {
        let faulted = va == self.va;
        let pfn = if faulted { self.page } else { self.neighbours.at(va)? };
        // The mapping is counted before the page is validated: who takes it away looks at the count after it
        // announced so (protocol 2).
        let meta = self.p.meta(pfn);
        if !meta.try_map() {
            return None;
        }
        if !self.file.is_attached(meta, self.vma.index_of(va)) {
            frame::unmap(self.p, pfn);
            return None;
        }
        if self.vma.prot.contains(Prot::EXEC) {
            self.p.sync_instructions(pfn);
        }
        let mut attrs = readable(self.vma);
        if !faulted && !self.young {
            attrs.remove(Attrs::ACCESSED);
        }
        if self.write && faulted {
            attrs |= Attrs::WRITE | Attrs::DIRTY;
            meta.set(FrameFlags::DIRTY);
        } else if self.vma.prot.contains(Prot::WRITE) && self.vma.is_written_in_place() {
            attrs |= Attrs::WRITE;
        }
        Some(NewEntry { raw: P::Format::leaf(pfn, 0, attrs), counted: Counted::File })
    }
    fn kind(&self) -> Option<FaultKind> {
        Some(if self.write { FaultKind::SharedWrite } else { FaultKind::FileRead })
    }
}

impl<'f, 'a, P: Platform> Fault<'f, 'a, P> {
    pub(super) fn file_page(
        &mut self,
        vma: &'f Vma<P>,
        file: &'f Shared<P, FileCache<P>>,
        slot: Slot<'f, P, Nothing>,
    ) -> Look<'a, P> {
        let va = self.addr.page();
        let page = match self.cached(vma, file) {
            Ok(page) => page,
            Err(look) => return look,
        };
        let write = self.access == Access::Write;
        // Neighbours of a write would have to be written to be worth it.
        let around = if write {
            VirtRange::page_of(va)
        } else {
            window(self.space.policy().fault_around, vma, va, &slot)
        };
        let mut batch = Pages {
            p: self.pin.platform(),
            vma,
            file,
            va,
            page: page.pfn(),
            window: around,
            neighbours: Neighbours::collect(self.pin, file, vma, around),
            write,
            young: self.space.policy().prefault_young,
        };
        self.install(slot, &mut batch)
    }

    /// The file's page for the faulting address, from the cache, or what to do instead.
    pub(super) fn cached(
        &self,
        vma: &'f Vma<P>,
        file: &'f Shared<P, FileCache<P>>,
    ) -> Result<Frame<P>, Look<'a, P>> {
        let index = vma.index_of(self.addr);
        match file.lookup(self.pin.platform(), self.pin, index) {
            Lookup::Poisoned => Err(Look::error(FaultError::Bus(Bus::Poison))),
            Lookup::Page(page) => Ok(page),
            Lookup::Filling(page) => Err(Look::Done(Outcome::Blocked(Ticket(For::Page(page))))),
            Lookup::BeyondEnd => Err(Look::error(FaultError::Bus(Bus::BeyondEnd))),
            Lookup::Missing => Err(Look::Need(Need::Page(file.clone(), index))),
        }
    }
}
