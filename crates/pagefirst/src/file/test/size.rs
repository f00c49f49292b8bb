//! Growing and shrinking: what lies beyond the end is zero or invalid, and never comes back.

use super::super::cache::Lookup;
use super::super::{ReadError, SizeError, WriteError};
use super::contents::{Cache, around, look};
use super::{AtomicU64, CPU, Disk, Machine, PAGE, PAGE_SIZE, Relaxed, machine, std};
use crate::frame;
use crate::platform::Platform as _;
use crate::types::Pfn;
use core::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::vec;

/// Maps a page as a fault does.
fn map(p: &'static Machine, cache: &Cache, index: u64) -> Pfn {
    let page = cache.read(p, index).unwrap();
    assert!(page.meta().try_map() && cache.is_attached(page.pfn(), page.pfn(), index));
    page.pfn()
}

fn bytes(p: &'static Machine, cache: &Cache, at: u64, n: usize) -> std::vec::Vec<u8> {
    let mut out = vec![0xcc; n];
    let got = cache.read_at(p, at, &mut out).unwrap();
    out.truncate(got);
    out
}

#[test]
fn bytes_beyond_the_end_are_zero_when_the_file_grows() {
    for by_writing in [false, true] {
        let p = machine(100);
        let cache = p.cache(&Disk::numbered(), 100);
        // A mapping writes beyond the end, in the last page: allowed, and forgotten.
        let pfn = map(p, &cache, 0);
        for cell in p.cells(pfn) {
            cell.store(u64::MAX, Relaxed);
        }
        if by_writing {
            assert_eq!(cache.write_at(p, 200, &[5]).unwrap(), 1);
        } else {
            cache.set_size(p, 201);
        }
        let seen = bytes(p, &cache, 0, PAGE);
        assert_eq!(seen.len(), 201);
        assert!(seen[..100].iter().all(|b| *b == 0xff) && seen[100..200].iter().all(|b| *b == 0));
        assert_eq!(seen[200], if by_writing { 5 } else { 0 });
        assert_eq!(p.cells(pfn)[PAGE / 8 - 1].load(Relaxed), 0, "up to the page's end");
        frame::unmap(p, pfn);
        drop(cache);
        p.assert_empty();
    }
}

#[test]
fn r13_contents_from_before_a_truncation_do_not_return() {
    let p = machine(200);
    let cache = p.cache(&Disk::empty(), 0);
    let all = 60 * PAGE_SIZE as usize;
    assert_eq!(cache.write_at(p, 0, &vec![7; all]).unwrap(), all);
    cache.set_size(p, PAGE_SIZE + 10);
    assert_eq!(cache.pages(), 2);
    cache.set_size(p, all as u64);
    let seen = bytes(p, &cache, 0, all);
    assert!(seen.iter().enumerate().all(|(i, b)| *b == if i < PAGE + 10 { 7 } else { 0 }));
    // The same with a size on a page's boundary, and to nothing.
    for size in [PAGE_SIZE, 0] {
        cache.write_at(p, 0, &vec![7; all]).unwrap();
        cache.set_size(p, size);
        assert_eq!(cache.pages(), size / PAGE_SIZE);
        cache.set_size(p, all as u64);
        let seen = bytes(p, &cache, 0, all);
        assert!(seen.iter().enumerate().all(|(i, b)| *b == if i < size as usize { 7 } else { 0 }));
    }
    drop(cache);
    p.assert_empty();
}

#[test]
fn r13_a_removal_ends_when_nobody_maps_what_it_removes() {
    let p = machine(200);
    let cache = p.cache(&Disk::numbered(), 100 * PAGE_SIZE);
    for index in 0..100 {
        cache.read(p, index).unwrap();
    }
    // Entries on the move, counted and in no table: the removal waits for them.
    let mapped = [70, 3, 99].map(|index| map(p, &cache, index));
    std::thread::scope(|s| {
        let removal = s.spawn(|| {
            CPU.set(1);
            cache.set_size(p, PAGE_SIZE + 1);
        });
        while cache.pages() > 2 + 3 {
            p.relax();
        }
        assert!(!cache.is_attached(mapped[1], mapped[1], 3));
        assert!(matches!(look(p, &cache, 3), Lookup::BeyondEnd));
        assert_eq!(around(p, &cache, 0, 200), [0, 1]);
        assert_eq!((cache.turn() % 2, cache.pages()), (1, 5), "those mapped are left");
        mapped.iter().for_each(|pfn| frame::unmap(p, *pfn));
        removal.join().unwrap();
    });
    assert_eq!((cache.turn(), cache.pages()), (2, 2));
    cache.set_size(p, 100 * PAGE_SIZE);
    assert_eq!(around(p, &cache, 0, 200), [0, 1]);
    drop(cache);
    p.assert_empty();
}

#[test]
fn r05_what_is_in_a_hole_is_gone_and_what_is_beside_it_stays() {
    for (from, to) in
        [(PAGE_SIZE, 3 * PAGE_SIZE), (100, 200), (4000, 4200), (0, 3 * PAGE_SIZE + 8), (5000, u64::MAX)]
    {
        let p = machine(200);
        let disk = Disk::empty();
        let cache = p.cache(&disk, 0);
        let all = 5 * PAGE + 7;
        cache.write_at(p, 0, &vec![7; all]).unwrap();
        cache.write_back(p).unwrap();
        cache.write_at(p, 2 * PAGE_SIZE, &[8]).unwrap();
        cache.punch(p, from..to);
        let hole = |i: u64| from <= i && i < to;
        let check = || {
            for (i, byte) in (0..).zip(bytes(p, &cache, 0, all + 1)) {
                let was = if i == 2 * PAGE_SIZE { 8 } else { 7 };
                assert_eq!(byte, if hole(i) { 0 } else { was }, "byte {i} of {from}..{to}");
            }
        };
        let whole = (0..6).filter(|i| hole(i * PAGE_SIZE) && hole((i + 1) * PAGE_SIZE - 1)).count() as u64;
        assert_eq!((cache.pages(), cache.size()), (6 - whole, all as u64));
        check();
        // And so they do from the storage.
        cache.write_back(p).unwrap();
        assert_eq!(cache.evict(p), 6);
        check();
        drop(cache);
        p.assert_empty();
    }
}

#[test]
fn r05_what_comes_while_pages_are_removed_waits() {
    let p = machine(100);
    let disk = Disk::empty();
    let cache = p.cache(&disk, 8 * PAGE_SIZE);
    let here = map(p, &cache, 2);
    let hole = PAGE_SIZE + 100..5 * PAGE_SIZE;
    std::thread::scope(|s| {
        let removal = s.spawn(|| {
            CPU.set(1);
            cache.punch(p, hole.clone());
        });
        while cache.turn() == 0 {
            p.relax();
        }
        // A page that is there, one that is not, and one that only in part is in the hole.
        while !matches!(cache.read(p, 2), Err(ReadError::Removing(1))) {
            p.relax();
        }
        assert!(matches!(cache.read(p, 3), Err(ReadError::Removing(1))));
        assert!(matches!(cache.read(p, 1), Err(ReadError::Removing(1))));
        assert!(matches!(look(p, &cache, 2), Lookup::Removing(1)));
        assert!(cache.read(p, 5).is_ok() && cache.read(p, 0).is_ok());
        let others = [
            s.spawn(|| {
                CPU.set(2);
                assert_eq!(bytes(p, &cache, 2 * PAGE_SIZE, 9), [0; 9]);
                assert_eq!(cache.turn(), 2);
            }),
            s.spawn(|| {
                CPU.set(3);
                assert_eq!(cache.write_at(p, 3 * PAGE_SIZE, &[1]).unwrap(), 1);
                assert_eq!(cache.turn(), 2);
            }),
            s.spawn(|| {
                CPU.set(4);
                cache.set_size(p, 9 * PAGE_SIZE);
                assert_eq!(cache.turn(), 2);
            }),
        ];
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(cache.turn(), 1);
        frame::unmap(p, here);
        removal.join().unwrap();
        others.into_iter().for_each(|other| other.join().unwrap());
    });
    assert_eq!((cache.size(), bytes(p, &cache, 3 * PAGE_SIZE, 1)), (9 * PAGE_SIZE, vec![1]));
    drop(cache);
    p.assert_empty();
}

#[test]
fn r13_what_is_read_while_the_file_shrinks_is_not_seen() {
    // The file shrinks and grows while a page is read: before the page, within it; beyond it nothing matters.
    for (shrunk, reads) in [(PAGE_SIZE, 2), (PAGE_SIZE + 24, 2), (2 * PAGE_SIZE, 1), (3 * PAGE_SIZE, 1)] {
        let p = machine(100);
        let disk = Disk::numbered();
        let cache = p.cache(&disk, 10 * PAGE_SIZE);
        let (inner, storage, once) = (cache.clone(), disk.clone(), AtomicBool::new(false));
        let pages = Arc::new(AtomicU64::new(0));
        let seen = pages.clone();
        disk.on_read(move |_| {
            if !once.swap(true, Relaxed) {
                inner.set_size(p, shrunk);
                storage.0.len.store(shrunk, Relaxed);
                inner.set_size(p, 10 * PAGE_SIZE);
                seen.store(inner.pages(), Relaxed);
                // The first read still answers from before.
                storage.0.len.store(if shrunk < 2 * PAGE_SIZE { u64::MAX } else { shrunk }, Relaxed);
            } else {
                storage.0.len.store(shrunk, Relaxed);
            }
        });
        let page = cache.read(p, 1).unwrap();
        assert_eq!(disk.reads(), reads);
        assert_eq!(pages.load(Relaxed), 2 - reads, "taken out at once, or left alone");
        assert!(cache.is_attached(page.pfn(), page.pfn(), 1));
        for (i, cell) in p.cells(page.pfn()).iter().enumerate() {
            let below = PAGE_SIZE + i as u64 * 8 < shrunk;
            assert_eq!(cell.load(Relaxed), below as u64);
        }
        disk.no_hook();
        drop((page, cache));
        p.assert_empty();
    }
}

#[test]
fn a_read_whose_page_is_cut_off_for_good_is_beyond_the_end() {
    let p = machine(100);
    let disk = Disk::numbered();
    let cache = p.cache(&disk, 10 * PAGE_SIZE);
    let inner = cache.clone();
    disk.on_read(move |_| inner.set_size(p, PAGE_SIZE));
    assert!(matches!(cache.read(p, 5), Err(ReadError::BeyondEnd)));
    assert_eq!(cache.pages(), 0);
    disk.no_hook();
    drop(cache);
    p.assert_empty();
}

#[test]
fn sizes_up_to_the_largest() {
    let p = machine(100);
    let cache = p.cache(&Disk::numbered(), 0);
    cache.set_size(p, u64::MAX);
    let last = u64::MAX / PAGE_SIZE;
    assert_eq!(cache.read(p, last).unwrap().meta().index(), last);
    assert_eq!(bytes(p, &cache, u64::MAX - 3, 100).len(), 3);
    assert!(matches!(cache.write_at(p, u64::MAX, &[1, 2]), Err(WriteError::Size(SizeError::TooLarge))));
    assert_eq!(cache.write_at(p, u64::MAX - 2, &[1, 2]).unwrap(), 2);
    cache.set_size(p, 1);
    assert_eq!(cache.pages(), 0);
    drop(cache);
    p.assert_empty();
}
