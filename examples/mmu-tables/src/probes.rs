//! The tables and the accesses to try on them.
//!
//! Every word of memory that the tables lead to holds its own physical address, and in the middle of each frame is code
//! that tells the frame's: so what an access finds is where it was led.

use crate::guest::{Guest, Why};
use crate::platform;
use pagefirst::arch::Attrs;
use pagefirst::fault::Outcome;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::{AddressSpace, Map, Place};
use pagefirst::sync::epoch::Pin;
use pagefirst::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr, VirtRange};
use std::error::Error;
use std::fmt::Write;
use std::sync::atomic::Ordering::Relaxed;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;
type Space<F> = AddressSpace<platform::Guest<F>>;

/// The image: the list of probes, the library's memory, and frames that the tables lead to.
const LIST: u64 = 64 << 10;
const LIBRARY: u64 = (16 << 20) - LIST;
const TARGETS: u64 = 4 << 20;
/// From here on addresses are mapped: beyond what a stub uses itself while it starts.
const BASE: u64 = 64 << 30;
/// Where in a page is what.
const WORD: u64 = 0x10;
const STORED: u64 = 0x20;
const CODE: u64 = 0x800;

const R: Attrs = Attrs::empty();
const W: Attrs = Attrs::WRITE;
const X: Attrs = Attrs::EXEC;
const NONE: Attrs = Attrs::NONE;

/// What a probe does, as the stubs number it.
#[derive(Clone, Copy)]
enum Kind {
    Load,
    Store,
    Fetch,
    TranslateRead,
    TranslateWrite,
}

struct Probe {
    kind: Kind,
    va: u64,
    value: u64,
    look: u64,
}

struct Probes<F: Guest> {
    guest: &'static platform::Guest<F>,
    list: Vec<Probe>,
    expected: String,
}

/// The image of a format and what is expected of it.
pub fn build<F: Guest>() -> Result<(Vec<u8>, String)> {
    let guest = platform::Guest::<F>::new(F::IMAGE, LIST, LIBRARY, TARGETS);
    let policy = Policy { huge: HugePolicy::Always, min_addr: VirtAddr(PAGE_SIZE), ..Policy::default() };
    let space: &'static Space<F> = Box::leak(Box::new(AddressSpace::new(guest, policy)?));
    let mut probes = Probes { guest, list: Vec::new(), expected: String::new() };
    (0..TARGETS / PAGE_SIZE).for_each(|i| probes.fill(Pfn((target::<F>() / PAGE_SIZE + i) as u32)));
    for level in 0..=F::TOP_LEAF {
        probes.frames(space, level)?;
    }
    probes.across(space)?;
    probes.ends(space)?;
    probes.memory(space)?;
    let Probes { list, expected, .. } = probes;
    let header = [F::root(space.page_table().root_frame()), list.len() as u64, F::MORE];
    let words = list.into_iter().flat_map(|p| [p.kind as u64, p.va, p.value, p.look]);
    for (i, word) in header.into_iter().chain(words).enumerate() {
        let page = guest.words(Pfn((F::IMAGE / PAGE_SIZE) as u32 + (i / platform::WORDS) as u32));
        page[i % platform::WORDS].store(word, Relaxed);
    }
    Ok((guest.bytes(), expected))
}

/// The first address of the targets; a multiple of 2 MiB.
const fn target<F: Guest>() -> u64 {
    F::IMAGE + LIST + LIBRARY
}

impl<F: Guest> Probes<F> {
    /// Makes a frame tell where it is.
    fn fill(&self, pfn: Pfn) {
        let words = self.guest.words(pfn);
        for (i, word) in words.iter().enumerate() {
            word.store(pfn.phys() + 8 * i as u64, Relaxed);
        }
        for (i, pair) in F::code(pfn.phys()).chunks(2).enumerate() {
            let [low, high] = [pair[0], pair.get(1).copied().unwrap_or(0)].map(u64::from);
            words[CODE as usize / 8 + i].store(high << 32 | low, Relaxed);
        }
    }

    fn add(&mut self, kind: Kind, va: u64, (value, look): (u64, u64), name: &str, expected: &str) {
        let (word, n) = match kind {
            Kind::Load => ("load", 0),
            Kind::Store => ("store", 1),
            Kind::Fetch => ("fetch", 2),
            Kind::TranslateRead => ("translate for a load", 3),
            Kind::TranslateWrite => ("translate for a store", 4),
        };
        assert!(kind as u64 == n && ((self.list.len() + 2) * 32) < LIST as usize);
        self.list.push(Probe { kind, va, value, look });
        writeln!(self.expected, "{word}\t{name}, {word} at {va:#x}\t{expected}").expect("a string takes all");
    }

    fn load(&mut self, va: u64, name: &str, expected: std::result::Result<u64, (Why, u64)>) {
        self.add(Kind::Load, va, (0, 0), name, &told::<F>(Access::Read, expected));
    }

    /// Stores a value of its own, which must be found at `look`.
    fn store(&mut self, va: u64, look: u64, name: &str, refused: Option<(Why, u64)>) {
        let value = 0x5107_ed00_0000_0000 | self.list.len() as u64;
        let expected = refused.map_or(Ok(value), Err);
        self.add(Kind::Store, va, (value, look), name, &told::<F>(Access::Write, expected));
    }

    /// All accesses to the page at `va`, which the tables lead to `pa` with these rights; `None`: nothing is there.
    fn page(&mut self, va: u64, pa: u64, rights: Option<Attrs>, name: &str) {
        let there = rights.filter(|rights| !rights.contains(NONE));
        let why = if there.is_some() { Why::Permission } else { Why::Translation };
        let can = |right| there.is_some_and(|rights| rights.contains(right));
        let refused = |can: bool, at| if can { None } else { Some((why, at)) };
        let load = refused(can(R), va + WORD).map_or(Ok(pa + WORD), Err);
        self.load(va + WORD, name, load);
        self.store(va + STORED, pa + STORED, name, refused(can(W), va + STORED));
        let fetch = refused(can(X), va + CODE).map_or(Ok(pa), Err);
        self.add(Kind::Fetch, va + CODE, (0, 0), name, &told::<F>(Access::Execute, fetch));
        if F::TRANSLATES {
            let memory = match there {
                Some(rights) if rights.contains(Attrs::DEVICE) => 0x04,
                Some(rights) if rights.contains(Attrs::UNCACHED) => 0x44,
                _ => 0xff,
            };
            for (kind, can) in [(Kind::TranslateRead, can(R)), (Kind::TranslateWrite, can(W))] {
                let expected = match can {
                    true => format!("physical {pa:#x}, memory type {memory:#x}"),
                    false if why == Why::Translation => "translation fault".to_owned(),
                    false => "permission fault".to_owned(),
                };
                self.add(kind, va, (0, 0), name, &expected);
            }
        }
    }

    /// Leaves of one level, side by side, with every set of rights.
    fn frames(&mut self, space: &'static Space<F>, level: u8) -> Result {
        let span = F::span(level);
        // A table of its own for each level, at its second entry.
        let base = BASE.next_multiple_of(F::span(F::LEVELS - 1)).max(span) + span;
        let base = base + u64::from(level) * F::span(F::LEVELS - 1).max(span * 16);
        let target = target::<F>();
        let all = [R, W, X, W | X, NONE, W | Attrs::UNCACHED, W | Attrs::DEVICE];
        for (i, attrs) in all.into_iter().enumerate() {
            let va = base + i as u64 * span;
            // The leaf that holds the target, and where in it.
            let pa = target + if level == 0 { i as u64 * PAGE_SIZE } else { 0 };
            let (first, inside) = (pa & !(span - 1), pa & (span - 1));
            let range = VirtRange::new(VirtAddr(va), VirtAddr(va + span));
            space.page_table().mapper().map(range, Pfn((first / PAGE_SIZE) as u32), level, attrs)?;
            let name = format!("a leaf of level {level}, {attrs:?}");
            self.page(va + inside, pa, Some(attrs), &name);
            if level > 0 {
                // Far into it, and not at a round place.
                self.page(va + inside + 37 * PAGE_SIZE, pa + 37 * PAGE_SIZE, Some(attrs), &name);
            }
        }
        self.page(base - span, 0, None, &format!("below the leaves of level {level}"));
        self.page(base + all.len() as u64 * span, 0, None, &format!("behind the leaves of level {level}"));
        Ok(())
    }

    /// Accesses that begin in one page and end in the next.
    fn across(&mut self, space: &'static Space<F>) -> Result {
        // The first page is the last of its leaf table.
        let base = BASE / 2 - PAGE_SIZE;
        let target = target::<F>() + (2 << 20);
        // Two pages whose frames are the other way round, one that cannot be written, a hole, and one behind it.
        let pages = [(0, 1, W), (1, 0, W), (2, 2, R), (4, 4, W)];
        for (page, frame, attrs) in pages {
            let va = VirtAddr(base + page * PAGE_SIZE);
            let pfn = Pfn(((target / PAGE_SIZE) + frame) as u32);
            space.page_table().mapper().map(VirtRange::page_of(va), pfn, 0, attrs)?;
        }
        let end = |page: u64| base + (page + 1) * PAGE_SIZE;
        // The last four bytes of frame 1, the first four of frame 0.
        let last = target + 2 * PAGE_SIZE - 8;
        self.load(end(0) - 4, "across two pages", Ok(target << 32 | last >> 32));
        self.load(end(0) - 7, "across two pages", Ok(target << 56 | last >> 8));
        self.load(end(2) - 4, "into a hole", Err((Why::Translation, end(2))));
        self.load(end(3) - 4, "out of a hole", Err((Why::Translation, end(3) - 4)));
        let [low, high] = [0x0506_0708, 0x0102_0304];
        let first = target >> 32 << 32 | high;
        self.add(
            Kind::Store,
            end(0) - 4,
            (high << 32 | low, target),
            "across two pages",
            &told::<F>(Access::Write, Ok(first)),
        );
        let last = low << 32 | (target + 2 * PAGE_SIZE - 8) & 0xffff_ffff;
        self.load(end(0) - 8, "what was stored across two pages", Ok(last));
        self.store(end(1) - 4, target, "into a page that cannot be written", Some((Why::Permission, end(1))));
        self.store(
            end(2) - 4,
            target,
            "from a page that cannot be written",
            Some((Why::Permission, end(2) - 4)),
        );
        Ok(())
    }

    /// The last page that a program can have, and what is behind it.
    fn ends(&mut self, space: &'static Space<F>) -> Result {
        let last = F::USER_END.0 - PAGE_SIZE;
        let range = VirtRange::page_of(VirtAddr(last));
        space.page_table().mapper().map(range, Pfn((target::<F>() / PAGE_SIZE) as u32), 0, W)?;
        self.page(last, target::<F>(), Some(W), "the last page");
        let end = F::USER_END.0 + WORD;
        self.load(end, "behind the last page", Err((Why::Translation, end)));
        Ok(())
    }

    /// Memory that faults have mapped, and calls have changed.
    fn memory(&mut self, space: &'static Space<F>) -> Result {
        let rw = Prot::READ | Prot::WRITE;
        let map = |at: u64, pages: u64| {
            let place = Place::Fixed(VirtAddr(at));
            space.map(Map { place, ..Map::anonymous(pages * PAGE_SIZE, rw) }).map(|_| at)
        };
        let at = map(BASE / 4, 8)?;
        let page = |i: u64| VirtAddr(at + i * PAGE_SIZE);
        fault(space, page(1), Access::Read)?;
        for i in [0, 3, 4, 5] {
            fault(space, page(i), Access::Write)?;
            self.fill(led(space, page(i))?.0);
        }
        let pa = |i| led(space, page(i)).map(|(pfn, _)| pfn.phys());
        space.protect(page(3), PAGE_SIZE, Prot::empty())?;
        space.protect(page(4), PAGE_SIZE, Prot::READ | Prot::EXEC)?;
        space.unmap(page(5), PAGE_SIZE)?;
        self.page(page(0).0, pa(0)?, Some(W), "written");
        self.load(page(1).0 + WORD, "read", Ok(0));
        self.store(page(1).0, pa(1)?, "read", Some((Why::Permission, page(1).0)));
        self.page(page(2).0, 0, None, "not touched");
        self.page(page(3).0, pa(3)?, Some(NONE), "written, PROT_NONE");
        self.page(page(4).0, pa(4)?, Some(X), "written, then made executable");
        self.page(page(5).0, 0, None, "unmapped");

        let huge = map(BASE / 4 + (1 << 30), 1024)?;
        let page = |i: u64| VirtAddr(huge + i * PAGE_SIZE);
        for half in [0, 512] {
            fault(space, page(half), Access::Write)?;
            let (pfn, level) = led(space, page(half))?;
            assert_eq!(level, 1, "a huge page");
            (0..512).for_each(|i| self.fill(pfn.add(i)));
        }
        space.protect(page(612), PAGE_SIZE, Prot::READ)?;
        assert_eq!(led(space, page(512))?.1, 0, "it was cut");
        let probes = [(0, W, "huge"), (511, W, "huge"), (611, W, "cut"), (612, R, "cut"), (1023, W, "cut")];
        for (i, rights, name) in probes {
            self.page(page(i).0, led(space, page(i))?.0.phys(), Some(rights), name);
        }
        Ok(())
    }
}

fn fault<F: Guest>(space: &Space<F>, va: VirtAddr, access: Access) -> Result {
    match space.fault(va, access) {
        Outcome::Mapped { .. } => Ok(()),
        _ => Err(format!("{access:?} at {va} is not mapped by a fault").into()),
    }
}

/// Where the library says that an address leads, and by an entry of which level.
fn led<F: Guest>(space: &Space<F>, va: VirtAddr) -> Result<(Pfn, u8)> {
    let there = space.page_table().translate(&Pin::new(space.platform()), va);
    there.map(|there| (there.pfn, there.level)).ok_or_else(|| format!("nothing at {va}").into())
}

fn told<F: Guest>(access: Access, expected: std::result::Result<u64, (Why, u64)>) -> String {
    match expected {
        Ok(value) => format!("value {value:#x}"),
        Err((why, at)) => F::refused(access, why, at),
    }
}
