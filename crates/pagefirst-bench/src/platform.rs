//! A platform for measuring: memory, one CPU or more, and nothing else.
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
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};

/// Memory and one CPU: the thread that made it.
pub type Bench = Cpus<1>;

/// Memory and `N` CPUs. Where there is more than one, threads are CPUs while they say so ([`Cpus::be`]).
pub struct Cpus<const N: usize> {
    base: NonNull<u8>,
    vm: Vm<Cpus<N>>,
    locals: [Local<Cpus<N>>; N],
    taken: [AtomicBool; N],
    random: AtomicU64,
    _map: MmapMut,
}

// SAFETY: the library's part is `Sync` by itself, and the memory is used through it.
unsafe impl<const N: usize> Sync for Cpus<N> {}

static MADE: AtomicBool = AtomicBool::new(false);

const NONE: usize = usize::MAX;
thread_local!(static CPU: Cell<usize> = const { Cell::new(NONE) });

impl<const N: usize> Cpus<N> {
    /// The platform, with so many bytes of memory, all touched. There is one.
    ///
    /// # Panics
    /// When it was made before, or the host has no memory.
    pub fn new(bytes: usize) -> &'static Self {
        assert!(!MADE.swap(true, Relaxed), "there is one platform");
        let mut map = MmapOptions::new().len(bytes).map_anon().expect("memory for the benchmark");
        // A host without huge pages does without.
        let _ = map.advise(Advice::HugePage);
        let region = Region {
            first: Pfn(0),
            frames: u32::try_from(bytes as u64 / PAGE_SIZE).expect("at most 16 TiB"),
        };
        // Touched, but for the metadata, which must be zero.
        map[region.meta_frames() as usize * PAGE_SIZE as usize..].fill(0xa5);
        let bench: &'static Self = Box::leak(Box::new(Cpus {
            base: NonNull::new(map.as_mut_ptr()).expect("a mapping is never at address 0"),
            vm: Vm::new(),
            locals: std::array::from_fn(|_| Local::new()),
            taken: [const { AtomicBool::new(false) }; N],
            random: AtomicU64::new(1),
            _map: map,
        }));
        bench.be(0, || bench.vm.init(bench, &[region])).expect("memory for the zero page");
        bench
    }

    /// Runs `f` as this CPU.
    ///
    /// # Panics
    /// When there is no such CPU, or another thread is it, or this thread is one already.
    pub fn be<R>(&self, cpu: usize, f: impl FnOnce() -> R) -> R {
        assert!(!self.taken[cpu].swap(true, Acquire), "two threads on CPU {cpu}");
        assert_eq!(CPU.replace(cpu), NONE, "a thread on two CPUs");
        let result = f();
        CPU.set(NONE);
        self.taken[cpu].store(false, Release);
        result
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
// platform. With one CPU its maker's thread is that: `&'static Bench` could be sent to another thread, but no benchmark
// that has a `Bench` starts one. With more, a thread is the CPU that it took in `be`, and no other thread is; without,
// there is no CPU of its number, and the library panics. No hardware caches translations. There is no user code, and
// nobody writes to a page while it is copied.
unsafe impl<const N: usize> Platform for Cpus<N> {
    type Format = X86_64;
    type File = MachineFile;
    type SpinLock = Flag;
    type WriterLock = Flag;

    #[inline]
    fn vm(&'static self) -> &'static Vm<Self> {
        &self.vm
    }
    #[inline]
    fn local(&'static self, cpu: usize) -> &'static Local<Self> {
        if N == 1 { &self.locals[0] } else { &self.locals[cpu] }
    }
    #[inline]
    fn cpus(&'static self) -> usize {
        N
    }
    #[inline]
    fn cpu(&'static self) -> usize {
        if N == 1 { 0 } else { CPU.get() }
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
unsafe impl<const N: usize> RawLock<Cpus<N>> for Flag {
    #[inline]
    fn lock(&self, p: &'static Cpus<N>) {
        while !self.try_lock(p) {
            p.relax();
        }
    }
    #[inline]
    fn try_lock(&self, _: &'static Cpus<N>) -> bool {
        !self.0.swap(true, Acquire)
    }
    #[inline]
    unsafe fn unlock(&self, _: &'static Cpus<N>) {
        self.0.store(false, Release);
    }
}
