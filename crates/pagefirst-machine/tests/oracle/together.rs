//! CPUs at work at the same time, in one space. What must hold whatever the order:
//!
//! - each has a part of the space and files that nobody else touches: there it compares every outcome and every value
//!   with an oracle of its own, exactly, while the others work beside it under the same tables;
//! - of the pages that are everybody's, each CPU has a word of its own in each page, and writes ever larger numbers to
//!   it. Whoever reads a word finds what the page began with, or a number that was written there, never smaller than
//!   one that he has seen; its owner finds his last one or what the page began with, if it was taken away meanwhile;
//! - now and then a CPU forks, and goes on in its part of parent and child by turns. What is everybody's is in the child
//!   what it was then, and stays so; what is written to the child nobody else sees;
//! - afterwards what is resident, the mappings, and the bytes of tables are what the oracles say together, and in the
//!   end nothing is left.

use super::calls::bytes_of;
use super::case::{Case, spaces, store};
use super::crew::enter;
use super::files::mark;
use super::kit::{Cache, Gate, Space as Real, check, private, settle};
use super::model;
use super::parts::{COMMON, Common, Part};
use super::plan::{FILES, Setting, Step};
use super::seeds::Tally;
use pagefirst::arch::Format;
use pagefirst::fault::{FaultError, Segv};
use pagefirst::file::FileCache;
use pagefirst::policy::HugePolicy;
use pagefirst::space::{Map, MapError, Place};
use pagefirst::types::{PAGE_SIZE, Prot, VirtAddr, VirtRange};
use pagefirst_machine::{Machine, Vcpu};
use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

/// A number as it is written: the page and the word in it that it was written to, its owner's count.
fn word(page: u64, owner: usize, count: u64) -> u64 {
    (count << 16) | (page << 8) | (owner as u64 + 1)
}

/// Where in its page the word of an owner lies.
fn place(page: u64, owner: usize) -> VirtAddr {
    VirtAddr((COMMON.start + page) * PAGE_SIZE + 512 * owner as u64)
}

/// What one CPU does to the pages that are everybody's.
struct Shared<'a, F: Format> {
    me: usize,
    space: Real<F>,
    file: Cache<F>,
    /// How far each owner has counted: raised before a number is written.
    counts: &'a [AtomicU64],
    /// The largest number seen in each word.
    seen: BTreeMap<(u64, usize), u64>,
    /// What was written last to each page's own word.
    written: BTreeMap<u64, u64>,
    /// What is everybody's in the child, if there is one, by page and owner.
    snapshot: BTreeMap<(u64, usize), Option<u64>>,
}

impl<F: Format> Shared<'_, F> {
    fn step(&mut self, cpu: &mut Vcpu<F>, op: &Common) {
        let at = |range: &Range<u64>| VirtAddr((COMMON.start + range.start) * PAGE_SIZE);
        let len = |range: &Range<u64>| (range.end - range.start) * PAGE_SIZE;
        let done = match op {
            Common::Store(page) => {
                let count = self.counts[self.me].fetch_add(1, SeqCst) + 1;
                let value = word(*page, self.me, count);
                match cpu.store_u64(place(*page, self.me), value).map_err(|trap| trap.error) {
                    Ok(()) => {
                        self.written.insert(*page, value);
                    }
                    Err(FaultError::Segv(Segv::NotMapped | Segv::Access)) => {}
                    Err(error) => panic!("{op:?}: {error}"),
                }
                return;
            }
            Common::Load(page) => {
                return (0..self.counts.len()).for_each(|owner| self.load(cpu, *page, owner));
            }
            Common::Discard(range) => self.space.discard(at(range), len(range)),
            Common::Unmap(range) => self.space.unmap(at(range), len(range)),
            Common::Protect(range, write) => {
                let prot = if *write { Prot::READ | Prot::WRITE } else { Prot::READ };
                self.space.protect(at(range), len(range), prot)
            }
            Common::Fork => return,
            Common::Map(range, file) => self.space.map(mapping(&self.file, range, *file)).map(drop),
        };
        assert!(matches!(done, Ok(()) | Err(MapError::NotMapped(_))), "{op:?}: {done:?}");
    }

    /// The word of an owner, if it can be read, and his count in it, if he has written to it.
    fn look(&self, cpu: &mut Vcpu<F>, page: u64, owner: usize) -> Option<(u64, Option<u64>)> {
        let found = match cpu.load_u64(place(page, owner)).map_err(|trap| trap.error) {
            Ok(found) => found,
            Err(FaultError::Segv(Segv::NotMapped)) => return None,
            Err(error) => panic!("page {page}: {error}"),
        };
        let start = page * PAGE_SIZE + 512 * owner as u64;
        let began = u64::from_le_bytes(std::array::from_fn(|i| mark(0, start + i as u64)));
        if found == 0 || found == began {
            return Some((found, None));
        }
        let count = found >> 16;
        assert_eq!(found, word(page, owner, count), "page {page}, word of CPU {owner}: never written there");
        let issued = self.counts[owner].load(SeqCst);
        assert!(count <= issued, "page {page}, word of CPU {owner}: {count} of {issued}");
        let seen = self.seen.get(&(page, owner)).copied().unwrap_or(0);
        assert!(count >= seen, "page {page}, word of CPU {owner}: {count} after {seen}");
        if owner == self.me {
            assert_eq!(Some(&found), self.written.get(&page), "page {page}: not what was written last");
        }
        Some((found, Some(count)))
    }
    fn load(&mut self, cpu: &mut Vcpu<F>, page: u64, owner: usize) {
        if let Some((_, Some(count))) = self.look(cpu, page, owner) {
            self.seen.insert((page, owner), count);
        }
    }

    /// What the child has, which the CPU runs, of what is everybody's.
    fn enter_child(&mut self, cpu: &mut Vcpu<F>) {
        for (page, owner) in self.words() {
            let found = self.look(cpu, page, owner).map(|(found, _)| found);
            self.snapshot.insert((page, owner), found);
        }
    }
    /// It is what it was. Whoever finds there what is written now, finds what no CPU has ever written.
    fn leave_child(&mut self, cpu: &mut Vcpu<F>) {
        for ((page, owner), then) in std::mem::take(&mut self.snapshot) {
            let now = cpu.load_u64(place(page, owner)).ok();
            assert_eq!(
                now, then,
                "page {page}, word of CPU {owner}: another in a child than when it was born"
            );
            // It may not be mapped, or not for writing.
            let _ = cpu.store_u64(place(page, owner), u64::MAX);
        }
    }
    fn words(&self) -> Vec<(u64, usize)> {
        let pages = 0..COMMON.end - COMMON.start;
        pages.flat_map(|page| (0..self.counts.len()).map(move |owner| (page, owner))).collect()
    }
}

/// A mapping in the pages that are everybody's: of private memory, or of a file whose pages nobody writes.
fn mapping<F: Format>(file: &Cache<F>, range: &Range<u64>, of_file: bool) -> Map<Machine<F>> {
    let (pages, prot) = (range.end - range.start, Prot::READ | Prot::WRITE);
    let map = if of_file {
        private(file, range.start, pages, prot)
    } else {
        Map::anonymous(pages * PAGE_SIZE, prot)
    };
    Map { place: Place::Fixed(VirtAddr((COMMON.start + range.start) * PAGE_SIZE)), ..map }
}

/// Runs a case; panics when something is not as it must be.
///
/// # Errors
/// What is left on the machine after it.
pub fn run<F: Format>(
    machine: &'static Machine<F>,
    setting: &Setting,
    steps: &[Vec<(Step, Common)>],
) -> Result<Tally, String> {
    let space = spaces(machine, setting, 1).remove(0);
    let file = FileCache::new(machine, store(0, setting), FILES[0]).expect("memory for an empty file");
    // Not dropped after a failure.
    let kept = ManuallyDrop::new((space.clone(), file.clone()));
    space.map(mapping(&file, &(0..COMMON.end - COMMON.start), false)).expect("nothing is mapped yet");
    let counts: Vec<AtomicU64> = steps.iter().map(|_| AtomicU64::new(0)).collect();
    let start = Gate::new(steps.len());
    let work = |me: usize| {
        let start = start.member();
        let mut case = Case::new(machine, *setting, vec![space.clone()], 1);
        let (seen, written) = (BTreeMap::new(), BTreeMap::new());
        let mut shared = Shared {
            me,
            space: space.clone(),
            file: file.clone(),
            counts: &counts,
            seen,
            written,
            snapshot: BTreeMap::new(),
        };
        start.pass();
        for (n, (step, common)) in steps[me].iter().enumerate() {
            if let Some(step) = Part(me as u64).step(step) {
                case.step(&Step { space: n % case.spaces.len(), ..step });
            }
            // Huge pages of all, and of their children, would take more memory than there is.
            if matches!(common, Common::Fork) && setting.policy.huge == HugePolicy::Never {
                fork(&mut case, &mut shared);
            }
            let cpu = case.crew.here();
            enter(cpu, &space);
            shared.step(cpu, common);
        }
        if case.spaces.len() > 1 {
            fork(&mut case, &mut shared);
        }
        case.compare_pages(0, PAGE_SIZE as usize / 8, false);
        case.settle();
        let Case { real, mut spaces, tally, .. } = case;
        drop(ManuallyDrop::into_inner(real));
        (spaces.remove(0), tally)
    };
    let work = &work;
    let ended: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..steps.len()).map(|me| scope.spawn(move || work(me))).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let (mut parts, mut panics) = (Vec::new(), Vec::new());
    for end in ended {
        end.map_or_else(|panic| panics.push(panic), |part| parts.push(part));
    }
    // What one has found ends the others: theirs is not the news.
    panics.sort_by_key(|panic| panic.downcast_ref::<&str>().is_some());
    if let Some(panic) = panics.into_iter().next() {
        resume_unwind(panic);
    }
    let common = VirtRange::new(VirtAddr(COMMON.start * PAGE_SIZE), VirtAddr(COMMON.end * PAGE_SIZE));
    space.unmap(common.start, common.len()).map_err(|e| e.to_string())?;
    let mut tally = Tally::default();
    let mut whole: Option<model::Space> = None;
    for (n, (part, reached)) in parts.into_iter().enumerate() {
        tally.merge(reached);
        match &mut whole {
            Some(whole) => whole.absorb(part, n * FILES.len()),
            None => whole = Some(part),
        }
    }
    if let Some(whole) = whole {
        compare(&space, &whole);
    }
    settle(file.file());
    drop((space, file, ManuallyDrop::into_inner(kept)));
    machine.nothing_left().map(|()| tally)
}

/// A child of the space that is everybody's is born, for this CPU alone; or the one that there is ends.
fn fork<F: Format>(case: &mut Case<F>, shared: &mut Shared<'_, F>) {
    if case.spaces.len() == 1 {
        let child = case.add_child(0);
        let cpu = case.crew.here();
        enter(cpu, &child);
        shared.enter_child(cpu);
        return case.tally.add("Fork ok", 1);
    }
    case.compare_pages(1, PAGE_SIZE as usize / 8, true);
    let child = case.real.spaces.remove(1);
    case.spaces.truncate(1);
    let cpu = case.crew.here();
    enter(cpu, &child);
    shared.leave_child(cpu);
    cpu.leave();
    check(&child);
    drop(Arc::into_inner(child).expect("it is this CPU's alone"));
}

/// What the library says of the space when all have ended, and what the oracles say together.
fn compare<F: Format>(space: &Real<F>, whole: &model::Space) {
    assert_eq!(check(space).present, whole.present(), "entries");
    let found = space.account();
    let resident = (found.anon_bytes, found.huge_bytes, found.file_bytes, found.huge_file_bytes);
    assert_eq!(resident, whole.resident(), "resident");
    assert_eq!(found.table_bytes, whole.table_bytes(), "tables");
    let mut mappings = Vec::new();
    space.for_each_vma(|vma| mappings.push((vma.range, vma.prot, vma.flags)));
    let expected = whole.areas.mappings().into_iter();
    let expected: Vec<_> = expected.map(|(range, area)| (bytes_of(&range), area.prot, area.flags)).collect();
    assert_eq!(mappings, expected, "mappings");
}
