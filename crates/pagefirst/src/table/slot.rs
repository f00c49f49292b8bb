//! Slots in three states, each a type: nothing, an entry seen, locked.

use super::record::{Guard, Table};
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
///     Locked(todo!())
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
        let (mut there, mut used) = (0, 0);
        if self.level() == 0 {
            let range = range.intersect(P::Format::span_of(self.va, 1));
            let first = P::Format::index(range.start, 0);
            for raw in (first..first + range.pages() as usize).map(|i| self.at.entry(i)) {
                there += (raw != 0) as u32;
                used += P::Format::attrs(raw).contains(Attrs::ACCESSED) as u32;
            }
        }
        (there, used)
    }
}

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
