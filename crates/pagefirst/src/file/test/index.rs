//! The index against a `BTreeMap`, indexes up to the last there can be, folios of all orders.

use super::super::index::{Cut, Found, Index, LAST_INDEX, MAX_FOLIO_ORDER, Nodes, Short, Writer};
use super::{Machine, Random, machine, std};
use crate::sync::epoch::Pin;
use crate::types::Pfn;
use core::ops::ControlFlow::{Break, Continue};
use std::collections::{BTreeMap, BTreeSet};
use std::vec::Vec;

/// Folios by the index of their first page.
type Model = BTreeMap<u64, Found>;

/// The page at an index: its frame, and the order of its folio.
fn page(model: &Model, at: u64) -> Option<Found> {
    let (first, folio) = model.range(..=at).next_back()?;
    let inside = at - first;
    (inside < 1 << folio.order).then(|| Found { pfn: folio.pfn.add(inside as u32), ..*folio })
}

/// The nodes a tree over these has: one for each group of 64 at each level, up to a single one.
fn nodes(of: &Model) -> usize {
    let mut level: BTreeSet<u64> =
        of.iter().flat_map(|(at, folio)| folio.indexes(*at).step_by(64).collect::<Vec<_>>()).collect();
    let mut count = 0;
    while !level.is_empty() && (count == 0 || level.iter().ne([&0])) {
        level = level.into_iter().map(|i| i >> 6).collect();
        count += level.len();
    }
    count
}

fn one(pfn: u32) -> Found {
    Found { pfn: Pfn(pfn), order: 0 }
}

fn insert(p: &'static Machine, index: &Index<Machine>, w: &mut Writer, at: u64, folio: Found) {
    let mut nodes = Nodes::new();
    while let Err(Short(n)) = index.insert(w, at, folio, &mut nodes) {
        nodes.reserve(p, n).unwrap();
    }
}

fn remove(index: &Index<Machine>, w: &mut Writer, at: u64) -> Option<Found> {
    let mut cut = Cut::new();
    index.remove(w, at, &mut cut)
}

fn check(p: &'static Machine, index: &Index<Machine>, w: &Writer, model: &Model, random: &mut Random) {
    let pin = Pin::new(p);
    assert_eq!(w.pages(), model.values().map(|folio| 1 << folio.order).sum::<u64>());
    for (&at, folio) in model {
        for at in folio.indexes(at).step_by(31) {
            assert_eq!(index.get(w, at), page(model, at));
            assert_eq!(index.slot(&pin, at).and_then(|s| s.load()), page(model, at));
        }
    }
    for _ in 0..20 {
        let at = any_index(random);
        assert_eq!(index.get(w, at), page(model, at));
        assert_eq!(index.slot(&pin, at).and_then(|s| s.load()), page(model, at));
        let most = random.below(MAX_FOLIO_ORDER as u64 + 1) as u8;
        let fits = |order: &u8| (at >> order << order..).take(1 << order).all(|i| page(model, i).is_none());
        assert_eq!(index.room(w, at, most), (0..=most).rev().find(fits));
        let (first, last) = (at.min(any_index(random)), at.max(any_index(random)));
        let mut seen = Vec::new();
        let _ = index.scan(&pin, first, last, &mut |at, found| {
            seen.push((at, found));
            if seen.len() == 50 { Break(()) } else { Continue(()) }
        });
        let within = page(model, first).filter(|_| !model.contains_key(&first)).map(|found| (first, found));
        let wanted = within.into_iter().chain(model.range(first..=last).map(|(at, found)| (*at, *found)));
        assert_eq!(seen, wanted.take(50).collect::<Vec<_>>());
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
        let (index, mut w, mut model) = (Index::new(), Writer::new(), BTreeMap::new());
        for step in 0..400 {
            let grow = if step / 100 % 2 == 0 { 7 } else { 2 };
            if random.below(10) < grow {
                let at = any_index(&mut random);
                let order = random.below(2) * random.below(MAX_FOLIO_ORDER as u64 + 1);
                if let Some(order) = index.room(&w, at, order as u8) {
                    let folio = Found { pfn: Pfn((1 + random.below(1000) as u32) << order), order };
                    let at = folio.indexes(at).start;
                    insert(p, &index, &mut w, at, folio);
                    model.insert(at, folio);
                }
            } else {
                let at = any_index(&mut random);
                let at = model.range(at..).next().map_or(at, |(at, _)| *at);
                match model.remove(&at) {
                    Some(folio) if random.below(4) == 0 => {
                        index.split(&w, at, folio);
                        let pages = (0..1 << folio.order).map(|i| (at + i as u64, one(folio.pfn.0 + i)));
                        model.extend(pages);
                    }
                    Some(folio) => assert_eq!(remove(&index, &mut w, at), Some(folio)),
                    None if page(&model, at).is_none() => assert_eq!(remove(&index, &mut w, at), None),
                    None => {}
                }
            }
            if step % 40 == round {
                check(p, &index, &w, &model, &mut random);
                p.vm.quiesce(p);
                assert_eq!(p.vm.cache_nodes.live(), nodes(&model), "{:?}", model.keys());
            }
        }
        check(p, &index, &w, &model, &mut random);
        if round % 2 == 0 {
            for (at, folio) in &model {
                assert_eq!(remove(&index, &mut w, *at), Some(*folio));
            }
            p.vm.quiesce(p);
            assert_eq!(p.vm.cache_nodes.live(), 0);
        }
        let mut left = 0;
        index.each(|_| left += 1);
        assert_eq!(left, if w.pages() == 0 { 0 } else { model.len() });
        drop(index);
        p.assert_empty();
    }
}

#[test]
fn an_insert_that_is_short_changes_nothing() {
    let p = machine(200);
    let index = Index::new();
    let mut w = Writer::new();
    let mut model = BTreeMap::new();
    // A tree of one leaf, then full height beside it; below an inner node; in a leaf; eight leaves where one is there, and
    // where none is, below a node and beside all nodes.
    let (small, huge) = (one(9), Found { pfn: Pfn(512), order: 9 });
    let order_7 = Found { pfn: Pfn(512), order: 7 };
    for (at, folio, need) in [
        (5, small, 1),
        (LAST_INDEX, small, 16),
        (1 << 40, small, 6),
        (4, small, 0),
        (512, huge, 8),
        (4096 + 65, small, 2),
        (4096 + 512, huge, 8),
        (1 << 20, huge, 10),
        ((1 << 20) + 512 + 128, order_7, 2),
    ] {
        for have in 0..need {
            let mut nodes = Nodes::new();
            nodes.reserve(p, have).unwrap();
            assert!(matches!(index.insert(&mut w, at, folio, &mut nodes), Err(Short(n)) if n == need));
            check(p, &index, &w, &model, &mut Random(3));
        }
        insert(p, &index, &mut w, at, folio);
        model.insert(at, folio);
        check(p, &index, &w, &model, &mut Random(3));
    }
    index.each(|_| {});
    drop(index);
    p.assert_empty();
}

#[test]
fn a_reader_in_a_node_that_was_cut_off_finds_nothing() {
    let p = machine(100);
    let index = Index::new();
    let mut w = Writer::new();
    insert(p, &index, &mut w, 1, one(7));
    insert(p, &index, &mut w, 5000, one(8));
    insert(p, &index, &mut w, 512, Found { pfn: Pfn(512), order: 9 });
    let pin = Pin::new(p);
    let slots = [5000, 512, 1023].map(|at| index.slot(&pin, at).unwrap());
    assert_eq!(slots[0].load(), Some(one(8)));
    assert_eq!(slots[2].load(), Some(Found { pfn: Pfn(1023), order: 9 }));
    remove(&index, &mut w, 5000);
    remove(&index, &mut w, 512);
    assert_eq!(slots.map(|slot| slot.load()), [None; 3]);
    assert!(index.slot(&pin, 5000).is_none(), "the tree is one leaf again");
    assert_eq!(index.slot(&pin, 1).unwrap().load(), Some(one(7)));
    drop(pin);
    index.each(|_| {});
    drop(index);
    p.assert_empty();
}
