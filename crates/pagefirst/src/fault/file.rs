//! A file's page where nothing is mapped: for a read, for an instruction fetch, for a shared write.

use super::anon::readable;
use super::around::window;
use super::hand::Need;
use super::{Bus, Fault, FaultError, Look, Outcome};
use crate::arch::{Attrs, Format};
use crate::file::{Cursor, FileCache, Lookup};
use crate::frame::{self, FrameFlags};
use crate::mem::Shared;
use crate::platform::Platform;
use crate::space::Vma;
use crate::table::{Batch, Counted, FaultKind, NewEntry, Nothing, Slot};
use crate::types::{Access, PAGE_SHIFT, Prot, VirtAddr, VirtRange};

/// A page of a file and its neighbours.
struct Pages<'f, P: Platform> {
    p: &'static P,
    vma: &'f Vma<P>,
    file: &'f FileCache<P>,
    pages: Cursor<'f, P>,
    va: VirtAddr,
    window: Option<VirtRange>,
    /// What is added to a page's number to give its index in the file.
    offset: u64,
    write: bool,
    attrs: Attrs,
    /// Those of neighbours.
    around: Attrs,
}

impl<P: Platform> Pages<'_, P> {
    #[inline(always)]
    fn mapped(&mut self, va: VirtAddr, attrs: Attrs, flags: FrameFlags) -> Option<NewEntry> {
        let index = (va.0 >> PAGE_SHIFT).wrapping_add(self.offset);
        let found = self.pages.look(index)?;
        let (folio, pfn) = (found.folio(), found.pfn);
        // The mapping is counted before the page is validated: who takes it away looks at the count after it
        // announced so (protocol 2).
        let meta = self.p.meta(folio);
        if !meta.try_map() {
            return None;
        }
        if !self.file.is_attached(folio, pfn, index) {
            frame::unmap(self.p, folio);
            return None;
        }
        if !flags.is_empty() {
            meta.set(flags);
        }
        if attrs.contains(Attrs::EXEC) && !cfg!(mutant = "exec_without_sync") {
            self.p.sync_instructions(pfn);
        }
        Some(NewEntry { raw: P::Format::leaf(pfn, 0, attrs), counted: Counted::File })
    }
}

impl<P: Platform> Batch for Pages<'_, P> {
    fn va(&self) -> VirtAddr {
        self.va
    }
    fn window(&self) -> Option<VirtRange> {
        self.window
    }
    fn is_current(&self) -> bool {
        !self.vma.is_retired()
    }
    #[inline(always)]
    fn entry(&mut self, va: VirtAddr) -> Option<NewEntry> {
        let flags = if self.write { FrameFlags::DIRTY } else { FrameFlags::empty() };
        self.mapped(va, self.attrs, flags)
    }
    #[inline(always)]
    fn neighbour(&mut self, va: VirtAddr) -> Option<NewEntry> {
        self.mapped(va, self.around, FrameFlags::empty())
    }
    fn kind(&self) -> Option<FaultKind> {
        Some(if self.write { FaultKind::SharedWrite } else { FaultKind::FileRead })
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
        if !pages.look(index).is_some_and(|found| file.is_attached(found.folio(), found.pfn, index)) {
            return self.not_there(vma, file);
        }
        let (policy, write) = (self.space.policy(), self.access == Access::Write);
        let in_place = vma.prot.contains(Prot::WRITE) && vma.is_written_in_place();
        let around = readable(vma) | if in_place { Attrs::WRITE } else { Attrs::empty() };
        // Neighbours of a write would have to be written to be worth it.
        let window = (!write).then(|| window(policy.fault_around, vma, va, &slot));
        let mut batch = Pages {
            p,
            vma,
            file,
            pages,
            va,
            window,
            offset: index.wrapping_sub(va.0 >> PAGE_SHIFT),
            write,
            attrs: around | if write { Attrs::WRITE | Attrs::DIRTY } else { Attrs::empty() },
            around: around - if policy.prefault_young { Attrs::empty() } else { Attrs::ACCESSED },
        };
        self.install(slot, &mut batch)
    }

    /// The file's page for the faulting address was not found, or not as it has to be: why, or what to do about it.
    #[cold]
    pub(super) fn not_there(&self, vma: &'f Vma<P>, file: &'f Shared<P, FileCache<P>>) -> Look<'a, P> {
        let index = vma.index_of(self.addr);
        match file.lookup(self.pin.platform(), self.pin, index) {
            Lookup::Poisoned => Look::error(FaultError::Bus(Bus::Poison)),
            Lookup::Page(page) if !page.meta().flags().contains(FrameFlags::AHEAD) => Look::Again,
            Lookup::Filling(page) if !page.meta().flags().contains(FrameFlags::AHEAD) => {
                Look::Done(Outcome::Blocked(file.ticket(page)))
            }
            Lookup::BeyondEnd => Look::error(FaultError::Bus(Bus::BeyondEnd)),
            // What is there is marked: more is to be read.
            Lookup::Missing | Lookup::Failed(_) | Lookup::Page(_) | Lookup::Filling(_) => {
                Look::Need(Need::Page(file.clone(), index, vma.wanted()))
            }
        }
    }
}
