//! The heap that `brk` moves.

use super::{AddressSpace, Map, MapError, Place, VmaFlags};
use crate::platform::Platform;
use crate::types::{PAGE_SIZE, Prot, VirtAddr, VirtRange};

impl<P: Platform> AddressSpace<P> {
    /// Says where the heap starts; nothing is mapped yet. Done once, when a program is set up.
    ///
    /// # Errors
    /// [`MapError::OutOfRange`] for an address that cannot be mapped.
    pub fn set_heap(&self, start: VirtAddr) -> Result<(), MapError> {
        if !self.usable().contains(start) {
            return Err(MapError::OutOfRange(VirtRange::page_of(start)));
        }
        self.write().state.heap = VirtRange::new(start, start);
        Ok(())
    }
    /// The end of the heap.
    pub fn heap_end(&self) -> VirtAddr {
        self.writer.lock(self.p).heap.end
    }
    /// Moves the end of the heap, mapping or unmapping whole pages; returns the new end.
    ///
    /// # Errors
    /// [`MapError`] when there is no heap, that is below its start, or what would be mapped is not free; nothing has changed then.
    pub fn brk(&self, end: VirtAddr) -> Result<VirtAddr, MapError> {
        let mut writing = self.write();
        let heap = writing.state.heap;
        let wanted = VirtRange { start: heap.start, end };
        if end < heap.start || heap.start.0 == 0 {
            return Err(MapError::Invalid(VirtRange::new(end, heap.start)));
        }
        let up = |va: VirtAddr| va.align_up(PAGE_SIZE).ok_or(MapError::OutOfRange(wanted));
        let (old, new) = (up(heap.end)?, up(end)?);
        if new > old {
            writing.map(Map {
                flags: VmaFlags::HEAP,
                place: Place::FixedNoReplace(old),
                ..Map::anonymous(new.0 - old.0, Prot::READ | Prot::WRITE)
            })?;
        } else if new < old {
            writing.unmap(VirtRange::new(new, old))?;
        }
        writing.state.heap.end = end;
        Ok(end)
    }
}
