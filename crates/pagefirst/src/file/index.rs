//! The index of a cache: a radix tree from a page's index to its frame.
//!
//! Nodes have 64 slots; a leaf's hold frame numbers, the others' hold links. The tree is as high as its largest
//! index asks for, no node of it is empty, and its top node never has its first child alone. [`Writer`] is the
//! proof that the cache's lock is held. Huge folios will use the upper half of a leaf's words, and slots of inner
//! nodes, for their order.
//!
//! | | look up, scan | insert | remove |
//! |---|---|---|---|
//! | look up, scan | free | finds the chain of new nodes whole, or not at all: one store publishes it | slots are emptied; nodes cut off stay readable while pinned, empty for ever |
//! | insert | | the lock | the lock |
//! | remove | | | the lock |
//!
//! "Not there" is an answer a reader may get while a writer is at work; only a writer knows.

use crate::mem::{Link, Pooled, Reserved, Shared};
use crate::platform::Platform;
use crate::sync::atomic::plain;
use crate::sync::atomic::{Acquire, AtomicU64, Relaxed, Release};
use crate::sync::epoch::Pin;
use crate::types::{NoMemory, Pfn};
use core::ops::ControlFlow::{self, Continue};

const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;
/// The largest index: that of the last page of 2^64 bytes.
pub(super) const LAST_INDEX: u64 = u64::MAX >> crate::types::PAGE_SHIFT;
/// The height that holds it.
const LEVELS: usize = LAST_INDEX.ilog2() as usize / BITS as usize + 1;
/// The most nodes one insert needs: a tree of one leaf grows to full height, with a branch of its own for the new page.
const MOST: usize = 2 * (LEVELS - 1);

/// A node of a cache's index.
pub struct CacheNode<P: Platform> {
    /// Bits of an index below those that select a slot; 0 in a leaf.
    shift: u32,
    /// Slots in use; writers only.
    used: plain::AtomicU32,
    slots: Slots<P>,
}

type Leaf = [AtomicU64; SLOTS];

impl<P: Platform> Pooled for CacheNode<P> {}

enum Slots<P: Platform> {
    Leaf(Leaf),
    Inner([Link<P, CacheNode<P>>; SLOTS]),
}

impl<P: Platform> CacheNode<P> {
    fn leaf(index: u64, pfn: Pfn) -> Self {
        let slots: [_; SLOTS] = core::array::from_fn(|_| AtomicU64::new(0));
        slots[slot_of(index, 0)].store(pfn.0 as u64, Relaxed);
        CacheNode { shift: 0, used: plain::AtomicU32::new(1), slots: Slots::Leaf(slots) }
    }
    fn inner(shift: u32, index: u64, mut child: Option<Shared<P, CacheNode<P>>>) -> Self {
        let at = slot_of(index, shift);
        let slots = core::array::from_fn(|i| Link::new(if i == at { child.take() } else { None }));
        CacheNode { shift, used: plain::AtomicU32::new(1), slots: Slots::Inner(slots) }
    }
    fn reaches(&self, index: u64) -> bool {
        index >> (self.shift + BITS) == 0
    }
    fn used(&self) -> u32 {
        self.used.load(Relaxed)
    }
    fn count(&self, delta: i32) {
        self.used.store(self.used().wrapping_add_signed(delta), Relaxed);
    }
}

fn slot_of(index: u64, shift: u32) -> usize {
    (index >> shift) as usize & (SLOTS - 1)
}

/// The shift of the top node of the lowest tree that reaches `index`.
fn top_shift(index: u64) -> u32 {
    index.max(1).ilog2() / BITS * BITS
}

fn to_pfn(word: u64) -> Option<Pfn> {
    (word != 0).then_some(Pfn(word as u32))
}

/// Possession proves that the cache's lock is held.
pub(super) struct Writer {
    pages: u64,
}

impl Writer {
    /// For the lock to hold.
    pub const fn new() -> Self {
        Writer { pages: 0 }
    }
    /// Pages in the index.
    pub const fn pages(&self) -> u64 {
        self.pages
    }
}

/// Nodes for an insert, reserved before the lock is taken.
pub(super) struct Nodes<P: Platform> {
    nodes: [Option<Reserved<P, CacheNode<P>>>; MOST],
    len: usize,
}

/// An insert needs as many nodes as given: drop the lock, reserve, again.
pub(super) struct Short(pub usize);

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
    fn make(&mut self, node: CacheNode<P>) -> Option<Shared<P, CacheNode<P>>> {
        self.len = self.len.checked_sub(1)?;
        Some(self.nodes[self.len].take()?.fill(node))
    }
    /// A chain of nodes of its own that holds one page, its top at `shift`.
    fn chain(&mut self, shift: u32, index: u64, pfn: Pfn) -> Option<Shared<P, CacheNode<P>>> {
        let mut at = self.make(CacheNode::leaf(index, pfn))?;
        for shift in (BITS..=shift).step_by(BITS as usize) {
            at = self.make(CacheNode::inner(shift, index, Some(at)))?;
        }
        Some(at)
    }
}

/// What a removal cut off; dropped with no lock held.
pub(super) type Cut<P> = [Option<Shared<P, CacheNode<P>>>; 2];

/// Where a page is to be put.
enum Place<'a, P: Platform> {
    /// There is no tree.
    Nowhere,
    /// Beyond the reach of the tree.
    Above(&'a CacheNode<P>),
    /// Below a slot of this inner node, which is empty.
    Below(&'a CacheNode<P>, &'a Link<P, CacheNode<P>>),
    /// Into this slot of a leaf.
    Slot(&'a CacheNode<P>, &'a AtomicU64),
}

/// The tree.
pub(super) struct Index<P: Platform> {
    top: Link<P, CacheNode<P>>,
}

impl<P: Platform> Index<P> {
    pub fn new() -> Self {
        Index { top: Link::new(None) }
    }

    /// The leaf that has the slot of the page at `index`.
    #[inline]
    fn leaf<'e>(&'e self, pin: &'e Pin<P>, index: u64) -> Option<&'e Leaf> {
        let mut node = self.top.load(pin)?;
        if !node.reaches(index) {
            return None;
        }
        loop {
            match &node.slots {
                Slots::Leaf(slots) => return Some(slots),
                Slots::Inner(links) => node = links[slot_of(index, node.shift)].load(pin)?,
            }
        }
    }
    /// The slot of the page at `index`, if it has a leaf.
    #[inline]
    pub fn slot<'e>(&'e self, pin: &'e Pin<P>, index: u64) -> Option<Slot<'e>> {
        Some(Slot(&self.leaf(pin, index)?[slot_of(index, 0)]))
    }

    /// Calls `f` on the pages from `first` to `last`, in order.
    pub fn scan<'e, B>(
        &'e self,
        pin: &'e Pin<P>,
        first: u64,
        last: u64,
        f: &mut impl FnMut(u64, Pfn) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let follow = |link: &'e Link<P, CacheNode<P>>| link.load(pin);
        match self.top.load(pin) {
            Some(top) => scan(top, 0, first, last, &follow, f),
            None => Continue(()),
        }
    }

    /// Takes every page out, for a cache that is going away.
    pub fn empty(&mut self, mut f: impl FnMut(Pfn)) {
        let mut each = |_, pfn| {
            f(pfn);
            Continue::<()>(())
        };
        if let Some(top) = self.top.get() {
            let _ = scan(top, 0, 0, LAST_INDEX, &|link| link.get(), &mut each);
        }
    }

    fn place(&self, index: u64) -> Place<'_, P> {
        let Some(mut node) = self.top.get() else { return Place::Nowhere };
        if !node.reaches(index) {
            return Place::Above(node);
        }
        loop {
            match &node.slots {
                Slots::Leaf(slots) => return Place::Slot(node, &slots[slot_of(index, 0)]),
                Slots::Inner(links) => {
                    let link = &links[slot_of(index, node.shift)];
                    match link.get() {
                        Some(child) => node = child,
                        None => return Place::Below(node, link),
                    }
                }
            }
        }
    }

    /// The page at `index`.
    pub fn get(&self, _: &Writer, index: u64) -> Option<Pfn> {
        match self.place(index) {
            Place::Slot(_, slot) => to_pfn(slot.load(Acquire)),
            _ => None,
        }
    }

    /// Puts a page where none is. On failure nothing has changed.
    pub fn insert(&self, w: &mut Writer, index: u64, pfn: Pfn, nodes: &mut Nodes<P>) -> Result<(), Short> {
        debug_assert!(index <= LAST_INDEX && pfn.0 != 0);
        let place = self.place(index);
        let level = |shift: u32| (shift / BITS) as usize;
        let need = match place {
            Place::Nowhere => level(top_shift(index)) + 1,
            Place::Above(top) => level(top_shift(index) - top.shift) + level(top_shift(index)),
            Place::Below(node, _) => level(node.shift),
            Place::Slot(..) => 0,
        };
        if nodes.len < need {
            return Err(Short(need));
        }
        let short = || Short(need);
        // A link replaced below is an empty one, or one whose node lives on in the new tree: nothing goes to limbo.
        match place {
            Place::Nowhere => {
                let top = nodes.chain(top_shift(index), index, pfn).ok_or_else(short)?;
                drop(self.top.replace(Some(top)));
            }
            Place::Above(old) => {
                let shift = top_shift(index);
                let branch = nodes.chain(shift - BITS, index, pfn).ok_or_else(short)?;
                let mut spine = self.top.share().ok_or_else(short)?;
                for shift in (old.shift + BITS..shift).step_by(BITS as usize) {
                    spine = nodes.make(CacheNode::inner(shift, 0, Some(spine))).ok_or_else(short)?;
                }
                let top = CacheNode::inner(shift, index, Some(branch));
                top.count(1);
                if let Slots::Inner(links) = &top.slots {
                    drop(links[0].replace(Some(spine)));
                }
                drop(self.top.replace(Some(nodes.make(top).ok_or_else(short)?)));
            }
            Place::Below(node, link) => {
                let branch = nodes.chain(node.shift - BITS, index, pfn).ok_or_else(short)?;
                drop(link.replace(Some(branch)));
                node.count(1);
            }
            Place::Slot(leaf, slot) => {
                debug_assert_eq!(slot.load(Relaxed), 0, "two pages at one index");
                slot.store(pfn.0 as u64, Release);
                leaf.count(1);
            }
        }
        w.pages += 1;
        Ok(())
    }

    /// Takes the page at `index` out, and the nodes that would be empty without it.
    pub fn remove(&self, w: &mut Writer, index: u64) -> Option<(Pfn, Cut<P>)> {
        let mut node = self.top.get().filter(|top| top.reaches(index))?;
        let (mut link, mut parent) = (&self.top, None);
        // The highest node that holds this page alone: the link to it, and the node that has the link.
        let mut alone = None;
        let slot = loop {
            match (node.used(), alone) {
                (1, None) => alone = Some((link, parent)),
                (1, Some(_)) => {}
                _ => alone = None,
            }
            match &node.slots {
                Slots::Leaf(slots) => break &slots[slot_of(index, 0)],
                Slots::Inner(links) => {
                    (link, parent) = (&links[slot_of(index, node.shift)], Some(node));
                    node = link.get()?;
                }
            }
        };
        let pfn = to_pfn(slot.load(Acquire))?;
        // Emptied even in a leaf that is cut off: readers may be there still.
        slot.store(0, Release);
        w.pages -= 1;
        let cut = match alone {
            Some((link, parent)) => {
                if let Some(parent) = parent {
                    parent.count(-1);
                }
                link.replace(None)
            }
            None => {
                node.count(-1);
                None
            }
        };
        Some((pfn, [cut, self.lower()]))
    }

    /// Takes off the top what has its first child alone.
    fn lower(&self) -> Option<Shared<P, CacheNode<P>>> {
        let mut link = &self.top;
        while let Some(node) = link.get()
            && node.used() == 1
            && let Slots::Inner(links) = &node.slots
            && links[0].get().is_some()
        {
            link = &links[0];
        }
        if core::ptr::eq(link, &self.top) { None } else { self.top.replace(link.share()) }
    }
}

/// A leaf's slot as a reader sees it.
#[derive(Clone, Copy)]
pub(super) struct Slot<'e>(&'e AtomicU64);

impl Slot<'_> {
    #[inline]
    pub fn load(self) -> Option<Pfn> {
        to_pfn(self.0.load(Acquire))
    }
}

/// Looks pages up one after the other; those of one leaf by one walk.
pub(crate) struct Cursor<'e, P: Platform> {
    index: &'e Index<P>,
    pin: &'e Pin<P>,
    /// The leaf looked at last, if there was one, and which.
    leaf: Option<&'e Leaf>,
    at: u64,
}

impl<'e, P: Platform> Cursor<'e, P> {
    #[inline]
    pub(super) fn new(index: &'e Index<P>, pin: &'e Pin<P>) -> Self {
        Cursor { index, pin, leaf: None, at: u64::MAX }
    }
    /// The frame in the slot for `index`: the page's at that moment, perhaps not up to date. Nothing is held for it.
    #[inline]
    pub fn look(&mut self, index: u64) -> Option<Pfn> {
        if self.at != index >> BITS {
            self.at = index >> BITS;
            self.leaf = self.index.leaf(self.pin, index);
        }
        Slot(&self.leaf?[slot_of(index, 0)]).load()
    }
}

fn scan<'n, P: Platform, B>(
    node: &'n CacheNode<P>,
    base: u64,
    first: u64,
    last: u64,
    follow: &impl Fn(&'n Link<P, CacheNode<P>>) -> Option<&'n CacheNode<P>>,
    f: &mut impl FnMut(u64, Pfn) -> ControlFlow<B>,
) -> ControlFlow<B> {
    if last < base {
        return Continue(());
    }
    let from = (first.saturating_sub(base) >> node.shift).min(SLOTS as u64);
    let to = ((last - base) >> node.shift).saturating_add(1).min(SLOTS as u64);
    for i in from..to {
        let at = base + (i << node.shift);
        match &node.slots {
            Slots::Leaf(slots) => {
                if let Some(pfn) = to_pfn(slots[i as usize].load(Acquire)) {
                    f(at, pfn)?;
                }
            }
            Slots::Inner(links) => {
                if let Some(child) = follow(&links[i as usize]) {
                    scan(child, at, first, last, follow, f)?;
                }
            }
        }
    }
    Continue(())
}
