//! What look-ups find, what reads and writes show, what is stored and what is dropped.

use super::super::cache::Lookup;
use super::super::index::{Cut, Found, Nodes};
use super::super::{ReadError, WriteBackError, WriteError};
use super::{BELL, Disk, FileCache, Machine, PAGE, PAGE_SIZE, Random, Relaxed, WATCH, machine, std};
use crate::file::IoError;
use crate::frame::{self, Frame, FrameFlags, Part};
use crate::mem::Shared;
use crate::platform::Platform as _;
use crate::sync::epoch::Pin;
use core::cell::Cell;
use core::sync::atomic::AtomicBool;
use std::boxed::Box;
use std::rc::Rc;
use std::sync::Arc;
use std::vec;
use std::vec::Vec;

pub(super) type Cache = Shared<Machine, FileCache<Machine>>;

pub(super) fn look(p: &'static Machine, cache: &Cache, index: u64) -> Lookup<Machine> {
    let pin = Pin::new(p);
    cache.lookup(p, &pin, index)
}
/// The indexes that fault-around would be offered.
pub(super) fn around(p: &'static Machine, cache: &Cache, first: u64, last: u64) -> Vec<u64> {
    let pin = Pin::new(p);
    let mut cursor = cache.cursor(&pin);
    let mut is_offered = |index: &u64| {
        let Some(pfn) = cursor.look(*index).map(|found| found.pfn) else { return false };
        assert!(p.meta(pfn).try_map());
        let attached = cache.is_attached(pfn, pfn, *index);
        frame::unmap(p, pfn);
        attached
    };
    (first..=last).filter(&mut is_offered).collect()
}
fn first_word(p: &'static Machine, page: &Part<Machine>) -> u64 {
    p.cells(page.pfn())[0].load(Relaxed)
}

#[test]
fn a_page_is_read_once() {
    let p = machine(100);
    let disk = Disk::numbered();
    let cache = p.cache(&disk, 1 << 52);
    for index in [0, 3, 70, 1 << 30] {
        assert!(matches!(look(p, &cache, index), Lookup::Missing));
        let page = cache.read(p, index).unwrap();
        assert_eq!(first_word(p, &page), index);
        assert!(
            cache.is_attached(page.pfn(), page.pfn(), index)
                && !cache.is_attached(page.pfn(), page.pfn(), index + 1)
        );
        assert!(matches!(look(p, &cache, index), Lookup::Page(same) if same.pfn() == page.pfn()));
        assert_eq!(cache.read(p, index).unwrap().pfn(), page.pfn());
    }
    assert_eq!((disk.reads(), cache.pages()), (4, 4));
    assert_eq!(around(p, &cache, 0, 70), [0, 3, 70]);
    assert_eq!(around(p, &cache, 1, 69), [3]);
    drop(cache);
    p.assert_empty();
}

#[test]
fn x09_nothing_is_found_beyond_the_end() {
    let p = machine(100);
    let cache = p.cache(&Disk::numbered(), 2 * PAGE_SIZE + 1);
    assert!(cache.read(p, 2).is_ok());
    assert!(matches!(cache.read(p, 3), Err(ReadError::BeyondEnd)));
    assert!(matches!(look(p, &cache, 3), Lookup::BeyondEnd));
    assert!(matches!(look(p, &cache, u64::MAX), Lookup::BeyondEnd));
    cache.set_size(p, 2 * PAGE_SIZE);
    assert!(matches!(cache.read(p, 2), Err(ReadError::BeyondEnd)));
    let empty = p.cache(&Disk::numbered(), 0);
    assert!(matches!(empty.read(p, 0), Err(ReadError::BeyondEnd)));
    assert_eq!(around(p, &empty, 0, 100), []);
    drop((cache, empty));
    p.assert_empty();
}

#[test]
fn a_short_file_is_zero_beyond_its_end() {
    let p = machine(100);
    let disk = Disk::numbered();
    disk.0.len.store(PAGE_SIZE + 16, Relaxed);
    // The storage ends at 16 bytes of page 1; then the file does at 8, though the storage has more.
    for (size, zero_from) in [(8 * PAGE_SIZE, 16), (PAGE_SIZE + 8, 8)] {
        let cache = p.cache(&disk, size);
        let page = cache.read(p, 1).unwrap();
        let words = p.cells(page.pfn());
        for (i, word) in words.iter().enumerate() {
            assert_eq!(word.load(Relaxed), if i * 8 < zero_from { 1 } else { 0 });
        }
    }
    p.assert_empty();
}

#[test]
fn c47_lookup_skips_pages_not_up_to_date() {
    let p = machine(100);
    let disk = Disk::numbered();
    let cache = p.cache(&disk, 1 << 20);
    cache.read(p, 4).unwrap();
    cache.read(p, 6).unwrap();
    let seen = Arc::new(AtomicBool::new(false));
    let (inner, flag) = (cache.clone(), seen.clone());
    disk.on_read(move |index| {
        let Lookup::Filling(page) = look(p, &inner, index) else { panic!("it is being read in") };
        assert!(!inner.is_attached(page.pfn(), page.pfn(), index));
        assert!(matches!(inner.read(p, index), Err(ReadError::Blocked(t)) if t.page().unwrap().pfn() == page.pfn()));
        assert_eq!(around(p, &inner, 0, 10), [4, 6]);
        assert_eq!(inner.evict(p), 2, "not the one that is being read in");
        flag.store(true, Relaxed);
    });
    let page = cache.read(p, 5).unwrap();
    assert!(seen.load(Relaxed));
    assert_eq!(around(p, &cache, 0, 10), [5]);
    // Poisoned, or on its way out: neither mapped nor offered.
    page.meta().set(FrameFlags::GOING);
    assert_eq!(around(p, &cache, 0, 10), []);
    assert!(!cache.is_attached(page.pfn(), page.pfn(), 5));
    page.meta().clear(FrameFlags::GOING);
    page.meta().set(FrameFlags::POISON);
    assert_eq!(around(p, &cache, 0, 10), []);
    assert!(!cache.is_attached(page.pfn(), page.pfn(), 5));
    assert!(matches!(look(p, &cache, 5), Lookup::Poisoned));
    page.meta().set(FrameFlags::DIRTY);
    assert!(matches!(cache.read(p, 5), Err(ReadError::Poisoned)));
    page.meta().clear(FrameFlags::DIRTY);
    page.meta().try_pin().unwrap();
    assert!(matches!(cache.read(p, 5), Err(ReadError::Poisoned)));
    page.meta().unpin();
    // Nothing is lost with it, so it is read anew, though somebody refers to it: its frame is used no more.
    disk.no_hook();
    let anew = cache.read(p, 5).unwrap();
    assert!(anew.pfn() != page.pfn() && page.meta().owner().is_null());
    drop((page, anew));
    assert_eq!(cache.evict(p), 1);
    disk.no_hook();
    drop(cache);
    p.assert_empty();
}

#[test]
fn another_thread_sees_the_page_being_read_in() {
    let p = machine(100);
    let disk = Disk::numbered();
    let cache = p.cache(&disk, 1 << 20);
    let (started, go_on) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (tell, wait) = (started.clone(), go_on.clone());
    disk.on_read(move |_| {
        tell.store(true, Relaxed);
        while !wait.load(Relaxed) {
            std::thread::yield_now();
        }
    });
    std::thread::scope(|s| {
        s.spawn(|| {
            super::CPU.set(1);
            assert_eq!(first_word(p, &cache.read(p, 9).unwrap()), 9);
        });
        while !started.load(Relaxed) {
            std::thread::yield_now();
        }
        let Err(ReadError::Blocked(ticket)) = cache.read(p, 9) else { panic!("it is being read in") };
        let page = ticket.page().unwrap();
        assert!(matches!(
            cache.write_at(p, 9 * PAGE_SIZE, &[1]),
            Err(WriteError::Page(ReadError::Blocked(_)))
        ));
        go_on.store(true, Relaxed);
        while page.meta().flags().contains(FrameFlags::FILLING) {
            std::thread::yield_now();
        }
        assert_eq!(cache.read(p, 9).unwrap().pfn(), page.pfn());
    });
    assert_eq!(disk.reads(), 1);
    disk.no_hook();
    drop(cache);
    p.assert_empty();
}

#[test]
fn a_failed_read_leaves_nothing() {
    let p = machine(100);
    let disk = Disk::numbered();
    let cache = p.cache(&disk, 1 << 20);
    cache.read(p, 0).unwrap();
    disk.0.fails.store(true, Relaxed);
    let waiting = Arc::new(std::sync::Mutex::new(None));
    let (inner, waiter) = (cache.clone(), waiting.clone());
    disk.on_read(move |index| {
        let Lookup::Filling(page) = look(p, &inner, index) else { panic!("it is being read in") };
        *waiter.lock().unwrap() = Some(page);
    });
    assert!(matches!(cache.read(p, 200), Err(ReadError::Io)));
    let page = waiting.lock().unwrap().take().unwrap();
    let flags = page.meta().flags();
    assert!(
        flags.contains(FrameFlags::FAILED) && !flags.intersects(FrameFlags::FILLING | FrameFlags::UP_TO_DATE)
    );
    assert!(!cache.is_attached(page.pfn(), page.pfn(), 200));
    drop(page);
    disk.no_hook();
    assert!(matches!(look(p, &cache, 200), Lookup::Missing));
    assert_eq!(cache.pages(), 1);
    let mut bytes = vec![7; 3 * PAGE];
    assert_eq!(cache.read_at(p, 0, &mut bytes).unwrap(), PAGE, "as far as it goes");
    assert!(matches!(cache.read_at(p, PAGE_SIZE, &mut bytes), Err(ReadError::Io)));
    disk.0.fails.store(false, Relaxed);
    assert_eq!(first_word(p, &cache.read(p, 200).unwrap()), 200);
    drop(cache);
    p.assert_empty();
}

// Read ahead, and nobody was told to wait for it: who looks it up just then does not.
#[test]
fn a_look_up_is_no_waiter() {
    let p = machine(100);
    let disk = Disk::numbered();
    let cache = p.cache(&disk, 1 << 20);
    disk.0.fails.store(true, Relaxed);
    cache.will_need(p, 3, 1);
    disk.0.fails.store(false, Relaxed);
    let Lookup::Failed(passing) = look(p, &cache, 3) else { panic!("it could not be read") };
    assert_eq!(first_word(p, &cache.read(p, 3).unwrap()), 3);
    drop((passing, cache));
    p.assert_empty();
}

#[test]
fn a_read_that_unwinds_leaves_nothing() {
    let p = machine(100);
    let disk = Disk::numbered();
    let cache = p.cache(&disk, 1 << 20);
    disk.on_read(|_| panic!("the driver's mistake"));
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| cache.read(p, 1).is_ok()));
    assert!(caught.is_err());
    assert!(matches!(look(p, &cache, 1), Lookup::Failed(_)));
    disk.no_hook();
    assert_eq!(first_word(p, &cache.read(p, 1).unwrap()), 1, "nobody waited for it");
    drop(cache);
    p.assert_empty();
}

#[test]
fn write_back_stores_what_is_dirty_and_below_the_size() {
    let p = machine(100);
    let disk = Disk::numbered();
    let cache = p.cache(&disk, 2 * PAGE_SIZE);
    cache.read(p, 0).unwrap();
    assert_eq!(cache.write_back(p).unwrap(), 0);
    assert_eq!(cache.write_at(p, PAGE_SIZE - 2, &[1, 2, 3, 4]).unwrap(), 4);
    assert_eq!(cache.write_at(p, 3 * PAGE_SIZE + 1, &[9]).unwrap(), 1);
    assert_eq!(cache.size(), 3 * PAGE_SIZE + 2);
    assert_eq!(cache.evict(p), 0, "all are dirty");
    disk.0.fails.store(true, Relaxed);
    assert_eq!(cache.write_back(p), Err(WriteBackError::Io(IoError)));
    assert_eq!(cache.evict(p), 0, "what failed is dirty still");
    disk.0.fails.store(false, Relaxed);
    assert_eq!(cache.write_back(p).unwrap(), 3);
    assert_eq!(disk.stored(0).unwrap()[PAGE - 3..], [0, 1, 2]);
    assert_eq!(disk.stored(1).unwrap()[..4], [3, 4, 0, 0]);
    assert_eq!(disk.stored(3).unwrap(), [0, 9]);
    assert_eq!(disk.stored(2), None);
    assert_eq!(cache.write_back(p).unwrap(), 0);
    // Mapped where no entry is found: it may be written to without anybody being told, so it stays dirty.
    cache.write_at(p, 0, &[5]).unwrap();
    let page = cache.read(p, 0).unwrap();
    assert!(page.meta().try_map());
    assert_eq!(cache.write_back(p).unwrap(), 1);
    p.cells(page.pfn())[0].store(6, Relaxed);
    assert!(!page.meta().unmap_many(1));
    assert_eq!(cache.write_back(p).unwrap(), 1);
    assert_eq!(disk.stored(0).unwrap()[..2], 6u64.to_ne_bytes()[..2]);
    drop(page);
    assert_eq!(cache.evict(p), 3);
    assert_eq!(cache.pages(), 0);
    drop(cache);
    p.assert_empty();
}

#[test]
fn a_page_is_called_clean_before_it_is_stored() {
    let p = machine(100);
    let cache = p.cache(&Disk::numbered(), 0);
    cache.write_at(p, 0, &[1]).unwrap();
    let pfn = cache.read(p, 0).unwrap().pfn();
    // Who writes after the flag is cleared sets it again; who wrote before is in the copy.
    WATCH.set(Some((pfn, FrameFlags::empty())));
    assert_eq!(cache.write_back(p), Ok(1));
    let (_, when_copied) = WATCH.take().unwrap();
    assert_eq!(when_copied, FrameFlags::FILE | FrameFlags::UP_TO_DATE | FrameFlags::STORING);
    // And who writes, sets it after he wrote.
    WATCH.set(Some((pfn, FrameFlags::empty())));
    cache.write_at(p, 0, &[2]).unwrap();
    let (_, when_written) = WATCH.take().unwrap();
    assert_eq!(when_written, FrameFlags::FILE | FrameFlags::UP_TO_DATE);
    assert!(p.meta(pfn).flags().contains(FrameFlags::DIRTY));
    drop(cache);
    p.assert_empty();
}

#[test]
fn evict_takes_what_nobody_uses() {
    let p = machine(300);
    let cache = p.cache(&Disk::numbered(), 1 << 50);
    let at = |i: u64| i * i * i;
    for i in 0..100 {
        cache.read(p, at(i)).unwrap();
    }
    let held = cache.read(p, at(10)).unwrap();
    let mapped = cache.read(p, at(20)).unwrap().pfn();
    assert!(p.meta(mapped).try_map());
    cache.write_at(p, at(30) * PAGE_SIZE, b"dirty").unwrap();
    assert_eq!(cache.evict(p), 97);
    assert_eq!(around(p, &cache, 0, at(99)), [at(10), at(20), at(30)]);
    drop(held);
    frame::unmap(p, mapped);
    cache.write_back(p).unwrap();
    assert_eq!(cache.evict(p), 3);
    p.vm.quiesce(p);
    assert_eq!(p.vm.held(p).objects, 1, "no nodes are left");
    drop(cache);
    p.assert_empty();
}

#[test]
fn pages_survive_their_cache_while_they_are_held() {
    let p = machine(100);
    let cache = p.cache(&Disk::numbered(), 1 << 20);
    let page = cache.read(p, 7).unwrap();
    drop(cache);
    p.vm.quiesce(p);
    assert!(page.meta().owner().is_null(), "it belongs to nobody");
    assert_eq!(first_word(p, &page), 7);
    drop(page);
    p.assert_empty();
}

/// A frame that was the page when its slot was read and is another's when its reference is taken.
#[test]
fn a_frame_that_is_not_the_page_is_not_found() {
    let p = machine(100);
    let cache = p.cache(&Disk::numbered(), 1 << 20);
    cache.read(p, 4).unwrap();
    let (mut other, mut nodes) = (Frame::new(p).unwrap(), Nodes::new());
    other.clear();
    // The same cache's page of another index; the same index of another cache.
    for (owner, index) in [(cache.owner(), 6), (core::ptr::null_mut(), 5)] {
        other.meta().restate(FrameFlags::FILE | FrameFlags::UP_TO_DATE, 0);
        other.meta().set_owner(owner);
        other.meta().set_index(index);
        let found = Found { pfn: other.pfn(), order: 0 };
        assert!(cache.index.insert(&mut cache.writer.lock(p), 5, found, &mut nodes).is_ok());
        assert!(!cache.is_attached(other.pfn(), other.pfn(), 5));
        assert_eq!(around(p, &cache, 0, 10), [4]);
        std::thread::scope(|s| {
            let looker = s.spawn(|| {
                super::CPU.set(1);
                assert!(matches!(look(p, &cache, 5), Lookup::Missing));
            });
            while other.meta().counts().refs == 1 && !looker.is_finished() {
                std::thread::yield_now();
            }
            assert!(cache.index.remove(&mut cache.writer.lock(p), 5, &mut Cut::new()).is_some());
        });
    }
    drop((other, cache));
    p.assert_empty();
}

/// A file of bytes, read, written, resized, stored and dropped at random, against a plain vector.
#[test]
fn a_file_agrees_with_a_vector() {
    let p = machine(300);
    for seed in 1..20 {
        let mut random = Random(seed);
        let disk = Disk::empty();
        let mut model: Vec<u8> = Vec::new();
        let mut cache = p.cache(&disk, 0);
        let end = 70 * PAGE_SIZE;
        for _ in 0..400 {
            let at = match random.below(3) {
                0 => random.below(end),
                1 => random.below(end / PAGE_SIZE) * PAGE_SIZE,
                _ => random.below(model.len() as u64 + 2),
            } as usize;
            let most = [10, 3 * PAGE_SIZE][random.below(2) as usize];
            let n = random.below(most) as usize;
            match random.below(9) {
                0..=2 => {
                    let new: Vec<u8> = (0..n).map(|_| random.next() as u8).collect();
                    assert_eq!(cache.write_at(p, at as u64, &new).unwrap(), n);
                    if n > 0 {
                        model.resize(model.len().max(at + n), 0);
                        model[at..at + n].copy_from_slice(&new);
                    }
                }
                3..=4 => {
                    let mut out = vec![0xcc; n];
                    let got = cache.read_at(p, at as u64, &mut out).unwrap();
                    let wanted = model.get(at..).map_or(&[][..], |rest| &rest[..n.min(rest.len())]);
                    assert_eq!(&out[..got], wanted);
                }
                5 => {
                    cache.set_size(p, at as u64);
                    model.resize(at, 0);
                }
                6 => {
                    cache.punch(p, at as u64..(at + n) as u64);
                    let end = model.len();
                    model[at.min(end)..(at + n).min(end)].fill(0);
                }
                7 => drop(cache.write_back(p).unwrap()),
                _ => drop(cache.evict(p)),
            }
            assert_eq!(cache.size(), model.len() as u64);
            if random.below(100) == 0 {
                // Closed and opened again: what was stored is the file.
                cache.write_back(p).unwrap();
                cache = p.cache(&disk, model.len() as u64);
            }
        }
        let mut out = vec![0; model.len() + 1];
        assert_eq!(cache.read_at(p, 0, &mut out).unwrap(), model.len());
        assert_eq!(out[..model.len()], model);
        drop(cache);
        p.assert_empty();
    }
}

#[test]
fn who_waits_is_told_with_no_lock_of_the_file_held() {
    let p = machine(100);
    let cache = p.cache(&Disk::empty(), 0);
    let (rung, held) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    let (rings, holds, file) = (rung.clone(), held.clone(), cache.clone());
    let ring = move || {
        rings.set(rings.get() + 1);
        let is_free = file.changes.try_lock(p).is_some() && file.stores.try_lock(p).is_some();
        holds.set(holds.get() + !is_free as u32);
    };
    BELL.set(Some(Box::new(ring)));
    cache.write_at(p, 0, &[7; 4 * PAGE]).unwrap();
    assert_eq!((cache.write_back(p).unwrap(), rung.get()), (4, 4));
    cache.punch(p, 0..PAGE_SIZE);
    cache.set_size(p, 1);
    assert_eq!((rung.get(), held.get()), (6, 0));
    BELL.set(None);
    drop(cache);
    p.assert_empty();
}
