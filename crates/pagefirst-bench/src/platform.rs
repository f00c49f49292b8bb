//! A platform for measuring: one CPU, memory, and no more.
//!
//! Nothing is counted or checked, frames are found by one addition, and a flush does nothing: there is no hardware
//! that walks these tables, and the peers flush nothing either.

use memmap2::{Advice, MmapMut, MmapOptions};
use pagefirst::arch::X86_64;
use pagefirst::frame::{FrameMeta, Region};
use pagefirst::platform::Platform;
use pagefirst::sync::RawLock;
use pagefirst::tlb::Flush;
use pagefirst::types::{PAGE_SIZE, Pfn, VirtAddr};
use pagefirst::{Local, Vm};
use pagefirst_machine::MachineFile;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};

/// Memory and one CPU.
pub struct Bench {
    base: NonNull<u8>,
    vm: Vm<Bench>,
    local: Local<Bench>,
    random: AtomicU64,
    _map: MmapMut,
}

// SAFETY: the library's part is `Sync` by itself, and the memory is used through it.
unsafe impl Sync for Bench {}

static MADE: AtomicBool = AtomicBool::new(false);

impl Bench {
    /// The platform, with so many bytes of memory, all touched. There is one, for the thread that made it.
    ///
    /// # Panics
    /// When it was made before, or the host has no memory.
    pub fn new(bytes: usize) -> &'static Bench {
        assert!(!MADE.swap(true, Relaxed), "there is one platform, for one thread");
        let mut map = MmapOptions::new().len(bytes).map_anon().expect("memory for the benchmark");
        // A host without huge pages does without.
        let _ = map.advise(Advice::HugePage);
        let region = Region {
            first: Pfn(0),
            frames: u32::try_from(bytes as u64 / PAGE_SIZE).expect("at most 16 TiB"),
        };
        // Touched, but for the metadata, which must be zero.
        map[region.meta_frames() as usize * PAGE_SIZE as usize..].fill(0xa5);
        let bench: &'static Bench = Box::leak(Box::new(Bench {
            base: NonNull::new(map.as_mut_ptr()).expect("a mapping is never at address 0"),
            vm: Vm::new(),
            local: Local::new(),
            random: AtomicU64::new(1),
            _map: map,
        }));
        bench.vm.init(bench, &[region]).expect("memory for the zero page");
        bench
    }

    /// Where physical address 0 is mapped.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    #[inline]
    fn at(&self, pfn: Pfn) -> NonNull<u8> {
        // SAFETY: the library asks for frames of the region alone, which is as long as the mapping.
        unsafe { self.base.add(pfn.0 as usize * PAGE_SIZE as usize) }
    }
}

// SAFETY: frames and metadata are answered from one mapping that lives for ever, each at one address. There is one
// platform, and its maker's thread is the only CPU: `&'static Bench` could be sent to another thread, but nothing in
// this crate starts one. No hardware caches translations. There is no user code, and on one thread nobody writes to a
// page while it is copied.
unsafe impl Platform for Bench {
    type Format = X86_64;
    type File = MachineFile;
    type SpinLock = Flag;
    type WriterLock = Flag;

    #[inline]
    fn vm(&'static self) -> &'static Vm<Self> {
        &self.vm
    }
    #[inline]
    fn local(&'static self, _: usize) -> &'static Local<Self> {
        &self.local
    }
    #[inline]
    fn cpus(&'static self) -> usize {
        1
    }
    #[inline]
    fn cpu(&'static self) -> usize {
        0
    }
    #[inline]
    fn cells(&'static self, pfn: Pfn) -> &'static [AtomicU64] {
        // SAFETY: a whole page inside the mapping, aligned to 4 KiB; any bits are a valid `AtomicU64`.
        unsafe { self.at(pfn).cast::<[AtomicU64; 512]>().as_ref() }
    }
    #[inline]
    fn meta(&'static self, pfn: Pfn) -> &'static FrameMeta {
        // SAFETY: the first frames are set apart for the metadata of all; it is atomics, for which zero is valid.
        unsafe { self.base.cast::<FrameMeta>().add(pfn.0 as usize).as_ref() }
    }
    #[inline]
    fn page(&'static self, pfn: Pfn) -> NonNull<u8> {
        self.at(pfn)
    }
    #[inline]
    unsafe fn copy_page(&'static self, to: Pfn, from: Pfn) {
        let (to, from) = (self.page(to).as_ptr(), self.page(from).as_ptr());
        // SAFETY: two frames (the caller's promise), each a whole page; nobody else uses them meanwhile.
        unsafe { to.copy_from_nonoverlapping(from, PAGE_SIZE as usize) }
    }
    fn shootdown(&'static self, _: &Flush<'_>) {}
    #[inline]
    fn sync_local(&'static self, _: u64, _: VirtAddr, _: bool) {}
    fn relax(&'static self) {
        std::hint::spin_loop();
    }
    fn random(&'static self) -> u64 {
        self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed)
    }
}

/// A lock: what a kernel's costs when nobody waits for it.
#[derive(Default)]
pub struct Flag(AtomicBool);

// SAFETY: the flag is set by one swap that found it clear, and cleared by who set it; Acquire and Release order what
// is written under it.
unsafe impl RawLock<Bench> for Flag {
    #[inline]
    fn lock(&self, p: &'static Bench) {
        while !self.try_lock(p) {
            p.relax();
        }
    }
    #[inline]
    fn try_lock(&self, _: &'static Bench) -> bool {
        !self.0.swap(true, Acquire)
    }
    #[inline]
    unsafe fn unlock(&self, _: &'static Bench) {
        self.0.store(false, Release);
    }
}
