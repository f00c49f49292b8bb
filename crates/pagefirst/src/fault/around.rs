//! Fault-around: which neighbours of a file's page are mapped with it.
//!
//! The window is a power of two, aligned to itself, clipped to the VMA and to one leaf table. Neighbours are
//! collected from the cache without a lock and validated one by one under the lock of the table that gets them.

use crate::arch::Format;
use crate::file::FileCache;
use crate::platform::Platform;
use crate::policy::{MAX_FAULT_AROUND, Policy};
use crate::space::Vma;
use crate::sync::epoch::Pin;
use crate::types::{PAGE_SHIFT, PAGE_SIZE, Pfn, VirtAddr, VirtRange};

const MOST: usize = (MAX_FAULT_AROUND / PAGE_SIZE) as usize;

/// The window around `va`: where neighbours may be mapped.
pub(super) fn window<P: Platform>(policy: &Policy, vma: &Vma<P>, va: VirtAddr) -> VirtRange {
    let bytes = policy.fault_around.min(P::Format::span(1)).max(PAGE_SIZE);
    let start = va.align_down(bytes);
    VirtRange::new(start, VirtAddr(start.0.saturating_add(bytes))).intersect(vma.range)
}

/// The cached pages of a window, by position.
pub(super) struct Neighbours {
    first: VirtAddr,
    pages: [Pfn; MOST],
    len: usize,
}

impl Neighbours {
    /// Collects what is cached and up to date now.
    pub fn collect<P: Platform>(
        pin: &Pin<P>,
        file: &FileCache<P>,
        vma: &Vma<P>,
        window: VirtRange,
    ) -> Neighbours {
        let len = window.pages() as usize;
        let mut found = Neighbours { first: window.start, pages: [Pfn(0); MOST], len };
        if len > 1 {
            let first = vma.index_of(window.start);
            file.cached(pin.platform(), pin, first, first + len as u64 - 1, |index, pfn| {
                found.pages[(index - first) as usize] = pfn;
            });
        }
        found
    }
    /// The page collected for `va`.
    pub fn at(&self, va: VirtAddr) -> Option<Pfn> {
        let i = (va.0.checked_sub(self.first.0)? >> PAGE_SHIFT) as usize;
        (i < self.len && self.pages[i].0 != 0).then(|| self.pages[i])
    }
}
