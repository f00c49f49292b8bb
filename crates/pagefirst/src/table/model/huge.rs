//! Huge pages: against small ones, against the flush of a table that was there, and coming apart.

use super::install::{map, unmap, zap};
use super::{Machine, check, entry, pages};
use crate::arch::{Attrs, Format, Tiny};
use crate::platform::Platform;
use crate::sync::atomic::{AcqRel, Acquire, Relaxed};
use crate::sync::epoch::Pin;
use crate::table::publish::install;
use crate::table::{Batch, Counted, FaultKind, NewEntry, Refused, Reserve, Stock, Walk};
use crate::tlb::Gather;
use crate::types::{PAGE_SIZE, Pfn, VirtAddr};

/// Entries a table, and so small pages in a huge one.
const SMALL: u64 = Tiny::ENTRIES as u64;

/// A huge page of frames that are nobody's: nothing is counted in their metadata.
fn huge_entry(page: u32) -> u64 {
    Tiny::leaf(Pfn(page), 1, Attrs::SPECIAL)
}
/// The entry of the `i`th small page of a huge one.
fn piece(page: u32, i: u64, attrs: Attrs) -> (u64, u64) {
    (i * PAGE_SIZE, Tiny::leaf(Pfn(page + i as u32), 0, Attrs::SPECIAL | attrs))
}

struct Huge {
    m: &'static Machine,
    page: u32,
    heeds: bool,
    /// A table was here, and its flush must have come before.
    after_flush: bool,
}
impl Batch for Huge {
    fn va(&self) -> VirtAddr {
        VirtAddr(0)
    }
    fn level(&self) -> u8 {
        1
    }
    fn is_current(&self) -> bool {
        !self.heeds || self.m.retired.load(Relaxed) == 0
    }
    fn entry(&mut self, _: VirtAddr) -> Option<NewEntry> {
        // Relaxed: the library must have ordered it.
        assert!(!self.after_flush || self.m.flushes.load(Relaxed) > 0, "small translations may be cached");
        Some(NewEntry { raw: huge_entry(self.page), counted: Counted::Nothing })
    }
    fn kind(&self) -> Option<FaultKind> {
        Some(FaultKind::AnonWrite)
    }
}

const MAPPED: u64 = 10;
const RACED: u64 = 11;
const AGAIN: u64 = 12;

/// A fault on the first range, with the huge page numbered 40 in hand.
fn fault(m: &'static Machine, heeds: bool, after_flush: bool) -> u64 {
    let mut gather = Gather::new(m.space());
    let mut batch = Huge { m, page: 40, heeds, after_flush };
    loop {
        let done = {
            let pin = Pin::new(m);
            match m.space().walk(&pin, VirtAddr(0)) {
                Walk::Nothing(slot) => {
                    install(m.space(), &pin, slot, &mut batch, &mut Reserve::new(m), &mut gather)
                }
                Walk::Seen(_) | Walk::Huge(_) => Err(Refused::Raced),
            }
        };
        return match done {
            Ok(_) => MAPPED,
            Err(Refused::Raced) => RACED,
            Err(Refused::Again) => AGAIN,
            Err(Refused::Short(n)) => panic!("{n} tables wanted"),
            Err(Refused::Unflushed(taken)) => {
                gather.flush_before(pages(0, SMALL), taken);
                continue;
            }
        };
    }
}

/// A small page against a huge one in an empty range: one of them is mapped.
fn small_against_huge(main: usize) {
    let roles: [super::Role; 2] = [|m| map(m, 1, 20), |m| fault(m, false, false)];
    check(
        4,
        main,
        || Machine::new([1, 0, 0]),
        roles,
        |m, said| {
            let mapped = if said[1] == MAPPED { (0, huge_entry(40)) } else { (PAGE_SIZE, entry(20)) };
            assert_eq!(m.audit(), [mapped], "{said:?}");
        },
    );
}

// catches: install_counts_levels_once, install_overwrites
#[test]
fn r03_small_against_huge_main_0() {
    small_against_huge(0);
}
// catches: install_counts_levels_once, install_overwrites
#[test]
fn r03_small_against_huge_main_1() {
    small_against_huge(1);
}

/// The last small page of a range goes while a huge page comes: it comes after the flush, or not at all.
fn huge_over_dead_table(main: usize) {
    let setup = || {
        let m = Machine::new([1, 0, 0]);
        map(m, 1, 20);
        m
    };
    let roles: [super::Role; 2] = [|m| zap(m, pages(0, SMALL)), |m| fault(m, false, true)];
    check(4, main, setup, roles, |m, said| {
        let mapped: &[_] = if said[1] == MAPPED { &[(0, huge_entry(40))] } else { &[] };
        assert_eq!(m.audit(), mapped, "{said:?}");
    });
}

// catches: install_over_unflushed, retire_without_grace
// catches in turn: unlock_forgets_dead
#[test]
fn huge_page_over_a_dead_table_main_0() {
    huge_over_dead_table(0);
}
// catches: install_over_unflushed, retire_without_grace
// catches in turn: unlock_forgets_dead
#[test]
fn huge_page_over_a_dead_table_main_1() {
    huge_over_dead_table(1);
}

/// A huge page comes while its range is unmapped.
fn huge_against_unmap(main: usize) {
    let roles: [super::Role; 2] = [|m| fault(m, true, false), |m| unmap(m, pages(0, SMALL))];
    check(
        4,
        main,
        || Machine::new([0, 0, 0]),
        roles,
        |m, said| {
            assert_eq!(m.audit(), [], "mapping left in an unmapped range, {said:?}");
            assert!(said == [AGAIN, 0] || said == [MAPPED, 1], "{said:?}");
        },
    );
}

// catches: install_validates_unlocked, install_without_validation, zap_skips_empty
#[test]
fn r11_huge_page_against_unmap_main_0() {
    huge_against_unmap(0);
}
// catches: install_validates_unlocked, install_without_validation, zap_skips_empty
#[test]
fn r11_huge_page_against_unmap_main_1() {
    huge_against_unmap(1);
}

/// Hardware stores to the third page of the range: marks the entry that maps it, if it finds it as it was read.
fn store(m: &'static Machine) -> u64 {
    let pin = Pin::new(m);
    let (Walk::Seen(slot) | Walk::Huge(slot)) = m.space().walk(&pin, VirtAddr(2 * PAGE_SIZE)) else {
        panic!("a page that stays mapped was not there")
    };
    let (raw, level) = (slot.raw(), slot.level());
    if Tiny::frame(raw, level).is_none() {
        return 0; // in transit: hardware faults
    }
    let cell = match level {
        0 => return 0, // its own entry: nobody changes it any more
        _ => &m.cells(m.space().root_frame())[0],
    };
    let marked = Tiny::with_attrs(raw, Tiny::attrs(raw) | Attrs::DIRTY);
    cell.compare_exchange(raw, marked, AcqRel, Acquire).is_ok() as u64
}

/// Zaps the second page of a huge one, which is split for it.
fn cut(m: &'static Machine) -> u64 {
    let mut cuts = Stock::new(m, 1).unwrap();
    let mut zap = super::install::Zap(0);
    let mut gather = Gather::new(m.space());
    m.space().visit(pages(1, 2), &mut zap, &mut cuts, &mut gather);
    gather.flush();
    zap.0
}

/// A huge page is split while hardware stores to a part of it that stays: the mark is in the piece's entry, and
/// nobody takes what is split for nothing.
fn split_against_hardware(main: usize) {
    let setup = || {
        let m = Machine::new([1, 0, 0]);
        fault(m, false, false);
        m
    };
    check(4, main, setup, [cut, store], |m, said| {
        let dirty = if said[1] == 1 { Attrs::DIRTY } else { Attrs::empty() };
        assert_eq!(m.audit(), [piece(40, 0, dirty), piece(40, 2, dirty), piece(40, 3, dirty)], "{said:?}");
    });
}

// catches: split_leaves_hole, split_loses_dirty, split_reads_before_swap
#[test]
fn r15_split_against_hardware_main_0() {
    split_against_hardware(0);
}
// catches: split_leaves_hole, split_loses_dirty, split_reads_before_swap
#[test]
fn r15_split_against_hardware_main_1() {
    split_against_hardware(1);
}
