//! Map.

use super::change::Change;
use super::error::Unpopulated;
use super::tree::Order;
use super::{AddressSpace, Backing, MapError, MemoryType, Vma, VmaFlags, Why, Writing};
use crate::arch::{Attrs, Format};
use crate::fault::{HUGE_LEVEL, Outcome};
use crate::file::File as _;
use crate::platform::Platform;
use crate::sync::epoch::Pin;
use crate::table::Stock;
use crate::tlb::Gather;
use crate::types::{Access, PAGE_SIZE, Prot, VirtAddr, VirtRange};
use core::fmt;

/// How much is begun to be read when populating is blocked.
const AHEAD: u64 = 2 << 20;

/// Where a mapping goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Where there is room, from the top down.
    Anywhere,
    /// At this address if it is free, otherwise anywhere.
    Hint(VirtAddr),
    /// At this address; what is mapped there goes.
    Fixed(VirtAddr),
    /// At this address; an error if anything is mapped there.
    FixedNoReplace(VirtAddr),
}

/// A mapping to be made.
pub struct Map<P: Platform> {
    /// Length in bytes; rounded up to whole pages.
    pub len: u64,
    /// Rights.
    pub prot: Prot,
    /// Other properties.
    pub flags: VmaFlags,
    /// What it shows.
    pub backing: Backing<P>,
    /// Where it goes.
    pub place: Place,
    /// Fill it at once.
    pub populate: bool,
}

impl<P: Platform> Map<P> {
    /// Private anonymous memory, anywhere.
    pub fn anonymous(len: u64, prot: Prot) -> Self {
        Map {
            len,
            prot,
            flags: VmaFlags::empty(),
            backing: Backing::Anonymous,
            place: Place::Anywhere,
            populate: false,
        }
    }
}

/// A mapping that was made.
pub struct Mapped<'a, P: Platform> {
    /// Its addresses.
    pub range: VirtRange,
    /// Where populating stopped, if it was asked for and did not reach the end.
    pub unpopulated: Option<Unpopulated<'a, P>>,
}

impl<P: Platform> fmt::Debug for Mapped<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mapped { range, unpopulated } = self;
        f.debug_struct("Mapped").field("range", range).field("unpopulated", unpopulated).finish()
    }
}

impl<P: Platform> AddressSpace<P> {
    /// Maps.
    ///
    /// Populating comes after the mapping is there and may stop short of its end: [`Mapped`] says where and why.
    ///
    /// # Errors
    /// [`MapError`]; nothing has changed then.
    pub fn map(&self, map: Map<P>) -> Result<Mapped<'_, P>, MapError> {
        let (prot, populate) = (map.prot, map.populate);
        let range = self.write().map(map)?;
        let unpopulated = if populate { self.populate(range, prot) } else { None };
        Ok(Mapped { range, unpopulated })
    }

    /// Fills a range as if every page of it were touched, written to if `prot` allows that, and if it is no file's that is
    /// mapped shared: of such a one all would become dirty (as in Linux's `populate_vma_page_range`). Tells where it stopped
    /// short of the end.
    pub fn populate(&self, range: VirtRange, prot: Prot) -> Option<Unpopulated<'_, P>> {
        let wanted = match prot {
            p if p.contains(Prot::WRITE) => Access::Write,
            p if p.is_empty() => return None,
            _ => Access::Read,
        };
        let mut at = range.start.page();
        let (mut access, mut known) = (wanted, at);
        while at < range.end {
            if at >= known {
                (access, known) = self.populates(at, wanted);
            }
            match self.fault(at, access) {
                Outcome::Mapped { huge: true, .. } => at = P::Format::span_of(at, HUGE_LEVEL).end,
                Outcome::Mapped { .. } => at = VirtAddr(at.0 + PAGE_SIZE),
                Outcome::Spurious => {
                    let there = self.page_table().translate(&Pin::new(self.p), at);
                    match there {
                        Some(there) if access == Access::Read || there.attrs.contains(Attrs::WRITE) => {
                            at = P::Format::span_of(at, there.level).end;
                        }
                        // A huge page that is being split; or somebody who only reads was faster.
                        _ => self.p.relax(),
                    }
                }
                Outcome::Blocked(ticket) => {
                    // What comes next is read while the caller waits.
                    let soon = VirtAddr(at.0.saturating_add(AHEAD)).min(range.end);
                    let _ = self.will_need(VirtRange::new(at, soon));
                    return Some(Unpopulated { at, why: Why::Blocked(ticket) });
                }
                Outcome::Error(why) => return Some(Unpopulated { at, why: Why::Error(why) }),
            }
        }
        None
    }

    /// By which access a mapping is populated, and up to where.
    fn populates(&self, at: VirtAddr, wanted: Access) -> (Access, VirtAddr) {
        let pin = Pin::new(self.p);
        match self.find(&pin, at) {
            Some(vma) if !vma.is_private() && matches!(vma.backing, Backing::File { .. }) => {
                (Access::Read, vma.range.end)
            }
            Some(vma) => (wanted, vma.range.end),
            None => (wanted, at),
        }
    }

    pub(super) fn check_prot(
        &self,
        prot: Prot,
        flags: VmaFlags,
        backing: &Backing<P>,
        range: VirtRange,
    ) -> Result<(), MapError> {
        let never = flags.contains(VmaFlags::NEVER_WRITE) && prot.contains(Prot::WRITE);
        let both = self.policy.deny_wx && prot.contains(Prot::WRITE | Prot::EXEC);
        // Fetched ahead, a device's registers would be read.
        let cached = !matches!(backing, Backing::Physical(p) if p.memory != MemoryType::Normal);
        let fetched = prot.contains(Prot::EXEC) && !cached;
        if never || both || fetched { Err(MapError::Denied(range)) } else { Ok(()) }
    }

    /// Where a mapping of `len` bytes goes.
    pub(super) fn place(&self, len: u64, place: Place, large: bool) -> Result<VirtRange, MapError> {
        match place {
            Place::Fixed(at) => return self.check_range(at, len),
            Place::FixedNoReplace(at) => {
                let range = self.check_range(at, len)?;
                return if self.tree.is_free(range) { Ok(range) } else { Err(MapError::Taken(range)) };
            }
            Place::Hint(at) => {
                if let Ok(range) = self.check_range(at.page(), len)
                    && self.tree.is_free(range)
                {
                    return Ok(range);
                }
            }
            Place::Anywhere => {}
        }
        let whole = VirtRange::new(VirtAddr(0), VirtAddr(len));
        let len = VirtAddr(len).align_up(PAGE_SIZE).ok_or(MapError::Invalid(whole))?.0;
        if len == 0 {
            return Err(MapError::Invalid(whole));
        }
        let VirtRange { start, end } = self.usable();
        let room = VirtRange::new(start, end.min(self.policy.map_top));
        let (order, within) = match self.policy.bottom_up {
            true => {
                let start = VirtAddr(room.start.0.saturating_add(self.gap));
                (Order::BottomUp, VirtRange::new(start, room.end))
            }
            false => {
                let end = VirtAddr(room.end.0.saturating_sub(self.gap));
                (Order::TopDown, VirtRange::new(room.start, end))
            }
        };
        let align = self.policy.align_large;
        let large = large && align > PAGE_SIZE && len.is_multiple_of(align);
        let aligned = if large { self.tree.gap(len, align, within, order) } else { None };
        let at = aligned
            .or_else(|| self.tree.gap(len, PAGE_SIZE, within, order))
            .or_else(|| self.tree.gap(len, PAGE_SIZE, room, order))
            .ok_or(MapError::NoRoom(len))?;
        Ok(VirtRange::new(at, VirtAddr(at.0 + len)))
    }
}

impl<P: Platform> Writing<'_, P> {
    pub(super) fn map(&mut self, map: Map<P>) -> Result<VirtRange, MapError> {
        let space = self.space;
        let large = match &map.backing {
            Backing::Anonymous => true,
            Backing::File { file, first } => {
                file.file().max_folio_order() > 0
                    && first.wrapping_mul(PAGE_SIZE).is_multiple_of(space.policy.align_large.max(1))
            }
            Backing::Physical(p) => p.first.phys().is_multiple_of(space.policy.align_large.max(1)),
        };
        let range = space.place(map.len, map.place, large)?;
        let mut flags = map.flags;
        if let Backing::Physical(physical) = &map.backing {
            if !physical.reaches(range.pages()) {
                return Err(MapError::Invalid(range));
            }
            // There are no private copies of what is not counted.
            flags.set(VmaFlags::NEVER_WRITE, !flags.contains(VmaFlags::SHARED));
        }
        space.check_prot(map.prot, flags, &map.backing, range)?;
        // A file has no pages below its first, and what is shared does not grow.
        let plain = matches!(map.backing, Backing::Anonymous) && !flags.contains(VmaFlags::SHARED);
        if flags.contains(VmaFlags::GROWS_DOWN) && !plain {
            return Err(MapError::Denied(range));
        }
        // Shared anonymous memory is a file of its own that has no name: the embedder supplies it.
        if matches!(map.backing, Backing::Anonymous) && flags.contains(VmaFlags::SHARED) {
            return Err(MapError::Denied(range));
        }
        self.insert(Vma::new(0, range, map.prot, flags, map.backing))?;
        Ok(range)
    }

    /// Puts a mapping in place of what is mapped where it is.
    pub(super) fn insert(&mut self, vma: Vma<P>) -> Result<(), MapError> {
        let (space, range) = (self.space, vma.range);
        if !vma.has_indexes() {
            return Err(MapError::Invalid(range));
        }
        let mut change = Change::cut(self, range);
        let replaces = change.replaces();
        change.push(vma, &mut self.state)?;
        let ready = change.finish(&mut self.state)?;
        let mut cuts = if replaces { space.cuts(&[range.start, range.end])? } else { Stock::empty(space.p) };
        let memory = ready.announce();
        if replaces {
            let mut gather = Gather::new(space.page_table());
            space.page_table().zap(range, None, &mut cuts, &mut gather);
            gather.touch_within(memory, range);
            gather.flush();
        }
        ready.publish(&mut self.state);
        Ok(())
    }
}
