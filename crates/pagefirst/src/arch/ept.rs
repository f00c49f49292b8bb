//! Intel extended page tables, 4 levels: from a guest's physical addresses to the host's. Intel SDM volume 3C, section
//! 29.3 "The Extended Page Table Mechanism (EPT)".
//!
//! *User* here is the guest. There is no user bit: an entry is present if it allows anything. The library has hardware
//! keep accessed and dirty flags: EPTP bit 6 must be set (section 29.3.5; CPUs since Haswell), without it dirty pages go
//! unnoticed. Memory types are those of section 29.3.7; the guest's own (PAT) apply on top, unless they say less.

use super::{Attrs, Format};
use crate::types::{Pfn, VirtAddr};

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const EXEC: u64 = 1 << 2;
/// An entry that allows nothing is not present (section 29.3.2).
const PRESENT: u64 = READ | WRITE | EXEC;
/// The memory type of a leaf entry, bits 5:3; reserved, so zero, in others.
const TYPE: u64 = 7 << 3;
const UNCACHEABLE: u64 = 0 << 3;
const WRITE_COMBINING: u64 = 1 << 3;
const WRITE_BACK: u64 = 6 << 3;
/// Maps a page, in a table above level 0.
const LARGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
/// Ignored by hardware (bits 56:52): ours.
const SPECIAL: u64 = 1 << 52;
/// Ours in an entry that is not present: the guest may not touch the page that is there.
const NONE: u64 = 1 << 53;
/// Ours in an entry that is not present: a huge page is being split into the table whose address stands here.
const TRANSIT: u64 = 1 << 54;
/// Where bits 2:1 stand in an entry that is not present.
const ASIDE: u32 = 54;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// The 4-level EPT format.
///
/// "Virtual" addresses are the guest's physical ones: 48 bits, all of them the guest's.
#[derive(Clone, Copy, Debug)]
pub struct Ept;

/// The address bits as they stand in an entry: inverted where it is not present (L1TF).
const fn address(raw: u64, phys: u64) -> u64 {
    if raw & PRESENT == 0 { !phys & FRAME } else { phys & FRAME }
}

/// What stands in an entry for these attributes, to be combined with the address by exclusive or.
const fn bits(attrs: Attrs) -> u64 {
    let rights = if attrs.contains(Attrs::WRITE) { WRITE } else { 0 }
        | if attrs.contains(Attrs::EXEC) { EXEC } else { 0 };
    let present = if attrs.contains(Attrs::NONE) { rights << ASIDE | NONE | FRAME } else { rights | READ };
    let memory = if attrs.contains(Attrs::DEVICE) {
        UNCACHEABLE
    } else if attrs.contains(Attrs::UNCACHED) {
        WRITE_COMBINING
    } else {
        WRITE_BACK
    };
    present
        | memory
        | if attrs.contains(Attrs::ACCESSED) { ACCESSED } else { 0 }
        | if attrs.contains(Attrs::DIRTY) { DIRTY } else { 0 }
        | if attrs.contains(Attrs::SPECIAL) { SPECIAL } else { 0 }
}

#[inline]
fn on(bit: u64, attr: Attrs) -> Attrs {
    if bit != 0 { attr } else { Attrs::empty() }
}

// SAFETY: the bits are the manual's, read back as they were written; the tests below show both ways.
unsafe impl Format for Ept {
    const LEVELS: u8 = 4;
    const TOP_LEAF: u8 = 2;
    const BITS: u32 = 9;
    const USER_END: VirtAddr = VirtAddr(1 << 48);
    const TABLES_MARKED: bool = true;

    #[inline]
    fn is_canonical(va: VirtAddr) -> bool {
        va < Self::USER_END
    }
    #[inline]
    fn table(pfn: Pfn) -> u64 {
        pfn.phys() | READ | WRITE | EXEC
    }
    #[inline]
    fn leaf(pfn: Pfn, level: u8, attrs: Attrs) -> u64 {
        (bits(attrs) ^ pfn.phys()) | if level > 0 { LARGE } else { 0 }
    }
    #[inline]
    fn transit(leaf: Pfn) -> u64 {
        TRANSIT | address(TRANSIT, leaf.phys())
    }
    #[inline]
    fn child(raw: u64, level: u8) -> Option<Pfn> {
        let table = level > 0 && raw & PRESENT != 0 && raw & LARGE == 0;
        table.then_some(Pfn(((raw & FRAME) >> 12) as u32))
    }
    #[inline]
    fn frame(raw: u64, level: u8) -> Option<Pfn> {
        let leaf = raw & (PRESENT | NONE) != 0 && (level == 0 || raw & LARGE != 0);
        leaf.then_some(Pfn((address(raw, raw) >> 12) as u32))
    }
    #[inline]
    fn attrs(raw: u64) -> Attrs {
        let present = raw & PRESENT != 0;
        let rights = if present { raw } else { raw >> ASIDE };
        let memory = match raw & TYPE {
            UNCACHEABLE => Attrs::DEVICE,
            WRITE_COMBINING => Attrs::UNCACHED,
            _ => Attrs::empty(),
        };
        memory
            | on(rights & WRITE, Attrs::WRITE)
            | on(rights & EXEC, Attrs::EXEC)
            | on(raw & ACCESSED, Attrs::ACCESSED)
            | on(raw & DIRTY, Attrs::DIRTY)
            | on(raw & SPECIAL, Attrs::SPECIAL)
            | if present { Attrs::empty() } else { Attrs::NONE }
    }
    /// Section 29.3.3.2 "EPT Violations": an access needs its right in every entry on the way.
    #[inline]
    fn allows(raw: u64) -> Attrs {
        on(raw & WRITE, Attrs::WRITE) | on(raw & EXEC, Attrs::EXEC) | on(!raw & READ, Attrs::NONE)
    }
    #[inline]
    fn shown(raw: u64) -> Option<u64> {
        (raw != 0 && raw & PRESENT == 0).then_some(raw & FRAME)
    }
    #[inline]
    fn with_attrs(raw: u64, attrs: Attrs) -> u64 {
        let ours = PRESENT | PRESENT << ASIDE | TYPE | ACCESSED | DIRTY | SPECIAL | NONE | FRAME;
        raw & !ours | (bits(attrs) ^ address(raw, raw))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Table "Format of an EPT Page-Table Entry that Maps a 4-KByte Page": R, W, X, type 6 (write-back) in bits 5:3,
    /// accessed in bit 8, dirty in bit 9.
    #[test]
    fn leaf_4k_bits() {
        let w = Attrs::WRITE | Attrs::DIRTY | Attrs::ACCESSED;
        assert_eq!(Ept::leaf(Pfn(0x12345), 0, w), 0x1234_5333);
        assert_eq!(Ept::leaf(Pfn(1), 0, Attrs::EXEC), 0x1035);
        assert_eq!(Ept::leaf(Pfn(1), 0, Attrs::empty()), 0x1031);
        assert_eq!(Ept::leaf(Pfn(1), 0, Attrs::DEVICE | Attrs::WRITE), 0x1003);
        assert_eq!(Ept::leaf(Pfn(1), 0, Attrs::UNCACHED | Attrs::WRITE), 0x100b);
        assert_eq!(Ept::leaf(Pfn(1), 0, Attrs::SPECIAL), 0x0010_0000_0000_1031);
        let none = Ept::leaf(Pfn(1), 0, Attrs::NONE);
        assert_eq!((none, Ept::frame(none, 0)), (0x002f_ffff_ffff_e030, Some(Pfn(1))));
    }
    /// Table "Format of an EPT Page-Directory Entry that Maps a 2-MByte Page": bit 7 is set.
    #[test]
    fn leaf_2m_bits() {
        assert_eq!(Ept::leaf(Pfn(0x200), 1, Attrs::WRITE | Attrs::EXEC), 0x20_00b7);
        assert_eq!((Ept::child(0x20_00b7, 1), Ept::frame(0x20_00b7, 1)), (None, Some(Pfn(0x200))));
    }
    /// Table "Format of an EPT Page-Directory Entry that References an EPT Page Table": bits 7:3 are clear.
    #[test]
    fn table_bits() {
        assert_eq!(Ept::table(Pfn(0xabcde)), 0xabcd_e007);
        assert_eq!((Ept::child(0xabcd_e007, 3), Ept::frame(0xabcd_e007, 3)), (Some(Pfn(0xabcde)), None));
        assert_eq!(Ept::allows(0xabcd_e007), Attrs::WRITE | Attrs::EXEC);
        assert_eq!(Ept::allows(0xabcd_e001), Attrs::empty());
        assert_eq!(Ept::allows(0xabcd_e006), Attrs::NONE | Attrs::WRITE | Attrs::EXEC);
    }
    /// Section 29.3.3.1 "EPT Misconfigurations": writable and not readable is one.
    #[test]
    fn what_can_be_written_can_be_read() {
        for attrs in (0..=255).map(Attrs::from_bits_truncate) {
            let raw = Ept::leaf(Pfn(1), 0, attrs);
            assert!(raw & (READ | WRITE) != WRITE, "{raw:#x}");
        }
    }
    #[test]
    fn transit_bits() {
        assert_eq!(Ept::transit(Pfn(1)), 0x004f_ffff_ffff_e000);
    }
    #[test]
    fn all_of_the_guests_addresses() {
        assert_eq!((Ept::user_entries(3), Ept::index(VirtAddr(0xffff_ffff_f000), 3)), (512, 511));
        assert!(Ept::is_canonical(VirtAddr(0xffff_ffff_f000)) && !Ept::is_canonical(VirtAddr(1 << 48)));
    }
}
