//! x86-64, 4 and 5 levels. Intel SDM volume 3A, section 4.5 "4-Level Paging and 5-Level Paging", tables 4-14 to 4-20.
//!
//! The fifth level (CR4.LA57) adds a table above and 9 bits of address; entries are the same at every level.

use super::{Attrs, Format};
use crate::types::{Pfn, VirtAddr};

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
/// PWT and PCD select an entry of the page attribute table (SDM 3A, 12.12): PCD the third, uncacheable since reset; PWT
/// the second, which a kernel sets to write-combining, and which until then means write-through.
const PWT: u64 = 1 << 3;
const PCD: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// PS: in a directory entry, "maps a page".
const LARGE: u64 = 1 << 7;
/// Ours in an entry that is not present: user code may not touch the page that is there (`PROT_NONE`).
const NONE: u64 = 1 << 8;
/// Ignored by hardware (bits 11:9): ours.
const SPECIAL: u64 = 1 << 9;
/// Ours in an entry that is not present: a huge page is being split into the table whose address stands here.
const TRANSIT: u64 = 1 << 10;
const NO_EXEC: u64 = 1 << 63;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// The x86-64 formats, by the number of levels.
#[derive(Clone, Copy, Debug)]
pub struct X86<const LEVELS: u8>;

/// The 4-level x86-64 format: 48 bits of address.
pub type X86_64 = X86<4>;
/// The 5-level x86-64 format (LA57): 57 bits of address.
pub type X86_64La57 = X86<5>;

/// The address bits as they stand in an entry: inverted where the entry is not present, so that no usable address does
/// (L1TF: Intel, "L1 Terminal Fault", 2018; a not-present entry's address may still be looked up in the cache).
const fn address(raw: u64, phys: u64) -> u64 {
    if raw & PRESENT == 0 { !phys & FRAME } else { phys & FRAME }
}

/// These stand in an entry as they are.
const SAME: Attrs =
    Attrs::WRITE.union(Attrs::UNCACHED).union(Attrs::DEVICE).union(Attrs::ACCESSED).union(Attrs::DIRTY);
const _: () = assert!(SAME.bits() as u64 == WRITE | PWT | PCD | ACCESSED | DIRTY);

/// What stands in an entry for each set of attributes, so that a new entry is one look-up: to be combined with the
/// address by exclusive or, which inverts it where the entry is not present (see [`address`]).
const BITS: [u64; 256] = {
    let mut all = [0; 256];
    let mut attrs = 0;
    while attrs < all.len() {
        all[attrs] = bits_of(Attrs::from_bits_truncate(attrs as u8));
        attrs += 1;
    }
    all
};

const fn bits_of(attrs: Attrs) -> u64 {
    SAME.intersection(attrs).bits() as u64
        | if attrs.contains(Attrs::SPECIAL) { SPECIAL } else { 0 }
        | if attrs.contains(Attrs::NONE) { NONE | FRAME } else { PRESENT | USER }
        | if attrs.contains(Attrs::EXEC) { 0 } else { NO_EXEC }
}

#[inline]
fn bits(attrs: Attrs) -> u64 {
    BITS[attrs.bits() as usize]
}

// SAFETY: the bits are the manual's, read back as they were written; the tests below show both ways.
unsafe impl<const LEVELS: u8> Format for X86<LEVELS> {
    const LEVELS: u8 = {
        assert!(LEVELS == 4 || LEVELS == 5);
        LEVELS
    };
    // 1 GiB: above, bit 7 is reserved.
    const TOP_LEAF: u8 = 2;
    const BITS: u32 = 9;
    // The last page below the canonical hole stays unmapped, as on Linux: SYSRET to a non-canonical address
    // faults in kernel mode (CVE-2012-0217).
    const USER_END: VirtAddr = VirtAddr((1 << (11 + 9 * LEVELS)) - 0x1000);
    const TABLES_MARKED: bool = true;
    const NON_CANONICAL_TRAPS: bool = true;

    #[inline]
    fn is_canonical(va: VirtAddr) -> bool {
        let unused = 52 - 9 * LEVELS as u32;
        (va.0 as i64) << unused >> unused == va.0 as i64
    }
    #[inline]
    fn table(pfn: Pfn) -> u64 {
        let write = if cfg!(mutant = "table_entry_read_only") { 0 } else { WRITE };
        pfn.phys() | PRESENT | write | USER
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
        (level > 0 && raw & (PRESENT | LARGE) == PRESENT).then_some(Pfn(((raw & FRAME) >> 12) as u32))
    }
    #[inline]
    fn frame(raw: u64, level: u8) -> Option<Pfn> {
        let leaf = raw & (PRESENT | NONE) != 0 && (level == 0 || raw & LARGE != 0);
        leaf.then_some(Pfn((address(raw, raw) >> 12) as u32))
    }
    #[inline]
    fn attrs(raw: u64) -> Attrs {
        let on = |bit, a| if bit != 0 { a } else { Attrs::empty() };
        SAME.intersection(Attrs::from_bits_truncate(raw as u8))
            | on(raw & SPECIAL, Attrs::SPECIAL)
            | on(!raw & PRESENT, Attrs::NONE)
            | on(!raw & NO_EXEC, Attrs::EXEC)
    }
    /// Section 4.6.1 "Determination of Access Rights": user access, write and fetch need every entry on the way.
    #[inline]
    fn allows(raw: u64) -> Attrs {
        let on = |bit, a| if bit != 0 { a } else { Attrs::empty() };
        on(raw & WRITE, Attrs::WRITE) | on(!raw & NO_EXEC, Attrs::EXEC) | on(!raw & USER, Attrs::NONE)
    }
    #[inline]
    fn shown(raw: u64) -> Option<u64> {
        (raw != 0 && raw & PRESENT == 0).then_some(raw & FRAME)
    }
    #[inline]
    fn with_attrs(raw: u64, attrs: Attrs) -> u64 {
        let other =
            raw & !(FRAME | PRESENT | NONE | WRITE | USER | PWT | PCD | ACCESSED | DIRTY | SPECIAL | NO_EXEC);
        other | (bits(attrs) ^ address(raw, raw))
    }
    #[inline]
    fn read_only(raw: u64) -> u64 {
        raw & !WRITE
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Intel SDM 3A, table 4-20 "Format of a Page-Table Entry that Maps a 4-KByte Page".
    #[test]
    fn leaf_4k_bits() {
        let w = Attrs::WRITE | Attrs::DIRTY | Attrs::ACCESSED;
        assert_eq!(X86_64::leaf(Pfn(0x12345), 0, w), 0x8000_0000_1234_5067);
        assert_eq!(X86_64::leaf(Pfn(1), 0, Attrs::EXEC), 0x1005);
        assert_eq!(X86_64::leaf(Pfn(1), 0, Attrs::empty()), 0x8000_0000_0000_1005);
        assert_eq!(X86_64::leaf(Pfn(1), 0, Attrs::SPECIAL | Attrs::EXEC), 0x1205);
        assert_eq!(X86_64::leaf(Pfn(1), 0, Attrs::DEVICE | Attrs::EXEC), 0x1015);
        assert_eq!(X86_64::leaf(Pfn(1), 0, Attrs::UNCACHED | Attrs::EXEC), 0x100d);
        assert_eq!(X86_64::leaf(Pfn(1), 0, Attrs::NONE | Attrs::EXEC), 0x000f_ffff_ffff_e100);
        assert_eq!(X86_64::frame(0x000f_ffff_ffff_e100, 0), Some(Pfn(1)));
    }
    /// Table 4-18 "Format of a Page-Directory Entry that Maps a 2-MByte Page": PS is bit 7.
    #[test]
    fn leaf_2m_bits() {
        assert_eq!(X86_64::leaf(Pfn(0x200), 1, Attrs::WRITE | Attrs::EXEC), 0x20_0087);
        assert_eq!(X86_64::child(0x20_0087, 1), None);
        assert_eq!(X86_64::frame(0x20_0087, 1), Some(Pfn(0x200)));
        let none = X86_64::with_attrs(0x20_0087, Attrs::NONE);
        assert_eq!((none & 1, X86_64::frame(none, 1), X86_64::child(none, 1)), (0, Some(Pfn(0x200)), None));
    }
    /// Bit 0, P, is clear: hardware looks at nothing else (section 4.5.2); the address is inverted (L1TF).
    #[test]
    fn transit_bits() {
        let raw = X86_64::transit(Pfn(1));
        assert_eq!(raw, 0x000f_ffff_ffff_e400);
        assert_eq!((X86_64::child(raw, 1), X86_64::frame(raw, 1)), (None, None));
    }
    /// Table 4-19 "Format of a Page-Directory Entry that References a Page Table": P, R/W, U/S.
    #[test]
    fn table_bits() {
        assert_eq!(X86_64::table(Pfn(0xabcde)), 0xabcd_e007);
        assert_eq!(X86_64::child(0xabcd_e007, 1), Some(Pfn(0xabcde)));
        assert_eq!(X86_64::frame(0xabcd_e007, 1), None);
        assert_eq!(X86_64::child(0xabcd_e007, 0), None);
        assert_eq!(X86_64::child(0, 3), None);
        assert_eq!(X86_64::allows(0xabcd_e007), Attrs::WRITE | Attrs::EXEC);
        assert_eq!(X86_64::allows(0x8000_0000_abcd_e001), Attrs::NONE);
    }
    /// Section 4.5.4: bits 47:39 select the PML4 entry, 38:30, 29:21, 20:12 the rest.
    #[test]
    fn index_bits() {
        let va = VirtAddr(0x7f12_3456_789a);
        let by_hand = [(va.0 >> 12) & 511, (va.0 >> 21) & 511, (va.0 >> 30) & 511, (va.0 >> 39) & 511];
        for level in 0..4u8 {
            assert_eq!(X86_64::index(va, level) as u64, by_hand[level as usize]);
        }
        assert!(X86_64::is_canonical(VirtAddr(0x7fff_ffff_ffff)));
        assert!(!X86_64::is_canonical(VirtAddr(0x8000_0000_0000)));
        assert!(X86_64::is_canonical(VirtAddr(0xffff_8000_0000_0000)));
        assert_eq!(X86_64::USER_END, VirtAddr(0x7fff_ffff_f000));
    }
    /// With CR4.LA57 bits 56:48 select the PML5 entry, and bits 63:57 repeat bit 56 (section 4.5.1).
    #[test]
    fn five_levels() {
        let va = VirtAddr(0x00ab_7f12_3456_789a);
        assert_eq!(X86_64La57::index(va, 4), 0xab);
        for level in 0..4 {
            assert_eq!(X86_64La57::index(va, level), X86_64::index(va, level));
        }
        assert_eq!(X86_64La57::USER_END, VirtAddr(0x00ff_ffff_ffff_f000));
        assert_eq!(X86_64La57::user_entries(4), 256);
        assert!(X86_64La57::is_canonical(VirtAddr(0x00ff_ffff_ffff_ffff)));
        assert!(!X86_64La57::is_canonical(VirtAddr(0x0100_0000_0000_0000)));
        assert!(X86_64La57::is_canonical(VirtAddr(0xff00_0000_0000_0000)));
        // A PML5 entry that references a PML4 table: P, R/W, U/S (table 4-14).
        assert_eq!(X86_64La57::child(0xabcd_e007, 4), Some(Pfn(0xabcde)));
    }
    /// Frame numbers reach 44 bits of address; what stands in an entry that is not present has more.
    #[test]
    fn an_entry_that_is_not_present_names_no_memory() {
        for pfn in [0, 1, 0x1234_5678, u32::MAX].map(Pfn) {
            for attrs in (0..64).map(Attrs::from_bits_truncate) {
                let made = X86_64::leaf(pfn, 0, attrs);
                let changed = X86_64::with_attrs(X86_64::leaf(pfn, 0, Attrs::empty()), attrs);
                let huge = X86_64::leaf(Pfn(pfn.0 & !511), 1, attrs);
                for raw in [made, changed, huge] {
                    let shown = X86_64::shown(raw);
                    assert_eq!(shown.is_some(), attrs.contains(Attrs::NONE), "{raw:#x}");
                    assert!(shown.is_none_or(|phys| phys >> 44 != 0), "{raw:#x}");
                }
                assert_eq!(X86_64::frame(made, 0), Some(pfn), "{made:#x}");
            }
        }
        assert_eq!((X86_64::shown(0), X86_64::shown(X86_64::table(Pfn(1)))), (None, None));
    }
    #[test]
    fn attrs_round_trip() {
        for bits in 0..=255 {
            let a = Attrs::from_bits_truncate(bits);
            let raw = X86_64::leaf(Pfn(77), 0, a);
            assert_eq!(X86_64::attrs(raw), a);
            assert_eq!(X86_64::with_attrs(raw, Attrs::EXEC), X86_64::leaf(Pfn(77), 0, Attrs::EXEC));
        }
    }
}
