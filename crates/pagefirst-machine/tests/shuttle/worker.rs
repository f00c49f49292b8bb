//! A thread that does something or other, and knows what must come of it in the pages that are its own.

use super::run::tell;
use super::scheduler::Dice;
use super::seen::{Before, Seen};
use super::world::{KEPT, MEMORY, PAGES, RW, STORED, Space, World};
use pagefirst::arch::Format;
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::platform::Platform as _;
use pagefirst::space::{Advice, Backing, MapError, Pinned, RemapTo, VmaFlags, Why};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtRange};
use pagefirst_machine::{Machine, Vcpu};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// What a page of the thread's own is.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Own {
    Gone,
    /// Private memory that holds this word.
    Private(u64, Prot),
    /// This page of the kept file.
    File(u64, Prot),
}

/// A space as the thread knows it: the one that is everybody's, or a child that is its own.
pub struct View<F: Format> {
    pub space: Space<F>,
    own: BTreeMap<u64, Own>,
    /// Words of others in a child's private memory: they stay as they were.
    snapshot: BTreeMap<(u64, usize), u64>,
    /// What was seen of pages that are everybody's.
    seen: Arc<Seen>,
}

/// A page that a device may use.
struct Held<F: Format> {
    pinned: Pinned<Machine<F>>,
    /// Private memory of the thread's own, which it is still mapped as, in this space.
    of: Option<(usize, u64)>,
}

/// What a thread leaves.
pub struct Left<F: Format> {
    views: Vec<View<F>>,
    kept: BTreeMap<u64, u64>,
}

pub struct Worker<'w, F: Format> {
    pub world: &'w World<F>,
    pub me: usize,
    cpu: Vcpu<F>,
    pub dice: Dice,
    /// The space that is everybody's, then children.
    pub views: Vec<View<F>>,
    /// The one that it works in.
    at: usize,
    /// What it wrote to pages of the kept file.
    kept: BTreeMap<u64, u64>,
    pins: Vec<Held<F>>,
}

fn has_no_memory(error: FaultError) -> bool {
    matches!(error, FaultError::NoMemory | FaultError::OverLimit(_))
}

/// What comes of an access to a page that is everybody's.
fn may_trap(done: Result<(), FaultError>) {
    match done {
        Ok(())
        | Err(FaultError::Segv(Segv::NotMapped | Segv::Access) | FaultError::Bus(Bus::BeyondEnd | Bus::Io)) =>
            {}
        Err(error) => assert!(has_no_memory(error), "{error}"),
    }
}

impl<'w, F: Format> Worker<'w, F> {
    pub fn new(world: &'w World<F>, me: usize, dice: Dice, is_mapped: bool) -> Self {
        let begins = if is_mapped { Own::Private(0, RW) } else { Own::Gone };
        let own = world.own(me).into_iter().map(|page| (page, begins)).collect();
        let view =
            View { space: world.space.clone(), own, snapshot: BTreeMap::new(), seen: world.seen.clone() };
        let left = Left { views: vec![view], kept: BTreeMap::new() };
        Worker { dice, ..Worker::again(world, me, left) }
    }
    /// It goes on, as another thread.
    pub fn again(world: &'w World<F>, me: usize, Left { views, kept }: Left<F>) -> Self {
        let cpu = world.machine.vcpu();
        Worker { world, me, cpu, dice: Dice::new(0), views, at: 0, kept, pins: Vec::new() }
    }
    pub fn work(mut self, steps: u64) -> Left<F> {
        for _ in 0..steps {
            self.check_pins();
            self.enter();
            let what = match self.world.crowded {
                Some(_) => [6, 6, 6, 15][self.dice.below(4) as usize],
                None => self.dice.below(16),
            };
            match what {
                0..=5 => self.own_step(),
                6..=12 => self.common_step(),
                13 | 14 => self.file_step(),
                _ => self.space_step(),
            }
        }
        Left { views: self.views, kept: self.kept }
    }
    pub fn into_children(mut self) -> Vec<Space<F>> {
        self.cpu.leave();
        self.views.drain(1..).map(|view| view.space).collect()
    }

    pub fn tell(&self, what: impl FnOnce() -> String) {
        tell(|| format!("thread {} in space {}: {}", self.me, self.at, what()));
    }
    fn space(&self) -> Space<F> {
        self.views[self.at].space.clone()
    }
    fn enter(&mut self) {
        let space = self.space();
        if self.cpu.space().is_none_or(|running| !Arc::ptr_eq(running, &space)) {
            self.cpu.switch_to(&space);
        }
    }
    /// Memory may run out where it is short; mapping calls that did so have changed nothing.
    fn may_fail(&self, error: MapError) -> bool {
        matches!(error, MapError::NoMemory | MapError::OverLimit(_))
    }

    /// All of its own pages, in all spaces, are what it knows, and the words of others in children what they were.
    pub fn check_own(&mut self) {
        for at in 0..self.views.len() {
            self.at = at;
            self.enter();
            let pages: Vec<u64> = self.views[at].own.keys().copied().collect();
            pages.into_iter().for_each(|page| self.load_own(page, self.me));
            self.check_snapshot();
        }
    }

    /// The word in a page of its own, and whether it can be read and written.
    fn expected(&self, page: u64) -> (u64, Prot, bool) {
        match self.views[self.at].own[&page] {
            Own::Gone => (0, Prot::empty(), false),
            Own::Private(word, prot) => (word, prot, true),
            Own::File(index, prot) => (self.kept.get(&index).copied().unwrap_or(0), prot, true),
        }
    }
    /// Somebody else's word in it is 0.
    fn load_own(&mut self, page: u64, owner: usize) {
        let (word, prot, is_mapped) = self.expected(page);
        let word = if owner == self.me { word } else { 0 };
        let expected = match (is_mapped, prot.contains(Prot::READ)) {
            (false, _) => Err(FaultError::Segv(Segv::NotMapped)),
            (_, false) => Err(FaultError::Segv(Segv::Access)),
            _ => Ok(word),
        };
        let found = self.read(page, owner);
        self.tell(|| format!("own page {page}, word of {owner}: {found:x?}"));
        if !found.is_err_and(has_no_memory) {
            assert_eq!(found, expected, "page {page} of thread {}, space {}", self.me, self.at);
        }
    }
    fn store_own(&mut self, page: u64) {
        let (_, prot, is_mapped) = self.expected(page);
        let expected = match (is_mapped, prot.contains(Prot::WRITE)) {
            (false, _) => Err(FaultError::Segv(Segv::NotMapped)),
            (_, false) => Err(FaultError::Segv(Segv::Access)),
            _ => Ok(()),
        };
        let word = self.world.count(self.me);
        self.tell(|| format!("own page {page}: {word:#x} is to be written"));
        let done = self.write(page, word);
        if !done.is_err_and(has_no_memory) {
            assert_eq!(done, expected, "page {page} of thread {}, space {}", self.me, self.at);
        }
        if done.is_ok() {
            match self.views[self.at].own.get_mut(&page) {
                Some(Own::Private(old, _)) => *old = word,
                Some(Own::File(index, _)) => drop(self.kept.insert(*index, word)),
                Some(Own::Gone) | None => {}
            }
        }
    }
    /// A device finds in a page that is pinned what the program wrote there.
    fn check_pins(&self) {
        for Held { pinned, of } in &self.pins {
            let Some((at, page)) = *of else { continue };
            // A tiny table has few words.
            let cells = self.world.machine.cells(pinned.first());
            if let (Some(Own::Private(word, _)), Some(cell)) =
                (self.views[at].own.get(&page), cells.get(self.me))
            {
                let found = cell.load(Relaxed);
                assert_eq!(found, *word, "the frame that holds page {page} of space {at} pinned");
            }
        }
    }
    /// By the program, or by the kernel for it.
    fn read(&mut self, page: u64, owner: usize) -> Result<u64, FaultError> {
        let at = self.world.place(page, owner);
        if self.dice.one_in(4) {
            let mut bytes = [0; 8];
            let space = self.space();
            return self
                .copy(|| space.copy_in(at, &mut bytes).map_err(|stopped| stopped.why))
                .map(|()| u64::from_le_bytes(bytes));
        }
        self.cpu.load_u64(at).map_err(|trap| trap.error)
    }
    fn write(&mut self, page: u64, word: u64) -> Result<(), FaultError> {
        let at = self.world.place(page, self.me);
        if self.dice.one_in(4) {
            let space = self.space();
            return self.copy(|| space.copy_out(at, &word.to_le_bytes()).map_err(|stopped| stopped.why));
        }
        self.cpu.store_u64(at, word).map_err(|trap| trap.error)
    }
    /// A copy by the kernel, as often as it has to wait. It keeps the ticket until it has tried again: an error is told then.
    fn copy<'a>(&self, mut copy: impl FnMut() -> Result<(), Why<'a, Machine<F>>>) -> Result<(), FaultError>
    where
        F: 'a,
    {
        let mut waited = None;
        loop {
            let done = copy();
            drop(waited.take());
            match done {
                Ok(()) => return Ok(()),
                Err(Why::Error(error)) => return Err(error),
                Err(Why::Blocked(ticket)) => {
                    while !ticket.is_ready() {
                        shuttle::thread::yield_now();
                    }
                    waited = Some(ticket);
                }
                Err(Why::Misaligned) => unreachable!("words are aligned"),
            }
        }
    }

    /// Something done to a page of its own.
    fn own_step(&mut self) {
        let pages: Vec<u64> = self.views[self.at].own.keys().copied().collect();
        let Some(&page) = pages.get(self.dice.below(pages.len() as u64) as usize) else {
            return self.common_step();
        };
        let (space, at, own) = (self.space(), self.world.at(page), self.views[self.at].own[&page]);
        let prot = self.prot();
        let kind = self.dice.below(20);
        let kept = &self.world.files[KEPT];
        let (done, then) = match kind {
            0..=5 => return self.store_own(page),
            6..=8 => {
                let other = self.dice.below(self.world.threads as u64) as usize;
                let owner = if self.dice.one_in(3) { other } else { self.me };
                return self.load_own(page, owner);
            }
            9 => (
                space.discard(at, PAGE_SIZE),
                match own {
                    Own::Private(_, prot) => Own::Private(0, prot),
                    own => own,
                },
            ),
            10 => {
                let is_file = self.dice.one_in(2);
                let index = pages[self.dice.below(pages.len() as u64) as usize];
                let backing = if is_file { self.world.file(KEPT, index) } else { Backing::Anonymous };
                let done = space.map(self.world.map(&(page..page + 1), backing, prot, is_file)).map(drop);
                (done, if is_file { Own::File(index, prot) } else { Own::Private(0, prot) })
            }
            11 => (space.unmap(at, PAGE_SIZE), Own::Gone),
            12 | 13 => (
                space.protect(at, PAGE_SIZE, prot),
                match own {
                    Own::Private(word, _) => Own::Private(word, prot),
                    Own::File(index, _) => Own::File(index, prot),
                    Own::Gone => Own::Gone,
                },
            ),
            14 => {
                let to = pages[self.dice.below(pages.len() as u64) as usize];
                if to == page {
                    return;
                }
                let moved = space.remap(at, PAGE_SIZE, PAGE_SIZE, RemapTo::Fixed(self.world.at(to)));
                if moved.is_ok() {
                    self.views[self.at].own.insert(to, own);
                    self.forget(&(to..to + 1));
                }
                if moved.is_ok() && self.dice.one_in(2) {
                    self.views[self.at].own.insert(page, Own::Gone);
                    self.forget(&(page..page + 1));
                    return self.lose(to);
                }
                (moved.map(drop), Own::Gone)
            }
            15 => return self.pin(page),
            16 | 17 => {
                kept.evict_range(0..PAGES);
                return;
            }
            18 => {
                // An error is told by memory that is short.
                let _ = kept.write_back(self.world.machine);
                return;
            }
            _ => {
                // The page becomes dirty anew, perhaps in its entry alone.
                if self.dice.one_in(2) {
                    let _ = kept.write_back(self.world.machine);
                    self.store_own(page);
                }
                return self.lose(page);
            }
        };
        self.tell(|| format!("own page {page}, {own:x?}, call {kind}: {done:?}, then {then:x?}"));
        if !matches!(kind, 12 | 13) || !prot.contains(Prot::READ) {
            self.forget(&(page..page + 1));
        }
        match done {
            Ok(()) => {
                assert!(
                    own != Own::Gone || !matches!(kind, 12..=14),
                    "a call on page {page}, which is not mapped"
                );
                self.views[self.at].own.insert(page, then);
            }
            Err(MapError::NotMapped(_)) => assert_eq!(own, Own::Gone, "page {page} is mapped"),
            Err(error) => assert!(self.may_fail(error), "page {page}: {error}"),
        }
    }
    /// What was in pages is no longer: what a child had, and what is pinned.
    fn forget(&mut self, pages: &Range<u64>) {
        let at = self.at;
        self.views[at].snapshot.retain(|(page, _), _| !pages.contains(page));
        for held in &mut self.pins {
            held.of = held.of.filter(|(space, page)| *space != at || !pages.contains(page));
        }
    }
    /// A page of its own is mapped no more, nor in memory if it is a file's; and is there again.
    fn lose(&mut self, page: u64) {
        if let Own::File(index, _) = self.views[self.at].own[&page]
            && self.space().discard(self.world.at(page), PAGE_SIZE).is_ok()
        {
            self.world.files[KEPT].evict_range(index..index + 1);
        }
        self.load_own(page, self.me);
    }
    fn prot(&mut self) -> Prot {
        match self.dice.below(6) {
            0 => Prot::empty(),
            1 => Prot::READ,
            _ => RW,
        }
    }
    /// Holds a page, or lets go of those that it holds.
    fn pin(&mut self, page: u64) {
        if self.pins.len() > 1 {
            return self.pins.clear();
        }
        let write = self.dice.one_in(2);
        let space = self.space();
        let is_own = write && matches!(self.views[self.at].own.get(&page), Some(Own::Private(..)));
        if let Ok(pinned) = space.pin(VirtRange::page_of(self.world.at(page)), write) {
            self.tell(|| format!("page {page} pinned: {pinned:?}"));
            self.pins.push(Held { pinned, of: is_own.then_some((self.at, page)) });
        }
    }

    /// A word in a page that is everybody's was found or written, of which this was known before. Unless a call came
    /// between, it is no older.
    fn saw(&mut self, page: u64, owner: usize, word: u64, before: Option<Before>) {
        let (seen, files) = (&self.views[self.at].seen, &self.world.file_calls);
        let count = self.world.counted(word, owner);
        let Some(newer) = seen.saw((page, owner), count, before, files) else { return };
        let still = seen.still(page, files);
        let is_of_file = self.is_private_of_file(page);
        assert!(
            is_of_file || still.is_none() || still != seen.still(page, files),
            "page {page}, space {}: the word of thread {owner} is his number {count}, and was {newer} ({before:?})",
            self.at
        );
    }
    fn write_common(&mut self, page: u64) {
        let before = self.views[self.at].seen.before((page, self.me), &self.world.file_calls);
        let word = self.world.count(self.me);
        self.tell(|| format!("page {page}: {word:#x} is to be written"));
        let done = self.write(page, word);
        if done.is_ok() {
            self.saw(page, self.me, word, before);
        }
        may_trap(done);
    }
    fn read_common(&mut self, page: u64, owner: usize) {
        let before = self.views[self.at].seen.before((page, owner), &self.world.file_calls);
        let found = self.read(page, owner);
        self.tell(|| format!("page {page}, word of {owner}: {found:x?}"));
        if let Ok(found) = found {
            self.saw(page, owner, found, before);
        }
        may_trap(found.map(drop));
    }
    fn is_private_of_file(&self, page: u64) -> bool {
        let at = self.world.at(page);
        let mut is = false;
        self.space().for_each_vma(|vma| {
            let is_file = matches!(vma.backing, Backing::File { .. });
            is |= vma.range.contains(at) && is_file && !vma.flags.contains(VmaFlags::SHARED);
        });
        is
    }

    /// Something done to pages that are everybody's.
    fn common_step(&mut self) {
        let Some(range) = self.world.common(&mut self.dice) else { return };
        let (space, at) = (self.space(), self.world.at(range.start));
        let len = (range.end - range.start) * PAGE_SIZE;
        let prot = self.prot();
        let kind = match self.world.crowded {
            Some(_) => [0, 0, 0, 16][self.dice.below(4) as usize],
            None => self.dice.below(20),
        };
        let (world, seen) = (self.world, self.views[self.at].seen.clone());
        let to = self.world.common(&mut self.dice).unwrap_or(range.clone());
        let to = to.start..(to.start + (range.end - range.start)).min(to.end);
        let _change = match kind {
            11..=15 => Some(seen.change([range.clone()])),
            19.. => Some(seen.change([range.clone(), to.clone()])),
            _ => None,
        };
        if kind >= 11 {
            self.forget(&range);
        }
        let done = match kind {
            // Often the page that somebody has just touched, and several times.
            0..=8 => {
                let other = self.dice.below(world.threads as u64) as usize;
                let recent = seen.recent(other).filter(|_| !self.dice.one_in(4));
                let page = recent.unwrap_or(range.start);
                for _ in 0..1 + self.dice.below(4) {
                    let owner = if self.dice.one_in(4) { self.me } else { other };
                    match self.dice.one_in(3) {
                        true => self.write_common(page),
                        false => self.read_common(page, owner),
                    }
                }
                return;
            }
            9 => return may_trap(self.cpu.touch(at, Access::Execute).map_err(|trap| trap.error)),
            10 => return self.pin(range.start),
            11 | 12 => space.discard(at, len),
            13 => space.unmap(at, len),
            14 | 15 => {
                let first = self.dice.below(4) * self.dice.below(2) + range.start % 4;
                let which = self.dice.below(5);
                if which < 3 {
                    seen.may_be_of_file(range.clone());
                }
                let (backing, shared) = match which {
                    0 => (self.world.file(STORED, first), false),
                    1 => (self.world.file(STORED, first), true),
                    2 => (self.world.file(MEMORY, first), true),
                    _ => (Backing::Anonymous, false),
                };
                let map = self.world.map(&range, backing, prot, shared);
                let populate = self.dice.one_in(3);
                space.map(pagefirst::space::Map { populate, ..map }).map(drop)
            }
            16 | 17 => space.protect(at, len, prot),
            18 => {
                let advice =
                    [Advice::Huge, Advice::NoHuge, Advice::WillNeed, Advice::WipeOnFork, Advice::DontFork];
                space.advise(at, len, advice[self.dice.below(5) as usize])
            }
            _ => {
                self.forget(&to);
                let new = (to.end - to.start) * PAGE_SIZE;
                let moved = space.remap(at, len, new, RemapTo::Fixed(self.world.at(to.start))).map(drop);
                // Whoever maps a file says so first, and it may have been moved here before.
                if seen.is_of_file(0..PAGES) {
                    seen.may_be_of_file(to.clone());
                }
                moved
            }
        };
        self.tell(|| format!("pages {range:?}, {prot:?}, call {kind}: {done:?}"));
        match done {
            Ok(()) | Err(MapError::NotMapped(_) | MapError::Invalid(_)) => {}
            Err(error) => assert!(self.may_fail(error), "pages {range:?}: {error}"),
        }
    }
    /// Something done to whole spaces.
    fn space_step(&mut self) {
        let kind = if self.world.crowded.is_some() { 4 } else { self.dice.below(6) };
        match kind {
            // What was shared is nobody else's again, and the next write finds that out.
            4 | 5 => drop(self.views[0].space.fork()),
            0 | 1 if self.views.len() == 1 => self.fork(),
            0 if self.views.len() > 1 => self.end_child(),
            1 | 2 => self.at = self.dice.below(self.views.len() as u64) as usize,
            _ => drop(self.world.machine.vm().drain(self.world.machine)),
        }
    }
    fn fork(&mut self) {
        let child = match self.space().fork() {
            Ok(child) => Arc::new(child),
            Err(error) => return assert!(self.may_fail(error), "fork: {error}"),
        };
        self.tell(|| "forked".into());
        let own = self.views[0].own.clone();
        let mut private = Vec::new();
        child.for_each_vma(|vma| {
            let is_private =
                matches!(vma.backing, Backing::Anonymous) && !vma.flags.contains(VmaFlags::SHARED);
            if is_private && vma.prot.contains(Prot::READ) {
                private.extend(self.world.page(vma.range.start)..self.world.page(vma.range.end));
            }
        });
        let seen = Arc::<Seen>::default();
        seen.may_be_of_file(0..PAGES);
        self.views.push(View { space: child, own, snapshot: BTreeMap::new(), seen });
        self.at = self.views.len() - 1;
        self.enter();
        for _ in 0..6 {
            let (page, owner) = self.world.any_word(&mut self.dice);
            if owner == self.me || !private.contains(&page) {
                continue;
            }
            if let Ok(found) = self.cpu.load_u64(self.world.place(page, owner)) {
                self.world.counted(found, owner);
                self.views[self.at].snapshot.insert((page, owner), found);
            }
        }
    }
    fn check_snapshot(&mut self) {
        for ((page, owner), then) in self.views[self.at].snapshot.clone() {
            let now = self.cpu.load_u64(self.world.place(page, owner)).map_err(|trap| trap.error);
            if !now.is_err_and(has_no_memory) {
                assert_eq!(
                    now,
                    Ok(then),
                    "page {page}, word of {owner}: another in a child than when it was born"
                );
            }
        }
    }
    fn end_child(&mut self) {
        self.at = self.views.len() - 1;
        self.enter();
        self.check_snapshot();
        self.at = 0;
        self.enter();
        self.pins.clear();
        self.tell(|| "its child ends".into());
        drop(self.views.pop());
    }
}
