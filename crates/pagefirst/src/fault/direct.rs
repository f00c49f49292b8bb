//! Pages of files that are memory themselves (`file/direct.rs`): where nothing is mapped, and where a write finds one.

use super::anon::{WRITTEN, private_entry, readable};
use super::around::window;
use super::hand::Need;
use super::{Bus, Fault, FaultError, Look};
use crate::arch::{Attrs, Format};
use crate::file::{Direct, File as _, FileCache};
use crate::frame::Frame;
use crate::mem::Shared;
use crate::platform::Platform;
use crate::space::Vma;
use crate::table::{Batch, Counted, FaultKind, NewEntry, Nothing, Seen, Slot};
use crate::types::{Access, Pfn, Prot, VirtAddr, VirtRange};

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

impl<P: Platform> Answer<P> {
    fn is_current(&self, vma: &Vma<P>) -> bool {
        !vma.is_retired() && self.file.turn() == self.turn
    }
}

/// Frames in a row, where the file says.
struct Frames<'f, P: Platform> {
    vma: &'f Vma<P>,
    answer: &'f Answer<P>,
    va: VirtAddr,
    level: u8,
    window: Option<VirtRange>,
    attrs: Attrs,
}

/// How many small pages an entry of a table at `level` maps.
fn pages<F: Format>(level: u8) -> u64 {
    1 << (F::BITS * u32::from(level))
}

impl<P: Platform> Batch for Frames<'_, P> {
    fn va(&self) -> VirtAddr {
        self.va
    }
    fn level(&self) -> u8 {
        self.level
    }
    fn window(&self) -> Option<VirtRange> {
        self.window
    }
    fn is_current(&self) -> bool {
        self.answer.is_current(self.vma)
    }
    fn entry(&mut self, va: VirtAddr) -> Option<NewEntry> {
        let pfn = self.answer.frame::<P::Format>(self.vma.index_of(va), self.level)?;
        Some(NewEntry { raw: P::Format::leaf(pfn, self.level, self.attrs), counted: Counted::Nothing })
    }
    fn kind(&self) -> Option<FaultKind> {
        Some(FaultKind::Physical)
    }
}

impl<P: Platform> Answer<P> {
    /// The frames for an entry at `level`, from the page at `index` on: all of them answered, and below the file's end.
    fn frame<F: Format>(&self, index: u64, level: u8) -> Option<Pfn> {
        let below = index + pages::<F>(level) <= self.file.page_count();
        self.run.frame(index, pages::<F>(level)).filter(|_| below)
    }
}

/// A copy of a page, on its way to becoming private memory.
struct Private<'f, P: Platform> {
    vma: &'f Vma<P>,
    va: VirtAddr,
    answer: &'f mut Answer<P>,
}

impl<P: Platform> Batch for Private<'_, P> {
    fn va(&self) -> VirtAddr {
        self.va
    }
    fn is_current(&self) -> bool {
        self.answer.is_current(self.vma)
    }
    fn entry(&mut self, va: VirtAddr) -> Option<NewEntry> {
        self.answer.frame::<P::Format>(self.vma.index_of(va), 0)?;
        let copy = self.answer.copy.take()?;
        Some(NewEntry { raw: private_entry(self.vma, va, copy, 0, WRITTEN), counted: Counted::Anon })
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
            return self.install(slot, &mut Private { vma, va: self.addr.page(), answer: &mut answer });
        }
        let level = self.level_of(vma, &answer, slot.level());
        let va = P::Format::span_of(self.addr, level).start;
        let window = (level == 0).then(|| window(self.space.policy().fault_around, vma, va, &slot).0);
        let shared = vma.prot.contains(Prot::WRITE) && !vma.is_private();
        let write =
            if shared && (answer.write || !file.file().tracks_writes()) { WRITTEN } else { Attrs::empty() };
        let attrs = readable(vma) | write | answer.run.memory.attrs() | Attrs::SPECIAL;
        self.install(slot, &mut Frames { vma, answer: &answer, va, level, window, attrs })
    }

    /// The level of the largest entry that fits, at most `highest`.
    fn level_of(&self, vma: &Vma<P>, answer: &Answer<P>, highest: u8) -> u8 {
        let fits = |level: &u8| {
            let span = P::Format::span_of(self.addr, *level);
            let frame = || answer.frame::<P::Format>(vma.index_of(span.start), *level);
            vma.range.covers(span)
                && frame().is_some_and(|pfn| u64::from(pfn.0).is_multiple_of(pages::<P::Format>(*level)))
        };
        (1..=highest.min(P::Format::TOP_LEAF)).rev().find(fits).unwrap_or(0)
    }

    /// What the file answered about the page; or the question.
    fn answer(&mut self, vma: &Vma<P>, file: &Shared<P, FileCache<P>>) -> Result<Answer<P>, Look<'a, P>> {
        let (index, write) = (vma.index_of(self.addr), self.access == Access::Write);
        let copies = write && vma.is_private();
        let is_it = |answer: &Answer<P>| {
            let same = answer.file.same(file) && answer.index == index && answer.write == write;
            same && answer.copy.is_some() == copies && answer.turn == file.turn()
        };
        if index >= file.page_count() {
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
                let Ok(mut slot) = slot.lock(|| answer.is_current(vma)) else { return Look::Again };
                slot.widen(WRITTEN | Attrs::ACCESSED);
                slot.tally(FaultKind::Physical);
                return Look::mapped(self.hand.major, level > 0, 0);
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
