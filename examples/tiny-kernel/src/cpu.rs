//! What a CPU needs before it can take a trap, and how one reaches the other.

use crate::platform::{CPUS, Kernel, Shootdown, direct, kernel};
use crate::{program::Task, trap};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering::*};
use core::{arch::global_asm, mem::MaybeUninit, ptr::null_mut};
use pagefirst::{Local, platform::Platform};
#[cfg(feature = "stress")]
use pagefirst::{limit::Limit, mem::Shared};
use x86_64::instructions::{port::Port, tables};
use x86_64::registers::control::{Cr4, Cr4Flags};
use x86_64::registers::model_specific::{GsBase, LStar, SFMask, Star};
use x86_64::registers::segmentation::{CS, Segment};
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::{DescriptorTablePointer, tss::TaskStateSegment};
use x86_64::{VirtAddr, registers::rflags::RFlags};

#[cfg(not(feature = "la57"))]
global_asm!(".set LA57, 0", include_str!("boot.s"), options(raw));
#[cfg(feature = "la57")]
global_asm!(".set LA57, 1", include_str!("boot.s"), options(raw));
unsafe extern "C" {
    #[link_name = "boot_root"]
    static BOOT_ROOT: u8;
    static ap_start: u8;
    static ap_end: u8;
}

/// One CPU, found by a shift.
#[derive(Default)]
#[repr(C, align(1024))]
pub struct Cpu {
    /// `trap.s` knows these three.
    number: u64,
    user_stack: AtomicU64,
    pub kernel_stack: AtomicU64,
    /// The program it runs.
    pub task: AtomicPtr<Task>,
    /// Where that goes on when its next fault is refused; 0 for nowhere.
    pub recover: AtomicU64,
    /// A program for the second CPU to run.
    pub job: AtomicPtr<Task>,
    started: AtomicBool,
    /// The library's part.
    pub local: Local<Kernel>,
    /// CPUs that want this one to forget translations, a bit each.
    pub asked_by: AtomicU64,
    pub shootdown: Shootdown,
    /// Whom what it reads and writes of files is charged to.
    #[cfg(feature = "stress")]
    pub limit: spin::Mutex<Option<Shared<Kernel, Limit<Kernel>>>>,
}

impl Cpu {
    /// CPU `number`, not started.
    pub fn new(number: usize) -> Self {
        Cpu { number: number as u64, ..Cpu::default() }
    }
}

/// A CPU's own tables, and the stack for traps.
#[repr(C, align(16))]
struct Tables {
    stack: [u8; 32768],
    tss: TaskStateSegment,
    gdt: GlobalDescriptorTable,
    idt: [u128; trap::VECTORS],
}

static mut TABLES: MaybeUninit<[Tables; CPUS]> = MaybeUninit::zeroed();

/// The physical address of the tables of `boot.s`.
pub fn boot_root() -> u64 {
    (&raw const BOOT_ROOT) as u64
}

/// Sets the CPU up that this runs on.
pub fn start(number: usize) {
    // SAFETY: each CPU comes here once, with its own number; zeros are tables, if empty ones.
    let tables: &'static mut Tables = unsafe { &mut *(&raw mut TABLES).cast::<Tables>().add(number) };
    (tables.tss, tables.gdt) = (TaskStateSegment::new(), GlobalDescriptorTable::new());
    tables.tss.interrupt_stack_table[0] = VirtAddr::from_ptr(tables.stack.as_ptr_range().end);
    let code = tables.gdt.append(Descriptor::kernel_code_segment());
    tables.gdt.append(Descriptor::kernel_data_segment());
    tables.gdt.append(Descriptor::user_data_segment());
    tables.gdt.append(Descriptor::user_code_segment());
    let tss = tables.gdt.append(Descriptor::tss_segment(&tables.tss));
    tables.gdt.load();
    tables.idt = core::array::from_fn(|vector| trap::gate(vector, code.0));
    let (base, limit) = (VirtAddr::from_ptr(&tables.idt), size_of_val(&tables.idt) as u16 - 1);
    let cpu = &kernel().cpus[number];
    // SAFETY: the tables are complete and live for ever, and the selectors are theirs; 7 is the leaf of CPUID that
    // tells of SMEP and SMAP (no access from here to user memory, for the library goes by the direct map) and of UMIP (no
    // look from there at the kernel's addresses); the ports are the masks of the PC's two interrupt controllers.
    unsafe {
        CS::set_reg(code);
        tables::load_tss(tss);
        tables::lidt(&DescriptorTablePointer { limit, base });
        let features = core::arch::x86_64::__cpuid_count(7, 0);
        let has = |register: u32, bit: u32, cr4: u32| u64::from(register >> bit & 1) << cr4;
        let wanted = has(features.ebx, 7, 20) | has(features.ebx, 20, 21) | has(features.ecx, 2, 11);
        Cr4::update(|flags| *flags |= Cr4Flags::from_bits_truncate(wanted));
        Star::write_raw(0, code.0);
        [0x21, 0xa1].into_iter().for_each(|mask| Port::new(mask).write(0xffu8));
    }
    LStar::write(VirtAddr::from_ptr(trap::syscall_entry as *const ()));
    SFMask::write(RFlags::all()); // NT among them, with which IRETQ would fault
    GsBase::write(VirtAddr::from_ptr(cpu));
    local_apic(0xf0, 0x100 | trap::SPURIOUS as u32); // SDM 3A, 11.9: enabled
    cpu.started.store(true, Release);
}

/// Writes a register of this CPU's interrupt controller (SDM 3A, table 11-1).
pub fn local_apic(register: u64, value: u32) {
    // SAFETY: the direct map shows the registers, at the address that they have after reset.
    unsafe { direct(0xfee0_0000 + register).cast::<u32>().write_volatile(value) };
}

/// Sends a command to another CPU (SDM 3A, 11.6.1), and waits until it is on its way. A vector alone is an interrupt.
pub fn send(cpu: usize, command: u32) {
    local_apic(0x310, (cpu as u32) << 24);
    local_apic(0x300, command);
    // SAFETY: as in `local_apic`; a read of this register has no effect.
    while unsafe { direct(0xfee0_0300).cast::<u32>().read_volatile() } >> 12 & 1 == 1 {}
}

/// Starts the second CPU and waits for it (SDM 3A, 9.4.4: INIT, start-up at 0x8000, twice).
pub fn wake_second() {
    let (from, to) = (&raw const ap_start as u64, &raw const ap_end as u64);
    // SAFETY: both lie in the image, at physical addresses; the page at 0x8000 is nobody's.
    unsafe { direct(0x8000).copy_from(direct(from), (to - from) as usize) };
    let wait = |turns| (0..turns).any(|_| core::hint::black_box(&kernel().cpus[1].started).load(Acquire));
    for command in [0x4500, 0x4608, 0x4608] {
        send(1, command);
        wait(1_000_000);
    }
    assert!(wait(2_000_000_000u64), "the second CPU does not start (QEMU: -smp 2)");
}

/// The second CPU comes here from `boot.s`: it runs what it is given.
#[unsafe(no_mangle)]
extern "C" fn ap_main() -> ! {
    start(1);
    let cpu = &kernel().cpus[1];
    loop {
        // SAFETY: who gave the task waits until it is taken back.
        if let Some(task) = unsafe { cpu.job.load(Acquire).as_ref() } {
            task.run(1);
            cpu.job.store(null_mut(), Release);
        }
        kernel().relax();
    }
}
