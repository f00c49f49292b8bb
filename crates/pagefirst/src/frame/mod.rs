//! Frames: metadata, counts, owned handles, the buddy allocator and the per-CPU caches before it.
//!
//! | | taken from | given to |
//! |---|---|---|
//! | a small frame | this CPU's cache, refilled by aligned pairs from the buddy allocator | this CPU's cache |
//! | a block of order n | the buddy allocator | the buddy allocator |
//!
//! A frame in a cache or in the allocator has no reference; [`Note::FrameFreed`] marks that moment.

mod anywhere;
mod buddy;
pub(crate) mod bytes;
mod filling;
mod folio;
mod handle;
mod meta;
mod owner;
mod poison;
mod storing;

pub(crate) use anywhere::During;
pub use buddy::{Frames, MAX_ORDER, Region};
pub(crate) use filling::Filling;
pub use folio::head_of;
pub(crate) use folio::{Part, first_of, folio_of, link_tails, split, split_cached};
pub use handle::Frame;
pub(crate) use handle::{WORDS, clear_page, copy_page, words};
pub use meta::{Counts, FrameFlags, FrameMeta};
pub(crate) use owner::{root_of, with_file};
pub(crate) use poison::{Bad, is_bad, mark as mark_bad};
pub(crate) use storing::Storing;

use crate::limit;
use crate::mem::ask;
use crate::platform::{Note, Platform};
use crate::sync::atomic::plain::AtomicU32;
use crate::sync::atomic::{Acquire, Relaxed, Release};
use crate::types::{NoMemory, Pfn};

const BATCH: usize = 32;

/// One CPU's cache of small frames; its lock is all but never contended.
pub(crate) struct FrameCache {
    frames: [Pfn; 2 * BATCH],
    len: usize,
    charged: limit::Stock,
}

impl FrameCache {
    pub const fn new() -> Self {
        FrameCache { frames: [Pfn(0); 2 * BATCH], len: 0, charged: limit::Stock::new() }
    }
    fn pop(&mut self) -> Option<Pfn> {
        self.len = self.len.checked_sub(1)?;
        Some(self.frames[self.len])
    }
    fn push(&mut self, pfn: Pfn) {
        self.frames[self.len] = pfn;
        self.len += 1;
    }
    /// Takes a small frame that nobody refers to.
    #[inline]
    fn free<P: Platform>(&mut self, p: &'static P, pfn: Pfn, meta: &FrameMeta) {
        p.note(Note::FrameFreed(pfn, 0));
        meta.disown();
        if self.len >= self.frames.len() {
            self.spill(p, BATCH);
        }
        self.push(pfn);
    }
    /// Takes a batch from the buddy allocator, in blocks: those first that are no use to anybody who wants more.
    #[cold]
    fn refill<P: Platform>(&mut self, p: &'static P) {
        // Aligned pairs at least: two CPUs never share a line of metadata.
        while let most @ 1.. = (BATCH - self.len).checked_ilog2().unwrap_or(0) as u8
            && let Some((first, order)) = p.vm().frames.allocate_within(p, 1..=most)
        {
            (0..1 << order).rev().for_each(|i| self.push(first.add(i)));
        }
        if self.len == 0
            && let Some(single) = p.vm().frames.allocate(p, 0)
        {
            self.push(single);
        }
    }
    /// Gives frames back to the buddy allocator until no more than `keep` are left.
    fn spill<P: Platform>(&mut self, p: &'static P, keep: usize) {
        if self.len > keep {
            p.vm().frames.free_all(p, &self.frames[keep..self.len]);
            self.len = keep;
        }
    }
}

/// Takes one small frame, owned by the caller alone, contents unspecified. Does not drain anything.
#[cfg_attr(debug_assertions, track_caller)]
pub(crate) fn allocate<P: Platform>(p: &'static P) -> Result<Pfn, NoMemory> {
    ask(p)?;
    let local = p.local(p.enter());
    let pfn = {
        let mut cache = local.frames.lock(p);
        let mut pfn = cache.pop();
        if pfn.is_none() {
            cache.refill(p);
            pfn = cache.pop();
        }
        local.cached_frames.store(cache.len as u32, Relaxed);
        pfn
    };
    p.leave();
    let pfn = pfn.ok_or(NoMemory)?;
    let meta = p.meta(pfn);
    meta.reset(FrameFlags::empty(), 0);
    meta.adopt();
    p.note(Note::FrameAllocated(pfn, 0));
    Ok(pfn)
}

/// Takes a block of 2^order frames, owned by the caller alone, contents unspecified: one folio, whose metadata is its
/// first frame's. Does not drain anything.
#[cfg_attr(debug_assertions, track_caller)]
pub(crate) fn allocate_block<P: Platform>(p: &'static P, order: u8) -> Result<Pfn, NoMemory> {
    if order == 0 {
        return allocate(p);
    }
    ask(p)?;
    let pfn = p.vm().frames.allocate(p, order).ok_or(NoMemory)?;
    p.meta(pfn).adopt();
    p.note(Note::FrameAllocated(pfn, order));
    Ok(pfn)
}

/// Gives back folios whose last reference is gone: all of them with one lock of this CPU's cache.
#[inline(always)]
fn release_all<P: Platform>(p: &'static P, mut gone: impl Iterator<Item = (Pfn, &'static FrameMeta)>) {
    let Some((mut pfn, mut meta)) = gone.next() else { return };
    let local = p.local(p.enter());
    let mut cache = local.frames.lock(p);
    loop {
        let bad = FrameFlags::HURT | FrameFlags::POISON;
        if meta.limit() == 0 && meta.is_single_with(bad, FrameFlags::empty()) {
            cache.free(p, pfn, meta);
        } else {
            release_other(p, &mut cache, pfn, meta);
        }
        match gone.next() {
            Some(next) => (pfn, meta) = next,
            None => break,
        }
    }
    local.cached_frames.store(cache.len as u32, Relaxed);
    drop(cache);
    p.leave();
}

/// The same for a folio of more than one frame, one that is charged, and one in which hardware reported an error.
#[inline(never)]
fn release_other<P: Platform>(p: &'static P, cache: &mut FrameCache, pfn: Pfn, meta: &FrameMeta) {
    let (flags, order) = meta.flags_and_order();
    if meta.limit() != 0 {
        cache.charged.keep(p, meta.limit(), 1 << order);
    }
    if flags.intersects(FrameFlags::HURT | FrameFlags::POISON) {
        poison::release(p, pfn, order);
    } else if order == 0 {
        cache.free(p, pfn, meta);
    } else {
        p.note(Note::FrameFreed(pfn, order));
        folio::unlink_tails(p, pfn, order);
        meta.disown();
        p.vm().frames.free(p, pfn, order);
    }
}

/// Runs `f` on what a CPU has charged in advance.
pub(crate) fn with_stock<P: Platform, R>(
    p: &'static P,
    cpu: usize,
    f: impl FnOnce(&mut limit::Stock) -> R,
) -> R {
    f(&mut p.local(cpu).frames.lock(p).charged)
}

/// Gives back a folio whose last reference is gone.
pub(crate) fn release<P: Platform>(p: &'static P, pfn: Pfn) {
    release_all(p, core::iter::once((pfn, p.meta(pfn))));
}

/// Drops one reference without a lock, in an interrupt too: a frame that has no other is put aside.
pub(crate) fn put_anywhere<P: Platform>(p: &'static P, pfn: Pfn) {
    let meta = p.meta(pfn);
    if !meta.put() {
        return;
    }
    let aside = &p.vm().aside;
    let mut first = aside.load(Relaxed);
    loop {
        // Nobody's page any more, so its index is free for it.
        meta.set_index(u64::from(first));
        match aside.compare_exchange_weak(first, pfn.0, Release, Relaxed) {
            Ok(_) => return,
            Err(newer) => first = newer,
        }
    }
}

/// Frees the frames that were put aside; returns how many.
pub(crate) fn free_aside<P: Platform>(p: &'static P) -> usize {
    let aside = &p.vm().aside;
    if aside.load(Relaxed) == 0 {
        return 0;
    }
    let mut at = aside.swap(0, Acquire);
    let mut freed = 0;
    while at != 0 {
        let pfn = Pfn(at);
        at = p.meta(pfn).index() as u32;
        release(p, pfn);
        freed += 1;
    }
    freed
}

/// Drops one mapping of each of these folios and its reference, and frees those that have no other. A folio that comes
/// several times in a row is counted once.
pub(crate) fn unmap_all<P: Platform>(p: &'static P, mut folios: &[Pfn]) {
    let gone = move || {
        while let [folio, more @ ..] = folios {
            let meta = p.meta(*folio);
            let is_last = if more.first() == Some(folio) {
                let n = run_of(folios);
                folios = &folios[n..];
                meta.unmap_many(n as u32)
            } else {
                folios = more;
                meta.unmap_many(1)
            };
            if is_last {
                return Some((*folio, meta));
            }
        }
        None
    };
    release_all(p, core::iter::from_fn(gone));
}

/// How often the first of these folios comes before another does.
#[cold]
fn run_of(folios: &[Pfn]) -> usize {
    folios.iter().take_while(|folio| **folio == folios[0]).count()
}

/// Drops one reference of each of these frames, and frees those that have no other.
pub(crate) fn put_all<P: Platform>(p: &'static P, frames: &[Pfn]) {
    release_all(p, frames.iter().map(|pfn| (*pfn, p.meta(*pfn))).filter(|(_, meta)| meta.put()));
}

/// Drops so many mappings of a folio and their references, and frees it if it has no other.
pub(crate) fn unmap_many<P: Platform>(p: &'static P, folio: Pfn, n: u32) {
    if p.meta(folio).unmap_many(n) {
        release(p, folio);
    }
}

/// Drops one mapping of a folio and its reference, and frees it if it has no other.
pub(crate) fn unmap<P: Platform>(p: &'static P, folio: Pfn) {
    unmap_many(p, folio, 1);
}

/// Moves what every CPU's cache holds to the buddy allocator; returns the number of frames moved.
pub(crate) fn drain<P: Platform>(p: &'static P) -> usize {
    let mut moved = 0;
    for cpu in 0..p.cpus() {
        let local = p.local(cpu);
        let mut cache = local.frames.lock(p);
        moved += cache.len;
        cache.spill(p, 0);
        local.cached_frames.store(0, Relaxed);
    }
    moved
}

/// Frames held in per-CPU caches, as last stored by their CPUs.
pub(crate) fn cached<P: Platform>(p: &'static P) -> u64 {
    (0..p.cpus()).map(|c| p.local(c).cached_frames.load(Relaxed) as u64).sum()
}

/// A counter of frames in one CPU's cache, readable without its lock.
pub(crate) type Cached = AtomicU32;
