//! A page is written back while somebody writes to it, by a stale translation, and then by a fault: what was written is in
//! what was read for storing, or the page is dirty.

use super::{Machine, Role, check, entry, pages};
use crate::arch::{Attrs, Format, Tiny};
use crate::file::{Entries, clean_then_read};
use crate::frame::FrameFlags;
use crate::platform::Platform;
use crate::rmap::Clean;
use crate::sync::atomic::{Acquire, Relaxed, Release};
use crate::sync::epoch::Pin;
use crate::table::Walk;
use crate::types::{Pfn, VirtAddr};

const FIRST: VirtAddr = VirtAddr(0);
/// The page that is mapped there. Its contents are a counter of the machine's.
const PAGE: Pfn = Pfn(1);
const WRITABLE: Attrs = Attrs::ACCESSED.union(Attrs::WRITE).union(Attrs::DIRTY);

/// Writes the page back; what was read for storing.
fn store(m: &'static Machine) -> u64 {
    let mut clean = Clean::new(PAGE, true);
    let protect = || {
        clean.visit(true, m.space(), pages(0, 1));
        Entries::Clean
    };
    let read = |_| u64::from(m.contents.load(Acquire));
    clean_then_read(&m.meta[PAGE.0 as usize], || 0, protect, read).unwrap_or_default()
}

/// Writes a 1 by the translation that this CPU has, and then a 2, if need be by a fault.
fn write(m: &'static Machine) -> u64 {
    m.by_translation(1);
    if !m.by_translation(2) {
        let pin = Pin::new(m);
        let Walk::Seen(slot) = m.space().walk(&pin, FIRST) else { panic!("nobody takes it out") };
        let Ok(mut slot) = slot.lock(|| true) else { return 1 };
        m.meta[PAGE.0 as usize].set(FrameFlags::DIRTY);
        slot.widen(WRITABLE);
        drop(slot);
        m.contents.store(2, Release);
    }
    2
}

impl Machine {
    /// Stores to the page if the translation that allows it is still cached.
    fn by_translation(&self, value: u32) -> bool {
        let cached = self.cached.lock().unwrap();
        if *cached {
            self.contents.store(value, Release);
        }
        *cached
    }
}

fn write_back_against_writes(main: usize) {
    let setup = || {
        let m = Machine::new([1, 0, 0]);
        super::install::map(m, 0, PAGE.0);
        let pin = Pin::new(m);
        let Walk::Seen(slot) = m.space().walk(&pin, FIRST) else { panic!("mapped above") };
        m.cells(slot.at.pfn())[0].store(Tiny::with_attrs(entry(PAGE.0), WRITABLE), Relaxed);
        m.meta[PAGE.0 as usize].set(FrameFlags::DIRTY);
        drop(pin);
        *m.cached.lock().unwrap() = true;
        m
    };
    let roles: [Role; 2] = [store, write];
    check(3, main, setup, roles, |m, [stored, _]| {
        let is_dirty = m.meta[PAGE.0 as usize].flags().contains(FrameFlags::DIRTY);
        let now = u64::from(m.contents.load(Relaxed));
        assert!(stored == now || is_dirty, "{now} is in the page, {stored} stored, and it is clean");
        m.meta[PAGE.0 as usize].clear(FrameFlags::DIRTY);
    });
}
// catches: clean_after_protecting, clean_after_reading, clean_without_flush
#[test]
fn x12_write_back_against_writes_main_0() {
    write_back_against_writes(0);
}
// catches: clean_after_protecting, clean_after_reading, clean_without_flush
#[test]
fn x12_write_back_against_writes_main_1() {
    write_back_against_writes(1);
}
