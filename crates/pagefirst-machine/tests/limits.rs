//! Limits: what is charged, to whom, and what happens when there is no more.

mod kit;

use kit::*;
use pagefirst::fault::FaultError;
use pagefirst::file::{ReadError, WriteError};
use pagefirst::limit::Limit;
use pagefirst::mem::Shared;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::{Map, Why};
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr, VirtRange};
use pagefirst_machine::Machine;
use std::sync::Barrier;

type LimitOf = Shared<Machine, Limit<Machine>>;

const AT: VirtAddr = VirtAddr(1 << 30);
const FILE: VirtAddr = VirtAddr(1 << 40);
const SHARED: VirtAddr = VirtAddr(2 << 40);

/// What is charged when nothing is charged in advance.
fn charged(machine: &'static Machine, limit: &LimitOf) -> u64 {
    machine.vm().drain(machine);
    limit.charged()
}

fn limited(machine: &'static Machine, policy: Policy, max: u64) -> Result<(Space, LimitOf)> {
    let (space, limit) = (space_with(machine, policy)?, Limit::new(machine, None, max)?);
    space.set_limit(Some(limit.clone()));
    Ok((space, limit))
}

fn small() -> Result<Policy> {
    Ok(policy().with_fault_around(PAGE_SIZE).ok_or("a window")?)
}

fn stage(machine: &'static Machine, max: u64) -> Result<(Space, LimitOf, Cache)> {
    let (space, limit) = limited(machine, small()?, max)?;
    let cache = cache(machine, &marked(), 8)?;
    warm(machine, &cache, 0..4)?;
    space.map(at(AT, anonymous(8, RW)))?;
    space.map(at(FILE, private(&cache, 0, 8, RW)))?;
    space.map(at(SHARED, shared(&cache, 0, 8, RW)))?;
    Ok((space, limit, cache))
}

/// Every kind of fault, with limits from none on until it works: told who refused, with everything as before.
#[test]
fn r06_each_charge_fails_in_turn() -> Result {
    let cases = [
        ("zero page", AT, Access::Read, 0),
        ("cleared page", AT, Access::Write, 1),
        ("cached page", FILE, Access::Read, 0),
        ("page to be read", page(FILE, 6), Access::Read, 1),
        ("copy of a cached page", FILE, Access::Write, 1),
        ("copy of a page to be read", page(FILE, 6), Access::Write, 2),
        ("shared page to be read", page(SHARED, 6), Access::Write, 1),
    ];
    let machine = machine();
    for (name, va, access, pages) in cases {
        for max in 0..=pages {
            let (space, limit, cache) = stage(machine, max)?;
            let held = machine.vm().held(machine).tables;
            let end = fault(&space, va, access);
            if max < pages {
                assert_eq!(end, End::Error(FaultError::OverLimit(limit.id())), "{name}, {max}");
                assert_eq!((entry(&space, va).0, tables(&space)), (0, 1), "{name}, {max}");
                let again = fault(&space, va, access);
                assert_eq!((again, limit.refused(), space.account().faults.over_limit), (end, 2, 2));
                // At most a page that was read, and is the file's now.
                assert_eq!(machine.vm().held(machine).tables, held, "{name}, {max}");
                assert!(charged(machine, &limit) <= 1 && limit.peak() <= max);
                limit.set_max(pages);
                assert!(matches!(fault(&space, va, access), End::Mapped(..)), "{name}, {max}");
            } else {
                assert!(matches!(end, End::Mapped(..)), "{name}: {end:?}");
            }
            assert_eq!(charged(machine, &limit), pages, "{name}");
            check(&space);
            drop((space, cache));
            machine.vm().quiesce(machine);
            assert_eq!((limit.charged(), limit.peak()), (0, limit.max()), "{name}");
            drop(limit);
            machine.nothing_left()?;
        }
    }
    Ok(())
}

#[test]
fn the_limit_above_refuses_as_well() -> Result {
    let machine = machine();
    let above = Limit::new(machine, None, 3)?;
    let limits = [Limit::new(machine, Some(&above), 10)?, Limit::new(machine, Some(&above), 2)?];
    let spaces = [space(machine)?, space(machine)?];
    for (space, limit) in spaces.iter().zip(&limits) {
        space.set_limit(Some(limit.clone()));
        assert!(space.limit().is_some_and(|of| of.same(limit)));
        space.map(at(AT, anonymous(8, RW)))?;
    }
    let ends = [(1, 0), (1, 1), (1, 2), (0, 0), (0, 1)].map(|(space, i): (usize, u64)| {
        match fault(&spaces[space], page(AT, i), Access::Write) {
            End::Mapped(..) => None,
            End::Error(FaultError::OverLimit(id)) => Some(id),
            end => panic!("{end:?}"),
        }
    });
    assert_eq!(ends, [None, None, Some(limits[1].id()), None, Some(above.id())]);
    assert_eq!([&above, &limits[0], &limits[1]].map(|l| charged(machine, l)), [3, 1, 2]);
    // The one below is forgotten before what is charged to it.
    let [first, second] = limits;
    drop(first);
    drop(spaces);
    machine.vm().quiesce(machine);
    assert_eq!((above.charged(), second.charged()), (0, 0));
    drop((above, second));
    Ok(machine.nothing_left()?)
}

/// Who brings a file's page in pays for it until it is dropped, whoever uses it, even when all else of him is gone.
#[test]
fn who_reads_a_page_pays_for_it() -> Result {
    let machine = machine();
    let (a, limit, c) = stage(machine, 100)?;
    assert_eq!(fault(&a, page(FILE, 5), Access::Read), End::Mapped(true, 0));
    assert_eq!(charged(machine, &limit), 1);
    let (b, other) = limited(machine, small()?, 0)?;
    b.map(at(FILE, shared(&c, 0, 8, RW)))?;
    assert_eq!(fault(&b, page(FILE, 5), Access::Write), End::Mapped(false, 0));
    drop((a, b, other));
    machine.vm().quiesce(machine);
    assert_eq!(limit.charged(), 1);
    drop(limit);
    machine.vm().quiesce(machine);
    assert_eq!(c.pages(), 5);
    c.write_back(machine)?;
    assert_eq!(c.evict(machine), 5);
    drop(c);
    Ok(machine.nothing_left()?)
}

#[test]
fn reads_and_writes_of_files_are_the_callers() -> Result {
    let machine = machine();
    let (c, limit) = (cache(machine, &marked(), 8)?, Limit::new(machine, None, 2)?);
    machine.charge_to(Some(limit.clone()));
    let mut bytes = [0; 3 * PAGE_SIZE as usize];
    assert_eq!(c.read_at(machine, 0, &mut bytes).ok(), Some(2 * PAGE_SIZE as usize));
    let id = limit.id();
    let refused = c.read_at(machine, 2 * PAGE_SIZE, &mut bytes);
    assert!(matches!(refused, Err(ReadError::OverLimit(over)) if over.0 == id), "{refused:?}");
    for offset in [3, 20] {
        let refused = c.write_at(machine, offset * PAGE_SIZE, &[1]);
        let over = matches!(refused, Err(WriteError::Page(ReadError::OverLimit(over))) if over.0 == id);
        assert!(over, "{refused:?}");
    }
    assert_eq!((c.pages(), c.size(), limit.refused()), (2, 8 * PAGE_SIZE, 4));
    limit.set_max(4);
    assert_eq!(c.write_at(machine, 20 * PAGE_SIZE, &[1]).ok(), Some(1));
    assert_eq!((charged(machine, &limit), c.pages()), (3, 3));
    machine.charge_to(None);
    warm(machine, &c, 3..5)?;
    assert_eq!(charged(machine, &limit), 3);
    drop((c, limit));
    Ok(machine.nothing_left()?)
}

/// A huge page is charged whole, or a small one comes instead; cut, its pages are charged one by one.
#[test]
fn huge_pages_are_charged_whole() -> Result {
    let machine = machine();
    let (space, limit) = limited(machine, Policy { huge: HugePolicy::Always, ..policy() }, 600)?;
    space.map(at(AT, anonymous(1024, RW)))?;
    let huge = |i| entry(&space, page(AT, i)).1 == 1;
    assert!(matches!(fault(&space, AT, Access::Write), End::Mapped(..)));
    assert!(huge(0) && charged(machine, &limit) == 512);
    assert!(matches!(fault(&space, page(AT, 512), Access::Write), End::Mapped(..)));
    assert!(!huge(512) && charged(machine, &limit) == 513);
    assert_eq!(space.account().faults.no_huge, 1);
    space.unmap(page(AT, 100), 12 * PAGE_SIZE)?;
    assert_eq!(charged(machine, &limit), 501);
    space.unmap(AT, 1024 * PAGE_SIZE)?;
    assert_eq!(charged(machine, &limit), 0);
    drop((space, limit));
    Ok(machine.nothing_left()?)
}

#[test]
fn populating_and_copies_stop_at_the_limit() -> Result {
    let machine = machine();
    let (space, limit) = limited(machine, policy(), 3)?;
    let made = space.map(Map { populate: true, ..at(AT, anonymous(8, RW)) })?;
    let over = FaultError::OverLimit(limit.id());
    let stopped = made.unpopulated.map(|u| (u.at, u.why.error()));
    assert_eq!(stopped, Some((page(AT, 3), Some(over))));
    assert_eq!(mapped(&space, AT, 8), [0, 1, 2]);
    let stopped = space.copy_out(page(AT, 2), &[1; 2 * PAGE_SIZE as usize]).expect_err("over the limit");
    assert_eq!(stopped.done, PAGE_SIZE as usize);
    assert!(matches!(stopped.why, Why::Error(why) if why == over && stopped.why.errno() == Some(12)));
    space.set_limit(None);
    assert!(space.populate(VirtRange::new(AT, page(AT, 8)), RW).is_none());
    assert_eq!(charged(machine, &limit), 3);
    Ok(())
}

/// What one CPU has charged in advance does not make another one fail; many at once never go over.
#[test]
fn cpus_share_a_limit() -> Result {
    let machine = machine();
    let (space, limit) = limited(machine, policy(), 100)?;
    space.map(at(AT, anonymous(1024, RW)))?;
    let refused = std::sync::atomic::AtomicU64::new(0);
    let start = Barrier::new(4);
    let user = |n: u64| {
        start.wait();
        for round in 0..20 {
            for i in 0..26 {
                match fault(&space, page(AT, 256 * n + i), Access::Write) {
                    End::Mapped(..) => {}
                    End::Error(FaultError::OverLimit(id)) if id == limit.id() => {
                        refused.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    }
                    end => panic!("{end:?}"),
                }
                assert!(limit.charged() <= 100);
            }
            // In the last round everybody keeps what he has.
            if round < 19 {
                space.discard(page(AT, 256 * n), 256 * PAGE_SIZE).expect("mapped");
            }
        }
    };
    together(4, user, || {});
    let there = mapped(&space, AT, 1024).len() as u64;
    assert_eq!((limit.peak(), charged(machine, &limit)), (100, there));
    assert!(refused.into_inner() >= 4 && there <= 100);
    // Exactly the last page is had, wherever pages were charged in advance.
    for i in 0..100 - there {
        assert!(matches!(fault(&space, page(AT, 100 + i), Access::Write), End::Mapped(..)), "{i}");
    }
    assert!(matches!(fault(&space, page(AT, 255), Access::Write), End::Error(_)));
    drop((space, limit));
    Ok(machine.nothing_left()?)
}

/// The charge comes before the page is anybody's: while it is read nothing more is charged; if it is refused, nothing is
/// read.
#[test]
fn x05_a_page_is_charged_before_it_is_locked() -> Result {
    let machine = machine();
    let (file, hook) = hooked();
    let (space, limit) = limited(machine, small()?, 0)?;
    let c = cache(machine, &file, 8)?;
    space.map(at(FILE, shared(&c, 0, 8, RW)))?;
    assert_eq!(fault(&space, page(FILE, 2), Access::Write), End::Error(FaultError::OverLimit(limit.id())));
    assert_eq!((file.reads(), c.pages()), (0, 0));
    limit.set_max(1);
    let (inner, other) = (limit.clone(), space.clone());
    hook.arm(2, move || {
        assert_eq!(inner.charged(), 1);
        // Whoever meets the page now waits for it, and is charged nothing.
        assert_eq!(fault(&other, page(FILE, 2), Access::Read), End::Blocked);
        assert_eq!((inner.charged(), inner.refused()), (1, 1));
    });
    assert_eq!(fault(&space, page(FILE, 2), Access::Write), End::Mapped(true, 0));
    assert!(!hook.is_armed());
    assert_eq!(limit.charged(), 1);
    Ok(())
}

/// Read-ahead takes what there is, and nobody is refused for it.
#[test]
fn what_is_not_read_ahead_for_a_limit_is_no_refusal() -> Result {
    let machine = machine();
    let (space, limit) = limited(machine, small()?, 3)?;
    let c = cache(machine, &marked().with_folios(4).with_read_ahead(32), 64)?;
    space.map(at(FILE, shared(&c, 0, 64, R)))?;
    limit.set_max(18);
    assert_eq!(fault(&space, FILE, Access::Read), End::Mapped(true, 0));
    assert_eq!((c.pages(), limit.refused()), (18, 0));
    Ok(())
}

/// Many limits come and go; each is counted for itself.
#[test]
fn many_limits() -> Result {
    let machine = machine();
    let top = Limit::new(machine, None, 1000)?;
    let limits: Vec<_> =
        (0..300).map(|i| Limit::new(machine, Some(&top), i)).collect::<std::result::Result<_, _>>()?;
    let space = space(machine)?;
    space.map(at(AT, anonymous(300, RW)))?;
    for (i, limit) in (0..).zip(&limits) {
        space.set_limit(Some(limit.clone()));
        let end = fault(&space, page(AT, i), Access::Write);
        assert_eq!(matches!(end, End::Mapped(..)), i > 0, "{i}: {end:?}");
    }
    assert_eq!(charged(machine, &top), 299);
    assert!(limits.iter().zip(0..).all(|(l, i)| l.max() == i && l.charged() == (i > 0) as u64));
    drop(limits);
    space.set_limit(None);
    machine.vm().quiesce(machine);
    assert_eq!(top.charged(), 299);
    drop((space, top));
    Ok(machine.nothing_left()?)
}

/// A child is charged like its parent; what they share was charged once.
#[test]
fn a_child_has_its_parents_limit() -> Result {
    let machine = machine();
    let (parent, limit) = limited(machine, policy(), 3)?;
    parent.map(at(AT, anonymous(8, RW)))?;
    assert!((0..2).all(|i| fault(&parent, page(AT, i), Access::Write) == End::Mapped(false, 0)));
    let child = std::sync::Arc::new(parent.fork()?);
    assert!(child.limit().is_some_and(|of| of.same(&limit)));
    assert_eq!(charged(machine, &limit), 2);
    assert_eq!(fault(&child, AT, Access::Write), End::Mapped(false, 0));
    let over = End::Error(FaultError::OverLimit(limit.id()));
    assert_eq!([&parent, &child].map(|space| fault(space, page(AT, 1), Access::Write)), [over, over]);
    // Nobody else has it any more.
    drop(child);
    assert_eq!(fault(&parent, page(AT, 1), Access::Write), End::Mapped(false, 0));
    machine.vm().quiesce(machine);
    assert_eq!(limit.charged(), 2);
    drop((parent, limit));
    Ok(machine.nothing_left()?)
}

/// What was charged in advance is not used up beyond a limit that was lowered.
#[test]
fn a_limit_that_is_lowered_is_kept() -> Result {
    let machine = machine();
    let (space, limit) = limited(machine, policy(), 100)?;
    space.map(at(AT, anonymous(40, RW)))?;
    assert!(matches!(fault(&space, AT, Access::Write), End::Mapped(..)));
    limit.set_max(1);
    for i in 1..40 {
        assert!(matches!(fault(&space, page(AT, i), Access::Write), End::Error(FaultError::OverLimit(_))));
    }
    limit.set_max(2);
    assert!(matches!(fault(&space, page(AT, 1), Access::Write), End::Mapped(..)));
    assert_eq!(charged(machine, &limit), 2);
    Ok(())
}

// catches: stock_over_limit
/// Nor are pages that are freed afterwards, as long as more is charged; so it is with a limit above.
#[test]
fn a_limit_that_is_lowered_is_kept_when_pages_are_freed() -> Result {
    let machine = machine();
    let above = Limit::new(machine, None, 1000)?;
    for lowers_above in [false, true] {
        let (space, limit) = (space(machine)?, Limit::new(machine, Some(&above), 100)?);
        space.set_limit(Some(limit.clone()));
        space.map(at(AT, anonymous(60, RW)))?;
        let fault = |i| fault(&space, page(AT, i), Access::Write);
        assert!((0..60).all(|i| matches!(fault(i), End::Mapped(..))));
        let lowered = if lowers_above { &above } else { &limit };
        lowered.set_max(10);
        space.discard(page(AT, 10), 50 * PAGE_SIZE)?;
        let over = End::Error(FaultError::OverLimit(lowered.id()));
        assert_eq!((10..60).find(|i| fault(*i) != over), None);
        space.discard(AT, PAGE_SIZE)?;
        assert_eq!((fault(20), fault(30)), (End::Mapped(false, 0), over));
        assert_eq!(charged(machine, &limit), 10);
        drop((space, limit));
        machine.vm().quiesce(machine);
    }
    drop(above);
    Ok(machine.nothing_left()?)
}

/// Nobody is refused for the pages of a file that has ended.
#[test]
fn what_waits_to_be_freed_is_given_back_before_a_limit_refuses() -> Result {
    let machine = machine();
    let (space, limit) = limited(machine, policy(), 8)?;
    let file = cache(machine, &marked(), 8)?;
    space.map(at(AT, shared(&file, 0, 8, RW)))?;
    for i in 0..8 {
        fault(&space, page(AT, i), Access::Read);
    }
    assert_eq!(charged(machine, &limit), 8);
    drop(file);
    space.unmap(AT, 8 * PAGE_SIZE)?; // the last that had the file
    space.map(at(AT, anonymous(1, RW)))?;
    assert!(matches!(fault(&space, AT, Access::Write), End::Mapped(..)));
    assert_eq!((charged(machine, &limit), limit.refused()), (1, 0));
    Ok(())
}
