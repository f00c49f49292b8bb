//! All that pagefirst does, by many CPUs at once, its contents verified while it runs.
//!
//! It runs wherever the library does: a [`Host`] supplies the platform, and a [`Cpu`] loads and stores by virtual address.
//! The program `pagefirst stress` runs it on the embedded machine, a thread for each CPU; the tiny kernel on a real MMU.
//! What it finds wrong is a panic.
//!
//! Each worker is one CPU. It enters a space, does some operations there, each chosen by chance, and goes on to another.
//!
//! | file | what is worked on | what must hold |
//! |---|---|---|
//! | `own` | a stretch of private memory that one worker alone maps and touches, among the others' in the same tables | all of it: what is mapped, every answer, every word, also in the child of a fork, and while rights are taken away and given back |
//! | `files` | pages of files, mapped shared and private in all spaces, read, written, cut, stored, dropped by all | a word is its writer's last, or newer than any that was seen; zero only if the file was cut since, and then for good |
//! | `cuts` | their ends, and holes in them | what was there before is gone |
//! | `chaos` | private memory, huge pages, heaps, stacks and physical memory that all map and touch | a word belongs where it is, and was written |
//! | `direct` | a file that is memory itself, mapped shared and private, cut and cleaned | a worker's word is its last |
//! | `lose` | pages of a file in which hardware reports errors | they are lost, or all there |
//! | `hunt` | the page that somebody else is about to touch, or just has | the same; faults come to an end |
//!
//! Spaces are of two kinds. *Homes* live as long as the run: each worker has its stretch in one. *Guests* are made, forked
//! and ended all the time.
//!
//! Now and then all workers stop: a *quiet point*. Each verifies its stretch, and the host looks at everything
//! ([`Host::inspect`]).
#![no_std]

mod board;
mod chaos;
mod cuts;
mod dice;
mod direct;
mod files;
mod hunt;
mod layout;
mod lose;
mod own;
mod quiet;
mod tally;
mod worker;

pub use board::{Board, MAX_WORKERS};
pub use files::Kind as FileKind;
pub use tally::{Op, Sums};

use core::ops::Deref;
use pagefirst::fault::FaultError;
use pagefirst::file::FileCache;
use pagefirst::limit::Limit;
use pagefirst::mem::Shared;
use pagefirst::platform::Platform;
use pagefirst::policy::Policy;
use pagefirst::space::AddressSpace;
use pagefirst::types::{NoMemory, Pfn, VirtAddr};
use spin::RwLock;

/// A file, in memory.
pub type FileOf<H> = Shared<<H as Host>::Platform, FileCache<<H as Host>::Platform>>;

/// Where it runs.
pub trait Host: Sync + Sized {
    /// The platform.
    type Platform: Platform;
    /// A space that several CPUs run.
    type Space: Deref<Target = AddressSpace<Self::Platform>> + Send + Sync;
    /// A CPU.
    type Cpu: Cpu<Self>;

    /// The platform.
    fn platform(&self) -> &'static Self::Platform;
    /// Makes a space one that CPUs can run.
    fn share(&self, space: AddressSpace<Self::Platform>) -> Self::Space;
    /// A file of this kind, fresh.
    fn file(&self, kind: FileKind) -> <Self::Platform as Platform>::File;
    /// A file of so many pages that is memory itself, from this frame on; it tracks writes.
    fn direct_file(&self, first: Pfn, pages: u64) -> <Self::Platform as Platform>::File;
    /// Charges to a limit, or to none, what this CPU's reads and writes of files bring in.
    fn charge_to(&self, limit: Option<&Shared<Self::Platform, Limit<Self::Platform>>>);
    /// Whether it is time for a quiet point.
    fn is_quiet_due(&self) -> bool;
    /// Whether the run is over.
    fn is_over(&self) -> bool;
    /// Looks at everything while nothing happens.
    ///
    /// # Panics
    /// When something is wrong.
    fn inspect(&self, quiet: Quiet<'_, Self>);
}

/// A CPU that runs user code.
pub trait Cpu<H: Host> {
    /// Leaves the space it runs and enters another.
    fn enter(&mut self, space: &H::Space);
    /// Leaves the space it runs.
    fn leave(&mut self);
    /// Loads eight aligned bytes.
    ///
    /// # Errors
    /// Why a fault refused it.
    fn load(&mut self, at: VirtAddr) -> Result<u64, FaultError>;
    /// Stores eight aligned bytes in one step.
    ///
    /// # Errors
    /// Why a fault refused it.
    fn store(&mut self, at: VirtAddr, word: u64) -> Result<(), FaultError>;
}

/// All that there is, at a quiet point.
pub struct Quiet<'q, H: Host> {
    /// All spaces.
    pub spaces: [Option<&'q H::Space>; SPACES],
    /// All files.
    pub files: &'q [FileOf<H>],
    /// What everything is charged to.
    pub limit: &'q Shared<H::Platform, Limit<H::Platform>>,
}

/// What a run goes by.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Workers, at most [`MAX_WORKERS`].
    pub workers: usize,
    /// Where chance starts.
    pub seed: u64,
}

/// Spaces that live as long as the run.
const HOMES: usize = 3;
/// Spaces at a time.
pub const SPACES: usize = 8;

/// A run: what its workers share.
pub struct Stress<'a, H: Host> {
    host: &'a H,
    board: &'static Board,
    config: Config,
    spaces: [RwLock<Option<H::Space>>; SPACES],
    files: [FileOf<H>; FileKind::COUNT],
    /// Above all others: without a bound.
    root: Shared<H::Platform, Limit<H::Platform>>,
    /// One for the homes, one for the guests.
    limits: [Shared<H::Platform, Limit<H::Platform>>; 2],
    physical: direct::Block<H::Platform>,
    direct: direct::Direct<H>,
}

impl<'a, H: Host> Stress<'a, H> {
    /// Prepares a run.
    ///
    /// # Errors
    /// [`NoMemory`] for what there is from the first.
    ///
    /// # Panics
    /// When there are more workers than a [`Board`] is for.
    pub fn new(host: &'a H, board: &'static Board, config: Config) -> Result<Self, NoMemory> {
        assert!((1..=MAX_WORKERS).contains(&config.workers), "1 to {MAX_WORKERS} workers");
        let p = host.platform();
        let file = |kind: FileKind| FileCache::new(p, host.file(kind), kind.size());
        let [still, moving, memory, huge] = FileKind::ALL;
        let root = Limit::new(p, None, u64::MAX >> 1)?;
        let limit = || Limit::new(p, Some(&root), root.max());
        let limits = [limit()?, limit()?];
        let stress = Stress {
            host,
            board,
            config,
            spaces: [const { RwLock::new(None) }; SPACES],
            files: [file(still)?, file(moving)?, file(memory)?, file(huge)?],
            limits,
            physical: direct::Block::new(p)?,
            direct: direct::Direct::new(host)?,
            root,
        };
        for (i, slot) in stress.spaces.iter().enumerate() {
            *slot.write() = Some(host.share(stress.fresh_space(i)?));
        }
        Ok(stress)
    }

    /// A space for the place of this number.
    fn fresh_space(&self, number: usize) -> Result<AddressSpace<H::Platform>, NoMemory> {
        let space = AddressSpace::new(self.host.platform(), Policy::default())?;
        space.set_heap(layout::Area::heap().start).expect("it can be mapped");
        space.set_limit(Some(self.limits[usize::from(number >= HOMES)].clone()));
        Ok(space)
    }

    /// Works as worker `me` until the host says that it is over.
    ///
    /// # Panics
    /// When something is wrong.
    pub fn work(&self, me: usize, cpu: &mut H::Cpu) {
        worker::Worker::new(self, me).work(cpu);
    }

    /// The files of the run.
    pub fn files(&self) -> &[FileOf<H>] {
        &self.files
    }

    /// What was done so far.
    pub fn sums(&self) -> Sums {
        self.board.sums()
    }

    /// What a worker is at: the operation, and how many it has done before.
    pub fn doing(&self, worker: usize) -> (Op, u64) {
        self.board.tallies[worker].doing()
    }
}
