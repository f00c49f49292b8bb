//! Slots in three states, each a type: nothing, an entry seen, locked.

use super::record::{Guard, Last, Table};
use crate::arch::{Attrs, Format};
use crate::platform::Platform;
use crate::types::{Pfn, VirtAddr, VirtRange};

/// State: the walk found no entry, and no table below.
#[derive(Clone, Copy, Debug)]
pub struct Nothing {
    /// The table that points to the slot's; none points to the root.
    parent: Option<Pfn>,
}
/// State: a snapshot of an entry, read once.
#[derive(Clone, Copy, Debug)]
pub struct Seen(pub u64);
/// State: the table is locked and alive, the entry is what was seen.
pub struct Locked<'e, P: Platform>(pub(super) Guard<'e, P>);

/// A slot of the deepest live table on the way to an address.
///
/// What has been seen is not locked, and only what is locked can be written. These are types, so the one is not taken
/// for the other,
/// ```compile_fail,E0308
/// # use pagefirst::{platform::Platform, table::{Locked, Seen, Slot}};
/// # fn write<P: Platform>(_: Slot<'_, P, Locked<'_, P>>) {}
/// fn c04_a_slot_that_was_seen_is_not_one_that_is_locked<P: Platform>(slot: Slot<'_, P, Seen>) {
///     write(slot);
/// }
/// ```
/// nor what was found empty for either,
/// ```compile_fail,E0308
/// # use pagefirst::{platform::Platform, table::{Locked, Nothing, Slot}};
/// # fn write<P: Platform>(_: Slot<'_, P, Locked<'_, P>>) {}
/// fn c04_an_empty_slot_is_not_one_that_is_locked<P: Platform>(slot: Slot<'_, P, Nothing>) {
///     write(slot);
/// }
/// ```
/// and nobody but the table's own code makes a locked one.
/// ```compile_fail,E0423
/// # use pagefirst::{platform::Platform, table::Locked};
/// fn c04_a_lock_is_not_claimed<'e, P: Platform>() -> Locked<'e, P> {
///     Locked(unreachable!())
/// }
/// ```
/// With the lock:
/// ```
/// # use pagefirst::{platform::Platform, table::{Locked, Slot}};
/// # fn write<P: Platform>(_: Slot<'_, P, Locked<'_, P>>) {}
/// fn locked<'e, P: Platform>(slot: Slot<'e, P, Locked<'e, P>>) {
///     write(slot);
/// }
/// ```
pub struct Slot<'e, P: Platform, S> {
    pub(super) at: Table<'e, P>,
    pub(super) va: VirtAddr,
    pub(super) state: S,
}

impl<'e, P: Platform, S> Slot<'e, P, S> {
    /// The level of the table that holds the slot: so many tables are missing below it.
    pub fn level(&self) -> u8 {
        self.at.level()
    }
    pub(super) fn index(&self) -> usize {
        P::Format::index(self.va, self.at.level())
    }
}

impl<'e, P: Platform> Slot<'e, P, Nothing> {
    /// The table that points to the slot's; none points to the root.
    pub(super) fn parent(&self) -> Option<Table<'e, P>> {
        self.state.parent.map(|pfn| self.at.above(pfn))
    }
    /// How many entries there are for pages of `range` in the slot's table, and how many of them were used. Read without
    /// the lock; none where the table for small pages is missing.
    pub(crate) fn used_in(&self, range: VirtRange) -> (u32, u32) {
        if self.level() > 0 {
            return (0, 0);
        }
        let range = range.intersect(P::Format::span_of(self.va, 1));
        let first = P::Format::index(range.start, 0);
        used_among(self.at, first..first + range.pages() as usize)
    }
    /// Where only the slot's table of small pages is missing: what fault-around did last in the nearest such table beside,
    /// of those to which an entry a few slots away leads.
    pub(crate) fn beside(&self) -> Option<Beside> {
        if self.level() != 1 {
            return None;
        }
        let index = self.index();
        for far in 1..=NEAR {
            for at in [index.wrapping_sub(far), index + far] {
                if at < P::Format::user_entries(1)
                    && let Some(table) = self.at.child(self.at.entry(at))
                    && let Some(Last { slot, order }) = table.record().last()
                {
                    let apart = (at as u64).wrapping_sub(index as u64) << P::Format::shift(1);
                    let start = self.va.align_down(P::Format::span(1)).0.wrapping_add(apart);
                    let va = VirtAddr(start + ((slot as u64) << P::Format::shift(0)));
                    if order == 0 {
                        return Some(Beside { va, alone: true, there: 1, used: 1 });
                    }
                    let order = order.min(MOST_LOOKED_AT);
                    let first = slot >> order << order;
                    let (there, used) = used_among(table, first..first + (1 << order));
                    return Some(Beside { va, alone: false, there, used });
                }
            }
        }
        None
    }
}

/// How many slots away a table is looked for: within two cache lines of entries.
const NEAR: usize = 8;
/// log2 of the entries of a window that are looked at, at most.
const MOST_LOOKED_AT: u8 = 5;

/// What fault-around did last in a table beside.
pub(crate) struct Beside {
    /// For this address.
    pub va: VirtAddr,
    /// It mapped no neighbours.
    pub alone: bool,
    /// Entries in the window, or in the part of it around the address, and how many of them were used.
    pub there: u32,
    pub used: u32,
}

/// How many of these slots have entries, and how many of those were used. Read without the lock.
fn used_among<P: Platform>(table: Table<'_, P>, slots: core::ops::Range<usize>) -> (u32, u32) {
    let (mut there, mut used) = (0, 0);
    for raw in slots.map(|i| table.entry(i)) {
        there += (raw != 0) as u32;
        used += P::Format::attrs(raw).contains(Attrs::ACCESSED) as u32;
    }
    (there, used)
}

impl<P: Platform> Clone for Slot<'_, P, Seen> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<P: Platform> Copy for Slot<'_, P, Seen> {}

impl<P: Platform> Slot<'_, P, Seen> {
    /// The entry as it was read.
    pub fn raw(&self) -> u64 {
        self.state.0
    }
}

/// What a walk found.
pub enum Walk<'e, P: Platform> {
    /// No entry; the slot belongs to the deepest live table.
    Nothing(Slot<'e, P, Nothing>),
    /// A leaf entry of a small page.
    Seen(Slot<'e, P, Seen>),
    /// A leaf entry above the lowest level.
    Huge(Slot<'e, P, Seen>),
}

/// Walks down from `at`, to which the table `parent` points, without a lock, reading each entry once.
#[inline(always)]
pub(super) fn walk<'e, P: Platform>(
    mut at: Table<'e, P>,
    mut parent: Option<Pfn>,
    va: VirtAddr,
) -> Walk<'e, P> {
    loop {
        let raw = at.entry(P::Format::index(va, at.level()));
        match at.child(raw) {
            Some(child) => {
                parent = Some(at.pfn());
                at = child;
            }
            None if raw == 0 => return Walk::Nothing(Slot { at, va, state: Nothing { parent } }),
            None => {
                let slot = Slot { at, va, state: Seen(raw) };
                return if at.level() == 0 { Walk::Seen(slot) } else { Walk::Huge(slot) };
            }
        }
    }
}
