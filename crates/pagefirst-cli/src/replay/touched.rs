//! Which pages a program touched, to tell how much of its huge pages it never did.

use super::engine::Space;
use pagefirst::frame::FrameFlags;
use pagefirst::platform::Platform;
use pagefirst::sync::epoch::Pin;
use pagefirst::types::{PAGE_SIZE, VirtAddr};
use std::collections::BTreeSet;

/// Small pages in a huge one.
const SMALL: u64 = 512;

/// The pages touched, by number, since they were last mapped or discarded.
#[derive(Clone, Default)]
pub struct Touched(BTreeSet<u64>);

impl Touched {
    pub fn mark(&mut self, at: VirtAddr) {
        self.0.insert(at.0 / PAGE_SIZE);
    }

    /// Forgets what was touched in `len` bytes from `at` on, and returns it.
    pub fn forget(&mut self, at: VirtAddr, len: u64) -> BTreeSet<u64> {
        let mut gone = self.0.split_off(&(at.0 / PAGE_SIZE));
        let mut above = gone.split_off(&at.0.saturating_add(len).div_ceil(PAGE_SIZE));
        self.0.append(&mut above);
        gone
    }

    /// What was touched in `len` bytes moves with them.
    pub fn shift(&mut self, from: VirtAddr, len: u64, to: VirtAddr) {
        let moved = self.forget(from, len);
        self.0.extend(moved.iter().map(|page| page - from.0 / PAGE_SIZE + to.0 / PAGE_SIZE));
    }

    /// The bytes that were touched of what huge pages of private memory map now.
    pub fn of_huge_pages(&self, space: &Space) -> u64 {
        let (machine, pin) = (space.platform(), Pin::new(space.platform()));
        let is_huge = |page: &&u64| {
            let there = space.page_table().translate(&pin, VirtAddr(**page * PAGE_SIZE));
            there.is_some_and(|t| {
                // The metadata of a huge page is its first frame's.
                let first = t.pfn.0 - (**page % SMALL) as u32;
                let flags = machine.meta(pagefirst::types::Pfn(first)).flags();
                t.level == 1 && flags.contains(FrameFlags::ANON)
            })
        };
        self.0.iter().filter(is_huge).count() as u64 * PAGE_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_touched_is_forgotten_and_moves_by_range() {
        let page = |n| VirtAddr(n * PAGE_SIZE);
        let mut touched = Touched::default();
        (0..10).for_each(|n| touched.mark(page(n)));
        assert_eq!(touched.forget(page(2), 3 * PAGE_SIZE), BTreeSet::from([2, 3, 4]));
        touched.shift(page(8), 2 * PAGE_SIZE, page(100));
        assert_eq!(touched.0, BTreeSet::from([0, 1, 5, 6, 7, 100, 101]));
    }
}
