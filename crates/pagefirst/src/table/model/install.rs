//! Installs against each other, against unmaps, against tables that die.

use super::{Machine, Role, check, entry, pages};
use crate::arch::{Format, Tiny};
use crate::platform::Platform;
use crate::sync::atomic::{Acquire, Relaxed};
use crate::sync::epoch::Pin;
use crate::table::publish::Installed;
use crate::table::publish::install;
use crate::table::{
    Batch, Counted, FaultKind, Flow, Guard, NewEntry, Refused, Reserve, Stock, Table, Visitor, Walk,
};
use crate::tlb::Gather;
use crate::types::{PAGE_SIZE, VirtAddr, VirtRange};

/// One page to be mapped, with an announcement to heed or without.
struct Page {
    m: &'static Machine,
    at: u64,
    page: u32,
    heeds: bool,
}
impl Batch for Page {
    fn va(&self) -> VirtAddr {
        VirtAddr(self.at * PAGE_SIZE)
    }
    fn is_current(&self) -> bool {
        // Relaxed: the table's lock alone must order it.
        !self.heeds || self.m.retired.load(Relaxed) == 0
    }
    fn entry(&mut self, _: VirtAddr) -> Option<NewEntry> {
        Some(NewEntry { raw: entry(self.page), counted: Counted::Nothing })
    }
    fn kind(&self) -> Option<FaultKind> {
        Some(FaultKind::AnonWrite)
    }
}

/// Zaps what is mapped; counts it.
pub(super) struct Zap(pub u64);
impl Visitor<Machine> for Zap {
    fn leaf(
        &mut self,
        guard: &mut Guard<'_, Machine>,
        range: VirtRange,
        gather: &mut Gather<'_, Machine>,
    ) -> Flow {
        let mut va = range.start;
        while va < range.end {
            let index = Tiny::index(va, guard.table().level());
            if guard.take(index).is_some() {
                gather.touch(VirtRange::page_of(va));
                self.0 += 1;
            }
            va = VirtAddr(va.0 + Tiny::span(guard.table().level()));
        }
        Flow::Done
    }
}
pub(super) const MAPPED: u64 = 1;
const MAPPED_WITH_TABLE: u64 = 2;
const RACED: u64 = 3;
const AGAIN: u64 = 4;
const NO_MEMORY: u64 = 5;

/// A fault on the page number `at`, with `page` in hand.
fn fault(m: &'static Machine, at: u64, page: u32, heeds: bool) -> u64 {
    let mut reserve = Reserve::new(m);
    reserve.refill(1).unwrap();
    let mut gather = Gather::new(m.space());
    let mut batch = Page { m, at, page, heeds };
    let pin = Pin::new(m);
    let result = match m.space().walk(&pin, batch.va()) {
        Walk::Nothing(slot) => install(m.space(), &pin, slot, &mut batch, &mut reserve, &mut gather),
        Walk::Seen(_) | Walk::Huge(_) => Err(Refused::Raced),
    };
    drop(pin);
    match result {
        Ok(Installed { tables: 0, .. }) => MAPPED,
        Ok(Installed { .. }) => MAPPED_WITH_TABLE,
        Err(Refused::Raced) => RACED,
        Err(Refused::Again) => AGAIN,
        Err(Refused::Unflushed(n)) => panic!("{n} tables unflushed"),
        Err(Refused::Short(n)) => panic!("{n} tables wanted"),
    }
}
pub(super) fn map(m: &'static Machine, at: u64, page: u32) -> u64 {
    fault(m, at, page, false)
}
/// The same with no table in hand, and no memory for one.
fn fault_in_want(m: &'static Machine, at: u64, page: u32) -> u64 {
    let (mut reserve, mut gather) = (Reserve::new(m), Gather::new(m.space()));
    let mut batch = Page { m, at, page, heeds: false };
    loop {
        let done = {
            let pin = Pin::new(m);
            let Walk::Nothing(slot) = m.space().walk(&pin, batch.va()) else { panic!("nobody else maps it") };
            install(m.space(), &pin, slot, &mut batch, &mut reserve, &mut gather)
        };
        match done {
            Err(Refused::Short(tables)) if reserve.refill(tables).is_err() => return NO_MEMORY,
            Err(Refused::Short(_)) => continue,
            Ok(Installed { tables: 0, .. }) => return MAPPED,
            other => panic!("{other:?}"),
        }
    }
}
pub(super) fn zap(m: &'static Machine, range: VirtRange) -> u64 {
    let mut zap = Zap(0);
    let mut gather = Gather::new(m.space());
    m.space().visit(range, &mut zap, &mut Stock::empty(m), &mut gather);
    zap.0
}
/// Announces, then zaps.
pub(super) fn unmap(m: &'static Machine, range: VirtRange) -> u64 {
    m.retired.store(1, Relaxed);
    zap(m, range)
}

/// Two faults on one page: one maps, the other finds the slot taken and gives its table back.
fn two_faults_same_page(main: usize) {
    check(
        4,
        main,
        || Machine::new([1, 1, 0]),
        [|m| map(m, 0, 10), |m| map(m, 0, 11)],
        |m, said| {
            let winner = if said[0] == RACED { 11 } else { 10 };
            assert!(said == [MAPPED_WITH_TABLE, RACED] || said == [RACED, MAPPED_WITH_TABLE], "{said:?}");
            assert_eq!(m.audit(), [(0, entry(winner))]);
        },
    );
}

// catches: install_overwrites
#[test]
fn r01_two_faults_same_page_main_0() {
    two_faults_same_page(0);
}
// catches: install_overwrites
#[test]
fn r01_two_faults_same_page_main_1() {
    two_faults_same_page(1);
}

/// Two first touches in one empty range: both are mapped, in one table.
fn two_faults_same_range(main: usize) {
    check(
        4,
        main,
        || Machine::new([1, 1, 0]),
        [|m| map(m, 0, 10), |m| map(m, 1, 11)],
        |m, said| {
            let mapped = [MAPPED, MAPPED_WITH_TABLE];
            assert!(said == mapped || said == [mapped[1], mapped[0]], "{said:?}");
            assert_eq!(m.audit(), [(0, entry(10)), (PAGE_SIZE, entry(11))]);
        },
    );
}

// catches: install_counts_levels_once, install_overwrites
#[test]
fn r02_two_faults_same_empty_range_main_0() {
    two_faults_same_range(0);
}
// catches: install_counts_levels_once, install_overwrites
#[test]
fn r02_two_faults_same_empty_range_main_1() {
    two_faults_same_range(1);
}

/// An unmap of a range in which no table is yet, against a first touch: nothing is left mapped.
fn unmap_of_empty_slot(main: usize) {
    check(
        4,
        main,
        || Machine::new([1, 0, 0]),
        [|m| fault(m, 0, 10, true), |m| unmap(m, pages(0, 4))],
        |m, said| {
            assert_eq!(m.audit(), [], "mapping left in an unmapped range, {said:?}");
            assert!(said == [AGAIN, 0] || said == [MAPPED_WITH_TABLE, 1], "{said:?}");
        },
    );
}

// catches: install_validates_unlocked, install_without_validation, unlock_forgets_dead, zap_skips_empty
#[test]
fn r11_install_against_unmap_of_empty_slot_main_0() {
    unmap_of_empty_slot(0);
}
// catches: install_validates_unlocked, install_without_validation, unlock_forgets_dead, zap_skips_empty
#[test]
fn r11_install_against_unmap_of_empty_slot_main_1() {
    unmap_of_empty_slot(1);
}

/// Zaps a page at a time.
struct ZapOne {
    zap: Zap,
    room: bool,
}
impl Visitor<Machine> for ZapOne {
    fn leaf(
        &mut self,
        guard: &mut Guard<'_, Machine>,
        range: VirtRange,
        gather: &mut Gather<'_, Machine>,
    ) -> Flow {
        if !core::mem::replace(&mut self.room, false) {
            return Flow::Full(range.start);
        }
        let page = VirtRange::page_of(range.start);
        self.zap.leaf(guard, page, gather);
        if page.end < range.end { Flow::Full(page.end) } else { Flow::Done }
    }
    fn between(&mut self) {
        self.room = true;
    }
}
fn unmap_one_by_one(m: &'static Machine, range: VirtRange) -> u64 {
    m.retired.store(1, Relaxed);
    let mut zap = ZapOne { zap: Zap(0), room: true };
    m.space().visit(range, &mut zap, &mut Stock::empty(m), &mut Gather::new(m.space()));
    zap.zap.0
}

/// The same for an unmap that goes on behind what it could not take more of: a first touch may come before that.
fn unmap_goes_on(main: usize) {
    let setup = || {
        let m = Machine::new([2, 0, 0]);
        map(m, 4, 20);
        map(m, 5, 21);
        m
    };
    check(4, main, setup, [|m| fault(m, 0, 10, true), |m| unmap_one_by_one(m, pages(0, 6))], |m, said| {
        assert_eq!(m.audit(), [], "mapping left in an unmapped range, {said:?}");
        assert!(said == [AGAIN, 2] || said == [MAPPED_WITH_TABLE, 3], "{said:?}");
    });
}

// catches: install_validates_unlocked, install_without_validation, zap_skips_empty
#[test]
fn r11_install_against_unmap_that_goes_on_main_0() {
    unmap_goes_on(0);
}
// catches: install_validates_unlocked, install_without_validation, zap_skips_empty
#[test]
fn r11_install_against_unmap_that_goes_on_main_1() {
    unmap_goes_on(1);
}

/// The same where the leaf exists, holds a neighbour that stays, and is visited while it may look empty. The announcement may
/// come after the fault has found its mapping, and the visit before the fault has the leaf's lock.
fn unmap_in_leaf(main: usize) {
    let setup = || {
        let m = Machine::new([2, 0, 0]);
        map(m, 1, 20);
        m
    };
    check(4, main, setup, [|m| fault(m, 0, 10, true), |m| unmap(m, pages(0, 1))], |m, said| {
        assert_eq!(m.audit(), [(PAGE_SIZE, entry(20))], "mapping left in an unmapped range, {said:?}");
        assert!(said == [AGAIN, 0] || said == [MAPPED, 1], "{said:?}");
    });
}

// catches: install_validates_unlocked, install_without_validation
#[test]
fn r11_install_against_unmap_in_leaf_main_0() {
    unmap_in_leaf(0);
}
// catches: install_validates_unlocked, install_without_validation
#[test]
fn r11_install_against_unmap_in_leaf_main_1() {
    unmap_in_leaf(1);
}

fn one_page() -> &'static Machine {
    let m = Machine::new([2, 1, 0]);
    map(m, 0, 20);
    m
}

/// A zap takes a leaf's last entry while an installer comes with another: the entry is in a live table.
fn against_retire(main: usize) {
    check(4, main, one_page, [|m| map(m, 1, 10), |m| zap(m, pages(0, 1))], |m, said| {
        assert_eq!(m.audit(), [(PAGE_SIZE, entry(10))], "{said:?}");
        assert_eq!(said[1], 1);
        let dead = m.vm.tables_in_limbo.len(m);
        // Either the leaf lived on, or it died, has one owner, and another took its place.
        assert!(
            (said[0], dead) == (MAPPED, 0) || (said[0], dead) == (MAPPED_WITH_TABLE, 1),
            "{said:?} {dead}"
        );
    });
}

// catches: install_counts_levels_once, lock_ignores_dead, retire_without_grace, unlink_counted_by_finder
// catches: unlink_without_looking
#[test]
fn c24_install_against_retire_main_0() {
    against_retire(0);
}
// catches: install_counts_levels_once, lock_ignores_dead, retire_without_grace, unlink_counted_by_finder
// catches: unlink_without_looking
#[test]
fn c24_install_against_retire_main_1() {
    against_retire(1);
}

/// The same where the installer has no table for a new leaf, and gets none: it maps the page in the leaf that it saw, or says
/// that memory is out, and nothing is left of it (X2).
fn short_of_tables(main: usize) {
    let setup = || {
        let m = Machine::new([1, 0, 0]);
        map(m, 0, 20);
        m
    };
    // CPU 1 has no table. What the zap frees waits for its grace period.
    check(4, main, setup, [|m| zap(m, pages(0, 1)), |m| fault_in_want(m, 1, 10)], |m, said| {
        let mapped: &[_] = if said[1] == MAPPED { &[(PAGE_SIZE, entry(10))] } else { &[] };
        assert_eq!((m.audit().as_slice(), said[0]), (mapped, 1), "{said:?}");
    });
}

// catches: install_counts_levels_once, lock_ignores_dead, retire_without_grace, unlink_counted_by_finder
#[test]
fn r06_short_of_tables_against_retire_main_0() {
    short_of_tables(0);
}
// catches: install_counts_levels_once, lock_ignores_dead, retire_without_grace, unlink_counted_by_finder
#[test]
fn r06_short_of_tables_against_retire_main_1() {
    short_of_tables(1);
}

/// A leaf that a zap without announcement has just killed; the zap's owner has not unlinked it yet.
fn dead_leaf() -> &'static Machine {
    let m = one_page();
    let pin = Pin::new(m);
    let root = m.space().root(&pin);
    let mut guard = root.child(root.entry(0)).and_then(Table::lock).unwrap();
    guard.take(0);
    assert!(guard.unlock());
    m
}
/// An installer helps to unlink a dead leaf and puts another in its place; an unmap that announced meets the dead
/// leaf, and must still find what the installer put there. (The zap that killed the leaf stands still between its
/// unlock and its unlink, which others must bear: as a third thread it makes the model too large, more than 10^5
/// executions with two preemptions, and with one the mutant lives.)
fn dead_table(main: usize) {
    let roles: [Role; 2] = [|m| unmap(m, pages(0, 4)), |m| fault(m, 1, 10, true)];
    check(4, main, dead_leaf, roles, |m, said| {
        assert_eq!(m.audit(), [], "mapping left in an unmapped range, {said:?}");
        assert!(said == [0, AGAIN] || said == [1, MAPPED_WITH_TABLE], "{said:?}");
    });
}

// catches: install_counts_levels_once, install_validates_unlocked, install_without_validation, retire_without_grace
// catches: unlink_counted_by_finder, zap_skips_empty
// catches in turn: lock_ignores_dead, unlock_forgets_dead
#[test]
fn dead_table_hides_no_install_main_0() {
    dead_table(0);
}
// catches: install_counts_levels_once, install_validates_unlocked, install_without_validation, retire_without_grace
// catches: unlink_counted_by_finder, zap_skips_empty
// catches in turn: lock_ignores_dead, unlock_forgets_dead
#[test]
fn dead_table_hides_no_install_main_1() {
    dead_table(1);
}

/// The same with the whole life of the dead leaf: one thread zaps without announcement and touches another page.
fn zap_and_touch(main: usize) {
    let roles: [Role; 2] = [
        |m| unmap(m, pages(1, 4)),
        |m| {
            assert_eq!(zap(m, pages(0, 1)), 1);
            fault(m, 1, 10, true)
        },
    ];
    check(4, main, one_page, roles, |m, said| {
        assert_eq!(m.audit(), [], "mapping left in an unmapped range, {said:?}");
        assert!(said == [0, AGAIN] || said == [1, MAPPED_WITH_TABLE], "{said:?}");
    });
}

// catches: install_validates_unlocked, install_without_validation, retire_without_grace, unlink_counted_by_finder
// catches: zap_skips_empty
// catches in turn: unlock_forgets_dead
#[test]
fn dead_table_hides_no_later_touch_main_0() {
    zap_and_touch(0);
}
// catches: install_validates_unlocked, install_without_validation, retire_without_grace, unlink_counted_by_finder
// catches: zap_skips_empty
// catches in turn: unlock_forgets_dead
#[test]
fn dead_table_hides_no_later_touch_main_1() {
    zap_and_touch(1);
}

/// A reader that takes no lock, as hardware does: it never sees a table without an entry, for tables come filled.
fn reader(main: usize) {
    let read: Role = |m| {
        let root = m.cells(m.space().root_frame())[0].load(Acquire);
        let Some(table) = Tiny::child(root, 1) else { return 0 };
        let raw = m.cells(table)[0].load(Relaxed);
        assert_eq!(raw, entry(10), "a table that is visible before its entries");
        1
    };
    check(
        4,
        main,
        || Machine::new([1, 0, 0]),
        [|m| map(m, 0, 10), read],
        |m, said| {
            assert_eq!(said[0], MAPPED_WITH_TABLE);
            assert_eq!(m.audit(), [(0, entry(10))]);
        },
    );
}

// catches: publish_relaxed
#[test]
fn c35_tables_come_filled_main_0() {
    reader(0);
}
// catches: publish_relaxed
#[test]
fn c35_tables_come_filled_main_1() {
    reader(1);
}
