//! The atomics of `cfg(shuttle)`: `core`'s, and before each operation a point at which shuttle may run another thread.
//!
//! They are laid out as `core`'s, which shuttle's own are not: tables and metadata are words in memory, and stay that.
//!
//! Shuttle runs one thread at a time, so whatever ordering an operation names it is sequentially consistent here. What
//! weaker orderings allow is seen by the loom models alone.

#![expect(missing_docs, reason = "their methods are `core`'s")]

use core::sync::atomic::Ordering;
use core::time::Duration;

/// Shuttle knows no time: this is its plain scheduling point.
#[inline]
fn point() {
    shuttle::thread::sleep(Duration::ZERO);
}

macro_rules! atomic {
    ($(#[$doc:meta])* $name:ident $(<$t:ident>)?, $value:ty) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(Debug)]
        pub struct $name $(<$t>)? (core::sync::atomic::$name $(<$t>)?);

        impl $(<$t>)? $name $(<$t>)? {
            pub const fn new(value: $value) -> Self {
                $name(core::sync::atomic::$name::new(value))
            }
            pub fn load(&self, order: Ordering) -> $value {
                point();
                self.0.load(order)
            }
            pub fn store(&self, value: $value, order: Ordering) {
                point();
                self.0.store(value, order);
            }
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                point();
                self.0.swap(value, order)
            }
            pub fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                point();
                self.0.compare_exchange(current, new, success, failure)
            }
            pub fn compare_exchange_weak(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.compare_exchange(current, new, success, failure)
            }
        }
    };
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $value:ty: $($op:ident),*) => {
        atomic!($(#[$doc])* $name, $value);

        impl $name {
            $(pub fn $op(&self, value: $value, order: Ordering) -> $value {
                point();
                self.0.$op(value, order)
            })*
            pub fn fetch_update(
                &self,
                success: Ordering,
                failure: Ordering,
                mut f: impl FnMut($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                let mut found = self.load(failure);
                while let Some(new) = f(found) {
                    match self.compare_exchange(found, new, success, failure) {
                        Ok(found) => return Ok(found),
                        Err(newer) => found = newer,
                    }
                }
                Err(found)
            }
        }
    };
}

atomic!(
    /// A pointer.
    AtomicPtr<T>, *mut T
);
number!(
    /// 32 bits.
    AtomicU32, u32: fetch_add, fetch_sub, fetch_and, fetch_or, fetch_max
);
number!(
    /// 64 bits.
    AtomicU64, u64: fetch_add, fetch_sub, fetch_and, fetch_or, fetch_max
);
