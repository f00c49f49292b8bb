//! The tree of VMAs: persistent, balanced, with the largest gap in each node.
//!
//! Protocol. A node never changes once it is placed. The writer (one at a time: it holds the space's writer lock)
//! copies the path to what it changes into nodes reserved beforehand, shares every other subtree, and publishes the
//! new version with one store of the root. A reader pins, loads the root once, and walks a version that is complete
//! and stays as it is until the pin is dropped: nodes and VMAs only the old version needs are retired by their
//! counts. So nothing here is `unsafe`, and nothing but the reserve allocates.
//!
//! | | find, find_next | writer's queries | replace |
//! |---|---|---|---|
//! | find, find_next | free | free | the reader sees the old version or the new one, whole |
//! | writer's queries, replace | | the space's writer lock | the space's writer lock |
//!
//! Balance is AVL's, kept by `join` alone (Blelloch, Ferizovic, Sun, "Just Join for Parallel Ordered Sets", SPAA
//! 2016). Results of a join stay *drafts*, without a slot, until they become somebody's child, so that what the next
//! join takes apart again costs no node.

mod build;
mod gap;

pub(crate) use build::TreeReserve;
pub(crate) use gap::Order;

use super::{Vma, VmaFlags};
use crate::mem::{Link, Past, Pooled, Shared};
use crate::platform::Platform;
use crate::sync::epoch::Pin;
use crate::types::{NoMemory, PAGE_SIZE, VirtAddr, VirtRange};
pub(crate) use build::MAX_NEW;
use build::{Draft, needed};
use gap::Search;

/// What is kept free below a stack: a search for a gap takes its low edge to be this much lower.
pub(crate) const STACK_GUARD: u64 = 256 * PAGE_SIZE;

type Mapping<P> = Shared<P, Vma<P>>;
type Node<P> = Shared<P, TreeNode<P>>;
type Subtree<P> = Option<Node<P>>;

/// Where the low edge of a VMA counts in a search for a gap.
fn fence(start: VirtAddr, stack: bool) -> VirtAddr {
    VirtAddr(if stack { start.0.saturating_sub(STACK_GUARD) } else { start.0 })
}

fn distance(from: VirtAddr, to: VirtAddr) -> u64 {
    to.0.saturating_sub(from.0)
}

/// One VMA of one or more versions of the tree, and what is known of the subtree below it. Not on the cache line on which it
/// is counted, as a VMA.
#[repr(align(64))]
pub struct TreeNode<P: Platform> {
    vma: Mapping<P>,
    /// The VMA's range, here to spare walks a cache line a level.
    range: VirtRange,
    left: Subtree<P>,
    right: Subtree<P>,
    /// From the subtree's lowest start to its highest end.
    span: VirtRange,
    /// The largest gap between neighbours inside the subtree.
    gap: u64,
    count: u32,
    height: u8,
    /// Whether this VMA is a stack.
    stack: bool,
    /// Whether the subtree's lowest VMA is a stack.
    low_stack: bool,
}

impl<P: Platform> TreeNode<P> {
    fn new(draft: Draft<P>) -> Self {
        let Draft { left, vma, right, height } = draft;
        let range = vma.range;
        let stack = vma.flags.contains(VmaFlags::GROWS_DOWN);
        let mut node = TreeNode {
            vma,
            range,
            left: None,
            right: None,
            span: range,
            gap: 0,
            count: 1,
            height,
            stack,
            low_stack: stack,
        };
        if let Some(l) = &left {
            debug_assert!(l.span.end <= range.start, "VMAs out of order");
            node.gap = l.gap.max(distance(l.span.end, node.fence()));
            node.span.start = l.span.start;
            node.low_stack = l.low_stack;
            node.count += l.count;
        }
        if let Some(r) = &right {
            debug_assert!(range.end <= r.span.start, "VMAs out of order");
            node.gap = node.gap.max(r.gap).max(distance(range.end, r.low_fence()));
            node.span.end = r.span.end;
            node.count += r.count;
        }
        TreeNode { left, right, ..node }
    }
    fn fence(&self) -> VirtAddr {
        fence(self.range.start, self.stack)
    }
    /// Where the subtree's low edge counts in a search for a gap.
    fn low_fence(&self) -> VirtAddr {
        fence(self.span.start, self.low_stack)
    }
    /// The first VMA below this node with an end above `addr`.
    fn first_ending_after(mut at: Option<&Self>, addr: VirtAddr) -> Option<&Self> {
        let mut best = None;
        while let Some(n) = at {
            if n.range.end > addr {
                best = at;
                if n.range.start <= addr {
                    break;
                }
                at = n.left.as_deref();
            } else {
                at = n.right.as_deref();
            }
        }
        best
    }
}

impl<P: Platform> Pooled for TreeNode<P> {
    /// Readers get to a node by the nodes above it alone.
    fn end(&mut self, past: &Past) {
        if let Some(left) = self.left.take() {
            left.end(past);
        }
        if let Some(right) = self.right.take() {
            right.end(past);
        }
    }
}

/// The VMAs of a space, in the order of their addresses, none overlapping.
pub(crate) struct VmaTree<P: Platform> {
    root: Link<P, TreeNode<P>>,
}

impl<P: Platform> VmaTree<P> {
    /// A tree without VMAs.
    pub fn new() -> Self {
        VmaTree { root: Link::new(None) }
    }

    /// The VMA that contains `addr`.
    #[inline]
    pub fn find<'e>(&self, pin: &'e Pin<P>, addr: VirtAddr) -> Option<&'e Vma<P>> {
        let mut at = self.root.load(pin);
        while let Some(n) = at {
            if addr < n.range.start {
                at = n.left.as_deref();
            } else if addr < n.range.end {
                return Some(&n.vma);
            } else {
                at = n.right.as_deref();
            }
        }
        None
    }
    /// The first VMA with an end above `addr`: the one that contains it, or the next one.
    pub fn find_next<'e>(&self, pin: &'e Pin<P>, addr: VirtAddr) -> Option<&'e Vma<P>> {
        TreeNode::first_ending_after(self.root.load(pin), addr).map(|n| &*n.vma)
    }

    // From here on: for the writer, who holds the space's writer lock.

    /// The number of VMAs.
    pub fn len(&self) -> usize {
        self.root.get().map_or(0, |n| n.count as usize)
    }
    /// The number of VMAs, for readers.
    pub fn count(&self, pin: &Pin<P>) -> usize {
        self.root.load(pin).map_or(0, |n| n.count as usize)
    }
    fn height(&self) -> usize {
        self.root.get().map_or(0, |n| n.height as usize)
    }
    /// The VMAs that overlap `range`, ascending; a step is a search of its own, so the tree may change between two.
    /// An empty range overlaps nothing.
    pub fn overlapping(&self, range: VirtRange) -> impl Iterator<Item = Mapping<P>> {
        let mut from = range.start;
        core::iter::from_fn(move || {
            if from >= range.end {
                return None;
            }
            let n =
                TreeNode::first_ending_after(self.root.get(), from).filter(|n| n.range.start < range.end)?;
            from = n.range.end;
            Some(n.vma.clone())
        })
    }
    /// The last VMA that starts below `addr`: it may contain `addr`, end there, or end below it.
    pub fn before(&self, addr: VirtAddr) -> Option<Mapping<P>> {
        let (mut at, mut best) = (self.root.get(), None);
        while let Some(n) = at {
            if n.range.start < addr {
                best = at;
                at = n.right.as_deref();
            } else {
                at = n.left.as_deref();
            }
        }
        best.map(|n| n.vma.clone())
    }
    /// The first VMA that starts at or above `addr`.
    pub fn after(&self, addr: VirtAddr) -> Option<Mapping<P>> {
        let (mut at, mut best) = (self.root.get(), None);
        while let Some(n) = at {
            if n.range.start >= addr {
                best = at;
                at = n.left.as_deref();
            } else {
                at = n.right.as_deref();
            }
        }
        best.map(|n| n.vma.clone())
    }
    /// Whether a VMA shares an address with `range`.
    pub fn overlaps(&self, range: VirtRange) -> bool {
        self.overlapping(range).next().is_some()
    }
    /// Whether `range` neither overlaps a VMA nor reaches into the guard gap of the stack next above it.
    ///
    /// A guard gap ends at the VMA below its stack, wherever that is.
    pub fn is_free(&self, range: VirtRange) -> bool {
        match TreeNode::first_ending_after(self.root.get(), range.start) {
            Some(n) => n.fence() >= range.end,
            None => true,
        }
    }

    /// Nodes for one [`replace`](VmaTree::replace) that inserts at most `new` VMAs into the tree as it is.
    ///
    /// # Errors
    /// As for [`TreeReserve::refill`], which spares the large value its way through the stack.
    pub fn reserve(&self, p: &'static P, new: usize) -> Result<TreeReserve<P>, NoMemory> {
        let mut reserve = TreeReserve::new();
        reserve.refill(p, self, new)?;
        Ok(reserve)
    }

    /// Another tree that shares every node with this one, to be changed while this one stays as it is.
    pub fn fork(&self) -> Self {
        VmaTree { root: Link::new(self.root.share()) }
    }
    /// Becomes `next`, with one store; nothing is left of that.
    pub fn adopt(&self, next: &Self) {
        drop(self.root.replace(next.root.replace(None)));
    }

    /// Removes every VMA that overlaps `range`, inserts the new ones in their place, and publishes both with one
    /// store. The new ones are taken out of the slice; they are in order, overlap neither each other nor what stays, and
    /// are at most [`MAX_NEW`].
    ///
    /// # Panics
    /// When the reserve was not filled for this tree and this many VMAs: never half-way, never for want of memory.
    pub fn replace(&self, range: VirtRange, new: &mut [Option<Mapping<P>>], reserve: &mut TreeReserve<P>) {
        debug_assert!(!range.is_empty());
        let n = new.len();
        debug_assert!(n <= MAX_NEW && new.iter().all(Option::is_some));
        assert!(reserve.len() >= needed(self.height(), n), "a reserve that was not filled");
        let old = self.root.share();
        let mut new = new.iter_mut().filter_map(Option::take);
        let tree = reserve.change(old.as_ref(), range, n, &mut new);
        let tree = reserve.place(tree);
        drop(self.root.replace(tree));
    }

    /// The highest or lowest multiple of `align`, a power of two, from which `len` bytes are free and inside
    /// `within`, guard gaps of stacks spared as in [`is_free`](VmaTree::is_free).
    ///
    /// It looks only where a gap of `len` bytes is: O(log n), plus as much for each such gap that alignment or
    /// `within` makes too short.
    pub fn gap(&self, len: u64, align: u64, within: VirtRange, order: Order) -> Option<VirtAddr> {
        debug_assert!(align.is_power_of_two());
        if len == 0 {
            return None;
        }
        let whole = VirtRange::new(VirtAddr(0), VirtAddr(u64::MAX));
        Search { len, align, within, order }.below(self.root.get(), whole)
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
