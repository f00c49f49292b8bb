//! The machine that models run on, and what they watch it by.

use super::super::record::TableRecord;
use super::super::{PageTable, Table, collect, reserve};
use crate::arch::{Format, Tiny};
use crate::fault::Ticket;
use crate::file::{File, Fill, FillGuard, Hint, Io, StoreGuard};
use crate::frame::FrameMeta;
use crate::mem::{Link, Past, Pool, Pooled, Shared};
use crate::platform::{Note, Platform};
use crate::space::model::Whole;
use crate::sync::RawLock;
use crate::sync::atomic::{AtomicU32, AtomicU64, Relaxed, SeqCst, fence, plain};
use crate::sync::epoch::Pin;
use crate::tlb::Flush;
use crate::types::{PAGE_SIZE, Pfn, VirtAddr};
use crate::vm::{Local, Vm};
use core::ptr::NonNull;
use loom::cell::UnsafeCell;
use loom::sync::{Condvar, Mutex, MutexGuard};
use std::boxed::Box;
use std::cell::Cell;
use std::sync::OnceLock;
use std::vec::Vec;

/// CPUs, one for each role.
const CPUS: usize = 3;

loom::thread_local! {
    static CPU: Cell<usize> = Cell::new(0);
}

pub(crate) fn become_cpu(cpu: usize) {
    CPU.with(|c| c.set(cpu));
}

/// Whether a thing may be touched, in a cell that loom checks for races.
pub(crate) struct Watch(UnsafeCell<bool>);

// SAFETY: loom runs one thread at a time, and panics when two accesses race.
unsafe impl Sync for Watch {}
// SAFETY: as above.
unsafe impl Send for Watch {}

impl Watch {
    pub(crate) fn new() -> Self {
        Watch(UnsafeCell::new(true))
    }
    /// A touch by somebody who thinks that it is there.
    pub(crate) fn touch(&self) {
        // SAFETY: loom checked that no write races with this.
        assert!(self.0.with(|owned| unsafe { *owned }), "touched after it was freed");
    }
    pub(crate) fn change(&self, to: bool) {
        // SAFETY: loom checked that nothing races with this.
        let was = self.0.with_mut(|owned| unsafe { core::mem::replace(&mut *owned, to) });
        assert_ne!(was, to, "{}", if to { "taken twice" } else { "freed twice" });
    }
    pub(crate) fn is_owned(&self) -> bool {
        // SAFETY: as in `touch`.
        self.0.with(|owned| unsafe { *owned })
    }
}

/// A lock that loom knows.
#[derive(Default)]
pub(crate) struct Raw {
    lock: Mutex<()>,
    guard: core::cell::UnsafeCell<Option<MutexGuard<'static, ()>>>,
}

// SAFETY: the guard is touched by the lock's holder alone.
unsafe impl Sync for Raw {}
// SAFETY: as above.
unsafe impl Send for Raw {}

// SAFETY: loom's mutex excludes and orders.
unsafe impl RawLock<Machine> for Raw {
    fn lock(&self, _: &'static Machine) {
        // SAFETY: every lock lives in the machine, which lives until its model's threads have ended.
        let lock: &'static Mutex<()> = unsafe { &*core::ptr::from_ref(&self.lock) };
        let guard = lock.lock().unwrap();
        // SAFETY: we hold the lock.
        unsafe { *self.guard.get() = Some(guard) };
    }
    fn try_lock(&self, _: &'static Machine) -> bool {
        unreachable!("no model tries a lock")
    }
    unsafe fn unlock(&self, _: &'static Machine) {
        // SAFETY: the caller holds the lock.
        drop(unsafe { (*self.guard.get()).take() });
    }
}

/// A file of zeros that is memory, or is read by who takes long ([`KEPT`]). What it was before it is forgotten is [`STORED`].
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Zeros {
    pub(crate) is_slow: bool,
    /// log2 of the pages of its folios.
    pub(crate) order: u8,
}
std::thread_local! {
    /// The page of a slow file that is being read. (All threads of a model are one.)
    pub(crate) static KEPT: Cell<Option<Fill>> = const { Cell::new(None) };
    /// What every byte of the file is until some of it is forgotten.
    pub(crate) static STORED: Cell<u8> = const { Cell::new(0) };
}
impl File for Zeros {
    fn id(&self) -> u64 {
        1
    }
    fn read(&self, _: u64, mut page: FillGuard<'_>) -> Io {
        if let stored @ 1.. = STORED.get() {
            page.fill(stored);
        }
        if !self.is_slow {
            return Io::Ready;
        }
        KEPT.set(Some(page.keep()));
        Io::Pending
    }
    fn write(&self, _: u64, _: StoreGuard<'_>) -> Io {
        Io::Ready
    }
    fn forget(&self, _: core::ops::Range<u64>) {
        STORED.set(0);
    }
    fn tracks_writes(&self) -> bool {
        false
    }
    fn max_folio_order(&self) -> u8 {
        self.order
    }
    fn folio_order(&self, _: u64, _: u64, _: Hint) -> u8 {
        self.order
    }
}

/// What the models' [`Link`](crate::mem::Link) links to, and what that links to.
pub(crate) struct Item {
    pub(crate) watch: Watch,
    pub(crate) below: Option<Shared<Machine, Item>>,
}
impl Pooled for Item {
    fn end(&mut self, past: &Past) {
        if let Some(below) = self.below.take() {
            below.end(past);
        }
    }
}
impl Drop for Item {
    fn drop(&mut self) {
        self.watch.change(false);
    }
}
impl Item {
    pub(crate) fn above(below: Option<Shared<Machine, Item>>) -> Self {
        Item { watch: Watch::new(), below }
    }
    pub(crate) fn touch(&self) {
        self.watch.touch();
        if let Some(below) = &self.below {
            below.touch();
        }
    }
}

/// A machine that lives for one execution of a model.
pub(crate) struct Machine {
    pub(crate) vm: Vm<Machine>,
    pub(crate) locals: [Local<Machine>; CPUS],
    pub(crate) cells: Vec<[AtomicU64; Tiny::ENTRIES]>,
    pub(crate) meta: Vec<FrameMeta>,
    pub(crate) watch: Vec<Watch>,
    /// Frames that are tables; those behind are pages.
    pub(crate) tables: usize,
    /// What a page holds: a word.
    pub(crate) memory: Vec<AtomicU64>,
    /// Its bytes, which only the library's reading of files touches.
    bytes: OnceLock<Vec<[u64; PAGE_SIZE as usize / 8]>>,
    /// Whether somebody has the page.
    pub(crate) held: Vec<Watch>,
    /// How often anybody has spun.
    spun: plain::AtomicU32,
    /// Who waits asleep, and what wakes him.
    asleep: Mutex<()>,
    wake: Condvar,
    /// What models of whole calls work on.
    pub(crate) whole: Whole,
    /// Another CPU's translation of one address, of page 0 if nothing else is said, in the space with this tag: an entry, or
    /// none; gone with the next shootdown there.
    pub(crate) stale: Mutex<u64>,
    pub(crate) stale_at: plain::AtomicU64,
    /// The frame that it leads to, in models that free it.
    pub(crate) stale_frame: plain::AtomicU32,
    pub(crate) stale_in: plain::AtomicU64,
    pub(crate) space: OnceLock<PageTable<Machine>>,
    pub(crate) child: OnceLock<PageTable<Machine>>,
    pub(crate) items: Pool<Machine, Item>,
    pub(crate) link: OnceLock<Link<Machine, Item>>,
    /// Something that the epoch alone protects, and whether readers can find it.
    pub(crate) object: Watch,
    pub(crate) linked: AtomicU32,
    /// The announcement of protocol 2, as a VMA's `retired`.
    pub(crate) retired: AtomicU32,
    /// Shootdowns so far.
    pub(crate) flushes: AtomicU32,
    /// Whether a CPU has cached a translation that allows writing; a flush takes it.
    pub(crate) cached: Mutex<bool>,
    /// What is in the one page that is looked at.
    pub(crate) contents: AtomicU32,
}

// SAFETY: cells and metadata are the machine's own and do not move; a thread is a CPU; nobody caches translations.
unsafe impl Platform for Machine {
    type Format = Tiny;
    type File = Zeros;
    type SpinLock = Raw;
    type WriterLock = Raw;

    fn vm(&'static self) -> &'static Vm<Self> {
        &self.vm
    }
    fn local(&'static self, cpu: usize) -> &'static Local<Self> {
        &self.locals[cpu]
    }
    fn cpus(&'static self) -> usize {
        CPUS
    }
    fn cpu(&'static self) -> usize {
        CPU.with(Cell::get)
    }
    fn cells(&'static self, pfn: Pfn) -> &'static [AtomicU64] {
        self.watch[pfn.0 as usize].touch();
        &self.cells[pfn.0 as usize]
    }
    fn meta(&'static self, pfn: Pfn) -> &'static FrameMeta {
        if (pfn.0 as usize) < self.tables {
            self.watch[pfn.0 as usize].touch();
        }
        &self.meta[pfn.0 as usize]
    }
    fn page(&'static self, pfn: Pfn) -> NonNull<u8> {
        if self.whole.is_limited() {
            // What is charged is in such a page, plain for loom: so that it runs all orders of looking charges up, too.
            self.memory[pfn.0 as usize].fetch_add(0, Relaxed);
        }
        let page = || std::vec![[0; PAGE_SIZE as usize / 8]; self.meta.len()];
        NonNull::from(&self.bytes.get_or_init(page)[pfn.0 as usize]).cast()
    }
    unsafe fn clear_page(&'static self, pfn: Pfn) {
        self.memory[pfn.0 as usize].store(0, Relaxed);
        if self.bytes.get().is_some() {
            // SAFETY: the caller has the page alone.
            unsafe { self.page(pfn).write_bytes(0, PAGE_SIZE as usize) };
        }
    }
    unsafe fn copy_page(&'static self, to: Pfn, from: Pfn) {
        self.memory[to.0 as usize].store(self.memory[from.0 as usize].load(Relaxed), Relaxed);
    }
    fn shootdown(&'static self, flush: &Flush<'_>) {
        self.flushes.fetch_add(1, Relaxed);
        *self.cached.lock().unwrap() = false;
        let is_there = flush.range.contains(VirtAddr(self.stale_at.load(Relaxed)));
        if is_there && flush.tag == self.stale_in.load(Relaxed) {
            *self.stale.lock().unwrap() = 0;
        }
    }
    fn sync_local(&'static self, _: u64, _: VirtAddr, _: bool) {}
    fn ready(&'static self, _: u64) {
        drop(self.asleep.lock().unwrap());
        self.wake.notify_all();
    }
    fn wait(&'static self, ticket: &Ticket<'_, Self>) {
        let mut asleep = self.asleep.lock().unwrap();
        while !ticket.is_ready() {
            asleep = self.wake.wait(asleep).unwrap();
        }
    }
    fn relax(&'static self) {
        let spun = self.spun.fetch_add(1, Relaxed);
        assert!(spun < 100, "what somebody spins for does not come");
        // Else loom would let two threads that spin see, again and again, what was there before the other had changed it.
        fence(SeqCst);
        loom::thread::yield_now();
        fence(SeqCst);
    }
    fn random(&'static self) -> u64 {
        0
    }
    fn note(&'static self, note: Note) {
        match note {
            Note::TableAllocated(pfn) => {
                self.watch[pfn.0 as usize].change(true);
                self.assert_zero(pfn);
            }
            Note::TableFreed(pfn) => {
                self.assert_zero(pfn);
                self.watch[pfn.0 as usize].change(false);
            }
            Note::FrameAllocated(pfn, order) => self.hold(pfn, order, true),
            Note::FrameFreed(pfn, order) => {
                if pfn.0 == self.stale_frame.load(Relaxed) {
                    assert_eq!(*self.stale.lock().unwrap(), 0, "a page is free, and another CPU can use it");
                }
                self.hold(pfn, order, false);
            }
            _ => {}
        }
    }
}

impl Machine {
    /// A machine whose CPUs have so many tables in their caches, and a space; its root is one more.
    pub(crate) fn new(tables: [usize; CPUS]) -> &'static Machine {
        Machine::with_pages(tables, 0)
    }
    /// One with pages of private memory, nobody's yet, beside.
    pub(crate) fn with_pages(tables: [usize; CPUS], pages: usize) -> &'static Machine {
        let first = 2 + tables.iter().sum::<usize>(); // frame 0 is nobody
        let frames = first + pages;
        let m: &'static Machine = Box::leak(Box::new(Machine {
            vm: Vm::new(),
            locals: core::array::from_fn(|_| Local::new()),
            cells: (0..frames).map(|_| core::array::from_fn(|_| AtomicU64::new(0))).collect(),
            meta: (0..frames).map(|_| FrameMeta::default()).collect(),
            watch: (0..frames).map(|_| Watch::new()).collect(),
            tables: first,
            memory: (0..frames).map(|_| AtomicU64::new(0)).collect(),
            bytes: OnceLock::new(),
            held: (0..frames).map(|_| Watch::new()).collect(),
            spun: plain::AtomicU32::new(0),
            asleep: Mutex::new(()),
            wake: Condvar::new(),
            whole: Whole::default(),
            stale: Mutex::new(0),
            stale_at: plain::AtomicU64::new(0),
            stale_frame: plain::AtomicU32::new(0),
            stale_in: plain::AtomicU64::new(0),
            space: OnceLock::new(),
            child: OnceLock::new(),
            items: Pool::new(),
            link: OnceLock::new(),
            object: Watch::new(),
            linked: AtomicU32::new(1),
            retired: AtomicU32::new(0),
            flushes: AtomicU32::new(0),
            cached: Mutex::new(false),
            contents: AtomicU32::new(0),
        }));
        m.items.init(m);
        // Nor are pages tables, before they become some.
        m.watch[..1].iter().chain(&m.watch[first..]).for_each(|watch| watch.change(false));
        m.fill_cache(0, 1);
        assert!(m.space.set(PageTable::new(m).unwrap()).is_ok());
        let mut next = 2;
        for (cpu, n) in tables.into_iter().enumerate() {
            for pfn in next..next + n {
                m.fill_cache(cpu, pfn);
            }
            next += n;
        }
        become_cpu(0);
        m
    }
    fn fill_cache(&'static self, cpu: usize, pfn: usize) {
        let record = self.vm.records.take_one(self).unwrap();
        // SAFETY: the slot is ours and uninitialised.
        unsafe { record.write(TableRecord::new()) };
        self.meta[pfn].set_owner(record.as_ptr().cast());
        become_cpu(cpu);
        reserve::give_zeroed(self, &[Pfn(pfn as u32)]);
    }
    fn hold(&self, first: Pfn, order: u8, held: bool) {
        (0..1 << order).for_each(|i| self.held[(first.0 + i) as usize].change(held));
    }
    fn assert_zero(&self, pfn: Pfn) {
        // SAFETY: whoever takes or frees a table is alone with it; loom panics when that is not so.
        let zero = self.cells[pfn.0 as usize].iter().all(|c| unsafe { c.unsync_load() } == 0);
        assert!(zero, "a table in a cache that is not zero");
    }
    pub(crate) fn space(&self) -> &PageTable<Machine> {
        self.space.get().unwrap()
    }
    /// Moves the epoch on twice if it can, and hands tables that are past it to this CPU's cache.
    pub(crate) fn advance_and_collect(&'static self) {
        for _ in 0..2 {
            let now = self.vm.epoch.advance(self);
            collect(self, now, usize::MAX);
        }
    }

    /// The mapped pages, as (address, entry). Every table is alive, not empty, and counts right; every table that is
    /// not in a cache is in the tree or in limbo. Called when all threads have ended.
    pub(crate) fn audit(&'static self) -> Vec<(u64, u64)> {
        let (found, tables) = self.audit_of(self.space());
        let owned = self.watch[..self.tables].iter().filter(|w| w.is_owned()).count() as u64;
        let limbo = self.vm.tables_in_limbo.len(self) as u64;
        assert_eq!(owned, tables + limbo, "a table leaked");
        found
    }

    /// The same for the tables of one of many spaces: the mapped pages, and how many tables there are.
    pub(crate) fn audit_of(&'static self, table: &PageTable<Machine>) -> (Vec<(u64, u64)>, u64) {
        let (mut found, pin) = (Vec::new(), Pin::new(self));
        let tables = audit(table.root(&pin), 0, &mut found);
        let live = table.table_bytes().iter().sum::<u64>() / PAGE_SIZE;
        assert_eq!(live, tables, "tables counted as they were published and unlinked");
        (found, tables)
    }

    /// Frees the machine.
    ///
    /// # Safety
    /// Nobody uses it any more.
    pub(crate) unsafe fn free(&'static self) {
        for meta in &self.meta[1..self.tables] {
            let record = NonNull::new(meta.owner()).unwrap().cast::<TableRecord>();
            // SAFETY: taken from this slab in `fill_cache`, and nobody reads it any more.
            unsafe { self.vm.records.give(self, &[record]) };
        }
        // SAFETY: leaked by `new`, and nobody uses it any more. The space must not retire its root now.
        unsafe {
            let mut this = Box::from_raw(core::ptr::from_ref(self).cast_mut());
            core::mem::forget((this.space.take(), this.child.take()));
        }
    }
}

fn audit(table: Table<'_, Machine>, base: u64, found: &mut Vec<(u64, u64)>) -> u64 {
    let record = table.record();
    assert!(!record.is_dead(), "a dead table is linked");
    let (mut entries, mut tables) = (0, 1);
    for i in 0..Tiny::ENTRIES {
        let raw = table.entry(i);
        let va = base + i as u64 * Tiny::span(table.level());
        entries += (raw != 0) as u64;
        match table.child(raw) {
            Some(child) => tables += audit(child, va, found),
            None if raw != 0 => found.push((va, raw)),
            None => {}
        }
    }
    assert_eq!(record.entries(), Some(entries), "entries counted");
    assert!(entries > 0 || record.is_pinned(), "a live table is empty");
    tables
}
