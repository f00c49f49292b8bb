//! Every knob, in one place. A policy belongs to a space and does not change.

use crate::types::{PAGE_SIZE, VirtAddr};

/// When tables are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TablePolicy {
    /// The page first, the tables after: what this library is for.
    #[default]
    Postponed,
    /// Tables first, as before 2016; they stay until their range is unmapped. The other side of comparisons.
    #[cfg(feature = "__baseline")]
    Upfront,
    /// As Linux 6.18 keeps them, for comparisons too: of a fault that fails only the upper tables stay, for a page of
    /// a file the leaf table comes with the page, and tables stay until their range is unmapped; but a leaf table goes
    /// when one call discards all that it spans (`MADV_DONTNEED`, commit 6375e95f381e).
    #[cfg(feature = "__baseline")]
    Linux,
}

/// Where private memory gets huge pages (2 MiB on x86-64) on a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HugePolicy {
    /// Nowhere.
    Never,
    /// Where [`Advice::Huge`](crate::space::Advice::Huge) was given.
    #[default]
    Advise,
    /// Everywhere but where [`Advice::NoHuge`](crate::space::Advice::NoHuge) was given.
    Always,
}

/// How much of a file a read fault maps: the cached pages of a window around it.
///
/// Where the window may vary, it is four times [`DEFAULT_FAULT_AROUND`] beside pages most of which were used since they
/// were mapped, a quarter of it beside pages few of which were, as far as the bounds allow. That rests on accessed bits:
/// entries must be prefaulted old ([`Policy::prefault_young`]).
/// ```
/// use pagefirst::policy::{FaultAround, Policy};
/// let around = FaultAround::adaptive(16 << 10, 256 << 10).ok_or("bounds")?;
/// let policy = Policy { fault_around: around, ..Policy::default() };
/// assert_eq!(Policy::default().fault_around, FaultAround::fixed(64 << 10).ok_or("a size")?);
/// assert!(policy.fault_around != Policy::default().fault_around);
/// # Ok::<(), &str>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FaultAround {
    least: u64,
    most: u64,
}

impl FaultAround {
    const DEFAULT: FaultAround = FaultAround { least: DEFAULT_FAULT_AROUND, most: DEFAULT_FAULT_AROUND };
    /// A window of `bytes`; `None` unless they are a power of two from 4 KiB to 2 MiB.
    pub fn fixed(bytes: u64) -> Option<FaultAround> {
        let fits = bytes.is_power_of_two() && (PAGE_SIZE..=MAX_FAULT_AROUND).contains(&bytes);
        fits.then_some(FaultAround { least: bytes, most: bytes })
    }
    /// A window that adapts; `None` unless both bounds are powers of two, the lower one from 4 KiB to
    /// [`DEFAULT_FAULT_AROUND`], the upper one from there to 2 MiB.
    pub fn adaptive(least: u64, most: u64) -> Option<FaultAround> {
        FaultAround::fixed(least)?;
        FaultAround::fixed(most)?;
        let start = DEFAULT_FAULT_AROUND;
        (least <= start && start <= most).then_some(FaultAround { least, most })
    }
    /// The smallest window, in bytes.
    pub fn least(self) -> u64 {
        self.least
    }
    /// The largest window, in bytes.
    pub fn most(self) -> u64 {
        self.most
    }
    /// Whether there is but one window.
    pub fn is_fixed(self) -> bool {
        self.least == self.most
    }
}

/// How a space behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    /// How much of a file a read fault maps when it is cached.
    pub fault_around: FaultAround,
    /// Whether prefaulted entries start out as used. Old entries cost x86 about 6 % of a benchmark of process
    /// start-up when hardware sets the bit (Linux commit 315d09bf30c2), and tell used from unused ones.
    pub prefault_young: bool,
    /// When tables are made.
    pub tables: TablePolicy,
    /// Where private memory gets huge pages.
    pub huge: HugePolicy,
    /// Refuse mappings that can be written and executed.
    pub deny_wx: bool,
    /// Addresses below are refused.
    pub min_addr: VirtAddr,
    /// Mappings are placed below, from the top down; the format's user end if that is lower.
    pub map_top: VirtAddr,
    /// Mappings are placed at least a random number of whole pages, less than so many bytes, below `map_top` (above
    /// `min_addr` if placed from there), the same for all of a space; 0 for none. Where there is no room otherwise, this
    /// gap is used too. The first program's addresses, its stack and its heap are the embedder's to choose.
    pub random_gap: u64,
    /// Place mappings from `min_addr` up instead (Linux's legacy layout).
    pub bottom_up: bool,
    /// Mappings of anonymous memory, and of files with large folios from a multiple of it on, whose length is a multiple
    /// of it, are placed at a multiple of it; 0 for nowhere.
    /// Linux 6.7 aligned all from 2 MiB on (commit efa7df3e3bb5); those of other lengths then lay beside each other with
    /// gaps and at the same offset, which cost programs dearly, so since 6.12 they are not (commit d4148aeab412).
    pub align_large: u64,
    /// The most VMAs (`vm.max_map_count`).
    pub max_vmas: usize,
    /// The most bytes mapped (`RLIMIT_AS`).
    pub max_bytes: u64,
    /// The most bytes a stack grows to (`RLIMIT_STACK`).
    pub max_stack: u64,
}

/// Linux's default window of fault-around, and where one that adapts starts.
pub const DEFAULT_FAULT_AROUND: u64 = 64 << 10;
/// The largest window: what one leaf table spans on most formats.
pub const MAX_FAULT_AROUND: u64 = 2 << 20;

impl Default for Policy {
    fn default() -> Self {
        Policy {
            fault_around: FaultAround::DEFAULT,
            prefault_young: false,
            tables: TablePolicy::Postponed,
            huge: HugePolicy::Advise,
            deny_wx: false,
            min_addr: VirtAddr(64 << 10),
            map_top: VirtAddr(u64::MAX),
            random_gap: 0,
            bottom_up: false,
            align_large: 2 << 20,
            max_vmas: 65_530,
            max_bytes: u64::MAX,
            max_stack: 8 << 20,
        }
    }
}

impl Policy {
    /// The policy with a fixed window of fault-around; `None` unless `bytes` is a power of two from 4 KiB to 2 MiB.
    pub fn with_fault_around(self, bytes: u64) -> Option<Policy> {
        Some(Policy { fault_around: FaultAround::fixed(bytes)?, ..self })
    }
}
