//! Fork: a page that is shared is written by nobody who could have. (Pins and copies: `space::model`.)

use super::{Machine, Role, check, pages};
use crate::arch::{Attrs, Format, Tiny};
use crate::frame::FrameFlags;
use crate::limit::Payer;
use crate::platform::Platform;
use crate::space::fork::{Copier, held_up};
use crate::sync::atomic::{Acquire, Relaxed, Release};
use crate::sync::epoch::Pin;
use crate::table::{Counted, Locked, NewEntry, PageTable, Reserve, Slot, Walk};
use crate::tlb::Gather;
use crate::types::{PAGE_SIZE, Pfn, VirtAddr};

/// The page of private memory in a machine with so many tables.
const PAGE: Pfn = Pfn(8);
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
