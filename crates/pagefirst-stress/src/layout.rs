//! Where things are in every space.

use crate::HOMES;
use crate::direct::BLOCK;
use pagefirst::types::{PAGE_SIZE, VirtAddr};

/// Parts of a worker's stretch. The pages of sixteen small ones would fill a leaf table of x86-64.
pub(crate) const OWN_PARTS: u64 = 32;
/// Pages of a file, or of an area of private memory that all work on.
pub(crate) const PAGES: u64 = 64;

const OWN: u64 = 0x1_0000_0000;
/// Across the border of two leaf tables.
const CHAOS: [u64; 2] = [0x1_4000_0000, 0x1_4020_0000 - PAGES / 2 * PAGE_SIZE];
const HUGE: u64 = 0x1_8000_0000;
const WIDE: u64 = 0x1_a000_0000;
const PHYSICAL: u64 = 0x1_c000_0000;
const HEAP: u64 = 0x1_d000_0000;
/// What is below it is free: it is a stack's guard gap.
const STACK: u64 = 0x1_e000_0000;
const DIRECT: u64 = 0x1_f000_0000;
const FILES: u64 = 0x2_0000_0000;

/// A page: where it is, and the number that the words in it bear.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Area {
    pub start: VirtAddr,
    pub pages: u64,
}

impl Area {
    const fn new(start: u64, pages: u64) -> Self {
        Area { start: VirtAddr(start), pages }
    }
    pub fn page(self, i: u64) -> VirtAddr {
        VirtAddr(self.start.0 + i * PAGE_SIZE)
    }
    /// Those of one home's workers lie side by side.
    pub const fn own(worker: usize) -> Self {
        Area::new(OWN + (worker / HOMES) as u64 * OWN_PARTS * PAGE_SIZE, OWN_PARTS)
    }
    /// Two huge pages of one worker.
    pub const fn wide(worker: usize) -> Self {
        Area::new(WIDE + (worker / HOMES) as u64 * 0x40_0000, 1024)
    }
    /// Two, between which pages move.
    pub const fn chaos(which: usize) -> Self {
        Area::new(CHAOS[which & 1], PAGES)
    }
    /// Two huge pages.
    pub const fn huge() -> Self {
        Area::new(HUGE, 1024)
    }
    pub const fn physical() -> Self {
        Area::new(PHYSICAL, BLOCK)
    }
    pub const fn heap() -> Self {
        Area::new(HEAP, PAGES)
    }
    /// As far as a stack grows: no limit, for nobody touches more.
    pub const fn stack() -> Self {
        Area::new(STACK, PAGES)
    }
    /// Two in which a file is mapped shared, and between which its mappings move; and one in which it is private.
    pub const fn file(file: usize, which: usize, pages: u64) -> Self {
        Area::new(FILES + file as u64 * 0x4000_0000 + which as u64 * 0x400_0000, pages)
    }
    /// The same of a file that is memory itself.
    pub const fn direct(which: usize) -> Self {
        Area::new(DIRECT + which as u64 * 0x40_0000, BLOCK)
    }
    pub const PRIVATE: usize = 2;
    /// Which page of it this is, if it is one.
    pub fn index_of(self, at: VirtAddr) -> Option<u64> {
        let page = at.0.checked_sub(self.start.0)? / PAGE_SIZE;
        (page < self.pages).then_some(page)
    }
}

/// The word of a page that this worker writes.
pub(crate) const fn place_of(worker: usize) -> u64 {
    worker as u64 * 64
}
