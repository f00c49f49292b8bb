//! Races made certain: another CPU acts at one point of a fault, between two steps that nothing else separates (c41,
//! c43, c46, c47, c51, c62, c70, r07).
//!
//! The points are where the fault asks the format of page tables something, so the format here is x86-64's with a door
//! in it.

use crate::kit::*;
use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::fault::{FaultError, Segv};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, VirtAddr};
use pagefirst_machine::Machine;
use std::cell::RefCell;

const AT: VirtAddr = VirtAddr(1 << 30);
const LEN: u64 = 16 * PAGE_SIZE;

/// A point of a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Point {
    /// It has found its mapping and begins to walk the tables. (Passed again under the root's lock, if that is where
    /// tables are missing.)
    Found,
    /// It has seen that nothing is mapped, and has not locked the table yet.
    SawNothing,
    /// Under the table's lock, its own page is checked, its neighbours are not.
    Checked,
}

/// How often the fault passes the point before something happens there, and what.
type Armed = (Point, u32, Box<dyn FnOnce() + Send>);

thread_local!(static ARMED: RefCell<Option<Armed>> = const { RefCell::new(None) });

/// At the `nth` time that this thread passes the point, `then` happens on another CPU.
fn arm(point: Point, nth: u32, then: impl FnOnce() + Send + 'static) {
    ARMED.set(Some((point, nth, Box::new(then))));
}

fn pass(point: Point) {
    let then = ARMED.with_borrow_mut(|armed| match armed {
        Some((at, 0, _)) if *at == point => armed.take().map(|(.., then)| then),
        Some((at, left, _)) if *at == point => {
            *left -= 1;
            None
        }
        _ => None,
    });
    if let Some(then) = then {
        assert!(std::thread::spawn(then).join().is_ok(), "what was to happen meanwhile failed");
    }
}

/// Whether what was armed has happened.
fn has_happened() -> bool {
    ARMED.with_borrow(|armed| armed.is_none())
}

struct Doors;

// SAFETY: every answer is that of `X86_64`, which keeps the contract.
unsafe impl Format for Doors {
    const LEVELS: u8 = X86_64::LEVELS;
    const BITS: u32 = X86_64::BITS;
    const USER_END: VirtAddr = X86_64::USER_END;
    fn is_canonical(va: VirtAddr) -> bool {
        X86_64::is_canonical(va)
    }
    fn table(pfn: Pfn) -> u64 {
        X86_64::table(pfn)
    }
    fn leaf(pfn: Pfn, level: u8, attrs: Attrs) -> u64 {
        pass(Point::Checked);
        X86_64::leaf(pfn, level, attrs)
    }
    fn child(raw: u64, level: u8) -> Option<Pfn> {
        if raw == 0 {
            pass(Point::SawNothing);
        }
        X86_64::child(raw, level)
    }
    fn frame(raw: u64, level: u8) -> Option<Pfn> {
        X86_64::frame(raw, level)
    }
    fn attrs(raw: u64) -> Attrs {
        X86_64::attrs(raw)
    }
    fn with_attrs(raw: u64, attrs: Attrs) -> u64 {
        X86_64::with_attrs(raw, attrs)
    }
    fn index(va: VirtAddr, level: u8) -> usize {
        if level + 1 == Self::LEVELS {
            pass(Point::Found);
        }
        X86_64::index(va, level)
    }
}

/// A space with private, shared and anonymous memory, 16 pages of each, the file's pages cached.
struct Stage {
    machine: &'static Machine<Doors>,
    s: Space<Doors>,
    c: Cache<Doors>,
}

const KINDS: [(u64, Access); 6] = [
    (0, Access::Read),
    (0, Access::Write),
    (16, Access::Read),
    (16, Access::Write),
    (32, Access::Read),
    (32, Access::Write),
];

impl Stage {
    fn new() -> Result<Stage> {
        let machine = machine_of::<Doors>();
        let (s, c) = (space(machine)?, cache(machine, &marked().with_tracking(true), 16)?);
        warm(machine, &c, 0..16)?;
        s.map(at(AT, private(&c, 0, 16, RW)))?;
        s.map(at(page(AT, 16), shared(&c, 0, 16, RW)))?;
        s.map(at(page(AT, 32), anonymous(16, RW)))?;
        Ok(Stage { machine, s, c })
    }
    fn end(self) -> Result {
        check(&self.s);
        let Stage { machine, s, c } = self;
        drop((s, c));
        Ok(machine.nothing_left()?)
    }
}

#[test]
fn r07_the_mapping_goes_after_the_fault_has_found_it() -> Result {
    // A fault that has to fetch something looks twice: the last look installs.
    for (point, nth) in [(Point::Found, 0), (Point::SawNothing, 0), (Point::SawNothing, 1)] {
        for (first, access) in KINDS {
            let stage = Stage::new()?;
            let (s, va) = (&stage.s, page(AT, first + 5));
            let inner = s.clone();
            arm(point, nth, move || inner.unmap(page(AT, first), LEN).expect("mapped"));
            let end = fault(s, va, access);
            if has_happened() {
                let gone = End::Error(FaultError::Segv(Segv::NotMapped));
                assert_eq!(end, gone, "{point:?} {nth}, {access:?} at {first}");
                assert_eq!((check(s).present, tables(s)), (0, 1));
            } else {
                assert!(nth > 0 && matches!(end, End::Mapped(..)), "{point:?} {nth}, {access:?} at {first}");
                ARMED.set(None);
            }
            stage.end()?;
        }
    }
    Ok(())
}

#[test]
fn c41_who_loses_a_slot_seen_empty_changes_no_count() -> Result {
    for ((first, access), nth, has_table) in KINDS
        .into_iter()
        .flat_map(|kind| [(kind, 0, false), (kind, 0, true), (kind, 1, false), (kind, 1, true)])
    {
        let name = format!("{access:?} at {first}, look {nth}, its table there: {has_table}");
        let stage = Stage::new()?;
        let (machine, s, va) = (stage.machine, &stage.s, page(AT, first + 5));
        if has_table {
            fault(s, page(AT, 47), Access::Write);
        }
        let inner = s.clone();
        arm(Point::SawNothing, nth, move || {
            assert!(matches!(fault(&inner, va, access), End::Mapped(..)));
        });
        let end = fault(s, va, access);
        if has_happened() {
            assert_eq!(end, End::Spurious, "{name}");
        }
        ARMED.set(None);
        let found = check(s);
        let own = frame(s, va).ok_or("mapped")?;
        match (first, access) {
            (32, Access::Read) => assert_eq!(own, machine.vm().zero_page(), "{name}"),
            (0 | 32, Access::Write) => assert_eq!(counts(machine, own), (1, 1), "{name}"),
            _ => assert_eq!(counts(machine, own), (2, 1), "{name}"),
        }
        assert_eq!(s.account().resident_bytes(), found.counted * PAGE_SIZE, "{name}");
        assert_eq!(machine.vm().held(machine).tables, 4, "{name}: the loser's tables went back");
        stage.end()?;
    }
    Ok(())
}

#[test]
fn c43_a_neighbour_that_fails_its_check_is_counted_down_again() -> Result {
    let stage = Stage::new()?;
    let (machine, s, c) = (stage.machine, &stage.s, stage.c.clone());
    // Pages 10 and 11 stay, mapped by another, when the file ends before them; the others beyond its end go.
    let other = space_with(machine, policy().with_fault_around(PAGE_SIZE).ok_or("a window")?)?;
    other.map(at(AT, private(&c, 0, 16, R)))?;
    for i in [10, 11] {
        fault(&other, page(AT, i), Access::Read);
    }
    let kept = [10, 11].map(|i| frame(&other, page(AT, i)));
    arm(Point::Checked, 0, move || c.set_size(machine, 8 * PAGE_SIZE).expect("shrinking never fails"));
    assert_eq!(fault(s, page(AT, 3), Access::Read), End::Mapped(false, 7));
    assert!(has_happened());
    assert_eq!(mapped(s, AT, 16), (0..8).collect::<Vec<_>>());
    assert_eq!(kept.map(|pfn| pfn.map(|pfn| counts(machine, pfn))), [Some((2, 1)); 2]);
    assert_eq!(stage.c.pages(), 10);
    drop(other);
    stage.end()
}

#[test]
fn c47_a_neighbour_that_became_another_page_meanwhile_is_not_mapped() -> Result {
    let stage = Stage::new()?;
    let (machine, s, c) = (stage.machine, &stage.s, stage.c.clone());
    // Between find and check all neighbours leave the cache and their frames come back as other pages of it.
    arm(Point::Checked, 0, move || {
        assert_eq!(c.evict(machine), 15, "all but the one that is being mapped");
        warm(machine, &c, (0..16).rev()).expect("memory");
    });
    assert!(matches!(fault(s, page(AT, 3), Access::Read), End::Mapped(false, _)));
    assert!(has_happened());
    let there = mapped(s, AT, 16);
    assert!(there.contains(&3));
    for i in there {
        assert_eq!(first_byte(s, page(AT, i)), Some(mark(i)), "page {i}");
    }
    stage.end()
}

#[test]
fn c51_the_page_itself_gone_sends_the_fault_back_to_look_again() -> Result {
    // No table is there, so the root is where the fault walks from and what it locks: it passes this point in every
    // walk, and once more under the lock. A private copy looks twice, first for the page to copy.
    for (i, access, nth) in
        [(21, Access::Read, 1), (21, Access::Write, 1), (5, Access::Read, 1), (5, Access::Write, 2)]
    {
        let stage = Stage::new()?;
        let (machine, s, c) = (stage.machine, &stage.s, stage.c.clone());
        // The file loses the page after it was found for the fault, and then has room for it again.
        arm(Point::Found, nth, move || {
            c.set_size(machine, 0).expect("shrinking never fails");
            c.set_size(machine, 16 * PAGE_SIZE).expect("nothing is mapped");
        });
        assert_eq!(fault(s, page(AT, i), access), End::Mapped(true, 0), "{access:?} of page {i}");
        assert!(has_happened());
        assert_eq!((first_byte(s, page(AT, i)), stage.c.pages()), (Some(mark(5)), 1));
        stage.end()?;
    }
    Ok(())
}
