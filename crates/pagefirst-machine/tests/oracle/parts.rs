//! What CPUs do that are at work at the same time: each in a part of the space that is its own, and all in some pages.

use super::calls::NewMap;
use super::plan::{FAR, HOT, NEAR, Op, Step, WIDE, beginnings, ops, region_end};
use pagefirst::space::{Place, RemapTo, VmaFlags};
use pagefirst::types::{PAGE_SIZE, VirtAddr};
use proptest::prelude::*;
use std::ops::Range;

/// The part of the regions that is one CPU's, when several are at work: as large as the regions, so that a step for
/// these becomes one for the part. The parts share leaf tables, and mappings of neighbours may become one.
#[derive(Clone, Copy, Debug)]
pub struct Part(pub u64);

impl Part {
    fn page(self, page: u64) -> u64 {
        let by =
            [(NEAR, 50), (FAR, 60), (WIDE, 4 * 512)].into_iter().find(|(region, _)| region.contains(&page));
        match by {
            Some((_, step)) => page + self.0 * step,
            None => self.page(HOT.start),
        }
    }
    fn range(self, range: &Range<u64>) -> Range<u64> {
        self.page(range.start)..self.page(range.end - 1) + 1
    }
    fn at(self, at: u64, wide: bool) -> (u64, bool) {
        let (page, place) = (at / PAGE_SIZE, at % PAGE_SIZE);
        // The page behind the last one is somebody else's.
        (self.page(page) * PAGE_SIZE + place, wide && page + 1 < region_end(page))
    }
    /// The step as one within this part; `None` for what concerns all.
    pub fn step(self, step: &Step) -> Option<Step> {
        let op = match step.op.clone() {
            Op::Map { map, populate } => {
                let at = match map.place {
                    Place::Fixed(at) | Place::FixedNoReplace(at) | Place::Hint(at) => at,
                    Place::Anywhere => return None,
                };
                let start = self.page(at.0 / PAGE_SIZE);
                let at = VirtAddr(start * PAGE_SIZE);
                let place = match map.place {
                    Place::FixedNoReplace(_) => Place::FixedNoReplace(at),
                    _ => Place::Fixed(at),
                };
                // A stack keeps a gap free, and that may be another's.
                let flags = map.flags - VmaFlags::GROWS_DOWN;
                Op::Map { map: NewMap { place, flags, ..map }, populate }
            }
            Op::Unmap(range) => Op::Unmap(self.range(&range)),
            Op::Protect(range, prot) => Op::Protect(self.range(&range), prot),
            Op::Discard(range) => Op::Discard(self.range(&range)),
            Op::Advise(range, advice) => Op::Advise(self.range(&range), advice),
            Op::Remap { old, pages, to } => {
                let room = region_end(old.start) - old.start;
                let (pages, to) = match to {
                    RemapTo::Fixed(at) => {
                        (pages, RemapTo::Fixed(VirtAddr(self.page(at.0 / PAGE_SIZE) * PAGE_SIZE)))
                    }
                    RemapTo::InPlace | RemapTo::Anywhere => (pages.min(room), RemapTo::InPlace),
                };
                Op::Remap { old: self.range(&old), pages, to }
            }
            Op::Brk(_) if self.0 > 0 => return None,
            Op::Fork { .. } => return None,
            Op::Load { at, wide, by } => {
                let (at, wide) = self.at(at, wide);
                Op::Load { at, wide, by }
            }
            Op::Store { at, wide, by, value } => {
                let (at, wide) = self.at(at, wide);
                Op::Store { at, wide, by, value }
            }
            Op::Fetch(at) => Op::Fetch(self.at(at, false).0),
            Op::Exchange { at, hits, value } => Op::Exchange { at: self.at(at, false).0, hits, value },
            op @ (Op::Brk(_)
            | Op::ReadFile { .. }
            | Op::WriteFile { .. }
            | Op::Resize { .. }
            | Op::Punch { .. }
            | Op::Evict(_)
            | Op::WriteBack(_)
            | Op::Leave
            | Op::Drain) => op,
        };
        Some(Step { cpu: 0, space: 0, op })
    }
}

/// What a CPU does to pages that are everybody's; pages are counted within them.
#[derive(Clone, Debug)]
pub enum Common {
    Store(u64),
    Load(u64),
    Discard(Range<u64>),
    Unmap(Range<u64>),
    Map(Range<u64>, bool),
    Protect(Range<u64>, bool),
    /// The child that there is ends, or there is one from now on.
    Fork,
}

/// The pages that are everybody's: beside the parts, under the same leaf table.
pub const COMMON: Range<u64> = (1 << 18) + 300..(1 << 18) + 316;

fn common() -> impl Strategy<Value = Common> {
    let pages = || 0..COMMON.end - COMMON.start;
    let range =
        || (pages(), 1..6_u64).prop_map(|(start, n)| start..(start + n).min(COMMON.end - COMMON.start));
    prop_oneof![
        8 => pages().prop_map(Common::Store),
        8 => pages().prop_map(Common::Load),
        2 => range().prop_map(Common::Discard),
        1 => range().prop_map(Common::Unmap),
        2 => (range(), any::<bool>()).prop_map(|(range, file)| Common::Map(range, file)),
        2 => (range(), any::<bool>()).prop_map(|(range, write)| Common::Protect(range, write)),
        1 => Just(Common::Fork),
    ]
}

/// For each CPU, steps in its part, each followed by one in what is common.
pub fn steps_together(cpus: usize, most: usize) -> impl Strategy<Value = Vec<Vec<(Step, Common)>>> {
    let beginning = beginnings()
        .prop_map(|ops| ops.into_iter().map(|op| Step { cpu: 0, space: 0, op }).collect::<Vec<_>>());
    let step = ops().prop_map(|op| Step { cpu: 0, space: 0, op });
    let one = (beginning, prop::collection::vec((step, common()), 1..most)).prop_map(|(begin, steps)| {
        let begin = begin.into_iter().map(|step| (step, Common::Load(0)));
        begin.chain(steps).collect()
    });
    prop::collection::vec(one, cpus)
}
