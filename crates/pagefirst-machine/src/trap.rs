//! What a program would get as a signal.

use pagefirst::fault::{FaultError, Segv, Signal};
use pagefirst::types::{Access, VirtAddr};
use std::fmt;

/// An access that is not to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trap {
    /// The address.
    pub addr: VirtAddr,
    /// What was tried.
    pub access: Access,
    /// Why not.
    pub error: FaultError,
}

impl Trap {
    /// The signal and its `si_code`; `None` when memory is out, for which there is none.
    pub fn signal(&self) -> Option<(Signal, i32)> {
        self.error.signal()
    }
    /// The signal's `si_addr`: hardware does not tell a non-canonical address.
    pub fn si_addr(&self) -> u64 {
        if self.error == FaultError::Segv(Segv::NonCanonical) { 0 } else { self.addr.0 }
    }
}

impl fmt::Display for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = match self.access {
            Access::Read => "read",
            Access::Write => "write",
            Access::Execute => "execute",
        };
        write!(f, "{access} at {}: {}", self.addr, self.error)
    }
}

impl std::error::Error for Trap {}
