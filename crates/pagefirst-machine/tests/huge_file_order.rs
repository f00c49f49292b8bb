//! Huge pages of files against faults, truncation and mapping calls, each race as one defined order of events.

mod stage;

use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::file::{Direct, FileCache, ShmemHuge};
use pagefirst::frame::{FrameFlags, head_of};
use pagefirst::platform::Platform;
use pagefirst::space::{Advice, MemoryType, RemapTo};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr};
use pagefirst_machine::MachineFile;
use stage::*;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};

const BASE: VirtAddr = VirtAddr(1 << 40);
const SMALL: u64 = 512;
const HUGE: u64 = SMALL * PAGE_SIZE;

type MapIt = fn(&Space, VirtAddr, &Cache, u64, Prot) -> Result;

/// A stage, a memory file of one huge page, and a space that maps it at `BASE`.
fn wanting(huge: ShmemHuge, map: MapIt) -> Result<(&'static Stage, Cache, Space)> {
    let stage = Stage::new(2560);
    let file = FileCache::new(stage, MachineFile::shmem(huge), HUGE)?;
    let s = stage.space()?;
    map(&s, BASE, &file, SMALL, RW)?;
    Ok((stage, file, s))
}

fn is_huge(space: &Space) -> bool {
    let raw = entry(space, BASE);
    X86_64::frame(raw, 1).is_some() && raw & 0x80 != 0
}

fn folio(stage: &'static Stage, space: &Space, va: VirtAddr) -> Result<Pfn> {
    Ok(head_of(stage, frame(space, va).ok_or("nothing mapped")?))
}

#[test]
fn c60_a_huge_entry_that_appears_over_the_address_settles_the_fault() -> Result {
    let (stage, file, s) = wanting(ShmemHuge::Always, private)?;
    stage.warm(&file, 0)?;
    let meanwhile = s.clone();
    // The copy of a small page is made, and not yet installed.
    stage.at(is_frame_allocated, move || {
        on(1, || assert_eq!(fault(&meanwhile, page(BASE, 9), Access::Read), "mapped"));
    });
    assert_eq!(fault(&s, BASE, Access::Write), "spurious");
    assert!(stage.is_done() && is_huge(&s));
    // The same write again takes the huge entry out, and copies.
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    assert!(!is_huge(&s));
    assert_eq!((s.tables().anon, s.tables().file), (1, 0));
    s.unmap(BASE, HUGE)?;
    drop(file);
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn c53_fault_around_ends_at_a_huge_entry_over_its_window() -> Result {
    let (stage, file, s) = wanting(ShmemHuge::Advise, shared)?;
    // Small pages by now, a huge one when they are gone.
    (0..16).try_for_each(|i| stage.warm(&file, i))?;
    s.advise(BASE, HUGE, Advice::Huge)?;
    let (meanwhile, cache) = (s.clone(), file.clone());
    stage.at(is_table_allocated, move || {
        on(1, || {
            assert_eq!(cache.evict(stage), 16);
            assert_eq!(fault(&meanwhile, page(BASE, 9), Access::Read), "mapped");
        });
    });
    assert_eq!(fault(&s, page(BASE, 3), Access::Read), "spurious");
    assert!(stage.is_done() && is_huge(&s));
    assert_eq!(stage.counts(folio(stage, &s, BASE)?), (2, 1), "the cache's, and one entry's");
    assert_eq!(s.tables().file, SMALL);
    s.unmap(BASE, HUGE)?;
    drop(file);
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn x09_a_huge_entry_is_not_made_when_the_file_has_shrunk_meanwhile() -> Result {
    for access in [Access::Read, Access::Write] {
        let (stage, file, s) = wanting(ShmemHuge::Always, shared)?;
        stage.warm(&file, 0)?;
        let shrunk = file.clone();
        stage.at(is_table_allocated, move || {
            on(1, || shrunk.set_size(stage, HUGE - 2 * PAGE_SIZE));
        });
        assert_eq!(fault(&s, BASE, access), "mapped");
        assert!(stage.is_done() && !is_huge(&s));
        assert!(frame(&s, page(BASE, SMALL - 2)).is_none());
        assert_eq!(fault(&s, page(BASE, SMALL - 2), access), "Bus(BeyondEnd)");
        assert_eq!(file.pages(), SMALL - 2);
        s.unmap(BASE, HUGE)?;
        drop(file);
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

// catches: split_loses_dirty
#[test]
fn x12_hardware_marks_a_file_before_the_split_and_nothing_is_lost() -> Result {
    let (stage, file, s) = wanting(ShmemHuge::Always, shared)?;
    stage.warm(&file, 0)?;
    assert_eq!(fault(&s, BASE, Access::Read), "mapped");
    assert!(is_huge(&s));
    let folio = folio(stage, &s, BASE)?;
    // Until the swap: the table is reserved, the entry not yet looked at.
    let meanwhile = s.clone();
    stage.at(is_table_allocated, move || {
        on(1, || hardware_marks(&meanwhile, BASE, Attrs::DIRTY | Attrs::ACCESSED))
    });
    s.unmap(BASE, PAGE_SIZE)?;
    assert!(stage.is_done());
    assert_eq!(stage.counts(folio), (SMALL as u32, SMALL as u32 - 1));
    for i in 1..SMALL {
        assert!(attrs(&s, page(BASE, i)).contains(Attrs::DIRTY | Attrs::ACCESSED), "page {i}");
    }
    s.unmap(BASE, HUGE)?;
    assert!(stage.meta(folio).flags().contains(FrameFlags::DIRTY));
    drop(file);
    stage.nothing_held(&[&s]);
    Ok(())
}

/// A program writes by a huge entry, which hardware alone marks. `begin` happens while the entry is on its way to another
/// place, until `is_begun`.
fn written_on_the_move(
    begin: fn(&'static Stage, &Cache, Pfn),
    is_begun: fn(&'static Stage, &Cache, Pfn) -> bool,
) -> Result {
    let (stage, file, s) = wanting(ShmemHuge::Always, shared)?;
    assert_eq!(fault(&s, BASE, Access::Read), "mapped");
    let pfn = folio(stage, &s, BASE)?;
    stage.words(pfn.add(1))[0].store(0x77, Release);
    hardware_marks(&s, BASE, Attrs::DIRTY | Attrs::ACCESSED);
    let (other, same) = (file.clone(), file.clone());
    let begun = stage.begin_at(
        |step| matches!(step, Step::Flush { .. }),
        move || begin(stage, &other, pfn),
        move || is_begun(stage, &same, pfn),
    );
    s.remap(BASE, HUGE, HUGE, RemapTo::Fixed(VirtAddr(2 << 40)))?;
    begun.end()?;
    // Memory is short.
    file.evict(stage);
    let mut byte = [0];
    file.read_at(stage, PAGE_SIZE, &mut byte).map_err(|e| format!("{e:?}"))?;
    assert!(byte == [0x77], "page 1 reads {byte:?}");
    Ok(())
}

// catches: move_loses_dirty
#[test]
fn x12_no_dirty_bit_is_lost_when_the_file_shrinks_while_its_huge_entry_moves() -> Result {
    let shrink = |stage, file: &Cache, _| file.set_size(stage, 5 * PAGE_SIZE);
    written_on_the_move(shrink, |_, file, _| file.size() == 5 * PAGE_SIZE)
}

// catches: move_loses_dirty
#[test]
fn x12_no_dirty_bit_is_lost_when_a_part_is_bad_while_its_huge_entry_moves() -> Result {
    let hurt = |stage: &'static Stage, _: &Cache, pfn: Pfn| {
        stage.vm().poison(stage, pfn.add(100));
    };
    let is_hurt =
        |stage: &'static Stage, _: &Cache, pfn: Pfn| stage.flags(pfn.add(100)).contains(FrameFlags::POISON);
    written_on_the_move(hurt, is_hurt)
}

/// A write finds a small page of a file that is memory itself, takes it out to put a copy there, and flushes. Its table is
/// dead by then, and another fault maps a huge page there. Then the first sees to the tables of its page.
#[test]
fn a_huge_page_that_comes_where_a_write_took_a_small_one_out_stays() -> Result {
    let stage = Stage::new(256);
    let is_huge = Arc::new(AtomicBool::new(false));
    let says = is_huge.clone();
    let file = MachineFile::zeros().placed(move |index, _| {
        let (first, pages) = if says.load(Acquire) { (0, SMALL) } else { (index, 1) };
        Ok(Direct { index: first, pages, first: Pfn((1 << 20) + first as u32), memory: MemoryType::Normal })
    });
    let cache = stage.cache(&file, SMALL)?;
    let s = stage.space()?;
    private(&s, BASE, &cache, SMALL, RW)?;
    assert_eq!(fault(&s, BASE, Access::Read), "mapped");
    is_huge.store(true, Release);
    let other = s.clone();
    stage.at(
        |step| matches!(step, Step::Flush { .. }),
        move || on(1, || assert_eq!(fault(&other, page(BASE, 5), Access::Read), "mapped")),
    );
    // It is no memory that can be copied, so the write cannot be done.
    assert_eq!(fault(&s, BASE, Access::Write), "Bus(Io)");
    assert!(stage.is_done());
    Ok(())
}

/// A file's huge page may come again while a discard is at work on its part of it. So none is cut.
#[test]
fn a_discard_takes_a_huge_page_of_a_file_out_whole() -> Result {
    let (stage, file, s) = wanting(ShmemHuge::Always, shared)?;
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    hardware_marks(&s, BASE, Attrs::DIRTY);
    let folio = folio(stage, &s, BASE)?;
    let other = s.clone();
    stage.at(
        |step| matches!(step, Step::Flush { .. }),
        move || {
            on(1, || {
                assert!(stage.meta(folio).flags().contains(FrameFlags::DIRTY));
                assert_eq!(fault(&other, BASE, Access::Read), "mapped");
            });
        },
    );
    stage.steps();
    s.discard(page(BASE, 100), 412 * PAGE_SIZE)?;
    assert!(stage.is_done() && is_huge(&s), "what came meanwhile is newer");
    s.discard(page(BASE, 511), PAGE_SIZE)?;
    assert_eq!(frame(&s, BASE), None);
    drop(file);
    stage.nothing_held(&[&s]);
    Ok(())
}
