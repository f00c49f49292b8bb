//! Where a call cuts a huge page: the tables to split it with are reserved before anything is announced, so that the
//! call cannot fail half-way.

use super::AddressSpace;
use crate::arch::Format;
use crate::platform::Platform;
use crate::sync::epoch::Pin;
use crate::table::Stock;
use crate::tlb::Gather;
use crate::types::{NoMemory, VirtAddr};

impl<P: Platform> AddressSpace<P> {
    /// The tables to split what lies across these addresses, or may by the time the call is announced, for faults go on
    /// until then. Called with the writer lock held.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(super) fn cuts(&self, at: &[VirtAddr]) -> Result<Stock<P>, NoMemory> {
        let tables = {
            let pin = Pin::new(self.p);
            at.iter().map(|at| self.tables_for_cut(&pin, *at)).sum()
        };
        Stock::new(self.p, tables)
    }

    /// Splits the huge page at `addr`, if there is one still, for a fault: with nothing locked or pinned. `None` while a
    /// mapping call is at work.
    pub(crate) fn split_huge(&self, addr: VirtAddr) -> Option<Result<(), NoMemory>> {
        let _writing = self.try_write()?;
        let mut cuts = match Stock::new(self.p, 1) {
            Ok(cuts) => cuts,
            Err(error) => return Some(Err(error)),
        };
        self.page_table().split(addr, &mut cuts, &mut Gather::new(self.page_table()));
        Some(Ok(()))
    }

    fn tables_for_cut(&self, pin: &Pin<P>, at: VirtAddr) -> u64 {
        let highest = self.tree.find(pin, at).map_or(0, |vma| vma.highest_level(self.policy.huge, at));
        let may_come = (1..=highest).filter(|level| !at.is_aligned(P::Format::span(*level))).count();
        // What a mapper put there is cut as well, whatever its size.
        self.page_table().tables_to_cut(pin, at).max(may_come as u64)
    }
}
