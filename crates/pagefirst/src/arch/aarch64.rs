//! AArch64: stage 1 of the EL1&0 translation regime, 4 KiB granule, 48 bits of address, by `TTBR0_EL1`. Arm ARM (DDI
//! 0487), chapter D8 "The AArch64 Virtual Memory System Architecture": D8.3 "Translation table descriptor formats",
//! D8.4 "Memory access control", D8.5 "Hardware updates to the translation tables".
//!
//! Its level 0 is our level 3. An entry that can be written carries DBM; it is dirty when it is not read-only as well,
//! which is what FEAT_HAFDBS lets hardware do and what a fault does elsewhere. Memory types are three entries of
//! `MAIR_EL1`, [`Aarch64::MAIR`]. Contiguous is never set. Nothing takes another page's place before that is flushed
//! (D8.16.1 "Using break-before-make when updating translation table entries").

use super::{Attrs, Format};
use crate::types::{Pfn, VirtAddr};

const VALID: u64 = 1 << 0;
/// A table, or at level 0 a page; without it a block.
const TABLE: u64 = 1 << 1;
/// AttrIndx, bits 4:2: an entry of `MAIR_EL1`.
const NORMAL: u64 = 0 << 2;
const NON_CACHEABLE: u64 = 1 << 2;
const DEVICE: u64 = 2 << 2;
const MEMORY: u64 = 7 << 2;
/// AP[1]: EL0 may access.
const USER: u64 = 1 << 6;
/// AP[2]: nobody may write.
const READ_ONLY: u64 = 1 << 7;
/// SH, bits 9:8: inner shareable.
const SHARED: u64 = 3 << 8;
/// AF.
const ACCESSED: u64 = 1 << 10;
/// nG: of one ASID.
const NOT_GLOBAL: u64 = 1 << 11;
/// DBM: AP[2] says clean, not read-only.
const WRITE: u64 = 1 << 51;
/// PXN: not executable at EL1.
const NO_EXEC_KERNEL: u64 = 1 << 53;
/// UXN: not executable at EL0.
const NO_EXEC: u64 = 1 << 54;
/// Bits 58:55 are software's. Dirty, of an entry that cannot be written (any more).
const DIRTY: u64 = 1 << 55;
const SPECIAL: u64 = 1 << 56;
/// In an entry that is not valid, in which hardware looks at nothing else: user code may not touch the page there.
const NONE: u64 = 1 << 57;
/// In an entry that is not valid: a huge page is being split into the table whose address stands here.
const TRANSIT: u64 = 1 << 58;
/// PXNTable: below, nothing is executable at EL1.
const TABLE_NO_EXEC_KERNEL: u64 = 1 << 59;
/// UXNTable: below, nothing is executable at EL0.
const TABLE_NO_EXEC: u64 = 1 << 60;
/// APTable[0]: below, EL0 may access nothing.
const TABLE_NO_USER: u64 = 1 << 61;
/// APTable[1]: below, nothing can be written.
const TABLE_READ_ONLY: u64 = 1 << 62;
const FRAME: u64 = 0x0000_ffff_ffff_f000;

/// The AArch64 format.
#[derive(Clone, Copy, Debug)]
pub struct Aarch64;

impl Aarch64 {
    /// What `MAIR_EL1` must say: index 0 normal memory, write-back; 1 normal memory, not cached; 2 device, nGnRE.
    pub const MAIR: u64 = 0x04_44_ff;
}

/// The address bits as they stand in an entry: inverted where it is not valid, so that it names no memory.
const fn address(raw: u64, phys: u64) -> u64 {
    if raw & VALID == 0 { !phys & FRAME } else { phys & FRAME }
}

/// What stands in an entry for these attributes, to be combined with the address by exclusive or.
const fn bits(attrs: Attrs) -> u64 {
    let write = attrs.contains(Attrs::WRITE);
    let dirty = attrs.contains(Attrs::DIRTY);
    USER | SHARED
        | NOT_GLOBAL
        | NO_EXEC_KERNEL
        | if attrs.contains(Attrs::NONE) { NONE | FRAME } else { VALID }
        | if write { WRITE } else { 0 }
        | if write && dirty { 0 } else { READ_ONLY }
        | if dirty && !write { DIRTY } else { 0 }
        | if attrs.contains(Attrs::EXEC) { 0 } else { NO_EXEC }
        | if attrs.contains(Attrs::ACCESSED) { ACCESSED } else { 0 }
        | if attrs.contains(Attrs::SPECIAL) { SPECIAL } else { 0 }
        | if attrs.contains(Attrs::DEVICE) {
            DEVICE
        } else if attrs.contains(Attrs::UNCACHED) {
            NON_CACHEABLE
        } else {
            NORMAL
        }
}

#[inline]
fn on(bit: u64, attr: Attrs) -> Attrs {
    if bit != 0 { attr } else { Attrs::empty() }
}

// SAFETY: the bits are the manual's, read back as they were written; the tests below show both ways.
unsafe impl Format for Aarch64 {
    const LEVELS: u8 = 4;
    const TOP_LEAF: u8 = 2;
    const BITS: u32 = 9;
    const USER_END: VirtAddr = VirtAddr(1 << 48);
    const BREAK_BEFORE_MAKE: bool = true;

    /// Bits 63:48 select `TTBR0_EL1`, zero, or `TTBR1_EL1`, ones; anything else faults.
    #[inline]
    fn is_canonical(va: VirtAddr) -> bool {
        matches!(va.0 >> 48, 0 | 0xffff)
    }
    #[inline]
    fn table(pfn: Pfn) -> u64 {
        pfn.phys() | TABLE_NO_EXEC_KERNEL | TABLE | VALID
    }
    #[inline]
    fn leaf(pfn: Pfn, level: u8, attrs: Attrs) -> u64 {
        (bits(attrs) ^ pfn.phys()) | if level > 0 { 0 } else { TABLE }
    }
    #[inline]
    fn transit(leaf: Pfn) -> u64 {
        TRANSIT | address(TRANSIT, leaf.phys())
    }
    #[inline]
    fn child(raw: u64, level: u8) -> Option<Pfn> {
        let table = level > 0 && raw & (VALID | TABLE) == VALID | TABLE;
        table.then_some(Pfn(((raw & FRAME) >> 12) as u32))
    }
    #[inline]
    fn frame(raw: u64, level: u8) -> Option<Pfn> {
        let leaf = raw & (VALID | NONE) != 0 && (level == 0 || raw & TABLE == 0);
        leaf.then_some(Pfn((address(raw, raw) >> 12) as u32))
    }
    #[inline]
    fn attrs(raw: u64) -> Attrs {
        let memory = match raw & MEMORY {
            NON_CACHEABLE => Attrs::UNCACHED,
            DEVICE => Attrs::DEVICE,
            _ => Attrs::empty(),
        };
        memory
            | on(raw & WRITE, Attrs::WRITE)
            | on(raw & DIRTY, Attrs::DIRTY)
            | if raw & (WRITE | READ_ONLY) == WRITE { Attrs::DIRTY } else { Attrs::empty() }
            | on(!raw & NO_EXEC, Attrs::EXEC)
            | on(raw & ACCESSED, Attrs::ACCESSED)
            | on(raw & SPECIAL, Attrs::SPECIAL)
            | on(!raw & VALID, Attrs::NONE)
    }
    /// D8.4.2 "Hierarchical control of permissions".
    #[inline]
    fn allows(raw: u64) -> Attrs {
        on(!raw & TABLE_READ_ONLY, Attrs::WRITE)
            | on(!raw & TABLE_NO_EXEC, Attrs::EXEC)
            | on(raw & TABLE_NO_USER, Attrs::NONE)
    }
    #[inline]
    fn shown(raw: u64) -> Option<u64> {
        (raw != 0 && raw & VALID == 0).then_some(raw & FRAME)
    }
    #[inline]
    fn with_attrs(raw: u64, attrs: Attrs) -> u64 {
        let rights = VALID | NONE | USER | READ_ONLY | WRITE | NO_EXEC | NO_EXEC_KERNEL;
        let ours = rights | MEMORY | SHARED | NOT_GLOBAL | ACCESSED | DIRTY | SPECIAL | FRAME;
        raw & !ours | (bits(attrs) ^ address(raw, raw))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// D8.3.1.2 "VMSAv8-64 Page descriptor": bits 1:0 are 11; AttrIndx 4:2, AP[2:1] 7:6, SH 9:8, AF 10, nG 11, DBM 51,
    /// PXN 53, UXN 54.
    #[test]
    fn page_bits() {
        let w = Attrs::WRITE | Attrs::DIRTY | Attrs::ACCESSED;
        assert_eq!(Aarch64::leaf(Pfn(0x12345), 0, w), 0x0068_0000_1234_5f43);
        // Clean: AP[2] is set, and DBM says why.
        assert_eq!(Aarch64::leaf(Pfn(1), 0, Attrs::WRITE), 0x0068_0000_0000_1bc3);
        assert_eq!(Aarch64::leaf(Pfn(1), 0, Attrs::EXEC | Attrs::ACCESSED), 0x0020_0000_0000_1fc3);
        assert_eq!(Aarch64::leaf(Pfn(1), 0, Attrs::empty()), 0x0060_0000_0000_1bc3);
        assert_eq!(Aarch64::leaf(Pfn(1), 0, Attrs::DIRTY), 0x00e0_0000_0000_1bc3);
        assert_eq!(Aarch64::leaf(Pfn(1), 0, Attrs::SPECIAL), 0x0160_0000_0000_1bc3);
        assert_eq!(Aarch64::leaf(Pfn(1), 0, Attrs::UNCACHED), 0x0060_0000_0000_1bc7);
        assert_eq!(Aarch64::leaf(Pfn(1), 0, Attrs::DEVICE), 0x0060_0000_0000_1bcb);
        let none = Aarch64::leaf(Pfn(1), 0, Attrs::NONE);
        assert_eq!((none, Aarch64::frame(none, 0)), (0x0260_ffff_ffff_ebc2, Some(Pfn(1))));
    }
    /// D8.5.2: hardware that manages dirty state clears AP[2] of an entry with DBM.
    #[test]
    fn hardware_marks_as_dirty() {
        let (clean, dirty) = (Attrs::WRITE | Attrs::ACCESSED, Attrs::WRITE | Attrs::ACCESSED | Attrs::DIRTY);
        let raw = Aarch64::leaf(Pfn(1), 0, clean) & !(1 << 7);
        assert_eq!(raw, Aarch64::leaf(Pfn(1), 0, dirty));
        assert_eq!(Aarch64::attrs(Aarch64::with_attrs(raw, dirty - Attrs::WRITE)), dirty - Attrs::WRITE);
    }
    /// D8.3.1.1 "VMSAv8-64 Table descriptor and Block descriptor": 11 is a table, 01 a block of 2 MiB or 1 GiB.
    #[test]
    fn block_and_table_bits() {
        assert_eq!(Aarch64::leaf(Pfn(0x200), 1, Attrs::EXEC), 0x0020_0000_0020_0bc1);
        let block = 0x0020_0000_0020_0bc1;
        assert_eq!((Aarch64::child(block, 1), Aarch64::frame(block, 1)), (None, Some(Pfn(0x200))));
        let none = Aarch64::with_attrs(block, Attrs::NONE);
        assert_eq!((Aarch64::child(none, 1), Aarch64::frame(none, 1)), (None, Some(Pfn(0x200))));
        let table = Aarch64::table(Pfn(0xabcde));
        assert_eq!(table, 0x0800_0000_abcd_e003);
        assert_eq!((Aarch64::child(table, 1), Aarch64::frame(table, 1)), (Some(Pfn(0xabcde)), None));
        assert_eq!(Aarch64::child(table, 0), None);
        // APTable in bits 62:61, UXNTable in bit 60.
        assert_eq!(Aarch64::allows(table), Attrs::WRITE | Attrs::EXEC);
        assert_eq!(Aarch64::allows(table | 1 << 62), Attrs::EXEC);
        assert_eq!(Aarch64::allows(table | 1 << 61), Attrs::WRITE | Attrs::EXEC | Attrs::NONE);
        assert_eq!(Aarch64::allows(table | 1 << 60), Attrs::WRITE);
    }
    #[test]
    fn transit_bits() {
        assert_eq!(Aarch64::transit(Pfn(1)), 0x0400_ffff_ffff_e000);
    }
    /// Bits 47:39 select the entry of the level-0 table, ours of level 3.
    #[test]
    fn index_bits() {
        assert_eq!(Aarch64::index(VirtAddr(0xff12_3456_789a), 3), 0x1fe);
        assert_eq!((Aarch64::USER_END.0, Aarch64::user_entries(3)), (0x1_0000_0000_0000, 512));
        assert!(Aarch64::is_canonical(VirtAddr(0xffff_ffff_ffff)));
        assert!(!Aarch64::is_canonical(VirtAddr(0x1_0000_0000_0000)));
        assert!(Aarch64::is_canonical(VirtAddr(0xffff_0000_0000_0000)));
    }
    /// Arm ARM, `MAIR_EL1`: 0xff write-back, both; 0x44 non-cacheable, both; 0x04 Device-nGnRE.
    #[test]
    fn memory_types() {
        let index = |attrs| (Aarch64::leaf(Pfn(1), 0, attrs) >> 2 & 7) * 8;
        let of = |attrs| Aarch64::MAIR >> index(attrs) & 0xff;
        assert_eq!([Attrs::empty(), Attrs::UNCACHED, Attrs::DEVICE].map(of), [0xff, 0x44, 0x04]);
    }
}
