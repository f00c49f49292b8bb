//! Knowing that what was written is stored, and of errors of storing it.

mod kit;

use kit::*;
use pagefirst::Poisoned;
use pagefirst::file::{StoreErrors, SyncError, Syncing, WriteBackError};
use pagefirst::frame::Frame;
use pagefirst::types::{PAGE_SIZE, VirtAddr};
use pagefirst_machine::{Late, Machine, MachineFile};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

const AT: VirtAddr = VirtAddr(1 << 30);
const PAGES: u64 = 64;

/// A file whose pages are stored when the test says so, mapped, with the first `warm` pages read in.
fn stage(warm_pages: u64) -> Result<(&'static Machine, Space, MachineFile, Cache)> {
    let machine = machine();
    let file = marked().with_tracking(true).late(Late::Held).late_writes();
    let c = cache(machine, &file, PAGES)?;
    c.will_need(machine, 0, warm_pages);
    while file.finish_one() {}
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, PAGES, RW)))?;
    Ok((machine, s, file, c))
}

fn write(s: &Space, i: u64, byte: u8) -> Result {
    s.copy_out(page(AT, i), &[byte]).map_err(|e| e.to_string())?;
    Ok(())
}

/// Syncs, and lets what is waited for be stored: how often it had to wait.
fn sync(c: &Cache, file: &MachineFile, mut work: Syncing, seen: &mut StoreErrors) -> Result<u32> {
    for waits in 0.. {
        match c.sync(&mut work, seen) {
            Ok(()) => return Ok(waits),
            Err(SyncError::Blocked(ticket)) => {
                assert!(!ticket.is_ready());
                while !ticket.is_ready() {
                    assert!(file.finish_one(), "waits for nothing");
                }
            }
            Err(why) => return Err(why.into()),
        }
    }
    Err("never".into())
}

#[test]
fn c68_what_was_written_while_it_was_being_stored_is_stored_by_a_sync() -> Result {
    let (machine, s, file, c) = stage(4)?;
    write(&s, 0, 50)?;
    assert_eq!(c.write_back(machine)?, 1);
    // It is being stored, and dirty again.
    write(&s, 0, 51)?;
    write(&s, 2, 52)?;
    let mut seen = c.store_errors();
    assert_eq!(sync(&c, &file, Syncing::all(), &mut seen)?, 3);
    assert_eq!((file.stored(0)[0], file.stored(2)[0]), (51, 52));
    assert_eq!((sync(&c, &file, Syncing::all(), &mut seen)?, file.writes()), (0, 3), "all is clean");
    Ok(())
}

#[test]
fn c68_a_sync_of_a_range_stores_and_waits_for_that_alone() -> Result {
    let (_, s, file, c) = stage(8)?;
    let mut seen = c.store_errors();
    for i in [0, 3, 5] {
        write(&s, i, 50 + i as u8)?;
    }
    sync(&c, &file, Syncing::of(2..4), &mut seen)?;
    assert_eq!((file.writes(), file.stored(3)[0]), (1, 53));
    // What is written after the call began, and before its place, is not gone back for.
    let mut work = Syncing::all();
    write(&s, 3, 63)?;
    assert!(matches!(c.sync(&mut work, &mut seen), Err(SyncError::Blocked(_))));
    assert_eq!(file.pending(), [0, 3, 5]);
    write(&s, 3, 73)?;
    assert_eq!(sync(&c, &file, work, &mut seen)?, 3);
    assert_eq!((file.writes(), file.stored(3)[0], file.stored(5)[0]), (4, 63, 55));
    Ok(())
}

#[test]
fn the_error_of_a_write_that_ended_later_is_told_once_to_each_who_syncs() -> Result {
    let (machine, s, file, c) = stage(4)?;
    let (mut a, mut b) = (c.store_errors(), c.store_errors());
    let io = |end: Result<u32>| end.is_err_and(|why| why.to_string() == "input/output error");
    write(&s, 0, 50)?;
    c.write_back(machine)?;
    file.fail_writes(0, true);
    assert!(file.finish(0));
    file.fail_writes(0, false);
    // It is stored by somebody else meanwhile.
    c.write_back(machine)?;
    assert!(file.finish(0));
    // Who opens the file now is told too, for nobody was.
    let mut new = c.store_errors();
    assert!(io(sync(&c, &file, Syncing::all(), &mut a)));
    assert!(sync(&c, &file, Syncing::all(), &mut a).is_ok());
    let mut late = c.store_errors();
    assert!(io(sync(&c, &file, Syncing::of(2..3), &mut b)), "whatever the range");
    assert!(io(sync(&c, &file, Syncing::all(), &mut new)));
    for seen in [&mut a, &mut b, &mut new, &mut late] {
        assert!(sync(&c, &file, Syncing::all(), seen).is_ok());
    }
    // One that comes while it is waited for.
    write(&s, 1, 50)?;
    file.fail_writes(1, true);
    assert!(io(sync(&c, &file, Syncing::all(), &mut a)));
    file.fail_writes(1, false);
    assert!(io(sync(&c, &file, Syncing::all(), &mut b)));
    assert_eq!(file.stored(1)[0], 50, "dirty still, and stored by the next");
    assert!(sync(&c, &file, Syncing::all(), &mut a).is_ok());
    Ok(())
}

/// So it is of a page that is gone by then: cut off, or in a hole.
#[test]
fn the_error_of_a_write_that_ended_later_is_told_though_its_page_is_gone() -> Result {
    let removes: [fn(&'static Machine, &Cache); 2] =
        [|machine, c| c.set_size(machine, 0), |machine, c| c.punch(machine, 0..PAGE_SIZE)];
    for remove in removes {
        let (machine, s, file, c) = stage(1)?;
        let mut seen = c.store_errors();
        write(&s, 0, 50)?;
        c.write_back(machine)?;
        file.fail_writes(0, true);
        assert!(file.finish(0));
        remove(machine, &c);
        assert_eq!(c.pages(), 0);
        let told = sync(&c, &file, Syncing::all(), &mut seen);
        assert!(told.is_err_and(|why| why.to_string() == "input/output error"));
        assert!(sync(&c, &file, Syncing::all(), &mut seen).is_ok());
    }
    Ok(())
}

#[test]
fn a_sync_of_a_page_that_is_lost_fails() -> Result {
    let (machine, s, file, c) = stage(4)?;
    let mut seen = c.store_errors();
    write(&s, 0, 50)?;
    machine.vm().poison(machine, frame(&s, AT).ok_or("mapped")?);
    write(&s, 1, 51)?;
    assert!(sync(&c, &file, Syncing::all(), &mut seen).is_err());
    assert_eq!((file.stored(0).len(), file.stored(1)[0]), (0, 51));
    Ok(())
}

/// What was stored of the bad page is good, though others of its folio are written to.
#[test]
fn a_sync_does_not_fail_for_a_page_of_a_folio_that_was_clean_when_it_went_bad() -> Result {
    for was_dirty in [false, true] {
        let machine = machine();
        let file = marked().with_folios(2).with_tracking(true);
        let c = cache(machine, &file, 4)?;
        c.will_need(machine, 0, 4);
        let mut seen = c.store_errors();
        if was_dirty {
            c.write_at(machine, 0, &[50])?;
        }
        let said = machine.vm().poison(machine, cached_frame(machine, &c, 0)?.add(2));
        assert_eq!(said, Poisoned::File { lost: was_dirty });
        c.write_at(machine, PAGE_SIZE, &[51])?;
        for _ in 0..2 {
            c.write_at(machine, 0, &[52])?;
            assert_eq!(sync(&c, &file, Syncing::all(), &mut seen).is_err(), was_dirty);
        }
        assert_eq!([0, 1, 2].map(|i| file.stored(i).first().copied()), [Some(52), Some(51), None]);
        c.write_at(machine, 0, &[53])?;
        // Cut, it is a page by itself, and read anew.
        c.set_size(machine, 3 * PAGE_SIZE);
        let mut byte = [0];
        assert_eq!(c.read_at(machine, 2 * PAGE_SIZE, &mut byte).is_err(), was_dirty);
        assert_eq!(byte[0], if was_dirty { 0 } else { mark(2) });
    }
    Ok(())
}

#[test]
fn a_store_for_which_there_is_no_memory_is_no_error_of_the_file() -> Result {
    let machine = small_machine(400);
    let file = MachineFile::zeros().with_folios(3).with_tracking(true).late(Late::Held).late_writes();
    let c = cache(machine, &file, 8)?;
    c.will_need(machine, 0, 1);
    while file.finish_one() {}
    assert_eq!(c.write_at(machine, 0, &[1])?, 1);
    let mut seen = c.store_errors();
    // One copy can be had.
    let mut frames: Vec<_> = std::iter::from_fn(|| Frame::new(machine).ok()).collect();
    frames.pop();
    assert!(matches!(c.write_back(machine), Err(WriteBackError::NoMemory(_))));
    drop(frames);
    while file.finish_one() {}
    assert_eq!(sync(&c, &file, Syncing::all(), &mut seen)?, 1);
    assert_eq!((file.stored(0)[0], file.stored(7).len()), (1, PAGE_SIZE as usize));
    Ok(())
}

#[test]
fn a_sync_ends_though_somebody_writes_all_the_time() -> Result {
    let machine = machine();
    let file =
        MachineFile::zeros().with_tracking(true).late(Late::Within(Duration::from_micros(50))).late_writes();
    let c = cache(machine, &file, 0)?;
    c.write_at(machine, 0, &[1; (PAGES * PAGE_SIZE) as usize])?;
    let stop = AtomicBool::new(false);
    let writes = |n: u64| {
        let _ends = StopAtEnd(&stop);
        let mut i = n;
        while !stop.load(SeqCst) {
            i += 1;
            c.write_at(machine, i % PAGES * PAGE_SIZE, &i.to_ne_bytes()).expect("there");
        }
    };
    let mut ends = 0;
    together(2, writes, || {
        let mut seen = c.store_errors();
        for _ in 0..20 {
            let mut work = Syncing::all();
            while let Err(why) = c.sync(&mut work, &mut seen) {
                let SyncError::Blocked(ticket) = why else { panic!("{why:?}") };
                while !ticket.is_ready() {
                    std::thread::yield_now();
                }
            }
            ends += 1;
        }
        stop.store(true, SeqCst);
    });
    assert_eq!(ends, 20);
    Ok(())
}

#[test]
fn pages_of_a_range_are_dropped() -> Result {
    let machine = machine();
    let file = MachineFile::zeros().with_folios(2);
    let c = cache(machine, &file, PAGES)?;
    c.will_need(machine, 0, PAGES);
    c.write_at(machine, 9 * PAGE_SIZE, &[1])?;
    // Folios of four pages: of two of them others are part, and one is dirty.
    assert_eq!((c.evict_range(3..19), c.pages()), (8, PAGES - 8));
    assert_eq!((c.evict_range(5..5), c.evict_range(0..4), c.evict(machine)), (0, 4, PAGES - 16));
    assert_eq!(c.pages(), 4);
    Ok(())
}
