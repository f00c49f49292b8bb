//! Tests of the page cache, and the small machine they run on: an arena, and threads as CPUs.
//!
//! Free frames are filled with a pattern, so that a byte that was not cleared shows.

extern crate std;

mod bytes;
mod contents;
mod index;
mod memory;
mod race;
mod size;

use super::{File, FileCache, FillGuard, Io, StoreGuard};
use crate::arch::X86_64;
use crate::frame::{FrameFlags, FrameMeta, Region};
use crate::mem::Shared;
use crate::platform::{Note, Platform};
use crate::sync::RawLock;
use crate::tlb::Flush;
use crate::types::{PAGE_SIZE, Pfn, VirtAddr};
use crate::vm::{Held, Local, Vm};
use core::cell::{Cell, RefCell};
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicBool, AtomicU64};
use std::boxed::Box;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::vec::Vec;

const FIRST: Pfn = Pfn(64);
const CPUS: usize = 8;
const STALE: u64 = 0xa5a5_a5a5_a5a5_a5a5;
const PAGE: usize = PAGE_SIZE as usize;

std::thread_local! {
    static CPU: Cell<usize> = const { Cell::new(0) };
    /// A frame, and its flags when this thread last asked for its words.
    static WATCH: Cell<Option<(Pfn, FrameFlags)>> = const { Cell::new(None) };
    /// Called where this thread tells who waits for something.
    static BELL: RefCell<Option<Box<dyn Fn()>>> = const { RefCell::new(None) };
}

#[repr(align(4096))]
struct Page([AtomicU64; PAGE / 8]);

pub struct Machine {
    vm: Vm<Machine>,
    first: Pfn,
    locals: Vec<Local<Machine>>,
    /// Each an allocation of its own: who leaves a page is seen under Miri, which takes time by the square of its size.
    pages: Vec<Box<Page>>,
    metas: Vec<FrameMeta>,
}

#[derive(Default)]
pub struct Lock(AtomicBool);

// SAFETY: one compare-exchange wins; Acquire and Release order what is written between.
unsafe impl RawLock<Machine> for Lock {
    fn lock(&self, p: &'static Machine) {
        while !self.try_lock(p) {
            p.relax();
        }
    }
    fn try_lock(&self, _: &'static Machine) -> bool {
        self.0.compare_exchange(false, true, Acquire, Relaxed).is_ok()
    }
    unsafe fn unlock(&self, _: &'static Machine) {
        self.0.store(false, Release);
    }
}

// SAFETY: cells, metadata and pages are vectors that live for ever; each thread is a CPU of its own.
unsafe impl Platform for Machine {
    type Format = X86_64;
    type File = Disk;
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
    fn cells(&'static self, pfn: Pfn) -> &'static [AtomicU64] {
        if let Some((watched, _)) = WATCH.get()
            && watched == pfn
        {
            WATCH.set(Some((pfn, self.meta(pfn).flags())));
        }
        &self.pages[(pfn.0 - self.first.0) as usize].0
    }
    fn meta(&'static self, pfn: Pfn) -> &'static FrameMeta {
        &self.metas[pfn.0.wrapping_sub(self.first.0) as usize]
    }
    fn page(&'static self, pfn: Pfn) -> NonNull<u8> {
        NonNull::from(self.cells(pfn)).cast()
    }
    fn shootdown(&'static self, _: &Flush<'_>) {}
    fn sync_local(&'static self, _: u64, _: VirtAddr, _: bool) {}
    fn ready(&'static self, key: u64) {
        BELL.with_borrow(|bell| bell.iter().for_each(|ring| ring()));
        self.vm.wake(self, key);
    }
    fn relax(&'static self) {
        std::thread::yield_now();
    }
    fn random(&'static self) -> u64 {
        4
    }
    fn note(&'static self, note: Note) {
        if let Note::FrameFreed(pfn, _) = note {
            let words = self.page(pfn).cast::<[u64; PAGE / 8]>();
            // SAFETY: nobody uses the frame any more. Not as atomics, so that Miri would see it if somebody did.
            unsafe { words.write([STALE; PAGE / 8]) };
        }
    }
}

/// All machines, which live for ever: what nobody leads to is a leak, to Miri.
static MACHINES: Mutex<Vec<&Machine>> = Mutex::new(Vec::new());

/// A machine with `frames` frames.
pub(crate) fn machine(frames: u32) -> &'static Machine {
    // The metadata is elsewhere, but the region keeps room for it.
    let room = Region { first: FIRST, frames }.meta_frames();
    machine_with(Region { first: FIRST, frames: frames + room })
}

fn machine_with(region: Region) -> &'static Machine {
    CPU.set(0);
    let frames = region.frames;
    let p: &'static Machine = Box::leak(Box::new(Machine {
        vm: Vm::new(),
        first: region.first,
        locals: (0..CPUS).map(|_| Local::new()).collect(),
        pages: (0..frames).map(|_| Box::new(Page([const { AtomicU64::new(STALE) }; PAGE / 8]))).collect(),
        metas: (0..frames).map(|_| FrameMeta::default()).collect(),
    }));
    MACHINES.lock().unwrap().push(p);
    p.vm.init(p, &[region]).expect("room for the zero page");
    p
}

impl Machine {
    /// Nothing is held but the zero page.
    pub(crate) fn assert_empty(&'static self) {
        self.vm.quiesce(self);
        assert_eq!(self.vm.held(self), Held { frames: 1, ..Held::default() });
    }
    pub(crate) fn cache(&'static self, disk: &Disk, size: u64) -> Shared<Machine, FileCache<Machine>> {
        FileCache::new(self, disk.clone(), size).expect("memory for a cache")
    }
}

type Hook = Box<dyn Fn(u64) + Send + Sync>;

/// A file: stored pages over a pattern, as long as `len` says.
#[derive(Clone)]
pub struct Disk(Arc<Inner>);

#[derive(Default)]
struct Inner {
    stored: Mutex<BTreeMap<u64, Vec<u8>>>,
    /// Where stored bytes end; nothing is read beyond.
    len: AtomicU64,
    /// Pages that are not stored hold their index in every word, rather than nothing.
    numbered: bool,
    fails: AtomicBool,
    reads: AtomicU64,
    /// Called in each read, before the page is filled.
    hook: Mutex<Option<Arc<Hook>>>,
}

impl Disk {
    /// Every page, up to the end of what can be, holds its index in every word.
    pub(crate) fn numbered() -> Self {
        Disk(Arc::new(Inner { numbered: true, len: AtomicU64::new(u64::MAX), ..Inner::default() }))
    }
    /// Nothing but what is written.
    pub(crate) fn empty() -> Self {
        Disk(Arc::new(Inner { len: AtomicU64::new(u64::MAX), ..Inner::default() }))
    }
    fn on_read(&self, hook: impl Fn(u64) + Send + Sync + 'static) {
        *self.0.hook.lock().unwrap() = Some(Arc::new(Box::new(hook)));
    }
    fn no_hook(&self) {
        *self.0.hook.lock().unwrap() = None;
    }
    fn stored(&self, index: u64) -> Option<Vec<u8>> {
        self.0.stored.lock().unwrap().get(&index).cloned()
    }
    fn reads(&self) -> u64 {
        self.0.reads.load(Relaxed)
    }
}

impl PartialEq for Disk {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
impl Eq for Disk {}

impl File for Disk {
    fn id(&self) -> u64 {
        1
    }
    fn read(&self, index: u64, mut page: FillGuard<'_>) -> Io {
        assert!(*page == [0; PAGE], "a page that was not cleared");
        self.0.reads.fetch_add(1, Relaxed);
        let hook = self.0.hook.lock().unwrap().clone();
        if let Some(hook) = hook {
            hook(index);
        }
        if self.0.fails.load(Relaxed) {
            page.fill(0xee);
            return Io::Error;
        }
        let below = self.0.len.load(Relaxed).saturating_sub(index * PAGE_SIZE).min(PAGE_SIZE) as usize;
        match self.0.stored.lock().unwrap().get(&index) {
            Some(bytes) => page[..bytes.len()].copy_from_slice(bytes),
            None if self.0.numbered => {
                for word in page[..below / 8 * 8].as_chunks_mut().0 {
                    *word = index.to_ne_bytes();
                }
            }
            None => {}
        }
        Io::Ready
    }
    fn write(&self, index: u64, bytes: StoreGuard<'_>) -> Io {
        if self.0.fails.load(Relaxed) {
            return Io::Error;
        }
        self.0.stored.lock().unwrap().insert(index, bytes.to_vec());
        Io::Ready
    }
    fn forget(&self, bytes: Range<u64>) {
        let mut stored = self.0.stored.lock().unwrap();
        for (index, page) in stored.iter_mut() {
            let at = |byte: u64| byte.saturating_sub(index * PAGE_SIZE).min(page.len() as u64) as usize;
            let (start, end) = (at(bytes.start), at(bytes.end));
            page[start..end].fill(0);
        }
    }
    fn tracks_writes(&self) -> bool {
        true
    }
}

/// Numbers that look random, the same in every run (xorshift64*).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}
