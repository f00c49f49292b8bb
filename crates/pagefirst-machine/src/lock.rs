//! The platform's two kinds of locks, and the machine's own.

use crate::machine::Machine;
use crate::sync::{AtomicU32, RawMutex, relax};
use crossbeam_utils::CachePadded;
use pagefirst::arch::Format;
use pagefirst::platform::Platform;
use pagefirst::sync::RawLock;
use parking_lot::lock_api::RawMutex as _;
use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// A lock that spins; a thread that spins long lets others run, since the host may have preempted the holder.
#[derive(Debug)]
pub struct SpinLock(AtomicU32);

const FREE: u32 = 0;
const TAKEN: u32 = 1;

impl Default for SpinLock {
    fn default() -> Self {
        SpinLock(AtomicU32::new(FREE))
    }
}

impl SpinLock {
    #[inline]
    fn try_acquire(&self) -> bool {
        self.0.load(Relaxed) == FREE && self.0.swap(TAKEN, Acquire) == FREE
    }
}

// SAFETY: the lock is taken by one swap that found it free and given back by its owner alone; Acquire and Release order
// what is written under it.
unsafe impl<F: Format> RawLock<Machine<F>> for SpinLock {
    #[inline]
    fn lock(&self, machine: &'static Machine<F>) {
        while !self.try_acquire() {
            machine.relax();
        }
    }
    #[inline]
    fn try_lock(&self, _: &'static Machine<F>) -> bool {
        self.try_acquire()
    }
    #[inline]
    unsafe fn unlock(&self, _: &'static Machine<F>) {
        self.0.store(FREE, Release);
    }
}

/// A lock that sleeps.
pub struct WriterLock(RawMutex);

impl Default for WriterLock {
    fn default() -> Self {
        WriterLock(RawMutex::INIT)
    }
}

// SAFETY: parking_lot's RawMutex keeps the same contract.
unsafe impl<F: Format> RawLock<Machine<F>> for WriterLock {
    fn lock(&self, _: &'static Machine<F>) {
        self.0.lock();
    }
    fn try_lock(&self, _: &'static Machine<F>) -> bool {
        self.0.try_lock()
    }
    unsafe fn unlock(&self, _: &'static Machine<F>) {
        // SAFETY: the caller holds it.
        unsafe { self.0.unlock() }
    }
}

/// A value of one CPU that others look into now and then: taking it costs its owner one atomic swap. Who waits comes
/// before who takes it again and again, as an interrupt comes before the next instruction.
pub(crate) struct Mostly<T> {
    state: CachePadded<State>,
    value: UnsafeCell<T>,
}

struct State {
    taken: AtomicU32,
    waiting: AtomicU32,
}

// SAFETY: the value is reached through the guard alone, and the flag excludes.
unsafe impl<T: Send> Sync for Mostly<T> {}

impl<T> Mostly<T> {
    pub fn new(value: T) -> Self {
        let state = State { taken: AtomicU32::new(FREE), waiting: AtomicU32::new(0) };
        Mostly { state: CachePadded::new(state), value: UnsafeCell::new(value) }
    }
    #[inline]
    pub fn lock(&self) -> MostlyGuard<'_, T> {
        if self.state.waiting.load(Relaxed) > 0 {
            self.give_way();
        }
        if self.state.taken.swap(TAKEN, Acquire) == TAKEN {
            self.wait();
        }
        MostlyGuard(self)
    }
    /// Lets those who wait go first, for a while: they may be waiting for somebody else by now.
    #[cold]
    fn give_way(&self) {
        let waits = || self.state.waiting.load(Relaxed) > 0;
        (0..256).take_while(|_| waits()).for_each(|_| relax());
    }
    #[cold]
    fn wait(&self) {
        let State { taken, waiting } = &*self.state;
        waiting.fetch_add(1, Relaxed);
        while taken.load(Relaxed) == TAKEN || taken.swap(TAKEN, Acquire) == TAKEN {
            relax();
        }
        waiting.fetch_sub(1, Relaxed);
    }
}

/// Possession proves that the lock is held.
pub(crate) struct MostlyGuard<'a, T>(&'a Mostly<T>);

impl<T> Deref for MostlyGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the guard proves that the flag is ours.
        unsafe { &*self.0.value.get() }
    }
}
impl<T> DerefMut for MostlyGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard proves that the flag is ours, and `&mut self` that no other borrow of it lives.
        unsafe { &mut *self.0.value.get() }
    }
}
impl<T> Drop for MostlyGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.0.state.taken.store(FREE, Release);
    }
}
