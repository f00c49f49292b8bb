//! What a machine is built from.

/// How many translations a vCPU keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TlbShape {
    /// Number of sets, a power of two.
    pub sets: usize,
    /// Translations in a set; the least recently used gives way.
    pub ways: usize,
}

impl Default for TlbShape {
    /// 1,536 translations in 128 sets, the second-level TLB of many x86 CPUs.
    fn default() -> Self {
        TlbShape { sets: 128, ways: 12 }
    }
}

/// What a machine is built from.
///
/// ```
/// use pagefirst_machine::{Config, Machine};
/// let machine: &Machine = Machine::new(Config { memory: 8 << 20, cpus: 2, ..Config::default() });
/// assert_eq!(machine.counts().live_tables(), 0);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Physical memory in bytes, at least 16 KiB. The host commits it as it is touched.
    pub memory: u64,
    /// Number of CPUs: so many threads can use the library at once.
    pub cpus: usize,
    /// Check the library while it runs: shadow states of frames, poison, translations after each flush. Panics with
    /// the history when something is wrong. On in debug builds unless said otherwise.
    pub checks: bool,
    /// The TLB of each CPU.
    pub tlb: TlbShape,
    /// Translations of a space stay, by tag, when a CPU leaves it, as with PCIDs; the CPU then stays in the space's
    /// mask. Otherwise leaving a space flushes its tag.
    pub keep_tags: bool,
    /// Where the random numbers for placement start.
    pub seed: u64,
    /// So many faults in a row that find nothing to do, for one access, are a livelock (X08): the machine panics.
    pub livelock: u32,
    /// A mistake the machine makes on purpose, to show that the checks notice.
    #[doc(hidden)]
    pub plant: Option<Mistake>,
}

impl Default for Config {
    /// 64 MiB, four CPUs; checks in debug builds.
    fn default() -> Self {
        Config {
            memory: 64 << 20,
            cpus: 4,
            checks: cfg!(debug_assertions),
            tlb: TlbShape::default(),
            keep_tags: false,
            seed: 1,
            livelock: 1_000_000,
            plant: None,
        }
    }
}

/// What the machine can be told to do wrong.
#[doc(hidden)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mistake {
    /// Shootdowns pass this CPU over.
    SkipCpu(usize),
    /// A CPU that leaves a space keeps its translations without saying so.
    LeaveWithoutFlush,
}
