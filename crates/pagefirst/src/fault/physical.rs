//! Frames in a row that are nobody's pages, where nothing is mapped: physical memory, devices, files that are memory
//! themselves (`direct`). The largest entry that fits, or small ones for a whole window.

use super::anon::{WRITTEN, readable};
use super::around::window;
use super::{Fault, Look};
use crate::arch::{Attrs, Format};
use crate::platform::Platform;
use crate::space::{MemoryType, Physical, Vma};
use crate::table::{Batch, Counted, FaultKind, NewEntry, Nothing, Seen, Slot};
use crate::types::{Pfn, Prot, VirtAddr, VirtRange};

/// Frames in a row.
struct Frames<'f, P: Platform, F> {
    vma: &'f Vma<P>,
    va: VirtAddr,
    level: u8,
    window: Option<VirtRange>,
    attrs: Attrs,
    source: F,
}

/// Where frames are.
pub(super) trait Source {
    /// Whether nothing that it goes by was announced to go away, the mapping aside.
    fn is_current(&self) -> bool;
    /// The first frame for an entry at `level`, for the page with this index in the mapping's backing.
    fn frame<F: Format>(&self, index: u64, level: u8) -> Option<Pfn>;
}

/// As the mapping says.
impl Source for Physical {
    fn is_current(&self) -> bool {
        true
    }
    fn frame<F: Format>(&self, index: u64, _: u8) -> Option<Pfn> {
        Some(Pfn(index as u32))
    }
}

impl<P: Platform, F: Source> Batch for Frames<'_, P, &F> {
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
        !self.vma.is_retired() && self.source.is_current()
    }
    fn entry(&mut self, va: VirtAddr) -> Option<NewEntry> {
        let pfn = self.source.frame::<P::Format>(self.vma.index_of(va), self.level)?;
        Some(NewEntry { raw: P::Format::leaf(pfn, self.level, self.attrs), counted: Counted::Nothing })
    }
    fn kind(&self) -> Option<FaultKind> {
        Some(FaultKind::Physical)
    }
}

impl<'f, 'a, P: Platform> Fault<'f, 'a, P> {
    #[inline(never)]
    pub(super) fn physical(
        &mut self,
        vma: &'f Vma<P>,
        physical: Physical,
        slot: Slot<'f, P, Nothing>,
    ) -> Look<'a, P> {
        let level = physical.level(vma, self.addr).min(slot.level());
        // Marked at once, so that hardware has nothing to write: nobody asks what was used.
        self.install_frames(vma, slot, &physical, level, physical.memory, vma.prot.contains(Prot::WRITE))
    }

    /// Maps frames of memory of this type by an entry at `level`, or a window of small ones.
    pub(super) fn install_frames(
        &mut self,
        vma: &'f Vma<P>,
        slot: Slot<'f, P, Nothing>,
        source: &impl Source,
        level: u8,
        memory: MemoryType,
        writable: bool,
    ) -> Look<'a, P> {
        let va = P::Format::span_of(self.addr, level).start;
        let window = (level == 0).then(|| window(self.space.policy().fault_around, vma, va, &slot).0);
        let write = if writable { WRITTEN } else { Attrs::empty() };
        // Fetched ahead, a device's registers would be read.
        let never = if memory == MemoryType::Normal { Attrs::empty() } else { Attrs::EXEC };
        let attrs = (readable(vma) - never) | write | memory.attrs() | Attrs::SPECIAL;
        self.install(slot, &mut Frames { vma, va, level, window, attrs, source })
    }

    /// A write to a frame that is mapped read-only.
    #[cold]
    pub(super) fn write_frame(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Seen>) -> Look<'a, P> {
        match slot.lock(|| !vma.is_retired()) {
            Ok(slot) => self.widen(slot, FaultKind::Physical),
            Err(_) => Look::Again,
        }
    }
}
