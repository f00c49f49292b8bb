//! Locks over the platform's raw ones, and the lock order that debug builds check.

use super::atomic::Relaxed;
use crate::platform::Platform;
use core::cell::UnsafeCell;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

/// A lock the platform supplies.
///
/// # Safety
/// Between a `lock` (or a `try_lock` that answered true) and the matching `unlock` nobody else holds it; what was
/// written before `unlock` is visible after the next `lock`.
pub unsafe trait RawLock<P>: Default + Send + Sync {
    /// Waits until the lock is ours.
    fn lock(&self, platform: &'static P);
    /// Takes the lock if it is free.
    fn try_lock(&self, platform: &'static P) -> bool;
    /// Gives the lock back.
    ///
    /// # Safety
    /// The caller holds it.
    unsafe fn unlock(&self, platform: &'static P);
}

/// A value behind one of the platform's locks.
pub struct Lock<P: Platform, L: RawLock<P>, T> {
    raw: L,
    /// Place in the lock order; 0 for a lock that may sleep, which comes before all that spin.
    rank: u32,
    value: UnsafeCell<T>,
    platform: PhantomData<fn(P)>,
}

/// A value behind a spin lock: a leaf of the lock order, nothing but the frame allocator is locked under it.
pub type Spin<P, T> = Lock<P, <P as Platform>::SpinLock, T>;
/// A value behind a space's writer lock.
pub type Writer<P, T> = Lock<P, <P as Platform>::WriterLock, T>;
/// Possession proves that a spin lock is held.
pub type SpinGuard<'a, P, T> = LockGuard<'a, P, <P as Platform>::SpinLock, T>;

// SAFETY: the value is only reached through the guard, and the raw lock excludes (its own contract).
unsafe impl<P: Platform, L: RawLock<P>, T: Send> Sync for Lock<P, L, T> {}
// SAFETY: owning the lock is owning the value.
unsafe impl<P: Platform, L: RawLock<P>, T: Send> Send for Lock<P, L, T> {}

impl<P: Platform, L: RawLock<P>, T> Lock<P, L, T> {
    /// A free leaf lock around `value`.
    pub fn new(value: T) -> Self {
        Self::ranked(held::LEAF, value)
    }
    /// A free lock around `value` that may be taken under those of lower rank.
    pub(crate) fn ranked(rank: u32, value: T) -> Self {
        Lock { raw: L::default(), rank, value: UnsafeCell::new(value), platform: PhantomData }
    }
    /// Waits for the lock.
    pub fn lock(&self, p: &'static P) -> LockGuard<'_, P, L, T> {
        if self.rank == 0 {
            held::none(p, "a lock that may sleep is taken");
        } else {
            held::take(p, self.rank);
        }
        self.raw.lock(p);
        LockGuard { lock: self, p }
    }
    /// Takes the lock if it is free. For locks that may sleep, which a fault may only try.
    pub(crate) fn try_lock(&self, p: &'static P) -> Option<LockGuard<'_, P, L, T>> {
        debug_assert_eq!(self.rank, 0);
        self.raw.try_lock(p).then(|| LockGuard { lock: self, p })
    }
    /// The value; `&mut self` proves that nobody holds the lock.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }
}

/// Possession proves that the lock is held.
pub struct LockGuard<'a, P: Platform, L: RawLock<P>, T> {
    lock: &'a Lock<P, L, T>,
    p: &'static P,
}

impl<P: Platform, L: RawLock<P>, T> Deref for LockGuard<'_, P, L, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard proves that the lock is held, so nobody else has a reference.
        unsafe { &*self.lock.value.get() }
    }
}
impl<P: Platform, L: RawLock<P>, T> DerefMut for LockGuard<'_, P, L, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`; `&mut self` makes this the only reference through the guard.
        unsafe { &mut *self.lock.value.get() }
    }
}
impl<P: Platform, L: RawLock<P>, T> Drop for LockGuard<'_, P, L, T> {
    fn drop(&mut self) {
        // SAFETY: the guard was made by `lock` or `try_lock` and is dropped once.
        unsafe { self.lock.raw.unlock(self.p) };
        if self.lock.rank != 0 {
            held::give(self.p, self.lock.rank);
        }
    }
}

/// The lock order, checked in debug builds: pin < one table < leaves < the frame allocator; a flush is made with none of them held.
pub(crate) mod held {
    use super::{Platform, Relaxed};

    pub const PIN: u32 = 1;
    pub const TABLE: u32 = 2;
    pub const LEAF: u32 = 4;
    pub const FRAMES: u32 = 8;

    /// Records that this CPU is about to take a lock of `rank`; panics in debug builds when it already holds one
    /// of that rank or of a later one.
    #[inline]
    pub fn take<P: Platform>(p: &'static P, rank: u32) {
        if cfg!(debug_assertions) {
            let held = &p.local(p.enter()).held;
            let now = held.load(Relaxed);
            assert!(
                now < rank,
                "lock order: {rank} wanted while holding {now} (1 pin, 2 table, 4 leaf, 8 frames)"
            );
            held.store(now | rank, Relaxed);
        }
    }
    /// Undoes [`take`].
    #[inline]
    pub fn give<P: Platform>(p: &'static P, rank: u32) {
        if cfg!(debug_assertions) {
            let held = &p.local(p.cpu()).held;
            held.store(held.load(Relaxed) & !rank, Relaxed);
            p.leave();
        }
    }
    /// Runs what may run in an interrupt, whatever is held: debug builds panic when it takes a lock.
    #[inline]
    pub fn nothing_more<P: Platform, T>(p: &'static P, f: impl FnOnce() -> T) -> T {
        if !cfg!(debug_assertions) {
            return f();
        }
        let held = &p.local(p.enter()).held;
        let before = held.load(Relaxed);
        held.store(u32::MAX, Relaxed);
        let answer = f();
        held.store(before, Relaxed);
        p.leave();
        answer
    }
    /// Panics in debug builds when this CPU holds a spin lock; it may be pinned.
    #[inline]
    pub fn no_lock<P: Platform>(p: &'static P, what: &str) {
        if cfg!(debug_assertions) {
            let now = p.local(p.cpu()).held.load(Relaxed);
            assert!(now <= PIN, "{what} while holding {now} (1 pin, 2 table, 4 leaf, 8 frames)");
        }
    }
    /// Panics in debug builds when this CPU holds a pin or a spin lock.
    #[inline]
    pub fn none<P: Platform>(p: &'static P, what: &str) {
        if cfg!(debug_assertions) {
            let now = p.local(p.cpu()).held.load(Relaxed);
            assert!(now == 0, "{what} while holding {now} (1 pin, 2 table, 4 leaf, 8 frames)");
        }
    }
}
