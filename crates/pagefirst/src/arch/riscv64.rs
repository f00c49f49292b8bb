//! RISC-V: Sv39 and Sv48. The RISC-V Instruction Set Manual, volume II (privileged architecture), "Sv39: Page-Based
//! 39-bit Virtual-Memory System", "Sv48"; memory types by "Svpbmt".
//!
//! An entry that allows nothing points to a table. A page that can be written must be readable. Hardware may cache
//! entries that are not valid (without Svvptc), and may leave accessed and dirty to software (Svade): both are what
//! [`sync_local`](crate::platform::Platform::sync_local) and faults are for. [`Attrs::UNCACHED`] and [`Attrs::DEVICE`]
//! need Svpbmt (and `menvcfg.PBMTE`): elsewhere their bits are reserved, and memory has the type that the platform gave
//! its addresses.

use super::{Attrs, Format};
use crate::types::{Pfn, VirtAddr};

const VALID: u64 = 1 << 0;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXEC: u64 = 1 << 3;
const USER: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 6;
const DIRTY: u64 = 1 << 7;
/// RSW, reserved for software (bits 9:8): ours.
const SPECIAL: u64 = 1 << 8;
/// Ours in an entry that is not valid, in which hardware looks at nothing else: a huge page is being split into the
/// table whose address stands here. (An entry that is not valid and has READ is a page that may not be touched.)
const TRANSIT: u64 = 1 << 9;
/// The page number: bits 53:10.
const FRAME: u64 = ((1 << 44) - 1) << FRAME_SHIFT;
const FRAME_SHIFT: u32 = 10;
/// Svpbmt, bits 62:61: NC, non-cacheable main memory.
const NON_CACHEABLE: u64 = 1 << 61;
/// Svpbmt: IO, non-cacheable, strongly ordered.
const IO: u64 = 2 << 61;

/// The formats of RISC-V, by the number of levels.
#[derive(Clone, Copy, Debug)]
pub struct Riscv64<const LEVELS: u8>;

/// Sv39: three levels.
pub type Sv39 = Riscv64<3>;
/// Sv48: four levels.
pub type Sv48 = Riscv64<4>;

/// The page number as it stands in an entry: inverted where it is not valid, so that it names no memory.
const fn address(raw: u64, frame: u64) -> u64 {
    if raw & VALID == 0 { !frame & FRAME } else { frame & FRAME }
}

const fn placed(pfn: Pfn) -> u64 {
    (pfn.0 as u64) << FRAME_SHIFT
}

/// What stands in an entry for these attributes, to be combined with the page number by exclusive or.
const fn bits(attrs: Attrs) -> u64 {
    READ | if attrs.contains(Attrs::NONE) { FRAME } else { VALID | USER }
        | if attrs.contains(Attrs::WRITE) { WRITE } else { 0 }
        | if attrs.contains(Attrs::EXEC) { EXEC } else { 0 }
        | if attrs.contains(Attrs::ACCESSED) { ACCESSED } else { 0 }
        | if attrs.contains(Attrs::DIRTY) { DIRTY } else { 0 }
        | if attrs.contains(Attrs::SPECIAL) { SPECIAL } else { 0 }
        | if attrs.contains(Attrs::DEVICE) {
            IO
        } else if attrs.contains(Attrs::UNCACHED) {
            NON_CACHEABLE
        } else {
            0
        }
}

#[inline]
fn on(bit: u64, attr: Attrs) -> Attrs {
    if bit != 0 { attr } else { Attrs::empty() }
}

// SAFETY: the bits are the manual's, read back as they were written; the tests below show both ways.
unsafe impl<const LEVELS: u8> Format for Riscv64<LEVELS> {
    const LEVELS: u8 = {
        assert!(LEVELS == 3 || LEVELS == 4);
        LEVELS
    };
    // A leaf may stand at every level.
    const TOP_LEAF: u8 = LEVELS - 1;
    const BITS: u32 = 9;
    const USER_END: VirtAddr = VirtAddr(1 << (11 + 9 * LEVELS));

    /// "Addresses must have bits 63–39 all equal to bit 38, or else a page-fault exception will occur."
    #[inline]
    fn is_canonical(va: VirtAddr) -> bool {
        let unused = 52 - 9 * LEVELS as u32;
        (va.0 as i64) << unused >> unused == va.0 as i64
    }
    /// In a pointer to a table D, A and U are reserved.
    #[inline]
    fn table(pfn: Pfn) -> u64 {
        placed(pfn) | VALID
    }
    #[inline]
    fn leaf(pfn: Pfn, _level: u8, attrs: Attrs) -> u64 {
        bits(attrs) ^ placed(pfn)
    }
    #[inline]
    fn transit(leaf: Pfn) -> u64 {
        TRANSIT | address(TRANSIT, placed(leaf))
    }
    #[inline]
    fn child(raw: u64, level: u8) -> Option<Pfn> {
        let table = level > 0 && raw & (VALID | READ | WRITE | EXEC) == VALID;
        table.then_some(Pfn(((raw & FRAME) >> FRAME_SHIFT) as u32))
    }
    #[inline]
    fn frame(raw: u64, _level: u8) -> Option<Pfn> {
        (raw & READ != 0).then_some(Pfn((address(raw, raw) >> FRAME_SHIFT) as u32))
    }
    #[inline]
    fn attrs(raw: u64) -> Attrs {
        on(raw & WRITE, Attrs::WRITE)
            | on(raw & EXEC, Attrs::EXEC)
            | on(raw & ACCESSED, Attrs::ACCESSED)
            | on(raw & DIRTY, Attrs::DIRTY)
            | on(raw & SPECIAL, Attrs::SPECIAL)
            | on(!raw & VALID, Attrs::NONE)
            | on(raw & NON_CACHEABLE, Attrs::UNCACHED)
            | on(raw & IO, Attrs::DEVICE)
    }
    #[inline]
    fn shown(raw: u64) -> Option<u64> {
        (raw != 0 && raw & VALID == 0).then_some((raw & FRAME) >> FRAME_SHIFT << 12)
    }
    #[inline]
    fn with_attrs(raw: u64, attrs: Attrs) -> u64 {
        let ours = VALID | READ | WRITE | EXEC | USER | ACCESSED | DIRTY | SPECIAL;
        let other = raw & !(ours | FRAME | NON_CACHEABLE | IO);
        other | (bits(attrs) ^ address(raw, raw))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Figure "Sv39 page table entry": V, R, W, X, U, G, A, D in bits 0 to 7, RSW in 9:8, the page number from bit 10.
    #[test]
    fn leaf_bits() {
        let w = Attrs::WRITE | Attrs::DIRTY | Attrs::ACCESSED;
        assert_eq!(Sv39::leaf(Pfn(0x12345), 0, w), 0x48d_14d7);
        assert_eq!(Sv39::leaf(Pfn(1), 0, Attrs::EXEC), 0x41b);
        assert_eq!(Sv39::leaf(Pfn(1), 0, Attrs::empty()), 0x413);
        assert_eq!(Sv39::leaf(Pfn(1), 0, Attrs::SPECIAL), 0x513);
        // Svpbmt: NC is 1 and IO is 2 in bits 62:61.
        assert_eq!(Sv39::leaf(Pfn(1), 0, Attrs::UNCACHED), 0x2000_0000_0000_0413);
        assert_eq!(Sv39::leaf(Pfn(1), 0, Attrs::DEVICE), 0x4000_0000_0000_0413);
        let none = Sv39::leaf(Pfn(1), 0, Attrs::NONE);
        assert_eq!((none, Sv39::frame(none, 0)), (0x003f_ffff_ffff_f802, Some(Pfn(1))));
        // Megapages and gigapages look the same.
        assert_eq!(Sv39::leaf(Pfn(0x200), 1, Attrs::WRITE), 0x8_0017);
        assert_eq!((Sv39::child(0x8_0017, 1), Sv39::frame(0x8_0017, 1)), (None, Some(Pfn(0x200))));
        assert_eq!(Sv48::leaf(Pfn(1 << 27), 3, Attrs::EXEC), (1 << 37) | 0x1b);
    }
    /// Table "Encoding of PTE R/W/X fields": all clear points to the next level; W without R is reserved.
    #[test]
    fn table_bits() {
        assert_eq!(Sv39::table(Pfn(0xabcde)), 0x2af3_7801);
        assert_eq!(Sv39::child(0x2af3_7801, 1), Some(Pfn(0xabcde)));
        assert_eq!((Sv39::child(0x2af3_7801, 0), Sv39::frame(0x2af3_7801, 1)), (None, None));
        for attrs in (0..=255).map(Attrs::from_bits_truncate) {
            let raw = Sv39::leaf(Pfn(1), 0, attrs);
            assert!(raw & (READ | WRITE) != WRITE && raw >> 61 != 3, "{raw:#x}");
        }
    }
    #[test]
    fn transit_bits() {
        assert_eq!(Sv39::transit(Pfn(1)), 0x003f_ffff_ffff_fa00);
    }
    /// Figure "Sv39 virtual address": VPN[2] in bits 38:30, VPN[1] in 29:21, VPN[0] in 20:12; Sv48: VPN[3] in 47:39.
    #[test]
    fn index_bits() {
        let va = VirtAddr(0x2b_4567_89ab);
        assert_eq!([2, 1, 0].map(|level| Sv39::index(va, level)), [0xad, 0x2b, 0x078]);
        assert_eq!(Sv48::index(VirtAddr(0x7f12_3456_789a), 3), 0xfe);
        assert_eq!((Sv39::USER_END.0, Sv48::USER_END.0), (0x40_0000_0000, 0x8000_0000_0000));
        assert_eq!((Sv39::user_entries(2), Sv48::user_entries(3)), (256, 256));
        assert!(
            Sv39::is_canonical(VirtAddr(0x3f_ffff_ffff)) && !Sv39::is_canonical(VirtAddr(0x40_0000_0000))
        );
        assert!(Sv39::is_canonical(VirtAddr(0xffff_ffc0_0000_0000)));
        assert!(Sv48::is_canonical(VirtAddr(0x40_0000_0000)));
    }
}
