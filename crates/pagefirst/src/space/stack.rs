//! Stacks that grow down.

use super::change::Change;
use super::tree::STACK_GUARD;
use super::{AddressSpace, MapError, Vma, VmaFlags, Writing};
use crate::platform::Platform;
use crate::types::{VirtAddr, VirtRange};

/// What came of a try to grow a stack.
pub(crate) enum Grown {
    /// It covers the address now, or what is mapped has changed: look again.
    Again,
    /// A mapping call is at work.
    Busy,
    /// Memory is out.
    NoMemory,
    /// There is no stack to grow, or it must not.
    No,
}

impl<P: Platform> AddressSpace<P> {
    /// Grows the stack above `addr` down to it, within its limit and never into the guard gap kept free below it.
    pub(crate) fn grow_stack(&self, addr: VirtAddr) -> Grown {
        let Some(mut writing) = self.try_write() else { return Grown::Busy };
        if self.tree.overlaps(VirtRange::page_of(addr)) {
            return Grown::Again;
        }
        let Some(stack) = self.tree.after(addr).filter(|v| v.flags.contains(VmaFlags::GROWS_DOWN)) else {
            return Grown::No;
        };
        let range = VirtRange::new(addr.page(), stack.range.end);
        let guard = VirtRange::new(VirtAddr(range.start.0.saturating_sub(STACK_GUARD)), stack.range.start);
        let is_near = self.tree.overlaps(guard) && !cfg!(mutant = "stack_without_guard");
        if range.len() > self.policy.max_stack || !self.usable().covers(range) || is_near {
            return Grown::No;
        }
        match writing.grow(&stack, range) {
            Ok(()) => Grown::Again,
            Err(MapError::NoMemory) => Grown::NoMemory,
            Err(_) => Grown::No,
        }
    }
}

impl<P: Platform> Writing<'_, P> {
    fn grow(&mut self, stack: &Vma<P>, range: VirtRange) -> Result<(), MapError> {
        let mut change = Change::cut(self, range);
        let whole = stack.part(range, stack.prot, stack.flags);
        change.push(whole, &mut self.state)?;
        let ready = change.finish(&mut self.state)?;
        ready.announce();
        ready.publish(&mut self.state);
        Ok(())
    }
}
