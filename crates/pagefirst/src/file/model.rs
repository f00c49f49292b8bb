//! Models of a page's state for loom, over its metadata alone. Whole faults and removals are in `space::model`.
//!
//! As in `table::model`: every thread starts at one gate, and each model runs once for each rotation of its roles.

extern crate std;

use super::{Entries, clean_then_read};
use crate::frame::{FrameFlags, FrameMeta};
use crate::table::model::{explorer, is_in_turn};
use loom::sync::{Arc, Mutex};

type Role = fn(&FrameMeta) -> bool;

#[track_caller]
fn check(main: usize, setup: fn() -> FrameMeta, roles: [Role; 2], end: fn(&FrameMeta, [bool; 2])) {
    explorer(4).check(move || {
        let (meta, gate) = (Arc::new(setup()), Arc::new(Mutex::new(())));
        if is_in_turn() {
            let mut said = [false; 2];
            [main, 1 - main].into_iter().for_each(|role| said[role] = roles[role](&meta));
            return end(&meta, said);
        }
        let other = {
            let (meta, gate) = (meta.clone(), gate.clone());
            loom::thread::spawn(move || {
                drop(gate.lock().unwrap());
                roles[1 - main](&meta)
            })
        };
        drop(gate.lock().unwrap());
        let mut said = [false; 2];
        said[main] = roles[main](&meta);
        said[1 - main] = other.join().unwrap();
        end(&meta, said);
    });
}

/// A page that is taken out because nobody maps it is not mapped by a fault afterwards.
fn count_against_going(main: usize) {
    let setup = || {
        let meta = FrameMeta::default();
        meta.adopt();
        meta.set(FrameFlags::UP_TO_DATE);
        meta
    };
    let fault = |meta: &FrameMeta| {
        let is_valid =
            || meta.flags() & (FrameFlags::UP_TO_DATE | FrameFlags::GOING) == FrameFlags::UP_TO_DATE;
        let mapped = meta.try_map_valid(is_valid) == Some(true);
        if !mapped {
            let _ = meta.unmap_many(1);
        }
        mapped
    };
    let removal = |meta: &FrameMeta| {
        meta.go();
        meta.maps_ordered() == 0
    };
    check(main, setup, [fault, removal], |_, [mapped, taken_out]| {
        assert!(!(mapped && taken_out), "a page is mapped that the file has no longer");
    });
}
// catches: maps_read_plainly, remove_without_going, validate_before_count
#[test]
fn count_against_going_main_0() {
    count_against_going(0);
}
// catches: maps_read_plainly, remove_without_going, validate_before_count
#[test]
fn count_against_going_main_1() {
    count_against_going(1);
}

/// A write that lets the file grow, by which the page's index stands for the size here, is stored, or the page is dirty.
fn write_back_against_growth(main: usize) {
    let setup = || {
        let meta = FrameMeta::default();
        meta.set_index(1);
        meta.set(FrameFlags::DIRTY);
        meta
    };
    let store = |meta: &FrameMeta| {
        let entries = || Entries::Clean;
        clean_then_read(meta, || meta.index(), entries, |size| size == 2) == Some(true)
    };
    let grow = |meta: &FrameMeta| {
        meta.set_index(2);
        meta.set(FrameFlags::DIRTY);
        true
    };
    check(main, setup, [store, grow], |meta, [stored, _]| {
        assert!(
            stored || meta.flags().contains(FrameFlags::DIRTY),
            "what was written beyond the old end is lost"
        );
    });
}
// catches: clean_after_reading, size_before_cleaning
#[test]
fn x12_write_back_against_growth_main_0() {
    write_back_against_growth(0);
}
// catches: clean_after_reading, size_before_cleaning
#[test]
fn x12_write_back_against_growth_main_1() {
    write_back_against_growth(1);
}
