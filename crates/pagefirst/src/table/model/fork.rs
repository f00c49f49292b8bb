//! Fork: a page that was shared is not reused while somebody reads it. (Reuse against fork, pins and copies: `space::model`.)

use super::{Machine, Role, check, pages};
use crate::arch::{Attrs, Format, Tiny};
use crate::frame::FrameFlags;
use crate::limit::Payer;
use crate::platform::Platform;
use crate::space::fork::{Copier, held_up};
use crate::sync::atomic::Relaxed;
use crate::sync::epoch::Pin;
use crate::table::{Counted, Locked, NewEntry, PageTable, Reserve, Slot, Walk};
use crate::tlb::Gather;
use crate::types::{Pfn, VirtAddr};

/// The page of private memory in a machine with so many tables.
const PAGE: Pfn = Pfn(8);
const TABLES: usize = 6;
const WRITABLE: Attrs = Attrs::WRITE.union(Attrs::ACCESSED).union(Attrs::DIRTY);

fn child(m: &'static Machine) -> &'static PageTable<Machine> {
    m.child.get().unwrap()
}

/// Parent and child, which share the page.
fn parent_and_child() -> &'static Machine {
    let m = Machine::with_pages([TABLES, 0, 0], 2);
    assert!(m.child.set(PageTable::new(m).unwrap()).is_ok());
    m.meta(PAGE).restate(FrameFlags::ANON | FrameFlags::EXCLUSIVE, 0);
    m.meta(PAGE).adopt();
    m.meta(PAGE).map_first();
    let mut reserve = Reserve::new(m);
    reserve.refill(1).unwrap();
    let entry = NewEntry { raw: Tiny::leaf(PAGE, 0, WRITABLE), counted: Counted::Anon };
    m.space().put(VirtAddr(0), 0, entry, &mut reserve, &mut Gather::new(m.space()));
    let copied = held_up(
        m.space(),
        |_| (),
        |gather| {
            Copier::new(child(m), core::ptr::null_mut(), Payer::Caller).copy(m.space(), pages(0, 1), gather)
        },
    );
    assert!(copied.is_ok());
    assert_eq!(m.meta(PAGE).counts().maps, 2);
    m
}

/// Calls `f` with the entry of the page locked.
fn locked<R>(
    space: &'static PageTable<Machine>,
    f: impl FnOnce(Slot<'_, Machine, Locked<'_, Machine>>) -> R,
) -> R {
    let pin = Pin::new(space.platform());
    let Walk::Seen(slot) = space.walk(&pin, VirtAddr(0)) else { panic!("it is mapped") };
    let Ok(slot) = slot.lock(|| true) else { panic!("nobody else changes it") };
    f(slot)
}

/// The child unmaps a shared page and reads on by a reference that it took before; the parent writes to the page where it
/// is only when that is gone (CVE-2020-29374).
fn reuse_against_reader(main: usize) {
    let read: Role = |m| {
        let meta = m.meta(PAGE);
        locked(child(m), |slot| {
            assert!(meta.try_get());
            slot.take();
        });
        let _ = meta.unmap_many(1);
        let seen = m.memory[PAGE.0 as usize].load(Relaxed);
        let _ = meta.put();
        seen
    };
    let write: Role = |m| {
        let reused = locked(m.space(), |mut slot| {
            let reused = m.meta(PAGE).try_reuse(0);
            if reused {
                slot.widen(WRITABLE);
            }
            reused
        });
        if reused {
            m.memory[PAGE.0 as usize].store(42, Relaxed);
        }
        0
    };
    check(3, main, parent_and_child, [read, write], |_, said| {
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
