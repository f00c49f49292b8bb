//! Atomics (those of loom or shuttle when their tests are built), locks over the platform's, the epoch, and waiting.

pub mod epoch;
mod keyed;
mod lock;
mod padded;
#[cfg(shuttle)]
mod points;
mod wait;

pub(crate) use keyed::{Key, Keyed};
pub(crate) use lock::held;
pub use lock::{Lock, LockGuard, RawLock, Spin, SpinGuard, Writer};
pub(crate) use padded::CachePadded;
pub(crate) use wait::Bells;
pub use wait::{Awaited, Wait};

/// The atomics the library is written with: loom's under `cfg(loom)`, with scheduling points under `cfg(shuttle)`, `core`'s
/// otherwise.
pub mod atomic {
    #[cfg(shuttle)]
    pub use super::points::{AtomicPtr, AtomicU32, AtomicU64};
    pub use core::sync::atomic::Ordering::{self, AcqRel, Acquire, Relaxed, Release, SeqCst};
    #[cfg(shuttle)]
    pub use core::sync::atomic::fence;
    #[cfg(not(any(loom, shuttle)))]
    pub use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, fence};
    #[cfg(loom)]
    pub use loom::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, fence};
    /// Counters that decide nothing: never modelled, nor points to schedule at, so that they do not widen a model's state.
    pub mod plain {
        pub use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize};
    }
}

/// A value that those touch in turn who agree on it by other means, which loom checks.
pub(crate) mod cell {
    #[cfg(not(loom))]
    use core::cell::UnsafeCell;
    #[cfg(loom)]
    use loom::cell::UnsafeCell;

    pub(crate) struct Cell<T>(UnsafeCell<T>);

    impl<T> Cell<T> {
        pub fn new(value: T) -> Self {
            Cell(UnsafeCell::new(value))
        }
        /// # Safety
        /// Nobody else touches the value meanwhile.
        #[inline]
        pub unsafe fn with_mut<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
            #[cfg(not(loom))]
            let at = self.0.get();
            // SAFETY: the caller's promise.
            #[cfg(not(loom))]
            return f(unsafe { &mut *at });
            // SAFETY: the caller's promise.
            #[cfg(loom)]
            self.0.with_mut(|at| f(unsafe { &mut *at }))
        }
    }
}
