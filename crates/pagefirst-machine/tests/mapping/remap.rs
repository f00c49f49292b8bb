//! Remap: shrink, grow, move.

use super::*;
use pagefirst::space::RemapTo::{Anywhere, Fixed, InPlace};

/// A page far from [`AT`], in other tables at every level below the root.
const FAR: u64 = (1 << 40) / PAGE_SIZE;

#[test]
fn remap_shrinks_and_grows_in_place() -> Result {
    let mut b = Bench::new()?;
    b.numbered(0, 8)?;
    let len = |pages: u64| pages * PAGE_SIZE;
    assert_eq!(b.s.remap(AT, len(8), len(3), InPlace)?, AT);
    assert_eq!((b.vmas(), b.words(2, 4)), (vec![(0, 3, RW)], vec![Some(3), None]));
    assert_eq!(b.s.remap(AT, len(3), len(6), InPlace)?, AT);
    assert_eq!((b.vmas(), b.words(2, 6)), (vec![(0, 6, RW)], vec![Some(3), Some(0), Some(0), Some(0)]));
    assert_eq!(b.s.remap(AT, len(6), len(6), InPlace)?, AT);
    // Not into what is mapped; nor in place if the end of the mapping is not the end of the range.
    b.numbered(8, 1)?;
    let before = b.vmas();
    assert_eq!(b.s.remap(AT, len(6), len(9), InPlace), Err(MapError::NoRoom(3 * PAGE_SIZE)));
    assert!(b.s.remap(AT, len(3), len(4), InPlace).is_err());
    assert_eq!(b.vmas(), before);
    assert_eq!(b.s.remap(AT, len(6), len(8), InPlace)?, AT);
    assert_eq!(b.vmas(), [(0, 9, RW)], "up to its neighbour, which it now continues");
    assert_eq!(b.words(8, 9), [Some(9)]);
    b.tables(3);
    b.end()
}

#[test]
fn remap_moves_contents_tables_and_all() -> Result {
    let mut b = Bench::new()?;
    b.numbered(0, 4)?;
    b.numbered(600, 2)?;
    b.s.map(at(page(AT, 4), anonymous(596, RW)))?;
    b.cpu.load_u64(page(AT, 300))?;
    assert_eq!(b.vmas(), [(0, 602, RW)]);
    let frames: Vec<_> = [0, 3, 601].into_iter().map(|i| frame(&b.s, page(AT, i))).collect();
    // Not aligned to tables as the source is: two source tables may need three.
    let to = FAR + 511;
    assert_eq!(b.s.remap(AT, 602 * PAGE_SIZE, 602 * PAGE_SIZE, Fixed(page(AT, to)))?, page(AT, to));
    assert_eq!(b.vmas(), [(to, to + 602, RW)]);
    assert_eq!(mapped(&b.s, page(AT, to), 602), [0, 1, 2, 3, 300, 600, 601]);
    assert_eq!(frames, [0, 3, 601].into_iter().map(|i| frame(&b.s, page(AT, to + i))).collect::<Vec<_>>());
    assert_eq!(b.words(0, 4), [None; 4]);
    assert_eq!(b.words(to, to + 5), [Some(1), Some(2), Some(3), Some(4), Some(0)]);
    assert_eq!(b.words(to + 600, to + 602), [Some(601), Some(602)]);
    b.tables(2 + 3);
    b.end()
}

#[test]
fn remap_anywhere_moves_only_if_it_must() -> Result {
    let mut b = Bench::new()?;
    b.numbered(0, 4)?;
    assert_eq!(b.s.remap(AT, 4 * PAGE_SIZE, 6 * PAGE_SIZE, Anywhere)?, AT);
    b.numbered(6, 2)?;
    b.s.protect(page(AT, 6), 2 * PAGE_SIZE, R)?;
    let moved = b.s.remap(AT, 6 * PAGE_SIZE, 10 * PAGE_SIZE, Anywhere)?;
    assert!(!VirtRange::sized(moved, 10 * PAGE_SIZE).ok_or("a range")?.overlaps(range(0, 8)));
    assert_eq!(b.vmas()[0], (6, 8, R));
    let words: Vec<_> = (0..10).map(|i| b.cpu.load_u64(page(moved, i)).ok()).collect();
    assert_eq!(
        words,
        [Some(1), Some(2), Some(3), Some(4)].into_iter().chain([Some(0); 6]).collect::<Vec<_>>()
    );
    assert_eq!(b.words(0, 7), [None, None, None, None, None, None, Some(7)]);
    check(&b.s);
    b.end()
}

#[test]
fn remap_takes_the_middle_of_one_over_parts_of_others() -> Result {
    let mut b = Bench::new()?;
    b.numbered(0, 8)?;
    b.numbered(16, 4)?;
    b.numbered(22, 4)?;
    // Longer than what it was: the rest is new. Over the end of one, a hole, and the start of another.
    let old = page(AT, 3);
    b.s.remap(old, 2 * PAGE_SIZE, 6 * PAGE_SIZE, Fixed(page(AT, 18)))?;
    assert_eq!(b.vmas(), [(0, 3, RW), (5, 8, RW), (16, 18, RW), (18, 24, RW), (24, 26, RW)]);
    assert_eq!(b.words(2, 6), [Some(3), None, None, Some(6)]);
    let shown = [17, 18, 4, 5, 0, 0, 0, 0, 25, 26].map(Some);
    assert_eq!(b.words(16, 26), shown);
    // Shorter: the tail is unmapped and not moved.
    b.s.remap(page(AT, 18), 6 * PAGE_SIZE, PAGE_SIZE, Fixed(page(AT, 7)))?;
    assert_eq!(b.vmas(), [(0, 3, RW), (5, 7, RW), (7, 8, RW), (16, 18, RW), (24, 26, RW)]);
    assert_eq!(b.words(6, 8), [Some(7), Some(4)]);
    b.tables(3);
    b.end()
}

#[test]
fn remap_within_one_mapping() -> Result {
    let mut b = Bench::new()?;
    b.numbered(0, 8)?;
    b.s.remap(page(AT, 1), 2 * PAGE_SIZE, 2 * PAGE_SIZE, Fixed(page(AT, 5)))?;
    assert_eq!(b.vmas(), [(0, 1, RW), (3, 5, RW), (5, 7, RW), (7, 8, RW)]);
    assert_eq!(b.words(0, 8), [Some(1), None, None, Some(4), Some(5), Some(2), Some(3), Some(8)]);
    b.s.remap(page(AT, 5), 2 * PAGE_SIZE, 2 * PAGE_SIZE, Fixed(page(AT, 1)))?;
    assert_eq!(b.vmas(), [(0, 5, RW), (7, 8, RW)], "back where it was, it closes the hole");
    assert_eq!(b.words(0, 8), [Some(1), Some(2), Some(3), Some(4), Some(5), None, None, Some(8)]);
    b.tables(3);
    b.end()
}

#[test]
fn remap_keeps_a_files_offsets_and_private_copies() -> Result {
    let mut b = Bench::new()?;
    let c = cache(b.machine, &marked(), 64)?;
    for (first, map) in [(0, private(&c, 10, 8, RW)), (32, shared(&c, 10, 8, RW))] {
        b.s.map(at(page(AT, first), map))?;
        b.cpu.store_u8(page(AT, first + 4), 200)?;
        b.cpu.load_u8(page(AT, first + 5))?;
        // The middle goes away and grows.
        b.s.remap(page(AT, first + 3), 4 * PAGE_SIZE, 6 * PAGE_SIZE, Fixed(page(AT, FAR + first)))?;
        let shows: Vec<_> = (0..6).map(|i| b.cpu.load_u8(page(AT, FAR + first + i)).ok()).collect();
        let expected = [mark(13), 200, mark(15), mark(16), mark(17), mark(18)].map(Some);
        assert_eq!(shows, expected);
        let left: Vec<_> = (0..8).map(|i| b.cpu.load_u8(page(AT, first + i)).ok()).collect();
        assert_eq!(left[..3], [10, 11, 12].map(|i| Some(mark(i))));
        assert_eq!(left[3..], [None, None, None, None, Some(mark(17))]);
        // In place, over the same file.
        b.s.remap(page(AT, first + 7), PAGE_SIZE, 2 * PAGE_SIZE, InPlace)?;
        assert_eq!(b.cpu.load_u8(page(AT, first + 8))?, mark(18));
        let before = b.s.account().file_bytes;
        check(&b.s);
        assert!(before > 0);
        // What the shared one wrote is the file's; otherwise the next round would not see what it expects.
        c.write_at(b.machine, 14 * PAGE_SIZE, &[mark(14)]).map_err(|e| e.to_string())?;
    }
    drop(c);
    b.end()
}

#[test]
fn remap_moves_what_a_file_that_shrank_has_left() -> Result {
    let mut b = Bench::new()?;
    let c = cache(b.machine, &marked(), 512)?;
    for left in [512, 300, 5, 0] {
        c.set_size(b.machine, 512 * PAGE_SIZE);
        b.s.map(at(AT, shared(&c, 0, 512, RW)))?;
        for i in 0..512 {
            b.cpu.load_u8(page(AT, i))?;
        }
        c.set_size(b.machine, left * PAGE_SIZE);
        assert_eq!(mapped(&b.s, AT, 512), (0..left).collect::<Vec<_>>());
        b.s.remap(AT, 512 * PAGE_SIZE, 512 * PAGE_SIZE, Fixed(page(AT, FAR)))?;
        assert_eq!(mapped(&b.s, page(AT, FAR), 512), (0..left).collect::<Vec<_>>());
        b.tables(if left > 0 { 3 } else { 0 });
        assert_eq!(b.cpu.load_u8(page(AT, FAR + left)).is_err(), left < 512 || b.s.vma_count() == 1);
        b.s.unmap(page(AT, FAR), 512 * PAGE_SIZE)?;
    }
    drop(c);
    b.end()
}

#[test]
fn remap_refuses_and_changes_nothing() -> Result {
    let mut b = Bench::new()?;
    b.numbered(0, 4)?;
    b.s.map(at(page(AT, 4), anonymous(4, R)))?;
    let before = b.vmas();
    let page_len = PAGE_SIZE;
    let invalid = |r: std::result::Result<VirtAddr, MapError>| r.map_err(|e| e.errno());
    // The old range spans two mappings, or a hole, or nothing.
    for (first, pages) in [(2, 4), (6, 4), (20, 1)] {
        let error = b.s.remap(page(AT, first), pages * page_len, pages * page_len, Fixed(page(AT, 100)));
        assert_eq!(error, Err(MapError::NotMapped(range(first, first + pages))));
    }
    // The new one overlaps the old, is empty, not aligned, or outside.
    for to in [0, 2] {
        let to = Fixed(page(AT, to));
        assert_eq!(invalid(b.s.remap(AT, 3 * page_len, 3 * page_len, to)), Err(22), "EINVAL");
    }
    assert_eq!(invalid(b.s.remap(AT, page_len, 0, Anywhere)), Err(22));
    assert_eq!(invalid(b.s.remap(VirtAddr(AT.0 + 1), page_len, page_len, Anywhere)), Err(22));
    assert_eq!(invalid(b.s.remap(AT, page_len, page_len, Fixed(VirtAddr(AT.0 + (1 << 20) + 7)))), Err(22));
    let outside = Fixed(b.s.usable().end);
    assert!(matches!(b.s.remap(AT, page_len, page_len, outside), Err(MapError::OutOfRange(_))));
    assert!(b.s.remap(AT, page_len, u64::MAX, Anywhere).is_err());
    assert!(matches!(b.s.remap(AT, page_len, 1 << 60, Anywhere), Err(MapError::NoRoom(_))));
    assert_eq!((b.vmas(), b.words(0, 4)), (before, [1, 2, 3, 4].map(Some).to_vec()));
    b.tables(3);
    b.end()
}
