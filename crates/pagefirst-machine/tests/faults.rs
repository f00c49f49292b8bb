//! What a program sees of its memory, on vCPUs of the machine: contents, signals, and what it costs in pages.

mod gate;

use gate::until;
use pagefirst::arch::X86_64;
use pagefirst::fault::{Bus, FaultError, Segv, Signal};
use pagefirst::file::FileCache;
use pagefirst::mem::Shared;
use pagefirst::policy::Policy;
use pagefirst::space::{AddressSpace, Backing, Map, VmaFlags};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr};
use pagefirst_machine::{Config, Machine, MachineFile, Trap, Vcpu};
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;
type Cache = Shared<Machine, FileCache<Machine>>;

const RW: Prot = Prot::READ.union(Prot::WRITE);
const WORD: u64 = 0x1122_3344_5566_7788;

struct Rig {
    machine: &'static Machine,
    space: Arc<AddressSpace<Machine>>,
    cpu: Vcpu,
}

impl Rig {
    fn new() -> Result<Rig> {
        let machine = Machine::<X86_64>::new(Config { checks: true, ..Config::default() });
        let space = Arc::new(AddressSpace::new(machine, Policy::default())?);
        let mut cpu = machine.vcpu();
        cpu.switch_to(&space);
        Ok(Rig { machine, space, cpu })
    }
    fn anonymous(&self, pages: u64, prot: Prot) -> Result<VirtAddr> {
        Ok(self.space.map(Map::anonymous(pages * PAGE_SIZE, prot))?.range.start)
    }
    fn cache(&self, file: &MachineFile, size: u64) -> Result<Cache> {
        Ok(FileCache::new(self.machine, file.clone(), size)?)
    }
    fn file(&self, cache: &Cache, pages: u64, prot: Prot, flags: VmaFlags) -> Result<VirtAddr> {
        let backing = Backing::File { file: cache.clone(), first: 0 };
        let map = Map { backing, flags, ..Map::anonymous(pages * PAGE_SIZE, prot) };
        Ok(self.space.map(map)?.range.start)
    }
    /// Nothing is left when the space is gone; file caches must be gone already.
    fn end(self) -> Result {
        let Rig { machine, space, cpu } = self;
        machine.check_space(&space);
        drop(cpu);
        drop(space);
        machine.nothing_left()?;
        Ok(())
    }
}

fn page(at: VirtAddr, i: u64) -> VirtAddr {
    VirtAddr(at.0 + i * PAGE_SIZE)
}

/// A file whose bytes tell their offset.
fn numbered() -> MachineFile {
    MachineFile::pattern(|at| (at / PAGE_SIZE) as u8 ^ at as u8 | 1)
}

fn error<T: std::fmt::Debug>(result: std::result::Result<T, Trap>) -> Option<FaultError> {
    result.err().map(|t| t.error)
}

#[test]
fn faults_anonymous_memory_reads_as_zero_then_as_written() -> Result {
    let mut r = Rig::new()?;
    let at = r.anonymous(16, RW)?;
    for i in 0..16 {
        assert_eq!(r.cpu.load_u64(page(at, i))?, 0);
    }
    let read = r.space.account();
    assert_eq!((read.anon_bytes, read.faults.anon_read), (0, 16), "the zero page is not resident");
    for i in 0..16 {
        r.cpu.store_u64(VirtAddr(page(at, i).0 + 8), WORD + i)?;
    }
    for i in 0..16 {
        assert_eq!(r.cpu.load_u64(page(at, i))?, 0);
        assert_eq!(r.cpu.load_u64(VirtAddr(page(at, i).0 + 8))?, WORD + i);
    }
    let written = r.space.account();
    assert_eq!((written.anon_bytes, written.faults.copy), (16 * PAGE_SIZE, 16));
    r.end()
}

#[test]
fn faults_no_byte_predates_its_page() -> Result {
    let mut r = Rig::new()?;
    // Frames come back poisoned, and are handed out again.
    for _ in 0..3 {
        let at = r.anonymous(64, RW)?;
        for i in 0..64 {
            r.cpu.store_u8(page(at, i), 0xee)?;
            let mut rest = [1; 4095];
            r.cpu.load(VirtAddr(page(at, i).0 + 1), &mut rest)?;
            assert!(rest.iter().all(|b| *b == 0));
        }
        r.space.unmap(at, 64 * PAGE_SIZE)?;
    }
    // The tail of a file's last page, and of one that grew.
    let cache = r.cache(&numbered(), PAGE_SIZE + 10)?;
    let at = r.file(&cache, 4, Prot::READ, VmaFlags::empty())?;
    let mut tail = [1; 4086];
    assert_ne!(r.cpu.load_u8(VirtAddr(page(at, 1).0 + 9))?, 0);
    r.cpu.load(VirtAddr(page(at, 1).0 + 10), &mut tail)?;
    assert!(tail.iter().all(|b| *b == 0));
    r.space.unmap(at, 4 * PAGE_SIZE)?;
    drop(cache);
    r.end()
}

#[test]
fn faults_a_file_is_read_with_its_neighbours() -> Result {
    let mut r = Rig::new()?;
    let file = numbered();
    let cache = r.cache(&file, 64 * PAGE_SIZE)?;
    let at = r.file(&cache, 64, Prot::READ, VmaFlags::empty())?;
    let mut word = [0; 2];
    for i in 0..64 {
        r.cpu.load(VirtAddr(page(at, i).0 + 256), &mut word)?;
        assert_eq!(word, [i as u8 | 1, (i as u8 ^ 1) | 1]);
    }
    assert_eq!((r.cpu.counts().major, file.reads()), (64, 64), "nothing was cached");
    // A second mapping finds all in the cache: one fault for each 64 KiB.
    let again = r.file(&cache, 64, Prot::READ, VmaFlags::empty())?;
    let before = r.cpu.counts();
    for i in 0..64 {
        r.cpu.touch(page(again, i), Access::Read)?;
    }
    let after = r.cpu.counts();
    assert_eq!(
        (after.faults - before.faults, after.around - before.around),
        (5, 59),
        "the mapping is not aligned"
    );
    assert_eq!((after.major, file.reads()), (64, 64));
    r.space.unmap(at, 64 * PAGE_SIZE)?;
    r.space.unmap(again, 64 * PAGE_SIZE)?;
    drop(cache);
    r.end()
}

#[test]
fn faults_a_private_copy_leaves_the_file_alone() -> Result {
    let mut r = Rig::new()?;
    let file = numbered();
    let cache = r.cache(&file, 4 * PAGE_SIZE)?;
    let private = r.file(&cache, 4, RW, VmaFlags::empty())?;
    let shared = r.file(&cache, 4, Prot::READ, VmaFlags::SHARED)?;
    let original = r.cpu.load_u64(private)?;
    r.cpu.store_u64(private, WORD)?; // after a read: a copy in place of the page
    r.cpu.store_u64(page(private, 1), WORD)?; // at once: a copy where nothing was
    let mut all = [0; 4096];
    r.cpu.load(page(private, 1), &mut all)?;
    assert_eq!(all[..8], WORD.to_le_bytes());
    assert!(all[8..].iter().zip(8u64..).all(|(b, i)| *b == 1 ^ i as u8 | 1), "the rest is the file's");
    assert_eq!(r.cpu.load_u64(shared)?, original);
    assert_ne!(r.cpu.load_u64(page(shared, 1))?, WORD);
    assert_eq!(r.space.account().anon_bytes, 2 * PAGE_SIZE);
    // Discarded, the file shows again.
    r.space.discard(private, 4 * PAGE_SIZE)?;
    assert_eq!(r.cpu.load_u64(private)?, original);
    assert_eq!((cache.write_back(r.machine)?, file.writes()), (0, 0));
    r.space.unmap(private, 4 * PAGE_SIZE)?;
    r.space.unmap(shared, 4 * PAGE_SIZE)?;
    drop(cache);
    r.end()
}

#[test]
fn faults_a_shared_write_reaches_the_file() -> Result {
    for tracks in [false, true] {
        let mut r = Rig::new()?;
        let file = numbered().with_tracking(tracks);
        let cache = r.cache(&file, 4 * PAGE_SIZE)?;
        let at = r.file(&cache, 4, RW, VmaFlags::SHARED)?;
        let other = r.file(&cache, 4, Prot::READ, VmaFlags::empty())?;
        assert_ne!(r.cpu.load_u64(at)?, WORD);
        r.cpu.store_u64(at, WORD)?;
        r.cpu.store_u64(page(at, 2), WORD)?;
        assert_eq!(r.cpu.load_u64(other)?, WORD, "the other mapping shows the same page");
        let mut read = [0; 8];
        assert_eq!(cache.read_at(r.machine, 2 * PAGE_SIZE, &mut read)?, 8);
        assert_eq!(read, WORD.to_le_bytes());
        r.space.unmap(at, 4 * PAGE_SIZE)?;
        r.space.unmap(other, 4 * PAGE_SIZE)?;
        cache.write_back(r.machine)?;
        assert_eq!(file.stored(0)[..8], WORD.to_le_bytes(), "tracks writes: {tracks}");
        assert_eq!(file.stored(2)[..8], WORD.to_le_bytes(), "tracks writes: {tracks}");
        drop(cache);
        r.end()?;
    }
    Ok(())
}

#[test]
fn faults_a_file_of_the_host_is_read_and_written() -> Result {
    let path = std::env::temp_dir().join(format!("pagefirst-machine-faults-{}", std::process::id()));
    std::fs::write(&path, vec![7u8; 3 * PAGE_SIZE as usize + 100])?;
    let open = std::fs::OpenOptions::new().read(true).write(true).open(&path);
    std::fs::remove_file(&path)?;
    let open = open?;
    let mut r = Rig::new()?;
    let file = MachineFile::host(open.try_clone()?);
    let cache = r.cache(&file, open.metadata()?.len())?;
    let at = r.file(&cache, 4, RW, VmaFlags::SHARED)?;
    assert_eq!(r.cpu.load_u64(page(at, 1))?, u64::from_le_bytes([7; 8]));
    r.cpu.store(VirtAddr(page(at, 3).0 + 90), &[9; 20])?; // across the end
    r.space.unmap(at, 4 * PAGE_SIZE)?;
    assert_eq!(cache.write_back(r.machine)?, 1);
    assert_eq!(open.metadata()?.len(), 3 * PAGE_SIZE + 100, "write-back does not grow the file");
    let mut tail = [0; 12];
    std::os::unix::fs::FileExt::read_exact_at(&open, &mut tail, 3 * PAGE_SIZE + 88)?;
    assert_eq!(tail, [7, 7, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]);
    drop(cache);
    r.end()
}

#[test]
fn faults_beyond_the_end_and_read_errors_are_sigbus() -> Result {
    let mut r = Rig::new()?;
    let file = numbered();
    let cache = r.cache(&file, 2 * PAGE_SIZE + 1)?;
    let at = r.file(&cache, 8, RW, VmaFlags::SHARED)?;
    r.cpu.load_u8(page(at, 2))?;
    let tables = r.machine.counts().tables_allocated;
    for (access, i) in [(Access::Read, 3), (Access::Write, 7)] {
        let trap = r.cpu.touch(page(at, i), access).expect_err("beyond the end");
        assert_eq!((trap.error, trap.signal()), (FaultError::Bus(Bus::BeyondEnd), Some((Signal::Bus, 2))));
        assert_eq!(trap.si_addr(), page(at, i).0);
    }
    cache.set_size(r.machine, 4 * PAGE_SIZE);
    r.cpu.load_u8(page(at, 3))?;
    file.fail_reads(1, true);
    let trap = r.cpu.touch(page(at, 1), Access::Read).expect_err("a read error");
    assert_eq!((trap.error, trap.signal()), (FaultError::Bus(Bus::Io), Some((Signal::Bus, 2))));
    file.fail_reads(1, false);
    assert_ne!(r.cpu.load_u8(page(at, 1))?, 0, "an error is delivered once");
    assert_eq!(r.machine.counts().tables_allocated, tables);
    r.space.unmap(at, 8 * PAGE_SIZE)?;
    drop(cache);
    r.end()
}

#[test]
fn faults_protection_is_sigsegv_with_its_code() -> Result {
    let mut r = Rig::new()?;
    let at = r.anonymous(4, RW)?;
    r.cpu.store_u64(at, WORD)?;
    let access = Some(FaultError::Segv(Segv::Access));
    assert_eq!(error(r.cpu.fetch(at)), access, "not executable unless asked");
    r.space.protect(at, 4 * PAGE_SIZE, Prot::READ)?;
    let trap = r.cpu.store_u64(at, 1).expect_err("read-only");
    assert_eq!((trap.signal(), trap.si_addr()), (Some((Signal::Segv, 2)), at.0));
    assert_eq!(r.cpu.load_u64(at)?, WORD);
    r.space.protect(at, 4 * PAGE_SIZE, Prot::empty())?;
    assert_eq!(error(r.cpu.load_u64(at)), access);
    r.space.protect(at, 4 * PAGE_SIZE, Prot::READ | Prot::EXEC)?;
    assert_eq!(r.cpu.fetch(at)?, WORD as u8);
    r.space.protect(at, 4 * PAGE_SIZE, RW)?;
    r.cpu.store_u64(at, 2)?;
    assert_eq!(error(r.cpu.fetch(at)), access);
    r.space.unmap(at, 4 * PAGE_SIZE)?;
    let trap = r.cpu.load_u64(at).expect_err("unmapped");
    assert_eq!(trap.signal(), Some((Signal::Segv, 1)));
    r.end()
}

#[test]
fn faults_discarded_memory_is_zero_and_its_tables_go() -> Result {
    let mut r = Rig::new()?;
    let at = r.anonymous(4 * 512, RW)?;
    let empty = r.space.account().table_bytes;
    for i in 0..4 {
        r.cpu.store_u64(page(at, i * 512), WORD)?;
    }
    assert_eq!(r.space.account().table_bytes[0], 4 * PAGE_SIZE);
    for i in 0..4 {
        r.space.discard(page(at, i * 512), PAGE_SIZE)?;
    }
    assert_eq!(r.space.account().table_bytes, empty);
    for i in 0..4 {
        assert_eq!(r.cpu.load_u64(page(at, i * 512))?, 0);
    }
    r.end()
}

#[test]
fn faults_a_stack_grows_down() -> Result {
    let mut r = Rig::new()?;
    let map = Map { flags: VmaFlags::GROWS_DOWN, ..Map::anonymous(4 * PAGE_SIZE, RW) };
    let at = r.space.map(map)?.range.start;
    for i in 1..20 {
        r.cpu.store_u64(VirtAddr(at.0 - i * PAGE_SIZE), i)?;
    }
    let far = VirtAddr(at.0 - Policy::default().max_stack);
    assert_eq!(error(r.cpu.load_u64(far)), Some(FaultError::Segv(Segv::NotMapped)));
    r.end()
}

/// Two vCPUs write, read back and count in a range that a third takes away, protects and maps again.
///
/// Every word says which page it is for: a vCPU that ever reads another's word has used a frame that was not its own.
#[test]
fn faults_two_cpus_hammer_what_a_third_unmaps() -> Result {
    const PAGES: u64 = 600; // two leaf tables at least
    let r = Rig::new()?;
    let at = r.anonymous(PAGES, RW)?;
    let Rig { machine, space, cpu } = r;
    drop(cpu);
    let stop = AtomicBool::new(false);
    let served = [const { AtomicU64::new(0) }; 2];
    let hammer = |seed: u64| -> std::result::Result<(), String> {
        let _stopping = Stop(&stop, machine);
        let mut cpu = machine.vcpu();
        cpu.switch_to(&space);
        let mut state = seed;
        while !stop.load(Relaxed) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let i = (state >> 33) % PAGES;
            let (slot, word) = (VirtAddr(page(at, i).0 + 8 * seed), i << 8 | seed);
            let ended = match state >> 20 & 3 {
                0 => cpu.store_u64(slot, word),
                1 => cpu.touch(slot, Access::Write),
                2 => cpu.fetch_add_u64(VirtAddr(page(at, i).0 + 1024), 1).map(drop),
                _ => match cpu.load_u64(slot) {
                    Ok(0) => Ok(()),
                    Ok(found) if found == word => Ok(()),
                    Ok(found) => return Err(format!("page {i} holds {found:#x}, not {word:#x}")),
                    Err(trap) => Err(trap),
                },
            };
            match ended {
                Ok(()) => _ = served[seed as usize - 1].fetch_add(1, Relaxed),
                Err(trap) if matches!(trap.error, FaultError::Segv(Segv::NotMapped | Segv::Access)) => {}
                Err(trap) => return Err(trap.to_string()),
            }
        }
        Ok(())
    };
    let mut calls = 0;
    std::thread::scope(|scope| -> Result {
        let stopping = Stop(&stop, machine);
        let both = [1, 2].map(|seed| {
            let hammer = &hammer;
            scope.spawn(move || hammer(seed))
        });
        let mut cpu = machine.vcpu();
        cpu.switch_to(&space);
        let end = Instant::now() + Duration::from_secs(2);
        let mut changed = Ok(());
        until(|| {
            changed = change(calls, &mut cpu, &space, at, PAGES);
            calls += 1;
            let is_enough = calls > 100 && served.iter().all(|n| n.load(Relaxed) > 1_000);
            changed.is_err() || is_enough && Instant::now() >= end || stop.load(Relaxed)
        });
        drop((cpu, stopping));
        for hammer in both {
            hammer.join().map_err(|_| "a vCPU panicked: see above")??;
        }
        changed
    })?;
    assert!(served.iter().all(|n| n.load(Relaxed) > 1_000), "{served:?} accesses were served");
    assert!(calls > 100, "{calls} mapping calls");
    machine.check_space(&space);
    space.unmap(at, PAGES * PAGE_SIZE)?;
    assert_eq!(space.account().resident_bytes(), 0);
    drop(space);
    machine.nothing_left()?;
    Ok(())
}

/// Ends the vCPUs' loops when it is dropped, by a panic too: the scope waits for them.
struct Stop<'a>(&'a AtomicBool, &'static Machine);
impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
        if std::thread::panicking() {
            self.1.give_up();
        }
    }
}

/// Takes a part of the range away and puts it back: the n-th call, so in every way there is.
///
/// What is unmapped is looked at through a vCPU: an entry that a fault has left behind would answer.
fn change(n: u64, cpu: &mut Vcpu, space: &AddressSpace<Machine>, at: VirtAddr, pages: u64) -> Result {
    let first = n * 37 % pages;
    let count = 1 + n * 53 % (pages - first);
    let (start, len) = (page(at, first), count * PAGE_SIZE);
    match n % 6 {
        0 | 1 => {
            space.unmap(start, len)?;
            for i in 0..count {
                let trap = error(cpu.load_u64(page(start, i)));
                assert_eq!(trap, Some(FaultError::Segv(Segv::NotMapped)), "page {}", first + i);
            }
            let place = pagefirst::space::Place::FixedNoReplace(start);
            space.map(Map { place, ..Map::anonymous(len, RW) })?;
        }
        2 => space.discard(start, len)?,
        3 => {
            space.protect(start, len, Prot::READ)?;
            space.protect(start, len, RW)?;
        }
        4 => {
            let place = pagefirst::space::Place::Fixed(start);
            space.map(Map { place, ..Map::anonymous(len, RW) })?;
        }
        _ => space.discard(at, pages * PAGE_SIZE)?,
    }
    Ok(())
}
