//! Frames mapped by an embedder itself: physical memory, devices. They are never counted.
//!
//! The same install and the same walk by range as everywhere else: one lock and one loop for each table that gets or
//! loses entries, tables made with their entries in them, tables gone with their last entry.

use super::{
    Batch, Counted, FaultKind, Flow, Guard, NewEntry, PageTable, Refused, Reserve, Stock, Visitor, Walk,
    install,
};
use crate::arch::{Attrs, Format};
use crate::platform::Platform;
use crate::sync::epoch::Pin;
use crate::tlb::{Gather, SmallGather};
use crate::types::{NoMemory, PAGE_SHIFT, Pfn, VirtAddr, VirtRange};

/// Where an address leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The frame of the small page that holds the address, inside a huge page too.
    pub pfn: Pfn,
    /// The level of the table that holds the entry: 0 for a small page.
    pub level: u8,
    /// What the entry allows.
    pub attrs: Attrs,
}

/// Why frames could not be mapped. Nothing was.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FramesError {
    /// The range or the first frame is not a multiple of the page size asked for, is empty, has no entries at this
    /// level, or does not lie below [`Format::USER_END`].
    #[error("cannot map frames at {0:?}: not a range of whole pages at level {1}")]
    Invalid(VirtRange, u8),
    /// Something is mapped in this part of the range.
    #[error("cannot map frames at {0:?}: something is mapped there")]
    Occupied(VirtRange),
    /// No memory for tables.
    #[error("cannot map frames at {0:?}: out of memory")]
    NoMemory(VirtRange),
}

impl<P: Platform> PageTable<P> {
    /// Where `va` leads now; `None` where nothing is mapped. Takes no lock and writes nothing.
    #[inline]
    pub fn translate(&self, pin: &Pin<P>, va: VirtAddr) -> Option<Translation> {
        let (Walk::Seen(slot) | Walk::Huge(slot)) = self.walk(pin, va) else { return None };
        let (raw, level) = (slot.raw(), slot.level());
        let first = P::Format::frame(raw, level)?;
        Some(Translation {
            pfn: first.add(P::Format::pages_into(va, level)),
            level,
            attrs: P::Format::attrs(raw),
        })
    }

    /// Begins to map and unmap frames that are not counted.
    pub fn mapper(&self) -> Mapper<'_, P> {
        Mapper { space: self, pin: None, reserve: Reserve::new(self.p), gather: SmallGather::small(self) }
    }
}

/// Maps and unmaps frames that are not counted: physical memory, devices.
///
/// Keep its ranges apart from those that an [`AddressSpace`](crate::space::AddressSpace) maps, and change one range
/// from one thread at a time; tables are shared with both and may come and go meanwhile. What was unmapped is flushed
/// when the mapper is dropped; only then may the memory behind it be used for something else.
///
/// A mapper keeps this CPU pinned between calls: it is short-lived, and nothing else of the library is called on this
/// CPU while it lives.
///
/// ```
/// use pagefirst::arch::Attrs;
/// use pagefirst::sync::epoch::Pin;
/// use pagefirst::table::PageTable;
/// use pagefirst::types::{Pfn, VirtAddr, VirtRange};
/// use pagefirst_machine::{Config, Machine};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let machine: &'static Machine = Machine::new(Config::default());
/// let table = PageTable::new(machine)?;
/// let range = VirtRange::new(VirtAddr(0x10_0000), VirtAddr(0x12_0000));
/// table.mapper().map(range, Pfn(0xf_ee00), 0, Attrs::WRITE | Attrs::DEVICE)?;
/// let there = table.translate(&Pin::new(machine), VirtAddr(0x10_1234)).ok_or("not mapped")?;
/// assert_eq!(there.pfn, Pfn(0xf_ee01));
/// table.mapper().unmap(range)?;
/// assert_eq!(table.table_bytes().iter().sum::<u64>(), 4096); // the root is all there is
/// # Ok(())
/// # }
/// ```
#[must_use = "it is there to map and unmap"]
pub struct Mapper<'a, P: Platform> {
    space: &'a PageTable<P>,
    /// Dropped before the gather, which flushes.
    pin: Option<Pin<P>>,
    reserve: Reserve<P>,
    gather: SmallGather<'a, P>,
}

impl<P: Platform> Mapper<'_, P> {
    /// Maps `range` to the frames from `first` on, by entries of tables at `level`: 0 for small pages. The entries
    /// are marked accessed, and dirty if they can be written, so that hardware has nothing to write to them.
    ///
    /// # Errors
    /// [`FramesError`]; nothing is mapped then.
    pub fn map(&mut self, range: VirtRange, first: Pfn, level: u8, attrs: Attrs) -> Result<(), FramesError> {
        let marks = if attrs.contains(Attrs::WRITE) { Attrs::DIRTY } else { Attrs::empty() };
        let attrs = attrs | marks | Attrs::ACCESSED | Attrs::SPECIAL;
        check::<P::Format>(range, first, level)?;
        let mut at = range.start;
        while at < range.end {
            let part = VirtRange { start: at, end: range.end.min(P::Format::span_of(at, level + 1).end) };
            let pages = (at.0 - range.start.0) >> PAGE_SHIFT;
            let mut frames: Frames<P::Format> = Frames::new(part, first.add(pages as u32), level, attrs);
            if let Err(error) = self.map_part(&mut frames) {
                // Whole tables and whole huge pages: nothing is cut.
                self.unmap(VirtRange::new(range.start, at)).and(Err(error))?;
            }
            at = part.end;
        }
        Ok(())
    }

    /// Maps what lies in one table.
    #[inline(always)]
    fn map_part(&mut self, frames: &mut Frames<P::Format>) -> Result<(), FramesError> {
        loop {
            let Some(pin) = &self.pin else {
                self.pin();
                continue;
            };
            let Walk::Nothing(slot) = self.space.walk(pin, frames.part.start) else {
                return Err(FramesError::Occupied(frames.part));
            };
            match install(self.space, pin, slot, frames, &mut self.reserve, &mut self.gather) {
                Ok(_) => return Ok(()),
                Err(refused) => self.prepare(refused, frames)?,
            }
        }
    }

    #[cold]
    fn pin(&mut self) {
        self.pin = Some(Pin::new(self.space.p));
    }

    /// Does what an install was refused for, unless something is in the way.
    #[cold]
    fn prepare(&mut self, refused: Refused, frames: &mut Frames<P::Format>) -> Result<(), FramesError> {
        match refused {
            Refused::Short(tables) if self.reserve.refill(tables).is_ok() => Ok(()),
            Refused::Short(tables) => {
                self.pin = None;
                self.gather.flush();
                let (p, reserve) = (self.space.p, &mut self.reserve);
                let refilled = p.vm().or_drain(p, || reserve.refill(tables));
                refilled.map_err(|NoMemory| FramesError::NoMemory(frames.part))
            }
            Refused::Unflushed(taken) => {
                self.pin = None;
                self.gather.flush_before(P::Format::span_of(frames.part.start, frames.level + 1), taken);
                Ok(())
            }
            Refused::Raced | Refused::Again => Err(FramesError::Occupied(frames.part)),
        }
    }

    /// Unmaps the frames that are mapped in `range`, and the tables that lose their last entry by it. Pages that are
    /// counted stay. A huge page that reaches beyond the range is split.
    ///
    /// # Errors
    /// [`FramesError::NoMemory`] when a huge page is to be split and there is no memory for the table; nothing has
    /// changed then.
    pub fn unmap(&mut self, range: VirtRange) -> Result<(), FramesError> {
        let range = range.intersect(VirtRange::new(VirtAddr(0), P::Format::USER_END));
        let p = self.space.p;
        let pin = self.pin.get_or_insert_with(|| Pin::new(p));
        let cut = self.space.tables_to_cut(pin, range.start) + self.space.tables_to_cut(pin, range.end);
        self.pin = None;
        let mut cuts = Stock::new(p, cut).map_err(|NoMemory| FramesError::NoMemory(range))?;
        self.space.visit(range, &mut Unmap, &mut cuts, &mut self.gather);
        Ok(())
    }
}

fn check<F: Format>(range: VirtRange, first: Pfn, level: u8) -> Result<(), FramesError> {
    let whole = level <= F::TOP_LEAF
        && !range.is_empty()
        && range.end <= F::USER_END
        && (range.start.0 | range.end.0 | first.phys()) & (F::span(level) - 1) == 0
        && u32::try_from(range.pages()).is_ok_and(|n| first.0.checked_add(n).is_some());
    if whole { Ok(()) } else { Err(FramesError::Invalid(range, level)) }
}

/// Frames in a row, for one table.
struct Frames<F> {
    part: VirtRange,
    /// The frame at address 0, were the row to begin there.
    base: u32,
    level: u8,
    attrs: Attrs,
    format: core::marker::PhantomData<F>,
}

impl<F: Format> Frames<F> {
    fn new(part: VirtRange, first: Pfn, level: u8, attrs: Attrs) -> Self {
        let base = first.0.wrapping_sub((part.start.0 >> PAGE_SHIFT) as u32);
        Frames { part, base, level, attrs, format: core::marker::PhantomData }
    }
}

impl<F: Format> Batch for Frames<F> {
    fn va(&self) -> VirtAddr {
        self.part.start
    }
    fn level(&self) -> u8 {
        self.level
    }
    fn window(&self) -> Option<VirtRange> {
        Some(self.part)
    }
    fn is_whole(&self) -> bool {
        true
    }
    fn is_current(&self) -> bool {
        true
    }
    #[inline]
    fn entry(&mut self, va: VirtAddr) -> Option<NewEntry> {
        let pfn = Pfn(self.base.wrapping_add((va.0 >> PAGE_SHIFT) as u32));
        Some(NewEntry { raw: F::leaf(pfn, self.level, self.attrs), counted: Counted::Nothing })
    }
    fn kind(&self) -> Option<FaultKind> {
        None
    }
}

/// Takes out what is not counted.
struct Unmap;

impl<P: Platform> Visitor<P> for Unmap {
    fn leaf(&mut self, guard: &mut Guard<'_, P>, range: VirtRange, gather: &mut Gather<'_, P>) -> Flow {
        let before = guard.entries();
        for i in P::Format::slots(range, guard.table().level()) {
            let raw = guard.entry(i);
            if raw != 0 && P::Format::attrs(raw).contains(Attrs::SPECIAL) {
                guard.take(i);
            }
            if guard.entries() == 0 {
                break;
            }
        }
        // Only now: a split on the way here has flushed what was touched before it.
        if guard.entries() < before {
            gather.touch(range);
        }
        Flow::Done
    }
}
