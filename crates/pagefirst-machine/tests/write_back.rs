//! Write-back of shared pages while they are mapped and written to.

mod kit;

use kit::*;
use pagefirst::arch::Attrs;
use pagefirst::file::WriteBackError;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::{Config, Late, Machine, MachineFile};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

const AT: VirtAddr = VirtAddr(1 << 30);
const PAGES: u64 = 64;

fn stage(file: MachineFile) -> Result<(&'static Machine, Space, MachineFile, Cache)> {
    let machine = machine();
    let file = file.with_tracking(true);
    let c = cache(machine, &file, PAGES)?;
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, PAGES, RW)))?;
    Ok((machine, s, file, c))
}

// A file in memory, whose pages are writable from the first: that one was written, its entry alone says.
// catches: zap_loses_dirty
#[test]
fn x12_what_an_entry_says_was_written_is_dirty_when_it_is_taken_out() -> Result {
    let machine = machine();
    let c = cache(machine, &marked().with_tracking(false), PAGES)?;
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, PAGES, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    cpu.load_u8(AT)?;
    cpu.store_u8(AT, 77)?;
    s.unmap(AT, PAGES * PAGE_SIZE)?;
    c.evict(machine);
    s.map(at(AT, shared(&c, 0, PAGES, RW)))?;
    assert_eq!(cpu.load_u8(AT)?, 77, "dropped as if it were clean");
    Ok(())
}

/// Writable, and dirty, as the entry says.
fn marks(s: &Space, va: VirtAddr) -> (bool, bool) {
    let attrs = attrs(s, va);
    (attrs.contains(Attrs::WRITE), attrs.contains(Attrs::DIRTY))
}

#[test]
fn c68_what_was_written_back_is_clean_until_it_is_written_again() -> Result {
    let (machine, s, file, c) = stage(marked())?;
    let other = space(machine)?;
    other.map(at(page(AT, 7), shared(&c, 0, PAGES, RW)))?;
    s.map(at(page(AT, 100), private(&c, 0, PAGES, RW)))?;
    let mut cpu = machine.vcpu();
    for (round, byte) in [(1, 5), (2, 6), (3, 7)] {
        // By two spaces, both of which have a translation that allows it.
        cpu.switch_to(&other);
        cpu.store_u8(page(AT, 7), byte)?;
        cpu.switch_to(&s);
        cpu.load_u8(page(AT, 100))?;
        cpu.store_u8(AT, byte)?;
        let faults = cpu.counts().faults;
        cpu.store_u8(VirtAddr(AT.0 + 1), byte)?;
        assert_eq!(cpu.counts().faults, faults, "no fault while it is dirty");
        assert_eq!((marks(&s, AT), marks(&other, page(AT, 7))), ((true, true), (true, true)));
        assert_eq!(c.write_back(machine)?, 1);
        assert_eq!((marks(&s, AT), marks(&other, page(AT, 7))), ((false, false), (false, false)));
        assert_eq!((&file.stored(0)[..3], file.writes()), (&[byte, byte, 1][..], round));
        assert_eq!(c.write_back(machine)?, 0, "nothing was written");
        assert_eq!(cpu.load_u8(AT)?, byte);
    }
    assert_eq!(mapped(&s, AT, PAGES), [0], "nothing was taken out");
    // What was not written stays as it is.
    cpu.store_u8(page(AT, 1), 1)?;
    cpu.store_u8(page(AT, 2), 1)?;
    assert_eq!(c.write_back(machine)?, 2);
    check(&s);
    drop(cpu);
    drop((s, other));
    machine.vm().quiesce(machine);
    let pages = c.pages();
    assert_eq!(c.evict(machine), pages, "all are clean");
    drop(c);
    machine.nothing_left().map_err(Into::into)
}

// That they were written, the entry alone says, and it says so again after they were stored.
#[test]
fn x12_pages_that_are_written_without_a_fault_are_stored_and_stay_writable() -> Result {
    for (config, huge) in [(hardware(), false), (Config::harsh(1), false), (hardware(), true)] {
        let machine: &'static Machine = Machine::new(Config { memory: 32 << 20, ..config });
        let file = MachineFile::zeros();
        let file = if huge { file.with_folios(9) } else { file };
        let c = cache(machine, &file, 512)?;
        let s = space(machine)?;
        s.map(at(AT, shared(&c, 0, 512, RW)))?;
        let stores = if huge { 512 } else { 1 };
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        cpu.load_u8(AT)?;
        assert_eq!(c.write_back(machine)?, 0, "only read");
        for byte in [5, 6] {
            cpu.store_u8(AT, byte)?;
            assert_eq!((c.write_back(machine)?, file.stored(0)[0]), (stores, byte));
            assert_eq!((marks(&s, AT), c.write_back(machine)?), ((true, false), 0));
        }
        s.unmap(AT, 512 * PAGE_SIZE)?;
        let pages = c.pages();
        assert_eq!((c.write_back(machine)?, c.evict(machine)), (0, pages));
    }
    Ok(())
}

#[test]
fn what_cannot_be_stored_is_dirty_still() -> Result {
    let (machine, s, file, c) = stage(marked())?;
    fault(&s, AT, Access::Write);
    fault(&s, page(AT, 1), Access::Write);
    file.fail_writes(0, true);
    assert!(matches!(c.write_back(machine), Err(WriteBackError::Io(_))));
    assert_eq!((c.evict(machine), marks(&s, AT)), (0, (false, false)));
    assert!(matches!(c.write_back(machine), Err(WriteBackError::Io(_))));
    assert_eq!(file.writes(), 3, "the other was stored at once");
    file.fail_writes(0, false);
    assert_eq!((c.write_back(machine)?, c.write_back(machine)?), (1, 0));
    // No frame for a copy: nothing is stored, nothing lost.
    fault(&s, AT, Access::Write);
    let taken = machine.leave_free(0);
    assert!(matches!(c.write_back(machine), Err(WriteBackError::NoMemory(_))));
    drop(taken);
    assert_eq!(c.write_back(machine)?, 1);
    Ok(())
}

#[test]
fn pages_are_stored_later_and_written_to_meanwhile() -> Result {
    let (machine, s, file, c) = stage(marked().late(Late::Held).late_writes())?;
    drop(s.fault(AT, Access::Write));
    file.finish(0);
    s.copy_out(AT, &[50]).map_err(|e| e.to_string())?;
    assert_eq!(c.write_back(machine)?, 1);
    let ticket = c.storing(machine).ok_or("it is being stored")?;
    assert!(!ticket.is_ready() && file.pending() == [0]);
    // Written to meanwhile: what is stored is what it was, and it is dirty again. Not stored twice at a time.
    s.copy_out(AT, &[51]).map_err(|e| e.to_string())?;
    assert_eq!((c.write_back(machine)?, file.pending()), (0, vec![0]));
    assert!(file.finish(0) && ticket.is_ready() && c.storing(machine).is_none());
    assert_eq!(file.stored(0)[0], 50);
    drop(ticket);
    assert_eq!(c.write_back(machine)?, 1);
    // An error makes it dirty again; so does a driver that forgets it. It stays as long as it is being stored.
    s.unmap(AT, PAGES * PAGE_SIZE)?;
    assert_eq!(c.evict(machine), 0);
    file.fail_writes(0, true);
    file.finish(0);
    assert_eq!(c.evict(machine), 0, "dirty");
    file.fail_writes(0, false);
    assert_eq!(c.write_back(machine)?, 1);
    file.lose(0);
    assert_eq!((c.evict(machine), c.write_back(machine)?), (0, 1));
    file.finish(0);
    assert_eq!((file.stored(0)[0], c.evict(machine)), (51, 1));
    // Its file goes while it is being stored.
    c.write_at(machine, PAGES * PAGE_SIZE, &[1])?;
    assert_eq!(c.write_back(machine)?, 1);
    drop((s, c));
    machine.vm().quiesce(machine);
    assert!(file.finish(PAGES));
    machine.nothing_left().map_err(Into::into)
}

/// Counts a thread that has ended, also by a panic.
struct CountAtEnd<'a>(&'a AtomicU64);

impl Drop for CountAtEnd<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, SeqCst);
    }
}

/// Threads write to their own words of shared pages, of a file that is written back, evicted and cut all the time: what
/// they wrote last is in memory as long as the file is, and stored in the end.
fn stress(file: MachineFile, config: Config) -> Result {
    const WRITERS: u64 = 3;
    let machine: &'static Machine = Machine::new(Config { cpus: 8, memory: 16 << 20, ..config });
    let c = cache(machine, &file, PAGES)?;
    let ends = AtomicU64::new(0);
    let last: Vec<AtomicU64> = (0..WRITERS * PAGES).map(|_| AtomicU64::new(0)).collect();
    let place = |n: u64, i: u64| VirtAddr(page(AT, i).0 + 8 * n);
    let write = |n: u64| {
        let _ends = CountAtEnd(&ends);
        let s = space(machine).expect("memory");
        s.map(at(AT, shared(&c, 0, PAGES, RW))).expect("room");
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        let mut seed = n + 1;
        for count in 1..4_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let i = (seed >> 40) % PAGES;
            let before = cpu.load_u64(place(n, i)).expect("it is there");
            let known = last[(n * PAGES + i) as usize].load(SeqCst);
            assert!(before == known || known == 0, "page {i}: {before} where {known} was written");
            cpu.store_u64(place(n, i), count).expect("it is there");
            last[(n * PAGES + i) as usize].store(count, SeqCst);
            if seed >> 58 == 0 {
                s.discard(AT, PAGES * PAGE_SIZE).expect("mapped");
            }
        }
    };
    together(WRITERS, write, || {
        while ends.load(SeqCst) < WRITERS {
            c.write_back(machine).expect("it can be stored");
            c.evict(machine);
            if machine.free_frames() == 0 {
                break;
            }
        }
    });
    while c.storing(machine).is_some() || c.write_back(machine)? > 0 || !file.pending().is_empty() {
        std::thread::sleep(Duration::from_micros(50));
    }
    machine.vm().quiesce(machine);
    assert_eq!(c.pages(), c.evict(machine), "all are clean");
    for n in 0..WRITERS {
        for i in 0..PAGES {
            let known = last[(n * PAGES + i) as usize].load(SeqCst);
            let stored = file.stored(i);
            if known != 0 {
                let at = 8 * n as usize;
                assert_eq!(stored[at..at + 8], known.to_le_bytes(), "page {i}, word {n}: lost");
            }
        }
    }
    drop((c, file));
    machine.nothing_left().map_err(Into::into)
}

#[test]
fn x12_no_write_is_lost_to_write_back() -> Result {
    stress(marked().with_tracking(true), Config { checks: true, late_shootdown: 50, ..hardware() })
}

#[test]
fn x12_no_write_is_lost_to_write_back_on_harsh_hardware() -> Result {
    stress(marked().with_tracking(true), Config::harsh(3))
}

#[test]
fn x12_no_write_without_a_fault_is_lost_to_write_back() -> Result {
    stress(marked(), Config { checks: true, late_shootdown: 50, ..hardware() })?;
    stress(marked(), Config::harsh(4))
}

#[test]
fn x12_no_write_is_lost_when_reads_and_writes_end_later() -> Result {
    stress(
        marked().with_tracking(true).late(Late::Within(Duration::from_micros(100))).late_writes(),
        hardware(),
    )
}

#[test]
fn x12_a_huge_entry_and_those_of_a_child_are_write_protected_too() -> Result {
    let machine: &'static Machine = Machine::new(Config { memory: 32 << 20, ..hardware() });
    let file = MachineFile::zeros().with_folios(9).with_tracking(true);
    let c = cache(machine, &file, 512)?;
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, 512, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    cpu.store_u8(page(AT, 3), 7)?;
    assert_eq!((entry(&s, AT).1, marks(&s, AT)), (1, (true, true)), "a huge entry");
    let child: Space = std::sync::Arc::new(s.fork()?);
    for byte in [8, 9] {
        assert_eq!(c.write_back(machine)?, 512);
        assert_eq!((entry(&s, AT).1, marks(&s, AT), c.write_back(machine)?), (1, (false, false), 0));
        cpu.switch_to(&child);
        cpu.store_u8(page(AT, 3), byte)?;
        assert_eq!((c.write_back(machine)?, file.stored(3)[0]), (512, byte));
        cpu.switch_to(&s);
        assert_eq!(cpu.load_u8(page(AT, 3))?, byte);
        cpu.store_u8(page(AT, 4), byte)?;
    }
    check(&s);
    drop(cpu);
    drop((s, child, c));
    machine.nothing_left().map_err(Into::into)
}

// What is below the end is stored, and not in memory.
#[test]
fn a_write_beyond_the_end_keeps_what_is_stored_before_it() -> Result {
    let machine = machine();
    let file = marked().with_folios(3);
    let c = cache(machine, &file, 3)?;
    c.write_at(machine, 7 * PAGE_SIZE, &[7])?;
    assert_eq!((c.pages(), c.write_back(machine)?), (4, 4), "a folio that begins beyond the old end");
    for (index, byte) in [(0, mark(0)), (2, mark(2)), (6, 0), (7, 7)] {
        let mut seen = [99];
        c.read_at(machine, index * PAGE_SIZE, &mut seen)?;
        assert_eq!(seen, [byte], "page {index}");
    }
    Ok(())
}

#[test]
fn a_page_is_clean_beside_a_lost_private_copy_of_it() -> Result {
    let (machine, s, _, c) = stage(marked())?;
    let other = space(machine)?;
    other.map(at(AT, private(&c, 0, 4, RW)))?;
    fault(&other, AT, Access::Write);
    let copy = frame(&other, AT).ok_or("mapped")?;
    machine.vm().poison(machine, copy);
    other.lose_poisoned()?;
    fault(&s, AT, Access::Write);
    assert_eq!((c.write_back(machine)?, c.write_back(machine)?), (1, 0));
    Ok(())
}
