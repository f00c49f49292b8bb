//! Why a mapping call did nothing.

use crate::fault::FaultError;
use crate::limit::{LimitId, OverLimit, Unavailable};
use crate::types::{NoMemory, VirtAddr, VirtRange};

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
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unpopulated {
    /// The first page that is not there.
    pub at: VirtAddr,
    /// Why.
    pub why: FaultError,
}
