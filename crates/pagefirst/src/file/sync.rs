//! Knowing that what was written is stored: `fsync(2)`, `msync(2)`.
//!
//! First every page of the range is stored that is dirty. One that is being stored is waited for before, for what is stored
//! was read before it was written to again. Then all that is being stored is waited for. The call never goes back in the
//! range; so it ends though programs go on writing.
//!
//! **Errors** are the file's, whoever met them: each keeper of a [`StoreErrors`] is told once of those that came since he was
//! told last. One that nobody was told of yet, is told to who comes new.

use super::cache::FileCache;
use super::error::{IoError, SyncError, WriteBackError};
use super::index::LAST_INDEX;
use super::store::WriteBack;
use crate::fault::Ticket;
use crate::frame::{Frame, FrameFlags, FrameMeta};
use crate::platform::Platform;
use crate::sync::atomic::{AcqRel, Acquire, AtomicU64};
use core::ops::Range;

/// A call of [`FileCache::sync`] at work: what is left of it to do.
#[derive(Clone, Debug)]
pub struct Syncing {
    pages: Range<u64>,
    /// What has not been begun, or waited for, yet.
    left: Range<u64>,
    /// All is begun.
    waits: bool,
}

impl Syncing {
    /// For these pages, by their indexes.
    pub const fn of(pages: Range<u64>) -> Self {
        let left = pages.start..pages.end;
        Syncing { pages, left, waits: false }
    }
    /// For the whole file.
    pub const fn all() -> Self {
        Self::of(0..LAST_INDEX + 1)
    }
}

/// What the owner of an open file, or whoever else syncs, knows of errors of storing it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoreErrors(u64);

/// How many errors there were of which somebody was told before the next; and whether that holds for the last one.
pub(super) struct Errors(AtomicU64);

const TOLD: u64 = 1;

impl Errors {
    pub fn new() -> Self {
        Errors(AtomicU64::new(TOLD))
    }
    fn note(&self) {
        let next = |now| if now & TOLD != 0 { Some(now + 1) } else { None };
        // Beside one that nobody was told of, another is no news.
        let _ = self.0.fetch_update(AcqRel, Acquire, next);
    }
    fn seen(&self) -> StoreErrors {
        let now = self.0.load(Acquire);
        StoreErrors(if now & TOLD != 0 { now } else { 0 })
    }
    fn tell(&self, seen: &mut StoreErrors) -> Result<(), IoError> {
        let now = self.0.fetch_or(TOLD, AcqRel) | TOLD;
        let before = core::mem::replace(seen, StoreErrors(now));
        if before == *seen { Ok(()) } else { Err(IoError) }
    }
}

impl<P: Platform> FileCache<P> {
    /// What is to be kept from here on by whoever will [`sync`](Self::sync), as with each open file.
    pub fn store_errors(&self) -> StoreErrors {
        self.errors.seen()
    }

    /// Stores what is dirty of the pages, and comes back when it is stored: all that was written before the call, and perhaps
    /// more. Called unpinned, with no lock held; may sleep.
    ///
    /// ```
    /// use pagefirst::fault::Ticket;
    /// use pagefirst::file::{FileCache, StoreErrors, SyncError, Syncing};
    /// use pagefirst::platform::Platform;
    /// fn fsync<P: Platform>(
    ///     file: &FileCache<P>,
    ///     seen: &mut StoreErrors,
    ///     wait: impl Fn(Ticket<'_, P>),
    /// ) -> Result<(), SyncError<P>> {
    ///     let mut work = Syncing::all();
    ///     loop {
    ///         match file.sync(&mut work, seen) {
    ///             Err(SyncError::Blocked(ticket)) => wait(ticket),
    ///             end => return end,
    ///         }
    ///     }
    /// }
    /// ```
    ///
    /// # Errors
    /// [`SyncError`]. After [`Blocked`](SyncError::Blocked) it is called again with the same `work`. An
    /// [`Io`](SyncError::Io) error may have come at any time since `seen`, by anybody's store; what was not stored is dirty
    /// still.
    pub fn sync(&self, work: &mut Syncing, seen: &mut StoreErrors) -> Result<(), SyncError<P>> {
        let mut storing = WriteBack::new(self);
        while !work.waits {
            let Some(folio) = self.next_to_store(&work.left) else {
                (work.left, work.waits) = (work.pages.clone(), true);
                break;
            };
            let next = behind(&folio);
            match storing.store(folio) {
                Ok(Some(ticket)) => return Err(SyncError::Blocked(ticket)),
                Err(WriteBackError::NoMemory(why)) => return Err(why.into()),
                // The error is noted.
                Ok(None) | Err(WriteBackError::Io(_)) => work.left.start = next,
            }
        }
        let is_open = |meta: &FrameMeta| meta.flags().intersects(FrameFlags::STORING | FrameFlags::UNTOLD);
        while let Some(folio) = self.next_with(&work.left, is_open) {
            work.left.start = folio.meta().index();
            if folio.meta().flags().contains(FrameFlags::STORING) {
                return Err(SyncError::Blocked(Ticket::for_store(folio)));
            }
            self.note_error(folio.meta());
            work.left.start = behind(&folio);
        }
        self.p.vm().collect_much(self.p);
        self.errors.tell(seen).map_err(Into::into)
    }

    /// Notes the error if a folio could not be stored, once.
    pub(super) fn note_error(&self, folio: &FrameMeta) {
        if folio.take_flag(FrameFlags::UNTOLD) {
            self.errors.note();
        }
    }
}

/// The index behind the folio.
pub(super) fn behind<P: Platform>(folio: &Frame<P>) -> u64 {
    folio.meta().index() + (1 << folio.order())
}
