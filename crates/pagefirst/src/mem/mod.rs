//! Memory of the library itself: typed slabs carved from frames, owned reservations, counted links.
//!
//! Everything here fails with [`NoMemory`](crate::types::NoMemory) and never panics for want of memory. Whatever
//! must not fail half-way reserves first.

mod few;
mod limbo;
mod shared;
mod slab;

pub(crate) use few::{Few, Room};
pub(crate) use limbo::{Chain, Limbo};
pub use shared::{Link, Past, Pool, Pooled, Reserved, Shared};
pub(crate) use slab::Slab;
