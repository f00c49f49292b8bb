//! Models of the tables' protocols for loom: the library's own code over a machine of a few tables.
//!
//! | model | file | what it shows | sentence of `lib.rs` |
//! |---|---|---|---|
//! | `r01_…`, `r02_…` | `install` | one mapping, one table, the other table given back | 1: the slot is what the fault saw |
//! | `r11_…` | `install` | an unmap that announced leaves nothing behind | 2: found before the lock, refused after it |
//! | `c24_install_against_retire` | `install` | an entry never lands in a dead table, the dead table has one owner | 3 |
//! | `dead_table_hides_no_…` | `install` | a dead table says nothing about what came after it | 2 and 3 together |
//! | `c35_…` | `install` | hardware and other walkers see no table before its entries | 1: one store publishes the chain |
//! | `r03_small_against_huge_…` | `huge` | a small or a huge page, never both | 1 |
//! | `huge_page_over_a_dead_table_…` | `huge` | a huge page comes after the flush of the table that was there | |
//! | `r11_huge_page_…` | `huge` | as `r11_…`, for a huge page | 2 |
//! | `r15_…` | `huge` | no bit is lost in a split, and nobody takes it for nothing | |
//! | `x12_write_back_…` | `clean` | no write is lost to write-back | `file::store` |
//! | `take_…` | `take` | what hardware marks is in what is taken, and does not come back | 2 |
//! | `c06_walk_against_retire_and_reuse` | `reuse` | a table found under a pin stays a table | 3: a grace period |
//! | `retire_tags_in_order` | `reuse` | who retires late does not shorten another's grace period | 3 |
//! | `r12_…` | `fork` | a page that fork shares is written by nobody; a pinned one is not shared; nor is one reused that somebody reads | |
//! | `epoch_…` | `epoch` | no reader is overtaken; what it read happened before the reuse | `sync::epoch` |
//! | `link_against_replace` | `epoch` | the same for [`Link`](crate::mem::Link) and the slabs | `mem::shared` |
//! | `link_to_what_is_shared` | `epoch` | what ends with what links to it is read by nobody | `mem::shared` |
//!
//! loom's false greens (loom#392) are met as follows: every thread, main included, starts by locking and unlocking
//! one gate; every model is run once for each rotation of its roles, and each mutant it names must die in each.
//!
//! A [`Watch`] stands beside every table. It is a cell that loom checks for data races, and says whether the table is
//! anybody's: a touch of a freed table panics, and so does one that is not ordered against the table's next owner,
//! even where the value read would have been the right one. (This is stronger than poison in the entries, and costs
//! no atomic operations.)

mod clean;
mod epoch;
mod fork;
mod huge;
mod install;
mod reuse;
mod take;

use super::record::TableRecord;
use super::{PageTable, Table, collect, reserve};
use crate::arch::{Attrs, Format, Tiny};
use crate::file::{File, FillGuard, Io, StoreGuard};
use crate::frame::FrameMeta;
use crate::mem::{Link, Past, Pool, Pooled, Shared};
use crate::platform::{Note, Platform};
use crate::sync::RawLock;
use crate::sync::atomic::{AtomicU32, AtomicU64, Relaxed};
use crate::sync::epoch::Pin;
use crate::tlb::Flush;
use crate::types::{PAGE_SIZE, Pfn, VirtAddr, VirtRange};
use crate::vm::{Local, Vm};
use core::ptr::NonNull;
use loom::cell::UnsafeCell;
use loom::sync::{Mutex, MutexGuard};
use std::boxed::Box;
use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::AtomicUsize;
use std::vec::Vec;

/// CPUs, one for each role.
const CPUS: usize = 3;

loom::thread_local! {
    static CPU: Cell<usize> = Cell::new(0);
}

fn become_cpu(cpu: usize) {
    CPU.with(|c| c.set(cpu));
}

/// Whether a thing may be touched, in a cell that loom checks for races.
struct Watch(UnsafeCell<bool>);

// SAFETY: loom runs one thread at a time, and panics when two accesses race.
unsafe impl Sync for Watch {}
// SAFETY: as above.
unsafe impl Send for Watch {}

impl Watch {
    fn new() -> Self {
        Watch(UnsafeCell::new(true))
    }
    /// A touch by somebody who thinks that it is there.
    fn touch(&self) {
        // SAFETY: loom checked that no write races with this.
        assert!(self.0.with(|owned| unsafe { *owned }), "touched after it was freed");
    }
    fn change(&self, to: bool) {
        // SAFETY: loom checked that nothing races with this.
        let was = self.0.with_mut(|owned| unsafe { core::mem::replace(&mut *owned, to) });
        assert_ne!(was, to, "{}", if to { "taken twice" } else { "freed twice" });
    }
    fn is_owned(&self) -> bool {
        // SAFETY: as in `touch`.
        self.0.with(|owned| unsafe { *owned })
    }
}

/// A lock that loom knows.
#[derive(Default)]
struct Raw {
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

/// No model maps a file.
#[derive(Clone, PartialEq, Eq)]
enum NoFile {}
impl File for NoFile {
    fn id(&self) -> u64 {
        match *self {}
    }
    fn read(&self, _: u64, _: FillGuard<'_>) -> Io {
        match *self {}
    }
    fn write(&self, _: u64, _: StoreGuard<'_>) -> Io {
        match *self {}
    }
    fn forget(&self, _: core::ops::Range<u64>) {
        match *self {}
    }
    fn tracks_writes(&self) -> bool {
        match *self {}
    }
}

/// What the models' [`Link`](crate::mem::Link) links to, and what that links to.
struct Item {
    watch: Watch,
    below: Option<Shared<Machine, Item>>,
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
    fn above(below: Option<Shared<Machine, Item>>) -> Self {
        Item { watch: Watch::new(), below }
    }
    fn touch(&self) {
        self.watch.touch();
        if let Some(below) = &self.below {
            below.touch();
        }
    }
}

/// A machine that lives for one execution of a model.
struct Machine {
    vm: Vm<Machine>,
    locals: [Local<Machine>; CPUS],
    cells: Vec<[AtomicU64; Tiny::ENTRIES]>,
    meta: Vec<FrameMeta>,
    watch: Vec<Watch>,
    /// Frames that are tables; those behind are pages.
    tables: usize,
    /// What a page holds: a word.
    memory: Vec<AtomicU64>,
    /// Another CPU's translation of page 0: an entry, or none; gone with the next shootdown.
    stale: Mutex<u64>,
    space: OnceLock<PageTable<Machine>>,
    child: OnceLock<PageTable<Machine>>,
    items: Pool<Machine, Item>,
    link: OnceLock<Link<Machine, Item>>,
    /// Something that the epoch alone protects, and whether readers can find it.
    object: Watch,
    linked: AtomicU32,
    /// The announcement of protocol 2, as a VMA's `retired`.
    retired: AtomicU32,
    /// Shootdowns so far.
    flushes: AtomicU32,
    /// Whether a CPU has cached a translation that allows writing; a flush takes it.
    cached: Mutex<bool>,
    /// What is in the one page that is looked at.
    contents: AtomicU32,
}

// SAFETY: cells and metadata are the machine's own and do not move; a thread is a CPU; nobody caches translations.
unsafe impl Platform for Machine {
    type Format = Tiny;
    type File = NoFile;
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
        self.watch[pfn.0 as usize].touch();
        &self.meta[pfn.0 as usize]
    }
    fn page(&'static self, _: Pfn) -> NonNull<u8> {
        unreachable!("no model touches a page")
    }
    unsafe fn copy_page(&'static self, to: Pfn, from: Pfn) {
        self.memory[to.0 as usize].store(self.memory[from.0 as usize].load(Relaxed), Relaxed);
    }
    fn shootdown(&'static self, _: &Flush<'_>) {
        self.flushes.fetch_add(1, Relaxed);
        *self.cached.lock().unwrap() = false;
        *self.stale.lock().unwrap() = 0;
    }
    fn sync_local(&'static self, _: u64, _: VirtAddr, _: bool) {}
    fn relax(&'static self) {
        loom::thread::yield_now();
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
            _ => {}
        }
    }
}

impl Machine {
    /// A machine whose CPUs have so many tables in their caches, and a space; its root is one more.
    fn new(tables: [usize; CPUS]) -> &'static Machine {
        Machine::with_pages(tables, 0)
    }
    /// One with pages of private memory, nobody's yet, beside.
    fn with_pages(tables: [usize; CPUS], pages: usize) -> &'static Machine {
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
            stale: Mutex::new(0),
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
        m.watch[0].change(false);
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
    fn assert_zero(&self, pfn: Pfn) {
        // SAFETY: whoever takes or frees a table is alone with it; loom panics when that is not so.
        let zero = self.cells[pfn.0 as usize].iter().all(|c| unsafe { c.unsync_load() } == 0);
        assert!(zero, "a table in a cache that is not zero");
    }
    fn space(&self) -> &PageTable<Machine> {
        self.space.get().unwrap()
    }
    /// Moves the epoch on twice if it can, and hands tables that are past it to this CPU's cache.
    fn advance_and_collect(&'static self) {
        for _ in 0..2 {
            let now = self.vm.epoch.advance(self);
            collect(self, now, usize::MAX);
        }
    }

    /// The mapped pages, as (address, entry). Every table is alive, not empty, and counts right; every table that is
    /// not in a cache is in the tree or in limbo. Called when all threads have ended.
    fn audit(&'static self) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        let tables = {
            let pin = Pin::new(self);
            audit(self.space().root(&pin), 0, &mut found)
        };
        let live = self.space().table_bytes().iter().sum::<u64>() / PAGE_SIZE;
        assert_eq!(live, tables, "tables counted as they were published and unlinked");
        let owned = self.watch[..self.tables].iter().filter(|w| w.is_owned()).count() as u64;
        let limbo = self.vm.tables_in_limbo.len(self) as u64;
        assert_eq!(owned, tables + limbo, "a table leaked");
        found
    }

    /// Frees the machine.
    ///
    /// # Safety
    /// Nobody uses it any more.
    unsafe fn free(&'static self) {
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

/// The entry for the page with this number.
fn entry(page: u32) -> u64 {
    Tiny::leaf(Pfn(page), 0, Attrs::empty())
}
/// The range of the pages `first..end`, by address.
fn pages(first: u64, end: u64) -> VirtRange {
    VirtRange::new(VirtAddr(first * PAGE_SIZE), VirtAddr(end * PAGE_SIZE))
}

/// What one thread does; the number it ends with is for the model's last check.
type Role = fn(&'static Machine) -> u64;

/// Runs a model: `setup`, all roles at once, `end`. The role numbered `main` runs on loom's first thread.
#[track_caller]
fn check<const N: usize>(
    bound: usize,
    main: usize,
    setup: fn() -> &'static Machine,
    roles: [Role; N],
    end: fn(&'static Machine, [u64; N]),
) {
    let executions = std::sync::Arc::new(AtomicUsize::new(0));
    let count = executions.clone();
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(bound);
    model.max_branches = 100_000;
    let began = std::time::Instant::now();
    model.check(move || {
        count.fetch_add(1, Relaxed);
        let m = setup();
        let gate = loom::sync::Arc::new(Mutex::new(()));
        let start = |gate: &Mutex<()>, role: usize| {
            drop(gate.lock().unwrap());
            become_cpu(role);
        };
        let others: Vec<_> = (1..N)
            .map(|i| (main + i) % N)
            .map(|role| {
                let gate = gate.clone();
                let run = move || {
                    start(&gate, role);
                    drop(gate);
                    roles[role](m)
                };
                (role, loom::thread::spawn(run))
            })
            .collect();
        start(&gate, main);
        let mut results = [0; N];
        results[main] = roles[main](m);
        for (role, thread) in others {
            results[role] = thread.join().unwrap();
        }
        become_cpu(0);
        end(m, results);
        // SAFETY: all threads have ended.
        unsafe { m.free() };
    });
    std::println!(
        "{} executions in {:.2} s, preemptions up to {bound}",
        executions.load(Relaxed),
        began.elapsed().as_secs_f64()
    );
}
