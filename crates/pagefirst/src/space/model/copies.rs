//! Copy-on-write, while other CPUs of the program use what they have cached of the page that is copied.

use super::*;
use crate::arch::Attrs;
use crate::space::model::pins::{copy_to_child, write};
use crate::sync::epoch::Pin;
use crate::table::model::{Role, check};

/// A page that the program has written to, alone; another CPU is in it. CPUs can take so many frames.
fn written_page(frames: [usize; 3]) -> &'static Machine {
    let m = Machine::whole([5, 0, 0], frames, HugePolicy::Never);
    m.map_private(0, 1);
    assert_eq!(m.fault(0, Access::Write), MAPPED);
    m.process().page_table().activate(2);
    m
}

/// The same, shared with a child.
fn shared_page(frames: [usize; 3]) -> &'static Machine {
    let m = written_page(frames);
    m.fork();
    m
}

impl Machine {
    /// Another CPU has what is mapped at page 0 now in its TLB.
    fn cache(&'static self) {
        *self.stale.lock().unwrap() = self.frame_at(0).unwrap().0.into();
    }
    /// Whether page 0 may be written to, by the tables.
    fn is_writable(&'static self) -> bool {
        let there = self.process().page_table().translate(&Pin::new(self), at(0));
        there.unwrap().attrs.contains(Attrs::WRITE)
    }
}

/// A page is copied while another CPU reads by a translation of it. Who walks the tables meanwhile can write to the copy only
/// when nobody can read the page any more: or else a write would be seen by some, and not by others.
fn copy_against_stale_read(main: usize) {
    let setup = || {
        let m = shared_page([2, 0, 0]);
        m.cache();
        m
    };
    let write: Role = |m| {
        let writes = m.is_writable();
        let can_read = *m.stale.lock().unwrap() != 0;
        assert!(!writes || !can_read, "a copy is written to, and another CPU reads the page that was copied");
        writes.into()
    };
    check(3, main, setup, [|m| m.fault(0, Access::Write), write], |m, said| {
        assert!(said == [MAPPED, 0] || said == [MAPPED, 1], "{said:?}");
        let maps = m.meta(m.frame_at(0).unwrap()).counts().maps;
        assert_eq!((m.is_writable(), maps), (true, 1), "it was not copied");
        m.exit();
    });
}

// catches: copy_writable_at_once
#[test]
fn r12_copy_against_stale_read_main_0() {
    copy_against_stale_read(0);
}
// catches: copy_writable_at_once
#[test]
fn r12_copy_against_stale_read_main_1() {
    copy_against_stale_read(1);
}

/// The program forks, and copies the page at once, while another CPU has a translation by which it may write: what it writes is
/// in the page that the program has in the end.
fn copy_against_stale_write(main: usize) {
    let setup = || {
        let m = written_page([1, 1, 0]);
        m.child();
        m.cache();
        m
    };
    let fork: Role = |m| copy_to_child(m, pages(0, 1));
    check(2, main, setup, [fork, |m| m.fault(0, Access::Write), write], |m, [_, said, written]| {
        assert!([MAPPED, SPURIOUS].contains(&said), "the fault said {said}");
        let page = m.frame_at(0).unwrap();
        assert_eq!(m.memory[page.0 as usize].load(Relaxed), written, "a write is lost");
        m.exit();
    });
}

// catches: fork_resumes_before_flush
#[test]
fn r12_copy_against_stale_write_main_0() {
    copy_against_stale_write(0);
}
// catches: fork_resumes_before_flush
#[test]
fn r12_copy_against_stale_write_main_1() {
    copy_against_stale_write(1);
}
// catches: fork_resumes_before_flush
#[test]
fn r12_copy_against_stale_write_main_2() {
    copy_against_stale_write(2);
}

/// A page is copied that a child shares; the child exits meanwhile, and whoever comes next gets what is free then. A CPU of the
/// program that has the page in its TLB still, from before the copy, may use it as long as that is so: it finds the page as it
/// was left, never free and never somebody else's. (Or the child is gone first, and the page is written where it is.)
fn copy_against_last_other_owner(main: usize) {
    let setup = || {
        let m = shared_page([2, 0, 0]);
        m.cache();
        m
    };
    let exit_child: Role = |m| {
        let child = m.whole.children.lock().unwrap().pop();
        drop(child);
        // Somebody else's, if it is free.
        Frame::new(m).is_ok().into()
    };
    let touch: Role = |m| {
        let stale = m.stale.lock().unwrap();
        if *stale != 0 {
            m.held[*stale as usize].touch();
        }
        0
    };
    check(2, main, setup, [|m| m.fault(0, Access::Write), exit_child, touch], |m, [said, _, _]| {
        assert_eq!(said, MAPPED);
        assert_eq!((m.is_writable(), m.meta(m.frame_at(0).unwrap()).counts().maps), (true, 1));
        m.exit();
    });
}

// catches: copy_drops_old_before_flush, free_before_flush
#[test]
fn r12_copy_against_last_other_owner_main_0() {
    copy_against_last_other_owner(0);
}
// catches: copy_drops_old_before_flush, free_before_flush
#[test]
fn r12_copy_against_last_other_owner_main_1() {
    copy_against_last_other_owner(1);
}
// catches: copy_drops_old_before_flush, free_before_flush
#[test]
fn r12_copy_against_last_other_owner_main_2() {
    copy_against_last_other_owner(2);
}

/// A write fault makes a page that is the program's alone writable where it is. The program forks meanwhile: once the page is
/// shared the fault copies it, though it had seen it before that. The entry is read-only already, for its
/// mapping got its right to write back while a copy was not flushed; so fork leaves it as it is, and only the page, looked at
/// under the table's lock, says whether it is shared.
fn fork_against_reuse(main: usize) {
    let setup = || {
        let m = Machine::whole([5, 0, 0], [1, 1, 0], HugePolicy::Never);
        m.map_private(0, 1);
        assert_eq!(m.fault(0, Access::Write), MAPPED);
        let space = m.process();
        assert!(space.protect(at(0), PAGE_SIZE, Prot::READ).is_ok());
        space.page_table().begin_unflushed();
        assert!(space.protect(at(0), PAGE_SIZE, Prot::READ | Prot::WRITE).is_ok());
        space.page_table().end_unflushed();
        assert!(!m.is_writable());
        m.child();
        m
    };
    let roles: [Role; 2] = [|m| copy_to_child(m, pages(0, 1)), |m| m.fault(0, Access::Write)];
    check(2, main, setup, roles, |m, [_, said]| {
        let maps = m.meta(m.frame_at(0).unwrap()).counts().maps;
        assert_eq!(said, MAPPED);
        assert!(!m.is_writable() || maps == 1, "a page that is shared can be written");
        m.exit();
    });
}

// catches: fork_keeps_exclusive, reuse_looks_once
#[test]
fn r12_fork_against_reuse_main_0() {
    fork_against_reuse(0);
}
// catches: fork_keeps_exclusive, reuse_looks_once
#[test]
fn r12_fork_against_reuse_main_1() {
    fork_against_reuse(1);
}

/// The program forks once more while a page is copied: the page, or the copy, is shared, and what is shared cannot be written to.
fn fork_against_copy(main: usize) {
    let setup = || {
        let m = shared_page([1, 1, 0]);
        m.child();
        m
    };
    let roles: [Role; 2] = [|m| copy_to_child(m, pages(0, 1)), |m| m.fault(0, Access::Write)];
    // One to stop the fault, and one to let it begin on loom's second thread.
    check(2 - main, main, setup, roles, |m, [_, said]| {
        assert_eq!(said, MAPPED);
        let is_shared = m.meta(m.frame_at(0).unwrap()).counts().maps > 1;
        assert_ne!(m.is_writable(), is_shared, "what is shared can be written to");
        m.exit();
    });
}

// catches: fork_keeps_exclusive, settle_shared_copy
#[test]
fn r12_fork_against_copy_main_0() {
    fork_against_copy(0);
}
// catches: fork_keeps_exclusive, settle_shared_copy
#[test]
fn r12_fork_against_copy_main_1() {
    fork_against_copy(1);
}
