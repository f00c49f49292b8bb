//! A format of 2 levels with 4 entries each: small enough to model-check, otherwise like the others.

use super::{Attrs, Format};
use crate::types::{Pfn, VirtAddr};

const PRESENT: u64 = 1;
const TABLE: u64 = 2;
const TRANSIT: u64 = 4;

/// Two levels, four entries a table, 64 KiB of addresses.
#[derive(Clone, Copy, Debug)]
pub struct Tiny;

// SAFETY: what is written is read back; there is no hardware.
unsafe impl Format for Tiny {
    const LEVELS: u8 = 2;
    const BITS: u32 = 2;
    const TOP_LEAF: u8 = 1;
    const USER_END: VirtAddr = VirtAddr(0x1_0000);
    const NON_CANONICAL_TRAPS: bool = true;

    fn is_canonical(va: VirtAddr) -> bool {
        va < Self::USER_END
    }
    fn table(pfn: Pfn) -> u64 {
        (pfn.0 as u64) << 16 | TABLE | PRESENT
    }
    fn leaf(pfn: Pfn, _level: u8, attrs: Attrs) -> u64 {
        (pfn.0 as u64) << 16 | (attrs.bits() as u64) << 8 | PRESENT
    }
    fn transit(leaf: Pfn) -> u64 {
        (leaf.0 as u64) << 16 | TRANSIT
    }
    fn child(raw: u64, level: u8) -> Option<Pfn> {
        (level > 0 && raw & TABLE != 0).then_some(Pfn((raw >> 16) as u32))
    }
    fn frame(raw: u64, _level: u8) -> Option<Pfn> {
        (raw & (PRESENT | TABLE) == PRESENT).then_some(Pfn((raw >> 16) as u32))
    }
    fn attrs(raw: u64) -> Attrs {
        Attrs::from_bits_truncate((raw >> 8) as u8)
    }
    fn with_attrs(raw: u64, attrs: Attrs) -> u64 {
        raw & !0xff00 | (attrs.bits() as u64) << 8
    }
}
