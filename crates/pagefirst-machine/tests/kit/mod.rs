//! What the tests of mapping calls and faults share: a checked machine, files with contents that tell where they come
//! from, and looks at entries and frames past the library.
#![allow(dead_code, reason = "each test program uses its own part")]

#[path = "../gate/mod.rs"]
mod gate;

#[allow(unused_imports, reason = "each test program uses its own part")]
pub use gate::*;
use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::fault::{FaultError, Outcome};
use pagefirst::file::{File as _, FileCache, ReadError};
use pagefirst::frame::Counts;
use pagefirst::mem::Shared;
use pagefirst::platform::Platform;
use pagefirst::policy::Policy;
use pagefirst::space::{AddressSpace, Backing, Map, Place, VmaFlags};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr};
use pagefirst_machine::{Config, Found, Machine, MachineFile};
use std::error::Error;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, Mutex, PoisonError};

pub type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;
pub type Space<F = X86_64> = Arc<AddressSpace<Machine<F>>>;
pub type Cache<F = X86_64> = Shared<Machine<F>, FileCache<Machine<F>>>;

pub const R: Prot = Prot::READ;
pub const RW: Prot = Prot::READ.union(Prot::WRITE);
pub const NONE: Prot = Prot::empty();
/// What a leaf table spans.
pub const LEAF: u64 = 2 << 20;

/// What tests run on: x86-64, with checks in release builds too; with a number in `PAGEFIRST_HARSH`, all at once that a
/// manual allows hardware to do, by chance from that number on (`cargo xtask harsh`).
pub fn hardware() -> Config {
    let seed =
        std::env::var("PAGEFIRST_HARSH").ok().map(|seed| seed.parse().expect("a number in PAGEFIRST_HARSH"));
    seed.map_or_else(|| Config { checks: true, ..Config::default() }, Config::harsh)
}

/// Hardware that walks this format, or all at once that a manual allows it to do.
pub fn hardware_of<F: Format>(harsh: bool) -> Config {
    let config = match (harsh, F::TABLES_MARKED) {
        (true, _) => Config::harsh(1),
        (false, true) => hardware(),
        (false, false) if F::BREAK_BEFORE_MAKE => Config::aarch64(),
        (false, false) => Config::riscv64(),
    };
    Config { memory: 16 << 20, checks: true, ..config }
}

/// Makes a test of `fn test<F: Format>() -> Result` for every format, in a module of its name; or for some.
#[allow(unused_macros, reason = "each test program uses its own part")]
macro_rules! on_formats {
    ($test:ident) => {
        on_formats!($test: la48 X86_64, la57 X86_64La57, ept Ept, sv39 Sv39, sv48 Sv48, aarch64 Aarch64);
    };
    ($test:ident: $($name:ident $format:ident),+) => {
        mod $test {
            $(#[test]
            fn $name() -> super::Result {
                super::$test::<::pagefirst::arch::$format>()
            })+
        }
    };
}
#[allow(unused_imports, reason = "each test program uses its own part")]
pub(crate) use on_formats;

/// A machine of that hardware.
pub fn machine() -> &'static Machine {
    machine_of()
}

pub fn machine_of<F: Format>() -> &'static Machine<F> {
    Machine::new(Config { memory: 16 << 20, cpus: 6, ..hardware() })
}

pub fn small_machine(frames: u64) -> &'static Machine {
    Machine::new(Config { memory: frames * PAGE_SIZE, ..hardware() })
}

pub fn policy() -> Policy {
    Policy { min_addr: VirtAddr(PAGE_SIZE), ..Policy::default() }
}

pub fn space<F: Format>(machine: &'static Machine<F>) -> Result<Space<F>> {
    space_with(machine, policy())
}

pub fn space_with<F: Format>(machine: &'static Machine<F>, policy: Policy) -> Result<Space<F>> {
    Ok(Arc::new(AddressSpace::new(machine, policy)?))
}

/// The address of page `i` from `at` on.
pub fn page(at: VirtAddr, i: u64) -> VirtAddr {
    VirtAddr(at.0 + i * PAGE_SIZE)
}

/// The byte that fills page `index` of the kit's files: never 0, different for neighbours.
pub fn mark(index: u64) -> u8 {
    (index % 251 + 1) as u8
}

/// A file in memory whose every page is filled with its [`mark`].
pub fn marked() -> MachineFile {
    MachineFile::pattern(|at| mark(at / PAGE_SIZE))
}

/// Something to happen once, in the middle of reading one page of a file.
#[derive(Clone, Default)]
pub struct Hook(Arc<Mutex<Option<Armed>>>);

/// The page's index, and what happens.
type Armed = (u64, Box<dyn FnOnce() + Send>);

impl Hook {
    pub fn arm(&self, index: u64, then: impl FnOnce() + Send + 'static) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((index, Box::new(then)));
    }
    pub fn is_armed(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
    fn at(&self, at: u64) {
        let mut armed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if armed.as_ref().is_some_and(|(index, _)| *index * PAGE_SIZE == at)
            && let Some((_, then)) = armed.take()
        {
            drop(armed);
            then();
        }
    }
}

/// A marked file, and a hook into its reading.
pub fn hooked() -> (MachineFile, Hook) {
    let hook = Hook::default();
    let inside = hook.clone();
    let file = MachineFile::pattern(move |at| {
        inside.at(at);
        mark(at / PAGE_SIZE)
    });
    (file, hook)
}

pub fn cache<F: Format>(machine: &'static Machine<F>, file: &MachineFile, pages: u64) -> Result<Cache<F>> {
    Ok(FileCache::new(machine, file.clone(), pages * PAGE_SIZE)?)
}

/// Brings pages of a file into its cache without mapping them.
pub fn warm<F: Format>(
    machine: &'static Machine<F>,
    cache: &Cache<F>,
    indexes: impl IntoIterator<Item = u64>,
) -> Result {
    if !cache.file().is_stored() {
        // A hole of a memory file is read without a page for it, and gets one by a fault.
        let s = space(machine)?;
        let base = s.map(shared(cache, 0, cache.size().div_ceil(PAGE_SIZE), R))?.range.start;
        for index in indexes {
            let end = fault(&s, page(base, index), Access::Read);
            assert!(matches!(end, End::Mapped(..) | End::Spurious), "page {index}: {end:?}");
        }
        return Ok(());
    }
    for index in indexes {
        let read = cache.read_at(machine, index * PAGE_SIZE, &mut [0]);
        read.map_err(|e: ReadError<Machine<F>>| format!("page {index}: {e:?}"))?;
    }
    Ok(())
}

pub fn at<F: Format>(place: VirtAddr, map: Map<Machine<F>>) -> Map<Machine<F>> {
    Map { place: Place::Fixed(place), ..map }
}

pub fn anonymous<F: Format>(pages: u64, prot: Prot) -> Map<Machine<F>> {
    Map::anonymous(pages * PAGE_SIZE, prot)
}

/// A private mapping of a file.
pub fn private<F: Format>(file: &Cache<F>, first: u64, pages: u64, prot: Prot) -> Map<Machine<F>> {
    Map { backing: Backing::File { file: file.clone(), first }, ..anonymous(pages, prot) }
}

/// A shared mapping of a file.
pub fn shared<F: Format>(file: &Cache<F>, first: u64, pages: u64, prot: Prot) -> Map<Machine<F>> {
    Map { flags: VmaFlags::SHARED, ..private(file, first, pages, prot) }
}

/// The leaf entry for an address, read as hardware would, and the level of the table it is in; no entry is 0, at the
/// level of the deepest table.
pub fn entry<F: Format>(space: &Space<F>, va: VirtAddr) -> (u64, u8) {
    let machine = space.platform();
    let mut table = space.page_table().root_frame();
    for level in (0..F::LEVELS).rev() {
        let raw = machine.cells(table)[F::index(va, level)].load(Acquire);
        match F::child(raw, level) {
            Some(child) => table = child,
            None => return (raw, level),
        }
    }
    unreachable!("level 0 has no children")
}

pub fn attrs<F: Format>(space: &Space<F>, va: VirtAddr) -> Attrs {
    F::attrs(entry(space, va).0)
}

/// The frame mapped at an address.
pub fn frame<F: Format>(space: &Space<F>, va: VirtAddr) -> Option<Pfn> {
    let (raw, level) = entry(space, va);
    F::frame(raw, level)
}

/// Which of `pages` pages from `at` on are mapped.
pub fn mapped<F: Format>(space: &Space<F>, at: VirtAddr, pages: u64) -> Vec<u64> {
    (0..pages).filter(|i| frame(space, page(at, *i)).is_some()).collect()
}

pub fn counts<F: Format>(machine: &'static Machine<F>, pfn: Pfn) -> (u32, u32) {
    let Counts { refs, maps } = machine.meta(pfn).counts();
    (refs, maps)
}

pub fn fork<F: Format>(s: &Space<F>) -> Result<Space<F>> {
    Ok(Arc::new(s.fork()?))
}
/// Writes a word as the kernel does for a program.
pub fn put<F: Format>(s: &Space<F>, at: VirtAddr, value: u64) -> Result {
    Ok(s.copy_out(at, &value.to_le_bytes()).map_err(|stopped| stopped.to_string())?)
}
/// Reads one.
pub fn get<F: Format>(s: &Space<F>, at: VirtAddr) -> Result<u64> {
    let mut bytes = [0; 8];
    s.copy_in(at, &mut bytes).map_err(|stopped| stopped.to_string())?;
    Ok(u64::from_le_bytes(bytes))
}

/// The frame of a page of a file, looked up by way of a mapping in a space of its own that is gone afterwards.
pub fn cached_frame<F: Format>(machine: &'static Machine<F>, cache: &Cache<F>, index: u64) -> Result<Pfn> {
    let policy = policy().with_fault_around(PAGE_SIZE).ok_or("a window of one page")?;
    let probe = space_with(machine, policy)?;
    let at = probe.map(private(cache, index, 1, R))?.range.start;
    let end = fault(&probe, at, Access::Read);
    let found = frame(&probe, at).ok_or_else(|| format!("{end:?}"))?;
    probe.unmap(at, PAGE_SIZE)?;
    Ok(found)
}

/// How a fault ended, for comparing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Major or not, and neighbours.
    Mapped(bool, u32),
    Spurious,
    Blocked,
    Error(FaultError),
}

pub fn fault<F: Format>(space: &Space<F>, at: VirtAddr, access: Access) -> End {
    match space.fault(at, access) {
        Outcome::Mapped { major, around, .. } => End::Mapped(major, around),
        Outcome::Spurious => End::Spurious,
        Outcome::Blocked(_) => End::Blocked,
        Outcome::Error(error) => End::Error(error),
    }
}

/// The space's tables, read past the library, agree with what the library says of them.
pub fn check<F: Format>(space: &Space<F>) -> Found {
    space.platform().check_space(space)
}

/// Tables of all levels.
pub fn tables<F: Format>(space: &Space<F>) -> u64 {
    space.account().tables_bytes() / PAGE_SIZE
}

/// The VMAs: start and end in pages, rights.
pub fn vmas<F: Format>(space: &Space<F>) -> Vec<(u64, u64, Prot)> {
    let mut all = Vec::new();
    space.for_each_vma(|v| all.push((v.range.start.0 / PAGE_SIZE, v.range.end.0 / PAGE_SIZE, v.prot)));
    all
}

/// The first byte of the page mapped at an address, read without a fault.
pub fn first_byte<F: Format>(space: &Space<F>, va: VirtAddr) -> Option<u8> {
    loop {
        let pfn = frame(space, va)?;
        let byte = space.platform().cells(pfn)[0].load(Acquire) as u8;
        // A truncation may have taken the page away meanwhile.
        if frame(space, va) == Some(pfn) {
            return Some(byte);
        }
    }
}

/// Runs `user` on `users` threads, and `here` on this one; ends when all of them have, their CPUs given back.
pub fn together(users: u64, user: impl Fn(u64) + Sync, here: impl FnOnce()) {
    let user = &user;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..users).map(|n| scope.spawn(move || user(n))).collect();
        here();
        assert!(threads.into_iter().all(|t| t.join().is_ok()), "a thread found something wrong: see above");
    });
}

/// Sets a flag when it goes, so that threads end also when a check here fails.
pub struct StopAtEnd<'a>(pub &'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Release);
    }
}
