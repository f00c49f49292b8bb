//! How a fault ends.

use super::Ticket;
use crate::arch::Format;
use crate::limit::{LimitId, OverLimit, Unavailable};
use crate::platform::Platform;
use crate::types::VirtAddr;

/// How a fault ended. After all but `Error` the access is tried again, after `Blocked` not before the ticket is
/// ready.
#[must_use]
pub enum Outcome<'a, P: Platform> {
    /// The page is mapped as the access needs it.
    Mapped {
        /// The page had to be read from its file.
        major: bool,
        /// The entry spans more than a small page.
        huge: bool,
        /// Neighbours mapped beside it.
        around: u32,
    },
    /// Nothing was left to do.
    Spurious,
    /// Something has to happen first.
    Blocked(Ticket<'a, P>),
    /// The access is not to be.
    Error(FaultError),
}

impl<P: Platform> Outcome<'_, P> {
    /// Why the access is not to be, if it is not.
    pub fn error(&self) -> Option<FaultError> {
        match self {
            Outcome::Error(error) => Some(*error),
            _ => None,
        }
    }
}

impl<P: Platform> core::fmt::Debug for Outcome<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Outcome::Mapped { major, huge, around } => {
                write!(f, "Mapped {{ major: {major}, huge: {huge}, around: {around} }}")
            }
            Outcome::Spurious => f.write_str("Spurious"),
            Outcome::Blocked(ticket) => f.debug_tuple("Blocked").field(ticket).finish(),
            Outcome::Error(error) => f.debug_tuple("Error").field(error).finish(),
        }
    }
}

/// Why an access is not to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FaultError {
    /// SIGSEGV.
    #[error("{0}")]
    Segv(Segv),
    /// SIGBUS.
    #[error("{0}")]
    Bus(Bus),
    /// Neither page nor table could be had, after everything held back was freed. The embedder frees memory or ends
    /// the program; the library neither waits nor kills (X18).
    #[error("out of memory")]
    NoMemory,
    /// The space's limit, or one above it, which is named here, is reached. The embedder takes memory from whoever shares
    /// it, raises it, or ends a program; and the access is tried again.
    #[error("over a limit")]
    OverLimit(LimitId),
}

impl From<Unavailable> for FaultError {
    fn from(why: Unavailable) -> Self {
        match why {
            Unavailable::NoMemory => FaultError::NoMemory,
            Unavailable::OverLimit(OverLimit(id)) => FaultError::OverLimit(id),
        }
    }
}

/// Why an address is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Segv {
    /// Nothing is mapped there.
    #[error("nothing mapped")]
    NotMapped,
    /// What is mapped there does not allow the access.
    #[error("access not allowed")]
    Access,
    /// Hardware does not translate the address, and traps without telling it ([`Format::NON_CANONICAL_TRAPS`]).
    #[error("non-canonical address")]
    NonCanonical,
}

impl Segv {
    /// Why an address is refused where no program can have anything.
    #[inline]
    pub(crate) fn nowhere<F: Format>(addr: VirtAddr) -> Segv {
        if F::NON_CANONICAL_TRAPS && !F::is_canonical(addr) { Segv::NonCanonical } else { Segv::NotMapped }
    }
}

/// Why a page cannot be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Bus {
    /// The file ends before it.
    #[error("beyond the end of the file")]
    BeyondEnd,
    /// Hardware reported a memory error in it.
    #[error("hardware memory error")]
    Poison,
    /// It could not be read.
    #[error("read error")]
    Io,
    /// Its file does not let it be written to ([`File::page_mkwrite`](crate::file::File::page_mkwrite)).
    #[error("write refused")]
    Refused,
}

/// A signal's number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Signal {
    /// SIGBUS, 7.
    Bus = 7,
    /// SIGSEGV, 11.
    Segv = 11,
}

impl FaultError {
    /// Linux's signal and `si_code`; `None` for [`NoMemory`](FaultError::NoMemory) and
    /// [`OverLimit`](FaultError::OverLimit), which have none.
    /// `asm-generic/siginfo.h`: SEGV_MAPERR 1, SEGV_ACCERR 2, SI_KERNEL 128, BUS_ADRERR 2, BUS_MCEERR_AR 4.
    pub fn signal(self) -> Option<(Signal, i32)> {
        Some(match self {
            FaultError::Segv(Segv::NotMapped) => (Signal::Segv, 1),
            FaultError::Segv(Segv::Access) => (Signal::Segv, 2),
            FaultError::Segv(Segv::NonCanonical) => (Signal::Segv, 128),
            FaultError::Bus(Bus::BeyondEnd | Bus::Io | Bus::Refused) => (Signal::Bus, 2),
            FaultError::Bus(Bus::Poison) => (Signal::Bus, 4),
            FaultError::NoMemory | FaultError::OverLimit(_) => return None,
        })
    }
}
