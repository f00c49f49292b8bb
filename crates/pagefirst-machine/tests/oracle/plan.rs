//! What a case is made of: a machine, two spaces, and steps, all of it plain data that can be printed and shrunk.

use super::areas::Shows;
use super::calls::NewMap;
use pagefirst::file::ShmemHuge;
use pagefirst::policy::{FaultAround, HugePolicy, Policy};
use pagefirst::space::{Advice, Place, RemapTo, VmaFlags};
use pagefirst::types::{PAGE_SIZE, Prot, VirtAddr};
use proptest::prelude::*;
use proptest::strategy::Union;
use std::ops::Range;

/// Where calls and accesses happen, in pages: across the border of two leaf tables and of two tables above them; far
/// away; a region that spans several leaf tables.
pub const NEAR: Range<u64> = (1 << 18) - 20..(1 << 18) + 28;
pub const HOT: Range<u64> = (1 << 18) - 4..(1 << 18) + 4;
pub const FAR: Range<u64> = (1 << 30) + 7..(1 << 30) + 55;
pub const WIDE: Range<u64> = 3 << 18..(3 << 18) + 4 * 512;
/// Sizes of the files when a case begins, in bytes. The last one is memory.
pub const FILES: [u64; 3] = [30 * PAGE_SIZE, 600 * PAGE_SIZE + 1234, 1050 * PAGE_SIZE];
pub const MEMORY: usize = 2;
/// No file of a case becomes larger.
const LARGEST: u64 = 700 * PAGE_SIZE;

/// A machine to run on. Few differ, so that they can be used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Hardware {
    pub cpus: usize,
    /// All that manuals allow hardware to do.
    pub is_harsh: bool,
    pub keep_tags: bool,
}

/// All that is settled before the first step.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub hardware: Hardware,
    pub policy: Policy,
    /// Whether the files want to know who writes to their pages.
    pub tracks: bool,
    /// Whether their reads end later, by threads of theirs.
    pub late: bool,
    /// When the memory file has huge pages.
    pub shmem: ShmemHuge,
    /// Where the heap starts.
    pub heap: u64,
    /// So many frames are left free: memory may run out.
    pub free: Option<u64>,
}

#[derive(Clone, Debug)]
pub enum Op {
    Map {
        map: NewMap,
        populate: bool,
    },
    Unmap(Range<u64>),
    Protect(Range<u64>, Prot),
    Discard(Range<u64>),
    Remap {
        old: Range<u64>,
        pages: u64,
        to: RemapTo,
    },
    Brk(u64),
    Advise(Range<u64>, Advice),
    Load {
        at: u64,
        wide: bool,
        by: By,
    },
    Store {
        at: u64,
        wide: bool,
        by: By,
        value: u64,
    },
    Fetch(u64),
    /// A compare-exchange by the kernel; `hits` if it is to find what it looks for.
    Exchange {
        at: u64,
        hits: bool,
        value: u64,
    },
    ReadFile {
        file: usize,
        at: u64,
        len: usize,
    },
    WriteFile {
        file: usize,
        at: u64,
        len: usize,
        value: u8,
    },
    Resize {
        file: usize,
        size: u64,
    },
    Punch {
        file: usize,
        hole: Range<u64>,
    },
    Evict(usize),
    WriteBack(usize),
    /// The other space ends, before or after, and becomes a child of this one.
    Fork {
        ends_first: bool,
    },
    /// The CPU leaves the space that it runs.
    Leave,
    /// Everything that the library holds back goes to the allocator.
    Drain,
}

/// Who uses a program's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum By {
    Program,
    /// A system call that copies.
    Kernel,
}

/// One step: what one CPU does in one of the two spaces.
#[derive(Clone, Debug)]
pub struct Step {
    pub cpu: usize,
    pub space: usize,
    pub op: Op,
}

fn spots() -> BoxedStrategy<u64> {
    let near_leaf_borders = (0..5_u64, 0..24_u64).prop_map(|(leaf, n)| {
        let border = WIDE.start + leaf * 512;
        (border + n).saturating_sub(8).clamp(WIDE.start, WIDE.end - 1)
    });
    // Most of it happens on few pages, so that steps have to do with each other.
    prop_oneof![10 => HOT, 3 => NEAR, 1 => FAR, 5 => near_leaf_borders, 2 => WIDE].boxed()
}

pub fn region_end(page: u64) -> u64 {
    [NEAR, FAR, WIDE].into_iter().find(|r| r.contains(&page)).map_or(page + 1, |r| r.end)
}

/// Ranges of up to `most` pages, and now and then some that span leaf tables.
fn ranges(most: u64) -> BoxedStrategy<Range<u64>> {
    let short = (spots(), 1..=most)
        .prop_map(|(start, len)| start..(start + len).min(region_end(start)).max(start + 1));
    let long = (WIDE, WIDE).prop_map(|(a, b)| a.min(b)..a.max(b) + 1);
    let leaves = (0..4_u64, 1..=4_u64)
        .prop_map(|(first, n)| WIDE.start + first * 512..WIDE.start + (first + n).min(4) * 512);
    prop_oneof![12 => short, 1 => long, 1 => leaves].boxed()
}

fn prots() -> BoxedStrategy<Prot> {
    let (r, w, x) = (Prot::READ, Prot::WRITE, Prot::EXEC);
    prop_oneof![
        12 => Just(r | w),
        4 => Just(r),
        1 => Just(Prot::empty()),
        2 => Just(r | w | x),
        2 => Just(r | x),
        1 => prop_oneof![Just(w), Just(x)],
    ]
    .boxed()
}

fn addresses() -> BoxedStrategy<u64> {
    let inside = prop_oneof![Just(0), Just(8), Just(PAGE_SIZE - 4), Just(PAGE_SIZE - 8), 0..PAGE_SIZE];
    let usual = (spots(), inside).prop_map(|(page, place)| page * PAGE_SIZE + place);
    let odd = prop_oneof![
        Just(0),
        Just((1 << 47) - PAGE_SIZE - 8),
        Just((1 << 47) + 8),
        Just(u64::MAX - PAGE_SIZE + 1)
    ];
    // Below a stack.
    let below = (spots(), 1..300_u64).prop_map(|(page, n)| (page - n) * PAGE_SIZE);
    prop_oneof![60 => usual, 1 => odd, 3 => below].boxed()
}

fn shows() -> BoxedStrategy<(Shows, VmaFlags)> {
    // Mostly so that it fits where huge pages may be.
    let memory = || prop_oneof![3 => Just(0), 1 => Just(512), 1 => 0..600_u64];
    let file = || (0..FILES.len(), prop_oneof![4 => 0..8_u64, 2 => 0..40_u64, 1 => 560..610_u64]);
    prop_oneof![
        8 => Just((Shows::Anonymous, VmaFlags::empty())),
        1 => Just((Shows::Anonymous, VmaFlags::GROWS_DOWN)),
        1 => memory().prop_map(|first| (Shows::Private { file: MEMORY, first }, VmaFlags::empty())),
        3 => memory().prop_map(|first| (Shows::Shared { file: MEMORY, first }, VmaFlags::SHARED)),
        4 => file().prop_map(|(file, first)| (Shows::Private { file, first }, VmaFlags::empty())),
        4 => file().prop_map(|(file, first)| (Shows::Shared { file, first }, VmaFlags::SHARED)),
        1 => file().prop_map(|(file, first)| {
            (Shows::Shared { file, first }, VmaFlags::SHARED | VmaFlags::NEVER_WRITE)
        }),
    ]
    .boxed()
}

fn maps() -> BoxedStrategy<Op> {
    let places = 0..12_u8;
    (ranges(24), prots(), shows(), places, prop::bool::weighted(0.15))
        .prop_map(|(range, prot, (shows, flags), place, populate)| {
            let (at, pages) = (VirtAddr(range.start * PAGE_SIZE), range.end - range.start);
            let place = match place {
                0 => Place::Anywhere,
                1 => Place::Hint(at),
                2..=4 => Place::FixedNoReplace(at),
                _ => Place::Fixed(at),
            };
            // Filling large mappings takes time: now and then will do.
            let populate = populate && (pages < 64 || range.start.is_multiple_of(3));
            Op::Map { map: NewMap { pages, prot, flags, shows, place }, populate }
        })
        .boxed()
}

fn remaps() -> BoxedStrategy<Op> {
    let any = (ranges(4), ranges(6), 0..6_u8).prop_map(|(old, new, to)| {
        let at = VirtAddr(new.start * PAGE_SIZE);
        let to = match to {
            0 | 1 => RemapTo::InPlace,
            2 => RemapTo::Anywhere,
            _ => RemapTo::Fixed(at),
        };
        Op::Remap { old, pages: new.end - new.start, to }
    });
    // Where huge pages may be, to where they may be, or not quite.
    let huge = (0..4_u64, 0..4_u64, prop_oneof![3 => Just(0), 1 => 1..8_u64]).prop_map(|(from, to, off)| {
        let (old, new) = (WIDE.start + from * 512, WIDE.start + to * 512 + off);
        let to = RemapTo::Fixed(VirtAddr(new * PAGE_SIZE));
        Op::Remap { old: old..old + 512, pages: (WIDE.end - new).min(512), to }
    });
    prop_oneof![6 => any, 1 => huge].boxed()
}

fn file_ops() -> BoxedStrategy<Op> {
    let file = || 0..FILES.len();
    let place = || (file(), prop_oneof![0..32 * PAGE_SIZE, 590 * PAGE_SIZE..LARGEST - 9000], 1..9000_usize);
    prop_oneof![
        2 => place().prop_map(|(file, at, len)| Op::ReadFile { file, at, len }),
        2 => (place(), any::<u8>())
            .prop_map(|((file, at, len), value)| Op::WriteFile { file, at, len, value }),
        1 => (file(), prop_oneof![2 => 0..10 * PAGE_SIZE, 1 => 0..40 * PAGE_SIZE, 1 => 0..LARGEST])
            .prop_map(|(file, size)| Op::Resize { file, size }),
        // It gets its end back, if another size was set before.
        1 => file().prop_map(|file| Op::Resize { file, size: FILES[file] }),
        1 => (place(), any::<bool>()).prop_map(|((file, at, len), whole)| {
            let hole = at..at + len as u64;
            let pages = at / PAGE_SIZE * PAGE_SIZE..(hole.end / PAGE_SIZE + 1) * PAGE_SIZE;
            Op::Punch { file, hole: if whole { pages } else { hole } }
        }),
        3 => file().prop_map(Op::Evict),
        1 => file().prop_map(Op::WriteBack),
    ]
    .boxed()
}

/// Kinds of operations, and how often each is chosen.
pub fn kinds() -> Vec<(u32, BoxedStrategy<Op>)> {
    let by = || prop_oneof![4 => Just(By::Program), 1 => Just(By::Kernel)];
    let for_forks = [Advice::DontFork, Advice::DoFork, Advice::WipeOnFork, Advice::KeepOnFork];
    let advice = prop_oneof![2 => Just(Advice::Huge), 1 => Just(Advice::NoHuge), 2 => prop::sample::select(for_forks.to_vec())];
    let accesses = prop_oneof![
        10 => (addresses(), any::<bool>(), by()).prop_map(|(at, wide, by)| Op::Load { at, wide, by }),
        14 => (addresses(), any::<bool>(), by(), any::<u64>())
            .prop_map(|(at, wide, by, value)| Op::Store { at, wide, by, value }),
        2 => addresses().prop_map(Op::Fetch),
        2 => (addresses(), any::<bool>(), any::<u64>())
            .prop_map(|(at, hits, value)| Op::Exchange { at: at / 8 * 8, hits, value }),
    ];
    vec![
        (5, maps()),
        (2, ranges(3).prop_map(Op::Unmap).boxed()),
        (4, (ranges(4), prots()).prop_map(|(range, prot)| Op::Protect(range, prot)).boxed()),
        (2, ranges(4).prop_map(Op::Discard).boxed()),
        (2, (ranges(24), advice).prop_map(|(range, advice)| Op::Advise(range, advice)).boxed()),
        (4, remaps()),
        (1, (0..16 * PAGE_SIZE).prop_map(Op::Brk).boxed()),
        (5, file_ops()),
        (2, any::<bool>().prop_map(|ends_first| Op::Fork { ends_first }).boxed()),
        (1, prop_oneof![3 => Just(Op::Leave), 1 => Just(Op::Drain)].boxed()),
        (36, accesses.boxed()),
    ]
}

pub fn ops() -> BoxedStrategy<Op> {
    Union::new_weighted(kinds()).boxed()
}

/// What a case begins with, so that most of what comes after meets something: mappings throughout the regions.
pub fn beginnings() -> BoxedStrategy<Vec<Op>> {
    let at = |region: Range<u64>| {
        (prots(), shows()).prop_map(move |(prot, (shows, flags))| {
            let (pages, place) =
                (region.end - region.start, Place::Fixed(VirtAddr(region.start * PAGE_SIZE)));
            Op::Map { map: NewMap { pages, prot, flags, shows, place }, populate: false }
        })
    };
    let wide = (
        prop_oneof![
            6 => Just(Shows::Anonymous),
            1 => Just(Shows::Private { file: 1, first: 0 }),
            1 => Just(Shows::Private { file: MEMORY, first: 0 }),
            3 => Just(Shows::Shared { file: MEMORY, first: 0 }),
        ],
        any::<bool>(),
    )
        .prop_map(|(shows, huge)| {
            let shared = if shows.is_shared() { VmaFlags::SHARED } else { VmaFlags::empty() };
            let flags = shared | if huge { VmaFlags::HUGE } else { VmaFlags::empty() };
            let place = Place::Fixed(VirtAddr(WIDE.start * PAGE_SIZE));
            let prot = Prot::READ | Prot::WRITE;
            let map = NewMap { pages: WIDE.end - WIDE.start, prot, flags, shows, place };
            Op::Map { map, populate: false }
        });
    (
        at(NEAR),
        at(HOT.start..HOT.start + 3),
        at(HOT.start + 3..HOT.end + 2),
        at(FAR.start + 20..FAR.end),
        wide,
    )
        .prop_map(|(a, b, c, d, e)| vec![a, b, c, d, e])
        .boxed()
}

/// The first steps of a case.
pub fn first_steps() -> BoxedStrategy<Vec<Step>> {
    let both = (beginnings(), beginnings()).prop_map(|both| {
        let of = |space, ops: Vec<Op>| ops.into_iter().map(move |op| Step { cpu: 0, space, op });
        of(0, both.0).chain(of(1, both.1)).collect::<Vec<_>>()
    });
    // All steps can be left out, these too, so that what fails shrinks to little.
    let keep = prop::collection::vec(prop::bool::weighted(0.95), 10);
    (both, keep)
        .prop_map(|(steps, keep)| {
            steps.into_iter().zip(keep).filter_map(|(step, keep)| keep.then_some(step)).collect()
        })
        .boxed()
}

pub fn steps(cpus: usize, most: usize) -> impl Strategy<Value = Vec<Step>> {
    let step = (0..cpus, prop::bool::weighted(0.15), ops());
    let step = step.prop_map(|(cpu, other, op)| Step { cpu, space: other as usize, op });
    (first_steps(), prop::collection::vec(step, 1..most))
        .prop_map(|(begin, steps)| begin.into_iter().chain(steps).collect())
}

fn policies() -> impl Strategy<Value = Policy> {
    let flags = (any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.2), any::<bool>());
    let fixed = prop_oneof![4 => Just(64 << 10), 1 => Just(4 << 10), 1 => Just(16 << 10), 1 => Just(2 << 20)];
    // One that adapts goes by what others did last under the same table; `adaptive.rs` tries those.
    let around = fixed.prop_map(|bytes| FaultAround::fixed(bytes).expect("a window"));
    let top = prop_oneof![Just(NEAR.end + 300), Just(WIDE.end + 40), Just(WIDE.end + 40_000)];
    let limits =
        (prop_oneof![3 => Just(1000), 1 => 4..12_usize], prop_oneof![3 => Just(1 << 40), 1 => 20..2000_u64]);
    let huge = prop_oneof![Just(HugePolicy::Never), Just(HugePolicy::Advise), Just(HugePolicy::Always)];
    (flags, around, top, limits, huge).prop_map(
        |((prefault_young, deny_wx, bottom_up, align), fault_around, top, (max_vmas, max_pages), huge)| {
            Policy {
                fault_around,
                prefault_young,
                deny_wx,
                min_addr: VirtAddr((NEAR.start - 16) * PAGE_SIZE),
                map_top: VirtAddr(top * PAGE_SIZE),
                bottom_up,
                align_large: if align { 2 << 20 } else { 0 },
                max_vmas,
                max_bytes: max_pages * PAGE_SIZE,
                max_stack: 280 * PAGE_SIZE,
                huge,
                ..Policy::default()
            }
        },
    )
}

/// Settings for CPUs at work at the same time: nothing that one of them does must change what another may do.
pub fn settings_together(cpus: usize) -> impl Strategy<Value = Setting> {
    settings(cpus).prop_map(|setting| {
        let policy = Policy { max_vmas: 60_000, max_bytes: u64::MAX, ..setting.policy };
        Setting { policy, free: None, ..setting }
    })
}

pub fn settings(cpus: usize) -> impl Strategy<Value = Setting> {
    let hardware = (any::<bool>(), any::<bool>()).prop_map(move |(is_harsh, keep_tags)| Hardware {
        cpus,
        is_harsh,
        keep_tags,
    });
    use ShmemHuge::{Advise, Always, Never, WithinSize};
    let shmem = prop::sample::select(vec![Always, WithinSize, Advise, Never]);
    let free = prop_oneof![5 => Just(None), 1 => (12..120_u64).prop_map(Some)];
    (hardware, policies(), any::<bool>(), FAR.start..FAR.start + 9, free, shmem).prop_map(
        |(hardware, policy, tracks, heap, free, shmem)| {
            // What fault-around maps depends on which pages could be read when memory was short.
            let alone = FaultAround::fixed(PAGE_SIZE).filter(|_| free.is_some());
            Setting {
                hardware,
                policy: Policy { fault_around: alone.unwrap_or(policy.fault_around), ..policy },
                tracks,
                late: free.is_none() && heap % 4 == 1,
                shmem,
                heap: heap * PAGE_SIZE + 0x123,
                free,
            }
        },
    )
}
