//! What bytes stand for: a setting, and steps of five bytes each, so that a change to one leaves the others alone.

use super::model::{Shows, WORDS};
use crate::oracle::plan::Hardware;
use pagefirst::file::ShmemHuge;
use pagefirst::policy::{FaultAround, HugePolicy, Policy};
use pagefirst::space::Advice;
use pagefirst::types::{PAGE_SIZE, Prot, VirtAddr};
use std::ops::Range;

/// Where things are mapped, in pages: across the border of two leaf tables, and where huge pages fit.
pub const NEAR: Range<u64> = (1 << 18) - 8..(1 << 18) + 8;
pub const WIDE: Range<u64> = 3 << 18..(3 << 18) + 2 * HUGE;
pub const HUGE: u64 = 512;

/// A file on a disk, memory, and a file on a disk with folios of several pages.
pub const FILES: usize = 3;
pub const MEMORY: usize = 1;
/// Pages that a file has at first, and at most.
pub const SIZES: [u64; FILES] = [20, 2 * HUGE + 40, 50];
pub const LARGEST: [u64; FILES] = [40, 2 * HUGE + 100, 80];

const SETTING: usize = 4;
const STEP: usize = 5;
/// The most steps that are taken, so that no input takes long.
const MOST: usize = 60;

#[derive(Debug)]
pub struct Setting {
    /// The number of the format.
    pub format: u8,
    pub hardware: Hardware,
    pub policy: Policy,
    pub shmem: ShmemHuge,
    /// Pages that the spaces may have among them.
    pub limit: Option<u64>,
    /// Whether hardware may report errors: frames are lost to the machine.
    pub may_poison: bool,
    /// Of the two files on disks.
    pub late: [bool; 2],
    pub late_writes: bool,
    pub tracks: [bool; 2],
    pub read_ahead: bool,
    /// Which process ends first in the end.
    pub first_out: usize,
    /// What is mapped at first.
    pub first: [Op; 4],
}

#[derive(Debug)]
pub struct Step {
    /// Which of the processes that there are.
    pub space: usize,
    /// So many steps come between, if this one has to wait.
    pub wait: u8,
    pub op: Op,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    Map {
        pages: Range<u64>,
        prot: Prot,
        shows: Shows,
    },
    Unmap(Range<u64>),
    Protect(Range<u64>, Prot),
    Discard(Range<u64>),
    Remap {
        from: Range<u64>,
        to: u64,
    },
    Advise(Range<u64>, Advice),
    Access {
        page: u64,
        word: usize,
        store: Option<u64>,
        by_kernel: bool,
    },
    Fork,
    Exit,
    Resize {
        file: usize,
        size: u64,
    },
    Punch {
        file: usize,
        bytes: Range<u64>,
    },
    ReadFile {
        file: usize,
        index: u64,
        word: usize,
    },
    WriteFile {
        file: usize,
        index: u64,
        word: usize,
        value: u64,
    },
    Evict(usize),
    WriteBack(usize),
    /// One of the reads and writes that have begun ends, or fails.
    Finish {
        file: usize,
        nth: u8,
        fails: bool,
    },
    /// A page can be neither read nor stored any more, or again.
    Fail {
        file: usize,
        index: u64,
        fails: bool,
    },
    Pin {
        pages: Range<u64>,
        write: bool,
    },
    Unpin(u8),
    /// A device writes to what is pinned.
    Device {
        nth: u8,
        page: u8,
        word: usize,
        value: u64,
    },
    Poison(u64),
    Limit(u64),
    Drain,
    Leave,
}

pub fn setting(bytes: &[u8]) -> (Setting, &[u8]) {
    let (head, rest) = bytes.split_at(bytes.len().min(SETTING));
    let mut all = [0; SETTING];
    all[..head.len()].copy_from_slice(head);
    let [machine, policy, files, more] = all;
    let has = |byte: u8, bit: u8| byte & (1 << bit) != 0;
    let around = match policy >> 4 & 3 {
        0 => FaultAround::fixed(PAGE_SIZE),
        1 => FaultAround::adaptive(16 << 10, 256 << 10),
        _ => None,
    };
    let setting = Setting {
        format: machine & 3,
        hardware: Hardware { cpus: 1, is_harsh: has(machine, 2), keep_tags: has(machine, 3) },
        policy: Policy {
            huge: [HugePolicy::Advise, HugePolicy::Always, HugePolicy::Never, HugePolicy::Always]
                [usize::from(policy & 3)],
            fault_around: around.unwrap_or(Policy::default().fault_around),
            prefault_young: has(policy, 6),
            ..Policy::default()
        },
        shmem: [ShmemHuge::Always, ShmemHuge::WithinSize, ShmemHuge::Advise, ShmemHuge::Never]
            [usize::from(policy >> 2 & 3)],
        limit: has(policy, 7).then_some(8 * u64::from(more >> 2)),
        may_poison: machine >> 4 & 3 == 3,
        late: [has(files, 0), has(files, 1)],
        late_writes: has(files, 2),
        tracks: [!has(files, 3), !has(files, 4)],
        read_ahead: has(files, 5),
        first_out: usize::from(more & 3),
        first: [
            first(NEAR.start..1 << 18, Shows::Anonymous),
            first(1 << 18..NEAR.end, of(if has(files, 6) { 0 } else { 2 }, 0, !has(files, 7))),
            first(
                WIDE.start..WIDE.start + HUGE,
                if has(machine, 6) { of(MEMORY, 0, false) } else { Shows::Anonymous },
            ),
            first(WIDE.start + HUGE..WIDE.end, of(MEMORY, HUGE, !has(machine, 7))),
        ],
    };
    (setting, rest)
}

fn of(file: usize, index: u64, shared: bool) -> Shows {
    Shows::File { file, index, shared }
}
fn first(pages: Range<u64>, shows: Shows) -> Op {
    Op::Map { pages, prot: Prot::READ | Prot::WRITE, shows }
}

pub fn steps(bytes: &[u8]) -> Vec<Step> {
    bytes.chunks_exact(STEP).take(MOST).map(step).collect()
}

/// A page where things are mapped: most of it happens on few.
fn page(byte: u8) -> u64 {
    const ODD: [u64; 8] = [0, 1, 2, 100, 255, 256, 510, 511];
    match byte {
        0..176 => NEAR.start + u64::from(byte) % (NEAR.end - NEAR.start),
        _ => WIDE.start + HUGE * u64::from(byte & 1) + ODD[usize::from(byte >> 1 & 7)],
    }
}
/// Pages from there on: some, or all that a huge page spans, or up to the end.
fn pages(start: u8, len: u8) -> Range<u64> {
    let start = page(start);
    let region = if NEAR.contains(&start) { NEAR } else { WIDE };
    match len {
        0..160 => start..(start + 1 + u64::from(len) % 8).min(region.end),
        160..208 => {
            let span = start / HUGE * HUGE;
            span.max(region.start)..(span + HUGE).min(region.end)
        }
        208..232 => start..region.end,
        _ => region,
    }
}
/// Fewer of them, mostly.
fn some(start: u8, len: u8) -> Range<u64> {
    pages(start, if len < 240 { len % 4 } else { len - 80 })
}
fn prot(byte: u8) -> Prot {
    match byte % 16 {
        0 => Prot::empty(),
        1..4 => Prot::READ,
        _ => Prot::READ | Prot::WRITE,
    }
}
fn shows(byte: u8) -> Shows {
    let first = [0, 0, 3, 16, HUGE, HUGE, 8, 1][usize::from(byte >> 5)];
    let of = |file, shared| of(file, first, shared);
    match byte & 15 {
        0..6 => Shows::Anonymous,
        6 => of(0, false),
        7 | 8 => of(0, true),
        9 | 10 => of(MEMORY, false),
        11..14 => of(MEMORY, true),
        14 => of(2, false),
        _ => of(2, true),
    }
}
fn advice(byte: u8) -> Advice {
    [
        Advice::Huge,
        Advice::NoHuge,
        Advice::DontFork,
        Advice::DoFork,
        Advice::WipeOnFork,
        Advice::KeepOnFork,
        Advice::Sequential,
        Advice::WillNeed,
    ][usize::from(byte % 8)]
}
fn file(byte: u8) -> usize {
    usize::from(byte) % FILES
}
/// A page of a file.
fn index(file: usize, byte: u8) -> u64 {
    let first = if file == MEMORY && byte >= 128 { HUGE - 8 } else { 0 };
    first + u64::from(byte) % 64 % LARGEST[file]
}
/// A byte of a file, where a word begins.
fn place(file: usize, page: u8, within: u8) -> u64 {
    let whole = [0, 0, 8, 2048, 2056, PAGE_SIZE - 8][usize::from(within) % 6];
    (index(file, page) * PAGE_SIZE + whole).min(LARGEST[file] * PAGE_SIZE)
}

fn step(bytes: &[u8]) -> Step {
    let &[kind, who, a, b, c] = bytes else { unreachable!("a step has {STEP} bytes") };
    let (word, value) = (usize::from(b) % WORDS.len(), u64::from(c) * 0x0101_0101_0101_0101);
    let of = file(a >> 6);
    let op = match kind {
        0..36 => Op::Map { pages: pages(a, b), prot: prot(b >> 1 ^ c), shows: shows(c) },
        36..46 => Op::Unmap(some(a, b)),
        46..58 => Op::Protect(some(a, b), prot(c)),
        58..66 => Op::Discard(some(a, b)),
        66..76 => Op::Remap { from: some(a, b), to: page(c) },
        76..88 => Op::Advise(pages(a, b), advice(c)),
        88..120 => Op::Access { page: page(a), word, store: None, by_kernel: b & 0x80 != 0 },
        120..168 => Op::Access { page: page(a), word, store: Some(value), by_kernel: b & 0x80 != 0 },
        168..180 => Op::Fork,
        180..188 => Op::Exit,
        188..196 => Op::Resize { file: of, size: place(of, b, c) },
        196..204 => {
            let (start, end) = (place(of, b, a), place(of, b.wrapping_add(c >> 4), c));
            Op::Punch { file: of, bytes: start..end }
        }
        204..207 => Op::ReadFile { file: of, index: index(of, b), word: usize::from(c) % WORDS.len() },
        207..213 => {
            Op::WriteFile { file: of, index: index(of, b), word: usize::from(a) % WORDS.len(), value }
        }
        213..218 => Op::Evict(of),
        218..224 => Op::WriteBack(of),
        224..230 => Op::Finish { file: of, nth: b, fails: c & 3 == 3 },
        230..232 => Op::Fail { file: of, index: index(of, b), fails: c & 1 != 0 },
        232..239 => Op::Pin { pages: pages(a, b), write: c & 1 != 0 },
        239..243 => Op::Unpin(a),
        243..248 => Op::Device { nth: a, page: b, word: usize::from(who >> 5) % WORDS.len(), value },
        248..251 => Op::Poison(page(a)),
        251..253 => Op::Limit(8 * u64::from(a)),
        253 => Op::Drain,
        _ => Op::Leave,
    };
    Step { space: usize::from(who & 3), wait: who >> 2 & 7, op }
}

/// The address of a page.
pub fn address(page: u64) -> VirtAddr {
    VirtAddr(page * PAGE_SIZE)
}
