//! A virtual-memory subsystem to embed in kernels, unikernels and hypervisors: address spaces, the page-fault path,
//! page tables, a page cache. `no_std` and without `alloc`: memory that runs out is a value on every path.
//!
//! **The page first, the tables after.** A fault first obtains what it will map. Only then does it build the tables
//! that are missing, of every level, privately, with the entry already in them, and makes the whole chain visible
//! with one store. So no live table is ever empty (the root excepted); a fault that fails leaves no table behind, and
//! allocates none unless what fails is the allocation of a table; the table that loses its last entry is dead in the same moment.
//!
//! An embedder implements [`Platform`](platform::Platform), gives memory to [`Vm::init`], makes an
//! [`AddressSpace`](space::AddressSpace), maps into it, and passes page faults to
//! [`fault`](space::AddressSpace::fault).
//!
//! # The three protocols
//! Everything concurrent follows from these.
//!
//! **1. Validate, then publish, under the table's lock.** A fault holds no lock and no VMA while it fetches, clears or
//! copies a page. Every entry that it writes is written under the lock of the table that holds the slot, after
//! checking there that the table is alive; that the VMA it worked from is not retired; that the slot is what it saw;
//! that every page to be mapped, neighbours included, is attached to its file and index, up to date, not poisoned,
//! not going away, below the file's size. Map counts rise before a page is validated and fall again if it fails.
//! (`table::publish`, `table::edit`, `fault`.)
//!
//! **2. Announce, then lock every table.** Whoever takes something away announces it first (a mapping call retires
//! the VMAs concerned), then locks, one at a time, every deepest live table that intersects the range, even where it
//! looks empty, and takes away what is there; then it flushes; only then does it publish what comes instead. An
//! install before that lock is found; one after it sees the announcement. (`table::range`, `space`.) Whoever takes pages
//! away from a file marks them, walks the file's mappings like that, and lets a page go only when its map count is zero.
//! (`file`, `rmap`.)
//!
//! **3. Dead with the last entry.** A table is marked dead in the store that unlocks it empty. Who meets a dead table
//! clears the parent's slot under the parent's lock, owns the table from there, and walks again; it is reused after a
//! flush and a grace period. (`table::record`, `table::retire`, `sync::epoch`.)
//!
//! # Lock order
//! space writer, or a file's changes > a page being stored (these may sleep) > pin > one table > leaves (a file's index, its mappings, limbo, slabs, per-CPU caches) > the frame
//! allocator. One lock of each rank at a time; a flush is made with none of them held. Debug builds check it.
//!
//! # Example
//! The embedded machine (crate `pagefirst-machine`) implements the platform on threads:
//! ```
//! use pagefirst::fault::Outcome;
//! use pagefirst::policy::Policy;
//! use pagefirst::space::{AddressSpace, Map};
//! use pagefirst::types::{Access, Prot};
//! use pagefirst_machine::{Config, Machine};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let machine: &'static Machine = Machine::new(Config::default());
//! let space = AddressSpace::new(machine, Policy::default())?;
//! let at = space.map(Map::anonymous(1 << 40, Prot::READ | Prot::WRITE))?.range.start;
//! assert_eq!(space.account().tables_bytes(), 4096); // a tebibyte is mapped; the root is all there is
//! assert!(matches!(space.fault(at, Access::Write), Outcome::Mapped { .. }));
//! assert_eq!(space.account().tables_bytes(), 4 * 4096); // one page, and one table of each level
//! space.discard(at, 4096)?;
//! assert_eq!(space.account().tables_bytes(), 4096);
//! # Ok(())
//! # }
//! ```
#![cfg_attr(not(loom), no_std)]

#[cfg(any(test, shuttle))]
#[macro_use]
mod planted;

pub mod account;
pub mod arch;
pub mod fault;
pub mod file;
pub mod frame;
pub mod limit;
pub mod mem;
pub mod platform;
pub mod policy;
mod rmap;
pub mod space;
pub mod sync;
pub mod table;
pub mod tlb;
pub mod types;
mod vm;

pub use vm::{Held, Local, Poisoned, Vm};
