//! A fault that comes again, with the ticket that it waited for.

use super::ticket::For;
use super::{Bus, FaultError, Outcome, Ticket};
use crate::file::{File as _, FileCache, Lookup};
use crate::frame::{Frame, FrameFlags};
use crate::mem::Shared;
use crate::platform::Platform;
use crate::space::{AddressSpace, Backing};
use crate::sync::epoch::Pin;
use crate::table::Walk;
use crate::types::{Access, VirtAddr};

impl<P: Platform> AddressSpace<P> {
    /// The same [`fault`](AddressSpace::fault) again, after it was blocked on this ticket, which is kept meanwhile: so the
    /// page that was waited for is there, unless the file was cut before it. If that page could not be read, and is
    /// needed still, the fault is told so. A fault that waited for a page counts as major.
    ///
    /// A kernel may also call `fault` again, and drop the ticket when that has returned. Then it is told of a failure only
    /// if it is the first to come.
    pub fn retry(&self, addr: VirtAddr, access: Access, ticket: Ticket<'_, P>) -> Outcome<'_, P> {
        let For::Page(page, file) = &ticket.0 else { return self.fault(addr, access) };
        // Of a folio of several another page may have failed.
        if page.order() == 0
            && page.meta().flags().contains(FrameFlags::FAILED)
            && let Some(cache) = self.still_needs(addr, access, page, *file)
        {
            cache.take_failed(page);
            let outcome = Outcome::Error(FaultError::Bus(Bus::Io));
            self.count(&outcome);
            return outcome;
        }
        match self.fault(addr, access) {
            Outcome::Mapped { huge, around, .. } => Outcome::Mapped { major: true, huge, around },
            outcome => outcome,
        }
    }

    /// The file of the page, if that is what an access to the address needs and cannot have.
    #[cold]
    fn still_needs(
        &self,
        addr: VirtAddr,
        access: Access,
        page: &Frame<P>,
        file: u64,
    ) -> Option<Shared<P, FileCache<P>>> {
        let (p, index) = (self.platform(), page.meta().index());
        let pin = Pin::new(p);
        let vma = self.find(&pin, addr).filter(|vma| !vma.is_retired() && vma.prot.allows(access))?;
        let Backing::File { file: cache, .. } = &vma.backing else { return None };
        let is_needed = cache.file().id() == file
            && vma.index_of(addr) == index
            && matches!(self.page_table().walk(&pin, addr), Walk::Nothing(_))
            && !matches!(cache.lookup(p, &pin, index), Lookup::Page(_) | Lookup::BeyondEnd);
        is_needed.then(|| cache.clone())
    }
}
