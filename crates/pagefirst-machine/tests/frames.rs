//! Frames that an embedder maps itself: what is mapped, what a failure leaves, what is gone afterwards.

mod kit;

use kit::*;
use pagefirst::arch::Attrs;
use pagefirst::sync::epoch::Pin;
use pagefirst::table::{FramesError, PageTable, Translation};
use pagefirst::types::{PAGE_SIZE, Pfn, VirtAddr, VirtRange};
use pagefirst_machine::Machine;

/// The last page of a leaf table, and of all tables above it.
const AT: VirtAddr = VirtAddr((1 << 39) - PAGE_SIZE);
/// Frames of no memory that is there: a device's.
const DEVICE: Pfn = Pfn(0xf_0000);

fn pages(first: u64, end: u64) -> VirtRange {
    VirtRange::new(page(AT, first), page(AT, end))
}
fn translate(table: &PageTable<Machine>, i: u64) -> Option<Translation> {
    table.translate(&Pin::new(table.platform()), page(AT, i))
}
fn frame_at(table: &PageTable<Machine>, i: u64) -> Option<u32> {
    translate(table, i).map(|there| there.pfn.0)
}
fn tables_of(table: &PageTable<Machine>) -> u64 {
    table.table_bytes().iter().sum::<u64>() / PAGE_SIZE
}

#[test]
fn a_range_is_mapped_across_tables_and_goes_with_them() -> Result {
    let machine = machine();
    let table = PageTable::new(machine)?;
    table.mapper().map(pages(0, 1026), DEVICE, 0, Attrs::WRITE | Attrs::DEVICE)?;
    for i in 0..1026 {
        assert_eq!(frame_at(&table, i), Some(DEVICE.0 + i as u32));
    }
    let marks = Attrs::ACCESSED | Attrs::DIRTY | Attrs::SPECIAL;
    let attrs = Attrs::WRITE | Attrs::DEVICE | marks;
    assert_eq!(translate(&table, 7), Some(Translation { pfn: DEVICE.add(7), level: 0, attrs }));
    assert_eq!((frame_at(&table, 1026), table.count().present), (None, 1026));
    // The last page of one chain of tables; two tables and one page in the next.
    assert_eq!(tables_of(&table), 1 + 3 + 2 + 3);

    let mut mapper = table.mapper();
    mapper.unmap(pages(0, 513))?;
    mapper.unmap(pages(514, 1026))?;
    mapper.unmap(pages(5, 5))?;
    drop(mapper);
    assert_eq!((frame_at(&table, 512), frame_at(&table, 513)), (None, Some(DEVICE.0 + 513)));
    assert_eq!((table.count().present, tables_of(&table)), (1, 4));
    // What is still mapped goes with the tables.
    drop(table);
    Ok(machine.nothing_left()?)
}

#[test]
fn what_is_in_the_way_stays_and_nothing_else_is_mapped() -> Result {
    let machine = machine();
    let table = PageTable::new(machine)?;
    table.mapper().map(pages(800, 801), Pfn(7), 0, Attrs::empty())?;
    let before = table.count();
    let refused = table.mapper().map(pages(0, 1026), DEVICE, 0, Attrs::WRITE);
    assert_eq!(refused, Err(FramesError::Occupied(pages(513, 1025))), "the part in one table");
    assert_eq!(frame_at(&table, 800), Some(7));
    assert_eq!(table.count(), before, "no entry and no table more");
    drop(table);
    Ok(machine.nothing_left()?)
}

#[test]
fn nonsense_is_refused() -> Result {
    let machine = machine();
    let table = PageTable::new(machine)?;
    let mut mapper = table.mapper();
    let end = VirtAddr(0x7fff_ffff_f000);
    for (range, first, level) in [
        (pages(3, 3), DEVICE, 0),
        (VirtRange::new(VirtAddr(PAGE_SIZE + 1), VirtAddr(3 * PAGE_SIZE)), DEVICE, 0),
        (VirtRange::new(VirtAddr(PAGE_SIZE), VirtAddr(3 * PAGE_SIZE - 1)), DEVICE, 0),
        (VirtRange::new(VirtAddr(end.0 - PAGE_SIZE), VirtAddr(end.0 + PAGE_SIZE)), DEVICE, 0),
        (VirtRange::new(VirtAddr(LEAF), VirtAddr(2 * LEAF)), Pfn(513), 1),
        (VirtRange::new(VirtAddr(LEAF), VirtAddr(LEAF + PAGE_SIZE)), Pfn(512), 1),
        (VirtRange::new(VirtAddr(1 << 39), VirtAddr(2 << 39)), Pfn(0), 3),
        (VirtRange::new(VirtAddr(LEAF), VirtAddr(2 * LEAF)), Pfn(u32::MAX - 5), 0),
    ] {
        let refused = mapper.map(range, first, level, Attrs::empty());
        assert_eq!(refused, Err(FramesError::Invalid(range, level)));
    }
    mapper.unmap(VirtRange::new(VirtAddr(0), VirtAddr(u64::MAX)))?;
    drop(mapper);
    assert_eq!(tables_of(&table), 1);
    drop(table);
    Ok(machine.nothing_left()?)
}

#[test]
fn when_memory_runs_out_nothing_is_mapped() -> Result {
    let machine = small_machine(64);
    let table = PageTable::new(machine)?;
    for left in 0..6 {
        let taken = machine.leave_free(left);
        // Six tables are wanted.
        let refused = table.mapper().map(pages(0, 2), DEVICE, 0, Attrs::WRITE);
        assert!(matches!(refused, Err(FramesError::NoMemory(_))), "{left} frames: {refused:?}");
        assert_eq!((table.count().present, tables_of(&table)), (0, 1));
        drop(taken);
    }
    table.mapper().map(pages(0, 2), DEVICE, 0, Attrs::WRITE)?;
    drop(table);
    Ok(machine.nothing_left()?)
}

#[test]
fn pages_that_are_counted_are_not_unmapped() -> Result {
    let machine = machine();
    let s = space(machine)?;
    s.map(at(AT, anonymous(2, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    cpu.store_u64(AT, 5)?;
    s.page_table().mapper().map(pages(2, 4), DEVICE, 0, Attrs::WRITE)?;
    assert_eq!(s.resident_bytes(), PAGE_SIZE, "frames are not counted");
    s.page_table().mapper().unmap(pages(0, 4))?;
    assert_eq!((cpu.load_u64(AT)?, frame_at(s.page_table(), 2)), (5, None));
    check(&s);
    drop(cpu);
    drop(s);
    Ok(machine.nothing_left()?)
}

#[test]
fn a_huge_page_that_is_cut_is_split() -> Result {
    let machine = small_machine(64);
    let table = PageTable::new(machine)?;
    let three = VirtRange::new(VirtAddr(LEAF), VirtAddr(4 * LEAF));
    table.mapper().map(three, Pfn(512), 1, Attrs::WRITE | Attrs::DEVICE)?;
    assert_eq!(tables_of(&table), 3);
    let middle = VirtRange::new(VirtAddr(LEAF + PAGE_SIZE), VirtAddr(4 * LEAF - PAGE_SIZE));
    // Two tables are wanted, one for each end.
    for left in 0..2 {
        let taken = machine.leave_free(left);
        assert_eq!(table.mapper().unmap(middle), Err(FramesError::NoMemory(middle)));
        assert_eq!((table.count().present, tables_of(&table)), (3, 3));
        drop(taken);
    }
    table.mapper().unmap(middle)?;
    assert_eq!((table.count().present, tables_of(&table)), (2, 5));
    for (va, pfn) in [(LEAF, 512), (4 * LEAF - PAGE_SIZE, 512 + 3 * 512 - 1)] {
        let there = table.translate(&Pin::new(machine), VirtAddr(va)).ok_or("mapped")?;
        assert_eq!((there.pfn, there.level), (Pfn(pfn), 0));
        assert!(there.attrs.contains(Attrs::WRITE | Attrs::DEVICE));
    }
    drop(table);
    Ok(machine.nothing_left()?)
}

/// What is taken out behind a huge page that was split on the way is flushed too.
#[test]
fn what_goes_behind_a_split_is_flushed() -> Result {
    let machine = machine();
    let s = space(machine)?;
    let two = VirtRange::new(VirtAddr(LEAF), VirtAddr(3 * LEAF));
    s.page_table().mapper().map(two, Pfn(512), 1, Attrs::WRITE)?;
    s.map(at(VirtAddr(64 * LEAF), anonymous(1, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    let flushes = || machine.counts().shootdowns;
    let before = flushes();
    s.page_table().mapper().unmap(VirtRange::new(VirtAddr(LEAF + PAGE_SIZE), two.end))?;
    // That of the split, and that of what was taken out after it.
    assert_eq!(flushes(), before + 2);
    // Nothing waits for a flush any more: tables for small pages come without one.
    cpu.store_u64(VirtAddr(64 * LEAF), 1)?;
    assert_eq!(flushes(), before + 2);
    Ok(())
}
