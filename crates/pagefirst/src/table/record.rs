//! A table's record: lock, dead bit and number of entries in one word; and the guard that proves the lock.

use crate::arch::{Attrs, Format};
use crate::frame::{FrameFlags, folio_of};
use crate::platform::{Note, Platform};
use crate::sync::atomic::plain::AtomicU32;
use crate::sync::atomic::{AcqRel, Acquire, AtomicU64, Relaxed, Release};
use crate::sync::epoch::Pin;
use crate::sync::held;
use crate::types::Pfn;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use core::ops::Range;

const LOCK: u64 = 1;
const DEAD: u64 = 2;
/// Lives on without entries: the root, and tables of the `Upfront` baseline.
const PINNED: u64 = 4;
/// Something was counted in the tally.
const TALLIED: u64 = 8;
const ONE: u64 = 1 << 8;
/// In the upper half of the word: where fault-around was last at work ([`Last`]).
const LAST: u32 = 32;

/// The word without that.
const fn lower(word: u64) -> u64 {
    word & ((1 << LAST) - 1)
}

/// Where in a table of small pages fault-around was last at work, if its window adapts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Last {
    /// The slot of the page that faulted.
    pub slot: usize,
    /// log2 of the pages of the window.
    pub order: u8,
}

impl Last {
    fn bits(self) -> u64 {
        ((self.slot as u64) << 4 | (self.order as u64 + 1)) << LAST
    }
    fn of(word: u64) -> Option<Last> {
        let bits = word >> LAST;
        let order = (bits & 15).checked_sub(1)? as u8;
        Some(Last { slot: (bits >> 4) as usize, order })
    }
}

/// What a fault did, for counting in the record of the table that holds the entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum FaultKind {
    /// The zero page was mapped.
    AnonRead,
    /// A cleared page was mapped.
    AnonWrite,
    /// A file's page was mapped for reading.
    FileRead,
    /// A private copy of a file's page was mapped.
    FileCopy,
    /// A file's page was mapped for shared writing.
    SharedWrite,
    /// A mapped page was copied for a write (the zero page included).
    Copy,
    /// A mapped page was made writable where it is.
    Reuse,
    /// Physical memory or a device was mapped, or made writable.
    Physical,
    /// An entry was marked accessed, or dirty, for hardware that does not.
    Marked,
    /// Not a fault: a neighbour mapped by fault-around.
    Around,
    /// Not a fault: an entry that was taken out never used.
    Unused,
    /// Not a fault: an entry mapped by a mapping call (populate, remap).
    Populated,
}

impl FaultKind {
    /// The number of kinds.
    pub const COUNT: usize = 12;
}

/// As what an entry counts in the resident set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Counted {
    /// A page of private memory.
    Anon,
    /// A page of a file's cache.
    File,
    /// A zero page, device memory: not counted.
    Nothing,
}

impl Counted {
    /// As what this entry of a table at `level` counts.
    pub fn of<P: Platform>(p: &'static P, raw: u64, level: u8) -> Counted {
        match P::Format::frame(raw, level) {
            Some(pfn) if !P::Format::attrs(raw).contains(Attrs::SPECIAL) => Counted::page(folio_of(p, pfn).2),
            _ => Counted::Nothing,
        }
    }
    /// As what an entry for a page of a folio with these flags counts.
    #[inline]
    pub fn page(flags: FrameFlags) -> Counted {
        if flags.contains(FrameFlags::FILE) {
            Counted::File
        } else if flags.contains(FrameFlags::ANON) {
            Counted::Anon
        } else {
            Counted::Nothing
        }
    }
}

/// The record of one table: 64 bytes in a slab, taken and given back with the table.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct TableRecord {
    word: AtomicU64,
    /// Small pages of private memory and of files that the entries map; written under the lock. Resident set is their
    /// sum over tables.
    anon: AtomicU32,
    file: AtomicU32,
    tally: [AtomicU32; FaultKind::COUNT],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<TableRecord>() == 64);

impl TableRecord {
    pub(super) fn new() -> Self {
        TableRecord {
            word: AtomicU64::new(0),
            anon: AtomicU32::new(0),
            file: AtomicU32::new(0),
            tally: [const { AtomicU32::new(0) }; FaultKind::COUNT],
        }
    }
    /// Resets a record that nobody else can see.
    fn start(&self, word: u64) {
        self.word.store(word, Relaxed);
        self.anon.store(0, Relaxed);
        self.file.store(0, Relaxed);
        self.tally.iter().for_each(|t| t.store(0, Relaxed));
    }
    /// The faults that mapped huge pages, for a table at `level`.
    pub(super) fn huge_faults(&self, level: u8) -> u64 {
        let mapped = [
            FaultKind::AnonRead,
            FaultKind::AnonWrite,
            FaultKind::FileRead,
            FaultKind::SharedWrite,
            FaultKind::Copy,
            FaultKind::Physical,
        ];
        let sum = mapped.into_iter().map(|kind| self.tally[kind as usize].load(Relaxed) as u64).sum();
        if level > 0 { sum } else { 0 }
    }
    pub(super) fn has_tally(&self) -> bool {
        self.word.load(Relaxed) & TALLIED != 0
    }
    pub(super) fn tally(&self) -> [u32; FaultKind::COUNT] {
        core::array::from_fn(|i| self.tally[i].load(Relaxed))
    }
    /// Small pages of private memory and of files that the entries map.
    pub fn resident(&self) -> (u64, u64) {
        (self.anon.load(Relaxed) as u64, self.file.load(Relaxed) as u64)
    }
    /// Entries in use, as last published by a lock holder; `None` while somebody holds the lock.
    pub fn entries(&self) -> Option<u64> {
        let word = self.word.load(Acquire);
        (word & LOCK == 0).then_some(lower(word) / ONE)
    }
    /// Where fault-around was last at work.
    pub(super) fn last(&self) -> Option<Last> {
        Last::of(self.word.load(Relaxed))
    }
    /// Dead: empty, unlinked or about to be.
    pub fn is_dead(&self) -> bool {
        self.word.load(Acquire) & DEAD != 0
    }
    /// Kept although it may be empty: a root, or a table of the `Upfront` baseline.
    pub fn is_pinned(&self) -> bool {
        self.word.load(Relaxed) & PINNED != 0
    }
}

/// The record of the table in frame `pfn`.
///
/// The pointer was stored when the record was taken, and both stay until the table is freed; who calls it holds the
/// table: by a pin under which it was found, by a reserve, or by having unlinked it.
pub(super) fn record_of<'e, P: Platform>(p: &'static P, pfn: Pfn) -> &'e TableRecord {
    let at = p.meta(pfn).owner().cast::<TableRecord>();
    debug_assert!(!at.is_null(), "a frame that is no table");
    // SAFETY: protocol 3: a table found under a pin is freed only after the pin's grace period; a reserved or
    // unlinked table belongs to the caller. `owner` is set by `reserve::fresh` to a live record.
    unsafe { &*at }
}

pub(super) fn make_root<P: Platform>(p: &'static P, pfn: Pfn) {
    record_of(p, pfn).start(PINNED);
}

/// A table, found under a pin: its memory stays a table's until `'e` ends, alive or dead.
pub(crate) struct Table<'e, P: Platform> {
    p: &'static P,
    pfn: Pfn,
    level: u8,
    pin: PhantomData<&'e ()>,
}

impl<P: Platform> Clone for Table<'_, P> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<P: Platform> Copy for Table<'_, P> {}

impl<'e, P: Platform> Table<'e, P> {
    pub(super) fn found(pin: &'e Pin<P>, pfn: Pfn, level: u8) -> Self {
        Table { p: pin.platform(), pfn, level, pin: PhantomData }
    }
    /// The table in this frame, which pointed to this one when it was found.
    pub(super) fn above(self, pfn: Pfn) -> Table<'e, P> {
        Table { pfn, level: self.level + 1, ..self }
    }
    /// The table one level down that an entry of this one points to.
    pub(super) fn child(self, raw: u64) -> Option<Table<'e, P>> {
        P::Format::child(raw, self.level).map(|pfn| Table { pfn, level: self.level - 1, ..self })
    }
    /// The same table, known to the compiler to be one of the lowest level.
    #[inline]
    pub(super) fn lowest(self) -> Self {
        debug_assert_eq!(self.level, 0);
        Table { level: 0, ..self }
    }
    /// The table's frame.
    pub fn pfn(self) -> Pfn {
        self.pfn
    }
    /// The table's level.
    pub fn level(self) -> u8 {
        self.level
    }
    pub(crate) fn platform(self) -> &'static P {
        self.p
    }
    pub(super) fn record(self) -> &'e TableRecord {
        record_of(self.p, self.pfn)
    }
    /// Reads an entry without the lock.
    #[inline]
    pub fn entry(self, index: usize) -> u64 {
        self.p.cells(self.pfn)[index].load(Acquire)
    }
    /// Locks the table; `None` when it is dead.
    #[inline]
    pub fn lock(self) -> Option<Guard<'e, P>> {
        held::take(self.p, held::TABLE);
        let record = self.record();
        loop {
            // Acquire: who finds a table dead sees what its last entry's taker had announced.
            let word = record.word.load(Acquire);
            if word & DEAD != 0 && !cfg!(mutant = "lock_ignores_dead") {
                held::give(self.p, held::TABLE);
                return None;
            }
            if word & LOCK == 0
                && record.word.compare_exchange_weak(word, word | LOCK, Acquire, Relaxed).is_ok()
            {
                self.p.note(Note::TableLocked(self.pfn, self.level));
                return Some(Guard { table: self, record, word, ranked: true });
            }
            self.p.relax();
        }
    }
}

/// Possession proves: the table is locked and alive.
///
/// Dropping it unlocks. If the table has no entry left it is marked dead in the same store (protocol 3): no table
/// can be unlocked empty and alive.
pub(crate) struct Guard<'e, P: Platform> {
    table: Table<'e, P>,
    record: &'e TableRecord,
    /// The word to unlock with, lock bit clear; nobody else writes while we hold the lock.
    word: u64,
    ranked: bool,
}

impl<'e, P: Platform> Guard<'e, P> {
    /// A guard of a table from a reserve, which nobody else can see.
    pub(super) fn private(p: &'static P, pfn: Pfn, level: u8, pinned: bool) -> Self {
        let record = record_of(p, pfn);
        record.start(LOCK);
        let word = if pinned { PINNED } else { 0 };
        Guard { table: Table { p, pfn, level, pin: PhantomData }, record, word, ranked: false }
    }
    /// The table.
    pub fn table(&self) -> Table<'e, P> {
        self.table
    }
    /// Entries in use.
    pub fn entries(&self) -> u64 {
        lower(self.word) / ONE
    }
    /// Reads an entry.
    #[inline]
    pub fn entry(&self, index: usize) -> u64 {
        self.cell(index).load(Relaxed)
    }
    #[inline]
    fn cell(&self, index: usize) -> &'static AtomicU64 {
        &self.table.p.cells(self.table.pfn)[index]
    }
    /// The slots themselves.
    #[inline]
    pub(super) fn cells(&self, slots: Range<usize>) -> &'static [AtomicU64] {
        &self.table.p.cells(self.table.pfn)[slots]
    }
    /// Puts an entry into an empty slot. For `publish.rs` alone.
    #[inline]
    pub(super) fn set(&mut self, index: usize, raw: u64) {
        self.set_cell(self.cell(index), raw);
    }
    /// The same for one of the table's [`cells`](Guard::cells).
    #[inline]
    pub(super) fn set_cell(&mut self, cell: &AtomicU64, raw: u64) {
        debug_assert!(raw != 0 && cell.load(Relaxed) == 0);
        let order = if cfg!(mutant = "publish_relaxed") { Relaxed } else { Release };
        cell.store(raw, order);
        self.word += ONE;
    }
    /// Takes an entry out, if there is one; returns what it said, with what hardware set until now.
    #[inline]
    pub(crate) fn take(&mut self, index: usize) -> Option<u64> {
        let cell = self.cell(index);
        let mut old = cell.load(Relaxed);
        if old == 0 {
            return None;
        }
        self.word -= ONE;
        if P::Format::is_settled(old, self.table.level) {
            // Hardware has nothing to write to it, and nobody else writes without the lock.
            cell.store(0, Release);
        } else {
            old = cell.swap(0, AcqRel);
        }
        Some(old)
    }
    /// Changes an entry that is there: `new` computes it from the present one and is called again when hardware
    /// wrote meanwhile. Returns what it said before.
    pub(crate) fn update(&mut self, index: usize, mut new: impl FnMut(u64) -> u64) -> u64 {
        let cell = self.cell(index);
        let mut old = cell.load(Relaxed);
        loop {
            let next = new(old);
            debug_assert!(old != 0 && next != 0);
            if next == old {
                return old;
            }
            if cfg!(mutant = "update_by_store") {
                cell.store(next, Release);
                return old;
            }
            match cell.compare_exchange_weak(old, next, AcqRel, Relaxed) {
                Ok(_) => return old,
                Err(now) => old = now,
            }
        }
    }
    /// Keeps in mind where fault-around was at work.
    pub(super) fn remember(&mut self, last: Last) {
        self.word = lower(self.word) | last.bits();
    }
    /// Whether the table is kept although it may be empty.
    pub(super) fn is_pinned(&self) -> bool {
        self.word & PINNED != 0
    }
    /// Lets the table die with its last entry from now on.
    pub(super) fn unpin(&mut self) {
        self.word &= !PINNED;
    }
    pub(crate) fn tally(&mut self, kind: FaultKind, n: u32) {
        let t = &self.record.tally[kind as usize];
        t.store(t.load(Relaxed).wrapping_add(n), Relaxed);
        self.word |= TALLIED;
    }
    /// Counts so many entries more, or less, in the resident set.
    pub(crate) fn count(&self, counted: Counted, entries: i32) {
        let count = match counted {
            Counted::Anon => &self.record.anon,
            Counted::File => &self.record.file,
            Counted::Nothing => return,
        };
        let pages = entries << P::Format::order(self.table.level);
        count.store(count.load(Relaxed).wrapping_add_signed(pages), Relaxed);
    }
    fn leave(&self) -> bool {
        let dies = lower(self.word) & !TALLIED == 0;
        let dead = if dies && !cfg!(mutant = "unlock_forgets_dead") { DEAD } else { 0 };
        self.record.word.store(self.word | dead, Release);
        if self.ranked {
            held::give(self.table.p, held::TABLE);
        }
        dies
    }
    /// Unlocks; true when the table died with this.
    pub fn unlock(self) -> bool {
        ManuallyDrop::new(self).leave()
    }
    /// Forgets a private table that got no entry; it stays the reserve's.
    pub(super) fn abandon(self) {
        debug_assert!(!self.ranked && self.entries() == 0);
        let _ = ManuallyDrop::new(self);
    }
}

impl<P: Platform> Drop for Guard<'_, P> {
    fn drop(&mut self) {
        self.leave();
    }
}
