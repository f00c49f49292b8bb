//! The index against a `BTreeMap`, indexes up to the last there can be.

use super::super::index::{Index, LAST_INDEX, Nodes, Short, Writer};
use super::{Machine, Random, machine, std};
use crate::sync::epoch::Pin;
use crate::types::Pfn;
use core::ops::ControlFlow::{Break, Continue};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::vec::Vec;

/// The nodes a tree over these indexes has: one for each group of 64 at each level, up to a single one.
fn nodes(of: &BTreeMap<u64, Pfn>) -> usize {
    let mut level: BTreeSet<u64> = of.keys().copied().collect();
    let mut count = 0;
    while !level.is_empty() && (count == 0 || level.iter().ne([&0])) {
        level = level.into_iter().map(|i| i >> 6).collect();
        count += level.len();
    }
    count
}

fn insert(p: &'static Machine, index: &Index<Machine>, w: &mut Writer, at: u64, pfn: Pfn) {
    let mut nodes = Nodes::new();
    while let Err(Short(n)) = index.insert(w, at, pfn, &mut nodes) {
        nodes.reserve(p, n).unwrap();
    }
}

fn check(
    p: &'static Machine,
    index: &Index<Machine>,
    w: &Writer,
    model: &BTreeMap<u64, Pfn>,
    random: &mut Random,
) {
    let pin = Pin::new(p);
    assert_eq!(w.pages(), model.len() as u64);
    for (&at, &pfn) in model {
        assert_eq!(index.get(w, at), Some(pfn));
        assert_eq!(index.slot(&pin, at).and_then(|s| s.load()), Some(pfn));
    }
    for _ in 0..20 {
        let at = any_index(random);
        assert_eq!(index.get(w, at), model.get(&at).copied());
        assert_eq!(index.slot(&pin, at).and_then(|s| s.load()), model.get(&at).copied());
        let (first, last) = (at.min(any_index(random)), at.max(any_index(random)));
        let mut seen = Vec::new();
        let _ = index.scan(&pin, first, last, &mut |at, pfn| {
            seen.push((at, pfn));
            if seen.len() == 50 { Break(()) } else { Continue(()) }
        });
        let wanted: Vec<_> = model.range(first..=last).take(50).map(|(at, pfn)| (*at, *pfn)).collect();
        assert_eq!(seen, wanted);
    }
}

fn any_index(random: &mut Random) -> u64 {
    let most = [3, 64, 200, 5000, 1 << 20, 1 << 40, LAST_INDEX + 1][random.below(7) as usize];
    random.below(most)
}

#[test]
fn index_agrees_with_a_map() {
    let p = machine(3000);
    let mut random = Random(11);
    for round in 0..30 {
        let (mut index, mut w, mut model) = (Index::new(), Writer::new(), BTreeMap::new());
        for step in 0..400 {
            let grow = if step / 100 % 2 == 0 { 7 } else { 2 };
            if random.below(10) < grow {
                let (at, pfn) = (any_index(&mut random), Pfn(1 + random.below(1000) as u32));
                if let Entry::Vacant(free) = model.entry(at) {
                    insert(p, &index, &mut w, at, pfn);
                    free.insert(pfn);
                }
            } else {
                let at = any_index(&mut random);
                let at = model.range(at..).next().map_or(at, |(at, _)| *at);
                let out = index.remove(&mut w, at);
                assert_eq!(out.map(|(pfn, _)| pfn), model.remove(&at));
            }
            if step % 40 == round {
                check(p, &index, &w, &model, &mut random);
                p.vm.quiesce(p);
                assert_eq!(p.vm.cache_nodes.live(), nodes(&model), "{:?}", model.keys());
            }
        }
        check(p, &index, &w, &model, &mut random);
        if round % 2 == 0 {
            for (at, pfn) in &model {
                assert_eq!(index.remove(&mut w, *at).map(|(pfn, _)| pfn), Some(*pfn));
            }
            p.vm.quiesce(p);
            assert_eq!(p.vm.cache_nodes.live(), 0);
        }
        let mut left = 0;
        index.empty(|_| left += 1);
        assert_eq!(left, w.pages());
        drop(index);
        p.assert_empty();
    }
}

#[test]
fn an_insert_that_is_short_changes_nothing() {
    let p = machine(200);
    let mut index = Index::new();
    let mut w = Writer::new();
    let mut model = BTreeMap::new();
    // A tree of one leaf, then full height beside it; below an inner node; in a leaf.
    for (at, need) in [(5, 1), (LAST_INDEX, 16), (1 << 40, 6), (4, 0)] {
        for have in 0..need {
            let mut nodes = Nodes::new();
            nodes.reserve(p, have).unwrap();
            assert!(matches!(index.insert(&mut w, at, Pfn(9), &mut nodes), Err(Short(n)) if n == need));
            check(p, &index, &w, &model, &mut Random(3));
        }
        insert(p, &index, &mut w, at, Pfn(9));
        model.insert(at, Pfn(9));
        check(p, &index, &w, &model, &mut Random(3));
    }
    index.empty(|_| {});
    drop(index);
    p.assert_empty();
}

#[test]
fn a_reader_in_a_node_that_was_cut_off_finds_nothing() {
    let p = machine(100);
    let mut index = Index::new();
    let mut w = Writer::new();
    insert(p, &index, &mut w, 1, Pfn(7));
    insert(p, &index, &mut w, 5000, Pfn(8));
    let pin = Pin::new(p);
    let slot = index.slot(&pin, 5000).unwrap();
    assert_eq!(slot.load(), Some(Pfn(8)));
    drop(index.remove(&mut w, 5000));
    assert_eq!(slot.load(), None);
    assert!(index.slot(&pin, 5000).is_none(), "the tree is one leaf again");
    assert_eq!(index.slot(&pin, 1).unwrap().load(), Some(Pfn(7)));
    drop(pin);
    index.empty(|_| {});
    drop(index);
    p.assert_empty();
}
