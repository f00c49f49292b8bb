//! What a CPU needs before it can take a trap, and how one reaches the other.

use crate::platform::{CPUS, Kernel, Shootdown, direct, kernel};
use crate::program::Task;
use crate::trap;
use core::arch::global_asm;
use core::ptr::null_mut;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64};
use pagefirst::Local;
use pagefirst::platform::Platform;
use x86_64::VirtAddr;
use x86_64::instructions::port::Port;
use x86_64::instructions::tables::{lidt, load_tss};
use x86_64::registers::control::{Cr4, Cr4Flags, EferFlags};
use x86_64::registers::model_specific::{Efer, GsBase, LStar, SFMask, Star};
use x86_64::registers::rflags::RFlags;
use x86_64::registers::segmentation::{CS, Segment};
use x86_64::structures::DescriptorTablePointer;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;

global_asm!(include_str!("boot.s"), options(raw));

/// One CPU. `trap.s` knows the first three words.
#[repr(C, align(128))]
pub struct Cpu {
    number: usize,
    user_stack: AtomicU64,
    kernel_stack: AtomicU64,
    /// The program it runs.
    pub task: AtomicPtr<Task>,
    /// Where that wants to go on when its next fault is refused; 0 for nowhere.
    pub recover: AtomicU64,
    /// A program for it to run, and how that ended.
    pub job: AtomicPtr<Task>,
    pub status: AtomicU64,
    started: AtomicBool,
    /// The library's part.
    pub local: Local<Kernel>,
    /// CPUs that want this one to forget translations, a bit each.
    pub asked_by: AtomicU64,
    pub shootdown: Shootdown,
}

impl Cpu {
    /// CPU `number`, not started.
    pub fn new(number: usize) -> Self {
        let zero = || AtomicU64::new(0);
        Cpu {
            number,
            user_stack: zero(),
            kernel_stack: zero(),
            task: AtomicPtr::default(),
            recover: zero(),
            job: AtomicPtr::default(),
            status: zero(),
            started: AtomicBool::new(false),
            local: Local::new(),
            asked_by: zero(),
            shootdown: Shootdown::default(),
        }
    }
}

/// A CPU's own tables and stacks, which it alone sets up, once.
#[repr(C, align(16))]
struct Tables {
    /// For traps, for interrupts from other CPUs, and for what must never happen.
    stacks: [[u8; 16384]; 3],
    tss: TaskStateSegment,
    gdt: GlobalDescriptorTable,
    idt: [u128; trap::VECTORS],
}

static mut TABLES: [Tables; CPUS] = [const {
    Tables {
        stacks: [[0; 16384]; 3],
        tss: TaskStateSegment::new(),
        gdt: GlobalDescriptorTable::new(),
        idt: [0; trap::VECTORS],
    }
}; CPUS];

/// The physical address of the tables of `boot.s`.
pub fn boot_root() -> u64 {
    unsafe extern "C" {
        static boot_pml4: u8;
    }
    (&raw const boot_pml4) as u64
}

/// Sets the CPU up that this runs on.
pub fn start(number: usize) {
    // SAFETY: each CPU comes here once, with its own number.
    let tables: &'static mut Tables = unsafe { (&raw mut TABLES[number]).as_mut_unchecked() };
    for (i, stack) in tables.stacks.iter().enumerate() {
        tables.tss.interrupt_stack_table[i] = VirtAddr::from_ptr(stack.as_ptr_range().end);
    }
    let gdt = &mut tables.gdt;
    let code = gdt.append(Descriptor::kernel_code_segment());
    for data in [Descriptor::kernel_data_segment(), Descriptor::user_data_segment()] {
        gdt.append(data);
    }
    gdt.append(Descriptor::user_code_segment());
    let tss = gdt.append(Descriptor::tss_segment(&tables.tss));
    tables.gdt.load();
    for (gate, vector) in tables.idt.iter_mut().zip(0..) {
        *gate = trap::gate(vector, code.0);
    }
    let idt = DescriptorTablePointer {
        limit: (size_of_val(&tables.idt) - 1) as u16,
        base: VirtAddr::from_ptr(tables.idt.as_ptr()),
    };
    let cpu = &kernel().cpus[number];
    // SAFETY: the tables are complete and live for ever; the selectors are theirs.
    unsafe {
        CS::set_reg(code);
        load_tss(tss);
        lidt(&idt);
        // CR4: no access to user memory from here, and no execution: the library goes by the direct map.
        let features = core::arch::x86_64::__cpuid(7).ebx;
        let has = |bit: u32, flag| if features >> bit & 1 == 1 { flag } else { Cr4Flags::empty() };
        let no_user = has(7, Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION)
            | has(20, Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION);
        Cr4::update(|flags| *flags |= no_user);
        Efer::update(|flags| *flags |= EferFlags::SYSTEM_CALL_EXTENSIONS);
        Star::write_raw(0, code.0);
    }
    LStar::write(VirtAddr::new(trap::syscall_address()));
    SFMask::write(
        RFlags::INTERRUPT_FLAG | RFlags::DIRECTION_FLAG | RFlags::TRAP_FLAG | RFlags::ALIGNMENT_CHECK,
    );
    GsBase::write(VirtAddr::from_ptr(cpu));
    // SAFETY: the ports of the two interrupt controllers of the PC: all masked.
    [0x21, 0xa1].into_iter().for_each(|port| unsafe { Port::new(port).write(0xffu8) });
    local_apic(0xf0, 0x1ff); // SDM 3A, 11.9: enabled, spurious interrupts at vector 255
    cpu.started.store(true, Release);
}

/// Writes a register of this CPU's interrupt controller (SDM 3A, table 11-1).
pub fn local_apic(register: u64, value: u32) {
    // SAFETY: the direct map shows the registers, at the address that they have after reset.
    unsafe { direct(0xfee0_0000 + register).cast::<u32>().write_volatile(value) };
}

/// Sends `command` to another CPU (SDM 3A, 11.6.1).
fn send(cpu: usize, command: u32) {
    local_apic(0x310, (cpu as u32) << 24);
    local_apic(0x300, command);
}

/// Has another CPU answer what it is asked, if it runs a program now.
pub fn interrupt(cpu: usize) {
    send(cpu, trap::IPI as u32);
}

/// Starts the second CPU and waits for it (SDM 3A, 9.4.4: INIT, start-up, start-up).
pub fn wake_second() {
    unsafe extern "C" {
        static ap_start: u8;
        static ap_end: u8;
    }
    let (from, to) = (&raw const ap_start, &raw const ap_end);
    // SAFETY: both lie in the image, at physical addresses; the page at 0x8000 is nobody's.
    unsafe { direct(0x8000).copy_from(direct(from as u64), to as usize - from as usize) };
    let started = || kernel().cpus[1].started.load(Acquire);
    for command in [0x4500, 0x4608, 0x4608] {
        send(1, command);
        (0..1_000_000).take_while(|_| !started()).for_each(|_| core::hint::spin_loop());
    }
    let came = (0..2_000_000_000u64).any(|_| {
        core::hint::spin_loop();
        started()
    });
    assert!(came, "the second CPU does not start (QEMU: -smp 2)");
}

/// The second CPU comes here from `boot.s`: it runs what it is given.
#[unsafe(no_mangle)]
extern "C" fn ap_main() -> ! {
    start(1);
    let cpu = &kernel().cpus[1];
    loop {
        // SAFETY: who gave the task waits until it is taken back.
        if let Some(task) = unsafe { cpu.job.load(Acquire).as_ref() } {
            cpu.status.store(task.run(1, 2), Relaxed);
            cpu.job.store(null_mut(), Release);
        }
        kernel().relax();
    }
}
