//! Files are cut, and grow again, while their pages are mapped and read in.

use super::*;
use crate::frame::FrameFlags;
use crate::table::model::{Role, STORED, check};

/// What a page holds that was read before its file was cut.
const OLD: u8 = 7;

/// A file of so many pages, all of them in memory and old, that is mapped from page 0 on. CPU 0 can read two pages in.
fn with_file(pages: u64) -> &'static Machine {
    let m = Machine::whole([2, 0, 0], [2 + pages as usize, 0, 0], HugePolicy::Never);
    m.open(pages, false);
    STORED.set(OLD);
    for index in 0..pages {
        assert!(m.file().read(m, index).is_ok());
    }
    m.map_file(0, pages);
    m
}

impl Machine {
    /// The first byte of a page.
    fn first_byte(&'static self, page: Pfn) -> u8 {
        // SAFETY: a page's bytes, which nobody else touches when all threads have ended.
        unsafe { self.page(page).read() }
    }
}

/// A fault meets the cut of its page, which somebody else refers to: it comes in time, and the page is mapped no more when the
/// file is cut, or it is told that the page is beyond the end, or to wait until the removal has ended.
fn fault_against_truncate(main: usize) {
    let setup = || {
        let m = with_file(2);
        m.refer_to_page(1);
        m
    };
    let cut: Role = |m| {
        m.file().set_size(m, PAGE_SIZE);
        0
    };
    check(2, main, setup, [|m| m.fault(1, Access::Read), cut], |m, [said, _]| {
        let pages: Vec<u64> = m.mapped().iter().map(|(page, _)| *page).collect();
        match said {
            MAPPED => assert!(pages.is_empty() || pages == [0], "a page is mapped beyond the end: {pages:?}"),
            BEYOND_END | BLOCKED => assert_eq!(pages, [], "the fault said {said}"),
            other => panic!("the fault said {other}"),
        }
        assert_eq!(m.file().pages(), 1, "a page beyond the end is in memory");
        // What is before the end is there.
        m.fault(0, Access::Read);
        assert_eq!(m.mapped(), [(0, m.page_of_file(0).unwrap())]);
        m.exit();
    });
}

// catches: file_without_validation, size_after_removal
#[test]
fn r05_fault_against_truncate_main_0() {
    fault_against_truncate(0);
}
// catches: file_without_validation, size_after_removal
#[test]
fn r05_fault_against_truncate_main_1() {
    fault_against_truncate(1);
}

/// A fault meets the removal of its page, which somebody else refers to: what is mapped afterwards is what the file has.
fn fault_against_punch(main: usize) {
    let setup = || {
        let m = with_file(1);
        m.refer_to_page(0);
        m
    };
    let punch: Role = |m| {
        m.file().punch(m, 0..PAGE_SIZE);
        0
    };
    check(2, main, setup, [|m| m.fault(0, Access::Read), punch], |m, [said, _]| {
        let mapped = m.mapped();
        for (page, pfn) in &mapped {
            assert_eq!(m.page_of_file(*page), Some(*pfn), "a page is mapped that the file has no longer");
            assert_eq!(m.first_byte(*pfn), 0, "what was read before the hole was punched is in it");
        }
        assert!(said == MAPPED || said == BLOCKED && mapped.is_empty(), "the fault said {said}");
        m.exit();
    });
}

// catches: file_without_validation, read_before_insert, remove_without_going
#[test]
fn r05_fault_against_punch_main_0() {
    fault_against_punch(0);
}
// catches: file_without_validation, insert_while_removing, read_before_insert, remove_without_going
#[test]
fn r05_fault_against_punch_main_1() {
    fault_against_punch(1);
}

/// A fault meets the eviction of its page, whose frame becomes another page of the file at once.
fn fault_against_evict(main: usize) {
    let setup = || {
        let m = Machine::whole([1, 0, 0], [2, 0, 0], HugePolicy::Never);
        m.open(2, false);
        assert!(m.file().read(m, 0).is_ok());
        m.map_file(0, 1);
        m
    };
    let evict: Role = |m| {
        let evicted = m.file().evict_range(0..1);
        assert!(evicted == 0 || m.file().read(m, 1).is_ok());
        evicted
    };
    // One to let the fault begin on loom's second thread, and one to stop it.
    check(1 + main, main, setup, [|m| m.fault(0, Access::Read), evict], |m, [said, _]| {
        assert_eq!(said, MAPPED);
        let mapped = m.mapped().first().map(|(_, pfn)| *pfn);
        assert_eq!(mapped, m.page_of_file(0), "another page is mapped than the file has there");
        m.exit();
    });
}

// catches: file_without_validation, validate_before_count
#[test]
fn r13_fault_against_evict_main_0() {
    fault_against_evict(0);
}
// catches: file_without_validation, validate_before_count
#[test]
fn r13_fault_against_evict_main_1() {
    fault_against_evict(1);
}

/// Where a file of one page is mapped as well.
const OTHER: u64 = HUGE as u64;

/// A file of one page, which is old and not in memory, that is mapped in two places.
fn mapped_twice(is_slow: bool) -> &'static Machine {
    let m = Machine::whole([4, 0, 0], [2, 0, 0], HugePolicy::Never);
    m.open(1, is_slow);
    STORED.set(OLD);
    m.map_file(0, 1);
    m.map_file(OTHER, 1);
    m
}

/// Both places show the page that the file has, which is not old.
fn assert_one_new_page(m: &'static Machine) {
    for page in [OTHER, 0] {
        if m.fault(page, Access::Read) == BLOCKED {
            KEPT.take().unwrap().complete(Ok(()));
            assert_eq!(m.fault(page, Access::Read), MAPPED);
        }
    }
    let page = m.page_of_file(0).unwrap();
    assert_eq!(m.mapped(), [(0, page), (OTHER, page)], "two pages for one index");
    assert_eq!(m.first_byte(page), 0, "what the file was before it was cut has come back");
}

/// The page is read in anew when the file was cut, and has grown again, while a fault goes on.
fn fault_against_cut_and_growth(main: usize) {
    let setup = || {
        let m = mapped_twice(false);
        assert_eq!(m.fault(OTHER, Access::Read), MAPPED);
        m.refer_to_page(0);
        m
    };
    check(2, main, setup, [|m| m.fault(0, Access::Read), cut_and_grow], |m, [said, beyond]| {
        assert!([MAPPED, BLOCKED, BEYOND_END].contains(&said), "the fault said {said}");
        assert_eq!(beyond, 0, "a page beyond the end is in memory");
        assert_one_new_page(m);
        m.exit();
    });
}

fn cut_and_grow(m: &'static Machine) -> u64 {
    m.file().set_size(m, 0);
    let beyond = m.file().pages();
    m.file().set_size(m, PAGE_SIZE);
    beyond
}

// catches: file_without_validation, size_after_removal
#[test]
fn r13_fault_against_cut_and_growth_main_0() {
    fault_against_cut_and_growth(0);
}
// catches: file_without_validation, size_after_removal
#[test]
fn r13_fault_against_cut_and_growth_main_1() {
    fault_against_cut_and_growth(1);
}

/// A page is read in while the file is cut before it: it is taken out, or does not come.
fn read_in_against_truncate(main: usize) {
    let setup = || {
        let m = Machine::whole([2, 0, 0], [2, 0, 0], HugePolicy::Never);
        m.open(1, false);
        m.map_file(0, 1);
        m
    };
    check(2, main, setup, [|m| m.fault(0, Access::Read), Machine::cut], |m, [said, _]| {
        assert!([MAPPED, BLOCKED, BEYOND_END].contains(&said), "the fault said {said}");
        assert_eq!((m.file().pages(), m.mapped()), (0, Vec::new()), "a page beyond the end is in memory");
        m.file().set_size(m, PAGE_SIZE);
        assert_eq!(m.fault(0, Access::Read), MAPPED);
        assert_eq!(m.mapped(), [(0, m.page_of_file(0).unwrap())]);
        m.exit();
    });
}

// catches: file_without_validation, insert_beyond_end, size_after_removal
#[test]
fn r13_read_in_against_truncate_main_0() {
    read_in_against_truncate(0);
}
// catches: file_without_validation, insert_beyond_end, size_after_removal
#[test]
fn r13_read_in_against_truncate_main_1() {
    read_in_against_truncate(1);
}

/// The page comes from a disk while the file is cut, and grows again: what was read is not up to date, and who waited for it
/// waits for the page that takes its place, or until the removal has ended, or is told that the page is beyond the end. The cut
/// may come at any moment of the reader's last word on the page.
fn read_in_against_cut_and_growth(main: usize) {
    let setup = || {
        let m = mapped_twice(true);
        let Outcome::Blocked(ticket) = m.process().fault(at(0), Access::Read) else {
            panic!("it takes long")
        };
        *m.whole.ticket.lock().unwrap() = Some(ticket);
        m.refer_to_page(0);
        m
    };
    let retry: Role = |m| {
        KEPT.take().unwrap().complete(Ok(()));
        let ticket = m.whole.ticket.lock().unwrap().take().unwrap();
        assert!(ticket.is_ready());
        let outcome = m.process().retry(at(0), Access::Read, ticket);
        let said = said(&outcome);
        if let Outcome::Blocked(ticket) = outcome {
            *m.whole.ticket.lock().unwrap() = Some(ticket);
        }
        said
    };
    check(1, main, setup, [retry, cut_and_grow], |m, [said, _]| {
        let first = m.whole.held.lock().unwrap().take().unwrap();
        let state = first.meta().flags();
        assert!(!state.contains(FrameFlags::UP_TO_DATE), "a page from before the cut is up to date");
        drop(first);
        if let Some(fill) = KEPT.take() {
            fill.complete(Ok(())); // it is new
        }
        match said {
            MAPPED | BEYOND_END => {}
            BLOCKED => {
                assert!(m.whole.ticket.lock().unwrap().as_ref().unwrap().is_ready());
            }
            other => panic!("the fault said {other}"),
        }
        assert_one_new_page(m);
        m.exit();
    });
}

// catches: file_without_validation, fill_ends_in_two_steps, fill_what_goes, remove_without_going
#[test]
fn r13_read_in_against_cut_and_growth_main_0() {
    read_in_against_cut_and_growth(0);
}
// catches: fill_ends_in_two_steps, fill_what_goes, remove_without_going
#[test]
fn r13_read_in_against_cut_and_growth_main_1() {
    read_in_against_cut_and_growth(1);
}

/// Two faults read the same page in: one of them puts it into the file, and both map it.
fn two_read_ins(main: usize) {
    let setup = || {
        let m = Machine::whole([2, 1, 0], [1, 1, 0], HugePolicy::Never);
        m.open(1, false);
        m.map_file(0, 1);
        m.map_file(OTHER, 1);
        m
    };
    let roles: [Role; 2] = [|m| m.fault(0, Access::Read), |m| m.fault(OTHER, Access::Read)];
    check(2, main, setup, roles, |m, said| {
        assert!(said == [MAPPED; 2] || said == [MAPPED, BLOCKED] || said == [BLOCKED, MAPPED], "{said:?}");
        assert_eq!(m.file().pages(), 1, "two pages for one index");
        assert_one_new_page(m);
        m.exit();
    });
}

// catches: insert_over_another
#[test]
fn r13_two_read_ins_main_0() {
    two_read_ins(0);
}
// catches: insert_over_another
#[test]
fn r13_two_read_ins_main_1() {
    two_read_ins(1);
}
