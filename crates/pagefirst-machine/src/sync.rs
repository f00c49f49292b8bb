//! What the machine's threads share and wait with: the host's, or under `cfg(shuttle)` what shuttle schedules.
//!
//! Under shuttle all threads of a test are one thread of the host, so nothing may wait for the host, and what belongs to
//! a thread is kept by shuttle. What a CPU's hardware and the locks do are points at which another thread may run; the
//! machine's counters and checks are not.

#[cfg(not(shuttle))]
mod host {
    pub(crate) use parking_lot::{Mutex, RawMutex};
    pub(crate) use std::sync::atomic::AtomicU32;
    pub(crate) use std::thread::{sleep, spawn};
    pub(crate) use std::thread_local;

    /// One turn of a spin: mostly a pause, now and then the host's scheduler.
    #[inline]
    pub(crate) fn relax() {
        use std::cell::Cell;
        thread_local!(static TURNS: Cell<u32> = const { Cell::new(0) });
        let turns = TURNS.get().wrapping_add(1);
        TURNS.set(turns);
        if turns.is_multiple_of(64) { std::thread::yield_now() } else { std::hint::spin_loop() }
    }

    /// A CPU tries an access again that has just faulted; it is preempted now and then.
    #[inline]
    pub(crate) fn again() {}

    /// Another number each time.
    pub(crate) fn unique() -> u64 {
        use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
        static NEXT: AtomicU64 = AtomicU64::new(1);
        NEXT.fetch_add(1, Relaxed)
    }
}

#[cfg(shuttle)]
mod scheduled {
    pub(crate) use pagefirst::sync::atomic::AtomicU32;
    use parking_lot::lock_api::{self, GuardSend};
    use shuttle::future::batch_semaphore::{BatchSemaphore, Fairness};
    pub(crate) use shuttle::thread::{sleep, spawn};
    pub(crate) use shuttle::thread_local;

    pub(crate) use shuttle::thread::yield_now as relax;
    pub(crate) use shuttle::thread::yield_now as again;

    /// Another number each time, the same in each run of a schedule.
    pub(crate) fn unique() -> u64 {
        use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
        shuttle::lazy_static! {
            static ref NEXT: AtomicU64 = AtomicU64::new(1);
        }
        NEXT.fetch_add(1, Relaxed)
    }

    /// Whether it is held, with a thread asleep that waits for it.
    pub(crate) struct RawMutex(BatchSemaphore);

    // SAFETY: a semaphore of one, taken by `lock` and given back by `unlock`.
    unsafe impl lock_api::RawMutex for RawMutex {
        const INIT: Self = RawMutex(BatchSemaphore::const_new(1, Fairness::Unfair));
        type GuardMarker = GuardSend;

        fn lock(&self) {
            self.0.acquire_blocking(1).expect("never closed");
        }
        fn try_lock(&self) -> bool {
            self.0.try_acquire(1).is_ok()
        }
        unsafe fn unlock(&self) {
            self.0.release(1);
        }
    }

    pub(crate) type Mutex<T> = lock_api::Mutex<RawMutex, T>;
}

#[cfg(not(shuttle))]
pub(crate) use host::*;
#[cfg(shuttle)]
pub(crate) use scheduled::*;
