//! Why a call of the page cache failed.

use crate::fault::Ticket;
use crate::limit::{OverLimit, Unavailable};
use crate::platform::Platform;
use crate::types::NoMemory;
use core::fmt;

/// The device behind a file failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("input/output error")]
pub struct IoError;

/// Why a page of a file could not be had.
#[derive(thiserror::Error)]
pub enum ReadError<P: Platform> {
    /// It lies beyond the end of the file.
    #[error("beyond the end of the file")]
    BeyondEnd,
    /// The file could not read it.
    #[error("input/output error")]
    Io,
    /// Hardware reported a memory error in it.
    #[error("memory error in the page")]
    Poisoned,
    /// A limit is reached.
    #[error(transparent)]
    OverLimit(#[from] OverLimit),
    /// No memory is left for it.
    #[error("out of memory")]
    NoMemory,
    /// It is being read in: call again when the ticket is ready, and keep it until then.
    #[error("being read in")]
    Blocked(Ticket<'static, P>),
    /// It is being removed: until this turn of the file is over. Then look again.
    #[error("being removed")]
    Removing(u64),
}

impl<P: Platform> From<NoMemory> for ReadError<P> {
    fn from(NoMemory: NoMemory) -> Self {
        ReadError::NoMemory
    }
}

impl<P: Platform> From<Unavailable> for ReadError<P> {
    fn from(why: Unavailable) -> Self {
        match why {
            Unavailable::NoMemory => ReadError::NoMemory,
            Unavailable::OverLimit(over) => ReadError::OverLimit(over),
        }
    }
}

impl<P: Platform> fmt::Debug for ReadError<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReadError::BeyondEnd => f.write_str("BeyondEnd"),
            ReadError::Io => f.write_str("Io"),
            ReadError::Poisoned => f.write_str("Poisoned"),
            ReadError::OverLimit(over) => f.debug_tuple("OverLimit").field(over).finish(),
            ReadError::NoMemory => f.write_str("NoMemory"),
            ReadError::Blocked(ticket) => f.debug_tuple("Blocked").field(ticket).finish(),
            ReadError::Removing(turn) => f.debug_tuple("Removing").field(turn).finish(),
        }
    }
}

/// Why a file's size was not changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SizeError {
    /// The end would not be a 64-bit number.
    #[error("file too large")]
    TooLarge,
}

/// Why a write to a file failed.
#[derive(thiserror::Error)]
pub enum WriteError<P: Platform> {
    /// The page to write to could not be had.
    #[error(transparent)]
    Page(#[from] ReadError<P>),
    /// The file could not grow.
    #[error(transparent)]
    Size(#[from] SizeError),
}

impl<P: Platform> From<NoMemory> for WriteError<P> {
    fn from(NoMemory: NoMemory) -> Self {
        WriteError::Page(ReadError::NoMemory)
    }
}

impl<P: Platform> From<Unavailable> for WriteError<P> {
    fn from(why: Unavailable) -> Self {
        WriteError::Page(why.into())
    }
}

impl<P: Platform> fmt::Debug for WriteError<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WriteError::Page(e) => f.debug_tuple("Page").field(e).finish(),
            WriteError::Size(e) => f.debug_tuple("Size").field(e).finish(),
        }
    }
}

/// Why write-back did not store all.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WriteBackError {
    /// The file failed to store a page; the others were stored.
    #[error(transparent)]
    Io(#[from] IoError),
    /// There is no frame to copy pages into: the rest was not stored.
    #[error(transparent)]
    NoMemory(#[from] NoMemory),
}

/// Why what was written is not known to be stored.
#[derive(thiserror::Error)]
pub enum SyncError<P: Platform> {
    /// A page could not be stored, now or since the caller was told last. All that could be stored is.
    #[error(transparent)]
    Io(#[from] IoError),
    /// There is no frame to copy pages into: the call may come again.
    #[error(transparent)]
    NoMemory(#[from] NoMemory),
    /// A page is being stored, or some of it removed: call again when the ticket is ready.
    #[error("being stored")]
    Blocked(Ticket<'static, P>),
}

impl<P: Platform> fmt::Debug for SyncError<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SyncError::Io(IoError) => f.write_str("Io"),
            SyncError::NoMemory(NoMemory) => f.write_str("NoMemory"),
            SyncError::Blocked(ticket) => f.debug_tuple("Blocked").field(ticket).finish(),
        }
    }
}
