//! The machine's own hardware: TLB, walker, shootdown, counting.

use pagefirst::arch::{Attrs, Format, Tiny, X86_64};
use pagefirst::fault::{FaultError, Segv, Signal};
use pagefirst::policy::Policy;
use pagefirst::space::{AddressSpace, Map};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr};
use pagefirst_machine::{Config, Machine, TlbShape};
use std::error::Error;
use std::sync::Arc;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;
const RW: Prot = Prot::READ.union(Prot::WRITE);

fn space<F: Format>(machine: &'static Machine<F>) -> Result<Arc<AddressSpace<Machine<F>>>> {
    let policy = Policy { min_addr: VirtAddr(PAGE_SIZE), ..Policy::default() };
    Ok(Arc::new(AddressSpace::new(machine, policy)?))
}

/// The leaf entry for an address, read as hardware would.
fn entry<F: Format>(machine: &'static Machine<F>, root: Pfn, va: VirtAddr) -> u64 {
    use pagefirst::platform::Platform;
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
    use pagefirst::platform::Platform;
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
        b.map(Map { place: pagefirst::space::Place::Fixed(at), ..Map::anonymous(1 << 20, RW) })?;
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
    use pagefirst::platform::Platform;
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
