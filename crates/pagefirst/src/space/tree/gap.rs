//! The search for a gap that is large enough.

use super::{TreeNode, distance};
use crate::platform::Platform;
use crate::types::{VirtAddr, VirtRange};

/// Where in a gap a mapping goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Order {
    /// As high as possible.
    TopDown,
    /// As low as possible.
    BottomUp,
}

/// A search for a gap.
pub(super) struct Search {
    pub len: u64,
    pub align: u64,
    pub within: VirtRange,
    pub order: Order,
}

impl Search {
    /// The best address below `node`; `between` reaches from the end of the VMA before the subtree to the low edge
    /// of the one after it.
    pub fn below<P: Platform>(&self, node: Option<&TreeNode<P>>, between: VirtRange) -> Option<VirtAddr> {
        let Some(n) = node else { return self.fit(between) };
        let inner = if n.span.overlaps(self.within) { n.gap } else { 0 };
        let before = self.room(VirtRange::new(between.start, n.low_fence()));
        let after = self.room(VirtRange { start: n.span.end, end: between.end });
        if inner.max(before).max(after) < self.len {
            return None;
        }
        let low = || self.below(n.left.as_deref(), VirtRange { start: between.start, end: n.fence() });
        let high = || self.below(n.right.as_deref(), VirtRange { start: n.range.end, end: between.end });
        match self.order {
            Order::TopDown => high().or_else(low),
            Order::BottomUp => low().or_else(high),
        }
    }
    /// How much of a gap, whose end may lie before its start, is inside `within`.
    fn room(&self, gap: VirtRange) -> u64 {
        distance(gap.start.max(self.within.start), gap.end.min(self.within.end))
    }
    /// The best address in one gap.
    fn fit(&self, gap: VirtRange) -> Option<VirtAddr> {
        if self.room(gap) < self.len {
            return None;
        }
        let gap = gap.intersect(self.within);
        match self.order {
            Order::TopDown => {
                let at = VirtAddr(gap.end.0 - self.len).align_down(self.align);
                (at >= gap.start).then_some(at)
            }
            Order::BottomUp => {
                let at = gap.start.align_up(self.align)?;
                (distance(at, gap.end) >= self.len).then_some(at)
            }
        }
    }
}
