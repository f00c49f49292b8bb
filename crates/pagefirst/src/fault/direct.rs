//! Pages of files that are memory themselves (`file/direct.rs`): where nothing is mapped, and where a write finds one.

use super::anon::{WRITTEN, private_entry};
use super::hand::Need;
use super::physical::Source;
use super::{Bus, Fault, FaultError, Look};
use crate::arch::Format;
use crate::file::{Direct, File as _, FileCache};
use crate::frame::Frame;
use crate::mem::Shared;
use crate::platform::Platform;
use crate::rmap::Root;
use crate::space::Vma;
use crate::table::{Batch, Counted, FaultKind, NewEntry, Nothing, Seen, Slot};
use crate::types::{Access, Pfn, Prot, VirtAddr};

/// What a file answered, and when.
pub(super) struct Answer<P: Platform> {
    pub file: Shared<P, FileCache<P>>,
    /// The page that it was asked about.
    pub index: u64,
    pub write: bool,
    /// The file's turn before it was asked.
    pub turn: u64,
    pub run: Direct,
    /// A copy of the page, for a private write.
    pub copy: Option<Frame<P>>,
}

impl<P: Platform> Source for Answer<P> {
    fn is_current(&self) -> bool {
        self.file.turn() == self.turn
    }
    /// All of them answered, and below the file's end.
    fn frame<F: Format>(&self, index: u64, level: u8) -> Option<Pfn> {
        let below = index + F::pages(level) <= self.file.pages_below();
        self.run.frame(index, F::pages(level)).filter(|_| below)
    }
}

/// A copy of a page, on its way to becoming private memory.
struct Private<'f, P: Platform> {
    root: &'f Shared<P, Root<P>>,
    vma: &'f Vma<P>,
    va: VirtAddr,
    answer: &'f mut Answer<P>,
}

impl<P: Platform> Batch for Private<'_, P> {
    fn va(&self) -> VirtAddr {
        self.va
    }
    fn is_current(&self) -> bool {
        !self.vma.is_retired() && self.answer.is_current()
    }
    fn entry(&mut self, va: VirtAddr) -> Option<NewEntry> {
        self.answer.frame::<P::Format>(self.vma.index_of(va), 0)?;
        let copy = self.answer.copy.take()?;
        Some(NewEntry {
            raw: private_entry(self.root, self.vma, va, copy, 0, WRITTEN),
            counted: Counted::Anon,
        })
    }
    fn kind(&self) -> Option<FaultKind> {
        Some(FaultKind::FileCopy)
    }
}

impl<'f, 'a, P: Platform> Fault<'f, 'a, P> {
    /// Nothing is mapped.
    #[inline(never)]
    pub(super) fn direct_page(
        &mut self,
        vma: &'f Vma<P>,
        file: &'f Shared<P, FileCache<P>>,
        slot: Slot<'f, P, Nothing>,
    ) -> Look<'a, P> {
        let mut answer = match self.answer(vma, file) {
            Ok(answer) => answer,
            Err(look) => return look,
        };
        if self.access == Access::Write && vma.is_private() {
            let (root, va) = (self.space.root(), self.addr.page());
            return self.install(slot, &mut Private { root, vma, va, answer: &mut answer });
        }
        let frame = |va, level| answer.frame::<P::Format>(vma.index_of(va), level);
        let level = vma.largest_entry(self.addr, frame).min(slot.level());
        let shared = vma.prot.contains(Prot::WRITE) && !vma.is_private();
        let writable = shared && (answer.write || !file.file().tracks_writes());
        self.install_frames(vma, slot, &answer, level, answer.run.memory, writable)
    }

    /// What the file answered about the page; or the question.
    fn answer(&mut self, vma: &Vma<P>, file: &Shared<P, FileCache<P>>) -> Result<Answer<P>, Look<'a, P>> {
        let (index, write) = (vma.index_of(self.addr), self.access == Access::Write);
        let copies = write && vma.is_private();
        let is_it = |answer: &Answer<P>| {
            let same = answer.file.same(file) && answer.index == index && answer.write == write;
            same && answer.copy.is_some() == copies && answer.turn == file.turn()
        };
        if index >= file.pages_below() {
            return Err(Look::error(FaultError::Bus(Bus::BeyondEnd)));
        }
        let answer = self.hand.answer.take().filter(is_it);
        answer.ok_or_else(|| Look::Need(Need::Direct { file: file.clone(), index, write, copies }))
    }

    /// A write where one is mapped read-only.
    #[cold]
    #[inline(never)]
    pub(super) fn write_direct(
        &mut self,
        vma: &'f Vma<P>,
        file: &'f Shared<P, FileCache<P>>,
        slot: Slot<'f, P, Seen>,
    ) -> Look<'a, P> {
        let (raw, level) = (slot.raw(), slot.level());
        let span = P::Format::span_of(self.addr, level);
        if !vma.is_private() {
            let answer = match self.answer(vma, file) {
                Ok(answer) => answer,
                Err(look) => return look,
            };
            // All that becomes writable, the file has taken for written.
            if answer.frame::<P::Format>(vma.index_of(span.start), level) == P::Format::frame(raw, level) {
                let is_current = || !vma.is_retired() && answer.is_current();
                return slot
                    .lock(is_current)
                    .map_or(Look::Again, |slot| self.widen(slot, FaultKind::Physical));
            }
        }
        // It goes; when it is flushed, something else comes in its place.
        let Ok(slot) = slot.lock(|| !vma.is_retired()) else { return Look::Again };
        self.hand.gather.taken(1);
        self.hand.gather.touch(span);
        slot.take();
        Look::Need(Need::Tidy(span))
    }
}
