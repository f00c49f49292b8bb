//! The embedded machine on which pagefirst is tested and recordings are replayed.
//!
//! [`Machine`] is memory and CPUs, and implements the library's
//! [`Platform`](pagefirst::platform::Platform); a thread that uses it is one of its CPUs. [`Vcpu`] runs user code on
//! such a CPU: it loads, stores and fetches by virtual address, through a tagged TLB and a walker that sets accessed
//! and dirty bits as x86 does, and takes page faults to the library. [`Counts`] is what happened, counted here and not
//! by the library. [`MachineFile`] is a file for file mappings.
//!
//! # Hardware
//! [`Config`] says what the hardware does, within what manuals allow. By default it is x86-64: a TLB for small pages and
//! one for huge ones, a paging-structure cache, accessed and dirty set by the walker. It walks tables of any
//! [`Format`](pagefirst::arch::Format); [`Config::riscv64`] and [`Config::aarch64`] are the hardware of theirs.
//! [`Config::harsh`] is all at once that a manual allows: entries that are not present cached too, flushes that take no
//! more than they must, accessed and dirty left to software, CPUs that answer shootdowns late and use what they have
//! until then.
//!
//! | file | what it models |
//! |---|---|
//! | `walk` | the walker: rights of all levels, accessed and dirty |
//! | `tlb`, `inner` | one buffer of translations; the paging-structure cache |
//! | `mmu` | a CPU's buffers together, and what takes things out of them |
//! | `vcpu`, `platform` | accesses and faults; shootdowns |
//!
//! # Checks
//! With [`Config::checks`] the machine checks the library while it runs it, and panics with the history of the last
//! events when it finds
//! - a table that is alive and empty (the walker looks at each it passes; [`Machine::check_space`] at all);
//! - a frame or table touched, walked or locked that is free, or freed or handed out twice;
//! - a frame or table freed or handed out while a CPU has cached the way to it, or written to while it was free;
//! - a cached zeroed table that is not zero;
//! - something cached, on any CPU, that is left after the flush that should have taken it; when nothing is under way
//!   ([`Machine::check_space`]), a translation that says more than the tables do;
//! - an entry that leads to another page than one that a CPU still has cached, where a format asks for break-before-make;
//! - an entry that hardware marked dirty and that was overwritten without the mark;
//! - a page executed that was not synchronised for it, where fetches do not see stores by themselves;
//! - a page in use that holds what was in its frame before;
//! - an entry outside all mappings, one that gives more than its mapping, one that is not present and names memory;
//! - faults at one address that go on finding nothing to do, one that looks more often than it may.
//!
//! # Locks
//! | | access | shootdown | library |
//! |---|---|---|---|
//! | access | its own CPU's TLB lock, over translation, walk and data | waits for that one access | called with no TLB lock |
//! | shootdown | | each CPU's TLB lock in turn | called with no lock of the library |
//!
//! # What it does not do
//! Walk without an access (speculation), reorder memory accesses beyond what the host does. Blocks of more than one
//! frame are not followed: [`Note`](pagefirst::platform::Note) does not tell their size.

mod arena;
mod bytes;
mod check;
mod config;
mod counts;
mod cpu;
mod file;
mod history;
mod hooks;
mod inner;
#[cfg(feature = "__instances")]
mod instances;
mod late;
mod lock;
mod machine;
mod mmu;
mod platform;
mod refuse;
mod secure;
mod shadow;
mod sync;
mod tlb;
mod trap;
mod vcpu;
mod walk;

pub use check::Found;
pub use config::{Config, Mistake, TlbShape};
pub use counts::Counts;
pub use file::MachineFile;
#[cfg(feature = "__instances")]
#[doc(hidden)]
pub use instances::instances;
pub use late::Late;
pub use lock::{SpinLock, WriterLock};
pub use machine::{GAVE_UP, Machine};
pub use refuse::{Attempts, Refuse, count_points};
pub use shadow::POISON;
pub use trap::Trap;
pub use vcpu::{FaultCounts, Vcpu};
