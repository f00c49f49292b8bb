//! The 32 bytes that describe a frame.
//!
//! References and map counts share one atomic word, so that taking a mapping is one read-modify-write. Both
//! saturate: a count that reaches its limit is never moved again, and the frame is never freed.

use crate::sync::atomic::{AcqRel, AtomicPtr, AtomicU32, AtomicU64, Relaxed, SeqCst, fence};
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
        /// Behind the head of a folio: everything but this is in the head's metadata, the folio's order excepted, and whether
        /// hardware reported an error in this frame.
        const TAIL = 1 << 11;
        /// Of a folio of more than one frame: hardware reported an error in one of them. In which one, its own
        /// [`POISON`](FrameFlags::POISON) says.
        const HURT = 1 << 12;
        /// Read ahead, and who wants it first has more read: not mapped until then.
        const AHEAD = 1 << 13;
        /// Its file is being asked whether it may be written to.
        const ASKED = 1 << 14;
        /// Being stored: under write-back.
        const STORING = 1 << 15;
        // Bits 16 to 23 are the order.
        /// Storing it failed, and its cache has not noted that yet.
        const UNTOLD = 1 << 24;
        /// While it was being read, somebody was told to wait for it.
        const AWAITED = 1 << 25;
        /// Of a part of a file's folio that is [`POISON`](FrameFlags::POISON): what is stored of it is what it held.
        const SPARED = 1 << 26;
    }
}

/// Where the order is in the word of the flags.
const ORDER: u32 = 0xff << 16;
/// The most pins that are counted: what the low half of a link holds.
const MAX_PINS: u32 = 0xffff;
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
    /// Says that the page is on its way out: who counts a mapping from now on is told so when he validates it.
    pub(crate) fn go(&self) {
        if !cfg!(mutant = "remove_without_going") {
            self.set(FrameFlags::GOING);
        }
    }
    /// Counts a mapping, and only then asks whether the page may be mapped: who takes it away says so first, and then looks
    /// at the count (protocol 2). `None`, with nothing counted, if the frame is free; if the answer is no, the caller
    /// gives the mapping up.
    #[inline(always)]
    pub(crate) fn try_map_valid(&self, is_valid: impl FnOnce() -> bool) -> Option<bool> {
        if cfg!(mutant = "validate_before_count") {
            let valid = is_valid();
            return self.try_map().then_some(valid);
        }
        self.try_map().then(is_valid)
    }
    /// Whether a count has reached its limit, and does not say any more how many there are.
    pub(crate) fn is_saturated(&self) -> bool {
        self.counts.load(Relaxed) & SATURATED != 0
    }
    /// The map count, read so that it is ordered against those who raise it before they validate (protocol 1).
    pub fn maps_ordered(&self) -> u32 {
        if cfg!(mutant = "maps_read_plainly") {
            return self.counts().maps;
        }
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
    /// Gives back `delta`, in which there are `refs` references; true when those were the last.
    #[inline]
    fn give(&self, delta: u64, refs: u32) -> bool {
        let mut now = self.counts.load(Relaxed);
        loop {
            let c = counts(now);
            if now & SATURATED != 0 {
                return false;
            }
            debug_assert!(c.refs >= refs, "a reference given back that nobody held");
            debug_assert!(c.maps >= (delta >> 32) as u32, "a mapping given back that nobody held");
            match self.counts.compare_exchange_weak(now, now - delta, AcqRel, Relaxed) {
                Ok(_) => return c.refs == refs,
                Err(newer) => now = newer,
            }
        }
    }
    /// Takes the only reference away, if nothing else refers to the frame and nothing maps it: from here until
    /// [`thaw`](Self::thaw) nobody can take another.
    #[must_use]
    pub(crate) fn freeze(&self) -> bool {
        self.freeze_at(REF)
    }
    /// Gives the only reference back to who called [`freeze`](Self::freeze).
    pub(crate) fn thaw(&self) {
        self.thaw_at(REF);
    }
    /// The same for a page whose only reference is its only mapping's.
    #[must_use]
    pub(crate) fn freeze_mapped(&self) -> bool {
        self.freeze_at(REF + MAP)
    }
    /// One mapping and its reference, for a frame nobody refers to.
    pub(crate) fn thaw_mapped(&self) {
        self.thaw_at(REF + MAP);
    }
    fn freeze_at(&self, expected: u64) -> bool {
        self.counts.compare_exchange(expected, 0, AcqRel, Relaxed).is_ok()
    }
    fn thaw_at(&self, counts: u64) {
        debug_assert_eq!(self.counts.load(Relaxed), 0);
        self.counts.store(counts, Ordering::Release);
    }
    /// Takes a reference unless the frame is free.
    pub(crate) fn try_get(&self) -> bool {
        self.take(REF)
    }
    /// Gives a reference back; true when it was the last, and the caller frees the frame.
    #[must_use]
    pub(crate) fn put(&self) -> bool {
        self.give(REF, 1)
    }
    /// Takes a reference and a mapping unless the frame is free.
    pub(crate) fn try_map(&self) -> bool {
        self.take(REF + MAP)
    }
    /// The same, so many times at once.
    pub(crate) fn try_map_many(&self, n: u32) -> bool {
        self.take((REF + MAP) * n as u64)
    }
    /// The same, of a folio that the caller has a mapping of.
    pub(crate) fn map_more(&self, n: u32) {
        let taken = self.try_map_many(n);
        debug_assert!(taken, "mapped and free");
    }
    /// Takes a mapping of a page of private memory for another space, which makes it one that is shared: exclusive no more.
    /// False, with nothing changed, if it is pinned. Called under the lock of the table whose entry maps it here.
    #[inline]
    pub(crate) fn try_share(&self) -> bool {
        if self.flags().contains(FrameFlags::EXCLUSIVE) {
            if self.pins() > 0 && !cfg!(mutant = "fork_shares_pinned") {
                return false;
            }
            if !cfg!(mutant = "fork_keeps_exclusive") {
                self.clear(FrameFlags::EXCLUSIVE);
            }
            // Entries of one folio may be in several tables: who pins it by another looks at the flag after it counted.
            if self.order() > 0 {
                fence(SeqCst);
                if self.pins() > 0 && !cfg!(mutant = "fork_looks_for_pins_once") {
                    self.set(FrameFlags::EXCLUSIVE);
                    return false;
                }
            }
        }
        // Mapped, and the mapping stays as long as the lock is held.
        if self.counts.load(Relaxed) & SATURATED == 0 {
            self.counts.fetch_add(REF + MAP, AcqRel);
        }
        true
    }
    /// Makes a page of private memory exclusive if nothing refers to it but one mapping, whose table the caller has
    /// locked, and `held` references of the caller's. Meanwhile nobody can take another: whoever comes later, to read it,
    /// finds a page that its one owner may write.
    #[must_use]
    pub(crate) fn try_reuse(&self, held: u32) -> bool {
        let expected = REF * (1 + held as u64) + MAP;
        if cfg!(mutant = "reuse_by_map_count") {
            let mapped_once = self.counts().maps == 1;
            if mapped_once {
                self.set(FrameFlags::EXCLUSIVE);
            }
            return mapped_once;
        }
        let frozen = self.freeze_at(expected);
        if frozen {
            self.set(FrameFlags::EXCLUSIVE);
            self.thaw_at(expected);
        }
        frozen
    }
    /// Pins, on the head of what is pinned.
    pub(crate) fn pins(&self) -> u32 {
        self.link.load(Relaxed) & MAX_PINS
    }
    /// Pins the page, for a reference that the caller holds and that the pin takes over; `None` if it has as many pins as
    /// can be counted.
    pub(crate) fn try_pin(&self) -> Option<()> {
        let more = |link| if link & MAX_PINS < MAX_PINS { Some(link + 1) } else { None };
        self.link.fetch_update(AcqRel, Relaxed, more).ok()?;
        // As in `try_share`.
        if self.order() > 0 {
            fence(SeqCst);
        }
        Some(())
    }
    /// Takes a pin back; its reference is the caller's again.
    pub(crate) fn unpin(&self) {
        let before = self.link.fetch_sub(1, AcqRel);
        debug_assert!(before & MAX_PINS > 0, "a pin taken back that nobody has");
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
    /// Gives so many mappings and their references back; true when those were the last references.
    #[inline]
    #[must_use]
    pub(crate) fn unmap_many(&self, n: u32) -> bool {
        self.give((REF + MAP) * n as u64, n)
    }

    /// The flags now.
    pub fn flags(&self) -> FrameFlags {
        FrameFlags::from_bits_retain(self.flags.load(Ordering::Acquire) & !ORDER)
    }
    pub(crate) fn set(&self, on: FrameFlags) {
        self.flags.fetch_or(on.bits(), AcqRel);
    }
    pub(crate) fn clear(&self, off: FrameFlags) {
        self.flags.fetch_and(!off.bits(), AcqRel);
    }
    /// Sets a flag; false if it was set.
    #[must_use]
    pub(crate) fn begin(&self, state: FrameFlags) -> bool {
        self.flags.fetch_or(state.bits(), AcqRel) & state.bits() == 0
    }
    /// Takes a flag off; whether it was there.
    pub(crate) fn take_flag(&self, off: FrameFlags) -> bool {
        self.flags().contains(off) && self.flags.fetch_and(!off.bits(), AcqRel) & off.bits() != 0
    }
    /// Takes the mark of read-ahead off; whether it was there.
    pub(crate) fn take_mark(&self) -> bool {
        self.take_flag(FrameFlags::AHEAD)
    }
    /// Ends the state of being filled, unless the page is going, in the state `with`.
    pub(crate) fn end_filling(&self, with: FrameFlags) {
        let mut now = self.flags.load(Relaxed);
        loop {
            debug_assert!(now & FrameFlags::FILLING.bits() != 0);
            let going = now & FrameFlags::GOING.bits() != 0 && !cfg!(mutant = "fill_what_goes");
            let failed = now & FrameFlags::FAILED.bits() != 0;
            let with = if going || failed { 0 } else { with.bits() };
            let next = now & !FrameFlags::FILLING.bits() | with;
            if cfg!(mutant = "fill_ends_in_two_steps") {
                self.clear(FrameFlags::FILLING);
                return self.set(FrameFlags::from_bits_retain(with));
            }
            // Release: who sees the page up to date sees what was read.
            match self.flags.compare_exchange_weak(now, next, AcqRel, Relaxed) {
                Ok(_) => return,
                Err(newer) => now = newer,
            }
        }
    }
    /// For the first tail of a folio: so many parts of it are being filled.
    pub(super) fn begin_parts(&self, parts: u32) {
        self.index.store(u64::from(parts), Relaxed);
    }
    /// So many of them have ended; whether those were the last.
    pub(super) fn end_parts(&self, parts: u32) -> bool {
        // AcqRel: who ends the last one has seen what filled the others.
        self.index.fetch_sub(u64::from(parts), AcqRel) == u64::from(parts)
    }
    /// Marks a page that is being filled as going: it will not be up to date. False, with nothing changed, if it is not
    /// being filled.
    #[must_use]
    pub(crate) fn stop_filling(&self) -> bool {
        let mut now = self.flags.load(Relaxed);
        while now & FrameFlags::FILLING.bits() != 0 {
            let next = now | FrameFlags::GOING.bits();
            match self.flags.compare_exchange_weak(now, next, AcqRel, Relaxed) {
                Ok(_) => return true,
                Err(newer) => now = newer,
            }
        }
        false
    }
    /// Says what the frame is from now on: flags and order whole, but for the marks of memory errors. These stay, whoever
    /// sets one at the same moment; they go with the frame's life, if at all.
    pub(crate) fn restate(&self, flags: FrameFlags, order: u8) {
        let new = flags.bits() | (order as u32) << 16;
        let marks = FrameFlags::POISON.union(FrameFlags::HURT).bits();
        let mut now = self.flags.load(Relaxed);
        while let Err(newer) = self.flags.compare_exchange_weak(now, new | now & marks, AcqRel, Relaxed) {
            now = newer;
        }
    }
    /// Stores flags and order whole, such marks included; for a frame that nobody refers to.
    pub(super) fn reset(&self, flags: FrameFlags, order: u8) {
        self.flags.store(flags.bits() | (order as u32) << 16, Ordering::Release);
    }
    /// Makes it a frame that is nothing and nobody's; for one that nobody refers to.
    #[inline]
    pub(super) fn disown(&self) {
        self.reset(FrameFlags::empty(), 0);
        self.set_owner(core::ptr::null_mut());
    }
    /// Whether this is the first frame of a free block of 2^order frames; for the allocator.
    pub(super) fn is_free_block(&self, order: u8) -> bool {
        self.flags.load(Relaxed) == FrameFlags::FREE.bits() | (order as u32) << 16
    }
    /// log2 of the number of frames of the folio.
    pub fn order(&self) -> u8 {
        (self.flags.load(Relaxed) >> 16) as u8
    }
    /// Flags and order at one moment.
    #[inline]
    pub(crate) fn flags_and_order(&self) -> (FrameFlags, u8) {
        let word = self.flags.load(Ordering::Acquire);
        (FrameFlags::from_bits_retain(word & !ORDER), (word >> 16) as u8)
    }
    /// Whether the frame is a folio by itself, and has `on` of the flags in `of`.
    #[inline]
    pub(crate) fn is_single_with(&self, of: FrameFlags, on: FrameFlags) -> bool {
        let word = self.flags.load(Ordering::Acquire);
        word & (of.union(FrameFlags::TAIL).bits() | ORDER) == on.bits()
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
    /// The next frame of the list this one is on; 0 ends it.
    pub(crate) fn link(&self) -> u32 {
        self.link.load(Relaxed)
    }
    pub(crate) fn set_link(&self, link: u32) {
        self.link.store(link, Relaxed);
    }
    /// The number of the limit that a page is charged to; 0 for none.
    #[inline]
    pub(crate) fn limit(&self) -> u16 {
        (self.link() >> 16) as u16
    }
    /// Charges a page that the caller owns alone.
    pub(crate) fn set_limit(&self, limit: u16) {
        self.set_link((limit as u32) << 16);
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
        assert!(!m.unmap_many(1));
        assert!(m.put());
        assert_eq!(m.counts(), Counts { refs: 0, maps: 0 });
    }

    #[test]
    fn r12_a_page_is_reused_by_its_last_mapping_alone() {
        let m = FrameMeta::default();
        m.reset(FrameFlags::ANON | FrameFlags::EXCLUSIVE, 0);
        m.adopt();
        m.map_first();
        assert!(m.try_share());
        assert_eq!((m.counts(), m.flags()), (Counts { refs: 2, maps: 2 }, FrameFlags::ANON));
        assert!(!m.try_reuse(0));
        assert!(m.try_get() && !m.unmap_many(1), "unmapped by the other, and read by somebody");
        assert!(!m.try_reuse(0));
        assert!(m.try_reuse(1), "by the one who reuses it");
        assert_eq!((m.counts(), m.pins()), (Counts { refs: 2, maps: 1 }, 0));
        assert!(m.flags().contains(FrameFlags::EXCLUSIVE));
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
