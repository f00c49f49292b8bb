//! The machine's own hardware: TLB, walker, shootdown, counting.

use pagefirst::arch::{Attrs, Format, Tiny, X86_64};
use pagefirst::fault::{FaultError, Segv, Signal};
use pagefirst::platform::Platform;
use pagefirst::policy::Policy;
use pagefirst::space::{AddressSpace, Map, Place};
use pagefirst::tlb::Flush;
use pagefirst::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr, VirtRange};
use pagefirst_machine::{Config, Machine, TlbShape, Vcpu};
use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;
const RW: Prot = Prot::READ.union(Prot::WRITE);

fn space<F: Format>(machine: &'static Machine<F>) -> Result<Arc<AddressSpace<Machine<F>>>> {
    let policy = Policy { min_addr: VirtAddr(PAGE_SIZE), ..Policy::default() };
    Ok(Arc::new(AddressSpace::new(machine, policy)?))
}

/// The leaf entry for an address, read as hardware would.
fn entry<F: Format>(machine: &'static Machine<F>, root: Pfn, va: VirtAddr) -> u64 {
    let mut table = root;
    for level in (0..F::LEVELS).rev() {
        let raw = machine.cells(table)[F::index(va, level)].load(std::sync::atomic::Ordering::Acquire);
        match F::child(raw, level) {
            Some(child) => table = child,
            None => return raw,
        }
    }
    unreachable!("level 0 has no children")
}

#[test]
fn machine_accessed_and_dirty_are_set_as_hardware_does() -> Result {
    let machine = Machine::<X86_64>::new(Config::default());
    let s = space(machine)?;
    let at = s.map(Map::anonymous(1 << 20, RW))?.range.start;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    cpu.store_u64(at, 5)?;
    let root = s.page_table().root_frame();
    let attrs = X86_64::attrs(entry(machine, root, at));
    assert!(attrs.contains(Attrs::ACCESSED | Attrs::DIRTY | Attrs::WRITE));
    // The root's entry was used as well.
    let top = machine.cells(root)[X86_64::index(at, 3)].load(std::sync::atomic::Ordering::Acquire);
    assert!(X86_64::attrs(top).contains(Attrs::ACCESSED));
    machine.compare(s.page_table())?;
    Ok(())
}

#[test]
fn machine_a_tlb_hit_does_not_walk() -> Result {
    let machine = Machine::<X86_64>::new(Config { tlb: TlbShape { sets: 4, ways: 2 }, ..Config::default() });
    let s = space(machine)?;
    let at = s.map(Map::anonymous(1 << 20, RW))?.range.start;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    let page = |i: u64| VirtAddr(at.0 + i * PAGE_SIZE);
    cpu.touch(page(0), Access::Write)?;
    let before = machine.counts();
    for _ in 0..100 {
        cpu.touch(page(0), Access::Write)?;
        cpu.touch(page(0), Access::Read)?;
    }
    assert_eq!((machine.counts() - before).tlb_misses, 0);
    for i in [4, 8] {
        cpu.touch(page(i), Access::Write)?; // the same set, two ways
    }
    let before = machine.counts();
    cpu.touch(page(0), Access::Read)?;
    let spent = machine.counts() - before;
    assert_eq!((spent.tlb_misses, spent.faults), (1, 0));
    Ok(())
}

#[test]
fn machine_leaving_a_space_flushes_it_unless_tags_are_kept() -> Result {
    for keep_tags in [false, true] {
        let machine = Machine::<X86_64>::new(Config { keep_tags, ..Config::default() });
        let (a, b) = (space(machine)?, space(machine)?);
        let at = a.map(Map::anonymous(1 << 20, RW))?.range.start;
        b.map(Map { place: Place::Fixed(at), ..Map::anonymous(1 << 20, RW) })?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&a);
        cpu.store_u64(at, 1)?;
        cpu.switch_to(&b);
        assert_eq!(cpu.load_u64(at)?, 0, "another space's translation was used");
        cpu.store_u64(at, 2)?;
        assert_eq!(a.page_table().cpus().contains(cpu.cpu()), keep_tags);
        let before = machine.counts();
        cpu.switch_to(&a);
        assert_eq!(cpu.load_u64(at)?, 1);
        assert_eq!((machine.counts() - before).tlb_misses, !keep_tags as u64);
        // A space that is kept by tag only is flushed all the same.
        b.unmap(at, 1 << 20)?;
        cpu.switch_to(&b);
        assert!(cpu.load_u64(at).is_err());
        drop(cpu);
        drop((a, b));
        machine.nothing_left()?;
    }
    Ok(())
}

#[test]
fn machine_a_shootdown_interrupts_the_other_cpus_of_the_space() -> Result {
    let machine = Machine::<X86_64>::new(Config::default());
    let s = space(machine)?;
    let at = s.map(Map::anonymous(1 << 20, RW))?.range.start;
    let (ready, go) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
    std::thread::scope(|scope| -> Result {
        let other = scope.spawn(|| {
            let mut cpu = machine.vcpu();
            cpu.switch_to(&s);
            let stored = cpu.store_u64(at, 7);
            ready.wait();
            go.wait();
            (stored, cpu.load_u64(at))
        });
        ready.wait();
        let before = machine.counts();
        s.unmap(at, 1 << 20)?;
        let spent = machine.counts() - before;
        assert_eq!((spent.shootdowns, spent.ipis), (1, 1));
        go.wait();
        let (stored, loaded) = other.join().map_err(|_| "the other thread panicked")?;
        stored?;
        assert_eq!(loaded.map_err(|t| t.error), Err(FaultError::Segv(Segv::NotMapped)));
        Ok(())
    })
}

#[test]
fn machine_an_access_that_spans_pages_is_split() -> Result {
    let machine = Machine::<X86_64>::new(Config::default());
    let s = space(machine)?;
    let at = s.map(Map::anonymous(2 * PAGE_SIZE, RW))?.range.start;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    let across = VirtAddr(at.0 + PAGE_SIZE - 3);
    cpu.store(across, b"abcdef")?;
    let mut got = [0; 8];
    cpu.load(VirtAddr(across.0 - 1), &mut got)?;
    assert_eq!(&got, b"\0abcdef\0");
    let past = VirtAddr(at.0 + 2 * PAGE_SIZE - 3);
    let trap = cpu.store(past, b"abcdef").expect_err("beyond the mapping");
    assert_eq!(trap.addr, VirtAddr(at.0 + 2 * PAGE_SIZE));
    assert_eq!(cpu.load_u8(past)?, b'a', "what came before the trap is stored");
    Ok(())
}

#[test]
fn machine_signals_are_linuxs() -> Result {
    let machine = Machine::<X86_64>::new(Config::default());
    let s = space(machine)?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    let mut signal = |at: u64| {
        let trap = cpu.load_u8(VirtAddr(at)).expect_err("nothing is mapped");
        (trap.signal(), trap.si_addr())
    };
    assert_eq!(signal(0x5000), (Some((Signal::Segv, 1)), 0x5000));
    assert_eq!(signal(0xffff_8000_0000_0000), (Some((Signal::Segv, 1)), 0xffff_8000_0000_0000));
    assert_eq!(signal(0x8000_0000_0000_0000), (Some((Signal::Segv, 128)), 0));
    Ok(())
}

#[test]
fn machine_a_small_memory_boots_and_runs_out_as_a_value() -> Result {
    let machine = Machine::<X86_64>::new(Config { memory: 64 * PAGE_SIZE, ..Config::default() });
    let s = space(machine)?;
    let at = s.map(Map::anonymous(1 << 20, RW))?.range.start;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    let mut touched = 0;
    let trap = loop {
        match cpu.store_u64(VirtAddr(at.0 + touched * PAGE_SIZE), touched) {
            Ok(()) => touched += 1,
            Err(trap) => break trap,
        }
    };
    assert_eq!(trap.error, FaultError::NoMemory);
    assert!(touched > 40, "{touched} pages of 64");
    for i in 0..touched {
        assert_eq!(cpu.load_u64(VirtAddr(at.0 + i * PAGE_SIZE))?, i);
    }
    s.discard(at, 1 << 20)?;
    cpu.store_u64(at, 1)?;
    machine.compare(s.page_table())?;
    drop(cpu);
    drop(s);
    machine.nothing_left()?;
    Ok(())
}

#[test]
fn machine_memory_can_be_used_up_for_a_while() -> Result {
    let machine = Machine::<X86_64>::new(Config::default());
    let s = space(machine)?;
    let at = s.map(Map::anonymous(1 << 20, RW))?.range.start;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    let taken = machine.leave_free(2);
    assert_eq!(machine.free_frames(), 2);
    assert_eq!(cpu.store_u64(at, 1).map_err(|t| t.error), Err(FaultError::NoMemory));
    drop(taken);
    cpu.store_u64(at, 1)?;
    Ok(())
}

#[test]
fn machine_tiny_runs_the_library() -> Result {
    let machine = Machine::<Tiny>::new(Config { memory: 256 * PAGE_SIZE, ..Config::default() });
    let s = space(machine)?;
    let at = s.map(Map::anonymous(8 * PAGE_SIZE, RW))?.range.start;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    for i in 0..8 {
        assert_eq!(cpu.load_u64(VirtAddr(at.0 + i * PAGE_SIZE))?, 0);
        cpu.store_u64(VirtAddr(at.0 + i * PAGE_SIZE + 4088), i)?;
        assert_eq!(cpu.load_u64(VirtAddr(at.0 + i * PAGE_SIZE + 4088))?, i);
    }
    let found = machine.compare(s.page_table())?;
    assert_eq!(found.present, 8);
    s.unmap(at, 4 * PAGE_SIZE)?;
    assert_eq!(cpu.load_u64(VirtAddr(at.0 + 4 * PAGE_SIZE + 4088))?, 4);
    drop(cpu);
    drop(s);
    machine.nothing_left()?;
    Ok(())
}

#[test]
fn machine_random_is_seeded() {
    let draw = |seed| {
        let machine = Machine::<X86_64>::new(Config { seed, memory: 1 << 20, ..Config::default() });
        [machine.random(), machine.random()]
    };
    assert_eq!(draw(3), draw(3));
    assert_ne!(draw(3), draw(4));
    assert_ne!(draw(3)[0], draw(3)[1]);
}

#[test]
fn machine_memory_is_committed_as_it_is_touched() -> Result {
    let resident = || -> Result<u64> {
        let text = std::fs::read_to_string("/proc/self/statm")?;
        let pages: u64 = text.split_whitespace().nth(1).ok_or("statm")?.parse()?;
        Ok(pages * PAGE_SIZE)
    };
    let before = resident()?;
    let machine = Machine::<X86_64>::new(Config { memory: 4 << 30, ..Config::default() });
    assert_eq!(machine.vm().frames.total_frames(), (4 << 30) / PAGE_SIZE - (32 << 20) / PAGE_SIZE);
    let grown = resident()?.saturating_sub(before);
    assert!(grown < 128 << 20, "4 GiB of memory cost {grown} bytes at boot");
    Ok(())
}

/// A space with one page mapped on its own machine, on whose entries tests play.
fn one_page(config: Config) -> Result<(&'static Machine, Arc<AddressSpace<Machine>>, VirtAddr)> {
    let machine = Machine::<X86_64>::new(Config { livelock: 100, ..config });
    let s = space(machine)?;
    let at =
        s.map(Map { place: Place::Fixed(VirtAddr(1 << 30)), ..Map::anonymous(4 << 20, RW) })?.range.start;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    cpu.store_u64(at, 1)?;
    Ok((machine, s, at))
}

#[test]
fn machine_an_access_needs_the_rights_of_every_level() -> Result {
    const WRITE: u64 = 1 << 1;
    const USER: u64 = 1 << 2;
    for (bit, level) in [(WRITE, 3), (WRITE, 2), (WRITE, 1), (USER, 3), (USER, 1)] {
        let (machine, s, at) = one_page(Config::default())?;
        let path = machine.hook_path(s.page_table().root_frame(), at);
        let entry = machine.hook_entry(path[3 - level as usize], level, at);
        entry.fetch_and(!bit, Relaxed);
        machine.hook_flush_all(s.page_table().tag());
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        let mut refused = |access| {
            catch_unwind(AssertUnwindSafe(|| cpu.touch(at, access))).is_err() // fault after fault does nothing
        };
        assert_eq!(refused(Access::Read), bit == USER, "level {level}");
        assert!(bit == USER || refused(Access::Write), "level {level}");
    }
    Ok(())
}

#[test]
fn machine_a_walk_starts_at_the_lowest_inner_entry_it_knows() -> Result {
    for walk_cache in [0, 16] {
        let (machine, s, at) = one_page(Config { walk_cache, ..Config::default() })?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        cpu.touch(at, Access::Read)?;
        // Without the flush that the library would have sent, the old way down is still taken.
        let path = machine.hook_path(s.page_table().root_frame(), at);
        let leaf = machine.hook_entry(path[3], 0, at).load(Relaxed);
        let next = VirtAddr(at.0 + PAGE_SIZE);
        machine.hook_entry(path[3], 0, next).store(leaf, Relaxed);
        machine.hook_entry(path[1], 2, at).store(0, Relaxed);
        let before = machine.counts();
        let read = cpu.load_u64(next)?;
        let faults = (machine.counts() - before).faults;
        assert_eq!((faults, read), if walk_cache == 0 { (1, 0) } else { (0, 1) });
        std::mem::forget(cpu);
        std::mem::forget(s);
    }
    Ok(())
}

#[test]
fn machine_a_huge_page_is_one_translation_or_many_and_goes_as_one() -> Result {
    const HUGE: u64 = 2 << 20;
    for (huge_tlb, misses) in [(Some(TlbShape { sets: 1, ways: 1 }), 1), (None, 512)] {
        let (machine, s, at) = one_page(Config { huge_tlb, checks: false, ..Config::default() })?;
        let table = s.page_table();
        let huge = VirtAddr(at.0 + HUGE);
        let path = machine.hook_path(table.root_frame(), at);
        let attrs = Attrs::WRITE | Attrs::ACCESSED;
        machine.hook_entry(path[2], 1, huge).store(X86_64::leaf(Pfn(4096), 1, attrs), Relaxed);
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        let touch_all = |cpu: &mut Vcpu| -> Result<u64> {
            let before = machine.counts();
            for i in 0..512 {
                cpu.touch(VirtAddr(huge.0 + i * PAGE_SIZE), Access::Write)?;
            }
            Ok((machine.counts() - before).tlb_misses)
        };
        assert_eq!((touch_all(&mut cpu)?, touch_all(&mut cpu)?), (misses, 0));
        assert!(X86_64::attrs(entry(machine, table.root_frame(), huge)).contains(Attrs::DIRTY));
        cpu.store_u64(VirtAddr(huge.0 + 7 * PAGE_SIZE), 77)?;
        assert_eq!(machine.cells(Pfn(4096 + 7))[0].load(Relaxed), 77);
        // A flush of one page in it takes it all.
        let range = VirtRange::page_of(VirtAddr(huge.0 + 300 * PAGE_SIZE));
        machine.shootdown(&Flush { cpus: table.cpus(), tag: table.tag(), range, tables: false });
        assert_eq!(touch_all(&mut cpu)?, misses);
        machine.hook_entry(path[2], 1, huge).store(0, Relaxed);
    }
    Ok(())
}
