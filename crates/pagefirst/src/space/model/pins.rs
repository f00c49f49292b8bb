//! Pins of what is shared in part.

use super::*;
use crate::frame::{FrameFlags, Part, head_of};
use crate::limit::Payer;
use crate::space::fork::{Copier, held_up};
use crate::space::{Advice, RemapTo};
use crate::table::model::{Role, check};

/// The page that is pinned. A child shares the other parts of its folio, so the folio is not exclusive; this part has never
/// been shared, and is writable.
const PAGE: u64 = HUGE as u64 - 1;

fn shared_in_part() -> &'static Machine {
    let m = Machine::whole([7, 2, 0], [2, 2, 0], HugePolicy::Always);
    let space = m.process();
    m.map_private(0, HUGE as u64);
    assert_eq!(m.fault(0, Access::Write), MAPPED);
    // Referred to, it stays one folio when its entry is split.
    let held = Part::try_get(m, m.huge_page(), 0);
    assert!(space.advise(at(PAGE), PAGE_SIZE, Advice::DontFork).is_ok());
    drop(held);
    m.fork();
    assert!(space.advise(at(PAGE), PAGE_SIZE, Advice::DoFork).is_ok());
    m.child();
    *m.stale.lock().unwrap() = u64::from(m.huge_page().0) + PAGE;
    m.stale_at.store(at(PAGE).0, Relaxed);
    m
}

/// Another CPU of the program writes by a translation from before; whether it could.
pub(super) fn write(m: &'static Machine) -> u64 {
    let stale = m.stale.lock().unwrap();
    if *stale != 0 {
        m.memory[*stale as usize].store(1, Relaxed);
    }
    (*stale != 0).into()
}
/// Pins the page; its frame, or 0 if a mapping call was in the way.
fn pin(m: &'static Machine) -> u64 {
    m.process().pin(VirtRange::page_of(at(PAGE)), true).map_or(0, |pinned| pinned.first().0.into())
}
/// Pins a page until the end; whether it could.
fn pin_for_long(m: &'static Machine, page: u64, write: bool) -> u64 {
    let Ok(pinned) = m.process().pin(VirtRange::page_of(at(page)), write) else { return 0 };
    *m.whole.pinned.lock().unwrap() = Some(pinned);
    1
}
/// What is pinned, if anything is, is what is mapped at `page`, and nobody else's: it has so many mappings at most.
fn assert_pinned_alone(m: &'static Machine, page: u64, mappings: usize) {
    let Some(pinned) = m.whole.pinned.lock().unwrap().take() else { return };
    assert_eq!(m.frame_at(page), Some(pinned.first()), "a page that is pinned is not the one that is mapped");
    let folio = m.meta(head_of(m, pinned.first()));
    let is_alone = folio.flags().contains(FrameFlags::EXCLUSIVE) && folio.counts().maps as usize <= mappings;
    assert!(is_alone, "what is pinned is shared");
}

/// The page is copied for the pin while another CPU writes to it: what was written is in what is pinned, and mapped. The flush
/// that takes the other CPU's translation comes before the page is copied; the one that follows a copy comes too late.
fn pin_against_stale_write(main: usize) {
    let setup = || {
        let m = shared_in_part();
        m.process().page_table().activate(2);
        m
    };
    check(3, main, setup, [pin, write], |m, [pinned, written]| {
        assert_eq!(
            m.frame_at(PAGE),
            Some(Pfn(pinned as u32)),
            "a page that is pinned is not the one that is mapped"
        );
        assert_eq!(m.memory[pinned as usize].load(Relaxed), written, "a write is lost");
        m.exit();
    });
}

// catches: pin_narrows_without_flush
#[test]
fn r12_pin_against_stale_write_main_0() {
    pin_against_stale_write(0);
}
// catches: pin_narrows_without_flush
#[test]
fn r12_pin_against_stale_write_main_1() {
    pin_against_stale_write(1);
}

/// What a fork does with the entries of a range, when the mappings of the child, the last, are made.
pub(super) fn copy_to_child(m: &'static Machine, range: VirtRange) -> u64 {
    let (parent, child) = (m.process(), m.whole.children.lock().unwrap().last().unwrap().shared.clone());
    let copied = held_up(
        parent.page_table(),
        |hold| parent.hold(hold),
        |gather| {
            let mut copier = Copier::new(&child.table, child.root().name(), Payer::Caller);
            copier.copy(parent.page_table(), range, gather)
        },
    );
    assert!(copied.is_ok());
    0
}

/// The program forks meanwhile: what the child shares is not written to any more when the fork is done.
fn fork_of_what_a_pin_narrows(main: usize) {
    let fork: Role = |m| {
        copy_to_child(m, VirtRange::page_of(at(PAGE)));
        m.memory[m.huge_page().0 as usize + PAGE as usize].load(Relaxed)
    };
    check(2, main, shared_in_part, [fork, pin, write], |m, [seen, _, _]| {
        let shared = m.memory[m.huge_page().0 as usize + PAGE as usize].load(Relaxed);
        assert_eq!(shared, seen, "a page that is shared was written to");
        m.exit();
    });
}

// catches: fork_ignores_unflushed, fork_keeps_exclusive, pin_narrows_without_flush
#[test]
fn r12_fork_of_what_a_pin_narrows_main_0() {
    fork_of_what_a_pin_narrows(0);
}
// catches: fork_ignores_unflushed, fork_keeps_exclusive, pin_narrows_without_flush
#[test]
fn r12_fork_of_what_a_pin_narrows_main_1() {
    fork_of_what_a_pin_narrows(1);
}
// catches: fork_ignores_unflushed, fork_keeps_exclusive, pin_narrows_without_flush
#[test]
fn r12_fork_of_what_a_pin_narrows_main_2() {
    fork_of_what_a_pin_narrows(2);
}

/// A page is pinned while the program forks: it is not shared, or the pin is on a copy. Its mapping may be read alone, so fork
/// leaves its entry as it is, and only the page, looked at under the table's lock, says whether it is shared.
fn fork_against_pin(main: usize) {
    let setup = || {
        let m = Machine::whole([5, 0, 0], [2, 1, 0], HugePolicy::Never);
        m.map_private(0, 1);
        assert_eq!(m.fault(0, Access::Write), MAPPED);
        assert!(m.process().protect(at(0), PAGE_SIZE, Prot::READ).is_ok());
        m.child();
        m
    };
    let roles: [Role; 2] = [|m| copy_to_child(m, pages(0, 1)), |m| pin_for_long(m, 0, false)];
    check(2, main, setup, roles, |m, _| {
        assert_pinned_alone(m, 0, 1);
        m.exit();
    });
}

// catches: fork_keeps_exclusive, fork_shares_pinned, pin_looks_before_lock
#[test]
fn r12_fork_against_pin_main_0() {
    fork_against_pin(0);
}
// catches: fork_keeps_exclusive, fork_shares_pinned, pin_looks_before_lock
#[test]
fn r12_fork_against_pin_main_1() {
    fork_against_pin(1);
}

/// Where a part of a folio was moved: another table maps it.
const MOVED: u64 = HUGE as u64;

/// A part of a folio is pinned while the program forks, which shares another part of it under another table's lock.
fn fork_against_pin_of_another_part(main: usize) {
    let setup = || {
        let m = Machine::whole([6, 0, 0], [1, 1, 0], HugePolicy::Always);
        m.map_private(0, HUGE as u64);
        assert_eq!(m.fault(0, Access::Write), MAPPED);
        // Referred to, it stays one folio when its entry is split.
        let held = Part::try_get(m, m.huge_page(), 0);
        assert!(m.process().remap(at(PAGE), PAGE_SIZE, PAGE_SIZE, RemapTo::Fixed(at(MOVED))).is_ok());
        drop(held);
        m.child();
        m
    };
    let roles: [Role; 2] = [|m| copy_to_child(m, pages(0, 1)), |m| pin_for_long(m, MOVED, true)];
    check(3 - main, main, setup, roles, |m, _| {
        assert_pinned_alone(m, MOVED, HUGE);
        m.exit();
    });
}

// catches: fork_keeps_exclusive, fork_looks_for_pins_once, pin_looks_before_lock, pin_looks_once
#[test]
fn r12_fork_against_pin_of_another_part_main_0() {
    fork_against_pin_of_another_part(0);
}
// catches: fork_keeps_exclusive, fork_looks_for_pins_once, pin_looks_before_lock, pin_looks_once
#[test]
fn r12_fork_against_pin_of_another_part_main_1() {
    fork_against_pin_of_another_part(1);
}
