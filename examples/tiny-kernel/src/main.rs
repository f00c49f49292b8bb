//! The smallest kernel that embeds pagefirst: bare x86-64, two CPUs, user programs that fault.
//!
//! | file | what is there |
//! |---|---|
//! | `platform` | **what the library asks of a kernel**: memory, locks, CPUs, TLB shootdown |
//! | `trap.s`, `trap` | into the kernel and out of it; **page faults, which the library answers**; system calls |
//! | `program` | files, and programs: mapped, run, ended |
//! | `boot.s`, `cpu` | from power-on to Rust; what a CPU needs before it can take a trap; the second CPU |
//! | `stress` | all that the library does, at once, on this MMU |
//! | here | the order of things |
//!
//! A CPU takes interrupts only while a user program runs on it. In the kernel it answers the other's requests where it
//! waits for something itself ([`Platform::relax`](pagefirst::platform::Platform::relax)), so no wait is for ever.
#![no_std]
#![no_main]

mod cpu;
mod platform;
mod program;
#[cfg(feature = "stress")]
mod stress;
mod trap;

use core::fmt::{self, Write};
use core::panic::PanicInfo;
use pagefirst::types::Pfn;
use platform::{CPUS, Kernel, direct, kernel};
use program::{PROGRAMS, Task};
use uart_16550::{Config, Uart16550, Uart16550Tty};
use x86_64::instructions::port::Port;

/// The first CPU comes here from `boot.s`, with the physical address of what QEMU passed: Xen's `hvm_start_info`, in
/// words of 64 bits: ..., command line, ..., memory map, its length; entries have start, length, kind (1 is RAM).
///
/// # Safety
/// Called once.
#[unsafe(no_mangle)]
unsafe extern "C" fn kernel_main(start_info: u64) -> ! {
    // SAFETY: it and what it points to lie in low memory, which the direct map shows and nobody uses.
    let (mode, map) = unsafe {
        let info = &*direct(start_info).cast::<[u64; 7]>();
        let map = core::slice::from_raw_parts(direct(info[5]).cast::<[u64; 3]>(), info[6] as u32 as usize);
        (core::ffi::CStr::from_ptr(direct(info[3]).cast()), map)
    };
    let mut words = mode.to_str().unwrap_or("?").split_whitespace();
    let mode = words.next().unwrap_or("?");
    let ram = map.iter().find(|m| m[2] as u32 == 1 && m[0] <= 1 << 20 && 1 << 20 < m[0] + m[1]);
    let [start, len, _] = ram.expect("there is memory at 1 MiB");
    // SAFETY: COM1 is there; this is called once, and alone; the memory behind the kernel is nobody's.
    unsafe {
        Uart16550Tty::new_port(0x3f8, Config::default()).expect("a serial port");
        Kernel::start(start + len, if mode == "count" { 1 } else { CPUS });
    }
    cpu::start(0);
    let (p, ram) = (kernel(), kernel().ram);
    p.vm.init(p, &[ram]).expect("memory");
    if p.running > 1 {
        cpu::wake_second();
    }
    let bounds = [0x100, ram.first.0, ram.first.0 + ram.meta_frames(), ram.first.0 + ram.frames];
    for (name, bounds) in ["kernel", "frame metadata", "frames"].iter().zip(bounds.windows(2)) {
        println!("region {name} {:#x} {:#x}", Pfn(bounds[0]).phys(), Pfn(bounds[1]).phys());
    }
    let mut ran = 0;
    let mut run = |name: &str, program: &dyn Fn()| {
        println!("running {name}"); // so that one that hangs has a name
        p.vm.quiesce(p);
        let before = p.vm.held(p);
        program();
        p.vm.quiesce(p);
        let after = p.vm.held(p);
        assert_eq!(before, after, "FAILED: something is left");
        println!("program {name}: ok");
        ran += 1;
    };
    for (_, name, image) in PROGRAMS.iter().filter(|program| program.0 == mode) {
        run(name, &|| Task::load(image).unwrap_or_else(|why| panic!("{name}: {why}")).run_on_all());
    }
    #[cfg(feature = "stress")]
    if mode == "stress" {
        let [seed, seconds] = [(); 2].map(|()| words.next().and_then(|word| word.parse().ok()).unwrap_or(1));
        run(mode, &|| stress::run(seed, seconds));
    }
    assert!(ran > 0, "`-append {mode}`: not one of test, count, lines, or not in this image");
    exit(0x10)
}

/// Writes to the serial port. Lines of two CPUs may mix.
fn print(text: fmt::Arguments<'_>) {
    // SAFETY: COM1, set up in `kernel_main`.
    let port = unsafe { Uart16550::new_port(0x3f8) };
    let _ = port.map(|port| Uart16550Tty::from_inner(port).write_fmt(text));
}

/// Prints a line.
#[macro_export]
macro_rules! println {
    ($($text:tt)*) => { $crate::print(format_args!("{}\n", format_args!($($text)*))) };
}

/// Ends QEMU, by the port of its `isa-debug-exit`: its exit status is 2 x `code` + 1.
fn exit(code: u32) -> ! {
    // SAFETY: it does that, and nothing else.
    unsafe { Port::new(0xf4).write(code) };
    panic!("QEMU has no isa-debug-exit")
}

#[panic_handler]
fn panic(why: &PanicInfo<'_>) -> ! {
    println!("PANIC {why}");
    exit(0x12)
}
