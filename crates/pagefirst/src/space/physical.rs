//! Mappings of physical memory and of devices' registers.
//!
//! Their frames are whatever the embedder says, memory of the library's or not: they are never counted, never copied on
//! write, and it is the embedder who keeps them what they are for as long as they are mapped. A fault maps them with the
//! largest entries that fit. They do not grow (`mremap`), and a move maps them anew.

use super::Vma;
use crate::arch::{Attrs, Format};
use crate::platform::Platform;
use crate::types::{Pfn, VirtAddr};

/// How CPUs treat memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum MemoryType {
    /// As memory: cached.
    Normal,
    /// Not cached; writes may be merged ([`Attrs::UNCACHED`]).
    Uncached,
    /// A device's registers ([`Attrs::DEVICE`]).
    Device,
}

impl MemoryType {
    pub(crate) fn attrs(self) -> Attrs {
        match self {
            MemoryType::Normal => Attrs::empty(),
            MemoryType::Uncached => Attrs::UNCACHED,
            MemoryType::Device => Attrs::DEVICE,
        }
    }
}

/// Physical memory, from one frame of it on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Physical {
    /// The frame of the mapping's first page.
    pub first: Pfn,
    /// How it is accessed.
    pub memory: MemoryType,
}

impl Physical {
    /// Whether a mapping of so many pages names frames that there can be.
    pub(super) fn reaches(self, pages: u64) -> bool {
        u64::from(self.first.0) + pages <= 1 << u32::BITS
    }
    /// The level of the largest entry by which a fault at `va` may map its page of the mapping.
    pub(crate) fn level<P: Platform>(self, vma: &Vma<P>, va: VirtAddr) -> u8 {
        vma.largest_entry(va, |start, _| Some(Pfn(vma.index_of(start) as u32)))
    }
}

impl<P: Platform> Vma<P> {
    /// The level of the largest entry around `va` that does not reach beyond the mapping, and whose first frame, which
    /// `frame` tells by its first address and its level, there is and lies where hardware wants it.
    pub(crate) fn largest_entry(&self, va: VirtAddr, frame: impl Fn(VirtAddr, u8) -> Option<Pfn>) -> u8 {
        let fits = |level: &u8| {
            let span = P::Format::span_of(va, *level);
            let is_aligned = |pfn: Pfn| u64::from(pfn.0).is_multiple_of(P::Format::pages(*level));
            self.range.covers(span) && frame(span.start, *level).is_some_and(is_aligned)
        };
        (1..=P::Format::TOP_LEAF).rev().find(fits).unwrap_or(0)
    }
}
