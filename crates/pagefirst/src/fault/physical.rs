//! Physical memory and devices where nothing is mapped: the largest entry that fits, or small ones for a whole window.

use super::anon::{WRITTEN, readable};
use super::around::window;
use super::{Fault, Look};
use crate::arch::{Attrs, Format};
use crate::platform::Platform;
use crate::space::{Physical, Vma};
use crate::table::{Batch, Counted, FaultKind, NewEntry, Nothing, Seen, Slot};
use crate::types::{Pfn, Prot, VirtAddr, VirtRange};

/// Frames in a row.
struct Frames<'f, P: Platform> {
    vma: &'f Vma<P>,
    va: VirtAddr,
    level: u8,
    window: Option<VirtRange>,
    attrs: Attrs,
}

impl<P: Platform> Batch for Frames<'_, P> {
    fn va(&self) -> VirtAddr {
        self.va
    }
    fn level(&self) -> u8 {
        self.level
    }
    fn window(&self) -> Option<VirtRange> {
        self.window
    }
    fn is_current(&self) -> bool {
        !self.vma.is_retired()
    }
    fn entry(&mut self, va: VirtAddr) -> Option<NewEntry> {
        let pfn = Pfn(self.vma.index_of(va) as u32);
        Some(NewEntry { raw: P::Format::leaf(pfn, self.level, self.attrs), counted: Counted::Nothing })
    }
    fn kind(&self) -> Option<FaultKind> {
        Some(FaultKind::Physical)
    }
}

impl<'f, 'a, P: Platform> Fault<'f, 'a, P> {
    #[inline(never)]
    pub(super) fn frames(
        &mut self,
        vma: &'f Vma<P>,
        physical: Physical,
        slot: Slot<'f, P, Nothing>,
    ) -> Look<'a, P> {
        let level = slot.level().min(physical.level(vma, self.addr));
        let va = P::Format::span_of(self.addr, level).start;
        let window = (level == 0).then(|| window(self.space.policy().fault_around, vma, va, &slot).0);
        // Marked at once, so that hardware has nothing to write: nobody asks what was used.
        let write = if vma.prot.contains(Prot::WRITE) { WRITTEN } else { Attrs::empty() };
        let attrs = readable(vma) | write | physical.memory.attrs() | Attrs::SPECIAL;
        self.install(slot, &mut Frames { vma, va, level, window, attrs })
    }

    /// A write to a frame that is mapped read-only.
    #[cold]
    pub(super) fn write_frame(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Seen>) -> Look<'a, P> {
        let Ok(mut slot) = slot.lock(|| !vma.is_retired()) else { return Look::Again };
        slot.widen(WRITTEN | Attrs::ACCESSED);
        slot.tally(FaultKind::Physical);
        Look::mapped(self.hand.major, slot.level() > 0, 0)
    }
}
