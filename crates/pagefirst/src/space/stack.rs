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
        if self.stack_from(range) > self.policy.max_stack || !self.usable().covers(range) {
            return Grown::No;
        }
        if self.is_near(range.start) && !cfg!(mutant = "stack_without_guard") {
            return Grown::No;
        }
        match writing.grow(&stack, range) {
            Ok(()) => Grown::Again,
            Err(MapError::NoMemory) => Grown::NoMemory,
            Err(_) => Grown::No,
        }
    }

    /// The length of the stack whose lowest part this is, as far as its limit: of parts with other rights or other advice,
    /// one above the other, together. (Linux merges them again when they are alike, and measures one mapping; two stacks that
    /// touch are measured as one here.)
    fn stack_from(&self, lowest: VirtRange) -> u64 {
        let mut whole = lowest;
        while whole.len() <= self.policy.max_stack
            && let Some(next) = self.tree.after(whole.end)
            && next.range.start == whole.end
            && next.flags.contains(VmaFlags::GROWS_DOWN)
        {
            whole.end = next.range.end;
        }
        whole.len()
    }

    /// Whether what a stack that begins at `start` has below it is in its guard gap: not what nobody can access, which
    /// guards by itself, nor a part of a stack (as Linux since 561b5e0709e4, "mm/mmap.c: do not blow on PROT_NONE
    /// MAP_FIXED holes in the stack").
    fn is_near(&self, start: VirtAddr) -> bool {
        self.tree.before(start).is_some_and(|below| {
            let in_gap = below.range.end.0 > start.0.saturating_sub(STACK_GUARD);
            in_gap && !below.prot.is_empty() && !below.flags.contains(VmaFlags::GROWS_DOWN)
        })
    }
}

impl<P: Platform> Writing<'_, P> {
    fn grow(&mut self, stack: &Vma<P>, range: VirtRange) -> Result<(), MapError> {
        let mut change = Change::cut(self, range);
        let whole = stack.part(range, stack.prot, stack.flags);
        // One that was moved up may grow below where its memory was filled, as far as that has addresses.
        if !whole.has_indexes() {
            return Err(MapError::Invalid(range));
        }
        change.push(whole, &mut self.state)?;
        let ready = change.finish(&mut self.state)?;
        ready.announce();
        ready.publish(&mut self.state);
        Ok(())
    }
}
