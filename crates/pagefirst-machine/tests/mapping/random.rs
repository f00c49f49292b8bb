//! Random mapping calls and accesses against an oracle: a plain map from pages to what they show.

use super::kit::*;
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::space::{Map, MapError, Place, RemapTo};
use pagefirst::types::{PAGE_SIZE, Prot, VirtAddr};
use pagefirst_machine::Machine;
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestError, TestRng, TestRunner};
use std::cell;
use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;

/// Pages of one region; the first region lies across the border of two leaf tables, the second far away.
const PAGES: u64 = 48;
const FIRST: u64 = (1 << 18) + 512 - 20;
const SECOND: u64 = (1 << 30) + 7;
/// Pages of the file.
const FILE: u64 = 30;
const CASES: u32 = 300;

fn addr(number: u64) -> VirtAddr {
    VirtAddr(number * PAGE_SIZE)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Anonymous,
    Private(u64),
    Shared(u64),
}

impl Kind {
    /// What lies `n` pages further on.
    fn further(self, n: u64) -> Kind {
        match self {
            Kind::Anonymous => Kind::Anonymous,
            Kind::Private(index) => Kind::Private(index + n),
            Kind::Shared(index) => Kind::Shared(index + n),
        }
    }
}

/// A page as a program sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Page {
    prot: Prot,
    kind: Kind,
    /// What was written to it, where that did not go to the file.
    own: Option<u64>,
}

#[derive(Clone, Debug)]
enum Call {
    Map { at: Range<u64>, prot: Prot, kind: Kind, replace: bool, populate: bool },
    Unmap(Range<u64>),
    Protect(Range<u64>, Prot),
    Discard(Range<u64>),
    Move { from: Range<u64>, to: u64, pages: u64 },
    Resize { from: Range<u64>, pages: u64 },
    Read(u64),
    Write(u64, u64),
    Evict,
    WriteBack,
}

#[derive(Default)]
struct Oracle {
    pages: BTreeMap<u64, Page>,
    file: Vec<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Refusal {
    Taken,
    Hole,
    NoRoom,
    Invalid,
}

impl Oracle {
    fn is_free(&self, range: Range<u64>) -> bool {
        self.pages.range(range).next().is_none()
    }
    fn is_whole(&self, range: Range<u64>) -> bool {
        self.pages.range(range.clone()).count() as u64 == range.end - range.start
    }
    fn drop_pages(&mut self, range: Range<u64>) {
        self.pages.retain(|page, _| !range.contains(page));
    }
    /// The mappings, each as far as it goes on: what a program would read in `/proc/self/maps`.
    fn mappings(&self) -> Vec<(u64, u64, Prot)> {
        let mut all: Vec<(u64, u64, Prot)> = Vec::new();
        let mut last = None;
        for (&number, &cell) in &self.pages {
            match last {
                Some((before, Page { prot, kind, .. }))
                    if before + 1 == number && prot == cell.prot && kind.further(1) == cell.kind =>
                {
                    all.last_mut().expect("one was pushed").1 = number + 1;
                }
                _ => all.push((number, number + 1, cell.prot)),
            }
            last = Some((number, cell));
        }
        all
    }
    fn in_one_mapping(&self, range: &Range<u64>) -> bool {
        self.mappings().iter().any(|m| m.0 <= range.start && range.end <= m.1)
    }
    fn map(&mut self, at: Range<u64>, prot: Prot, kind: Kind, populate: bool) {
        self.drop_pages(at.clone());
        for number in at.clone() {
            self.pages.insert(number, Page { prot, kind: kind.further(number - at.start), own: None });
        }
        if populate && prot.contains(Prot::WRITE) {
            for number in at {
                match self.read(number) {
                    Ok(word) => self.keep(number, word),
                    Err(_) => return,
                }
            }
        }
    }
    /// A write: to the file, or to a page of its own.
    fn keep(&mut self, number: u64, word: u64) {
        let Some(cell) = self.pages.get_mut(&number) else { return };
        match cell.kind {
            Kind::Shared(index) => self.file[index as usize] = word,
            Kind::Anonymous | Kind::Private(_) => cell.own = Some(word),
        }
    }
    fn read(&self, number: u64) -> std::result::Result<u64, FaultError> {
        let cell = self.pages.get(&number).ok_or(FaultError::Segv(Segv::NotMapped))?;
        if cell.prot.is_empty() {
            return Err(FaultError::Segv(Segv::Access));
        }
        match (cell.kind, cell.own) {
            (_, Some(word)) => Ok(word),
            (Kind::Anonymous, None) => Ok(0),
            (Kind::Private(index) | Kind::Shared(index), None) => {
                self.file.get(index as usize).copied().ok_or(FaultError::Bus(Bus::BeyondEnd))
            }
        }
    }
    fn write(&mut self, number: u64, word: u64) -> std::result::Result<(), FaultError> {
        if self.pages.get(&number).is_some_and(|c| !c.prot.contains(Prot::WRITE)) {
            return Err(FaultError::Segv(Segv::Access));
        }
        self.read(number)?;
        self.keep(number, word);
        Ok(())
    }
    fn relocate(&mut self, from: Range<u64>, to: u64, pages: u64) -> std::result::Result<(), Refusal> {
        if !self.in_one_mapping(&from) {
            return Err(Refusal::Hole);
        }
        if from.start < to + pages && to < from.end {
            return Err(Refusal::Invalid);
        }
        let first = self.pages[&from.start];
        let moved: Vec<Page> = from.clone().map(|number| self.pages[&number]).collect();
        self.drop_pages(from);
        self.drop_pages(to..to + pages);
        for i in 0..pages {
            let fresh = Page { kind: first.kind.further(i), own: None, ..first };
            self.pages.insert(to + i, moved.get(i as usize).copied().unwrap_or(fresh));
        }
        Ok(())
    }
    fn resize(&mut self, from: Range<u64>, pages: u64) -> std::result::Result<(), Refusal> {
        if !self.in_one_mapping(&from) {
            return Err(Refusal::Hole);
        }
        let end = from.start + pages;
        if end <= from.end {
            self.drop_pages(end..from.end);
            return Ok(());
        }
        let is_end = self.mappings().iter().any(|m| m.1 == from.end);
        if !is_end || !self.is_free(from.end..end) {
            return Err(Refusal::NoRoom);
        }
        let last = self.pages[&(from.end - 1)];
        for number in from.end..end {
            self.pages
                .insert(number, Page { kind: last.kind.further(number + 1 - from.end), own: None, ..last });
        }
        Ok(())
    }
}

fn refusal(error: MapError) -> Refusal {
    match error {
        MapError::Taken(_) => Refusal::Taken,
        MapError::NotMapped(_) => Refusal::Hole,
        MapError::NoRoom(_) => Refusal::NoRoom,
        MapError::Invalid(_) => Refusal::Invalid,
        other => panic!("{other}"),
    }
}

/// A range of up to `most` pages that lies in one region.
fn ranges(most: u64) -> impl Strategy<Value = Range<u64>> {
    (prop_oneof![3 => Just(FIRST), 1 => Just(SECOND)], 0..PAGES, 1..=most)
        .prop_map(|(region, start, len)| region + start..(region + start + len).min(region + PAGES))
}

fn pages() -> impl Strategy<Value = u64> {
    ranges(1).prop_map(|r| r.start)
}

fn calls() -> impl Strategy<Value = Call> {
    let prots = || prop_oneof![4 => Just(RW), 2 => Just(R), 1 => Just(NONE), 1 => Just(RW | Prot::EXEC)];
    let kinds = prop_oneof![
        2 => Just(Kind::Anonymous),
        1 => (0..FILE).prop_map(Kind::Private),
        1 => (0..FILE).prop_map(Kind::Shared),
    ];
    let map = (ranges(24), prots(), kinds, any::<bool>(), prop::bool::weighted(0.2));
    prop_oneof![
        6 => map.prop_map(|(at, prot, kind, replace, populate)| Call::Map { at, prot, kind, replace, populate }),
        3 => ranges(10).prop_map(Call::Unmap),
        3 => (ranges(10), prots()).prop_map(|(range, prot)| Call::Protect(range, prot)),
        2 => ranges(10).prop_map(Call::Discard),
        4 => (ranges(8), ranges(8)).prop_map(|(from, to)| {
            Call::Move { from, to: to.start, pages: to.end - to.start }
        }),
        2 => (ranges(8), ranges(12)).prop_map(|(from, r)| {
            let room = if from.start < SECOND { FIRST } else { SECOND } + PAGES - from.start;
            Call::Resize { from, pages: (r.end - r.start).min(room) }
        }),
        10 => pages().prop_map(Call::Read),
        12 => (pages(), 1..u64::MAX).prop_map(|(page, word)| Call::Write(page, word)),
        1 => Just(Call::Evict),
        1 => Just(Call::WriteBack),
    ]
}

fn run(machine: &'static Machine, calls: &[Call]) -> Result {
    let file = marked().with_tracking(calls.len().is_multiple_of(2));
    let c = cache(machine, &file, FILE)?;
    let s = space(machine)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    let unwritten = (0..FILE).map(|i| u64::from_le_bytes([mark(i); 8])).collect();
    let mut oracle = Oracle { file: unwritten, ..Oracle::default() };
    for (n, call) in calls.iter().cloned().enumerate() {
        let bytes = |r: &Range<u64>| (r.end - r.start) * PAGE_SIZE;
        let name = format!("call {n}: {call:?}");
        let (found, expected) = match call {
            Call::Map { at, prot, kind, replace, populate } => {
                let start = addr(at.start);
                let map = match kind {
                    Kind::Anonymous => anonymous(at.end - at.start, prot),
                    Kind::Private(first) => private(&c, first, at.end - at.start, prot),
                    Kind::Shared(first) => shared(&c, first, at.end - at.start, prot),
                };
                let place = if replace { Place::Fixed(start) } else { Place::FixedNoReplace(start) };
                let expected = if replace || oracle.is_free(at.clone()) {
                    oracle.map(at, prot, kind, populate);
                    Ok(())
                } else {
                    Err(Refusal::Taken)
                };
                (s.map(Map { place, populate, ..map }).map(drop), expected)
            }
            Call::Unmap(range) => {
                oracle.drop_pages(range.clone());
                (s.unmap(addr(range.start), bytes(&range)), Ok(()))
            }
            Call::Protect(range, prot) => {
                let whole = oracle.is_whole(range.clone());
                if whole {
                    oracle.pages.range_mut(range.clone()).for_each(|(_, cell)| cell.prot = prot);
                }
                (s.protect(addr(range.start), bytes(&range), prot), whole.then_some(()).ok_or(Refusal::Hole))
            }
            Call::Discard(range) => {
                let whole = oracle.is_whole(range.clone());
                if whole {
                    oracle.pages.range_mut(range.clone()).for_each(|(_, cell)| cell.own = None);
                }
                (s.discard(addr(range.start), bytes(&range)), whole.then_some(()).ok_or(Refusal::Hole))
            }
            Call::Move { from, to, pages } => {
                let expected = oracle.relocate(from.clone(), to, pages);
                let at = RemapTo::Fixed(addr(to));
                (s.remap(addr(from.start), bytes(&from), pages * PAGE_SIZE, at).map(drop), expected)
            }
            Call::Resize { from, pages } => {
                let expected = oracle.resize(from.clone(), pages);
                let found = s.remap(addr(from.start), bytes(&from), pages * PAGE_SIZE, RemapTo::InPlace);
                (found.map(drop), expected)
            }
            Call::Read(number) => {
                let found = cpu.load_u64(addr(number)).map_err(|t| t.error);
                assert_eq!(found, oracle.read(number), "{name}");
                continue;
            }
            Call::Write(number, word) => {
                let found = cpu.store_u64(addr(number), word).map_err(|t| t.error);
                assert_eq!(found, oracle.write(number, word), "{name}");
                continue;
            }
            Call::Evict => {
                c.evict(machine);
                continue;
            }
            Call::WriteBack => {
                c.write_back(machine).map_err(|e| e.to_string())?;
                continue;
            }
        };
        assert_eq!(found.map_err(refusal), expected, "{name}");
        assert_eq!(vmas(&s), oracle.mappings(), "{name}");
        check(&s);
    }
    for region in [FIRST, SECOND] {
        for number in region..region + PAGES {
            assert_eq!(
                cpu.load_u64(addr(number)).map_err(|t| t.error),
                oracle.read(number),
                "page {number:#x}"
            );
        }
    }
    check(&s);
    drop(cpu);
    drop((s, c));
    Ok(machine.nothing_left()?)
}

#[test]
fn random_calls_do_what_the_oracle_says() -> Result {
    let seed = match std::env::var("PAGEFIRST_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => RandomState::new().build_hasher().finish(),
    };
    println!("PAGEFIRST_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let cases = std::env::var("PAGEFIRST_CASES").map_or(Ok(CASES), |n| n.parse())?;
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    // A machine on which a case went wrong is not used again; otherwise nothing was left on it.
    let clean = cell::Cell::new(None);
    let outcome = runner.run(&prop::collection::vec(calls(), 1..120), |calls| {
        let machine = clean.take().unwrap_or_else(|| small_machine(2048));
        run(machine, &calls).map_err(|e| TestCaseError::fail(e.to_string()))?;
        clean.set(Some(machine));
        Ok(())
    });
    match outcome {
        Ok(()) => Ok(()),
        Err(TestError::Fail(why, calls)) => panic!("PAGEFIRST_SEED={seed}: {why}\n{calls:#?}"),
        Err(TestError::Abort(why)) => panic!("PAGEFIRST_SEED={seed}: {why}"),
    }
}
