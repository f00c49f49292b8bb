//! The proof that [`needed`] nodes are enough: the worst of every path a `replace` can take, from heights alone.

extern crate std;

use super::{MAX_HEIGHT, MAX_NEW, needed};
use std::collections::HashMap;
use std::vec::Vec;

/// Trees as the proof sees them: a height, and whether the root is a draft; with the most nodes placed so far.
type Costs = HashMap<(usize, bool), usize>;

fn put(costs: &mut Costs, tree: (usize, bool), cost: usize) {
    let at = costs.entry(tree).or_insert(0);
    *at = cost.max(*at);
}

/// What a join may result in, and what it may place: the rule stated at `needed`.
fn join((ha, da): (usize, bool), (hb, db): (usize, bool)) -> Vec<((usize, bool), usize)> {
    let (d, high) = (ha.abs_diff(hb), ha.max(hb));
    if d <= 1 {
        return std::vec![((high + 1, true), da as usize + db as usize)];
    }
    let low = if ha > hb { db } else { da } as usize;
    std::vec![((high, true), d + low), ((high + 1, true), d - 1 + low)]
}

fn join_all(costs: &mut Costs, a: &Costs, b: &Costs) {
    for (&a, ca) in a {
        for (&b, cb) in b {
            join(a, b).into_iter().for_each(|(tree, cost)| put(costs, tree, ca + cb + cost));
        }
    }
}

fn kept(height: usize) -> Costs {
    Costs::from([((height, false), 0)])
}

fn children(height: usize) -> Vec<(usize, usize)> {
    let lower = height.saturating_sub(2);
    let (h, mut all) = (height - 1, std::vec![(height - 1, height - 1)]);
    if lower < h {
        all.extend([(h, lower), (lower, h)]);
    }
    all
}

/// What `small` makes.
fn small(n: usize) -> Costs {
    Costs::from(
        [[((0, false), 0)], [((1, true), 0)], [((2, true), 1)], [((2, true), 2)], [((3, true), 3)]][n],
    )
}

fn concat(pops: &[Costs], low: (usize, bool), high: (usize, bool), n: usize) -> Costs {
    let one = |t| Costs::from([(t, 0)]);
    let mut costs = Costs::new();
    match n {
        _ if low.0 == 0 && high.0 == 0 => return small(n),
        0 if low.0 > high.0 => join_all(&mut costs, &pops[low.0], &one(high)),
        0 => join_all(&mut costs, &pops[high.0], &one(low)),
        1 => join_all(&mut costs, &one(low), &one(high)),
        _ => {
            let (low, high) = if low.0 <= high.0 { (low, high) } else { (high, low) };
            let mut lower = Costs::new();
            join_all(&mut lower, &one(low), &small(n - 2));
            join_all(&mut costs, &lower, &one(high));
        }
    }
    costs
}

#[test]
fn needed_is_enough() {
    let highest = MAX_HEIGHT;
    // By height: what `cut` and `pop` may make of a tree.
    let (mut cuts, mut pops) = (std::vec![kept(0)], std::vec![kept(0)]);
    for height in 1..=highest {
        let (mut cut, mut pop) = (kept(height), Costs::new());
        put(&mut cut, (0, false), 0);
        for (outer, inner) in children(height) {
            cuts[outer].iter().for_each(|(&t, &c)| put(&mut cut, t, c));
            join_all(&mut cut, &kept(outer), &cuts[inner]);
            match outer {
                0 => put(&mut pop, (inner, false), 0),
                _ => join_all(&mut pop, &pops[outer], &kept(inner)),
            }
        }
        cuts.push(cut);
        pops.push(pop);
    }
    for n in 0..=MAX_NEW {
        let mut changes = std::vec![small(n)];
        for height in 1..=highest {
            let mut change = Costs::new();
            for (l, r) in children(height) {
                for (&low, a) in &cuts[l] {
                    for (&high, b) in &cuts[r] {
                        concat(&pops, low, high, n)
                            .into_iter()
                            .for_each(|(t, c)| put(&mut change, t, a + b + c));
                    }
                }
                join_all(&mut change, &kept(l), &changes[r]);
            }
            changes.push(change);
        }
        let most = |costs: &Costs| costs.iter().map(|((_, draft), cost)| cost + *draft as usize).max();
        let bounds: Vec<_> = changes.iter().filter_map(most).collect();
        for (height, bound) in bounds.iter().enumerate() {
            assert!(*bound <= needed(height, n), "height {height}, {n} new: {bound} nodes");
        }
        std::println!("{n} new VMAs: by height {bounds:?}");
    }
}
