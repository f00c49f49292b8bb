//! Fault-around: which neighbours of a file's page are mapped with it.
//!
//! The window is a power of two, aligned to itself, clipped to the VMA and to one leaf table. Neighbours are found in
//! the cache without a lock of it, and validated one by one under the lock of the table that gets them (`file`).
//!
//! A window that adapts learns from the leaf table: neighbours are mapped old, so those that are young now were used. A
//! fault reads the entries of the two default windows it lies between, without a lock. Where the leaf table is missing, it
//! looks at a table beside: its record says where fault-around was last at work there, and the entries of that window are
//! read. If few of them were used the page is mapped alone: so where one page is used in each table, that is what is
//! mapped of the next. That place is kept in the word that unlocks the table: nothing more is written.

use crate::arch::Format;
use crate::platform::Platform;
use crate::policy::{DEFAULT_FAULT_AROUND, FaultAround};
use crate::space::Vma;
use crate::table::{Nothing, Slot};
use crate::types::{PAGE_SIZE, VirtAddr, VirtRange};

/// The window around `va`: where neighbours may be mapped; and log2 of its pages before it was clipped.
pub(super) fn window<P: Platform>(
    policy: FaultAround,
    vma: &Vma<P>,
    va: VirtAddr,
    slot: &Slot<'_, P, Nothing>,
) -> (VirtRange, u8) {
    let block = |bytes: u64| {
        let start = va.align_down(bytes);
        let aligned = VirtRange::new(start, VirtAddr(start.0.saturating_add(bytes)));
        if cfg!(mutant = "around_past_mapping") { aligned } else { aligned.intersect(vma.range) }
    };
    let bytes = match policy.is_fixed() {
        true => policy.least(),
        false => {
            let bytes = match slot.beside().filter(|beside| vma.range.contains(beside.va)) {
                Some(beside) if beside.alone => PAGE_SIZE,
                Some(beside) => begun(beside.there, beside.used),
                None => {
                    let (there, used) = slot.used_in(block(2 * DEFAULT_FAULT_AROUND));
                    adapted(there, used)
                }
            };
            bytes.clamp(policy.least(), policy.most())
        }
    };
    let bytes = bytes.min(P::Format::span(1));
    (block(bytes), (bytes / PAGE_SIZE).ilog2() as u8)
}

/// So many entries tell enough.
const ENOUGH: u32 = 8;

/// The window beside so many entries, so many of which were used.
fn adapted(there: u32, used: u32) -> u64 {
    let normal = DEFAULT_FAULT_AROUND;
    match () {
        _ if there < ENOUGH => normal,
        _ if 4 * used >= 3 * there => 4 * normal,
        _ if 5 * used < there => normal / 4,
        _ => normal,
    }
}

/// The window in a table that begins, when that in a table beside had so many entries, so many of which were used.
fn begun(there: u32, used: u32) -> u64 {
    let few = if there < ENOUGH { used <= 1 } else { 5 * used < there };
    if few { PAGE_SIZE } else { adapted(there, used) }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_what_was_used() {
        let windows = [(0, 0), (7, 7), (8, 6), (8, 5), (16, 4), (16, 3), (32, 6), (32, 32)]
            .map(|(n, u)| adapted(n, u) >> 10);
        assert_eq!(windows, [64, 64, 256, 64, 64, 16, 16, 256]);
        let begun =
            [(4, 1), (4, 2), (7, 7), (16, 3), (16, 4), (16, 12), (32, 6)].map(|(n, u)| begun(n, u) >> 10);
        assert_eq!(begun, [4, 64, 64, 4, 64, 256, 4]);
    }
}
