//! The buddy allocator: free blocks of 2^order frames, merged with their buddies when they come back.
//!
//! Lists are threaded through the metadata of the blocks' first frames (link: next, index: previous; frame 0 is
//! never free and ends a list). One spin lock; the per-CPU caches keep it off the fault path.

use super::{FrameFlags, FrameMeta, first_of};
use crate::platform::Platform;
use crate::sync::atomic::Relaxed;
use crate::sync::atomic::plain::AtomicU64;
use crate::sync::{Spin, held};
use crate::types::{PAGE_SIZE, Pfn};
use core::ops::RangeInclusive;

/// The largest block: 2^18 frames, 1 GiB.
pub const MAX_ORDER: u8 = 18;
const ORDERS: usize = MAX_ORDER as usize + 1;
const MAX_REGIONS: usize = 16;

/// A range of memory given to the library.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// The first frame; an even one, if two CPUs are never to write to one cache line of metadata: CPUs take frames in
    /// aligned pairs, and a line has the metadata of two.
    pub first: Pfn,
    /// The number of frames.
    pub frames: u32,
}

impl Region {
    /// The number of frames, from the region's first on, that hold the region's metadata: entry `i` of that array
    /// describes frame `first + i`. The platform's `meta` answers from there.
    pub const fn meta_frames(self) -> u32 {
        (self.frames as u64 * size_of::<FrameMeta>() as u64).div_ceil(PAGE_SIZE) as u32
    }
    fn contains(self, pfn: Pfn) -> bool {
        pfn.0 >= self.first.0 && pfn.0 - self.first.0 < self.frames
    }
}

struct Lists {
    heads: [Pfn; ORDERS],
    regions: [Region; MAX_REGIONS],
    region_count: usize,
}

/// All frames of the machine.
pub struct Frames<P: Platform> {
    lists: Spin<P, Lists>,
    free: AtomicU64,
    total: AtomicU64,
    bad: AtomicU64,
}

impl<P: Platform> Frames<P> {
    pub(crate) fn new() -> Self {
        let none = Region { first: Pfn(0), frames: 0 };
        Frames {
            lists: Spin::ranked(
                held::FRAMES,
                Lists { heads: [Pfn(0); ORDERS], regions: [none; MAX_REGIONS], region_count: 0 },
            ),
            free: AtomicU64::new(0),
            total: AtomicU64::new(0),
            bad: AtomicU64::new(0),
        }
    }

    /// Takes a region over. Its metadata must be zeroed and readable through `P::meta`.
    ///
    /// # Panics
    /// When more than 16 regions are given, or they overlap: that is a mistake at boot.
    pub(crate) fn add(&self, p: &'static P, region: Region) {
        {
            let mut l = self.lists.lock(p);
            assert!(l.region_count < MAX_REGIONS, "more than {MAX_REGIONS} regions of memory");
            let overlaps = |r: &Region| r.contains(region.first) || region.contains(r.first);
            assert!(!l.regions[..l.region_count].iter().any(overlaps), "regions of memory overlap");
            let n = l.region_count;
            l.regions[n] = region;
            l.region_count += 1;
        }
        // The last frame that has a number is never used: what ends with it would end at a number that is none.
        let end = region.first.0.saturating_add(region.frames);
        let first = region.first.0.saturating_add(region.meta_frames());
        let first = first.max(1).min(end); // frame 0 is the null of every list
        self.total.fetch_add((end - first) as u64, Relaxed);
        self.free.fetch_add((end - first) as u64, Relaxed);
        self.lists.lock(p).free_run(p, Pfn(first), end - first);
    }

    /// A block of 2^order frames, its contents unspecified; no counts are set.
    pub(crate) fn allocate(&self, p: &'static P, order: u8) -> Option<Pfn> {
        self.allocate_within(p, order..=order).map(|(pfn, _)| pfn)
    }
    /// A block of one of these orders, and its order: the smallest block that is free and large enough, whole if it is
    /// not too large.
    pub(crate) fn allocate_within(&self, p: &'static P, orders: RangeInclusive<u8>) -> Option<(Pfn, u8)> {
        let mut l = self.lists.lock(p);
        let found = (*orders.start()..=MAX_ORDER).find(|&o| l.heads[o as usize].0 != 0)?;
        let order = found.min(*orders.end());
        let pfn = l.heads[found as usize];
        l.unlink(p, pfn, found);
        for o in (order..found).rev() {
            l.push(p, pfn.add(1 << o), o);
        }
        p.meta(pfn).reset(FrameFlags::empty(), order);
        self.free.fetch_sub(1 << order, Relaxed);
        Some((pfn, order))
    }

    /// Gives a block back.
    pub(crate) fn free(&self, p: &'static P, pfn: Pfn, order: u8) {
        self.free.fetch_add(1 << order, Relaxed);
        self.lists.lock(p).free(p, pfn, order);
    }
    /// Gives small frames back; those that lie side by side, one after the other in the slice, as blocks.
    pub(crate) fn free_all(&self, p: &'static P, frames: &[Pfn]) {
        self.free.fetch_add(frames.len() as u64, Relaxed);
        let mut l = self.lists.lock(p);
        for run in frames.chunk_by(|a, b| b.0 == a.0 + 1) {
            l.free_run(p, run[0], run.len() as u32);
        }
    }

    /// Whether the frame is one of those taken over, and no metadata.
    pub(super) fn has(&self, p: &'static P, pfn: Pfn) -> bool {
        let l = self.lists.lock(p);
        let is_frame = |r: &Region| r.contains(pfn) && pfn.0 - r.first.0 >= r.meta_frames();
        pfn.0 != 0 && l.regions[..l.region_count].iter().any(is_frame)
    }
    /// Takes a bad frame out for good, if it is free.
    pub(super) fn take_out(&self, p: &'static P, pfn: Pfn) -> bool {
        let mut l = self.lists.lock(p);
        let Some(order) = (0..=MAX_ORDER).find(|order| l.is_free_block(p, pfn, *order)) else { return false };
        let mut first = first_of(pfn, order);
        l.unlink(p, first, order);
        for o in (0..order).rev() {
            let (low, high) = (first, first.add(1 << o));
            let good;
            (first, good) = if pfn < high { (low, high) } else { (high, low) };
            l.push(p, good, o);
        }
        p.meta(pfn).reset(FrameFlags::POISON, 0);
        self.free.fetch_sub(1, Relaxed);
        self.lose();
        true
    }
    /// A bad frame is not given back.
    pub(super) fn lose(&self) {
        self.total.fetch_sub(1, Relaxed);
        self.bad.fetch_add(1, Relaxed);
    }
    /// Frames in which hardware reported an error and that are not used any more.
    pub fn bad_frames(&self) -> u64 {
        self.bad.load(Relaxed)
    }

    /// Frames in the allocator now, per-CPU caches not included.
    pub fn free_frames(&self) -> u64 {
        self.free.load(Relaxed)
    }
    /// Frames in all, metadata and bad ones not included.
    pub fn total_frames(&self) -> u64 {
        self.total.load(Relaxed)
    }
}

impl Lists {
    fn has(&self, pfn: Pfn) -> bool {
        self.regions[..self.region_count].iter().any(|r| r.contains(pfn))
    }
    /// Whether the frame is in a free block of this order.
    fn is_free_block<P: Platform>(&self, p: &'static P, pfn: Pfn, order: u8) -> bool {
        let first = first_of(pfn, order);
        self.has(first) && p.meta(first).is_free_block(order)
    }
    /// Gives back `frames` frames from `first` on, in as few blocks as there are.
    fn free_run<P: Platform>(&mut self, p: &'static P, first: Pfn, frames: u32) {
        let (mut at, end) = (first.0, first.0 + frames);
        while at < end {
            let order = at.trailing_zeros().min((end - at).ilog2()).min(MAX_ORDER as u32) as u8;
            self.free(p, Pfn(at), order);
            at += 1 << order;
        }
    }
    fn free<P: Platform>(&mut self, p: &'static P, mut pfn: Pfn, mut order: u8) {
        while order < MAX_ORDER {
            let buddy = Pfn(pfn.0 ^ (1 << order));
            if !self.has(buddy) {
                break;
            }
            let meta = p.meta(buddy);
            if !meta.is_free_block(order) {
                break;
            }
            self.unlink(p, buddy, order);
            meta.reset(FrameFlags::empty(), 0);
            pfn = pfn.min(buddy);
            order += 1;
        }
        self.push(p, pfn, order);
    }
    fn push<P: Platform>(&mut self, p: &'static P, pfn: Pfn, order: u8) {
        let head = &mut self.heads[order as usize];
        let meta = p.meta(pfn);
        meta.set_link(head.0);
        meta.set_index(0);
        if head.0 != 0 {
            p.meta(*head).set_index(pfn.0 as u64);
        }
        *head = pfn;
        meta.reset(FrameFlags::FREE, order);
    }
    fn unlink<P: Platform>(&mut self, p: &'static P, pfn: Pfn, order: u8) {
        let (next, prev) = (p.meta(pfn).link(), p.meta(pfn).index() as u32);
        match prev {
            0 => self.heads[order as usize] = Pfn(next),
            prev => p.meta(Pfn(prev)).set_link(next),
        }
        if next != 0 {
            p.meta(Pfn(next)).set_index(prev as u64);
        }
    }
}
