//! What a blocked fault waits for.

use crate::file::FileCache;
use crate::frame::{Frame, FrameFlags};
use crate::mem::Shared;
use crate::platform::Platform;
use crate::sync::{Awaited, Bells, Wait};
use crate::table::PageTable;
use crate::types::Pfn;
use core::fmt;

/// What a blocked fault, or another call, waits for. Holds nothing but a reference to it.
///
/// Three ways to wait:
/// - `ticket.await` gives the ticket back when it is ready; so does polling [`Wait`] with any waker.
/// - A kernel with wait queues of its own keeps them by [`key`](Ticket::key), looks at [`is_ready`](Ticket::is_ready)
///   with its queue locked, sleeps, and wakes the queue in [`Platform::ready`].
/// - Looking at `is_ready` again and again.
///
/// The ticket is kept until the retried call has returned: as long, the page that was waited for stays, so that the
/// call finds it (unless the file was cut before it).
#[must_use = "dropped, the page that was waited for may go before it is mapped"]
pub struct Ticket<'a, P: Platform>(pub(crate) For<'a, P>);

pub(crate) enum For<'a, P: Platform> {
    /// The mapping call that was at work in this turn, in the space with these tables.
    Writer(&'a PageTable<P>, u64),
    /// This page of the file with this number, being read.
    Page(Frame<P>, u64),
    /// The file's answer, whether this page may be written to.
    Answer(Frame<P>),
    /// The removal of pages of this file that was at work in this turn.
    Removal(Shared<P, FileCache<P>>, u64),
    /// This page to be stored.
    Store(Frame<P>),
}

/// What is rung when this page was read, or could not be.
pub(crate) fn page_key(page: Pfn) -> u64 {
    u64::from(page.0) << 1
}

/// What is rung when a mapping call has ended. By the root of the page tables, which is no page of a file.
pub(crate) fn writer_key<P: Platform>(table: &PageTable<P>) -> u64 {
    page_key(table.root_frame())
}

/// What is rung when a removal of pages of this file has ended. An odd number, as no page's is.
pub(crate) fn removal_key<P: Platform>(file: &FileCache<P>) -> u64 {
    file.owner().addr() as u64 | 1
}

impl<P: Platform> Ticket<'static, P> {
    pub(crate) fn for_page(page: Frame<P>, file: u64) -> Self {
        Ticket(For::Page(page, file))
    }
    pub(crate) fn for_store(page: Frame<P>) -> Self {
        Ticket(For::Store(page))
    }
    /// For the removal that was at work in this turn.
    pub(crate) fn for_removal(file: Shared<P, FileCache<P>>, turn: u64) -> Self {
        Ticket(For::Removal(file, turn))
    }
    pub(crate) fn for_answer(page: Frame<P>) -> Self {
        Ticket(For::Answer(page))
    }
}

impl<'a, P: Platform> Ticket<'a, P> {
    /// For the mapping call that is at work in this space, if one is.
    pub(crate) fn for_writer(table: &'a PageTable<P>) -> Option<Self> {
        let turn = table.turn();
        (turn % 2 == 1).then_some(Ticket(For::Writer(table, turn)))
    }
}

impl<P: Platform> Ticket<'_, P> {
    /// Whether the call may come again.
    pub fn is_ready(&self) -> bool {
        match &self.0 {
            For::Writer(table, turn) => table.turn() != *turn,
            For::Removal(file, turn) => file.turn() != *turn,
            For::Page(page, _) => !page.meta().flags().contains(FrameFlags::FILLING),
            For::Answer(page) => !page.meta().flags().contains(FrameFlags::ASKED),
            For::Store(page) => !page.meta().flags().contains(FrameFlags::STORING),
        }
    }
    /// What [`Platform::ready`] is called with when it is ready, and perhaps at other times.
    pub fn key(&self) -> u64 {
        match &self.0 {
            For::Writer(table, _) => writer_key(table),
            For::Page(page, _) | For::Answer(page) | For::Store(page) => page_key(page.pfn()),
            For::Removal(file, _) => removal_key(file),
        }
    }
    /// The page that is waited for.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn page(&self) -> Option<&Frame<P>> {
        match &self.0 {
            For::Page(page, _) => Some(page),
            For::Writer(..) | For::Removal(..) | For::Answer(_) | For::Store(_) => None,
        }
    }
    fn platform(&self) -> &'static P {
        match &self.0 {
            For::Writer(table, _) => table.platform(),
            For::Page(page, _) | For::Answer(page) | For::Store(page) => page.platform(),
            For::Removal(file, _) => file.p,
        }
    }
}

impl<P: Platform> Awaited for Ticket<'_, P> {
    fn is_ready(&self) -> bool {
        Ticket::is_ready(self)
    }
    fn key(&self) -> u64 {
        Ticket::key(self)
    }
    fn bells(&self) -> &Bells {
        &self.platform().vm().bells
    }
    fn undisturbed<T>(&self, f: impl FnOnce() -> T) -> T {
        let p = self.platform();
        p.enter();
        let answer = f();
        p.leave();
        answer
    }
    fn relax(&self) {
        self.platform().relax();
    }
}

impl<'a, P: Platform> IntoFuture for Ticket<'a, P> {
    type Output = Self;
    type IntoFuture = Wait<Self>;
    fn into_future(self) -> Wait<Self> {
        Wait::new(self)
    }
}

impl<P: Platform> fmt::Debug for Ticket<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            For::Writer(_, turn) => write!(f, "mapping call {turn}"),
            For::Removal(file, turn) => write!(f, "removal {turn} of {file:?}"),
            For::Page(page, _) => write!(f, "{page:?} being read"),
            For::Answer(page) => write!(f, "an answer about {page:?}"),
            For::Store(page) => write!(f, "{page:?} being stored"),
        }
    }
}
