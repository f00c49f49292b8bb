//! Mappings of physical memory and of a device.

mod kit;

use kit::*;
use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::fault::{FaultError, Segv};
use pagefirst::frame::Frame;
use pagefirst::platform::Platform;
use pagefirst::space::{Backing, Map, MapError, MemoryType, Physical, RemapTo, VmaFlags, Why};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr};
use pagefirst_machine::{Config, Machine};
use std::sync::atomic::Ordering::Relaxed;

const GIB: u64 = 1 << 30;

fn config<F: Format>(harsh: bool) -> Config {
    Config { device: 3 * GIB, ..hardware_of::<F>(harsh) }
}

fn frames<F: Format>(first: u64, pages: u64, memory: MemoryType, prot: Prot) -> Map<Machine<F>> {
    let backing = Backing::Physical(Physical { first: Pfn(first as u32), memory });
    Map { backing, flags: VmaFlags::SHARED, ..anonymous(pages, prot) }
}

/// The device's word at the start of a frame.
fn device<F: Format>(machine: &'static Machine<F>, frame: u64) -> u64 {
    machine.cells(Pfn(frame as u32))[0].load(Relaxed)
}

/// A page, 2 MiB, 1 GiB, 2 MiB and a page: each by one entry, one fault for each; then they are cut, discarded, moved.
fn every_size<F: Format>() -> Result {
    for harsh in [false, true] {
        let machine = Machine::<F>::new(config::<F>(harsh));
        let s = space_with(machine, policy().with_fault_around(PAGE_SIZE).ok_or("a window")?)?;
        let whole = GIB / PAGE_SIZE;
        let (first, pages) = (whole - 513, whole + 2 * 513);
        let start = VirtAddr(8 * GIB - 513 * PAGE_SIZE);
        s.map(at(start, frames(first, pages, MemoryType::Device, RW)))?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        let highest = F::TOP_LEAF.min(2);
        let parts = [(0, 0), (1, 1), (513, highest), (513 + whole, 1), (pages - 1, 0)];
        for (i, level) in parts {
            cpu.store_u64(page(start, i), i + 1)?;
            let (raw, found) = entry(&s, page(start, i));
            assert_eq!((found, device(machine, first + i)), (level, i + 1));
            let has = Attrs::WRITE | Attrs::DIRTY | Attrs::ACCESSED | Attrs::DEVICE | Attrs::SPECIAL;
            assert_eq!(F::attrs(raw), has);
        }
        let account = s.account();
        assert_eq!((account.faults.physical, account.faults.huge, account.resident_bytes()), (5, 3, 0));
        check(&s);

        // Its registers are nobody's memory.
        let stopped = s.copy_in(start, &mut [0; 8]).expect_err("a device is no memory");
        assert!(matches!(stopped.why, Why::Error(FaultError::Segv(Segv::Access))), "{stopped}");
        assert_eq!(stopped.why.errno(), Some(14));

        // A page in the middle of the largest.
        let middle = 513 + 1000;
        cpu.store_u64(page(start, middle + 1), 7)?;
        s.protect(page(start, middle), PAGE_SIZE, R)?;
        assert_eq!(cpu.load_u64(page(start, middle + 1))?, 7);
        assert_eq!(entry(&s, page(start, middle)).1, 0, "it was cut");
        assert!(cpu.store_u64(page(start, middle), 1).is_err());
        s.protect(page(start, middle), PAGE_SIZE, RW)?;
        cpu.store_u64(page(start, middle), 8)?;
        assert_eq!((device(machine, first + middle), s.vma_count()), (8, 1));
        s.protect(start, PAGE_SIZE, NONE)?;
        assert!(cpu.load_u64(start).is_err());
        s.protect(start, PAGE_SIZE, RW)?;

        // What is discarded is there again, in as large a piece as before.
        s.discard(start, pages * PAGE_SIZE)?;
        assert_eq!((s.account().resident_bytes(), tables(&s)), (0, 1));
        assert_eq!((cpu.load_u64(page(start, middle))?, entry(&s, page(start, middle)).1), (8, highest));

        // So is what a page was discarded of: nothing is cut, and no table is needed, whatever comes meanwhile.
        let free = machine.leave_free(0);
        s.discard(page(start, middle), PAGE_SIZE)?;
        drop(free);
        assert_eq!((s.account().tables_bytes(), tables(&s)), (PAGE_SIZE, 1));
        assert_eq!((cpu.load_u64(page(start, middle))?, entry(&s, page(start, middle)).1), (8, highest));

        // Moved to where the large pieces do not fit, and a hole cut before that.
        s.unmap(page(start, 2), PAGE_SIZE)?;
        let to = VirtAddr(16 * GIB + PAGE_SIZE);
        let rest = (pages - 3) * PAGE_SIZE;
        assert_eq!(s.remap(page(start, 3), rest, rest, RemapTo::Fixed(to))?, to);
        for (i, value) in [(513, 514), (middle, 8), (middle + 1, 7), (513 + whole, 514 + whole)] {
            assert_eq!((cpu.load_u64(page(to, i - 3))?, entry(&s, page(to, i - 3)).1), (value, 0));
        }
        assert_eq!(cpu.load_u64(page(start, 1))?, 2);
        check(&s);
        drop((cpu, s));
        machine.nothing_left()?;
    }
    Ok(())
}

on_formats!(every_size);

/// Memory that the embedder owns: two spaces share it, user copies use it, and nobody counts it.
#[test]
fn memory_is_used_and_not_counted() -> Result {
    let machine = Machine::<X86_64>::new(config::<X86_64>(false));
    let owned = Frame::new(machine)?;
    let pfn = owned.pfn();
    machine.cells(pfn).iter().for_each(|word| word.store(0, Relaxed));
    let (a, b) = (space(machine)?, space(machine)?);
    let map = |prot| frames(pfn.0.into(), 1, MemoryType::Normal, prot);
    let (at_a, at_b) = (a.map(map(RW))?.range.start, b.map(map(R))?.range.start);
    let mut cpu = machine.vcpu();
    cpu.switch_to(&a);
    cpu.store_u64(at_a, 11)?;
    a.copy_out(at_a, &12u64.to_le_bytes()).map_err(|stopped| stopped.to_string())?;
    let mut read = [0; 8];
    b.copy_in(at_b, &mut read).map_err(|stopped| stopped.to_string())?;
    assert_eq!(u64::from_le_bytes(read), 12);
    assert!(b.copy_out(at_b, &read).is_err());
    assert!(matches!(a.compare_exchange_u64(at_a, 12, 13), Ok(Ok(12))));
    assert_eq!((counts(machine, pfn), a.resident_bytes(), b.resident_bytes()), ((1, 0), 0, 0));
    check(&a);
    check(&b);
    drop((cpu, a, b));
    assert_eq!(counts(machine, pfn), (1, 0));
    drop(owned);
    Ok(machine.nothing_left()?)
}

#[test]
fn what_is_refused() -> Result {
    let machine = Machine::<X86_64>::new(config::<X86_64>(false));
    let s = space(machine)?;
    let denied = |made: std::result::Result<_, MapError>| matches!(made, Err(MapError::Denied(_)));
    let map = |prot| frames(8192, 4, MemoryType::Device, prot);
    // No private copies of what is not counted; nothing is fetched from registers.
    assert!(denied(s.map(Map { flags: VmaFlags::empty(), ..map(RW) }).map(drop)));
    assert!(denied(s.map(map(R | Prot::EXEC)).map(drop)));
    assert!(denied(s.map(Map { flags: VmaFlags::SHARED | VmaFlags::GROWS_DOWN, ..map(RW) }).map(drop)));
    let beyond = s.map(frames(u64::from(u32::MAX), 2, MemoryType::Normal, RW)).map(drop);
    assert!(matches!(beyond, Err(MapError::Invalid(_))));
    let private = s.map(Map { flags: VmaFlags::empty(), ..map(R) })?.range.start;
    assert!(denied(s.protect(private, PAGE_SIZE, RW)));
    assert!(denied(s.protect(private, PAGE_SIZE, R | Prot::EXEC)));
    assert!(denied(s.remap(private, 4 * PAGE_SIZE, 5 * PAGE_SIZE, RemapTo::Anywhere).map(drop)));
    let to = RemapTo::Fixed(VirtAddr(GIB));
    assert!(denied(s.remap(private, 4 * PAGE_SIZE, 5 * PAGE_SIZE, to).map(drop)));
    assert_eq!(fault(&s, private, Access::Write), End::Error(FaultError::Segv(Segv::Access)));
    assert_eq!(s.vma_count(), 1);
    // The last frame that there is.
    s.map(frames(u64::from(u32::MAX), 1, MemoryType::Normal, RW))?;
    Ok(())
}

/// Small pages come by whole windows; pieces of one device that continue each other are one mapping.
#[test]
fn small_pages_come_with_their_neighbours() -> Result {
    let machine = Machine::<X86_64>::new(config::<X86_64>(false));
    let s = space(machine)?;
    let start = VirtAddr(GIB);
    s.map(at(start, frames(8193, 20, MemoryType::Uncached, RW)))?;
    s.map(at(page(start, 20), frames(8213, 20, MemoryType::Uncached, RW)))?;
    assert_eq!(s.vma_count(), 1);
    s.map(at(page(start, 40), frames(8233, 1, MemoryType::Device, RW)))?;
    assert_eq!(s.vma_count(), 2);
    assert_eq!(fault(&s, page(start, 5), Access::Read), End::Mapped(false, 15));
    assert_eq!(frame(&s, page(start, 15)), Some(Pfn(8208)));
    assert_eq!(fault(&s, page(start, 33), Access::Write), End::Mapped(false, 7));
    assert_eq!(fault(&s, page(start, 34), Access::Write), End::Spurious);
    assert!(attrs(&s, page(start, 34)).contains(Attrs::UNCACHED));
    check(&s);

    let populated =
        Map { populate: true, ..at(VirtAddr(2 * GIB), frames(8192, 1024, MemoryType::Normal, RW)) };
    assert!(s.map(populated)?.unpopulated.is_none());
    assert_eq!(s.account().faults.physical, 4);
    Ok(())
}
