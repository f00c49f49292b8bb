//! The embedded machine on which pagefirst is tested and recordings are replayed.
//!
//! [`Machine`] is memory and CPUs, and implements the library's
//! [`Platform`](pagefirst::platform::Platform); a thread that uses it is one of its CPUs. [`Vcpu`] runs user code on
//! such a CPU: it loads, stores and fetches by virtual address, through a tagged TLB and a walker that sets accessed
//! and dirty bits as x86 does, and takes page faults to the library. [`Counts`] is what happened, counted here and not
//! by the library. [`MachineFile`] is a file for file mappings.
//!
//! # Checks
//! With [`Config::checks`] the machine checks the library while it runs it, and panics with the history of the last
//! events when it finds
//! - a table that is alive and empty (the walker looks at each it passes; [`Machine::check_space`] at all);
//! - a frame or table touched, walked or locked that is free, or freed or handed out twice;
//! - a frame freed or handed out while a TLB still translates to it, or written to while it was free;
//! - a cached zeroed table that is not zero;
//! - a translation that is left, on any CPU, after the flush that should have taken it;
//! - faults at one address that go on finding nothing to do.
//!
//! # Locks
//! | | access | shootdown | library |
//! |---|---|---|---|
//! | access | its own CPU's TLB lock, over translation, walk and data | waits for that one access | called with no TLB lock |
//! | shootdown | | each CPU's TLB lock in turn | called with no lock of the library |
//!
//! # What it does not do yet
//! Cache inner entries of tables or entries that are not present, delay shootdowns, leave accessed and dirty bits to
//! software. Blocks of more than one frame are not followed: [`Note`](pagefirst::platform::Note) does not tell their
//! size.

mod arena;
mod bytes;
mod check;
mod config;
mod counts;
mod cpu;
mod file;
mod history;
mod hooks;
mod lock;
mod machine;
mod platform;
mod shadow;
mod tlb;
mod trap;
mod vcpu;
mod walk;

pub use check::Found;
pub use config::{Config, Mistake, TlbShape};
pub use counts::Counts;
pub use file::MachineFile;
pub use lock::{SpinLock, WriterLock};
pub use machine::Machine;
pub use shadow::POISON;
pub use trap::Trap;
pub use vcpu::{FaultCounts, Vcpu};
