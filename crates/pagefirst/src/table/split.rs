//! A huge page becomes a table of small ones.
//!
//! Its entry is swapped for one that is neither empty nor present (`Transit`), so that nobody takes the slot for empty
//! (X13); the translations of the huge page are flushed; the table is filled privately, with what hardware had marked
//! until the swap, and made visible with one store. So no CPU ever has translations of both sizes for one address
//! (AMD, "Revision Guide for AMD Family 10h Processors", erratum 383), and no accessed or dirty bit is lost (X12). A
//! fault that meets `Transit` comes again.
//!
//! | | fault | mapping call |
//! |---|---|---|
//! | split | `Transit` is not empty and not present: the fault comes again | the space's writer splits: one at a time |

use super::publish::{NewEntry, set};
use super::record::{Counted, Guard};
use super::slot::Walk;
use super::{PageTable, Stock};
use crate::arch::{Attrs, Format};
use crate::frame::{self, FrameFlags, bytes};
use crate::platform::Platform;
use crate::sync::epoch::Pin;
use crate::tlb::Gather;
use crate::types::{PAGE_SIZE, Pfn, VirtAddr};

impl<P: Platform> PageTable<P> {
    /// Splits the huge page mapped at `at`, if there is one, with a table of `cuts`. Called by the space's writer, with no
    /// lock and no pin held.
    pub(crate) fn split(&self, at: VirtAddr, cuts: &mut Stock<P>, gather: &mut Gather<'_, P>) {
        let p = self.platform();
        let Some(table) = cuts.take() else {
            unreachable!("a huge page is cut at {at} and no table was reserved")
        };
        let Some((level, old)) = announce(self, at, table) else { return cuts.put(table) };
        gather.touch(P::Format::span_of(at, level));
        gather.flush();

        let counted = Counted::of(p, old, level);
        let pieces = Pieces::of(p, old, level);
        let mut guard = Guard::private(p, table, level - 1, false);
        for i in 0..P::Format::ENTRIES {
            set(&mut guard, i, NewEntry { raw: pieces.entry(p, i), counted });
        }
        drop(guard);
        publish(self, at, table, counted);
        pieces.settle(p);
    }

    /// The tables that it takes to cut what is mapped at `at`: one for each level of a huge page that `at` is inside of.
    pub(crate) fn tables_to_cut(&self, pin: &Pin<P>, at: VirtAddr) -> u64 {
        // Where no entry reaches across nothing is looked at: the end of the user's half is the kernel's first address.
        if at.is_aligned(P::Format::span(P::Format::TOP_LEAF)) {
            return 0;
        }
        match self.walk(pin, at) {
            Walk::Huge(slot) => {
                (1..=slot.level()).filter(|l| !at.is_aligned(P::Format::span(*l))).count() as u64
            }
            Walk::Nothing(_) | Walk::Seen(_) => 0,
        }
    }
}

/// The entries, one level down, that together map what a huge page's entry mapped. It is taken out, and flushed.
pub(crate) struct Pieces {
    /// The huge page, its entry's attributes, and the level of the table it was in.
    page: Pfn,
    attrs: Attrs,
    level: u8,
    is_zero: bool,
}

impl Pieces {
    /// Splits the page that `old`, from a table at `level`, mapped. Private memory that nobody else refers to becomes small
    /// pages. If somebody does, and if it is a file's, it stays one folio, and its parts are mapped one by one.
    pub fn of<P: Platform>(p: &'static P, old: u64, level: u8) -> Pieces {
        let Some(page) = P::Format::frame(old, level) else { unreachable!("{old:#x} maps no page") };
        let others = P::Format::pages(level) as u32 - 1;
        match Counted::of(p, old, level) {
            Counted::Anon if !frame::split(p, page) => {
                frame::link_tails(p, page);
                p.meta(page).map_more(others);
            }
            Counted::File => p.meta(frame::head_of(p, page)).map_more(others),
            Counted::Anon | Counted::Nothing => {}
        }
        let lost = if cfg!(mutant = "split_loses_dirty") { Attrs::DIRTY } else { Attrs::empty() };
        if cfg!(mutant = "split_loses_contents") && Counted::of(p, old, level) == Counted::Anon {
            (1..=others).for_each(|i| bytes::zero(frame::words(p, page.add(i)), 0..PAGE_SIZE as usize));
        }
        let attrs = P::Format::attrs(old) - lost;
        let is_zero = !attrs.contains(Attrs::SPECIAL) && p.meta(page).flags().contains(FrameFlags::ZERO);
        Pieces { page, attrs, level, is_zero }
    }
    /// The entry with this index.
    pub fn entry<P: Platform>(&self, p: &'static P, index: usize) -> u64 {
        if self.is_zero {
            return P::Format::leaf(p.vm().zero_page(), 0, self.attrs | Attrs::SPECIAL);
        }
        let below = self.level - 1;
        P::Format::leaf(self.page.add((index << P::Format::order(below)) as u32), below, self.attrs)
    }
    /// The entries are in place: the mapping of the huge zero page ends.
    pub fn settle<P: Platform>(self, p: &'static P) {
        if self.is_zero {
            frame::unmap(p, self.page);
        }
    }
}

/// Puts `Transit` in place of the huge page at `at`; returns what was there and the level of its table, `None` when
/// there is no huge page.
fn announce<P: Platform>(space: &PageTable<P>, at: VirtAddr, table: Pfn) -> Option<(u8, u64)> {
    let pin = Pin::new(space.platform());
    let Walk::Huge(slot) = space.walk(&pin, at) else { return None };
    let (level, index) = (slot.level(), slot.index());
    let mut guard = slot.at.lock()?;
    P::Format::frame(guard.entry(index), level)?;
    let before = guard.entry(index);
    let transit = if cfg!(mutant = "split_leaves_hole") { 0 } else { P::Format::transit(table) };
    let old = guard.update(index, |_| transit);
    Some((level, if cfg!(mutant = "split_reads_before_swap") { before } else { old }))
}

/// Makes the table visible in place of `Transit`. Until then the slot is taken, so its own table lives.
fn publish<P: Platform>(space: &PageTable<P>, at: VirtAddr, table: Pfn, counted: Counted) {
    let pin = Pin::new(space.platform());
    let (parent, index) = match space.walk(&pin, at) {
        Walk::Huge(slot) => (slot.at, slot.index()),
        Walk::Nothing(slot) if cfg!(mutant = "split_leaves_hole") && slot.level() > 0 => {
            (slot.at, slot.index())
        }
        _ if cfg!(mutant = "split_leaves_hole") => return,
        _ => unreachable!("what is split at {at} went away"),
    };
    let Some(mut guard) = parent.lock() else { unreachable!("the table of what is split at {at} died") };
    let was = guard.update(index, |_| P::Format::table(table));
    debug_assert_eq!(was, P::Format::transit(table), "somebody else split what is split at {at}");
    if !cfg!(mutant = "split_counts_twice") {
        guard.count(counted, -1);
    }
    space.count_published(parent.level() - 1, 1);
}
