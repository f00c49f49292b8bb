//! The stress (`crates/pagefirst-stress`) on the real MMU: both CPUs work in the kernel and touch user memory from there, as
//! instructions do, with interrupts on meanwhile.

use crate::platform::{Kernel, kernel};
use crate::program::{File, Task};
use crate::{cpu::boot_root, println};
use core::arch::global_asm;
use core::ops::Deref;
use core::ptr::{from_ref, null_mut};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering::*};
use pagefirst::arch::{Attrs, Format};
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::file::Direct;
use pagefirst::frame::{FrameFlags, head_of};
use pagefirst::platform::Platform;
use pagefirst::space::{AddressSpace, MemoryType};
use pagefirst::types::{Pfn, VirtAddr};
use pagefirst::{limit::Limit, mem::Shared};
use pagefirst_stress::{Board, Config, Cpu, FileKind, Host, Quiet, Stress};
use x86_64::instructions::port::Port;
use x86_64::registers::control::{Cr4, Cr4Flags};

// Each answers 0, or as `refuse` in `trap.rs` says: then it goes on at the last line.
global_asm!(
    "touches: load_word: sti; mov rax, [rdi]; cli; mov [rsi], rax; xor eax, eax; ret",
    "store_word: sti; mov [rdi], rsi; cli; xor eax, eax; ret",
    "refused: cli; ret",
);
unsafe extern "C" {
    fn touches();
    fn load_word(at: u64, to: &mut u64) -> u64;
    fn store_word(at: u64, word: u64) -> u64;
    fn refused();
}

/// Whether this is code that touches user memory.
pub fn touches_there(rip: u64) -> bool {
    (touches as *const () as u64..refused as *const () as u64).contains(&rip)
}

static BOARD: Board = Board::new();
static STRESS: AtomicPtr<Stress<'static, Bench>> = AtomicPtr::new(null_mut());
/// Operations between two quiet points.
const BETWEEN: u64 = 20_000;

/// Runs it on both CPUs for so many seconds.
pub fn run(seed: u64, seconds: u64) {
    let task = Task::load(&[]).expect("memory for files");
    let bench =
        Bench { task, start: clock(), seconds, turns: AtomicU64::new(1), over: AtomicBool::new(false) };
    let config = Config { workers: kernel().running, seed };
    let stress = Stress::new(&bench, &BOARD, config).expect("memory to start with");
    STRESS.store(from_ref(&stress).cast_mut().cast(), Release);
    bench.task.run_on_all();
    let sums = stress.sums();
    println!(
        "stress: {} operations with seed {seed}, {} of them refused, {} short of memory",
        sums.all(),
        sums.refused,
        sums.short
    );
}

/// What a CPU does of it.
pub fn work(number: usize) {
    // SAFETY: `run` waits until both CPUs are back.
    let stress = unsafe { &*STRESS.load(Acquire) };
    kernel().this_cpu().recover.store(refused as *const () as u64, Relaxed);
    // SAFETY: the kernel is to touch user memory, and only where it is meant to.
    unsafe { Cr4::update(|flags| flags.remove(Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION)) };
    stress.work(number, &mut User(number));
    kernel().this_cpu().recover.store(0, Relaxed);
}

/// Seconds of the day (MC146818, registers 0, 2 and 4: binary-coded decimals).
fn clock() -> u64 {
    let read = || {
        let [s, m, h] = [0u8, 2, 4].map(|register| {
            // SAFETY: reading the clock has no effect.
            let bcd: u8 = unsafe {
                Port::new(0x70).write(register);
                Port::new(0x71).read()
            };
            u64::from(bcd >> 4) * 10 + u64::from(bcd & 15)
        });
        (h * 60 + m) * 60 + s
    };
    // It is being updated now and then: what is read twice is right.
    loop {
        let time = read();
        if time == read() {
            return time;
        }
    }
}

struct Bench {
    task: Task,
    start: u64,
    seconds: u64,
    turns: AtomicU64,
    over: AtomicBool,
}

#[rustfmt::skip]
impl Host for Bench {
    type Platform = Kernel;
    type Space = Task;
    type Cpu = User;

    fn platform(&self) -> &'static Kernel { kernel() }
    fn share(&self, space: AddressSpace<Kernel>) -> Task { self.task.with(space) }
    fn file(&self, kind: FileKind) -> File { File::zeros(kind as u64, kind == FileKind::Still, kind == FileKind::Huge) }
    fn direct_file(&self, first: Pfn, pages: u64) -> File { File::direct(Direct { index: 0, pages, first, memory: MemoryType::Normal }) }
    fn charge_to(&self, limit: Option<&Shared<Kernel, Limit<Kernel>>>) { *kernel().this_cpu().limit.lock() = limit.cloned(); }
    fn is_quiet_due(&self) -> bool { self.turns.fetch_add(1, Relaxed).is_multiple_of(BETWEEN) }
    fn is_over(&self) -> bool { self.over.load(Relaxed) }
    fn inspect(&self, quiet: Quiet<'_, Self>) {
        kernel().vm.quiesce(kernel());
        let pages = count_mappings(&quiet);
        let past = (clock() + 86_400 - self.start) % 86_400;
        println!("stress: {past} s, {} operations, {pages} pages mapped", BOARD.sums().all());
        self.over.store(past >= self.seconds, Relaxed);
    }
}

/// How often each page is mapped, by its number in the region.
static MAPPED: [AtomicU32; 1 << 16] = [const { AtomicU32::new(0) }; 1 << 16];

/// Each page counts the mappings that all spaces have of it, and each is charged once; how many are mapped.
fn count_mappings(quiet: &Quiet<'_, Bench>) -> usize {
    let ram = &kernel().ram;
    let mapped = &MAPPED[..ram.frames as usize];
    mapped.iter().for_each(|n| n.store(0, Relaxed));
    for task in quiet.spaces.into_iter().flatten() {
        let table = task.space.page_table();
        visit(table.root_frame(), <Kernel as Platform>::Format::LEVELS - 1, &|page| {
            mapped[(page.0 - ram.first.0) as usize].fetch_add(1, Relaxed);
        });
    }
    let (mut pages, mut private) = (0, 0);
    for (n, i) in mapped.iter().map(|n| n.load(Relaxed)).zip(0..).filter(|(n, _)| *n > 0) {
        let page = ram.first.add(i);
        let meta = kernel().meta(page);
        assert_eq!(meta.counts().maps, n, "violation: mappings of {page:?}, counted and found in all spaces");
        pages += 1;
        if meta.flags().contains(FrameFlags::ANON) {
            private += 1 << meta.order();
        }
    }
    let of_files: u64 = quiet.files.iter().map(|file| file.pages()).sum();
    let charged = quiet.limit.charged();
    assert_eq!(
        charged,
        private + of_files,
        "violation: {private} private pages, {of_files} of files; charged"
    );
    pages
}

/// Tells of each entry for a page that counts its mappings, in a table and those below it, which pages it is one of.
fn visit(table: Pfn, level: u8, see: &impl Fn(Pfn)) {
    type F = <Kernel as Platform>::Format;
    for raw in kernel().cells(table)[..F::user_entries(level)].iter().map(|entry| entry.load(Relaxed)) {
        match F::child(raw, level) {
            Some(child) => visit(child, level - 1, see),
            None => {
                let page = F::frame(raw, level).filter(|_| !F::attrs(raw).contains(Attrs::SPECIAL));
                let head = page.map(|page| head_of(kernel(), page));
                let counts = |head: &Pfn| !kernel().meta(*head).flags().contains(FrameFlags::ZERO);
                head.filter(counts).into_iter().for_each(see);
            }
        }
    }
}

impl Deref for Task {
    type Target = AddressSpace<Kernel>;
    fn deref(&self) -> &AddressSpace<Kernel> {
        &self.space
    }
}

/// User memory, as the CPU of this number sees it.
struct User(usize);

impl User {
    /// Leaves the task that this CPU is in, for one with this root.
    fn change(&self, root: u64, task: *mut Task) {
        let before = kernel().this_cpu().task.swap(task, Relaxed);
        kernel().load_root(root);
        // SAFETY: who enters another task ends this one after that.
        if let Some(before) = unsafe { before.as_ref() } {
            before.space.page_table().deactivate(self.0);
        }
    }
}

impl Cpu<Bench> for User {
    fn enter(&mut self, task: &Task) {
        self.change(task.space.page_table().activate(self.0).phys(), from_ref(task).cast_mut());
    }
    fn leave(&mut self) {
        self.change(boot_root(), null_mut());
    }
    fn load(&mut self, at: VirtAddr) -> Result<u64, FaultError> {
        let mut word = 0;
        // SAFETY: an address of the user's half, which holds nothing of the kernel's.
        why(unsafe { load_word(at.0, &mut word) }).map(|()| word)
    }
    fn store(&mut self, at: VirtAddr, word: u64) -> Result<(), FaultError> {
        // SAFETY: likewise.
        why(unsafe { store_word(at.0, word) })
    }
}

/// What `refuse` in `trap.rs` said.
fn why(code: u64) -> Result<(), FaultError> {
    Err(match code {
        0 => return Ok(()),
        0xb01 => FaultError::Segv(Segv::NotMapped),
        0xb02 => FaultError::Segv(Segv::Access),
        0x702 => FaultError::Bus(Bus::BeyondEnd),
        0x704 => FaultError::Bus(Bus::Poison),
        0x900 => FaultError::NoMemory,
        code => panic!("a fault was refused with {code:#x}"),
    })
}
