//! Copies by kernels on two CPUs, beside programs, while the memory goes, comes back and changes its rights.

use super::*;
use pagefirst::arch::X86_64;
use pagefirst_machine::{Config, Vcpu};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::{Duration, Instant};

const TIME: Duration = Duration::from_millis(1200);

/// Goes on until done, past what only blocks; other ends are told.
fn patiently<F: Format>(
    machine: &'static Machine<F>,
    mut rest: impl FnMut(usize) -> Either<(), (usize, Option<FaultError>)>,
) -> Either<(), FaultError> {
    let mut done = 0;
    loop {
        match rest(done) {
            Ok(()) => return Ok(()),
            Err((_, Some(error))) => return Err(error),
            Err((more, None)) => {
                done += more;
                machine.relax();
            }
        }
    }
}

fn told<F: Format>(end: Either<(), Stopped<'_, Machine<F>>>) -> Either<(), (usize, Option<FaultError>)> {
    end.map_err(|Stopped { done, why }| match why {
        Why::Error(error) => (done, Some(error)),
        Why::Blocked(_) => (done, None),
        Why::Misaligned => unreachable!("copies do not ask for that"),
    })
}

fn out<F: Format>(s: &Space<F>, to: VirtAddr, from: &[u8]) -> Either<(), FaultError> {
    patiently(s.platform(), |done| told(s.copy_out(VirtAddr(to.0 + done as u64), &from[done..])))
}

fn into<F: Format>(s: &Space<F>, from: VirtAddr, to: &mut [u8]) -> Either<(), FaultError> {
    patiently(s.platform(), |done| told(s.copy_in(VirtAddr(from.0 + done as u64), &mut to[done..])))
}

/// Runs `users` threads until `writer` has worked for a while, and it is enough.
fn race<F: Format>(
    machine: &'static Machine<F>,
    users: u64,
    user: impl Fn(u64, u64) + Sync,
    mut writer: impl FnMut(u64) -> Result,
    is_enough: impl Fn() -> bool,
) -> Result {
    let stop = AtomicBool::new(false);
    let mut calls = 0;
    let run = |n| {
        let _stop = StopAtEnd(&stop);
        let mut turn = 0;
        while !stop.load(Acquire) {
            user(n, turn);
            turn += 1;
        }
        machine.release_cpu();
    };
    together(users, run, || {
        let _stop = StopAtEnd(&stop);
        let end = Instant::now() + TIME;
        until(|| {
            writer(calls).expect("a mapping call");
            calls += 1;
            Instant::now() >= end && calls > 50 && is_enough() || stop.load(Acquire)
        });
    });
    assert!(calls > 50, "{calls} calls");
    Ok(())
}

/// Two kernels write their own numbers through two pages' edge and read each other's, while the mapping is unmapped,
/// discarded, protected, mapped over. Who reads finds a number of that place, or zero.
fn numbers<F: Format>(machine: &'static Machine<F>, pages: u64) -> Result {
    let s = space(machine)?;
    let start = s.map(anonymous(pages, RW))?.range.start;
    let write = |n: u64, turn: u64| {
        // Eight numbers, unaligned words, across the edge of pages i and i + 1.
        let i = turn * 7 % (pages - 1);
        let place = VirtAddr(page(start, i + 1).0 - 31 - 64 * n);
        let number = |who: u64| (i << 8 | who | 0x80).to_ne_bytes();
        let end = match turn % 2 {
            0 => out(&s, place, &number(n).repeat(8)),
            _ => {
                let who = turn / 2 % 2;
                let mut found = [0; 64];
                into(&s, VirtAddr(page(start, i + 1).0 - 31 - 64 * who), &mut found).inspect(|()| {
                    // Each half of it at once or not: a word may be torn at the page's edge alone.
                    let legal = |(at, byte): (usize, &u8)| *byte == 0 || *byte == number(who)[at % 8];
                    assert!(found.iter().enumerate().all(legal), "page {i}: {found:x?}");
                })
            }
        };
        assert!(matches!(end, Ok(()) | Err(FaultError::Segv(_))), "{end:?}");
    };
    let change = |n| {
        let first = n * 5 % pages;
        let len = (pages - first) * PAGE_SIZE;
        match n % 5 {
            0 => s.discard(page(start, first), len)?,
            1 => s.protect(page(start, first), len, R)?,
            2 => s.protect(page(start, first), len, RW)?,
            3 => s.unmap(page(start, first), len)?,
            _ => drop(s.map(at(page(start, first), anonymous(pages - first, RW)))?),
        }
        if n % 5 == 3 {
            s.map(at(page(start, first), anonymous(pages - first, RW)))?;
        }
        Ok(())
    };
    race(machine, 2, write, change, || true)?;
    check(&s);
    drop(s);
    machine.nothing_left()?;
    Ok(())
}

#[test]
fn race_copies_and_mapping_calls() -> Result {
    numbers::<X86_64>(
        Machine::new(Config { checks: true, memory: 16 << 20, cpus: 4, ..Config::default() }),
        300,
    )?;
    numbers::<Tiny>(Machine::new(Config { checks: true, memory: 4 << 20, cpus: 4, ..Config::default() }), 12)
}

/// A counter raised by compare-exchange of two kernels and by the atomic instruction of a program, in a page whose
/// rights come and go: no step is lost, none is taken twice.
#[test]
fn race_a_counter_loses_no_step() -> Result {
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let start = s.map(anonymous(2, RW))?.range.start;
    let steps: [std::sync::atomic::AtomicU64; 3] = Default::default();
    let exchange = |n: usize| {
        let mut old = 0;
        loop {
            match s.compare_exchange_u64(start, old, old + 1) {
                Ok(Ok(_)) => break,
                Ok(Err(found)) => old = found,
                Err(Why::Error(FaultError::Segv(Segv::Access)) | Why::Blocked(_)) => return machine.relax(),
                Err(other) => panic!("{other:?}"),
            }
        }
        steps[n].fetch_add(1, Relaxed);
    };
    let program = || {
        let mut cpu: Vcpu = machine.vcpu();
        cpu.switch_to(&s);
        for _ in 0..50 {
            if cpu.fetch_add_u64(start, 1).is_ok() {
                steps[2].fetch_add(1, Relaxed);
            }
            // Its other half belongs to somebody else.
            let _ = cpu.store_u8(VirtAddr(start.0 + 8), 1);
        }
    };
    let user = |n, _| if n == 2 { program() } else { exchange(n as usize) };
    let change = |n| {
        let prot = [R, RW, NONE, RW][n as usize % 4];
        Ok(s.protect(start, PAGE_SIZE, prot)?)
    };
    race(machine, 3, user, change, || steps.iter().all(|n| n.load(Relaxed) > 20))?;
    s.protect(start, PAGE_SIZE, RW)?;
    let mut found = [0; 8];
    into(&s, start, &mut found).map_err(|e| e.to_string())?;
    let steps = steps.map(std::sync::atomic::AtomicU64::into_inner);
    assert_eq!(u64::from_ne_bytes(found), steps.iter().sum::<u64>(), "{steps:?}");
    assert!(steps.iter().all(|n| *n > 20), "{steps:?}");
    check(&s);
    Ok(())
}

/// What was copied into a shared mapping of a file is in the file, whatever takes the mapping away right after it and
/// whoever drops the page then.
#[test]
fn race_a_copy_into_a_file_is_not_lost_when_the_mapping_goes() -> Result {
    const PAGES: u64 = 20;
    let machine: &'static Machine = machine();
    let s = space(machine)?;
    let c = cache(machine, &MachineFile::zeros().with_tracking(true), PAGES)?;
    s.map(at(AT, shared(&c, 0, PAGES, RW)))?;
    let lasting: [[std::sync::atomic::AtomicU64; PAGES as usize]; 2] = Default::default();
    let user = |n: u64, turn: u64| {
        let i = turn * 3 % PAGES;
        let place = 8 * n + 16 * (i % 5);
        let count = &lasting[n as usize][i as usize];
        let number = count.load(Relaxed) + 1;
        match out(&s, VirtAddr(page(AT, i).0 + place), &number.to_ne_bytes()) {
            Ok(()) => count.store(number, Release),
            Err(FaultError::Segv(Segv::NotMapped)) => {}
            Err(other) => panic!("{other}"),
        }
        let mut found = [0; 8];
        match c.read_at(machine, i * PAGE_SIZE + place, &mut found) {
            Ok(8) => assert_eq!(u64::from_ne_bytes(found), count.load(Relaxed), "page {i}, turn {turn}"),
            Ok(n) => panic!("{n} bytes"),
            Err(_) => machine.relax(), // another reads it in
        }
    };
    let change = |n| {
        match n % 4 {
            0 => s.unmap(AT, PAGES * PAGE_SIZE)?,
            1 => _ = c.write_back(machine)?,
            2 => _ = c.evict(machine),
            _ => drop(s.map(at(AT, shared(&c, 0, PAGES, RW)))?),
        }
        Ok(())
    };
    let written = || lasting.iter().flatten().map(|n| n.load(Acquire)).sum::<u64>();
    race(machine, 2, user, change, || written() > 1000)?;
    assert!(written() > 1000);
    check(&s);
    Ok(())
}
