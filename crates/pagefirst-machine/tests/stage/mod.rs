//! A platform whose every step can be watched. A test arms a step with something that happens right there, as another
//! CPU: so a race is one defined order of events, on one thread.
#![allow(dead_code, reason = "each test program uses its own part")]

#[path = "../gate/mod.rs"]
mod gate;

#[allow(unused_imports, reason = "each test program uses its own part")]
pub use gate::*;
use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::fault::{Outcome, Ticket};
use pagefirst::file::{File as _, FileCache, ReadError};
use pagefirst::frame::{Frame, FrameFlags, FrameMeta, Region};
use pagefirst::mem::Shared;
use pagefirst::platform::{Note, Platform};
use pagefirst::policy::Policy;
use pagefirst::space::{AddressSpace, Backing, Map, Place, VmaFlags};
use pagefirst::sync::RawLock;
use pagefirst::sync::epoch::Pin;
use pagefirst::tlb::Flush;
use pagefirst::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr, VirtRange};
use pagefirst::{Held, Local, Vm};
use pagefirst_machine::MachineFile;
use std::cell::Cell;
use std::error::Error;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

pub type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;
pub type Space = Arc<AddressSpace<Stage>>;
pub type Cache = Shared<Stage, FileCache<Stage>>;

pub const R: Prot = Prot::READ;
pub const RW: Prot = Prot::READ.union(Prot::WRITE);
/// What free frames hold.
pub const STALE: u64 = 0xa5a5_a5a5_a5a5_a5a5;

const FIRST: u32 = 64;
const CPUS: usize = 4;
const WORDS: usize = PAGE_SIZE as usize / 8;

/// A step of the library that the platform sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// What it says of frames and tables.
    Note(Note),
    /// A flush.
    Flush {
        range: VirtRange,
        tables: bool,
    },
    /// What this CPU needs before it tries again.
    Sync {
        tag: u64,
        addr: VirtAddr,
        tables: bool,
    },
    /// It spins.
    Relax,
    /// It waits for a ticket: asleep, in a kernel.
    Wait,
    /// It looks at a frame's metadata.
    Meta(Pfn),
    /// It has read this entry of a table at this level.
    Read(u64, u8),
    /// It looks at the attributes of an entry it has read.
    Attrs(u64),
    /// It turns preemption off, or on.
    Enter,
    Leave,
    /// It is about to use the bytes of a frame.
    Page(Pfn),
}

struct Armed {
    on: Box<dyn FnMut(&Step) -> bool + Send>,
    then: Box<dyn FnOnce() + Send>,
}

thread_local! {
    static CPU: Cell<usize> = const { Cell::new(0) };
    static STAGE: Cell<Option<&'static Stage>> = const { Cell::new(None) };
}

#[repr(align(4096))]
struct Page([AtomicU64; WORDS]);

pub struct Stage {
    vm: Vm<Stage>,
    locals: Vec<Local<Stage>>,
    pages: Vec<Page>,
    metas: Vec<FrameMeta>,
    armed: Mutex<Vec<Armed>>,
    log: Mutex<Vec<Step>>,
    turns: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stage {
    /// A stage with this many frames. This thread is its CPU 0.
    pub fn new(frames: u32) -> &'static Stage {
        CPU.set(0);
        // The metadata is elsewhere, but the region keeps room for it.
        let frames = frames + Region { first: Pfn(FIRST), frames }.meta_frames();
        let p: &'static Stage = Box::leak(Box::new(Stage {
            vm: Vm::new(),
            locals: (0..CPUS).map(|_| Local::new()).collect(),
            pages: (0..frames).map(|_| Page([const { AtomicU64::new(STALE) }; WORDS])).collect(),
            metas: (0..frames).map(|_| FrameMeta::default()).collect(),
            armed: Mutex::default(),
            log: Mutex::default(),
            turns: AtomicU64::new(0),
        }));
        p.vm.init(p, &[Region { first: Pfn(FIRST), frames }]).expect("room for the zero page");
        STAGE.set(Some(p));
        p
    }

    /// At the first step that fits, `then` happens: in the middle of it, so as another CPU (see [`on`]).
    pub fn at(&self, on: impl FnMut(&Step) -> bool + Send + 'static, then: impl FnOnce() + Send + 'static) {
        lock(&self.armed).push(Armed { on: Box::new(on), then: Box::new(then) });
    }
    /// The same, from the first step on that fits `after`.
    pub fn at_after(
        &'static self,
        after: impl FnMut(&Step) -> bool + Send + 'static,
        on: impl FnMut(&Step) -> bool + Send + 'static,
        then: impl FnOnce() + Send + 'static,
    ) {
        self.at(after, move || self.at(on, then));
    }
    /// The same with what may have to wait for what this thread is doing: it is another thread's. This one goes on when it
    /// has begun.
    pub fn begin_at(
        &'static self,
        on: impl FnMut(&Step) -> bool + Send + 'static,
        what: impl FnOnce() + Send + 'static,
        has_begun: impl Fn() -> bool + Send + 'static,
    ) -> Begun {
        let begun = Begun(Arc::default());
        let thread = begun.0.clone();
        self.at(on, move || {
            let handle = std::thread::spawn(move || {
                self.play(CPUS - 1);
                what();
            });
            while !has_begun() && !handle.is_finished() {
                std::thread::yield_now();
            }
            *lock(&thread) = Some(handle);
        });
        begun
    }
    /// Whether everything that was to happen has happened.
    pub fn is_done(&self) -> bool {
        lock(&self.armed).is_empty()
    }
    /// How much is still to happen.
    pub fn left(&self) -> usize {
        lock(&self.armed).len()
    }
    /// The steps since the last call, those that only read left out.
    pub fn steps(&self) -> Vec<Step> {
        std::mem::take(&mut *lock(&self.log))
    }

    fn step(&self, step: Step) {
        if !matches!(
            step,
            Step::Meta(_) | Step::Read(..) | Step::Attrs(_) | Step::Enter | Step::Leave | Step::Page(_)
        ) {
            lock(&self.log).push(step);
        }
        let mut armed = lock(&self.armed);
        let then = armed.iter_mut().position(|a| (a.on)(&step)).map(|i| armed.remove(i).then);
        drop(armed);
        if let Some(then) = then {
            then();
        }
    }

    /// This thread plays this CPU of the stage, beside others: whoever does it sees to what may happen at once.
    pub fn play(&'static self, cpu: usize) {
        CPU.set(cpu);
        STAGE.set(Some(self));
    }
    pub fn space(&'static self) -> Result<Space> {
        self.space_with(Policy::default())
    }
    pub fn space_with(&'static self, policy: Policy) -> Result<Space> {
        Ok(Arc::new(AddressSpace::new(self, policy)?))
    }
    pub fn cache(&'static self, file: &MachineFile, pages: u64) -> Result<Cache> {
        Ok(FileCache::new(self, file.clone(), pages * PAGE_SIZE)?)
    }
    /// Brings a page of a file into its cache.
    pub fn warm(&'static self, cache: &Cache, index: u64) -> Result {
        if !cache.file().is_stored() {
            // A hole of a memory file is read without a page for it, and gets one by a fault.
            let (s, base) = (self.space()?, VirtAddr(4 << 30));
            shared(&s, base, cache, cache.size().div_ceil(PAGE_SIZE), Prot::READ)?;
            let end = fault(&s, VirtAddr(base.0 + index * PAGE_SIZE), Access::Read);
            assert_eq!(end, "mapped", "page {index}");
            return Ok(());
        }
        let read = cache.read_at(self, index * PAGE_SIZE, &mut [0]);
        read.map_err(|e: ReadError<Stage>| format!("page {index}: {e:?}"))?;
        Ok(())
    }
    pub fn held(&'static self) -> Held {
        self.vm.held(self)
    }
    pub fn vm_quiesce(&'static self) {
        self.vm.quiesce(self);
    }
    /// Frees what has waited long enough.
    pub fn collect(&'static self) {
        self.vm.collect(self, usize::MAX);
    }
    /// Takes every frame that is free.
    pub fn take_all(&'static self) -> Vec<Frame<Stage>> {
        (0..CPUS).flat_map(|cpu| std::iter::from_fn(move || on(cpu, || Frame::new(self)).ok())).collect()
    }
    /// Fails unless this CPU holds no pin and no lock (debug builds can tell) and every table is in a tree.
    pub fn nothing_held(&'static self, spaces: &[&Space]) {
        drop(Pin::new(self));
        self.vm.quiesce(self);
        let live: u64 = spaces.iter().map(|s| s.tables().tables.iter().sum::<u64>()).sum();
        assert_eq!(self.vm.held(self).tables, live, "a table is reserved, or lost");
    }
}

/// What another thread does.
pub struct Begun(Arc<Mutex<Option<JoinHandle<()>>>>);

impl Begun {
    /// Waits until it is done.
    pub fn end(self) -> Result {
        let thread = lock(&self.0).take().ok_or("it has not begun")?;
        thread.join().map_err(|_| "it failed")?;
        Ok(())
    }
}

/// Runs as another CPU.
pub fn on<T>(cpu: usize, f: impl FnOnce() -> T) -> T {
    let before = CPU.replace(cpu);
    let result = f();
    CPU.set(before);
    result
}

/// The number of steps that fit.
pub fn count(steps: &[Step], fits: impl Fn(&Step) -> bool) -> usize {
    steps.iter().filter(|s| fits(s)).count()
}

pub fn is_table_allocated(step: &Step) -> bool {
    matches!(step, Step::Note(Note::TableAllocated(_)))
}
pub fn is_table_locked(step: &Step) -> bool {
    matches!(step, Step::Note(Note::TableLocked(..)))
}
pub fn is_frame_allocated(step: &Step) -> bool {
    matches!(step, Step::Note(Note::FrameAllocated(..)))
}
/// A folio of this order is allocated: `at` is its number from then on.
pub fn allocates(order: u8, at: &Arc<AtomicU32>) -> impl FnMut(&Step) -> bool + Send + use<> {
    let at = at.clone();
    move |step| match step {
        Step::Note(Note::FrameAllocated(pfn, of)) if *of == order => {
            at.store(pfn.0, Release);
            true
        }
        _ => false,
    }
}
/// The walk has found an empty slot in a leaf table.
pub fn is_empty_leaf_slot(step: &Step) -> bool {
    *step == Step::Read(0, 0)
}
/// Fits at the `n`th step that `on` fits, counted from 1.
pub fn nth(n: u32, mut on: impl FnMut(&Step) -> bool + Send) -> impl FnMut(&Step) -> bool + Send {
    let mut seen = 0;
    move |step| {
        seen += on(step) as u32;
        seen == n
    }
}

pub fn page(at: VirtAddr, i: u64) -> VirtAddr {
    VirtAddr(at.0 + i * PAGE_SIZE)
}

/// The leaf entry for an address; 0 for none.
pub fn entry(space: &Space, va: VirtAddr) -> u64 {
    leaf(space, va).0
}

/// The same, and the level of the table it is in.
pub fn leaf(space: &Space, va: VirtAddr) -> (u64, u8) {
    let stage = space.platform();
    let mut table = space.page_table().root_frame();
    for level in (0..X86_64::LEVELS).rev() {
        let raw = stage.words(table)[X86_64::index(va, level)].load(Acquire);
        match X86_64::child(raw, level) {
            Some(child) => table = child,
            None => return (raw, level),
        }
    }
    unreachable!("level 0 has no children")
}

/// Changes a leaf entry as hardware would.
pub fn hardware_marks(space: &Space, va: VirtAddr, more: Attrs) {
    let stage = space.platform();
    let mut table = space.page_table().root_frame();
    for level in (0..X86_64::LEVELS).rev() {
        let cell = &stage.words(table)[X86_64::index(va, level)];
        let raw = cell.load(Acquire);
        match X86_64::child(raw, level) {
            Some(child) => table = child,
            None => cell.store(X86_64::with_attrs(raw, X86_64::attrs(raw) | more), Release),
        }
    }
}

pub fn frame(space: &Space, va: VirtAddr) -> Option<Pfn> {
    X86_64::frame(entry(space, va), 0)
}

pub fn attrs(space: &Space, va: VirtAddr) -> Attrs {
    X86_64::attrs(entry(space, va))
}

/// Maps anonymous memory of this many pages at a fixed place.
pub fn anonymous(space: &Space, at: VirtAddr, pages: u64, prot: Prot) -> Result {
    space.map(Map { place: Place::Fixed(at), ..Map::anonymous(pages * PAGE_SIZE, prot) })?;
    Ok(())
}

/// Maps a file privately, from its start.
pub fn private(space: &Space, at: VirtAddr, file: &Cache, pages: u64, prot: Prot) -> Result {
    let backing = Backing::File { file: file.clone(), first: 0 };
    space.map(Map { place: Place::Fixed(at), backing, ..Map::anonymous(pages * PAGE_SIZE, prot) })?;
    Ok(())
}

/// Maps a file for all to see, from its start.
pub fn shared(space: &Space, at: VirtAddr, file: &Cache, pages: u64, prot: Prot) -> Result {
    let (backing, flags) = (Backing::File { file: file.clone(), first: 0 }, VmaFlags::SHARED);
    space.map(Map { place: Place::Fixed(at), backing, flags, ..Map::anonymous(pages * PAGE_SIZE, prot) })?;
    Ok(())
}

/// How a fault ended, in a word.
pub fn fault(space: &Space, at: VirtAddr, access: Access) -> String {
    match space.fault(at, access) {
        Outcome::Mapped { .. } => "mapped".into(),
        Outcome::Spurious => "spurious".into(),
        Outcome::Blocked(_) => "blocked".into(),
        Outcome::Error(error) => format!("{error:?}"),
    }
}

impl Stage {
    pub fn words(&'static self, pfn: Pfn) -> &'static [AtomicU64; WORDS] {
        &self.pages[(pfn.0 - FIRST) as usize].0
    }
    pub fn counts(&'static self, pfn: Pfn) -> (u32, u32) {
        let counts = self.metas[(pfn.0 - FIRST) as usize].counts();
        (counts.refs, counts.maps)
    }
    /// A frame's flags: no step, so a step may ask for them.
    pub fn flags(&'static self, pfn: Pfn) -> FrameFlags {
        self.metas[(pfn.0 - FIRST) as usize].flags()
    }
}

#[derive(Default)]
pub struct Lock(AtomicBool);

// SAFETY: one compare-exchange wins; Acquire and Release order what is written between.
unsafe impl RawLock<Stage> for Lock {
    fn lock(&self, p: &'static Stage) {
        while !self.try_lock(p) {
            p.relax();
        }
    }
    fn try_lock(&self, _: &'static Stage) -> bool {
        self.0.compare_exchange(false, true, Acquire, Relaxed).is_ok()
    }
    unsafe fn unlock(&self, _: &'static Stage) {
        self.0.store(false, Release);
    }
}

// SAFETY: cells, metadata and pages are vectors that live for ever; one thread plays all CPUs, one at a time, each with
// state of its own; there are no translations to shoot down.
unsafe impl Platform for Stage {
    type Format = Watched;
    type File = MachineFile;
    type SpinLock = Lock;
    type WriterLock = Lock;

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
        CPU.get()
    }
    fn enter(&'static self) -> usize {
        self.step(Step::Enter);
        self.cpu()
    }
    fn leave(&'static self) {
        self.step(Step::Leave);
    }
    fn cells(&'static self, pfn: Pfn) -> &'static [AtomicU64] {
        self.words(pfn)
    }
    fn meta(&'static self, pfn: Pfn) -> &'static FrameMeta {
        self.step(Step::Meta(pfn));
        &self.metas[pfn.0.wrapping_sub(FIRST) as usize]
    }
    fn page(&'static self, pfn: Pfn) -> NonNull<u8> {
        self.step(Step::Page(pfn));
        NonNull::from(self.words(pfn)).cast()
    }
    fn shootdown(&'static self, flush: &Flush<'_>) {
        self.step(Step::Flush { range: flush.range, tables: flush.tables });
    }
    fn sync_local(&'static self, tag: u64, addr: VirtAddr, tables: bool) {
        self.step(Step::Sync { tag, addr, tables });
    }
    fn relax(&'static self) {
        let turns = self.turns.fetch_add(1, Relaxed);
        assert!(turns < 1_000_000, "a wait that cannot end: one thread plays all CPUs");
        self.step(Step::Relax);
    }
    fn wait(&'static self, ticket: &Ticket<'_, Self>) {
        self.step(Step::Wait);
        while !ticket.is_ready() {
            self.relax();
        }
    }
    fn random(&'static self) -> u64 {
        4
    }
    fn note(&'static self, note: Note) {
        if let Note::FrameFreed(pfn, _) = note {
            self.words(pfn).iter().for_each(|w| w.store(STALE, Relaxed));
        }
        self.step(Step::Note(note));
    }
}

/// The x86-64 format, watched.
pub struct Watched;

fn watched(step: Step) {
    if let Some(stage) = STAGE.get() {
        stage.step(step);
    }
}

// SAFETY: every answer is that of the format it watches.
unsafe impl Format for Watched {
    const LEVELS: u8 = X86_64::LEVELS;
    const BITS: u32 = X86_64::BITS;
    const USER_END: VirtAddr = X86_64::USER_END;

    fn is_canonical(va: VirtAddr) -> bool {
        X86_64::is_canonical(va)
    }
    fn table(pfn: Pfn) -> u64 {
        X86_64::table(pfn)
    }
    fn transit(leaf: Pfn) -> u64 {
        X86_64::transit(leaf)
    }
    fn leaf(pfn: Pfn, level: u8, attrs: Attrs) -> u64 {
        X86_64::leaf(pfn, level, attrs)
    }
    fn child(raw: u64, level: u8) -> Option<Pfn> {
        watched(Step::Read(raw, level));
        X86_64::child(raw, level)
    }
    fn frame(raw: u64, level: u8) -> Option<Pfn> {
        X86_64::frame(raw, level)
    }
    fn attrs(raw: u64) -> Attrs {
        watched(Step::Attrs(raw));
        X86_64::attrs(raw)
    }
    fn with_attrs(raw: u64, attrs: Attrs) -> u64 {
        X86_64::with_attrs(raw, attrs)
    }
}
