//! Changes to one entry that is there: widen it, put another page in its place, use it as the MMU would.

use super::PageTable;
use super::record::{Counted, FaultKind};
use super::slot::{Locked, Seen, Slot, Walk};
use crate::arch::{Attrs, Format};
use crate::frame::{FrameFlags, WORDS, head_of, words};
use crate::platform::Platform;
use crate::sync::atomic::plain::AtomicU64;
use crate::sync::epoch::Pin;
use crate::types::{Access, VirtAddr};

/// The slot is not what was seen any more, or what the change rests on is going away: look again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EditError;

/// What came of an access.
pub(crate) enum Accessed<R> {
    /// It was made.
    Done(R),
    /// The MMU would fault.
    Faults,
    /// What is mapped there is not memory.
    NotMemory,
    /// Hardware reported an error in it.
    Lost,
}

fn same<F: Format>(a: u64, b: u64) -> bool {
    let bare = |raw| F::with_attrs(raw, F::attrs(raw) - (Attrs::ACCESSED | Attrs::DIRTY));
    a == b || bare(a) == bare(b)
}

impl<'e, P: Platform> Slot<'e, P, Seen> {
    /// Locks the slot if it still holds what was seen, whatever hardware marked it as, and `is_current` under the
    /// lock says that nothing the change rests on was announced to go away.
    #[inline]
    pub(crate) fn lock(
        self,
        is_current: impl FnOnce() -> bool,
    ) -> Result<Slot<'e, P, Locked<'e, P>>, EditError> {
        let guard = self.at.lock().ok_or(EditError)?;
        if !is_current() || !same::<P::Format>(guard.entry(self.index()), self.state.0) {
            return Err(EditError);
        }
        Ok(Slot { at: self.at, va: self.va, state: Locked(guard) })
    }
}

impl<P: Platform> Slot<'_, P, Locked<'_, P>> {
    /// Adds attributes. An entry that was broken is made again.
    #[inline]
    pub(crate) fn widen(&mut self, attrs: Attrs) {
        let broken = if P::Format::BREAK_BEFORE_MAKE { Attrs::NONE } else { Attrs::empty() };
        let index = self.index();
        let new = |raw| P::Format::with_attrs(raw, (P::Format::attrs(raw) - broken) | attrs);
        self.state.0.update(index, new);
    }
    /// Makes the entry read-only.
    pub(crate) fn narrow(&mut self) {
        let index = self.index();
        self.state.0.update(index, P::Format::read_only);
    }
    /// Makes the entry one that is not present, so that another page can take its place after a flush. It still maps its
    /// page, for all but hardware: whoever zaps or changes it meanwhile does so as ever.
    pub(crate) fn break_up(&mut self) {
        let index = self.index();
        let new = |raw| P::Format::with_attrs(raw, P::Format::attrs(raw) | Attrs::NONE);
        self.state.0.update(index, new);
    }
    /// Puts the entry of a page of private memory in place of what is there, which was counted as `was`.
    #[inline]
    pub(crate) fn replace(&mut self, was: Counted, raw: u64) {
        debug_assert_eq!(
            was,
            Counted::of(self.at.platform(), self.state.0.entry(self.index()), self.at.level())
        );
        self.state.0.count(was, -1);
        self.state.0.count(Counted::Anon, 1);
        self.put(raw);
    }
    /// Puts another entry for the same page in place of what is there.
    #[inline]
    pub(crate) fn put(&mut self, raw: u64) {
        let index = self.index();
        self.state.0.update(index, |_| raw);
    }
    /// Takes the entry out, and unlocks; returns what was there.
    pub(crate) fn take(self) -> u64 {
        let (index, mut guard) = (self.index(), self.state.0);
        guard.count(Counted::of(self.at.platform(), guard.entry(index), self.at.level()), -1);
        guard.take(index).unwrap_or(0)
    }
    /// Counts a fault of this kind in the table's record.
    #[inline]
    pub(crate) fn tally(&mut self, kind: FaultKind) {
        self.state.0.tally(kind, 1);
    }
}

impl<P: Platform> PageTable<P> {
    /// Does to the page at `va` what an MMU does that has just read its entry: if the entry allows a load, or a store,
    /// `f` gets the page's contents, under the lock of the table that holds the entry, and the entry is marked.
    ///
    /// The mapping's own reference keeps the page: it is not given back before the entry is taken out under this lock.
    /// What is not counted, and not the zero page, is used if it is memory as CPUs cache it, and the platform says so.
    pub(crate) fn access<R>(
        &self,
        pin: &Pin<P>,
        va: VirtAddr,
        access: Access,
        f: impl FnOnce(&[AtomicU64; WORDS]) -> R,
    ) -> Accessed<R> {
        let mark = match access {
            Access::Write => Attrs::ACCESSED | Attrs::DIRTY,
            Access::Read | Access::Execute => Attrs::ACCESSED,
        };
        loop {
            let (Walk::Seen(slot) | Walk::Huge(slot)) = self.walk(pin, va) else { return Accessed::Faults };
            // The entry alone decides, as for an MMU: whoever announces something has yet to come for this entry.
            let Ok(mut slot) = slot.lock(|| true) else {
                self.p.relax();
                continue;
            };
            let (raw, level) = (slot.state.0.entry(slot.index()), slot.level());
            let Some(head) = P::Format::frame(raw, level) else { return Accessed::Faults };
            let attrs = P::Format::attrs(raw);
            if attrs.contains(Attrs::NONE) || access == Access::Write && !attrs.contains(Attrs::WRITE) {
                return Accessed::Faults;
            }
            let pfn = head.add(P::Format::pages_into(va, level));
            if attrs.contains(Attrs::SPECIAL) && pfn != self.p.vm().zero_page() {
                let cached = !attrs.intersects(Attrs::UNCACHED | Attrs::DEVICE);
                if !cached || !self.p.is_memory(pfn) {
                    return Accessed::NotMemory;
                }
            } else if self.p.meta(pfn).flags().contains(FrameFlags::POISON) {
                // A file's page is about to be unmapped: the next fault is told whether anything is lost.
                let folio = self.p.meta(head_of(self.p, pfn));
                let is_file = folio.flags().contains(FrameFlags::FILE);
                return if is_file { Accessed::Faults } else { Accessed::Lost };
            }
            let done = f(words(self.p, pfn));
            slot.widen(mark);
            return Accessed::Done(done);
        }
    }
}
