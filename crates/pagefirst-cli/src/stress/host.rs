//! The embedded machine as the place where the stress runs.

use pagefirst::fault::FaultError;
use pagefirst::file::{Direct, ShmemHuge};
use pagefirst::frame::FrameFlags;
use pagefirst::limit::Limit;
use pagefirst::mem::Shared;
use pagefirst::platform::Platform;
use pagefirst::space::{AddressSpace, MemoryType};
use pagefirst::types::{Pfn, VirtAddr};
use pagefirst_machine::{Late, Machine, MachineFile, Vcpu};
use pagefirst_stress::{FileKind, FileOf, Host, Quiet};
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

/// The machine, and what whoever watches the time asks for.
pub struct Bench {
    machine: &'static Machine,
    pub quiet: AtomicBool,
    pub over: AtomicBool,
}

impl Bench {
    /// Files with a thread of their own.
    pub const LATE_FILES: usize = 2;

    /// Threads of the machine are interrupted by chance from now on, also in the middle of what the library does: the host
    /// does that too seldom for others to come between.
    pub fn new(machine: &'static Machine) -> Self {
        machine.hook_interrupt(interrupt);
        Bench { machine, quiet: AtomicBool::new(false), over: AtomicBool::new(false) }
    }

    /// Waits until nothing is being read or stored.
    pub fn settle(&self, files: &[FileOf<Self>]) {
        while files
            .iter()
            .any(|file| !file.file().pending().is_empty() || file.storing(self.machine).is_some())
        {
            self.machine.relax();
        }
    }
}

/// At each note of the library: mostly nothing, now and then others come first, seldom they get far.
fn interrupt() {
    thread_local!(static NEXT: Cell<u32> = const { Cell::new(1) });
    // Xorshift (Marsaglia, 2003).
    let mut n = NEXT.get() ^ NEXT.get() << 13;
    n ^= n >> 17;
    n ^= n << 5;
    NEXT.set(n);
    match n % 4096 {
        0 => std::thread::sleep(Duration::from_micros(50)),
        1..64 => std::thread::yield_now(),
        _ => {}
    }
}

/// How late files answer at most.
const LATE: Late = Late::Within(Duration::from_micros(300));

impl Host for Bench {
    type Platform = Machine;
    type Space = Arc<AddressSpace<Machine>>;
    type Cpu = Cpu;

    fn platform(&self) -> &'static Machine {
        self.machine
    }
    fn share(&self, space: AddressSpace<Machine>) -> Self::Space {
        Arc::new(space)
    }
    fn file(&self, kind: FileKind) -> MachineFile {
        match kind {
            FileKind::Still => MachineFile::zeros().with_tracking(true).with_read_ahead(8).late(LATE),
            FileKind::Moving => MachineFile::zeros().late(LATE).late_writes(),
            FileKind::Memory => MachineFile::shmem(ShmemHuge::Never).with_folios(4),
            FileKind::Huge => MachineFile::shmem(ShmemHuge::Always),
        }
    }
    fn direct_file(&self, first: Pfn, pages: u64) -> MachineFile {
        let direct = Direct { index: 0, pages, first, memory: MemoryType::Normal };
        MachineFile::zeros().with_tracking(true).placed(move |_, _| Ok(direct))
    }
    fn charge_to(&self, limit: Option<&Shared<Machine, Limit<Machine>>>) {
        self.machine.charge_to(limit.cloned());
    }
    fn is_quiet_due(&self) -> bool {
        self.quiet.swap(false, Relaxed)
    }
    fn is_over(&self) -> bool {
        self.over.load(Relaxed)
    }

    /// Every space's tables against what the library says and CPUs have cached; each page's mappings, in all spaces; frames
    /// and tables against what the machine counted; charges against pages.
    fn inspect(&self, quiet: Quiet<'_, Self>) {
        let machine = self.machine;
        self.settle(quiet.files);
        machine.vm().quiesce(machine);
        let mut maps: HashMap<Pfn, u32> = HashMap::new();
        for space in quiet.spaces.into_iter().flatten() {
            for (pfn, n) in machine.check_space(space).frames {
                *maps.entry(pfn).or_default() += n;
            }
        }
        let mut private = 0;
        for (pfn, n) in maps {
            let meta = machine.meta(pfn);
            if meta.flags().contains(FrameFlags::ZERO) {
                continue;
            }
            let counts = meta.counts();
            assert_eq!(counts.maps, n, "mappings of {pfn:?}: counted, and found in all spaces");
            if meta.flags().contains(FrameFlags::ANON) {
                private += 1 << meta.order();
            }
        }
        let of_files: u64 = quiet.files.iter().map(|file| file.pages()).sum();
        assert_eq!(
            quiet.limit.charged(),
            private + of_files,
            "pages charged, and found: {private} private, {of_files} of files"
        );
        let (held, counts) = (machine.vm().held(machine), machine.counts());
        assert_eq!(
            (held.frames, held.tables),
            (counts.live_frames(), counts.live_tables()),
            "frames and tables: the library says, and the machine counted"
        );
    }
}

/// A CPU of the machine.
pub struct Cpu(pub Vcpu);

impl pagefirst_stress::Cpu<Bench> for Cpu {
    fn enter(&mut self, space: &Arc<AddressSpace<Machine>>) {
        self.0.switch_to(space);
    }
    fn leave(&mut self) {
        self.0.leave();
    }
    fn load(&mut self, at: VirtAddr) -> Result<u64, FaultError> {
        self.0.load_u64(at).map_err(|trap| trap.error)
    }
    fn store(&mut self, at: VirtAddr, word: u64) -> Result<(), FaultError> {
        self.0.store_u64(at, word).map_err(|trap| trap.error)
    }
}
