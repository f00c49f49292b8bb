//! Into the kernel: page faults, which the library answers; system calls; interrupts from the other CPU.

use crate::cpu;
use crate::platform::kernel;
use crate::program::Task;
use crate::{print, println};
use core::arch::{asm, global_asm};
use core::sync::atomic::Ordering::Relaxed;
use pagefirst::fault::{FaultError, Outcome, Segv};
use pagefirst::platform::Platform;
use pagefirst::types::{Access, VirtAddr};

global_asm!(include_str!("trap.s"), options(raw));

unsafe extern "C" {
    /// Runs user code until it exits; returns its status.
    pub fn enter_user(rip: u64, rsp: u64, argument: u64, arguments: u64) -> u64;
    fn leave_user(status: u64) -> !;
    fn syscall_entry();
    fn case_marks();
    static trap_table: [u64; VECTORS];
}

/// Gates in the table of a CPU.
pub const VECTORS: usize = 33;
/// The vector by which CPUs reach each other.
pub const IPI: u64 = 32;
const GENERAL_PROTECTION: u64 = 13;
const PAGE_FAULT: u64 = 14;
const SYSTEM_CALL: u64 = 256;

/// What `trap.s` saved of who was interrupted.
#[repr(C)]
pub struct Frame {
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
    flags: u64,
    rsp: u64,
    ss: u64,
}

/// The gate of a vector (SDM 3A, 7.14.1): an interrupt gate, so interrupts are off, on a stack of its own.
pub fn gate(vector: usize, code: u16) -> u128 {
    // SAFETY: `trap.s` has that many addresses.
    let address = unsafe { trap_table[vector] } as u128;
    let stack = match vector {
        2 | 8 | 18 => 3, // NMI, double fault, machine check
        32 => 2,
        _ => 1,
    };
    let present = if address == 0 { 0 } else { 0x8e00 };
    let (low, high) = (address & 0xffff, address >> 16);
    low | (code as u128) << 16 | stack << 32 | present << 32 | high << 48
}

/// Where system calls enter.
pub fn syscall_address() -> u64 {
    syscall_entry as *const () as u64
}

/// Whatever came in, from `trap.s`.
#[unsafe(no_mangle)]
extern "C" fn trap(frame: &mut Frame) {
    match frame.vector {
        PAGE_FAULT if frame.cs & 3 == 3 => page_fault(frame),
        SYSTEM_CALL => frame.rax = Task::current().system_call(frame),
        IPI => {
            cpu::local_apic(0xb0, 0); // end of interrupt: the next one may come
            kernel().answer();
        }
        GENERAL_PROTECTION if frame.cs & 3 == 3 => refuse(frame, FaultError::Segv(Segv::NonCanonical)),
        vector if frame.cs & 3 == 3 => {
            println!("a user's exception {vector} at {:#x}", frame.rip);
            exit(vector << 32);
        }
        vector => {
            panic!("exception {vector}, error {:#x}, at {:#x}, CR2 {:#x}", frame.error, frame.rip, cr2())
        }
    }
}

fn cr2() -> u64 {
    let address: u64;
    // SAFETY: reads the register.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack, preserves_flags)) };
    address
}

/// A user touched what its tables do not allow. (The bits of the error: SDM 3A, 4.7.)
fn page_fault(frame: &mut Frame) {
    assert!(frame.error & 8 == 0, "reserved bits in the entry for {:#x}", cr2());
    let access = match frame.error {
        e if e & 16 != 0 => Access::Execute,
        e if e & 2 != 0 => Access::Write,
        _ => Access::Read,
    };
    let addr = VirtAddr(cr2());
    let space = &Task::current().space;
    let mut held = None;
    loop {
        match space.fault(addr, access) {
            Outcome::Mapped { .. } | Outcome::Spurious => return,
            // Kept until the fault has come again: that is what the ticket is for.
            Outcome::Blocked(ticket) => {
                while !ticket.is_ready() {
                    kernel().relax();
                }
                held = Some(ticket);
            }
            Outcome::Error(why) => {
                drop(held);
                return refuse(frame, why);
            }
        }
    }
}

/// What a signal is elsewhere: the program goes on where it said, with signal and code, or it ends.
fn refuse(frame: &mut Frame, why: FaultError) {
    let code = why.signal().map_or(9 << 8, |(signal, code)| (signal as u64) << 8 | code as u64);
    match kernel().cpus[kernel().cpu()].recover.swap(0, Relaxed) {
        0 => {
            println!("refused: {why}, CR2 {:#x}, at {:#x}", cr2(), frame.rip);
            exit(code << 32)
        }
        recover => (frame.rip, frame.rax) = (recover, code),
    }
}

/// Ends the program that this CPU runs.
fn exit(status: u64) -> ! {
    // SAFETY: this CPU runs a program, so `enter_user` waits; nothing on the stack in between needs dropping.
    unsafe { leave_user(status) }
}

/// Tells those who count from outside what is measured from here on (0: nothing).
fn mark(case: u64) {
    let address = case_marks as *const () as u64 + 16 * (case & 63);
    // SAFETY: there are 64 marks, 16 bytes apart, each of which returns and does nothing.
    unsafe { core::mem::transmute::<u64, extern "C" fn()>(address)() };
}

impl Task {
    /// A system call: Linux's number and arguments, Linux's result; from 1000 on our own.
    fn system_call(&self, frame: &Frame) -> u64 {
        let [r10, r9, r8] = [frame.r11_r8[1], frame.r11_r8[2], frame.r11_r8[3]];
        let (a, b, c) = (frame.rdi, frame.rsi, frame.rdx);
        let done = match frame.rax {
            1 => self.write(b, c),
            9 => self.mmap(a, b, c, r10, r8, r9),
            10 => self.mprotect(a, b, c),
            11 => self.munmap(a, b),
            28 => self.madvise(a, b, c),
            39 => Ok(1), // getpid
            60 => exit(a),
            1000 => {
                kernel().cpus[kernel().cpu()].recover.store(a, Relaxed);
                Ok(0)
            }
            1001 => {
                mark(a);
                Ok(0)
            }
            1002 => {
                print(format_args!("count {a} {b} {c} "));
                self.write(r10, r8)
            }
            1003 => Ok(self.space.account().faults.mapped()),
            _ => Err(38),
        };
        done.unwrap_or_else(|errno: i32| -i64::from(errno) as u64)
    }
}
