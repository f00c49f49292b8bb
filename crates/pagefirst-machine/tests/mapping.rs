//! Mapping calls as a user of Linux expects them: what is mapped, what it shows, what it costs, and that a call that
//! fails changes nothing.

mod kit;
#[path = "mapping/limits.rs"]
mod limits;
#[path = "mapping/remap.rs"]
mod remap;

use kit::*;
use pagefirst::space::{Map, MapError, Place};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr, VirtRange};
use pagefirst_machine::{Machine, Vcpu};

/// Pages of the tests are counted from here, the start of a leaf table.
const AT: VirtAddr = VirtAddr(1 << 30);
const A: u64 = AT.0 / PAGE_SIZE;

/// A machine, a space, and a CPU that runs it.
struct Bench {
    machine: &'static Machine,
    s: Space,
    cpu: Vcpu,
}

impl Bench {
    fn new() -> Result<Bench> {
        let machine = machine();
        let s = space(machine)?;
        Ok(Bench::on(machine, s))
    }
    fn on(machine: &'static Machine, s: Space) -> Bench {
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        Bench { machine, s, cpu }
    }
    /// Anonymous memory of `pages` pages from page `first` on, each page written with its number.
    fn numbered(&mut self, first: u64, pages: u64) -> Result {
        self.s.map(at(page(AT, first), anonymous(pages, RW)))?;
        for i in first..first + pages {
            self.cpu.store_u64(page(AT, i), i + 1)?;
        }
        Ok(())
    }
    /// The words that pages `first` to `end` begin with; `None` where nothing can be read.
    fn words(&mut self, first: u64, end: u64) -> Vec<Option<u64>> {
        (first..end).map(|i| self.cpu.load_u64(page(AT, i)).ok()).collect()
    }
    /// The VMAs, in pages from [`AT`] on.
    fn vmas(&self) -> Vec<(u64, u64, Prot)> {
        vmas(&self.s).into_iter().map(|(start, end, prot)| (start - A, end - A, prot)).collect()
    }
    /// Checks the tables, and that there are so many below the root.
    fn tables(&self, below: u64) {
        check(&self.s);
        assert_eq!(tables(&self.s), 1 + below);
    }
    fn end(self) -> Result {
        let Bench { machine, s, cpu } = self;
        drop(cpu);
        drop(s);
        Ok(machine.nothing_left()?)
    }
}

fn range(first: u64, end: u64) -> VirtRange {
    VirtRange::new(page(AT, first), page(AT, end))
}

#[test]
fn map_anywhere_goes_from_the_top_down_and_reads_zero() -> Result {
    let mut b = Bench::new()?;
    let first = b.s.map(anonymous(3, RW))?.range;
    let second = b.s.map(anonymous(2, R))?.range;
    assert_eq!((first.pages(), second.pages(), second.end), (3, 2, first.start));
    assert_eq!(first.end, b.s.usable().end);
    assert_eq!((b.cpu.load_u64(first.start)?, b.cpu.load_u64(second.start)?), (0, 0));
    // Lengths are rounded up to whole pages.
    let odd = b.s.map(Map::anonymous(PAGE_SIZE + 1, RW))?.range;
    assert_eq!((odd.pages(), odd.end), (2, second.start));
    // Anonymous memory of whole huge pages is aligned to them.
    let large = b.s.map(anonymous(1024, RW))?.range;
    assert!(large.start.is_aligned(LEAF) && large.end <= odd.start);
    check(&b.s);
    b.end()
}

#[test]
fn map_with_a_hint_goes_there_if_that_is_free() -> Result {
    let mut b = Bench::new()?;
    let hinted = |first| Map { place: Place::Hint(page(AT, first)), ..anonymous(4, RW) };
    assert_eq!(b.s.map(hinted(2))?.range, range(2, 6));
    b.cpu.store_u64(page(AT, 5), 9)?;
    let elsewhere = b.s.map(hinted(5))?.range;
    assert!(!elsewhere.overlaps(range(0, 9)));
    assert_eq!(b.cpu.load_u64(page(AT, 5))?, 9);
    // A hint that makes no sense is none.
    let outside = Map { place: Place::Hint(VirtAddr(u64::MAX - 5)), ..anonymous(4, RW) };
    assert!(b.s.usable().covers(b.s.map(outside)?.range));
    b.end()
}

#[test]
fn map_fixed_takes_the_place_of_what_was_there() -> Result {
    let mut b = Bench::new()?;
    let c = cache(b.machine, &marked(), 16)?;
    b.numbered(0, 8)?;
    b.s.map(at(page(AT, 2), private(&c, 7, 3, R)))?;
    assert_eq!(b.vmas(), [(0, 2, RW), (2, 5, R), (5, 8, RW)]);
    assert_eq!(mapped(&b.s, AT, 8), [0, 1, 5, 6, 7], "what was there is gone");
    let shown = u64::from_le_bytes([mark(8); 8]);
    assert_eq!(b.words(0, 4)[..2], [Some(1), Some(2)]);
    assert_eq!((b.cpu.load_u64(page(AT, 3))?, b.cpu.load_u64(page(AT, 5))?), (shown, 6));
    b.tables(3);
    // Over several mappings and the gaps between them, and over itself.
    for _ in 0..2 {
        b.s.map(at(page(AT, 1), anonymous(20, RW)))?;
        assert_eq!(b.vmas(), [(0, 21, RW)]);
        assert_eq!(b.words(0, 3), [Some(1), Some(0), Some(0)]);
    }
    drop(c);
    b.end()
}

#[test]
fn map_fixed_without_replacing_refuses_what_is_taken() -> Result {
    let mut b = Bench::new()?;
    b.numbered(4, 4)?;
    let map = |first, pages| Map { place: Place::FixedNoReplace(page(AT, first)), ..anonymous(pages, RW) };
    for (first, pages) in [(0, 5), (7, 1), (5, 1), (0, 20)] {
        let error = b.s.map(map(first, pages)).map(|m| m.range);
        assert_eq!(error, Err(MapError::Taken(range(first, first + pages))));
        assert_eq!(error.map_err(|e| e.errno()), Err(17), "EEXIST");
    }
    assert_eq!(b.vmas(), [(4, 8, RW)]);
    b.s.map(map(0, 4))?;
    b.s.map(map(8, 4))?;
    assert_eq!((b.vmas(), b.words(3, 5)), (vec![(0, 12, RW)], vec![Some(0), Some(5)]));
    b.end()
}

#[test]
fn map_populated_is_there_without_a_fault() -> Result {
    let mut b = Bench::new()?;
    let c = cache(b.machine, &marked(), 3)?;
    for (first, map, pages) in [
        (0, anonymous(4, RW), 4),
        (4, anonymous(4, R), 4),
        (8, private(&c, 0, 3, RW), 3),
        (16, shared(&c, 0, 3, RW), 3),
    ] {
        let made = b.s.map(Map { populate: true, ..at(page(AT, first), map) })?;
        assert!(made.unpopulated.is_none());
        assert_eq!(mapped(&b.s, page(AT, first), pages).len() as u64, pages);
    }
    // Half of a page is one too.
    b.s.map(at(page(AT, 40), anonymous(2, RW)))?;
    let halves = VirtRange::new(VirtAddr(page(AT, 40).0 + 2048), VirtAddr(page(AT, 41).0 + 2048));
    assert!(b.s.populate(halves, RW).is_none());
    assert_eq!(mapped(&b.s, page(AT, 40), 2).len(), 2);
    let faults = b.cpu.counts().faults;
    for i in (0..11).chain(16..19).chain(40..42) {
        // What is shared was not written to.
        let reads = (4..8).contains(&i) || (16..19).contains(&i);
        b.cpu.touch(page(AT, i), if reads { Access::Read } else { Access::Write })?;
    }
    assert_eq!(b.cpu.counts().faults, faults);
    // It stops where the file does and says so; the mapping is there. Nothing can be filled without rights.
    let made = b.s.map(Map { populate: true, ..at(page(AT, 24), private(&c, 1, 4, R)) })?;
    assert_eq!(made.unpopulated.map(|u| u.at), Some(page(AT, 26)));
    let made = b.s.map(Map { populate: true, ..at(page(AT, 32), anonymous(2, NONE)) })?;
    assert!(made.unpopulated.is_none() && mapped(&b.s, page(AT, 32), 2).is_empty());
    drop(c);
    b.end()
}

#[test]
fn private_and_shared_mappings_of_a_file_differ_in_where_writes_go() -> Result {
    let mut b = Bench::new()?;
    let c = cache(b.machine, &marked(), 4)?;
    b.s.map(at(AT, private(&c, 0, 4, RW)))?;
    b.s.map(at(page(AT, 4), shared(&c, 0, 4, RW)))?;
    b.s.map(at(page(AT, 8), shared(&c, 2, 2, R)))?;
    b.cpu.store_u8(page(AT, 2), 200)?;
    b.cpu.store_u8(page(AT, 7), 201)?;
    let shows: Vec<u8> = [2, 3, 6, 7, 8, 9]
        .into_iter()
        .map(|i| b.cpu.load_u8(page(AT, i)))
        .collect::<std::result::Result<_, _>>()?;
    assert_eq!(shows, [200, 201, mark(2), 201, mark(2), 201]);
    let mut byte = [0];
    c.read_at(b.machine, 3 * PAGE_SIZE, &mut byte).map_err(|e| e.to_string())?;
    assert_eq!(byte, [201], "a shared write is a write to the file");
    assert_eq!(b.s.vma_count(), 3, "three different mappings, side by side");
    drop(c);
    b.end()
}

#[test]
fn unmap_splits_cuts_and_spans() -> Result {
    let mut b = Bench::new()?;
    b.numbered(0, 16)?;
    b.s.unmap(page(AT, 6), 2 * PAGE_SIZE)?;
    assert_eq!(b.vmas(), [(0, 6, RW), (8, 16, RW)]);
    b.s.unmap(AT, PAGE_SIZE)?;
    b.s.unmap(page(AT, 15), PAGE_SIZE)?;
    assert_eq!(b.vmas(), [(1, 6, RW), (8, 15, RW)]);
    assert_eq!(b.words(5, 9), [Some(6), None, None, Some(9)]);
    // Across both and the hole, a part of a page counting as the page; what was not mapped is no error.
    b.s.unmap(page(AT, 4), 4 * PAGE_SIZE + 1)?;
    assert_eq!(b.vmas(), [(1, 4, RW), (9, 15, RW)]);
    b.s.unmap(page(AT, 4), 5 * PAGE_SIZE)?;
    b.s.unmap(page(AT, 100), PAGE_SIZE)?;
    assert_eq!(b.words(3, 10), [Some(4), None, None, None, None, None, Some(10)]);
    b.tables(3);
    assert_eq!(b.s.account().anon_bytes, 9 * PAGE_SIZE);
    b.s.unmap(AT, 1 << 30)?;
    assert_eq!((b.vmas(), b.words(0, 1)), (vec![], vec![None]));
    b.tables(0);
    b.end()
}

#[test]
fn unmap_leaves_tables_only_for_what_is_left() -> Result {
    let mut b = Bench::new()?;
    b.s.map(at(AT, anonymous(8 * 512, RW)))?;
    for i in [0, 511, 512, 1500, 4095] {
        b.cpu.store_u64(page(AT, i), i)?;
    }
    b.tables(2 + 4);
    b.s.unmap(page(AT, 512), 512 * PAGE_SIZE)?;
    b.tables(2 + 3);
    b.s.unmap(page(AT, 300), 212 * PAGE_SIZE)?;
    b.tables(2 + 3);
    b.s.unmap(page(AT, 1024), 3072 * PAGE_SIZE)?;
    b.tables(2 + 1);
    assert_eq!((b.vmas(), b.words(0, 1)), (vec![(0, 300, RW)], vec![Some(0)]));
    b.end()
}

#[test]
fn protect_splits_and_merges_back() -> Result {
    let mut b = Bench::new()?;
    b.numbered(0, 8)?;
    b.s.protect(page(AT, 2), 3 * PAGE_SIZE, R)?;
    assert_eq!(b.vmas(), [(0, 2, RW), (2, 5, R), (5, 8, RW)]);
    assert!(b.cpu.store_u64(page(AT, 3), 0).is_err());
    assert_eq!(b.words(0, 8), (1..9).map(Some).collect::<Vec<_>>());
    // The same again changes nothing and costs no flush.
    let before = b.machine.counts();
    b.s.protect(page(AT, 2), 3 * PAGE_SIZE, R)?;
    assert_eq!((b.machine.counts() - before).shootdowns, 0);
    b.s.protect(page(AT, 2), 3 * PAGE_SIZE, RW)?;
    assert_eq!(b.vmas(), [(0, 8, RW)]);
    let faults = b.cpu.counts().faults;
    b.cpu.store_u64(page(AT, 3), 77)?;
    assert_eq!(
        (b.cpu.counts().faults, b.words(3, 4)),
        (faults, vec![Some(77)]),
        "its own page, writable at once"
    );
    b.tables(3);
    b.end()
}

#[test]
fn protect_to_none_and_back_keeps_what_is_there() -> Result {
    let mut b = Bench::new()?;
    let c = cache(b.machine, &marked(), 4)?;
    b.numbered(0, 4)?;
    b.cpu.load_u64(page(AT, 3))?;
    b.s.map(at(page(AT, 8), private(&c, 0, 4, RW)))?;
    b.cpu.store_u8(page(AT, 9), 99)?;
    b.cpu.load_u8(page(AT, 10))?;
    for range in [range(0, 4), range(8, 12)] {
        b.s.protect(range.start, range.len(), NONE)?;
    }
    assert!((0..4).chain(8..12).all(|i| b.cpu.load_u8(page(AT, i)).is_err()));
    assert!(b.cpu.fetch(AT).is_err());
    b.tables(3);
    b.s.protect(AT, 4 * PAGE_SIZE, R)?;
    b.s.protect(page(AT, 8), 4 * PAGE_SIZE, RW)?;
    assert_eq!(b.words(0, 4), [Some(1), Some(2), Some(3), Some(4)]);
    let bytes: Vec<_> = (8..12).map(|i| b.cpu.load_u8(page(AT, i)).ok()).collect();
    assert_eq!(bytes, [Some(mark(0)), Some(99), Some(mark(2)), Some(mark(3))]);
    b.cpu.store_u8(page(AT, 10), 55)?;
    let mut byte = [0];
    c.read_at(b.machine, 2 * PAGE_SIZE, &mut byte).map_err(|e| e.to_string())?;
    assert_eq!(byte, [mark(2)], "still a private mapping");
    drop(c);
    b.end()
}

#[test]
fn protect_over_a_hole_fails_and_changes_nothing() -> Result {
    let mut b = Bench::new()?;
    b.numbered(0, 4)?;
    b.numbered(6, 2)?;
    for (first, end, hole) in [(0, 8, (4, 6)), (3, 5, (4, 5)), (7, 12, (8, 12)), (20, 21, (20, 21))] {
        let error = b.s.protect(page(AT, first), (end - first) * PAGE_SIZE, R);
        assert_eq!(error, Err(MapError::NotMapped(range(hole.0, hole.1))));
        assert_eq!(error.map_err(|e| e.errno()), Err(12), "ENOMEM, as mprotect(2)");
    }
    assert_eq!(b.vmas(), [(0, 4, RW), (6, 8, RW)]);
    b.cpu.store_u64(page(AT, 3), 5)?;
    b.end()
}

#[test]
fn discard_reads_zero_again_and_shows_the_file_again() -> Result {
    let mut b = Bench::new()?;
    let c = cache(b.machine, &marked(), 4)?;
    b.numbered(0, 4)?;
    b.s.map(at(page(AT, 4), private(&c, 0, 4, RW)))?;
    b.s.map(at(page(AT, 8), shared(&c, 0, 4, RW)))?;
    for i in 4..8 {
        b.cpu.store_u8(page(AT, i), 99)?;
    }
    b.cpu.store_u8(page(AT, 9), 88)?;
    b.s.discard(page(AT, 1), 10 * PAGE_SIZE)?;
    assert_eq!(mapped(&b.s, AT, 12), [0]);
    b.tables(3);
    assert_eq!(b.words(0, 4), [Some(1), Some(0), Some(0), Some(0)]);
    let bytes: Vec<_> = (4..12).map(|i| b.cpu.load_u8(page(AT, i)).ok().unwrap_or(0)).collect();
    assert_eq!(bytes, [mark(0), 88, mark(2), mark(3), mark(0), 88, mark(2), mark(3)]);
    let error = b.s.discard(page(AT, 10), 4 * PAGE_SIZE);
    assert_eq!(error, Err(MapError::NotMapped(range(12, 14))));
    b.s.discard(AT, 12 * PAGE_SIZE)?;
    b.tables(0);
    drop(c);
    b.end()
}

#[test]
fn neighbours_that_continue_each_other_are_one_mapping() -> Result {
    let b = Bench::new()?;
    let (c, d) = (cache(b.machine, &marked(), 64)?, cache(b.machine, &marked(), 64)?);
    let counted = |first, map| -> Result<usize> {
        b.s.map(at(page(AT, first), map))?;
        Ok(b.s.vma_count())
    };
    assert_eq!(counted(10, anonymous(2, RW))?, 1);
    assert_eq!(counted(12, anonymous(2, RW))?, 1, "after it");
    assert_eq!(counted(8, anonymous(2, RW))?, 1, "before it");
    assert_eq!(counted(4, anonymous(2, RW))?, 2, "apart");
    assert_eq!(counted(6, anonymous(2, RW))?, 1, "the gap filled");
    assert_eq!(counted(14, anonymous(2, R))?, 2, "other rights");
    assert_eq!(counted(20, private(&c, 5, 2, R))?, 3);
    assert_eq!(counted(22, private(&c, 7, 2, R))?, 3, "the file goes on");
    assert_eq!(counted(24, private(&c, 9, 2, R))?, 3);
    assert_eq!(counted(26, private(&c, 20, 2, R))?, 4, "elsewhere in the file");
    assert_eq!(counted(28, shared(&c, 22, 2, R))?, 5, "shared");
    assert_eq!(counted(30, shared(&d, 24, 2, R))?, 6, "another file");
    assert_eq!(b.vmas()[..3], [(4, 14, RW), (14, 16, R), (20, 26, R)]);
    drop((c, d));
    b.end()
}
