//! What the main job is done by: table bytes follow the mapped pages, faults that fail cost no table, and calls cost
//! what is mapped, not what is addressed.

mod kit;

use kit::*;
use pagefirst::Held;
use pagefirst::arch::{Format, X86_64};
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::file::{FileCache, ShmemHuge};
use pagefirst::limit::Limit;
use pagefirst::policy::{FaultAround, Policy, TablePolicy};
use pagefirst::space::Map;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::{Config, Machine, MachineFile};

const RANGES: u64 = 4_096;
const FAULTS: u64 = 10_000;
const BASE: VirtAddr = VirtAddr(1 << 40);
/// What one entry of the root spans.
const TOP: u64 = 512 << 30;

fn range(i: u64) -> VirtAddr {
    VirtAddr(BASE.0 + i * LEAF)
}

fn roomy() -> &'static Machine {
    Machine::new(Config { checks: true, memory: 256 << 20, ..Config::default() })
}

#[test]
fn done_after_discards_table_bytes_are_where_they_began() -> Result {
    let machine = roomy();
    let s = space(machine)?;
    s.map(at(BASE, Map::anonymous(RANGES * LEAF, RW)))?;
    s.quiesce();
    let began = (s.account().table_bytes, machine.vm().held(machine));
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    // In each range one page, another one each time: written, or only read.
    let page_of = |i: u64| page(range(i), i * 37 % 512);
    let discards: [(&str, &dyn Fn() -> Result); 3] = [
        ("all at once", &|| Ok(s.discard(BASE, RANGES * LEAF)?)),
        ("whole ranges", &|| (0..RANGES).try_for_each(|i| Ok(s.discard(range(i), LEAF)?))),
        ("just the 4 KiB", &|| (0..RANGES).try_for_each(|i| Ok(s.discard(page_of(i), PAGE_SIZE)?))),
    ];
    for (how, discard) in discards {
        for access in [Access::Write, Access::Read] {
            for i in 0..RANGES {
                cpu.touch(page_of(i), access)?;
            }
            let tables = check(&s).tables;
            assert_eq!(
                tables,
                [RANGES, RANGES * LEAF / (1 << 30), 1, 1, 0],
                "a leaf for each range, and what is above"
            );
            discard()?;
            s.quiesce();
            assert_eq!(s.account().table_bytes, began.0, "{how}, {access:?}");
            assert_eq!(machine.vm().held(machine), began.1, "{how}, {access:?}");
            assert_eq!(machine.counts().live_tables(), 1, "the machine counts the root alone");
            check(&s);
        }
    }
    drop((cpu, s));
    machine.nothing_left()?;
    Ok(())
}

/// 10,000 faults that fail, each in an empty range of 2 MiB of its own: for each way to fail, how many tables the
/// machine counted.
fn tables_of_failures(tables: TablePolicy) -> Result<Vec<(FaultError, u64)>> {
    let machine = roomy();
    let mut counted = Vec::new();
    let limit = Limit::new(machine, None, 0)?;
    let errors = [
        FaultError::Bus(Bus::BeyondEnd),
        FaultError::Bus(Bus::Io),
        FaultError::NoMemory,
        FaultError::OverLimit(limit.id()),
        FaultError::Segv(Segv::Access),
    ];
    for error in errors {
        let s = space_with(machine, Policy { tables, ..policy() })?;
        let content = marked();
        let file = cache(machine, &content, FAULTS * LEAF / PAGE_SIZE)?;
        let pages = FAULTS * LEAF / PAGE_SIZE;
        let (map, access) = match error {
            FaultError::Bus(Bus::Io) => {
                (0..FAULTS).for_each(|i| content.fail_reads(i * LEAF / PAGE_SIZE, true));
                (private(&file, 0, pages, R), Access::Read)
            }
            FaultError::Bus(_) => {
                file.set_size(machine, 0);
                (private(&file, 0, pages, R), Access::Read)
            }
            FaultError::NoMemory | FaultError::OverLimit(_) => (anonymous(pages, RW), Access::Write),
            FaultError::Segv(_) => (anonymous(pages, R), Access::Write),
        };
        s.map(at(BASE, map))?;
        s.set_limit(matches!(error, FaultError::OverLimit(_)).then(|| limit.clone()));
        let kept = if error == FaultError::NoMemory { machine.leave_free(0) } else { Vec::new() };
        let before = machine.counts();
        for i in 0..FAULTS {
            assert_eq!(fault(&s, range(i), access), End::Error(error));
        }
        counted.push((error, (machine.counts() - before).tables_allocated));
        drop(kept);
        check(&s);
        drop((s, file));
    }
    drop(limit);
    machine.nothing_left()?;
    Ok(counted)
}

#[test]
fn done_ten_thousand_faults_that_fail_allocate_no_table() -> Result {
    let counted = tables_of_failures(TablePolicy::Postponed)?;
    assert_eq!(counted.len(), 5);
    assert!(counted.iter().all(|(_, tables)| *tables == 0), "{counted:?}");
    Ok(())
}

#[test]
fn done_with_tables_upfront_the_difference_shows() -> Result {
    // A leaf for each range, one above for each GiB, and one above that.
    let all = FAULTS + (FAULTS * LEAF).div_ceil(1 << 30) + 1;
    for (error, tables) in tables_of_failures(TablePolicy::Upfront)? {
        let expected = match error {
            FaultError::Bus(_) | FaultError::OverLimit(_) => all,
            // Refused before there was anything to do, and without memory for a table there is none.
            FaultError::Segv(_) | FaultError::NoMemory => 0,
        };
        assert_eq!(tables, expected, "{error:?}");
    }
    Ok(())
}

#[test]
fn done_with_tables_as_linux_keeps_them_what_linux_keeps_is_there() -> Result {
    // Of faults that fail, the tables stay that were there before the page was asked for: of files those above.
    let above = (FAULTS * LEAF).div_ceil(1 << 30) + 1;
    for (error, tables) in tables_of_failures(TablePolicy::Linux)? {
        let expected = match error {
            FaultError::Bus(_) => above,
            FaultError::OverLimit(_) => FAULTS + above,
            FaultError::Segv(_) | FaultError::NoMemory => 0,
        };
        assert_eq!(tables, expected, "{error:?}");
    }
    // Measured on Linux 6.18 for 4,096 ranges of 2 MiB with one page touched in each: what was discarded page by page
    // leaves all tables, what was discarded whole leaves those above, munmap leaves none.
    let machine = roomy();
    let s = space_with(machine, Policy { tables: TablePolicy::Linux, ..policy() })?;
    let above = (RANGES * LEAF) >> 30;
    let leaves = || s.account().table_bytes.map(|bytes| bytes / PAGE_SIZE);
    let touch = || {
        for i in 0..RANGES {
            assert!(matches!(fault(&s, range(i), Access::Write), End::Mapped(..)));
        }
    };
    s.map(at(BASE, Map::anonymous(RANGES * LEAF, RW)))?;
    touch();
    assert_eq!(leaves()[..3], [RANGES, above, 1]);
    (0..RANGES).try_for_each(|i| s.discard(range(i), PAGE_SIZE))?;
    assert_eq!(leaves()[..3], [RANGES, above, 1]);
    s.discard(BASE, RANGES * LEAF - PAGE_SIZE)?;
    assert_eq!(leaves()[..3], [1, above, 1], "the last range was not discarded whole");
    s.discard(BASE, RANGES * LEAF)?;
    assert_eq!(leaves()[..3], [0, above, 1]);
    touch();
    check(&s);
    s.unmap(BASE, RANGES * LEAF)?;
    assert_eq!(leaves()[..3], [0, 0, 0]);
    check(&s);
    drop(s);
    machine.nothing_left()?;
    Ok(())
}

#[test]
fn done_the_whole_user_half_costs_what_is_touched_in_it() -> Result {
    const MOST: u64 = 60;
    let machine = roomy();
    let s = space_with(machine, Policy::default())?;
    let whole = s.usable();
    assert_eq!((whole.start, whole.end), (Policy::default().min_addr, X86_64::USER_END));
    let begin = machine.counts();
    s.map(at(whole.start, Map::anonymous(whole.len(), RW)))?;
    let mapped_it = machine.counts() - begin;
    assert_eq!((mapped_it.tables_allocated, mapped_it.locked(), mapped_it.scanned()), (0, 0, 0));

    // Ten places, each under its own entry of the root: 250 of 256 entries lie between the first and the last.
    let place = |i: u64| VirtAddr(whole.start.0 + i * 27 * TOP + i * (5 << 30) + i * 11 * LEAF);
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    for i in 0..10 {
        cpu.store_u64(place(i), i)?;
    }
    assert_eq!(check(&s).tables, [10, 10, 10, 1, 0], "tables for the ten alone");

    let quarter = whole.len() / 4 / PAGE_SIZE * PAGE_SIZE;
    let middle = VirtAddr(whole.start.0 + quarter);
    let before = machine.counts();
    s.protect(middle, 2 * quarter, R)?;
    let protected = machine.counts() - before;
    for i in 0..10 {
        let inside = place(i).0 >= middle.0 && place(i).0 < middle.0 + 2 * quarter;
        assert_eq!(
            cpu.store_u64(place(i), i).map_err(|t| t.error),
            match inside {
                true => Err(FaultError::Segv(Segv::Access)),
                false => Ok(()),
            }
        );
        assert_eq!(cpu.load_u64(place(i))?, i);
    }
    assert_eq!(check(&s).tables, [10, 10, 10, 1, 0]);

    let before = machine.counts();
    s.unmap(whole.start, whole.len())?;
    let unmapped = machine.counts() - before;
    let locked = mapped_it.locked() + protected.locked() + unmapped.locked();
    let scanned = mapped_it.scanned() + protected.scanned() + unmapped.scanned();
    println!(
        "locked: map {}, protect {}, unmap {}; read: {}, {}, {}",
        mapped_it.locked(),
        protected.locked(),
        unmapped.locked(),
        mapped_it.scanned(),
        protected.scanned(),
        unmapped.scanned()
    );
    // A table is read once. A table of tables is locked before, and once more if one below it died; a leaf once.
    assert!(scanned <= MOST, "{scanned} tables read");
    assert!(locked <= 2 * scanned, "{locked} lockings of {scanned} tables");
    assert_eq!(check(&s).tables, [0, 0, 0, 1, 0]);
    drop((cpu, s));
    machine.nothing_left()?;
    Ok(())
}

/// Reads every page of a memory file of 1 GiB that is full in the cache, from one end to the other, with a window of
/// fault-around; how many faults that took, how many of them mapped a huge page, and how many leaf tables there were then.
fn reads_of_a_gibibyte(
    machine: &'static Machine,
    huge: ShmemHuge,
    window: FaultAround,
) -> Result<(u64, u64, u64)> {
    const GIB: u64 = 1 << 30;
    let file = FileCache::new(machine, MachineFile::shmem(huge), GIB)?;
    warm(machine, &file, 0..GIB / PAGE_SIZE)?;
    assert_eq!(file.pages(), GIB / PAGE_SIZE);
    let s = space_with(machine, Policy { fault_around: window, ..policy() })?;
    s.map(at(BASE, shared(&file, 0, GIB / PAGE_SIZE, R)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    for i in 0..GIB / PAGE_SIZE {
        assert_eq!(cpu.load_u64(page(BASE, i))?, 0);
    }
    let (counts, account) = (cpu.counts(), s.account());
    assert_eq!(counts.faults, counts.mapped);
    assert_eq!(account.file_bytes, GIB);
    Ok((counts.faults, counts.huge, account.table_bytes[0] / PAGE_SIZE))
}

#[test]
fn done_a_gibibyte_of_huge_tmpfs_takes_512_faults_and_no_leaf_table() -> Result {
    let machine: &'static Machine =
        Machine::new(Config { checks: false, memory: (1 << 30) + (96 << 20), ..Config::default() });
    let (least, most) = (PAGE_SIZE, 2 << 20);
    for window in [FaultAround::adaptive(least, most), FaultAround::fixed(most)] {
        let reads = reads_of_a_gibibyte(machine, ShmemHuge::Always, window.ok_or("a window")?)?;
        assert_eq!(reads, (512, 512, 0));
        machine.nothing_left()?;
    }
    let window = FaultAround::fixed(64 << 10).ok_or("a window")?;
    assert_eq!(reads_of_a_gibibyte(machine, ShmemHuge::Never, window)?, (16_384, 0, 512));
    Ok(machine.nothing_left()?)
}

#[test]
fn done_in_the_end_everything_is_gone() -> Result {
    let machine = roomy();
    let began = machine.vm().held(machine);
    {
        let (a, b) = (space(machine)?, space(machine)?);
        let file = cache(machine, &marked().with_tracking(true), 256)?;
        let in_memory = cache(machine, &marked(), 256)?;
        for s in [&a, &b] {
            s.map(at(BASE, Map::anonymous(64 * LEAF, RW)))?;
            s.map(at(VirtAddr(BASE.0 + TOP), private(&file, 0, 256, RW)))?;
            s.map(at(VirtAddr(BASE.0 + 2 * TOP), shared(&file, 0, 256, RW)))?;
            s.map(at(VirtAddr(BASE.0 + 3 * TOP), shared(&in_memory, 0, 256, RW)))?;
        }
        let work = |s: &Space, thread: u64| -> std::result::Result<(), String> {
            let mut cpu = machine.vcpu();
            cpu.switch_to(s);
            for i in 0..2_000_u64 {
                let place = VirtAddr(BASE.0 + i % 4 * TOP);
                let access = if i / 4 % 3 == thread % 3 { Access::Write } else { Access::Read };
                cpu.touch(page(place, i * 7 % 256), access).map_err(|t| t.to_string())?;
                if i % 500 == 499 {
                    s.discard(place, 128 * PAGE_SIZE).map_err(|e| e.to_string())?;
                }
            }
            Ok(())
        };
        let work = &work;
        std::thread::scope(|scope| -> Result {
            let threads = [(&a, 0), (&a, 1), (&b, 2)].map(|(s, n)| scope.spawn(move || work(s, n)));
            for thread in threads {
                thread.join().map_err(|_| "a thread panicked")??;
            }
            Ok(())
        })?;
        check(&a);
        check(&b);
        assert!(a.account().resident_bytes() > 0 && b.account().resident_bytes() > 0);
    }
    machine.vm().quiesce(machine);
    let end = machine.vm().held(machine);
    assert_eq!((end.tables, end.objects, end.in_limbo, end.cached_tables), (0, 0, 0, 0));
    assert_eq!(end, Held { frames: 1, ..Held::default() }, "the zero page's frame alone");
    assert_eq!((began.frames, began.tables, began.objects), (1, 0, 0));
    machine.nothing_left()?;
    Ok(())
}
