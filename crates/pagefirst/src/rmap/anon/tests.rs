//! Which spaces are visited for a root's pages, and how many roots there are.

extern crate std;

use super::*;
use crate::file::test::{Machine, machine};
use std::collections::VecDeque;
use std::vec::Vec;

fn new(p: &'static Machine, parent: Option<&Present<Machine>>) -> Present<Machine> {
    Present::new(p, parent.map(|parent| &***parent)).expect("memory for a space")
}

/// Checks that the places of a page are in these spaces, at the page's own address.
fn check(root: &Root<Machine>, spaces: &[&Present<Machine>]) {
    let mut places = Vec::new();
    root.for_each_place(7, |table, at| places.push((table.tag(), at.0)));
    let wanted: Vec<_> = spaces.iter().map(|space| (space.table.tag(), 7 << PAGE_SHIFT)).collect();
    assert_eq!(places, wanted);
}

#[test]
fn a_child_joins_the_roots_of_its_parent() {
    let p = machine(300);
    let parent = new(p, None);
    let child = new(p, Some(&parent));
    let sister = new(p, Some(&parent));
    let grandchild = new(p, Some(&child));
    let stranger = new(p, None);
    check(parent.root(), &[&parent, &child, &sister, &grandchild]);
    check(child.root(), &[&child, &grandchild]);
    check(sister.root(), &[&sister]);
    check(stranger.root(), &[&stranger]);
    // A root outlives its space in those that descend from it.
    let (above, own) = (parent.root().clone(), child.root().clone());
    drop((child, parent));
    check(&above, &[&sister, &grandchild]);
    check(&own, &[&grandchild]);
    drop((sister, grandchild));
    check(&above, &[]);
    drop((above, own, stranger));
    p.assert_empty();
}

#[test]
fn a_root_is_taken_over_when_nobody_else_has_one_below_it() {
    let p = machine(300);
    let parent = new(p, None);
    let root = parent.root().clone();
    let child = new(p, Some(&parent));
    assert!(!new(p, Some(&child)).root().same(&root), "its owner lives");
    drop(parent);
    p.vm().quiesce(p);
    let heir = new(p, Some(&child));
    assert!(heir.root().same(&root));
    assert!(!new(p, Some(&child)).root().same(&root), "its owner lives again");
    check(&root, &[&child, &heir]);
    drop((heir, child, root));
    p.assert_empty();
}

#[test]
fn roots_are_less_than_twice_the_spaces() {
    let p = machine(300);
    for living in [1, 2, 5] {
        let mut spaces = VecDeque::from([new(p, None)]);
        for generation in 0..100 {
            let parent = spaces.len() - 1 - (generation * 7 % spaces.len()) / 2;
            spaces.push_back(new(p, Some(&spaces[parent])));
            if spaces.len() > living {
                spaces.pop_front();
            }
            p.vm().quiesce(p);
            assert!(p.vm().roots.live() <= 2 * living + 1, "{} roots of {living}", p.vm().roots.live());
        }
        drop(spaces);
        p.assert_empty();
    }
}
