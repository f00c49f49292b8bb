//! Heap, stack, limits, and what is refused.

use super::*;
use pagefirst::policy::Policy;
use pagefirst::space::VmaFlags;

#[test]
fn brk_moves_the_end_of_the_heap_up_and_down() -> Result {
    let mut b = Bench::new()?;
    let start = VirtAddr(AT.0 + 0x123);
    b.s.set_heap(start)?;
    assert_eq!((b.s.heap_end(), b.vmas()), (start, vec![]));
    let brk = |b: &Bench, end: u64| b.s.brk(VirtAddr(AT.0 + end));
    // The rest of the page that the start lies in belongs to what comes before the heap.
    assert_eq!(brk(&b, 0x800)?, VirtAddr(AT.0 + 0x800));
    assert_eq!(b.vmas(), []);
    brk(&b, 3 * PAGE_SIZE + 1)?;
    assert_eq!((b.vmas(), b.s.heap_end()), (vec![(1, 4, RW)], VirtAddr(AT.0 + 3 * PAGE_SIZE + 1)));
    for i in 1..4 {
        b.cpu.store_u64(page(AT, i), i)?;
    }
    brk(&b, 6 * PAGE_SIZE)?;
    assert_eq!(
        (b.vmas(), b.words(1, 7)),
        (vec![(1, 6, RW)], vec![Some(1), Some(2), Some(3), Some(0), Some(0), None])
    );
    brk(&b, 2 * PAGE_SIZE)?;
    brk(&b, 4 * PAGE_SIZE)?;
    assert_eq!(b.words(1, 5), [Some(1), Some(0), Some(0), None], "what went came back as zeros");
    // Below its start, into another mapping: nothing changes.
    b.numbered(10, 1)?;
    assert!(matches!(brk(&b, 0), Err(MapError::Invalid(_))));
    assert_eq!(brk(&b, 11 * PAGE_SIZE), Err(MapError::Taken(range(4, 11))));
    assert_eq!(b.s.heap_end(), page(AT, 4));
    assert_eq!(b.vmas(), [(1, 4, RW), (10, 11, RW)]);
    brk(&b, 0x123)?;
    assert_eq!((b.vmas(), b.s.heap_end()), (vec![(10, 11, RW)], start));
    assert!(matches!(b.s.set_heap(VirtAddr(u64::MAX)), Err(MapError::OutOfRange(_))));
    b.end()
}

/// A stack of two pages that ends at page 10,000.
fn with_stack(policy: Policy) -> Result<Bench> {
    let machine = machine();
    let b = Bench::on(machine, space_with(machine, policy)?);
    b.s.map(at(page(AT, 9_998), Map { flags: VmaFlags::GROWS_DOWN, ..anonymous(2, RW) }))?;
    Ok(b)
}

#[test]
fn a_stack_grows_down_to_its_limit() -> Result {
    let mut b = with_stack(Policy { max_stack: 100 * PAGE_SIZE, ..policy() })?;
    b.cpu.store_u64(page(AT, 9_999), 1)?;
    b.cpu.store_u64(page(AT, 9_990), 2)?;
    assert_eq!(b.vmas(), [(9_990, 10_000, RW)]);
    assert_eq!(b.cpu.load_u64(page(AT, 9_900))?, 0, "a read grows it too");
    assert!(b.cpu.store_u64(page(AT, 9_899), 3).is_err());
    assert_eq!(b.vmas(), [(9_900, 10_000, RW)]);
    assert_eq!((b.cpu.load_u64(page(AT, 9_999))?, b.cpu.load_u64(page(AT, 9_990))?), (1, 2));
    check(&b.s);
    b.end()
}

#[test]
fn a_stack_keeps_its_guard_gap() -> Result {
    const GAP: u64 = 256;
    let mut b = with_stack(policy())?;
    b.numbered(9_000, 10)?;
    // Down to the gap above its neighbour, and no further.
    assert!(b.cpu.store_u64(page(AT, 9_010 + GAP - 1), 1).is_err());
    b.cpu.store_u64(page(AT, 9_010 + GAP), 1)?;
    assert_eq!(b.vmas(), [(9_000, 9_010, RW), (9_010 + GAP, 10_000, RW)]);
    // Nothing is placed in the gap.
    let into = |first| Map { place: Place::FixedNoReplace(page(AT, first)), ..anonymous(1, RW) };
    assert_eq!(b.s.map(into(9_010)).map(drop), Err(MapError::Taken(range(9_010, 9_011))));
    let hint = Map { place: Place::Hint(page(AT, 9_100)), ..anonymous(1, RW) };
    assert!(!range(9_010, 10_000).overlaps(b.s.map(hint)?.range));
    // A stack stays a mapping of its own beside its like.
    b.s.map(at(page(AT, 10_000), Map { flags: VmaFlags::GROWS_DOWN, ..anonymous(2, RW) }))?;
    assert_eq!(b.vmas()[1..3], [(9_010 + GAP, 10_000, RW), (10_000, 10_002, RW)]);
    b.end()
}

/// The limit is that of the stack, whatever parts it was cut into.
#[test]
fn a_stack_in_parts_has_one_limit() -> Result {
    let mut b = with_stack(Policy { max_stack: 100 * PAGE_SIZE, ..policy() })?;
    b.cpu.store_u64(page(AT, 9_940), 1)?;
    b.s.protect(page(AT, 9_940), PAGE_SIZE, R)?;
    b.s.protect(page(AT, 9_940), PAGE_SIZE, RW)?;
    assert_eq!(b.vmas(), [(9_940, 9_941, RW), (9_941, 10_000, RW)]);
    assert!(b.cpu.store_u64(page(AT, 9_899), 3).is_err());
    b.cpu.store_u64(page(AT, 9_900), 2)?;
    assert_eq!(b.vmas(), [(9_900, 9_941, RW), (9_941, 10_000, RW)]);
    b.end()
}

/// What nobody can access is a guard itself: a program's own, at the end of the room for its stack. And a hole in a stack may
/// fill again.
#[test]
fn a_stack_grows_down_to_a_guard_of_its_own() -> Result {
    let mut b = with_stack(policy())?;
    b.s.map(at(page(AT, 9_800), anonymous(1, NONE)))?;
    b.cpu.store_u64(page(AT, 9_801), 1)?;
    assert_eq!(b.vmas(), [(9_800, 9_801, NONE), (9_801, 10_000, RW)]);
    assert!(b.cpu.store_u64(page(AT, 9_800), 1).is_err());
    b.s.unmap(page(AT, 9_900), 10 * PAGE_SIZE)?;
    b.cpu.store_u64(page(AT, 9_905), 2)?;
    assert_eq!(b.vmas()[1..], [(9_801, 9_900, RW), (9_905, 10_000, RW)]);
    assert_eq!((b.cpu.load_u64(page(AT, 9_801))?, b.cpu.load_u64(page(AT, 9_905))?), (1, 2));
    b.end()
}

/// A stack that was moved up grows as far as its pages have numbers, counted from where they were filled; who looks for a page
/// by its number finds it.
#[test]
fn a_stack_that_was_moved_grows_as_far_as_its_pages_have_numbers() -> Result {
    let machine = machine();
    let mut b = Bench::on(machine, space(machine)?);
    let (from, to) = (VirtAddr(1 << 20), VirtAddr(1 << 40));
    b.s.map(at(from, Map { flags: VmaFlags::GROWS_DOWN, ..anonymous(16, RW) }))?;
    let len = 16 * PAGE_SIZE;
    assert_eq!(b.s.remap(from, len, len, pagefirst::space::RemapTo::Fixed(to))?, to);
    assert!(b.cpu.store_u64(VirtAddr(to.0 - (2 << 20)), 1).is_err());
    let lowest = VirtAddr(to.0 - (1 << 20));
    b.cpu.store_u64(lowest, 1)?;
    let bad = frame(&b.s, lowest).ok_or("a page")?;
    assert_eq!(machine.vm().poison(machine, bad), pagefirst::Poisoned::Private { huge: false });
    assert!(b.cpu.load_u64(lowest).is_err());
    Ok(())
}

#[test]
fn what_lies_far_below_a_stack_or_without_one_is_not_mapped() -> Result {
    let mut b = with_stack(policy())?;
    assert!(b.cpu.store_u64(page(AT, 5_000), 1).is_err(), "beyond the limit");
    b.numbered(20_000, 1)?;
    assert!(b.cpu.store_u64(page(AT, 19_999), 1).is_err(), "no stack");
    assert_eq!(b.vmas(), [(9_998, 10_000, RW), (20_000, 20_001, RW)]);
    b.end()
}

#[test]
fn the_limit_on_mappings_refuses_what_would_exceed_it() -> Result {
    let machine = machine();
    let mut b = Bench::on(machine, space_with(machine, Policy { max_vmas: 3, ..policy() })?);
    b.numbered(0, 8)?;
    b.numbered(10, 2)?;
    b.numbered(20, 2)?;
    let before = b.vmas();
    let too_many = Err(MapError::TooMany(3));
    assert_eq!(b.s.map(at(page(AT, 30), anonymous(1, RW))).map(drop), too_many);
    assert_eq!(b.s.unmap(page(AT, 3), PAGE_SIZE), too_many, "a split is one more");
    assert_eq!(b.s.protect(page(AT, 3), PAGE_SIZE, R), too_many);
    let to = pagefirst::space::RemapTo::Fixed(page(AT, 40));
    assert_eq!(b.s.remap(page(AT, 3), PAGE_SIZE, PAGE_SIZE, to).map(drop), too_many);
    assert_eq!(too_many.map_err(|e: MapError| e.errno()), Err::<(), _>(12));
    assert_eq!((b.vmas(), b.words(2, 4)), (before, vec![Some(3), Some(4)]));
    // What does not add one goes on.
    b.s.map(at(page(AT, 8), anonymous(2, RW)))?;
    b.s.map(at(page(AT, 30), anonymous(1, RW)))?;
    b.s.unmap(AT, PAGE_SIZE)?;
    assert_eq!(b.vmas(), [(1, 12, RW), (20, 22, RW), (30, 31, RW)]);
    b.tables(3);
    b.end()
}

#[test]
fn the_limit_on_bytes_refuses_what_would_exceed_it() -> Result {
    let machine = machine();
    let mut b = Bench::on(machine, space_with(machine, Policy { max_bytes: 10 * PAGE_SIZE, ..policy() })?);
    b.numbered(0, 8)?;
    b.s.set_heap(page(AT, 100))?;
    let too_large = MapError::TooLarge(10 * PAGE_SIZE);
    assert_eq!(b.s.map(anonymous(3, RW)).map(drop), Err(too_large));
    assert_eq!(b.s.brk(page(AT, 103)), Err(too_large));
    let grow = |pages| b.s.remap(AT, 8 * PAGE_SIZE, pages * PAGE_SIZE, pagefirst::space::RemapTo::InPlace);
    assert_eq!(grow(11), Err(too_large));
    assert_eq!((too_large.errno(), b.vmas(), b.s.heap_end()), (12, vec![(0, 8, RW)], page(AT, 100)));
    // What is replaced does not count twice; a move takes nothing.
    b.s.map(at(AT, anonymous(10, RW)))?;
    let to = pagefirst::space::RemapTo::Fixed(page(AT, 40));
    b.s.remap(AT, 10 * PAGE_SIZE, 10 * PAGE_SIZE, to)?;
    b.s.unmap(page(AT, 41), PAGE_SIZE)?;
    b.s.map(at(AT, anonymous(1, RW)))?;
    assert_eq!(b.vmas(), [(0, 1, RW), (40, 41, RW), (42, 50, RW)]);
    b.end()
}

#[test]
fn writable_and_executable_at_once_is_refused_where_that_is_the_policy() -> Result {
    let machine = machine();
    let b = Bench::on(machine, space_with(machine, Policy { deny_wx: true, ..policy() })?);
    let (wx, rx) = (RW | Prot::EXEC, R | Prot::EXEC);
    assert_eq!(b.s.map(at(AT, anonymous(2, wx))).map(drop), Err(MapError::Denied(range(0, 2))));
    b.s.map(at(AT, anonymous(2, rx)))?;
    assert_eq!(b.s.protect(AT, PAGE_SIZE, wx), Err(MapError::Denied(range(0, 1))));
    b.s.protect(AT, PAGE_SIZE, RW)?;
    assert_eq!((b.vmas(), MapError::Denied(range(0, 1)).errno()), (vec![(0, 1, RW), (1, 2, rx)], 13));
    b.end()
}

#[test]
fn addresses_outside_the_user_range_are_refused() -> Result {
    let machine = machine();
    let b = Bench::on(machine, space_with(machine, Policy { min_addr: VirtAddr(16 << 12), ..policy() })?);
    let end = b.s.usable().end;
    for start in [VirtAddr(0), VirtAddr(15 << 12), end, VirtAddr(end.0 - PAGE_SIZE), VirtAddr(1 << 63)] {
        let range = VirtRange::new(start, VirtAddr(start.0 + 2 * PAGE_SIZE));
        let refused = Err(MapError::OutOfRange(range));
        assert_eq!(b.s.map(at(start, anonymous(2, RW))).map(drop), refused);
        assert_eq!(
            b.s.map(Map { place: Place::FixedNoReplace(start), ..anonymous(2, RW) }).map(drop),
            refused
        );
        assert_eq!(b.s.unmap(start, 2 * PAGE_SIZE), refused);
        assert_eq!(b.s.protect(start, 2 * PAGE_SIZE, R), refused);
        assert_eq!(b.s.discard(start, 2 * PAGE_SIZE), refused);
    }
    // The first and the last page can be mapped.
    b.s.map(at(VirtAddr(16 << 12), anonymous(1, RW)))?;
    b.s.map(at(VirtAddr(end.0 - PAGE_SIZE), anonymous(1, RW)))?;
    assert_eq!(b.s.vma_count(), 2);
    b.end()
}

#[test]
fn ranges_that_make_no_sense_are_invalid() -> Result {
    let b = Bench::new()?;
    let whole = b.s.usable();
    for (start, len) in [(AT, 0), (VirtAddr(AT.0 + 1), PAGE_SIZE), (VirtAddr(u64::MAX - 4095), 2 * PAGE_SIZE)]
    {
        let end = VirtAddr(start.0.saturating_add(len));
        let invalid = Err(MapError::Invalid(VirtRange::new(start, end)));
        assert_eq!(b.s.map(at(start, Map::anonymous(len, RW))).map(drop), invalid);
        assert_eq!(b.s.unmap(start, len), invalid);
        assert_eq!(b.s.protect(start, len, R), invalid);
        assert_eq!(b.s.discard(start, len), invalid);
        assert_eq!(invalid.map_err(|e: MapError| e.errno()), Err::<(), _>(22));
    }
    assert!(matches!(b.s.map(Map::anonymous(0, RW)), Err(MapError::Invalid(_))));
    assert!(matches!(b.s.map(Map::anonymous(u64::MAX, RW)), Err(MapError::Invalid(_))));
    assert_eq!(b.s.map(Map::anonymous(1 << 50, RW)).map(drop), Err(MapError::NoRoom(1 << 50)));
    // A file's pages are numbered in 64 bits; shared anonymous memory needs a file behind it.
    let c = cache(b.machine, &marked(), 1)?;
    assert!(matches!(b.s.map(private(&c, u64::MAX - 1, 4, R)), Err(MapError::Invalid(_))));
    assert!(matches!(b.s.map(private(&c, u64::MAX / PAGE_SIZE, 4, R)), Err(MapError::Invalid(_))));
    let nameless = Map { flags: VmaFlags::SHARED, ..anonymous(1, RW) };
    assert!(matches!(b.s.map(nameless), Err(MapError::Denied(_))));
    assert_eq!((b.s.vma_count(), b.s.usable()), (0, whole));
    // What spans everything can be unmapped and looked at.
    b.s.unmap(whole.start, whole.len())?;
    drop(c);
    b.end()
}
