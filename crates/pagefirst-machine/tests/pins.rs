//! Pins: whose page it is that is pinned, through forks, copies and the end of its mapping (r12).

mod doors;
mod kit;

use doors::{DoorsOf, Point, arm, disarm};
use kit::*;
use pagefirst::arch::{Attrs, X86_64};
use pagefirst::fault::{FaultError, Segv};
use pagefirst::frame::{Frame, FrameFlags};
use pagefirst::platform::Platform;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::{Advice, Backing, Map, MemoryType, Physical, PinError, Pinned, RemapTo, VmaFlags};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, VirtAddr, VirtRange};
use pagefirst_machine::{Config, Machine};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

const AT: VirtAddr = VirtAddr(1 << 30);
const SMALL: u64 = LEAF / PAGE_SIZE;

fn pages(at: VirtAddr, n: u64) -> VirtRange {
    VirtRange::new(at, page(at, n))
}
fn pin(s: &Space, at: VirtAddr, write: bool) -> Result<Pinned<Machine>> {
    Ok(s.pin(pages(at, 1), write).map_err(|error| error.to_string())?)
}
/// A device's view of a frame.
fn dma(machine: &'static Machine, pfn: Pfn) -> &'static std::sync::atomic::AtomicU64 {
    &machine.cells(pfn)[0]
}
fn end(machine: &'static Machine, spaces: impl IntoIterator<Item = Space>) -> Result {
    for s in spaces {
        check(&s);
        drop(Arc::into_inner(s).ok_or("somebody else has it")?);
    }
    Ok(machine.nothing_left()?)
}

#[test]
fn r12_a_pinned_page_stays_the_parents() -> Result {
    let machine = machine();
    let parent = space(machine)?;
    parent.map(at(AT, anonymous(4, RW)))?;
    for i in 0..4 {
        put(&parent, page(AT, i), i + 1)?;
    }
    let pinned = pin(&parent, page(AT, 1), true)?;
    let pfn = pinned.first();
    let child = fork(&parent)?;
    assert_eq!((frame(&parent, page(AT, 1)), frame(&child, AT)), (Some(pfn), frame(&parent, AT)));
    assert_ne!(frame(&child, page(AT, 1)), Some(pfn), "copied at once");
    assert!(attrs(&parent, page(AT, 1)).contains(Attrs::WRITE), "and written on with no fault");
    assert_eq!(get(&child, page(AT, 1))?, 2);
    dma(machine, pfn).store(200, Release);
    put(&child, page(AT, 1), 20)?;
    assert_eq!((get(&parent, page(AT, 1))?, get(&child, page(AT, 1))?), (200, 20));
    put(&parent, page(AT, 1), 300)?;
    assert_eq!(dma(machine, pfn).load(Acquire), 300);
    // Given up, it is a page like others.
    drop(pinned);
    let third = fork(&parent)?;
    assert_eq!(frame(&third, page(AT, 1)), Some(pfn));
    end(machine, [parent, child, third])
}

/// A page that is shared is made exclusive before it is pinned: by a copy, or where it is.
#[test]
fn r12_a_shared_page_is_unshared_before_it_is_pinned() -> Result {
    let machine = machine();
    for write in [false, true] {
        let parent = space(machine)?;
        parent.map(at(AT, anonymous(2, RW)))?;
        put(&parent, AT, 1)?;
        let child = fork(&parent)?;
        let pinned = pin(&child, AT, write)?;
        assert_eq!(frame(&child, AT), Some(pinned.first()));
        assert_ne!(frame(&parent, AT), Some(pinned.first()));
        let old = frame(&parent, AT);
        let other = pin(&parent, AT, write)?;
        assert_eq!(Some(other.first()), old, "nobody else has it");
        put(&child, AT, 5)?;
        assert_eq!(dma(machine, pinned.first()).load(Acquire), 5);
        // Nothing there yet, and the zero page.
        let fresh = pin(&parent, page(AT, 1), write)?;
        get(&child, page(AT, 1))?;
        let zero = pin(&child, page(AT, 1), write)?;
        assert_ne!(fresh.first(), zero.first());
        drop((pinned, other, fresh, zero));
        end(machine, [child, parent])?;
    }
    Ok(())
}

/// What it was to be made exclusive of is a device's by then, of whose frames nothing is known.
#[test]
fn r12_a_page_whose_place_a_device_takes_is_not_pinned() -> Result {
    let machine = Machine::<DoorsOf<X86_64>>::new(Config { device: 1 << 30, ..hardware() });
    let parent = space(machine)?;
    parent.map(at(AT, anonymous(1, RW)))?;
    put(&parent, AT, 1)?;
    let child = fork(&parent)?;
    let other = child.clone();
    // It has been seen to be shared; the second time it is about to be copied.
    arm(Point::Found, 1, move || {
        let backing = Backing::Physical(Physical { first: Pfn(1 << 18), memory: MemoryType::Device });
        let device = Map { backing, flags: VmaFlags::SHARED, ..anonymous(1, RW) };
        other.map(at(AT, device)).expect("room");
        assert!(matches!(fault(&other, AT, Access::Write), End::Mapped(..)));
    });
    assert!(matches!(child.pin(pages(AT, 1), false), Err(PinError::NotMemory)));
    disarm();
    drop((parent, child));
    Ok(machine.nothing_left()?)
}

/// So it is where the program may not write just now: or else its next write would be to another page.
#[test]
fn r12_a_page_pinned_for_reading_stays_the_one_that_is_mapped() -> Result {
    let machine = machine();
    for child_lives in [false, true] {
        let parent = space(machine)?;
        parent.map(at(AT, anonymous(1, RW)))?;
        put(&parent, AT, 1)?;
        let child = fork(&parent)?;
        let kept = child_lives.then(|| child.clone());
        drop(child);
        parent.protect(AT, PAGE_SIZE, R)?;
        let pinned = pin(&parent, AT, false)?;
        assert_eq!(frame(&parent, AT), Some(pinned.first()));
        assert!(!attrs(&parent, AT).contains(Attrs::WRITE), "it may not write still");
        assert_eq!(fault(&parent, AT, Access::Write), End::Error(FaultError::Segv(Segv::Access)));
        parent.protect(AT, PAGE_SIZE, RW)?;
        put(&parent, AT, 2)?;
        assert_eq!(frame(&parent, AT), Some(pinned.first()));
        assert_eq!(dma(machine, pinned.first()).load(Acquire), 2);
        if let Some(child) = &kept {
            assert_eq!(get(child, AT)?, 1);
        }
        drop(pinned);
        end(machine, [Some(parent), kept].into_iter().flatten())?;
    }
    Ok(())
}

/// Runs it on another thread, which is given some time.
fn ends(f: impl FnOnce() + Send + 'static) {
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        f();
        let _ = done.send(());
    });
    is_done.recv_timeout(PATIENCE).expect("it ends");
}
/// What a pin is of, another space's writes do not reach, nor its own another page.
fn is_pinned_as_mapped(s: &Space, at: VirtAddr) {
    let pinned = pin(s, at, true).expect("writable");
    put(s, at, 99).expect("writable");
    assert_eq!(frame(s, at), Some(pinned.first()));
    assert_eq!(dma(s.platform(), pinned.first()).load(Acquire), 99);
}

/// A part of a folio that a fork left out is writable, and the folio is exclusive no more.
#[test]
fn r12_a_part_that_was_not_forked_is_unshared_before_it_is_pinned() -> Result {
    let machine = machine();
    let parent = huge(machine)?;
    let pinned = pin(&parent, page(AT, 5), true)?;
    // The pin keeps the folio whole when its mapping is split.
    parent.advise(page(AT, 5), PAGE_SIZE, Advice::DontFork)?;
    drop(pinned);
    let child = fork(&parent)?;
    assert!(attrs(&parent, page(AT, 5)).contains(Attrs::WRITE));
    let s = parent.clone();
    ends(move || is_pinned_as_mapped(&s, page(AT, 5)));
    assert_eq!((get(&parent, page(AT, 4))?, get(&child, page(AT, 4))?), (5, 5));
    end(machine, [child, parent])
}

/// So is what a fork did not come to that had no memory for all.
#[test]
fn r12_a_part_that_a_failed_fork_did_not_come_to_is_unshared_before_it_is_pinned() -> Result {
    let machine = machine();
    let parent = huge(machine)?;
    let pinned = pin(&parent, page(AT, 5), true)?;
    // Parts of one folio in two leaf tables.
    let to = VirtAddr((2 << 30) + LEAF / 2);
    parent.remap(AT, LEAF, LEAF, RemapTo::Fixed(to))?;
    drop(pinned);
    let writable = |i| attrs(&parent, page(to, i)).contains(Attrs::WRITE);
    let half_way = (0..100).find(|n| {
        let taken = machine.leave_free(*n);
        let failed = parent.fork().is_err();
        drop(taken);
        failed && !writable(0) && writable(SMALL - 1)
    });
    assert!(half_way.is_some());
    let s = parent.clone();
    ends(move || is_pinned_as_mapped(&s, page(to, SMALL - 1)));
    end(machine, [parent])
}

/// Zeros that nobody wrote are everybody's: who pins them takes nobody's pins.
#[test]
fn pins_of_zero_pages_are_not_counted() -> Result {
    let machine = machine();
    let policy = Policy { huge: HugePolicy::Always, ..policy() };
    for huge in [false, true] {
        let (s, other) = (space_with(machine, policy)?, space_with(machine, policy)?);
        for s in [&s, &other] {
            s.map(at(AT, anonymous(if huge { SMALL } else { 1 }, R)))?;
        }
        let pins: Vec<_> = (0..0x1_0000).map(|_| pin(&s, AT, false)).collect::<Result<_>>()?;
        assert_eq!((entry(&s, AT).1, pins[0].first()), (u8::from(huge), pin(&other, AT, false)?.first()));
        drop(pins);
        end(machine, [s, other])?;
    }
    Ok(())
}

/// Memory that the program may only read, and never wrote, is pinned as it is.
#[test]
fn what_was_never_written_is_pinned_as_it_is() -> Result {
    let machine = machine();
    let s = space(machine)?;
    let file = cache(machine, &marked(), 2)?;
    s.map(at(AT, private(&file, 0, 2, R)))?;
    let pinned = pin(&s, AT, false)?;
    assert_eq!(
        (pinned.first(), dma(machine, pinned.first()).load(Acquire) as u8),
        (cached_frame(machine, &file, 0)?, mark(0))
    );
    let denied = s.pin(pages(AT, 1), true);
    assert!(matches!(denied, Err(PinError::Fault(FaultError::Segv(Segv::Access)))), "{denied:?}");
    assert_eq!(denied.err().and_then(|error| error.errno()), Some(14));
    let nothing = s.pin(pages(page(AT, 50), 1), false);
    assert!(matches!(nothing, Err(PinError::Fault(FaultError::Segv(Segv::NotMapped)))), "{nothing:?}");
    assert!(s.pin(VirtRange::new(AT, AT), false).is_err());
    drop((pinned, nothing, file));
    end(machine, [s])
}

/// A shared page of a file is dirty when a device that wrote to it gives it up, and not for one that read.
#[test]
fn a_pin_makes_a_files_page_dirty_at_its_end() -> Result {
    let machine = machine();
    let s = space(machine)?;
    let file = cache(machine, &marked(), 2)?;
    s.map(at(AT, shared(&file, 0, 2, RW)))?;
    fault(&s, AT, Access::Read);
    let read = pin(&s, AT, false)?;
    let dirty = |pinned: &Pinned<Machine>| machine.meta(pinned.first()).flags().contains(FrameFlags::DIRTY);
    assert!(!dirty(&read));
    let pfn = read.first();
    drop(read);
    assert!(!machine.meta(pfn).flags().contains(FrameFlags::DIRTY));
    let written = pin(&s, page(AT, 1), true)?;
    let pfn = written.first();
    s.unmap(AT, 2 * PAGE_SIZE)?;
    file.write_back(machine)?;
    assert!(!dirty(&written));
    dma(machine, pfn).store(77, Release);
    drop(written);
    assert!(machine.meta(pfn).flags().contains(FrameFlags::DIRTY));
    drop(file);
    end(machine, [s])
}

/// Unmapped, the page is the device's until it gives it up.
#[test]
fn a_pin_outlives_its_mapping() -> Result {
    let machine = machine();
    let s = space(machine)?;
    s.map(at(AT, anonymous(1, RW)))?;
    let pinned = pin(&s, AT, true)?;
    s.unmap(AT, PAGE_SIZE)?;
    end(machine, [s]).expect_err("a frame is pinned still");
    dma(machine, pinned.first()).store(1, Release);
    drop(pinned);
    Ok(machine.nothing_left()?)
}

#[test]
fn too_many_pins_are_an_error() -> Result {
    let machine = machine();
    let s = space(machine)?;
    s.map(at(AT, anonymous(1, RW)))?;
    let pins: Vec<_> = (0..0xffff).map(|_| pin(&s, AT, true)).collect::<Result<_>>()?;
    let more = s.pin(pages(AT, 1), true);
    assert!(matches!(more, Err(PinError::TooMany)), "{more:?}");
    drop(more);
    drop(pins);
    pin(&s, AT, true)?;
    end(machine, [s])
}

fn huge(machine: &'static Machine) -> Result<Space> {
    let s = space_with(machine, Policy { huge: HugePolicy::Always, ..policy() })?;
    s.map(at(AT, anonymous(SMALL, RW)))?;
    for i in 0..SMALL {
        put(&s, page(AT, i), i + 1)?;
    }
    Ok(s)
}
/// Takes all memory that a huge page could be had of; what is left is enough for as many small ones.
fn scatter(machine: &'static Machine) -> Result<Vec<Frame<Machine>>> {
    let mut taken: Vec<_> = std::iter::from_fn(|| Frame::block(machine, 9).ok()).collect();
    let _odd: Vec<_> = std::iter::from_fn(|| Frame::block(machine, 8).ok()).collect();
    let mut halves = Vec::new();
    for _ in 0..2 {
        taken.pop();
        halves.push([Frame::block(machine, 8)?, Frame::block(machine, 8)?]);
    }
    taken.extend(halves.into_iter().map(|[half, _]| half));
    Ok(taken)
}

/// A huge page is pinned in one go, and copied for a child: whole, or, where there is no other, in small pages.
#[test]
fn r12_a_pinned_huge_page_is_copied_for_the_child() -> Result {
    for scarce in [false, true] {
        let machine = machine();
        let parent = huge(machine)?;
        let part = VirtRange::new(VirtAddr(page(AT, 5).0 + 8), page(AT, SMALL + 3));
        let pinned = parent.pin(part, true).map_err(|error| error.to_string())?;
        let head = frame(&parent, AT).ok_or("mapped")?;
        assert_eq!(
            (pinned.first(), pinned.len(), pinned.phys() % PAGE_SIZE),
            (head.add(5), (SMALL - 5) * PAGE_SIZE - 8, 8)
        );
        let hoarded = if scarce { scatter(machine)? } else { Vec::new() };
        let child = fork(&parent)?;
        assert_eq!((frame(&parent, AT), entry(&parent, AT).1), (Some(head), 1));
        assert_eq!(entry(&child, AT).1, u8::from(!scarce));
        assert_eq!(counts(machine, head), (2, 1), "the mapping, and the pin's reference");
        put(&parent, page(AT, 6), 600)?;
        assert_eq!(dma(machine, head.add(6)).load(Acquire), 600);
        for i in 0..SMALL {
            assert_eq!(get(&child, page(AT, i))?, i + 1);
        }
        drop((pinned, hoarded));
        end(machine, [parent, child])?;
    }
    Ok(())
}

/// Its entry may be split: the parts are the parent's, exclusive all of them, and pinned all of them.
#[test]
fn r12_parts_of_a_pinned_folio_are_copied_for_the_child() -> Result {
    let machine = machine();
    let parent = huge(machine)?;
    let pinned = pin(&parent, page(AT, 5), true)?;
    let head = frame(&parent, AT).ok_or("mapped")?;
    parent.protect(page(AT, 100), PAGE_SIZE, R)?;
    assert_eq!((entry(&parent, AT).1, frame(&parent, page(AT, 9))), (0, Some(head.add(9))));
    assert_eq!(counts(machine, head), (513, 512));
    put(&parent, page(AT, 7), 700)?;
    assert_eq!(frame(&parent, page(AT, 7)), Some(head.add(7)));
    let child = fork(&parent)?;
    assert_eq!(counts(machine, head), (513, 512), "none is shared");
    put(&parent, page(AT, 5), 500)?;
    assert_eq!(dma(machine, pinned.first()).load(Acquire), 500);
    assert_eq!(
        (get(&child, page(AT, 5))?, get(&child, page(AT, 7))?, get(&child, page(AT, 100))?),
        (6, 700, 101)
    );
    drop(pinned);
    let third = fork(&parent)?;
    assert_eq!(counts(machine, head), (1024, 1024), "all are shared");
    end(machine, [child, parent, third])
}
