//! A window of fault-around that adapts: it follows what was used beside the fault.

mod kit;

use kit::*;
use pagefirst::arch::Tiny;
use pagefirst::policy::{FaultAround, Policy};
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::{Config, Machine};

const AT: VirtAddr = VirtAddr(1 << 40);
const PAGES: u64 = 1024;

fn adaptive(least: u64, most: u64) -> Result<Policy> {
    Ok(Policy { fault_around: FaultAround::adaptive(least << 10, most << 10).ok_or("bounds")?, ..policy() })
}

fn mapping(machine: &'static Machine, policy: Policy) -> Result<Space> {
    let c = cache(machine, &marked(), PAGES)?;
    warm(machine, &c, 0..PAGES)?;
    let s = space_with(machine, policy)?;
    s.map(at(AT, private(&c, 0, PAGES, R)))?;
    Ok(s)
}

/// Reads the pages in order as a program does; how many pages each fault mapped.
fn reads(s: &Space, pages: impl IntoIterator<Item = u64>) -> Result<Vec<usize>> {
    let mut cpu = s.platform().vcpu();
    cpu.switch_to(s);
    let mut windows = Vec::new();
    for i in pages {
        let before = mapped(s, AT, PAGES).len();
        assert_eq!(cpu.load_u8(page(AT, i))?, mark(i));
        let now = mapped(s, AT, PAGES).len();
        windows.extend(Some(now - before).filter(|n| *n > 0));
    }
    check(s);
    Ok(windows)
}

#[test]
fn a_window_grows_where_everything_is_used() -> Result {
    let s = mapping(machine(), adaptive(16, 256)?)?;
    // Where the first half of a 128 KiB block was used, the next fault, in its second half, maps the rest of 256 KiB. A
    // table begins with what the one before it ended with.
    let (first, second) = ([16, 48].repeat(8), [vec![64], [16, 48].repeat(7)].concat());
    assert_eq!(reads(&s, 0..1024)?, [first, second].concat());
    assert_eq!(s.account().unused, 0);
    Ok(())
}

#[test]
fn a_window_shrinks_where_little_is_used() -> Result {
    let s = mapping(machine(), adaptive(16, 256)?)?;
    // One page of every 32 KiB: of 16 pages beside a fault two were used, too few; of 20, three and so on.
    assert_eq!(reads(&s, (0..64).step_by(8))?, [16, 4, 4, 16, 4, 4]);
    // Bounds hold: none below the default, none above.
    let s = mapping(machine(), adaptive(64, 256)?)?;
    assert_eq!(reads(&s, (0..64).step_by(8))?, [16, 16, 16, 16]);
    let s = mapping(machine(), adaptive(16, 64)?)?;
    assert_eq!(reads(&s, 0..64)?, [16, 16, 16, 16]);
    let s = mapping(machine(), adaptive(4, 2048)?)?;
    assert_eq!(reads(&s, 0..64)?, [16, 48]);
    Ok(())
}

#[test]
fn where_half_is_used_the_window_stays_and_so_it_does_where_nothing_is_known() -> Result {
    let s = mapping(machine(), adaptive(16, 256)?)?;
    assert_eq!(reads(&s, (0..256).step_by(2))?, [16; 16]);
    // Far apart, each fault finds nothing beside it, unless its table begins: then the one before it tells.
    let s = mapping(machine(), adaptive(16, 256)?)?;
    assert_eq!(reads(&s, (0..1024).step_by(32))?, [vec![16; 16], vec![4], vec![16; 15]].concat());
    // Entries that start young tell nothing of use: the window grows, and no further than it may.
    let s = mapping(machine(), Policy { prefault_young: true, ..adaptive(16, 256)? })?;
    assert_eq!(reads(&s, (0..64).step_by(16))?, [16, 48]);
    Ok(())
}

#[test]
fn a_window_that_adapts_costs_one_lock_and_stays_in_its_table_and_mapping() -> Result {
    let machine = machine();
    let s = mapping(machine, adaptive(16, 256)?)?;
    assert_eq!(reads(&s, 0..16)?, [16]);
    let before = machine.counts();
    assert_eq!(fault(&s, page(AT, 16), Access::Read), End::Mapped(false, 47));
    let spent = machine.counts() - before;
    assert_eq!((spent.locked(), spent.scanned(), spent.tables_allocated), (1, 0, 0));
    // Tables of four pages.
    let machine = machine_of::<Tiny>();
    let c = cache(machine, &marked(), 16)?;
    warm(machine, &c, 0..16)?;
    let s = space_with(machine, adaptive(4, 2048)?)?;
    s.map(at(page(VirtAddr(0), 2), private(&c, 2, 13, R)))?;
    for (first, around) in [(5, 3), (3, 0), (14, 0)] {
        assert_eq!(fault(&s, page(VirtAddr(0), first), Access::Read), End::Mapped(false, around));
    }
    check(&s);
    Ok(())
}

/// The worst case for fault-around, one page used of each table: none is mapped in vain, but for the first table's.
#[test]
fn a_page_in_each_table_is_mapped_alone_wherever_it_lies() -> Result {
    let machine: &'static Machine = Machine::new(Config { memory: 64 << 20, ..hardware() });
    let c = cache(machine, &marked(), 12 * 512)?;
    warm(machine, &c, 0..12 * 512)?;
    let orders: [&dyn Fn(u64) -> u64; 4] = [
        &|i| 512 * i + 77,               // at the same place of each
        &|i| 512 * i + i * i * 37 % 512, // anywhere
        &|i| 512 * (11 - i) + 5,         // from the end on
        &|i| 512 * (i * 5 % 12) + 99,    // in no order, each a few tables from one that is there
    ];
    for order in orders {
        let s = space_with(machine, adaptive(4, 256)?)?;
        s.map(at(AT, private(&c, 0, 12 * 512, R)))?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        for page_of in (0..12).map(order) {
            assert_eq!(cpu.load_u8(page(AT, page_of))?, mark(page_of));
        }
        assert_eq!((cpu.counts().faults, cpu.counts().around), (12, 15));
        check(&s);
    }
    // From there on in sequence: it grows again, and the next table begins with the large window.
    let s = space_with(machine, adaptive(4, 256)?)?;
    s.map(at(AT, private(&c, 0, 12 * 512, R)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    for i in [5, 517, 1029].into_iter().chain(1030..1536).chain([1536]) {
        assert_eq!(cpu.load_u8(page(AT, i))?, mark(i));
    }
    assert_eq!(mapped(&s, page(AT, 1536), 512).len(), 64);
    Ok(())
}

#[test]
fn only_sizes_that_make_sense_are_windows() {
    let bounds = |least: u64, most: u64| FaultAround::adaptive(least, most).map(|w| (w.least(), w.most()));
    assert_eq!(bounds(PAGE_SIZE, 2 << 20), Some((PAGE_SIZE, 2 << 20)));
    assert_eq!(bounds(64 << 10, 64 << 10), Some((64 << 10, 64 << 10)));
    for (least, most) in [(128, 256), (16, 32), (12, 256), (16, 96), (2, 64), (64, 4096), (0, 64)] {
        assert_eq!(bounds(least << 10, most << 10), None, "{least} to {most}");
    }
    assert!(FaultAround::fixed(4 << 20).is_none() && FaultAround::fixed(3 << 12).is_none());
    assert!(FaultAround::fixed(2 << 20).is_some_and(FaultAround::is_fixed));
}
