//! Performs a recording's events.
//!
//! Touches run on vCPUs, so that faults happen where the library's policies make them happen; calls run between
//! touches. With several vCPUs the recorded threads are dealt out to them, each thread's touches stay in order, and
//! every call waits for the touches before it.
//!
//! Each process has a space of its own: its parent's fork, or an empty one when it executes a program. (So has a child that
//! would have its parent's memory on Linux, `vfork`: the emulator copied it as well.) One process runs at a time, in the
//! order of the recording.

use super::crew::Crew;
use super::place::{Placer, fixed};
use super::touched::Touched;
use super::{Checked, Huge, Placement, Tables};
use indicatif::ProgressBar;
use pagefirst::Held;
use pagefirst::account::Account;
use pagefirst::fault::FaultError;
use pagefirst::file::FileCache;
use pagefirst::mem::Shared;
use pagefirst::policy::{FaultAround, HugePolicy, Policy, TablePolicy};
use pagefirst::space::{
    AddressSpace, Advice as Told, Backing as Shows, Map as Mapping, MapError, Place as At, RemapTo,
    Unpopulated, VmaFlags, Why,
};
use pagefirst::types::{NoMemory, PAGE_SIZE, Prot as Rights, VirtAddr};
use pagefirst_machine::{Config, Counts, Machine, MachineFile};
use pagefirst_record::{
    Address, Advice, Backing, Event, FileId, FormatError, Map, MapKind, MappingId, Place, ProcessId, Prot,
};
use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub type Space = AddressSpace<Machine>;
type File = Shared<Machine, FileCache<Machine>>;

/// How to replay.
pub struct Options {
    /// What this way of replaying is called.
    pub name: &'static str,
    /// When tables are made.
    pub tables: Tables,
    /// Window of fault-around.
    pub fault_around: FaultAround,
    /// Where mappings go.
    pub place: Placement,
    /// Where private memory gets huge pages.
    pub huge: Huge,
    /// vCPUs.
    pub cpus: usize,
    /// The machine's memory, in bytes.
    pub memory: u64,
    /// Let the machine check the library.
    pub checks: bool,
}

/// Why a replay ended early.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The recording, although it was read once.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The machine's memory is too small.
    #[error("event {event}: the machine's memory is used up; --memory gives it more than {memory} bytes")]
    NoMemory {
        /// Which event.
        event: u64,
        /// How much memory there is.
        memory: u64,
    },
}

/// What a process did while it ran one program.
pub struct Program {
    /// The process.
    pub process: ProcessId,
    /// The program's name.
    pub name: String,
    /// Touches performed.
    pub touches: u64,
    /// Touches that ended as SIGSEGV and as SIGBUS.
    pub refused: (u64, u64),
    /// Calls performed.
    pub calls: u64,
    /// Calls that failed or that cannot be replayed.
    pub failed: u64,
    /// What the space held at its end.
    pub account: Account,
}

/// What a replay came to.
pub struct Run {
    /// What this way of replaying is called.
    pub name: &'static str,
    /// What each process did, program by program, in the order of their ends.
    pub programs: Vec<Program>,
    /// What the first process's space held at the end.
    pub account: Account,
    /// Bytes of huge pages mapped there at the end that were never touched.
    pub huge_untouched: u64,
    /// The most bytes of tables at one time, of all processes together.
    pub peak_tables: u64,
    /// The largest resident set, in bytes, of all processes together.
    pub peak_resident: u64,
    /// The first process's largest.
    pub first_peak: u64,
    /// Touches performed.
    pub touches: u64,
    /// Touches that ended as SIGSEGV and as SIGBUS.
    pub refused: (u64, u64),
    /// Calls performed.
    pub calls: u64,
    /// Calls that failed or that cannot be replayed, and the first of them.
    pub failed: u64,
    /// What the first failed call was.
    pub first_failed: Option<String>,
    /// What happened on the machine.
    pub machine: Counts,
    /// What is left when everything is gone.
    pub left: Held,
    /// How long it took.
    pub time: Duration,
}

/// Replays a recording once.
pub fn replay(recording: &Checked, options: &Options, bar: &ProgressBar) -> Result<Run, ReplayError> {
    let mut stage = Stage { machine: options.machine(options.cpus + 1), files: Files::default() };
    let mut recording = recording.open()?;
    let program = recording.header().program.clone();
    let events = std::iter::from_fn(|| recording.next_event().transpose());
    let mut run = stage.perform(options, &program, events, bar)?;
    drop(stage.files);
    stage.machine.vm().quiesce(stage.machine);
    run.left = stage.machine.vm().held(stage.machine);
    Ok(run)
}

/// Replays a recording so many times, each time in a new space, in so many loops at once on one machine; each loop keeps
/// its files cached. Returns how long each round took, and all of them.
pub fn repeat(
    recording: &Checked,
    options: &Options,
    rounds: u32,
    loops: u16,
) -> Result<(Vec<Duration>, Duration), ReplayError> {
    let machine = options.machine(loops as usize * (options.cpus + 1));
    let mut open = recording.open()?;
    let mut events = Vec::new();
    while let Some(event) = open.next_event()? {
        events.push(event);
    }
    let program = &open.header().program;
    let one_loop = || {
        let mut stage = Stage { machine, files: Files::default() };
        let round = |_| {
            let start = Instant::now();
            let events = events.iter().map(|(process, event)| Ok((*process, event)));
            stage.perform(options, program, events, &ProgressBar::hidden())?;
            Ok(start.elapsed())
        };
        (0..rounds).map(round).collect::<Result<Vec<_>, ReplayError>>()
    };
    let start = Instant::now();
    let all = std::thread::scope(|scope| {
        let loops: Vec<_> = (0..loops).map(|_| scope.spawn(one_loop)).collect();
        // A loop ends early only when the machine panicked; that is passed on.
        let ended = loops.into_iter().map(|l| l.join().unwrap_or_else(|why| std::panic::resume_unwind(why)));
        ended.collect::<Result<Vec<_>, _>>()
    })?;
    Ok((all.concat(), start.elapsed()))
}

/// A machine, and the files that it has.
struct Stage {
    machine: &'static Machine,
    files: Files,
}

/// Files, and the parts of them that were brought into the cache.
#[derive(Default)]
struct Files {
    open: HashMap<FileId, File>,
    warmed: HashSet<(FileId, u64, u64)>,
}

impl Stage {
    /// Performs the events of a recording of this program, in spaces that are gone when this returns.
    fn perform(
        &mut self,
        options: &Options,
        program: &str,
        mut events: impl Iterator<Item = Result<(ProcessId, impl Borrow<Event>), FormatError>>,
        bar: &ProgressBar,
    ) -> Result<Run, ReplayError> {
        let out = |event| move |NoMemory| ReplayError::NoMemory { event, memory: options.memory };
        let (machine, start) = (self.machine, Instant::now());
        let first = Process::new(machine, options, ProcessId(0), program).map_err(out(0))?;
        let mut engine = Engine {
            machine,
            options,
            now: first,
            others: HashMap::new(),
            files: &mut self.files,
            run: Run::new(options.name),
        };
        std::thread::scope(|scope| {
            let mut crew = Crew::new(scope, machine, &engine.now.space, options.cpus);
            let mut n = 0;
            while let Some((process, event)) = events.next().transpose()? {
                if process != engine.now.number {
                    engine.switch(process, &mut crew).map_err(out(n))?;
                }
                let step = match event.borrow() {
                    &Event::Touch { thread, at, access, .. } => {
                        engine.now.touches += 1;
                        let at = engine.address(at);
                        if let Some(touched) = &mut engine.now.touched {
                            touched.mark(at);
                        }
                        crew.touch(thread, at, access)
                    }
                    &Event::Fork { child, .. } => engine.fork(child, &mut crew),
                    Event::Exec { program, .. } => engine.exec(program, &mut crew),
                    Event::End { .. } => engine.end(&mut crew),
                    call => crew.settle().and_then(|()| engine.call(call.clone())),
                };
                step.map_err(out(n))?;
                n += 1;
                if n % 4096 == 0 {
                    bar.set_position(n);
                }
            }
            engine.end_all(&mut crew).map_err(out(n))
        })?;
        let mut run = engine.run;
        run.machine = machine.counts();
        run.time = start.elapsed();
        Ok(run)
    }
}

impl Options {
    fn machine(&self, cpus: usize) -> &'static Machine {
        Machine::new(Config { memory: self.memory, cpus, checks: self.checks, ..Config::default() })
    }

    fn policy(&self, placer: &Placer) -> Policy {
        Policy {
            fault_around: self.fault_around,
            tables: match self.tables {
                Tables::Postponed => TablePolicy::Postponed,
                Tables::Upfront => TablePolicy::Upfront,
                Tables::Linux => TablePolicy::Linux,
            },
            huge: match self.huge {
                Huge::Never => HugePolicy::Never,
                Huge::Advise => HugePolicy::Advise,
                Huge::Always => HugePolicy::Always,
            },
            max_stack: u64::MAX,
            ..placer.policy(Policy::default())
        }
    }
}

impl Run {
    fn new(name: &'static str) -> Self {
        Run {
            name,
            programs: Vec::new(),
            account: Account::default(),
            huge_untouched: 0,
            peak_tables: 0,
            peak_resident: 0,
            first_peak: 0,
            touches: 0,
            refused: (0, 0),
            calls: 0,
            failed: 0,
            first_failed: None,
            machine: Counts::default(),
            left: Held::default(),
            time: Duration::ZERO,
        }
    }
}

/// A process, while it runs one program.
struct Process {
    number: ProcessId,
    program: String,
    space: Arc<Space>,
    placer: Placer,
    /// Where each mapping's reservation starts.
    bases: Vec<u64>,
    /// Kept where there may be huge pages: from the start, or from the first advice on.
    touched: Option<Touched>,
    touches: u64,
    refused: (u64, u64),
    calls: u64,
    failed: u64,
    /// It ended, and what it did is in the run.
    ended: bool,
}

impl Process {
    fn new(
        machine: &'static Machine,
        options: &Options,
        number: ProcessId,
        program: &str,
    ) -> Result<Self, NoMemory> {
        let placer = Placer::new(options.place);
        let space = Arc::new(Space::new(machine, options.policy(&placer))?);
        let touched = (options.huge == Huge::Always).then(Touched::default);
        Ok(Process::running(number, program, space, placer, Vec::new(), touched))
    }
    fn running(
        number: ProcessId,
        program: &str,
        space: Arc<Space>,
        placer: Placer,
        bases: Vec<u64>,
        touched: Option<Touched>,
    ) -> Self {
        let program = program.to_owned();
        let (touches, refused, calls, failed) = (0, (0, 0), 0, 0);
        Process {
            number,
            program,
            space,
            placer,
            bases,
            touched,
            touches,
            refused,
            calls,
            failed,
            ended: false,
        }
    }
    /// A copy of it.
    fn fork(&self, number: ProcessId) -> Result<Self, NoMemory> {
        // Of all the reasons that a mapping call may fail for, this one has no other.
        let space = Arc::new(self.space.fork().map_err(|_| NoMemory)?);
        let (placer, bases, touched) = (self.placer.clone(), self.bases.clone(), self.touched.clone());
        Ok(Process::running(number, &self.program, space, placer, bases, touched))
    }
}

struct Engine<'s> {
    machine: &'static Machine,
    options: &'s Options,
    /// The process whose events these are, and all others that live.
    now: Process,
    others: HashMap<ProcessId, Process>,
    files: &'s mut Files,
    run: Run,
}

impl Engine<'_> {
    /// Goes on with another process.
    fn switch(&mut self, to: ProcessId, crew: &mut Crew) -> Result<(), NoMemory> {
        self.settle(crew)?;
        let next = match self.others.remove(&to) {
            Some(process) => process,
            // The reader sees to it that nobody acts before it is made.
            None => Process::new(self.machine, self.options, to, "")?,
        };
        crew.switch_to(&next.space);
        let before = std::mem::replace(&mut self.now, next);
        if !before.ended {
            self.others.insert(before.number, before);
        }
        Ok(())
    }
    fn settle(&mut self, crew: &mut Crew) -> Result<(), NoMemory> {
        crew.settle()?;
        let (segv, bus) = crew.take_refused();
        self.now.refused = (self.now.refused.0 + segv, self.now.refused.1 + bus);
        Ok(())
    }
    fn fork(&mut self, child: ProcessId, crew: &mut Crew) -> Result<(), NoMemory> {
        self.settle(crew)?;
        self.others.insert(child, self.now.fork(child)?);
        Ok(())
    }
    fn exec(&mut self, program: &str, crew: &mut Crew) -> Result<(), NoMemory> {
        self.end(crew)?;
        let next = Process::new(self.machine, self.options, self.now.number, program)?;
        crew.switch_to(&next.space);
        self.now = next;
        Ok(())
    }
    /// The process ends, or its program.
    fn end(&mut self, crew: &mut Crew) -> Result<(), NoMemory> {
        self.settle(crew)?;
        self.sample();
        let now = &mut self.now;
        now.ended = true;
        let account = now.space.account();
        if now.number == ProcessId(0) {
            self.run.account = account;
            let touched = now.touched.as_ref().map(|touched| touched.of_huge_pages(&now.space));
            self.run.huge_untouched = touched.map_or(0, |touched| account.huge_bytes.saturating_sub(touched));
        }
        let run = &mut self.run;
        run.touches += now.touches;
        run.refused = (run.refused.0 + now.refused.0, run.refused.1 + now.refused.1);
        run.calls += now.calls;
        run.failed += now.failed;
        run.programs.push(Program {
            process: now.number,
            name: now.program.clone(),
            touches: now.touches,
            refused: now.refused,
            calls: now.calls,
            failed: now.failed,
            account,
        });
        Ok(())
    }
    /// The recording ends, and whoever lives yet.
    fn end_all(&mut self, crew: &mut Crew) -> Result<(), NoMemory> {
        loop {
            if !self.now.ended {
                self.end(crew)?;
            }
            let Some(next) = self.others.keys().min().copied() else { return Ok(()) };
            self.switch(next, crew)?;
        }
    }
}

fn rights(prot: Prot) -> Rights {
    let mut rights = Rights::empty();
    rights.set(Rights::READ, prot.read);
    rights.set(Rights::WRITE, prot.write);
    rights.set(Rights::EXEC, prot.execute);
    rights
}

impl Engine<'_> {
    fn address(&self, at: Address) -> VirtAddr {
        VirtAddr(self.now.bases.get(at.mapping.0 as usize).copied().unwrap_or(0).wrapping_add(at.offset))
    }

    /// Resident set and tables only grow between calls: looked at before each call that may shrink them and at the end,
    /// the peaks are exact.
    fn sample(&mut self) {
        let tables = |p: &Process| p.space.page_table().table_bytes().iter().sum::<u64>();
        let all = || std::iter::once(&self.now).chain(self.others.values());
        let (tables, resident) =
            (all().map(tables).sum(), all().map(|process| process.space.resident_bytes()).sum());
        self.run.peak_tables = self.run.peak_tables.max(tables);
        self.run.peak_resident = self.run.peak_resident.max(resident);
        if self.now.number == ProcessId(0) {
            self.run.first_peak = self.run.first_peak.max(self.now.space.resident_bytes());
        }
    }

    fn call(&mut self, event: Event) -> Result<(), NoMemory> {
        let what = event.clone();
        let done = match event {
            // One that an earlier round has left as it was is taken again.
            Event::File(info) if self.files.open.get(&info.number).is_some_and(|f| f.size() == info.size) => {
                Ok(())
            }
            Event::File(info) => {
                let file = FileCache::new(self.machine, MachineFile::zeros(), info.size)?;
                self.files.open.insert(info.number, file);
                self.files.warmed.retain(|(number, ..)| *number != info.number);
                Ok(())
            }
            Event::FileSize { file, size } => {
                if let Some(file) = self.files.open.get(&file) {
                    file.set_size(self.machine, size);
                }
                Ok(())
            }
            // Processes were seen to before.
            Event::ThreadStart { .. }
            | Event::ThreadExit { .. }
            | Event::Stray { .. }
            | Event::Touch { .. }
            | Event::Fork { .. }
            | Event::Exec { .. }
            | Event::End { .. } => Ok(()),
            call => {
                if may_shrink(&call) {
                    self.sample();
                }
                self.now.calls += 1;
                self.perform(call)
            }
        };
        match done {
            Ok(()) => Ok(()),
            Err(Failed::Map(MapError::NoMemory)) => Err(NoMemory),
            Err(why) => {
                self.now.failed += 1;
                self.run.first_failed.get_or_insert_with(|| format!("{what:?}: {why}"));
                Ok(())
            }
        }
    }

    fn perform(&mut self, event: Event) -> Result<(), Failed> {
        match event {
            Event::Map(map) => self.map(&map)?,
            Event::Unmap { at, len, .. } => {
                self.now.space.unmap(self.address(at), len)?;
                self.forget(self.address(at), len);
            }
            Event::Protect { at, len, prot, .. } => {
                self.now.space.protect(self.address(at), len, rights(prot))?
            }
            Event::Remap { old_len: 0, .. } => {
                return Err(Failed::Unknown("a second mapping of the same pages"));
            }
            Event::Remap { from, old_len, new_len, id, recorded, keep, moved, .. } => {
                let from = self.address(from);
                let to = match self.now.placer.is_recorded() && moved {
                    true => RemapTo::Fixed(VirtAddr(recorded)),
                    false => RemapTo::Anywhere,
                };
                let at = self.now.space.remap(from, old_len, new_len, to)?;
                self.born(id, at.0);
                if let Some(touched) = &mut self.now.touched {
                    touched.shift(from, old_len.min(new_len), at);
                }
                if keep && at != from {
                    let map = Mapping::anonymous(old_len, Rights::READ | Rights::WRITE);
                    self.now.space.map(Mapping { place: At::Fixed(from), ..map })?;
                }
            }
            Event::Advise { at, len, advice: Advice::DontNeed, .. } => {
                self.now.space.discard(self.address(at), len)?;
                self.forget(self.address(at), len);
            }
            Event::Advise { at, len, advice: Advice::Huge, .. } => {
                self.now.space.advise(self.address(at), len, Told::Huge)?;
                if self.options.huge == Huge::Advise {
                    self.now.touched.get_or_insert_default();
                }
            }
            Event::Advise { at, len, advice: Advice::NoHuge, .. } => {
                self.now.space.advise(self.address(at), len, Told::NoHuge)?
            }
            // Other advice may be ignored; MADV_FREE is as good as ignored while memory is not short.
            Event::Advise { .. } => {}
            Event::Brk { heap, new, .. } => {
                let start = self.address(Address { mapping: heap, offset: 0 });
                self.now.space.brk(VirtAddr(start.0 + new))?;
            }
            _ => {}
        }
        Ok(())
    }

    fn forget(&mut self, at: VirtAddr, len: u64) {
        if let Some(touched) = &mut self.now.touched {
            touched.forget(at, len);
        }
    }

    fn born(&mut self, id: MappingId, base: u64) {
        let i = id.0 as usize;
        if self.now.bases.len() <= i {
            self.now.bases.resize(i + 1, 0);
        }
        self.now.bases[i] = base;
    }

    fn map(&mut self, map: &Map) -> Result<(), Failed> {
        let base = match map.place {
            Place::At(at) => Some(self.address(at).0),
            _ => match self.now.placer.reservation(map) {
                Some(base) => Some(base),
                None if map.reserve > map.len => {
                    // A place large enough for what comes beside it later.
                    let whole = Mapping::anonymous(map.reserve, Rights::empty());
                    let range = self.now.space.map(whole)?.range;
                    self.now.space.unmap(range.start, range.len())?;
                    Some(range.start.0)
                }
                None => None,
            },
        };
        if map.kind == MapKind::Heap {
            let base = base.unwrap_or(0);
            self.born(map.id, base);
            return Ok(self.now.space.set_heap(VirtAddr(base))?);
        }
        let start = base.map(|b| if map.grows_down { b + map.reserve - map.len } else { b });
        let mut flags = VmaFlags::empty();
        flags.set(VmaFlags::SHARED, map.shared);
        flags.set(VmaFlags::GROWS_DOWN, map.grows_down);
        let backing = match map.backing {
            Backing::File { file: number, offset } => {
                let file =
                    self.files.open.get(&number).ok_or(Failed::Unknown("a file that was not named"))?.clone();
                if self.files.warmed.insert((number, offset, map.len)) {
                    warm(self.machine, &file, offset, map.len);
                }
                Shows::File { file, first: offset / PAGE_SIZE }
            }
            Backing::Anonymous if map.shared => {
                let file =
                    FileCache::new(self.machine, MachineFile::zeros(), map.len).map_err(MapError::from)?;
                Shows::File { file, first: 0 }
            }
            Backing::Anonymous => Shows::Anonymous,
        };
        let mapped = self.now.space.map(Mapping {
            len: map.len,
            prot: rights(map.prot),
            flags,
            backing,
            place: start.map_or(At::Anywhere, fixed),
            populate: map.populate,
        })?;
        let short =
            matches!(mapped.unpopulated, Some(Unpopulated { why: Why::Error(FaultError::NoMemory), .. }));
        let range = mapped.range;
        self.forget(range.start, range.len());
        if short {
            return Err(Failed::Map(MapError::NoMemory));
        }
        if !matches!(map.place, Place::At(_)) {
            let start = range.start.0;
            self.born(map.id, if map.grows_down { start + map.len - map.reserve } else { start });
        }
        Ok(())
    }
}

/// Whether a call takes away what is mapped.
fn may_shrink(call: &Event) -> bool {
    match call {
        Event::Map(map) => matches!(map.place, Place::At(_)),
        Event::Protect { .. } => false,
        Event::Advise { advice, .. } => *advice == Advice::DontNeed,
        Event::Brk { old, new, .. } => new < old,
        _ => true,
    }
}

/// Brings what is mapped of a file into the cache, as it is on a machine that ran the program before.
fn warm(machine: &'static Machine, file: &File, offset: u64, len: u64) {
    let end = file.size().min(offset.saturating_add(len));
    let mut at = offset;
    while at < end {
        // What cannot be had now will be asked for by a fault.
        if file.read_at(machine, at, &mut [0]).is_err() {
            return;
        }
        at += PAGE_SIZE;
    }
}

/// Why a call of the recording was not performed.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("{0} cannot be replayed")]
    Unknown(&'static str),
}
