//! The smallest kernel that embeds pagefirst: bare x86-64, two CPUs, user programs that fault.
//!
//! | file | what is there |
//! |---|---|
//! | `boot.s`, `cpu` | from power-on to Rust; what a CPU needs before it can take a trap; interprocessor interrupts |
//! | `platform` | **what the library asks of a kernel**: memory, locks, CPUs, TLB shootdown |
//! | `trap.s`, `trap` | into the kernel and out of it; **page faults, which the library answers**; system calls |
//! | `program` | files, and programs: loaded by file mappings, run, and ended |
//! | here | the order of things |
//!
//! A CPU takes interrupts only while a user program runs on it. In the kernel it answers the other's requests where it
//! waits for something itself ([`Platform::relax`](pagefirst::platform::Platform::relax)), so no wait is for ever.
#![no_std]
#![no_main]

mod cpu;
mod platform;
mod program;
mod trap;

use core::fmt::{self, Write};
use core::panic::PanicInfo;
use pagefirst::sync::RawLock;
use platform::{CPUS, Kernel, Lock, direct, kernel};
use program::{PROGRAMS, Program, Task};
use uart_16550::{Config, Uart16550, Uart16550Tty};
use x86_64::instructions::port::Port;

/// What QEMU passes at boot (Xen's `hvm_start_info`, version 1).
#[repr(C)]
struct StartInfo {
    magic_version: [u32; 2],
    flags_modules: [u32; 2],
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_len: u32,
}

/// A range of physical memory; `kind` 1 is RAM.
#[repr(C)]
#[derive(Clone, Copy)]
struct MapEntry {
    start: u64,
    len: u64,
    kind: u32,
    reserved: u32,
}

/// The first CPU comes here from `boot.s`.
///
/// # Safety
/// Called once, with the physical address of what QEMU passed.
#[unsafe(no_mangle)]
unsafe extern "C" fn kernel_main(start_info: u64) -> ! {
    // SAFETY: it and what it points to lie in low memory, which the direct map shows and nobody uses.
    let (map, command) = unsafe {
        let info = &*direct(start_info).cast::<StartInfo>();
        let map = direct(info.memory_map).cast::<MapEntry>();
        let map = core::slice::from_raw_parts(map, info.memory_map_len as usize);
        (map, core::ffi::CStr::from_ptr(direct(info.command_line).cast()))
    };
    let command = command.to_str().unwrap_or("?").trim();
    let ram = map.iter().find(|m| m.kind == 1 && m.start <= 1 << 20 && 1 << 20 < m.start + m.len);
    let ram = ram.expect("there is memory at 1 MiB");
    // SAFETY: COM1 is there, and this CPU is alone.
    unsafe { Uart16550Tty::new_port(0x3f8, Config::default()) }.expect("a serial port");
    let cpus = if command == "count" { 1 } else { CPUS };
    // SAFETY: once, and alone; the memory behind the kernel is nobody's.
    unsafe { Kernel::start(ram.start + ram.len, cpus) };
    cpu::start(0);
    kernel().vm.init(kernel(), &[kernel().ram]).expect("memory");
    if cpus > 1 {
        cpu::wake_second();
    }
    let (first, frames) = (kernel().ram.first.phys(), u64::from(kernel().ram.frames) * 4096);
    let metadata = u64::from(kernel().ram.meta_frames()) * 4096;
    println!("region kernel {:#x} {:#x}", 1 << 20, first);
    println!("region frame metadata {:#x} {:#x}", first, first + metadata);
    println!("region frames {:#x} {:#x}", first + metadata, first + frames);
    let mut failed = 0;
    for program in PROGRAMS.iter().filter(|p| p.mode == command) {
        match run(program, cpus) {
            Ok(()) => println!("program {}: ok", program.name),
            Err(why) => {
                println!("program {}: FAILED {why}", program.name);
                failed += 1;
            }
        }
    }
    let known = PROGRAMS.iter().any(|p| p.mode == command);
    if !known {
        println!("`-append {command}`: not one of test, count, lines");
    }
    exit(if failed == 0 && known { 0x10 } else { 0x11 })
}

/// Runs a program, and sees that it ends well and leaves nothing behind.
fn run(program: &Program, cpus: usize) -> Result<(), &'static str> {
    let p = kernel();
    p.vm.quiesce(p);
    let before = p.vm.held(p);
    let task = Task::load(program)?;
    let status = task.run_on(program.cpus.min(cpus));
    drop(task);
    p.vm.quiesce(p);
    let after = p.vm.held(p);
    if status != 0 {
        println!("{}: line {}, or signal and code {:#x}", program.name, status, status);
        return Err("its own check");
    }
    if before != after {
        println!("held before: {before:?}\nheld after: {after:?}");
        return Err("something is left");
    }
    Ok(())
}

/// Writes to the serial port, one CPU at a time.
fn print(text: fmt::Arguments<'_>) {
    static PRINTING: Lock = Lock::new();
    PRINTING.lock(kernel());
    write_serial(text);
    // SAFETY: locked above.
    unsafe { PRINTING.unlock(kernel()) };
}

fn write_serial(text: fmt::Arguments<'_>) {
    // SAFETY: COM1, set up in `kernel_main`; `print` lets one CPU write at a time, a panic what it likes.
    let port = unsafe { Uart16550::new_port(0x3f8) };
    let _ = port.map(|port| Uart16550Tty::from_inner(port).write_fmt(text));
}

/// Prints a line.
#[macro_export]
macro_rules! println {
    ($($text:tt)*) => { $crate::print(format_args!("{}\n", format_args!($($text)*))) };
}

/// Ends QEMU: its exit status is 2 x `code` + 1.
fn exit(code: u32) -> ! {
    // SAFETY: the port of QEMU's `isa-debug-exit`.
    unsafe { Port::new(0xf4).write(code) };
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panic(why: &PanicInfo<'_>) -> ! {
    write_serial(format_args!("PANIC {why}\n"));
    exit(0x12)
}

/// What the precompiled `core` calls and nobody supplies on bare hardware.
mod memory {
    use core::arch::global_asm;
    global_asm!(include_str!("memory.s"), options(raw));
}
