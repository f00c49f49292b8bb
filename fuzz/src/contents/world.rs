//! The processes and files of a case, those of the library beside those of the model, and what is done to them.

use super::files::OnDisk;
use super::model::{File, Mapped, Page, Shows, Space, WORDS, set, zeros};
use super::plan::{FILES, LARGEST, MEMORY, Op, SIZES, Setting, Step, address};
use crate::oracle::kit::{Cache, Space as Real, entry};
use pagefirst::Poisoned;
use pagefirst::arch::{Attrs, Format};
use pagefirst::fault::{FaultError, Outcome, Ticket};
use pagefirst::file::FileCache;
use pagefirst::limit::Limit;
use pagefirst::mem::Shared;
use pagefirst::platform::Platform;
use pagefirst::space::{
    AddressSpace, Advice, Backing, Map, MapError, PinError, Pinned, Place, RemapTo, Stopped, VmaFlags, Why,
};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr, VirtRange};
use pagefirst_machine::{Machine, Vcpu};
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

/// The most processes at once, and the most pins.
const SPACES: usize = 3;
const PINS: usize = 4;
/// After so many steps all that is in the tables is looked at.
const LOOK: usize = 8;
/// Steps that wait at once.
const WAITING: usize = 4;
/// The most times that one access waits.
const ROUNDS: usize = 16;

/// What a device has, and where it writes to.
pub struct Held<F: Format> {
    pinned: Pinned<Machine<F>>,
    write: bool,
    /// What each page is, if that is certain; and of which file.
    pages: Vec<Option<Page>>,
    of: Option<(usize, u64)>,
}

/// What must not be dropped after a failure: the library may be in the middle of anything.
pub struct Things<F: Format> {
    pub spaces: Vec<(Real<F>, Space)>,
    pub caches: Vec<Cache<F>>,
    pub limit: Option<Shared<Machine<F>, Limit<Machine<F>>>>,
    pub pins: Vec<Held<F>>,
}

pub struct World<F: Format> {
    pub machine: &'static Machine<F>,
    pub cpu: Vcpu<F>,
    pub real: ManuallyDrop<Things<F>>,
    pub files: Vec<File>,
    pub disks: Vec<OnDisk>,
    most: u64,
    may_poison: bool,
    steps: std::vec::IntoIter<Step>,
    waiting: usize,
}

/// Runs a case.
///
/// # Errors
/// What is left on the machine after it.
pub fn run<F: Format>(
    machine: &'static Machine<F>,
    setting: &Setting,
    steps: Vec<Step>,
) -> Result<(), String> {
    let first = setting.first.iter().map(|op| Step { space: 0, wait: 0, op: op.clone() });
    let mut world = World::new(machine, setting, first.chain(steps).collect());
    let mut n = 0;
    while world.next() {
        n += 1;
        if n % LOOK == 0 {
            world.look();
        }
    }
    world.end(setting.first_out)
}

impl<F: Format> World<F> {
    fn new(machine: &'static Machine<F>, setting: &Setting, steps: Vec<Step>) -> Self {
        let disks: Vec<_> = (0..FILES).map(|id| OnDisk::new(id, setting)).collect();
        let cache = |(disk, pages): (&OnDisk, u64)| {
            FileCache::new(machine, disk.file.clone(), pages * PAGE_SIZE).expect("memory for an empty file")
        };
        let caches: Vec<_> = disks.iter().zip(SIZES).map(cache).collect();
        let is_late = [setting.late[0], false, setting.late[1]];
        let file = |id| File::new(id, SIZES[id] * PAGE_SIZE, LARGEST[id], id != MEMORY, is_late[id]);
        let limit = setting.limit.map(|max| Limit::new(machine, None, max).expect("memory for a limit"));
        let space = AddressSpace::new(machine, setting.policy).expect("memory for an empty space");
        space.set_limit(limit.clone());
        machine.charge_to(limit.clone());
        let spaces = vec![(Arc::new(space), Space::default())];
        World {
            machine,
            cpu: machine.vcpu(),
            real: ManuallyDrop::new(Things { spaces, caches, limit, pins: Vec::new() }),
            files: (0..FILES).map(file).collect(),
            disks,
            most: setting.limit.unwrap_or(0),
            may_poison: setting.may_poison,
            steps: steps.into_iter(),
            waiting: 0,
        }
    }

    /// Takes a step; false if there was none left.
    fn next(&mut self) -> bool {
        let Some(step) = self.steps.next() else { return false };
        self.step(&step);
        true
    }
    pub fn is_limited(&self) -> bool {
        self.real.limit.is_some()
    }

    fn step(&mut self, step: &Step) {
        let of = step.space % self.real.spaces.len();
        let (real, model) = (self.real.spaces[of].0.clone(), self.real.spaces[of].1.clone());
        let sized = |pages: &Range<u64>| (address(pages.start), (pages.end - pages.start) * PAGE_SIZE);
        let mapped = |pages: &Range<u64>| model.is_mapped(pages);
        match step.op.clone() {
            Op::Map { pages, prot, shows } => self.map(of, &pages, prot, shows),
            Op::Unmap(pages) => {
                let (at, len) = sized(&pages);
                assert_eq!(real.unmap(at, len), Ok(()), "{step:?}");
                self.model(of).0.retain(|page, _| !pages.contains(page));
            }
            Op::Protect(pages, prot) => {
                let (at, len) = sized(&pages);
                if agree(step, real.protect(at, len, prot), mapped(&pages)) {
                    self.model(of).change(&pages, |mapped| mapped.prot = prot);
                }
            }
            Op::Discard(pages) => {
                let (at, len) = sized(&pages);
                if agree(step, real.discard(at, len), mapped(&pages)) {
                    self.model(of).change(&pages, Mapped::forget);
                }
            }
            Op::Remap { from, to } => self.remap(step, of, &from, to),
            Op::Advise(pages, advice) => {
                let (at, len) = sized(&pages);
                let mut all = model.0.range(pages.clone());
                let may = advice != Advice::WipeOnFork || all.all(|(_, m)| m.shows == Shows::Anonymous);
                if agree(step, real.advise(at, len, advice), mapped(&pages) && may) {
                    self.model(of).change(&pages, |mapped| match advice {
                        Advice::DontFork | Advice::DoFork => mapped.dont_fork = advice == Advice::DontFork,
                        Advice::WipeOnFork | Advice::KeepOnFork => mapped.wipe = advice == Advice::WipeOnFork,
                        _ => {}
                    });
                }
            }
            Op::Access { page, word, store, by_kernel } => {
                self.access(step, &real, page, word, store, by_kernel);
            }
            Op::Fork if self.real.spaces.len() < SPACES => match real.fork() {
                Ok(child) => self.real.spaces.push((Arc::new(child), model.fork())),
                Err(MapError::OverLimit(_)) if self.is_limited() => {}
                Err(why) => panic!("{step:?}: {why}"),
            },
            Op::Exit if self.real.spaces.len() > 1 => {
                self.cpu.leave();
                self.real.spaces.remove(of);
            }
            Op::Fork | Op::Exit => {}
            Op::Pin { pages, write } => self.pin(step, of, &pages, write),
            Op::Unpin(nth) if !self.real.pins.is_empty() => {
                let nth = usize::from(nth) % self.real.pins.len();
                self.real.pins.swap_remove(nth);
            }
            Op::Device { nth, page, word, value } if !self.real.pins.is_empty() => {
                self.device(usize::from(nth) % self.real.pins.len(), usize::from(page), word, value);
            }
            Op::Unpin(_) | Op::Device { .. } => {}
            Op::Poison(page) if self.may_poison => self.poison(step, of, page),
            Op::Poison(_) => {}
            Op::Limit(max) => {
                self.most = self.most.max(max);
                self.real.limit.iter().for_each(|limit| limit.set_max(max));
            }
            Op::Drain => drop(self.machine.vm().drain(self.machine)),
            Op::Leave => self.cpu.leave(),
            _ => self.file_step(step),
        }
        if let Some(limit) = &self.real.limit {
            assert!(limit.peak() <= self.most, "{step:?}: {} pages of {}", limit.peak(), self.most);
        }
    }
    fn model(&mut self, of: usize) -> &mut Space {
        &mut self.real.spaces[of].1
    }

    fn map(&mut self, of: usize, pages: &Range<u64>, prot: Prot, shows: Shows) {
        let (backing, flags) = match shows {
            Shows::Anonymous => (Backing::Anonymous, VmaFlags::empty()),
            Shows::File { file, index, shared } => (
                Backing::File { file: self.real.caches[file].clone(), first: index },
                if shared { VmaFlags::SHARED } else { VmaFlags::empty() },
            ),
        };
        let (len, place) = ((pages.end - pages.start) * PAGE_SIZE, Place::Fixed(address(pages.start)));
        let map = Map { len, prot, flags, backing, place, populate: false };
        self.real.spaces[of].0.map(map).expect("there is room for few mappings");
        let further = |n| match shows {
            Shows::File { file, index, shared } => Shows::File { file, index: index + n, shared },
            Shows::Anonymous => Shows::Anonymous,
        };
        let new = pages.clone().zip(0..).map(|(page, n)| (page, Mapped::new(prot, further(n))));
        self.model(of).0.extend(new);
    }

    /// Whether pages are one mapping is not the model's to know, if they are several.
    fn remap(&mut self, step: &Step, of: usize, from: &Range<u64>, to: u64) {
        let (pages, model) = (from.end - from.start, &mut self.real.spaces[of].1);
        let may = model.is_mapped(from) && (to + pages <= from.start || from.end <= to);
        let (at, len) = (address(from.start), pages * PAGE_SIZE);
        let moved = self.real.spaces[of].0.remap(at, len, len, RemapTo::Fixed(address(to)));
        assert!(moved.is_ok() && may || moved.is_err() && (!may || pages > 1), "{step:?}: {moved:?}");
        if moved.is_ok() {
            let Space(model) = self.model(of);
            let there: Vec<_> = from.clone().filter_map(|page| model.remove(&page)).collect();
            model.extend((to..).zip(there));
        }
    }

    /// An access; while it waits, other steps come between.
    fn access(
        &mut self,
        step: &Step,
        real: &Real<F>,
        page: u64,
        word: usize,
        store: Option<u64>,
        by_kernel: bool,
    ) {
        let (at, mut rounds) = (VirtAddr(page * PAGE_SIZE + WORDS[word]), 0);
        let mut ticket = None;
        let end = loop {
            let Some(model) = self.model_of(real) else { return };
            let expected = model.expect(&self.files, page, store.is_some());
            if store.is_some() && self.is_beyond_end(model, page, word) {
                return;
            }
            ticket = match try_access(&mut self.cpu, real, at, store, by_kernel, ticket) {
                Tried::Done(found) => break Ok(found),
                Tried::Failed(error) => break Err(error),
                Tried::Blocked(ticket) => Some(ticket),
            };
            assert!(expected.may_block, "{step:?}: it waits");
            if rounds == 0 && self.waiting < WAITING {
                self.waiting += 1;
                (0..step.wait).for_each(|_| {
                    self.next();
                });
                self.waiting -= 1;
            }
            if !ticket.as_ref().is_some_and(Ticket::is_ready) {
                self.finish_all();
            }
            assert!(ticket.as_ref().is_some_and(Ticket::is_ready), "{step:?}: what it waits for never comes");
            rounds += 1;
            assert!(rounds < ROUNDS, "{step:?}: it waits for ever");
        };
        let is_limited = self.is_limited();
        let Things { spaces, .. } = &mut *self.real;
        let Some((_, model)) = spaces.iter_mut().find(|(other, _)| Arc::ptr_eq(real, other)) else { return };
        let expected = model.expect(&self.files, page, store.is_some());
        assert!(expected.allows(end.err(), is_limited), "{step:?}: {end:x?}, not {expected:?}");
        let (Ok(found), Some(mapped)) = (end, model.0.get_mut(&page)) else { return };
        // What a file has again, it has as it was stored.
        if let (None, Shows::File { file, index, .. }) = (&mapped.own, mapped.shows) {
            self.files[file].bad.remove(&index);
        }
        match store {
            Some(value) => set(&mapped.page_to_write(&self.files), word, value),
            None => assert_eq!(found, mapped.page(&self.files).get()[word], "{step:?}"),
        }
    }
    fn model_of(&self, real: &Real<F>) -> Option<&Space> {
        let found = self.real.spaces.iter().find(|(other, _)| Arc::ptr_eq(real, other));
        found.map(|(_, model)| model)
    }
    fn is_beyond_end(&self, model: &Space, page: u64, word: usize) -> bool {
        matches!(model.0.get(&page), Some(Mapped { shows: Shows::File { file, index, shared: true }, .. })
            if self.files[*file].has_page(*index) && !self.files[*file].has_word(*index, word))
    }

    fn pin(&mut self, step: &Step, of: usize, pages: &Range<u64>, write: bool) {
        if self.real.pins.len() == PINS {
            return;
        }
        let real = self.real.spaces[of].0.clone();
        let range = VirtRange::new(address(pages.start), address(pages.end));
        let mut kept = None;
        let end = (0..ROUNDS).find_map(|_| match real.pin(range, write) {
            Ok(pinned) => Some(Ok(pinned)),
            Err(PinError::Fault(error)) => Some(Err(error)),
            Err(PinError::Blocked(ticket)) => {
                self.finish_all();
                assert!(ticket.is_ready(), "{step:?}: what it waits for never comes");
                kept = Some(ticket);
                None
            }
            Err(why) => panic!("{step:?}: {why}"),
        });
        drop(kept);
        let end = end.unwrap_or_else(|| panic!("{step:?}: it waits for ever"));
        let is_limited = self.is_limited();
        let (files, Things { spaces, pins, .. }) = (&mut self.files, &mut *self.real);
        let (_, model) = &mut spaces[of];
        let Some(first) = model.0.get(&pages.start) else {
            assert!(end.is_err(), "{step:?}: {end:?}");
            return;
        };
        let exclusive = !first.is_shared() && (write || first.prot.contains(Prot::WRITE));
        let expected = model.expect(files, pages.start, write);
        assert!(expected.allows(end.as_ref().err().copied(), is_limited), "{step:?}: {end:?}");
        let Ok(pinned) = end else { return };
        let of = match first.shows {
            Shows::File { file, index, shared: true } => Some((file, index)),
            _ => None,
        };
        let page = |(_, mapped): (_, &mut Mapped)| match (exclusive, mapped.is_shared()) {
            (true, _) => Some(mapped.page_to_write(files)),
            (false, true) => Some(mapped.page(files)),
            (false, false) => None,
        };
        let n = pinned.len() / PAGE_SIZE;
        let bodies = model.0.range_mut(pages.start..pages.start + n).map(page).collect();
        pins.push(Held { pinned, write, pages: bodies, of });
    }

    /// A device looks at what it has, and writes to it.
    fn device(&mut self, nth: usize, page: usize, word: usize, value: u64) {
        let held = &self.real.pins[nth];
        let page = page % held.pages.len();
        let Some(body) = &held.pages[page] else { return };
        if let Some((file, first)) = held.of {
            let (file, index) = (&self.files[file], first + page as u64);
            let is_there = file.has_word(index, word);
            if !is_there || !Rc::ptr_eq(&file.pages[index as usize], body) {
                return;
            }
        }
        let cell = &self.machine.cells(held.pinned.first().add(page as u32))[WORDS[word] as usize / 8];
        assert_eq!(cell.load(Acquire), body.get()[word], "what a device sees");
        if held.write {
            cell.store(value, Release);
            set(body, word, value);
        }
    }

    /// Hardware reports an error in what is mapped.
    fn poison(&mut self, step: &Step, of: usize, page: u64) {
        let machine = self.machine;
        let Some(pfn) = frame(&self.real.spaces[of].0, page) else { return };
        let Things { spaces, .. } = &mut *self.real;
        let shows = spaces[of].1.0.get(&page).map(|mapped| mapped.shows);
        let places = |(real, model): &(Real<F>, Space)| {
            let of_page = |(page, mapped): (&u64, &Mapped)| {
                (!mapped.is_shared() && frame(real, *page) == Some(pfn)).then_some(*page)
            };
            model.0.iter().filter_map(of_page).collect::<Vec<u64>>()
        };
        let places: Vec<_> = spaces.iter().map(places).collect();
        match (machine.vm().poison(machine, pfn), shows) {
            (Poisoned::InUse, _) => {} // the page of zeros
            (Poisoned::Private { huge }, _) => {
                for ((real, model), places) in spaces.iter_mut().zip(places) {
                    let left = if huge { places.len() as u64 } else { 0 };
                    assert_eq!(real.lose_poisoned(), Ok(left), "{step:?}");
                    let lost = model.0.iter_mut().filter(|(page, _)| places.contains(page));
                    lost.for_each(|(_, mapped)| (mapped.own, mapped.lost) = (None, true));
                }
            }
            (Poisoned::File { lost }, Some(Shows::File { file, index, .. })) => {
                let file = &mut self.files[file];
                let is_zero = file.pages[index as usize].get() == zeros().get();
                assert!(lost || file.is_stored || is_zero, "{step:?}: it is nowhere else");
                file.bad.insert(index, lost);
            }
            (end, _) => panic!("{step:?}: {end:?}"),
        }
    }

    /// Everything ends, the process of that number first.
    fn end(mut self, first: usize) -> Result<(), String> {
        self.finish_all();
        self.look();
        let World { machine, cpu, real, .. } = self;
        drop(cpu);
        let Things { mut spaces, caches, limit, pins } = ManuallyDrop::into_inner(real);
        machine.charge_to(None);
        let n = spaces.len();
        spaces.rotate_left(first % n);
        for (space, _) in spaces {
            drop(Arc::into_inner(space).ok_or("somebody else has a space")?);
        }
        drop((pins, caches));
        machine.vm().quiesce(machine);
        if let Some(limit) = limit.as_ref().filter(|limit| limit.charged() != 0) {
            return Err(format!("{} pages are charged still", limit.charged()));
        }
        drop(limit);
        machine.nothing_left()
    }
}

/// Whether a call did what it was to do; it does if it may.
fn agree(step: &Step, done: Result<(), MapError>, may: bool) -> bool {
    assert_eq!(done.is_ok(), may, "{step:?}: {done:?}");
    may
}

/// The frame that a page is in, if it is in one.
pub fn frame<F: Format>(real: &Real<F>, page: u64) -> Option<Pfn> {
    let (raw, level) = entry(real, address(page));
    F::frame(raw, level).map(|first| first.add((page % F::pages(level)) as u32))
}

enum Tried<'a, F: Format> {
    Done(u64),
    Failed(FaultError),
    Blocked(Ticket<'a, Machine<F>>),
}

/// Accesses a word, unless it has to wait for something else than this ticket.
fn try_access<'a, F: Format>(
    cpu: &mut Vcpu<F>,
    real: &'a Real<F>,
    at: VirtAddr,
    store: Option<u64>,
    by_kernel: bool,
    mut ticket: Option<Ticket<'a, Machine<F>>>,
) -> Tried<'a, F> {
    if by_kernel {
        let mut bytes = store.unwrap_or(0).to_le_bytes();
        let end = match store {
            Some(_) => real.copy_out(at, &bytes),
            None => real.copy_in(at, &mut bytes),
        };
        return match end {
            Ok(()) => Tried::Done(u64::from_le_bytes(bytes)),
            Err(Stopped { why: Why::Error(error), .. }) => Tried::Failed(error),
            Err(Stopped { why: Why::Blocked(ticket), .. }) => Tried::Blocked(ticket),
            Err(stopped) => panic!("{at}: {stopped}"),
        };
    }
    let access = if store.is_some() { Access::Write } else { Access::Read };
    let is_there = || {
        let (raw, level) = entry(real, at.page());
        let attrs = F::attrs(raw);
        let allows = !attrs.contains(Attrs::NONE) && (store.is_none() || attrs.contains(Attrs::WRITE));
        F::frame(raw, level).is_some() && allows
    };
    while ticket.is_some() || !is_there() {
        let outcome = match ticket.take() {
            Some(ticket) => real.retry(at, access, ticket),
            None => real.fault(at, access),
        };
        match outcome {
            Outcome::Mapped { .. } | Outcome::Spurious => {}
            Outcome::Blocked(ticket) => return Tried::Blocked(ticket),
            Outcome::Error(error) => return Tried::Failed(error),
        }
    }
    if cpu.space().is_none_or(|running| !Arc::ptr_eq(running, real)) {
        cpu.switch_to(real);
    }
    let end = match store {
        Some(value) => cpu.store_u64(at, value).map(|()| value),
        None => cpu.load_u64(at),
    };
    end.map_or_else(|trap| Tried::Failed(trap.error), Tried::Done)
}
