//! Fault-around: which neighbours, where, and how it ends (c47 to c65, r08, r09).

use crate::kit::*;
use pagefirst::arch::{Tiny, X86_64};
use pagefirst::fault::{Bus, FaultError};
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr, VirtRange};
use pagefirst_machine::Machine;
use std::sync::{Arc, Mutex};

const AT: VirtAddr = VirtAddr(1 << 30);
/// Pages of the default window.
const WINDOW: u64 = 16;

/// A space with a private mapping of the first `pages` pages of a marked file at [`AT`], `cached` of them cached.
fn mapping(
    machine: &'static Machine,
    pages: u64,
    cached: impl IntoIterator<Item = u64>,
) -> Result<(Space, Cache)> {
    let (s, c) = (space(machine)?, cache(machine, &marked(), pages)?);
    warm(machine, &c, cached)?;
    s.map(at(AT, private(&c, 0, pages, RW)))?;
    Ok((s, c))
}

/// Whatever is mapped among the first `pages` pages shows the page of the file that belongs there.
fn each_in_its_place(s: &Space, pages: u64) {
    for i in mapped(s, AT, pages) {
        assert_eq!(first_byte(s, page(AT, i)), Some(mark(i)), "page {i}");
    }
}

#[test]
fn c47_fault_around_takes_only_what_is_up_to_date_and_reads_nothing() -> Result {
    let machine = machine();
    let (file, hook) = hooked();
    let c = cache(machine, &file, 14)?;
    warm(machine, &c, (0..14).filter(|i| *i != 3))?;
    let (s, other) = (space(machine)?, space(machine)?);
    s.map(at(AT, private(&c, 0, WINDOW, R)))?;
    // While page 3 is being read in, page 5 faults: 3 is in the cache and not up to date.
    let (inner, during) = (s.clone(), Arc::new(Mutex::new(None)));
    let seen = during.clone();
    hook.arm(3, move || {
        let end = fault(&inner, page(AT, 5), Access::Read);
        if let Ok(mut seen) = seen.lock() {
            *seen = Some((end, mapped(&inner, AT, WINDOW)));
        }
    });
    let reads = file.reads();
    assert_eq!(fault(&s, page(AT, 3), Access::Read), End::Mapped(true, 0));
    let expected: Vec<u64> = (0..14).filter(|i| *i != 3).collect();
    let during = during.lock().map_err(|e| e.to_string())?.take();
    assert_eq!(during, Some((End::Mapped(false, 12), expected)));
    assert_eq!(file.reads() - reads, 1, "only the page that faulted was read");
    each_in_its_place(&s, WINDOW);

    // Page 13 goes, though `s` maps it, when the file ends before it: nobody gets it any more.
    c.set_size(machine, 12 * PAGE_SIZE);
    other.map(at(AT, private(&c, 0, WINDOW, R)))?;
    assert_eq!(mapped(&s, AT, WINDOW), (0..12).collect::<Vec<_>>());
    assert_eq!(fault(&other, AT, Access::Read), End::Mapped(false, 11));
    assert_eq!(mapped(&other, AT, WINDOW), (0..12).collect::<Vec<_>>());
    check(&other);
    Ok(())
}

#[test]
fn c49_gaps_in_the_cache_shift_no_neighbour() -> Result {
    let machine = machine();
    for first in [0, 100] {
        let c = cache(machine, &marked(), 200)?;
        warm(machine, &c, [1, 4, 5, 11].map(|i| first + i))?;
        let s = space(machine)?;
        s.map(at(AT, private(&c, first, WINDOW, R)))?;
        assert_eq!(fault(&s, page(AT, 8), Access::Read), End::Mapped(true, 4));
        assert_eq!(mapped(&s, AT, WINDOW), [1, 4, 5, 8, 11]);
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        for i in [1, 4, 5, 8, 11] {
            assert_eq!(cpu.load_u8(page(AT, i))?, mark(first + i));
        }
        // Where software marks entries, each neighbour takes a fault for it.
        let marked = s.account().faults.marked;
        assert_eq!(marked, if machine.config().sets_accessed { 0 } else { 4 });
        assert_eq!(cpu.counts().faults, marked, "all of them were mapped");
        check(&s);
    }
    Ok(())
}

#[test]
fn c50_without_a_table_the_first_neighbour_present_gets_its_own_slot() -> Result {
    let machine = machine();
    for first in 0..WINDOW {
        let fault_at = WINDOW - 1;
        let (s, _) = mapping(machine, WINDOW, [first, fault_at])?;
        assert_eq!(entry(&s, AT), (0, 3), "no table below the root");
        let neighbours = (first != fault_at) as u32;
        assert_eq!(fault(&s, page(AT, fault_at), Access::Read), End::Mapped(false, neighbours));
        let mut expected = vec![first, fault_at];
        expected.dedup();
        assert_eq!(mapped(&s, AT, WINDOW), expected);
        each_in_its_place(&s, WINDOW);
    }
    Ok(())
}

#[test]
fn c51_a_neighbour_that_cannot_be_mapped_is_dropped_and_the_others_go_on() -> Result {
    let machine = machine();
    let (s, c) = mapping(machine, WINDOW, 0..WINDOW)?;
    let frames: Vec<_> = (0..WINDOW).map(|i| cached_frame(machine, &c, i)).collect::<Result<_>>()?;
    c.set_size(machine, 14 * PAGE_SIZE);
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    cpu.store_u8(page(AT, 4), 200)?; // a private copy: its slot is taken
    assert_eq!(fault(&s, page(AT, 6), Access::Read), End::Mapped(false, 12));
    assert_eq!(mapped(&s, AT, WINDOW), (0..14).collect::<Vec<_>>());
    for (i, pfn) in frames[..14].iter().enumerate() {
        let expected = if i == 4 { (1, 0) } else { (2, 1) };
        assert_eq!(counts(machine, *pfn), expected, "page {i}");
    }
    assert_eq!(cpu.load_u8(page(AT, 4))?, 200);
    check(&s);
    Ok(())
}

#[test]
fn c52_a_neighbour_that_was_mapped_keeps_its_reference_and_is_free_for_others() -> Result {
    let machine = machine();
    let (s, c) = mapping(machine, 4, 0..4)?;
    assert_eq!(fault(&s, AT, Access::Read), End::Mapped(false, 3));
    let neighbour = frame(&s, page(AT, 2)).ok_or("mapped around")?;
    assert_eq!(counts(machine, neighbour), (2, 1));
    assert_eq!(c.evict(machine), 0, "mapped pages stay");
    let other = space(machine)?;
    other.map(at(AT, shared(&c, 0, 4, RW)))?;
    assert_eq!(fault(&other, page(AT, 2), Access::Write), End::Mapped(false, 0));
    assert_eq!((frame(&other, page(AT, 2)), counts(machine, neighbour)), (Some(neighbour), (3, 2)));
    other.unmap(AT, 4 * PAGE_SIZE)?;
    s.unmap(AT, 4 * PAGE_SIZE)?;
    assert_eq!(counts(machine, neighbour), (1, 0));
    Ok(())
}

#[test]
fn c55_the_window_is_a_power_of_two_aligned_to_itself_and_not_scanned() -> Result {
    let machine = machine();
    let pages = 3 * 512;
    let c = cache(machine, &marked(), pages)?;
    warm(machine, &c, 0..pages)?;
    for window in (0..=9).map(|n| 1u64 << n) {
        let policy = policy().with_fault_around(window * PAGE_SIZE).ok_or("a window")?;
        let s = space_with(machine, policy)?;
        // The mapping starts in the middle of a window of any size, and of a table.
        let first = page(AT, 511);
        s.map(at(first, private(&c, 0, pages - 1, R)))?;
        for i in [0, 1, 2, 300, 513, 700] {
            s.discard(first, (pages - 1) * PAGE_SIZE)?;
            let absolute = 511 + i;
            let from = (absolute & !(window - 1)).max(511) - 511;
            let to = (absolute | (window - 1)) - 511;
            let before = machine.counts();
            let end = fault(&s, page(first, i), Access::Read);
            let spent = machine.counts() - before;
            assert_eq!(end, End::Mapped(false, (to - from) as u32), "window {window}, page {i}");
            assert_eq!(mapped(&s, first, pages - 1), (from..=to).collect::<Vec<_>>());
            // One table is locked, once, and none has its entries scanned: whether around is worth it is not asked.
            assert_eq!((spent.locked(), spent.scanned()), (1, 0));
            // The same again with every neighbour there already.
            s.discard(page(first, i), PAGE_SIZE)?;
            let before = machine.counts();
            assert_eq!(fault(&s, page(first, i), Access::Read), End::Mapped(false, 0));
            let spent = machine.counts() - before;
            assert_eq!((spent.locked(), spent.scanned()), (1, 0));
        }
        check(&s);
    }
    Ok(())
}

#[test]
fn c56_the_window_never_leaves_its_table_or_the_mapping() -> Result {
    // Tables of four pages, a window of sixteen.
    let machine = machine_of::<Tiny>();
    let c = cache(machine, &marked(), 16)?;
    warm(machine, &c, 0..16)?;
    let s = space(machine)?;
    s.map(at(VirtAddr(2 * PAGE_SIZE), private(&c, 2, 12, R)))?;
    for (faulted, around) in [(6, 4..8), (3, 2..4), (13, 12..14)] {
        s.discard(VirtAddr(2 * PAGE_SIZE), 12 * PAGE_SIZE)?;
        let neighbours = (around.end - around.start - 1) as u32;
        assert_eq!(fault(&s, page(VirtAddr(0), faulted), Access::Read), End::Mapped(false, neighbours));
        assert_eq!(mapped(&s, VirtAddr(0), 16), around.collect::<Vec<_>>());
        assert_eq!(tables(&s), 2, "one table below the root");
    }
    for i in mapped(&s, VirtAddr(0), 16) {
        assert_eq!(first_byte(&s, page(VirtAddr(0), i)), Some(mark(i)));
    }
    check(&s);
    Ok(())
}

#[test]
fn c57_tables_are_reserved_only_where_one_is_missing() -> Result {
    let machine = machine();
    let (s, c) = mapping(machine, 64, 0..64)?;
    let spent = |i, end| {
        let before = machine.counts();
        assert_eq!(fault(&s, page(AT, i), Access::Read), end);
        let spent = machine.counts() - before;
        (spent.tables_allocated, spent.tables_freed, spent.locked())
    };
    // To look whether a table is there costs no lock: with and without it, one is taken, to install.
    assert_eq!(spent(0, End::Mapped(false, 15)), (3, 0, 1));
    assert_eq!(spent(16, End::Mapped(false, 15)), (0, 0, 1));
    assert_eq!(spent(16, End::Spurious), (0, 0, 0));
    c.set_size(machine, 32 * PAGE_SIZE);
    assert_eq!(spent(40, End::Error(FaultError::Bus(Bus::BeyondEnd))), (0, 0, 0));
    check(&s);
    Ok(())
}

#[test]
fn c58_without_memory_for_a_table_fault_around_leaves_nothing_and_the_fault_says_so() -> Result {
    let machine = machine();
    let (s, c) = mapping(machine, WINDOW, 0..WINDOW)?;
    let frames: Vec<_> = (0..WINDOW).map(|i| cached_frame(machine, &c, i)).collect::<Result<_>>()?;
    machine.vm().quiesce(machine);
    for free in 0..3 {
        let taken = machine.leave_free(free);
        assert_eq!(fault(&s, page(AT, 7), Access::Read), End::Error(FaultError::NoMemory));
        assert_eq!((mapped(&s, AT, WINDOW), tables(&s)), (vec![], 1));
        assert!(frames.iter().all(|pfn| counts(machine, *pfn) == (1, 0)));
        assert_eq!(machine.free_frames() + machine.vm().held(machine).cached_tables, free);
        drop(taken);
    }
    let taken = machine.leave_free(3);
    assert_eq!(fault(&s, page(AT, 7), Access::Read), End::Mapped(false, 15));
    drop(taken);
    check(&s);
    Ok(())
}

#[test]
fn c59_what_is_left_of_a_reserve_returns_before_the_fault_ends() -> Result {
    let machine = machine();
    let (s, _) = mapping(machine, 64, 0..64)?;
    let gate = Gate::new(2);
    // Two first faults in one empty range: one of them has reserved tables that it cannot use.
    let toucher = |first: u64| {
        let gate = gate.member();
        for _ in 0..300 {
            gate.pass();
            assert_eq!(fault(&s, page(AT, first), Access::Read), End::Mapped(false, 15));
            if gate.pass() {
                // Nothing is held but what was published.
                assert_eq!((tables(&s), machine.vm().held(machine).tables), (4, 4));
                s.discard(AT, 64 * PAGE_SIZE).expect("mapped");
                s.quiesce();
                assert_eq!((tables(&s), machine.vm().held(machine).tables), (1, 1));
            }
            gate.pass();
        }
    };
    together(2, |n| toucher(32 * n), || ());
    Ok(())
}

#[test]
fn c61_with_nothing_cached_the_fault_reads_its_page_alone() -> Result {
    let machine = machine();
    let file = marked();
    let c = cache(machine, &file, WINDOW)?;
    let s = space(machine)?;
    s.map(at(AT, private(&c, 0, WINDOW, R)))?;
    for (i, around) in [(9, 0), (2, 0)] {
        assert_eq!(fault(&s, page(AT, i), Access::Read), End::Mapped(true, around));
    }
    assert_eq!((file.reads(), c.pages()), (2, 2));
    assert_eq!(mapped(&s, AT, WINDOW), [2, 9]);
    Ok(())
}

#[test]
fn c62_the_faults_own_slot_decides_wherever_it_lies_in_the_window() -> Result {
    let machine = machine();
    for own in 0..WINDOW {
        let (file, hook) = hooked();
        let c = cache(machine, &file, WINDOW)?;
        warm(machine, &c, (0..WINDOW).filter(|i| *i != own))?;
        let s = space(machine)?;
        s.map(at(AT, private(&c, 0, WINDOW, RW)))?;
        // Its neighbours are mapped by another meanwhile; its own slot is still empty, so it goes on.
        let inner = s.clone();
        let other = (own + 5) % WINDOW;
        hook.arm(own, move || {
            assert_eq!(fault(&inner, page(AT, other), Access::Read), End::Mapped(false, 14));
        });
        assert_eq!(fault(&s, page(AT, own), Access::Read), End::Mapped(true, 0));
        assert_eq!(mapped(&s, AT, WINDOW).len() as u64, WINDOW);
        each_in_its_place(&s, WINDOW);

        // Its own slot is filled meanwhile, and is all that is: the fault is settled, whatever is cached.
        c.evict(machine);
        s.unmap(AT, WINDOW * PAGE_SIZE)?;
        c.evict(machine);
        warm(machine, &c, (0..WINDOW).filter(|i| *i != own))?;
        s.map(at(AT, private(&c, 0, WINDOW, RW)))?;
        let inner = s.clone();
        hook.arm(own, move || {
            inner.map(at(AT, anonymous(WINDOW, RW))).expect("mapped over");
            assert_eq!(fault(&inner, page(AT, own), Access::Write), End::Mapped(false, 0));
        });
        assert_eq!(fault(&s, page(AT, own), Access::Read), End::Spurious);
        assert_eq!((mapped(&s, AT, WINDOW), first_byte(&s, page(AT, own))), (vec![own], Some(0)));
        check(&s);
    }
    Ok(())
}

#[test]
fn c65_fault_around_is_for_reads_of_files_with_a_window_and_settles_at_once() -> Result {
    let machine = machine();
    let c = cache(machine, &marked(), WINDOW)?;
    warm(machine, &c, 0..WINDOW)?;
    let alone = |window: u64, map, access| -> Result<(End, usize)> {
        let s = space_with(machine, policy().with_fault_around(window).ok_or("a window")?)?;
        s.map(at(AT, map))?;
        let before = machine.counts();
        let end = fault(&s, page(AT, 5), access);
        let locked = (machine.counts() - before).locked();
        assert_eq!(locked, 1, "what it maps, it maps in one locked section, and returns");
        Ok((end, mapped(&s, AT, WINDOW).len()))
    };
    let (one, all) = ((End::Mapped(false, 0), 1), (End::Mapped(false, 15), 16));
    assert_eq!(alone(64 << 10, private(&c, 0, WINDOW, R), Access::Read)?, all);
    assert_eq!(alone(64 << 10, shared(&c, 0, WINDOW, RW), Access::Read)?, all);
    assert_eq!(alone(4 << 10, private(&c, 0, WINDOW, R), Access::Read)?, one);
    assert_eq!(alone(64 << 10, private(&c, 0, WINDOW, RW), Access::Write)?, one);
    assert_eq!(alone(64 << 10, shared(&c, 0, WINDOW, RW), Access::Write)?, one);
    assert_eq!(alone(64 << 10, anonymous(WINDOW, RW), Access::Read)?, one);
    Ok(())
}

#[test]
fn r08_fault_around_maps_all_but_the_page_that_faulted_and_the_fault_goes_on() -> Result {
    let machine = machine();
    for own in 0..WINDOW {
        let (s, c) = mapping(machine, WINDOW, (0..WINDOW).filter(|i| *i != own))?;
        assert_eq!(fault(&s, page(AT, own), Access::Read), End::Mapped(true, 15));
        assert_eq!((mapped(&s, AT, WINDOW).len() as u64, c.pages()), (WINDOW, WINDOW));
        each_in_its_place(&s, WINDOW);
        check(&s);
    }
    Ok(())
}

/// One fault at `fault_at` in a mapping over `range`; what is mapped afterwards, all of it in its place.
fn r09_try(
    machine: &'static Machine,
    c: &Cache,
    range: VirtRange,
    fault_at: VirtAddr,
    memory: Option<u64>,
) -> Result<(End, Vec<u64>)> {
    let s: Space<X86_64> = space_with(machine, policy().with_fault_around(64 << 10).ok_or("a window")?)?;
    s.map(at(range.start, private(c, 0, range.pages(), R)))?;
    let taken = memory.map(|n| machine.leave_free(n));
    let end = fault(&s, fault_at, Access::Read);
    drop(taken);
    let found = mapped(&s, range.start, range.pages());
    for i in &found {
        assert_eq!(first_byte(&s, page(range.start, *i)), Some(mark(*i)));
    }
    // The fault stands at its own address, with nothing in hand.
    assert_eq!(check(&s).present, found.len() as u64);
    match end {
        End::Mapped(_, around) => {
            assert!(found.contains(&((fault_at.0 - range.start.0) / PAGE_SIZE)));
            assert_eq!(found.len() as u32, around + 1);
            assert_eq!(fault(&s, fault_at, Access::Read), End::Spurious);
        }
        _ => assert_eq!(found, []),
    }
    s.unmap(range.start, range.len())?;
    s.quiesce();
    assert_eq!(machine.vm().held(machine).tables, 1);
    Ok((end, found))
}

#[test]
fn r09_the_fault_is_anywhere_in_a_window_cut_by_mapping_and_table() -> Result {
    let machine = machine();
    let table = VirtAddr(AT.0 + LEAF);
    // Windows of 16 pages lie at multiples of 16 pages. Start and end of the mapping, in pages from a table's start.
    for (start, end) in [(0i64, 16i64), (3, 16), (0, 9), (3, 9), (-16, 16), (-5, 5), (-20, -7), (7, 8)] {
        let place = |i: i64| VirtAddr(table.0.wrapping_add_signed(i * PAGE_SIZE as i64));
        let range = VirtRange::new(place(start), place(end));
        let len = (end - start) as u64;
        for fault_page in start..end {
            let own = (fault_page - start) as u64;
            let window = fault_page.div_euclid(16) * 16;
            let in_window: Vec<u64> =
                (window.max(start)..(window + 16).min(end)).map(|i| (i - start) as u64).collect();
            let name = format!("mapping {start}..{end}, fault at {fault_page}");
            let c = cache(machine, &marked(), len)?;
            let ends = |memory| r09_try(machine, &c, range, place(fault_page), memory);
            // Nothing cached: the page alone, read.
            assert_eq!(ends(None)?, (End::Mapped(true, 0), vec![own]), "{name}");
            c.evict(machine);
            // All cached but its own.
            warm(machine, &c, (0..len).filter(|i| *i != own))?;
            let around = in_window.len() as u32 - 1;
            assert_eq!(ends(None)?, (End::Mapped(true, around), in_window.clone()), "{name}");
            // All cached.
            assert_eq!(ends(None)?, (End::Mapped(false, around), in_window.clone()), "{name}");
            // No memory for the table.
            assert_eq!(ends(Some(1))?, (End::Error(FaultError::NoMemory), vec![]), "{name}");
            // The file ends right after the fault, then right before it.
            c.set_size(machine, (own + 1) * PAGE_SIZE);
            let below: Vec<u64> = in_window.iter().copied().filter(|i| *i <= own).collect();
            assert_eq!(ends(None)?, (End::Mapped(false, below.len() as u32 - 1), below), "{name}");
            c.set_size(machine, own * PAGE_SIZE);
            assert_eq!(ends(None)?, (End::Error(FaultError::Bus(Bus::BeyondEnd)), vec![]), "{name}");
        }
    }
    Ok(())
}
