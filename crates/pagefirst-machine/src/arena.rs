//! Physical memory: one mapping of the host, committed as it is touched; under Miri an allocation for each frame.
//!
//! Frames are numbered from 0; the first ones hold the metadata of all. Behind memory, with numbers that go on, lie those of
//! a device. Everything that runs on the machine reads
//! and writes frames as 64-bit atomics, user bytes included (a store of a few bytes is a compare-exchange of the
//! word around them): so threads that race have a defined outcome, and no access mixes sizes.

use pagefirst::frame::{FrameMeta, Region};
use pagefirst::sync::atomic;
use pagefirst::types::{PAGE_SIZE, Pfn};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// 64-bit words in a frame.
pub(crate) const WORDS: usize = PAGE_SIZE as usize / 8;

/// The host's memory for the frames.
#[cfg(not(miri))]
mod host {
    use super::*;
    use memmap2::{Advice, MmapMut, MmapOptions};

    pub struct Memory {
        base: NonNull<u8>,
        bytes: usize,
        /// Keeps the mapping; `base` points into it.
        _map: MmapMut,
    }

    impl Memory {
        pub fn new(frames: u32) -> Self {
            let bytes = frames as usize * PAGE_SIZE as usize;
            let mut map = MmapOptions::new()
                .len(bytes)
                .no_reserve_swap()
                .map_anon()
                .unwrap_or_else(|e| panic!("no {bytes} bytes for the machine: {e}"));
            // Fewer faults of the host, which otherwise cost more than ours. A host that has no huge pages does without.
            let _ = map.advise(Advice::HugePage);
            let base = NonNull::new(map.as_mut_ptr()).expect("a mapping is never at address 0");
            Memory { base, bytes, _map: map }
        }
        /// The first byte of a frame, of those that there are.
        #[inline]
        pub fn at(&self, frame: u32) -> NonNull<u8> {
            debug_assert!(frame as usize * PAGE_SIZE as usize <= self.bytes - PAGE_SIZE as usize);
            // SAFETY: the frame lies inside the mapping (the caller checked its number).
            unsafe { self.base.add(frame as usize * PAGE_SIZE as usize) }
        }
        /// Whether `[at, at + len)` lies inside.
        pub fn contains(&self, at: usize, len: usize) -> bool {
            let start = self.base.addr().get();
            at >= start && at.checked_add(len).is_some_and(|end| end <= start + self.bytes)
        }
    }
}

/// The host's memory under Miri: who leaves a frame is seen, and Miri takes time by the square of an allocation's size.
#[cfg(miri)]
mod host {
    use super::*;
    use std::alloc::{Layout, alloc_zeroed};

    pub struct Memory(Box<[NonNull<u8>]>);

    impl Memory {
        pub fn new(frames: u32) -> Self {
            let page =
                Layout::from_size_align(PAGE_SIZE as usize, PAGE_SIZE as usize).expect("a power of two");
            // SAFETY: the layout has a size.
            let frame = |_| NonNull::new(unsafe { alloc_zeroed(page) }).expect("memory for a frame");
            Memory((0..frames).map(frame).collect())
        }
        pub fn at(&self, frame: u32) -> NonNull<u8> {
            self.0[frame as usize]
        }
        pub fn contains(&self, at: usize, len: usize) -> bool {
            let inside = |from: usize| at >= from && at + len <= from + PAGE_SIZE as usize;
            self.0.iter().any(|frame| inside(frame.addr().get()))
        }
    }
}

pub(crate) struct Arena {
    memory: host::Memory,
    region: Region,
    /// Frames in all, the device's included.
    frames: u32,
}

// SAFETY: it is plain memory, used through atomics and through the library, whose contract with
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
        Arena { memory: host::Memory::new(frames), region, frames }
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

    /// The frame's first byte.
    #[inline]
    pub fn page(&self, pfn: Pfn) -> NonNull<u8> {
        assert!(pfn.0 < self.frames, "{pfn:?} is beyond the machine's memory");
        self.memory.at(pfn.0)
    }

    /// The frame as words.
    #[inline]
    pub fn words(&self, pfn: Pfn) -> &[AtomicU64; WORDS] {
        // SAFETY: `page` gives the start of a whole page of memory, aligned to 4 KiB; any bits are a valid
        // AtomicU64, and shared access to atomics is always allowed. Frames that the library writes through
        // `page` are exclusively its own then (the contract of `Platform::page`).
        unsafe { self.page(pfn).cast().as_ref() }
    }

    /// Overwrites a frame that nobody uses: under Miri not as atomics, so that it tells if somebody does.
    pub fn fill(&self, pfn: Pfn, word: u64) {
        if cfg!(miri) {
            // SAFETY: it is a frame, aligned, and nobody uses it, or else there is a mistake to be found.
            unsafe { self.page(pfn).cast().write([word; WORDS]) }
        } else {
            self.words(pfn).iter().for_each(|w| w.store(word, Relaxed));
        }
    }

    /// The first word of a frame that nobody uses that is not this one, and its index: under Miri as [`fill`](Arena::fill).
    pub fn differs(&self, pfn: Pfn, word: u64) -> Option<(usize, u64)> {
        // SAFETY: as in `fill`.
        if cfg!(miri) && unsafe { self.page(pfn).cast::<[u64; WORDS]>().read() } == [word; WORDS] {
            return None;
        }
        let words = self.words(pfn).iter().map(|w| w.load(Relaxed));
        words.enumerate().find(|(_, now)| *now != word)
    }

    /// The same as the library sees it, and hardware where they meet.
    #[inline]
    pub fn cells(&self, pfn: Pfn) -> &[atomic::AtomicU64; WORDS] {
        // SAFETY: as in `words`; the library's atomics, whichever they are, are laid out as those of the host.
        unsafe { self.page(pfn).cast().as_ref() }
    }

    /// The frame's metadata, in the array at the start of memory.
    #[inline]
    pub fn meta(&self, pfn: Pfn) -> &FrameMeta {
        assert!(pfn.0 < self.region.frames, "{pfn:?} is beyond the machine's memory");
        let per_frame = (PAGE_SIZE as usize / size_of::<FrameMeta>()) as u32;
        let frame = self.memory.at(pfn.0 / per_frame).cast::<FrameMeta>();
        // SAFETY: `Region::meta_frames` frames from the start are set apart for `frames` entries, so entry `pfn`
        // lies in this one and is aligned; `FrameMeta` is atomics alone, for which zeroed memory is valid.
        unsafe { frame.add((pfn.0 % per_frame) as usize).as_ref() }
    }

    /// Whether `[at, at + len)` lies inside memory or the device.
    pub fn contains(&self, at: usize, len: usize) -> bool {
        self.memory.contains(at, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_apart_and_zero() {
        let arena = Arena::new(1 << 20, 0);
        assert_eq!(arena.frames(), 256);
        assert_eq!(arena.differs(Pfn(255), 0), None);
        arena.fill(Pfn(253), 3);
        arena.words(Pfn(254))[511].store(7, Relaxed);
        assert_eq!(arena.words(Pfn(255))[0].load(Relaxed), 0);
        assert_eq!(arena.differs(Pfn(253), 3), None);
        assert_eq!(arena.differs(Pfn(254), 0), Some((511, 7)));
        assert_eq!(arena.meta(Pfn(255)).counts().refs, 0);
    }

    #[test]
    #[should_panic(expected = "beyond the machine's memory")]
    fn a_frame_beyond_memory_is_refused() {
        Arena::new(1 << 20, 0).words(Pfn(256));
    }
}
