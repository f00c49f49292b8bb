//! The machine: memory, CPUs, and the library's state embedded in it.

use crate::arena::Arena;
use crate::config::{Config, Mistake};
use crate::counts::{Counters, Counts};
use crate::cpu::CpuSet;
use crate::history::{Event, History};
use crate::lock::Mostly;
use crate::mmu::Mmu;
use crate::refuse::{Refusals, Refuse};
use crate::shadow::Shadow;
use crate::sync::Mutex;
use crossbeam_utils::CachePadded;
use pagefirst::arch::{Format, X86_64};
use pagefirst::frame::Frame;
use pagefirst::limit::Limit;
use pagefirst::mem::Shared;
use pagefirst::platform::MAX_CPUS;
use pagefirst::types::Pfn;
use pagefirst::{Held, Local, Vm};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{OnceLock, PoisonError};

/// One CPU: what it has cached, its counters.
pub(crate) struct Cpu {
    pub mmu: Mostly<Mmu>,
    /// A [`Vcpu`](crate::Vcpu) of it lives.
    pub running: AtomicBool,
    pub counters: Counters,
}

/// What a CPU panics with that stops because another has: who tells of panics waits for that one's.
pub const GAVE_UP: &str = "another CPU of the machine has found a mistake, or its test has given up";

type LimitOf<F> = Shared<Machine<F>, Limit<Machine<F>>>;

/// A machine with page tables of format `F`, on which pagefirst runs: [`Platform`](pagefirst::platform::Platform).
///
/// Threads are its CPUs: the first use of the machine makes a thread a CPU until the thread ends.
pub struct Machine<F: Format = X86_64> {
    pub(crate) config: Config,
    pub(crate) arena: Arena,
    pub(crate) vm: Vm<Machine<F>>,
    pub(crate) locals: Box<[Local<Machine<F>>]>,
    pub(crate) cpus: Box<[CachePadded<Cpu>]>,
    /// By CPU, whom what the files' reads and writes bring in is charged to.
    pub(crate) limits: Box<[Mutex<Option<LimitOf<F>>>]>,
    pub(crate) refusals: Refusals,
    pub(crate) set: CpuSet,
    pub(crate) random: AtomicU64,
    /// As `random`, for how late shootdowns arrive.
    pub(crate) lateness: AtomicU64,
    pub(crate) shadow: Option<Shadow>,
    pub(crate) history: History,
    /// Counts shootdowns, so that a translation can be older than one.
    pub(crate) clock: AtomicU64,
    /// What interrupts do that a test has made come.
    pub(crate) interrupt: OnceLock<Interrupt>,
    failed: AtomicBool,
}

/// All machines, of whatever format, which live for ever: what nobody leads to is a leak, to Miri.
static MACHINES: std::sync::Mutex<Vec<&(dyn Send + Sync)>> = std::sync::Mutex::new(Vec::new());

/// What an interrupt does.
pub(crate) type Interrupt = Box<dyn Fn() + Send + Sync>;

impl<F: Format> Machine<F> {
    /// Builds a machine. It lives as long as the program.
    ///
    /// # Panics
    /// When the configuration makes no sense, the host has no memory, or the machine's memory is too small to boot.
    pub fn new(config: Config) -> &'static Self {
        assert!((1..=MAX_CPUS).contains(&config.cpus), "a machine has 1 to {MAX_CPUS} CPUs");
        let arena = Arena::new(config.memory, config.device);
        let shadow = config.checks.then(|| Shadow::new(&arena));
        let mapped = shadow.as_ref().map(|s| s.mapped);
        let cpu = |_| {
            CachePadded::new(Cpu {
                mmu: Mostly::new(Mmu::new(&config, F::BITS, mapped)),
                running: AtomicBool::new(false),
                counters: Counters::default(),
            })
        };
        let machine: &'static Self = Box::leak(Box::new(Machine {
            arena,
            vm: Vm::new(),
            locals: (0..config.cpus).map(|_| Local::new()).collect(),
            cpus: (0..config.cpus).map(cpu).collect(),
            limits: (0..config.cpus).map(|_| Mutex::default()).collect(),
            refusals: Refusals::default(),
            set: CpuSet::new(config.cpus),
            random: AtomicU64::new(config.seed),
            lateness: AtomicU64::new(config.seed),
            shadow,
            history: History::new(),
            clock: AtomicU64::new(1),
            interrupt: OnceLock::new(),
            failed: AtomicBool::new(false),
            config,
        }));
        MACHINES.lock().unwrap_or_else(PoisonError::into_inner).push(machine);
        let boot = || machine.vm.init(machine, &[machine.arena.region()]);
        let booted = match machine.config.plant {
            Some(Mistake::BootWithoutMemory) => machine.refusing(Refuse::One(0), boot).0,
            _ => boot(),
        };
        assert!(booted.is_ok(), "{} bytes of memory are too few to boot", config.memory);
        machine.release_cpu();
        machine
    }

    /// The library's state.
    pub fn vm(&'static self) -> &'static Vm<Machine<F>> {
        &self.vm
    }

    /// What the machine was built from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Charges what this CPU's reads and writes of files bring in to a limit, or to none.
    pub fn charge_to(&'static self, limit: Option<LimitOf<F>>) {
        *self.limits[self.this_cpu()].lock() = limit;
    }

    /// Gives up the CPU number of this thread, which it would otherwise keep until it ends.
    ///
    /// Not to be called while a [`Vcpu`](crate::Vcpu) of this thread lives.
    pub fn release_cpu(&'static self) {
        self.set.release();
    }

    /// What happened until now, on all CPUs.
    pub fn counts(&self) -> Counts {
        let mut sum = Counts::default();
        for cpu in &self.cpus {
            cpu.counters.add_to(&mut sum);
        }
        sum
    }

    /// Takes free frames until `n` are left, so that a test can see what happens when memory runs out. They come
    /// back when the result is dropped. What the library could still drain is drained first.
    pub fn leave_free(&'static self, n: u64) -> Vec<Frame<Machine<F>>> {
        self.vm.drain(self);
        let mut taken = Vec::new();
        while self.free_frames() > n {
            let Ok(frame) = Frame::new(self) else { break };
            taken.push(frame);
        }
        taken
    }

    /// Frames that nobody owns, in the allocator and in the CPUs' caches.
    pub fn free_frames(&'static self) -> u64 {
        self.vm.frames.free_frames() + self.vm.held(self).cached_frames
    }

    /// What is left when every space and file is gone: after [`Vm::quiesce`] nothing but the zero page.
    ///
    /// # Errors
    /// What the library says it still holds, and what the machine counted, when that is more.
    pub fn nothing_left(&'static self) -> Result<(), String> {
        self.vm.quiesce(self);
        let (held, counts) = (self.vm.held(self), self.counts());
        let library = Held { frames: 1, ..Held::default() };
        let (frames, tables) = (counts.live_frames(), counts.live_tables());
        let in_use = self.shadow.as_ref().map_or((1, 0), Shadow::in_use);
        if held == library && (frames, tables) == (1, 0) && in_use == (1, 0) {
            return Ok(());
        }
        Err(format!(
            "left behind: the library says {held:?}; counted {frames} frames, {tables} tables; \
             in use {in_use:?} (frames, tables); expected the zero page alone"
        ))
    }

    #[inline]
    pub(crate) fn this_cpu(&'static self) -> usize {
        self.set.current()
    }

    /// Adds to the history, when the machine checks.
    #[inline]
    pub(crate) fn record(&'static self, event: Event) {
        if self.shadow.is_some() {
            self.history.push(self.this_cpu(), event);
        }
    }

    /// Ends the program's test with the history.
    #[cold]
    pub(crate) fn fail(&self, what: &str) -> ! {
        self.failed.store(true, SeqCst);
        panic!("the machine found a mistake: {what}\n{}", self.history);
    }

    /// Who translates to this frame, in words.
    pub(crate) fn translations_to(&self, pfn: Pfn) -> String {
        let lines = self.cpus.iter().enumerate().filter_map(|(cpu, state)| {
            state.mmu.lock().leads_to(pfn).map(|how| format!("\nCPU {cpu} {how}"))
        });
        lines.collect()
    }

    /// Makes every CPU panic the next time it waits. For a test that fails in the middle of a call: what its other
    /// CPUs wait for would never come.
    pub fn give_up(&self) {
        self.failed.store(true, SeqCst);
    }

    /// Panics when `check` found something.
    #[inline]
    pub(crate) fn require(&self, check: Result<(), String>) {
        if let Err(what) = check {
            self.fail(&what);
        }
    }

    /// When another CPU has found a mistake, this one stops as well: nothing it waits for would come.
    #[inline]
    pub(crate) fn stop_if_failed(&self) {
        if self.failed.load(Relaxed) && !std::thread::panicking() {
            panic!("{GAVE_UP}");
        }
    }
}
