//! What the calls are tried on, and the trying: each attempt to have memory fails in turn.

use crate::kit::*;
use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::fault::FaultError;
use pagefirst::file::ShmemHuge;
use pagefirst::frame::FrameFlags;
use pagefirst::platform::Platform;
use pagefirst::space::{Advice, MapError, MemoryType, Physical, VmaFlags};
use pagefirst::space::{Backing, Map};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, VirtAddr, VirtRange};
use pagefirst_machine::{Attempts, Config, Machine, MachineFile, Refuse, count_points};
use std::cell::Cell;
use std::sync::atomic::Ordering::Acquire;

/// Private memory: pages 0 to 3 written, 5 read, the others untouched.
pub const ANON: VirtAddr = VirtAddr(1 << 30);
/// A private mapping of a file: page 0 read, 1 written.
pub const FILE: VirtAddr = VirtAddr(2 << 30);
/// A shared mapping of the same file: page 2 read.
pub const SHARED: VirtAddr = VirtAddr(3 << 30);
pub const HEAP: VirtAddr = VirtAddr(4 << 30);
/// The end of a stack of two pages, the upper one written.
pub const STACK: VirtAddr = VirtAddr(5 << 30);
/// Private memory that gets huge pages: 2 MiB written, 2 MiB read, 2 MiB untouched.
pub const HUGE: VirtAddr = VirtAddr(6 << 30);
/// 4 MiB of a device, the first 2 MiB touched.
pub const DEVICE: VirtAddr = VirtAddr(7 << 30);
/// A shared mapping of a memory file with huge pages: 2 MiB written, 2 MiB untouched.
pub const SHMEM: VirtAddr = VirtAddr(8 << 30);
/// Nothing is touched here: every table below the root is missing.
pub const EMPTY: VirtAddr = VirtAddr(1 << 40);
pub const EMPTY_FILE: VirtAddr = VirtAddr(2 << 40);
pub const EMPTY_SHARED: VirtAddr = VirtAddr(3 << 40);
pub const NOWHERE: VirtAddr = VirtAddr(4 << 40);

/// Mappings when nothing was called yet.
pub const MAPPINGS: usize = 11;

const MEMORY: u64 = 16384;

pub fn machine_with_device() -> &'static Machine {
    Machine::new(Config { memory: MEMORY * PAGE_SIZE, device: 8 << 20, ..hardware() })
}

pub struct Stage {
    pub machine: &'static Machine,
    pub space: Space,
    pub cache: Cache,
    pub file: MachineFile,
    /// The call may leave a huge page as small ones: the same pages, with a table more.
    pub may_split: Cell<bool>,
}

pub fn device(pages: u64) -> Map<Machine> {
    let backing = Backing::Physical(Physical { first: Pfn(MEMORY as u32), memory: MemoryType::Device });
    Map { backing, flags: VmaFlags::SHARED, ..anonymous(pages, RW) }
}

impl Stage {
    pub fn new(machine: &'static Machine) -> Result<Stage> {
        let policy = policy().with_fault_around(PAGE_SIZE).ok_or("a window")?;
        let file = marked().with_tracking(true);
        let (space, cache) = (space_with(machine, policy)?, cache(machine, &file, 8)?);
        let shmem = crate::kit::cache(machine, &MachineFile::shmem(ShmemHuge::Always), 1024)?;
        warm(machine, &cache, 0..4)?;
        for (place, map) in [
            (ANON, anonymous(8, RW)),
            (FILE, private(&cache, 0, 8, RW)),
            (SHARED, shared(&cache, 0, 8, RW)),
            (HUGE, anonymous(3 * 512, RW)),
            (DEVICE, device(1024)),
            (SHMEM, shared(&shmem, 0, 1024, RW)),
            (EMPTY, anonymous(1024, RW)),
            (EMPTY_FILE, private(&cache, 0, 8, RW)),
            (EMPTY_SHARED, shared(&cache, 0, 8, RW)),
        ] {
            space.map(at(place, map))?;
        }
        let stack = Map { flags: VmaFlags::GROWS_DOWN, ..anonymous(2, RW) };
        space.map(at(VirtAddr(STACK.0 - 2 * PAGE_SIZE), stack))?;
        space.set_heap(HEAP)?;
        space.brk(page(HEAP, 2))?;
        space.advise(HUGE, 3 << 21, Advice::Huge)?;
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
        cpu.store_u8(HUGE, 140)?;
        cpu.load_u8(page(HUGE, 512))?;
        cpu.store_u8(DEVICE, 150)?;
        cpu.store_u8(SHMEM, 160)?;
        drop(cpu);
        let levels = [HUGE, page(HUGE, 512), DEVICE, SHMEM].map(|va| entry(&space, va).1);
        assert_eq!(levels, [1; 4], "huge entries");
        Ok(Stage { machine, space, cache, file, may_split: Cell::new(false) })
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
        let zero = |pfn| {
            let is_huge = || self.machine.meta(pfn).flags().contains(FrameFlags::ZERO);
            pfn == self.machine.vm().zero_page() || u64::from(pfn.0) < MEMORY && is_huge()
        };
        for (va, level, raw) in check(s).entries {
            // Whether there is a zero page, nobody can tell.
            if X86_64::frame(raw, level).is_some_and(zero) {
                continue;
            }
            // A fork that failed may have made it read-only: the next write needs no copy.
            let attrs = X86_64::attrs(raw) - Attrs::WRITE;
            for i in 0..1 << (9 * u32::from(level)) {
                let pfn = X86_64::frame(raw, level).map(|first| first.add(i));
                entries.push((page(va, i.into()), pfn, attrs, self.byte(page(va, i.into()))));
            }
        }
        let account = s.account();
        let tables = (!self.may_split.get()).then(|| (account.table_bytes, check(s).tables));
        (mappings, entries, account.resident_bytes(), s.heap_end(), tables)
    }

    pub fn fault(&self, va: VirtAddr, access: Access) -> Came {
        match fault(&self.space, va, access) {
            End::Mapped(..) | End::Spurious => Came::Done,
            End::Error(FaultError::NoMemory) => Came::NoMemory,
            end => panic!("{access:?} at {va}: {end:?}"),
        }
    }

    pub fn byte(&self, va: VirtAddr) -> Option<u8> {
        let (raw, level) = entry(&self.space, va);
        let first = X86_64::frame(raw, level)?;
        let inside = if level > 0 { (va.0 >> 12) as u32 % 512 } else { 0 };
        Some(self.machine.cells(first.add(inside))[0].load(Acquire) as u8)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Came {
    Done,
    NoMemory,
}

pub fn came<T>(result: std::result::Result<T, MapError>) -> Came {
    match result {
        Ok(_) => Came::Done,
        Err(MapError::NoMemory) => Came::NoMemory,
        Err(error) => panic!("{error}"),
    }
}

/// Runs `call` so that each attempt to have memory in it fails in turn: alone, with all later ones at its place in the code,
/// with all later ones. It works, or says that there is none, with everything as it was; then it works when there is. If it
/// works without what was refused, each attempt that comes in its place fails in turn as well.
pub fn fails_at_each_point(
    name: &str,
    call: impl Fn(&Stage) -> Came,
    done: impl Fn(&Stage) -> bool,
) -> Result {
    fails_at_each_point_of(name, |_| Ok(()), call, done)
}

/// The same after something else was done.
pub fn fails_at_each_point_of(
    name: &str,
    before: impl Fn(&Stage) -> Result,
    call: impl Fn(&Stage) -> Came,
    done: impl Fn(&Stage) -> bool,
) -> Result {
    let machine = machine_with_device();
    let mut points = 0;
    let mut refuse = |how: Refuse| -> Result<(Came, Attempts)> {
        let stage = Stage::new(machine)?;
        before(&stage)?;
        stage.space.quiesce();
        let as_it_was = stage.state();
        let name = format!("{name}, {how:?}");
        let (first, attempts) = machine.refusing(how, || call(&stage));
        if first == Came::NoMemory {
            assert!(attempts.refused > 0, "{name}: there was memory");
            assert_eq!(stage.state(), as_it_was, "{name}");
            assert_eq!(call(&stage), Came::Done, "{name}: with memory");
        }
        check(&stage.space);
        assert!(done(&stage), "{name}: not done");
        drop(stage);
        machine.nothing_left().map_err(|e| format!("{name}: {e}"))?;
        points += (attempts.refused > 0) as u64;
        Ok((first, attempts))
    };
    for how in [Refuse::One, Refuse::From] {
        (0..).try_for_each(|n| refuse(how(n)).map_err(Some).and_then(any_refused)).or_else(stop)?;
    }
    for n in 0.. {
        let (came, attempts) = refuse(Refuse::Site(n))?;
        if attempts.refused == 0 {
            break;
        }
        if came == Came::Done {
            let then = |m| {
                refuse(Refuse::Sites(n, m))
                    .map_err(Some)
                    .and_then(|(_, attempts)| (attempts.made > m).then_some(()).ok_or(None))
            };
            (n + 1..).try_for_each(then).or_else(stop)?;
        }
    }
    println!("{name}: {points} points");
    count_points(points);
    Ok(())
}

type Stop = Option<Box<dyn std::error::Error>>;

fn any_refused((_, attempts): (Came, Attempts)) -> std::result::Result<(), Stop> {
    if attempts.refused > 0 { Ok(()) } else { Err(None) }
}
fn stop(why: Stop) -> Result {
    why.map_or(Ok(()), Err)
}
