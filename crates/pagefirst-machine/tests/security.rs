//! What programs are owed by whoever maps for them: no bytes from before, nothing executable unasked, no address that
//! is not theirs, no count that wraps.

mod kit;

use kit::*;
use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::fault::{FaultError, Segv};
use pagefirst::file::FileCache;
use pagefirst::platform::Platform;
use pagefirst::policy::Policy;
use pagefirst::space::{AddressSpace, Map, MapError, Place, RemapTo, VmaFlags, Why};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr, VirtRange};
use pagefirst_machine::{Machine, MachineFile, POISON};
use std::sync::atomic::Ordering::Relaxed;

const AT: VirtAddr = VirtAddr(1 << 40);
/// What a count stops at.
const LIMIT: u32 = 1 << 31;

#[test]
fn no_byte_predates_its_page() -> Result {
    let machine = small_machine(512);
    // Every frame there is has been somebody's, and holds poison since.
    let free = machine.leave_free(0);
    assert!(free.iter().all(|f| machine_word(machine, f.pfn(), 17) == POISON));
    drop(free);
    let s = space(machine)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    let mut loads = |va: VirtAddr, expected: &[(usize, u8)]| -> Result {
        let mut bytes = vec![0xee; expected.iter().map(|(n, _)| n).sum()];
        cpu.load(va, &mut bytes)?;
        let mut from = 0;
        for (n, byte) in expected {
            assert!(bytes[from..from + n].iter().all(|b| b == byte), "from {from} on");
            from += n;
        }
        // The whole page, not only what was loaded.
        check(&s);
        Ok(())
    };
    let page_size = PAGE_SIZE as usize;
    s.map(at(AT, anonymous(3, RW)))?;
    loads(AT, &[(page_size, 0)])?;
    s.copy_out(page(AT, 1), &[1]).map_err(|e| e.to_string())?;
    loads(page(AT, 1), &[(1, 1), (page_size - 1, 0)])?;
    // A file that ends in a page, in memory and on the host's disk, which gives a short read; a hole; a file that
    // shrank and grew.
    let end = PAGE_SIZE + 100;
    let path = std::env::temp_dir().join(format!("pagefirst-short-{}", std::process::id()));
    std::fs::write(&path, vec![7; end as usize])?;
    let host = MachineFile::host(std::fs::OpenOptions::new().read(true).write(true).open(&path)?);
    std::fs::remove_file(&path)?;
    for file in [MachineFile::pattern(|_| 7), host] {
        let c = FileCache::new(machine, file, end)?;
        for map in [private(&c, 0, 2, R), private(&c, 0, 2, RW), shared(&c, 0, 2, RW)] {
            let write = map.prot == RW;
            s.map(at(AT, map))?;
            loads(AT, &[(end as usize, 7), (page_size - 100, 0)])?;
            if write {
                // A private copy, too, holds zeros behind the end.
                s.copy_out(VirtAddr(AT.0 + PAGE_SIZE), &[7]).map_err(|e| e.to_string())?;
                loads(AT, &[(end as usize, 7), (page_size - 100, 0)])?;
            }
            s.unmap(AT, 2 * PAGE_SIZE)?;
        }
        c.set_size(machine, 10);
        c.set_size(machine, PAGE_SIZE);
        s.map(at(AT, private(&c, 0, 1, R)))?;
        loads(AT, &[(10, 7), (page_size - 10, 0)])?;
    }
    let hole = FileCache::new(machine, MachineFile::zeros(), PAGE_SIZE)?;
    s.map(at(AT, shared(&hole, 0, 1, R)))?;
    loads(AT, &[(page_size, 0)])?;
    Ok(())
}

fn machine_word(machine: &'static Machine, pfn: Pfn, i: usize) -> u64 {
    machine.cells(pfn)[i].load(Relaxed)
}

/// Nor is it looked at, where what is mapped ends at it: tables in it are none of the library's.
fn the_kernels_half_is_not_looked_at<F: Format>() -> Result {
    let machine = machine_of::<F>();
    let s = space(machine)?;
    let first = &machine.cells(s.page_table().root_frame())[F::user_entries(F::LEVELS - 1)];
    let before = first.swap(F::table(Pfn(u32::MAX)), Relaxed);
    let last = VirtAddr(F::USER_END.0 - 2 * PAGE_SIZE);
    s.map(at(last, anonymous(2, RW)))?;
    fault(&s, last, Access::Write);
    s.protect(last, 2 * PAGE_SIZE, R)?;
    s.discard(last, 2 * PAGE_SIZE)?;
    s.unmap(last, 2 * PAGE_SIZE)?;
    s.page_table().mapper().unmap(VirtRange::new(last, F::USER_END))?;
    first.store(before, Relaxed);
    check(&s);
    Ok(())
}

on_formats!(the_kernels_half_is_not_looked_at: sv39 Sv39, sv48 Sv48);

#[test]
fn a_kernels_half_is_left_alone() -> Result {
    let machine = machine();
    let upper = |s: &AddressSpace<Machine>| -> Vec<u64> {
        let root = s.page_table().root_frame();
        (X86_64::user_entries(3)..512).map(|i| machine_word(machine, root, i)).collect()
    };
    // Twice, so that the second root is the first one's frame, and given back clean (which the machine checks).
    for _ in 0..2 {
        let s = space(machine)?;
        let kernel = upper(&s);
        assert!(kernel.len() == 256 && kernel.iter().all(|entry| *entry != 0));
        let end = VirtAddr(X86_64::USER_END.0 - 2 * PAGE_SIZE);
        s.map(at(end, anonymous(2, RW)))?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        cpu.store_u8(end, 1)?;
        for kernel in [0xffff_8000_0000_0000, 0xffff_ffff_ffff_fff8].map(VirtAddr) {
            let why = cpu.load_u8(kernel).map_err(|t| t.error);
            assert_eq!(why, Err(FaultError::Segv(Segv::NotMapped)));
            assert!(s.copy_in(kernel, &mut [0; 8]).is_err() && s.copy_out(kernel, &[0; 8]).is_err());
        }
        machine.check_space(&s);
        assert_eq!(s.account().resident_bytes(), PAGE_SIZE);
        s.unmap(end, 2 * PAGE_SIZE)?;
        assert_eq!(upper(&s), kernel);
        cpu.leave();
        drop((cpu, s));
        machine.vm().quiesce(machine);
    }
    Ok(())
}

#[test]
fn nothing_is_executable_unless_asked() -> Result {
    let machine = machine();
    let s = space(machine)?;
    let c = cache(machine, &marked().with_tracking(true), 32)?;
    warm(machine, &c, 0..32)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    let exec = Prot::EXEC;
    // Every kind of page, first without the right: from the zero page to a copy in a file page's place.
    type Kind = fn(&Cache) -> Map<Machine>;
    let kinds: [(Kind, &[Access]); 4] = [
        (|_| anonymous(32, RW), &[Access::Read, Access::Write]),
        (|_| anonymous(32, RW), &[Access::Write]),
        (|c| private(c, 0, 32, RW), &[Access::Read, Access::Write]),
        (|c| shared(c, 0, 32, RW), &[Access::Read, Access::Write]),
    ];
    for (n, (map, accesses)) in kinds.into_iter().enumerate() {
        s.map(at(AT, map(&c)))?;
        for access in accesses {
            cpu.touch(AT, *access)?;
            for i in mapped(&s, AT, 32) {
                assert!(!attrs(&s, page(AT, i)).contains(Attrs::EXEC), "kind {n}, page {i}");
                let refused = cpu.fetch(page(AT, i)).map_err(|t| t.error);
                assert_eq!(refused, Err(FaultError::Segv(Segv::Access)));
            }
        }
        // Asked for, it is, with what was mapped around; and taken back.
        s.protect(AT, 32 * PAGE_SIZE, R | exec)?;
        cpu.fetch(AT)?;
        check(&s);
        s.protect(AT, 32 * PAGE_SIZE, R)?;
        assert_eq!(cpu.fetch(AT).map_err(|t| t.error), Err(FaultError::Segv(Segv::Access)));
        check(&s);
    }
    // A heap and a stack are not.
    s.set_heap(page(AT, 1000))?;
    s.brk(page(AT, 1002))?;
    s.map(at(page(AT, 9_000), Map { flags: VmaFlags::GROWS_DOWN, ..anonymous(1, RW) }))?;
    for va in [page(AT, 1000), page(AT, 8_990)] {
        cpu.touch(va, Access::Write)?;
        assert_eq!(cpu.fetch(va).map_err(|t| t.error), Err(FaultError::Segv(Segv::Access)));
    }
    check(&s);
    Ok(())
}

#[test]
fn writable_and_executable_at_once_is_refused_by_every_call() -> Result {
    let machine = machine();
    let s = space_with(machine, Policy { deny_wx: true, ..policy() })?;
    let c = cache(machine, &marked(), 8)?;
    let (wx, rx) = (RW | Prot::EXEC, R | Prot::EXEC);
    let denied = |at: VirtAddr, pages| Err(MapError::Denied(VirtRange::new(at, page(at, pages))));
    for map in [anonymous(4, wx), private(&c, 0, 4, wx), shared(&c, 0, 4, wx)] {
        assert_eq!(s.map(Map { populate: true, ..at(AT, map) }).map(drop), denied(AT, 4));
    }
    assert_eq!((s.vma_count(), tables(&s)), (0, 1), "nothing of it was done");
    assert!(matches!(s.map(anonymous(4, wx)), Err(MapError::Denied(_))), "wherever it would go");
    // Replacing one, nothing of what is there goes.
    s.map(Map { populate: true, ..at(AT, anonymous(4, RW)) })?;
    s.map(at(page(AT, 4), private(&c, 0, 4, rx)))?;
    assert_eq!(s.map(at(page(AT, 2), anonymous(4, wx))).map(drop), denied(page(AT, 2), 4));
    assert_eq!((mapped(&s, AT, 8).len(), s.vma_count()), (4, 2));
    // One call over both: all or nothing.
    assert_eq!(s.protect(AT, 8 * PAGE_SIZE, wx), denied(AT, 4));
    assert_eq!(s.protect(page(AT, 4), 4 * PAGE_SIZE, wx), denied(page(AT, 4), 4));
    // Moved, grown, populated: rights stay what they were.
    s.remap(AT, 4 * PAGE_SIZE, 6 * PAGE_SIZE, RemapTo::Fixed(page(AT, 100)))?;
    s.remap(page(AT, 4), 4 * PAGE_SIZE, 4 * PAGE_SIZE, RemapTo::Anywhere)?;
    s.populate(VirtRange::new(page(AT, 100), page(AT, 106)), RW);
    s.protect(page(AT, 100), 6 * PAGE_SIZE, rx)?;
    assert!(s.fault(page(AT, 100), Access::Write).error().is_some());
    assert_eq!(
        s.compare_exchange_u32(page(AT, 100), 0, 1).map_err(|why| why.errno()),
        Err(Some(14)),
        "a kernel does not write there for a program"
    );
    let mut both = 0;
    s.for_each_vma(|v| both += v.prot.contains(Prot::WRITE | Prot::EXEC) as u32);
    assert_eq!(both, 0);
    check(&s);
    Ok(())
}

#[test]
fn addresses_that_are_nobodys_are_refused_by_every_call() -> Result {
    let machine = machine();
    let low = page(VirtAddr(0), 16);
    let s = space_with(machine, Policy { min_addr: low, ..policy() })?;
    let end = s.usable().end;
    s.map(at(AT, anonymous(2, RW)))?;
    let refused = |range: VirtRange| Err::<(), _>(MapError::OutOfRange(range));
    for start in [VirtAddr(0), page(VirtAddr(0), 15), end, VirtAddr(1 << 63)] {
        let range = VirtRange::new(start, page(start, 2));
        // A hint is only that: the mapping goes elsewhere.
        let hinted = s.map(Map { place: Place::Hint(start), ..anonymous(2, RW) })?.range;
        assert!(s.usable().covers(hinted) && !hinted.overlaps(range));
        assert_eq!(
            s.remap(AT, 2 * PAGE_SIZE, 2 * PAGE_SIZE, RemapTo::Fixed(start)).map(drop),
            refused(range)
        );
        assert_eq!(s.remap(start, 2 * PAGE_SIZE, PAGE_SIZE, RemapTo::InPlace).map(drop), refused(range));
        assert_eq!(s.set_heap(start), refused(VirtRange::page_of(start)));
        let unpopulated = s.populate(range, RW).ok_or("populated")?;
        let why = if X86_64::is_canonical(start) { Segv::NotMapped } else { Segv::NonCanonical };
        assert_eq!((unpopulated.at, unpopulated.why.error()), (start, Some(FaultError::Segv(why))));
        for access in [Access::Read, Access::Write, Access::Execute] {
            assert_eq!(s.fault(start, access).error(), Some(FaultError::Segv(why)));
        }
        let Err(stopped) = s.copy_out(start, &[0; 8]) else { return Err("copied".into()) };
        assert!(matches!(stopped.why, Why::Error(FaultError::Segv(found)) if found == why));
        assert!(s.compare_exchange_u64(start, 0, 1).is_err());
        s.unmap(hinted.start, hinted.len())?;
    }
    // A heap ends before the end, a stack stops above the lowest address, wherever its limit lies.
    s.set_heap(VirtAddr(end.0 - PAGE_SIZE))?;
    let heap = VirtRange::new(VirtAddr(end.0 - PAGE_SIZE), page(end, 1));
    assert_eq!(s.brk(page(end, 1)).map(drop), refused(heap));
    assert!(s.brk(VirtAddr(u64::MAX)).is_err());
    assert_eq!(s.heap_end(), VirtAddr(end.0 - PAGE_SIZE));
    s.map(at(page(low, 40), Map { flags: VmaFlags::GROWS_DOWN, ..anonymous(1, RW) }))?;
    assert_eq!(s.fault(page(low, 2), Access::Write).error(), None);
    assert_eq!(
        s.fault(VirtAddr(low.0 - 1), Access::Write).error(),
        Some(FaultError::Segv(Segv::NotMapped)),
        "within the stack's limit, but below what can be mapped"
    );
    assert_eq!(s.vma_count(), 2);
    check(&s);
    Ok(())
}

#[test]
fn a_page_without_rights_shows_hardware_no_address() -> Result {
    let machine = machine();
    let s = space(machine)?;
    let c = cache(machine, &marked(), 16)?;
    warm(machine, &c, 0..16)?;
    s.map(Map { populate: true, ..at(AT, anonymous(4, RW)) })?;
    s.map(Map { populate: true, ..at(page(AT, 4), private(&c, 0, 16, R)) })?;
    let frames: Vec<_> = (0..20).map(|i| frame(&s, page(AT, i))).collect();
    s.protect(AT, 20 * PAGE_SIZE, NONE)?;
    for (i, was) in (0..20).zip(&frames) {
        let (raw, _) = entry(&s, page(AT, i));
        let shown = X86_64::shown(raw).ok_or("present")?;
        assert!(shown >= 1 << 44, "page {i}: {raw:#x} shows {shown:#x}");
        assert_eq!(X86_64::frame(raw, 0), *was, "the page is still there");
    }
    check(&s);
    // Moved, it stays so; and comes back.
    s.remap(AT, 4 * PAGE_SIZE, 4 * PAGE_SIZE, RemapTo::Fixed(page(AT, 100)))?;
    check(&s);
    s.protect(page(AT, 100), 4 * PAGE_SIZE, RW)?;
    assert_eq!(frame(&s, page(AT, 100)), frames[0]);
    check(&s);
    Ok(())
}

#[test]
fn a_count_that_is_full_stays_full_and_its_page_is_never_free() -> Result {
    let machine = machine();
    let (a, b) = (space(machine)?, space(machine)?);
    let c = cache(machine, &marked(), 2)?;
    warm(machine, &c, 0..2)?;
    let pfn = cached_frame(machine, &c, 0)?;
    // The first fault's mapping fills the count.
    machine.hook_counts(pfn, LIMIT - 1, LIMIT - 2);
    for s in [&a, &b] {
        s.map(at(AT, private(&c, 0, 2, R)))?;
        assert!(s.fault(AT, Access::Read).error().is_none());
        assert_eq!((frame(s, AT), first_byte(s, AT)), (Some(pfn), Some(mark(0))));
    }
    assert_eq!(counts(machine, pfn), (LIMIT, LIMIT - 1), "the second one is not counted");
    for s in [&a, &b] {
        s.unmap(AT, 2 * PAGE_SIZE)?;
        assert_eq!(counts(machine, pfn), (LIMIT, LIMIT - 1), "nor is any given back");
    }
    assert_eq!((c.evict(machine), c.pages()), (1, 1), "the page beside it goes, it stays");
    // Mapped again, written in place of, copied from: it works as before.
    a.map(at(AT, private(&c, 0, 2, RW)))?;
    let mut byte = [0];
    a.copy_in(AT, &mut byte).map_err(|e| e.to_string())?;
    assert_eq!((byte, frame(&a, AT)), ([mark(0)], Some(pfn)));
    a.copy_out(AT, &[1]).map_err(|e| e.to_string())?;
    assert_ne!(frame(&a, AT), Some(pfn), "a copy");
    assert_eq!(first_byte(&a, AT), Some(1));
    drop((a, b, c));
    // All of it is gone but that page: lost, and nobody else's for ever.
    machine.vm().quiesce(machine);
    assert_eq!((machine.vm().held(machine).frames, counts(machine, pfn)), (2, (LIMIT, LIMIT - 1)));
    let all = machine.leave_free(0);
    assert!(all.iter().all(|f| f.pfn() != pfn));
    Ok(())
}

#[test]
fn placing_starts_at_random_where_that_is_the_policy() -> Result {
    let machine = machine();
    let gap = 1 << 30;
    for bottom_up in [false, true] {
        let random = Policy { random_gap: gap, bottom_up, align_large: 0, ..policy() };
        let fixed = space_with(machine, Policy { random_gap: 0, ..random })?;
        let base = fixed.map(anonymous(1, R))?.range.start;
        let mut starts = Vec::new();
        for _ in 0..16 {
            let s = space_with(machine, random)?;
            let start = s.map(anonymous(1, R))?.range.start;
            assert!(start.0.abs_diff(base.0) < gap && start.is_aligned(PAGE_SIZE));
            let next = s.map(anonymous(1, R))?.range.start;
            assert_eq!(next.0.abs_diff(start.0), PAGE_SIZE, "one beside the other");
            starts.push(start);
        }
        starts.sort();
        starts.dedup();
        assert!(starts.len() > 12, "{starts:?}");
        // The gap is used rather than nothing.
        let s = space_with(machine, random)?;
        let whole = s.usable();
        assert_eq!(s.map(anonymous(whole.pages(), R))?.range, whole);
    }
    Ok(())
}
