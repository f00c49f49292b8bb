//! Fault-around where it is worst, and where it is best: one page used in each 2 MiB of a file that is all in memory, in
//! small folios; and all pages, in folios of three sizes.

use pagefirst::fault::Outcome;
use pagefirst::file::FileCache;
use pagefirst::mem::Shared;
use pagefirst::policy::{FaultAround, Policy};
use pagefirst::space::{AddressSpace, Backing, Map, Place};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr};
use pagefirst_bench::Bench;
use pagefirst_bench::measure::{self, Contender, Sheet};
use pagefirst_machine::MachineFile;
use std::cell::Cell;

/// What a leaf table spans.
const SPAN: u64 = 2 << 20;
/// Bytes of a file.
const LEN: u64 = 64 << 20;
/// Mappings of it, each of which begins with a fault that nothing tells about, and is not counted.
const MAPPINGS: u64 = 8;
const FAULTS: u64 = MAPPINGS * (LEN / SPAN - 1);
const WINDOW: u64 = 64 << 10;

const SPARSE: &str = "one page in each 2 MiB, read";
const UNMAP_SPARSE: &str = "the same, unmapped, a page used";
const FOLIOS: [(u8, &str, &str); 4] = [
    (0, "folios of 4 KiB, 16 pages read", "the same, unmapped, a page"),
    (4, "folios of 64 KiB, 16 pages read", "the same, unmapped, a page of them"),
    (8, "folios of 1 MiB, 16 pages read", "the same, unmapped, a page of those"),
    (9, "folios of 2 MiB, read by one entry", "the same, unmapped, 2 MiB"),
];

struct Stage {
    platform: &'static Bench,
    /// By the order of their folios.
    files: Vec<Shared<Bench, FileCache<Bench>>>,
}

impl Stage {
    fn new() -> Self {
        let platform = Bench::new(400 << 20);
        let file = |order: u8| {
            let content = MachineFile::zeros().with_folios(order);
            let file = FileCache::new(platform, content, LEN).expect("memory");
            (0..LEN).step_by(PAGE_SIZE as usize).for_each(|at| {
                assert!(file.read_at(platform, at, &mut [0]).is_ok());
            });
            file
        };
        Stage { platform, files: FOLIOS.map(|(order, ..)| file(order)).into() }
    }
}

fn touch(space: &AddressSpace<Bench>, at: VirtAddr, first: u64, step: u64) {
    for offset in (first..LEN).step_by(step as usize) {
        let outcome = space.fault(VirtAddr(at.0 + offset), Access::Read);
        assert!(matches!(outcome, Outcome::Mapped { .. }));
    }
}

fn run(stage: &Stage, sheet: &mut Sheet, around: FaultAround) {
    let policy = Policy { fault_around: around, ..Policy::default() };
    let space = AddressSpace::new(stage.platform, policy).expect("memory");
    // At multiples of what a table spans.
    let next = Cell::new(1 << 40);
    let map = |file: usize| {
        let backing = Backing::File { file: stage.files[file].clone(), first: 0 };
        let map = Map { backing, ..Map::anonymous(LEN, Prot::READ) };
        let place = Place::Fixed(VirtAddr(next.replace(next.get() + LEN)));
        space.map(Map { place, ..map }).expect("room").range.start
    };
    let unmap = |at| space.unmap(at, LEN).expect("mapped");
    let all: Vec<_> = (0..MAPPINGS).map(|_| map(0)).collect();
    all.iter().for_each(|at| touch(&space, *at, 0, LEN));
    sheet.time(SPARSE, FAULTS, || all.iter().for_each(|at| touch(&space, *at, SPAN, SPAN)));
    sheet.time(UNMAP_SPARSE, FAULTS, || all.iter().for_each(|at| unmap(*at)));
    if around.is_fixed() && around.least() == WINDOW {
        for (file, (order, read, unmapped)) in FOLIOS.into_iter().enumerate() {
            let at = map(file);
            let (step, pages) = if order == 9 { (SPAN, SPAN) } else { (WINDOW, PAGE_SIZE) };
            sheet.time(read, LEN / step, || touch(&space, at, 0, step));
            sheet.time(unmapped, LEN / pages, || unmap(at));
        }
    }
}

fn fixed(bytes: u64) -> FaultAround {
    FaultAround::fixed(bytes).expect("a size")
}

fn main() {
    let contenders: [Contender<'_, Stage>; 4] = [
        ("4 KiB", |stage, sheet| run(stage, sheet, fixed(PAGE_SIZE))),
        ("64 KiB", |stage, sheet| run(stage, sheet, fixed(WINDOW))),
        ("2 MiB", |stage, sheet| run(stage, sheet, fixed(SPAN))),
        ("4 KiB to 256 KiB", |stage, sheet| {
            run(stage, sheet, FaultAround::adaptive(PAGE_SIZE, 256 << 10).expect("bounds"));
        }),
    ];
    measure::compare("Fault-around, by window", 15, &Stage::new(), &contenders);
}
