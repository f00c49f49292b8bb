//! Files that are memory themselves.

mod kit;

use kit::*;
use pagefirst::arch::{Aarch64, Attrs, Format, Sv48, X86_64};
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::file::{Direct, IoError, ReadError};
use pagefirst::frame::Frame;
use pagefirst::limit::Limit;
use pagefirst::platform::Platform;
use pagefirst::space::{Advice, MemoryType, PinError, RemapTo, Why};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr, VirtRange};
use pagefirst_machine::{Config, Machine, MachineFile};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex};

const GIB: u64 = 1 << 30;
const AT: VirtAddr = VirtAddr(8 * GIB);
const HUGE: u64 = 512;

/// A file whose page 0 is in this frame, all of it side by side.
fn at_frame(first: Pfn, pages: u64) -> MachineFile {
    MachineFile::zeros().placed(move |_, _| Ok(Direct { index: 0, pages, first, memory: MemoryType::Normal }))
}

/// Memory of 4 MiB that is nobody's but the file's, every page with its mark.
fn memory<F: Format>(machine: &'static Machine<F>) -> Result<Frame<Machine<F>>> {
    let block = Frame::block(machine, 10)?;
    for i in 0..1024 {
        let byte = u64::from(mark(i.into()));
        machine.cells(block.pfn().add(i)).iter().for_each(|word| word.store(byte, Relaxed));
    }
    Ok(block)
}

fn word<F: Format>(machine: &'static Machine<F>, pfn: Pfn) -> u64 {
    machine.cells(pfn)[0].load(Relaxed)
}

/// Read and written where it is, by the largest entries that fit; nothing is counted, nothing is cached.
fn every_size<F: Format>() -> Result {
    for harsh in [false, true] {
        let machine = Machine::<F>::new(Config { device: 3 * GIB, ..hardware_of::<F>(harsh) });
        let (whole, first) = (GIB / PAGE_SIZE, (GIB / PAGE_SIZE) as u32 - 513);
        let pages = whole + 2 * 513;
        let c = cache(machine, &at_frame(Pfn(first), pages), pages)?;
        let s = space_with(machine, policy().with_fault_around(PAGE_SIZE).ok_or("a window")?)?;
        let start = VirtAddr(AT.0 - 513 * PAGE_SIZE);
        s.map(at(start, shared(&c, 0, pages, RW)))?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        let highest = F::TOP_LEAF.min(2);
        for (i, level) in [(0, 0), (1, 1), (513, highest), (513 + whole, 1), (pages - 1, 0)] {
            cpu.store_u64(page(start, i), i + 1)?;
            assert_eq!(
                (entry(&s, page(start, i)).1, word(machine, Pfn(first).add(i as u32))),
                (level, i + 1)
            );
        }
        let account = s.account();
        assert_eq!((account.faults.physical, account.faults.huge, account.resident_bytes()), (5, 3, 0));
        assert_eq!(c.pages(), 0);
        check(&s);
        // Cut, moved to where large entries do not fit, discarded.
        s.protect(page(start, 1000), PAGE_SIZE, R)?;
        assert_eq!((cpu.load_u64(page(start, 513))?, entry(&s, page(start, 1000)).1), (514, 0));
        assert!(cpu.store_u64(page(start, 1000), 1).is_err());
        s.protect(page(start, 1000), PAGE_SIZE, RW)?;
        cpu.store_u64(page(start, 1000), 7)?;
        let (to, len) = (VirtAddr(16 * GIB + PAGE_SIZE), pages * PAGE_SIZE);
        assert_eq!(s.remap(start, len, len, RemapTo::Fixed(to))?, to);
        assert_eq!((cpu.load_u64(page(to, 1000))?, entry(&s, page(to, 1000)).1), (7, 0));
        s.discard(to, len)?;
        assert_eq!((cpu.load_u64(page(to, 513))?, s.account().resident_bytes()), (514, 0));
        drop((cpu, s, c));
        machine.nothing_left()?;
    }
    Ok(())
}

on_formats!(every_size);

/// Private writes get copies, where nothing was mapped, where a small entry was, where a huge one was; the file stays.
fn copies<F: Format>() -> Result {
    for harsh in [false, true] {
        let machine = Machine::<F>::new(hardware_of::<F>(harsh));
        let block = memory(machine)?;
        let c = cache(machine, &at_frame(block.pfn(), 1024), 1024)?;
        let (s, limit) = (space(machine)?, Limit::new(machine, None, 3)?);
        s.set_limit(Some(limit.clone()));
        s.map(at(AT, private(&c, 0, 1024, RW)))?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        cpu.store_u8(page(AT, 5), 1)?;
        assert_eq!(cpu.load_u8(page(AT, 6))?, mark(6));
        cpu.store_u8(page(AT, 6), 2)?;
        assert_eq!((cpu.load_u8(page(AT, 512))?, entry(&s, page(AT, 512)).1), (mark(512), 1));
        cpu.store_u8(page(AT, 700), 3)?;
        let over = cpu.store_u8(page(AT, 8), 4).expect_err("over the limit").error;
        assert_eq!(over, FaultError::OverLimit(limit.id()));
        for (i, byte) in [(5, 1), (6, 2), (700, 3), (7, mark(7)), (8, mark(8)), (699, mark(699))] {
            assert_eq!(cpu.load_u8(page(AT, i))?, byte);
            assert_eq!(word(machine, block.pfn().add(i as u32)) as u8, mark(i));
        }
        assert_eq!(s.account().resident_bytes(), 3 * PAGE_SIZE);
        // A child has the copies and the file.
        let child = Arc::new(s.fork()?);
        cpu.switch_to(&child);
        for (i, byte) in [(5, 1), (700, 3), (7, mark(7))] {
            assert_eq!(cpu.load_u8(page(AT, i))?, byte);
        }
        check(&s);
        check(&child);
        drop((cpu, child, s, c, limit));
        assert_eq!(counts(machine, block.pfn()), (1, 0));
        drop(block);
        machine.nothing_left()?;
    }
    Ok(())
}

#[test]
fn c67_a_private_write_copies_what_the_file_has() -> Result {
    copies::<X86_64>()
}
#[test]
fn aarch64_copies() -> Result {
    copies::<Aarch64>()
}
#[test]
fn sv48_copies() -> Result {
    copies::<Sv48>()
}

/// A file that tracks writes is asked for all that becomes writable, and for no more.
#[test]
fn the_file_is_asked_before_a_page_becomes_writable() -> Result {
    let machine = Machine::<X86_64>::new(hardware_of::<X86_64>(false));
    let block = memory(machine)?;
    let first = block.pfn();
    // For reads it says all; for writes two pages.
    let file = MachineFile::zeros().with_tracking(true).placed(move |index, write| {
        let (index, pages) = if write { (index & !1, 2) } else { (0, 1024) };
        Ok(Direct { index, pages, first: first.add(index as u32), memory: MemoryType::Normal })
    });
    let c = cache(machine, &file, 1024)?;
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, 1024, RW)))?;
    assert_eq!(fault(&s, page(AT, 600), Access::Read), End::Mapped(false, 0));
    assert_eq!((entry(&s, page(AT, 600)).1, file.reads(), file.writes()), (1, 1, 0));
    // Of 2 MiB it takes two pages for written: they alone become writable.
    assert_eq!(fault(&s, page(AT, 600), Access::Write), End::Mapped(false, 1));
    assert_eq!((file.reads(), file.writes()), (1, 2));
    let writable = |i| attrs(&s, page(AT, i)).contains(Attrs::WRITE);
    assert_eq!(mapped(&s, page(AT, 512), HUGE), [600 - 512, 601 - 512]);
    assert!(writable(600) && writable(601));
    assert_eq!(fault(&s, page(AT, 603), Access::Read), End::Mapped(false, 13));
    assert!(!writable(602) && writable(600));
    assert_eq!(fault(&s, page(AT, 602), Access::Write), End::Mapped(false, 0));
    assert!(writable(602) && !writable(603));
    check(&s);
    Ok(())
}

#[test]
fn what_the_file_says_is_checked() -> Result {
    let machine = Machine::<X86_64>::new(hardware_of::<X86_64>(false));
    let block = memory(machine)?;
    let first = block.pfn();
    let file = MachineFile::zeros().placed(move |index, _| match index {
        0 => Err(IoError),
        1 => Ok(Direct { index: 2, pages: 4, first, memory: MemoryType::Normal }),
        2 => Ok(Direct { index: 0, pages: 4, first: Pfn(u32::MAX), memory: MemoryType::Normal }),
        // A device: it is mapped, and is no memory to copy.
        3 => Ok(Direct { index: 3, pages: 1, first: Pfn(0xf_ee00), memory: MemoryType::Device }),
        _ => Ok(Direct { index: 4, pages: 9, first: first.add(4), memory: MemoryType::Uncached }),
    });
    let c = cache(machine, &file, 6)?;
    let s = space(machine)?;
    s.map(at(AT, private(&c, 0, 8, RW)))?;
    let bus = |bus| End::Error(FaultError::Bus(bus));
    for i in 0..3 {
        assert_eq!(fault(&s, page(AT, i), Access::Read), bus(Bus::Io));
    }
    assert_eq!(fault(&s, page(AT, 3), Access::Write), bus(Bus::Io));
    assert_eq!(tables(&s), 1);
    // Nothing beyond the end, though the file says that there is memory.
    assert_eq!(fault(&s, page(AT, 4), Access::Read), End::Mapped(false, 1));
    assert!(attrs(&s, page(AT, 4)).contains(Attrs::UNCACHED));
    assert_eq!(mapped(&s, AT, 8), [4, 5]);
    for access in [Access::Read, Access::Write] {
        assert_eq!(fault(&s, page(AT, 6), access), bus(Bus::BeyondEnd));
    }
    assert!(matches!(c.read_at(machine, 0, &mut [0]), Err(ReadError::Io)));
    assert!(c.write_at(machine, 0, &[0]).is_err());
    Ok(())
}

/// User copies use it, and nobody pins it: nobody counts who does.
#[test]
fn user_copies_use_it() -> Result {
    let machine = Machine::<X86_64>::new(hardware_of::<X86_64>(false));
    let block = memory(machine)?;
    let c = cache(machine, &at_frame(block.pfn(), 1024), 1024)?;
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, 1024, RW)))?;
    s.copy_out(page(AT, 3), &[9, 9]).map_err(|e| e.to_string())?;
    let mut read = [0; 3];
    s.copy_in(page(AT, 3), &mut read).map_err(|e| e.to_string())?;
    assert_eq!((read, word(machine, block.pfn().add(3)) as u16), ([9, 9, 0], 0x909));
    let pinned = s.pin(VirtRange::page_of(AT), true);
    assert!(matches!(pinned, Err(PinError::NotMemory)), "{:?}", pinned.map(drop));

    let device = MachineFile::zeros()
        .placed(|_, _| Ok(Direct { index: 0, pages: 1, first: Pfn(0xf_ee00), memory: MemoryType::Device }));
    let d = cache(machine, &device, 1)?;
    let at = s.map(shared(&d, 0, 1, RW))?.range.start;
    let stopped = s.copy_in(at, &mut read).expect_err("a device");
    assert!(matches!(stopped.why, Why::Error(FaultError::Segv(Segv::Access))), "{stopped}");
    Ok(())
}

/// What is not cached is not executable, whatever its mapping says: hardware would fetch ahead from a device.
fn only_memory_is_executed<F: Format>() -> Result {
    let machine = Machine::<F>::new(hardware_of::<F>(false));
    let first = memory(machine)?;
    let pfn = first.pfn();
    let file = MachineFile::zeros().placed(move |index, _| {
        let memory = [MemoryType::Normal, MemoryType::Uncached, MemoryType::Device][index as usize];
        Ok(Direct { index, pages: 1, first: pfn.add(index as u32), memory })
    });
    let c = cache(machine, &file, 3)?;
    let s = space_with(machine, policy().with_fault_around(PAGE_SIZE).ok_or("a window")?)?;
    let refused = End::Error(FaultError::Segv(Segv::Access));
    for asked_later in [false, true] {
        s.map(at(AT, shared(&c, 0, 3, if asked_later { R } else { R | Prot::EXEC })))?;
        for (i, end) in [(0, End::Spurious), (1, refused), (2, refused)] {
            assert_eq!(fault(&s, page(AT, i), Access::Read), End::Mapped(false, 0));
            s.protect(page(AT, i), PAGE_SIZE, R | Prot::EXEC)?;
            assert_eq!(
                (fault(&s, page(AT, i), Access::Execute), attrs(&s, page(AT, i)).contains(Attrs::EXEC)),
                (end, i == 0)
            );
            assert_eq!(fault(&s, page(AT, i), Access::Read), End::Spurious);
        }
        check(&s);
    }
    Ok(())
}

on_formats!(only_memory_is_executed);

/// A file that moves: where it is when it is asked, and what happens while it is.
struct Moves {
    first: Arc<AtomicU32>,
    during: Arc<Mutex<Option<Then>>>,
}

type Then = Box<dyn FnOnce() + Send>;

impl Moves {
    fn new(first: Pfn) -> (MachineFile, Moves) {
        let moves = Moves { first: Arc::new(AtomicU32::new(first.0)), during: Arc::default() };
        let (at, during) = (moves.first.clone(), moves.during.clone());
        let file = MachineFile::zeros().placed(move |_, _| {
            let first = Pfn(at.load(Relaxed));
            let then = during.lock().map_err(|_| IoError)?.take();
            if let Some(then) = then {
                then();
            }
            Ok(Direct { index: 0, pages: 1024, first, memory: MemoryType::Normal })
        });
        (file, moves)
    }
    fn to(&self, first: Pfn) {
        self.first.store(first.0, Relaxed);
    }
    /// When it is asked next, this happens between the question and the answer, which is from before.
    fn during(&self, then: impl FnOnce() + Send + 'static) -> Result {
        *self.during.lock().map_err(|_| "poisoned")? = Some(Box::new(then));
        Ok(())
    }
}

/// What is removed is mapped nowhere when that is done, in no size, and the file is asked anew.
fn removal<F: Format>() -> Result {
    for harsh in [false, true] {
        let machine = Machine::<F>::new(hardware_of::<F>(harsh));
        let (old, new) = (memory(machine)?, memory(machine)?);
        machine.cells(new.pfn().add(600))[0].store(77, Relaxed);
        let (file, moves) = Moves::new(old.pfn());
        let c = cache(machine, &file, 1024)?;
        let (a, b) = (space(machine)?, space(machine)?);
        a.map(at(AT, shared(&c, 0, 1024, RW)))?;
        b.map(at(AT, private(&c, 0, 1024, RW)))?;
        let mut cpu = machine.vcpu();
        for s in [&b, &a] {
            cpu.switch_to(s);
            cpu.load_u8(page(AT, 512))?;
            cpu.load_u8(page(AT, 3))?;
            assert_eq!(entry(s, page(AT, 512)).1, 1);
        }
        assert!(matches!(fault(&b, page(AT, 601), Access::Write), End::Mapped(..)));
        moves.to(new.pfn());
        c.punch(machine, 600 * PAGE_SIZE..602 * PAGE_SIZE);
        for s in [&a, &b] {
            assert!(frame(s, page(AT, 600)).is_none() && frame(s, page(AT, 3)).is_some());
        }
        assert_eq!(frame(&a, page(AT, 601)), None);
        assert!(frame(&b, page(AT, 601)).is_some(), "a private copy stays when a hole is punched");
        assert_eq!(cpu.load_u8(page(AT, 600))?, 77);
        c.set_size(machine, 5 * PAGE_SIZE);
        for s in [&a, &b] {
            assert_eq!(mapped(s, AT, 1024).iter().filter(|i| **i >= 5).count(), 0);
            let beyond = FaultError::Bus(Bus::BeyondEnd);
            assert_eq!(fault(s, page(AT, 5), Access::Write), End::Error(beyond));
            check(s);
        }
        c.set_size(machine, 1024 * PAGE_SIZE);
        assert_eq!(cpu.load_u8(page(AT, 601))?, mark(601));
        drop((cpu, a, b, c, old, new));
        machine.nothing_left()?;
    }
    Ok(())
}

#[test]
fn r05_no_entry_is_left_for_memory_of_a_file_that_is_removed() -> Result {
    removal::<X86_64>()
}
#[test]
fn aarch64_removal() -> Result {
    removal::<Aarch64>()
}
#[test]
fn sv48_removal() -> Result {
    removal::<Sv48>()
}

/// The file is punched, or shrinks and grows, between its answer and the entry: the answer is not used.
#[test]
fn r05_an_answer_from_before_a_removal_is_not_used() -> Result {
    for (access, private_write) in [(Access::Read, false), (Access::Write, false), (Access::Write, true)] {
        for shrinks in [false, true] {
            let machine = Machine::<X86_64>::new(hardware_of::<X86_64>(false));
            let (old, new) = (memory(machine)?, memory(machine)?);
            machine.cells(new.pfn().add(600))[0].store(77, Relaxed);
            let (file, moves) = Moves::new(old.pfn());
            let c = cache(machine, &file, 1024)?;
            let s = space(machine)?;
            let map = if private_write { private(&c, 0, 1024, RW) } else { shared(&c, 0, 1024, RW) };
            s.map(at(AT, map))?;
            let (file, to, at) = (c.clone(), new.pfn(), moves.first.clone());
            moves.during(move || {
                at.store(to.0, Relaxed);
                match shrinks {
                    true => {
                        file.set_size(machine, 5);
                        file.set_size(machine, 1024 * PAGE_SIZE);
                    }
                    false => file.punch(machine, 600 * PAGE_SIZE..601 * PAGE_SIZE),
                }
            })?;
            assert_eq!(fault(&s, page(AT, 600), access), End::Mapped(false, 0));
            assert_eq!(first_byte(&s, page(AT, 600)).filter(|_| private_write).unwrap_or(77), 77);
            let leads = frame(&s, page(AT, 600)).ok_or("mapped")?;
            assert!(private_write || leads == new.pfn().add(512), "{leads:?}");
            check(&s);
            drop((s, c));
        }
    }
    // It shrank for good.
    let machine = Machine::<X86_64>::new(hardware_of::<X86_64>(false));
    let block = memory(machine)?;
    let (file, moves) = Moves::new(block.pfn());
    let c = cache(machine, &file, 1024)?;
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, 1024, RW)))?;
    let file = c.clone();
    moves.during(move || file.set_size(machine, 3 * PAGE_SIZE))?;
    assert_eq!(fault(&s, page(AT, 600), Access::Write), End::Error(FaultError::Bus(Bus::BeyondEnd)));
    assert_eq!(tables(&s), 1);
    Ok(())
}

/// Faults, moves and removals at once: no entry is left beyond the end, and what is read is what the file has there.
#[test]
fn r14_moves_and_removals_at_once() -> Result {
    let machine = Machine::<X86_64>::new(Config { cpus: 4, ..hardware_of::<X86_64>(false) });
    let block = memory(machine)?;
    let c = cache(machine, &at_frame(block.pfn(), 1024), 1024)?;
    let s = space(machine)?;
    let to = page(AT, 4096);
    s.map(at(AT, shared(&c, 0, 1024, R)))?;
    let stop = AtomicBool::new(false);
    let user = |n: u64| {
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        for round in (0..).take_while(|_| !stop.load(Relaxed)) {
            let i = (round * 37 + n * 11) % 1024;
            for base in [AT, to] {
                if let Ok(byte) = cpu.load_u8(page(base, i)) {
                    assert_eq!(byte, mark(i));
                }
            }
        }
    };
    together(2, user, || {
        let _stop = StopAtEnd(&stop);
        let whole = 1024 * PAGE_SIZE;
        for round in 0..150 {
            let (from, there) = if round % 2 == 0 { (AT, to) } else { (to, AT) };
            s.remap(from, whole, whole, RemapTo::Fixed(there)).expect("it moves");
            c.punch(machine, (round % 900) * PAGE_SIZE..(round % 900 + 90) * PAGE_SIZE);
            c.set_size(machine, 100 * PAGE_SIZE);
            assert!(mapped(&s, there, 1024).iter().all(|i| *i < 100), "beyond the end");
            c.set_size(machine, whole);
        }
    });
    check(&s);
    drop((s, c, block));
    Ok(machine.nothing_left()?)
}

#[test]
fn c68_a_file_that_is_memory_hears_of_each_first_write_after_it_was_cleaned() -> Result {
    for harsh in [false, true] {
        let machine = Machine::<X86_64>::new(Config { cpus: 2, ..hardware_of::<X86_64>(harsh) });
        let block = memory(machine)?;
        let file = at_frame(block.pfn(), 1024).with_tracking(true);
        let c = cache(machine, &file, 1024)?;
        let s = space(machine)?;
        s.map(at(AT, shared(&c, 0, 1024, RW)))?;
        s.map(at(page(AT, 4097), shared(&c, 1, 15, RW)))?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        // By a huge entry and by a small one.
        for round in 1..4 {
            for va in [AT, page(AT, 4097)] {
                let asked = file.writes();
                cpu.store_u64(va, round)?;
                cpu.store_u64(va, round)?;
                assert_eq!((file.writes() - asked, attrs(&s, va).contains(Attrs::WRITE)), (1, true));
            }
            c.clean(2..16);
            assert!(attrs(&s, page(AT, 4097)).contains(Attrs::WRITE), "another page");
            c.clean(0..1024);
            assert!(
                !attrs(&s, AT).contains(Attrs::WRITE) && !attrs(&s, page(AT, 4097)).contains(Attrs::WRITE)
            );
            assert_eq!(cpu.load_u64(AT)?, round);
        }
        drop(cpu);
        drop((s, c, block));
        machine.nothing_left()?;
    }
    Ok(())
}

// The file answers, and calls its pages clean before the fault has made one writable.
#[test]
fn an_answer_is_not_used_after_the_file_was_cleaned() -> Result {
    let machine = machine();
    let block = memory(machine)?;
    let (first, room) = (block.pfn(), Arc::new(Mutex::new(None::<Cache>)));
    let inside = room.clone();
    let file = MachineFile::zeros().with_tracking(true).placed(move |_, write| {
        if let Some(c) = inside.lock().expect("nobody panicked").take_if(|_| write) {
            c.clean(0..16);
        }
        Ok(Direct { index: 0, pages: 16, first, memory: MemoryType::Normal })
    });
    let c = cache(machine, &file, 16)?;
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, 16, RW)))?;
    for mapped in [false, true] {
        if mapped {
            s.discard(AT, 16 * PAGE_SIZE)?;
            fault(&s, AT, Access::Read);
        }
        *room.lock().expect("nobody panicked") = Some(c.clone());
        let asked = file.writes();
        fault(&s, AT, Access::Write);
        assert_eq!((file.writes() - asked, attrs(&s, AT).contains(Attrs::WRITE)), (2, true));
    }
    Ok(())
}

#[test]
fn a_file_that_is_memory_has_no_pages_and_is_not_read() -> Result {
    let machine = machine();
    let block = memory(machine)?;
    let file = at_frame(block.pfn(), 16);
    let c = cache(machine, &file, 16)?;
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, 16, RW)))?;
    s.advise(AT, 16 * PAGE_SIZE, Advice::WillNeed)?;
    c.will_need(machine, 0, 16);
    assert_eq!((c.pages(), file.reads()), (0, 0));
    Ok(())
}
