//! Performs a recording's events.
//!
//! Touches run on vCPUs, so that faults happen where the library's policies make them happen; calls run between
//! touches. With several vCPUs the recorded threads are dealt out to them, each thread's touches stay in order, and
//! every call waits for the touches before it.
//!
//! Each process has a space of its own: its parent's fork, or an empty one when it executes a program. (So has a child that
//! would have its parent's memory on Linux, `vfork`: the emulator copied it as well.) One process runs at a time, in the
//! order of the recording.

mod calls;
mod processes;

use super::crew::Crew;
use super::place::Placer;
use super::touched::Touched;
use super::{Checked, Huge, Placement, Tables};
use indicatif::ProgressBar;
use pagefirst::Held;
use pagefirst::account::Account;
use pagefirst::file::FileCache;
use pagefirst::mem::Shared;
use pagefirst::policy::{FaultAround, HugePolicy, Policy, TablePolicy};
use pagefirst::space::AddressSpace;
use pagefirst::types::NoMemory;
use pagefirst_machine::{Config, Counts, Machine};
use pagefirst_record::{Event, FileId, FormatError, ProcessId};
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

struct Engine<'s> {
    machine: &'static Machine,
    options: &'s Options,
    /// The process whose events these are, and all others that live.
    now: Process,
    others: HashMap<ProcessId, Process>,
    files: &'s mut Files,
    run: Run,
}
