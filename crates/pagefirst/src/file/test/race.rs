//! Threads against each other.

use super::super::cache::Lookup;
use super::super::{ReadError, WriteError};
use super::contents::Cache;
use super::{AtomicU64, CPU, Disk, Machine, PAGE, PAGE_SIZE, Random, Relaxed, machine, std};
use crate::frame;
use crate::platform::Platform as _;
use crate::sync::epoch::Pin;
use crate::types::Pfn;
use std::vec::Vec;

const ROUNDS: u64 = 4000;

/// Retries what meets a page that another is reading in.
fn read(p: &'static Machine, cache: &Cache, at: u64, to: &mut [u8]) -> usize {
    loop {
        match cache.read_at(p, at, to) {
            Ok(n) => return n,
            Err(ReadError::Blocked(_)) => p.relax(),
            Err(e) => panic!("{e}"),
        }
    }
}
/// Retries what meets a page that another is reading in.
fn write(p: &'static Machine, cache: &Cache, at: u64, from: &[u8]) {
    let mut done = 0;
    while done < from.len() {
        match cache.write_at(p, at + done as u64, &from[done..]) {
            Ok(n) => done += n,
            Err(WriteError::Page(ReadError::Blocked(_))) => p.relax(),
            Err(e) => panic!("{e}"),
        }
    }
}
/// As a fault maps a page: found without a lock, its count raised, then validated.
fn map(p: &'static Machine, cache: &Cache, index: u64) -> Option<Pfn> {
    let pin = Pin::new(p);
    let Lookup::Page(page) = cache.lookup(p, &pin, index) else { return None };
    let pfn = page.pfn();
    drop(page);
    if !p.meta(pfn).try_map() {
        return None;
    }
    if cache.is_attached(pfn, pfn, index) {
        return Some(pfn);
    }
    frame::unmap(p, pfn);
    None
}

/// Tells the other threads to end, even when this one panics.
struct Leave<'a>(&'a AtomicU64);
impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

fn threads(jobs: &[&(dyn Fn() + Sync)]) {
    std::thread::scope(|s| {
        let handles: Vec<_> = (0..)
            .zip(jobs)
            .map(|(cpu, job)| {
                s.spawn(move || {
                    CPU.set(cpu + 1);
                    job();
                })
            })
            .collect();
        handles.into_iter().for_each(|h| h.join().unwrap());
    });
}

#[test]
fn r13_readers_against_eviction_and_reading_in() {
    let p = machine(400);
    let disk = Disk::numbered();
    let cache = p.cache(&disk, 1 << 52);
    // Pages near and far, so that nodes come and go with them.
    let at = |i: u64| [i, i << 8, i << 30][i as usize % 3];
    let reader = |seed| {
        let mut random = Random(seed);
        for _ in 0..ROUNDS {
            let index = at(random.below(60));
            match cache.read(p, index) {
                Ok(page) => {
                    assert_eq!(p.cells(page.pfn())[511].load(Relaxed), index);
                    assert_eq!(page.meta().index(), index);
                }
                Err(ReadError::Blocked(_)) => {}
                Err(e) => panic!("{e}"),
            }
            let index = at(random.below(60));
            if let Some(pfn) = map(p, &cache, index) {
                assert_eq!(p.cells(pfn)[0].load(Relaxed), index);
                p.relax();
                assert_eq!(p.cells(pfn)[511].load(Relaxed), index, "a mapped page stays");
                assert!(cache.is_attached(pfn, pfn, index));
                frame::unmap(p, pfn);
            }
            let pin = Pin::new(p);
            let mut cursor = cache.cursor(&pin);
            let seen = (0..60 << 8).filter_map(|index| Some((index, cursor.look(index)?.pfn)));
            let seen: Vec<_> = seen.collect();
            drop(pin);
            for (index, pfn) in seen {
                if p.meta(pfn).try_map() {
                    if cache.is_attached(pfn, pfn, index) {
                        assert_eq!(p.cells(pfn)[9].load(Relaxed), index);
                    }
                    frame::unmap(p, pfn);
                }
            }
            if random.below(50) == 0 {
                p.vm.collect(p, 100);
            }
        }
    };
    let left = AtomicU64::new(1);
    let evictor = || {
        let mut dropped = 0;
        while left.load(Relaxed) > 0 {
            dropped += cache.evict(p);
            p.relax();
        }
        assert!(dropped > 100, "{dropped}");
    };
    let last = || {
        let _leave = Leave(&left);
        reader(3);
    };
    threads(&[&|| reader(1), &|| reader(2), &last, &evictor]);
    let pages = cache.pages();
    assert_eq!(cache.evict(p), pages, "no reference is left over");
    drop(cache);
    p.assert_empty();
}

#[test]
fn no_write_is_lost_to_eviction() {
    let p = machine(400);
    let disk = Disk::empty();
    let cache = p.cache(&disk, 0);
    let left = AtomicU64::new(2);
    // Two writers share pages and words: one has the even bytes, one the odd.
    let writer = |me: u64| {
        let _leave = Leave(&left);
        let mut random = Random(me + 1);
        let mut model = std::vec![0u8; 6 * PAGE / 2];
        for _ in 0..ROUNDS {
            let i = random.below(model.len() as u64) as usize / 7 * 7;
            let at = i as u64 * 2 + me;
            let mut out = [0];
            if read(p, &cache, at, &mut out) == 1 {
                assert_eq!(out[0], model[i]);
            } else {
                assert_eq!(model[i], 0);
            }
            model[i] = random.next() as u8;
            if random.below(3) > 0 {
                write(p, &cache, at, &model[i..=i]);
            } else if let Some(pfn) = map(p, &cache, at / PAGE_SIZE) {
                // Through a mapping, as hardware does; the dirty bit is handed over when it is unmapped.
                crate::frame::bytes::write(p.cells(pfn), (at % PAGE_SIZE) as usize, &model[i..=i]);
                let below = at < cache.size();
                p.meta(pfn).set(crate::frame::FrameFlags::DIRTY);
                frame::unmap(p, pfn);
                if !below {
                    write(p, &cache, at, &model[i..=i]);
                }
            } else {
                write(p, &cache, at, &model[i..=i]);
            }
        }
    };
    let storer = || {
        while left.load(Relaxed) > 0 {
            cache.write_back(p).unwrap();
            cache.evict(p);
            p.vm.collect(p, 100);
        }
    };
    threads(&[&|| writer(0), &|| writer(1), &storer, &|| {
        while left.load(Relaxed) > 0 {
            cache.evict(p);
            p.relax();
        }
    }]);
    drop(cache);
    p.assert_empty();
}

#[test]
fn r13_truncation_against_faults() {
    let p = machine(400);
    let disk = Disk::empty();
    let cache = p.cache(&disk, 0);
    let left = AtomicU64::new(1);
    let pages = 40;
    // One thread writes, shrinks and grows; what it cut off never shows again.
    let owner = || {
        let _leave = Leave(&left);
        let mut random = Random(5);
        for _ in 0..ROUNDS / 10 {
            write(p, &cache, 0, &std::vec![7; pages * PAGE]);
            let to = random.below(cache.size() + 1) & !(random.below(2) * 0xfff);
            cache.set_size(p, to);
            let at = to.div_ceil(PAGE_SIZE);
            assert!(map(p, &cache, at).is_none() && map(p, &cache, pages as u64).is_none());
            cache.set_size(p, (pages * PAGE) as u64);
            let mut out = std::vec![1; pages * PAGE];
            let mut got = 0;
            while got < out.len() {
                got += read(p, &cache, got as u64, &mut out[got..]);
            }
            for (i, byte) in out.into_iter().enumerate() {
                assert_eq!(byte, if (i as u64) < to { 7 } else { 0 }, "byte {i}, cut at {to}");
            }
        }
    };
    let faulter = |seed| {
        let mut random = Random(seed);
        while left.load(Relaxed) > 0 {
            let index = random.below(pages as u64 + 2);
            match cache.read(p, index) {
                Ok(_) | Err(ReadError::BeyondEnd | ReadError::Blocked(_) | ReadError::Removing(_)) => {}
                Err(e) => panic!("{e}"),
            }
            if let Some(pfn) = map(p, &cache, index) {
                let byte = p.cells(pfn)[0].load(Relaxed) as u8;
                assert!(byte == 0 || byte == 7);
                if random.below(8) == 0 {
                    p.relax();
                }
                frame::unmap(p, pfn);
            }
        }
    };
    let rest = || {
        while left.load(Relaxed) > 0 {
            cache.evict(p);
            p.vm.collect(p, 100);
            p.relax();
        }
    };
    threads(&[&owner, &|| faulter(1), &|| faulter(2), &rest]);
    cache.set_size(p, 0);
    assert_eq!(cache.pages(), 0);
    drop(cache);
    p.assert_empty();
}
