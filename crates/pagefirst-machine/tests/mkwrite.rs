//! Files that are asked before a shared page of theirs becomes writable.

mod kit;

use kit::*;
use pagefirst::arch::Attrs;
use pagefirst::fault::{Bus, FaultError, Outcome};
use pagefirst::file::Io;
use pagefirst::space::{Map, Why};
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr, VirtRange};
use pagefirst_machine::{Config, Machine, MachineFile};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex};

const AT: VirtAddr = VirtAddr(1 << 30);
const REFUSED: End = End::Error(FaultError::Bus(Bus::Refused));

/// What the file was asked, and what it says to it: how often it answers later first, and what then.
#[derive(Default)]
struct Talk {
    asked: AtomicUsize,
    later: AtomicUsize,
    refuses: AtomicU64,
}

impl Talk {
    fn asked(&self) -> usize {
        self.asked.swap(0, SeqCst)
    }
}

type Stage = (&'static Machine, Space, MachineFile, Cache, Arc<Talk>);

fn stage() -> Result<Stage> {
    let machine = machine();
    let talk = Arc::new(Talk { refuses: AtomicU64::new(u64::MAX), ..Talk::default() });
    let says = talk.clone();
    let file = marked().with_mkwrite(move |index, _| {
        says.asked.fetch_add(1, SeqCst);
        let later = says.later.load(SeqCst);
        if later > 0 {
            says.later.store(later - 1, SeqCst);
            return Io::Pending;
        }
        if says.refuses.load(SeqCst) == index { Io::Error } else { Io::Ready }
    });
    let c = cache(machine, &file, 64)?;
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, 64, RW)))?;
    Ok((machine, s, file, c, talk))
}

fn is_writable(s: &Space, i: u64) -> bool {
    attrs(s, page(AT, i)).contains(Attrs::WRITE)
}

#[test]
fn c68_a_file_is_asked_before_each_page_becomes_writable() -> Result {
    let (machine, s, file, c, talk) = stage()?;
    // Nothing mapped; mapped for reading; not again while it is writable.
    assert!(matches!(fault(&s, AT, Access::Write), End::Mapped(true, 0)));
    assert_eq!((talk.asked(), is_writable(&s, 0)), (1, true));
    fault(&s, page(AT, 1), Access::Read);
    assert_eq!((talk.asked(), is_writable(&s, 1)), (0, false));
    assert!(matches!(fault(&s, page(AT, 1), Access::Write), End::Mapped(false, 0)));
    assert_eq!((talk.asked(), fault(&s, page(AT, 1), Access::Write)), (1, End::Spurious));
    assert_eq!((talk.asked(), c.write_back(machine)?, file.writes()), (0, 2, 2));
    // Neighbours stay read-only, private mappings ask nobody.
    fault(&s, page(AT, 16), Access::Read);
    s.map(at(page(AT, 100), private(&c, 0, 64, RW)))?;
    fault(&s, page(AT, 102), Access::Write);
    assert_eq!((talk.asked(), is_writable(&s, 17)), (0, false));
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}

/// Nothing is written by that, so nobody is asked, and nothing is stored.
#[test]
fn c68_a_shared_mapping_that_is_populated_makes_nothing_dirty() -> Result {
    let (machine, s, file, c, talk) = stage()?;
    assert!(s.map(Map { populate: true, ..at(page(AT, 100), shared(&c, 0, 64, RW)) })?.unpopulated.is_none());
    assert_eq!(mapped(&s, page(AT, 100), 64).len(), 64);
    // Nor where that goes on after it has stopped.
    s.discard(page(AT, 140), 24 * PAGE_SIZE)?;
    assert!(s.populate(VirtRange::new(page(AT, 120), page(AT, 164)), RW).is_none());
    assert_eq!(mapped(&s, page(AT, 100), 64).len(), 64);
    assert!(!attrs(&s, page(AT, 100)).contains(Attrs::WRITE));
    assert_eq!((talk.asked(), c.write_back(machine)?, file.writes()), (0, 0, 0));
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}

#[test]
fn c68_a_write_that_is_refused_makes_nothing_dirty() -> Result {
    let (machine, s, file, c, talk) = stage()?;
    talk.refuses.store(3, SeqCst);
    assert_eq!(fault(&s, page(AT, 3), Access::Write), REFUSED);
    assert_eq!((tables(&s), FaultError::Bus(Bus::Refused).signal().map(|s| s.1)), (1, Some(2)));
    fault(&s, page(AT, 3), Access::Read);
    assert_eq!((fault(&s, page(AT, 3), Access::Write), is_writable(&s, 3)), (REFUSED, false));
    let stopped = s.copy_out(page(AT, 3), &[1]).expect_err("refused");
    assert!(matches!(stopped.why, Why::Error(FaultError::Bus(Bus::Refused))));
    drop(stopped);
    assert_eq!((c.write_back(machine)?, file.writes(), talk.asked()), (0, 0, 3));
    talk.refuses.store(u64::MAX, SeqCst);
    assert!(matches!(fault(&s, page(AT, 3), Access::Write), End::Mapped(..)));
    assert_eq!(c.write_back(machine)?, 1);
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}

#[test]
fn a_file_may_answer_later_and_be_asked_again() -> Result {
    let (machine, s, file, c, talk) = stage()?;
    for mapped in [false, true] {
        let va = page(AT, 8 + 16 * mapped as u64);
        let index = (va.0 - AT.0) / PAGE_SIZE;
        warm(machine, &c, [index])?;
        if mapped {
            fault(&s, va, Access::Read);
        }
        talk.later.store(2, SeqCst);
        let mut outcome = s.fault(va, Access::Write);
        for _ in 0..2 {
            let Outcome::Blocked(ticket) = outcome else { return Err(format!("{outcome:?}").into()) };
            assert!(!ticket.is_ready());
            // Whoever comes meanwhile waits with it, and asks nothing.
            let asked = talk.asked.load(SeqCst);
            let Outcome::Blocked(other) = s.fault(va, Access::Write) else {
                return Err("let through".into());
            };
            assert_eq!((talk.asked.load(SeqCst), other.is_ready()), (asked, false));
            assert!(
                matches!(fault(&s, va, Access::Read), End::Mapped(..) | End::Spurious),
                "reads do not wait"
            );
            assert!(file.answer(index) && ticket.is_ready() && other.is_ready());
            assert_eq!(c.evict(machine), 0, "it is kept for who waits");
            outcome = s.retry(va, Access::Write, ticket);
        }
        assert!(matches!(outcome, Outcome::Mapped { .. }), "{outcome:?}");
        assert_eq!(talk.asked(), 3);
    }
    // Cut while the question is open: what was asked about is gone.
    talk.later.store(1, SeqCst);
    let Outcome::Blocked(ticket) = s.fault(page(AT, 60), Access::Write) else {
        return Err("let through".into());
    };
    s.discard(AT, 64 * PAGE_SIZE)?;
    c.set_size(machine, 8 * PAGE_SIZE);
    assert!(file.answer(60));
    let outcome = s.retry(page(AT, 60), Access::Write, ticket);
    assert_eq!(outcome.error(), Some(FaultError::Bus(Bus::BeyondEnd)));
    drop((s, c));
    machine.nothing_left().map_err(Into::into)
}

// Room was found for the page; before the fault goes on, a hole is punched there, and the file gives the room back.
#[test]
fn leave_to_write_ends_with_a_hole() -> Result {
    for mapped in [false, true] {
        let machine = machine();
        let room = Arc::new(Mutex::new(None::<Cache>));
        let (inside, asked) = (room.clone(), Arc::new(AtomicUsize::new(0)));
        let count = asked.clone();
        let file = MachineFile::zeros().with_folios(3).with_mkwrite(move |index, _| {
            count.fetch_add(1, SeqCst);
            let c = inside.lock().expect("nobody panicked").take();
            if let Some(c) = c {
                c.punch(machine, index * PAGE_SIZE..(index + 1) * PAGE_SIZE);
            }
            Io::Ready
        });
        let c = cache(machine, &file, 8)?;
        let s = space(machine)?;
        s.map(at(AT, shared(&c, 0, 8, RW)))?;
        if mapped {
            fault(&s, page(AT, 3), Access::Read);
        }
        *room.lock().expect("nobody panicked") = Some(c.clone());
        fault(&s, page(AT, 3), Access::Write);
        assert_eq!((asked.load(SeqCst), is_writable(&s, 3)), (2, true));
    }
    Ok(())
}

// All of a folio is dirty, and one entry may map it: the file is asked about all of it.
#[test]
fn c68_only_pages_that_the_file_was_asked_about_are_stored() -> Result {
    for order in [0, 3, 9] {
        let machine: &'static Machine = Machine::new(Config { memory: 32 << 20, ..hardware() });
        let asked = Arc::new(Mutex::new(Vec::new()));
        let said = asked.clone();
        let file = MachineFile::zeros().with_folios(order).with_mkwrite(move |index, pages| {
            assert!(pages.contains(&index));
            said.lock().expect("nobody panicked").push(pages);
            Io::Ready
        });
        let c = cache(machine, &file, 512)?;
        let s = space(machine)?;
        s.map(at(AT, shared(&c, 0, 512, RW)))?;
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        cpu.load_u8(page(AT, 3))?;
        assert_eq!((entry(&s, AT).1 == 1, is_writable(&s, 3)), (order == 9, false), "huge where it can be");
        for i in [3, 64] {
            cpu.store_u8(page(AT, i), 1)?;
        }
        assert_eq!((entry(&s, AT).1 == 1, is_writable(&s, 3)), (order == 9, true));
        c.write_back(machine)?;
        let stored: Vec<u64> = (0..512).filter(|i| !file.stored(*i).is_empty()).collect();
        let asked: Vec<u64> = asked.lock().expect("nobody panicked").iter().cloned().flatten().collect();
        assert_eq!(stored, asked);
    }
    Ok(())
}
