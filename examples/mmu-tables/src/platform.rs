//! Memory of the guest, on the host, and one CPU: what the library needs to build tables for somebody else's MMU.

use pagefirst::arch::Format;
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
use std::thread::ThreadId;

/// Words of a page.
pub const WORDS: usize = PAGE_SIZE as usize / 8;

#[repr(align(4096))]
struct Page([AtomicU64; WORDS]);

/// Memory that is the guest's, from frame `first` on, and the library's state.
pub struct Guest<F: Format> {
    first: u32,
    pages: Box<[Page]>,
    vm: Vm<Guest<F>>,
    local: Local<Guest<F>>,
    random: AtomicU64,
    /// What the library has of the memory.
    region: Region,
    /// The thread that made it, which is the one CPU.
    thread: ThreadId,
}

impl<F: Format> Guest<F> {
    /// The guest's memory from the physical address `start` on: `own` bytes that are nobody's, `bytes` that the library
    /// has, `more` that it has not.
    pub fn new(start: u64, own: u64, bytes: u64, more: u64) -> &'static Guest<F> {
        let frames = |bytes: u64| (bytes / PAGE_SIZE) as usize;
        let region = Region { first: Pfn(((start + own) / PAGE_SIZE) as u32), frames: frames(bytes) as u32 };
        // SAFETY: zeros are a valid page of atomic words.
        let pages = unsafe { Box::new_zeroed_slice(frames(own + bytes + more)).assume_init() };
        let guest: &'static Guest<F> = Box::leak(Box::new(Guest {
            first: (start / PAGE_SIZE) as u32,
            pages,
            vm: Vm::new(),
            local: Local::new(),
            random: AtomicU64::new(1),
            region,
            thread: std::thread::current().id(),
        }));
        guest.vm.init(guest, &[region]).expect("memory for the zero page");
        guest
    }

    /// The words of a frame of this memory.
    pub fn words(&self, pfn: Pfn) -> &[AtomicU64; WORDS] {
        &self.pages[(pfn.0 - self.first) as usize].0
    }

    /// All of it, as the guest finds it.
    pub fn bytes(&self) -> Vec<u8> {
        let words = self.pages.iter().flat_map(|page| &page.0);
        words.flat_map(|word| word.load(Relaxed).to_le_bytes()).collect()
    }
}

// SAFETY: frames and metadata are answered from one allocation that lives for ever, each at one address; the region is
// the library's alone. `cpu` lets only the thread through that made the platform, so there is one CPU. No hardware of
// this host walks the tables, so nothing is cached when a shootdown returns.
unsafe impl<F: Format> Platform for Guest<F> {
    type Format = F;
    type File = MachineFile;
    type SpinLock = Flag;
    type WriterLock = Flag;

    fn vm(&'static self) -> &'static Vm<Self> {
        &self.vm
    }
    fn local(&'static self, _: usize) -> &'static Local<Self> {
        &self.local
    }
    fn cpus(&'static self) -> usize {
        1
    }
    fn cpu(&'static self) -> usize {
        assert_eq!(std::thread::current().id(), self.thread, "there is one CPU");
        0
    }
    fn cells(&'static self, pfn: Pfn) -> &'static [AtomicU64] {
        self.words(pfn)
    }
    fn meta(&'static self, pfn: Pfn) -> &'static FrameMeta {
        let index = (pfn.0 - self.region.first.0) as usize;
        assert!(index < self.region.frames as usize, "{pfn:?} is not the library's");
        // SAFETY: the region's first frames are set apart for the metadata of all of them; it is atomics, for which
        // zero is valid.
        unsafe { self.page(self.region.first).cast::<FrameMeta>().add(index).as_ref() }
    }
    fn page(&'static self, pfn: Pfn) -> NonNull<u8> {
        NonNull::from(&self.pages[(pfn.0 - self.first) as usize..]).cast()
    }
    fn shootdown(&'static self, _: &Flush<'_>) {}
    fn sync_local(&'static self, _: u64, _: VirtAddr, _: bool) {}
    fn relax(&'static self) {
        std::hint::spin_loop();
    }
    fn random(&'static self) -> u64 {
        self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed)
    }
}

/// A lock for one thread.
#[derive(Default)]
pub struct Flag(AtomicBool);

// SAFETY: the flag is set by one swap that found it clear, and cleared by who set it; Acquire and Release order what
// is written under it.
unsafe impl<F: Format> RawLock<Guest<F>> for Flag {
    fn lock(&self, p: &'static Guest<F>) {
        while !self.try_lock(p) {
            p.relax();
        }
    }
    fn try_lock(&self, _: &'static Guest<F>) -> bool {
        !self.0.swap(true, Acquire)
    }
    unsafe fn unlock(&self, _: &'static Guest<F>) {
        self.0.store(false, Release);
    }
}
