//! Why a mapping call did nothing.

use super::Why;
use crate::limit::{LimitId, OverLimit, Unavailable};
use crate::platform::Platform;
use crate::types::{NoMemory, VirtAddr, VirtRange};
use core::fmt;

/// Why a mapping call changed nothing, with the range at fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// Not page-aligned, empty, or past the end of the address space.
    #[error("not a page-aligned, non-empty range: {0:?}")]
    Invalid(VirtRange),
    /// Outside the user range, or below the lowest address allowed.
    #[error("outside the addresses that can be mapped: {0:?}")]
    OutOfRange(VirtRange),
    /// Something is mapped there, or a stack's guard gap is.
    #[error("taken already: {0:?}")]
    Taken(VirtRange),
    /// Nothing is mapped in a part of the range.
    #[error("not mapped: {0:?}")]
    NotMapped(VirtRange),
    /// No free range is large enough.
    #[error("no free range of {0} bytes")]
    NoRoom(u64),
    /// The limit on the number of VMAs.
    #[error("more than {0} mappings")]
    TooMany(usize),
    /// The limit on mapped bytes.
    #[error("more than {0} bytes mapped")]
    TooLarge(u64),
    /// Writable and executable at once, which the policy denies; or write access to what does not allow it.
    #[error("rights not allowed: {0:?}")]
    Denied(VirtRange),
    /// Memory is out.
    #[error("out of memory")]
    NoMemory,
    /// The space's limit, or one above it, which is named here, is reached.
    #[error("over a limit")]
    OverLimit(LimitId),
}

impl From<Unavailable> for MapError {
    fn from(why: Unavailable) -> Self {
        match why {
            Unavailable::NoMemory => MapError::NoMemory,
            Unavailable::OverLimit(OverLimit(id)) => MapError::OverLimit(id),
        }
    }
}

impl From<NoMemory> for MapError {
    fn from(_: NoMemory) -> Self {
        MapError::NoMemory
    }
}

impl MapError {
    /// Linux's errno.
    pub fn errno(&self) -> i32 {
        const EACCES: i32 = 13;
        const EEXIST: i32 = 17;
        const EINVAL: i32 = 22;
        const ENOMEM: i32 = 12;
        match self {
            MapError::Invalid(_) => EINVAL,
            MapError::Taken(_) => EEXIST,
            MapError::Denied(_) => EACCES,
            MapError::OutOfRange(_)
            | MapError::NotMapped(_)
            | MapError::NoRoom(_)
            | MapError::TooMany(_)
            | MapError::TooLarge(_)
            | MapError::NoMemory
            | MapError::OverLimit(_) => ENOMEM,
        }
    }
}

/// Where and why populating stopped. The mapping itself is there.
pub struct Unpopulated<'a, P: Platform> {
    /// The first page that is not there.
    pub at: VirtAddr,
    /// Why. When it is blocked, [`populate`](super::AddressSpace::populate) goes on from there when the ticket is ready,
    /// which is kept until then.
    pub why: Why<'a, P>,
}

impl<P: Platform> fmt::Debug for Unpopulated<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unpopulated").field("at", &self.at).field("why", &self.why).finish()
    }
}
