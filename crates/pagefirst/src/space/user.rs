//! Copies between the kernel and user memory, and compare-exchange on a word of it; of any space, running or not.
//!
//! A copy goes page by page, and does what an MMU does: it walks to the entry, and if the entry allows the access, the
//! bytes move and the entry is marked accessed, and dirty. All of it is one section under the lock of the table that
//! holds the entry; the bytes move through the direct map. Where an MMU would fault, the copy faults, with nothing
//! locked, and looks again. The entry is the only authority; the VMA matters to the fault alone.
//!
//! | beside a copy | why it is right |
//! |---|---|
//! | unmap, discard, move, truncate | the entry goes under the same lock, and its page is freed after that: a copy comes before, while the page is mapped, or finds nothing |
//! | protect, fork | the entry is narrowed under the same lock: no write comes after it |
//! | copy-on-write | the entry is replaced under the same lock, and becomes writable only when no CPU can reach the old page; a copy writes where the entry is writable |
//! | split of a huge entry | the entry is in transit, and allows nothing: the copy faults and comes again |
//! | user code | bytes move as words, a part of a word in one atomic step: nothing beside what is written is touched |
//! | write-back, reclaim | a write has marked its entry dirty before it unlocks |
//!
//! A reference to the page instead of the lock would not do: between taking it and writing, the mapping may go, or a
//! fork may share the page with another process (CVE-2020-29374). A kernel whose CPU runs the space may also use the
//! user mapping itself, with a fix-up for its own faults, and call [`fault`](AddressSpace::fault) from there: both obey
//! the same entries. `docs/decisions/004` says why the library does not.
//!
//! A copy that stops half-way says how much is done. One that is blocked goes on there when the ticket is ready.

use super::AddressSpace;
use crate::fault::{Bus, FaultError, Outcome, Segv, Ticket};
use crate::frame::{WORDS, bytes};
use crate::platform::Platform;
use crate::sync::atomic::plain::AtomicU64;
use crate::sync::epoch::Pin;
use crate::table::Accessed;
use crate::types::{Access, PAGE_SIZE, VirtAddr, VirtRange};
use core::fmt;
use core::ops::Range;

/// A copy that stopped half-way.
#[must_use]
pub struct Stopped<'a, P: Platform> {
    /// Bytes copied: all before the first page that could not be had.
    pub done: usize,
    /// Why it stopped there.
    pub why: Why<'a, P>,
}

/// Why user memory could not be used.
pub enum Why<'a, P: Platform> {
    /// The access is not to be.
    Error(FaultError),
    /// Something has to happen first: go on when the ticket is ready, and keep it until then.
    Blocked(Ticket<'a, P>),
    /// A word that is not aligned to its size. Copies do not ask for that.
    Misaligned,
}

impl<P: Platform> Why<'_, P> {
    /// Why the access is not to be, if it is not.
    pub fn error(&self) -> Option<FaultError> {
        match self {
            Why::Error(error) => Some(*error),
            Why::Blocked(_) | Why::Misaligned => None,
        }
    }
    /// Linux's errno; `None` for what is only blocked.
    pub fn errno(&self) -> Option<i32> {
        const EFAULT: i32 = 14;
        const ENOMEM: i32 = 12;
        const EINVAL: i32 = 22;
        match self {
            Why::Error(FaultError::NoMemory | FaultError::OverLimit(_)) => Some(ENOMEM),
            Why::Error(FaultError::Segv(_) | FaultError::Bus(_)) => Some(EFAULT),
            Why::Misaligned => Some(EINVAL),
            Why::Blocked(_) => None,
        }
    }
}

impl<P: Platform> fmt::Display for Why<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Error(error) => write!(f, "{error}"),
            Why::Blocked(ticket) => write!(f, "waits for {ticket:?}"),
            Why::Misaligned => write!(f, "a word that is not aligned"),
        }
    }
}

impl<P: Platform> fmt::Display for Stopped<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stopped after {} bytes: {}", self.done, self.why)
    }
}

impl<P: Platform> fmt::Debug for Why<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<P: Platform> fmt::Debug for Stopped<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<P: Platform> core::error::Error for Why<'_, P> {}
impl<P: Platform> core::error::Error for Stopped<'_, P> {}

impl<P: Platform> AddressSpace<P> {
    /// Copies user memory from `from` on into `to`. An aligned word is read in one step. Physical memory and what a
    /// [`Mapper`](crate::table::Mapper) mapped are user memory only if [`Platform::is_memory`] says so.
    ///
    /// Called like [`fault`](AddressSpace::fault), with no lock and no pin held. The buffer is memory that does not
    /// fault.
    ///
    /// # Errors
    /// [`Stopped`]. A range that is not all within what a program can have is refused whole.
    pub fn copy_in(&self, from: VirtAddr, to: &mut [u8]) -> Result<(), Stopped<'_, P>> {
        self.by_page(from, to.len(), Access::Read, |page, at, part| bytes::read(page, at, &mut to[part]))
    }

    /// Copies `from` into user memory from `to` on. An aligned word is written in one step.
    ///
    /// Called like [`fault`](AddressSpace::fault), with no lock and no pin held. The buffer is memory that does not
    /// fault.
    ///
    /// # Errors
    /// [`Stopped`]. A range that is not all within what a program can have is refused whole.
    pub fn copy_out(&self, to: VirtAddr, from: &[u8]) -> Result<(), Stopped<'_, P>> {
        self.by_page(to, from.len(), Access::Write, |page, at, part| bytes::write(page, at, &from[part]))
    }

    /// Writes `new` to the 32-bit word of user memory at `at` if it is `old`, in one atomic step. Tells what was there,
    /// as `Ok` if it was written. Like the instruction, it needs the right to write either way, and makes the page
    /// dirty.
    ///
    /// # Errors
    /// [`Why`].
    pub fn compare_exchange_u32(
        &self,
        at: VirtAddr,
        old: u32,
        new: u32,
    ) -> Result<Result<u32, u32>, Why<'_, P>> {
        let found = self.exchange(at, old.to_ne_bytes(), new.to_ne_bytes())?;
        Ok(found.map(u32::from_ne_bytes).map_err(u32::from_ne_bytes))
    }

    /// The same for a 64-bit word.
    ///
    /// # Errors
    /// [`Why`].
    pub fn compare_exchange_u64(
        &self,
        at: VirtAddr,
        old: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, Why<'_, P>> {
        let found = self.exchange(at, old.to_ne_bytes(), new.to_ne_bytes())?;
        Ok(found.map(u64::from_ne_bytes).map_err(u64::from_ne_bytes))
    }

    fn exchange<const N: usize>(
        &self,
        at: VirtAddr,
        old: [u8; N],
        new: [u8; N],
    ) -> Result<Result<[u8; N], [u8; N]>, Why<'_, P>> {
        if !at.is_aligned(N as u64) {
            return Err(Why::Misaligned);
        }
        let mut found = Err(new);
        let swap = |page: &[AtomicU64; WORDS], at, _| found = bytes::compare_exchange(page, at, old, new);
        match self.by_page(at, N, Access::Write, swap) {
            Ok(()) => Ok(found),
            Err(stopped) => Err(stopped.why),
        }
    }

    /// Gives `part` every page of a range in turn: its contents, the place in it, and which of the `len` bytes those
    /// are. Called under a lock.
    fn by_page(
        &self,
        start: VirtAddr,
        len: usize,
        access: Access,
        mut part: impl FnMut(&[AtomicU64; WORDS], usize, Range<usize>),
    ) -> Result<(), Stopped<'_, P>> {
        let stopped = |done, why| Err(Stopped { done, why });
        if len == 0 {
            return Ok(());
        }
        // Before any walk: the root may have a kernel's half.
        if !VirtRange::sized(start, len as u64).is_some_and(|range| self.usable().covers(range)) {
            return stopped(0, Why::Error(FaultError::Segv(Segv::nowhere::<P::Format>(start))));
        }
        let mut done = 0;
        while done < len {
            let va = VirtAddr(start.0 + done as u64);
            let at = (va.0 % PAGE_SIZE) as usize;
            let end = len.min(done + PAGE_SIZE as usize - at);
            let moved =
                self.page_table().access(&Pin::new(self.p), va, access, |page| part(page, at, done..end));
            match moved {
                Accessed::Done(()) => {
                    done = end;
                    continue;
                }
                Accessed::Lost => return stopped(done, Why::Error(FaultError::Bus(Bus::Poison))),
                Accessed::NotMemory => return stopped(done, Why::Error(FaultError::Segv(Segv::Access))),
                Accessed::Faults => {}
            }
            match self.fault(va, access) {
                Outcome::Mapped { .. } => {}
                // A huge page may be being split: whoever does that may wait for this CPU.
                Outcome::Spurious => self.p.relax(),
                Outcome::Blocked(ticket) => return stopped(done, Why::Blocked(ticket)),
                Outcome::Error(error) => return stopped(done, Why::Error(error)),
            }
        }
        Ok(())
    }
}
