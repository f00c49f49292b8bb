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
    /// Bytes of a device, whose frames follow those of memory and are none of the library's. It keeps what is stored there.
    pub device: u64,
    /// Number of CPUs: so many threads can use the library at once.
    pub cpus: usize,
    /// Check the library while it runs: shadow states of frames, poison, translations after each flush. Panics with
    /// the history when something is wrong. On in debug builds unless said otherwise.
    pub checks: bool,
    /// The TLB of each CPU for small pages.
    pub tlb: TlbShape,
    /// The TLB of each CPU for huge pages, one translation for each; without it they are kept in pieces, in `tlb`.
    pub huge_tlb: Option<TlbShape>,
    /// Entries of each level in the paging-structure cache of each CPU; 0 for none (Intel SDM volume 3A, 4.10.3).
    pub walk_cache: usize,
    /// A flush of pages leaves inner entries in the paging-structure cache unless it says that tables went, and a fault
    /// invalidates nothing by itself: RISC-V and AArch64, not x86. See `mmu.rs`.
    pub lean_flush: bool,
    /// Entries that are not present are cached too, in the paging-structure cache: RISC-V without Svvptc (Arm ARM
    /// D8.16.1 and Intel SDM volume 3A, 4.10.2.3, rule it out).
    pub caches_nothing: bool,
    /// Hardware sets accessed and dirty: x86, RISC-V with Svadu, AArch64 with FEAT_HAFDBS. Otherwise it faults where
    /// they are missing (RISC-V Svade), and the library sets them.
    pub sets_accessed: bool,
    /// Instruction fetches see what was stored before: x86. Otherwise a page is to be synchronised before it can be
    /// executed (RISC-V Zifencei; AArch64 unless `CTR_EL0` says DIC and IDC).
    pub fetch_sees_stores: bool,
    /// Now and then, by chance, a CPU answers a shootdown up to so many turns of a waiting loop late, and uses its old
    /// translations until then.
    pub late_shootdown: u32,
    /// Translations of a space stay, by tag, when a CPU leaves it, as with PCIDs; the CPU then stays in the space's
    /// mask. Otherwise leaving a space flushes its tag.
    pub keep_tags: bool,
    /// Where the random numbers for placement and for late shootdowns start.
    pub seed: u64,
    /// So many faults in a row that find nothing to do, for one access, are a livelock (X08): the machine panics.
    pub livelock: u32,
    /// A mistake the machine makes on purpose, to show that the checks notice.
    #[doc(hidden)]
    pub plant: Option<Mistake>,
}

impl Default for Config {
    /// 64 MiB, four CPUs as x86-64 has them; checks in debug builds.
    fn default() -> Self {
        Config {
            memory: 64 << 20,
            device: 0,
            cpus: 4,
            checks: cfg!(debug_assertions),
            tlb: TlbShape::default(),
            huge_tlb: Some(TlbShape { sets: 8, ways: 4 }),
            walk_cache: 16,
            lean_flush: false,
            caches_nothing: false,
            sets_accessed: true,
            fetch_sees_stores: true,
            late_shootdown: 0,
            keep_tags: false,
            seed: 1,
            livelock: 1_000_000,
            plant: None,
        }
    }
}

impl Config {
    /// RISC-V without Svadu and Svvptc: what is not valid is cached, fences take no more than they must, accessed and
    /// dirty are software's, and so is what fetches see. For `Sv39` and `Sv48`.
    pub fn riscv64() -> Self {
        Config { caches_nothing: true, ..Config::aarch64() }
    }

    /// AArch64 without FEAT_HAFDBS: `TLBI` of the last level alone, accessed and dirty are software's, and so is what
    /// fetches see. For `Aarch64`.
    pub fn aarch64() -> Self {
        Config { lean_flush: true, sets_accessed: false, fetch_sees_stores: false, ..Config::default() }
    }

    /// All at once that a manual allows hardware to do to us, with checks: tiny TLBs, lean flushes, cached entries that
    /// are not present, accessed and dirty left to software, fetches that see no stores, tags kept, late shootdowns.
    pub fn harsh(seed: u64) -> Self {
        Config {
            checks: true,
            tlb: TlbShape { sets: 4, ways: 2 },
            huge_tlb: Some(TlbShape { sets: 1, ways: 2 }),
            walk_cache: 4,
            lean_flush: true,
            caches_nothing: true,
            sets_accessed: false,
            fetch_sees_stores: false,
            late_shootdown: 100,
            keep_tags: true,
            seed,
            ..Config::default()
        }
    }
}

/// What the machine can be told to do wrong.
#[doc(hidden)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mistake {
    /// There is no memory at boot.
    BootWithoutMemory,
    /// Shootdowns pass this CPU over.
    SkipCpu(usize),
    /// A CPU that leaves a space keeps its translations without saying so.
    LeaveWithoutFlush,
}
