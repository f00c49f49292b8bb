//! Whole lives of spaces and files on small machines: little of everything, so that Miri can run all of it
//! (`cargo xtask miri`): it looks for memory that is used after it was given back, read before it was written, or
//! reached by a pointer that may not, and for data races.

mod kit;

use kit::*;
use pagefirst::Poisoned;
use pagefirst::arch::{Aarch64, Format, Sv39, Tiny, X86_64};
use pagefirst::fault::{Bus, FaultError, Outcome, Segv};
use pagefirst::file::Syncing;
use pagefirst::limit::Limit;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::RemapTo;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr, VirtRange};
use pagefirst_machine::{Config, Late, Machine, MachineFile, TlbShape, Trap, Vcpu};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::task::{Context, Poll, Wake};

const AT: VirtAddr = VirtAddr(0x4000);
const FAR: VirtAddr = VirtAddr(0xa000);

/// A quarter of a megabyte, and hardware of the format's kind with few translations.
fn small<F: Format>() -> &'static Machine<F> {
    let tlb = TlbShape { sets: 2, ways: 2 };
    Machine::new(Config { memory: 256 << 10, cpus: 4, tlb, huge_tlb: Some(tlb), ..hardware_of::<F>(false) })
}

/// A CPU that runs a space.
fn on<F: Format>(s: &Space<F>) -> Vcpu<F> {
    let mut cpu = s.platform().vcpu();
    cpu.switch_to(s);
    cpu
}

/// Nothing is mapped there, or it may not be touched, or its file is shorter: what a race can come to.
fn unless_gone(end: std::result::Result<u64, Trap>) -> Option<u64> {
    match end {
        Ok(value) => Some(value),
        Err(trap) => match trap.error {
            FaultError::Segv(Segv::NotMapped | Segv::Access) | FaultError::Bus(Bus::BeyondEnd) => None,
            error => panic!("{error:?} at {}", trap.addr),
        },
    }
}

fn private_memory<F: Format>() -> Result {
    let machine = small::<F>();
    let s = space(machine)?;
    s.map(at(AT, anonymous(4, RW)))?;
    let mut cpu = on(&s);
    cpu.load_u64(page(AT, 3))?;
    (0..4).try_for_each(|i| cpu.store_u64(page(AT, i), i + 1))?;
    let child = fork(&s)?;
    cpu.store_u64(AT, 10)?;
    cpu.switch_to(&child);
    assert_eq!((cpu.load_u64(AT)?, cpu.load_u64(page(AT, 1))?), (1, 2));
    cpu.store_u64(page(AT, 1), 20)?;
    s.protect(page(AT, 1), 2 * PAGE_SIZE, R)?;
    s.discard(page(AT, 3), PAGE_SIZE)?;
    s.remap(page(AT, 1), PAGE_SIZE, PAGE_SIZE, RemapTo::Fixed(FAR))?;
    cpu.switch_to(&s);
    assert_eq!((cpu.load_u64(FAR)?, cpu.load_u64(page(AT, 3))?), (2, 0));
    assert!(cpu.store_u64(FAR, 1).is_err() && cpu.load_u64(page(AT, 1)).is_err());
    // Both have the third page: it is found in both.
    let bad = frame(&child, page(AT, 2)).ok_or("mapped")?;
    assert_eq!(machine.vm().poison(machine, bad), Poisoned::Private { huge: false });
    assert!(cpu.load_u64(page(AT, 2)).is_err());
    let pinned = s.pin(VirtRange::page_of(AT), true).map_err(|_| "memory to pin")?;
    s.unmap(AT, 4 * PAGE_SIZE)?;
    drop((pinned, cpu));
    check(&child);
    check(&s);
    drop((s, child));
    machine.nothing_left()?;
    Ok(())
}

#[test]
fn private_memory_x86_64() -> Result {
    private_memory::<X86_64>()
}
#[test]
fn private_memory_aarch64() -> Result {
    private_memory::<Aarch64>()
}
#[test]
fn private_memory_sv39() -> Result {
    private_memory::<Sv39>()
}

#[test]
fn a_file() -> Result {
    const PAGES: u64 = 4;
    let machine = small::<X86_64>();
    let file = MachineFile::zeros().with_tracking(true);
    let (s, c) = (space(machine)?, cache(machine, &file, PAGES)?);
    c.write_at(machine, 0, b"written")?;
    c.write_at(machine, 3 * PAGE_SIZE - 4, b"over an edge")?;
    s.map(at(AT, shared(&c, 0, PAGES, RW)))?;
    s.map(at(FAR, private(&c, 0, PAGES, RW)))?;
    let mut cpu = on(&s);
    let mut bytes = [0; 12];
    cpu.load(VirtAddr(page(FAR, 3).0 - 4), &mut bytes)?;
    assert_eq!(&bytes, b"over an edge");
    cpu.store(page(FAR, 2), b"mine")?;
    cpu.store(page(AT, 2), b"all's")?;
    assert_eq!((cpu.load_u8(page(FAR, 2))?, cpu.load_u8(page(AT, 2))?), (b'm', b'a'));
    c.sync(&mut Syncing::all(), &mut c.store_errors()).map_err(|e| format!("{e:?}"))?;
    assert_eq!(&file.stored(2)[..5], b"all's");
    cpu.store(page(AT, 2), b"more")?;
    let child = fork(&s)?;
    c.punch(machine, PAGE_SIZE / 2..2 * PAGE_SIZE);
    assert_eq!((cpu.load_u8(AT)?, cpu.load_u8(page(FAR, 1))?), (b'w', 0));
    c.set_size(machine, PAGE_SIZE + 100);
    assert!(cpu.load_u8(page(AT, 2)).is_err() && cpu.load_u8(page(FAR, 2)).is_err());
    c.set_size(machine, PAGES * PAGE_SIZE);
    assert_eq!(cpu.load_u8(page(AT, 2))?, 0);
    drop(cpu);
    s.unmap(AT, PAGES * PAGE_SIZE)?;
    check(&s);
    check(&child);
    drop(child);
    s.unmap(FAR, PAGES * PAGE_SIZE)?;
    c.evict(machine);
    drop((s, c));
    machine.nothing_left()?;
    Ok(())
}

/// Huge pages are four small ones here: had, forked, cut, copied. By the kernel's copies: no hardware walks these tables.
#[test]
fn huge_pages() -> Result {
    let machine = small::<Tiny>();
    let s = space_with(machine, Policy { huge: HugePolicy::Always, ..policy() })?;
    s.map(at(AT, anonymous(8, RW)))?;
    put(&s, page(AT, 1), 1)?;
    get(&s, page(AT, 5))?;
    assert_eq!(entry(&s, AT).1, 1, "huge");
    let child = fork(&s)?;
    put(&s, page(AT, 2), 2)?;
    s.unmap(AT, PAGE_SIZE)?;
    s.protect(page(AT, 6), PAGE_SIZE, R)?;
    assert_eq!((get(&s, page(AT, 1))?, get(&s, page(AT, 2))?), (1, 2));
    assert_eq!((get(&child, page(AT, 1))?, get(&child, page(AT, 2))?), (1, 0));
    check(&s);
    check(&child);
    drop((s, child));
    machine.nothing_left()?;
    Ok(())
}

/// Memory runs out in the middle of everything, for the machine and for a program.
#[test]
fn no_memory() -> Result {
    let machine = small::<X86_64>();
    let s = space(machine)?;
    let limit = Limit::new(machine, None, 3)?;
    s.set_limit(Some(limit.clone()));
    s.map(at(AT, anonymous(8, RW)))?;
    let fill = |s: &Space| (0..8).take_while(|i| put(s, page(AT, *i), 1).is_ok()).count();
    assert!(fill(&s) <= 3);
    s.set_limit(None);
    for left in [0, 1, 3] {
        s.discard(AT, 8 * PAGE_SIZE)?;
        let taken = machine.leave_free(left);
        assert!(fill(&s) as u64 <= left);
        drop(fork(&s));
        drop(taken);
        check(&s);
    }
    assert_eq!(fill(&s), 8);
    drop((s, limit));
    machine.nothing_left()?;
    Ok(())
}

struct Rings(AtomicUsize);
impl Wake for Rings {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

/// Faults wait for a page as futures; one of them gives up before it comes.
#[test]
fn pages_that_come_late() -> Result {
    let machine = small::<X86_64>();
    let file = MachineFile::zeros().late(Late::Held);
    let (s, c) = (space(machine)?, cache(machine, &file, 2)?);
    s.map(at(AT, shared(&c, 0, 2, RW)))?;
    let rings = Arc::new(Rings(AtomicUsize::new(0)));
    let waker = rings.clone().into();
    let mut cx = Context::from_waker(&waker);
    let ask = || match s.fault(AT, Access::Read) {
        Outcome::Blocked(ticket) => Ok(ticket),
        outcome => Err(format!("{outcome:?}")),
    };
    let mut first = Box::pin(ask()?.into_future());
    let mut second = Box::pin(ask()?.into_future());
    let third = Box::pin(ask()?.into_future());
    assert!(first.as_mut().poll(&mut cx).is_pending() && second.as_mut().poll(&mut cx).is_pending());
    drop(third);
    drop(second);
    std::thread::scope(|scope| scope.spawn(|| assert!(file.finish(0))).join()).map_err(|_| "a panic")?;
    assert_eq!(rings.0.load(SeqCst), 1);
    let Poll::Ready(ticket) = first.as_mut().poll(&mut cx) else { panic!("it is there") };
    assert!(matches!(s.retry(AT, Access::Read, ticket), Outcome::Mapped { major: true, .. }));
    drop(first);
    drop((s, c));
    machine.nothing_left()?;
    Ok(())
}

/// Runs `user` on two CPUs while `here` runs on this one, so many rounds each.
fn race(s: &Space, rounds: u64, user: impl Fn(&mut Vcpu, u64) + Sync, mut here: impl FnMut(u64)) {
    let run = |number: u64| {
        let mut cpu = on(s);
        (0..rounds).for_each(|round| user(&mut cpu, number * 5 + round));
    };
    together(2, run, || (0..rounds).for_each(&mut here));
}

/// Two CPUs touch the same pages first, while mappings come and go.
#[test]
fn r04_faults_against_mapping_calls() -> Result {
    let machine = small::<X86_64>();
    let s = space(machine)?;
    s.map(at(AT, anonymous(4, RW)))?;
    let user = |cpu: &mut Vcpu, n| {
        let va = page(AT, n % 4);
        if unless_gone(cpu.store_u64(va, n % 4 + 1).map(|()| 0)).is_some() {
            let found = unless_gone(cpu.load_u64(va));
            assert!(found.is_none_or(|found| [0, n % 4 + 1].contains(&found)), "{found:?}");
        }
    };
    race(&s, 6, user, |round| match round % 3 {
        0 => s.unmap(page(AT, 1), 2 * PAGE_SIZE).expect("a range"),
        1 => drop(s.map(at(page(AT, 1), anonymous(2, RW))).expect("room")),
        _ => s.discard(AT, 4 * PAGE_SIZE).expect("a range"),
    });
    check(&s);
    drop(s);
    machine.nothing_left()?;
    Ok(())
}

/// Sums of atomic additions are exact while the space forks, and its children copy and end.
#[test]
fn r12_additions_against_fork() -> Result {
    const ROUNDS: u64 = 4;
    let machine = small::<X86_64>();
    let s = space(machine)?;
    s.map(at(AT, anonymous(2, RW)))?;
    let user = |cpu: &mut Vcpu, n| assert!(cpu.fetch_add_u64(page(AT, n % 2), 1).is_ok());
    race(&s, ROUNDS, user, |round| {
        let child = s.fork().expect("memory");
        assert!(child.copy_out(AT, &[1; 16]).is_ok());
        if round % 2 == 0 {
            child.unmap(AT, PAGE_SIZE).expect("a range");
        }
    });
    assert_eq!(get(&s, AT)? + get(&s, page(AT, 1))?, 2 * ROUNDS);
    check(&s);
    drop(s);
    machine.nothing_left()?;
    Ok(())
}

/// A file shrinks, grows and has holes, loses clean pages and is written back, while two CPUs read and write it.
#[test]
fn r05_faults_against_truncation_and_eviction() -> Result {
    const PAGES: u64 = 3;
    let machine = small::<X86_64>();
    let file = MachineFile::zeros().with_tracking(true);
    let (s, c) = (space(machine)?, cache(machine, &file, PAGES)?);
    s.map(at(AT, shared(&c, 0, PAGES, RW)))?;
    s.map(at(FAR, private(&c, 0, PAGES, RW)))?;
    let user = |cpu: &mut Vcpu, n| {
        let i = n % PAGES;
        let stored = if n % 2 == 0 { AT } else { FAR };
        unless_gone(cpu.store_u64(page(stored, i), i + 1).map(|()| 0));
        for first in [AT, FAR] {
            let found = unless_gone(cpu.load_u64(page(first, i)));
            assert!(found.is_none_or(|found| [0, i + 1].contains(&found)), "{found:?}");
        }
    };
    race(&s, 5, user, |round| match round % 5 {
        0 => c.set_size(machine, PAGE_SIZE + 8),
        1 => c.set_size(machine, PAGES * PAGE_SIZE),
        2 => drop(c.sync(&mut Syncing::all(), &mut c.store_errors())),
        3 => c.punch(machine, PAGE_SIZE..2 * PAGE_SIZE),
        _ => drop(c.evict(machine)),
    });
    check(&s);
    drop((s, c));
    machine.nothing_left()?;
    Ok(())
}

/// A page is poisoned, and moved, while others use it.
#[test]
fn r14_remap_and_poison_against_faults() -> Result {
    let machine = small::<X86_64>();
    let s = space(machine)?;
    s.map(at(AT, anonymous(2, RW)))?;
    put(&s, AT, 7)?;
    let child = fork(&s)?;
    let user = |cpu: &mut Vcpu, n| {
        for va in [AT, FAR] {
            match cpu.load_u64(va).map_err(|trap| trap.error) {
                Ok(7) | Err(FaultError::Segv(Segv::NotMapped) | FaultError::Bus(Bus::Poison)) => {}
                other => panic!("{n}: {other:?}"),
            }
        }
    };
    race(&s, 4, user, |round| {
        let (from, to) = if round % 2 == 0 { (AT, FAR) } else { (FAR, AT) };
        s.remap(from, 2 * PAGE_SIZE, 2 * PAGE_SIZE, RemapTo::Fixed(to)).expect("room");
        if round == 2
            && let Some(pfn) = frame(&s, to)
        {
            machine.vm().poison(machine, pfn);
        }
    });
    check(&s);
    check(&child);
    drop((s, child));
    machine.nothing_left()?;
    Ok(())
}
