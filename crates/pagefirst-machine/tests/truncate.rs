//! Files that shrink, grow and have holes punched in them while they are mapped (r05, r13, r14, x09).

mod kit;

use kit::*;
use pagefirst::arch::{Aarch64, Format, Sv39, X86_64};
use pagefirst::fault::{Bus, FaultError};
use pagefirst::file::{ReadError, ShmemHuge};
use pagefirst::platform::Platform;
use pagefirst::space::{Advice, RemapTo};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr, VirtRange};
use pagefirst_machine::{Machine, MachineFile};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, SeqCst};

const AT: VirtAddr = VirtAddr(1 << 30);
const FAR: VirtAddr = VirtAddr((1 << 31) + 3 * PAGE_SIZE);
const PAGES: u64 = 600; // more than a leaf table of any format
const BEYOND: End = End::Error(FaultError::Bus(Bus::BeyondEnd));

/// A file of zeros, mapped shared at `AT` and privately at `FAR`; each page has its number, and so has its private copy,
/// but for every third.
fn mapped_twice<F: Format>(machine: &'static Machine<F>) -> Result<(Space<F>, Cache<F>)> {
    let (s, c) = (space(machine)?, cache(machine, &pagefirst_machine::MachineFile::zeros(), PAGES)?);
    s.map(at(AT, shared(&c, 0, PAGES, RW)))?;
    s.map(at(FAR, private(&c, 0, PAGES, RW)))?;
    for i in 0..PAGES {
        put(&s, page(AT, i), i + 1)?;
        if i % 3 > 0 {
            put(&s, page(FAR, i), i + 1000)?;
        } else {
            fault(&s, page(FAR, i), Access::Read);
        }
    }
    Ok((s, c))
}

fn what_is_beyond_the_end_goes_with_private_copies<F: Format>() -> Result {
    let machine = machine_of::<F>();
    let (s, c) = mapped_twice(machine)?;
    let other = space(machine)?;
    // In another space, and not from the file's start.
    other.map(at(AT, private(&c, 100, 50, R)))?;
    for i in 0..50 {
        fault(&other, page(AT, i), Access::Read);
    }
    for end in [400, 120, 101, 1, 0] {
        c.set_size(machine, end * PAGE_SIZE);
        for first in [AT, FAR] {
            assert_eq!(mapped(&s, first, PAGES), (0..end).collect::<Vec<_>>(), "cut at {end}");
        }
        assert_eq!(mapped(&other, AT, 50), (0..end.saturating_sub(100).min(50)).collect::<Vec<_>>());
        assert_eq!(c.pages(), end);
        assert_eq!(fault(&s, page(FAR, end), Access::Write), BEYOND);
        assert_eq!(fault(&s, page(AT, end), Access::Read), BEYOND);
        check(&s);
        check(&other);
    }
    assert_eq!(tables(&s), 1, "the tables went with the pages");
    // What comes back is new.
    c.set_size(machine, PAGES * PAGE_SIZE);
    for i in (0..PAGES).step_by(7) {
        assert_eq!((get(&s, page(AT, i)).ok(), get(&s, page(FAR, i)).ok()), (Some(0), Some(0)));
    }
    drop((s, other, c));
    Ok(machine.nothing_left()?)
}

fn what_is_in_a_hole_goes_and_private_copies_stay<F: Format>() -> Result {
    let machine = machine_of::<F>();
    let (s, c) = mapped_twice(machine)?;
    let hole = 30..550;
    c.punch(machine, 30 * PAGE_SIZE..550 * PAGE_SIZE);
    let (there, copies): (Vec<u64>, Vec<u64>) = (
        (0..PAGES).filter(|i| !hole.contains(i)).collect(),
        (0..PAGES).filter(|i| !hole.contains(i) || i % 3 > 0).collect(),
    );
    assert_eq!((mapped(&s, AT, PAGES), mapped(&s, FAR, PAGES)), (there, copies));
    assert_eq!((c.pages(), c.size()), (PAGES - 520, PAGES * PAGE_SIZE));
    for i in 0..PAGES {
        let whole = if hole.contains(&i) { 0 } else { i + 1 };
        assert_eq!(get(&s, page(AT, i)).ok(), Some(whole));
        assert_eq!(get(&s, page(FAR, i)).ok(), Some(if i % 3 > 0 { i + 1000 } else { whole }));
    }
    // A part of a page is zeroed where it is, for all who see it.
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    cpu.store_u64(page(AT, 3), u64::MAX)?;
    c.punch(machine, 3 * PAGE_SIZE + 2..3 * PAGE_SIZE + 5);
    assert_eq!(cpu.load_u64(page(AT, 3))?, 0xffff_ff00_0000_ffff);
    check(&s);
    drop(cpu);
    drop((s, c));
    Ok(machine.nothing_left()?)
}

#[test]
fn r05_what_is_beyond_the_end_goes_with_private_copies() -> Result {
    what_is_beyond_the_end_goes_with_private_copies::<X86_64>()?;
    what_is_beyond_the_end_goes_with_private_copies::<Sv39>()?;
    what_is_beyond_the_end_goes_with_private_copies::<Aarch64>()
}

#[test]
fn r05_what_is_in_a_hole_goes_and_private_copies_stay() -> Result {
    what_is_in_a_hole_goes_and_private_copies_stay::<X86_64>()?;
    what_is_in_a_hole_goes_and_private_copies_stay::<Sv39>()?;
    what_is_in_a_hole_goes_and_private_copies_stay::<Aarch64>()
}

#[test]
fn a_mapping_that_was_cut_up_moved_and_forked_is_found_whole() -> Result {
    let machine = machine();
    let (s, c) = mapped_twice(machine)?;
    // Split, merged again in part, moved, grown; what another thing takes the place of is no concern.
    s.protect(page(AT, 100), 50 * PAGE_SIZE, R)?;
    s.protect(page(AT, 120), 10 * PAGE_SIZE, RW)?;
    s.unmap(page(FAR, 200), 100 * PAGE_SIZE)?;
    let moved = s.remap(page(FAR, 400), 100 * PAGE_SIZE, 110 * PAGE_SIZE, RemapTo::Anywhere)?;
    s.map(at(page(FAR, 50), anonymous(10, RW)))?;
    put(&s, page(FAR, 55), 7)?;
    s.advise(page(FAR, 0), 20 * PAGE_SIZE, Advice::NoHuge)?;
    let child: Space = Arc::new(s.fork()?);
    let grandchild: Space = Arc::new(child.fork()?);
    drop(child);
    c.set_size(machine, 10 * PAGE_SIZE);
    for s in [&s, &grandchild] {
        assert_eq!(mapped(s, page(AT, 10), PAGES - 10), [0; 0]);
        assert_eq!(mapped(s, page(FAR, 10), PAGES - 10), [45], "of another mapping");
        assert_eq!(mapped(s, moved, 110), [0; 0]);
        assert_eq!(get(s, page(FAR, 55)).ok(), Some(7));
        check(s);
    }
    assert_eq!(c.pages(), 10);
    drop((s, grandchild, c));
    Ok(machine.nothing_left()?)
}

/// The file shrinks and grows, `then` tells each time whether anything is mapped beyond its end, while `works` goes on.
fn against(
    works: impl Fn(&Space, u64, u64) -> Result + Sync,
    maps: &[(VirtAddr, u64)],
    rounds: u64,
) -> Result {
    let machine = machine();
    let (s, c) = (space(machine)?, cache(machine, &pagefirst_machine::MachineFile::zeros(), 64)?);
    s.map(at(AT, shared(&c, 0, 64, RW)))?;
    s.map(at(FAR, private(&c, 0, 64, RW)))?;
    let stop = AtomicBool::new(false);
    let work = |number: u64| {
        let _stopping = StopAtEnd(&stop);
        for n in 0.. {
            if stop.load(Acquire) {
                return;
            }
            works(&s, number, n).expect("it works");
        }
    };
    together(2, work, || {
        let _stopping = StopAtEnd(&stop);
        for n in 0..rounds {
            let end = n * 7 % 60;
            if n % 3 == 0 {
                c.punch(machine, end * PAGE_SIZE..(end + 4) * PAGE_SIZE);
            }
            c.set_size(machine, end * PAGE_SIZE + n % 2 * 8);
            // Faults come all the time, and none of them may bring such a page in.
            let first = end + n % 2;
            for (at, pages) in maps {
                let left = mapped(&s, page(*at, first), pages - first);
                assert!(left.is_empty(), "round {n}, {at}, cut at {first}: {left:?} are mapped");
            }
            c.set_size(machine, 64 * PAGE_SIZE);
        }
    });
    check(&s);
    drop((s, c));
    Ok(machine.nothing_left()?)
}

fn touch(s: &Space, at: VirtAddr, n: u64) {
    let va = page(at, n * 11 % 64);
    match n % 3 {
        0 => drop(s.copy_out(va, &n.to_le_bytes())),
        1 => drop(s.copy_in(va, &mut [0])),
        _ => drop(s.fault(va, Access::Write)),
    }
}

#[test]
fn r05_faults_bring_in_nothing_beyond_the_end() -> Result {
    let works = |s: &Space, number, n| {
        touch(s, if number == 0 { AT } else { FAR }, n);
        Ok(())
    };
    against(works, &[(AT, 64), (FAR, 64)], 400)
}

#[test]
fn r13_merges_and_splits_hide_no_mapping() -> Result {
    let works = |s: &Space, number, n: u64| {
        if number == 0 {
            touch(s, [AT, FAR][n as usize % 2], n);
            return Ok(());
        }
        let at = [AT, FAR][n as usize / 2 % 2];
        let prot = if n.is_multiple_of(2) { Prot::READ } else { RW };
        Ok(s.protect(page(at, 16 + n % 9), 24 * PAGE_SIZE, prot)?)
    };
    against(works, &[(AT, 64), (FAR, 64)], 400)
}

#[test]
fn r14_a_mapping_on_the_move_hides_no_page() -> Result {
    const THERE: VirtAddr = VirtAddr(3 << 30);
    let works = |s: &Space, number, n: u64| {
        let places = [FAR, THERE];
        if number == 0 {
            touch(s, places[n as usize % 2], n);
            touch(s, AT, n);
            return Ok(());
        }
        let (from, to) = (places[n as usize % 2], places[1 - n as usize % 2]);
        s.remap(from, 64 * PAGE_SIZE, 64 * PAGE_SIZE, RemapTo::Fixed(to))?;
        Ok(())
    };
    against(works, &[(AT, 64), (FAR, 64), (THERE, 64)], 400)
}

#[test]
fn r05_a_fork_meanwhile_takes_nothing_beyond_the_end() -> Result {
    let works = |s: &Space, number, n: u64| {
        if number == 0 {
            touch(s, FAR, n);
            return Ok(());
        }
        let child: Space = Arc::new(s.fork()?);
        // What it has it can read, or the file has no such page any more.
        for i in 0..64 {
            if let Some(pfn) = frame(&child, page(FAR, i)) {
                let (refs, maps) = counts(s.platform(), pfn);
                assert!(refs >= maps);
            }
        }
        touch(&child, FAR, n);
        Ok(())
    };
    against(works, &[(AT, 64), (FAR, 64)], 200)
}

/// A file of a folio that somebody holds, and a pin of one of its pages.
#[test]
fn r13_what_a_device_writes_beyond_the_end_does_not_come_back() -> Result {
    let machine = machine();
    let c = cache(machine, &MachineFile::shmem(ShmemHuge::Always).with_folios(3), 8)?;
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, 8, RW)))?;
    let device = |i: u64| -> Result {
        fault(&s, page(AT, i), Access::Write);
        let pin = s.pin(VirtRange::new(page(AT, i), page(AT, i + 1)), true).map_err(|e| e.to_string())?;
        c.set_size(machine, PAGE_SIZE + 8);
        machine.cells(pin.first())[7].store(0x55, SeqCst);
        Ok(())
    };
    for grows_by_write in [false, true] {
        for i in [1, 5] {
            c.set_size(machine, 8 * PAGE_SIZE);
            device(i)?;
            match grows_by_write {
                false => c.set_size(machine, 8 * PAGE_SIZE),
                true => drop(c.write_at(machine, 7 * PAGE_SIZE, &[1])?),
            }
            let mut seen = [1; 64];
            c.read_at(machine, i * PAGE_SIZE, &mut seen)?;
            assert_eq!(seen, [0; 64], "page {i}");
        }
    }
    Ok(())
}

/// What counts of a page have reached their limit, which never move again, does not say how often it is mapped.
#[test]
fn r13_a_page_whose_counts_have_reached_their_limit_is_removed_like_others() -> Result {
    const LIMIT: u32 = 1 << 31;
    for (refs, maps) in [(LIMIT, 1), (LIMIT, LIMIT)] {
        let machine = machine();
        let c = cache(machine, &marked(), 4)?;
        warm(machine, &c, 0..4)?;
        let s = space(machine)?;
        s.map(at(AT, shared(&c, 0, 4, RW)))?;
        fault(&s, page(AT, 2), Access::Read);
        let (gone, bad) = (frame(&s, page(AT, 2)).ok_or("mapped")?, frame(&s, page(AT, 3)).ok_or("mapped")?);
        machine.hook_counts(gone, refs, maps);
        machine.hook_counts(bad, refs, maps);
        machine.vm().poison(machine, bad);
        assert!(matches!(c.read_at(machine, 3 * PAGE_SIZE, &mut [0]), Err(ReadError::Poisoned)));
        c.punch(machine, 2 * PAGE_SIZE..3 * PAGE_SIZE);
        assert_eq!(mapped(&s, AT, 4), [0, 1]);
        c.set_size(machine, PAGE_SIZE);
        c.set_size(machine, 4 * PAGE_SIZE);
        assert_eq!((mapped(&s, AT, 4), c.pages()), (vec![0], 1));
        fault(&s, page(AT, 2), Access::Read);
        assert_ne!(frame(&s, page(AT, 2)), Some(gone), "it is never anybody's again");
        check(&s);
    }
    Ok(())
}
