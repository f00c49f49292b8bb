//! A program exits while others look for its pages.

use super::*;
use crate::frame::{FrameFlags, Part, root_of};
use crate::space::poison::Lose;
use crate::table::model::{Role, check};

fn exit(m: &'static Machine) -> u64 {
    // SAFETY: nobody else uses the space, but by the reverse map.
    unsafe { m.drop_space() };
    0
}

/// The file that it maps is cut: the page is freed when no CPU can use it, by who comes last; in the end all sums are zero.
fn against_truncate(main: usize) {
    let setup = || {
        let m = Machine::whole([1, 0, 0], [1, 0, 0], HugePolicy::Never);
        m.open(1, false);
        m.map_file(0, 1);
        assert_eq!(m.fault(0, Access::Write), MAPPED);
        m.translate_elsewhere(m.first_frame());
        m
    };
    check(2, main, setup, [exit, Machine::cut], |m, _| {
        assert_eq!(m.file().pages(), 0);
        m.assert_nothing_left();
    });
}

// catches: free_before_flush, retire_without_grace, unlink_counted_by_finder
#[test]
fn r10_exit_against_truncate_main_0() {
    against_truncate(0);
}
// catches: free_before_flush, retire_without_grace, unlink_counted_by_finder
#[test]
fn r10_exit_against_truncate_main_1() {
    against_truncate(1);
}

/// Hardware reports an error in a private page of it, which is looked for once.
fn against_poison(main: usize) {
    let setup = || {
        let m = Machine::whole([1, 0, 0], [1, 0, 0], HugePolicy::Never);
        m.map_private(0, 1);
        assert_eq!(m.fault(0, Access::Write), MAPPED);
        *m.stale.lock().unwrap() = 1;
        m
    };
    let report: Role = |m| {
        let Some(page) = Part::try_get(m, m.first_frame(), 0) else { return 0 };
        page.meta().set(FrameFlags::POISON);
        let root = root_of(m, page.folio());
        root.iter().for_each(|root| {
            root.for_each_place(page.index(), |table, at| {
                let mut gather = Gather::new(table);
                table.visit(VirtRange::page_of(at), &mut Lose { lost: 0 }, &mut Stock::empty(m), &mut gather);
            });
        });
        let is_lost = page.meta().maps_ordered() == 0;
        assert!(!is_lost || *m.stale.lock().unwrap() == 0, "a bad page is lost, and another CPU can use it");
        page.meta().clear(FrameFlags::POISON);
        is_lost.into()
    };
    check(3, main, setup, [exit, report], |m, _| m.assert_nothing_left());
}

// catches: free_before_flush, retire_without_grace, unlink_counted_by_finder
#[test]
fn r10_exit_against_poison_main_0() {
    against_poison(0);
}
// catches: free_before_flush, retire_without_grace, unlink_counted_by_finder
#[test]
fn r10_exit_against_poison_main_1() {
    against_poison(1);
}
