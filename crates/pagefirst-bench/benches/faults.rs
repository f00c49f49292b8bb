//! Each kind of fault, and unmapping, through [`AddressSpace`] beside its floor: what cannot be left out of it, done in
//! a loop and nothing else. A page that is cleared or copied is cleared or copied by the floor as well; a fault that
//! does neither is beside a walk of four dependent loads and so many uncontended compare-exchanges as it takes locks
//! and counts.

use pagefirst::fault::Outcome;
use pagefirst::file::FileCache;
use pagefirst::frame::Frame;
use pagefirst::mem::Shared;
use pagefirst::platform::Platform;
use pagefirst::policy::Policy;
use pagefirst::space::{AddressSpace, Backing, Map, VmaFlags};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr};
use pagefirst_bench::Bench;
use pagefirst_bench::measure::{self, Contender, Sheet};
use pagefirst_machine::MachineFile;
use std::hint::black_box;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Relaxed};

/// Pages of one mapping: 64 MiB.
const PAGES: u64 = 16 << 10;
/// Pages that one read fault maps from the page cache.
const WINDOW: u64 = 16;
/// Pages that are alone in their tables, and what a table spans.
const SPARSE: u64 = 4 << 10;
const SPAN: u64 = 2 << 20;
const RW: Prot = Prot::READ.union(Prot::WRITE);

const CLEARED: &str = "private memory, write";
const ZERO: &str = "private memory, read";
const ZERO_COPY: &str = "private memory, write after read";
const UNMAP_PRIVATE: &str = "unmap private memory, a page";
const UNMAP_SPARSE: &str = "unmap a page in each 2 MiB, a page";
const READ: &str = "file, read (16 pages)";
const COPY: &str = "private file mapping, write";
const READ_COPY: &str = "private file mapping, write after read";
const UNMAP_FILE: &str = "unmap a file's pages, a page";
const SHARED: &str = "shared file mapping, write";
const REUSE: &str = "shared file mapping, write after read";
const TOUCH: &str = "map 4 KiB, write, unmap";
const TOUCH_BESIDE: &str = "the same beside 64 mappings";

struct Stage {
    platform: &'static Bench,
    file: Shared<Bench, FileCache<Bench>>,
    /// Frames for the floors.
    frames: Vec<Frame<Bench>>,
}

impl Stage {
    fn new() -> Self {
        let platform = Bench::new(320 << 20);
        let file = FileCache::new(platform, MachineFile::zeros().with_tracking(true), PAGES * PAGE_SIZE)
            .expect("memory");
        for page in 0..PAGES {
            assert!(file.read_at(platform, page * PAGE_SIZE, &mut [0]).is_ok());
        }
        let frames = (0..PAGES).map(|_| Frame::new(platform).expect("memory")).collect();
        Stage { platform, file, frames }
    }
}

/// Faults at `pages` pages from `at` on, `step` apart.
fn touch(space: &AddressSpace<Bench>, at: VirtAddr, pages: u64, step: u64, access: Access) {
    for page in (0..pages).step_by(step as usize) {
        let outcome = space.fault(VirtAddr(at.0 + page * PAGE_SIZE), access);
        assert!(matches!(outcome, Outcome::Mapped { .. }));
    }
}

fn ours(stage: &Stage, sheet: &mut Sheet) {
    let space = AddressSpace::new(stage.platform, Policy::default()).expect("memory");
    let empty = space.account().tables_bytes();
    let len = PAGES * PAGE_SIZE;
    let map = |map: Map<Bench>| space.map(map).expect("room").range.start;
    let of_file = |flags| {
        let backing = Backing::File { file: stage.file.clone(), first: 0 };
        Map { backing, flags, ..Map::anonymous(len, RW) }
    };
    let private = || of_file(VmaFlags::empty());
    let shared = || of_file(VmaFlags::SHARED);

    let at = map(Map::anonymous(len, RW));
    sheet.time(CLEARED, PAGES, || touch(&space, at, PAGES, 1, Access::Write));
    sheet.time(UNMAP_PRIVATE, PAGES, || space.unmap(at, len).expect("mapped"));

    let at = map(Map::anonymous(SPARSE * SPAN, RW));
    touch(&space, at, SPARSE * SPAN / PAGE_SIZE, SPAN / PAGE_SIZE, Access::Write);
    sheet.time(UNMAP_SPARSE, SPARSE, || {
        space.unmap(at, SPARSE * SPAN).expect("mapped");
        // Two more grace periods and all tables are free: later calls would do it, a part each.
        (0..2).for_each(|_| _ = stage.platform.vm().collect(stage.platform, usize::MAX));
    });

    let at = map(Map::anonymous(len, RW));
    sheet.time(ZERO, PAGES, || touch(&space, at, PAGES, 1, Access::Read));
    sheet.time(ZERO_COPY, PAGES, || touch(&space, at, PAGES, 1, Access::Write));
    space.unmap(at, len).expect("mapped");

    let at = map(private());
    sheet.time(READ, PAGES / WINDOW, || touch(&space, at, PAGES, WINDOW, Access::Read));
    sheet.time(READ_COPY, PAGES, || touch(&space, at, PAGES, 1, Access::Write));
    space.unmap(at, len).expect("mapped");

    let at = map(private());
    sheet.time(COPY, PAGES, || touch(&space, at, PAGES, 1, Access::Write));
    space.unmap(at, len).expect("mapped");

    let at = map(shared());
    sheet.time(SHARED, PAGES, || touch(&space, at, PAGES, 1, Access::Write));
    sheet.time(UNMAP_FILE, PAGES, || space.unmap(at, len).expect("mapped"));

    let at = map(shared());
    touch(&space, at, PAGES, WINDOW, Access::Read);
    sheet.time(REUSE, PAGES, || touch(&space, at, PAGES, 1, Access::Write));
    space.unmap(at, len).expect("mapped");

    let map_and_touch = || {
        for _ in 0..PAGES {
            let at = map(Map::anonymous(PAGE_SIZE, RW));
            touch(&space, at, 1, 1, Access::Write);
            space.unmap(at, PAGE_SIZE).expect("mapped");
        }
    };
    sheet.time(TOUCH, PAGES, map_and_touch);
    // None continues another.
    let others: Vec<_> = (0..64)
        .map(|i| map(Map::anonymous(4 * PAGE_SIZE, if i % 2 == 0 { RW } else { Prot::READ })))
        .inspect(|at| touch(&space, *at, 4, 1, Access::Read))
        .collect();
    sheet.time(TOUCH_BESIDE, PAGES, map_and_touch);
    others.iter().for_each(|at| space.unmap(*at, 4 * PAGE_SIZE).expect("mapped"));
    sheet.note("bytes of tables left", space.account().tables_bytes() - empty);
}

/// Four loads, each of an address that the one before it gave.
fn walk(chain: &[AtomicU64; 4]) -> u64 {
    (0..4).fold(0, |at, _| chain[at as usize & 3].load(Relaxed))
}
fn exchange(word: &AtomicU64, times: u64) {
    for _ in 0..times {
        let now = word.load(Relaxed);
        let _ = black_box(word.compare_exchange(now, now + 1, AcqRel, Relaxed));
    }
}

fn floors(stage: &Stage, sheet: &mut Sheet) {
    let page = |i: usize| stage.platform.page(stage.frames[i].pfn()).as_ptr();
    // SAFETY: the stage's frames are nobody else's.
    let clear = |i: usize| unsafe { page(i).write_bytes(0, PAGE_SIZE as usize) };
    let half = stage.frames.len() / 2;
    // SAFETY: as above; the halves do not overlap.
    let copy = |i: usize| unsafe {
        page(i % half).copy_from_nonoverlapping(page(half + i % half), PAGE_SIZE as usize);
    };
    let chain = black_box([1, 2, 3, 0].map(AtomicU64::new));
    let word = AtomicU64::new(0);
    let each = |work: &mut dyn FnMut(usize)| (0..PAGES as usize).for_each(work);

    sheet.time(CLEARED, PAGES, || each(&mut |i| clear(i)));
    for row in [ZERO_COPY, COPY, READ_COPY] {
        sheet.time(row, PAGES, || each(&mut |i| copy(i)));
    }
    for (row, exchanges) in [(ZERO, 1), (REUSE, 1), (SHARED, 2), (READ, 1 + WINDOW)] {
        sheet.time(row, PAGES, || {
            each(&mut |_| {
                black_box(walk(&chain));
                exchange(&word, exchanges);
            });
        });
    }
    for row in [UNMAP_PRIVATE, UNMAP_FILE] {
        sheet.time(row, PAGES, || each(&mut |_| exchange(&word, 1)));
    }
    sheet.time(UNMAP_SPARSE, SPARSE, || (0..SPARSE).for_each(|_| exchange(&word, 3)));
    for row in [TOUCH, TOUCH_BESIDE] {
        sheet.time(row, PAGES, || each(&mut |_| clear(0)));
    }
}

fn main() {
    let contenders: [Contender<'_, Stage>; 2] = [("floor", floors), ("pagefirst", ours)];
    measure::compare("Faults", 15, &Stage::new(), &contenders);
}
