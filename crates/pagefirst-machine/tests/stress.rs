//! CPUs that race: files with fault-around and private copies, memory that runs out, several spaces on one CPU.

mod kit;

use kit::hardware;
use pagefirst::arch::{Aarch64, Format, Tiny, X86_64};
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::file::FileCache;
use pagefirst::policy::Policy;
use pagefirst::space::{AddressSpace, Backing, Map, Place, VmaFlags};
use pagefirst::sync::epoch::Pin;
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr};
use pagefirst_machine::{Config, Machine, MachineFile, TlbShape, Vcpu};
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;
type Space<F> = Arc<AddressSpace<Machine<F>>>;
const RW: Prot = Prot::READ.union(Prot::WRITE);
const TIME: Duration = Duration::from_millis(1500);

fn policy() -> Policy {
    Policy { min_addr: VirtAddr(PAGE_SIZE), ..Policy::default() }
}

fn page(at: VirtAddr, i: u64) -> VirtAddr {
    VirtAddr(at.0 + i * PAGE_SIZE)
}

struct Dice(u64);
impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// Ends the vCPUs' loops when it is dropped, by a panic too: the scope waits for them.
struct Stop<'a, F: Format>(&'a AtomicBool, &'static Machine<F>);
impl<F: Format> Drop for Stop<'_, F> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
        if std::thread::panicking() {
            self.1.give_up();
        }
    }
}

/// Runs `user` on two vCPUs until `writer` has worked for a while on this thread.
fn race<F: Format>(
    spaces: &[&Space<F>],
    user: impl Fn(&mut Vcpu<F>, &mut Dice, u64) -> std::result::Result<(), String> + Sync,
    mut writer: impl FnMut(u64) -> Result,
) -> Result {
    let stop = AtomicBool::new(false);
    let run = |seed: u64| {
        let machine = spaces[0].platform();
        let mut cpu = machine.vcpu();
        let mut dice = Dice(seed);
        for n in 0.. {
            if stop.load(Relaxed) {
                break;
            }
            if n % 500 == 0 {
                cpu.switch_to(spaces[n / 500 % spaces.len()]);
            }
            user(&mut cpu, &mut dice, seed)?;
        }
        Ok::<(), String>(())
    };
    let run = &run;
    std::thread::scope(|scope| {
        let stopping = Stop(&stop, spaces[0].platform());
        let users = [1, 2].map(|seed| scope.spawn(move || run(seed)));
        let end = Instant::now() + TIME;
        let mut n = 0;
        let mut worked = Ok(());
        while worked.is_ok() && (Instant::now() < end || n < 50) && !users.iter().any(|u| u.is_finished()) {
            worked = writer(n);
            n += 1;
        }
        drop(stopping);
        for user in users {
            user.join().map_err(|_| "a vCPU panicked: see above")??;
        }
        worked?;
        Ok(())
    })
}

/// Private copies of a file's pages are made under readers on another CPU, with neighbours mapped around, while the
/// mapping goes and comes: who reads sees the file's word or the copy's, and a copy never loses what was written.
fn private_copies<F: Format>(pages: u64) -> Result {
    let machine = Machine::<F>::new(hardware());
    let space: Space<F> = Arc::new(AddressSpace::new(machine, policy())?);
    let cache =
        FileCache::new(machine, MachineFile::pattern(|at| (at / PAGE_SIZE) as u8 | 0x80), pages * PAGE_SIZE)?;
    let map = |place| {
        let backing = Backing::File { file: cache.clone(), first: 0 };
        Map { backing, place, ..Map::anonymous(pages * PAGE_SIZE, RW) }
    };
    let at = space.map(map(Place::Anywhere))?.range.start;
    race(
        &[&space],
        |cpu, dice, seed| {
            let i = dice.roll(pages);
            let file = u64::from_le_bytes([i as u8 | 0x80; 8]);
            let slot = VirtAddr(page(at, i).0 + 4096 - 8 * seed);
            let end = match dice.roll(3) {
                0 => cpu.store_u64(slot, i << 8 | seed),
                _ => match cpu.load_u64(slot) {
                    Ok(found) if found == file || found == i << 8 | seed => Ok(()),
                    Ok(found) => return Err(format!("page {i}: {found:#x}")),
                    Err(trap) => Err(trap),
                },
            };
            match end.map_err(|t| t.error) {
                Ok(()) | Err(FaultError::Segv(Segv::NotMapped)) => Ok(()),
                Err(error) => Err(error.to_string()),
            }
        },
        |n| {
            let first = n * 7 % pages;
            match n % 3 {
                0 => space.discard(page(at, first), (pages - first) * PAGE_SIZE)?,
                1 => drop(space.map(map(Place::Fixed(at)))?),
                _ => {
                    space.unmap(at, pages * PAGE_SIZE)?;
                    cache.evict(machine);
                    space.map(map(Place::FixedNoReplace(at)))?;
                }
            }
            Ok(())
        },
    )?;
    machine.check_space(&space);
    space.unmap(at, pages * PAGE_SIZE)?;
    let mut byte = [0];
    for i in 0..pages {
        assert_eq!(cache.read_at(machine, i * PAGE_SIZE + 4088, &mut byte)?, 1);
        assert_eq!(byte, [i as u8 | 0x80], "a private write reached page {i} of the file");
    }
    drop(space);
    drop(cache);
    machine.nothing_left()?;
    Ok(())
}

#[test]
fn stress_private_copies() -> Result {
    private_copies::<X86_64>(40)
}

#[test]
fn stress_private_copies_on_tiny() -> Result {
    private_copies::<Tiny>(6)
}

/// Where a copy takes a page's place only after it was broken and flushed.
#[test]
fn stress_private_copies_on_aarch64() -> Result {
    private_copies::<Aarch64>(8)
}

/// Two spaces share a file and take turns on the CPUs; translations stay by tag. Sums of atomic additions through
/// both are exact.
#[test]
fn stress_shared_memory_of_two_spaces() -> Result {
    const PAGES: u64 = 20;
    let tlb = TlbShape { sets: 8, ways: 2 };
    let machine = Machine::<X86_64>::new(Config { keep_tags: true, tlb, ..hardware() });
    let cache = FileCache::new(machine, MachineFile::zeros(), PAGES * PAGE_SIZE)?;
    let (a, b): (Space<X86_64>, Space<X86_64>) =
        (Arc::new(AddressSpace::new(machine, policy())?), Arc::new(AddressSpace::new(machine, policy())?));
    let at = VirtAddr(0x4000_0000);
    let map = || {
        let backing = Backing::File { file: cache.clone(), first: 0 };
        let place = Place::Fixed(at);
        Map { backing, place, flags: VmaFlags::SHARED, ..Map::anonymous(PAGES * PAGE_SIZE, RW) }
    };
    a.map(map())?;
    b.map(map())?;
    let added = std::sync::atomic::AtomicU64::new(0);
    race(
        &[&a, &b],
        |cpu, dice, _| {
            let i = dice.roll(PAGES);
            match cpu.fetch_add_u64(page(at, i), 1).map_err(|t| t.error) {
                Ok(_) => {
                    added.fetch_add(1, Relaxed);
                    Ok(())
                }
                Err(FaultError::Segv(_)) => Ok(()),
                Err(error) => Err(error.to_string()),
            }
        },
        |n| {
            let space = if n % 2 == 0 { &a } else { &b };
            match n % 5 {
                0 => space.discard(at, PAGES * PAGE_SIZE)?,
                1 => drop(space.map(map())?),
                2 => {
                    space.protect(at, PAGES * PAGE_SIZE, Prot::READ)?;
                    space.protect(at, PAGES * PAGE_SIZE, RW)?;
                }
                3 => {
                    let moved = pagefirst::space::RemapTo::Fixed(VirtAddr(0x8000_0000));
                    space.remap(at, PAGES * PAGE_SIZE, PAGES * PAGE_SIZE, moved)?;
                    space.map(map())?;
                    space.unmap(VirtAddr(0x8000_0000), PAGES * PAGE_SIZE)?;
                }
                _ => space.unmap(page(at, n % PAGES), PAGE_SIZE)?,
            }
            Ok(())
        },
    )?;
    let mut sum = 0;
    for i in 0..PAGES {
        let mut word = [0; 8];
        cache.read_at(machine, i * PAGE_SIZE, &mut word)?;
        sum += u64::from_le_bytes(word);
    }
    assert_eq!(sum, added.load(Relaxed));
    drop((a, b, cache));
    machine.nothing_left()?;
    Ok(())
}

/// Memory is out most of the time: that is an outcome, and nothing leaks.
#[test]
fn stress_out_of_memory() -> Result {
    const PAGES: u64 = 400;
    let machine = Machine::<X86_64>::new(Config { memory: 128 * PAGE_SIZE, ..hardware() });
    let space: Space<X86_64> = Arc::new(AddressSpace::new(machine, policy())?);
    let at = space.map(Map::anonymous(PAGES * PAGE_SIZE, RW))?.range.start;
    let out = std::sync::atomic::AtomicU64::new(0);
    race(
        &[&space],
        |cpu, dice, _| match cpu.touch(page(at, dice.roll(PAGES)), Access::Write).map_err(|t| t.error) {
            Ok(()) => Ok(()),
            Err(FaultError::NoMemory) => {
                out.fetch_add(1, Relaxed);
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        },
        |n| {
            std::thread::sleep(Duration::from_millis(2));
            space.discard(page(at, n * 13 % PAGES), PAGE_SIZE * (1 + n % (PAGES - n * 13 % PAGES)))?;
            Ok(())
        },
    )?;
    assert!(out.load(Relaxed) > 0);
    machine.check_space(&space);
    drop(space);
    machine.nothing_left()?;
    Ok(())
}

/// A file that grows and shrinks under its readers, who see its bytes, zeros, or SIGBUS.
#[test]
fn stress_a_file_that_changes_its_size() -> Result {
    const PAGES: u64 = 32;
    let machine = Machine::<X86_64>::new(hardware());
    let space: Space<X86_64> = Arc::new(AddressSpace::new(machine, policy())?);
    let cache = FileCache::new(machine, MachineFile::zeros(), PAGES * PAGE_SIZE)?;
    let backing = Backing::File { file: cache.clone(), first: 0 };
    let map = Map { backing, flags: VmaFlags::SHARED, ..Map::anonymous(PAGES * PAGE_SIZE, RW) };
    let at = space.map(map)?.range.start;
    race(
        &[&space],
        |cpu, dice, _| {
            let i = dice.roll(PAGES);
            let end = match dice.roll(4) {
                0 => cpu.store_u64(page(at, i), i + 1),
                _ => match cpu.load_u64(page(at, i)) {
                    Ok(found) if found == 0 || found == i + 1 => Ok(()),
                    Ok(found) => return Err(format!("page {i}: {found:#x}")),
                    Err(trap) => Err(trap),
                },
            };
            match end.map_err(|t| t.error) {
                Ok(()) | Err(FaultError::Bus(Bus::BeyondEnd)) => Ok(()),
                Err(error) => Err(error.to_string()),
            }
        },
        |n| {
            let size = n * 11 % PAGES * PAGE_SIZE + n % 3 * 100;
            cache.set_size(machine, size);
            let end = size.div_ceil(PAGE_SIZE);
            let left = (end..PAGES)
                .find(|i| space.page_table().translate(&Pin::new(machine), page(at, *i)).is_some());
            if let Some(i) = left {
                return Err(format!("page {i} is mapped, beyond {end}").into());
            }
            if n % 5 == 0 {
                cache.punch(machine, size / 2..size);
            }
            Ok(())
        },
    )?;
    drop((space, cache));
    machine.nothing_left()?;
    Ok(())
}
