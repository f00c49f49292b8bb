//! Huge pages that come apart while they are looked for by the reverse map.

use super::*;
use crate::frame::FrameFlags;
use crate::table::model::{Role, check};

const ALL: u64 = HUGE as u64;

/// A huge page of a file is split by a mapping call while the file is cut within it. The removal finds it whole, or in pieces, or
/// waits for the call: nothing stays mapped beyond the end, and the page is dirty, as its one entry said that it was.
fn split_against_truncate(main: usize) {
    let setup = || {
        let m = Machine::whole([2, 0, 0], [0; 3], HugePolicy::Always);
        m.open_file(ALL, Zeros { is_slow: false, order: 2 });
        m.map_file(0, ALL);
        assert_eq!((m.fault(0, Access::Write), m.frame_at(0)), (MAPPED, Some(m.huge_page())));
        m.refer_to_page(0);
        // As if it had been stored just now, and then the program had written to it.
        m.meta(m.huge_page()).clear(FrameFlags::DIRTY);
        m
    };
    let split: Role = |m| m.process().unmap(at(1), PAGE_SIZE).is_ok().into();
    let cut: Role = |m| {
        m.file().set_size(m, 2 * PAGE_SIZE);
        0
    };
    check(1, main, setup, [split, cut], |m, said| {
        assert_eq!(said, [1, 0]);
        let mapped = m.mapped();
        assert!(mapped.is_empty() || mapped == [(0, m.huge_page())], "mapped beyond the end: {mapped:?}");
        assert!(m.meta(m.huge_page()).flags().contains(FrameFlags::DIRTY), "a dirty bit is lost");
        m.exit();
    });
}

// catches: removal_does_not_wait, split_loses_dirty
#[test]
fn r15_split_against_truncate_main_0() {
    split_against_truncate(0);
}
// catches: removal_does_not_wait, split_loses_dirty
#[test]
fn r15_split_against_truncate_main_1() {
    split_against_truncate(1);
}
