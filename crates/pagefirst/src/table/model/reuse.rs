//! Dead tables: readable while anybody is pinned who may have found them, then reused.

use super::install::{map, zap};
use super::{Machine, Role, check, entry, pages};
use crate::platform::Platform;
use crate::sync::epoch::Pin;
use crate::table::{Unlinked, Walk, collect, reserve, retire};
use crate::types::{Pfn, VirtAddr};

fn one_page() -> &'static Machine {
    let m = Machine::new([1, 0, 0]);
    map(m, 0, 20);
    m
}

/// Walks to page 0 under a pin; returns what was there.
fn walk(m: &'static Machine) -> u64 {
    let pin = Pin::new(m);
    match m.space().walk(&pin, VirtAddr(0)) {
        Walk::Nothing(_) => 0,
        Walk::Seen(slot) => slot.raw(),
        Walk::Huge(_) => panic!("no huge page here"),
    }
}
/// Zaps page 0, whose leaf dies; if it can be reused already, maps a page with it elsewhere.
fn retire_and_reuse(m: &'static Machine) -> u64 {
    let zapped = zap(m, pages(0, 1));
    m.advance_and_collect();
    if crate::table::cached(m) > 0 {
        map(m, 4, 30);
    }
    zapped
}

/// A walker under a pin sees page 0 or nothing, never the table's next life.
fn walk_against_reuse(main: usize) {
    check(4, main, one_page, [retire_and_reuse, walk], |m, said| {
        assert!(said == [1, 0] || said == [1, entry(20)], "{said:?}");
        m.audit();
    });
}

// catches: epoch_ignores_pins, pin_without_fence, retire_without_grace, unpin_relaxed
// catches in turn: unlock_forgets_dead
#[test]
fn c06_walk_against_retire_and_reuse_main_0() {
    walk_against_reuse(0);
}
// catches: epoch_ignores_pins, pin_without_fence, retire_without_grace, unpin_relaxed
// catches in turn: unlock_forgets_dead
#[test]
fn c06_walk_against_retire_and_reuse_main_1() {
    walk_against_reuse(1);
}

/// Two tables, unlinked, frames 2 and 3.
fn two_tables() -> &'static Machine {
    let m = Machine::new([2, 0, 0]);
    assert_eq!([Y, X], [(); 2].map(|()| reserve::take_zeroed(m).unwrap()));
    m
}
const X: Pfn = Pfn(2);
const Y: Pfn = Pfn(3);

/// Of two retirers one is late by three epochs: the other's table keeps its grace period.
fn late_retire(main: usize) {
    let reader: Role = |m| {
        for _ in 0..3 {
            m.vm.epoch.advance(m);
        }
        // This CPU found Y before it was unlinked, and still reads it.
        let _pin = Pin::new(m);
        retire(m, Unlinked::one(Y));
        collect(m, m.vm.epoch.advance(m), usize::MAX);
        m.cells(Y);
        0
    };
    check(4, main, two_tables, [|m| (retire(m, Unlinked::one(X)), 0).1, reader], |_, _| {});
}

// catches: retire_tag_early
// catches in turn: retire_without_grace
#[test]
fn retire_tags_in_order_main_0() {
    late_retire(0);
}
// catches: retire_tag_early
// catches in turn: retire_without_grace
#[test]
fn retire_tags_in_order_main_1() {
    late_retire(1);
}
