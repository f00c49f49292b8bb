//! Performs a recording's events.
//!
//! Touches run on vCPUs, so that faults happen where the library's policies make them happen; calls run between
//! touches. With several vCPUs the recorded threads are dealt out to them, each thread's touches stay in order, and
//! every call waits for the touches before it.

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
    Address, Advice, Backing, Event, FileId, FormatError, Map, MapKind, MappingId, Place, Prot,
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

/// What a replay came to.
pub struct Run {
    /// What this way of replaying is called.
    pub name: &'static str,
    /// What the space held at the end.
    pub account: Account,
    /// Bytes of huge pages mapped at the end that were never touched.
    pub huge_untouched: u64,
    /// The most bytes of tables at one time.
    pub peak_tables: u64,
    /// The largest resident set, in bytes.
    pub peak_resident: u64,
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
    let events = std::iter::from_fn(|| recording.next_event().map(|e| e.map(|(_, event)| event)).transpose());
    let mut run = stage.perform(options, events, bar)?;
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
    while let Some((_, event)) = open.next_event()? {
        events.push(event);
    }
    let one_loop = || {
        let mut stage = Stage { machine, files: Files::default() };
        let round = |_| {
            let start = Instant::now();
            stage.perform(options, events.iter().map(Ok), &ProgressBar::hidden())?;
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
    /// Performs events in a space of their own, which is gone when this returns.
    fn perform(
        &mut self,
        options: &Options,
        mut events: impl Iterator<Item = Result<impl Borrow<Event>, FormatError>>,
        bar: &ProgressBar,
    ) -> Result<Run, ReplayError> {
        let out = |event| move |NoMemory| ReplayError::NoMemory { event, memory: options.memory };
        let (machine, start) = (self.machine, Instant::now());
        let placer = Placer::new(options.place);
        let policy = options.policy(&placer);
        let space = Arc::new(Space::new(machine, policy).map_err(out(0))?);
        let mut engine = Engine {
            machine,
            space: space.clone(),
            placer,
            bases: Vec::new(),
            files: &mut self.files,
            touched: (options.huge == Huge::Always).then(Touched::default),
            advised: options.huge == Huge::Advise,
            run: Run::new(options.name),
        };
        std::thread::scope(|scope| {
            let mut crew = Crew::new(scope, machine, &space, options.cpus);
            let mut n = 0;
            while let Some(event) = events.next().transpose()? {
                let step = match event.borrow() {
                    &Event::Touch { thread, at, access, .. } => {
                        engine.run.touches += 1;
                        let at = engine.address(at);
                        if let Some(touched) = &mut engine.touched {
                            touched.mark(at);
                        }
                        crew.touch(thread, at, access)
                    }
                    call => crew.settle().and_then(|()| engine.call(call.clone())),
                };
                step.map_err(out(n))?;
                n += 1;
                if n % 4096 == 0 {
                    bar.set_position(n);
                }
            }
            crew.settle().map_err(out(n))?;
            engine.run.refused = crew.refused();
            Ok::<(), ReplayError>(())
        })?;
        engine.sample();
        let mut run = engine.run;
        run.account = space.account();
        if let Some(touched) = &engine.touched {
            run.huge_untouched = run.account.huge_bytes.saturating_sub(touched.of_huge_pages(&space));
        }
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
            account: Account::default(),
            huge_untouched: 0,
            peak_tables: 0,
            peak_resident: 0,
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

struct Engine<'s> {
    machine: &'static Machine,
    space: Arc<Space>,
    placer: Placer,
    /// Where each mapping's reservation starts.
    bases: Vec<u64>,
    files: &'s mut Files,
    /// Kept where there may be huge pages: from the start, or from the first advice on.
    touched: Option<Touched>,
    advised: bool,
    run: Run,
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
        VirtAddr(self.bases.get(at.mapping.0 as usize).copied().unwrap_or(0).wrapping_add(at.offset))
    }

    /// Resident set and tables only grow between calls: looked at before each call that may shrink them and at the end,
    /// the peaks are exact.
    fn sample(&mut self) {
        let tables: u64 = self.space.page_table().table_bytes().iter().sum();
        self.run.peak_tables = self.run.peak_tables.max(tables);
        self.run.peak_resident = self.run.peak_resident.max(self.space.resident_bytes());
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
            // A recording with forks and new programs is refused before.
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
                self.run.calls += 1;
                self.perform(call)
            }
        };
        match done {
            Ok(()) => Ok(()),
            Err(Failed::Map(MapError::NoMemory)) => Err(NoMemory),
            Err(why) => {
                self.run.failed += 1;
                self.run.first_failed.get_or_insert_with(|| format!("{what:?}: {why}"));
                Ok(())
            }
        }
    }

    fn perform(&mut self, event: Event) -> Result<(), Failed> {
        match event {
            Event::Map(map) => self.map(&map)?,
            Event::Unmap { at, len, .. } => {
                self.space.unmap(self.address(at), len)?;
                self.forget(self.address(at), len);
            }
            Event::Protect { at, len, prot, .. } => {
                self.space.protect(self.address(at), len, rights(prot))?
            }
            Event::Remap { old_len: 0, .. } => {
                return Err(Failed::Unknown("a second mapping of the same pages"));
            }
            Event::Remap { from, old_len, new_len, id, recorded, keep, moved, .. } => {
                let from = self.address(from);
                let to = match self.placer.is_recorded() && moved {
                    true => RemapTo::Fixed(VirtAddr(recorded)),
                    false => RemapTo::Anywhere,
                };
                let at = self.space.remap(from, old_len, new_len, to)?;
                self.born(id, at.0);
                if let Some(touched) = &mut self.touched {
                    touched.shift(from, old_len.min(new_len), at);
                }
                if keep && at != from {
                    let map = Mapping::anonymous(old_len, Rights::READ | Rights::WRITE);
                    self.space.map(Mapping { place: At::Fixed(from), ..map })?;
                }
            }
            Event::Advise { at, len, advice: Advice::DontNeed, .. } => {
                self.space.discard(self.address(at), len)?;
                self.forget(self.address(at), len);
            }
            Event::Advise { at, len, advice: Advice::Huge, .. } => {
                self.space.advise(self.address(at), len, Told::Huge)?;
                if self.advised {
                    self.touched.get_or_insert_default();
                }
            }
            Event::Advise { at, len, advice: Advice::NoHuge, .. } => {
                self.space.advise(self.address(at), len, Told::NoHuge)?
            }
            // Other advice may be ignored; MADV_FREE is as good as ignored while memory is not short.
            Event::Advise { .. } => {}
            Event::Brk { heap, new, .. } => {
                let start = self.address(Address { mapping: heap, offset: 0 });
                self.space.brk(VirtAddr(start.0 + new))?;
            }
            _ => {}
        }
        Ok(())
    }

    fn forget(&mut self, at: VirtAddr, len: u64) {
        if let Some(touched) = &mut self.touched {
            touched.forget(at, len);
        }
    }

    fn born(&mut self, id: MappingId, base: u64) {
        let i = id.0 as usize;
        if self.bases.len() <= i {
            self.bases.resize(i + 1, 0);
        }
        self.bases[i] = base;
    }

    fn map(&mut self, map: &Map) -> Result<(), Failed> {
        let base = match map.place {
            Place::At(at) => Some(self.address(at).0),
            _ => match self.placer.reservation(map) {
                Some(base) => Some(base),
                None if map.reserve > map.len => {
                    // A place large enough for what comes beside it later.
                    let whole = Mapping::anonymous(map.reserve, Rights::empty());
                    let range = self.space.map(whole)?.range;
                    self.space.unmap(range.start, range.len())?;
                    Some(range.start.0)
                }
                None => None,
            },
        };
        if map.kind == MapKind::Heap {
            let base = base.unwrap_or(0);
            self.born(map.id, base);
            return Ok(self.space.set_heap(VirtAddr(base))?);
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
        let mapped = self.space.map(Mapping {
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
