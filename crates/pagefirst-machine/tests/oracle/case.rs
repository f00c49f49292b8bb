//! A case: spaces of the library and what the oracle knows of them; each step is made on both, and what they answer is
//! compared.

use super::calls::{Called, bytes_of};
use super::crew::{Crew, enter};
use super::files::{File, mark};
use super::kit::{Cache, Space as Real, entry, settle};
use super::model::{self, Level};
use super::plan::{By, FILES, MEMORY, Op, Setting, Step};
use super::seeds::Tally;
use super::turns::tally_faults;
use pagefirst::arch::Format;
use pagefirst::fault::{FaultError, Ticket};
use pagefirst::file::FileCache;
use pagefirst::frame::Frame;
use pagefirst::platform::Platform;
use pagefirst::space::{AddressSpace, Backing, Map, MapError, Stopped, Why};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr, VirtRange};
use pagefirst_machine::{Late, Machine, MachineFile, Vcpu};
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// What must not be dropped after a failure: the library may be in the middle of anything.
pub struct Things<F: Format> {
    pub spaces: Vec<Real<F>>,
    pub caches: Vec<Cache<F>>,
    /// Keeps memory short.
    pub _taken: Vec<Frame<Machine<F>>>,
}

pub struct Case<F: Format> {
    pub machine: &'static Machine<F>,
    pub setting: Setting,
    pub crew: Crew<F>,
    pub real: ManuallyDrop<Things<F>>,
    pub spaces: Vec<model::Space>,
    pub files: Vec<File>,
    stores: Vec<MachineFile>,
    pub tally: Tally,
}

/// A file of its size and with its marks.
pub fn store(id: usize, setting: &Setting) -> MachineFile {
    if id == MEMORY {
        return MachineFile::shmem(setting.shmem);
    }
    let file = MachineFile::pattern(move |at| if at < FILES[id] { mark(id, at) } else { 0 });
    let file = file.with_tracking(setting.tracks);
    if setting.late { file.late(Late::Within(Duration::from_micros(20))) } else { file }
}

/// Empty spaces for a case.
pub fn spaces<F: Format>(machine: &'static Machine<F>, setting: &Setting, n: usize) -> Vec<Real<F>> {
    let space = |_| {
        let space = AddressSpace::new(machine, setting.policy).expect("memory for an empty space");
        space.set_heap(VirtAddr(setting.heap)).expect("the heap starts where things can be mapped");
        Arc::new(space)
    };
    (0..n).map(space).collect()
}

impl<F: Format> Case<F> {
    /// A case in spaces that are still empty, by `cpus` CPUs of which the first is this thread, with files of its own.
    pub fn new(machine: &'static Machine<F>, setting: Setting, spaces: Vec<Real<F>>, cpus: usize) -> Self {
        let file = |(id, &size): (usize, &u64)| match id {
            MEMORY => File::memory(id, size, setting.shmem),
            _ => File::new(id, size, setting.tracks),
        };
        let files = FILES.iter().enumerate().map(file).collect();
        let stores: Vec<_> = (0..FILES.len()).map(|id| store(id, &setting)).collect();
        let cache = |(store, &size): (&MachineFile, &u64)| {
            FileCache::new(machine, store.clone(), size).expect("memory for an empty file")
        };
        let caches = stores.iter().zip(&FILES).map(cache).collect();
        let model = |real: &Real<F>| model::Space::new::<F>(setting.policy, setting.heap, level_in(real));
        let models = spaces.iter().map(model).collect();
        let crew = Crew::new(machine, cpus);
        let taken = setting.free.map_or_else(Vec::new, |free| machine.leave_free(free));
        let real = ManuallyDrop::new(Things { spaces, caches, _taken: taken });
        Case { machine, setting, crew, real, spaces: models, files, stores, tally: Tally::default() }
    }

    /// Waits until no read of its files is under way.
    pub fn settle(&self) {
        self.stores.iter().for_each(settle);
    }
    /// Whether memory may run out.
    pub fn is_short(&self) -> bool {
        self.setting.free.is_some()
    }
    /// Whether nobody else is at work at the same time: all CPUs are this case's.
    pub fn is_alone(&self) -> bool {
        self.crew.cpus() == self.setting.hardware.cpus
    }
    fn real(&self, step: &Step) -> Real<F> {
        self.real.spaces[step.space].clone()
    }

    /// A mapping call: on the library first; if memory ran out there, nothing happened.
    fn call<T: PartialEq + std::fmt::Debug + Send + 'static>(
        &mut self,
        step: &Step,
        call: impl FnOnce(Real<F>) -> Result<T, MapError> + Send + 'static,
        model: impl FnOnce(&mut model::Space, &[File]) -> Called<T>,
    ) -> Option<T> {
        let real = self.real(step);
        let found = self.crew.on(step.cpu, move |_| call(real));
        let end = match &found {
            Ok(_) => "ok".to_owned(),
            Err(error) => format!("{error:?}").split('(').next().unwrap_or_default().to_owned(),
        };
        self.reached(step, &end);
        if found == Err(MapError::NoMemory) && self.is_short() {
            return None;
        }
        let expected = model(&mut self.spaces[step.space], &self.files);
        assert_eq!(found, expected, "{step:?}");
        found.ok()
    }

    /// Counts what became of a step.
    fn reached(&mut self, step: &Step, end: &str) {
        let op = format!("{:?}", step.op);
        let name = op.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
        self.tally.add(format!("{name} {end}"), 1);
    }

    /// Makes a step, and compares what came of it.
    pub fn step(&mut self, step: &Step) {
        match step.op.clone() {
            Op::Map { map, populate } => {
                let backing = match map.shows.file() {
                    Some((file, first)) => Backing::File { file: self.real.caches[file].clone(), first },
                    None => Backing::Anonymous,
                };
                let new = Map {
                    len: map.pages * PAGE_SIZE,
                    prot: map.prot,
                    flags: map.flags,
                    backing,
                    place: map.place,
                    populate: false,
                };
                let range = self.call(
                    step,
                    move |space| space.map(new).map(|mapped| mapped.range),
                    |space, files| space.map(files, map).map(|range| bytes_of(&range)),
                );
                if let Some(range) = range.filter(|_| populate) {
                    self.populate(step, range, map.prot);
                }
            }
            Op::Unmap(range) => {
                let (at, len) = sized(&range);
                self.call(step, move |space| space.unmap(at, len), |space, _| space.unmap(range));
            }
            Op::Protect(range, prot) => {
                let (at, len) = sized(&range);
                self.call(
                    step,
                    move |space| space.protect(at, len, prot),
                    |space, files| space.protect(files, range, prot),
                );
            }
            Op::Discard(range) => {
                let (at, len) = sized(&range);
                self.call(step, move |space| space.discard(at, len), |space, _| space.discard(range));
            }
            Op::Advise(range, advice) => {
                let (at, len) = sized(&range);
                self.call(
                    step,
                    move |space| space.advise(at, len, advice),
                    |space, _| space.advise(range, advice),
                );
            }
            Op::Remap { old, pages, to } => {
                let (at, len) = sized(&old);
                self.call(
                    step,
                    move |space| space.remap(at, len, pages * PAGE_SIZE, to),
                    |space, _| space.remap(old, pages, to).map(|page| VirtAddr(page * PAGE_SIZE)),
                );
            }
            Op::Brk(up) => {
                let end = (self.setting.heap + up).saturating_sub(PAGE_SIZE);
                self.call(
                    step,
                    move |space| space.brk(VirtAddr(end)),
                    |space, _| space.brk(end).map(|()| VirtAddr(end)),
                );
            }
            Op::Load { at, wide, by } => {
                self.access(step, at, self.length(step, at, wide), Access::Read, by, 0);
            }
            Op::Fetch(at) => self.access(step, at, 1, Access::Execute, By::Program, 0),
            Op::Store { at, wide, by, value } => {
                let len = self.length(step, at, wide);
                if !self.spaces[step.space].is_beyond_end(&self.files, VirtAddr(at), len) {
                    self.access(step, at, len, Access::Write, by, value);
                }
            }
            Op::Exchange { at, hits, value } => self.exchange(step, VirtAddr(at), hits, value),
            Op::Fork { ends_first } => self.fork(step, ends_first),
            Op::Leave => self.crew.on(step.cpu, |cpu| cpu.leave()),
            Op::Drain => {
                let machine = self.machine;
                self.crew.on(step.cpu, move |_| machine.vm().drain(machine));
            }
            Op::ReadFile { file, at, len } => self.read_file(step, file, at, len),
            Op::WriteFile { file, at, len, value } => self.write_file(step, file, at, vec![value; len]),
            Op::Resize { file, size } => self.resize(step, file, size),
            Op::Punch { file, hole } => self.punch(step, file, hole),
            Op::Evict(file) => self.evict(step, file),
            Op::WriteBack(file) => self.write_back(step, file),
        }
    }

    /// The other space ends, and becomes a child of this one. Where memory may run out there are no children: of how far
    /// a fork came that failed the oracle does not know.
    fn fork(&mut self, step: &Step, ends_first: bool) {
        if self.is_short() {
            return;
        }
        if ends_first {
            self.exit(step, 1 - step.space);
        }
        let real = self.real(step);
        let child = self.crew.on(step.cpu, move |_| real.fork().map(Arc::new));
        self.add(step.space, child);
        if !ends_first {
            self.exit(step, 1 - step.space);
        }
        // The child takes its place.
        drop(self.real.spaces.swap_remove(1 - step.space));
        self.spaces.swap_remove(1 - step.space);
        self.reached(step, "ok");
    }
    /// A child is the last of the spaces from now on.
    pub fn add_child(&mut self, of: usize) -> Real<F> {
        let child = self.real.spaces[of].fork().map(Arc::new);
        self.add(of, child)
    }
    fn add(&mut self, of: usize, child: Result<Real<F>, MapError>) -> Real<F> {
        let child = child.unwrap_or_else(|error| panic!("no child: {error}"));
        self.spaces.push(self.spaces[of].fork(level_in(&child)));
        self.real.spaces.push(child.clone());
        child
    }
    /// A space ends; in its place is the other one, until there is a child.
    fn exit(&mut self, step: &Step, ends: usize) {
        let other = self.real.spaces[1 - ends].clone();
        let real = std::mem::replace(&mut self.real.spaces[ends], other);
        for cpu in 0..self.setting.hardware.cpus {
            let real = real.clone();
            self.crew.on(cpu, move |cpu| {
                if cpu.space().is_some_and(|running| Arc::ptr_eq(running, &real)) {
                    cpu.leave();
                }
            });
        }
        self.crew.on(step.cpu, move |_| drop(Arc::into_inner(real).expect("nobody runs it")));
        let empty = self.spaces[ends].another(Box::new(|_| None));
        tally_faults(&mut self.tally, &std::mem::replace(&mut self.spaces[ends], empty).faults);
    }

    fn populate(&mut self, step: &Step, range: VirtRange, prot: Prot) {
        let real = self.real(step);
        let area = self.spaces[step.space].areas.at(range.start.0 / PAGE_SIZE);
        let of_memory = area.is_some_and(|area| area.shows.file().is_some_and(|(file, _)| file == MEMORY));
        if of_memory && range.len() > PAGE_SIZE {
            // What each of its faults mapped is looked at after that fault.
            let pages = range.start.0 / PAGE_SIZE..range.end.0 / PAGE_SIZE;
            return pages.for_each(|page| self.populate(step, bytes_of(&(page..page + 1)), prot));
        }
        let late = self.setting.late && area.is_some_and(|area| area.shows.file().is_some());
        let stopped = self.crew.on(step.cpu, move |_| {
            let mut at = range.start;
            loop {
                // When it is blocked it reads ahead, by chance.
                let end = if late { VirtAddr(at.0 + PAGE_SIZE).min(range.end) } else { range.end };
                let Some(stopped) = real.populate(VirtRange::new(at, end), prot) else {
                    if end == range.end {
                        return None;
                    }
                    at = end;
                    continue;
                };
                at = stopped.at;
                match stopped.why {
                    Why::Error(error) => return Some((at, error)),
                    Why::Blocked(ticket) => wait(real.platform(), &ticket),
                    why => panic!("{at}: {why}"),
                }
            }
        });
        let limit = stopped.filter(|_| self.is_short());
        let pages = range.start.0 / PAGE_SIZE..range.end.0 / PAGE_SIZE;
        let expected = self.spaces[step.space].populate(&mut self.files, pages, prot, limit);
        assert_eq!(stopped, expected, "{step:?}");
    }

    /// How long an access is. One that reaches into another page of memory takes two faults, and what each mapped would
    /// not be known.
    fn length(&self, step: &Step, at: u64, wide: bool) -> u64 {
        let second = at.wrapping_add(7) / PAGE_SIZE;
        let area = self.spaces[step.space].areas.at(second).filter(|_| second != at / PAGE_SIZE);
        let is_memory = area.is_some_and(|area| area.shows.file().is_some_and(|(file, _)| file == MEMORY));
        if wide && !is_memory { 8 } else { 1 }
    }

    fn access(&mut self, step: &Step, at: u64, len: u64, access: Access, by: By, value: u64) {
        let real = self.real(step);
        let found = self.crew.on(step.cpu, move |cpu: &mut Vcpu<F>| {
            if by == By::Kernel {
                return copy(&real, VirtAddr(at), len as usize, access, value);
            }
            enter(cpu, &real);
            let mut bytes = value.to_le_bytes();
            let slice = &mut bytes[..len as usize];
            let done = match access {
                Access::Read => cpu.load(VirtAddr(at), slice),
                Access::Write => cpu.store(VirtAddr(at), slice),
                Access::Execute => cpu.fetch(VirtAddr(at)).map(|byte| slice[0] = byte),
            };
            done.map(|()| bytes).map_err(|trap| (trap.addr, trap.error))
        });
        let end = found.map_or_else(|(_, error)| format!("{error:?}"), |_| "ok".to_owned());
        self.reached(step, &format!("{by:?} {end}"));
        let limit = match found {
            Err((addr, FaultError::NoMemory)) if self.is_short() => Some(addr),
            _ => None,
        };
        let space = &self.spaces[step.space];
        if by == By::Kernel && !space.is_usable(VirtAddr(at), len) {
            // Refused before anything is looked at: no fault.
            assert!(matches!(found, Err((_, FaultError::Segv(_)))), "{step:?}: {found:?}");
            return;
        }
        let mut bytes = value.to_le_bytes();
        // A kernel marks what it accesses, whatever hardware does.
        self.spaces[step.space].marks = by == By::Kernel || self.machine.config().sets_accessed;
        let expected = self.expect(step, VirtAddr(at), &mut bytes[..len as usize], access, limit);
        assert_eq!(found, expected.map(|()| bytes), "{step:?}");
    }

    fn exchange(&mut self, step: &Step, at: VirtAddr, hits: bool, value: u64) {
        let space = &self.spaces[step.space];
        if !space.is_usable(at, 8) || space.is_beyond_end(&self.files, at, 8) {
            return;
        }
        let there = space.peek(&self.files, at);
        let old = if hits { there } else { !there };
        let real = self.real(step);
        let found = self.crew.on(step.cpu, move |_| {
            loop {
                match real.compare_exchange_u64(at, old, value) {
                    Ok(found) => return Ok(found),
                    Err(Why::Error(error)) => return Err((at, error)),
                    Err(Why::Blocked(ticket)) => {
                        wait(real.platform(), &ticket);
                    }
                    Err(why) => panic!("{at}: {why}"),
                }
            }
        });
        self.reached(step, if found.is_ok() { "ok" } else { "refused" });
        let limit = (found == Err((at, FaultError::NoMemory)) && self.is_short()).then_some(at);
        // It writes, if only what was there.
        let mut bytes = if hits { value } else { there }.to_le_bytes();
        self.spaces[step.space].marks = true;
        let expected = self.expect(step, at, &mut bytes, Access::Write, limit);
        let expected = expected.map(|()| if hits { Ok(there) } else { Err(there) });
        assert_eq!(found, expected, "{step:?}");
    }

    /// An access by the oracle, as far as `limit`, where memory ran out.
    fn expect(
        &mut self,
        step: &Step,
        at: VirtAddr,
        mut bytes: &mut [u8],
        access: Access,
        limit: Option<VirtAddr>,
    ) -> Result<(), (VirtAddr, FaultError)> {
        let mut at = at;
        while !bytes.is_empty() {
            let space = &mut self.spaces[step.space];
            if limit == Some(at) {
                // A stack may have grown before that.
                let page = at.0 / PAGE_SIZE;
                let mut is_mapped = false;
                self.real.spaces[step.space].for_each_vma(|vma| is_mapped |= vma.range.contains(at));
                if is_mapped && space.areas.at(page).is_none() {
                    assert!(space.grow_stack(page), "{step:?}: no stack to grow");
                }
                space.out_of_memory(page, access);
                return Err((at, FaultError::NoMemory));
            }
            let (now, rest) = bytes.split_at_mut(bytes.len().min((PAGE_SIZE - at.0 % PAGE_SIZE) as usize));
            match access {
                Access::Write => space.store(&mut self.files, at, now),
                _ => space.load(&mut self.files, at, now, access),
            }
            .map_err(|error| (at, error))?;
            at = VirtAddr(at.0.wrapping_add(now.len() as u64));
            bytes = rest;
        }
        Ok(())
    }
}

/// What the kernel does when it copies to or from a program's memory.
fn copy<F: Format>(
    real: &Real<F>,
    at: VirtAddr,
    len: usize,
    access: Access,
    value: u64,
) -> Result<[u8; 8], (VirtAddr, FaultError)> {
    let mut bytes = value.to_le_bytes();
    let mut from = 0;
    // Kept until the copy that comes after it has ended.
    let mut _kept = None;
    loop {
        let (here, rest) = (VirtAddr(at.0.wrapping_add(from as u64)), &mut bytes[from..len]);
        let end = if access == Access::Write { real.copy_out(here, rest) } else { real.copy_in(here, rest) };
        match end {
            Ok(()) => return Ok(bytes),
            Err(Stopped { done, why: Why::Error(error) }) => {
                return Err((VirtAddr(here.0.wrapping_add(done as u64)), error));
            }
            Err(Stopped { done, why: Why::Blocked(ticket) }) => {
                wait(real.platform(), &ticket);
                from += done;
                _kept = Some(ticket);
            }
            Err(stopped) => panic!("{at}: {stopped}"),
        }
    }
}

pub fn wait<F: Format>(machine: &'static Machine<F>, ticket: &Ticket<'_, Machine<F>>) {
    while !ticket.is_ready() {
        machine.relax();
    }
}

/// By an entry of which level a page is mapped.
fn level_in<F: Format>(real: &Real<F>) -> Level {
    let real = Arc::downgrade(real);
    Box::new(move |page| {
        let (raw, level) = entry(&real.upgrade()?, VirtAddr(page * PAGE_SIZE));
        F::frame(raw, level).map(|_| level)
    })
}

fn sized(range: &Range<u64>) -> (VirtAddr, u64) {
    (VirtAddr(range.start * PAGE_SIZE), (range.end - range.start) * PAGE_SIZE)
}
