//! Read-ahead: what is read before it is wanted, and what is not.

mod kit;

use kit::*;
use pagefirst::fault::{Bus, FaultError, Outcome};
use pagefirst::file::ShmemHuge;
use pagefirst::space::{Advice, MapError};
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr, VirtRange};
use pagefirst_machine::{Late, Machine, MachineFile};
use std::time::Duration;

const AT: VirtAddr = VirtAddr(1 << 30);
const PAGES: u64 = 512;

/// A machine, a space without fault-around, a file of which up to 32 pages are read ahead, mapped whole at `AT`.
fn stage(file: MachineFile) -> Result<(&'static Machine, Space, MachineFile, Cache)> {
    let machine = machine();
    let file = file.with_read_ahead(32);
    let cache = cache(machine, &file, PAGES)?;
    let space = space_with(machine, policy().with_fault_around(PAGE_SIZE).ok_or("a window")?)?;
    space.map(at(AT, shared(&cache, 0, PAGES, RW)))?;
    Ok((machine, space, file, cache))
}

/// Accesses a page as a program does; tells which reads began meanwhile.
fn touch(s: &Space, file: &MachineFile, i: u64) -> Result<Vec<u64>> {
    let mut outcome = s.fault(page(AT, i), Access::Read);
    let began = file.pending();
    while let Outcome::Blocked(ticket) = outcome {
        while file.finish_one() {}
        outcome = s.retry(page(AT, i), Access::Read, ticket);
    }
    while file.finish_one() {}
    assert!(matches!(outcome, Outcome::Mapped { .. } | Outcome::Spurious), "page {i}: {outcome:?}");
    assert_eq!(first_byte(s, page(AT, i)), Some(mark(i)));
    Ok(began)
}

fn range(from: u64, to: u64) -> Vec<u64> {
    (from..to).collect()
}

#[test]
fn a_sequence_is_read_ahead_in_windows_that_grow() -> Result {
    let (machine, s, file, c) = stage(marked().late(Late::Held))?;
    let mut waited = 0;
    for i in 0..PAGES {
        let began = touch(&s, &file, i)?;
        let expected = match i {
            0 => range(0, 4),
            2 => range(4, 8),
            4 => range(8, 16),
            8 => range(16, 32),
            16 => range(32, 64),
            i if i % 32 == 0 => range(i + 32, (i + 64).min(PAGES)),
            _ => vec![],
        };
        assert_eq!(began, expected, "page {i}");
        waited += u64::from(i == 0);
    }
    assert_eq!((file.reads(), s.account().faults.blocked), (PAGES, waited), "all but the first were there");
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}

#[test]
fn what_is_wanted_here_and_there_is_read_alone() -> Result {
    let (machine, s, file, c) = stage(marked().late(Late::Held))?;
    for i in [100, 300, 200, 7, 400] {
        assert_eq!(touch(&s, &file, i)?, [i]);
    }
    // Two that read in sequence do not disturb each other.
    assert_eq!(touch(&s, &file, 101)?, range(101, 105));
    assert_eq!(touch(&s, &file, 301)?, range(301, 305));
    assert_eq!(touch(&s, &file, 102)?, []);
    assert_eq!(touch(&s, &file, 103)?, range(105, 109));
    assert_eq!(touch(&s, &file, 303)?, range(305, 309));
    // Not beyond the end.
    assert_eq!(touch(&s, &file, PAGES - 2)?, [PAGES - 2]);
    assert_eq!(touch(&s, &file, PAGES - 1)?, [PAGES - 1]);
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}

#[test]
fn advice_makes_it_more_or_none() -> Result {
    let (machine, s, file, c) = stage(marked().late(Late::Held))?;
    s.advise(AT, 100 * PAGE_SIZE, Advice::Random)?;
    s.advise(page(AT, 100), 200 * PAGE_SIZE, Advice::Sequential)?;
    assert_eq!(vmas(&s).len(), 3);
    assert_eq!((touch(&s, &file, 0)?, touch(&s, &file, 1)?), (vec![0], vec![1]));
    assert_eq!(touch(&s, &file, 150)?, range(150, 214));
    assert_eq!(touch(&s, &file, 182)?, range(214, 278));
    s.advise(AT, 300 * PAGE_SIZE, Advice::Normal)?;
    assert_eq!(vmas(&s).len(), 1);
    assert_eq!(touch(&s, &file, 2)?, range(2, 6));
    // What will be needed, whatever is there already, and holes are told of.
    s.advise(page(AT, 400), 100 * PAGE_SIZE, Advice::WillNeed)?;
    assert_eq!(file.pending(), range(400, 500));
    let hole = VirtRange::new(page(AT, PAGES), page(AT, PAGES + 1));
    let told = s.advise(page(AT, 498), (PAGES - 497) * PAGE_SIZE, Advice::WillNeed);
    assert_eq!(told, Err(MapError::NotMapped(hole)));
    assert_eq!(file.pending(), range(400, PAGES));
    c.will_need(machine, 0, 10);
    assert_eq!(file.pending().last(), Some(&9));
    while file.finish_one() {}
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}

#[test]
fn marked_pages_are_not_mapped_around_others() -> Result {
    let (machine, _, file, c) = stage(marked().late(Late::Held))?;
    let s = space(machine)?;
    s.map(at(AT, private(&c, 0, PAGES, R)))?;
    touch(&s, &file, 0)?;
    assert_eq!(mapped(&s, AT, 16), [0, 1, 3]);
    assert_eq!(touch(&s, &file, 2)?, range(4, 8));
    // A write to a private mapping and a read of the file take marks off too.
    assert!(s.protect(AT, PAGES * PAGE_SIZE, RW).is_ok());
    assert!(matches!(s.fault(page(AT, 4), Access::Write), Outcome::Mapped { .. }));
    assert_eq!(file.pending(), range(8, 16));
    while file.finish_one() {}
    assert_eq!(c.read_at(machine, 8 * PAGE_SIZE, &mut [0])?, 1);
    assert_eq!(file.pending(), range(16, 32));
    while file.finish_one() {}
    drop((s, c));
    Ok(())
}

#[test]
fn it_ends_where_memory_does_and_pushes_nothing_out() -> Result {
    let (machine, s, file, c) = stage(marked().late(Late::Held))?;
    s.advise(AT, PAGES * PAGE_SIZE, Advice::Sequential)?;
    warm_late(&s, &file, 300)?;
    let before = c.pages();
    // For the page itself, and a few.
    let taken = machine.leave_free(6);
    let began = touch(&s, &file, 100)?;
    assert!(began.contains(&100) && began.len() <= 6, "{began:?}");
    assert_eq!(c.pages(), before + began.len() as u64);
    drop(taken);
    // A page that could not be read ahead is nobody's error.
    file.fail_reads(420, true);
    assert!(touch(&s, &file, 400)?.contains(&420));
    file.fail_reads(420, false);
    assert!(touch(&s, &file, 420)?.contains(&420));
    // Who waits for one that fails is told.
    file.fail_reads(460, true);
    s.discard(AT, PAGES * PAGE_SIZE)?;
    c.evict(machine);
    let ticket = {
        let Outcome::Blocked(first) = s.fault(page(AT, 440), Access::Read) else {
            return Err("there".into());
        };
        let Outcome::Blocked(ticket) = s.fault(page(AT, 460), Access::Read) else {
            return Err("there".into());
        };
        drop(first);
        ticket
    };
    while file.finish_one() {}
    let told = s.retry(page(AT, 460), Access::Read, ticket).error();
    assert_eq!(told, Some(FaultError::Bus(Bus::Io)));
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}

fn warm_late(s: &Space, file: &MachineFile, i: u64) -> Result {
    touch(s, file, i).map(drop)
}

/// Threads read a late file in sequence, each at its own place, while it is cut and grown.
#[test]
fn stress_of_read_ahead() -> Result {
    let machine = machine();
    let file = marked().with_read_ahead(16).late(Late::Within(Duration::from_micros(200)));
    let c = cache(machine, &file, PAGES)?;
    let read = |n: u64| {
        let s = space(machine).expect("memory");
        s.map(at(AT, shared(&c, 0, PAGES, R))).expect("room");
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        for round in 0..6 {
            for i in (n * 50..PAGES).step_by(1 + (round == 5) as usize * 7) {
                match cpu.load_u8(page(AT, i)) {
                    // What was cut off is zero when the file grows again.
                    Ok(byte) => assert!(byte == mark(i) || byte == 0 && i >= PAGES / 2, "page {i}: {byte}"),
                    Err(trap) => assert!(i >= PAGES / 2, "page {i}: {trap:?}"),
                }
            }
            s.discard(AT, PAGES * PAGE_SIZE).expect("mapped");
            c.evict(machine);
        }
        drop(cpu);
    };
    together(3, read, || {
        for _ in 0..50 {
            c.set_size(machine, PAGES / 2 * PAGE_SIZE);
            std::thread::sleep(Duration::from_micros(300));
            c.set_size(machine, PAGES * PAGE_SIZE);
            std::thread::sleep(Duration::from_micros(300));
        }
    });
    settle(&file);
    drop((c, file));
    machine.nothing_left().map_err(Into::into)
}

#[test]
fn a_hole_of_a_memory_file_is_read_without_memory() -> Result {
    let machine = machine();
    let c = cache(machine, &MachineFile::shmem(ShmemHuge::Never), 1024)?;
    c.write_at(machine, 3 * PAGE_SIZE, &[3])?;
    let mut bytes = vec![1; 1 << 20];
    assert_eq!(c.read_at(machine, 0, &mut bytes)?, 1 << 20);
    assert!(bytes.iter().enumerate().all(|(i, byte)| *byte == if i == 3 << 12 { 3 } else { 0 }));
    c.will_need(machine, 0, 1024);
    assert_eq!(c.pages(), 1);
    Ok(())
}
