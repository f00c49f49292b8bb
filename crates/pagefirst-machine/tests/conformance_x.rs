//! Defects that must not come back: items x08, x09, x16 to x19 and x21; x07 on real TLBs.

mod kit;

use kit::*;
use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::fault::{Bus, FaultError};
use pagefirst::platform::Platform;
use pagefirst::space::Map;
use pagefirst::types::{Access, PAGE_SIZE, Pfn, VirtAddr};
use pagefirst_machine::Machine;
use std::sync::atomic::Ordering::Acquire;

const BASE: VirtAddr = VirtAddr(1 << 40);

#[test]
fn x07_a_cpu_with_a_stale_translation_does_not_fault_for_ever() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let file = cache(machine, &marked().with_tracking(true), 4)?;
    s.map(at(BASE, shared(&file, 0, 4, RW)))?;
    let turn = Gate::new(2);
    std::thread::scope(|scope| -> Result {
        let other = scope.spawn(|| {
            let turn = turn.member();
            let mut cpu = machine.vcpu();
            cpu.switch_to(&s);
            let read = cpu.load_u8(BASE);
            turn.pass(); // it has the page read-only in its TLB
            turn.pass(); // the entry allows writes, and nobody told it
            let before = cpu.counts();
            let stored = cpu.store_u8(BASE, 7);
            (read, stored, cpu.counts().faults - before.faults, cpu.counts().spurious - before.spurious)
        });
        let turn = turn.member();
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        cpu.load_u8(BASE)?;
        turn.pass();
        cpu.store_u8(page(BASE, 0), 5)?;
        turn.pass();
        let (read, stored, faults, spurious) = other.join().map_err(|_| "the other CPU panicked")?;
        assert_eq!(read?, mark(0));
        stored?;
        assert!(faults <= 1 && spurious == faults, "{faults} faults, {spurious} with nothing to do");
        assert_eq!(cpu.load_u8(BASE)?, 7);
        Ok(())
    })
}

#[test]
fn x08_occupied_neighbours_do_not_keep_the_page_from_being_mapped() -> Result {
    let machine: &'static Machine = machine();
    for index in [16, 23, 31] {
        let s = space(machine)?;
        let file = cache(machine, &marked(), 64)?;
        warm(machine, &file, 0..64)?;
        s.map(at(BASE, private(&file, 0, 64, RW)))?;
        // All neighbours in the window are taken, by private copies.
        for i in (16..32).filter(|i| *i != index) {
            assert_eq!(fault(&s, page(BASE, i), Access::Write), End::Mapped(false, 0));
        }
        let copies: Vec<_> = (16..32).map(|i| frame(&s, page(BASE, i))).collect();
        assert_eq!(fault(&s, page(BASE, index), Access::Read), End::Mapped(false, 0));
        assert_eq!(frame(&s, page(BASE, index)), Some(cached_frame(machine, &file, index)?));
        let still = (16..32).filter(|i| *i != index);
        assert!(still.into_iter().all(|i| frame(&s, page(BASE, i)) == copies[i as usize - 16]));
        check(&s);
        // Some are taken: the page and the others are mapped.
        for i in [33, 40, 46] {
            fault(&s, page(BASE, i), Access::Write);
        }
        assert_eq!(fault(&s, page(BASE, index + 16), Access::Read), End::Mapped(false, 12));
        assert_eq!(mapped(&s, BASE, 64), (16..48).collect::<Vec<_>>());
        check(&s);
    }
    Ok(())
}

#[test]
fn x09_no_page_beyond_the_end_is_mapped_and_an_access_there_is_sigbus() -> Result {
    let beyond = End::Error(FaultError::Bus(Bus::BeyondEnd));
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let file = cache(machine, &marked(), 16)?;
    warm(machine, &file, 0..16)?;
    // Five pages and a half: the cache still knows the others as it is told of the end.
    file.set_size(machine, 5 * PAGE_SIZE + 100);
    s.map(at(BASE, private(&file, 0, 32, RW)))?;
    s.map(at(VirtAddr(BASE.0 + LEAF), shared(&file, 0, 32, RW)))?;
    for base in [BASE, VirtAddr(BASE.0 + LEAF)] {
        assert_eq!(fault(&s, page(base, 2), Access::Read), End::Mapped(false, 5));
        assert_eq!(mapped(&s, base, 32), [0, 1, 2, 3, 4, 5]);
        for index in [6, 7, 15, 16, 31] {
            for access in [Access::Read, Access::Write] {
                assert_eq!(fault(&s, page(base, index), access), beyond, "page {index}");
            }
        }
        assert_eq!(mapped(&s, base, 32), [0, 1, 2, 3, 4, 5]);
    }
    // The rest of the last page is zero, not what the file once had there.
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    assert_eq!(cpu.load_u8(VirtAddr(BASE.0 + 5 * PAGE_SIZE + 99))?, mark(5));
    assert_eq!(cpu.load_u8(VirtAddr(BASE.0 + 5 * PAGE_SIZE + 100))?, 0);
    // The end moves up and down: each fault goes by where it is then.
    s.discard(BASE, 32 * PAGE_SIZE)?;
    s.discard(VirtAddr(BASE.0 + LEAF), 32 * PAGE_SIZE)?;
    file.set_size(machine, 3 * PAGE_SIZE);
    assert_eq!(fault(&s, page(BASE, 3), Access::Read), beyond);
    assert_eq!(fault(&s, BASE, Access::Read), End::Mapped(false, 2));
    file.set_size(machine, 8 * PAGE_SIZE);
    assert_eq!(fault(&s, page(BASE, 7), Access::Read), End::Mapped(true, 0));
    assert_eq!(fault(&s, page(BASE, 8), Access::Read), beyond);
    assert_eq!(mapped(&s, BASE, 32), [0, 1, 2, 7]);
    Ok(())
}

#[test]
fn x09_a_neighbour_is_not_mapped_when_the_file_shrinks_below_it() -> Result {
    // A file shrinks while the fault reads its page: pages that were below the end when it began are not mapped.
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let (content, hook) = hooked();
    let file = cache(machine, &content, 16)?;
    warm(machine, &file, (0..16).filter(|i| *i != 2))?;
    s.map(at(BASE, private(&file, 0, 16, R)))?;
    let meanwhile = file.clone();
    hook.arm(2, move || meanwhile.set_size(machine, 4 * PAGE_SIZE));
    assert_eq!(fault(&s, page(BASE, 2), Access::Read), End::Mapped(true, 3));
    assert!(!hook.is_armed());
    assert_eq!(mapped(&s, BASE, 16), [0, 1, 2, 3]);
    Ok(())
}

#[test]
fn x17_each_entry_of_a_batch_has_its_own_frame() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let file = cache(machine, &marked(), 16)?;
    // Frames neither ascend nor follow each other.
    warm(machine, &file, (0..16).map(|i| i * 7 % 16))?;
    s.map(at(BASE, private(&file, 0, 16, R)))?;
    assert_eq!(fault(&s, page(BASE, 4), Access::Read), End::Mapped(false, 15));
    let frames: Vec<_> = (0..16).filter_map(|i| frame(&s, page(BASE, i))).collect();
    assert!(frames.windows(2).any(|w| w[0].0 + 1 != w[1].0), "{frames:?}");
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    for i in 0..16 {
        assert_eq!(frame(&s, page(BASE, i)), Some(cached_frame(machine, &file, i)?));
        assert_eq!(cpu.load_u8(VirtAddr(BASE.0 + i * PAGE_SIZE + 4095))?, mark(i));
    }
    assert_eq!(check(&s).frames.len(), 16);
    Ok(())
}

/// Every entry in the tables of a space that is not the kernel's, with the level of its table.
fn entries(space: &Space, table: Pfn, level: u8, all: &mut Vec<(u64, u8)>) {
    for cell in &space.platform().cells(table)[..X86_64::user_entries(level)] {
        let raw = cell.load(Acquire);
        if raw != 0 {
            all.push((raw, level));
        }
        if let Some(child) = X86_64::child(raw, level) {
            entries(space, child, level - 1, all);
        }
    }
}

#[test]
fn x17_an_entry_that_is_not_present_has_no_address_in_it() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let file = cache(machine, &marked(), 16)?;
    warm(machine, &file, 0..16)?;
    s.map(at(BASE, anonymous(64, RW)))?;
    s.map(at(VirtAddr(BASE.0 + LEAF), private(&file, 0, 16, RW)))?;
    let both = 2 * LEAF;
    // Entries, those not present among them, and whether one of these names a frame of the machine's. Bit 0 says present
    // (Intel SDM 3A, table 4-20); bits 51:12 are the address.
    let frames = u64::from(machine.vm().frames.total_frames() as u32) * 2;
    let look = || {
        let mut all = Vec::new();
        entries(&s, s.page_table().root_frame(), 3, &mut all);
        let absent: Vec<u64> = all.iter().map(|(raw, _)| *raw).filter(|raw| raw & 1 == 0).collect();
        let usable = absent.iter().any(|raw| (raw >> 12 & ((1 << 40) - 1)) < frames);
        (absent.len(), all.len(), usable)
    };
    for i in 0..16 {
        fault(&s, page(BASE, i), if i % 2 == 0 { Access::Write } else { Access::Read });
        fault(
            &s,
            VirtAddr(BASE.0 + LEAF + i * PAGE_SIZE),
            if i % 3 == 0 { Access::Write } else { Access::Read },
        );
    }
    assert_eq!(look(), (0, 32 + 4, false));
    s.protect(BASE, 64 * PAGE_SIZE, NONE)?;
    s.protect(VirtAddr(BASE.0 + LEAF), 8 * PAGE_SIZE, R)?;
    assert_eq!(look(), (16, 32 + 4, false), "pages nobody may touch are not present");
    s.discard(BASE, 8 * PAGE_SIZE)?;
    assert_eq!(look(), (8, 24 + 4, false), "what was taken out is zero, not a trace of it");
    s.protect(BASE, 64 * PAGE_SIZE, RW)?;
    assert_eq!(look(), (0, 24 + 4, false));
    s.unmap(BASE, both)?;
    assert_eq!(look(), (0, 0, false));
    Ok(())
}

#[test]
fn x18_memory_that_is_out_is_a_value_that_comes_back_at_once() -> Result {
    let machine: &'static Machine = small_machine(256);
    let s = space(machine)?;
    let file = cache(machine, &marked(), 8)?;
    s.map(at(BASE, anonymous(8, RW)))?;
    s.map(at(VirtAddr(BASE.0 + LEAF), private(&file, 0, 8, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    let kept = machine.leave_free(0);
    for va in [BASE, VirtAddr(BASE.0 + LEAF)] {
        for access in [Access::Read, Access::Write] {
            let before = machine.counts();
            for _ in 0..100 {
                let trap = cpu.touch(va, access).expect_err("no memory");
                assert_eq!((trap.error, trap.signal()), (FaultError::NoMemory, None));
            }
            let spent = machine.counts() - before;
            // One try, and one more after what was held back was freed; nothing is locked meanwhile.
            assert_eq!((spent.faults, spent.frames_allocated, spent.locked()), (100, 0, 0));
        }
    }
    assert_eq!(s.account().faults.no_memory, 400);
    // Calls say it too, and change nothing.
    let before = vmas(&s);
    let refused = (0..64).map(|i| s.map(at(page(BASE, 100 + 2 * i), anonymous(1, R)))).find_map(|r| r.err());
    assert_eq!(refused, Some(pagefirst::space::MapError::NoMemory));
    assert!(vmas(&s).starts_with(&before[..1]));
    drop(kept);
    cpu.touch(BASE, Access::Write)?;
    Ok(())
}

#[test]
fn x19_a_spurious_fault_tells_no_other_cpu_to_flush() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let file = cache(machine, &marked(), 4)?;
    s.map(at(BASE, Map::anonymous(4 * PAGE_SIZE, RW)))?;
    s.map(at(VirtAddr(BASE.0 + LEAF), shared(&file, 0, 4, RW)))?;
    let places = [BASE, VirtAddr(BASE.0 + LEAF)];
    let turn = Gate::new(2);
    std::thread::scope(|scope| -> Result {
        let other = scope.spawn(|| {
            let turn = turn.member();
            let mut cpu = machine.vcpu();
            cpu.switch_to(&s);
            let touched = places.map(|va| cpu.touch(va, Access::Write));
            turn.pass();
            turn.pass(); // it is in the space's mask all the while
            touched
        });
        let turn = turn.member();
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        turn.pass();
        let before = machine.counts();
        for va in places {
            for access in [Access::Read, Access::Write] {
                for _ in 0..50 {
                    assert_eq!(fault(&s, va, access), End::Spurious);
                }
            }
        }
        let spent = machine.counts() - before;
        assert_eq!((spent.shootdowns, spent.ipis, spent.locked()), (0, 0, 0));
        assert_eq!(s.page_table().cpus().iter().count(), 2);
        turn.pass();
        other
            .join()
            .map_err(|_| "the other CPU panicked")?
            .into_iter()
            .collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(())
    })
}

#[test]
fn x21_whether_neighbours_start_as_used_is_a_policy() -> Result {
    for young in [false, true] {
        let machine: &'static Machine = machine();
        let s = space_with(machine, pagefirst::policy::Policy { prefault_young: young, ..policy() })?;
        let file = cache(machine, &marked(), 32)?;
        warm(machine, &file, 0..32)?;
        s.map(at(BASE, private(&file, 0, 32, R)))?;
        assert_eq!(fault(&s, page(BASE, 20), Access::Read), End::Mapped(false, 15));
        for i in 16..32 {
            let accessed = attrs(&s, page(BASE, i)).contains(Attrs::ACCESSED);
            assert_eq!(accessed, young || i == 20, "page {i}");
        }
        // What is old tells used from unused.
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        cpu.load_u8(page(BASE, 21))?;
        assert_eq!((s.account().around, s.account().unused), (15, if young { 0 } else { 14 }));
        s.discard(BASE, 32 * PAGE_SIZE)?;
        assert_eq!(s.account().unused, if young { 0 } else { 14 });
    }
    Ok(())
}
