//! Which accesses to each page are in the stream already: one byte a page, in a table of two levels.
//!
//! The bits of a page are set by whoever reports the access, and cleared under the stream's lock, together with the
//! report of the call that cleared them. So an access is reported at least once after each such call; two
//! threads that race may both report it.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU8, Ordering};

/// A read was reported.
pub const READ: u8 = 1;
/// A write was reported.
pub const WRITE: u8 = 2;
/// An execution was reported.
pub const EXECUTE: u8 = 4;

/// Pages of a chunk: 1 GiB of addresses.
const CHUNK: usize = 1 << 18;
/// Chunks in the user half of the address space.
const CHUNKS: usize = 1 << 17;
/// The pages that the table has room for.
const PAGES: u64 = (CHUNK * CHUNKS) as u64;

type Chunk = [AtomicU8; CHUNK];

/// Chunks are allocated on first use and never freed.
static TABLE: [AtomicPtr<Chunk>; CHUNKS] = [const { AtomicPtr::new(ptr::null_mut()) }; CHUNKS];

fn chunk(page: u64) -> Option<&'static Chunk> {
    let pointer = TABLE.get((page / CHUNK as u64) as usize)?.load(Ordering::Acquire);
    // SAFETY: the pointer is null or came from `allocate`, which initialized the chunk before it stored the pointer;
    // nobody ever frees a chunk that the table holds.
    unsafe { pointer.as_ref() }
}

#[cold]
fn allocate(slot: &'static AtomicPtr<Chunk>) -> &'static Chunk {
    let layout = Layout::new::<Chunk>();
    // SAFETY: the layout's size is not zero.
    let fresh = unsafe { alloc_zeroed(layout) }.cast::<Chunk>();
    if fresh.is_null() {
        handle_alloc_error(layout);
    }
    let winner = match slot.compare_exchange(ptr::null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => fresh,
        Err(other) => {
            // SAFETY: `fresh` was allocated above with this layout, and nobody else has seen it.
            unsafe { dealloc(fresh.cast(), layout) };
            other
        }
    };
    // SAFETY: not null: `fresh` is not, and `other` was found where null was expected. Zeroes are valid atomics.
    // Nobody ever frees a chunk that the table holds.
    unsafe { &*winner }
}

/// Whether the accesses in `bits` to the page were all reported.
#[inline]
pub fn seen(page: u64, bits: u8) -> bool {
    chunk(page).is_some_and(|chunk| chunk[page as usize % CHUNK].load(Ordering::Relaxed) & bits == bits)
}

/// Notes that the accesses in `bits` to the page are being reported; false if somebody else has done so. A page
/// beyond the user half is always to be reported.
pub fn mark(page: u64, bits: u8) -> bool {
    let Some(slot) = TABLE.get((page / CHUNK as u64) as usize) else { return true };
    let chunk = chunk(page).unwrap_or_else(|| allocate(slot));
    chunk[page as usize % CHUNK].fetch_or(bits, Ordering::Relaxed) & bits != bits
}

/// Forgets what was reported of the pages of a range of addresses. The caller holds the stream's lock.
pub fn forget(start: u64, len: u64) {
    let mut page = (start >> 12).min(PAGES);
    let end = (start.saturating_add(len).saturating_add(4095) >> 12).min(PAGES);
    while page < end {
        let next = (page / CHUNK as u64 + 1) * CHUNK as u64;
        if let Some(chunk) = chunk(page) {
            let first = page as usize % CHUNK;
            for byte in &chunk[first..first + (next.min(end) - page) as usize] {
                byte.store(0, Ordering::Relaxed);
            }
        }
        page = next;
    }
}

/// Forgets what was reported of every page. The caller holds the stream's lock.
pub fn forget_all() {
    for first in (0..PAGES).step_by(CHUNK).filter(|&page| chunk(page).is_some()) {
        forget(first << 12, (CHUNK as u64) << 12);
    }
}
