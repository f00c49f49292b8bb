//! Files that are memory themselves (Linux's DAX): a program's mapping leads to the memory that the file says, and the
//! cache has no pages of it.
//!
//! There is no page with a map count for a removal to look at. A fault notes the file's turn, asks the file where its memory
//! is, and looks at turn and size again under the table's lock: a removal, which announces first and then locks every
//! table of the file's mappings, finds the entry, or the fault sees the announcement (protocol 2). Who took it out before, as a
//! discard does, may not have flushed yet: so a removal flushes every part of the file's mappings itself. Entries on the move
//! (`mremap`) are not carried along: the destination faults them in. So there is no lock that would have to be held from
//! the question to the entry, or given back on each way out.
//!
//! Linux's `daxdev` mappings are resident to nobody; neither are these.

use super::cache::FileCache;
use super::{File as _, IoError, ReadError};
use crate::fault::Ticket;
use crate::platform::Platform;
use crate::rmap::Clean;
use crate::space::MemoryType;
use crate::sync::atomic::Release;
use crate::types::Pfn;
use core::ops::Range;

/// Where some of a file is: pages side by side, in the file and in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Direct {
    /// The index in the file of the first of them.
    pub index: u64,
    /// How many there are.
    pub pages: u64,
    /// The frame of the first.
    pub first: Pfn,
    /// How it is accessed. What is not [`Normal`](MemoryType::Normal) is never executable.
    pub memory: MemoryType,
}

impl Direct {
    /// The frame of the page at `index`, the first of `pages`, if they are all among these.
    pub(crate) fn frame(&self, index: u64, pages: u64) -> Option<Pfn> {
        let at = index.checked_sub(self.index)?;
        let end = at.checked_add(pages)?;
        (end <= self.pages).then(|| Pfn((u64::from(self.first.0) + at) as u32))
    }
    /// The answer to a question about the page at `index`, if it is one.
    pub(crate) fn checked(self, index: u64) -> Result<Direct, IoError> {
        let Range { start, end } = self.index..self.index.saturating_add(self.pages);
        let there_are = u64::from(self.first.0).checked_add(self.pages).is_some_and(|n| n <= 1 << u32::BITS);
        if (start..end).contains(&index) && there_are { Ok(self) } else { Err(IoError) }
    }
}

impl<P: Platform> FileCache<P> {
    /// Makes these pages read-only wherever they are mapped, of a file that is memory itself and tracks writes: so it is
    /// [asked](super::File::direct) again before one of them is written to. What was written to them is in memory then,
    /// or in CPU caches, for the file to write back; and to call clean, which it was to do before. Called unpinned, with no
    /// lock held; may sleep.
    pub fn clean(&self, pages: Range<u64>) {
        let Some(last) = pages.end.checked_sub(1).filter(|_| self.file.is_direct()) else { return };
        let _alone = self.changes.lock(self.p);
        // As a removal's: what the file answered before this is not good any more under a table's lock.
        self.turn.store(self.turn() + 2, Release);
        loop {
            let mut clean = Clean::of_memory();
            let all = self.for_each_mapping(pages.start, last, |vma, table, range| {
                let all = clean.visit(vma.is_live(), table, range);
                if !all && let Some(ticket) = Ticket::for_writer(table) {
                    self.p.wait(&ticket); // it has entries in hand
                }
            });
            if all && clean.is_all(0) {
                return;
            }
            self.p.relax();
        }
    }
    /// What a file that is memory itself has is not read or written by way of the cache.
    pub(super) fn not_direct(&self) -> Result<(), ReadError<P>> {
        if self.file.is_direct() { Err(ReadError::Io) } else { Ok(()) }
    }
}
