//! The 32 bytes that describe a frame.
//!
//! References and map counts share one atomic word, so that taking a mapping is one read-modify-write. Both
//! saturate: a count that reaches its limit is never moved again, and the frame is never freed.

use crate::sync::atomic::{AcqRel, AtomicPtr, AtomicU32, AtomicU64, Relaxed};
use crate::types::Pfn;
use core::sync::atomic::Ordering;

bitflags::bitflags! {
    /// What a frame is used for, and its state.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct FrameFlags: u32 {
        /// In the buddy allocator, the first frame of a free block.
        const FREE = 1;
        /// Private memory that belongs to no file.
        const ANON = 1 << 1;
        /// The anonymous page is reachable through one mapping alone: a write may reuse it whatever its counts.
        const EXCLUSIVE = 1 << 2;
        /// A page of a file's cache.
        const FILE = 1 << 3;
        /// Being read: contents not valid yet.
        const FILLING = 1 << 4;
        /// Contents valid.
        const UP_TO_DATE = 1 << 5;
        /// Written since it was last stored.
        const DIRTY = 1 << 6;
        /// On its way out of the cache: no new mapping.
        const GOING = 1 << 7;
        /// Hardware reported a memory error.
        const POISON = 1 << 8;
        /// Reading it failed; the next fault that meets it reports it and takes it out.
        const FAILED = 1 << 9;
        /// The huge zero page: all zeros, never written, in no resident set.
        const ZERO = 1 << 10;
        /// Behind the head of a folio: everything but this is in the head's metadata.
        const TAIL = 1 << 11;
    }
}

const REF: u64 = 1;
const MAP: u64 = 1 << 32;
const LIMIT: u32 = 1 << 31;
/// Set in a word whose references or mappings have reached the limit.
const SATURATED: u64 = LIMIT as u64 * (REF + MAP);

/// Metadata of one frame: 32 bytes.
#[derive(Debug)]
#[repr(C)]
pub struct FrameMeta {
    counts: AtomicU64,
    owner: AtomicPtr<()>,
    index: AtomicU64,
    flags: AtomicU32,
    link: AtomicU32,
}

#[cfg(all(not(loom), target_pointer_width = "64"))]
const _: () = assert!(size_of::<FrameMeta>() == 32);

/// References and mappings of a frame at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Counts {
    /// References, mappings included.
    pub refs: u32,
    /// Mappings.
    pub maps: u32,
}

const fn counts(word: u64) -> Counts {
    Counts { refs: word as u32, maps: (word >> 32) as u32 }
}

impl Default for FrameMeta {
    fn default() -> Self {
        FrameMeta {
            counts: AtomicU64::new(0),
            owner: AtomicPtr::new(core::ptr::null_mut()),
            index: AtomicU64::new(0),
            flags: AtomicU32::new(0),
            link: AtomicU32::new(0),
        }
    }
}

impl FrameMeta {
    /// References and mappings now.
    pub fn counts(&self) -> Counts {
        counts(self.counts.load(Relaxed))
    }
    /// The map count, read so that it is ordered against those who raise it before they validate (protocol 1).
    pub fn maps_ordered(&self) -> u32 {
        counts(self.counts.fetch_add(0, AcqRel)).maps
    }
    /// Makes the caller the only owner of a frame nobody refers to.
    pub(crate) fn adopt(&self) {
        debug_assert_eq!(self.counts.load(Relaxed), 0, "a frame handed out twice");
        self.set_link(0);
        // Release: who takes a reference sees the metadata of this life, not of the one before.
        self.counts.store(REF, Ordering::Release);
    }
    /// Takes `delta` (REF, or REF + MAP) unless the frame is free.
    #[inline]
    fn take(&self, delta: u64) -> bool {
        let mut now = self.counts.load(Relaxed);
        loop {
            if counts(now).refs == 0 {
                return false;
            }
            // Saturated: stays as it is, for ever.
            if now & SATURATED != 0 {
                return true;
            }
            match self.counts.compare_exchange_weak(now, now + delta, AcqRel, Relaxed) {
                Ok(_) => return true,
                Err(newer) => now = newer,
            }
        }
    }
    /// Gives back `delta`; true when that was the last reference.
    #[inline]
    fn give(&self, delta: u64) -> bool {
        let mut now = self.counts.load(Relaxed);
        loop {
            let c = counts(now);
            if now & SATURATED != 0 {
                return false;
            }
            debug_assert!(c.refs > 0, "a reference given back that nobody held");
            debug_assert!(delta < MAP || c.maps > 0, "a mapping given back that nobody held");
            match self.counts.compare_exchange_weak(now, now - delta, AcqRel, Relaxed) {
                Ok(_) => return c.refs == 1,
                Err(newer) => now = newer,
            }
        }
    }
    /// Takes the only reference away, if nothing else refers to the frame and nothing maps it: from here until
    /// [`thaw`](Self::thaw) nobody can take another.
    #[must_use]
    pub(crate) fn freeze(&self) -> bool {
        self.counts.compare_exchange(REF, 0, AcqRel, Relaxed).is_ok()
    }
    /// Gives the only reference back to who called [`freeze`](Self::freeze).
    pub(crate) fn thaw(&self) {
        debug_assert_eq!(self.counts.load(Relaxed), 0);
        self.counts.store(REF, Ordering::Release);
    }
    /// The same for a page whose only reference is its only mapping's.
    #[must_use]
    pub(crate) fn freeze_mapped(&self) -> bool {
        self.counts.compare_exchange(REF + MAP, 0, AcqRel, Relaxed).is_ok()
    }
    /// One mapping and its reference, for a frame nobody refers to.
    pub(crate) fn thaw_mapped(&self) {
        debug_assert_eq!(self.counts.load(Relaxed), 0);
        self.counts.store(REF + MAP, Ordering::Release);
    }
    /// Takes a reference unless the frame is free.
    pub(crate) fn try_get(&self) -> bool {
        self.take(REF)
    }
    /// Gives a reference back; true when it was the last, and the caller frees the frame.
    #[must_use]
    pub(crate) fn put(&self) -> bool {
        self.give(REF)
    }
    /// Takes a reference and a mapping unless the frame is free.
    pub(crate) fn try_map(&self) -> bool {
        self.take(REF + MAP)
    }
    /// Takes so many references and mappings more of a folio that the caller has a mapping of.
    pub(crate) fn map_more(&self, n: u32) {
        let taken = self.take((REF + MAP) * n as u64);
        debug_assert!(taken, "mapped and free");
    }
    /// Counts the first mapping of a page that the caller owns alone, whose reference becomes the mapping's. Others may
    /// have taken it for the page it was before, and will let go of it: their counts are few.
    #[inline]
    pub(crate) fn map_first(&self) {
        self.counts.fetch_add(MAP, AcqRel);
    }
    /// Turns the mapping count up by one for a reference the caller already holds and hands to the mapping.
    pub(crate) fn map_held(&self) {
        self.take(MAP);
    }
    /// Gives a mapping and its reference back; true when it was the last reference.
    #[must_use]
    pub(crate) fn unmap(&self) -> bool {
        self.give(REF + MAP)
    }

    /// The flags now.
    pub fn flags(&self) -> FrameFlags {
        FrameFlags::from_bits_retain(self.flags.load(Ordering::Acquire) & 0xffff)
    }
    pub(crate) fn set(&self, on: FrameFlags) {
        self.flags.fetch_or(on.bits(), AcqRel);
    }
    pub(crate) fn clear(&self, off: FrameFlags) {
        self.flags.fetch_and(!off.bits(), AcqRel);
    }
    /// Stores flags and order whole; for a frame nobody else looks at.
    pub(crate) fn reset(&self, flags: FrameFlags, order: u8) {
        self.flags.store(flags.bits() | (order as u32) << 16, Ordering::Release);
    }
    /// Whether this is the first frame of a free block of 2^order frames; for the allocator.
    pub(super) fn is_free_block(&self, order: u8) -> bool {
        self.flags.load(Relaxed) == FrameFlags::FREE.bits() | (order as u32) << 16
    }
    pub(crate) fn order(&self) -> u8 {
        (self.flags.load(Relaxed) >> 16) as u8
    }
    /// To whom the frame belongs: a file's cache, a table's record; null for nobody.
    pub(crate) fn owner(&self) -> *mut () {
        self.owner.load(Ordering::Acquire)
    }
    pub(crate) fn set_owner(&self, owner: *mut ()) {
        self.owner.store(owner, Ordering::Release);
    }
    /// The page's index in its owner.
    pub(crate) fn index(&self) -> u64 {
        self.index.load(Relaxed)
    }
    pub(crate) fn set_index(&self, index: u64) {
        self.index.store(index, Relaxed);
    }
    /// The head of the folio that this frame is a tail of; `None` if it is none.
    #[inline]
    pub fn head(&self) -> Option<Pfn> {
        self.flags().contains(FrameFlags::TAIL).then(|| Pfn(self.link()))
    }
    /// Makes the frame, which nobody uses by itself, a tail.
    pub(super) fn make_tail(&self, head: Pfn) {
        self.set_link(head.0);
        // Release: who sees the mark sees the head.
        self.reset(FrameFlags::TAIL, 0);
    }
    /// The next frame of the list this one is on; 0 ends it.
    pub(crate) fn link(&self) -> u32 {
        self.link.load(Relaxed)
    }
    pub(crate) fn set_link(&self, link: u32) {
        self.link.store(link, Relaxed);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn counts_rise_and_fall_together() {
        let m = FrameMeta::default();
        assert!(!m.try_get() && !m.try_map(), "a free frame cannot be taken");
        m.adopt();
        assert!(m.try_map());
        assert_eq!(m.counts(), Counts { refs: 2, maps: 1 });
        assert!(!m.unmap());
        assert!(m.put());
        assert_eq!(m.counts(), Counts { refs: 0, maps: 0 });
    }

    #[test]
    fn counts_saturate() {
        let m = FrameMeta::default();
        m.counts.store(LIMIT as u64, Relaxed);
        assert!(m.try_map());
        assert!(!m.put());
        assert_eq!(m.counts().refs, LIMIT, "saturated counts never move again");
    }
}
