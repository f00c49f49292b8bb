//! Where a call cuts a huge page: the tables to split it with are reserved before anything is announced, so that the
//! call cannot fail half-way.

use super::AddressSpace;
use crate::arch::Format;
use crate::fault::HUGE_LEVEL;
use crate::platform::Platform;
use crate::policy::HugePolicy;
use crate::sync::epoch::Pin;
use crate::table::{Stock, Walk};
use crate::types::{NoMemory, VirtAddr};

impl<P: Platform> AddressSpace<P> {
    /// A table for each of the addresses that lies inside a huge page, or may by the time the call is announced, for
    /// faults go on until then. Called with the writer lock held.
    pub(super) fn cuts(&self, at: &[VirtAddr]) -> Result<Stock<P>, NoMemory> {
        Stock::new(self.p, at.iter().filter(|at| self.may_be_huge(**at)).count() as u64)
    }

    fn may_be_huge(&self, at: VirtAddr) -> bool {
        let span = P::Format::span_of(at, HUGE_LEVEL);
        if self.policy.huge == HugePolicy::Never || at == span.start {
            return false;
        }
        let pin = Pin::new(self.p);
        self.tree.find(&pin, at).is_some_and(|vma| vma.takes_huge(self.policy.huge, span))
            || matches!(self.table.walk(&pin, at), Walk::Huge(_))
    }
}
