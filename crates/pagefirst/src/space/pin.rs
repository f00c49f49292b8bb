//! Pins: user pages held where they are, for devices and direct I/O.
//!
//! A pin holds a reference, and is counted apart from references on the head of the page's folio (the low half of its link;
//! `FrameMeta::try_pin`). It is taken under the lock of the table that maps the page, and of private memory on exclusive
//! pages only, whether the mapping may be written to or not: one that is not is made exclusive first. Fork leaves a pinned
//! page to its parent, exclusive, and copies it for the child. So what a device writes, the program sees, and what the
//! program writes, the device sees (r12): a page that is pinned stays the one that is mapped until the program itself
//! unmaps it.
//!
//! A part of a folio may be writable though the folio is not exclusive: another part of it was shared with a child that did
//! not get this one. It is made read-only, and flushed, before it is made exclusive, for that may take a copy.
//!
//! | | pin |
//! |---|---|
//! | fork | the table's lock; entries of one folio in several tables: each sets its word, fences, and looks at the other's |
//! | copy-on-write, reuse | an exclusive page is written where it is; a reference keeps another from being reused |
//! | unmap, discard, truncate | the page stays the pin's until it goes |

use super::AddressSpace;
use crate::arch::{Attrs, Format};
use crate::fault::{Bus, FaultError, Outcome, Segv, Ticket};
use crate::frame::{Frame, FrameFlags, Part, folio_of};
use crate::platform::Platform;
use crate::sync::epoch::Pin;
use crate::table::Walk;
use crate::tlb::Gather;
use crate::types::{Access, PAGE_SHIFT, PAGE_SIZE, Pfn, Prot, VirtRange};
use core::fmt;

/// Pages that are pinned, in a row. Dropped, they are pinned no more.
pub struct Pinned<P: Platform> {
    folio: Frame<P>,
    phys: u64,
    len: u64,
    /// A page of a file that may have been written to by the time it is given up.
    dirties: bool,
    /// A zero page, which is everybody's: its pins are not counted.
    is_zero: bool,
}

impl<P: Platform> Pinned<P> {
    /// The physical address of the first byte.
    pub fn phys(&self) -> u64 {
        self.phys
    }
    /// The frame that the first byte is in.
    pub fn first(&self) -> Pfn {
        Pfn((self.phys >> PAGE_SHIFT) as u32)
    }
    /// How many bytes are pinned, in frames in a row: at least one.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> u64 {
        self.len
    }
}

impl<P: Platform> Drop for Pinned<P> {
    fn drop(&mut self) {
        let meta = self.folio.meta();
        if self.dirties {
            meta.set(FrameFlags::DIRTY);
        }
        if !self.is_zero {
            meta.unpin();
        }
    }
}

impl<P: Platform> fmt::Debug for Pinned<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}, {} bytes of {:?}", self.phys, self.len, self.folio)
    }
}

/// Why a page is not pinned.
#[must_use]
pub enum PinError<'a, P: Platform> {
    /// The access is not to be.
    Fault(FaultError),
    /// Something has to happen first: try again when the ticket is ready, and keep it until then.
    Blocked(Ticket<'a, P>),
    /// It has as many pins as can be counted.
    TooMany,
    /// It is no memory, or none that is counted: a device's registers, what an embedder mapped itself.
    NotMemory,
}

impl<P: Platform> PinError<'_, P> {
    /// Linux's errno; `None` for what is only blocked.
    pub fn errno(&self) -> Option<i32> {
        const ENOMEM: i32 = 12;
        const EFAULT: i32 = 14;
        match self {
            PinError::Fault(FaultError::NoMemory | FaultError::OverLimit(_)) | PinError::TooMany => {
                Some(ENOMEM)
            }
            PinError::Fault(FaultError::Segv(_) | FaultError::Bus(_)) | PinError::NotMemory => Some(EFAULT),
            PinError::Blocked(_) => None,
        }
    }
}

impl<P: Platform> fmt::Display for PinError<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PinError::Fault(error) => write!(f, "{error}"),
            PinError::Blocked(ticket) => write!(f, "waits for {ticket:?}"),
            PinError::TooMany => write!(f, "pinned too often"),
            PinError::NotMemory => write!(f, "no memory that can be pinned"),
        }
    }
}
impl<P: Platform> fmt::Debug for PinError<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl<P: Platform> core::error::Error for PinError<'_, P> {}

/// What a look at a page came to.
enum Look<P: Platform> {
    Pinned(Pinned<P>),
    /// A fault has to come first.
    Fault(Access),
    /// The page must be made exclusive first.
    Unshare,
    /// The same; it was made read-only for that, in a table at this level, which is not flushed yet.
    Narrowed(u8),
    Again,
    TooMany,
    NotMemory,
    /// Hardware reported an error in it.
    Lost,
}

impl<P: Platform> AddressSpace<P> {
    /// Pins what `range` begins with, to be read, or written as well, by others than the program: as many bytes as lie in
    /// frames side by side that one entry maps, a small page or a part of a huge one. Who wants all of the range pins
    /// again, from where that ends.
    ///
    /// Called like [`fault`](AddressSpace::fault), with no lock and no pin of the epoch held. For writing the mapping must
    /// allow it. For reading, memory that the program itself may write is pinned where it writes; of memory that it may only
    /// read, what it never wrote is pinned as it is: a page of a file, or zeros.
    ///
    /// ```
    /// use pagefirst::policy::Policy;
    /// use pagefirst::space::{AddressSpace, Map};
    /// use pagefirst::types::{Prot, VirtAddr};
    /// use pagefirst_machine::{Config, Machine};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let machine: &'static Machine = Machine::new(Config::default());
    /// let space = AddressSpace::new(machine, Policy::default())?;
    /// let mut range = space.map(Map::anonymous(2 * 4096, Prot::READ | Prot::WRITE))?.range;
    /// range.start.0 += 100;
    /// let mut pinned = Vec::new();
    /// while !range.is_empty() {
    ///     let part = space.pin(range, true).map_err(|error| error.to_string())?;
    ///     range.start = VirtAddr(range.start.0 + part.len());
    ///     pinned.push(part);
    /// }
    /// assert_eq!(pinned.iter().map(|part| part.len()).collect::<Vec<_>>(), [4096 - 100, 4096]);
    /// assert_eq!(pinned[0].phys() % 4096, 100);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`PinError`]. A range that is empty, or not all within what a program can have, is refused whole.
    pub fn pin(&self, range: VirtRange, write: bool) -> Result<Pinned<P>, PinError<'_, P>> {
        if range.is_empty() || !self.usable().covers(range) {
            return Err(PinError::Fault(FaultError::Segv(Segv::nowhere::<P::Format>(range.start))));
        }
        loop {
            let look = self.look_to_pin(&Pin::new(self.p), range, write);
            let outcome = match look {
                Look::Pinned(pinned) => return Ok(pinned),
                Look::Fault(access) => self.fault(range.start, access),
                Look::Unshare => self.unshare(range.start),
                Look::Narrowed(level) => {
                    let mut gather = Gather::small(self.page_table());
                    if !cfg!(mutant = "pin_narrows_without_flush") {
                        gather.touch(P::Format::span_of(range.start, level));
                    }
                    gather.flush();
                    self.page_table().end_unflushed();
                    continue;
                }
                Look::Again => {
                    self.p.relax();
                    continue;
                }
                Look::TooMany => return Err(PinError::TooMany),
                Look::NotMemory => return Err(PinError::NotMemory),
                Look::Lost => return Err(PinError::Fault(FaultError::Bus(Bus::Poison))),
            };
            match outcome {
                Outcome::Mapped { .. } => {}
                Outcome::Spurious => self.p.relax(),
                Outcome::Blocked(ticket) => return Err(PinError::Blocked(ticket)),
                Outcome::Error(error) => return Err(PinError::Fault(error)),
            }
        }
    }

    fn look_to_pin(&self, pin: &Pin<P>, range: VirtRange, write: bool) -> Look<P> {
        let (p, at) = (self.p, range.start);
        let access = if write { Access::Write } else { Access::Read };
        let Some(vma) = self.find(pin, at) else { return Look::Fault(access) };
        let exclusive = vma.is_private() && (write || vma.prot.contains(Prot::WRITE));
        let (Walk::Seen(slot) | Walk::Huge(slot)) = self.page_table().walk(pin, at) else {
            return Look::Fault(if exclusive { Access::Write } else { access });
        };
        let (raw, level) = (slot.raw(), slot.level());
        let early = cfg!(mutant = "pin_looks_before_lock")
            && P::Format::frame(raw, level)
                .is_some_and(|page| folio_of(p, page).2.contains(FrameFlags::EXCLUSIVE));
        let Ok(mut slot) = slot.lock(|| !vma.is_retired()) else {
            return if vma.is_retired() { Look::Fault(access) } else { Look::Again };
        };
        let attrs = P::Format::attrs(raw);
        // A huge page that is being split, or a page that is lost: the fault knows which.
        let Some(page) = P::Format::frame(raw, level) else { return Look::Fault(access) };
        if attrs.contains(Attrs::NONE) || write && !attrs.contains(Attrs::WRITE) {
            return Look::Fault(access);
        }
        let first = page.add(P::Format::pages_into(at, level));
        let zero = first == p.vm().zero_page();
        if attrs.contains(Attrs::SPECIAL) && !zero {
            return Look::NotMemory;
        }
        let Some(part) = Part::try_get(p, page, 0) else { return Look::Again };
        if p.meta(first).flags().contains(FrameFlags::POISON) {
            // A file's page is about to be unmapped: the next fault is told whether anything is lost.
            let is_file = part.meta().flags().contains(FrameFlags::FILE);
            return if is_file { Look::Again } else { Look::Lost };
        }
        let meta = part.meta();
        let flags = meta.flags();
        if exclusive && !flags.contains(FrameFlags::ANON) {
            return Look::Fault(Access::Write);
        }
        let is_shared =
            || !early && meta.flags() & (FrameFlags::ANON | FrameFlags::EXCLUSIVE) == FrameFlags::ANON;
        let mut unshare = || {
            if !attrs.contains(Attrs::WRITE) {
                return Look::Unshare;
            }
            // Before the entry changes: who writes to it from now on flushes before it copies.
            self.page_table().begin_unflushed();
            slot.narrow();
            Look::Narrowed(level)
        };
        if is_shared() {
            return unshare();
        }
        let is_zero = zero || flags.contains(FrameFlags::ZERO);
        if !is_zero && meta.try_pin().is_none() {
            return Look::TooMany;
        }
        let span = P::Format::span_of(at, level).intersect(range);
        let pinned = Pinned {
            phys: first.phys() + at.0 % PAGE_SIZE,
            len: span.len(),
            dirties: write && meta.flags().contains(FrameFlags::FILE),
            folio: Frame::from(part),
            is_zero,
        };
        // A fork may have shared another part of the folio, under another lock, before it could see the pin.
        if is_shared() && !cfg!(mutant = "pin_looks_once") {
            drop(pinned);
            return unshare();
        }
        slot.widen(if write { Attrs::ACCESSED | Attrs::DIRTY } else { Attrs::ACCESSED });
        Look::Pinned(pinned)
    }
}
