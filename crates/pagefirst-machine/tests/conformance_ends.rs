//! However a fault ends, it holds nothing: items 20, 27, 31 and 37.

mod kit;

use kit::*;
use pagefirst::fault::{Bus, FaultError, Outcome, Segv};
use pagefirst::frame::FrameFlags;
use pagefirst::platform::Platform;
use pagefirst::space::Map;
use pagefirst::sync::epoch::Pin;
use pagefirst::types::{Access, PAGE_SIZE, Pfn, VirtAddr};
use pagefirst_machine::{Config, Machine};
use std::collections::HashMap;

const BASE: VirtAddr = VirtAddr(1 << 40);

/// No table is locked or reserved, no pin is held, and each mapped page has the references of its mappings, one of the
/// cache's if it is a file's, and no other. `spaces` are all that there are.
fn nothing_held(machine: &'static Machine, spaces: &[&Space]) -> Result {
    // Debug builds refuse a pin to a CPU that has one, or that has a lock.
    drop(Pin::new(machine));
    machine.vm().quiesce(machine);
    let mut maps: HashMap<Pfn, u32> = HashMap::new();
    let mut tables = 0;
    for space in spaces {
        // Says so if a table is locked.
        let found = check(space);
        tables += found.tables.iter().sum::<u64>();
        found.frames.iter().for_each(|(pfn, n)| *maps.entry(*pfn).or_default() += n);
    }
    let held = machine.vm().held(machine);
    assert_eq!((held.tables, held.in_limbo), (tables, 0), "a table is reserved, or lost");
    for (pfn, n) in maps {
        let is_file = machine.meta(pfn).flags().contains(FrameFlags::FILE);
        assert_eq!(counts(machine, pfn), (n + is_file as u32, n), "references and mappings of {pfn:?}");
    }
    Ok(())
}

#[test]
fn c20_a_fault_that_maps_something_holds_nothing() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let file = cache(machine, &marked().with_tracking(true), 64)?;
    let (anon, private_at, shared_at) = (BASE, VirtAddr(BASE.0 + LEAF), VirtAddr(BASE.0 + 2 * LEAF));
    s.map(at(anon, anonymous(64, RW)))?;
    s.map(at(private_at, private(&file, 0, 64, RW)))?;
    s.map(at(shared_at, shared(&file, 0, 64, RW)))?;
    warm(machine, &file, 40..64)?;
    let faults = [
        (anon, Access::Read, End::Mapped(false, 0)),  // the zero page
        (anon, Access::Write, End::Mapped(false, 0)), // a copy of it
        (page(anon, 1), Access::Write, End::Mapped(false, 0)), // a cleared page
        (page(anon, 1), Access::Write, End::Spurious), // nothing to do
        (private_at, Access::Read, End::Mapped(true, 0)), // a file's page, read in
        (private_at, Access::Write, End::Mapped(false, 0)), // a copy in its place
        (page(private_at, 5), Access::Write, End::Mapped(true, 0)), // a copy where nothing was
        (page(private_at, 50), Access::Read, End::Mapped(false, 15)), // a page and its neighbours
        (page(shared_at, 9), Access::Write, End::Mapped(true, 0)), // a shared page, written
        (page(shared_at, 60), Access::Read, End::Mapped(false, 15)),
        (page(shared_at, 60), Access::Write, End::Mapped(false, 0)), // the same page, made writable
    ];
    for (va, access, end) in faults {
        assert_eq!(fault(&s, va, access), end, "{access:?} at {va}");
        nothing_held(machine, &[&s])?;
    }
    drop(s);
    file.write_back(machine)?;
    assert_eq!(
        (file.pages(), file.evict(machine)),
        (27, 27),
        "each page of the cache has the cache's reference alone"
    );
    drop(file);
    machine.nothing_left()?;
    Ok(())
}

#[test]
fn c20_a_copy_that_other_cpus_must_be_told_of_holds_nothing() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    s.map(at(BASE, anonymous(1, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    assert_eq!(cpu.load_u64(BASE)?, 0);
    let turn = Gate::new(2);
    std::thread::scope(|scope| -> Result {
        let other = scope.spawn(|| {
            let turn = turn.member();
            let mut cpu = machine.vcpu();
            cpu.switch_to(&s);
            let before = cpu.load_u64(BASE);
            turn.pass(); // it has seen the zero page
            turn.pass(); // the page is written
            (before, cpu.load_u64(BASE))
        });
        let turn = turn.member();
        turn.pass();
        let before = machine.counts();
        cpu.store_u64(BASE, 9)?;
        assert_eq!((machine.counts() - before).ipis, 1, "it had the zero page cached");
        nothing_held(machine, &[&s])?;
        turn.pass();
        let (before, after) = other.join().map_err(|_| "the other CPU panicked")?;
        assert_eq!((before?, after?), (0, 9));
        Ok(())
    })
}

#[test]
fn c20_a_fault_that_fails_holds_nothing() -> Result {
    let machine: &'static Machine = small_machine(512);
    let s = space(machine)?;
    let content = marked();
    content.fail_reads(3, true);
    let file = cache(machine, &content, 8)?;
    let (none, read, anon, of_file) = (page(BASE, 100), page(BASE, 200), page(BASE, 300), page(BASE, 400));
    s.map(at(none, anonymous(1, NONE)))?;
    s.map(at(read, anonymous(1, R)))?;
    s.map(at(anon, anonymous(1, RW)))?;
    s.map(at(of_file, private(&file, 0, 16, RW)))?;
    let faults = [
        (BASE, Access::Read, FaultError::Segv(Segv::NotMapped), None),
        (none, Access::Read, FaultError::Segv(Segv::Access), None),
        (read, Access::Write, FaultError::Segv(Segv::Access), None),
        (VirtAddr(1 << 63), Access::Read, FaultError::Segv(Segv::NonCanonical), None),
        (page(of_file, 9), Access::Read, FaultError::Bus(Bus::BeyondEnd), None),
        (page(of_file, 9), Access::Write, FaultError::Bus(Bus::BeyondEnd), None),
        (page(of_file, 3), Access::Read, FaultError::Bus(Bus::Io), None),
        (page(of_file, 3), Access::Write, FaultError::Bus(Bus::Io), None),
        (anon, Access::Read, FaultError::NoMemory, Some(2)),
        (anon, Access::Write, FaultError::NoMemory, Some(3)),
        (anon, Access::Write, FaultError::NoMemory, Some(0)),
        (of_file, Access::Read, FaultError::NoMemory, Some(0)),
        (of_file, Access::Write, FaultError::NoMemory, Some(1)),
    ];
    s.quiesce();
    let before = machine.vm().held(machine);
    for (va, access, error, frames) in faults {
        let kept = frames.map(|n| machine.leave_free(n));
        assert_eq!(fault(&s, va, access), End::Error(error), "{access:?} at {va}");
        drop(kept);
        nothing_held(machine, &[&s])?;
        // What was read from the file meanwhile is the cache's; with that dropped, all is as it was.
        file.evict(machine);
        s.quiesce();
        assert_eq!(machine.vm().held(machine), before, "{error:?}");
    }
    Ok(())
}

#[test]
fn c20_a_blocked_fault_holds_its_ticket_alone() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let (content, hook) = hooked();
    let file = cache(machine, &content, 8)?;
    let (one, other) = (BASE, VirtAddr(BASE.0 + LEAF));
    s.map(at(one, private(&file, 0, 8, RW)))?;
    s.map(at(other, shared(&file, 0, 8, RW)))?;
    let meanwhile = s.clone();
    hook.arm(2, move || {
        let s = meanwhile;
        for access in [Access::Read, Access::Write] {
            let allocated = machine.counts().tables_allocated;
            let Outcome::Blocked(ticket) = s.fault(page(other, 2), access) else {
                panic!("another reads the page")
            };
            assert!(!ticket.is_ready());
            drop(Pin::new(machine));
            assert_eq!(machine.counts().tables_allocated, allocated);
            assert_eq!(check(&s).tables, [0, 0, 0, 1, 0]);
            drop(ticket);
        }
    });
    assert_eq!(fault(&s, page(one, 2), Access::Read), End::Mapped(true, 0));
    assert_eq!(s.account().faults.blocked, 2);
    nothing_held(machine, &[&s])?;
    assert_eq!(fault(&s, page(other, 2), Access::Write), End::Mapped(false, 0));
    nothing_held(machine, &[&s])
}

#[test]
fn c27_an_anonymous_fault_without_a_page_leaves_no_table() -> Result {
    for beside in [false, true] {
        let machine: &'static Machine = small_machine(256);
        let s = space(machine)?;
        s.map(at(BASE, anonymous(8, RW)))?;
        if beside {
            fault(&s, page(BASE, 7), Access::Write);
        }
        let (bytes, there) = (s.account().table_bytes, mapped(&s, BASE, 8));
        let kept = machine.leave_free(0);
        let before = machine.counts();
        for _ in 0..3 {
            assert_eq!(fault(&s, BASE, Access::Write), End::Error(FaultError::NoMemory));
        }
        assert_eq!((machine.counts() - before).tables_allocated, 0);
        assert_eq!((s.account().table_bytes, mapped(&s, BASE, 8)), (bytes, there));
        check(&s);
        drop(kept);
        assert_eq!(fault(&s, BASE, Access::Write), End::Mapped(false, 0));
        drop(s);
        machine.nothing_left()?;
    }
    Ok(())
}

#[test]
fn c31_without_memory_for_a_table_nothing_is_mapped() -> Result {
    let machine: &'static Machine = small_machine(256);
    let s = space(machine)?;
    let file = cache(machine, &marked(), 8)?;
    let (anon, of_file) = (BASE, VirtAddr(BASE.0 + (1 << 39)));
    s.map(at(anon, anonymous(8, RW)))?;
    s.map(at(of_file, shared(&file, 0, 8, RW)))?;
    warm(machine, &file, 0..8)?;
    // The page is to be had; for the three tables there is memory for none, one, or two.
    let faults = [
        (anon, Access::Write, 1),
        (anon, Access::Read, 0),
        (of_file, Access::Read, 0),
        (of_file, Access::Write, 0),
    ];
    for (va, access, page_frames) in faults {
        for tables in 0..3 {
            let kept = machine.leave_free(page_frames + tables);
            let before = machine.counts();
            assert_eq!(fault(&s, va, access), End::Error(FaultError::NoMemory));
            let spent = machine.counts() - before;
            assert_eq!((spent.tables_allocated, spent.live_tables()), (tables, 0));
            assert_eq!((mapped(&s, va, 8), check(&s).tables), (vec![], [0, 0, 0, 1, 0]));
            s.quiesce();
            assert_eq!(machine.free_frames(), page_frames + tables, "all that was had came back");
            drop(kept);
            nothing_held(machine, &[&s])?;
        }
    }
    assert_eq!(s.account().faults.no_memory, 12);
    for (va, access, page_frames) in faults {
        let kept = machine.leave_free(page_frames + 3);
        assert!(matches!(fault(&s, va, access), End::Mapped(false, _)), "with memory it goes on");
        drop(kept);
        s.discard(va, 8 * PAGE_SIZE)?;
    }
    Ok(())
}

#[test]
fn c37_a_batch_is_set_in_one_locked_section() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let file = cache(machine, &marked(), 64)?;
    warm(machine, &file, 0..64)?;
    s.map(at(BASE, private(&file, 0, 64, R)))?;
    // Into a table of its own, then into one that is there, then into one where some slots are taken.
    for (index, locked, around) in
        [(5, [0, 0, 0, 1, 0], 15), (20, [1, 0, 0, 0, 0], 15), (63, [1, 0, 0, 0, 0], 15)]
    {
        let before = machine.counts();
        assert_eq!(fault(&s, page(BASE, index), Access::Read), End::Mapped(false, around));
        let spent = machine.counts() - before;
        assert_eq!((spent.tables_locked, spent.scanned()), (locked, 0), "from page {index}");
        // The lock is free again: this fails on a table that is locked.
        check(&s);
    }
    s.discard(page(BASE, 16), 8 * PAGE_SIZE)?;
    let before = machine.counts();
    assert_eq!(fault(&s, page(BASE, 18), Access::Read), End::Mapped(false, 7));
    assert_eq!((machine.counts() - before).tables_locked, [1, 0, 0, 0, 0]);
    assert_eq!(mapped(&s, BASE, 64).len(), 48);
    Ok(())
}

#[test]
fn c37_a_batch_is_seen_whole_or_not_at_all_where_its_table_is_new() -> Result {
    const ROUNDS: u64 = 200;
    let machine: &'static Machine = Machine::new(Config { checks: true, cpus: 3, ..Config::default() });
    let s = space(machine)?;
    let file = cache(machine, &marked(), 16)?;
    warm(machine, &file, 0..16)?;
    for round in 0..ROUNDS {
        s.map(at(VirtAddr(BASE.0 + round * LEAF), private(&file, 0, 16, R)))?;
    }
    s.map(at(VirtAddr(BASE.0 + (1 << 39)), Map::anonymous(PAGE_SIZE, RW)))?;
    let turn = Gate::new(2);
    std::thread::scope(|scope| -> Result {
        let other = scope.spawn(|| {
            let turn = turn.member();
            for round in 0..ROUNDS {
                turn.pass();
                assert_eq!(fault(&s, VirtAddr(BASE.0 + round * LEAF), Access::Read), End::Mapped(false, 15));
            }
        });
        let turn = turn.member();
        for round in 0..ROUNDS {
            let here = VirtAddr(BASE.0 + round * LEAF);
            turn.pass();
            // The last of them is there as soon as any is.
            while frame(&s, page(here, 15)).is_none() && !other.is_finished() {
                std::hint::spin_loop();
            }
            assert_eq!(mapped(&s, here, 16).len(), 16, "in round {round}");
        }
        Ok(())
    })
}
