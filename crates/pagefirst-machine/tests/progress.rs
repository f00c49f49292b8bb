//! Every fault ends, also one that loses every race.

mod doors;
mod kit;

use doors::{DoorsOf, Point, arm, arm_always, disarm};
use kit::*;
use pagefirst::arch::{Attrs, Format};
use pagefirst::fault::MOST_LOOKS;
use pagefirst::file::ShmemHuge;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::{Advice, MapError};
use pagefirst::sync::epoch::Pin;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr, VirtRange};
use pagefirst_machine::{Machine, MachineFile};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

const AT: VirtAddr = VirtAddr(1 << 30);

/// A space of one page, which each of a fault's looks finds, and then somebody is faster: the fault ends when it has looked
/// often enough, and the next one, left alone, does what it is for.
fn loses_every_race<F: Format>(
    machine: &'static Machine<DoorsOf<F>>,
    s: &Space<DoorsOf<F>>,
    access: Access,
    faster: impl Fn(&Space<DoorsOf<F>>) + Send + Sync + 'static,
) -> Result {
    let other = s.clone();
    arm_always(Point::Found, move || faster(&other));
    let before = machine.counts();
    let end = fault(s, AT, access);
    disarm();
    assert_eq!(end, End::Spurious);
    let looks = machine.counts() - before;
    assert_eq!((looks.most_looks, looks.looks_again), (MOST_LOOKS.into(), u64::from(MOST_LOOKS) - 1));
    assert!(matches!(fault(s, AT, access), End::Mapped(..)));
    check(s);
    Ok(())
}

fn protect_again<F: Format>(s: &Space<F>) {
    s.protect(AT, PAGE_SIZE, R).expect("it is mapped");
    s.protect(AT, PAGE_SIZE, RW).expect("it is mapped");
}

/// A copy of the zero page is to be made, and the mapping is another each time.
fn a_write_whose_mapping_changes<F: Format>() -> Result {
    let machine = machine_of::<DoorsOf<F>>();
    let s = space(machine)?;
    s.map(at(AT, anonymous(1, RW)))?;
    assert!(matches!(fault(&s, AT, Access::Read), End::Mapped(..)));
    loses_every_race(machine, &s, Access::Write, protect_again)?;
    drop(s);
    Ok(machine.nothing_left()?)
}

/// Nothing is mapped, and the mapping is another each time.
fn a_first_touch_whose_mapping_changes<F: Format>() -> Result {
    let machine = machine_of::<DoorsOf<F>>();
    let s = space(machine)?;
    s.map(at(AT, anonymous(1, RW)))?;
    loses_every_race(machine, &s, Access::Write, protect_again)?;
    drop(s);
    Ok(machine.nothing_left()?)
}

/// The page is read in, and gone again each time.
fn a_file_that_is_cut_each_time<F: Format>() -> Result {
    let machine = machine_of::<DoorsOf<F>>();
    let (s, c) = (space(machine)?, cache(machine, &MachineFile::shmem(ShmemHuge::Never), 1)?);
    s.map(at(AT, shared(&c, 0, 1, RW)))?;
    let file = c.clone();
    loses_every_race(machine, &s, Access::Write, move |s| {
        file.set_size(s.platform(), 0);
        file.set_size(s.platform(), PAGE_SIZE);
    })?;
    drop((s, c));
    Ok(machine.nothing_left()?)
}

/// Others are faster so often that the fault ends with a copy in hand that waits for its flush: with the page before it still
/// mapped, or its entry broken. The next one sees to that, and nothing is lost, nor changed for a child.
fn a_copy_that_waits_is_given_up<F: Format>() -> Result {
    let mut given_up = 0;
    for faster in MOST_LOOKS - 4..MOST_LOOKS + 2 {
        let machine = machine_of::<DoorsOf<F>>();
        let s = space(machine)?;
        s.map(at(AT, anonymous(1, RW)))?;
        put(&s, AT, 7)?;
        let child = fork(&s)?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        assert_eq!(cpu.load_u64(AT)?, 7);
        let (other, passes) = (s.clone(), AtomicU32::new(0));
        arm_always(Point::Found, move || {
            if passes.fetch_add(1, SeqCst) < faster {
                protect_again(&other);
            }
        });
        let before = machine.counts();
        let end = fault(&s, AT, Access::Write);
        disarm();
        let looks = machine.counts() - before;
        let is_copied = frame(&s, AT) != frame(&child, AT);
        given_up += u32::from(looks.most_looks == u64::from(MOST_LOOKS) && is_copied);
        cpu.store_u64(AT, 9)?;
        assert_eq!((get(&s, AT)?, get(&child, AT)?), (9, 7), "{faster}: {end:?}");
        check(&s);
        check(&child);
        drop((cpu, s, child));
        machine.nothing_left()?;
    }
    assert!(given_up > 0, "no copy was in hand");
    Ok(())
}

/// What others do to the memory in which a fault has just read an entry.
type Faster<F> = fn(&Space<DoorsOf<F>>) -> std::result::Result<(), MapError>;

/// A page, huge or small, is discarded or comes apart each time that a fault has seen it. Nobody can take the same thing
/// twice, so the fault ends soon, with what was asked for or with another look at the mapping; and what a child has stays.
fn what_is_taken_away_each_time<F: Format>() -> Result {
    let huge = F::span(1);
    let ways: [(&str, Faster<F>); 5] = [
        ("discard all", |s| s.discard(AT, F::span(1))),
        ("discard one", |s| s.discard(AT, PAGE_SIZE)),
        ("split", |s| s.discard(page(AT, 3), PAGE_SIZE)),
        ("advise", |s| s.advise(AT, F::span(1), Advice::NoHuge)),
        ("unmap another", |s| s.unmap(page(AT, 7), PAGE_SIZE)),
    ];
    for (name, faster) in ways {
        for use_huge in [HugePolicy::Always, HugePolicy::Never] {
            for access in [Access::Read, Access::Write] {
                let machine = machine_of::<DoorsOf<F>>();
                let s = space_with(machine, Policy { huge: use_huge, ..policy() })?;
                s.map(at(AT, anonymous(huge / PAGE_SIZE, RW)))?;
                put(&s, AT, 7)?;
                let child = fork(&s)?;
                let other = s.clone();
                let times = Arc::new(AtomicU32::new(0));
                let counted = times.clone();
                arm_always(Point::SawTable, move || {
                    counted.fetch_add(1, SeqCst);
                    faster(&other).expect("memory");
                });
                let before = machine.counts();
                let end = fault(&s, AT, access);
                disarm();
                let looks = (machine.counts() - before).most_looks;
                assert!(matches!(end, End::Mapped(..) | End::Spurious), "{name}: {end:?}");
                let case = format!("{name}, {use_huge:?}, {access:?}: {looks} looks, {times:?} times");
                assert!(times.load(SeqCst) > 0 && looks <= 6, "{case}");
                put(&s, AT, 9)?;
                assert_eq!((get(&s, AT)?, get(&child, AT)?), (9, 7), "{name}");
                check(&s);
                check(&child);
                drop((s, child));
                machine.nothing_left()?;
            }
        }
    }
    Ok(())
}

/// As soon as a fault has ended, what it mapped is taken away, comes apart, or may not be written to, a hundred times over:
/// each fault ends after a few looks and leaves nothing behind, and the access is made when it is left alone.
fn what_is_taken_away_after_each_fault<F: Format>() -> Result {
    let pages = F::span(1) / PAGE_SIZE;
    type Cut<F> = fn(&Space<F>, &Cache<F>) -> std::result::Result<(), MapError>;
    let ways: [(&str, Cut<F>); 6] = [
        ("discard all", |s, _| s.discard(AT, F::span(1))),
        // Of a huge page that is split it; then all of it goes, for the next fault to map a huge page again.
        ("discard one", |s, _| s.discard(AT, PAGE_SIZE).and_then(|()| s.discard(AT, F::span(1)))),
        ("split", |s, _| s.discard(AT, F::span(1) / 2).and_then(|()| s.discard(AT, F::span(1)))),
        ("protect", |s, _| s.protect(AT, PAGE_SIZE, R).and_then(|()| s.protect(AT, PAGE_SIZE, RW))),
        ("truncate", |s, c| {
            c.set_size(s.platform(), 0);
            c.set_size(s.platform(), F::span(1));
            Ok(())
        }),
        ("punch", |s, c| {
            c.punch(s.platform(), 0..PAGE_SIZE);
            Ok(())
        }),
    ];
    for (name, take) in ways {
        for is_file in [false, true] {
            let machine = machine_of::<F>();
            let s = space_with(machine, Policy { huge: HugePolicy::Always, ..policy() })?;
            let c = cache(machine, &MachineFile::shmem(ShmemHuge::Always), pages)?;
            let map = if is_file { shared(&c, 0, pages, RW) } else { anonymous(pages, RW) };
            s.map(at(AT, map))?;
            let before = machine.counts();
            for _ in 0..100 {
                let end = fault(&s, AT, Access::Write);
                assert!(matches!(end, End::Mapped(..) | End::Spurious), "{name}: {end:?}");
                take(&s, &c)?;
                check(&s);
            }
            let counts = machine.counts() - before;
            assert!(counts.most_looks <= 6, "{name}, of a file {is_file}: {} looks", counts.most_looks);
            put(&s, AT, 9)?;
            assert_eq!(get(&s, AT)?, 9, "{name}");
            drop((s, c));
            machine.nothing_left()?;
        }
    }
    Ok(())
}

/// Somebody who only reads is faster, and maps the file's page: populating to write goes on until there is a copy.
fn populating_does_not_stop_at_what_another_reads<F: Format>() -> Result {
    let machine = machine_of::<DoorsOf<F>>();
    let (s, c) = (space(machine)?, cache(machine, &marked(), 1)?);
    s.map(at(AT, private(&c, 0, 1, RW)))?;
    // It is in memory, so that the fault does not have to wait.
    assert_eq!(get(&s, AT)?, u64::from_ne_bytes([mark(0); 8]));
    s.discard(AT, PAGE_SIZE)?;
    let other = s.clone();
    arm(Point::SawNothing, 0, move || assert!(matches!(fault(&other, AT, Access::Read), End::Mapped(..))));
    assert!(s.populate(VirtRange::page_of(AT), RW).is_none());
    disarm();
    let there = s.page_table().translate(&Pin::new(machine), AT).ok_or("nothing is mapped")?;
    assert!(there.attrs.contains(Attrs::WRITE), "{there:?}");
    check(&s);
    drop((s, c));
    Ok(machine.nothing_left()?)
}

on_formats!(populating_does_not_stop_at_what_another_reads: la48 X86_64, aarch64 Aarch64);
on_formats!(what_is_taken_away_after_each_fault: la48 X86_64, aarch64 Aarch64);
on_formats!(what_is_taken_away_each_time: la48 X86_64, aarch64 Aarch64);
on_formats!(a_copy_that_waits_is_given_up: la48 X86_64, aarch64 Aarch64);
on_formats!(a_write_whose_mapping_changes: la48 X86_64, aarch64 Aarch64);
on_formats!(a_first_touch_whose_mapping_changes: la48 X86_64, aarch64 Aarch64);
on_formats!(a_file_that_is_cut_each_time: la48 X86_64, aarch64 Aarch64);
