//! Advice.

use super::{AddressSpace, MapError};
use crate::platform::Platform;
use crate::tlb::Gather;
use crate::types::VirtAddr;

impl<P: Platform> AddressSpace<P> {
    /// Discards the pages of `len` bytes from `start` (`MADV_DONTNEED`): private memory reads as zero again, private
    /// copies of a file's pages as the file, shared pages stay in the file. Tables that held nothing else go.
    ///
    /// Announces nothing: a fault may refill at once.
    ///
    /// # Errors
    /// [`MapError`], [`NotMapped`](MapError::NotMapped) with the first hole among them; nothing has changed then.
    pub fn discard(&self, start: VirtAddr, len: u64) -> Result<(), MapError> {
        let range = self.check_range(start, len)?;
        let _writing = self.write();
        self.check_mapped(range)?;
        let mut gather = Gather::new(&self.table);
        self.table.zap(range, None, &mut gather);
        gather.flush();
        Ok(())
    }
}
