//! What the library rests on, tried on every format that hardware has (see [`Format`]'s safety).

use super::*;

const FRAMES: [u32; 5] = [0, 1, 0x200, 0x1234_5678, u32::MAX];

fn all_attrs() -> impl Iterator<Item = Attrs> {
    // A page is of one kind of memory.
    (0..=255).map(Attrs::from_bits_truncate).filter(|a| !a.contains(Attrs::UNCACHED | Attrs::DEVICE))
}

fn keeps_the_contract<F: Format>() {
    assert!(F::LEVELS as usize <= MAX_LEVELS && F::TOP_LEAF < F::LEVELS);
    for level in 0..F::LEVELS {
        assert!((0..F::LEVELS).all(|level| F::child(0, level).is_none() && F::frame(0, level).is_none()));
        for pfn in FRAMES {
            is_read_back::<F>(Pfn(pfn), level);
        }
        for va in [0, 0x1234_5678_9abc, F::USER_END.0 - 1] {
            assert!(F::index(VirtAddr(va), level) < F::user_entries(level));
        }
    }
    assert!(F::is_canonical(VirtAddr(0)) && F::is_canonical(VirtAddr(F::USER_END.0 - 1)));
    assert!(!F::attrs(0).contains(Attrs::ACCESSED), "an empty slot counts as used");
    for bits in 0..64 {
        let (raw, level) = (1u64 << bits, F::LEVELS - 1);
        assert!(F::child(raw, level).is_none() || F::frame(raw, level).is_none(), "{raw:#x} is both");
    }
}

fn is_read_back<F: Format>(pfn: Pfn, level: u8) {
    let table = F::table(pfn);
    assert_eq!(F::child(table, level), (level > 0).then_some(pfn));
    assert_eq!(F::allows(table), Attrs::WRITE | Attrs::EXEC);
    assert_eq!(F::shown(table), None);
    let poison = F::poison();
    assert_eq!((F::child(poison, level), F::frame(poison, level)), (None, None));
    assert!(poison != 0 && !F::attrs(poison).intersects(Attrs::ACCESSED | Attrs::SPECIAL), "{poison:#x}");
    assert!(!F::is_settled(poison, level) && F::shown(poison).is_some_and(|phys| phys >> 44 != 0));
    if level > 0 {
        assert_eq!(F::frame(table, level), None);
        let transit = F::transit(pfn);
        assert_eq!((F::child(transit, level), F::frame(transit, level)), (None, None));
        assert!(transit != 0 && F::shown(transit).is_some_and(|phys| phys >> 44 != 0), "{transit:#x}");
    }
    if level > F::TOP_LEAF {
        return;
    }
    let pfn = Pfn(pfn.0 & !((1u64 << (F::BITS * level as u32)) - 1) as u32);
    for attrs in all_attrs() {
        let raw = F::leaf(pfn, level, attrs);
        let name = format_args!("{attrs:?} of {pfn:?} at level {level}: {raw:#x}");
        assert_eq!((F::frame(raw, level), F::child(raw, level)), (Some(pfn), None), "{name}");
        assert_eq!(F::attrs(raw), attrs, "{name}");
        assert_eq!(F::read_only(raw), F::with_attrs(raw, attrs - Attrs::WRITE), "{name}");
        // Whatever it was before.
        for before in [Attrs::empty(), Attrs::all() - Attrs::UNCACHED, Attrs::WRITE | Attrs::EXEC] {
            assert_eq!(F::with_attrs(F::leaf(pfn, level, before), attrs), raw, "{name}");
        }
        // What is not present names no memory; frame numbers reach 44 bits of address.
        let shown = F::shown(raw);
        assert_eq!(shown.is_some(), attrs.contains(Attrs::NONE), "{name}");
        assert!(shown.is_none_or(|phys| phys >> 44 != 0), "{name}");
        // Hardware has a mark left to set, or none.
        let settled = attrs.contains(Attrs::ACCESSED)
            && (!attrs.contains(Attrs::WRITE) || attrs.contains(Attrs::DIRTY));
        assert_eq!(F::is_settled(raw, level), settled, "{name}");
    }
}

#[test]
fn the_contract_is_kept_by_x86_64() {
    keeps_the_contract::<X86_64>();
    keeps_the_contract::<X86_64La57>();
}
#[test]
fn the_contract_is_kept_by_ept() {
    keeps_the_contract::<Ept>();
}
#[test]
fn the_contract_is_kept_by_riscv64() {
    keeps_the_contract::<Sv39>();
    keeps_the_contract::<Sv48>();
}
#[test]
fn the_contract_is_kept_by_aarch64() {
    keeps_the_contract::<Aarch64>();
}
