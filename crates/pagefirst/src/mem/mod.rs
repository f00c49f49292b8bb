//! Memory of the library itself: typed slabs carved from frames, owned reservations, counted links.
//!
//! Everything here fails with [`NoMemory`] and never panics for want of memory. Whatever
//! must not fail half-way reserves first.

use crate::platform::Platform;
use crate::types::NoMemory;
#[cfg(debug_assertions)]
use core::panic::Location;

mod few;
mod limbo;
mod shared;
mod slab;

pub(crate) use few::{Few, Room};
pub(crate) use limbo::{Chain, Limbo};
pub(crate) use shared::{AnyPool, Link, Name};
pub use shared::{Past, Pool, Pooled, Reserved, Shared};
pub(crate) use slab::Slab;

/// Before memory is taken: in debug builds the platform may refuse it ([`Platform::refuses`]). What calls this is marked
/// `track_caller` in debug builds, and so is what passes its error on, up to the place that wants the memory.
#[cfg_attr(debug_assertions, track_caller)]
#[inline]
pub(crate) fn ask<P: Platform>(p: &'static P) -> Result<(), NoMemory> {
    #[cfg(debug_assertions)]
    if p.refuses(Location::caller()) {
        return Err(NoMemory);
    }
    let _ = p;
    Ok(())
}
