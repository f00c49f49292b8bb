//! Fault-around: which neighbours of a file's page are mapped with it.
//!
//! The window is a power of two, aligned to itself, clipped to the VMA and to one leaf table. Neighbours are
//! collected from the cache without a lock and validated one by one under the lock of the table that gets them.
//!
//! A window that adapts keeps no record. The leaf table is one: neighbours are mapped old, so those that are young now
//! were used. A fault reads the entries of the two default windows it lies between, without a lock, and writes nothing.

use crate::arch::Format;
use crate::file::FileCache;
use crate::platform::Platform;
use crate::policy::{DEFAULT_FAULT_AROUND, FaultAround};
use crate::space::Vma;
use crate::sync::epoch::Pin;
use crate::table::{Nothing, Slot};
use crate::types::{PAGE_SHIFT, PAGE_SIZE, Pfn, VirtAddr, VirtRange};

/// The window around `va`: where neighbours may be mapped.
pub(super) fn window<P: Platform>(
    policy: FaultAround,
    vma: &Vma<P>,
    va: VirtAddr,
    slot: &Slot<'_, P, Nothing>,
) -> VirtRange {
    let block = |bytes: u64| {
        let start = va.align_down(bytes);
        let aligned = VirtRange::new(start, VirtAddr(start.0.saturating_add(bytes)));
        if cfg!(mutant = "around_past_mapping") { aligned } else { aligned.intersect(vma.range) }
    };
    let bytes = match policy.is_fixed() {
        true => policy.least(),
        false => {
            let (there, used) = slot.used_in(block(2 * DEFAULT_FAULT_AROUND));
            adapted(there, used).clamp(policy.least(), policy.most())
        }
    };
    block(bytes.min(P::Format::span(1)))
}

/// So many entries tell enough.
const ENOUGH: u32 = 8;

/// The window beside so many entries, so many of which were used.
fn adapted(there: u32, used: u32) -> u64 {
    let normal = DEFAULT_FAULT_AROUND;
    match () {
        _ if there < ENOUGH => normal,
        _ if 4 * used >= 3 * there => 4 * normal,
        _ if 5 * used < there => normal / 4,
        _ => normal,
    }
}

/// Pages collected at a time: few, for a fault runs on a kernel's stack.
const AT_ONCE: usize = 64;

/// The cached pages of a window, collected as they are asked for, in order.
pub(super) struct Neighbours<'f, P: Platform> {
    pin: &'f Pin<P>,
    file: &'f FileCache<P>,
    vma: &'f Vma<P>,
    window: VirtRange,
    /// Whose pages are collected.
    part: VirtRange,
    pages: [Pfn; AT_ONCE],
}

impl<'f, P: Platform> Neighbours<'f, P> {
    /// Begins with what is cached and up to date now.
    pub fn collect(pin: &'f Pin<P>, file: &'f FileCache<P>, vma: &'f Vma<P>, window: VirtRange) -> Self {
        let part = VirtRange::new(window.start, window.start);
        let mut neighbours = Neighbours { pin, file, vma, window, part, pages: [Pfn(0); AT_ONCE] };
        if window.pages() > 1 {
            neighbours.fill(window.start);
        }
        neighbours
    }
    fn fill(&mut self, va: VirtAddr) {
        let end = VirtAddr(va.0.saturating_add(AT_ONCE as u64 * PAGE_SIZE));
        self.part = VirtRange::new(va, end).intersect(self.window);
        self.pages = [Pfn(0); AT_ONCE];
        let first = self.vma.index_of(va);
        let last = first + self.part.pages() - 1;
        let pages = &mut self.pages;
        self.file.cached(self.pin.platform(), self.pin, first, last, |index, pfn| {
            pages[(index - first) as usize] = pfn;
        });
    }
    /// The page for `va`, which lies in the window.
    pub fn at(&mut self, va: VirtAddr) -> Option<Pfn> {
        if !self.part.contains(va) {
            self.fill(va);
        }
        let pfn = self.pages[((va.0 - self.part.start.0) >> PAGE_SHIFT) as usize];
        (pfn.0 != 0).then_some(pfn)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_what_was_used() {
        let windows = [(0, 0), (7, 7), (8, 6), (8, 5), (16, 4), (16, 3), (32, 6), (32, 32)]
            .map(|(n, u)| adapted(n, u) >> 10);
        assert_eq!(windows, [64, 64, 256, 64, 64, 16, 16, 256]);
    }
}
