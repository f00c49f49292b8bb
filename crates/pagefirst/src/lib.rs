//! Stub
#![cfg_attr(not(loom), no_std)]

pub mod arch;
pub mod file;
pub mod frame;
pub mod mem;
pub mod platform;
pub mod space;
pub mod sync;
pub mod table;
pub mod tlb;
pub mod types;
pub mod vm;

pub use vm::Vm;
