//! Faults that map neighbours.

use super::*;
use crate::table::model::{Role, check};

/// A program that maps so many pages of a file from `first` on, all but `missing` of them in memory.
fn with_file(first: u64, pages: u64, missing: u64) -> &'static Machine {
    let m = Machine::whole([1, 1, 0], [4, 1, 0], HugePolicy::Never);
    m.open(pages, false);
    for index in (0..pages).filter(|index| *index != missing) {
        assert!(m.file().read(m, index).is_ok());
    }
    m.map_file(first, pages);
    m
}

/// One fault reads its page in, which is in the window of another that is nowhere in memory: every neighbour is mapped with
/// one or the other, and the pages that faulted with their own faults, or by the other's. Each is mapped once.
fn faulting_page_alone(main: usize) {
    let roles: [Role; 2] = [|m| m.fault(1, Access::Read), |m| m.fault(0, Access::Read)];
    check(
        4,
        main,
        || with_file(0, 4, 1),
        roles,
        |m, said| {
            let mapped = m.mapped();
            assert_eq!(mapped.iter().map(|(page, _)| *page).collect::<Vec<_>>(), [0, 1, 2, 3], "{said:?}");
            assert!(
                mapped.iter().all(|(_, pfn)| m.meta(*pfn).counts().maps == 1),
                "mapped once, counted once"
            );
            assert!(said.iter().all(|said| [MAPPED, SPURIOUS].contains(said)), "{said:?}");
            m.exit();
        },
    );
}

// catches: around_needs_all, install_counts_levels_once, install_overwrites, lost_race_keeps_tables
// catches: publish_relaxed
// catches in turn: around_overwrites
#[test]
fn r08_all_but_the_faulting_page_main_0() {
    faulting_page_alone(0);
}
// catches: around_needs_all, install_counts_levels_once, install_overwrites, lost_race_keeps_tables
// catches: publish_relaxed
// catches in turn: around_overwrites
#[test]
fn r08_all_but_the_faulting_page_main_1() {
    faulting_page_alone(1);
}

/// A window that the mapping cuts at both ends, of which the file's end cuts the last page meanwhile: it is mapped no more when
/// the file is cut, though somebody else refers to it; and the one before stays.
fn cut_window(main: usize) {
    let setup = || {
        let m = with_file(1, 3, 9);
        assert!(m.meta(m.last_page()).try_get());
        m
    };
    let cut: Role = |m| {
        m.file().set_size(m, 2 * PAGE_SIZE);
        0
    };
    check(3, main, setup, [|m| m.fault(2, Access::Read), cut], |m, [said, _]| {
        let pages: Vec<u64> = m.mapped().iter().map(|(page, _)| *page).collect();
        assert_eq!((pages.as_slice(), said), ([1, 2].as_slice(), MAPPED), "nothing beyond the end");
        drop(Frame::from_held(m, m.last_page()));
        m.exit();
    });
}

impl Machine {
    /// The third that CPU 0 takes.
    fn last_page(&self) -> Pfn {
        Pfn(self.first_frame().0 + 1)
    }
}

// catches: file_without_validation
// catches in turn: around_overwrites
#[test]
fn r09_cut_window_against_truncate_main_0() {
    cut_window(0);
}
// catches: file_without_validation
// catches in turn: around_overwrites
#[test]
fn r09_cut_window_against_truncate_main_1() {
    cut_window(1);
}
