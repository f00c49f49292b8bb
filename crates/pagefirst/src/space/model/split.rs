//! Mappings that are cut and merged, and huge pages that come apart, while their pages are looked for by the reverse map.

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

/// A private mapping of three pages of a file, the one in the middle not yet; the last is copied.
fn with_gap() -> &'static Machine {
    let m = Machine::whole([1, 0, 0], [2, 0, 0], HugePolicy::Never);
    m.open(3, false);
    m.map_from(0, 0, 1, VmaFlags::empty());
    m.map_from(2, 2, 1, VmaFlags::empty());
    assert_eq!(m.fault(2, Access::Write), MAPPED);
    m
}

/// Maps the middle: three mappings become one.
fn merge(m: &'static Machine) -> u64 {
    m.map_from(1, 1, 1, VmaFlags::empty());
    0
}

/// Mappings of a file are merged while the file is cut. The removal finds the copy by one mapping or another; or it waits for the
/// call; or the call takes the copy out itself, when it ends: its new mapping is where the removal's walk has been already, and
/// the old one is gone when the walk comes there.
fn merge_against_truncate(main: usize) {
    // One to let the call begin on loom's second thread, and one to stop it.
    check(1 + main, main, with_gap, [merge, Machine::cut], |m, _| {
        m.end_cut();
    });
}

// catches: calls_do_not_help, removal_does_not_wait
#[test]
fn r13_merge_against_truncate_main_0() {
    merge_against_truncate(0);
}
// catches: calls_do_not_help, removal_does_not_wait, retire_without_grace, unlink_counted_by_finder
#[test]
fn r13_merge_against_truncate_main_1() {
    merge_against_truncate(1);
}
