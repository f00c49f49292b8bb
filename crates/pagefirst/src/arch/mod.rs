//! Page-table formats: pure functions on bits, no memory, no state.

mod aarch64;
mod ept;
mod riscv64;
mod tiny;
mod x86_64;

#[cfg(all(test, not(loom)))]
mod contract;

pub use aarch64::Aarch64;
pub use ept::Ept;
pub use riscv64::{Riscv64, Sv39, Sv48};
pub use tiny::Tiny;
pub use x86_64::{X86, X86_64, X86_64La57};

use crate::types::{PAGE_SHIFT, Pfn, VirtAddr, VirtRange};
use core::ops::Range;

/// The most levels any format has.
pub const MAX_LEVELS: usize = 5;

bitflags::bitflags! {
    /// What a leaf entry says beside its frame. Where x86-64 has a bit for it among its lowest eight, it is that bit.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    pub struct Attrs: u8 {
        /// User code may not touch the page at all (`PROT_NONE`).
        const NONE = 1 << 0;
        /// Stores are allowed.
        const WRITE = 1 << 1;
        /// Instruction fetches are allowed.
        const EXEC = 1 << 2;
        /// The page is memory that no cache keeps; writes to it may be merged (a frame buffer).
        const UNCACHED = 1 << 3;
        /// The page is a device's registers: not cached, nothing merged or reordered.
        const DEVICE = 1 << 4;
        /// The page was used since the bit was last clear.
        const ACCESSED = 1 << 5;
        /// The page was written since the bit was last clear.
        const DIRTY = 1 << 6;
        /// Software: the frame is not counted (the zero page, device memory).
        const SPECIAL = 1 << 7;
    }
}

/// A page-table format. Level 0 is the table whose entries map small pages; `LEVELS - 1` is the root.
///
/// Entries of user mappings only: user access is allowed unless [`Attrs::NONE`] says otherwise, global is never set.
/// An all-zero entry is empty. An entry with [`Attrs::NONE`] is not present for hardware, and no usable address stands
/// in it (L1TF).
///
/// # Safety
/// The library follows what the functions answer: `child(table(pfn), level)` is `pfn` at every level above 0 and
/// `None` for every other entry, `frame(leaf(pfn, level, attrs), level)` is `pfn` and `None` for `transit`, indexes are
/// below `ENTRIES`.
pub unsafe trait Format: 'static {
    /// Number of levels.
    const LEVELS: u8;
    /// Index bits of each level.
    const BITS: u32;
    /// Entries of a table.
    const ENTRIES: usize = 1 << Self::BITS;
    /// The highest level at which hardware takes a leaf.
    const TOP_LEAF: u8 = Self::LEVELS - 2;
    /// Whether an address that hardware does not translate ends in a trap of its own, which does not tell it (x86), and
    /// not in a page fault like others.
    const NON_CANONICAL_TRAPS: bool = false;
    /// Whether an entry that leads somewhere may come into a slot only when what a CPU may have cached of the slot's last
    /// one, if that led elsewhere, is flushed (break-before-make, Arm ARM D8.16.1). In between the slot is not present.
    const BREAK_BEFORE_MAKE: bool = false;
    /// Whether hardware that marks leaf entries as accessed marks the entries that lead to them as well.
    const TABLES_MARKED: bool = false;
    /// The first address past the user half.
    const USER_END: VirtAddr;
    /// Whether the address is one that hardware translates.
    fn is_canonical(va: VirtAddr) -> bool;
    /// An entry that points to the next lower table.
    fn table(pfn: Pfn) -> u64;
    /// A leaf entry at `level`.
    fn leaf(pfn: Pfn, level: u8, attrs: Attrs) -> u64;
    /// An entry of a table above level 0, neither empty nor present, that stands in for a huge page while it is being
    /// split into the entries of this table. No usable address stands in it.
    fn transit(leaf: Pfn) -> u64;
    /// An entry of a table at level 0 that stands in for a page of private memory that hardware reported as bad: neither
    /// empty nor present, and nothing usable stands in it. No huge page is ever split there, so it is free for that.
    #[inline]
    fn poison() -> u64 {
        Self::transit(Pfn(0))
    }
    /// The table this entry of a table at `level` points to.
    fn child(raw: u64, level: u8) -> Option<Pfn>;
    /// The frame of a present leaf entry; `None` when the entry is empty, a table or not present.
    fn frame(raw: u64, level: u8) -> Option<Pfn>;
    /// What a present leaf entry says beside its frame.
    fn attrs(raw: u64) -> Attrs;
    /// What an entry that points to a table allows below it: write and execute, unless the format has rights at every
    /// level, all of which an access needs.
    #[inline]
    fn allows(_raw: u64) -> Attrs {
        Attrs::WRITE.union(Attrs::EXEC)
    }
    /// The physical address that stands in an entry hardware takes for not present, which hardware might look up all the
    /// same (as some x86 does: L1TF).
    #[inline]
    fn shown(_raw: u64) -> Option<u64> {
        None
    }
    /// The same entry with other attributes; whatever else it says stays.
    fn with_attrs(raw: u64, attrs: Attrs) -> u64;

    /// The same entry with [`Attrs::WRITE`] taken away.
    #[inline]
    fn read_only(raw: u64) -> u64 {
        Self::with_attrs(raw, Self::attrs(raw) - Attrs::WRITE)
    }
    /// Whether hardware has nothing left to mark in this entry of a table at `level`: it is a leaf, accessed, and
    /// dirty if it can be written. From then on it only reads it.
    #[inline]
    fn is_settled(raw: u64, level: u8) -> bool {
        let attrs = Self::attrs(raw);
        let clean =
            attrs & (Attrs::WRITE | Attrs::DIRTY) == Attrs::WRITE && !cfg!(mutant = "settled_while_clean");
        attrs.contains(Attrs::ACCESSED) && !clean && Self::child(raw, level).is_none()
    }
    /// The index of `va` in a table at `level`.
    #[inline]
    fn index(va: VirtAddr, level: u8) -> usize {
        (va.0 >> Self::shift(level)) as usize & (Self::ENTRIES - 1)
    }
    /// How many entries of a table at `level` user addresses go through: all of them, and at the root the first ones,
    /// with a kernel's behind them if it likes ([`kernel_half`](crate::platform::Platform::kernel_half)).
    #[inline]
    fn user_entries(level: u8) -> usize {
        let last = VirtAddr(Self::USER_END.0 - 1);
        if level + 1 < Self::LEVELS { Self::ENTRIES } else { Self::index(last, level) + 1 }
    }
    /// The slots of a table at `level` that `range` intersects; it lies in what the table spans, and is not empty.
    #[inline]
    fn slots(range: VirtRange, level: u8) -> Range<usize> {
        Self::index(range.start, level)..Self::index(VirtAddr(range.end.0 - 1), level) + 1
    }
    /// log2 of what one entry at `level` spans.
    #[inline]
    fn shift(level: u8) -> u32 {
        PAGE_SHIFT + Self::BITS * level as u32
    }
    /// What the entry for `va` in a table at `level` spans.
    #[inline]
    fn span_of(va: VirtAddr, level: u8) -> VirtRange {
        let start = va.align_down(Self::span(level));
        VirtRange::new(start, VirtAddr(start.0.saturating_add(Self::span(level))))
    }
    /// How many small pages lie between the start of what the entry for `va` in a table at `level` spans, and `va`.
    #[inline]
    fn pages_into(va: VirtAddr, level: u8) -> u32 {
        ((va.0 & (Self::span(level) - 1)) >> PAGE_SHIFT) as u32
    }
    /// log2 of the number of small pages that one entry at `level` spans.
    #[inline]
    fn order(level: u8) -> u8 {
        Self::BITS as u8 * level
    }
    /// That number.
    #[inline]
    fn pages(level: u8) -> u64 {
        1 << Self::order(level)
    }
    /// What one entry at `level` spans, in bytes.
    #[inline]
    fn span(level: u8) -> u64 {
        1 << Self::shift(level)
    }
}
