//! Fork: what parent and child see, whose pages they are, and that nothing is left when both have ended (r12).

mod kit;

use kit::*;
use pagefirst::arch::{Aarch64, Attrs, Ept, Format, Sv39, X86_64, X86_64La57};
use pagefirst::frame::{Frame, FrameFlags};
use pagefirst::platform::Platform;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::{Advice, MapError, RemapTo, VmaFlags};
use pagefirst::table::FaultKind;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::{Machine, Vcpu};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

const AT: VirtAddr = VirtAddr(1 << 30);
const SMALL: u64 = LEAF / PAGE_SIZE;

/// A space with `pages` pages of private memory, page `i` of which holds `i + 1`.
fn filled<F: Format>(machine: &'static Machine<F>, pages: u64) -> Result<Space<F>> {
    let s = space(machine)?;
    s.map(at(AT, anonymous(pages, RW)))?;
    (0..pages).try_for_each(|i| put(&s, page(AT, i), i + 1))?;
    Ok(s)
}
/// Ends these spaces in this order, and sees that nothing is left.
fn end<F: Format>(machine: &'static Machine<F>, spaces: impl IntoIterator<Item = Space<F>>) -> Result {
    for s in spaces {
        check(&s);
        drop(Arc::into_inner(s).ok_or("somebody else has it")?);
    }
    Ok(machine.nothing_left()?)
}
fn is_exclusive<F: Format>(s: &Space<F>, va: VirtAddr) -> bool {
    frame(s, va).is_some_and(|pfn| s.platform().meta(pfn).flags().contains(FrameFlags::EXCLUSIVE))
}
fn tally<F: Format>(s: &Space<F>, kind: FaultKind) -> u64 {
    s.tables().of(kind)
}

fn each_sees_its_own_writes<F: Format>() -> Result {
    const PAGES: u64 = 700; // more than a leaf table of any format
    let machine = machine_of::<F>();
    let parent = filled(machine, PAGES)?;
    let child = fork(&parent)?;
    check(&child);
    assert_eq!(parent.account().anon_bytes, child.account().anon_bytes);
    for i in 0..PAGES {
        let va = page(AT, i);
        assert_eq!(frame(&parent, va), frame(&child, va), "shared");
        assert!(!attrs(&parent, va).contains(Attrs::WRITE) && !attrs(&child, va).contains(Attrs::WRITE));
        match i % 3 {
            0 => put(&parent, va, 1000 + i)?,
            1 => put(&child, va, 2000 + i)?,
            _ => {}
        }
    }
    for i in 0..PAGES {
        let (va, was) = (page(AT, i), i + 1);
        let expected = match i % 3 {
            0 => (1000 + i, was),
            1 => (was, 2000 + i),
            _ => (was, was),
        };
        assert_eq!((get(&parent, va)?, get(&child, va)?), expected, "page {i}");
    }
    end(machine, [parent, child])
}

#[test]
fn r12_each_sees_its_own_writes_x86_64() -> Result {
    each_sees_its_own_writes::<X86_64>()
}
#[test]
fn r12_each_sees_its_own_writes_x86_64_la57() -> Result {
    each_sees_its_own_writes::<X86_64La57>()
}
#[test]
fn r12_each_sees_its_own_writes_ept() -> Result {
    each_sees_its_own_writes::<Ept>()
}
#[test]
fn r12_each_sees_its_own_writes_sv39() -> Result {
    each_sees_its_own_writes::<Sv39>()
}
#[test]
fn r12_each_sees_its_own_writes_aarch64() -> Result {
    each_sees_its_own_writes::<Aarch64>()
}

/// The first to write copies, the last one reuses the page where it is, and writes on without a fault.
#[test]
fn r12_the_last_one_reuses_the_page() -> Result {
    let machine = machine();
    let parent = filled(machine, 1)?;
    let old = frame(&parent, AT);
    let child = fork(&parent)?;
    put(&child, AT, 7)?;
    assert_ne!(frame(&child, AT), old);
    assert!(is_exclusive(&child, AT) && !is_exclusive(&parent, AT));
    put(&parent, AT, 8)?;
    assert_eq!((frame(&parent, AT), is_exclusive(&parent, AT)), (old, true));
    assert_eq!((tally(&parent, FaultKind::Copy), tally(&parent, FaultKind::Reuse)), (0, 1));
    end(machine, [parent, child])
}

#[test]
fn nested_forks_end_in_every_order() -> Result {
    const PAGES: u64 = 30;
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let machine = machine();
        let first = filled(machine, PAGES)?;
        let second = fork(&first)?;
        put(&second, page(AT, 1), 21)?;
        let third = fork(&second)?;
        put(&third, page(AT, 2), 32)?;
        put(&first, page(AT, 3), 13)?;
        let seen = |s: &Space| -> Result<Vec<u64>> { (0..4).map(|i| get(s, page(AT, i))).collect() };
        let want = [vec![1, 2, 3, 13], vec![1, 21, 3, 4], vec![1, 21, 32, 4]];
        let mut spaces = [Some(first), Some(second), Some(third)];
        for n in order {
            for (s, want) in spaces.iter().zip(&want) {
                if let Some(s) = s {
                    assert_eq!(&seen(s)?, want, "{order:?}");
                    check(s);
                }
            }
            spaces[n] = None;
        }
        machine.nothing_left()?;
    }
    Ok(())
}

/// What of a file was not written to is not copied; a private copy is; what is shared stays shared.
#[test]
fn pages_of_files() -> Result {
    let machine = machine();
    let parent = space(machine)?;
    let file = cache(machine, &marked(), 8)?;
    let (there, other) = (page(AT, 100), page(AT, 200));
    parent.map(at(there, private(&file, 0, 8, RW)))?;
    parent.map(at(other, shared(&file, 0, 8, RW)))?;
    for i in 0..8 {
        get(&parent, page(there, i))?;
        get(&parent, page(other, i))?;
    }
    put(&parent, page(there, 2), 77)?;
    let child = fork(&parent)?;
    assert_eq!(mapped(&child, there, 8), [2], "clean pages are left to faults");
    assert_eq!(mapped(&child, other, 8), []);
    put(&child, page(there, 2), 78)?;
    put(&child, page(other, 5), 55)?;
    assert_eq!((get(&parent, page(there, 2))?, get(&parent, page(other, 5))?), (77, 55));
    assert_eq!(get(&child, page(there, 5))?, 55, "no copy of its own");
    drop(file);
    end(machine, [child, parent])
}

#[test]
fn no_table_without_an_entry() -> Result {
    let machine = machine();
    let parent = space(machine)?;
    parent.map(at(AT, anonymous(3 * SMALL, RW)))?;
    get(&parent, page(AT, 5))?; // the zero page
    let child = fork(&parent)?;
    assert_eq!((tables(&parent), tables(&child), check(&child).present), (4, 1, 0));
    put(&parent, page(AT, SMALL), 1)?;
    let other = fork(&parent)?;
    assert_eq!((tables(&parent), tables(&other), check(&other).present), (5, 4, 1));
    end(machine, [parent, child, other])
}

#[test]
fn advice_for_forks() -> Result {
    let machine = machine();
    let parent = filled(machine, 9)?;
    let file = cache(machine, &marked(), 1)?;
    parent.map(at(page(AT, 20), private(&file, 0, 1, RW)))?;
    parent.map(at(page(AT, 21), shared(&file, 0, 1, RW)))?;
    parent.advise(AT, 3 * PAGE_SIZE, Advice::DontFork)?;
    parent.advise(page(AT, 3), 3 * PAGE_SIZE, Advice::WipeOnFork)?;
    for i in [20, 21] {
        let wiped = parent.advise(page(AT, i), PAGE_SIZE, Advice::WipeOnFork);
        assert!(matches!(wiped, Err(MapError::Invalid(_))), "{wiped:?}");
    }
    let child = fork(&parent)?;
    assert!(get(&child, AT).is_err() && get(&child, page(AT, 2)).is_err(), "not there");
    assert_eq!((get(&child, page(AT, 3))?, get(&child, page(AT, 5))?, get(&child, page(AT, 6))?), (0, 0, 7));
    assert!(is_exclusive(&parent, AT) && is_exclusive(&parent, page(AT, 4)), "no business of the child's");
    let pages = |s: &Space| vmas(s).iter().map(|(start, end, _)| end - start).sum::<u64>();
    assert_eq!(pages(&child) + 3, pages(&parent));
    // The child passes it on, and takes it back.
    put(&child, page(AT, 3), 33)?;
    let wiped = fork(&child)?;
    child.advise(page(AT, 3), 3 * PAGE_SIZE, Advice::KeepOnFork)?;
    let kept = fork(&child)?;
    assert_eq!((get(&wiped, page(AT, 3))?, get(&kept, page(AT, 3))?), (0, 33));
    parent.advise(AT, 3 * PAGE_SIZE, Advice::DoFork)?;
    let whole = fork(&parent)?;
    assert_eq!(get(&whole, page(AT, 2))?, 3);
    // The two have nothing to do with each other.
    for advice in [Advice::DontFork, Advice::WipeOnFork, Advice::DoFork] {
        parent.advise(AT, PAGE_SIZE, advice)?;
        let back = [Advice::DontFork, Advice::DoFork];
        back.into_iter().try_for_each(|advice| parent.advise(page(AT, 3), PAGE_SIZE, advice))?;
    }
    let both = fork(&parent)?;
    assert_eq!((get(&both, AT)?, get(&both, page(AT, 3))?, get(&both, page(AT, 2))?), (0, 0, 3));
    drop(file);
    end(machine, [whole, child, wiped, parent, kept, both])
}

#[test]
fn mapping_calls_after_a_fork() -> Result {
    let machine = machine();
    let parent = filled(machine, 12)?;
    let child = fork(&parent)?;
    // Rights that are given back do not make a shared page writable.
    child.protect(AT, 4 * PAGE_SIZE, R)?;
    child.protect(AT, 4 * PAGE_SIZE, RW)?;
    assert!(!attrs(&child, AT).contains(Attrs::WRITE));
    put(&child, AT, 50)?;
    let to = VirtAddr(AT.0 + LEAF);
    assert_eq!(child.remap(page(AT, 4), 4 * PAGE_SIZE, 4 * PAGE_SIZE, RemapTo::Fixed(to))?, to);
    put(&child, to, 60)?;
    child.discard(page(AT, 8), 4 * PAGE_SIZE)?;
    parent.remap(page(AT, 8), 4 * PAGE_SIZE, 4 * PAGE_SIZE, RemapTo::Fixed(to))?;
    assert_eq!((get(&parent, AT)?, get(&parent, page(AT, 4))?, get(&parent, to)?), (1, 5, 9));
    assert_eq!((get(&child, AT)?, get(&child, to)?, get(&child, page(to, 1))?), (50, 60, 6));
    assert_eq!(get(&child, page(AT, 9))?, 0);
    let pfn = frame(&parent, to);
    put(&parent, to, 90)?;
    assert_eq!(frame(&parent, to), pfn, "discarded by the child: nobody else has it");
    end(machine, [parent, child])
}

/// A heap, limits, a stack that grows: the child goes on where its parent was.
#[test]
fn the_child_goes_on_from_where_its_parent_was() -> Result {
    let machine = machine();
    let limit = policy().max_bytes.min(40 * PAGE_SIZE);
    let parent = space_with(machine, Policy { max_bytes: limit, ..policy() })?;
    let stack = pagefirst::space::Map { flags: VmaFlags::GROWS_DOWN, ..anonymous(2, RW) };
    parent.map(at(page(AT, 1000), stack))?;
    put(&parent, page(AT, 1000), 1)?;
    let child = fork(&parent)?;
    put(&child, page(AT, 998), 2)?;
    assert_eq!((vmas(&child)[0].0, vmas(&parent)[0].0), (AT.0 / PAGE_SIZE + 998, AT.0 / PAGE_SIZE + 1000));
    let much = child.map(anonymous(37, RW));
    assert!(matches!(much, Err(MapError::TooLarge(_))), "{much:?}");
    child.map(anonymous(36, RW))?;
    end(machine, [child, parent])
}

fn wanting(machine: &'static Machine) -> Result<Space> {
    space_with(machine, Policy { huge: HugePolicy::Always, ..policy() })
}
fn is_huge(s: &Space, va: VirtAddr) -> bool {
    entry(s, va).1 == 1 && frame(s, va).is_some()
}
fn hoard(machine: &'static Machine) -> Vec<Frame<Machine>> {
    std::iter::from_fn(|| Frame::block(machine, 9).ok()).collect()
}

#[test]
fn a_huge_page_is_shared_and_copied_whole() -> Result {
    let machine = machine();
    let parent = wanting(machine)?;
    parent.map(at(AT, anonymous(SMALL, RW)))?;
    put(&parent, page(AT, 3), 3)?;
    assert!(is_huge(&parent, AT));
    let child = fork(&parent)?;
    assert!(is_huge(&child, AT));
    assert_eq!((frame(&child, AT), tables(&child)), (frame(&parent, AT), 3));
    put(&child, page(AT, 4), 4)?;
    assert!(is_huge(&child, AT) && frame(&child, AT) != frame(&parent, AT));
    let old = frame(&parent, AT);
    put(&parent, page(AT, 5), 5)?;
    assert_eq!(frame(&parent, AT), old, "reused where it is");
    let seen = |s: &Space| -> Result<Vec<u64>> { (3..6).map(|i| get(s, page(AT, i))).collect() };
    assert_eq!((seen(&parent)?, seen(&child)?), (vec![3, 0, 5], vec![3, 4, 0]));
    end(machine, [parent, child])
}

/// No huge page for a copy: the entry is split, and the small page copied; the rest stays shared, part by part.
#[test]
fn a_huge_page_is_shared_in_parts_where_there_is_no_other() -> Result {
    let machine = machine();
    let parent = wanting(machine)?;
    parent.map(at(AT, anonymous(SMALL, RW)))?;
    for i in 0..SMALL {
        put(&parent, page(AT, i), i + 1)?;
    }
    let head = frame(&parent, AT).ok_or("mapped")?;
    let child = fork(&parent)?;
    let hoarded = hoard(machine);
    put(&child, page(AT, 7), 700)?;
    assert!(!is_huge(&child, AT) && is_huge(&parent, AT));
    assert_eq!(frame(&child, page(AT, 8)), Some(head.add(8)));
    assert_eq!(counts(machine, head), (512, 512), "511 parts, and all of it");
    check(&child);
    // Grandchildren share parts with parts.
    let third = fork(&child)?;
    assert_eq!(counts(machine, head), (1023, 1023));
    put(&third, page(AT, 9), 900)?;
    put(&parent, page(AT, 9), 901)?;
    assert!(!is_huge(&parent, AT), "others have it, in parts");
    assert_eq!((get(&child, page(AT, 9))?, get(&third, page(AT, 9))?), (10, 900));
    assert_eq!((get(&parent, page(AT, 9))?, get(&parent, page(AT, 10))?), (901, 11));
    // Cut, moved, discarded, part by part.
    child.unmap(AT, 20 * PAGE_SIZE)?;
    let to = VirtAddr(AT.0 + 4 * LEAF);
    child.remap(page(AT, 20), 40 * PAGE_SIZE, 40 * PAGE_SIZE, RemapTo::Fixed(to))?;
    third.discard(page(AT, 100), 200 * PAGE_SIZE)?;
    assert_eq!((get(&child, to)?, get(&third, page(AT, 99))?, get(&third, page(AT, 100))?), (21, 100, 0));
    let fourth = fork(&child)?;
    put(&child, to, 1)?;
    assert_eq!(get(&fourth, to)?, 21);
    drop(hoarded);
    end(machine, [parent, third, child, fourth])
}

/// The last one that has a part of a folio reuses it.
#[test]
fn the_last_part_is_reused() -> Result {
    let machine = machine();
    let parent = wanting(machine)?;
    parent.map(at(AT, anonymous(SMALL, RW)))?;
    put(&parent, page(AT, 3), 3)?;
    let child = fork(&parent)?;
    let hoarded = hoard(machine);
    put(&child, AT, 1)?;
    drop(parent);
    child.unmap(AT, 3 * PAGE_SIZE)?;
    child.unmap(page(AT, 4), (SMALL - 4) * PAGE_SIZE)?;
    let part = frame(&child, page(AT, 3));
    put(&child, page(AT, 3), 33)?;
    assert_eq!(frame(&child, page(AT, 3)), part);
    drop(hoarded);
    end(machine, [child])
}

/// Parent and child run while the parent forks again and again: each one's counters are its own, and no write of the
/// parent's threads through a translation from before reaches a page that a child has seen.
#[test]
fn r12_stale_writable_translations() -> Result {
    const PAGES: u64 = 24;
    let machine = machine();
    let parent = space(machine)?;
    parent.map(at(AT, anonymous(PAGES, RW)))?;
    (0..PAGES).try_for_each(|i| put(&parent, page(AT, i), 0))?;
    let (turn, stop) = (AtomicU64::new(0), std::sync::atomic::AtomicBool::new(false));
    let writer = |n: u64| {
        let mut cpu: Vcpu = machine.vcpu();
        cpu.switch_to(&parent);
        let mut value = 0;
        while !stop.load(Acquire) {
            value += 1;
            // Each thread has every second page, and writes the number of its round to one after the other.
            for i in (0..PAGES).filter(|i| i % 2 == n) {
                cpu.store_u64(page(AT, i), value).expect("mapped");
            }
            turn.fetch_add(1, AcqRel);
        }
    };
    let mut failed = Ok(());
    together(2, writer, || {
        let stopping = StopAtEnd(&stop);
        let round = || -> Result {
            let before = turn.load(Acquire);
            let child = fork(&parent)?;
            let seen: Vec<u64> = (0..PAGES).map(|i| get(&child, page(AT, i))).collect::<Result<_>>()?;
            while turn.load(Acquire) < before + 4 {
                machine.relax();
            }
            for (i, then) in seen.iter().enumerate() {
                let now = get(&child, page(AT, i as u64))?;
                assert_eq!(now, *then, "page {i} of a child changed");
            }
            // A page that comes later is never ahead, nor more than a round behind: all that is of one moment.
            for n in 0..2 {
                let mine: Vec<u64> = seen.iter().skip(n).step_by(2).copied().collect();
                let first = mine[0];
                assert!(mine.is_sorted_by(|a, b| a >= b) && mine.iter().all(|v| first - v <= 1), "{mine:?}");
            }
            put(&child, AT, 5)?;
            assert_eq!(get(&child, AT)?, 5);
            Ok(())
        };
        for _ in 0..150 {
            failed = round();
            if failed.is_err() {
                break;
            }
        }
        drop(stopping);
    });
    failed?;
    turn.store(0, Release);
    end(machine, [parent])
}

/// Memory runs out at every step of a fork: there is no child, and the parent goes on as before.
#[test]
fn r06_a_fork_that_fails_leaves_nothing() -> Result {
    let machine = small_machine(2100);
    let parent = filled(machine, 3 * SMALL / 2)?;
    parent.map(at(page(AT, 4 * SMALL), anonymous(SMALL, RW)))?;
    put(&parent, page(AT, 4 * SMALL), 5)?;
    let mut failures = 0;
    let child = loop {
        let taken = machine.leave_free(failures);
        match parent.fork() {
            Ok(child) => break Arc::new(child),
            Err(error) => assert_eq!(error, MapError::NoMemory),
        }
        drop(taken);
        failures += 1;
        check(&parent);
        assert_eq!(get(&parent, page(AT, 4 * SMALL))?, 5);
    };
    assert!(failures > 5, "{failures} frames were enough");
    for i in 0..3 * SMALL / 2 {
        assert_eq!(get(&child, page(AT, i))?, i + 1);
    }
    end(machine, [child, parent])
}

#[test]
fn a_huge_page_needs_memory_for_its_split() -> Result {
    let machine = small_machine(1200);
    let parent = wanting(machine)?;
    parent.map(at(AT, anonymous(SMALL, RW)))?;
    put(&parent, AT, 1)?;
    let child = fork(&parent)?;
    let taken = machine.leave_free(0);
    assert!(matches!(fault(&child, AT, Access::Write), End::Error(_)));
    drop(taken);
    put(&child, AT, 2)?;
    assert_eq!((get(&parent, AT)?, get(&child, AT)?), (1, 2));
    end(machine, [child, parent])
}
