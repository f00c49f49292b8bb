//! What a schedule runs on: a machine, a space and files that are everybody's, and pages of one thread each among them.
//! All of it by chance. And what must hold when all threads have ended.

use super::run::tell;
use super::scheduler::Dice;
use super::seen::{Calls, Seen};
use super::worker::Worker;
use pagefirst::arch::{Format, Tiny};
use pagefirst::file::{FileCache, ShmemHuge};
use pagefirst::frame::FrameFlags;
use pagefirst::limit::Limit;
use pagefirst::mem::Shared;
use pagefirst::platform::Platform;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::{AddressSpace, Backing, Map, Place, VmaFlags};
use pagefirst::types::{PAGE_SIZE, Pfn, Prot, VirtAddr};
use pagefirst_machine::{Config, Late, Machine, MachineFile, TlbShape};
use shuttle::sync::Mutex;
use shuttle::thread;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};

pub type Space<F> = Arc<AddressSpace<Machine<F>>>;
pub type Cache<F> = Shared<Machine<F>, FileCache<Machine<F>>>;

pub const RW: Prot = Prot::READ.union(Prot::WRITE);
/// What all of it happens in.
pub const PAGES: u64 = 16;
/// The most threads there are.
pub const MOST: usize = 8;
/// The files: one that is stored, one that is memory, and one of either kind whose pages are a thread's each.
pub const STORED: usize = 0;
pub const MEMORY: usize = 1;
pub const KEPT: usize = 2;

/// log2 of the pages in a folio of a file: those of a huge page of the tiny format.
const FOLIOS: u8 = 2;

/// The byte that fills a page of the stored file.
pub fn mark(index: u64) -> u8 {
    0x80 | index as u8
}

/// A number as it is written: whose it is, and how many he had written before.
pub fn word(owner: usize, count: u64) -> u64 {
    count << 8 | owner as u64 + 1
}

pub struct World<F: Format> {
    pub machine: &'static Machine<F>,
    pub space: Space<F>,
    pub files: [Cache<F>; 3],
    /// By file, held by who changes its size.
    pub sizes: [Mutex<()>; 2],
    /// The number of the first page.
    base: u64,
    /// Whose page it is, if it is not everybody's.
    owners: [Option<usize>; PAGES as usize],
    /// How far each thread has counted: raised before a number is written.
    counts: [AtomicU64; MOST],
    /// What was seen in the space that is everybody's.
    pub seen: Arc<Seen>,
    /// Calls that give files other contents than they had.
    pub file_calls: Calls,
    pub threads: usize,
    /// The one page on which all threads work, if they do nothing else.
    pub crowded: Option<u64>,
    /// Whether memory may run out.
    pub is_short: bool,
}

/// Hardware of this format, by chance.
fn hardware<F: Format>(dice: &mut Dice) -> Config {
    let like = if F::BREAK_BEFORE_MAKE {
        Config::aarch64()
    } else if F::TABLES_MARKED || F::LEVELS == Tiny::LEVELS {
        if dice.one_in(2) { Config::harsh(1) } else { Config::default() }
    } else {
        Config::riscv64()
    };
    Config {
        checks: true,
        tlb: TlbShape { sets: 4, ways: 2 },
        huge_tlb: dice.one_in(2).then_some(TlbShape { sets: 2, ways: 2 }),
        walk_cache: 4,
        keep_tags: dice.one_in(2),
        late_shootdown: if dice.one_in(4) { 4 } else { 0 },
        livelock: 10_000,
        seed: dice.next(),
        ..like
    }
}

/// A file that is stored, by chance with folios, and reads and writes that end later.
fn of_a_disk(file: MachineFile, dice: &mut Dice) -> MachineFile {
    let file = file.with_tracking(dice.one_in(2));
    let file = if dice.one_in(2) { file.with_folios(FOLIOS) } else { file };
    let file = if dice.one_in(2) { file.late(Late::Held) } else { file };
    if dice.one_in(4) { file.late_writes() } else { file }
}

impl<F: Format> World<F> {
    fn new(dice: &mut Dice, threads: usize, is_crowded: bool) -> (Self, [MachineFile; 2]) {
        // One more for the main thread, one for the device.
        let config = Config { memory: 320 * PAGE_SIZE, cpus: threads + 2, ..hardware::<F>(dice) };
        let machine = Machine::<F>::new(config);
        let is_tiny = F::LEVELS == Tiny::LEVELS;
        let huge = match dice.below(3) {
            // There is not that much memory.
            _ if !is_tiny => HugePolicy::Never,
            0 => HugePolicy::Never,
            1 => HugePolicy::Advise,
            _ => HugePolicy::Always,
        };
        let policy = Policy {
            min_addr: VirtAddr(PAGE_SIZE),
            huge,
            prefault_young: dice.one_in(2),
            ..Policy::default()
        };
        let around = PAGE_SIZE << dice.below(5);
        let policy = policy.with_fault_around(around).expect("a power of two");
        let space = Arc::new(AddressSpace::new(machine, policy).expect("memory for a space"));
        let stored = of_a_disk(MachineFile::pattern(|at| mark(at / PAGE_SIZE)), dice);
        let huge = if dice.one_in(2) { ShmemHuge::Always } else { ShmemHuge::WithinSize };
        let memory = MachineFile::shmem(huge).with_folios(FOLIOS);
        let kept = if dice.one_in(2) {
            of_a_disk(MachineFile::zeros(), dice)
        } else {
            MachineFile::shmem(ShmemHuge::Never)
        };
        let disks = [stored.clone(), kept.clone()];
        let files = [stored, memory, kept];
        let files =
            files.map(|file| FileCache::new(machine, file, PAGES * PAGE_SIZE).expect("memory for a file"));
        // A tiny space is no larger, and its first page cannot be mapped; otherwise across two tables of each level.
        let base = if is_tiny { 0 } else { (1 << 18) - PAGES / 2 };
        let mut owners = [None; PAGES as usize];
        let crowded = is_crowded.then(|| 1 + dice.below(PAGES - 1));
        let owned = if is_crowded { 0 } else { threads };
        for owner in (0..owned).cycle().take(threads * if threads > 4 { 1 } else { 2 }) {
            owners[1 + dice.below(PAGES - 1) as usize] = Some(owner);
        }
        let counts = std::array::from_fn(|_| AtomicU64::new(0));
        let sizes = [Mutex::new(()), Mutex::new(())];
        (
            World {
                machine,
                space,
                files,
                sizes,
                base,
                owners,
                counts,
                seen: Arc::default(),
                file_calls: Calls::default(),
                threads,
                crowded,
                is_short: dice.one_in(6),
            },
            disks,
        )
    }

    pub fn at(&self, page: u64) -> VirtAddr {
        VirtAddr((self.base + page) * PAGE_SIZE)
    }
    /// Where in a page, or a file, the word of an owner lies.
    pub fn place(&self, page: u64, owner: usize) -> VirtAddr {
        VirtAddr(self.at(page).0 + 8 * owner as u64)
    }
    /// The page of an address.
    pub fn page(&self, at: VirtAddr) -> u64 {
        at.0 / PAGE_SIZE - self.base
    }
    pub fn own(&self, owner: usize) -> Vec<u64> {
        (0..PAGES).filter(|page| self.owners[*page as usize] == Some(owner)).collect()
    }
    /// A range of pages that are everybody's, if there are such.
    pub fn common(&self, dice: &mut Dice) -> Option<Range<u64>> {
        if let Some(page) = self.crowded {
            return Some(page..page + 1);
        }
        let is_common = |page: &u64| self.owners[*page as usize].is_none();
        let all: Vec<u64> = (1..PAGES).filter(is_common).collect();
        let first = *all.get(dice.below(all.len() as u64) as usize)?;
        let most = (first..PAGES).take_while(is_common).count() as u64;
        // Often all there are.
        let n = if dice.one_in(3) { most } else { 1 + dice.below(most) };
        Some(first..first + n)
    }
    /// Somebody's word somewhere: that of the page's owner, if it has one.
    pub fn any_word(&self, dice: &mut Dice) -> (u64, usize) {
        let page = 1 + dice.below(PAGES - 1);
        let anybody = dice.below(self.threads as u64) as usize;
        (page, self.owners[page as usize].unwrap_or(anybody))
    }
    /// The next number of an owner.
    pub fn count(&self, owner: usize) -> u64 {
        word(owner, self.counts[owner].fetch_add(1, Relaxed) + 1)
    }
    /// How far its owner had counted who wrote a word that is found in a page that is everybody's; 0 for what a page begins
    /// with. Nothing else may stand there.
    pub fn counted(&self, found: u64, owner: usize) -> u64 {
        let byte = found as u8;
        let began = found == 0 || byte & 0x80 != 0 && u64::from_le_bytes([byte; 8]) == found;
        let count = found >> 8;
        let written = byte as usize == owner + 1 && count > 0 && count <= self.counts[owner].load(Relaxed);
        assert!(began || written, "the word of thread {owner} is {found:#x}, which he never wrote");
        if began { 0 } else { count }
    }
    pub fn map(
        &self,
        range: &Range<u64>,
        backing: Backing<Machine<F>>,
        prot: Prot,
        shared: bool,
    ) -> Map<Machine<F>> {
        let flags = if shared { VmaFlags::SHARED } else { VmaFlags::empty() };
        let place = Place::Fixed(self.at(range.start));
        Map { place, backing, flags, ..Map::anonymous((range.end - range.start) * PAGE_SIZE, prot) }
    }
    pub fn file(&self, file: usize, first: u64) -> Backing<Machine<F>> {
        Backing::File { file: self.files[file].clone(), first }
    }
}

/// Runs threads of the number that is given, each of which does something or other, and looks at all that is left.
pub fn run<F: Format>(dice: &mut Dice, threads: usize, is_crowded: bool) {
    let (world, disks) = World::<F>::new(dice, threads, is_crowded);
    let machine = world.machine;
    let limit =
        Limit::new(machine, None, if dice.one_in(8) { 12 } else { 10_000 }).expect("memory for a limit");
    world.space.set_limit(Some(limit.clone()));
    // Often all is one mapping in the beginning.
    let all = 1..PAGES;
    let is_mapped = dice.one_in(2) || is_crowded;
    if is_mapped {
        world.space.map(world.map(&all, Backing::Anonymous, RW, false)).expect("nothing is mapped yet");
    }
    let taken = world.is_short.then(|| machine.leave_free(4 + dice.below(40)));
    tell(|| format!("{} threads, {:?}, {:?}", threads, world.space.policy().huge, world.owners));
    let world = Arc::new(world);
    let over = Arc::new(AtomicBool::new(false));
    let device = {
        let over = over.clone();
        thread::spawn(move || {
            while !over.load(Acquire) || disks.iter().any(|file| !file.pending().is_empty()) {
                if disks.iter().all(|file| !file.finish_one()) {
                    thread::yield_now();
                }
            }
        })
    };
    let steps = 2 + dice.below(60 / threads as u64);
    let workers: Vec<_> = (0..threads)
        .map(|me| {
            let (world, dice) = (world.clone(), Dice::new(dice.next()));
            thread::spawn(move || Worker::new(&world, me, dice, is_mapped).work(steps))
        })
        .collect();
    let left: Vec<_> = workers.into_iter().map(|worker| worker.join().expect("it ends")).collect();
    let world = Arc::into_inner(world).expect("all threads have ended");
    let mut spaces = vec![world.space.clone()];
    for (owner, left) in left.into_iter().enumerate() {
        let mut worker = Worker::again(&world, owner, left);
        worker.check_own();
        spaces.extend(worker.into_children());
    }
    over.store(true, Release);
    device.join().expect("it ends");
    drop(taken);
    finish(world, spaces, &limit);
    drop(limit);
    machine.nothing_left().unwrap_or_else(|what| panic!("{what}"));
}

/// Counts and charges are what they must be.
fn finish<F: Format>(
    world: World<F>,
    mut spaces: Vec<Space<F>>,
    limit: &Shared<Machine<F>, Limit<Machine<F>>>,
) {
    let machine = world.machine;
    let mut maps: BTreeMap<u32, u32> = BTreeMap::new();
    for space in &spaces {
        space.quiesce();
        for (folio, n) in machine.check_space(space).frames {
            *maps.entry(folio.0).or_default() += n;
        }
    }
    for (&folio, &n) in &maps {
        let counts = machine.meta(Pfn(folio)).counts();
        assert_eq!(counts.maps, n, "folio {folio:#x}: maps, and what was found in {} spaces", spaces.len());
    }
    drop(spaces.split_off(1));
    // Of what is charged now only what is private and mapped remains.
    world.files.iter().for_each(|file| file.set_size(machine, 0));
    world.space.quiesce();
    let found = machine.check_space(&world.space);
    machine.vm().quiesce(machine);
    let charges = |folio: &Pfn| {
        let meta = machine.meta(*folio);
        if meta.flags().contains(FrameFlags::ZERO) { 0 } else { 1 << meta.order() }
    };
    let private: u64 = found.frames.keys().map(charges).sum();
    assert_eq!(limit.charged(), private, "pages charged, and private pages mapped");
    drop((world, spaces));
    machine.vm().quiesce(machine);
    assert_eq!(limit.charged(), 0, "charged in the end");
}
