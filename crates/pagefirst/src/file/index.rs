//! The index of a cache: a radix tree from a page's index to its frame.
//!
//! Nodes have 64 slots; a leaf's hold frame numbers, the others' hold links. The tree is as high as its largest
//! index asks for, no node of it is empty, and its top node never has its first child alone. [`Writer`] is the
//! proof that the cache's lock is held.
//!
//! A large folio has a slot for each of its small pages, with the page's own frame and the folio's order in it; so what
//! makes it into small pages needs no node (`docs/decisions/011`). Folios lie at multiples of their size in the file.
//!
//! | | look up, scan | insert | remove |
//! |---|---|---|---|
//! | look up, scan | free | finds the chain of new nodes whole, or not at all: one store publishes it | slots are emptied; nodes cut off stay readable while pinned, empty for ever |
//! | insert | | the lock | the lock |
//! | remove | | | the lock |
//!
//! "Not there" is an answer a reader may get while a writer is at work; only a writer knows.

use super::truncate::Removal;
use crate::mem::{Link, Pooled, Shared};
use crate::platform::Platform;
use crate::sync::atomic::plain;
use crate::sync::atomic::{Acquire, AtomicU64, Relaxed, Release};
use crate::sync::epoch::Pin;
use crate::types::Pfn;
use core::ops::ControlFlow::{self, Break, Continue};

mod parts;

pub(crate) use parts::Found;
use parts::Run;
pub(super) use parts::{Cut, Nodes, Short};

const BITS: u32 = 6;
const SLOTS: usize = 1 << BITS;
/// The largest index: that of the last page of 2^64 bytes.
pub(super) const LAST_INDEX: u64 = u64::MAX >> crate::types::PAGE_SHIFT;
/// The height that holds it.
const LEVELS: usize = LAST_INDEX.ilog2() as usize / BITS as usize + 1;
/// log2 of the pages of the largest folio.
pub const MAX_FOLIO_ORDER: u8 = 9;
/// The leaves it fills.
const LEAVES: usize = (1 << MAX_FOLIO_ORDER) / SLOTS;
/// The most nodes one insert needs: a tree of one leaf grows to full height, with a branch of its own for the new page,
/// and leaves beside it.
const MOST: usize = 2 * (LEVELS - 1) + LEAVES - 1;

/// A node of a cache's index.
pub struct CacheNode<P: Platform> {
    /// Bits of an index below those that select a slot; 0 in a leaf.
    shift: u32,
    /// Slots in use; writers only.
    used: plain::AtomicU32,
    slots: Slots<P>,
}

/// A leaf's slot: what a reader sees of it, he sees in one load.
#[derive(Debug)]
pub(crate) struct PageSlot(AtomicU64);

impl PageSlot {
    #[inline]
    pub fn load(&self) -> Option<Found> {
        Found::of(self.0.load(Acquire))
    }
    fn store(&self, found: Option<Found>) {
        self.0.store(found.map_or(0, Found::word), Release);
    }
}

type Leaf = [PageSlot; SLOTS];

impl<P: Platform> Pooled for CacheNode<P> {}

enum Slots<P: Platform> {
    Leaf(Leaf),
    Inner([Link<P, CacheNode<P>>; SLOTS]),
}

impl<P: Platform> CacheNode<P> {
    fn leaf(run: Run) -> Self {
        let slots: [_; SLOTS] = core::array::from_fn(|_| PageSlot(AtomicU64::new(0)));
        run.store(&slots);
        CacheNode { shift: 0, used: plain::AtomicU32::new(run.len as u32), slots: Slots::Leaf(slots) }
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

/// Possession proves that the cache's lock is held.
pub(super) struct Writer {
    pages: u64,
    /// What is being removed: nothing is inserted there.
    pub removal: Option<Removal>,
}

impl Writer {
    /// For the lock to hold.
    pub const fn new() -> Self {
        Writer { pages: 0, removal: None }
    }
    /// Pages in the index.
    pub const fn pages(&self) -> u64 {
        self.pages
    }
}

/// Where a run is to be put.
enum Place<'a, P: Platform> {
    /// There is no tree.
    Nowhere,
    /// Beyond the reach of the tree.
    Above(&'a CacheNode<P>),
    /// Below a slot of this inner node, which is empty.
    Below(&'a CacheNode<P>, &'a Link<P, CacheNode<P>>),
    /// Into this leaf.
    Leaf(&'a CacheNode<P>, &'a Leaf),
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
    pub fn slot<'e>(&'e self, pin: &'e Pin<P>, index: u64) -> Option<&'e PageSlot> {
        Some(&self.leaf(pin, index)?[slot_of(index, 0)])
    }

    /// Calls `f` on the folios of which there are pages from `first` to `last`, in order: with the first such page of
    /// each.
    pub fn scan<'e, B>(
        &'e self,
        pin: &'e Pin<P>,
        mut first: u64,
        last: u64,
        f: &mut impl FnMut(u64, Found) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let follow = |link: &'e Link<P, CacheNode<P>>| link.load(pin);
        match self.top.load(pin) {
            Some(top) => scan(top, 0, &mut first, last, &follow, f),
            None => Continue(()),
        }
    }

    /// Calls `f` with every folio of a cache that is going away, which nobody changes any more.
    pub fn each(&self, mut f: impl FnMut(Pfn)) {
        let mut each = |_, found: Found| {
            f(found.folio());
            Continue::<()>(())
        };
        if let Some(top) = self.top.get() {
            let _ = scan(top, 0, &mut 0, LAST_INDEX, &|link| link.get(), &mut each);
        }
    }

    fn place(&self, index: u64) -> Place<'_, P> {
        let Some(mut node) = self.top.get() else { return Place::Nowhere };
        if !node.reaches(index) {
            return Place::Above(node);
        }
        loop {
            match &node.slots {
                Slots::Leaf(slots) => return Place::Leaf(node, slots),
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
    pub fn get(&self, _: &Writer, index: u64) -> Option<Found> {
        match self.place(index) {
            Place::Leaf(_, slots) => slots[slot_of(index, 0)].load(),
            _ => None,
        }
    }

    /// The order of the largest folio, at most of order `most`, that has room and holds the page at `index`; `None` when
    /// that is there.
    pub fn room(&self, _: &Writer, index: u64, most: u8) -> Option<u8> {
        let mut order = most;
        let mut each = |at: u64, found: Found| {
            if found.indexes(at).contains(&index) {
                return Break(());
            }
            // Aligned: any folio that holds both is larger than what differs.
            order = order.min((at ^ index).ilog2() as u8);
            Continue(())
        };
        let first = index >> most << most;
        let last = first | ((1 << most) - 1);
        let stopped =
            self.top.get().map(|top| scan(top, 0, &mut { first }, last, &|link| link.get(), &mut each));
        if stopped.is_some_and(|flow| flow.is_break()) { None } else { Some(order) }
    }

    /// Nodes needed to put a run at `index`.
    fn need(&self, index: u64) -> usize {
        let level = |shift: u32| (shift / BITS) as usize;
        match self.place(index) {
            Place::Nowhere => level(top_shift(index)) + 1,
            Place::Above(top) => level(top_shift(index) - top.shift) + level(top_shift(index)),
            Place::Below(node, _) => level(node.shift),
            Place::Leaf(..) => 0,
        }
    }

    /// Puts a folio where there is room, its first page at `index`. On failure nothing has changed.
    pub fn insert(
        &self,
        w: &mut Writer,
        index: u64,
        folio: Found,
        nodes: &mut Nodes<P>,
    ) -> Result<(), Short> {
        let pages = 1 << folio.order;
        debug_assert!(index + pages as u64 - 1 <= LAST_INDEX && folio.pfn.0 != 0);
        debug_assert!(folio.order <= MAX_FOLIO_ORDER && index.is_multiple_of(pages as u64));
        let len = pages.min(SLOTS);
        let at = |leaf: usize| index + (leaf * SLOTS) as u64;
        // The last leaf first: then the tree reaches all of them, and the node above them is there.
        let last = pages / len - 1;
        let missing = (0..last).filter(|leaf| !matches!(self.place(at(*leaf)), Place::Leaf(..))).count();
        let need = self.need(at(last)) + missing;
        if nodes.len < need {
            return Err(Short(need));
        }
        for leaf in (0..=last).rev() {
            let first = Found { pfn: folio.pfn.add((leaf * SLOTS) as u32), ..folio };
            self.put(Run { index: at(leaf), first, len }, nodes).ok_or(Short(need))?;
        }
        w.pages += pages as u64;
        Ok(())
    }

    /// Puts a run into its leaf; there are nodes enough.
    fn put(&self, run: Run, nodes: &mut Nodes<P>) -> Option<()> {
        let index = run.index;
        // A link replaced below is an empty one, or one whose node lives on in the new tree: nothing goes to limbo.
        match self.place(index) {
            Place::Nowhere => {
                let top = nodes.chain(top_shift(index), run)?;
                drop(self.top.replace(Some(top)));
            }
            Place::Above(old) => {
                let shift = top_shift(index);
                let branch = nodes.chain(shift - BITS, run)?;
                let mut spine = self.top.share()?;
                for shift in (old.shift + BITS..shift).step_by(BITS as usize) {
                    spine = nodes.make(CacheNode::inner(shift, 0, Some(spine)))?;
                }
                let top = CacheNode::inner(shift, index, Some(branch));
                top.count(1);
                if let Slots::Inner(links) = &top.slots {
                    drop(links[0].replace(Some(spine)));
                }
                drop(self.top.replace(Some(nodes.make(top)?)));
            }
            Place::Below(node, link) => {
                let branch = nodes.chain(node.shift - BITS, run)?;
                drop(link.replace(Some(branch)));
                node.count(1);
            }
            Place::Leaf(leaf, slots) => {
                run.store(slots);
                leaf.count(run.len as i32);
            }
        }
        Some(())
    }

    /// Makes the slots of a folio, whose first page is at `index`, those of so many small pages.
    pub fn split(&self, _: &Writer, index: u64, folio: Found) {
        for i in 0..1 << folio.order {
            let small = Found { pfn: folio.pfn.add(i), order: 0 };
            if let Place::Leaf(_, slots) = self.place(index + i as u64) {
                slots[slot_of(index + i as u64, 0)].store(Some(small));
            }
        }
    }

    /// Takes the folio out whose first page is at `index`, and the nodes that would be empty without it.
    pub fn remove(&self, w: &mut Writer, index: u64, cut: &mut Cut<P>) -> Option<Found> {
        let folio = self.get(w, index)?;
        debug_assert_eq!(folio.indexes(index).start, index);
        let mut node = self.top.get()?;
        let (mut link, mut parent) = (&self.top, None);
        // The lowest node that holds all of it, and how many of its slots.
        let lowest = if folio.order as u32 > BITS { BITS } else { 0 };
        let slots = 1 << (folio.order as u32 - lowest);
        // The highest node that holds this folio alone: the link to it, and the node that has the link.
        let mut alone = None;
        loop {
            let all = if node.shift == lowest { slots } else { 1 };
            match alone {
                _ if node.used() != all => alone = None,
                None => alone = Some((link, parent)),
                Some(_) => {}
            }
            match &node.slots {
                Slots::Inner(links) if node.shift > lowest => {
                    (link, parent) = (&links[slot_of(index, node.shift)], Some(node));
                    node = link.get()?;
                }
                _ => break,
            }
        }
        // Emptied even in leaves that are cut off: readers may be there still.
        let first = slot_of(index, lowest);
        match &node.slots {
            Slots::Leaf(leaf) => empty(&leaf[first..][..slots as usize]),
            Slots::Inner(links) => {
                for link in &links[first..][..slots as usize] {
                    if let Some(Slots::Leaf(leaf)) = link.get().map(|leaf| &leaf.slots) {
                        empty(leaf);
                    }
                    if alone.is_none() {
                        cut.push(link.replace(None));
                    }
                }
            }
        }
        w.pages -= 1 << folio.order;
        match alone {
            Some((link, parent)) => {
                if let Some(parent) = parent {
                    parent.count(-1);
                }
                cut.push(link.replace(None));
            }
            None => node.count(-(slots as i32)),
        }
        cut.push(self.lower());
        Some(folio)
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

fn empty(slots: &[PageSlot]) {
    slots.iter().for_each(|slot| slot.store(None));
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
    pub fn look(&mut self, index: u64) -> Option<Found> {
        if self.at != index >> BITS {
            self.go_to(index);
        }
        self.leaf?[slot_of(index, 0)].load()
    }
    /// The slots from the one for `index` to the end of its leaf, if there is one, and how many that are.
    #[inline]
    pub fn slots(&mut self, index: u64) -> (Option<&'e [PageSlot]>, usize) {
        if self.at != index >> BITS {
            self.go_to(index);
        }
        let first = slot_of(index, 0);
        (self.leaf.map(|leaf| &leaf[first..]), SLOTS - first)
    }
    #[inline(never)]
    fn go_to(&mut self, index: u64) {
        self.at = index >> BITS;
        self.leaf = self.index.leaf(self.pin, index);
    }
}

fn scan<'n, P: Platform, B>(
    node: &'n CacheNode<P>,
    base: u64,
    // The first index not looked at yet.
    first: &mut u64,
    last: u64,
    follow: &impl Fn(&'n Link<P, CacheNode<P>>) -> Option<&'n CacheNode<P>>,
    f: &mut impl FnMut(u64, Found) -> ControlFlow<B>,
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
                if at >= *first
                    && let Some(found) = slots[i as usize].load()
                {
                    *first = found.indexes(at).end;
                    f(at, found)?;
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
