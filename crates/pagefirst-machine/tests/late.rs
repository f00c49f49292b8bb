//! Files whose reads end later: what waits, who is told of errors, what is there in the end.

mod kit;

use kit::*;
use pagefirst::fault::{Bus, FaultError, Outcome, Segv, Ticket};
use pagefirst::file::{ReadError, WriteError};
use pagefirst::space::{Map, Unpopulated, Why};
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr, VirtRange};
use pagefirst_machine::{Late, Machine, MachineFile};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

const AT: VirtAddr = VirtAddr(1 << 30);
const IO: Option<FaultError> = Some(FaultError::Bus(Bus::Io));

/// A machine, a space, and a file whose reads end when the test says so, mapped whole at `AT`.
fn stage(pages: u64) -> Result<(&'static Machine, Space, MachineFile, Cache)> {
    let machine = machine();
    let file = marked().late(Late::Held);
    let cache = cache(machine, &file, pages)?;
    let space = space(machine)?;
    space.map(at(AT, shared(&cache, 0, pages, RW)))?;
    Ok((machine, space, file, cache))
}

fn blocked<'a>(space: &'a Space, va: VirtAddr, access: Access) -> Result<Ticket<'a, Machine>> {
    match space.fault(va, access) {
        Outcome::Blocked(ticket) => Ok(ticket),
        outcome => Err(format!("{outcome:?}").into()),
    }
}

#[test]
fn x20_the_page_that_was_waited_for_is_there() -> Result {
    let (machine, s, file, c) = stage(4)?;
    let ticket = blocked(&s, AT, Access::Read)?;
    assert!(!ticket.is_ready());
    assert_eq!((file.pending(), tables(&s)), (vec![0], 1), "no table for a page that is not there");
    assert!(file.finish(0) && ticket.is_ready());
    assert_eq!(c.evict(machine), 0, "it is kept for who waited");
    let outcome = s.retry(AT, Access::Read, ticket);
    assert!(matches!(outcome, Outcome::Mapped { major: true, .. }), "{outcome:?}");
    assert_eq!((first_byte(&s, AT), file.reads()), (Some(mark(0)), 1));
    // Who does not want it any more lets it go.
    drop(blocked(&s, page(AT, 1), Access::Write)?);
    file.finish(1);
    assert_eq!(c.evict(machine), 1);
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}

#[test]
fn c66_an_error_is_told_once_for_each_ticket() -> Result {
    let (machine, s, file, c) = stage(4)?;
    let other = space(machine)?;
    other.map(at(AT, private(&c, 0, 4, RW)))?;
    file.fail_reads(2, true);
    let va = page(AT, 2);
    let tickets = (blocked(&s, va, Access::Read)?, blocked(&other, va, Access::Write)?);
    let third = blocked(&s, va, Access::Write)?;
    assert_eq!(file.reads(), 1, "one read, three that wait");
    file.finish(2);
    assert_eq!(s.retry(va, Access::Read, tickets.0).error(), IO);
    assert_eq!(other.retry(va, Access::Write, tickets.1).error(), IO);
    assert_eq!((tables(&s), tables(&other)), (1, 1));
    // All were told, but the third: a fresh fault reads anew, and the third is told of its own.
    file.fail_reads(2, false);
    let fresh = blocked(&other, va, Access::Read)?;
    assert_eq!(file.reads(), 2);
    assert_eq!(s.retry(va, Access::Write, third).error(), IO);
    file.finish(2);
    assert!(matches!(other.retry(va, Access::Read, fresh), Outcome::Mapped { .. }));
    assert_eq!(s.account().faults.bus, 2);
    drop((s, other, c));
    machine.nothing_left().map_err(Into::into)
}

/// The page of the ticket could not be read, and is not what the access needs by then: nothing is told of that.
#[test]
fn c66_an_error_is_told_to_nobody_who_does_not_need_that_page() -> Result {
    type Then = fn(&'static Machine, &Space, &MachineFile, &Cache) -> Result;
    let other_page: Then = |_, s, file, c| {
        drop(blocked(s, page(AT, 1), Access::Read)?);
        file.finish(1);
        s.map(at(AT, shared(c, 1, 1, RW)))?;
        Ok(())
    };
    let other_file: Then = |machine, s, _, _| {
        let c = cache(machine, &marked(), 1)?;
        s.map(at(AT, shared(&c, 0, 1, RW)))?;
        Ok(())
    };
    let read_anew: Then = |_, s, file, _| {
        assert_eq!(s.fault(AT, Access::Read).error(), IO);
        file.fail_reads(0, false);
        let ticket = blocked(s, AT, Access::Read)?;
        file.finish(0);
        drop(ticket);
        Ok(())
    };
    let no_access: Then = |_, s, _, _| Ok(s.protect(AT, PAGE_SIZE, NONE)?);
    let access = Some(FaultError::Segv(Segv::Access));
    for (then, told) in [(other_page, None), (other_file, None), (read_anew, None), (no_access, access)] {
        let (machine, s, file, c) = stage(4)?;
        file.fail_reads(0, true);
        let ticket = blocked(&s, AT, Access::Read)?;
        file.finish(0);
        then(machine, &s, &file, &c)?;
        let outcome = s.retry(AT, Access::Read, ticket);
        assert!(outcome.error() == told && !matches!(outcome, Outcome::Blocked(_)), "{outcome:?}");
        drop((s, c));
        machine.nothing_left()?;
    }
    Ok(())
}

#[test]
fn c11_an_error_is_told_to_who_comes_without_the_ticket_and_keeps_it() -> Result {
    let (machine, s, file, c) = stage(4)?;
    file.fail_reads(0, true);
    let ticket = blocked(&s, AT, Access::Read)?;
    file.finish(0);
    assert_eq!(s.fault(AT, Access::Read).error(), IO);
    drop(ticket);
    // Nobody is told twice, and a page that nobody waited for is read anew.
    let ticket = blocked(&s, AT, Access::Read)?;
    drop(ticket);
    file.finish(0);
    let again = blocked(&s, AT, Access::Read)?;
    assert_eq!(file.reads(), 3);
    // The same through the file.
    assert!(matches!(c.read_at(machine, 0, &mut [0]), Err(ReadError::Blocked(_))));
    file.finish(0);
    assert!(matches!(c.read_at(machine, 0, &mut [0]), Err(ReadError::Io)));
    assert!(matches!(c.write_at(machine, 0, &[0]), Err(WriteError::Page(ReadError::Blocked(_)))));
    assert_eq!(s.retry(AT, Access::Read, again).error(), IO, "it waited for the third");
    drop((s, c, file));
    machine.nothing_left().map_err(Into::into)
}

#[test]
fn r13_a_file_that_is_cut_while_a_page_is_read() -> Result {
    let (machine, s, file, c) = stage(4)?;
    let (gone, cut) = (blocked(&s, page(AT, 3), Access::Read)?, blocked(&s, page(AT, 1), Access::Write)?);
    c.set_size(machine, PAGE_SIZE + 100);
    c.set_size(machine, 4 * PAGE_SIZE);
    assert!(file.finish(3) && file.finish(1));
    assert!(gone.is_ready() && cut.is_ready());
    // Both are read anew: nothing read before is seen.
    for (i, old) in [(3, gone), (1, cut)] {
        let Outcome::Blocked(ticket) = s.retry(page(AT, i), Access::Read, old) else {
            return Err(format!("page {i} is from before").into());
        };
        file.finish(i);
        assert!(matches!(s.retry(page(AT, i), Access::Read, ticket), Outcome::Mapped { .. }));
    }
    let mut bytes = vec![0xff; 3 * PAGE_SIZE as usize];
    assert_eq!(c.read_at(machine, PAGE_SIZE, &mut bytes[..PAGE_SIZE as usize])?, PAGE_SIZE as usize);
    assert!(bytes[..100].iter().all(|b| *b == mark(1)));
    assert!(bytes[100..PAGE_SIZE as usize].iter().all(|b| *b == 0));
    assert_eq!(first_byte(&s, page(AT, 3)), Some(0));
    // Beyond the end.
    let ticket = blocked(&s, page(AT, 2), Access::Read)?;
    c.set_size(machine, 2 * PAGE_SIZE);
    file.finish(2);
    assert_eq!(s.retry(page(AT, 2), Access::Read, ticket).error(), Some(FaultError::Bus(Bus::BeyondEnd)));
    check(&s);
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}

#[test]
fn r07_a_mapping_that_is_gone_when_the_page_is_there() -> Result {
    let (machine, s, file, c) = stage(4)?;
    let (gone, moved) = (blocked(&s, AT, Access::Read)?, blocked(&s, page(AT, 1), Access::Read)?);
    file.fail_reads(1, true);
    s.unmap(AT, 2 * PAGE_SIZE)?;
    s.map(at(page(AT, 1), anonymous(1, RW)))?;
    assert!(file.finish(0) && file.finish(1));
    assert_eq!(s.retry(AT, Access::Read, gone).error(), Some(FaultError::Segv(Segv::NotMapped)));
    let outcome = s.retry(page(AT, 1), Access::Read, moved);
    assert!(matches!(outcome, Outcome::Mapped { .. }), "an error of what is not mapped there: {outcome:?}");
    assert_eq!((tables(&s), c.pages()), (4, 2));
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}

#[test]
fn a_page_whose_file_is_gone_is_freed_by_who_completes_it() -> Result {
    let (machine, s, file, c) = stage(4)?;
    drop(blocked(&s, AT, Access::Read)?);
    drop((s, c));
    machine.vm().quiesce(machine);
    assert!(machine.nothing_left().is_err(), "the file has the page");
    assert!(file.finish(0));
    machine.nothing_left()?;
    // A file that loses a page has failed to read it.
    let c = cache(machine, &file, 1)?;
    assert!(matches!(c.read_at(machine, 0, &mut [0]), Err(ReadError::Blocked(_))));
    file.lose(0);
    assert!(file.pending().is_empty());
    assert!(matches!(c.read_at(machine, 0, &mut [0]), Err(ReadError::Blocked(_))), "nobody waited");
    drop((c, file));
    machine.nothing_left().map_err(Into::into)
}

#[derive(Default)]
struct Bell(AtomicUsize);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

impl Bell {
    fn rung(&self) -> usize {
        self.0.load(SeqCst)
    }
}

#[test]
fn a_ticket_is_a_future() -> Result {
    let (machine, s, file, c) = stage(64)?;
    let bell = Arc::new(Bell::default());
    let waker = Waker::from(bell.clone());
    let mut cx = Context::from_waker(&waker);
    // Waits, and is woken.
    {
        let mut wait = pin!(blocked(&s, AT, Access::Read)?.into_future());
        assert!(wait.as_mut().poll(&mut cx).is_pending() && wait.as_mut().poll(&mut cx).is_pending());
        file.finish(0);
        assert_eq!(bell.rung(), 1);
        let Poll::Ready(ticket) = wait.as_mut().poll(&mut cx) else { return Err("pending".into()) };
        assert!(matches!(s.retry(AT, Access::Read, ticket), Outcome::Mapped { .. }));
    }
    // Was ready before it was first looked at.
    {
        let mut wait = pin!(blocked(&s, page(AT, 20), Access::Read)?.into_future());
        file.finish(20);
        assert!(wait.as_mut().poll(&mut cx).is_ready());
        assert_eq!(bell.rung(), 1);
    }
    // Given up.
    {
        let mut wait = pin!(blocked(&s, page(AT, 40), Access::Read)?.into_future());
        assert!(wait.as_mut().poll(&mut cx).is_pending());
    }
    file.finish(40);
    assert_eq!(bell.rung(), 1, "nobody waits");
    // Another waker takes the place of the first.
    {
        let other = Arc::new(Bell::default());
        let mut wait = pin!(blocked(&s, page(AT, 50), Access::Read)?.into_future());
        assert!(wait.as_mut().poll(&mut cx).is_pending());
        assert!(wait.as_mut().poll(&mut Context::from_waker(&Waker::from(other.clone()))).is_pending());
        file.finish(50);
        assert_eq!((bell.rung(), other.rung()), (1, 1));
    }
    // Many of one page.
    let mut waits = Vec::new();
    for _ in 0..50 {
        waits.push(Box::pin(blocked(&s, page(AT, 60), Access::Read)?.into_future()));
    }
    assert!(waits.iter_mut().all(|wait| wait.as_mut().poll(&mut cx).is_pending()));
    waits.truncate(40);
    file.finish(60);
    assert!(waits.iter_mut().all(|wait| wait.as_mut().poll(&mut cx).is_ready()));
    assert!(bell.rung() >= 41, "{} were woken", bell.rung());
    drop(waits);
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}

#[test]
fn populate_and_copies_stop_where_they_are_blocked() -> Result {
    let (machine, s, file, c) = stage(3)?;
    let mut filled = AT;
    let end = page(AT, 3);
    for i in 0..3 {
        let stopped = s.populate(VirtRange::new(filled, end), RW);
        let Some(Unpopulated { at, why: Why::Blocked(ticket) }) = stopped else {
            return Err(format!("{stopped:?}").into());
        };
        assert_eq!((at, ticket.is_ready()), (page(AT, i), false));
        assert!(file.finish(i) && ticket.is_ready());
        filled = at;
    }
    assert!(s.populate(VirtRange::new(filled, end), RW).is_none());
    // Mapped and asked for at once.
    let fresh = marked().late(Late::Held);
    let d = cache(machine, &fresh, 2)?;
    let made = s.map(Map { populate: true, ..at(page(AT, 8), private(&d, 0, 2, R)) })?;
    assert!(made.unpopulated.is_some_and(|u| matches!(u.why, Why::Blocked(_))));
    let mut bytes = [0; 8];
    let Err(stopped) = s.copy_in(VirtAddr(page(AT, 9).0 - 4), &mut bytes) else {
        return Err("copied".into());
    };
    assert_eq!((stopped.done, stopped.why.errno()), (0, None));
    drop(stopped);
    fresh.finish(0);
    let Err(stopped) = s.copy_in(VirtAddr(page(AT, 9).0 - 4), &mut bytes) else {
        return Err("copied".into());
    };
    assert_eq!((stopped.done, bytes), (4, [1, 1, 1, 1, 0, 0, 0, 0]));
    drop(stopped);
    drop((s, c, d, fresh));
    machine.nothing_left().map_err(Into::into)
}

/// Reads end in interrupts, whatever the library was doing; a debug build sees that no lock is taken there.
#[test]
fn pages_are_completed_in_interrupts_with_locks_held() -> Result {
    let (machine, s, file, c) = stage(256)?;
    let inside = file.clone();
    machine.hook_interrupt(move || {
        inside.finish_one();
    });
    let bell = Arc::new(Bell::default());
    let mut waits = Vec::new();
    for i in (0..256).step_by(16) {
        let mut wait = Box::pin(blocked(&s, page(AT, i), Access::Read)?.into_future());
        let waker = Waker::from(bell.clone());
        let _ = wait.as_mut().poll(&mut Context::from_waker(&waker));
        waits.push((i, wait));
        if i % 64 == 0 {
            c.set_size(machine, (i + 1) * PAGE_SIZE);
            c.set_size(machine, 256 * PAGE_SIZE);
        }
    }
    // Something to be interrupted.
    let own = s.map(anonymous(64, RW))?.range;
    while !file.pending().is_empty() {
        assert!(s.populate(own, RW).is_none());
        s.discard(own.start, own.len())?;
    }
    for (i, mut wait) in waits {
        let Poll::Ready(ticket) = wait.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
            return Err("a read that never ended".into());
        };
        assert!(!matches!(s.retry(page(AT, i), Access::Read, ticket), Outcome::Error(_)));
    }
    while file.finish_one() {}
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}

/// Threads read, write and cut a file whose reads end later, some of them with errors.
#[test]
fn stress_of_late_reads() -> Result {
    const PAGES: u64 = 64;
    let machine = machine();
    let file = marked().late(Late::Within(Duration::from_micros(300)));
    let c = cache(machine, &file, PAGES)?;
    file.fail_reads(13, true);
    let read = |n: u64| {
        let s = space(machine).expect("memory");
        s.map(at(AT, shared(&c, 0, PAGES, R))).expect("room");
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        let mut seen = n * 977;
        for _ in 0..2_000 {
            seen = seen.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let i = (seen >> 33) % PAGES;
            match cpu.load_u8(page(AT, i)) {
                // What was cut off is zero when the file grows again.
                Ok(byte) => assert!(byte == mark(i) || byte == 0 && i >= PAGES / 2, "page {i}: {byte}"),
                Err(trap) => assert!(
                    i == 13 && trap.error == FaultError::Bus(Bus::Io)
                        || i >= 32 && trap.error == FaultError::Bus(Bus::BeyondEnd),
                    "page {i}: {trap:?}"
                ),
            }
            if seen >> 60 == 0 {
                s.discard(AT, PAGES * PAGE_SIZE).expect("mapped");
                c.evict(machine);
            }
        }
        drop(cpu);
    };
    together(3, read, || {
        for _ in 0..200 {
            c.set_size(machine, PAGES / 2 * PAGE_SIZE);
            std::thread::sleep(Duration::from_micros(200));
            c.set_size(machine, PAGES * PAGE_SIZE);
            std::thread::sleep(Duration::from_micros(200));
        }
    });
    settle(&file);
    drop((c, file));
    machine.nothing_left().map_err(Into::into)
}

/// What a store that ended in an interrupt had for a copy, the next one frees.
#[test]
fn copies_of_what_was_stored_later_do_not_pile_up() -> Result {
    let machine = machine();
    let file = marked().late(Late::Held).late_writes();
    let c = cache(machine, &file, 0)?;
    let mut most = 0;
    for _ in 0..100 {
        assert!(c.write_at(machine, 0, &[1]).is_ok());
        assert_eq!(c.write_back(machine)?, 1);
        assert!(file.finish(0));
        most = most.max(machine.vm().held(machine).frames);
    }
    assert!(most < 20, "{most} frames are held");
    drop((c, file));
    machine.nothing_left().map_err(Into::into)
}

#[test]
fn a_folio_is_there_when_all_of_it_is_and_one_bad_page_is_nobodys_but_its_own() -> Result {
    let machine = machine();
    let file = marked().with_folios(2).late(Late::Held);
    let c = cache(machine, &file, 8)?;
    let s = space_with(machine, policy().with_fault_around(PAGE_SIZE).ok_or("a window")?)?;
    s.map(at(AT, shared(&c, 0, 8, RW)))?;
    let ticket = blocked(&s, page(AT, 1), Access::Read)?;
    assert_eq!((file.pending(), c.pages()), (vec![0, 1, 2, 3], 4));
    for i in [2, 0, 1] {
        file.finish(i);
        assert!(!ticket.is_ready());
    }
    file.finish(3);
    assert!(matches!(s.retry(page(AT, 1), Access::Read, ticket), Outcome::Mapped { major: true, .. }));
    assert_eq!(file.reads(), 4);
    // A page of the second is bad, but not that which is wanted.
    file.fail_reads(5, true);
    let ticket = blocked(&s, page(AT, 6), Access::Read)?;
    assert_eq!(file.pending(), [4, 5, 6, 7]);
    while file.finish_one() {}
    let Outcome::Blocked(ticket) = s.retry(page(AT, 6), Access::Read, ticket) else {
        return Err("told".into());
    };
    assert_eq!(file.pending(), [6], "by itself");
    file.finish(6);
    assert!(matches!(s.retry(page(AT, 6), Access::Read, ticket), Outcome::Mapped { .. }));
    assert_eq!(first_byte(&s, page(AT, 6)), Some(mark(6)));
    // That it is, is told once.
    let ticket = blocked(&s, page(AT, 5), Access::Read)?;
    assert_eq!(file.pending(), [4, 5]);
    while file.finish_one() {}
    let Outcome::Blocked(ticket) = s.retry(page(AT, 5), Access::Read, ticket) else {
        return Err("told".into());
    };
    file.finish(5);
    assert_eq!(s.retry(page(AT, 5), Access::Read, ticket).error(), IO);
    // Cut while it is read.
    s.discard(AT, 8 * PAGE_SIZE)?;
    c.set_size(machine, 0);
    c.set_size(machine, 8 * PAGE_SIZE);
    let ticket = blocked(&s, page(AT, 4), Access::Read)?;
    c.set_size(machine, 5 * PAGE_SIZE);
    while file.finish_one() {}
    assert!(ticket.is_ready());
    drop(ticket);
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}
