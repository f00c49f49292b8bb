//! Atomics (loom's when models are built), locks over the platform's, and the epoch.

pub mod epoch;
mod lock;

pub(crate) use lock::held;
pub use lock::{Lock, LockGuard, RawLock, Spin, SpinGuard, Writer};

/// The atomics the library is written with: loom's under `cfg(loom)`, `core`'s otherwise.
pub mod atomic {
    pub use core::sync::atomic::Ordering::{self, AcqRel, Acquire, Relaxed, Release, SeqCst};
    #[cfg(not(loom))]
    pub use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, fence};
    #[cfg(loom)]
    pub use loom::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, fence};
    /// Counters that decide nothing: never modelled, so that they do not widen a model's state.
    pub mod plain {
        pub use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize};
    }
}
