//! Page tables: typed slots, the lock-free walk, the one install, the one walk by range.
//!
//! | file | job | protocol of `lib.rs` |
//! |---|---|---|
//! | `record` | a table's lock, dead bit and counts; `Guard` | 3 |
//! | `slot` | the lock-free walk and the typed states of a slot | 1 |
//! | `reserve` | tables owned and not yet published; the caches of zeroed tables | |
//! | `publish` | `install`: the only way an entry comes into being | 1 |
//! | `leaf` | a leaf table filled before it is published | 1 |
//! | `range` | visit every deepest live table of a range, unlink what died | 2, 3 |
//! | `mapper` | frames that an embedder maps itself, not counted | 1, 2 |
//! | `edit` | change one entry that is there | 1 |
//! | `retire` | dead tables: unlink, limbo, reuse | 3 |
//! | `split` | a huge page becomes a table of small ones | |
//! | `account` | count by a walk | |
//!
//! | | walk | install | zap, edit | retire |
//! |---|---|---|---|---|
//! | walk | free | sees nothing or the whole chain | old or new entry | the pin keeps a dead table readable |
//! | install | | the lock of the deepest live table | the same lock; announcement seen or entry found | dead bit: help, walk again |
//! | zap, edit | | | the table's lock | dead bit: help, look again |
//! | retire | | | | who cleared the parent's slot owns the table |

mod account;
mod edit;
mod leaf;
mod mapper;
mod publish;
mod range;
mod record;
mod reserve;
mod retire;
mod slot;
mod split;

#[cfg(all(test, loom))]
pub(crate) mod model;

pub use account::Tables;
pub(crate) use edit::Accessed;
pub(crate) use leaf::NewLeaf;
pub use mapper::{FramesError, Mapper, Translation};
pub(crate) use publish::install;
#[cfg(feature = "__baseline")]
pub(crate) use publish::publish_empty;
pub(crate) use publish::{Batch, NewEntry, Refused};
pub(crate) use range::{Flow, Pass, Visitor};
pub(crate) use record::{Counted, Guard, Table};
pub use record::{FaultKind, TableRecord};
pub use reserve::Reserve;
pub(crate) use reserve::Stock;
pub(crate) use reserve::{TableCache, cached, drain};
pub(crate) use retire::{Unlinked, collect, retire};
pub use slot::{Locked, Nothing, Seen, Slot, Walk};
pub(crate) use split::Pieces;

use crate::arch::{Format, MAX_LEVELS};
use crate::platform::Platform;
use crate::sync::CachePadded;
use crate::sync::atomic::plain::{AtomicU32, AtomicU64};
use crate::sync::atomic::{AcqRel, Acquire, Relaxed, SeqCst, fence};
use crate::sync::epoch::Pin;
use crate::tlb::CpuMask;
use crate::types::{NoMemory, Pfn, VirtAddr, VirtRange};

/// How many of something were taken out since the space began, and how many of them were flushed. Written rarely.
pub(crate) struct Taken {
    taken: crate::sync::atomic::AtomicU64,
    flushed: crate::sync::atomic::AtomicU64,
}

impl Taken {
    fn new() -> Self {
        let zero = || crate::sync::atomic::AtomicU64::new(0);
        Taken { taken: zero(), flushed: zero() }
    }
    fn taken(&self) -> u64 {
        self.taken.load(Acquire)
    }
    /// So many are being taken out; called under the lock of the table they are in.
    pub(crate) fn take(&self, n: u64) {
        self.taken.fetch_add(n, AcqRel);
    }
    /// So many of them were flushed.
    pub(crate) fn flush(&self, n: u64) {
        if n > 0 {
            self.flushed.fetch_add(n, AcqRel);
        }
    }
    /// How many were taken out, if not all of them are flushed.
    fn unflushed(&self) -> Option<u64> {
        // Those flushed first: they are among those taken by then.
        let flushed = self.flushed.load(Acquire);
        let taken = self.taken();
        (flushed != taken).then_some(taken)
    }
}

/// The page tables of one space: the root, who may have translations cached, and what was counted.
pub struct PageTable<P: Platform> {
    p: &'static P,
    root: Pfn,
    tag: u64,
    pub(crate) cpus: CpuMask,
    /// Copies stored read-only whose flush is not done: while it is not zero, a write fault flushes its address
    /// before it copies or widens.
    pub(crate) unflushed: crate::sync::atomic::AtomicU32,
    /// Entries of pages that were taken out and that something may have to wait for: of huge pages, and of all where the
    /// format asks for it.
    pub(crate) pages_taken: Taken,
    /// On lines that only who adds or takes away tables goes to: all above, every fault reads.
    pub(crate) changing: CachePadded<Changing>,
}

/// What changes with mapping calls, and with tables.
pub(crate) struct Changing {
    /// Live tables by level.
    published: [AtomicU64; MAX_LEVELS],
    /// Mapping calls of the space begun and ended: odd while one is at work.
    turn: crate::sync::atomic::AtomicU64,
    /// Tables that were taken out and that a huge page may have to wait for.
    pub unlinked: Taken,
    /// What dead tables had counted, by [`FaultKind`].
    tally: [AtomicU32; FaultKind::COUNT],
    /// Of these, the faults that mapped huge pages.
    huge_faults: AtomicU64,
}

impl<P: Platform> PageTable<P> {
    /// An empty root.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn new(p: &'static P) -> Result<Self, NoMemory> {
        let root = p.vm().or_drain(p, || reserve::take_zeroed(p))?;
        record::make_root::<P>(p, root);
        let table = PageTable {
            p,
            root,
            tag: p.vm().new_id(),
            cpus: CpuMask::new(),
            unflushed: crate::sync::atomic::AtomicU32::new(0),
            pages_taken: Taken::new(),
            changing: CachePadded(Changing {
                published: core::array::from_fn(|_| AtomicU64::new(0)),
                turn: crate::sync::atomic::AtomicU64::new(0),
                unlinked: Taken::new(),
                tally: core::array::from_fn(|_| AtomicU32::new(0)),
                huge_faults: AtomicU64::new(0),
            }),
        };
        table.changing.published[P::Format::LEVELS as usize - 1].store(1, Relaxed);
        p.kernel_half(root);
        Ok(table)
    }
    /// The platform.
    pub fn platform(&self) -> &'static P {
        self.p
    }
    /// A number no other space has had.
    pub fn tag(&self) -> u64 {
        self.tag
    }
    /// The root table, for a CPU to load after [`activate`](PageTable::activate).
    pub fn root_frame(&self) -> Pfn {
        self.root
    }
    /// The mapping calls of its space begun and ended so far: odd while one is at work.
    pub(crate) fn turn(&self) -> u64 {
        self.changing.turn.load(Acquire)
    }
    /// One begins, or ends.
    pub(crate) fn next_turn(&self) {
        self.changing.turn.fetch_add(1, AcqRel);
    }
    /// The CPUs that may hold translations.
    pub fn cpus(&self) -> &CpuMask {
        &self.cpus
    }
    /// Says that `cpu` is about to use this space, and returns the root for it to load.
    pub fn activate(&self, cpu: usize) -> Pfn {
        if !cfg!(mutant = "activate_without_mask") {
            self.cpus.insert(cpu);
        }
        fence(SeqCst);
        self.root
    }
    /// Says that `cpu` holds no translation of this space any more: it flushed the tag itself.
    pub fn deactivate(&self, cpu: usize) {
        self.cpus.remove(cpu);
    }
    pub(crate) fn root<'e>(&self, pin: &'e Pin<P>) -> Table<'e, P> {
        debug_assert!(core::ptr::eq(pin.platform(), self.p), "a pin of another machine");
        Table::found(pin, self.root, P::Format::LEVELS - 1)
    }
    /// Looks `va` up without a lock.
    #[inline]
    pub fn walk<'e>(&self, pin: &'e Pin<P>, va: VirtAddr) -> Walk<'e, P> {
        slot::walk(self.root(pin), None, va)
    }

    fn count_published(&self, level: u8, n: u64) {
        self.changing.published[level as usize].fetch_add(n, Relaxed);
    }
    /// Takes a table that is being unlinked off the books; its counts of faults stay.
    fn count_unlinked(&self, table: Table<'_, P>) {
        self.changing.unlinked.take(1);
        self.changing.published[table.level() as usize].fetch_sub(1, Relaxed);
        let record = table.record();
        if !record.has_tally() {
            return; // as of every table of tables, but for huge pages
        }
        for (sum, n) in self.changing.tally.iter().zip(record.tally()) {
            if n > 0 {
                sum.fetch_add(n, Relaxed);
            }
        }
        self.changing.huge_faults.fetch_add(record.huge_faults(table.level()), Relaxed);
    }
    /// Bytes of live tables by level, the root's last; limbo and caches are apart.
    pub fn table_bytes(&self) -> [u64; MAX_LEVELS] {
        core::array::from_fn(|l| self.changing.published[l].load(Relaxed) * crate::types::PAGE_SIZE)
    }
    /// How much was taken out so far that an entry for a page of a table at `level` must not meet in a TLB, if any of it
    /// is not flushed yet: huge pages, for a huge page the tables of small ones, and all pages where a new one may not
    /// come before ([`Format::BREAK_BEFORE_MAKE`]).
    pub(crate) fn taken_unflushed(&self, level: u8) -> Option<u64> {
        let pages = self.pages_taken.unflushed();
        let tables = if level > 0 { self.changing.unlinked.unflushed() } else { None };
        let taken = || self.pages_taken.taken() + if level > 0 { self.changing.unlinked.taken() } else { 0 };
        (pages.is_some() || tables.is_some()).then(taken)
    }
    pub(crate) fn is_unflushed(&self) -> bool {
        self.unflushed.load(Acquire) > 0
    }
    pub(crate) fn begin_unflushed(&self) {
        self.unflushed.fetch_add(1, AcqRel);
    }
    pub(crate) fn end_unflushed(&self) {
        self.unflushed.fetch_sub(1, AcqRel);
    }
}

impl<P: Platform> Drop for PageTable<P> {
    fn drop(&mut self) {
        // A space has taken everything out before it let go; this is what an embedder has mapped in a table of its own.
        if self.table_bytes().iter().sum::<u64>() > crate::types::PAGE_SIZE {
            let unmapped = self.mapper().unmap(VirtRange::new(VirtAddr(0), P::Format::USER_END));
            debug_assert!(unmapped.is_ok(), "no huge page is cut");
        }
        debug_assert!(
            self.table_bytes().iter().sum::<u64>() <= crate::types::PAGE_SIZE,
            "dropped with counted pages mapped"
        );
        // Tables are reused as they are, and an emptied one is zero.
        let kernel = P::Format::user_entries(P::Format::LEVELS - 1)..;
        self.p.cells(self.root)[kernel].iter().for_each(|entry| entry.store(0, Relaxed));
        retire::retire(self.p, Unlinked::one(self.root));
    }
}
