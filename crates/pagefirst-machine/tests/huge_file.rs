//! Huge pages of files: where they go, what they cost, how they come apart; large folios mapped by small entries.

mod kit;

use kit::{
    Cache, LEAF, R, RW, Result, Space, check, entry, frame, page, private, shared, space_with, tables,
};
use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::fault::{Bus, FaultError, Outcome};
use pagefirst::file::{FileCache, ShmemHuge};
use pagefirst::frame::{Frame, FrameFlags, head_of};
use pagefirst::platform::Platform;
use pagefirst::space::{Advice, Map, RemapTo};
use pagefirst::sync::epoch::Pin;
use pagefirst::types::{Access, PAGE_SIZE, Pfn, VirtAddr, VirtRange};
use pagefirst_machine::{Config, Machine, MachineFile};
use std::sync::atomic::Ordering::Relaxed;

/// Small pages in a huge one.
const SMALL: u64 = LEAF / PAGE_SIZE;
/// Where mappings begin: a multiple of 2 MiB.
const BASE: VirtAddr = VirtAddr(1 << 40);

fn machine() -> &'static Machine {
    Machine::new(Config { memory: 32 << 20, ..kit::hardware() })
}

fn memory_file(machine: &'static Machine, huge: ShmemHuge, size: u64) -> Result<Cache> {
    Ok(FileCache::new(machine, MachineFile::shmem(huge), size)?)
}

/// A space, a memory file of so many huge pages, and a mapping of it.
fn mapped(
    pages: u64,
    map: impl Fn(&Cache) -> Map<Machine>,
) -> Result<(&'static Machine, Space, Cache, VirtAddr)> {
    let machine = machine();
    let file = memory_file(machine, ShmemHuge::Always, pages * LEAF)?;
    let space = space_with(machine, kit::policy())?;
    let at = space.map(kit::at(BASE, map(&file)))?.range.start;
    Ok((machine, space, file, at))
}

/// How a fault ended that mapped something: major, huge, neighbours.
fn fault(space: &Space, at: VirtAddr, access: Access) -> Result<(bool, bool, u32)> {
    match space.fault(at, access) {
        Outcome::Mapped { major, huge, around } => Ok((major, huge, around)),
        other => Err(format!("{access:?} at {at}: {:?}", other.error()).into()),
    }
}

fn is_huge(space: &Space, at: VirtAddr) -> bool {
    let (raw, level) = entry(space, at);
    level == 1 && X86_64::frame(raw, 1).is_some()
}

/// The folio mapped at an address: its first frame.
fn folio(space: &Space, at: VirtAddr) -> Pfn {
    head_of(space.platform(), frame(space, at).expect("mapped"))
}

/// Mappings of that folio.
fn maps(space: &Space, at: VirtAddr) -> u32 {
    space.platform().meta(folio(space, at)).counts().maps
}

fn nothing_left(machine: &'static Machine, held: impl Sized) -> Result {
    drop(held);
    Ok(machine.nothing_left()?)
}

// catches: huge_counts_pages
#[test]
fn x11_a_huge_read_takes_one_entry_one_count_and_no_leaf_table() -> Result {
    let (machine, space, file, at) = mapped(2, |f| shared(f, 0, 2 * SMALL, R))?;
    assert_eq!(fault(&space, page(at, 77), Access::Read)?, (true, true, 0));
    assert!(is_huge(&space, at) && is_huge(&space, page(at, 511)) && !is_huge(&space, page(at, 512)));
    assert_eq!((maps(&space, at), tables(&space)), (1, 3));
    let account = space.account();
    assert_eq!((account.file_bytes, account.huge_file_bytes), (LEAF, LEAF));
    assert_eq!((account.anon_bytes, account.huge_bytes), (0, 0));
    assert_eq!((account.faults.file_read, account.faults.huge, account.faults.no_huge), (1, 1, 0));
    assert_eq!(file.pages(), SMALL);
    // Cached by now, and huge at once, for whoever maps it.
    let other = space_with(machine, kit::policy())?;
    other.map(kit::at(BASE, private(&file, 0, 2 * SMALL, RW)))?;
    assert_eq!(fault(&other, page(at, 5), Access::Read)?, (false, true, 0));
    assert_eq!(folio(&other, at), folio(&space, at));
    assert_eq!(maps(&space, at), 2);
    check(&space);
    check(&other);
    space.unmap(at, 2 * LEAF)?;
    assert_eq!(maps(&other, at), 1);
    nothing_left(machine, (space, other, file))
}

#[test]
fn x22_every_observer_knows_huge_entries_of_files() -> Result {
    let (machine, space, file, at) = mapped(2, |f| shared(f, 0, 2 * SMALL, RW))?;
    assert!(space.populate(kit_range(at, 2), RW).is_none());
    assert_eq!((space.account().faults.file_read, space.account().faults.huge), (2, 2));
    let there = space.page_table().translate(&Pin::new(machine), page(at, 700)).ok_or("mapped")?;
    assert_eq!((there.level, there.pfn), (1, folio(&space, page(at, 700)).add(700 - 512)));
    assert_eq!(space.resident_bytes(), 2 * LEAF);
    assert_eq!(space.tables().present, 2);
    space.copy_out(page(at, 600), b"by hand").map_err(|e| e.to_string())?;
    let mut seen = [0; 7];
    space.copy_in(page(at, 600), &mut seen).map_err(|e| e.to_string())?;
    assert_eq!(&seen, b"by hand");
    assert_eq!(file.read_at(machine, 600 * PAGE_SIZE, &mut seen).map_err(|e| format!("{e:?}"))?, 7);
    assert_eq!(&seen, b"by hand");
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    assert_eq!(cpu.load_u64(page(at, 600))?.to_le_bytes()[..7], *b"by hand");
    cpu.leave();
    check(&space);
    nothing_left(machine, (space, file))
}

fn kit_range(at: VirtAddr, huge: u64) -> pagefirst::types::VirtRange {
    pagefirst::types::VirtRange::new(at, VirtAddr(at.0 + huge * LEAF))
}

#[test]
fn where_a_huge_entry_does_not_fit_small_ones_come_in_the_same_call() -> Result {
    // Misaligned by a page; ends inside; the table is there, since something is mapped in it.
    let (machine, space, file, at) = mapped(2, |f| shared(f, 1, 2 * SMALL - 1, R))?;
    assert_eq!(fault(&space, page(at, 20), Access::Read)?, (true, false, 15));
    space.unmap(at, 2 * LEAF)?;
    space.map(kit::at(at, shared(&file, 0, SMALL - 1, R)))?;
    assert_eq!(fault(&space, page(at, 20), Access::Read)?, (false, false, 15));
    assert_eq!(maps(&space, page(at, 20)), 16);
    space.unmap(at, LEAF)?;
    space.map(kit::at(at, private(&file, 0, SMALL, RW)))?;
    assert_eq!(fault(&space, page(at, 3), Access::Write)?, (false, false, 0));
    // A copy of the window's fourth page is there already.
    assert_eq!(fault(&space, page(at, 4), Access::Read)?, (false, false, 14));
    assert_eq!((maps(&space, page(at, 4)), maps(&space, page(at, 3))), (15, 1));
    let account = space.account();
    assert_eq!((account.file_bytes, account.anon_bytes), (15 * PAGE_SIZE, PAGE_SIZE));
    // Advice against.
    space.map(kit::at(page(at, 512), shared(&file, 512, SMALL, R)))?;
    space.advise(page(at, 512), LEAF, Advice::NoHuge)?;
    assert_eq!(fault(&space, page(at, 520), Access::Read)?, (true, false, 0), "a small folio, then");
    check(&space);
    nothing_left(machine, (space, file))
}

// catches: huge_past_end
#[test]
fn x09_nothing_is_mapped_beyond_the_end_though_a_folio_reaches_there() -> Result {
    let machine = machine();
    let size = LEAF + 20 * PAGE_SIZE + 5;
    let file = memory_file(machine, ShmemHuge::Always, size)?;
    let space = space_with(machine, kit::policy())?;
    space.map(kit::at(BASE, shared(&file, 0, 3 * SMALL, RW)))?;
    assert_eq!(fault(&space, BASE, Access::Read)?, (true, true, 0));
    // The folio is there with all its pages; of the window those below the end are mapped.
    assert_eq!(fault(&space, page(BASE, 512 + 17), Access::Read)?, (true, false, 4));
    assert_eq!(file.pages(), 2 * SMALL);
    assert_eq!(kit::mapped(&space, page(BASE, 512), 40), [16, 17, 18, 19, 20]);
    for beyond in [512 + 21, 1023, 1024] {
        let end = space.fault(page(BASE, beyond), Access::Read).error();
        assert_eq!(end, Some(FaultError::Bus(Bus::BeyondEnd)));
    }
    // It grows into what is there, and then it is huge for who maps it anew.
    file.set_size(machine, 2 * LEAF);
    assert_eq!(fault(&space, page(BASE, 512 + 100), Access::Read)?, (false, false, 15));
    space.discard(page(BASE, 512), LEAF)?;
    assert_eq!(fault(&space, page(BASE, 512 + 100), Access::Read)?, (false, true, 0));
    check(&space);
    nothing_left(machine, (space, file))
}

#[test]
fn x10_a_huge_entry_avoids_a_folio_with_a_poisoned_part() -> Result {
    let (machine, space, file, at) = mapped(1, |f| shared(f, 0, SMALL, RW))?;
    assert_eq!(fault(&space, at, Access::Read)?, (true, true, 0));
    let bad = folio(&space, at).add(21);
    space.discard(at, LEAF)?;
    machine.hook_set_flags(head_of(machine, bad), FrameFlags::HURT);
    machine.hook_set_flags(bad, FrameFlags::POISON);
    // Its other pages are mapped, page by page.
    assert_eq!(fault(&space, page(at, 20), Access::Read)?, (false, false, 14));
    let poisoned = space.fault(page(at, 21), Access::Read).error();
    assert_eq!(poisoned, Some(FaultError::Bus(Bus::Poison)));
    assert_eq!(fault(&space, page(at, 300), Access::Write)?, (false, false, 0));
    assert_eq!(frame(&space, page(at, 21)), None);
    check(&space);
    drop(space);
    drop(file);
    Ok(())
}

#[test]
fn x12_no_dirty_bit_is_lost_when_a_huge_entry_is_cut() -> Result {
    let (machine, space, file, at) = mapped(1, |f| shared(f, 0, SMALL, RW))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    assert_eq!(cpu.load_u64(page(at, 9))?, 0);
    let head = folio(&space, at);
    let is_dirty = || machine.meta(head).flags().contains(FrameFlags::DIRTY);
    assert!(is_huge(&space, at) && !is_dirty());
    // Writable from the first: hardware alone knows.
    cpu.store(page(at, 9), b"written")?;
    assert!(is_huge(&space, at));
    space.unmap(page(at, 100), 50 * PAGE_SIZE)?;
    assert!(!is_huge(&space, at));
    assert_eq!(maps(&space, at), SMALL as u32 - 50);
    assert!(kit::attrs(&space, page(at, 9)).contains(Attrs::DIRTY) || is_dirty());
    check(&space);
    cpu.leave();
    space.unmap(at, LEAF)?;
    assert!(is_dirty());
    assert_eq!(machine.meta(head).counts().maps, 0);
    assert_eq!(file.evict(machine), 0, "what is written is nowhere else");
    let mut seen = [0; 7];
    assert_eq!(file.read_at(machine, 9 * PAGE_SIZE, &mut seen).map_err(|e| format!("{e:?}"))?, 7);
    assert_eq!(&seen, b"written");
    drop(cpu);
    nothing_left(machine, (space, file))
}

#[test]
fn huge_file_entries_are_cut_moved_and_narrowed_like_others() -> Result {
    let (machine, space, file, at) = mapped(4, |f| shared(f, 0, 4 * SMALL, RW))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    for i in 0..4 * SMALL {
        cpu.store(page(at, i), &(i + 1).to_le_bytes())?;
    }
    assert_eq!(cpu.counts().huge, 4);
    assert_eq!(space.account().huge_file_bytes, 4 * LEAF);
    // Narrowed whole, and widened again by the next write, in place.
    space.protect(at, LEAF, R)?;
    assert!(is_huge(&space, at) && !kit::attrs(&space, at).contains(Attrs::WRITE));
    space.protect(at, LEAF, RW)?;
    cpu.store(page(at, 1), &2u64.to_le_bytes())?;
    assert!(is_huge(&space, at));
    // Narrowed in part.
    space.protect(page(at, 512), 3 * PAGE_SIZE, R)?;
    assert!(!is_huge(&space, page(at, 512)));
    assert!(cpu.store(page(at, 513), b"no").is_err());
    cpu.store(page(at, 515), &516u64.to_le_bytes())?;
    assert_eq!(maps(&space, page(at, 512)), SMALL as u32);
    // Moved, whole, and then by a page, in pieces.
    let to = VirtAddr(at.0 + 64 * LEAF);
    space.remap(page(at, 1024), LEAF, LEAF, RemapTo::Fixed(to))?;
    assert!(is_huge(&space, to));
    assert_eq!(maps(&space, to), 1);
    let odd = page(to, 1 + 64 * SMALL);
    space.remap(to, LEAF, LEAF, RemapTo::Fixed(odd))?;
    assert!(!is_huge(&space, odd));
    assert_eq!(maps(&space, odd), SMALL as u32);
    for i in 0..SMALL {
        assert_eq!(cpu.load_u64(page(odd, i))?, 1025 + i);
        assert_eq!(cpu.load_u64(page(at, i))?, 1 + i);
        assert_eq!(cpu.load_u64(page(at, 512 + i))?, 513 + i);
    }
    // Discarded in part: all of it goes, and is found in the file again.
    space.discard(page(at, 1536 + 7), PAGE_SIZE)?;
    assert_eq!(frame(&space, page(at, 1536 + 7)), None);
    assert_eq!(cpu.load_u64(page(at, 1536 + 7))?, 1536 + 8);
    assert_eq!(maps(&space, page(at, 1536)), 1);
    check(&space);
    drop(cpu);
    nothing_left(machine, (space, file))
}

#[test]
fn a_private_write_takes_a_huge_entry_out_and_copies_a_small_page() -> Result {
    let (machine, space, file, at) = mapped(1, |f| private(f, 0, SMALL, RW))?;
    file.write_at(machine, 0, b"the file's").map_err(|e| format!("{e:?}"))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    assert_eq!(cpu.load_u64(page(at, 5))?, 0);
    assert!(is_huge(&space, at));
    cpu.store(at, b"ours")?;
    assert_eq!(cpu.load_u64(at)?.to_le_bytes(), *b"oursfile");
    assert!(!is_huge(&space, at));
    let account = space.account();
    assert_eq!((account.anon_bytes, account.huge_bytes), (PAGE_SIZE, 0));
    assert_eq!(cpu.load_u64(page(at, 5))?, 0);
    let mut seen = [0; 10];
    file.read_at(machine, 0, &mut seen).map_err(|e| format!("{e:?}"))?;
    assert_eq!(&seen, b"the file's");
    check(&space);
    drop(cpu);
    nothing_left(machine, (space, file))
}

#[test]
fn memory_files_get_folios_by_policy_and_advice() -> Result {
    use ShmemHuge::{Advise, Always, Never, WithinSize};
    let size = LEAF + 24 * PAGE_SIZE;
    for (huge, advice, full, last) in [
        (Never, None, 1, 1),
        (Never, Some(Advice::Huge), 1, 1),
        (Advise, None, 1, 1),
        (Advise, Some(Advice::Huge), SMALL, SMALL),
        (WithinSize, None, SMALL, 16),
        (WithinSize, Some(Advice::Huge), SMALL, SMALL),
        (WithinSize, Some(Advice::NoHuge), 1, 1),
        (Always, None, SMALL, SMALL),
        (Always, Some(Advice::NoHuge), 1, 1),
    ] {
        let machine = machine();
        let file = memory_file(machine, huge, size)?;
        let space = space_with(machine, kit::policy())?;
        space.map(kit::at(BASE, shared(&file, 0, 2 * SMALL, R)))?;
        if let Some(advice) = advice {
            space.advise(BASE, 2 * LEAF, advice)?;
        }
        for (index, pages) in [(3, full), (512 + 3, last)] {
            let before = file.pages();
            let (_, is_huge, _) = fault(&space, page(BASE, index), Access::Read)?;
            assert_eq!(file.pages() - before, pages, "{huge:?} {advice:?} {index}");
            assert_eq!(is_huge, pages == SMALL && index < 512, "{huge:?} {advice:?} {index}");
        }
        check(&space);
        nothing_left(machine, (space, file))?;
    }
    Ok(())
}

#[test]
fn folios_are_smaller_where_pages_are_there_and_where_memory_is_short() -> Result {
    let (machine, space, file, at) = mapped(2, |f| shared(f, 0, 2 * SMALL, RW))?;
    // A page that came when there was advice against larger ones.
    space.advise(at, LEAF, Advice::NoHuge)?;
    assert_eq!(fault(&space, page(at, 64), Access::Write)?, (true, false, 0));
    space.advise(at, LEAF, Advice::Huge)?;
    let counts: Vec<u64> = [0, 100, 300]
        .into_iter()
        .map(|i| {
            let before = file.pages();
            assert!(fault(&space, page(at, i), Access::Write).is_ok());
            file.pages() - before
        })
        .collect();
    assert_eq!(counts, [64, 32, 256]);
    assert_eq!(space.account().faults.no_huge, 0);
    // No block of 2 MiB is free: the largest that is.
    let mut blocks = Vec::new();
    for order in [9, 8, 7] {
        while let Ok(block) = Frame::block(machine, order) {
            blocks.push(block);
        }
    }
    assert_eq!(fault(&space, page(at, 512), Access::Write)?, (true, false, 0));
    assert_eq!(space.account().faults.no_huge, 1);
    assert!(file.pages() < 353 + 128);
    check(&space);
    drop(blocks);
    nothing_left(machine, (space, file))
}

#[test]
fn a_folio_across_the_new_end_is_split_or_zeroed() -> Result {
    let (machine, space, file, at) = mapped(2, |f| shared(f, 0, 2 * SMALL, RW))?;
    let write =
        |index: u64| file.write_at(machine, index * PAGE_SIZE, &[7; 4096]).map_err(|e| format!("{e:?}"));
    (0..2 * SMALL).try_for_each(|i| write(i).map(drop))?;
    // Nobody maps it: pages beyond the end are freed at once.
    file.set_size(machine, LEAF + 5 * PAGE_SIZE + 100);
    assert_eq!(file.pages(), SMALL + 6);
    file.set_size(machine, 2 * LEAF);
    let mut seen = [1; 4096];
    file.read_at(machine, LEAF + 5 * PAGE_SIZE, &mut seen).map_err(|e| format!("{e:?}"))?;
    assert!(seen[..100] == [7; 100] && seen[100..] == [0; 3996]);
    file.read_at(machine, LEAF + 6 * PAGE_SIZE, &mut seen).map_err(|e| format!("{e:?}"))?;
    assert_eq!(seen, [0; 4096]);
    // Dropped whole where nothing is in it.
    assert_eq!(fault(&space, at, Access::Read)?, (false, true, 0));
    space.discard(at, LEAF)?;
    file.set_size(machine, 0);
    assert_eq!(file.pages(), 0);
    check(&space);
    nothing_left(machine, (space, file))
}

// The first page beyond the end is in a folio by itself by then, and so is the one that was written to by who had it pinned.
// catches: grow_clears_one_folio
#[test]
fn r13_pages_beyond_the_end_are_zero_when_the_file_grows_whatever_became_of_their_folio() -> Result {
    let machine = machine();
    for by_writing in [false, true] {
        let store = MachineFile::shmem(ShmemHuge::Always).with_folios(3);
        let file = FileCache::new(machine, store, 8 * PAGE_SIZE)?;
        let space = space_with(machine, kit::policy())?;
        space.map(kit::at(BASE, shared(&file, 0, 8, RW)))?;
        fault(&space, page(BASE, 6), Access::Write)?;
        let pin = space.pin(VirtRange::new(page(BASE, 6), page(BASE, 7)), true).map_err(|e| e.to_string())?;
        file.set_size(machine, 5 * PAGE_SIZE);
        let device = pin.first();
        machine.cells(device)[0].store(7, Relaxed);
        drop(pin);
        space.discard(BASE, 8 * PAGE_SIZE)?;
        file.punch(machine, PAGE_SIZE..2 * PAGE_SIZE);
        match by_writing {
            true => assert_eq!(file.write_at(machine, 8 * PAGE_SIZE, &[1]).map_err(|e| format!("{e:?}"))?, 1),
            false => file.set_size(machine, 8 * PAGE_SIZE),
        }
        let mut seen = [1; 8 * PAGE_SIZE as usize];
        file.read_at(machine, 0, &mut seen).map_err(|e| format!("{e:?}"))?;
        assert_eq!(seen.iter().max(), Some(&0));
        check(&space);
        drop((space, file));
    }
    nothing_left(machine, ())
}

#[test]
fn files_with_contents_have_large_folios_too() -> Result {
    let machine = machine();
    let content = kit::marked().with_folios(4);
    content.fail_reads(37, true);
    let file = FileCache::new(machine, content.clone(), 100 * PAGE_SIZE)?;
    let space = space_with(machine, kit::policy())?;
    space.map(kit::at(BASE, private(&file, 0, 128, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    for i in (0..100).filter(|i| *i != 37) {
        assert_eq!(cpu.load_u64(page(BASE, i))?.to_le_bytes(), [kit::mark(i); 8]);
    }
    assert!(cpu.load_u64(page(BASE, 37)).is_err() && cpu.load_u64(page(BASE, 100)).is_err());
    assert_eq!(file.pages(), 99);
    assert_eq!(maps(&space, BASE), 16);
    cpu.store(page(BASE, 3), b"copy")?;
    assert_eq!(maps(&space, page(BASE, 4)), 15);
    // Stored page by page, below the end alone.
    file.write_at(machine, 99 * PAGE_SIZE, b"tail").map_err(|e| format!("{e:?}"))?;
    file.write_at(machine, 0, b"head").map_err(|e| format!("{e:?}"))?;
    assert_eq!(file.write_back(machine)?, 16 + 4);
    assert_eq!(content.stored(0)[..5], [b'h', b'e', b'a', b'd', kit::mark(0)]);
    assert_eq!(content.stored(15)[..], [kit::mark(15); 4096]);
    assert_eq!((content.stored(99).len(), content.stored(90).len()), (4096, 0));
    check(&space);
    drop(cpu);
    nothing_left(machine, (space, file))
}
