//! A mapping is moved while its pages come and go.

use super::*;
use crate::space::RemapTo;
use crate::space::remap::Relocation;
use crate::table::model::{Role, check};

/// The mapping that moves is this large, and goes from page 0 to this one.
const TO: u64 = 4;

fn relocate(m: &'static Machine) -> u64 {
    let moved = m.process().remap(at(0), TO * PAGE_SIZE, TO * PAGE_SIZE, RemapTo::Fixed(at(TO)));
    assert_eq!(moved, Ok(at(TO)));
    0
}

/// A page of the source comes while it moves: it moves as well, or the fault is told to wait or that nothing is mapped there.
fn fault_in_source(main: usize) {
    let setup = || {
        let m = Machine::whole([4, 1, 0], [1, 1, 0], HugePolicy::Never);
        m.map_private(0, TO);
        assert_eq!(m.fault(1, Access::Write), MAPPED);
        m
    };
    check(2, main, setup, [relocate, |m| m.fault(0, Access::Write)], |m, [_, said]| {
        let pages: Vec<u64> = m.mapped().iter().map(|(page, _)| *page).collect();
        match said {
            MAPPED => assert_eq!(pages, [TO, TO + 1], "a page that came in time was lost"),
            BLOCKED | NOT_MAPPED => assert_eq!(pages, [TO + 1]),
            other => panic!("the fault said {other}"),
        }
        m.exit();
    });
}

// catches: install_without_validation, move_unannounced, refused_install_keeps_page, retire_without_grace
#[test]
fn r14_move_against_fault_in_source_main_0() {
    fault_in_source(0);
}
// catches: install_without_validation, move_unannounced, refused_install_keeps_page, retire_without_grace, unlink_counted_by_finder
#[test]
fn r14_move_against_fault_in_source_main_1() {
    fault_in_source(1);
}

/// A page comes where the mapping goes, in what is mapped there before: it goes with that, or the fault waits, or finds the page
/// that was moved. No hole is filled that the move counts on.
fn fault_in_destination(main: usize) {
    let setup = || {
        let m = Machine::whole([4, 1, 0], [1, 1, 0], HugePolicy::Never);
        m.map_private(0, TO);
        m.map_private(TO, TO);
        assert_eq!(m.fault(0, Access::Write), MAPPED);
        m
    };
    check(3, main, setup, [relocate, |m| m.fault(TO, Access::Write)], |m, [_, said]| {
        assert_eq!(
            m.mapped(),
            [(TO, m.first_frame())],
            "a hole was filled, and the page that was to go there is lost"
        );
        assert!([MAPPED, BLOCKED, SPURIOUS].contains(&said), "the fault said {said}");
        m.exit();
    });
}

// catches: install_validates_unlocked, install_without_validation, move_unannounced, refused_install_keeps_page
// catches: zap_skips_empty
#[test]
fn r14_move_against_fault_in_destination_main_0() {
    fault_in_destination(0);
}
// catches: install_validates_unlocked, install_without_validation, move_unannounced, refused_install_keeps_page
// catches: zap_skips_empty
#[test]
fn r14_move_against_fault_in_destination_main_1() {
    fault_in_destination(1);
}

/// A page of a file, mapped and written to.
fn written_page_of_file() -> &'static Machine {
    let m = Machine::whole([4, 0, 0], [1, 0, 0], HugePolicy::Never);
    m.open(1, false);
    m.map_file(0, TO);
    assert_eq!(m.fault(0, Access::Write), MAPPED);
    m
}

/// A page of a file is on the move when the file is cut. It is found at either end, or does not arrive; and nobody frees it while
/// another CPU can still use it where it was. (The removal waits for the move, so it meets little of it: for that the parts
/// are modelled below.)
fn whole_truncate(main: usize) {
    let setup = || {
        let m = written_page_of_file();
        m.translate_elsewhere(m.first_frame());
        m
    };
    check(1, main, setup, [relocate, Machine::cut], |m, _| {
        m.end_cut();
    });
}

// catches: move_unannounced, unlink_counted_by_finder
#[test]
fn r14_move_against_whole_truncate_main_0() {
    whole_truncate(0);
}
// catches: move_unannounced, retire_without_grace, unlink_counted_by_finder
#[test]
fn r14_move_against_whole_truncate_main_1() {
    whole_truncate(1);
}

/// A page of a file is on the move when the file is cut. It is found at either end, or does not arrive; and nobody frees it while
/// another CPU can still use it where it was (CVE-2018-18281). Both are what others meet of the whole calls,
/// which forgive more, for a removal waits and looks again: a move from when it has announced, a removal from one walk to its
/// look whether anybody maps the page. (With whole calls and two preemptions, 30,000 executions and 18 s, `remove_without_going`
/// and `zap_skips_empty` live.)
fn truncate(main: usize) {
    let setup = || {
        let m = written_page_of_file();
        *m.stale.lock().unwrap() = 1;
        m
    };
    let carry: Role = |m| {
        let (table, file) = (m.process().page_table(), m.file());
        let stock = Stock::new(m, 1).unwrap();
        Relocation::new(table, Some(&file), 0, at(0), at(TO), stock).carry(
            pages(0, TO),
            &mut Stock::empty(m),
            &mut Gather::new(table),
        );
        0
    };
    let cut: Role = |m| {
        let ranges = [pages(0, TO), pages(TO, 2 * TO)];
        m.take_away(m.process().page_table(), m.first_frame(), &ranges).into()
    };
    check(2, main, setup, [carry, cut], |m, _| {
        // Not even where the removal has looked, and nobody looks again.
        assert_eq!(m.mapped(), [], "a page is mapped that the file has no longer");
        m.file().set_size(m, 0);
        m.exit();
    });
}

// catches: move_before_flush, remove_without_going, retire_without_grace, unlink_counted_by_finder, zap_skips_empty
#[test]
fn r14_move_against_truncate_main_0() {
    truncate(0);
}
// catches: move_before_flush, remove_without_going, retire_without_grace, unlink_counted_by_finder, zap_skips_empty
#[test]
fn r14_move_against_truncate_main_1() {
    truncate(1);
}
