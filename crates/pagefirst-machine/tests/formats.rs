//! Every format on the hardware that walks it: the random sequences of `oracle.rs` with fewer cases, and each size of
//! page that it has.

mod doors;
#[path = "oracle/mod.rs"]
mod oracle;

use doors::{DoorsOf, Point, arm};
use oracle::hardware::{Machines, Walked};
use oracle::kit::{self, End, R, RW, Result, cache, fault, mark, marked, page, policy, private};
use oracle::{parts, plan, seeds, together};
use pagefirst::arch::{Aarch64, Attrs, Ept, Sv39, Sv48, X86_64La57};
use pagefirst::fault::{FaultError, Segv, Signal};
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::{AddressSpace, Map, RemapTo};
use pagefirst::sync::epoch::Pin;
use pagefirst::table::{FramesError, PageTable};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, VirtAddr, VirtRange};
use pagefirst_machine::{Config, Machine};
use proptest::prelude::*;
use std::sync::Arc;

fn in_turn<F: Walked>(name: &'static str) -> seeds::End {
    let machines = Machines::<F>::default();
    let strategy = (plan::settings(2), plan::steps(2, 120));
    seeds::run(name, 60, &strategy, |(setting, steps)| {
        machines.in_turn(setting, &steps).map_err(TestCaseError::fail)
    })
}

fn together<F: Walked>(name: &'static str) -> seeds::End {
    let machines = Machines::<F>::default();
    let strategy = (plan::settings_together(4), parts::steps_together(3, 100));
    seeds::run(name, 40, &strategy, |(setting, steps)| {
        let run = |machine| together::run(machine, &setting, &steps);
        machines.with(setting.hardware, run).map_err(TestCaseError::fail)
    })
}

macro_rules! oracle {
    ($($name:ident: $format:ty),*) => {
        mod sequences {
            use super::*;
            $(mod $name {
                use super::*;
                #[test]
                fn two_cpus_in_turn() -> seeds::End {
                    in_turn::<$format>(concat!("sequences::", stringify!($name), "::two_cpus_in_turn"))
                }
                #[test]
                fn three_cpus_together() -> seeds::End {
                    together::<$format>(concat!("sequences::", stringify!($name), "::three_cpus_together"))
                }
            })*
        }
    };
}
// Sv39 has no room for the addresses of the oracle's sequences, and is Sv48 with a level less.
oracle!(la57: X86_64La57, ept: Ept, sv48: Sv48, aarch64: Aarch64);

/// What hardware does not translate is a page fault like others, but for x86: Linux says SEGV_MAPERR, and there SI_KERNEL.
fn not_translated<F: Walked>() -> Result {
    let machine = Machine::<F>::new(F::config(false));
    let space = kit::space(machine)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&space);
    let at = VirtAddr(0x1234_5678_9abc_def0);
    let trap = cpu.load_u8(at).expect_err("nobody can have that address");
    let expected = if F::NON_CANONICAL_TRAPS { (128, 0) } else { (1, at.0) };
    assert_eq!((trap.signal(), trap.si_addr()), (Some((Signal::Segv, expected.0)), expected.1));
    Ok(())
}

#[test]
fn an_address_that_is_not_translated() -> Result {
    not_translated::<X86_64La57>()?;
    not_translated::<Sv39>()?;
    not_translated::<Sv48>()?;
    not_translated::<Aarch64>()
}

/// Frames mapped at each level, huge pages of private memory, and one of them cut.
fn every_size<F: Walked>() -> Result {
    for harsh in [false, true] {
        let machine = Machine::<F>::new(F::config(harsh));
        let table = PageTable::new(machine)?;
        let far = VirtAddr(F::USER_END.0 / 2).align_down(F::span(F::LEVELS - 1));
        for level in 0..F::LEVELS {
            let (span, first) = (F::span(level), Pfn(1u32.checked_shl(F::BITS * level as u32).unwrap_or(0)));
            let range = VirtRange::new(far, VirtAddr(far.0 + 2 * span));
            let attrs = Attrs::WRITE | Attrs::DEVICE;
            let mapped = table.mapper().map(range, first, level, attrs);
            if level > F::TOP_LEAF {
                assert_eq!(mapped, Err(FramesError::Invalid(range, level)));
                continue;
            }
            mapped?;
            let last = VirtAddr(range.end.0 - 1);
            let found = table.translate(&Pin::new(machine), last).ok_or("not mapped")?;
            let marks = Attrs::ACCESSED | Attrs::DIRTY | Attrs::SPECIAL;
            assert_eq!((found.level, found.attrs), (level, attrs | marks));
            assert_eq!(u64::from(found.pfn.0), u64::from(first.0) + 2 * span / PAGE_SIZE - 1);
            table.mapper().unmap(range)?;
        }
        drop(table);

        let space = Arc::new(AddressSpace::new(machine, Policy { huge: HugePolicy::Always, ..policy() })?);
        let at = space.map(Map::anonymous(8 << 20, RW))?.range.start;
        let (huge, mut cpu) = (VirtAddr((at.0 + (3 << 20)) & !0x1f_ffff), machine.vcpu());
        cpu.switch_to(&space);
        assert_eq!(cpu.load_u64(huge)?, 0);
        for i in 0..512 {
            cpu.store_u64(VirtAddr(huge.0 + i * PAGE_SIZE), i + 1)?;
        }
        assert_eq!(kit::entry(&space, huge).1, 1, "a huge page");
        space.protect(VirtAddr(huge.0 + 100 * PAGE_SIZE), PAGE_SIZE, R)?;
        assert_eq!(kit::entry(&space, huge).1, 0, "it was cut");
        for i in 0..512 {
            assert_eq!(cpu.load_u64(VirtAddr(huge.0 + i * PAGE_SIZE))?, i + 1);
            assert_eq!(cpu.store_u64(VirtAddr(huge.0 + i * PAGE_SIZE), 7).is_err(), i == 100);
        }
        machine.check_space(&space);
        drop((cpu, space));
        machine.nothing_left()?;
    }
    Ok(())
}

kit::on_formats!(every_size: la57 X86_64La57, ept Ept, sv39 Sv39, sv48 Sv48, aarch64 Aarch64);

/// A fault has broken an entry to put a copy in its place, and the mapping moves before it can: the page is found where
/// it is then, and by whoever comes.
#[test]
fn aarch64_a_copy_that_is_broken_off() -> Result {
    const FROM: VirtAddr = VirtAddr(1 << 30);
    const TO: VirtAddr = VirtAddr(2 << 30);
    let machine = Machine::<DoorsOf<Aarch64>>::new(Config { keep_tags: true, ..Aarch64::config(false) });
    let (s, c) = (kit::space(machine)?, cache(machine, &marked(), 8)?);
    s.map(kit::at(FROM, private(&c, 0, 8, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    assert_eq!(cpu.load_u8(page(FROM, 3))?, mark(3));
    // Another CPU may have what this one has.
    let there = s.clone();
    let other = std::thread::spawn(move || {
        let mut cpu = machine.vcpu();
        cpu.switch_to(&there);
        cpu.load_u8(page(FROM, 3)).map(drop).map_err(|trap| trap.error)
    });
    assert!(other.join().is_ok_and(|read| read.is_ok()));
    // It looks at the page, copies it and breaks the entry; and when it comes back from the flush:
    let inner = s.clone();
    arm(Point::Found, 1, move || {
        let broken = kit::attrs(&inner, page(FROM, 3));
        assert!(broken.contains(Attrs::NONE), "{broken:?}");
        inner.remap(FROM, 8 * PAGE_SIZE, 8 * PAGE_SIZE, RemapTo::Fixed(TO)).expect("it can move");
    });
    let end = fault(&s, page(FROM, 3), Access::Write);
    assert_eq!(end, End::Error(FaultError::Segv(Segv::NotMapped)));
    assert!(doors::has_happened());
    machine.check_space(&s);
    assert_eq!(cpu.load_u8(page(TO, 3))?, mark(3));
    assert!(!kit::attrs(&s, page(TO, 3)).contains(Attrs::NONE));
    cpu.store_u8(page(TO, 3), 1)?;
    assert_eq!((cpu.load_u8(page(TO, 3))?, cpu.load_u8(page(TO, 4))?), (1, mark(4)));
    kit::check(&s);
    drop((cpu, s, c));
    Ok(machine.nothing_left()?)
}
