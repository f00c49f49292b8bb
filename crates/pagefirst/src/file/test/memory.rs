//! Every allocation that fails is a value, and leaves nothing behind.

use super::super::index::{Index, Writer};
use super::super::{FileCache, ReadError, WriteBackError, WriteError};
use super::{Disk, Machine, PAGE_SIZE, machine, machine_with, std};
use crate::frame::{Frame, Region};
use crate::types::{NoMemory, Pfn};
use std::vec::Vec;

/// All frames but `left`.
fn hoard(p: &'static Machine, left: usize) -> Vec<Frame<Machine>> {
    p.vm.drain(p);
    let mut all: Vec<_> = std::iter::from_fn(|| Frame::new(p).ok()).collect();
    all.truncate(all.len() - left);
    all
}

#[test]
fn r06_each_allocation_fails_in_turn() {
    // What a cache, a page and its first nine nodes need: a slab each, a frame for the page, and a slab more.
    let mut outcomes = Vec::new();
    for left in 0..6 {
        let p = machine(60);
        let disk = Disk::numbered();
        let hoarded = hoard(p, left);
        let outcome = match FileCache::new(p, disk.clone(), u64::MAX) {
            Err(NoMemory) => 0,
            Ok(cache) => match cache.read(p, 1 << 50) {
                Err(ReadError::NoMemory) => {
                    assert_eq!((cache.pages(), disk.reads()), (0, 0));
                    1
                }
                Err(e) => panic!("{e}"),
                Ok(page) => {
                    assert_eq!(p.vm.cache_nodes.live(), 9);
                    drop(page);
                    2
                }
            },
        };
        outcomes.push(outcome);
        drop(hoarded);
        p.assert_empty();
    }
    assert_eq!(outcomes, [0, 1, 1, 1, 2, 2]);
}

#[test]
fn r06_a_write_that_finds_no_memory_changes_nothing() {
    let mut succeeded = 0;
    for left in 0..6 {
        let p = machine(60);
        let cache = p.cache(&Disk::numbered(), PAGE_SIZE);
        cache.read(p, 0).unwrap();
        let hoarded = hoard(p, left);
        match cache.write_at(p, 1 << 60, b"far beyond") {
            Ok(10) => {
                assert_eq!((cache.size(), cache.pages()), ((1 << 60) + 10, 2));
                succeeded += 1;
                drop(hoarded);
            }
            Err(WriteError::Page(ReadError::NoMemory)) => {
                assert_eq!((cache.size(), cache.pages()), (PAGE_SIZE, 1));
                drop(hoarded);
                p.vm.quiesce(p);
                assert_eq!(p.vm.cache_nodes.live(), 1);
            }
            other => panic!("{other:?}"),
        }
        drop(cache);
        p.assert_empty();
    }
    assert!((1..6).contains(&succeeded));
}

#[test]
fn writes_and_reads_go_as_far_as_memory_does() {
    let p = machine(60);
    let cache = p.cache(&Disk::numbered(), 0);
    cache.write_at(p, 0, &[1]).unwrap();
    let hoarded = hoard(p, 5);
    let written = cache.write_at(p, 1, &[2; 20 * PAGE_SIZE as usize]).unwrap() as u64;
    assert_eq!((written + 1, cache.size()), (6 * PAGE_SIZE, 6 * PAGE_SIZE));
    assert_eq!(cache.write_back(p), Err(WriteBackError::NoMemory(NoMemory)));
    drop(hoarded);
    assert_eq!(cache.write_back(p), Ok(6));
    cache.evict(p);
    cache.set_size(p, 100 * PAGE_SIZE);
    let hoarded = hoard(p, 3);
    let read = cache.read_at(p, 0, &mut [0; 20 * PAGE_SIZE as usize]).unwrap() as u64;
    assert_eq!(read, 2 * PAGE_SIZE, "one frame is the index's");
    drop((hoarded, cache));
    p.assert_empty();
}

#[test]
fn reading_in_drains_before_it_gives_up() {
    let p = machine(60);
    let cache = p.cache(&Disk::numbered(), u64::MAX);
    let hoarded = hoard(p, 6);
    // Each page far from the last needs nodes of its own; those of the one before are in limbo.
    for i in 1..200 {
        cache.read(p, i << 36).unwrap();
        assert_eq!(cache.evict(p), 1);
    }
    drop((hoarded, cache));
    p.assert_empty();
}

#[test]
fn a_node_fits_its_slab() {
    let p = machine(60);
    let mut w = Writer::new();
    let index = Index::new();
    let mut nodes = super::super::index::Nodes::new();
    nodes.reserve(p, 7).unwrap();
    p.vm.drain(p);
    assert_eq!(p.vm.held(p).frames, 2, "seven nodes a frame");
    let found = super::super::index::Found { pfn: crate::types::Pfn(1), order: 0 };
    assert!(index.insert(&mut w, 1 << 36, found, &mut nodes).is_ok());
    index.each(|_| {});
    drop((index, nodes));
    p.assert_empty();
}

#[test]
fn memory_ends_where_the_numbers_of_frames_do() {
    for frames in [3, 40, 64] {
        let p = machine_with(Region { first: Pfn(u32::MAX - (frames - 1)), frames });
        let all: Vec<_> = std::iter::from_fn(|| Frame::new(p).ok()).collect();
        // Of the others one has the metadata, and one is the zero page; the last has no end.
        assert_eq!(all.len() as u32, frames - 3);
        drop(all);
        p.assert_empty();
    }
}

/// Nodes of the index that pages were dropped from, and copies of what was stored later.
#[test]
fn what_is_dropped_page_by_page_is_freed_meanwhile() {
    let p = machine(400);
    let cache = p.cache(&Disk::empty(), 1 << 50);
    for i in 0..300 {
        cache.read(p, i << 20).unwrap();
        assert_eq!(cache.evict(p), 1);
        assert!(p.vm.in_limbo(p) < 200, "{} after {i}", p.vm.in_limbo(p));
    }
    drop(cache);
    p.assert_empty();
}
