//! The embedded machine on which pagefirst is tested and recordings are replayed.

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
