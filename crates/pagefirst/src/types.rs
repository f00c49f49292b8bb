//! Addresses, ranges, page frame numbers, access kinds: the words every other module speaks in.

use core::fmt;

/// log2 of the page size.
pub const PAGE_SHIFT: u32 = 12;
/// The size of a small page in bytes: 4 KiB in every format.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// A page frame number: a physical address divided by [`PAGE_SIZE`].
///
/// 32 bits reach 16 TiB of memory and keep [`FrameMeta`](crate::frame::FrameMeta) at 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(pub u32);

impl Pfn {
    /// The physical address of the frame's first byte.
    pub const fn phys(self) -> u64 {
        (self.0 as u64) << PAGE_SHIFT
    }
    /// The frame `n` frames further on.
    pub const fn add(self, n: u32) -> Pfn {
        Pfn(self.0 + n)
    }
}

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn {:#x}", self.0)
    }
}

/// A virtual address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct VirtAddr(pub u64);

impl VirtAddr {
    /// The start of the page that holds this address.
    pub const fn page(self) -> VirtAddr {
        self.align_down(PAGE_SIZE)
    }
    /// Rounds down to a multiple of `align`, a power of two.
    pub const fn align_down(self, align: u64) -> VirtAddr {
        VirtAddr(self.0 & !(align - 1))
    }
    /// Rounds up to a multiple of `align`, a power of two; `None` past the end of the address space.
    pub const fn align_up(self, align: u64) -> Option<VirtAddr> {
        match self.0.checked_add(align - 1) {
            Some(a) => Some(VirtAddr(a & !(align - 1))),
            None => None,
        }
    }
    /// Whether the address is a multiple of `align`, a power of two.
    pub const fn is_aligned(self, align: u64) -> bool {
        self.0 & (align - 1) == 0
    }
    /// The address `bytes` further on; `None` past the end of the address space.
    pub const fn checked_add(self, bytes: u64) -> Option<VirtAddr> {
        match self.0.checked_add(bytes) {
            Some(a) => Some(VirtAddr(a)),
            None => None,
        }
    }
}

impl fmt::Debug for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
impl fmt::Display for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A half-open range of virtual addresses, `start <= end`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct VirtRange {
    /// The first address.
    pub start: VirtAddr,
    /// The first address past the end.
    pub end: VirtAddr,
}

impl VirtRange {
    /// `start .. end`; an end before the start gives an empty range at `start`.
    pub const fn new(start: VirtAddr, end: VirtAddr) -> VirtRange {
        VirtRange { start, end: if end.0 < start.0 { start } else { end } }
    }
    /// `start .. start + len`; `None` when that passes the end of the address space.
    pub const fn sized(start: VirtAddr, len: u64) -> Option<VirtRange> {
        match start.checked_add(len) {
            Some(end) => Some(VirtRange { start, end }),
            None => None,
        }
    }
    /// The page that holds `addr`.
    pub const fn page_of(addr: VirtAddr) -> VirtRange {
        let start = addr.page();
        VirtRange { start, end: VirtAddr(start.0.saturating_add(PAGE_SIZE)) }
    }
    /// Length in bytes.
    pub const fn len(self) -> u64 {
        self.end.0 - self.start.0
    }
    /// Length in pages, rounded down.
    pub const fn pages(self) -> u64 {
        self.len() >> PAGE_SHIFT
    }
    /// Whether the range holds no address.
    pub const fn is_empty(self) -> bool {
        self.start.0 >= self.end.0
    }
    /// Whether `addr` lies inside.
    pub const fn contains(self, addr: VirtAddr) -> bool {
        self.start.0 <= addr.0 && addr.0 < self.end.0
    }
    /// Whether `other` lies wholly inside.
    pub const fn covers(self, other: VirtRange) -> bool {
        self.start.0 <= other.start.0 && other.end.0 <= self.end.0
    }
    /// Whether the two share an address.
    pub const fn overlaps(self, other: VirtRange) -> bool {
        self.start.0 < other.end.0 && other.start.0 < self.end.0
    }
    /// The addresses in both; empty when there are none.
    pub fn intersect(self, other: VirtRange) -> VirtRange {
        VirtRange::new(self.start.max(other.start), self.end.min(other.end))
    }
    /// The smallest range that covers both.
    pub fn union(self, other: VirtRange) -> VirtRange {
        VirtRange { start: self.start.min(other.start), end: self.end.max(other.end) }
    }
}

impl fmt::Debug for VirtRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start.0, self.end.0)
    }
}

/// What the CPU was doing when it faulted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Access {
    /// A load.
    Read,
    /// A store, or an atomic read-modify-write.
    Write,
    /// An instruction fetch.
    Execute,
}

bitflags::bitflags! {
    /// What a mapping allows.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    pub struct Prot: u8 {
        /// Loads.
        const READ = 1;
        /// Stores.
        const WRITE = 2;
        /// Instruction fetches.
        const EXEC = 4;
    }
}

impl Prot {
    /// Whether `access` is allowed. Write or execute imply read, as on x86, where no leaf can refuse it.
    pub const fn allows(self, access: Access) -> bool {
        match access {
            Access::Read => !self.is_empty(),
            Access::Write => self.contains(Prot::WRITE),
            Access::Execute => self.contains(Prot::EXEC),
        }
    }
}

/// No memory is left: an error value on every path.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("out of memory")]
pub struct NoMemory;
