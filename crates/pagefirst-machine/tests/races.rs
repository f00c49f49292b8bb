//! Mapping calls, eviction and faults of several CPUs against each other, for a bounded time: sums of atomic additions
//! are exact, nobody reads what is gone, and nothing is left (r14).

mod kit;

use kit::*;
use pagefirst::fault::{FaultError, Segv};
use pagefirst::policy::Policy;
use pagefirst::space::{Map, RemapTo, VmaFlags};
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::{Machine, MachineFile, Trap, Vcpu};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

const AT: VirtAddr = VirtAddr(1 << 30);
const TIME: Duration = Duration::from_millis(700);

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// Runs `user` on `users` CPUs until `writer` has worked for a while on this one.
fn race(s: &Space, users: u64, user: impl Fn(&mut Vcpu, &mut Dice, u64) + Sync, mut writer: impl FnMut(u64)) {
    let stop = AtomicBool::new(false);
    let run = |number: u64| {
        let mut cpu = s.platform().vcpu();
        cpu.switch_to(s);
        let mut dice = Dice(number + 1);
        while !stop.load(Relaxed) {
            user(&mut cpu, &mut dice, number);
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..users).map(|n| scope.spawn(move || run(n))).collect();
        let end = Instant::now() + TIME;
        let mut rounds = 0;
        let stopping = StopAtEnd(&stop);
        while (Instant::now() < end || rounds < 50) && !threads.iter().any(|t| t.is_finished()) {
            writer(rounds);
            rounds += 1;
        }
        drop(stopping);
        assert!(threads.into_iter().all(|t| t.join().is_ok()), "a CPU found something wrong: see above");
    });
}

/// Nothing is mapped, or it may not be touched: what a race with a mapping call can come to.
fn is_gone(trap: Trap) -> bool {
    matches!(trap.error, FaultError::Segv(Segv::NotMapped | Segv::Access))
}

/// Checks the space, ends it, and that nothing is left.
fn finish(machine: &'static Machine, s: Space, c: Option<Cache>) -> Result {
    check(&s);
    s.quiesce();
    check(&s);
    drop(s);
    drop(c);
    Ok(machine.nothing_left()?)
}

#[test]
fn faults_against_unmapping_and_mapping_at_the_same_place() -> Result {
    const PAGES: u64 = 40;
    let machine = machine();
    let s = space(machine)?;
    // Across two leaf tables.
    let at_ = VirtAddr(AT.0 + LEAF - 20 * PAGE_SIZE);
    race(
        &s,
        3,
        |cpu, dice, number| {
            let i = dice.roll(PAGES);
            let va = page(at_, i);
            match cpu.load_u64(va) {
                Ok(found) => assert!(found == 0 || found >> 8 == i + 1, "page {i}: {found:#x}"),
                Err(trap) => assert!(is_gone(trap), "{trap}"),
            }
            if let Err(trap) = cpu.store_u64(va, (i + 1) << 8 | number) {
                assert!(is_gone(trap), "{trap}");
            }
        },
        |n| {
            let (first, len) = (n * 7 % PAGES, 1 + n * 3 % 17);
            let len = len.min(PAGES - first);
            match n % 3 {
                0 => drop(s.map(at(at_, anonymous(PAGES, RW))).expect("fixed")),
                1 => s.unmap(page(at_, first), len * PAGE_SIZE).expect("a range"),
                _ => s.unmap(at_, PAGES * PAGE_SIZE).expect("a range"),
            }
        },
    );
    s.unmap(at_, PAGES * PAGE_SIZE)?;
    assert_eq!((check(&s).present, tables(&s)), (0, 1), "nothing was left mapped");
    finish(machine, s, None)
}

#[test]
fn faults_against_protecting() -> Result {
    const PAGES: u64 = 24;
    let machine = machine();
    let s = space(machine)?;
    s.map(at(AT, anonymous(PAGES, RW)))?;
    let added = AtomicU64::new(0);
    let sums = |s: &Space| -> u64 {
        (0..PAGES).filter_map(|i| frame(s, page(AT, i))).map(|pfn| word(machine, pfn)).sum()
    };
    race(
        &s,
        3,
        |cpu, dice, _| match cpu.fetch_add_u64(page(AT, dice.roll(PAGES)), 1) {
            Ok(_) => drop(added.fetch_add(1, Relaxed)),
            Err(trap) => assert!(is_gone(trap), "{trap}"),
        },
        |n| {
            s.protect(AT, PAGES * PAGE_SIZE, if n % 2 == 0 { R } else { NONE }).expect("mapped");
            // From here no store succeeds, whatever the CPUs had cached.
            let before = sums(&s);
            (0..100).for_each(|_| std::hint::spin_loop());
            assert_eq!(sums(&s), before, "a write after its right was taken away");
            s.protect(page(AT, n % PAGES), PAGE_SIZE, RW).expect("mapped");
            s.protect(AT, PAGES * PAGE_SIZE, RW).expect("mapped");
        },
    );
    assert_eq!(sums(&s), added.load(Relaxed), "no addition is lost");
    assert_eq!(s.vma_count(), 1);
    finish(machine, s, None)
}

/// The first word of a frame.
fn word(machine: &'static Machine, pfn: pagefirst::types::Pfn) -> u64 {
    use pagefirst::platform::Platform;
    machine.cells(pfn)[0].load(Acquire)
}

#[test]
fn faults_against_discarding() -> Result {
    const PAGES: u64 = 24;
    let machine = machine();
    let s = space(machine)?;
    let c = cache(machine, &marked(), PAGES)?;
    let file_at = page(AT, PAGES);
    s.map(at(AT, anonymous(PAGES, RW)))?;
    s.map(at(file_at, private(&c, 0, PAGES, RW)))?;
    race(
        &s,
        3,
        |cpu, dice, number| {
            let i = dice.roll(2 * PAGES);
            let untouched = if i < PAGES { 0 } else { u64::from_le_bytes([mark(i - PAGES); 8]) };
            let found = cpu.load_u64(page(AT, i)).expect("mapped");
            assert!(found == untouched || found >> 8 == i + 1, "page {i}: {found:#x}");
            if dice.roll(2) == 0 {
                cpu.store_u64(page(AT, i), (i + 1) << 8 | number).expect("mapped");
            }
        },
        |n| {
            let first = n * 5 % PAGES;
            s.discard(page(AT, first), (2 * PAGES - first) * PAGE_SIZE).expect("mapped");
        },
    );
    s.discard(AT, 2 * PAGES * PAGE_SIZE)?;
    assert_eq!(tables(&s), 1);
    finish(machine, s, Some(c))
}

/// A mapping moves back and forth while others add to its pages, at whichever of the two places they find it.
fn moving(machine: &'static Machine, s: &Space, pages: u64, step: u64) -> Result {
    let away = VirtAddr((1 << 40) + 511 * PAGE_SIZE);
    let len = pages * step * PAGE_SIZE;
    let added: Vec<AtomicU64> = (0..pages).map(|_| AtomicU64::new(0)).collect();
    race(
        s,
        3,
        |cpu, dice, _| {
            let i = dice.roll(pages);
            let place = if dice.roll(2) == 0 { AT } else { away };
            match cpu.fetch_add_u64(VirtAddr(page(place, i * step).0 + 8), 1) {
                Ok(_) => drop(added[i as usize].fetch_add(1, Relaxed)),
                Err(trap) => assert!(is_gone(trap), "{trap}"),
            }
        },
        |n| {
            let (from, to) = if n % 2 == 0 { (AT, away) } else { (away, AT) };
            assert_eq!(s.remap(from, len, len, RemapTo::Fixed(to)), Ok(to));
            if n % 16 == 0 {
                assert_eq!(mapped(s, from, pages * step), [], "after the move to {to}");
            }
        },
    );
    let here = if s.remap(AT, len, len, RemapTo::InPlace).is_ok() { AT } else { away };
    let mut cpu = machine.vcpu();
    cpu.switch_to(s);
    for i in 0..pages {
        let base = cpu.load_u64(page(here, i * step))?;
        let found = cpu.load_u64(VirtAddr(page(here, i * step).0 + 8))?;
        assert_eq!(found.wrapping_sub(base), added[i as usize].load(Relaxed), "page {i}");
    }
    drop(cpu);
    s.unmap(here, len)?;
    assert_eq!((check(s).present, tables(s)), (0, 1), "nothing is left at either place");
    Ok(())
}

#[test]
fn r14_moving_memory_against_faults_at_both_ends() -> Result {
    let machine = machine();
    let s = space(machine)?;
    // Untouched at first, and in many tables: holes are filled while they move.
    s.map(at(AT, anonymous(12 * 97, RW)))?;
    moving(machine, &s, 12, 97)?;
    finish(machine, s, None)
}

#[test]
fn r14_moving_tables_come_and_go_while_the_source_fills() -> Result {
    let machine = machine();
    let s = space(machine)?;
    let (pages, away) = (64 * 512, VirtAddr(1 << 40));
    s.map(at(AT, anonymous(pages, RW)))?;
    race(
        &s,
        2,
        |cpu, dice, _| {
            let place = if dice.roll(2) == 0 { AT } else { away };
            if let Err(trap) = cpu.touch(page(place, 512 * dice.roll(64) + dice.roll(4)), Access::Write) {
                assert!(is_gone(trap), "{trap}");
            }
        },
        |n| {
            // Empty, as far as can be: whatever is there when it moves came since.
            let (from, to) = if n % 2 == 0 { (AT, away) } else { (away, AT) };
            s.discard(from, pages * PAGE_SIZE).expect("mapped");
            assert_eq!(s.remap(from, pages * PAGE_SIZE, pages * PAGE_SIZE, RemapTo::Fixed(to)), Ok(to));
        },
    );
    for place in [AT, away] {
        s.unmap(place, pages * PAGE_SIZE)?;
    }
    assert_eq!((check(&s).present, tables(&s)), (0, 1));
    finish(machine, s, None)
}

#[test]
fn r14_moving_a_file_against_faults_at_both_ends() -> Result {
    for is_shared in [true, false] {
        let machine = machine();
        let s = space(machine)?;
        let c = cache(machine, &marked(), 40)?;
        let map = if is_shared { shared(&c, 0, 40, RW) } else { private(&c, 0, 40, RW) };
        s.map(at(AT, map))?;
        moving(machine, &s, 40, 1)?;
        c.write_back(machine).map_err(|e| e.to_string())?;
        c.evict(machine);
        assert_eq!(c.pages(), 0, "no page has a mapping left");
        finish(machine, s, Some(c))?;
    }
    Ok(())
}

/// One CPU writes pages that others have read, and tells them how far it has come: they never read the old page again.
fn copies(machine: &'static Machine, s: &Space, pages: u64, old: impl Fn(u64) -> u64 + Sync) -> Result {
    for _ in 0..6 {
        // Both write every page, each its own word.
        let written = [AtomicU64::new(0), AtomicU64::new(0)];
        let (ready, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let reader = |cpu: &mut Vcpu| {
            (0..pages).for_each(|i| assert_eq!(cpu.load_u64(page(AT, i)), Ok(old(i))));
            ready.fetch_add(1, Release);
            let mut dice = Dice(3);
            while !stop.load(Acquire) && written.iter().any(|w| w.load(Acquire) < pages) {
                let which = dice.roll(2);
                let before = written[which as usize].load(Acquire);
                let i = (before + dice.roll(5)).saturating_sub(2).min(pages - 1);
                let found = cpu.load_u64(VirtAddr(page(AT, i).0 + 8 * which)).expect("mapped");
                assert!(found == !i || found == old(i), "page {i}: {found:#x}");
                assert!(i >= before || found == !i, "page {i} was written before, and reads {found:#x}");
            }
        };
        let writer = |cpu: &mut Vcpu, which: u64| {
            while ready.load(Acquire) < 2 && !stop.load(Acquire) {
                std::thread::yield_now();
            }
            for i in 0..pages {
                cpu.store_u64(VirtAddr(page(AT, i).0 + 8 * which), !i).expect("mapped");
                written[which as usize].store(i + 1, Release);
            }
        };
        let user = |number| {
            let mut stopping = Some(StopAtEnd(&stop));
            let mut cpu = machine.vcpu();
            cpu.switch_to(s);
            if number < 2 {
                reader(&mut cpu)
            } else {
                writer(&mut cpu, number % 2)
            }
            std::mem::forget(stopping.take()); // it went well
        };
        together(4, user, || ());
        check(s);
        s.discard(AT, pages * PAGE_SIZE)?;
    }
    Ok(())
}

#[test]
fn a_private_copy_is_never_overtaken_by_a_stale_read() -> Result {
    let machine = machine();
    let s = space(machine)?;
    let c = cache(machine, &marked(), 400)?;
    s.map(at(AT, private(&c, 0, 400, RW)))?;
    copies(machine, &s, 400, |i| u64::from_le_bytes([mark(i); 8]))?;
    finish(machine, s, Some(c))
}

#[test]
fn a_page_over_the_zero_page_is_never_overtaken_by_a_stale_read() -> Result {
    let machine = machine();
    let s = space(machine)?;
    s.map(at(AT, anonymous(400, RW)))?;
    copies(machine, &s, 400, |_| 0)?;
    finish(machine, s, None)
}

#[test]
fn writers_that_copy_the_same_page_lose_nothing() -> Result {
    const PAGES: u64 = 16;
    let machine = machine();
    let s = space(machine)?;
    let c = cache(machine, &MachineFile::zeros(), PAGES)?;
    s.map(at(AT, private(&c, 0, PAGES, RW)))?;
    for round in 0..150 {
        let gate = Gate::new(3);
        let writer = |number: u64| {
            let gate = gate.member();
            let mut cpu = machine.vcpu();
            cpu.switch_to(&s);
            if round % 2 == 0 {
                (0..PAGES).for_each(|i| assert_eq!(cpu.load_u64(page(AT, i)), Ok(0)));
            }
            gate.pass();
            for i in 0..PAGES {
                cpu.fetch_add_u64(page(AT, i), 1 << (8 * number)).expect("mapped");
            }
        };
        together(3, writer, || ());
        let sums: Vec<_> =
            (0..PAGES).filter_map(|i| frame(&s, page(AT, i))).map(|f| word(machine, f)).collect();
        assert_eq!(sums, [0x1_0101; PAGES as usize]);
        s.discard(AT, PAGES * PAGE_SIZE)?;
    }
    finish(machine, s, Some(c))
}

#[test]
fn two_threads_grow_one_stack() -> Result {
    let machine = machine();
    for _ in 0..20 {
        let s = space_with(machine, Policy { max_stack: 600 * PAGE_SIZE, ..policy() })?;
        let top = VirtAddr(AT.0 + (1 << 30));
        let low = |i: u64| VirtAddr(top.0 - (i + 1) * PAGE_SIZE);
        s.map(at(low(0), Map { flags: VmaFlags::GROWS_DOWN, ..anonymous(1, RW) }))?;
        let grower = |number| {
            let mut cpu = machine.vcpu();
            cpu.switch_to(&s);
            for i in (number..600).step_by(2) {
                cpu.store_u64(low(i), i + 1).expect("within the limit");
            }
        };
        together(2, grower, || {
            // Somebody else changes mappings meanwhile.
            for n in 0..60 {
                s.map(at(page(AT, n % 7), anonymous(1, RW))).expect("fixed");
                s.unmap(page(AT, n % 5), PAGE_SIZE).expect("a range");
            }
        });
        s.unmap(AT, 10 * PAGE_SIZE)?;
        assert_eq!(
            vmas(&s),
            [(low(599).0 / PAGE_SIZE, top.0 / PAGE_SIZE, RW)],
            "one stack, of all its pages"
        );
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        for i in 0..600 {
            assert_eq!(cpu.load_u64(low(i))?, i + 1);
        }
        assert!(cpu.load_u64(low(600)).is_err());
        drop(cpu);
        finish(machine, s, None)?;
    }
    Ok(())
}

#[test]
fn eviction_and_write_back_against_faults_lose_no_write() -> Result {
    const PAGES: u64 = 20;
    for tracks in [true, false] {
        let machine = machine();
        let file = MachineFile::zeros().with_tracking(tracks);
        let (s, c) = (space(machine)?, cache(machine, &file, PAGES)?);
        s.map(at(AT, shared(&c, 0, PAGES, RW)))?;
        let read_only = page(AT, 2 * PAGES);
        s.map(at(read_only, private(&c, 0, PAGES, R)))?;
        let added: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        race(
            &s,
            2,
            |cpu, dice, _| {
                let i = dice.roll(PAGES);
                let before = added[i as usize].load(Acquire);
                if dice.roll(2) == 0 {
                    cpu.load_u64(page(AT, i)).expect("mapped"); // the write that follows may need no fault
                }
                let found = cpu.load_u64(page(read_only, i)).expect("mapped");
                assert!(found >= before, "page {i} reads {found} after {before} additions");
                cpu.fetch_add_u64(page(AT, i), 1).expect("mapped");
                added[i as usize].fetch_add(1, Release);
            },
            |n| {
                let first = n * 3 % PAGES;
                let len = (PAGES - first) * PAGE_SIZE;
                s.discard(page(AT, first), len).expect("mapped");
                s.discard(page(read_only, first), len).expect("mapped");
                if n % 2 == 0 {
                    c.write_back(machine).expect("memory for a copy");
                }
                c.evict(machine);
            },
        );
        s.unmap(AT, 3 * PAGES * PAGE_SIZE)?;
        c.write_back(machine)?;
        c.evict(machine);
        assert_eq!(c.pages(), 0, "stored and not mapped: all of them can go");
        for (i, added) in added.iter().enumerate() {
            let stored = file.stored(i as u64);
            let found = stored.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
            assert_eq!(found, added.load(Relaxed), "page {i}");
        }
        finish(machine, s, Some(c))?;
    }
    Ok(())
}
