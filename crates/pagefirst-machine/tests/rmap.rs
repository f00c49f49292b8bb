//! The reverse map of private memory: every place of a page is found, through forks, moves and exits. A page that is poisoned
//! is taken out of all of them.

mod kit;

use kit::*;
use pagefirst::Poisoned;
use pagefirst::arch::X86_64;
use pagefirst::fault::{Bus, FaultError};
use pagefirst::frame::FrameFlags;
use pagefirst::platform::Platform;
use pagefirst::space::RemapTo;
use pagefirst::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr};
use pagefirst_machine::Machine;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU64};

const AT: VirtAddr = VirtAddr(1 << 30);
const FAR: VirtAddr = VirtAddr(5 << 30);
const LOST: End = End::Error(FaultError::Bus(Bus::Poison));
const SMALL: Poisoned = Poisoned::Private { huge: false };

fn poison(machine: &'static Machine, pfn: Pfn) -> Poisoned {
    machine.vm().poison(machine, pfn)
}
/// The frames of private memory that a space maps in these pages.
fn private_frames(s: &Space<X86_64>, at: VirtAddr, pages: u64) -> Vec<Pfn> {
    let frames = (0..pages).filter_map(|i| frame(s, page(at, i)));
    frames.filter(|pfn| s.platform().meta(*pfn).flags().contains(FrameFlags::ANON)).collect()
}
/// Everything has ended, and `bad` frames are bad.
fn nothing_left(machine: &'static Machine, bad: u64) -> Result {
    machine.nothing_left()?;
    assert_eq!(machine.vm().frames.bad_frames(), bad);
    Ok(())
}

#[test]
fn a_page_is_found_in_the_spaces_that_descend_from_who_filled_it() -> Result {
    let machine = machine();
    let parent = space(machine)?;
    parent.map(at(AT, anonymous(3, RW)))?;
    (0..2).try_for_each(|i| put(&parent, page(AT, i), 1 + i))?;
    let child = fork(&parent)?;
    put(&child, page(AT, 2), 3)?;
    let grandchild = fork(&child)?;
    let sister = fork(&parent)?;
    put(&sister, page(AT, 0), 9)?;
    // The child's own, in two spaces; the parent's, in four; one that was copied, in three.
    let all = [&parent, &child, &grandchild, &sister];
    for (i, places) in [(2, 2), (1, 4), (0, 3)] {
        let pfn = frame(&grandchild, page(AT, i)).ok_or("mapped")?;
        assert_eq!(counts(machine, pfn).1, places);
        assert_eq!(poison(machine, pfn), SMALL);
        assert_eq!(counts(machine, pfn), (0, 0));
        let lost = all.iter().filter(|s| fault(s, page(AT, i), Access::Read) == LOST).count();
        assert_eq!(lost as u32, places);
    }
    assert_eq!(first_byte(&sister, AT), Some(9));
    all.into_iter().for_each(|s| drop(check(s)));
    drop((parent, child, grandchild, sister));
    nothing_left(machine, 3)
}

#[test]
fn a_page_is_found_when_who_filled_it_has_exited() -> Result {
    let machine = machine();
    let parent = space(machine)?;
    parent.map(at(AT, anonymous(2, RW)))?;
    put(&parent, AT, 1)?;
    let child = fork(&parent)?;
    put(&child, page(AT, 1), 2)?;
    drop(parent);
    // It takes the root of its grandparent for its own.
    let grandchild = fork(&child)?;
    drop(child);
    machine.vm().quiesce(machine);
    put(&grandchild, AT, 3)?;
    let last = fork(&grandchild)?;
    for i in 0..2 {
        let pfn = frame(&last, page(AT, i)).ok_or("mapped")?;
        assert_eq!((counts(machine, pfn).1, poison(machine, pfn)), (2, SMALL));
        for s in [&grandchild, &last] {
            assert_eq!(fault(s, page(AT, i), Access::Write), LOST);
        }
    }
    drop((grandchild, last));
    nothing_left(machine, 2)
}

/// Moved, split, moved again, forked in between, grown, moved back: anonymous memory and private copies of a file.
#[test]
fn a_page_is_found_where_it_was_moved() -> Result {
    for of_file in [false, true] {
        let machine = machine();
        let s = space(machine)?;
        let file = cache(machine, &marked(), 64)?;
        let map = if of_file { private(&file, 3, 8, RW) } else { anonymous(8, RW) };
        s.map(at(AT, map))?;
        (0..8).try_for_each(|i| put(&s, page(AT, i), i))?;
        s.remap(AT, 8 * PAGE_SIZE, 8 * PAGE_SIZE, RemapTo::Fixed(FAR))?;
        // What comes in its place has pages at the same indexes.
        s.map(at(AT, anonymous(8, RW)))?;
        (0..8).try_for_each(|i| put(&s, page(AT, i), 100 + i))?;
        let child = fork(&s)?;
        s.protect(page(FAR, 3), PAGE_SIZE, Prot::READ)?;
        s.remap(page(FAR, 4), 4 * PAGE_SIZE, 6 * PAGE_SIZE, RemapTo::Fixed(page(FAR, 100)))?;
        put(&s, page(FAR, 105), 77)?;
        child.remap(FAR, 4 * PAGE_SIZE, 4 * PAGE_SIZE, RemapTo::Fixed(page(FAR, 200)))?;
        child.remap(page(FAR, 200), 4 * PAGE_SIZE, 4 * PAGE_SIZE, RemapTo::Fixed(AT))?;
        let grandchild = fork(&child)?;
        let all = [&s, &child, &grandchild];
        let frames: BTreeSet<_> = all
            .iter()
            .flat_map(|s| [private_frames(s, AT, 8), private_frames(s, FAR, 300)].concat())
            .collect();
        assert_eq!(frames.len(), 8 + 8 + 1);
        for pfn in &frames {
            assert_eq!((poison(machine, *pfn), counts(machine, *pfn)), (SMALL, (0, 0)));
        }
        for s in all {
            assert_eq!((check(s).counted, s.account().anon_bytes), (0, 0));
        }
        drop((s, child, grandchild, file));
        nothing_left(machine, frames.len() as u64)?;
    }
    Ok(())
}

/// A mapping may have been moved so far that its pages have indexes that are no addresses.
#[test]
fn indexes_beyond_all_addresses() -> Result {
    let machine = machine();
    let s = space(machine)?;
    let top = VirtAddr(s.usable().end.0 - 4 * PAGE_SIZE);
    s.map(at(top, anonymous(2, RW)))?;
    put(&s, top, 1)?;
    s.remap(top, 2 * PAGE_SIZE, 16 * PAGE_SIZE, RemapTo::Fixed(AT))?;
    put(&s, page(AT, 15), 2)?;
    for i in [15, 0] {
        let pfn = frame(&s, page(AT, i)).ok_or("mapped")?;
        assert_eq!((poison(machine, pfn), counts(machine, pfn)), (SMALL, (0, 0)));
    }
    drop(s);
    nothing_left(machine, 2)
}

/// However many generations there were, the living ones need no more objects than one would.
#[test]
fn a_chain_of_forks_does_not_grow() -> Result {
    for overlapping in [0, 1, 3] {
        let machine = machine();
        let mut living = std::collections::VecDeque::from([space(machine)?]);
        living[0].map(at(AT, anonymous(2, RW)))?;
        let mut objects = Vec::new();
        for generation in 0..60 {
            let last = living.back().ok_or("one")?;
            put(last, page(AT, generation % 2), generation)?;
            let next = fork(last)?;
            living.push_back(next);
            if living.len() > overlapping + 1 {
                living.pop_front();
            }
            machine.vm().quiesce(machine);
            objects.push(machine.vm().held(machine).objects);
        }
        assert!(objects[59] <= objects[20], "{objects:?}");
        drop(living);
        nothing_left(machine, 0)?;
    }
    Ok(())
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

/// A random thing that is done to one of the spaces.
fn step(random: &mut Random, spaces: &mut Vec<Space<X86_64>>) -> Result {
    const PAGES: u64 = 40;
    let which = random.below(spaces.len() as u64) as usize;
    let (first, n, to) = (random.below(PAGES), 1 + random.below(6), random.below(PAGES));
    let (from, len) = (page(AT, first), n.min(PAGES - first) * PAGE_SIZE);
    let s = &spaces[which];
    match random.below(10) {
        0 if spaces.len() < 7 => {
            let child = fork(s)?;
            spaces.push(child);
        }
        1 if spaces.len() > 1 => drop(spaces.swap_remove(which)),
        2 => drop(s.map(at(from, anonymous(len / PAGE_SIZE, RW)))?),
        3 => drop(s.unmap(from, len)?),
        4 => drop(s.protect(from, len, if n > 3 { RW } else { Prot::READ })),
        // Refused where it overlaps, or more than one mapping is there.
        5 | 6 => drop(s.remap(from, len, n * PAGE_SIZE, RemapTo::Fixed(page(AT, to)))),
        _ => drop(s.copy_out(from, &[n as u8])),
    }
    Ok(())
}

#[test]
fn every_page_is_found_whatever_was_done() -> Result {
    for seed in 0..40 {
        let mut random = Random(seed);
        let machine = machine();
        let mut spaces = vec![space(machine)?];
        for _ in 0..400 {
            step(&mut random, &mut spaces)?;
        }
        let frames: BTreeSet<_> = spaces.iter().flat_map(|s| private_frames(s, AT, 50)).collect();
        for pfn in &frames {
            assert_eq!((poison(machine, *pfn), counts(machine, *pfn)), (SMALL, (0, 0)), "seed {seed}");
        }
        for s in &spaces {
            assert_eq!((check(s).counted, s.account().anon_bytes), (0, 0), "seed {seed}");
        }
        spaces.clear();
        nothing_left(machine, frames.len() as u64)?;
    }
    Ok(())
}

// Forks, moves and exits go on while pages are poisoned. What is bad is mapped nowhere, and never again.
// catches: lose_looks_once
#[test]
fn a_page_on_its_way_is_found() -> Result {
    for _ in 0..20 {
        let machine = machine();
        let s = space(machine)?;
        s.map(at(AT, anonymous(64, RW)))?;
        (0..64).try_for_each(|i| put(&s, page(AT, i), 1))?;
        let frames = private_frames(&s, AT, 64);
        let is_done = AtomicBool::new(false);
        let calls = [const { AtomicU64::new(0) }; 2];
        let user = |user: u64| {
            let _stop = StopAtEnd(&is_done);
            while !is_done.load(Acquire) {
                let done = match user {
                    0 => s.fork().and_then(|child| child.fork().map(drop)),
                    _ => s.remap(AT, 64 * PAGE_SIZE, 64 * PAGE_SIZE, RemapTo::Fixed(FAR)).and_then(|_| {
                        s.remap(FAR, 64 * PAGE_SIZE, 64 * PAGE_SIZE, RemapTo::Fixed(AT)).map(drop)
                    }),
                };
                assert_eq!(done, Ok(()));
                calls[user as usize].fetch_add(1, Relaxed);
            }
        };
        together(2, user, || {
            let _stop = StopAtEnd(&is_done);
            // They are at work.
            wait_until(|| calls.iter().all(|n| n.load(Relaxed) > 0) || is_done.load(Acquire));
            for pfn in &frames {
                assert_eq!((poison(machine, *pfn), counts(machine, *pfn).1), (SMALL, 0));
            }
        });
        assert!(frames.iter().all(|pfn| counts(machine, *pfn) == (0, 0)));
        assert_eq!(s.account().anon_bytes, 0);
        drop(s);
        nothing_left(machine, 64)?;
    }
    Ok(())
}
