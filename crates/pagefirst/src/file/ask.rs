//! Asking a file whether a shared page may become writable.
//!
//! One question for a folio at a time: whoever comes meanwhile waits, and asks himself. All of it becomes dirty, so the file
//! is asked about all of it, whatever the size of the entry. An answer is good for the fault that asked, as long as the folio
//! is the same (it is held, so it is, or has left the file), and until the file's next removal, which may take away what the
//! file prepared: a fault looks at the file's turn again under the table's lock.

use super::cache::FileCache;
use super::{File as _, Io};
use crate::fault::Ticket;
use crate::frame::{During, Frame, FrameFlags};
use crate::platform::Platform;
use core::fmt;

/// A question that is answered later, by dropping it: then it is asked again. Anywhere, in an interrupt too.
pub struct Ask {
    _during: During,
}

/// A question, to be answered at once or kept.
pub struct AskGuard<'a>(&'a mut Option<Ask>);

impl AskGuard<'_> {
    /// The question, to be dropped when it is time to ask again; `None` if it was kept already.
    pub fn keep(self) -> Option<Ask> {
        self.0.take()
    }
}

impl fmt::Debug for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ask")
    }
}

impl fmt::Debug for AskGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AskGuard")
    }
}

/// What a file says.
pub(crate) enum MayWrite<P: Platform> {
    Yes,
    No,
    /// Ask again then.
    Later(Ticket<'static, P>),
}

impl<P: Platform> FileCache<P> {
    /// Whether a fault may make the page at `index`, of this folio, writable, or all of it. Called unpinned, with no lock held.
    pub(crate) fn may_write(&self, folio: &Frame<P>, index: u64) -> MayWrite<P> {
        let later = || MayWrite::Later(Ticket::for_answer(folio.another()));
        let Some(during) = During::begin(folio, FrameFlags::ASKED) else { return later() };
        let mut ask = Some(Ask { _during: during });
        let first = folio.meta().index();
        let answer = self.file.page_mkwrite(index, first..first + (1 << folio.order()), AskGuard(&mut ask));
        match answer {
            // Whatever it says: it will be asked again.
            _ if ask.is_none() => later(),
            Io::Ready => MayWrite::Yes,
            Io::Pending | Io::Error => MayWrite::No,
        }
    }
}
