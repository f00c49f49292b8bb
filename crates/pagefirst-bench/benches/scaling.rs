//! What two CPUs do at once beside what one does alone: the library's faults, and those of the Linux that this runs on.
//!
//! Each thread stays on a CPU and touches pages of its own, each page the first time. An efficiency is what two did in a
//! second, over twice what one did, in the same round. Time is that on the wall: a CPU that waits is seen. So this is
//! for a machine with nothing else to do; how far its two CPUs are two at all, clearing pages alone says, and how far apart
//! they are, a cache line that goes to and fro.

use pagefirst::fault::{FaultError, Outcome};
use pagefirst::file::FileCache;
use pagefirst::mem::Shared;
use pagefirst::policy::Policy;
use pagefirst::space::{AddressSpace, Backing, Map, Place, VmaFlags};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr};
use pagefirst_bench::{Cpus, measure::median};
use pagefirst_machine::MachineFile;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::fs::File;
use std::hint::spin_loop;
use std::ptr::null_mut;
use std::sync::Mutex;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::Instant;

/// Bytes that a CPU touches of each of its mappings.
const LEN: u64 = 32 << 20;
/// Where mappings begin: a multiple of what any table spans that is not shared by all.
const FIRST: u64 = 0x2000_0000_0000;
/// What lies between two mappings, less than which would merge them: what a leaf table spans.
const GAP: u64 = 2 << 20;
const ROUNDS: usize = 31;
const RW: Prot = Prot::READ.union(Prot::WRITE);

/// What is touched.
struct Case {
    name: &'static str,
    of_file: bool,
    access: Access,
    /// From one touch to the next.
    step: u64,
    /// Mappings of each CPU.
    mappings: u64,
    /// One mapping for both, of which each has its part.
    is_one: bool,
    beside: Beside,
}

/// What the second CPU does.
#[derive(PartialEq)]
enum Beside {
    Same,
    /// It maps a page elsewhere, touches and unmaps it, again and again; what the first one does counts.
    Maps,
    /// The same in another space. This and what follows says what of the above is the space's.
    MapsApart,
    /// It clears pages, again and again.
    Clears,
}

impl Beside {
    /// For those fewer rounds do.
    fn is_control(&self) -> bool {
        matches!(self, Beside::MapsApart | Beside::Clears)
    }
}

const PRIVATE: Case = Case {
    name: "private memory, write",
    of_file: false,
    access: Access::Write,
    step: PAGE_SIZE,
    mappings: 1,
    is_one: false,
    beside: Beside::Same,
};
const READ: Case = Case {
    name: "file, read: 16 pages",
    of_file: true,
    access: Access::Read,
    step: 16 * PAGE_SIZE,
    mappings: 8,
    ..PRIVATE
};
const CASES: [Case; 10] = [
    PRIVATE,
    Case { name: "the same in one mapping", is_one: true, ..PRIVATE },
    READ,
    Case { name: "shared file mapping, write", of_file: true, mappings: 4, ..PRIVATE },
    Case { name: "private memory, write, while the other maps and unmaps", beside: Beside::Maps, ..PRIVATE },
    Case { name: "the same, in another space", beside: Beside::MapsApart, ..PRIVATE },
    Case { name: "private memory, write, while the other clears pages", beside: Beside::Clears, ..PRIVATE },
    Case { name: "file, read, while the other maps and unmaps", beside: Beside::Maps, ..READ },
    Case { name: "the same, in another space", beside: Beside::MapsApart, ..READ },
    Case { name: "file, read, while the other clears pages", beside: Beside::Clears, ..READ },
];

/// Memory in which mappings are made and touched, by two CPUs.
trait Memory: Sync {
    /// Runs `f` as this CPU.
    fn be<R>(&self, _cpu: usize, f: impl FnOnce() -> R) -> R {
        f()
    }
    /// Maps private memory, or the file from its start on.
    fn map(&self, at: u64, len: u64, of_file: bool);
    fn unmap(&self, at: u64, len: u64);
    fn touch(&self, at: u64, access: Access);
}

/// The library, without hardware.
struct Ours {
    platform: &'static Cpus<2>,
    file: Shared<Cpus<2>, FileCache<Cpus<2>>>,
    space: AddressSpace<Cpus<2>>,
}

impl Ours {
    fn new() -> Self {
        let platform: &'static Cpus<2> = Cpus::new(256 << 20);
        platform.be(0, || {
            let file = FileCache::new(platform, MachineFile::zeros(), 2 * LEN).expect("memory");
            for at in (0..2 * LEN).step_by(PAGE_SIZE as usize) {
                assert!(file.read_at(platform, at, &mut [0]).is_ok());
            }
            Ours { platform, file, space: AddressSpace::new(platform, Policy::default()).expect("memory") }
        })
    }
    /// Another space of the same machine.
    fn apart(&self) -> Self {
        let Ours { platform, ref file, .. } = *self;
        platform.be(0, || {
            let space = AddressSpace::new(platform, Policy::default()).expect("memory");
            Ours { platform, file: file.clone(), space }
        })
    }
}

impl Memory for Ours {
    fn be<R>(&self, cpu: usize, f: impl FnOnce() -> R) -> R {
        self.platform.be(cpu, f)
    }
    fn map(&self, at: u64, len: u64, of_file: bool) {
        let anonymous = Map { place: Place::FixedNoReplace(VirtAddr(at)), ..Map::anonymous(len, RW) };
        let map = if of_file {
            let backing = Backing::File { file: self.file.clone(), first: 0 };
            Map { backing, flags: VmaFlags::SHARED, ..anonymous }
        } else {
            anonymous
        };
        self.space.map(map).expect("room");
    }
    fn unmap(&self, at: u64, len: u64) {
        self.space.unmap(VirtAddr(at), len).expect("mapped");
    }
    fn touch(&self, at: u64, access: Access) {
        loop {
            match self.space.fault(VirtAddr(at), access) {
                Outcome::Mapped { .. } => return,
                // The host has taken the other CPU away in the middle of a fault, and nothing unmapped is free until it is back.
                Outcome::Error(FaultError::NoMemory) => std::thread::yield_now(),
                outcome => panic!("{outcome:?}"),
            }
        }
    }
}

/// The Linux that this runs on; the file is in memory (tmpfs).
struct Linux(File);

impl Linux {
    fn new() -> Self {
        let file =
            rustix::fs::memfd_create("scaling", rustix::fs::MemfdFlags::CLOEXEC).expect("a file in memory");
        let file = File::from(file);
        let page = [1; PAGE_SIZE as usize];
        for at in (0..2 * LEN).step_by(PAGE_SIZE as usize) {
            std::os::unix::fs::FileExt::write_all_at(&file, &page, at).expect("memory");
        }
        Linux(file)
    }
}

impl Memory for Linux {
    fn map(&self, at: u64, len: u64, of_file: bool) {
        let (wanted, len) = (null_mut::<u8>().with_addr(at as usize).cast(), len as usize);
        let (prot, fixed) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::FIXED_NOREPLACE);
        // SAFETY: new mappings where there is none, in a part of the address space that nobody else is given.
        let mapped = unsafe {
            if of_file {
                rustix::mm::mmap(wanted, len, prot, MapFlags::SHARED | fixed, &self.0, 0)
            } else {
                rustix::mm::mmap_anonymous(wanted, len, prot, MapFlags::PRIVATE | fixed)
            }
        };
        let mapped = mapped.expect("room");
        // SAFETY: it changes nothing that can be seen. A kernel without huge pages refuses.
        let _ = unsafe { rustix::mm::madvise(mapped, len, Advice::LinuxNoHugepage) };
    }
    fn unmap(&self, at: u64, len: u64) {
        // SAFETY: mapped by `map`, and nobody refers to it.
        let unmapped =
            unsafe { rustix::mm::munmap(null_mut::<u8>().with_addr(at as usize).cast(), len as usize) };
        unmapped.expect("mapped");
    }
    fn touch(&self, at: u64, access: Access) {
        let at = std::ptr::with_exposed_provenance_mut::<u8>(at as usize);
        // SAFETY: mapped by `map` to be read and written, and no Rust object lies there.
        unsafe {
            if access == Access::Write {
                at.write_volatile(1);
            } else {
                at.read_volatile();
            }
        }
    }
}

/// Where a CPU's mapping begins.
fn place(cpu: usize, mapping: u64) -> u64 {
    FIRST + (cpu as u64 * 64 + mapping) * (2 * LEN + GAP)
}

/// Touches all that a CPU has; how many touches that were.
fn touch_all(memory: &impl Memory, case: &Case, cpu: usize) -> u64 {
    // Of a file, and of memory that both map, each has a half.
    let half = if case.of_file || case.is_one { cpu as u64 * LEN } else { 0 };
    for mapping in 0..case.mappings {
        let first = place(if case.is_one { 0 } else { cpu }, mapping) + half;
        for at in (first..first + LEN).step_by(case.step as usize) {
            memory.touch(at, case.access);
        }
    }
    case.mappings * LEN / case.step
}

/// Maps a page, touches and unmaps it.
fn map_and_unmap(memory: &impl Memory) {
    let at = place(3, 0);
    memory.map(at, PAGE_SIZE, false);
    memory.touch(at, Access::Write);
    memory.unmap(at, PAGE_SIZE);
}

/// Runs `work` on these CPUs at once, each on its thread, and adds up what they did in a second, in millions.
fn together(memory: &impl Memory, cpus: &[usize], work: impl Fn(usize) -> u64 + Sync) -> f64 {
    let (ready, work) = (&AtomicUsize::new(0), &work);
    let run = move |cpu: usize| {
        let mut only = CpuSet::new();
        only.set(cpu);
        sched_setaffinity(None, &only).expect("a CPU to stay on");
        memory.be(cpu, || {
            ready.fetch_add(1, Release);
            while ready.load(Acquire) < cpus.len() {
                spin_loop();
            }
            let start = Instant::now();
            let done = work(cpu);
            done as f64 / start.elapsed().as_secs_f64() / 1e6
        })
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = cpus.iter().map(|cpu| scope.spawn(move || run(*cpu))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread found something wrong")).sum()
    })
}

/// What one CPU does in a second, alone, and what both do. `apart` is another space.
fn rates<M: Memory>(memory: &M, apart: &M, parts: &[Part; 2], case: &Case, alone: usize) -> (f64, f64) {
    let rate = |cpus: &[usize]| {
        let len = if case.of_file || case.is_one { 2 * LEN } else { LEN };
        let mapped: Vec<usize> = if case.is_one { vec![0] } else { cpus.to_vec() };
        let mappings =
            || mapped.iter().flat_map(|cpu| (0..case.mappings).map(|mapping| place(*cpu, mapping)));
        memory.be(0, || mappings().for_each(|at| memory.map(at, len, case.of_file)));
        let stop = AtomicBool::new(false);
        let rate = together(memory, cpus, |cpu| {
            if cpu == alone || case.beside == Beside::Same {
                let done = touch_all(memory, case, cpu);
                stop.store(true, Relaxed);
                return done;
            }
            while !stop.load(Relaxed) {
                match case.beside {
                    Beside::Clears => clear(&parts[cpu]),
                    Beside::MapsApart => map_and_unmap(apart),
                    _ => map_and_unmap(memory),
                }
            }
            0
        });
        memory.be(0, || mappings().for_each(|at| memory.unmap(at, len)));
        rate
    };
    (rate(&[alone]), rate(&[0, 1]))
}

/// Clearing pages alone: memory, and CPUs, that are no fault's.
fn clearing(memory: &impl Memory, parts: &[Part; 2], alone: usize) -> (f64, f64) {
    let work = |cpu: usize| {
        clear(&parts[cpu]);
        LEN / PAGE_SIZE
    };
    (together(memory, &[alone], work), together(memory, &[0, 1], work))
}

/// Nanoseconds in which a cache line goes to the other CPU and back.
fn to_and_fro(memory: &impl Memory) -> f64 {
    const TIMES: usize = 10_000;
    let turn = AtomicUsize::new(0);
    let rate = together(memory, &[0, 1], |cpu| {
        for mine in (cpu..2 * TIMES).step_by(2) {
            while turn.load(Acquire) != mine {
                spin_loop();
            }
            turn.store(mine + 1, Release);
        }
        TIMES as u64
    });
    2e3 / rate
}

/// Memory that one CPU clears.
type Part = Mutex<Vec<u8>>;

/// Clears it all, page by page.
fn clear(part: &Part) {
    let mut part = part.lock().expect("nobody panicked");
    for page in part.chunks_exact_mut(PAGE_SIZE as usize) {
        std::hint::black_box(page).fill(0);
    }
}

/// The medians of rates and of efficiencies within rounds; the work of one CPU counts, or that of `both`.
fn cells(rounds: &[(f64, f64)], both: bool) -> String {
    if rounds.is_empty() {
        return " | | ".into();
    }
    let of = |f: fn(&(f64, f64)) -> f64| median(rounds.iter().map(f));
    let efficiency = of(|(one, two)| two / one) / if both { 2.0 } else { 1.0 };
    format!("{:.2} | {:.2} | {efficiency:.2}", of(|r| r.0), of(|r| r.1))
}

fn main() {
    let (ours, linux) = (Ours::new(), Linux::new());
    let apart = ours.apart();
    let parts = [(); 2].map(|()| Part::new(vec![1; LEN as usize]));
    let (mut floor, mut distances) = (Vec::new(), Vec::new());
    let mut rounds: Vec<(Vec<_>, Vec<_>)> = CASES.iter().map(|_| Default::default()).collect();
    for round in 0..ROUNDS {
        let alone = round % 2;
        floor.push(clearing(&linux, &parts, alone));
        distances.push(to_and_fro(&linux));
        for (case, (our, linuxs)) in CASES.iter().zip(&mut rounds) {
            if case.beside.is_control() && round % 3 > 0 {
                continue;
            }
            our.push(rates(&ours, &apart, &parts, case, alone));
            // Another space would be another process.
            if case.beside != Beside::MapsApart {
                linuxs.push(rates(&linux, &linux, &parts, case, alone));
            }
        }
    }
    println!(
        "\nMillion a second on one CPU, on two, and the efficiency; medians of {ROUNDS} rounds, of the controls of a third\n"
    );
    println!(
        "| | pagefirst: one | two | efficiency | Linux: one | two | efficiency |\n|---|---|---|---|---|---|---|"
    );
    println!("| clearing pages, nothing else | {} | | | |", cells(&floor, true));
    for (case, (our, linux)) in CASES.iter().zip(&rounds) {
        let both = case.beside == Beside::Same;
        println!("| {} | {} | {} |", case.name, cells(our, both), cells(linux, both));
    }
    println!("\nA cache line goes to the other CPU and back in {:.0} ns.", median(distances.iter().copied()));
    // As a CPU of the platform's.
    let platform = ours.platform;
    platform.be(0, move || drop((ours, apart)));
}
