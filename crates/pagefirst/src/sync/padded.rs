//! Values on cache lines of their own.

use core::ops::Deref;

/// A value that shares no cache line with anything else, so that who writes it takes no line from those who read what stands
/// beside it. 128 bytes: lines are fetched in pairs (Intel's optimization manual, "spatial prefetcher"), or as long as that.
#[repr(align(128))]
pub(crate) struct CachePadded<T>(pub T);

impl<T> Deref for CachePadded<T> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        &self.0
    }
}
