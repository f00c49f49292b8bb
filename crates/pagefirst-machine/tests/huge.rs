//! Huge pages of private memory: where they go, what they cost, how they come apart.

mod kit;

use kit::{LEAF, NONE, R, RW, Result, Space, check, counts, entry, frame, page, space_with, tables};
use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::fault::{FaultError, Outcome};
use pagefirst::frame::Frame;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::{Advice, Map, MapError, Place, RemapTo, VmaFlags};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr};
use pagefirst_machine::{Config, Machine, Vcpu};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

const HUGE: u64 = 2 << 20;
const SMALL: u64 = HUGE / PAGE_SIZE;

fn machine() -> &'static Machine {
    Machine::new(Config { checks: true, memory: 32 << 20, cpus: 4, ..Config::default() })
}

fn policy(huge: HugePolicy) -> Policy {
    Policy { huge, ..kit::policy() }
}

/// A space with `len` bytes mapped at a multiple of 2 MiB.
fn always(len: u64) -> Result<(&'static Machine, Space, VirtAddr)> {
    let machine = machine();
    let space = space_with(machine, policy(HugePolicy::Always))?;
    let at = space.map(Map::anonymous(len, RW))?.range.start;
    assert!(at.is_aligned(HUGE));
    Ok((machine, space, at))
}

fn is_huge(space: &Space, at: VirtAddr) -> bool {
    let (raw, level) = entry(space, at);
    level == 1 && X86_64::frame(raw, 1).is_some()
}

/// Writes each page's number into it.
fn fill(cpu: &mut Vcpu, at: VirtAddr, pages: std::ops::Range<u64>) -> Result {
    for i in pages {
        cpu.store(page(at, i), &(i + 1).to_le_bytes())?;
    }
    Ok(())
}

fn holds(cpu: &mut Vcpu, at: VirtAddr, pages: std::ops::Range<u64>) -> Result {
    for i in pages {
        assert_eq!(cpu.load_u64(page(at, i))?, i + 1, "page {i}");
    }
    Ok(())
}

fn is_zero(cpu: &mut Vcpu, at: VirtAddr, pages: std::ops::Range<u64>) -> Result {
    for i in pages {
        assert_eq!(cpu.load_u64(page(at, i))?, 0, "page {i}");
    }
    Ok(())
}

/// Nothing is left once the space is gone: no table, no page, no huge zero page.
fn nothing_left(machine: &'static Machine, space: Space) {
    drop(space);
    machine.vm().quiesce(machine);
    let held = machine.vm().held(machine);
    assert_eq!((held.tables, held.objects, held.in_limbo), (0, 0, 0), "{held:?}");
    assert_eq!(machine.counts().live_frames(), held.frames);
}

#[test]
fn huge_write_takes_one_entry_and_no_leaf_table() -> Result {
    let (machine, space, at) = always(2 * HUGE)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    cpu.store(page(at, 77), b"x")?;
    assert!(is_huge(&space, at) && is_huge(&space, page(at, 511)) && !is_huge(&space, page(at, 512)));
    let account = space.account();
    assert_eq!((account.anon_bytes, account.huge_bytes), (HUGE, HUGE));
    assert_eq!((account.faults.anon_write, account.faults.huge, account.faults.no_huge), (1, 1, 0));
    assert_eq!(tables(&space), 3, "root and two: no table of small pages");
    is_zero(&mut cpu, at, 0..77)?;
    is_zero(&mut cpu, at, 78..512)?;
    assert_eq!((cpu.counts().faults, cpu.counts().huge), (1, 1));
    check(&space);
    cpu.leave();
    nothing_left(machine, space);
    Ok(())
}

#[test]
fn huge_pages_follow_policy_and_advice() -> Result {
    let machine = machine();
    let cases = [
        (HugePolicy::Never, None, false),
        (HugePolicy::Never, Some(Advice::Huge), false),
        (HugePolicy::Advise, None, false),
        (HugePolicy::Advise, Some(Advice::Huge), true),
        (HugePolicy::Advise, Some(Advice::NoHuge), false),
        (HugePolicy::Always, None, true),
        (HugePolicy::Always, Some(Advice::NoHuge), false),
    ];
    for (huge, advice, expected) in cases {
        let space = space_with(machine, policy(huge))?;
        let at = space.map(Map::anonymous(HUGE, RW))?.range.start;
        if let Some(advice) = advice {
            space.advise(at, HUGE, advice)?;
        }
        let _ = space.fault(at, Access::Write);
        assert_eq!(is_huge(&space, at), expected, "{huge:?} {advice:?}");
        check(&space);
    }
    Ok(())
}

#[test]
fn huge_pages_stay_inside_one_mapping_and_leave_tables_alone() -> Result {
    let (_, space, at) = always(4 * HUGE)?;
    // The first 2 MiB lose their first page, the second have a small page already.
    space.unmap(at, PAGE_SIZE)?;
    space.advise(VirtAddr(at.0 + HUGE), HUGE, Advice::NoHuge)?;
    let _ = space.fault(VirtAddr(at.0 + HUGE), Access::Write);
    space.advise(VirtAddr(at.0 + HUGE), HUGE, Advice::Huge)?;
    for i in [1, 513, 1024] {
        let _ = space.fault(page(at, i), Access::Write);
    }
    assert_eq!([1, 513, 1024].map(|i| is_huge(&space, page(at, i))), [false, false, true]);
    check(&space);
    Ok(())
}

#[test]
fn huge_zero_page_is_read_for_nothing_and_replaced_by_a_write() -> Result {
    let (machine, space, at) = always(2 * HUGE)?;
    let (mut here, before) = (machine.vcpu(), machine.vm().held(machine).frames);
    here.switch_to(&space);
    is_zero(&mut here, at, 0..2 * SMALL)?;
    assert_eq!(here.counts().faults, 2);
    assert!(is_huge(&space, at));
    assert_eq!(frame(&space, at), frame(&space, VirtAddr(at.0 + HUGE)));
    let account = space.account();
    assert_eq!((account.resident_bytes(), account.faults.anon_read, account.faults.huge), (0, 2, 2));
    assert_eq!(machine.vm().held(machine).frames - before, SMALL + 2, "one huge page and two tables");
    // Another CPU has the zero page cached when this one writes.
    let zero = frame(&space, at).ok_or("mapped")?;
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut there = machine.vcpu();
            there.switch_to(&space);
            there.load_u64(at).map(|_| there.load_u64(at))
        });
        reader.join().is_ok_and(|r| r.is_ok())
    });
    fill(&mut here, at, 0..SMALL)?;
    holds(&mut here, at, 0..SMALL)?;
    assert!(is_huge(&space, at) && frame(&space, at) != Some(zero));
    assert_eq!(counts(machine, zero).1, 1, "the second mapping of it");
    assert_eq!(space.account().anon_bytes, HUGE);
    check(&space);
    here.leave();
    nothing_left(machine, space);
    Ok(())
}

/// Takes every free huge page.
fn hoard(machine: &'static Machine) -> Vec<Frame<Machine>> {
    std::iter::from_fn(|| Frame::block(machine, 9).ok()).collect()
}

#[test]
fn c12_huge_pages_that_cannot_be_had_are_small_ones() -> Result {
    let (machine, space, at) = always(2 * HUGE)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    cpu.load_u64(at)?;
    assert!(is_huge(&space, at));
    let hoarded = hoard(machine);
    // A write to the huge zero page, a write and a read where nothing is.
    fill(&mut cpu, at, 3..4)?;
    fill(&mut cpu, at, SMALL + 5..SMALL + 6)?;
    is_zero(&mut cpu, at, 0..3)?;
    holds(&mut cpu, at, 3..4)?;
    is_zero(&mut cpu, at, 4..SMALL)?;
    assert!(!is_huge(&space, at) && !is_huge(&space, page(at, SMALL)));
    assert_eq!(space.account().anon_bytes, 2 * PAGE_SIZE);
    assert_eq!(space.account().faults.no_huge, 2);
    check(&space);
    drop(hoarded);
    cpu.leave();
    nothing_left(machine, space);
    Ok(())
}

#[test]
fn huge_zero_page_is_given_up_before_memory_is_out() -> Result {
    let machine = Machine::new(Config { checks: true, memory: 4 << 20, cpus: 1, ..Config::default() });
    let space = space_with(machine, policy(HugePolicy::Always))?;
    let at = space.map(Map::anonymous(HUGE, RW))?.range.start;
    let _ = space.fault(at, Access::Read);
    assert!(is_huge(&space, at));
    space.unmap(at, HUGE)?;
    // Small pages for everything there is; what the huge zero page holds is among it.
    let space = space_with(machine, policy(HugePolicy::Never))?;
    let at = space.map(Map::anonymous(4 << 20, RW))?.range.start;
    let pages =
        (0..1024).take_while(|i| matches!(space.fault(page(at, *i), Access::Write), Outcome::Mapped { .. }));
    let pages = pages.count() as u64;
    assert!(pages > machine.vm().frames.total_frames() - 32, "{pages} pages");
    check(&space);
    Ok(())
}

#[test]
fn huge_split_on_partial_unmap_keeps_the_rest() -> Result {
    let (machine, space, at) = always(3 * HUGE)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    fill(&mut cpu, at, 0..3 * SMALL)?;
    // From inside the first to inside the last: both are split, the middle one goes whole.
    space.unmap(page(at, 100), 2 * HUGE)?;
    check(&space);
    let account = space.account();
    assert_eq!((account.anon_bytes, account.huge_bytes), (HUGE, 0), "freed at once, not when the rest goes");
    assert_eq!(tables(&space), 5);
    holds(&mut cpu, at, 0..100)?;
    holds(&mut cpu, at, 2 * SMALL + 100..3 * SMALL)?;
    assert!(cpu.load_u64(page(at, 100)).is_err() && cpu.load_u64(page(at, 2 * SMALL + 99)).is_err());
    assert_eq!(counts(machine, frame(&space, at).ok_or("mapped")?), (1, 1));
    space.unmap(at, 100 * PAGE_SIZE)?;
    assert_eq!((space.account().anon_bytes, tables(&space)), ((SMALL - 100) * PAGE_SIZE, 4));
    cpu.leave();
    nothing_left(machine, space);
    Ok(())
}

#[test]
fn huge_split_keeps_accessed_and_dirty() -> Result {
    let (machine, space, at) = always(HUGE)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    fill(&mut cpu, at, 0..1)?;
    let both = Attrs::ACCESSED | Attrs::DIRTY;
    assert!(kit::attrs(&space, at).contains(both));
    space.unmap(at, PAGE_SIZE)?;
    for i in 1..SMALL {
        assert!(kit::attrs(&space, page(at, i)).contains(both | Attrs::WRITE), "x12 page {i}");
    }
    // What is clear stays clear.
    let space = space_with(machine, policy(HugePolicy::Always))?;
    let at = space.map(Map::anonymous(HUGE, RW))?.range.start;
    let _ = space.fault(at, Access::Read);
    space.unmap(at, PAGE_SIZE)?;
    assert_eq!(
        kit::attrs(&space, page(at, 1)) & (Attrs::DIRTY | Attrs::WRITE | Attrs::SPECIAL),
        Attrs::SPECIAL
    );
    Ok(())
}

#[test]
fn huge_split_on_partial_protect_and_discard() -> Result {
    let (machine, space, at) = always(2 * HUGE)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    fill(&mut cpu, at, 0..2 * SMALL)?;
    // All of one: it stays huge, and comes back writable.
    for prot in [R, NONE, RW] {
        space.protect(at, HUGE, prot)?;
        assert!(is_huge(&space, at), "{prot:?}");
        assert_eq!(cpu.load_u64(at).is_ok(), prot != NONE);
        assert_eq!(cpu.store(at, &1u64.to_le_bytes()).is_ok(), prot == RW);
        check(&space);
    }
    assert_eq!(cpu.counts().mapped, 2, "no fault after the first two mapped anything");
    // A part: split.
    space.protect(page(at, 10), 20 * PAGE_SIZE, R)?;
    assert!(!is_huge(&space, at) && is_huge(&space, page(at, SMALL)));
    holds(&mut cpu, at, 0..2 * SMALL)?;
    assert!(cpu.store(page(at, 29), b"x").is_err() && cpu.store(page(at, 10), b"x").is_err());
    fill(&mut cpu, at, 0..10)?;
    fill(&mut cpu, at, 30..SMALL)?;
    space.discard(page(at, SMALL + 1), 2 * PAGE_SIZE)?;
    holds(&mut cpu, at, 0..SMALL + 1)?;
    is_zero(&mut cpu, at, SMALL + 1..SMALL + 3)?;
    holds(&mut cpu, at, SMALL + 3..2 * SMALL)?;
    check(&space);
    // Discarded whole, it is huge again.
    space.discard(VirtAddr(at.0 + HUGE), HUGE)?;
    fill(&mut cpu, at, SMALL..SMALL + 1)?;
    assert!(is_huge(&space, page(at, SMALL)));
    cpu.leave();
    nothing_left(machine, space);
    Ok(())
}

#[test]
fn huge_zero_page_splits_into_zero_pages() -> Result {
    let (machine, space, at) = always(HUGE)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    cpu.load_u64(at)?;
    let zero = frame(&space, at).ok_or("mapped")?;
    space.protect(page(at, 1), PAGE_SIZE, R)?;
    assert_eq!(counts(machine, zero), (1, 0));
    assert_eq!(frame(&space, page(at, 9)), Some(machine.vm().zero_page()));
    assert_eq!(space.account().resident_bytes(), 0);
    fill(&mut cpu, at, 2..SMALL)?;
    is_zero(&mut cpu, at, 0..2)?;
    holds(&mut cpu, at, 2..SMALL)?;
    check(&space);
    cpu.leave();
    nothing_left(machine, space);
    Ok(())
}

#[test]
fn huge_pages_move_whole_where_they_fit_and_in_pieces_where_not() -> Result {
    for shift in [0, 5] {
        let (machine, space, at) = always(2 * HUGE)?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&space);
        fill(&mut cpu, at, 0..2 * SMALL)?;
        let to = VirtAddr(at.0 - 16 * HUGE + shift * PAGE_SIZE);
        assert_eq!(space.remap(at, 2 * HUGE, 2 * HUGE, RemapTo::Fixed(to))?, to);
        assert_eq!(is_huge(&space, page(to, 600)), shift == 0);
        assert_eq!(space.account().huge_bytes, if shift == 0 { 2 * HUGE } else { 0 });
        assert_eq!(space.account().anon_bytes, 2 * HUGE);
        check(&space);
        holds(&mut cpu, to, 0..2 * SMALL)?;
        assert!(cpu.load_u64(at).is_err());
        assert_eq!(space.account().anon_bytes, 2 * HUGE);
        cpu.leave();
        nothing_left(machine, space);
    }
    Ok(())
}

#[test]
fn huge_split_on_partial_remap() -> Result {
    let (machine, space, at) = always(3 * HUGE)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    fill(&mut cpu, at, 0..3 * SMALL)?;
    // The middle, from inside one huge page to inside another, to a place where a huge page is cut at both ends.
    let there = space.map(Map::anonymous(4 * HUGE, RW))?.range.start;
    fill(&mut cpu, there, 0..4 * SMALL)?;
    let to = page(there, 1);
    assert_eq!(space.remap(page(at, 300), HUGE, 2 * HUGE, RemapTo::Fixed(to))?, to);
    check(&space);
    holds(&mut cpu, at, 0..300)?;
    holds(&mut cpu, at, 300 + SMALL..3 * SMALL)?;
    for i in 0..SMALL {
        assert_eq!(cpu.load_u64(page(to, i))?, i + 301);
    }
    is_zero(&mut cpu, to, SMALL..2 * SMALL)?;
    holds(&mut cpu, there, 0..1)?;
    holds(&mut cpu, there, 2 * SMALL + 1..4 * SMALL)?;
    // Shrunk in the middle of what is still huge.
    space.remap(page(at, 2 * SMALL), HUGE, PAGE_SIZE, RemapTo::InPlace)?;
    holds(&mut cpu, at, 2 * SMALL..2 * SMALL + 1)?;
    check(&space);
    cpu.leave();
    nothing_left(machine, space);
    Ok(())
}

#[test]
fn huge_split_on_advice_for_a_part() -> Result {
    let (machine, space, at) = always(2 * HUGE)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    fill(&mut cpu, at, 0..2 * SMALL)?;
    space.advise(page(at, SMALL), HUGE, Advice::NoHuge)?;
    assert!(is_huge(&space, at) && is_huge(&space, page(at, SMALL)), "those that are there stay");
    space.advise(at, 7 * PAGE_SIZE, Advice::NoHuge)?;
    assert!(!is_huge(&space, at), "no huge page lies in two mappings");
    let mut flags = Vec::new();
    space.for_each_vma(|v| flags.push((v.range.pages(), v.flags)));
    let no = VmaFlags::NO_HUGE;
    assert_eq!(flags, [(7, no), (SMALL - 7, VmaFlags::empty()), (SMALL, no)]);
    holds(&mut cpu, at, 0..2 * SMALL)?;
    check(&space);
    Ok(())
}

#[test]
fn huge_map_over_a_part_replaces_that_part() -> Result {
    let (machine, space, at) = always(HUGE)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    fill(&mut cpu, at, 0..SMALL)?;
    let place = Place::Fixed(page(at, 3));
    space.map(Map { place, ..Map::anonymous(PAGE_SIZE, R) })?;
    holds(&mut cpu, at, 0..3)?;
    is_zero(&mut cpu, at, 3..4)?;
    holds(&mut cpu, at, 4..SMALL)?;
    check(&space);
    Ok(())
}

/// A call that cuts two huge pages, by name.
type Call = (&'static str, fn(&Space, VirtAddr) -> std::result::Result<(), MapError>);

#[test]
fn huge_cut_without_memory_for_a_table_changes_nothing() -> Result {
    let calls: [Call; 6] = [
        ("unmap", |space, at| space.unmap(page(at, 1), HUGE)),
        ("protect", |space, at| space.protect(page(at, 1), HUGE, R)),
        ("discard", |space, at| space.discard(page(at, 1), HUGE)),
        ("advise", |space, at| space.advise(page(at, 1), HUGE, Advice::NoHuge)),
        ("map over", |space, at| {
            space.map(Map { place: Place::Fixed(page(at, 1)), ..Map::anonymous(HUGE, RW) }).map(drop)
        }),
        ("remap", |space, at| {
            space.remap(page(at, 1), HUGE, HUGE, RemapTo::Fixed(VirtAddr(at.0 - 64 * HUGE))).map(drop)
        }),
    ];
    for (name, call) in calls {
        let (machine, space, at) = always(2 * HUGE)?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&space);
        fill(&mut cpu, at, 0..2 * SMALL)?;
        let (vmas, account) = (kit::vmas(&space), space.account());
        // Each with one frame more, until it succeeds: whatever it lacks, nothing has changed.
        let mut failed = 0;
        for frames in 0.. {
            let _taken = machine.leave_free(frames);
            match call(&space, at) {
                Ok(()) => break,
                Err(error) => assert_eq!(error, MapError::NoMemory, "{name} with {frames} frames"),
            }
            failed += 1;
            assert_eq!(kit::vmas(&space), vmas, "{name} with {frames} frames");
            assert_eq!(space.account(), account, "{name} with {frames} frames");
            assert!(is_huge(&space, at) && is_huge(&space, page(at, SMALL)));
            check(&space);
        }
        assert!(failed > 1, "{name} needs two tables, and failed {failed} times");
        assert!(!is_huge(&space, at));
        holds(&mut cpu, at, 0..1)?;
        holds(&mut cpu, at, SMALL + 1..2 * SMALL)?;
        check(&space);
    }
    Ok(())
}

#[test]
fn huge_populate_and_protect_to_execute() -> Result {
    let (machine, space, _) = always(HUGE)?;
    let exec = Prot::READ | Prot::EXEC;
    let map = Map { populate: true, ..Map::anonymous(4 * HUGE, RW) };
    let mapped = space.map(map)?;
    assert!(mapped.unpopulated.is_none());
    assert_eq!((space.account().faults.huge, space.account().huge_bytes), (4, 4 * HUGE));
    space.protect(mapped.range.start, 4 * HUGE, exec)?;
    assert!(kit::attrs(&space, mapped.range.start).contains(Attrs::EXEC));
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    cpu.fetch(page(mapped.range.start, 3))?;
    assert!(cpu.store(mapped.range.start, b"x").is_err());
    check(&space);
    Ok(())
}

/// R03, R15: threads write to pages of their own while a mapping call splits, discards, and lets the huge page come
/// back; no write of a page that stays is lost.
#[test]
fn r15_split_against_faults_and_stores_loses_nothing() -> Result {
    let (machine, space, at) = always(2 * HUGE)?;
    let stop = AtomicBool::new(false);
    let user = |n: u64| {
        let mut cpu = machine.vcpu();
        cpu.switch_to(&space);
        let mut round = 0u64;
        while !stop.load(Acquire) {
            round += 1;
            // Page n of each huge page is this thread's; nobody discards it.
            for huge in 0..2 {
                let own = page(at, huge * SMALL + n);
                cpu.store(own, &round.to_le_bytes()).expect("mapped");
                cpu.load_u64(page(at, huge * SMALL + 100 + round % 300)).expect("mapped");
                assert_eq!(cpu.load_u64(own).expect("mapped"), round, "thread {n}");
            }
        }
    };
    kit::together(3, user, || {
        let _stop = kit::StopAtEnd(&stop);
        for i in 0..24u64 {
            let part = page(at, 16 + i % 400);
            match i % 4 {
                0 => space.discard(part, 3 * PAGE_SIZE).expect("mapped"),
                1 => space.protect(part, 50 * PAGE_SIZE, R).expect("mapped"),
                2 => space.advise(part, PAGE_SIZE, Advice::NoHuge).expect("mapped"),
                _ => space.advise(at, 2 * HUGE, Advice::Huge).expect("mapped"),
            }
            space.protect(at, 2 * HUGE, RW).expect("mapped");
            // A whole huge page goes as soon as its owners' pages need not stay: in a range of its own.
            let own = space.map(Map::anonymous(HUGE, RW)).expect("room").range.start;
            let _ = space.fault(own, Access::Write);
            space.unmap(page(own, i % SMALL), PAGE_SIZE).expect("mapped");
            space.unmap(own, HUGE).expect("mapped");
        }
    });
    check(&space);
    nothing_left(machine, space);
    Ok(())
}

/// R03, R04: faults on many pages of one range against each other and against discards of all of it: huge or small,
/// one of them wins, and nothing leaks.
#[test]
fn r04_huge_faults_against_discard() -> Result {
    let (machine, space, at) = always(HUGE)?;
    let (stop, faults) = (AtomicBool::new(false), std::sync::atomic::AtomicU64::new(0));
    let user = |n: u64| {
        let _stop = kit::StopAtEnd(&stop);
        let mut cpu = machine.vcpu();
        cpu.switch_to(&space);
        while !stop.load(Acquire) {
            let i = faults.fetch_add(1, Relaxed);
            let ended = match i % 3 {
                0 => cpu.load_u64(page(at, (i * 7 + n) % SMALL)).map(drop),
                _ => cpu.store(page(at, (i * 5 + n) % SMALL), b"x"),
            };
            // While all that is free is hoarded there may be too little for small pages.
            if let Err(trap) = ended {
                assert_eq!(trap.error, FaultError::NoMemory);
            }
        }
    };
    kit::together(3, user, || {
        let _stop = kit::StopAtEnd(&stop);
        let mut i = 0;
        kit::until(|| {
            let hoarded = if i % 8 == 0 { hoard(machine) } else { Vec::new() };
            space.discard(at, HUGE).expect("mapped");
            std::thread::yield_now();
            drop(hoarded);
            i += 1;
            i >= 40 && space.account().faults.huge > 0 || stop.load(Acquire)
        });
    });
    check(&space);
    assert!(space.account().faults.huge > 0);
    assert_eq!(LEAF, HUGE);
    nothing_left(machine, space);
    Ok(())
}

/// No huge page is left: the huge zero page gives way to small pages while others have it cached. Who is told that a
/// page was written does not read zero from it.
#[test]
fn huge_zero_page_is_not_read_where_a_page_was_written() -> Result {
    let config = Config { memory: 32 << 20, cpus: 4, late_shootdown: 100, ..Config::default() };
    let machine = Machine::new(config);
    let space = space_with(machine, policy(HugePolicy::Always))?;
    let at = space.map(Map::anonymous(2 * HUGE, RW))?.range.start;
    let _ = space.fault(page(at, SMALL), Access::Write); // so that the table of huge pages stays
    let _ = space.fault(at, Access::Read);
    let _hoarded = hoard(machine);
    const ROUNDS: u64 = 2000;
    let (gate, told) = (kit::Gate::new(3), AtomicBool::new(false));
    let writer = |n: u64| {
        let (gate, _told) = (gate.member(), kit::StopAtEnd(&told));
        let mut cpu = machine.vcpu();
        cpu.switch_to(&space);
        for _ in 0..ROUNDS {
            gate.pass();
            cpu.store(page(at, [1, 7][n as usize]), &1u64.to_le_bytes()).expect("mapped");
            if n == 1 {
                told.store(true, std::sync::atomic::Ordering::Release);
            }
            gate.pass();
        }
    };
    let mut stale = 0;
    kit::together(2, writer, || {
        let gate = gate.member();
        let mut cpu = machine.vcpu();
        cpu.switch_to(&space);
        for _ in 0..ROUNDS {
            space.discard(at, HUGE).expect("mapped");
            told.store(false, Relaxed);
            let _ = cpu.load_u64(page(at, 7));
            gate.pass();
            while !told.load(Acquire) {
                let _ = cpu.load_u64(page(at, 100));
            }
            stale += (cpu.load_u64(page(at, 7)).expect("mapped") != 1) as u64;
            gate.pass();
        }
    });
    assert_eq!(stale, 0, "of {ROUNDS} rounds");
    Ok(())
}
