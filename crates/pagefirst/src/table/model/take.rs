//! An entry is taken out while hardware marks it: what was marked is in what was taken.

use super::{Machine, check, entry};
use crate::arch::{Attrs, Format, Tiny};
use crate::platform::Platform;
use crate::sync::atomic::{AcqRel, Acquire, Relaxed};
use crate::sync::epoch::Pin;
use crate::table::Walk;
use crate::types::{PAGE_SIZE, VirtAddr};

const FIRST: VirtAddr = VirtAddr(0);

/// Takes the first page's entry out; whether it was dirty.
fn take(m: &'static Machine) -> u64 {
    let pin = Pin::new(m);
    let Walk::Seen(slot) = m.space().walk(&pin, FIRST) else { panic!("nobody else takes it") };
    let mut guard = slot.at.lock().unwrap();
    let old = guard.take(slot.index()).unwrap();
    Tiny::attrs(old).contains(Attrs::DIRTY) as u64
}

/// Hardware stores to the first page: marks the entry, if it finds it as it was read.
fn store(m: &'static Machine) -> u64 {
    let pin = Pin::new(m);
    let Walk::Seen(slot) = m.space().walk(&pin, FIRST) else { return 0 };
    let marked = Tiny::with_attrs(slot.raw(), Tiny::attrs(slot.raw()) | Attrs::DIRTY);
    let cell = &m.cells(slot.at.pfn())[0];
    cell.compare_exchange(slot.raw(), marked, AcqRel, Acquire).is_ok() as u64
}

fn take_against_hardware(main: usize) {
    let setup = || {
        let m = Machine::new([2, 0, 0]);
        super::install::map(m, 0, 10);
        super::install::map(m, 1, 11);
        let pin = Pin::new(m);
        let Walk::Seen(slot) = m.space().walk(&pin, FIRST) else { panic!("mapped above") };
        // Read once, and not written yet.
        let used = Tiny::with_attrs(entry(10), Attrs::ACCESSED | Attrs::WRITE);
        m.cells(slot.at.pfn())[0].store(used, Relaxed);
        drop(pin);
        m
    };
    check(4, main, setup, [take, store], |m, said| {
        assert_eq!(m.audit(), [(PAGE_SIZE, entry(11))], "hardware brought back what was taken");
        assert_eq!(said[0], said[1], "dirty as taken, and as marked");
    });
}

// catches: settled_while_clean
#[test]
fn take_against_hardware_main_0() {
    take_against_hardware(0);
}
// catches: settled_while_clean
#[test]
fn take_against_hardware_main_1() {
    take_against_hardware(1);
}
