//! A QEMU plugin that counts, instruction by instruction, what a kernel does between a trap and the return from it.
//!
//! A window of a CPU opens with the instruction at an `entry` address and closes with the one at an `exit` address, both
//! included. Entries and exits must pair: a trap taken within a window belongs to it. The address `marks` is the first of
//! 64 functions, 16 bytes apart: a CPU that calls function K works on case K from then on. Case 0 is not counted, nor a
//! window in which a mark lies.
//!
//! Arguments: `entry=ADDRESS+ADDRESS…`, `exit=ADDRESS+ADDRESS…`, `marks=ADDRESS`, `out=FILE`. QEMU splits them at commas.
//! When QEMU ends, the file holds lines of these kinds, numbers that begin with `0x` being addresses:
//!
//! ```text
//! windows CASE CPU COUNT
//! exec CASE CPU PC COUNT
//! store CASE CPU LINE PC COUNT      stores to memory, by cache line of the physical address
//! device CASE CPU LINE PC COUNT     stores to a device
//! ```
//!
//! Each iteration of a `rep` instruction counts, as it does with `-icount`.

#[cfg(not(test))]
mod hooks;
mod options;
#[cfg(not(test))]
#[path = "../../../../crates/pagefirst-record/plugin-src/qemu.rs"]
#[expect(dead_code, reason = "the recorder's plugin uses the rest")]
mod qemu;
mod window;
