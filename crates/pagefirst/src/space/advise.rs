//! Advice.

use super::change::Change;
use super::zap::Whole;
use super::{AddressSpace, Backing, MapError, Vma, VmaFlags};
use crate::platform::Platform;
use crate::sync::epoch::Pin;
use crate::table::{Pass, Stock};
use crate::tlb::Gather;
use crate::types::{VirtAddr, VirtRange};
#[cfg(feature = "__baseline")]
use crate::{arch::Format, fault::HUGE_LEVEL, policy::TablePolicy};

/// What a program says of a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Advice {
    /// Huge pages are wanted (`MADV_HUGEPAGE`).
    Huge,
    /// Huge pages are not wanted (`MADV_NOHUGEPAGE`). Those that are there stay, but for those that reach beyond the
    /// range: they are split.
    NoHuge,
    /// The child of a fork does not get the mapping (`MADV_DONTFORK`): for memory that a device is about to write to.
    DontFork,
    /// It does, which is the rule (`MADV_DOFORK`).
    DoFork,
    /// The child of a fork finds the mapping empty (`MADV_WIPEONFORK`): for secrets, and seeds of random numbers. Private
    /// anonymous memory only.
    WipeOnFork,
    /// It finds what its parent had, which is the rule (`MADV_KEEPONFORK`).
    KeepOnFork,
    /// Pages are wanted in no known order (`MADV_NORMAL`).
    Normal,
    /// They are wanted one after the other: more is read ahead (`MADV_SEQUENTIAL`).
    Sequential,
    /// They are wanted here and there: nothing is read ahead (`MADV_RANDOM`).
    Random,
    /// They are wanted soon: those of files that are not in memory begin to be read, as far as free memory goes
    /// (`MADV_WILLNEED`). Nothing stays of it.
    WillNeed,
}

impl<P: Platform> AddressSpace<P> {
    /// Takes advice on `len` bytes from `start`, rounded up to whole pages. It becomes a property of the mappings.
    ///
    /// # Errors
    /// [`MapError`], [`NotMapped`](MapError::NotMapped) with the first hole among them, [`Invalid`](MapError::Invalid) for
    /// memory that cannot be wiped; nothing has changed then.
    pub fn advise(&self, start: VirtAddr, len: u64, advice: Advice) -> Result<(), MapError> {
        const PACE: VmaFlags = VmaFlags::SEQUENTIAL.union(VmaFlags::RANDOM);
        let range = self.check_range(start, len)?;
        if advice == Advice::WillNeed {
            return self.will_need(range);
        }
        let mut writing = self.write();
        self.check_mapped(range)?;
        let advised = |flags: VmaFlags| match advice {
            Advice::Huge => (flags - VmaFlags::NO_HUGE) | VmaFlags::HUGE,
            Advice::NoHuge => (flags - VmaFlags::HUGE) | VmaFlags::NO_HUGE,
            Advice::DontFork => flags | VmaFlags::DONT_FORK,
            Advice::DoFork => flags - VmaFlags::DONT_FORK,
            Advice::WipeOnFork => flags | VmaFlags::WIPE_ON_FORK,
            Advice::KeepOnFork => flags - VmaFlags::WIPE_ON_FORK,
            Advice::Normal | Advice::WillNeed => flags - PACE,
            Advice::Sequential => (flags - PACE) | VmaFlags::SEQUENTIAL,
            Advice::Random => (flags - PACE) | VmaFlags::RANDOM,
        };
        let of_file = |vma: &Vma<P>| !vma.is_private() || !matches!(vma.backing, Backing::Anonymous);
        if advice == Advice::WipeOnFork
            && let Some(vma) = self.tree.overlapping(range).find(|vma| of_file(vma))
        {
            return Err(MapError::Invalid(vma.range.intersect(range)));
        }
        if self.tree.overlapping(range).all(|vma| advised(vma.flags) == vma.flags) {
            return Ok(());
        }
        let mut change = Change::cut(&writing, range);
        for vma in self.tree.overlapping(range) {
            let part = vma.range.intersect(range);
            let piece = vma.part(part, vma.prot, advised(vma.flags));
            change.push(piece, &mut writing.state)?;
        }
        let ready = change.finish(&mut writing.state)?;
        let mut cuts = self.cuts(&[range.start, range.end])?;
        ready.announce();
        // No huge page lies in two mappings; and what is mapped from now on goes by the advice.
        let mut gather = Gather::new(self.page_table());
        self.page_table().visit(range, &mut Pass { cuts: true }, &mut cuts, &mut gather);
        gather.flush();
        ready.publish(&mut writing.state);
        Ok(())
    }

    /// Begins to read the pages of files in the range that are not in memory. Called unpinned, with no lock held.
    pub(super) fn will_need(&self, range: VirtRange) -> Result<(), MapError> {
        let mut at = range.start;
        let mut hole = None;
        while at < range.end {
            let (part, file) = {
                let pin = Pin::new(self.p);
                let Some(vma) = self.find_next(&pin, at).filter(|vma| vma.range.start < range.end) else {
                    hole = hole.or(Some(VirtRange::new(at, range.end)));
                    break;
                };
                let part = vma.range.intersect(VirtRange::new(at, range.end));
                let file = match &vma.backing {
                    Backing::File { file, .. } => {
                        Some((file.clone(), vma.index_of(part.start), vma.wanted()))
                    }
                    Backing::Anonymous | Backing::Physical(_) => None,
                };
                (part, file)
            };
            if part.start > at {
                hole = hole.or(Some(VirtRange::new(at, part.start)));
            }
            if let Some((file, first, wanted)) = file {
                file.read_pages(self.p, first, part.pages(), None, wanted.hint, &self.payer());
            }
            at = part.end;
        }
        hole.map_or(Ok(()), |hole| Err(MapError::NotMapped(hole)))
    }

    /// Discards the pages of `len` bytes from `start` (`MADV_DONTNEED`): private memory reads as zero again, private
    /// copies of a file's pages as the file, shared pages stay in the file. Tables that held nothing else go.
    ///
    /// Announces nothing: a fault may refill at once, by a huge page that reaches beyond the range too. Of private memory
    /// none can come where one was cut, for its other part is there; of a file, or of physical memory, it can. So a huge page
    /// of these is not cut: all of it goes, and faults in again.
    ///
    /// # Errors
    /// [`MapError`], [`NotMapped`](MapError::NotMapped) with the first hole among them; nothing has changed then.
    pub fn discard(&self, start: VirtAddr, len: u64) -> Result<(), MapError> {
        let range = self.check_range(start, len)?;
        let _writing = self.write();
        self.check_mapped(range)?;
        let mut cuts = match self.tree.overlapping(range).any(|vma| vma.is_anonymous()) {
            true => self.cuts(&[range.start, range.end])?,
            false => Stock::empty(self.p),
        };
        let mut gather = Gather::new(self.page_table());
        for vma in self.tree.overlapping(range) {
            let part = vma.range.intersect(range);
            match vma.is_anonymous() {
                true => self.page_table().zap(part, None, &mut cuts, &mut gather),
                false => self.page_table().zap_selected(part, &mut Whole, &mut gather),
            }
        }
        #[cfg(feature = "__baseline")]
        if self.policy.tables == TablePolicy::Linux {
            self.drop_leaf_tables(range, &mut cuts, &mut gather);
        }
        gather.flush();
        Ok(())
    }

    /// Linux's way: leaf tables go whose whole span was discarded and is of one VMA, and no others.
    #[cfg(feature = "__baseline")]
    fn drop_leaf_tables(&self, range: VirtRange, cuts: &mut Stock<P>, gather: &mut Gather<'_, P>) {
        for vma in self.tree.overlapping(range) {
            let part = vma.range.intersect(range);
            let mut span = P::Format::span_of(part.start, HUGE_LEVEL);
            while span.start < part.end {
                if part.covers(span) {
                    self.page_table().zap(span, Some(span), cuts, gather);
                }
                span = VirtRange::new(span.end, VirtAddr(span.end.0.saturating_add(span.len())));
            }
        }
    }
}
