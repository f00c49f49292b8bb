//! Any entry in any format: what the functions of [`Format`] say of it agrees.

use crate::Target;
use pagefirst::arch::{Aarch64, Attrs, Ept, Format, Sv39, Sv48, Tiny, X86_64, X86_64La57};
use pagefirst::types::{PAGE_SIZE, Pfn, VirtAddr};
use std::fmt::Write;

/// The formats of page tables.
pub static FORMATS: Target = Target { name: "formats", try_out, show };

/// What hardware looks at.
macro_rules! for_each_format_of_hardware {
    ($function:ident, $($argument:expr),*) => {
        for_each_format_of_hardware!(@ $function, ($($argument),*), X86_64 X86_64La57 Ept Sv39 Sv48 Aarch64)
    };
    (@ $function:ident, $arguments:tt, $($format:ident)*) => {
        $($function::<$format> $arguments;)*
    };
}

#[derive(Debug)]
struct Input {
    /// What may stand in a table.
    raw: u64,
    pfn: Pfn,
    attrs: Attrs,
    others: Attrs,
    va: VirtAddr,
}

/// A page is of one kind of memory.
fn attrs(bits: u8) -> Attrs {
    let attrs = Attrs::from_bits_truncate(bits);
    if attrs.contains(Attrs::UNCACHED | Attrs::DEVICE) { attrs - Attrs::UNCACHED } else { attrs }
}

fn decode(bytes: &[u8]) -> Input {
    let mut all = [0; 22];
    let len = bytes.len().min(all.len());
    all[..len].copy_from_slice(&bytes[..len]);
    let number = |from: usize, len: usize| {
        all[from..from + len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    };
    Input {
        raw: number(0, 8),
        pfn: Pfn(number(8, 4) as u32),
        attrs: attrs(all[12]),
        others: attrs(all[13]),
        va: VirtAddr(number(14, 8)),
    }
}

fn try_out(bytes: &[u8]) {
    let input = decode(bytes);
    for_each_format_of_hardware!(agrees, &input);
    for_each_format_of_hardware!(names_no_memory, &input);
    // No hardware looks at this one.
    agrees::<Tiny>(&input);
}

fn name<F: Format>() -> &'static str {
    std::any::type_name::<F>()
}

fn agrees<F: Format>(input: &Input) {
    let &Input { raw, pfn, attrs, others, va } = input;
    for level in 0..F::LEVELS {
        let name = format_args!("{} at level {level}", name::<F>());
        any_entry::<F>(raw, level, attrs, others);

        let table = F::table(pfn);
        assert_eq!(F::child(table, level), (level > 0).then_some(pfn), "{name}: {table:#x}");
        if level > 0 {
            assert_eq!(F::frame(table, level), None, "{name}: {table:#x}");
            let transit = F::transit(pfn);
            assert_ne!(transit, 0, "{name}");
            assert_eq!((F::child(transit, level), F::frame(transit, level)), (None, None), "{name}");
            assert!(!F::is_settled(transit, level), "{name}");
        }
        let (index, span) = (F::index(va, level), F::span_of(va, level));
        assert!(index < F::ENTRIES && span.start <= va, "{name}: {index} of {span:?}");
        assert!(span.contains(va) || span.end.0 == u64::MAX, "{name}: {span:?}");
        assert_eq!(F::pages_into(va, level), ((va.0 - span.start.0) / PAGE_SIZE) as u32, "{name}");
        if va < F::USER_END {
            assert!(F::is_canonical(va) && index < F::user_entries(level), "{name}");
            assert_eq!(F::slots(span, level), index..index + 1, "{name}");
        }
        if level > F::TOP_LEAF {
            continue;
        }
        let pfn = Pfn(pfn.0 & !((1_u64 << (F::BITS * u32::from(level))) - 1) as u32);
        let leaf = F::leaf(pfn, level, attrs);
        assert_eq!((F::child(leaf, level), F::frame(leaf, level)), (None, Some(pfn)), "{name}: {leaf:#x}");
        assert_eq!(F::attrs(leaf), attrs, "{name}: {leaf:#x}");
        assert_eq!(F::with_attrs(leaf, others), F::leaf(pfn, level, others), "{name}: {leaf:#x}");
        any_entry::<F>(leaf, level, attrs, others);
    }
}

/// Whatever stands in a table.
fn any_entry<F: Format>(raw: u64, level: u8, attrs: Attrs, others: Attrs) {
    let name = format_args!("{} at level {level}: {raw:#x}", name::<F>());
    let (child, frame) = (F::child(raw, level), F::frame(raw, level));
    assert!(child.is_none() || frame.is_none(), "{name} is both");
    assert!(raw != 0 || (child, frame) == (None, None), "{name} is something");
    assert!(level > 0 || child.is_none(), "{name} is a table");
    assert!(child.is_none() || F::shown(raw).is_none(), "{name} is a table and not present");
    assert!(child.is_none() || !F::is_settled(raw, level), "{name}");
    if frame.is_none() {
        return;
    }
    let changed = F::with_attrs(raw, attrs);
    assert_eq!((F::child(changed, level), F::frame(changed, level)), (None, frame), "{name}, {attrs:?}");
    assert_eq!(F::attrs(changed), attrs, "{name}, {attrs:?}");
    assert_eq!(F::with_attrs(changed, others), F::with_attrs(raw, others), "{name}, {attrs:?}");
    // Hardware has a mark left to set, or none.
    let settled = attrs.contains(Attrs::ACCESSED) && attrs & (Attrs::WRITE | Attrs::DIRTY) != Attrs::WRITE;
    assert_eq!(F::is_settled(changed, level), settled, "{name}, {attrs:?}");
}

/// Frame numbers reach 44 bits of address; what stands in an entry that is not present has more.
fn names_no_memory<F: Format>(input: &Input) {
    let &Input { raw, pfn, attrs, others, .. } = input;
    let name = name::<F>();
    let names_none = |raw: u64| F::shown(raw).is_none_or(|phys| phys >> 44 != 0);
    assert_eq!((F::shown(0), F::shown(F::table(pfn))), (None, None), "{name}");
    let transit = F::transit(pfn);
    assert!(F::shown(transit).is_some() && names_none(transit), "{name}: {transit:#x}");
    for level in 0..=F::TOP_LEAF {
        if F::frame(raw, level).is_some() {
            let present = !F::attrs(raw).contains(Attrs::NONE);
            assert_eq!(F::shown(raw).is_none(), present, "{name} at level {level}: {raw:#x}");
        }
        let pfn = Pfn(pfn.0 & !((1_u64 << (F::BITS * u32::from(level))) - 1) as u32);
        let leaf = F::leaf(pfn, level, attrs);
        for (raw, attrs) in [(leaf, attrs), (F::with_attrs(leaf, others), others)] {
            assert!(names_none(raw), "{name} at level {level}: {raw:#x}");
            assert_eq!(
                F::shown(raw).is_some(),
                attrs.contains(Attrs::NONE),
                "{name} at level {level}: {raw:#x}"
            );
        }
    }
}

fn show(bytes: &[u8]) -> String {
    let input = decode(bytes);
    let mut shown = format!("{input:x?}");
    for_each_format_of_hardware!(line, &input, &mut shown);
    line::<Tiny>(&input, &mut shown);
    shown
}

fn line<F: Format>(input: &Input, shown: &mut String) {
    for level in 0..F::LEVELS {
        let (child, frame) = (F::child(input.raw, level), F::frame(input.raw, level));
        let (attrs, stands) = (F::attrs(input.raw), F::shown(input.raw));
        let line = format_args!("child {child:?}, frame {frame:?}, {attrs:?}, shown {stands:x?}");
        write!(shown, "\n{} at level {level}: {line}", name::<F>()).expect("strings take everything");
    }
}
