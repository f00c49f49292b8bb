//! A tree of objects that are in it by links of their own.
//!
//! So to put one in or take one out needs no memory, and an exit cannot fail (`docs/decisions/015`). It is AVL-balanced, in
//! the order of [`Place`], and every node knows the last index below it. A spin lock, a leaf of the lock order, is held for
//! one step of it.
//!
//! | | look for the next | put in | take out |
//! |---|---|---|---|
//! | look for the next | the lock | the lock; one put in behind the place looked at is not seen | what was found stays, counted |
//! | put in, take out | | the lock | the lock |

use crate::mem::Shared;
use crate::platform::Platform;
use crate::sync::{Key, Keyed};
use core::cmp::Ordering;
use core::mem::take;

/// What a tree is of, and in which order.
pub(crate) trait Order<P: Platform>: Sized + 'static {
    /// What is in it.
    type Node: 'static;
    /// A node's links for this tree.
    fn links(node: &Self::Node) -> &Keyed<Links<P, Self>>;
    /// Where it is, for ever.
    fn place(node: &Self::Node) -> Place;
    /// The last index that it has.
    fn last(node: &Self::Node) -> u64;
}

/// A node's place: by the first index that it has, then by a number that is its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Place {
    pub first: u64,
    pub id: u64,
}

type Node<P, O> = Shared<P, <O as Order<P>>::Node>;
type Subtree<P, O> = Option<Node<P, O>>;

/// What a node has for a tree that it is in, or may be.
pub(crate) struct Links<P: Platform, O: Order<P>> {
    /// What comes before, and what comes after.
    below: [Subtree<P, O>; 2],
    height: u8,
    /// The largest index of this node and those below it.
    last: u64,
}

impl<P: Platform, O: Order<P>> Links<P, O> {
    /// Of a node that is in no tree yet.
    pub const fn new() -> Self {
        Links { below: [None, None], height: 1, last: 0 }
    }
}

/// The tree and its nodes own each other, so all are taken out before the last owner of the tree goes.
pub(crate) struct Tree<P: Platform, O: Order<P>> {
    key: Key,
    root: Subtree<P, O>,
    came: u64,
}

impl<P: Platform, O: Order<P>> Tree<P, O> {
    /// One without nodes.
    pub const fn new() -> Self {
        Tree { key: Key::new(), root: None, came: 0 }
    }
    /// How many nodes were ever put in.
    pub fn came(&self) -> u64 {
        self.came
    }
    /// What opens the values that belong to this tree's lock.
    pub fn key(&mut self) -> &mut Key {
        &mut self.key
    }

    /// Puts a node in, if it is not there.
    pub fn insert(&mut self, node: &Node<P, O>) {
        if !O::links(node).bind(&self.key) {
            return;
        }
        O::links(node).get_mut(&mut self.key).last = O::last(node);
        let root = self.root.take();
        self.root = Some(insert::<P, O>(&mut self.key, root, node.clone()));
        self.came += 1;
    }

    /// Takes a node out, if it is there; for ever. What is returned is dropped with no lock held.
    pub fn remove(&mut self, node: &O::Node) -> Option<Node<P, O>> {
        if !O::links(node).is_bound(&self.key) {
            return None;
        }
        let root = self.root.take();
        let (root, out) = remove::<P, O>(&mut self.key, root, O::place(node));
        self.root = root;
        out
    }

    /// The first node behind `after` that has an index of `first..=last`, and its place.
    pub fn next(&self, after: Option<Place>, first: u64, last: u64) -> Option<(Place, Node<P, O>)> {
        let found = next::<P, O>(&self.key, self.root.as_ref(), after, first, last)?;
        Some((O::place(found), found.clone()))
    }
}

fn height<P: Platform, O: Order<P>>(key: &Key, tree: &Subtree<P, O>) -> u8 {
    tree.as_ref().map_or(0, |node| O::links(node).get(key).height)
}

fn next<'t, P: Platform, O: Order<P>>(
    key: &'t Key,
    tree: Option<&'t Node<P, O>>,
    after: Option<Place>,
    first: u64,
    until: u64,
) -> Option<&'t Node<P, O>> {
    let node = tree?;
    let Links { below: [before, behind], last: most, .. } = O::links(node).get(key);
    if *most < first {
        return None;
    }
    let at = O::place(node);
    if after.is_none_or(|after| after < at) {
        let found = next::<P, O>(key, before.as_ref(), after, first, until);
        if found.is_some() {
            return found;
        }
        if at.first > until {
            return None;
        }
        if O::last(node) >= first {
            return Some(node);
        }
    }
    next::<P, O>(key, behind.as_ref(), after, first, until)
}

fn insert<P: Platform, O: Order<P>>(key: &mut Key, tree: Subtree<P, O>, new: Node<P, O>) -> Node<P, O> {
    let Some(node) = tree else { return new };
    let side = (O::place(&node) < O::place(&new)) as usize;
    let below = take(&mut O::links(&node).get_mut(key).below[side]);
    let below = insert::<P, O>(key, below, new);
    O::links(&node).get_mut(key).below[side] = Some(below);
    balance::<P, O>(key, node)
}

/// The tree without the node at `at`, and that node.
fn remove<P: Platform, O: Order<P>>(
    key: &mut Key,
    tree: Subtree<P, O>,
    at: Place,
) -> (Subtree<P, O>, Subtree<P, O>) {
    let Some(node) = tree else { return (None, None) };
    let side = match at.cmp(&O::place(&node)) {
        Ordering::Equal => {
            let [before, behind] = take(&mut O::links(&node).get_mut(key).below);
            return (join::<P, O>(key, before, behind), Some(node));
        }
        Ordering::Less => 0,
        Ordering::Greater => 1,
    };
    let below = take(&mut O::links(&node).get_mut(key).below[side]);
    let (below, out) = remove::<P, O>(key, below, at);
    O::links(&node).get_mut(key).below[side] = below;
    (Some(balance::<P, O>(key, node)), out)
}

/// Both sides of a node that was taken out.
fn join<P: Platform, O: Order<P>>(
    key: &mut Key,
    before: Subtree<P, O>,
    behind: Subtree<P, O>,
) -> Subtree<P, O> {
    let Some(behind) = behind else { return before };
    let (behind, least) = remove_least::<P, O>(key, behind);
    O::links(&least).get_mut(key).below = [before, behind];
    Some(balance::<P, O>(key, least))
}

fn remove_least<P: Platform, O: Order<P>>(key: &mut Key, node: Node<P, O>) -> (Subtree<P, O>, Node<P, O>) {
    let below = &mut O::links(&node).get_mut(key).below;
    let Some(before) = take(&mut below[0]) else { return (take(&mut below[1]), node) };
    let (before, least) = remove_least::<P, O>(key, before);
    O::links(&node).get_mut(key).below[0] = before;
    (Some(balance::<P, O>(key, node)), least)
}

/// What a node knows of those below it.
fn refresh<P: Platform, O: Order<P>>(key: &mut Key, node: &O::Node) {
    let (mut height, mut most) = (0, O::last(node));
    for below in O::links(node).get(key).below.iter().flatten() {
        let below = O::links(below).get(key);
        height = height.max(below.height);
        most = most.max(below.last);
    }
    let links = O::links(node).get_mut(key);
    (links.height, links.last) = (height + 1, most);
}

/// How much higher what comes behind is than what comes before.
fn lean<P: Platform, O: Order<P>>(key: &Key, node: &O::Node) -> i32 {
    let [before, behind] = &O::links(node).get(key).below;
    height::<P, O>(key, behind) as i32 - height::<P, O>(key, before) as i32
}

/// The top of a tree of which one side may have become one higher, or lower, than balance allows.
fn balance<P: Platform, O: Order<P>>(key: &mut Key, node: Node<P, O>) -> Node<P, O> {
    let side = match lean::<P, O>(key, &node) {
        -1..=1 => {
            refresh::<P, O>(key, &node);
            return node;
        }
        lean => (lean > 0) as usize,
    };
    let Some(below) = take(&mut O::links(&node).get_mut(key).below[side]) else { return node };
    let lean = lean::<P, O>(key, &below);
    let leans_back = if side == 1 { lean < 0 } else { lean > 0 };
    let below = if leans_back { rotate::<P, O>(key, below, 1 - side) } else { below };
    O::links(&node).get_mut(key).below[side] = Some(below);
    rotate::<P, O>(key, node, side)
}

/// Puts what is on that side of the top in its place.
fn rotate<P: Platform, O: Order<P>>(key: &mut Key, node: Node<P, O>, side: usize) -> Node<P, O> {
    let Some(up) = take(&mut O::links(&node).get_mut(key).below[side]) else { return node };
    O::links(&node).get_mut(key).below[side] = take(&mut O::links(&up).get_mut(key).below[1 - side]);
    refresh::<P, O>(key, &node);
    O::links(&up).get_mut(key).below[1 - side] = Some(node);
    refresh::<P, O>(key, &up);
    up
}

#[cfg(all(test, not(loom)))]
mod tests;
