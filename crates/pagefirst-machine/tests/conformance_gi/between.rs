//! Races made certain: another CPU acts at one point of a fault, between two steps that nothing else separates (c41,
//! c43, c46, c47, c51, c62, c70, r07).
//!
//! `doors` says which points there are.

use crate::doors::{Doors, Point, arm, arm_until, disarm, finish, has_happened};
use crate::kit::*;
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::Machine;

const AT: VirtAddr = VirtAddr(1 << 30);
const LEN: u64 = 16 * PAGE_SIZE;

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
                disarm();
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
        disarm();
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
    // The file is to end before page 8: that is announced, but none of its pages can go while the table is locked.
    let shrinks = c.clone();
    arm_until(
        Point::Checked,
        0,
        move || c.size() == 8 * PAGE_SIZE,
        move || shrinks.set_size(machine, 8 * PAGE_SIZE),
    );
    assert_eq!(fault(s, page(AT, 3), Access::Read), End::Mapped(false, 7));
    assert!(has_happened());
    assert_eq!(mapped(s, AT, 16), (0..8).collect::<Vec<_>>());
    finish();
    assert_eq!(stage.c.pages(), 8, "a count left too high would have kept one");
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
    // walk, and once more under the lock.
    let kinds = [(21, Access::Read), (21, Access::Write), (5, Access::Read), (5, Access::Write)];
    for (i, access) in kinds {
        // The file ends before the page after it was found for the fault.
        let stage = Stage::new()?;
        let (machine, s, c, shrinks) = (stage.machine, &stage.s, stage.c.clone(), stage.c.clone());
        let end = 5 * PAGE_SIZE;
        arm_until(Point::Found, 1, move || c.size() == end, move || shrinks.set_size(machine, end));
        assert_eq!(fault(s, page(AT, i), access), End::Error(FaultError::Bus(Bus::BeyondEnd)));
        assert!(has_happened());
        finish();
        assert_eq!((check(s).present, tables(s), stage.c.pages()), (0, 1, 5));
        stage.end()?;
    }
    for (i, access) in &kinds[..3] {
        let (i, access) = (*i, *access);
        let stage = Stage::new()?;
        let (machine, s, c) = (stage.machine, &stage.s, stage.c.clone());
        // The page is no longer in memory after it was found for the fault.
        arm(Point::Found, 1, move || assert_eq!(c.evict(machine), 16));
        assert_eq!(fault(s, page(AT, i), access), End::Mapped(true, 0), "{access:?} of page {i}");
        assert!(has_happened());
        assert_eq!((first_byte(s, page(AT, i)), stage.c.pages()), (Some(mark(5)), 1));
        stage.end()?;
    }
    Ok(())
}
