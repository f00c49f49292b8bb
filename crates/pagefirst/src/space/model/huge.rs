//! Huge pages of private memory, against discards, and while they come apart.

use super::*;
use crate::sync::atomic::Relaxed;
use crate::table::model::{Role, check};

const ALL: u64 = HUGE as u64;

/// A huge page that is mapped, in a program of which another CPU has its translation.
fn one_huge_page() -> &'static Machine {
    let m = Machine::whole([2, 1, 0], [0, 1, 0], HugePolicy::Always);
    m.map_private(0, ALL);
    assert_eq!((m.fault(1, Access::Write), m.frame_at(0)), (MAPPED, Some(m.huge_page())));
    *m.stale.lock().unwrap() = m.huge_page().0.into();
    m
}

/// A CPU uses the page by its translation, and then by a fault, while it is discarded. It finds the page, or maps another,
/// huge or small, after the flush; and the page is nobody's before that.
fn discard(main: usize) {
    let discard: Role = |m| m.process().discard(at(0), ALL * PAGE_SIZE).is_ok().into();
    let touch: Role = |m| {
        let stale = m.stale.lock().unwrap();
        if *stale != 0 {
            m.held[*stale as usize].touch();
        }
        drop(stale);
        let said = m.fault(2, Access::Write);
        // Relaxed: the library must have ordered it.
        assert!(said != MAPPED || m.flushes.load(Relaxed) > 0, "translations of both sizes may be cached");
        said
    };
    check(4, main, one_huge_page, [discard, touch], |m, [_, said]| {
        let mapped = m.mapped();
        match said {
            MAPPED => assert!(mapped == [(0, m.huge_page())] || mapped.len() == 1 && mapped[0].0 == 2),
            SPURIOUS => assert_eq!(mapped, []),
            other => panic!("the fault said {other}"),
        }
        m.exit();
    });
}

// catches: free_before_flush, install_over_unflushed, refused_install_keeps_page, unlock_forgets_dead
// catches: zap_huge_untold
#[test]
fn r04_fault_against_discard_of_huge_page_main_0() {
    discard(0);
}
// catches: free_before_flush, install_over_unflushed, refused_install_keeps_page, unlock_forgets_dead
// catches: zap_huge_untold
#[test]
fn r04_fault_against_discard_of_huge_page_main_1() {
    discard(1);
}

/// A part of a huge page is discarded while another part is used: the fault finds it mapped, or in transit, and comes again;
/// nothing takes its place, and the other parts stay. (A fault while a part is unmapped is told to wait for the call.)
fn split_against_fault(main: usize) {
    let cut: Role = |m| m.process().discard(at(1), PAGE_SIZE).is_ok().into();
    check(4, main, one_huge_page, [cut, |m| m.fault(2, Access::Write)], |m, said| {
        assert_eq!(said, [1, SPURIOUS], "what is split was taken for nothing");
        let part = |i: u64| (i, Pfn(m.huge_page().0 + i as u32));
        assert_eq!(m.mapped(), [part(0), part(2), part(3)]);
        m.exit();
    });
}

// catches: split_leaves_hole, split_loses_dirty
#[test]
fn r15_split_against_fault_main_0() {
    split_against_fault(0);
}
// catches: split_leaves_hole, split_loses_dirty
#[test]
fn r15_split_against_fault_main_1() {
    split_against_fault(1);
}
