//! What a case is made of: a machine, two spaces, and steps, all of it plain data that can be printed and shrunk.

use super::areas::Shows;
use super::calls::NewMap;
use pagefirst::policy::Policy;
use pagefirst::space::{Place, RemapTo, VmaFlags};
use pagefirst::types::{PAGE_SIZE, Prot, VirtAddr};
use pagefirst_machine::{Config, TlbShape};
use proptest::prelude::*;
use std::ops::Range;

/// Where calls and accesses happen, in pages: across the border of two leaf tables and of two tables above them; far
/// away; a region that spans several leaf tables.
const NEAR: Range<u64> = (1 << 18) - 20..(1 << 18) + 28;
const FAR: Range<u64> = (1 << 30) + 7..(1 << 30) + 55;
const WIDE: Range<u64> = 3 << 18..(3 << 18) + 4 * 512;
/// Sizes of the two files when a case begins, in bytes.
pub const FILES: [u64; 2] = [30 * PAGE_SIZE, 600 * PAGE_SIZE + 1234];
/// No file of a case becomes larger.
const LARGEST: u64 = 700 * PAGE_SIZE;

/// A machine to run on. Few differ, so that they can be used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Hardware {
    pub cpus: usize,
    pub small_tlb: bool,
    pub keep_tags: bool,
}

impl Hardware {
    pub fn config(self) -> Config {
        Config {
            checks: true,
            memory: 8192 * PAGE_SIZE,
            cpus: self.cpus,
            tlb: if self.small_tlb { TlbShape { sets: 2, ways: 2 } } else { TlbShape::default() },
            keep_tags: self.keep_tags,
            ..Config::default()
        }
    }
}

/// All that is settled before the first step.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub hardware: Hardware,
    pub policy: Policy,
    /// Whether the files want to know who writes to their pages.
    pub tracks: bool,
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
    Load {
        at: u64,
        wide: bool,
    },
    Store {
        at: u64,
        wide: bool,
        value: u64,
    },
    Fetch(u64),
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
    Evict(usize),
    WriteBack(usize),
    /// The CPU leaves the space that it runs.
    Leave,
    /// Everything that the library holds back goes to the allocator.
    Drain,
}

/// One step: what one CPU does in one of the two spaces.
#[derive(Clone, Debug)]
pub struct Step {
    pub cpu: usize,
    pub space: usize,
    pub op: Op,
}

fn spots() -> impl Strategy<Value = u64> {
    let near_leaf_borders = (0..5_u64, 0..24_u64).prop_map(|(leaf, n)| {
        let border = WIDE.start + leaf * 512;
        (border + n).saturating_sub(8).clamp(WIDE.start, WIDE.end - 1)
    });
    prop_oneof![5 => NEAR, 2 => FAR, 3 => near_leaf_borders, 1 => WIDE]
}

fn region_end(page: u64) -> u64 {
    [NEAR, FAR, WIDE].into_iter().find(|r| r.contains(&page)).map_or(page + 1, |r| r.end)
}

/// Ranges of up to `most` pages, and now and then some that span leaf tables.
fn ranges(most: u64) -> impl Strategy<Value = Range<u64>> {
    let short = (spots(), 1..=most)
        .prop_map(|(start, len)| start..(start + len).min(region_end(start)).max(start + 1));
    let long = (WIDE, WIDE).prop_map(|(a, b)| a.min(b)..a.max(b) + 1);
    let leaves = (0..4_u64, 1..=4_u64)
        .prop_map(|(first, n)| WIDE.start + first * 512..WIDE.start + (first + n).min(4) * 512);
    prop_oneof![12 => short, 1 => long, 1 => leaves]
}

fn prots() -> impl Strategy<Value = Prot> {
    let (r, w, x) = (Prot::READ, Prot::WRITE, Prot::EXEC);
    prop_oneof![
        8 => Just(r | w),
        4 => Just(r),
        2 => Just(Prot::empty()),
        1 => Just(r | w | x),
        1 => Just(r | x),
        1 => prop_oneof![Just(w), Just(x)],
    ]
}

fn addresses() -> impl Strategy<Value = u64> {
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
    prop_oneof![60 => usual, 1 => odd, 3 => below]
}

fn shows() -> impl Strategy<Value = (Shows, VmaFlags)> {
    let file = || (0..FILES.len(), prop_oneof![4 => 0..40_u64, 1 => 560..610_u64]);
    prop_oneof![
        8 => Just((Shows::Anonymous, VmaFlags::empty())),
        1 => Just((Shows::Anonymous, VmaFlags::GROWS_DOWN)),
        4 => file().prop_map(|(file, first)| (Shows::Private { file, first }, VmaFlags::empty())),
        4 => file().prop_map(|(file, first)| (Shows::Shared { file, first }, VmaFlags::SHARED)),
        1 => file().prop_map(|(file, first)| {
            (Shows::Shared { file, first }, VmaFlags::SHARED | VmaFlags::NEVER_WRITE)
        }),
    ]
}

fn maps() -> impl Strategy<Value = Op> {
    let places = 0..12_u8;
    (ranges(24), prots(), shows(), places, prop::bool::weighted(0.15)).prop_map(
        |(range, prot, (shows, flags), place, populate)| {
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
        },
    )
}

fn remaps() -> impl Strategy<Value = Op> {
    (ranges(10), ranges(14), 0..6_u8).prop_map(|(old, new, to)| {
        let at = VirtAddr(new.start * PAGE_SIZE);
        let to = match to {
            0 | 1 => RemapTo::InPlace,
            2 => RemapTo::Anywhere,
            _ => RemapTo::Fixed(at),
        };
        Op::Remap { old, pages: new.end - new.start, to }
    })
}

fn file_ops() -> impl Strategy<Value = Op> {
    let file = || 0..FILES.len();
    let place = || (file(), prop_oneof![0..32 * PAGE_SIZE, 590 * PAGE_SIZE..LARGEST - 9000], 1..9000_usize);
    prop_oneof![
        2 => place().prop_map(|(file, at, len)| Op::ReadFile { file, at, len }),
        2 => (place(), any::<u8>())
            .prop_map(|((file, at, len), value)| Op::WriteFile { file, at, len, value }),
        1 => (file(), prop_oneof![0..40 * PAGE_SIZE, 0..LARGEST])
            .prop_map(|(file, size)| Op::Resize { file, size }),
        1 => file().prop_map(Op::Evict),
        1 => file().prop_map(Op::WriteBack),
    ]
}

fn ops() -> impl Strategy<Value = Op> {
    let accesses = prop_oneof![
        10 => (addresses(), any::<bool>()).prop_map(|(at, wide)| Op::Load { at, wide }),
        14 => (addresses(), any::<bool>(), any::<u64>())
            .prop_map(|(at, wide, value)| Op::Store { at, wide, value }),
        2 => addresses().prop_map(Op::Fetch),
    ];
    prop_oneof![
        6 => maps(),
        3 => ranges(10).prop_map(Op::Unmap),
        4 => (ranges(10), prots()).prop_map(|(range, prot)| Op::Protect(range, prot)),
        2 => ranges(10).prop_map(Op::Discard),
        4 => remaps(),
        1 => (0..12 * PAGE_SIZE).prop_map(Op::Brk),
        3 => file_ops(),
        1 => prop_oneof![3 => Just(Op::Leave), 1 => Just(Op::Drain)],
        26 => accesses,
    ]
}

pub fn steps(cpus: usize, most: usize) -> impl Strategy<Value = Vec<Step>> {
    let step = (0..cpus, prop::bool::weighted(0.15), ops());
    prop::collection::vec(step.prop_map(|(cpu, other, op)| Step { cpu, space: other as usize, op }), 1..most)
}

fn policies() -> impl Strategy<Value = Policy> {
    let flags = (any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.2), any::<bool>());
    let around =
        prop_oneof![4 => Just(64 << 10), 1 => Just(4 << 10), 1 => Just(16 << 10), 1 => Just(2 << 20)];
    let top = prop_oneof![Just(NEAR.end + 300), Just(WIDE.end + 40), Just(WIDE.end + 40_000)];
    let limits =
        (prop_oneof![3 => Just(1000), 1 => 4..12_usize], prop_oneof![3 => Just(1 << 40), 1 => 20..2000_u64]);
    (flags, around, top, limits).prop_map(
        |((prefault_young, deny_wx, bottom_up, align), fault_around, top, (max_vmas, max_pages))| Policy {
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
            ..Policy::default()
        },
    )
}

pub fn settings(cpus: usize) -> impl Strategy<Value = Setting> {
    let hardware = (any::<bool>(), any::<bool>()).prop_map(move |(small_tlb, keep_tags)| Hardware {
        cpus,
        small_tlb,
        keep_tags,
    });
    let free = prop_oneof![5 => Just(None), 1 => (12..120_u64).prop_map(Some)];
    (hardware, policies(), any::<bool>(), NEAR, free).prop_map(|(hardware, policy, tracks, heap, free)| {
        // What fault-around maps depends on which pages could be read when memory was short.
        let fault_around = if free.is_some() { PAGE_SIZE } else { policy.fault_around };
        Setting {
            hardware,
            policy: Policy { fault_around, ..policy },
            tracks,
            heap: heap * PAGE_SIZE + 0x123,
            free,
        }
    })
}
