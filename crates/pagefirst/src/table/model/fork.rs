//! Fork: a page that is shared is written by nobody who could have, and a pinned one is not shared.

use super::{Machine, Role, check, pages};
use crate::arch::{Attrs, Format, Tiny};
use crate::frame::{Frame, FrameFlags};
use crate::limit::Payer;
use crate::platform::Platform;
use crate::space::fork::{Copier, held_up};
use crate::sync::atomic::{Acquire, Relaxed, Release};
use crate::sync::epoch::Pin;
use crate::table::{Counted, Locked, NewEntry, PageTable, Reserve, Slot, Walk};
use crate::tlb::Gather;
use crate::types::{PAGE_SIZE, Pfn, VirtAddr};

/// The first page of private memory in a machine with so many tables. (Its number is even: a folio of two may begin there.)
const PAGE: Pfn = Pfn(8);
const COPY: Pfn = Pfn(9);
/// Behind the folio.
const FREE: Pfn = Pfn(10);
const TABLES: usize = 6;
const WRITABLE: Attrs = Attrs::WRITE.union(Attrs::ACCESSED).union(Attrs::DIRTY);

/// Parent and child; the parent maps the page writable, alone.
fn parent_and_child() -> &'static Machine {
    let m = Machine::with_pages([TABLES, 0, 0], 2);
    assert!(m.child.set(PageTable::new(m).unwrap()).is_ok());
    m.meta(PAGE).restate(FrameFlags::ANON | FrameFlags::EXCLUSIVE, 0);
    m.meta(PAGE).adopt();
    m.meta(PAGE).map_first();
    put(m, m.space(), 0, PAGE, WRITABLE);
    m
}
fn put(m: &'static Machine, space: &PageTable<Machine>, at: u64, page: Pfn, attrs: Attrs) {
    let mut reserve = Reserve::new(m);
    reserve.refill(1).unwrap();
    let raw = Tiny::leaf(page, 0, attrs | Attrs::ACCESSED);
    let entry = NewEntry { raw, counted: Counted::Anon };
    space.put(VirtAddr(at * PAGE_SIZE), 0, entry, &mut reserve, &mut Gather::new(space));
}
fn child(m: &'static Machine) -> &'static PageTable<Machine> {
    m.child.get().unwrap()
}

/// Forks; tells whether the page is shared.
fn fork(m: &'static Machine) -> u64 {
    let hold = |hold: bool| m.retired.store(hold as u32, Release);
    held_up(m.space(), hold, |gather| copy(m, 0, gather))
}
/// Copies the entry of page `at`; tells whether it is shared now.
fn copy(m: &'static Machine, at: u64, gather: &mut Gather<'_, Machine>) -> u64 {
    let before = m.meta(PAGE).counts().maps;
    assert!(
        Copier::new(child(m), core::ptr::null_mut(), Payer::Caller)
            .copy(m.space(), pages(at, at + 1), gather)
            .is_ok()
    );
    (m.meta(PAGE).counts().maps > before) as u64
}
const SHARED: u64 = 1;
/// Leaves a frame for the copy of a page that is pinned.
fn leave(m: &'static Machine, frame: Pfn) {
    m.meta(frame).adopt();
    drop(Frame::from_held(m, frame));
}

/// Calls `f` with the parent's entry at this page locked, unless faults are held up.
fn locked<R>(
    m: &'static Machine,
    at: u64,
    f: impl FnOnce(Slot<'_, Machine, Locked<'_, Machine>>, u64) -> R,
) -> Option<R> {
    let pin = Pin::new(m);
    let Walk::Seen(slot) = m.space().walk(&pin, VirtAddr(at * PAGE_SIZE)) else { panic!("it stays mapped") };
    let raw = slot.raw();
    slot.lock(|| m.retired.load(Acquire) == 0).ok().map(|slot| f(slot, raw))
}

/// What the parent has mapped at page 0, and what the child has.
fn mapped(m: &'static Machine) -> [u64; 2] {
    [m.space(), child(m)].map(|space| match space.walk(&Pin::new(m), VirtAddr(0)) {
        Walk::Seen(slot) => slot.raw(),
        _ => 0,
    })
}

/// A write fault in the parent that finds an exclusive page makes it writable: after the fork has shared it, it is not.
fn fork_against_reuse(main: usize) {
    let setup = || {
        let m = parent_and_child();
        locked(m, 0, |mut slot, raw| slot.put(Tiny::read_only(raw)));
        m
    };
    let write: Role = |m| {
        let exclusive = || m.meta(PAGE).flags().contains(FrameFlags::EXCLUSIVE);
        locked(m, 0, |mut slot, _| exclusive().then(|| slot.widen(WRITABLE))).flatten().is_some() as u64
    };
    check(3, main, setup, [fork, write], |m, said| {
        let entries = mapped(m).map(|raw| (Tiny::frame(raw, 0), Tiny::attrs(raw).contains(Attrs::WRITE)));
        assert_eq!(entries, [(Some(PAGE), false); 2], "a page that is shared can be written, {said:?}");
        assert_eq!(m.meta(PAGE).counts().maps, 2);
    });
}

// catches: fork_keeps_exclusive
#[test]
fn r12_fork_against_reuse_main_0() {
    fork_against_reuse(0);
}
// catches: fork_keeps_exclusive
#[test]
fn r12_fork_against_reuse_main_1() {
    fork_against_reuse(1);
}

/// A pin of page `at`, taken as the library does.
fn pin(m: &'static Machine, at: u64) -> u64 {
    let meta = m.meta(PAGE);
    let pinned = locked(m, at, |_, _| {
        if !meta.flags().contains(FrameFlags::EXCLUSIVE) || !meta.try_get() || meta.try_pin().is_none() {
            return false;
        }
        let stays = meta.flags().contains(FrameFlags::EXCLUSIVE) || cfg!(mutant = "pin_looks_once");
        if !stays {
            meta.unpin();
            let _ = meta.put();
        }
        stays
    });
    pinned.unwrap_or(false) as u64
}

/// A page that is pinned is not shared.
fn fork_against_pin(main: usize) {
    let setup = || {
        let m = parent_and_child();
        leave(m, COPY);
        m
    };
    check(3, main, setup, [fork, |m| pin(m, 0)], |m, said| {
        assert!(said != [SHARED, 1], "a pinned page is shared");
        assert_eq!(m.meta(PAGE).flags().contains(FrameFlags::EXCLUSIVE), said[0] != SHARED);
    });
}

// catches: fork_keeps_exclusive, fork_shares_pinned
#[test]
fn r12_fork_against_pin_main_0() {
    fork_against_pin(0);
}
// catches: fork_keeps_exclusive, fork_shares_pinned
#[test]
fn r12_fork_against_pin_main_1() {
    fork_against_pin(1);
}

/// The same for a folio whose parts two tables map: fork shares the one while the other is pinned, under two locks.
fn fork_against_pin_of_another_part(main: usize) {
    let setup = || {
        let m = Machine::with_pages([TABLES, 0, 0], 3);
        assert!(m.child.set(PageTable::new(m).unwrap()).is_ok());
        leave(m, FREE);
        m.meta(PAGE).restate(FrameFlags::ANON | FrameFlags::EXCLUSIVE, 1);
        crate::frame::link_tails(m, PAGE);
        m.meta(PAGE).adopt();
        m.meta(PAGE).map_first();
        m.meta(PAGE).map_more(1);
        put(m, m.space(), 0, PAGE, WRITABLE);
        put(m, m.space(), Tiny::ENTRIES as u64, PAGE.add(1), WRITABLE);
        m
    };
    // Faults are not held up here, as if the pin had come just before that.
    let part: Role = |m| copy(m, Tiny::ENTRIES as u64, &mut Gather::new(m.space()));
    check(3, main, setup, [part, |m| pin(m, 0)], |_, said| {
        assert!(said != [SHARED, 1], "a part of a pinned folio is shared");
    });
}

// catches: fork_keeps_exclusive, fork_looks_for_pins_once, pin_looks_once
#[test]
fn r12_fork_against_pin_of_another_part_main_0() {
    fork_against_pin_of_another_part(0);
}
// catches: fork_keeps_exclusive, fork_looks_for_pins_once, pin_looks_once
#[test]
fn r12_fork_against_pin_of_another_part_main_1() {
    fork_against_pin_of_another_part(1);
}

/// The child unmaps a shared page and reads on by a reference that it took before; the parent writes to the page where it
/// is only when that is gone (CVE-2020-29374).
fn reuse_against_reader(main: usize) {
    let setup = || {
        let m = parent_and_child();
        assert_eq!(fork(m), SHARED);
        m
    };
    let read: Role = |m| {
        let meta = m.meta(PAGE);
        {
            let pin = Pin::new(m);
            let Walk::Seen(slot) = child(m).walk(&pin, VirtAddr(0)) else { panic!("it is mapped") };
            let Ok(slot) = slot.lock(|| true) else { panic!("nobody else changes it") };
            assert!(meta.try_get());
            slot.take();
        }
        let _ = meta.unmap_many(1);
        let seen = m.memory[PAGE.0 as usize].load(Relaxed);
        let _ = meta.put();
        seen
    };
    let write: Role = |m| {
        let reused = locked(m, 0, |mut slot, _| {
            let reused = m.meta(PAGE).try_reuse(0);
            if reused {
                slot.widen(WRITABLE);
            }
            reused
        });
        if reused == Some(true) {
            m.memory[PAGE.0 as usize].store(42, Relaxed);
        }
        0
    };
    check(3, main, setup, [read, write], |_, said| {
        assert_eq!(said[0], 0, "who reads by a reference sees what the parent wrote later");
    });
}

// catches: reuse_by_map_count
#[test]
fn r12_reuse_against_reader_main_0() {
    reuse_against_reader(0);
}
// catches: reuse_by_map_count
#[test]
fn r12_reuse_against_reader_main_1() {
    reuse_against_reader(1);
}

/// Another CPU of the parent has a writable translation from before the fork, and writes through it, while a fault copies
/// the page: what was written is in the page that the parent has in the end.
fn copy_against_stale_write(main: usize) {
    let setup = || {
        let m = parent_and_child();
        m.meta(COPY).adopt();
        *m.stale.lock().unwrap() = mapped(m)[0];
        m
    };
    let copy: Role = |m| {
        let shared = locked(m, 0, |_, raw| !Tiny::attrs(raw).contains(Attrs::WRITE));
        if shared != Some(true) {
            return 0; // writable still, or held up
        }
        let value = m.memory[PAGE.0 as usize].load(Relaxed);
        m.memory[COPY.0 as usize].store(value, Relaxed);
        locked(m, 0, |mut slot, _| slot.replace(Counted::Anon, Tiny::leaf(COPY, 0, WRITABLE))).is_some()
            as u64
    };
    let write: Role = |m| {
        let cached = m.stale.lock().unwrap();
        if *cached != 0 {
            m.memory[PAGE.0 as usize].store(1, Relaxed);
        }
        (*cached != 0) as u64
    };
    check(3, main, setup, [fork, copy, write], |m, said| {
        let page = Tiny::frame(mapped(m)[0], 0).unwrap();
        let value = m.memory[page.0 as usize].load(Relaxed);
        assert_eq!(value, said[2], "a write is lost, {said:?}");
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
