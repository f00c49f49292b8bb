//! How new versions of the tree are built: drafts, joins, and the nodes reserved for them.

use super::{Mapping, Node, Subtree, TreeNode, VmaTree};
use crate::mem::{Few, Reserved, Room};
use crate::platform::Platform;
use crate::types::{NoMemory, VirtAddr, VirtRange};

/// The most VMAs one [`VmaTree::replace`] inserts.
pub(crate) const MAX_NEW: usize = 4;

/// The height up to which a tree can be changed; up to 196,416 VMAs make none that is higher.
const MAX_HEIGHT: usize = 24;

const CAPACITY: usize = needed(MAX_HEIGHT, MAX_NEW);

/// The nodes that one `replace` of `new` VMAs in a tree of this height takes, at most.
///
/// Why it suffices: a join of trees whose heights differ by `d > 1` places at most `d` nodes, `d - 1` if the result
/// is higher than both, and one more if the lower tree is a draft; other joins place their drafts. What that adds
/// up to over every path a `replace` can take is computed by `tests::needed_is_enough`, from heights alone.
pub(super) const fn needed(height: usize, new: usize) -> usize {
    4 * height + new + 2
}

fn height<P: Platform>(tree: &Subtree<P>) -> u8 {
    tree.as_ref().map_or(0, |n| n.height)
}

impl<P: Platform> TreeNode<P> {
    /// The child on `side`, and the other.
    fn children(&self, side: Side) -> (&Subtree<P>, &Subtree<P>) {
        match side {
            Side::Low => (&self.left, &self.right),
            Side::High => (&self.right, &self.left),
        }
    }
}

/// A node without a slot.
pub(super) struct Draft<P: Platform> {
    pub left: Subtree<P>,
    pub vma: Mapping<P>,
    pub right: Subtree<P>,
    pub height: u8,
}

/// A tree while it is built.
pub(super) enum Tree<P: Platform> {
    Placed(Subtree<P>),
    Draft(Draft<P>),
}

impl<P: Platform> Tree<P> {
    pub(super) const EMPTY: Self = Tree::Placed(None);

    fn height(&self) -> u8 {
        match self {
            Tree::Placed(tree) => height(tree),
            Tree::Draft(draft) => draft.height,
        }
    }
    /// The root taken out: the subtree on `side`, the VMA, the other subtree.
    fn open(self, side: Side) -> Option<(Subtree<P>, Mapping<P>, Subtree<P>)> {
        let (left, vma, right) = match self {
            Tree::Placed(node) => {
                let n = node?;
                (n.left.clone(), n.vma.clone(), n.right.clone())
            }
            Tree::Draft(d) => (d.left, d.vma, d.right),
        };
        Some(match side {
            Side::Low => (left, vma, right),
            Side::High => (right, vma, left),
        })
    }
}

/// A direction: what is said of one holds, mirrored, of the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    Low,
    High,
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::Low => Side::High,
            Side::High => Side::Low,
        }
    }
}

/// Nodes reserved for changes to a tree, so that these cannot fail.
///
/// Large (1.6 KiB): it lives in its space and is filled up before each change.
pub(crate) struct TreeReserve<P: Platform> {
    slots: [Option<Reserved<P, TreeNode<P>>>; CAPACITY],
    len: usize,
}

impl<P: Platform> TreeReserve<P> {
    /// An empty reserve.
    pub const fn new() -> Self {
        TreeReserve { slots: [const { None }; CAPACITY], len: 0 }
    }
    /// Nodes in reserve.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Reserves what is missing for one [`VmaTree::replace`] in `tree` that inserts at most `new` VMAs. Called with
    /// no pin and no spin lock held; what was reserved stays if the rest cannot be.
    ///
    /// # Errors
    /// [`NoMemory`]; also when the tree is too high, or `new` exceeds [`MAX_NEW`].
    pub fn refill(&mut self, p: &'static P, tree: &VmaTree<P>, new: usize) -> Result<(), NoMemory> {
        let height = tree.height();
        if height > MAX_HEIGHT || new > MAX_NEW {
            return Err(NoMemory);
        }
        let needed = needed(height, new);
        if self.len >= needed {
            return Ok(());
        }
        p.vm().or_drain(p, || {
            p.vm().nodes.reserve_all(needed - self.len, |slot| {
                self.slots[self.len] = Some(slot);
                self.len += 1;
            })
        })
    }

    fn take(&mut self) -> Option<Reserved<P, TreeNode<P>>> {
        self.len = self.len.checked_sub(1)?;
        self.slots[self.len].take()
    }
    /// Gives a draft its slot. From here on the node does not change.
    #[inline]
    pub(super) fn place(&mut self, tree: Tree<P>) -> Subtree<P> {
        match tree {
            Tree::Placed(tree) => tree,
            Tree::Draft(draft) => Some(self.place_draft(draft)),
        }
    }
    fn place_draft(&mut self, draft: Draft<P>) -> Node<P> {
        let slot = self.take().expect("`replace` checked that there are `needed` nodes");
        slot.fill(TreeNode::new(draft))
    }
    /// `a`, `vma`, `b` in this order seen from `side`, the heights of `a` and `b` differing by at most 1.
    #[inline]
    pub(super) fn node(&mut self, side: Side, a: Tree<P>, vma: Mapping<P>, b: Tree<P>) -> Tree<P> {
        let (left, right) = match side {
            Side::Low => (a, b),
            Side::High => (b, a),
        };
        let (left, right) = (self.place(left), self.place(right));
        let (l, r) = (height(&left), height(&right));
        debug_assert!(l.abs_diff(r) <= 1, "a node out of balance: {l}, {r}");
        Tree::Draft(Draft { left, vma, right, height: l.max(r) + 1 })
    }
    /// The same for heights of any difference.
    #[inline]
    fn join(&mut self, side: Side, a: Tree<P>, vma: Mapping<P>, b: Tree<P>) -> Tree<P> {
        let (ha, hb) = (a.height(), b.height());
        if ha.abs_diff(hb) <= 1 {
            return self.node(side, a, vma, b);
        }
        self.join_far(side, a, vma, b)
    }
    /// The same for heights that differ by more than 1.
    fn join_far(&mut self, side: Side, a: Tree<P>, vma: Mapping<P>, b: Tree<P>) -> Tree<P> {
        let (ha, hb) = (a.height(), b.height());
        let (side, tall, low) = if ha > hb { (side, a, b) } else { (side.other(), b, a) };
        let Some((outer, key, inner)) = tall.open(side) else { return Tree::EMPTY };
        let mut path = Path::new();
        let mut at = inner.as_ref();
        while let Some(n) = at.filter(|n| n.height > low.height() + 1) {
            path.push((side, n));
            at = n.children(side).1.as_ref();
        }
        let mut tree = self.node(side, Tree::Placed(at.cloned()), vma, low);
        while let Some((side, n)) = path.pop() {
            tree = self.balance(side, n.children(side).0.clone(), n.vma.clone(), tree);
        }
        self.balance(side, outer, key, tree)
    }
    /// `a`, `vma`, `b` in this order seen from `side`, where `b` is at most 2 higher than `a`: AVL's rotations.
    fn balance(&mut self, side: Side, a: Subtree<P>, vma: Mapping<P>, b: Tree<P>) -> Tree<P> {
        let a = Tree::Placed(a);
        if b.height() <= a.height() + 1 {
            return self.node(side, a, vma, b);
        }
        let Some((near, key, far)) = b.open(side) else { return Tree::EMPTY };
        let (near, far) = (Tree::Placed(near), Tree::Placed(far));
        if near.height() > far.height() {
            let Some((n, middle, f)) = near.open(side) else { return Tree::EMPTY };
            let a = self.node(side, a, vma, Tree::Placed(n));
            let b = self.node(side, Tree::Placed(f), key, far);
            self.node(side, a, middle, b)
        } else {
            let a = self.node(side, a, vma, near);
            self.node(side, a, key, far)
        }
    }
    /// The VMAs of `tree` that lie wholly below `at` (`Low`), or wholly at or above it (`High`).
    fn cut(&mut self, side: Side, tree: &Node<P>, at: VirtAddr) -> Tree<P> {
        let mut tree = Some(tree);
        let inside = |range: VirtRange| match side {
            Side::Low => range.end <= at,
            Side::High => range.start >= at,
        };
        let mut path = Path::new();
        let mut kept = Tree::EMPTY;
        while let Some(n) = tree {
            if inside(n.span) {
                kept = Tree::Placed(Some(n.clone()));
                break;
            }
            let (outer, inner) = n.children(side);
            if inside(n.range) {
                path.push((side, n));
                tree = inner.as_ref();
            } else {
                tree = outer.as_ref();
            }
        }
        self.climb(&mut path, kept)
    }
    /// Joins `tree`, which takes the place of what was below `path`, with what stands beside the path.
    fn climb(&mut self, path: &mut Path<'_, P>, mut tree: Tree<P>) -> Tree<P> {
        while let Some((side, n)) = path.pop() {
            let (outer, _) = n.children(side);
            tree = self.join(side, Tree::Placed(outer.clone()), n.vma.clone(), tree);
        }
        tree
    }
    /// The VMA of `tree` that is outermost on `side`, and the others.
    fn pop(&mut self, side: Side, tree: Tree<P>) -> Option<(Mapping<P>, Tree<P>)> {
        let (outer, vma, inner) = tree.open(side)?;
        let mut path = Path::new();
        let Some(mut last) = outer.as_ref() else { return Some((vma, Tree::Placed(inner))) };
        while let Some(n) = &last.children(side).0 {
            path.push((side.other(), last));
            last = n;
        }
        let outer = self.climb(&mut path, Tree::Placed(last.children(side).1.clone()));
        Some((last.vma.clone(), self.join(side, outer, vma, Tree::Placed(inner))))
    }
    /// A tree of the next `n` VMAs alone.
    fn small(&mut self, n: usize, new: &mut New<'_, P>) -> Tree<P> {
        if n == 0 {
            return Tree::EMPTY;
        }
        let low = if n > 1 { self.small(n / 2, new) } else { Tree::EMPTY };
        let Some(vma) = new.next() else { return low };
        let high = if n > 2 { self.small(n - n / 2 - 1, new) } else { Tree::EMPTY };
        self.node(Side::Low, low, vma, high)
    }
    /// `low`, the next `n` VMAs, `high`.
    fn concat(&mut self, low: Tree<P>, n: usize, new: &mut New<'_, P>, high: Tree<P>) -> Tree<P> {
        if low.height() == 0 && high.height() == 0 {
            return self.small(n, new);
        }
        let Some(first) = new.next() else { return self.concat_two(low, high) };
        let between = self.small(n.saturating_sub(2), new);
        let Some(last) = new.next() else { return self.join(Side::Low, low, first, high) };
        if low.height() <= high.height() {
            let low = self.join(Side::Low, low, first, between);
            self.join(Side::Low, low, last, high)
        } else {
            let high = self.join(Side::Low, between, last, high);
            self.join(Side::Low, low, first, high)
        }
    }
    fn concat_two(&mut self, low: Tree<P>, high: Tree<P>) -> Tree<P> {
        let (side, low, tall) =
            if low.height() > high.height() { (Side::High, high, low) } else { (Side::Low, low, high) };
        match self.pop(side, tall) {
            Some((vma, tall)) => self.join(side, low, vma, tall),
            None => low,
        }
    }
    /// `tree` with `n` new VMAs in the place of those that overlap `range`.
    pub(super) fn change(
        &mut self,
        mut tree: Option<&Node<P>>,
        range: VirtRange,
        n: usize,
        new: &mut New<'_, P>,
    ) -> Tree<P> {
        let mut path = Path::new();
        while let Some(at) = tree {
            let side = if at.range.end <= range.start {
                Side::Low
            } else if at.range.start >= range.end {
                Side::High
            } else {
                break;
            };
            path.push((side, at));
            tree = at.children(side).1.as_ref();
        }
        let (left, right) = tree.map_or((None, None), |at| (at.left.as_ref(), at.right.as_ref()));
        let low = left.map_or(Tree::EMPTY, |tree| self.cut(Side::Low, tree, range.start));
        let high = right.map_or(Tree::EMPTY, |tree| self.cut(Side::High, tree, range.end));
        let changed = self.concat(low, n, new, high);
        self.climb(&mut path, changed)
    }
}

/// Nodes from the root down, each with the side of it that the path leaves aside; `refill` refuses trees that are
/// higher.
type Path<'t, P> = Few<(Side, &'t Node<P>), Room<(Side, &'t Node<P>), MAX_HEIGHT>>;

/// The VMAs to insert.
type New<'a, P> = dyn Iterator<Item = Mapping<P>> + 'a;

#[cfg(all(test, not(loom)))]
mod tests;
