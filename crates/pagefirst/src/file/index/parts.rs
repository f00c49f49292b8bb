//! What goes into an index, and what comes out: folios and their runs, nodes reserved, nodes cut off.

use super::{BITS, CacheNode, LEAVES, Leaf, MOST, slot_of};
use crate::frame::first_of;
use crate::mem::{Reserved, Shared};
use crate::platform::Platform;
use crate::types::{NoMemory, Pfn};
use core::ops::Range;

/// What a slot says: a small page's frame, and the order of the folio that it is part of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Found {
    pub pfn: Pfn,
    pub order: u8,
}

impl Found {
    #[inline]
    pub(super) fn of(word: u64) -> Option<Found> {
        (word != 0).then_some(Found { pfn: Pfn(word as u32), order: (word >> 32) as u8 })
    }
    pub(super) fn word(self) -> u64 {
        self.pfn.0 as u64 | (self.order as u64) << 32
    }
    /// The folio's first frame.
    pub fn folio(self) -> Pfn {
        first_of(self.pfn, self.order)
    }
    /// How many frames of the folio come before.
    pub fn part(self) -> u32 {
        self.pfn.0 - self.folio().0
    }
    /// The indexes of the folio, which the page at `index` is part of.
    pub fn indexes(self, index: u64) -> Range<u64> {
        let first = index >> self.order << self.order;
        first..first + (1 << self.order)
    }
}

/// Pages of one folio in one leaf, from this index on.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub index: u64,
    pub first: Found,
    pub len: usize,
}

impl Run {
    pub fn store(self, leaf: &Leaf) {
        let slots = &leaf[slot_of(self.index, 0)..][..self.len];
        for (slot, i) in slots.iter().zip(0..) {
            debug_assert_eq!(slot.load(), None, "two pages at one index");
            slot.store(Some(Found { pfn: self.first.pfn.add(i), ..self.first }));
        }
    }
}

/// Nodes for an insert, reserved before the lock is taken.
pub struct Nodes<P: Platform> {
    nodes: [Option<Reserved<P, CacheNode<P>>>; MOST],
    pub(super) len: usize,
}

/// An insert needs as many nodes as given: drop the lock, reserve, again.
pub struct Short(pub usize);

impl<P: Platform> Nodes<P> {
    pub const fn new() -> Self {
        Nodes { nodes: [const { None }; MOST], len: 0 }
    }
    /// Sees that there are `n`. Called unpinned, with no lock held.
    pub fn reserve(&mut self, p: &'static P, n: usize) -> Result<(), NoMemory> {
        while self.len < n {
            self.nodes[self.len] = Some(p.vm().or_drain(p, || p.vm().cache_nodes.reserve())?);
            self.len += 1;
        }
        Ok(())
    }
    /// The same with nothing drained for it.
    pub fn reserve_at_hand(&mut self, p: &'static P, n: usize) -> Result<(), NoMemory> {
        while self.len < n {
            self.nodes[self.len] = Some(p.vm().cache_nodes.reserve()?);
            self.len += 1;
        }
        Ok(())
    }
    pub(super) fn make(&mut self, node: CacheNode<P>) -> Option<Shared<P, CacheNode<P>>> {
        self.len = self.len.checked_sub(1)?;
        Some(self.nodes[self.len].take()?.fill(node))
    }
    /// A chain of nodes of its own that holds one run, its top at `shift`.
    pub(super) fn chain(&mut self, shift: u32, run: Run) -> Option<Shared<P, CacheNode<P>>> {
        let mut at = self.make(CacheNode::leaf(run))?;
        for shift in (BITS..=shift).step_by(BITS as usize) {
            at = self.make(CacheNode::inner(shift, run.index, Some(at)))?;
        }
        Some(at)
    }
}

/// The most nodes one removal cuts off.
const MOST_CUT: usize = LEAVES + 1;

/// Nodes cut off; dropped with no lock held.
#[must_use]
pub struct Cut<P: Platform> {
    nodes: [Option<Shared<P, CacheNode<P>>>; 4 * MOST_CUT],
    len: usize,
}

impl<P: Platform> Cut<P> {
    pub const fn new() -> Self {
        Cut { nodes: [const { None }; 4 * MOST_CUT], len: 0 }
    }
    /// Whether there is room for what one removal cuts off.
    pub const fn has_room(&self) -> bool {
        self.len + MOST_CUT <= self.nodes.len()
    }
    pub(super) fn push(&mut self, node: Option<Shared<P, CacheNode<P>>>) {
        if node.is_some() {
            self.nodes[self.len] = node;
            self.len += 1;
        }
    }
}
