//! Unmap.

use super::change::Change;
use super::{AddressSpace, MapError, Writing};
use crate::platform::Platform;
use crate::tlb::Gather;
use crate::types::{VirtAddr, VirtRange};

impl<P: Platform> AddressSpace<P> {
    /// Unmaps `len` bytes from `start`, rounded up to whole pages; parts where nothing is mapped are no error.
    ///
    /// # Errors
    /// [`MapError`]; nothing has changed then.
    pub fn unmap(&self, start: VirtAddr, len: u64) -> Result<(), MapError> {
        let range = self.check_range(start, len)?;
        self.write().unmap(range)
    }
}

impl<P: Platform> Writing<'_, P> {
    pub(super) fn unmap(&mut self, range: VirtRange) -> Result<(), MapError> {
        let mut change = Change::cut(self, range);
        if !change.replaces() {
            return Ok(());
        }
        let ready = change.finish(&mut self.state)?;
        let mut cuts = self.space.cuts(&[range.start, range.end])?;
        let memory = ready.announce();
        let table = self.space.page_table();
        let mut gather = Gather::new(table);
        table.zap(range, ready.unneeded(range), &mut cuts, &mut gather);
        gather.touch_within(memory, range);
        gather.flush();
        ready.publish(&mut self.state);
        Ok(())
    }
}
