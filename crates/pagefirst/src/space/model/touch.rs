//! First touches of private memory at the same time, which somebody pays for.

use super::*;
use crate::table::model::{Role, check};

const ALL: u64 = HUGE as u64;

/// Writes to page 0, and to page 1.
const FIRST: Role = |m| m.fault(0, Access::Write);
const SECOND: Role = |m| m.fault(1, Access::Write);

/// These pages are mapped, each by a frame of its own, by so many tables with the root; each is charged once, and nothing else.
fn assert_mapped(m: &'static Machine, pages: &[u64], tables: u64) {
    let mapped = m.mapped();
    assert!(mapped.iter().map(|(page, _)| page).eq(pages), "mapped is {mapped:?}");
    assert!(mapped.windows(2).all(|two| two[0].1 != two[1].1), "a frame is mapped twice: {mapped:?}");
    assert_eq!(m.audit_of(m.process().page_table()).1, tables);
    m.assert_charged(pages.len() as u64);
}

/// Each CPU has what a fault needs that finds no table, and CPU 2 a page.
fn enough(huge: HugePolicy) -> &'static Machine {
    Machine::whole([2, 1, 0], [3, 1, 1], huge)
}

/// The same with small pages alone, of which two may be charged.
fn for_two() -> &'static Machine {
    let m = enough(HugePolicy::Never);
    m.limit(None, 2);
    m.map_private(0, ALL);
    m
}

/// The faults say this and that, whichever says which.
fn are(said: [u64; 2], [this, that]: [u64; 2]) -> bool {
    said == [this, that] || said == [that, this]
}

/// Two faults at one address: one maps its page, and the other finds that done, before it has taken a page or after. It gives
/// back what it has taken: the page, a table, and a charge, which is then there for another CPU.
fn same_page(main: usize) {
    check(4, main, for_two, [FIRST, FIRST], |m, said| {
        assert!(are(said, [MAPPED, SPURIOUS]), "{said:?}");
        become_cpu(2);
        assert_eq!(SECOND(m), MAPPED, "what nobody uses is charged");
        assert_mapped(m, &[0, 1], 2);
        m.exit();
    });
}

// catches: charges_in_advance_stay, install_overwrites, lost_race_keeps_tables, publish_relaxed
// catches: refused_install_keeps_page
#[test]
fn r01_two_faults_one_page_charged_once_main_0() {
    same_page(0);
}
// catches: charges_in_advance_stay, install_overwrites, lost_race_keeps_tables, publish_relaxed
// catches: refused_install_keeps_page
#[test]
fn r01_two_faults_one_page_charged_once_main_1() {
    same_page(1);
}

/// Two faults at two pages whose table is not there, each with a table in hand: one table is published, and both pages are in it.
fn same_table(main: usize) {
    check(4, main, for_two, [FIRST, SECOND], |m, said| {
        assert_eq!(said, [MAPPED; 2]);
        assert_mapped(m, &[0, 1], 2);
        m.exit();
    });
}

// catches: install_counts_levels_once, install_overwrites, publish_relaxed
#[test]
fn r02_two_faults_one_table_both_charged_main_0() {
    same_table(0);
}
// catches: install_counts_levels_once, install_overwrites, publish_relaxed
#[test]
fn r02_two_faults_one_table_both_charged_main_1() {
    same_table(1);
}

/// Two faults where a huge page fits, and there is one: it is mapped, and the other fault finds that; or the other, which
/// could not have it, has mapped a small page before, and then the huge one is given back and both are small. Whoever loses
/// has a huge page in hand, or a small one and a table.
fn small_against_huge(main: usize) {
    let setup = || {
        let m = enough(HugePolicy::Always);
        m.limit(None, 6);
        m.map_private(0, ALL);
        m
    };
    check(4, main, setup, [FIRST, SECOND], |m, said| {
        if said == [MAPPED; 2] {
            assert_mapped(m, &[0, 1], 2);
        } else {
            assert!(are(said, [MAPPED, SPURIOUS]), "{said:?}");
            assert_eq!(m.mapped(), [(0, m.huge_page())]);
            m.assert_charged(ALL);
        }
        m.exit();
    });
}

// catches: install_counts_levels_once, install_overwrites, lost_race_keeps_tables, refused_install_keeps_page
// catches: unlock_forgets_dead
#[test]
fn r03_small_fault_against_huge_fault_main_0() {
    small_against_huge(0);
}
// catches: install_counts_levels_once, install_overwrites, lost_race_keeps_tables, refused_install_keeps_page
// catches: unlock_forgets_dead
#[test]
fn r03_small_fault_against_huge_fault_main_1() {
    small_against_huge(1);
}

/// Two faults at two pages whose table is not there, and three frames for whoever takes them: two pages and a table. Each fault
/// has a page when one gets the table. The other maps its page in that, or has seen none, finds no memory for one even when
/// everything is drained, and says so. Its page is there then for who comes again.
fn short_of_memory(main: usize) {
    let setup = || {
        let m = Machine::with_common([0; 3], [2, 0, 0], 3, HugePolicy::Never);
        m.limit(None, 2);
        m.map_private(0, ALL);
        m
    };
    check(3, main, setup, [FIRST, SECOND], |m, said| {
        match said {
            [MAPPED, MAPPED] => {}
            [MAPPED, NO_MEMORY] => {
                assert_mapped(m, &[0], 2);
                assert_eq!(SECOND(m), MAPPED, "what failed keeps its page");
            }
            [NO_MEMORY, MAPPED] => {
                assert_mapped(m, &[1], 2);
                assert_eq!(FIRST(m), MAPPED, "what failed keeps its page");
            }
            other => panic!("{other:?}"),
        }
        assert_mapped(m, &[0, 1], 2);
        m.exit();
    });
}

// catches: no_memory_keeps_page, publish_relaxed, refused_install_keeps_page
#[test]
fn r06_two_faults_short_of_memory_main_0() {
    short_of_memory(0);
}
// catches: no_memory_keeps_page, publish_relaxed, refused_install_keeps_page
#[test]
fn r06_two_faults_short_of_memory_main_1() {
    short_of_memory(1);
}

/// Two faults at one address, and the limit above theirs allows one page: one maps it. The other finds it, or it has come
/// before that, is refused when all that was charged in advance is given back, and has charged nothing, not to its own limit
/// either.
fn over_limit(main: usize) {
    let setup = || {
        let m = enough(HugePolicy::Never);
        let above = Limit::new(m, None, 1).unwrap();
        m.limit(Some(&above), 2);
        m.map_private(0, ALL);
        m
    };
    check(4, main, setup, [FIRST, FIRST], |m, said| {
        assert!(are(said, [MAPPED, SPURIOUS]) || are(said, [MAPPED, OVER_LIMIT]), "{said:?}");
        assert_mapped(m, &[0], 2);
        m.exit();
    });
}

// catches: publish_relaxed, refusal_charges_below
#[test]
fn r06_two_faults_over_limit_main_0() {
    over_limit(0);
}
// catches: publish_relaxed, refusal_charges_below
#[test]
fn r06_two_faults_over_limit_main_1() {
    over_limit(1);
}
