//! Memory errors that hardware reports: frames that are free, pages of files, private pages.

mod kit;

use kit::*;
use pagefirst::Poisoned;
use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::fault::{Bus, FaultError, Signal};
use pagefirst::file::{ReadError, ShmemHuge, WriteBackError};
use pagefirst::frame::Frame;
use pagefirst::platform::Platform;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::{PinError, RemapTo};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, VirtAddr, VirtRange};
use pagefirst_machine::{Machine, MachineFile};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;

const AT: VirtAddr = VirtAddr(1 << 30);
const LOST: End = End::Error(FaultError::Bus(Bus::Poison));

fn poison(machine: &'static Machine, pfn: Pfn) -> Poisoned {
    machine.vm().poison(machine, pfn)
}

/// All frames that there are, handed out and given back.
fn all(machine: &'static Machine) -> Vec<Pfn> {
    let frames: Vec<_> = machine.leave_free(0).iter().map(Frame::pfn).collect();
    machine.vm().drain(machine);
    frames
}

/// Wherever it is: in the allocator, in a block of it, in a CPU's cache, in a cached table's place.
#[test]
fn a_free_frame_is_never_handed_out() -> Result {
    let machine = small_machine(300);
    let there = all(machine);
    let frames = machine.vm().frames.total_frames();
    let mut bad = vec![there[0], there[7], there[8], there[100]];
    for &pfn in &bad {
        assert_eq!(poison(machine, pfn), Poisoned::Free);
        assert_eq!(poison(machine, pfn), Poisoned::Free, "again");
    }
    let cached = Frame::new(machine)?.pfn();
    assert_eq!(poison(machine, cached), Poisoned::Free);
    bad.push(cached);
    let s = space(machine)?;
    s.map(at(AT, anonymous(4, RW)))?;
    assert!(matches!(fault(&s, AT, Access::Write), End::Mapped(..)));
    drop(s);
    assert_eq!(machine.vm().frames.bad_frames(), 5);
    assert_eq!(machine.vm().frames.total_frames(), frames - 5);
    let left = all(machine);
    assert!(left.len() == there.len() - 5 && bad.iter().all(|pfn| !left.contains(pfn)));
    // The library's own, and nobody's.
    let own = Frame::new(machine)?;
    assert_eq!(poison(machine, own.pfn()), Poisoned::InUse);
    assert_eq!(poison(machine, machine.vm().zero_page()), Poisoned::InUse);
    for foreign in [0, 1, 300, u32::MAX] {
        assert_eq!(poison(machine, Pfn(foreign)), Poisoned::Foreign);
    }
    drop(own);
    Ok(machine.nothing_left()?)
}

/// Whoever has the page of a file mapped loses it, and gets SIGBUS with BUS_MCEERR_AR while somebody holds it, as does who
/// never had it; its neighbours stay. (c47: fault-around leaves it out.) After that it is read anew.
#[test]
fn c47_a_bad_page_is_not_mapped() -> Result {
    let machine = machine();
    let file = marked().with_tracking(true);
    let c = cache(machine, &file, 16)?;
    warm(machine, &c, 0..16)?;
    let (a, b, never) = (space(machine)?, space(machine)?, space(machine)?);
    a.map(at(AT, shared(&c, 0, 16, RW)))?;
    b.map(at(AT, private(&c, 0, 16, RW)))?;
    never.map(at(AT, shared(&c, 0, 16, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&a);
    cpu.load_u8(page(AT, 3))?;
    assert_eq!(fault(&b, page(AT, 4), Access::Read), End::Mapped(false, 15));
    assert_eq!(fault(&b, page(AT, 5), Access::Write), End::Mapped(false, 0));
    let (bad, copied) = (frame(&a, page(AT, 3)).ok_or("mapped")?, frame(&a, page(AT, 5)).ok_or("mapped")?);

    let pinned = a.pin(VirtRange::page_of(page(AT, 3)), false).map_err(|e| e.to_string())?;
    assert_eq!(poison(machine, bad), Poisoned::File { lost: false });
    assert_eq!(counts(machine, bad).1, 0, "held, and mapped nowhere");
    for s in [&a, &b] {
        assert_eq!(mapped(s, AT, 16).len(), 15);
        assert!(frame(s, page(AT, 3)).is_none());
    }
    let trap = cpu.load_u8(page(AT, 3)).expect_err("it is lost");
    assert_eq!((trap.signal(), trap.si_addr()), (Some((Signal::Bus, 4)), page(AT, 3).0));
    for (s, access) in [(&a, Access::Write), (&b, Access::Read), (&b, Access::Write), (&never, Access::Read)]
    {
        assert_eq!(fault(s, page(AT, 3), access), LOST);
    }
    assert_eq!(fault(&never, page(AT, 1), Access::Read), End::Mapped(false, 14));
    assert!(frame(&never, page(AT, 3)).is_none());
    // A copy is another page.
    assert_eq!(poison(machine, copied), Poisoned::File { lost: false });
    assert_eq!(first_byte(&b, page(AT, 5)), Some(mark(5)));
    // Everybody who asks is told.
    assert!(matches!(c.read_at(machine, 3 * PAGE_SIZE, &mut [0]), Err(ReadError::Poisoned)));
    assert!(a.copy_in(page(AT, 3), &mut [0]).is_err());
    assert!(a.pin(VirtRange::page_of(page(AT, 3)), false).is_err());
    for s in [&a, &b, &never] {
        check(s);
    }
    // Held by the cache alone, it is read anew by whoever asks, to another frame; this one is nobody's for ever.
    drop(pinned);
    assert_eq!(counts(machine, bad), (1, 0));
    assert_eq!(fault(&never, page(AT, 3), Access::Read), End::Mapped(true, 0));
    assert_eq!(counts(machine, bad), (0, 0));
    assert_eq!(fault(&a, page(AT, 3), Access::Write), End::Mapped(false, 0));
    assert_eq!(first_byte(&b, page(AT, 3)), None);
    assert_eq!(fault(&b, page(AT, 3), Access::Read), End::Mapped(false, 0));
    for s in [&a, &b, &never] {
        assert_ne!(frame(s, page(AT, 3)), Some(bad));
        assert_eq!(first_byte(s, page(AT, 3)), Some(mark(3)));
        check(s);
    }
    let read = c.read_at(machine, 5 * PAGE_SIZE, &mut [0]);
    assert!(read.is_ok(), "so does who reads the file");
    assert_eq!(c.write_back(machine).map_err(|e| e.to_string())?, 1);
    drop((cpu, a, b));
    assert_eq!(never.unmap(AT, 16 * PAGE_SIZE), Ok(()));
    assert_eq!(c.evict(machine), 16);
    drop((never, c));
    machine.nothing_left()?;
    assert!(!all(machine).contains(&bad));
    assert_eq!(machine.vm().frames.bad_frames(), 2);
    Ok(())
}

/// Nobody who touches, copies or writes a page of which nothing is lost is told that something is, while it is reported again
/// and again; nor is a write lost that came before or after.
#[test]
fn nothing_is_lost_with_a_clean_page_while_others_touch_it() -> Result {
    for tracks in [false, true] {
        let machine = machine();
        let file = marked().with_tracking(tracks);
        let (c, s) = (cache(machine, &file, 1)?, space(machine)?);
        s.map(at(AT, shared(&c, 0, 1, R)))?;
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for who in 0..3 {
                let (s, c, over) = (&s, &c, &over);
                scope.spawn(move || {
                    let mut cpu = machine.vcpu();
                    cpu.switch_to(s);
                    let mut byte = [0];
                    while !over.load(SeqCst) {
                        match who {
                            0 => byte = [cpu.load_u8(AT).expect("nothing is lost")],
                            1 => {
                                while let Err(stopped) = s.copy_in(AT, &mut byte) {
                                    assert_eq!(stopped.why.error(), None, "it has to wait");
                                }
                            }
                            _ => {
                                while let Err(error) = c.read_at(machine, 0, &mut byte) {
                                    assert!(matches!(error, ReadError::Blocked(_)), "{error}");
                                }
                            }
                        }
                        assert_eq!(byte, [mark(0)]);
                    }
                });
            }
            let mut reported = 0;
            while reported < 40 {
                let _ = fault(&s, AT, Access::Read);
                let Some(bad) = frame(&s, AT) else { continue };
                if poison(machine, bad) == (Poisoned::File { lost: false }) {
                    reported += 1;
                }
            }
            over.store(true, SeqCst);
        });
        check(&s);
        drop((s, c));
        machine.nothing_left()?;
        assert!(machine.vm().frames.bad_frames() > 1);
    }
    Ok(())
}

/// What was written and not stored is lost: that is said, and stays so until the page is removed.
#[test]
fn a_dirty_page_is_lost() -> Result {
    let machine = machine();
    let file = marked().with_tracking(true);
    let (c, s) = (cache(machine, &file, 8)?, space(machine)?);
    s.map(at(AT, shared(&c, 0, 8, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    for i in [2, 3] {
        cpu.store_u8(page(AT, i), 99)?;
    }
    let bad = frame(&s, page(AT, 3)).ok_or("mapped")?;
    assert_eq!(poison(machine, bad), Poisoned::File { lost: true });
    assert_eq!(cpu.load_u8(page(AT, 3)).expect_err("lost").error, FaultError::Bus(Bus::Poison));
    for _ in 0..2 {
        assert!(matches!(c.write_back(machine), Err(WriteBackError::Io(_))));
    }
    assert_eq!((file.stored(2).first(), file.stored(3).first()), (Some(&99), None));
    drop((cpu, s));
    // What was stored before must not be read as if nothing had been written.
    c.evict(machine);
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, 8, RW)))?;
    assert_eq!(fault(&s, page(AT, 3), Access::Read), LOST);
    c.set_size(machine, 3 * PAGE_SIZE);
    c.set_size(machine, 8 * PAGE_SIZE);
    assert!(matches!(fault(&s, page(AT, 3), Access::Read), End::Mapped(true, _)));
    assert_eq!(first_byte(&s, page(AT, 3)), Some(0));
    drop((s, c));
    machine.nothing_left()?;
    assert_eq!(machine.vm().frames.bad_frames(), 1);
    Ok(())
}

/// A huge page of which a part is bad is mapped by small entries, the good parts alone; and when it goes, they are free.
#[test]
fn x10_a_folio_with_a_bad_part_is_not_mapped_whole() -> Result {
    // The last one is a neighbour of what is read.
    for i in [0, 7, 511, 105] {
        let machine = machine();
        let c = cache(machine, &MachineFile::shmem(ShmemHuge::Always), 1024)?;
        let s = space(machine)?;
        s.map(at(AT, shared(&c, 0, 1024, RW)))?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        cpu.store_u8(page(AT, 100), 5)?;
        cpu.load_u8(page(AT, 512))?;
        assert_eq!([0, 512].map(|i| entry(&s, page(AT, i)).1), [1, 1]);
        let bad = frame(&s, AT).ok_or("mapped")?.add(i);
        assert_eq!(poison(machine, bad), Poisoned::File { lost: true });
        assert_eq!(poison(machine, bad), Poisoned::File { lost: true }, "again");
        let lost = page(AT, i.into());
        assert_eq!(fault(&s, lost, Access::Read), LOST);
        assert_eq!(cpu.load_u8(page(AT, 100))?, 5);
        cpu.store_u8(page(AT, 101), 6)?;
        assert_eq!([100, 512].map(|i| entry(&s, page(AT, i)).1), [0, 1], "the other folio is whole");
        assert_eq!(fault(&s, lost, Access::Write), LOST);
        // Nobody maps it whole again.
        let other = space(machine)?;
        other.map(at(AT, shared(&c, 0, 1024, R)))?;
        assert!(matches!(fault(&other, page(AT, 100), Access::Read), End::Mapped(..)));
        assert_eq!((entry(&other, page(AT, 100)).1, first_byte(&other, page(AT, 100))), (0, Some(5)));
        assert_eq!(fault(&other, lost, Access::Read), LOST);
        check(&s);
        check(&other);
        drop((cpu, s, other, c));
        machine.nothing_left()?;
        let left = all(machine);
        assert!(!left.contains(&bad) && left.contains(&bad.add(1).max(Pfn(bad.0 ^ 1))));
        assert_eq!(machine.vm().frames.bad_frames(), 1);
    }
    Ok(())
}

/// Entries say what hardware may do; a mark that is there already is not taken for an answer.
#[test]
fn attributes_are_as_before() -> Result {
    let machine = machine();
    let (c, s) = (cache(machine, &marked(), 8)?, space(machine)?);
    s.map(at(AT, shared(&c, 0, 8, RW)))?;
    assert!(matches!(fault(&s, AT, Access::Read), End::Mapped(..)));
    let before = attrs::<X86_64>(&s, AT);
    let bad = cached_frame(machine, &c, 1)?;
    assert_eq!(poison(machine, bad), Poisoned::File { lost: false });
    assert_eq!(attrs(&s, AT), before);
    assert!(!before.contains(Attrs::NONE));
    assert_eq!(fault(&s, page(AT, 1), Access::Read), End::Mapped(true, 0));
    assert_ne!(frame(&s, page(AT, 1)), Some(bad));
    assert_eq!((attrs(&s, page(AT, 1)), counts(machine, bad)), (before, (0, 0)));
    Ok(())
}

/// A frame of the library's is marked where it is, and withheld when the library gives it back: the root of a space's tables,
/// a table that would wait to be one again, a frame that is to become a page.
#[test]
fn a_frame_that_is_in_use_is_never_handed_out_again() -> Result {
    let machine = small_machine(300);
    let s = space(machine)?;
    s.map(at(AT, anonymous(2, RW)))?;
    assert!(matches!(fault(&s, AT, Access::Write), End::Mapped(..)));
    let root = s.page_table().root_frame();
    let entry = machine.cells(root)[X86_64::index(AT, 3)].load(std::sync::atomic::Ordering::Acquire);
    let table = X86_64::child(entry, 3).ok_or("a table")?;
    let own = Frame::new(machine)?;
    let bad = [root, table, own.pfn()];
    for pfn in bad {
        assert_eq!(poison(machine, pfn), Poisoned::InUse);
    }
    drop((s, own));
    machine.nothing_left()?;
    assert_eq!(machine.vm().frames.bad_frames(), 3);
    let left = all(machine);
    assert!(bad.iter().all(|pfn| !left.contains(pfn)));
    Ok(())
}

/// The page of zeros is read on by everybody; a huge one by those who have it, and mapped for nobody else.
#[test]
fn pages_of_zeros_are_read_on() -> Result {
    let machine = machine();
    let huge = VirtAddr(2 << 30);
    let s = space_with(machine, Policy { huge: HugePolicy::Always, ..policy() })?;
    s.map(at(AT, anonymous(2, RW)))?;
    s.map(at(huge, anonymous(2 * 512, RW)))?;
    for va in [AT, huge] {
        assert!(matches!(fault(&s, va, Access::Read), End::Mapped(..)));
        let pfn = frame(&s, va).ok_or("mapped")?;
        assert_eq!(poison(machine, pfn), Poisoned::InUse);
    }
    assert!(matches!(fault(&s, page(huge, 512), Access::Read), End::Mapped(..)));
    assert_eq!([0, 512].map(|i| entry(&s, page(huge, i)).1), [1, 0]);
    let child = Arc::new(s.fork()?);
    let mut cpu = machine.vcpu();
    for s in [&s, &child] {
        cpu.switch_to(s);
        for va in [AT, page(AT, 1), page(huge, 9), page(huge, 512)] {
            let mut byte = [1];
            assert!(s.copy_in(va, &mut byte).is_ok());
            assert_eq!((byte, cpu.load_u8(va)?), ([0], 0), "{va:?}");
        }
        cpu.store_u8(page(huge, 9), 7)?;
        assert_eq!((cpu.load_u8(page(huge, 9))?, cpu.load_u8(huge)?), (7, 0));
        check(s);
    }
    drop((cpu, s, child));
    machine.nothing_left()?;
    assert_eq!(machine.vm().frames.bad_frames(), 1);
    Ok(())
}

/// Huge pages are split before anything is taken out: whom memory runs out for is told the whole number when he calls again.
#[test]
fn pages_are_lost_and_told_once_though_memory_runs_out() -> Result {
    let mut failed = 0;
    for free in 0.. {
        let machine = machine();
        let s = space_with(machine, Policy { huge: HugePolicy::Always, ..policy() })?;
        s.map(at(VirtAddr(2 << 30), anonymous(2 * 512, RW)))?;
        for i in [0, 512] {
            let va = page(VirtAddr(2 << 30), i);
            assert!(s.copy_out(va, &[1]).is_ok());
            let pfn = frame(&s, va).ok_or("mapped")?.add(7);
            assert_eq!(poison(machine, pfn), Poisoned::Private { huge: true });
        }
        let taken = machine.leave_free(free);
        let first = s.lose_poisoned();
        drop(taken);
        check(&s);
        assert_eq!((first, s.lose_poisoned()), if first.is_ok() { (Ok(2), Ok(0)) } else { (first, Ok(2)) });
        failed += u32::from(first.is_err());
        drop(s);
        machine.nothing_left()?;
        if first.is_ok() {
            break;
        }
    }
    assert!(failed > 1);
    Ok(())
}

/// From the moment it is marked, and, of a huge one, before it is taken out, nobody uses what is lost: no user copy, no pin, no fork, no
/// write of a page that is reused.
#[test]
fn a_private_page_that_is_marked_is_not_used() -> Result {
    let machine = machine();
    let lost = |result: std::result::Result<(), pagefirst::space::Stopped<'_, Machine>>| {
        let why = result.err().and_then(|stopped| stopped.why.error());
        assert_eq!(why, Some(FaultError::Bus(Bus::Poison)));
    };
    let huge = VirtAddr(2 << 30);
    for pinned in [false, true] {
        let s = space_with(machine, Policy { huge: HugePolicy::Always, ..policy() })?;
        s.map(at(AT, anonymous(3, RW)))?;
        s.map(at(huge, anonymous(512, RW)))?;
        for va in [AT, page(AT, 1), page(AT, 2), page(huge, 77)] {
            assert!(s.copy_out(va, &[7]).is_ok());
        }
        let pins: Vec<_> = if pinned {
            [AT, huge].map(|va| s.pin(VirtRange::page_of(va), true).ok()).into()
        } else {
            vec![]
        };
        assert!(pins.iter().all(Option::is_some));
        drop(s.fork()?);
        for (va, i) in [(AT, 0), (page(huge, 77), 77)] {
            let pfn = frame(&s, page(va, 0)).ok_or("mapped")?.add(i);
            assert_eq!(poison(machine, pfn), Poisoned::Private { huge: i > 0 });
            lost(s.copy_in(va, &mut [0]));
            lost(s.copy_out(va, &[1]));
            for write in [false, true] {
                let again = s.pin(VirtRange::page_of(va), write);
                assert!(matches!(again, Err(PinError::Fault(FaultError::Bus(Bus::Poison)))), "{again:?}");
            }
        }
        if !pinned {
            assert_eq!(fault(&s, AT, Access::Write), LOST, "not reused, though nobody else has it");
        }
        let child = Arc::new(s.fork()?);
        assert_eq!((frame(&child, AT), fault(&child, AT, Access::Read)), (None, LOST));
        lost(child.copy_in(page(huge, 77), &mut [0]));
        let mut byte = [0];
        assert!(
            child.copy_in(page(huge, 78), &mut byte).is_ok() && child.copy_in(page(AT, 1), &mut byte).is_ok()
        );
        assert_eq!(byte, [7]);
        assert_eq!((s.lose_poisoned()?, child.lose_poisoned()?), (1, 0));
        assert_eq!(fault(&child, page(huge, 77), Access::Read), LOST);
        for s in [&s, &child] {
            check(s);
        }
        drop((pins, s, child));
        machine.nothing_left()?;
    }
    Ok(())
}

/// Private pages: poison in their place, in every space that has them; it is changed, moved, inherited and taken away like
/// a page, and nobody reads zeros there.
fn private_pages<F: Format>() -> Result {
    let machine = machine_of::<F>();
    let policy = Policy { huge: HugePolicy::Always, ..policy() };
    let s = space_with(machine, policy)?;
    let huge = VirtAddr(2 << 30);
    s.map(at(AT, anonymous(8, RW)))?;
    s.map(at(huge, anonymous(512, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    for i in 0..8 {
        cpu.store_u8(page(AT, i), 10 + i as u8)?;
    }
    for i in 0..512 {
        cpu.store_u8(page(huge, i), 1 + i as u8 % 200)?;
    }
    assert_eq!(entry(&s, huge).1, 1);
    let bad = frame(&s, page(AT, 3)).ok_or("mapped")?;
    let child = Arc::new(s.fork()?);
    let resident = s.account().resident_bytes();
    let hurt = frame(&s, huge).ok_or("mapped")?.add(77);
    assert_eq!(machine.vm().poison(machine, bad), Poisoned::Private { huge: false });
    for s in [&s, &child] {
        assert_eq!(fault(s, page(AT, 3), Access::Read), LOST);
    }
    assert_eq!(machine.vm().poison(machine, hurt), Poisoned::Private { huge: true });
    // Nobody copies what is bad.
    assert_eq!(fault(&s, page(huge, 77), Access::Write), LOST);
    assert_eq!((s.lose_poisoned()?, s.lose_poisoned()?), (1, 0));
    assert_eq!(s.account().resident_bytes(), resident - 2 * PAGE_SIZE);
    assert_eq!(child.lose_poisoned()?, 1);
    for s in [&s, &child] {
        for va in [page(AT, 3), page(huge, 77)] {
            for access in [Access::Read, Access::Write] {
                assert_eq!(fault(s, va, access), LOST);
            }
            assert!(s.copy_in(va, &mut [0]).is_err() && s.copy_out(va, &[0]).is_err());
            let pinned = [false, true].map(|write| s.pin(VirtRange::page_of(va), write));
            let is_lost = |end| matches!(end, Err(PinError::Fault(FaultError::Bus(Bus::Poison))));
            assert!(pinned.into_iter().all(is_lost), "nobody waits for it");
        }
        cpu.switch_to(s);
        assert_eq!((cpu.load_u8(page(AT, 4))?, cpu.load_u8(page(huge, 78))?), (14, 79));
        cpu.store_u8(page(huge, 76), 5)?;
        check(s);
    }
    // Rights come and go, it moves, a child has it.
    for prot in [NONE, R, RW] {
        s.protect(AT, 8 * PAGE_SIZE, prot)?;
    }
    let to = VirtAddr((3 << 30) + PAGE_SIZE);
    s.remap(AT, 8 * PAGE_SIZE, 8 * PAGE_SIZE, RemapTo::Fixed(to))?;
    s.remap(huge, 2 << 20, 2 << 20, RemapTo::Fixed(VirtAddr((4 << 30) + PAGE_SIZE)))?;
    let grandchild = Arc::new(s.fork()?);
    for s in [&s, &grandchild] {
        assert_eq!(fault(s, page(to, 3), Access::Read), LOST);
        assert_eq!(fault(s, page(VirtAddr((4 << 30) + PAGE_SIZE), 77), Access::Write), LOST);
        check(s);
    }
    assert_eq!(fault(&s, page(to, 2), Access::Write), End::Mapped(false, 0));
    // Discarded, the memory is zero again.
    s.discard(to, 8 * PAGE_SIZE)?;
    cpu.switch_to(&s);
    assert_eq!(cpu.load_u8(page(to, 3))?, 0);
    cpu.switch_to(&child);
    child.unmap(AT, 8 * PAGE_SIZE)?;
    check(&child);
    drop((cpu, s, child, grandchild));
    machine.nothing_left()?;
    assert_eq!(machine.vm().frames.bad_frames(), 2);
    Ok(())
}

on_formats!(private_pages);

// Of a folio across the end that somebody holds, a page beyond the end goes bad.
#[test]
fn a_write_that_lets_the_file_grow_to_a_bad_page_fails() -> Result {
    let machine = machine();
    let c = cache(machine, &MachineFile::shmem(ShmemHuge::Always).with_folios(3), 8)?;
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, 8, RW)))?;
    fault(&s, AT, Access::Write);
    let first = frame(&s, AT).ok_or("mapped")?;
    let pin = s.pin(VirtRange::new(AT, page(AT, 1)), true).map_err(|e| e.to_string())?;
    machine.vm().poison(machine, first.add(5));
    let bytes = || machine.cells(first.add(5))[0].load(SeqCst);
    machine.cells(first.add(5))[0].store(77, SeqCst);
    c.set_size(machine, PAGE_SIZE);
    assert!(c.write_at(machine, 5 * PAGE_SIZE, &[7]).is_err());
    assert_eq!(c.size(), PAGE_SIZE);
    c.write_at(machine, 6 * PAGE_SIZE, &[7])?;
    assert!(c.read_at(machine, 5 * PAGE_SIZE, &mut [0]).is_err());
    assert_eq!(bytes(), 77, "what is bad is touched no more");
    drop(pin);
    Ok(())
}
