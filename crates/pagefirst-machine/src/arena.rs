//! Physical memory: one mapping of the host, committed as it is touched.
//!
//! Frames are numbered from 0; the first ones hold the metadata of all. Behind memory, with numbers that go on, lie those of
//! a device. Everything that runs on the machine reads
//! and writes frames as 64-bit atomics, user bytes included (a store of a few bytes is a compare-exchange of the
//! word around them): so threads that race have a defined outcome, and no access mixes sizes.

use memmap2::{Advice, MmapMut, MmapOptions};
use pagefirst::frame::{FrameMeta, Region};
use pagefirst::sync::atomic;
use pagefirst::types::{PAGE_SIZE, Pfn};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// 64-bit words in a frame.
pub(crate) const WORDS: usize = PAGE_SIZE as usize / 8;

pub(crate) struct Arena {
    base: NonNull<u8>,
    region: Region,
    /// Frames in all, the device's included.
    frames: u32,
    /// Keeps the mapping; `base` points into it.
    _map: MmapMut,
}

// SAFETY: the mapping is plain memory, used through atomics and through the library, whose contract with
// `Platform::page` keeps exclusive uses exclusive.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// Reserves `bytes` of memory and `device` bytes of a device, all zero, none of it touched.
    ///
    /// # Panics
    /// When the host refuses, or when the size makes no sense.
    pub fn new(bytes: u64, device: u64) -> Self {
        let region = Region { first: Pfn(0), frames: (bytes / PAGE_SIZE) as u32 };
        let frames = u32::try_from(bytes / PAGE_SIZE + device / PAGE_SIZE).expect("at most 16 TiB of memory");
        assert!(region.frames >= 4, "a machine needs at least 16 KiB of memory");
        let mut options = MmapOptions::new();
        options.len(frames as usize * PAGE_SIZE as usize).no_reserve_swap();
        let mut map = options.map_anon().unwrap_or_else(|e| panic!("no {bytes} bytes for the machine: {e}"));
        // Fewer faults of the host, which otherwise cost more than ours. A host that has no huge pages does without.
        let _ = map.advise(Advice::HugePage);
        let base = NonNull::new(map.as_mut_ptr()).expect("a mapping is never at address 0");
        Arena { base, region, frames, _map: map }
    }

    /// Its memory, for `Vm::init`.
    pub fn region(&self) -> Region {
        self.region
    }

    /// Frames of memory and of the device.
    pub fn frames(&self) -> u32 {
        self.frames
    }
    /// Whether the frame is memory.
    pub fn is_memory(&self, pfn: Pfn) -> bool {
        pfn.0 < self.region.frames
    }

    #[inline]
    fn at(&self, pfn: Pfn) -> NonNull<u8> {
        assert!(pfn.0 < self.frames, "{pfn:?} is beyond the machine's memory");
        // SAFETY: the frame lies inside the mapping, which is `frames` pages long.
        unsafe { self.base.add(pfn.0 as usize * PAGE_SIZE as usize) }
    }

    /// The frame's first byte.
    #[inline]
    pub fn page(&self, pfn: Pfn) -> NonNull<u8> {
        self.at(pfn)
    }

    /// The frame as words.
    #[inline]
    pub fn words(&self, pfn: Pfn) -> &[AtomicU64; WORDS] {
        // SAFETY: `at` gives the start of a whole page inside the mapping, aligned to 4 KiB; any bits are a valid
        // AtomicU64, and shared access to atomics is always allowed. Frames that the library writes through
        // `page` are exclusively its own then (the contract of `Platform::page`).
        unsafe { self.at(pfn).cast().as_ref() }
    }

    /// The same as the library sees it, and hardware where they meet.
    #[inline]
    pub fn cells(&self, pfn: Pfn) -> &[atomic::AtomicU64; WORDS] {
        // SAFETY: as in `words`; the library's atomics, whichever they are, are laid out as those of the host.
        unsafe { self.at(pfn).cast().as_ref() }
    }

    /// The frame's metadata, in the array at the start of memory.
    #[inline]
    pub fn meta(&self, pfn: Pfn) -> &FrameMeta {
        assert!(pfn.0 < self.region.frames, "{pfn:?} is beyond the machine's memory");
        // SAFETY: `Region::meta_frames` frames from the start are set apart for `frames` entries, so entry `pfn`
        // lies inside the mapping and is aligned; `FrameMeta` is atomics alone, for which zeroed memory is valid.
        unsafe { self.base.cast::<FrameMeta>().add(pfn.0 as usize).as_ref() }
    }

    /// Whether `[at, at + len)` lies inside memory.
    pub fn contains(&self, at: usize, len: usize) -> bool {
        let start = self.base.as_ptr() as usize;
        let end = start + self.region.frames as usize * PAGE_SIZE as usize;
        at >= start && at.checked_add(len).is_some_and(|e| e <= end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn frames_are_apart_and_zero() {
        let arena = Arena::new(1 << 20, 0);
        assert_eq!(arena.frames(), 256);
        assert!(arena.words(Pfn(255)).iter().all(|w| w.load(Relaxed) == 0));
        arena.words(Pfn(254))[511].store(7, Relaxed);
        assert_eq!(arena.words(Pfn(255))[0].load(Relaxed), 0);
        assert_eq!(arena.page(Pfn(1)).as_ptr() as usize - arena.page(Pfn(0)).as_ptr() as usize, 4096);
        assert_eq!(arena.meta(Pfn(255)).counts().refs, 0);
    }

    #[test]
    #[should_panic(expected = "beyond the machine's memory")]
    fn a_frame_beyond_memory_is_refused() {
        Arena::new(1 << 20, 0).words(Pfn(256));
    }
}
