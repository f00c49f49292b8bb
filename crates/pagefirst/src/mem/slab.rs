//! Typed slabs: fixed-size slots carved from frames.
//!
//! A slab is one frame: a header, then the slots. Free slots are threaded by index through their first bytes.
//! Slabs with a free slot stand on one list; those wholly free are given back by [`Slab::trim`].
//! Under loom every slot is an object of its own, and none is used twice: who comes too late finds the end marked there
//! (`shared::Life`), and not another's value.

use crate::platform::Platform;
use crate::sync::atomic::Relaxed;
use crate::sync::atomic::plain::AtomicUsize;
use crate::types::NoMemory;
use core::marker::PhantomData;
use core::ptr::NonNull;

#[cfg(not(loom))]
mod store {
    use super::*;
    use crate::frame;
    use crate::sync::Spin;
    use crate::types::{PAGE_SIZE, Pfn};

    struct Header {
        pfn: Pfn,
        used: u16,
        /// Index + 1 of the first free slot; 0 for none.
        free: u16,
        next: Option<NonNull<Header>>,
    }

    /// Slabs that have a free slot.
    pub struct Store<P: Platform, T> {
        partial: Spin<P, Option<NonNull<Header>>>,
        slot: PhantomData<fn(T)>,
    }
    // SAFETY: the headers behind the list are only touched under its lock.
    unsafe impl<P: Platform, T> Send for Store<P, T> {}
    // SAFETY: as above.
    unsafe impl<P: Platform, T> Sync for Store<P, T> {}

    impl<P: Platform, T> Store<P, T> {
        const ALIGN: usize = if align_of::<T>() > 8 { align_of::<T>() } else { 8 };
        const SIZE: usize = size_of::<T>().next_multiple_of(Self::ALIGN);
        const FIRST: usize = size_of::<Header>().next_multiple_of(Self::ALIGN);
        const COUNT: usize = {
            let n = (PAGE_SIZE as usize - Self::FIRST) / Self::SIZE;
            assert!(n > 0, "an object larger than a slab");
            n
        };

        pub fn new() -> Self {
            Store { partial: Spin::new(None), slot: PhantomData }
        }

        fn slot(header: NonNull<Header>, i: usize) -> NonNull<u8> {
            // SAFETY: `i < COUNT`, so the slot lies inside the header's frame.
            unsafe { header.cast::<u8>().add(Self::FIRST + i * Self::SIZE) }
        }

        pub fn take(
            &self,
            p: &'static P,
            n: usize,
            mut each: impl FnMut(NonNull<T>),
        ) -> Result<(), NoMemory> {
            let mut partial = self.partial.lock(p);
            for _ in 0..n {
                let header = match *partial {
                    Some(header) => header,
                    None => {
                        drop(partial);
                        let fresh = Self::fresh(p)?;
                        partial = self.partial.lock(p);
                        // SAFETY: the fresh slab is ours alone until it is on the list.
                        unsafe { (*fresh.as_ptr()).next = *partial };
                        *partial = Some(fresh);
                        fresh
                    }
                };
                // SAFETY: headers on the list are initialised, and touched under the lock that we hold.
                let h = unsafe { &mut *header.as_ptr() };
                let slot = Self::slot(header, h.free as usize - 1);
                // SAFETY: a free slot's first two bytes hold the next free index, written by `fresh` or `give`.
                h.free = unsafe { slot.cast::<u16>().read() };
                h.used += 1;
                if h.free == 0 {
                    *partial = h.next.take();
                }
                each(slot.cast());
            }
            Ok(())
        }

        fn fresh(p: &'static P) -> Result<NonNull<Header>, NoMemory> {
            let pfn = frame::allocate(p)?;
            let header = p.page(pfn).cast::<Header>();
            // SAFETY: the frame is ours alone and page-aligned; the header and all slots lie inside it.
            unsafe {
                header.write(Header { pfn, used: 0, free: 1, next: None });
                for i in 0..Self::COUNT {
                    let next = if i + 1 < Self::COUNT { i as u16 + 2 } else { 0 };
                    Self::slot(header, i).cast::<u16>().write(next);
                }
            }
            Ok(header)
        }

        /// # Safety
        /// They came from `take` of this store, their values are dropped, nobody uses them any more.
        pub unsafe fn give(&self, p: &'static P, slots: &[NonNull<T>]) {
            let mut partial = self.partial.lock(p);
            for at in slots {
                let offset = at.as_ptr() as usize % PAGE_SIZE as usize;
                // SAFETY: slabs are frames, page-aligned in the direct map, with the header first; `at` lies in one.
                let header = unsafe { at.cast::<u8>().sub(offset).cast::<Header>() };
                // SAFETY: initialised by `fresh`; touched under the lock.
                let h = unsafe { &mut *header.as_ptr() };
                // SAFETY: the slot is free from here on (the caller's promise), so its first bytes are the list's.
                unsafe { at.cast::<u16>().write(h.free) };
                if h.free == 0 {
                    h.next = *partial;
                    *partial = Some(header);
                }
                h.free = ((offset - Self::FIRST) / Self::SIZE) as u16 + 1;
                h.used -= 1;
            }
        }

        /// Gives wholly free slabs back to the frame allocator; returns how many.
        pub fn trim(&self, p: &'static P) -> usize {
            let mut free = None;
            {
                let mut partial = self.partial.lock(p);
                let mut keep = None;
                let mut at = partial.take();
                while let Some(header) = at {
                    // SAFETY: on the list, under its lock.
                    let h = unsafe { &mut *header.as_ptr() };
                    at = h.next;
                    let onto = if h.used == 0 { &mut free } else { &mut keep };
                    h.next = *onto;
                    *onto = Some(header);
                }
                *partial = keep;
            }
            let mut count = 0;
            while let Some(header) = free {
                // SAFETY: wholly free and off the list: ours alone.
                let (pfn, next) = unsafe { ((*header.as_ptr()).pfn, (*header.as_ptr()).next) };
                free = next;
                if p.meta(pfn).put() {
                    frame::release(p, pfn);
                }
                count += 1;
            }
            count
        }
    }
}

#[cfg(loom)]
mod store {
    use super::*;
    extern crate std;
    use std::alloc::{Layout, alloc, dealloc};
    use std::sync::Mutex;
    use std::vec::Vec;

    /// Boxed objects. Their memory stays until the store goes.
    pub struct Store<P, T> {
        freed: Mutex<Vec<NonNull<T>>>,
        of: PhantomData<fn(P, T)>,
    }
    // SAFETY: the list is behind a lock. What is on it is memory until the store goes: who comes too late reads in it that
    // the object has ended (`shared::Life`).
    unsafe impl<P: Platform, T> Send for Store<P, T> {}
    // SAFETY: as above.
    unsafe impl<P: Platform, T> Sync for Store<P, T> {}

    impl<P: Platform, T> Store<P, T> {
        pub fn new() -> Self {
            Store { freed: Mutex::new(Vec::new()), of: PhantomData }
        }
        pub fn take(
            &self,
            _: &'static P,
            n: usize,
            mut each: impl FnMut(NonNull<T>),
        ) -> Result<(), NoMemory> {
            for _ in 0..n {
                // SAFETY: no T here is zero-sized.
                each(NonNull::new(unsafe { alloc(Layout::new::<T>()) }.cast()).ok_or(NoMemory)?);
            }
            Ok(())
        }
        /// # Safety
        /// As for the other back end.
        pub unsafe fn give(&self, _: &'static P, slots: &[NonNull<T>]) {
            self.freed.lock().unwrap().extend(slots);
        }
        pub fn trim(&self, _: &'static P) -> usize {
            0
        }
    }

    impl<P, T> Drop for Store<P, T> {
        fn drop(&mut self) {
            for at in self.freed.get_mut().unwrap().drain(..) {
                // SAFETY: allocated by `take` with this layout, and given back; nobody uses the store any more.
                unsafe { dealloc(at.as_ptr().cast(), Layout::new::<T>()) };
            }
        }
    }
}

/// An allocator of slots for values of one type.
pub(crate) struct Slab<P: Platform, T> {
    store: store::Store<P, T>,
    live: AtomicUsize,
}

impl<P: Platform, T> Slab<P, T> {
    pub fn new() -> Self {
        Slab { store: store::Store::new(), live: AtomicUsize::new(0) }
    }
    /// Takes `n` slots with one lock: each is passed on, uninitialised, and owned by who gets it. Called with a lock
    /// held. When memory runs out those that were there are passed on first.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn take(&self, p: &'static P, n: usize, mut each: impl FnMut(NonNull<T>)) -> Result<(), NoMemory> {
        let mut allowed = if cfg!(debug_assertions) { 0 } else { n };
        while allowed < n && super::ask(p).is_ok() {
            allowed += 1;
        }
        let mut taken = 0;
        let done = self.store.take(p, allowed, |at| {
            taken += 1;
            each(at);
        });
        self.live.fetch_add(taken, Relaxed);
        if allowed < n { Err(NoMemory) } else { done }
    }
    /// A slot, uninitialised, owned by the caller.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn take_one(&self, p: &'static P) -> Result<NonNull<T>, NoMemory> {
        let mut slot = None;
        self.take(p, 1, |at| slot = Some(at))?;
        slot.ok_or(NoMemory)
    }
    /// Gives slots back with one lock.
    ///
    /// # Safety
    /// They came from [`take`](Slab::take) of this slab, their values are dropped, nobody uses them any more.
    pub unsafe fn give(&self, p: &'static P, slots: &[NonNull<T>]) {
        // SAFETY: the caller's promise.
        unsafe { self.store.give(p, slots) };
        self.live.fetch_sub(slots.len(), Relaxed);
    }
    /// Slots handed out.
    pub fn live(&self) -> usize {
        self.live.load(Relaxed)
    }
    /// Gives wholly free slabs back; returns how many frames that were.
    pub fn trim(&self, p: &'static P) -> usize {
        self.store.trim(p)
    }
}
