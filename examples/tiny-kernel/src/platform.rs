//! What the library asks of a kernel, over real hardware.

use crate::cpu::{self, Cpu};
use crate::{program::File, trap};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use core::{arch::asm, mem::MaybeUninit, ptr::NonNull};
use pagefirst::frame::{FrameMeta, Region};
use pagefirst::types::{PAGE_SIZE, Pfn, VirtAddr};
use pagefirst::{Local, Vm, platform::Platform, sync::RawLock, tlb::Flush};
use x86_64::instructions::{random::RdRand, tlb};
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::{PhysAddr, structures::paging::PhysFrame};

/// The most CPUs, a power of two: then the remainder is an AND, where an index would have to be checked.
pub const CPUS: usize = 2;

/// Where the direct map shows a physical address (`boot.s`).
pub fn direct(phys: u64) -> *mut u8 {
    (0xffff_8000_0000_0000 + phys) as *mut u8
}

/// All of the kernel that is not on a stack.
pub struct Kernel {
    pub vm: Vm<Kernel>,
    pub ram: Region,
    pub cpus: [Cpu; CPUS],
    /// How many of them run.
    pub running: usize,
}

unsafe extern "C" {
    static kernel_end: u8; // `kernel.ld`
}
static mut KERNEL: MaybeUninit<Kernel> = MaybeUninit::uninit();

/// The kernel, once [`Kernel::start`] was called.
pub fn kernel() -> &'static Kernel {
    // SAFETY: `start` comes first, before the other CPU runs; from then on it is only shared.
    unsafe { &*(&raw const KERNEL).cast() }
}

impl Kernel {
    /// Gives the memory from the kernel's end to `end` to the library.
    ///
    /// # Safety
    /// Called once, on the first CPU, before anything else; nobody uses that memory.
    pub unsafe fn start(end: u64, running: usize) {
        let first = ((&raw const kernel_end) as u64 - 0xffff_ffff_8000_0000).div_ceil(PAGE_SIZE);
        let first = first.next_multiple_of(2); // `Region::first`
        let frames = (end.min(4 << 30) / PAGE_SIZE - first) as u32;
        let ram = Region { first: Pfn(first as u32), frames };
        // SAFETY: the region's first frames are for its metadata, and nobody uses them yet.
        unsafe { direct(ram.first.phys()).write_bytes(0, ram.meta_frames() as usize * PAGE_SIZE as usize) };
        let cpus = core::array::from_fn(Cpu::new);
        // SAFETY: this CPU is alone, and nobody has a reference yet.
        unsafe { (&raw mut KERNEL).cast::<Kernel>().write(Kernel { vm: Vm::new(), ram, cpus, running }) };
    }

    /// The CPU that this runs on.
    pub fn this_cpu(&'static self) -> &'static Cpu {
        &self.cpus[self.cpu() % CPUS]
    }

    /// Makes this CPU use these tables, and forget what it had of others.
    pub fn load_root(&'static self, root: u64) {
        let frame = PhysFrame::containing_address(PhysAddr::new(root));
        // SAFETY: every root has the kernel's half.
        unsafe { Cr3::write(frame, Cr3Flags::empty()) };
    }

    /// Answers what other CPUs have asked of this one.
    pub fn answer(&'static self) {
        let asked_by = &self.this_cpu().asked_by;
        let asking = if asked_by.load(Relaxed) != 0 { asked_by.swap(0, Acquire) } else { 0 };
        for (_, asks) in self.cpus.iter().enumerate().filter(|(cpu, _)| asking >> cpu & 1 == 1) {
            asks.shootdown.invalidate();
            asks.shootdown.unanswered.fetch_sub(1, Release);
        }
    }
}

/// The addresses that this CPU wants others to forget. It writes them; others read them while it waits.
#[derive(Default)]
pub struct Shootdown {
    start: AtomicU64,
    end: AtomicU64,
    unanswered: AtomicU64,
}

impl Shootdown {
    /// Makes this CPU forget them. INVLPG takes the entries of inner tables as well, all of them, and so does a new
    /// root (Intel SDM volume 3A, 4.10.4.1). Nothing is global, and there is one process-context identifier.
    fn invalidate(&self) {
        let (start, end) = (self.start.load(Relaxed), self.end.load(Relaxed));
        if end - start > 32 * PAGE_SIZE {
            return tlb::flush_all();
        }
        for page in (start..end).step_by(PAGE_SIZE as usize) {
            // SAFETY: a CPU may forget a translation at any time. (The crate `x86_64` knows 48 bits of address.)
            unsafe { asm!("invlpg [{}]", in(reg) page, options(nostack, preserves_flags)) };
        }
    }
}

// SAFETY: `cells`, `meta` and `page` answer from the direct map, which shows all memory for ever, and metadata lies
// where the library wants it; a program stays on its CPU and the kernel takes no interrupts, so `cpu` is constant and
// alone; `shootdown` waits until every CPU named has invalidated; `clear_page` and
// `copy_page` write the whole page, the latter in whole words.
#[rustfmt::skip]
unsafe impl Platform for Kernel {
    #[cfg(not(feature = "la57"))]
    type Format = pagefirst::arch::X86_64;
    #[cfg(feature = "la57")]
    type Format = pagefirst::arch::X86_64La57;
    type File = File;
    type SpinLock = Lock;
    type WriterLock = Lock;

    fn vm(&'static self) -> &'static Vm<Self> { &self.vm }
    fn local(&'static self, cpu: usize) -> &'static Local<Self> { &self.cpus[cpu % CPUS].local }
    fn cpus(&'static self) -> usize { self.running }
    fn cpu(&'static self) -> usize {
        let number: usize;
        // SAFETY: GS is this CPU's `Cpu` as long as the kernel runs; its first word is the number.
        unsafe { asm!("mov {}, gs:[0]", out(reg) number, options(pure, readonly, nostack, preserves_flags)) };
        number
    }
    fn cells(&'static self, pfn: Pfn) -> &'static [AtomicU64] {
        // SAFETY: a whole frame, aligned, in the direct map.
        unsafe { &*direct(pfn.phys()).cast::<[AtomicU64; 512]>() }
    }
    fn meta(&'static self, pfn: Pfn) -> &'static FrameMeta {
        let entry = (pfn.0 - self.ram.first.0) as usize;
        // SAFETY: the region's first frames hold its metadata, one entry a frame.
        unsafe { &*direct(self.ram.first.phys()).cast::<FrameMeta>().add(entry) }
    }
    fn page(&'static self, pfn: Pfn) -> NonNull<u8> {
        // SAFETY: the direct map is not at null.
        unsafe { NonNull::new_unchecked(direct(pfn.phys())) }
    }
    fn is_memory(&'static self, pfn: Pfn) -> bool {
        pfn.0.checked_sub(self.ram.first.0).is_some_and(|i| i < self.ram.frames)
    }
    unsafe fn clear_page(&'static self, pfn: Pfn) {
        // SAFETY: the page is the caller's alone, and DF is clear.
        unsafe { asm!("rep stosq", inout("rcx") 512u64 => _, inout("rdi") direct(pfn.phys()) => _, in("rax") 0, options(nostack)) };
    }
    unsafe fn copy_page(&'static self, to: Pfn, from: Pfn) {
        let (to, from) = (direct(to.phys()), direct(from.phys()));
        // SAFETY: `to` is the caller's alone, DF is clear, and whoever writes to `from` meanwhile is no Rust code.
        unsafe { asm!("rep movsq", inout("rcx") 512u64 => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack)) };
    }
    #[cfg(feature = "stress")]
    fn limit(&'static self) -> Option<pagefirst::mem::Shared<Self, pagefirst::limit::Limit<Self>>> {
        self.this_cpu().limit.lock().clone()
    }
    /// The kernel is mapped in every space, as it was at boot.
    fn kernel_half(&'static self, root: Pfn) {
        let boot = self.cells(Pfn((cpu::boot_root() / PAGE_SIZE) as u32));
        self.cells(root).iter().zip(boot).skip(256).for_each(|(mine, shared)| mine.store(shared.load(Relaxed), Relaxed));
    }
    fn shootdown(&'static self, flush: &Flush<'_>) {
        let (me, mine) = (self.cpu(), &self.this_cpu().shootdown);
        mine.start.store(flush.range.start.0, Relaxed);
        mine.end.store(flush.range.end.0, Relaxed);
        for cpu in flush.cpus.iter().filter(|&cpu| cpu != me) {
            mine.unanswered.fetch_add(1, Relaxed);
            self.cpus[cpu].asked_by.fetch_or(1 << me, Release);
            cpu::send(cpu, trap::IPI as u32);
        }
        if flush.cpus.contains(me) {
            mine.invalidate();
        }
        // Two CPUs that do this at once answer each other here; neither takes interrupts.
        while mine.unanswered.load(Acquire) > 0 {
            self.relax();
        }
    }
    /// A fault makes x86 forget the address (SDM 3A, 4.10.4.1), but faults also come from copies to user memory.
    fn sync_local(&'static self, _: u64, addr: VirtAddr, _: bool) {
        // SAFETY: as in `invalidate`.
        unsafe { asm!("invlpg [{}]", in(reg) addr.0, options(nostack, preserves_flags)) };
    }
    fn relax(&'static self) {
        core::hint::spin_loop();
        self.answer();
    }
    fn random(&'static self) -> u64 {
        let rdrand = RdRand::new().expect("a CPU with RDRAND");
        core::iter::repeat_with(|| rdrand.get_u64()).flatten().next().unwrap_or(0)
    }
}

/// Both kinds of lock: whoever waits spins, and answers others meanwhile. The kernel takes no interrupts, so nobody
/// who holds one is interrupted by who wants it.
#[derive(Default)]
pub struct Lock(AtomicBool);

// SAFETY: who swapped `false` for `true` holds it; Acquire and Release order what is done meanwhile.
#[rustfmt::skip]
unsafe impl RawLock<Kernel> for Lock {
    fn lock(&self, p: &'static Kernel) {
        while !self.try_lock(p) {
            p.relax();
        }
    }
    fn try_lock(&self, _: &'static Kernel) -> bool { !self.0.swap(true, Acquire) }
    unsafe fn unlock(&self, _: &'static Kernel) { self.0.store(false, Release); }
}
