//! Address spaces and the calls that change them.
//!
//! One writer at a time: a mapping call takes the writer lock, prepares a new tree of VMAs beside the published one
//! (it may fail; nothing has changed), announces by retiring the VMAs it replaces, takes away or edits their
//! entries, flushes, and publishes the new tree with one store (protocol 2).
//!
//! | | fault | mapping call | DontNeed |
//! |---|---|---|---|
//! | fault | the table's lock | sees `retired` under the table's lock, or its entry is found by the zap | may refill |
//! | mapping call | | the writer lock | both zap; idempotent |
//! | DontNeed | | | idempotent |
//!
//! Fork is a mapping call that takes nothing away: it holds faults up and then lets them go on (`fork`).
//!
//! Pins (`pin`) and user copies (`user`) are neither: they use entries that are there, and go by their table's lock alone.

mod advise;
mod brk;
mod change;
mod cuts;
mod error;
pub(crate) mod fork;
mod map;
#[cfg(all(test, loom))]
pub(crate) mod model;
mod physical;
mod pin;
pub(crate) mod poison;
mod protect;
mod remap;
mod stack;
mod tree;
mod unmap;
mod user;
mod vma;
mod zap;

pub use advise::Advice;
pub use error::{MapError, Unpopulated};
pub use map::{Map, Mapped, Place};
pub use physical::{MemoryType, Physical};
pub use pin::{PinError, Pinned};
pub use remap::RemapTo;
pub(crate) use stack::Grown;
pub use tree::TreeNode;
pub use user::{Stopped, Why};
pub use vma::{Backing, Vma, VmaFlags};
pub(crate) use zap::Selects;

use crate::account::Failures;
use crate::arch::Format;
use crate::fault::writer_key;
use crate::limit::{Limit, Payer};
use crate::mem::{Link, Shared};
use crate::platform::Platform;
use crate::policy::Policy;
use crate::rmap::{self, Present, Root};
use crate::sync::epoch::Pin;
use crate::sync::{CachePadded, LockGuard, Writer};
use crate::table::{PageTable, Stock, Tables};
use crate::tlb::Gather;
use crate::types::{NoMemory, PAGE_SIZE, VirtAddr, VirtRange};
use tree::{TreeReserve, VmaTree};

/// All addresses.
const EVERYTHING: VirtRange = VirtRange { start: VirtAddr(0), end: VirtAddr(u64::MAX) };

/// What only the writer touches.
struct State<P: Platform> {
    /// Bytes mapped.
    bytes: u64,
    /// Start and end of the heap.
    heap: VirtRange,
    reserve: TreeReserve<P>,
}

/// An address space.
pub struct AddressSpace<P: Platform> {
    p: &'static P,
    /// What stays while somebody who walks the reverse map works on it.
    shared: Present<P>,
    /// The root is written by mapping calls, and read by faults: nothing else is where either comes by (docs/decisions/020).
    tree: CachePadded<VmaTree<P>>,
    writer: CachePadded<Writer<P, State<P>>>,
    policy: Policy,
    /// Bytes left free where placing starts; see [`Policy::random_gap`].
    gap: u64,
    /// Who pays for what faults bring in.
    limit: Link<P, Limit<P>>,
    pub(crate) failures: CachePadded<Failures>,
}

/// A random number of whole pages, less than `below` bytes. The bias of the remainder is at most `below` in 2^64.
fn random_gap<P: Platform>(p: &'static P, below: u64) -> u64 {
    p.random().checked_rem(below).unwrap_or(0) & !(PAGE_SIZE - 1)
}

impl<P: Platform> AddressSpace<P> {
    /// An empty space.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn new(p: &'static P, policy: Policy) -> Result<Self, NoMemory> {
        let tree = VmaTree::new();
        let reserve = tree.reserve(p, 0)?;
        let state = State { bytes: 0, heap: VirtRange::default(), reserve };
        let shared = Present::new(p, None)?;
        Ok(AddressSpace::with(p, policy, random_gap(p, policy.random_gap), tree, state, shared))
    }
    /// A space with these mappings.
    fn with(
        p: &'static P,
        policy: Policy,
        gap: u64,
        tree: VmaTree<P>,
        state: State<P>,
        shared: Present<P>,
    ) -> Self {
        AddressSpace {
            p,
            shared,
            tree: CachePadded(tree),
            writer: CachePadded(Writer::ranked(0, state)),
            policy,
            gap,
            limit: Link::new(None),
            failures: CachePadded(Failures::default()),
        }
    }
    /// The platform.
    pub fn platform(&self) -> &'static P {
        self.p
    }
    /// The space's page tables, for a CPU that runs it.
    #[inline]
    pub fn page_table(&self) -> &PageTable<P> {
        &self.shared.table
    }
    /// Who owns the private pages that are filled here.
    #[inline]
    pub(crate) fn root(&self) -> &Shared<P, Root<P>> {
        self.shared.root()
    }
    /// How the space behaves.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }
    /// Charges what faults bring in from now on to this limit, or to none. What is charged already stays where it is.
    pub fn set_limit(&self, limit: Option<Shared<P, Limit<P>>>) {
        let before = {
            let _writer = self.writer.lock(self.p);
            self.limit.replace(limit)
        };
        drop(before);
    }
    /// The limit that what faults bring in is charged to.
    pub fn limit(&self) -> Option<Shared<P, Limit<P>>> {
        let _writer = self.writer.lock(self.p);
        self.limit.share()
    }
    /// The same, pinned.
    #[inline]
    pub(crate) fn limit_of<'e>(&self, pin: &'e Pin<P>) -> Option<&'e Limit<P>> {
        self.limit.load(pin)
    }
    /// Who pays for what a fault brings in.
    pub(crate) fn payer(&self) -> Payer<'_, P> {
        Payer::Space(&self.limit)
    }
    /// The addresses that can be mapped.
    pub fn usable(&self) -> VirtRange {
        VirtRange::new(self.policy.min_addr, P::Format::USER_END)
    }
    /// Calls `f` with every VMA, in the order of addresses, pinned: `f` may not use the space. Each look-up stands for itself: VMAs that come and go
    /// meanwhile may be seen or not.
    pub fn for_each_vma(&self, mut f: impl FnMut(&Vma<P>)) {
        let mut at = VirtAddr(0);
        loop {
            let pin = Pin::new(self.p);
            let Some(vma) = self.tree.find_next(&pin, at) else { return };
            f(vma);
            at = vma.range.end;
        }
    }
    /// The number of VMAs.
    pub fn vma_count(&self) -> usize {
        let pin = Pin::new(self.p);
        self.tree.count(&pin)
    }
    /// Walks the tables and counts; exact when nothing changes meanwhile.
    pub fn tables(&self) -> Tables {
        self.page_table().count()
    }
    /// Waits until nothing of this machine is in limbo and empties the caches, so that what is left can be counted.
    pub fn quiesce(&self) {
        self.p.vm().quiesce(self.p);
    }

    /// The VMA that contains `addr`, readable while pinned.
    pub(crate) fn find<'e>(&self, pin: &'e Pin<P>, addr: VirtAddr) -> Option<&'e Vma<P>> {
        self.tree.find(pin, addr)
    }
    /// The first VMA that ends above `addr`, readable while pinned.
    pub(crate) fn find_next<'e>(&self, pin: &'e Pin<P>, addr: VirtAddr) -> Option<&'e Vma<P>> {
        self.tree.find_next(pin, addr)
    }
    /// The mapping calls begun and ended so far: odd while one is at work.
    pub(crate) fn turn(&self) -> u64 {
        self.page_table().turn()
    }

    fn write(&self) -> Writing<'_, P> {
        let state = self.writer.lock(self.p);
        self.begin(state, true)
    }
    fn try_write(&self) -> Option<Writing<'_, P>> {
        Some(self.begin(self.writer.try_lock(self.p)?, false))
    }
    fn begin<'a>(
        &'a self,
        state: LockGuard<'a, P, P::WriterLock, State<P>>,
        collects: bool,
    ) -> Writing<'a, P> {
        self.page_table().next_turn();
        Writing { space: self, state, _after: After { space: self, collects } }
    }
    /// A page-aligned, non-empty range of `len` bytes at `start`, in the usable part.
    fn check_range(&self, start: VirtAddr, len: u64) -> Result<VirtRange, MapError> {
        let whole = VirtRange::new(start, start.checked_add(len).unwrap_or(VirtAddr(u64::MAX)));
        let end = start.checked_add(len).and_then(|e| e.align_up(PAGE_SIZE));
        match end {
            Some(end) if start.is_aligned(PAGE_SIZE) && len > 0 => {
                let range = VirtRange::new(start, end);
                if self.usable().covers(range) { Ok(range) } else { Err(MapError::OutOfRange(range)) }
            }
            _ => Err(MapError::Invalid(whole)),
        }
    }
}

/// Possession proves: the writer lock is held, and faults that find nothing wait.
struct Writing<'a, P: Platform> {
    space: &'a AddressSpace<P>,
    state: LockGuard<'a, P, P::WriterLock, State<P>>,
    /// Dropped last, unlocked.
    _after: After<'a, P>,
}

/// Dropped, it wakes who waited for the call, and frees what mapping calls retired: as long as there is much of it and
/// its grace period is over.
struct After<'a, P: Platform> {
    space: &'a AddressSpace<P>,
    /// Not after a fault that grew a stack.
    collects: bool,
}

impl<P: Platform> Drop for After<'_, P> {
    fn drop(&mut self) {
        let p = self.space.p;
        p.ready(writer_key(self.space.page_table()));
        if self.collects {
            p.vm().collect_much(p);
        }
    }
}

impl<P: Platform> Drop for Writing<'_, P> {
    fn drop(&mut self) {
        self.space.page_table().next_turn();
    }
}

impl<P: Platform> Drop for AddressSpace<P> {
    /// Exit: everything mapped goes, tables with it. The root goes with the last who holds it.
    fn drop(&mut self) {
        let mut gather = Gather::new(self.page_table());
        let whole = VirtRange::new(VirtAddr(0), P::Format::USER_END);
        self.page_table().zap(whole, Some(EVERYTHING), &mut Stock::empty(self.p), &mut gather);
        gather.flush();
        self.tree.overlapping(EVERYTHING).for_each(|vma| rmap::remove(&vma));
    }
}
