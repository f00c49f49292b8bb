//! Into the kernel: page faults, which the library answers; system calls; interrupts from the other CPU.

use crate::platform::{Kernel, kernel};
use crate::{cpu, program::Task};
use core::{arch::global_asm, sync::atomic::Ordering::Relaxed};
use pagefirst::fault::{FaultError, Outcome, Segv};
use pagefirst::platform::Platform;
use pagefirst::types::{Access, VirtAddr};
use x86_64::registers::control::Cr2;

global_asm!(include_str!("trap.s"), options(raw));
unsafe extern "C" {
    /// Runs user code until it exits.
    pub fn enter_user(rip: u64, rsp: u64, argument: u64, arguments: u64);
    fn leave_user() -> !;
    pub fn syscall_entry();
    fn traps();
    fn case_marks();
}

/// Gates in the table of a CPU.
pub const VECTORS: usize = 34;
/// The vector by which CPUs reach each other.
pub const IPI: u64 = 32;
/// What a CPU's interrupt controller says when it has nothing to say.
pub const SPURIOUS: u64 = 33;
const STACK: u64 = 12;
const GENERAL_PROTECTION: u64 = 13;
const PAGE_FAULT: u64 = 14;
const SYSTEM_CALL: u64 = 256;

/// What `trap.s` saved of who was interrupted.
#[repr(C)]
struct Frame {
    rbp: u64,
    r11_r8: [u64; 4],
    rdi: u64,
    rsi: u64,
    rdx: u64,
    rcx: u64,
    rax: u64,
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
}

/// The gate of a vector (SDM 3A, 7.14.1): an interrupt gate, so interrupts are off, on the first of the stacks in the TSS.
/// That one is enough, for nothing comes while it is in use but what ends the kernel.
pub fn gate(vector: usize, code: u16) -> u128 {
    let address = traps as *const () as u128 + 16 * vector as u128;
    (address & 0xffff) | (code as u128) << 16 | 0x8e01 << 32 | (address >> 16) << 48
}

/// Whatever came in, from `trap.s`.
#[unsafe(no_mangle)]
extern "C" fn trap(frame: &mut Frame) {
    let user = frame.cs & 3 == 3;
    match frame.vector {
        PAGE_FAULT if user => page_fault(frame),
        #[cfg(feature = "stress")]
        PAGE_FAULT if crate::stress::touches_there(frame.rip) => page_fault(frame),
        SYSTEM_CALL => system_call(frame),
        IPI => {
            cpu::local_apic(0xb0, 0); // end of interrupt: the next one may come
            kernel().answer();
        }
        SPURIOUS => {}
        STACK | GENERAL_PROTECTION if user => refuse(frame, FaultError::Segv(Segv::NonCanonical)),
        vector if user => exit((vector + 1) << 32),
        vector => panic!("exception {vector} {:#x} at {:#x}, CR2 {:?}", frame.error, frame.rip, Cr2::read()),
    }
}

/// A user touched what its tables do not allow. (The bits of the error: SDM 3A, 4.7.)
#[inline(never)]
fn page_fault(frame: &mut Frame) {
    let addr = VirtAddr(Cr2::read_raw());
    assert!(frame.error & 8 == 0, "reserved bits in the entry for {addr}");
    let access = match frame.error {
        e if e & 16 != 0 => Access::Execute,
        e if e & 2 != 0 => Access::Write,
        _ => Access::Read,
    };
    match Task::current().space.fault(addr, access) {
        Outcome::Mapped { .. } | Outcome::Spurious => {}
        outcome => wait_or_refuse(frame, addr, access, outcome),
    }
}

#[cold]
fn wait_or_refuse(frame: &mut Frame, addr: VirtAddr, access: Access, mut outcome: Outcome<'_, Kernel>) {
    loop {
        match outcome {
            Outcome::Mapped { .. } | Outcome::Spurious => return,
            Outcome::Blocked(ticket) => {
                while !ticket.is_ready() {
                    kernel().relax();
                }
                outcome = Task::current().space.retry(addr, access, ticket);
            }
            Outcome::Error(why) => return refuse(frame, why),
        }
    }
}

/// What a signal is elsewhere: the program goes on where it said, with signal and code, or it ends.
fn refuse(frame: &mut Frame, why: FaultError) {
    let code = why.signal().map_or(9 << 8, |(signal, code)| (signal as u64) << 8 | code as u64);
    match kernel().this_cpu().recover.load(Relaxed) {
        0 => exit(code << 16),
        recover => (frame.rip, frame.rax) = (recover, code),
    }
}

/// Ends the program that this CPU runs; unless all is well, everything.
fn exit(status: u64) -> ! {
    assert!(status == 0, "FAILED: a line, or signal and code, or exception + 1: {status:#x}");
    // SAFETY: this CPU runs a program, so `enter_user` waits; nothing on the stack in between needs dropping.
    unsafe { leave_user() }
}

#[inline(never)]
fn system_call(frame: &mut Frame) {
    let [_, r10, r9, r8] = frame.r11_r8;
    let arguments = [frame.rdi, frame.rsi, frame.rdx, r10, r8, r9];
    match frame.rax {
        60 => exit(frame.rdi),
        // What is measured from here on, for who watches from outside; 0 is nothing.
        // SAFETY: there are 64 marks, 16 bytes apart, each of which returns and does nothing.
        1001 => unsafe {
            let mark = case_marks as *const () as u64 + 16 * (frame.rdi & 63);
            core::mem::transmute::<u64, extern "C" fn()>(mark)();
        },
        number => {
            let done = Task::current().system_call(number, arguments);
            frame.rax = done.unwrap_or_else(|errno| -i64::from(errno) as u64);
        }
    }
}
