//! The fault path, item by item: `conformance.md`, c40 to c70 and r07 to r10. (r06 is in `oom.rs`, r14 in `races.rs`.)

#[path = "conformance_gi/around.rs"]
mod around;
#[path = "conformance_gi/between.rs"]
mod between;
mod doors;
#[path = "conformance_gi/kinds.rs"]
mod kinds;
mod kit;

use kit::*;
use pagefirst::arch::Attrs;
use pagefirst::fault::{FaultError, Segv};
use pagefirst::file::ShmemHuge;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::RemapTo;
use pagefirst::sync::epoch::Pin;
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr, VirtRange};
use pagefirst_machine::{Config, Machine, MachineFile};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};

const AT: VirtAddr = VirtAddr(1 << 30);
const RX: Prot = Prot::READ.union(Prot::EXEC);
const RWX: Prot = Prot::READ.union(Prot::WRITE).union(Prot::EXEC);

#[test]
fn c40_an_entry_is_built_from_the_rights_of_the_mapping() -> Result {
    let machine = machine();
    let c = cache(machine, &marked(), 4)?;
    let tracked = cache(machine, &marked().with_tracking(true), 4)?;
    let (write, dirty, exec) = (Attrs::WRITE, Attrs::DIRTY, Attrs::EXEC);
    let none = Attrs::empty();
    warm(machine, &c, [0])?;
    warm(machine, &tracked, [0])?;
    let (load, store, fetch) = (Access::Read, Access::Write, Access::Execute);
    let special = Attrs::SPECIAL;
    for (name, map, access, expected) in [
        ("zero page", anonymous(1, RW), load, special),
        ("zero page, executable", anonymous(1, RWX), load, special | exec),
        ("anonymous write", anonymous(1, RW), store, write | dirty),
        ("anonymous write, executable", anonymous(1, RWX), store, write | dirty | exec),
        ("private read", private(&c, 0, 1, RW), load, none),
        ("private read, executable", private(&c, 0, 1, RX), load, exec),
        ("private fetch", private(&c, 0, 1, RX), fetch, exec),
        ("private write", private(&c, 0, 1, RW), store, write | dirty),
        ("shared read, not writable", shared(&c, 0, 1, R), load, none),
        ("shared read, in memory", shared(&c, 0, 1, RW), load, write),
        ("shared read, on a disk", shared(&tracked, 0, 1, RW), load, none),
        ("shared write", shared(&tracked, 0, 1, RW), store, write | dirty),
    ] {
        let s = space(machine)?;
        s.map(at(AT, map))?;
        assert_eq!(fault(&s, AT, access), End::Mapped(false, 0), "{name}");
        assert_eq!(attrs(&s, AT), expected | Attrs::ACCESSED, "{name}");
    }
    Ok(())
}

/// On hardware whose fetches do not see stores the machine refuses a page that was not synchronised.
#[test]
fn c40_an_executable_page_is_synchronised_first() -> Result {
    let config = Config { checks: true, fetch_sees_stores: false, ..Config::default() };
    let machine: &'static Machine = Machine::new(config);
    let c = cache(machine, &marked(), 16)?;
    warm(machine, &c, 0..16)?;
    let s = space_with(machine, Policy { huge: HugePolicy::Always, ..policy() })?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    // A file's page and its neighbours; a copy; a page written, and one read, before they may be executed.
    s.map(at(AT, private(&c, 0, 16, RX)))?;
    assert_eq!((cpu.fetch(AT)?, cpu.fetch(page(AT, 15))?), (mark(0), mark(15)));
    let copies = page(AT, 100);
    s.map(at(copies, private(&c, 0, 16, RWX)))?;
    cpu.store_u8(copies, 7)?;
    assert_eq!(cpu.fetch(copies)?, 7);
    s.map(at(page(AT, 150), anonymous(1, RWX)))?;
    assert_eq!(cpu.fetch(page(AT, 150))?, 0);
    let later = page(AT, 200);
    s.map(at(later, anonymous(4, RW)))?;
    cpu.store_u8(later, 7)?;
    assert_eq!(cpu.load_u8(page(later, 1))?, 0);
    s.protect(later, 4 * PAGE_SIZE, RX)?;
    assert_eq!(
        (0..3).map(|i| cpu.fetch(page(later, i))).collect::<std::result::Result<Vec<_>, _>>()?,
        [7, 0, 0]
    );
    // Huge pages: written, read, and written before they may be executed.
    for (i, prot, write) in [(1, RWX, true), (2, RWX, false), (3, RW, true)] {
        let huge = VirtAddr(AT.0 + i * LEAF);
        s.map(at(huge, anonymous(512, prot)))?;
        if write {
            cpu.store_u8(huge, 7)?;
        }
        s.protect(huge, LEAF, RWX)?;
        assert_eq!((cpu.fetch(huge)?, cpu.fetch(page(huge, 511))?), (if write { 7 } else { 0 }, 0));
        assert_eq!(entry(&s, huge).1, 1);
    }
    Ok(())
}

#[test]
fn c40_a_huge_page_of_a_file_and_a_childs_copy_are_synchronised_too() -> Result {
    let config = Config { checks: true, fetch_sees_stores: false, ..Config::default() };
    let machine: &'static Machine = Machine::new(config);
    let c = cache(machine, &MachineFile::shmem(ShmemHuge::Always), 512)?;
    let s = space(machine)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    s.map(at(AT, shared(&c, 0, 512, RX)))?;
    assert_eq!((cpu.fetch(AT)?, cpu.fetch(page(AT, 511))?, entry(&s, AT).1), (0, 0, 1));
    // What is pinned stays the parent's: the child's is another frame from the first moment on.
    let own = VirtAddr(AT.0 + LEAF);
    s.map(at(own, anonymous(1, RWX)))?;
    cpu.store_u8(own, 7)?;
    let pinned = s.pin(VirtRange::page_of(own), true).map_err(|error| error.to_string())?;
    let child = Arc::new(s.fork()?);
    assert_ne!(frame(&child, own), Some(pinned.first()));
    cpu.switch_to(&child);
    assert_eq!(cpu.fetch(own)?, 7);
    Ok(())
}

#[test]
fn c41_a_fault_that_loses_leaves_every_count_alone() -> Result {
    let machine = machine();
    let s = space(machine)?;
    s.map(at(AT, anonymous(1, RW)))?;
    let gate = Gate::new(2);
    let won = AtomicU64::new(0);
    let write = |_| {
        let gate = gate.member();
        for _ in 0..300 {
            gate.pass();
            match fault(&s, AT, Access::Write) {
                End::Mapped(false, 0) => drop(won.fetch_add(1, SeqCst)),
                end => assert_eq!(end, End::Spurious),
            }
            if gate.pass() {
                assert_eq!(won.swap(0, SeqCst), 1, "one page is mapped, once");
                let account = s.account();
                assert_eq!((account.anon_bytes, account.file_bytes), (PAGE_SIZE, 0));
                let pfn = frame(&s, AT).expect("mapped");
                assert_eq!(counts(machine, pfn), (1, 1));
                s.unmap(AT, PAGE_SIZE).expect("mapped");
                s.map(at(AT, anonymous(1, RW))).expect("free");
                s.quiesce();
                assert_eq!((s.account().resident_bytes(), machine.vm().held(machine).tables), (0, 1));
            }
            gate.pass();
        }
    };
    together(2, write, || ());
    Ok(())
}

#[test]
fn c42_a_mapped_page_of_a_file_counts_as_file_memory_whoever_maps_it() -> Result {
    let machine = machine();
    let c = cache(machine, &marked(), 4)?;
    let (a, b) = (space(machine)?, space(machine)?);
    a.map(at(AT, private(&c, 0, 4, RW)))?;
    b.map(at(AT, shared(&c, 0, 4, RW)))?;
    let pages = |s: &Space| (s.account().anon_bytes / PAGE_SIZE, s.account().file_bytes / PAGE_SIZE);
    warm(machine, &c, 0..4)?;
    fault(&a, AT, Access::Read);
    fault(&b, AT, Access::Write);
    assert_eq!((pages(&a), pages(&b)), ((0, 4), (0, 1)));
    // A private copy is private memory; that page of the file is not mapped here any more.
    fault(&a, page(AT, 2), Access::Write);
    assert_eq!((pages(&a), pages(&b)), ((1, 3), (0, 1)));
    a.discard(AT, 4 * PAGE_SIZE)?;
    fault(&a, page(AT, 1), Access::Write);
    assert_eq!(pages(&a), (1, 0), "copied from where nothing was mapped");
    check(&a);
    check(&b);
    Ok(())
}

#[test]
fn c43_an_entry_that_can_be_seen_is_counted_and_counts_fall_again() -> Result {
    const PAGES: u64 = 512;
    let machine = machine();
    let c = cache(machine, &marked(), PAGES)?;
    // The largest window: neighbours are checked long after they were found.
    let s = space_with(machine, policy().with_fault_around(LEAF).ok_or("a window")?)?;
    s.map(at(AT, private(&c, 0, PAGES, R)))?;
    // Odd while entries are being taken away: by discards, and by cuts of the file.
    let [turn, cut] = [const { AtomicU64::new(0) }; 2];
    let turns = || (turn.load(SeqCst), cut.load(SeqCst));
    let seen = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let looks = || {
        let mut dice = 0;
        while !stop.load(SeqCst) {
            let _pin = Pin::new(machine); // the tables stay readable
            dice = (dice * 5 + 3) % PAGES;
            let before = turns();
            let Some(pfn) = frame(&s, page(AT, dice)) else { continue };
            let (refs, maps) = counts(machine, pfn);
            if before.0.is_multiple_of(2) && before.1.is_multiple_of(2) && turns() == before {
                assert!(maps >= 1 && refs > maps, "page {dice} is mapped and counts {refs}, {maps}");
                seen.fetch_add(1, SeqCst);
            }
        }
    };
    let shrinks = || {
        // The file loses its end and gets it back, its pages change places: neighbours fail when they are checked.
        while !stop.load(SeqCst) {
            cut.fetch_add(1, SeqCst);
            c.set_size(machine, 40 * PAGE_SIZE);
            cut.fetch_add(1, SeqCst);
            c.evict(machine);
            c.set_size(machine, PAGES * PAGE_SIZE);
            let _ = warm(machine, &c, (0..PAGES).rev()); // a page that the fault reads in is its own
        }
    };
    let user = |number| {
        let _stopping = StopAtEnd(&stop);
        if number == 0 { looks() } else { shrinks() }
    };
    together(2, user, || {
        let _stopping = StopAtEnd(&stop);
        let mut round = 0;
        until(|| {
            if let End::Mapped(..) = fault(&s, page(AT, round % 30), Access::Read) {
                for i in mapped(&s, AT, PAGES) {
                    let known = [mark(i), if i < 40 { mark(i) } else { 0 }];
                    assert!(first_byte(&s, page(AT, i)).is_none_or(|byte| known.contains(&byte)), "page {i}");
                }
            }
            turn.fetch_add(1, SeqCst);
            s.discard(AT, PAGES * PAGE_SIZE).expect("mapped");
            turn.fetch_add(1, SeqCst);
            round += 1;
            round >= 300 && seen.load(SeqCst) >= 20 || stop.load(SeqCst)
        });
    });
    assert!(seen.load(SeqCst) >= 20, "seen {seen:?} times");
    // Nothing is mapped and no fault is under way: no page has a count left, so all of them can go.
    assert_eq!(s.account().resident_bytes(), 0);
    c.evict(machine);
    assert_eq!(c.pages(), 0);
    drop((s, c));
    machine.nothing_left()?;
    Ok(())
}

#[test]
fn c46_the_mapping_takes_the_callers_reference_and_a_failure_leaves_it() -> Result {
    let machine = machine();
    let c = cache(machine, &marked(), 4)?;
    let s = space(machine)?;
    s.map(at(AT, anonymous(2, RW)))?;
    let file_at = VirtAddr(AT.0 + (1 << 30));
    s.map(at(file_at, private(&c, 0, 4, RW)))?;
    fault(&s, AT, Access::Write);
    let own = frame(&s, AT).ok_or("mapped")?;
    assert_eq!(counts(machine, own), (1, 1), "the reference is the mapping's alone");
    let zero = machine.vm().zero_page();
    let before = counts(machine, zero);
    fault(&s, page(AT, 1), Access::Read);
    assert_eq!((frame(&s, page(AT, 1)), counts(machine, zero)), (Some(zero), before), "not counted");

    let pfn = cached_frame(machine, &c, 1)?;
    s.quiesce();
    let taken = machine.leave_free(1);
    // No memory for the tables: the cache has its page still, and its reference alone.
    assert_eq!(fault(&s, page(file_at, 1), Access::Read), End::Error(FaultError::NoMemory));
    assert_eq!(counts(machine, pfn), (1, 0));
    // A page for a copy there is, but no tables: it goes back.
    assert_eq!(fault(&s, page(file_at, 1), Access::Write), End::Error(FaultError::NoMemory));
    assert_eq!((counts(machine, pfn), machine.free_frames()), ((1, 0), 1));
    drop(taken);
    fault(&s, page(file_at, 1), Access::Read);
    assert_eq!(counts(machine, pfn), (2, 1), "the cache's and the mapping's");
    s.unmap(file_at, 4 * PAGE_SIZE)?;
    assert_eq!(counts(machine, pfn), (1, 0));
    Ok(())
}

#[test]
fn r07_the_mapping_goes_while_a_fault_obtains_its_page() -> Result {
    let machine = machine();
    let segv = |why| End::Error(FaultError::Segv(why));
    type Change = fn(&Space);
    let changes: [(&str, Change, End); 5] = [
        ("unmapped", |s| s.unmap(AT, 16 * PAGE_SIZE).expect("mapped"), segv(Segv::NotMapped)),
        ("protected", |s| s.protect(AT, 16 * PAGE_SIZE, NONE).expect("mapped"), segv(Segv::Access)),
        ("moved", |s| moved(s), segv(Segv::NotMapped)),
        // Found anew, it is another mapping: what that one shows is mapped.
        ("replaced", |s| replaced(s), End::Mapped(true, 0)),
        ("split", |s| s.unmap(page(AT, 8), 8 * PAGE_SIZE).expect("mapped"), End::Mapped(true, 0)),
    ];
    for access in [Access::Read, Access::Write] {
        for (name, change, expected) in changes {
            let (file, hook) = hooked();
            let c = cache(machine, &file, 16)?;
            let s = space(machine)?;
            s.map(at(AT, private(&c, 0, 16, RW)))?;
            let inner = s.clone();
            hook.arm(5, move || change(&inner));
            let tables_before = machine.counts().tables_allocated;
            assert_eq!(fault(&s, page(AT, 5), access), expected, "{name}, {access:?}");
            assert!(!hook.is_armed());
            if let End::Error(_) = expected {
                assert_eq!(
                    machine.counts().tables_allocated,
                    tables_before,
                    "{name}: no table was even taken"
                );
                assert_eq!((check(&s).present, tables(&s)), (0, 1), "{name}");
                let pfn = cached_frame(machine, &c, 5)?;
                assert_eq!(
                    counts(machine, pfn),
                    (1, 0),
                    "{name}: the page that was read is the cache's alone"
                );
            } else {
                let shows = if name == "replaced" { 0 } else { mark(5) };
                assert_eq!(first_byte(&s, page(AT, 5)), Some(shows), "{name}, {access:?}");
            }
            drop((given_up(s)?, c));
            machine.nothing_left()?;
        }
    }
    Ok(())
}

fn moved(s: &Space) {
    let to = RemapTo::Fixed(VirtAddr(1 << 32));
    assert_eq!(s.remap(AT, 16 * PAGE_SIZE, 16 * PAGE_SIZE, to), Ok(VirtAddr(1 << 32)));
}

fn replaced(s: &Space) {
    assert_eq!(s.map(at(AT, anonymous(16, RW))).map(|m| m.range.start), Ok(AT));
}

/// Drops the last reference to a space: no hook has one any more.
fn given_up(space: Space) -> Result {
    check(&space);
    std::sync::Arc::try_unwrap(space).map(drop).map_err(|_| "somebody holds the space".into())
}

#[test]
fn r10_exit_leaves_no_resident_page_no_table_and_the_caches_references() -> Result {
    let machine = machine();
    let c = cache(machine, &marked(), 64)?;
    let s = space(machine)?;
    s.map(at(AT, anonymous(600, RW)))?;
    let (shared_at, private_at) = (VirtAddr(1 << 35), VirtAddr(1 << 40));
    s.map(at(shared_at, shared(&c, 0, 64, RW)))?;
    s.map(at(private_at, private(&c, 0, 64, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    for i in 0..600 {
        cpu.touch(page(AT, i), if i % 3 == 0 { Access::Read } else { Access::Write })?;
    }
    for i in 0..64 {
        cpu.touch(page(shared_at, i), if i % 2 == 0 { Access::Read } else { Access::Write })?;
        cpu.touch(page(private_at, i), if i % 5 == 0 { Access::Write } else { Access::Read })?;
    }
    let pages: Vec<_> = (0..64).filter_map(|i| frame(&s, page(shared_at, i))).collect();
    assert_eq!((pages.len(), check(&s).present), (64, 600 + 64 + 64));
    // Unmapped one by one, the sums come to nothing before the space goes.
    for (at, pages) in [(AT, 600), (shared_at, 64), (private_at, 64)] {
        s.unmap(at, pages * PAGE_SIZE)?;
    }
    let account = s.account();
    assert_eq!((account.resident_bytes(), account.tables_bytes()), (0, PAGE_SIZE));
    assert!(pages.iter().all(|pfn| counts(machine, *pfn) == (1, 0)));
    // And with everything mapped, exit does the same.
    s.map(at(private_at, private(&c, 0, 64, RW)))?;
    for i in 0..64 {
        cpu.touch(page(private_at, i), if i % 5 == 0 { Access::Write } else { Access::Read })?;
    }
    drop(cpu);
    drop(s);
    machine.vm().quiesce(machine);
    assert!(pages.iter().all(|pfn| counts(machine, *pfn) == (1, 0)));
    let held = machine.vm().held(machine);
    assert_eq!((held.tables, held.in_limbo), (0, 0));
    drop(c);
    machine.nothing_left()?;
    Ok(())
}
