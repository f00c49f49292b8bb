//! Memory that runs out at every point of every call (r06): each fault and each mapping call either works or says
//! NoMemory with everything as it was, and works when memory is back; nothing leaks.

mod kit;

use kit::*;
use pagefirst::arch::Attrs;
use pagefirst::arch::{Format, X86_64};
use pagefirst::fault::FaultError;
use pagefirst::space::{AddressSpace, MapError, RemapTo, VmaFlags};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr, VirtRange};
use pagefirst_machine::Machine;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Private memory: pages 0 to 3 written, 5 read, the others untouched.
const ANON: VirtAddr = VirtAddr(1 << 30);
/// A private mapping of a file: page 0 read, 1 written.
const FILE: VirtAddr = VirtAddr(2 << 30);
/// A shared mapping of the same file: page 2 read.
const SHARED: VirtAddr = VirtAddr(3 << 30);
const HEAP: VirtAddr = VirtAddr(4 << 30);
/// The end of a stack of two pages, the upper one written.
const STACK: VirtAddr = VirtAddr(5 << 30);
/// Nothing is touched here: every table below the root is missing.
const EMPTY: VirtAddr = VirtAddr(1 << 40);
const EMPTY_FILE: VirtAddr = VirtAddr(2 << 40);
const EMPTY_SHARED: VirtAddr = VirtAddr(3 << 40);
const NOWHERE: VirtAddr = VirtAddr(4 << 40);

struct Stage {
    machine: &'static Machine,
    space: Space,
    cache: Cache,
}

impl Stage {
    fn new() -> Result<Stage> {
        let machine = small_machine(400);
        let policy = policy().with_fault_around(PAGE_SIZE).ok_or("a window")?;
        let (space, cache) =
            (space_with(machine, policy)?, cache(machine, &marked().with_tracking(true), 8)?);
        warm(machine, &cache, 0..4)?;
        for (place, map) in [
            (ANON, anonymous(8, RW)),
            (FILE, private(&cache, 0, 8, RW)),
            (SHARED, shared(&cache, 0, 8, RW)),
            (EMPTY, anonymous(1024, RW)),
            (EMPTY_FILE, private(&cache, 0, 8, RW)),
            (EMPTY_SHARED, shared(&cache, 0, 8, RW)),
        ] {
            space.map(at(place, map))?;
        }
        let stack = pagefirst::space::Map { flags: VmaFlags::GROWS_DOWN, ..anonymous(2, RW) };
        space.map(at(VirtAddr(STACK.0 - 2 * PAGE_SIZE), stack))?;
        space.set_heap(HEAP)?;
        space.brk(page(HEAP, 2))?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&space);
        for i in 0..4 {
            cpu.store_u8(page(ANON, i), 100 + i as u8)?;
        }
        cpu.load_u8(page(ANON, 5))?;
        cpu.load_u8(FILE)?;
        cpu.store_u8(page(FILE, 1), 111)?;
        cpu.load_u8(page(SHARED, 2))?;
        cpu.store_u8(HEAP, 120)?;
        cpu.store_u8(VirtAddr(STACK.0 - 1), 130)?;
        drop(cpu);
        Ok(Stage { machine, space, cache })
    }

    /// Everything that a call that fails must leave alone: mappings, entries and the frames they name, what is in
    /// these, tables, resident set, heap. (A stack that grew for a fault stays grown, as on Linux.)
    fn state(&self) -> impl PartialEq + std::fmt::Debug + use<> {
        let s = &self.space;
        let mut entries = Vec::new();
        let mut mappings = Vec::new();
        s.for_each_vma(|v| {
            let grows = v.flags.contains(VmaFlags::GROWS_DOWN);
            let start = if grows { VirtAddr(STACK.0 - PAGE_SIZE) } else { v.range.start };
            mappings.push((VirtRange::new(start, v.range.end), v.prot, v.flags, v.index_of(start)));
        });
        for (range, ..) in &mappings {
            for i in 0..range.pages() {
                let va = page(range.start, i);
                let (raw, level) = entry(s, va);
                if X86_64::frame(raw, level).is_some() {
                    entries.push((va, raw, first_byte(s, va)));
                }
            }
        }
        let account = s.account();
        (mappings, entries, account.table_bytes, account.resident_bytes(), s.heap_end(), check(s).tables)
    }

    fn fault(&self, va: VirtAddr, access: Access) -> Came {
        match fault(&self.space, va, access) {
            End::Mapped(..) | End::Spurious => Came::Done,
            End::Error(FaultError::NoMemory) => Came::NoMemory,
            end => panic!("{access:?} at {va}: {end:?}"),
        }
    }

    fn byte(&self, va: VirtAddr) -> Option<u8> {
        first_byte(&self.space, va)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Came {
    Done,
    NoMemory,
}

fn came<T>(result: std::result::Result<T, MapError>) -> Came {
    match result {
        Ok(_) => Came::Done,
        Err(MapError::NoMemory) => Came::NoMemory,
        Err(error) => panic!("{error}"),
    }
}

/// Uses every free frame, and then every free slot of the slabs of VMAs and nodes.
fn use_up(machine: &'static Machine, all: &mut Vec<pagefirst::frame::Frame<Machine>>) -> Result<Space> {
    let ballast: Space = Arc::new(AddressSpace::new(machine, policy())?);
    *all = machine.leave_free(0);
    for i in 0.. {
        if ballast.map(at(page(ANON, 2 * i), anonymous(1, RW))).is_err() {
            break;
        }
    }
    // What the failed call drained.
    all.extend(machine.leave_free(0));
    Ok(ballast)
}

/// Runs `call` with 0, 1, 2, … frames left, with free slots in the slabs and without, until memory suffices.
fn fails_at_each_point(name: &str, call: impl Fn(&Stage) -> Came, done: impl Fn(&Stage) -> bool) -> Result {
    let mut outcomes = BTreeSet::new();
    for slots in [true, false] {
        for left in 0.. {
            let stage = Stage::new()?;
            let (machine, space) = (stage.machine, &stage.space);
            space.quiesce();
            let before = stage.state();
            let mut taken = Vec::new();
            let ballast = match slots {
                true => None,
                false => Some(use_up(machine, &mut taken)?),
            };
            match ballast {
                Some(_) => taken.truncate(taken.len() - left),
                None => taken = machine.leave_free(left as u64),
            }
            let first = call(&stage);
            outcomes.insert((slots, first == Came::Done));
            if first == Came::NoMemory {
                let name = format!("{name}, {left} frames left, slots: {slots}");
                assert_eq!(stage.state(), before, "{name}");
                // Failing again takes nothing more: nothing leaks.
                space.quiesce();
                let held = machine.vm().held(machine);
                assert_eq!(call(&stage), Came::NoMemory, "{name}");
                space.quiesce();
                let again = machine.vm().held(machine);
                assert_eq!((again.objects, again.tables), (held.objects, held.tables), "{name}");
                assert_eq!(stage.state(), before, "{name}");
                drop((taken, ballast));
                assert_eq!(call(&stage), Came::Done, "{name}: with memory");
            } else {
                drop((taken, ballast));
            }
            check(space);
            assert!(done(&stage), "{name}: not done, {left} frames left");
            drop(stage);
            machine.nothing_left().map_err(|e| format!("{name}, {left} frames left: {e}"))?;
            if first == Came::Done {
                break;
            }
            assert!(left < 64, "{name} never works");
        }
    }
    assert!(outcomes.contains(&(true, true)) && outcomes.contains(&(false, true)));
    Ok(())
}

#[test]
fn r06_anonymous_faults() -> Result {
    let cases = [
        ("read", EMPTY, Access::Read, 0),
        ("write", EMPTY, Access::Write, 0),
        ("write in a table that is there", page(ANON, 6), Access::Write, 0),
        ("write over the zero page", page(ANON, 5), Access::Write, 0),
    ];
    for (name, va, access, shows) in cases {
        let writable = access == Access::Write;
        fails_at_each_point(
            name,
            |s| s.fault(va, access),
            |s| s.byte(va) == Some(shows) && attrs(&s.space, va).contains(Attrs::WRITE) == writable,
        )?;
    }
    Ok(())
}

#[test]
fn r06_file_faults() -> Result {
    let cases = [
        ("cached read", page(EMPTY_FILE, 3), Access::Read),
        ("read", page(EMPTY_FILE, 6), Access::Read),
        ("private write, cached", page(EMPTY_FILE, 3), Access::Write),
        ("private write", page(EMPTY_FILE, 6), Access::Write),
        ("private write over the file's page", FILE, Access::Write),
        ("shared read", page(EMPTY_SHARED, 3), Access::Read),
        ("shared write, cached", page(EMPTY_SHARED, 3), Access::Write),
        ("shared write", page(EMPTY_SHARED, 6), Access::Write),
        ("shared write to a page mapped for reading", page(SHARED, 2), Access::Write),
    ];
    for (name, va, access) in cases {
        let shows = mark((va.0 & 0xffff) / PAGE_SIZE);
        let writable = access == Access::Write;
        fails_at_each_point(
            name,
            |s| s.fault(va, access),
            |s| s.byte(va) == Some(shows) && attrs(&s.space, va).contains(Attrs::WRITE) == writable,
        )?;
    }
    Ok(())
}

#[test]
fn r06_a_stack_that_grows() -> Result {
    let below = VirtAddr(STACK.0 - 20 * PAGE_SIZE);
    fails_at_each_point("stack", |s| s.fault(below, Access::Write), |s| s.byte(below) == Some(0))
}

#[test]
fn r06_map() -> Result {
    fails_at_each_point("anywhere", |s| came(s.space.map(anonymous(4, R))), |s| s.space.vma_count() == 9)?;
    fails_at_each_point(
        "over the middle of another",
        |s| came(s.space.map(at(page(ANON, 1), private(&s.cache, 0, 2, RW)))),
        |s| s.space.vma_count() == 10 && mapped(&s.space, ANON, 8) == [0, 3, 5],
    )?;
    fails_at_each_point(
        "continuing another",
        |s| came(s.space.map(at(page(ANON, 8), anonymous(4, RW)))),
        |s| s.space.vma_count() == 8 && s.byte(ANON) == Some(100),
    )
}

#[test]
fn r06_populate_stops_where_memory_does() -> Result {
    for left in 0..12 {
        let stage = Stage::new()?;
        let machine = stage.machine;
        let taken = machine.leave_free(left);
        let map = pagefirst::space::Map { populate: true, ..at(NOWHERE, anonymous(4, RW)) };
        let made = stage.space.map(map);
        // Three tables, and then a page each: pages are in hand before tables are taken.
        let filled = left.saturating_sub(3).min(4);
        let why = made.map(|m| m.unpopulated.map(|u| (u.at, u.why.error())));
        let expected = (filled < 4).then_some((page(NOWHERE, filled), Some(FaultError::NoMemory)));
        assert_eq!(why, Ok(expected), "{left} frames left");
        assert_eq!(mapped(&stage.space, NOWHERE, 4).len() as u64, filled);
        drop(taken);
        assert!(stage.space.populate(VirtRange::new(NOWHERE, page(NOWHERE, 4)), RW).is_none());
        check(&stage.space);
        drop(stage);
        machine.nothing_left()?;
    }
    Ok(())
}

#[test]
fn r06_unmap_and_discard() -> Result {
    fails_at_each_point(
        "in the middle",
        |s| came(s.space.unmap(page(ANON, 1), 2 * PAGE_SIZE)),
        |s| s.space.vma_count() == 9 && mapped(&s.space, ANON, 8) == [0, 3, 5],
    )?;
    fails_at_each_point(
        "across several",
        |s| came(s.space.unmap(page(ANON, 4), HEAP.0 - page(ANON, 4).0)),
        |s| s.space.vma_count() == 6 && mapped(&s.space, ANON, 8) == [0, 1, 2, 3],
    )?;
    fails_at_each_point(
        "discard",
        |s| came(s.space.discard(ANON, 8 * PAGE_SIZE)),
        |s| mapped(&s.space, ANON, 8).is_empty() && s.space.vma_count() == 8,
    )
}

#[test]
fn r06_protect() -> Result {
    for prot in [R, NONE, RW | Prot::EXEC] {
        fails_at_each_point(
            "protect in the middle",
            |s| came(s.space.protect(page(ANON, 1), 4 * PAGE_SIZE, prot)),
            |s| s.space.vma_count() == 10 && s.byte(page(ANON, 1)) == Some(101),
        )?;
    }
    fails_at_each_point(
        "protect all",
        |s| came(s.space.protect(FILE, 8 * PAGE_SIZE, R)),
        |s| s.space.vma_count() == 8 && !attrs(&s.space, page(FILE, 1)).contains(Attrs::WRITE),
    )
}

#[test]
fn r06_remap() -> Result {
    let whole = 8 * PAGE_SIZE;
    fails_at_each_point(
        "shrink",
        |s| came(s.space.remap(ANON, whole, 2 * PAGE_SIZE, RemapTo::InPlace)),
        |s| mapped(&s.space, ANON, 8) == [0, 1],
    )?;
    fails_at_each_point(
        "grow in place",
        |s| came(s.space.remap(ANON, whole, 2 * whole, RemapTo::InPlace)),
        |s| vmas(&s.space)[0] == (ANON.0 >> 12, (ANON.0 >> 12) + 16, RW) && s.byte(ANON) == Some(100),
    )?;
    fails_at_each_point(
        "move",
        |s| came(s.space.remap(ANON, whole, whole, RemapTo::Fixed(NOWHERE))),
        |s| mapped(&s.space, NOWHERE, 8) == [0, 1, 2, 3, 5] && s.byte(page(NOWHERE, 3)) == Some(103),
    )?;
    fails_at_each_point(
        "move a part of one into the middle of another",
        |s| came(s.space.remap(page(ANON, 1), 2 * PAGE_SIZE, 4 * PAGE_SIZE, RemapTo::Fixed(page(FILE, 1)))),
        |s| {
            let moved = (s.byte(page(FILE, 1)), s.byte(page(FILE, 2)), s.byte(page(FILE, 3)));
            moved == (Some(101), Some(102), None) && mapped(&s.space, ANON, 8) == [0, 3, 5]
        },
    )?;
    fails_at_each_point(
        "move a file's pages",
        |s| came(s.space.remap(FILE, whole, 2 * whole, RemapTo::Fixed(NOWHERE))),
        |s| (s.byte(NOWHERE), s.byte(page(NOWHERE, 1))) == (Some(mark(0)), Some(111)),
    )
}

#[test]
fn r06_brk() -> Result {
    fails_at_each_point(
        "up",
        |s| came(s.space.brk(page(HEAP, 6))),
        |s| s.space.heap_end() == page(HEAP, 6) && s.byte(HEAP) == Some(120),
    )?;
    fails_at_each_point(
        "down",
        |s| came(s.space.brk(page(HEAP, 1))),
        |s| s.space.heap_end() == page(HEAP, 1) && s.byte(HEAP) == Some(120),
    )
}

#[test]
fn r06_spaces_and_caches() -> Result {
    let machine = small_machine(64);
    let file = marked();
    let mut works = [0; 2];
    for left in 0..8 {
        let taken = machine.leave_free(left);
        match space(machine) {
            Ok(_) => works[0] += 1,
            Err(error) => assert_eq!(error.to_string(), "out of memory"),
        }
        match cache(machine, &file, 4) {
            Ok(_) => works[1] += 1,
            Err(error) => assert_eq!(error.to_string(), "out of memory"),
        }
        drop(taken);
        machine.nothing_left()?;
    }
    assert!(works.iter().all(|n| (1..8).contains(n)), "{works:?}");
    Ok(())
}
