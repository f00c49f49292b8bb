//! The fault path, items 1 to 38: what it does where nothing is mapped, in what order, and what a failure leaves.

mod kit;

use kit::*;
use pagefirst::arch::Attrs;
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::space::{Map, MapError, Place, VmaFlags};
use pagefirst::sync::epoch::Pin;
use pagefirst::table::{Reserve, Walk};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr};
use pagefirst_machine::{Config, Counts, Machine};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

const RWX: Prot = RW.union(Prot::EXEC);
const ONE_GIB: u64 = 1 << 30;
/// What one entry of the root spans.
const TOP: u64 = 512 << 30;
const BASE: VirtAddr = VirtAddr(1 << 40);
/// How a thread's work ended.
type Worked = std::result::Result<(), String>;

fn add(at: VirtAddr, bytes: u64) -> VirtAddr {
    VirtAddr(at.0 + bytes)
}

/// Where nothing is mapped, the level of the deepest table that lives; `None` where something is.
fn nothing(space: &Space, at: VirtAddr) -> Option<u8> {
    let pin = Pin::new(space.platform());
    match space.page_table().walk(&pin, at) {
        Walk::Nothing(slot) => Some(slot.level()),
        Walk::Seen(_) | Walk::Huge(_) => None,
    }
}

/// Runs `f` and answers with what the machine counted meanwhile.
fn counted(machine: &'static Machine, f: impl FnOnce()) -> Counts {
    let before = machine.counts();
    f();
    machine.counts() - before
}

#[test]
fn c02_nothing_mapped_names_the_deepest_table_that_lives() -> Result {
    let machine = machine();
    let s = space(machine)?;
    s.map(at(BASE, Map::anonymous(2 * TOP, RW)))?;
    let beside = [BASE, page(BASE, 1), add(BASE, LEAF), add(BASE, ONE_GIB), add(BASE, TOP)];
    // With every level missing, then with more and more of them there, down to an empty slot in a leaf.
    assert_eq!(beside.map(|va| nothing(&s, va)), [Some(3); 5]);
    assert_eq!(fault(&s, BASE, Access::Write), End::Mapped(false, 0));
    assert_eq!(beside.map(|va| nothing(&s, va)), [None, Some(0), Some(1), Some(2), Some(3)]);
    for va in &beside[1..] {
        let missing = nothing(&s, *va).ok_or("nothing is mapped there")?;
        let spent = counted(machine, || assert_eq!(fault(&s, *va, Access::Write), End::Mapped(false, 0)));
        assert_eq!(spent.tables_allocated, missing as u64, "as many tables as were missing for {va}");
        assert_eq!((nothing(&s, *va), frame(&s, *va).is_some()), (None, true));
    }
    // A slot that lost its entry in a table that lives on, and one whose table died with it, are nothing again.
    s.discard(BASE, PAGE_SIZE)?;
    assert_eq!((nothing(&s, BASE), nothing(&s, page(BASE, 1))), (Some(0), None));
    s.discard(BASE, 2 * PAGE_SIZE)?;
    assert_eq!((nothing(&s, BASE), nothing(&s, add(BASE, LEAF))), (Some(1), None));
    s.unmap(BASE, 2 * TOP)?;
    assert_eq!(beside.map(|va| nothing(&s, va)), [Some(3); 5]);
    check(&s);
    Ok(())
}

#[test]
fn c07_a_reserve_is_not_counted() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    s.map(at(BASE, anonymous(1, RW)))?;
    fault(&s, BASE, Access::Write);
    let before = s.account().table_bytes;
    assert_eq!(before, [PAGE_SIZE, PAGE_SIZE, PAGE_SIZE, PAGE_SIZE, 0]);
    let mut reserve = Reserve::new(machine);
    reserve.refill(3)?;
    assert_eq!((reserve.len(), machine.vm().held(machine).tables), (3, 4 + 3));
    assert_eq!(s.account().table_bytes, before);
    check(&s);
    drop(reserve);
    assert_eq!(machine.vm().held(machine).tables, 4);
    Ok(())
}

#[test]
fn c07_after_any_race_the_bytes_of_each_level_are_what_a_walk_counts() -> Result {
    const RANGES: u64 = 12;
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let file = cache(machine, &marked(), 64)?;
    // Three kinds of distance: a leaf, a table above, and two above that are shared by all.
    let range = |i: u64| add(BASE, i % 4 * LEAF + i / 4 * ONE_GIB);
    for i in 0..RANGES {
        s.map(at(range(i), if i % 3 == 2 { shared(&file, 0, 64, RW) } else { anonymous(64, RW) }))?;
    }
    for phase in 0..12_u64 {
        let work = |thread: u64| -> Worked {
            let mut cpu = machine.vcpu();
            cpu.switch_to(&s);
            let mut x = phase * 1000 + thread * 77 + 1;
            for _ in 0..300 {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let (i, n) = (x >> 33 & 0xff, x >> 41 & 63);
                let va = page(range(i % RANGES), n);
                match x >> 60 {
                    0..6 => cpu.touch(va, Access::Write).map_err(|t| t.to_string())?,
                    6..10 => cpu.touch(va, Access::Read).map_err(|t| t.to_string())?,
                    10..14 => s.discard(range(i % RANGES), 64 * PAGE_SIZE).map_err(|e| e.to_string())?,
                    _ => {
                        // A mapping of this thread's own, in a leaf that others fill and empty.
                        let own = page(range(i % RANGES), 100 + thread * 8);
                        s.map(at(own, anonymous(4, RW))).map_err(|e| e.to_string())?;
                        cpu.touch(own, Access::Write).map_err(|t| t.to_string())?;
                        s.unmap(own, 4 * PAGE_SIZE).map_err(|e| e.to_string())?;
                    }
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| -> Result {
            for thread in (0..3).map(|t| scope.spawn(move || work(t))).collect::<Vec<_>>() {
                thread.join().map_err(|_| "a thread panicked")??;
            }
            Ok(())
        })?;
        check(&s);
    }
    drop((s, file));
    machine.nothing_left()?;
    Ok(())
}

#[test]
fn c09_while_a_page_is_read_the_slot_above_is_free() -> Result {
    for (access, private_mapping) in
        [(Access::Read, true), (Access::Execute, true), (Access::Write, true), (Access::Write, false)]
    {
        let machine = machine();
        let s = space(machine)?;
        let (file, hook) = hooked();
        let file = cache(machine, &file, 8)?;
        let map = if private_mapping { private(&file, 0, 8, RWX) } else { shared(&file, 0, 8, RWX) };
        s.map(at(BASE, map))?;
        let allocated = machine.counts().tables_allocated;
        let meanwhile = s.clone();
        hook.arm(3, move || {
            let s = meanwhile;
            // Nothing but the root lives, nothing is reserved, and no table is locked.
            assert_eq!(nothing(&s, page(BASE, 3)), Some(3));
            assert_eq!(machine.counts().tables_allocated, allocated);
            assert_eq!(check(&s).tables, [0, 0, 0, 1, 0]);
        });
        assert_eq!(fault(&s, page(BASE, 3), access), End::Mapped(true, 0));
        assert!(!hook.is_armed(), "the page was read");
        assert_eq!(machine.counts().tables_allocated - allocated, 3);
    }
    Ok(())
}

#[test]
fn c09_no_walker_of_the_hardware_meets_an_empty_table() -> Result {
    // The machine's walker looks at every table on its way, and ends the test if one is alive and empty.
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    s.map(at(BASE, Map::anonymous(2 * LEAF, RW)))?;
    std::thread::scope(|scope| -> Result {
        let work = |thread: u64| -> Worked {
            let mut cpu = machine.vcpu();
            cpu.switch_to(&s);
            for round in 0..2_000 {
                let va = page(add(BASE, round % 2 * LEAF), thread);
                cpu.touch(va, Access::Write).map_err(|t| t.to_string())?;
                s.discard(va, PAGE_SIZE).map_err(|e| e.to_string())?;
            }
            Ok(())
        };
        for thread in (0..3).map(|t| scope.spawn(move || work(t))).collect::<Vec<_>>() {
            thread.join().map_err(|_| "a thread panicked")??;
        }
        Ok(())
    })?;
    assert_eq!(check(&s).tables, [0, 0, 0, 1, 0]);
    Ok(())
}

#[test]
fn c10_the_page_comes_before_any_table() -> Result {
    // With n frames free the page takes the first of them, and tables the rest; the zero page takes none.
    for (access, page_frames) in [(Access::Write, 1), (Access::Read, 0)] {
        for n in 0..page_frames + 3 {
            let machine: &'static Machine = small_machine(256);
            let s = space(machine)?;
            s.map(at(BASE, anonymous(1, RW)))?;
            let kept = machine.leave_free(n);
            let spent =
                counted(machine, || assert_eq!(fault(&s, BASE, access), End::Error(FaultError::NoMemory)));
            assert_eq!(spent.tables_allocated, n.saturating_sub(page_frames), "{access:?}, {n} frames free");
            assert_eq!(spent.live_tables(), 0);
            drop(kept);
        }
        let machine: &'static Machine = small_machine(256);
        let s = space(machine)?;
        s.map(at(BASE, anonymous(1, RW)))?;
        let _kept = machine.leave_free(page_frames + 3);
        assert_eq!(fault(&s, BASE, access), End::Mapped(false, 0));
    }
    // A file's page: with one frame free, not even that is left for a table.
    let machine: &'static Machine = small_machine(256);
    let s = space(machine)?;
    let file = cache(machine, &marked(), 8)?;
    s.map(at(BASE, private(&file, 0, 8, R)))?;
    for n in 0..2 {
        let _kept = machine.leave_free(n);
        let spent =
            counted(machine, || assert_eq!(fault(&s, BASE, Access::Read), End::Error(FaultError::NoMemory)));
        assert_eq!(spent.tables_allocated, 0);
    }
    Ok(())
}

/// Ways in which a fault of a file gets no page: the page's index, the error, and whether memory is out.
const PAGELESS: [(u64, FaultError, bool); 3] = [
    (20, FaultError::Bus(Bus::BeyondEnd), false),
    (5, FaultError::Bus(Bus::Io), false),
    (6, FaultError::NoMemory, true),
];

#[test]
fn c11_a_file_fault_without_a_page_leaves_no_table() -> Result {
    for (index, error, no_memory) in PAGELESS {
        for (access, private_mapping) in
            [(Access::Read, true), (Access::Execute, true), (Access::Write, true), (Access::Write, false)]
        {
            for beside in [false, true] {
                let machine: &'static Machine = small_machine(512);
                let s = space(machine)?;
                let content = marked();
                content.fail_reads(5, true);
                let file = cache(machine, &content, 16)?;
                let map =
                    if private_mapping { private(&file, 0, 32, RWX) } else { shared(&file, 0, 32, RWX) };
                s.map(at(BASE, map))?;
                if beside {
                    // The tables are there, and the slot is empty.
                    s.map(at(page(BASE, 64), anonymous(1, RW)))?;
                    fault(&s, page(BASE, 64), Access::Write);
                }
                let before = (s.account().table_bytes, nothing(&s, page(BASE, index)));
                let kept = if no_memory { machine.leave_free(0) } else { Vec::new() };
                let spent = counted(machine, || {
                    assert_eq!(fault(&s, page(BASE, index), access), End::Error(error));
                });
                drop(kept);
                assert_eq!(spent.tables_allocated, 0, "{error:?} {access:?}");
                assert_eq!((s.account().table_bytes, nothing(&s, page(BASE, index))), before);
                assert_eq!(before.1, Some(if beside { 0 } else { 3 }));
                assert_eq!(mapped(&s, BASE, 32), []);
                check(&s);
                drop((s, file));
                machine.nothing_left()?;
            }
        }
    }
    Ok(())
}

#[test]
fn c13_where_no_table_is_nothing_is_allocated_or_read_before_the_kinds_code() -> Result {
    let machine: &'static Machine = small_machine(512);
    let s = space(machine)?;
    let file = cache(machine, &marked(), 1)?;
    s.map(at(BASE, private(&file, 0, 8, RW)))?;
    s.map(at(add(BASE, TOP), shared(&file, 0, 8, RW)))?;
    s.map(at(add(BASE, 2 * TOP), anonymous(8, RW)))?;
    let kept = machine.leave_free(0);
    // Each is refused by the code for its kind, at the first thing that it does.
    let refused = [
        (page(BASE, 1), Access::Read, FaultError::Bus(Bus::BeyondEnd)),
        (page(BASE, 1), Access::Write, FaultError::Bus(Bus::BeyondEnd)),
        (page(add(BASE, TOP), 1), Access::Write, FaultError::Bus(Bus::BeyondEnd)),
        (add(BASE, 2 * TOP), Access::Write, FaultError::NoMemory),
    ];
    for (va, access, error) in refused {
        let spent = counted(machine, || assert_eq!(fault(&s, va, access), End::Error(error)));
        assert_eq!((spent.frames_allocated, spent.tables_allocated), (0, 0));
        assert_eq!((spent.locked(), spent.scanned()), (0, 0), "{access:?} at {va}");
    }
    drop(kept);
    Ok(())
}

#[test]
fn c18_what_a_fault_does_follows_the_kind_of_memory() -> Result {
    let machine: &'static Machine = machine();
    let s = space_with(machine, policy().with_fault_around(PAGE_SIZE).ok_or("one page")?)?;
    let (content, hook) = hooked();
    let file = cache(machine, &content, 8)?;
    let (anon, private_at, shared_at) = (BASE, add(BASE, LEAF), add(BASE, 2 * LEAF));
    s.map(at(anon, anonymous(8, RW)))?;
    s.map(at(private_at, private(&file, 0, 8, RW)))?;
    s.map(at(shared_at, shared(&file, 0, 8, RW)))?;

    fault(&s, anon, Access::Read);
    fault(&s, page(anon, 1), Access::Write);
    assert_eq!(content.reads(), 0, "anonymous memory asks no file");
    // The file's code begins with nothing locked and nothing pinned: a pin here would be refused by debug builds.
    let meanwhile = s.clone();
    hook.arm(0, move || assert_eq!(check(&meanwhile).present, 2));
    fault(&s, private_at, Access::Read);
    assert!(!hook.is_armed());
    fault(&s, page(private_at, 1), Access::Write);
    fault(&s, page(shared_at, 2), Access::Write);
    fault(&s, page(shared_at, 3), Access::Read);
    assert_eq!(content.reads(), 4);
    let faults = s.account().faults;
    assert_eq!((faults.anon_read, faults.anon_write), (1, 1));
    assert_eq!((faults.file_read, faults.file_copy, faults.shared_write), (2, 1, 1));
    assert_eq!((s.account().anon_bytes, s.account().file_bytes), (2 * PAGE_SIZE, 3 * PAGE_SIZE));
    Ok(())
}

#[test]
fn c19_a_fault_on_a_present_entry_works_on_that_entry() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let file = cache(machine, &marked().with_tracking(true), 4)?;
    s.map(at(BASE, shared(&file, 0, 1, RW)))?;
    fault(&s, BASE, Access::Read);
    let before = (frame(&s, BASE), check(&s).tables);
    assert!(!attrs(&s, BASE).intersects(Attrs::WRITE | Attrs::DIRTY));
    // The page may be written where it is: the entry is widened, under one lock, and nothing is allocated.
    let spent = counted(machine, || assert_eq!(fault(&s, BASE, Access::Write), End::Mapped(false, 0)));
    assert_eq!((spent.frames_allocated, spent.tables_allocated, spent.shootdowns), (0, 0, 0));
    assert_eq!((spent.tables_locked, spent.scanned()), ([1, 0, 0, 0, 0], 0));
    assert_eq!((frame(&s, BASE), check(&s).tables), before);
    assert!(attrs(&s, BASE).contains(Attrs::WRITE | Attrs::DIRTY | Attrs::ACCESSED));
    assert_eq!(s.account().faults.reuse, 1);
    // An entry that allows the access already is left alone, and no lock is taken.
    for access in [Access::Read, Access::Write] {
        let spent = counted(machine, || assert_eq!(fault(&s, BASE, access), End::Spurious));
        assert_eq!((spent.locked(), spent.frames_allocated), (0, 0));
    }
    Ok(())
}

#[test]
fn c21_what_can_never_succeed_costs_nothing() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let file = cache(machine, &marked(), 1)?;
    let place = |i: u64| add(BASE, i * LEAF);
    s.map(at(place(0), anonymous(8, NONE)))?;
    s.map(at(place(1), anonymous(8, R)))?;
    s.map(at(place(2), anonymous(8, RW)))?;
    s.map(at(place(3), shared(&file, 0, 8, RW)))?;
    // A stack with something mapped a hundred pages below it: its gap reaches further.
    let stack = place(6);
    let flags = VmaFlags::GROWS_DOWN;
    s.map(Map { place: Place::Fixed(stack), flags, ..anonymous(8, RW) })?;
    s.map(at(VirtAddr(stack.0 - 100 * PAGE_SIZE), anonymous(1, RW)))?;
    let refused = [
        (place(0), Access::Read, FaultError::Segv(Segv::Access)),
        (place(1), Access::Write, FaultError::Segv(Segv::Access)),
        (place(2), Access::Execute, FaultError::Segv(Segv::Access)),
        (page(place(3), 1), Access::Write, FaultError::Bus(Bus::BeyondEnd)),
        (VirtAddr(stack.0 - 1), Access::Write, FaultError::Segv(Segv::NotMapped)),
        (VirtAddr(0x8000_0000_0000_0000), Access::Read, FaultError::Segv(Segv::NonCanonical)),
        (VirtAddr(0xffff_8000_0000_0000), Access::Read, FaultError::Segv(Segv::NotMapped)),
    ];
    for (va, access, error) in refused {
        let spent = counted(machine, || assert_eq!(fault(&s, va, access), End::Error(error)));
        assert_eq!((spent.frames_allocated, spent.tables_allocated, spent.locked()), (0, 0, 0), "{error:?}");
    }
    // Shared memory that no file stands behind is refused when it is mapped.
    let refused = s.map(Map { flags: VmaFlags::SHARED, ..anonymous(1, RW) });
    assert!(matches!(refused, Err(MapError::Denied(_))));
    assert_eq!(check(&s).tables, [0, 0, 0, 1, 0]);
    Ok(())
}

#[test]
fn c22_the_missing_tables_are_published_once_with_the_page_in_them() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    s.map(at(BASE, Map::anonymous(2 * TOP, RW)))?;
    // Whatever is missing, one table is locked, once: the deepest that lives.
    for (va, level) in [(BASE, 3), (add(BASE, ONE_GIB), 2), (add(BASE, LEAF), 1), (page(BASE, 1), 0)] {
        let spent = counted(machine, || assert_eq!(fault(&s, va, Access::Write), End::Mapped(false, 0)));
        let mut once = [0; 5];
        once[level] = 1;
        assert_eq!((spent.tables_locked, spent.tables_allocated), (once, level as u64));
        assert_eq!((spent.tables_freed, spent.scanned()), (0, 0));
    }
    let found = check(&s);
    assert_eq!((found.tables, found.present), ([3, 2, 1, 1, 0], 4));
    Ok(())
}

#[test]
fn c25_an_untouched_page_reads_as_the_zero_frame() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    s.map(at(BASE, anonymous(16, RWX)))?;
    let zero = machine.vm().zero_page();
    let before = counts(machine, zero);
    let spent = counted(machine, || {
        for i in 0..16 {
            let access = if i % 2 == 0 { Access::Read } else { Access::Execute };
            assert_eq!(fault(&s, page(BASE, i), access), End::Mapped(false, 0));
        }
    });
    assert_eq!(spent.tables_allocated, 3);
    assert!((0..16).all(|i| frame(&s, page(BASE, i)) == Some(zero)));
    assert!((0..16).all(|i| !attrs(&s, page(BASE, i)).contains(Attrs::WRITE)));
    assert_eq!(counts(machine, zero), before, "neither mapped nor referred to");
    assert_eq!((s.account().resident_bytes(), s.account().faults.anon_read), (0, 16));
    // A write gets a page of its own, and what others read stays zero.
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    cpu.store_u64(page(BASE, 3), 7)?;
    assert_ne!(frame(&s, page(BASE, 3)), Some(zero));
    assert_eq!((cpu.load_u64(page(BASE, 3))?, cpu.load_u64(page(BASE, 4))?), (7, 0));
    assert_eq!(s.account().resident_bytes(), PAGE_SIZE);
    Ok(())
}

#[test]
fn c26_a_write_to_an_untouched_page_maps_a_cleared_one() -> Result {
    let machine: &'static Machine = small_machine(512);
    let s = space(machine)?;
    s.map(at(BASE, anonymous(64, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    // Frames are poisoned when they come back, so what is not cleared shows.
    for round in 0..4 {
        for i in 0..64 {
            let mut bytes = [0xff; PAGE_SIZE as usize];
            cpu.store_u8(page(BASE, i), 0)?;
            cpu.load(page(BASE, i), &mut bytes)?;
            assert!(bytes.iter().all(|b| *b == 0), "page {i} in round {round}");
            cpu.store(page(BASE, i), &[0xee; PAGE_SIZE as usize])?;
            let own = frame(&s, page(BASE, i)).ok_or("mapped")?;
            assert_eq!(counts(machine, own), (1, 1));
        }
        assert_eq!(check(&s).frames.len(), 64, "no page is mapped twice");
        s.discard(BASE, 64 * PAGE_SIZE)?;
    }
    Ok(())
}

#[test]
fn c26_who_loses_the_race_for_a_page_gives_its_own_back() -> Result {
    const ROUNDS: u64 = 300;
    let machine: &'static Machine = Machine::new(Config { checks: true, cpus: 5, ..Config::default() });
    let s = space(machine)?;
    s.map(at(BASE, Map::anonymous(ROUNDS * LEAF, RW)))?;
    let before = machine.counts().live_frames();
    let turn = Gate::new(4);
    let losers = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let turn = turn.member();
                let mut cpu = machine.vcpu();
                cpu.switch_to(&s);
                for round in 0..ROUNDS {
                    turn.pass();
                    assert!(cpu.fetch_add_u64(add(BASE, round * LEAF), 1).is_ok());
                }
                losers.fetch_add(cpu.counts().spurious as u32, Relaxed);
            });
        }
    });
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    for round in 0..ROUNDS {
        assert_eq!(cpu.load_u64(add(BASE, round * LEAF))?, 4, "all four wrote to the same page");
    }
    let found = check(&s);
    assert!(found.frames.keys().all(|pfn| counts(machine, *pfn) == (1, 1)));
    assert_eq!((found.counted, s.account().faults.anon_write), (ROUNDS, ROUNDS));
    assert_eq!(s.account().faults.spurious, losers.load(Relaxed) as u64);
    s.unmap(BASE, ROUNDS * LEAF)?;
    s.quiesce();
    assert!(machine.counts().live_frames() <= before, "a page of a loser was not given back");
    Ok(())
}
