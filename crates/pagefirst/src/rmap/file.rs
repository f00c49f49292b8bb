//! Where a file is mapped: a tree of its mappings, searched by the pages they show.
//!
//! It is intrusive: the links are the VMAs' own ([`Spot`]), so to put one in or take one out needs no memory, and an exit
//! cannot fail (`docs/decisions/015`). It is AVL-balanced, in the order of first index and VMA number, and every node
//! knows the last index below it. A spin lock of the file's, a leaf of the lock order, is held for one step of it.
//!
//! | | look for the next | put in | take out |
//! |---|---|---|---|
//! | look for the next | the lock | the lock; one put in behind the place looked at is not seen | what was found stays, counted |
//! | put in, take out | | the lock | the lock |
//!
//! What a walk may miss: a mapping that comes behind it, and entries that go there. Who takes something away has announced
//! that before, so no page comes there anew; and what was there before is counted by its page, or, where pages are not
//! counted, [`Mappings::came`] tells that it has to be walked again.

use crate::mem::{Pooled, Shared};
use crate::platform::Platform;
use crate::space::{Backing, Vma};
use crate::sync::{Key, Keyed};
use crate::table::PageTable;
use core::cmp::Ordering;
use core::mem::take;

type Mapping<P> = Shared<P, Vma<P>>;
type Subtree<P> = Option<Mapping<P>>;

/// What a mapping of a file has for the file's tree: whose it is, and its place.
pub(crate) struct Spot<P: Platform> {
    /// The tables of the space it is in.
    pub table: Shared<P, PageTable<P>>,
    links: Keyed<Links<P>>,
}

impl<P: Platform> Spot<P> {
    /// For a mapping of the space with these tables.
    pub fn new(table: Shared<P, PageTable<P>>) -> Self {
        Spot { table, links: Keyed::new(Links { below: [None, None], height: 1, last: 0 }) }
    }
}

impl<P: Platform> Pooled for Spot<P> {}

struct Links<P: Platform> {
    /// What comes before, and what comes after.
    below: [Subtree<P>; 2],
    height: u8,
    /// The largest index shown by this mapping and those below it.
    last: u64,
}

/// The order of mappings in the tree.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Place {
    first: u64,
    id: u64,
}

fn place<P: Platform>(vma: &Vma<P>) -> Place {
    let first = match &vma.backing {
        Backing::File { first, .. } => *first,
        Backing::Anonymous | Backing::Physical(_) => 0,
    };
    Place { first, id: vma.id }
}

/// The last index that a mapping shows.
fn last<P: Platform>(vma: &Vma<P>) -> u64 {
    place(vma).first + vma.range.pages() - 1
}

fn links<P: Platform>(vma: &Vma<P>) -> &Keyed<Links<P>> {
    match vma.spot() {
        Some(spot) => &spot.links,
        None => unreachable!("a mapping of no file in a file's tree"),
    }
}

fn height<P: Platform>(key: &Key, tree: &Subtree<P>) -> u8 {
    tree.as_ref().map_or(0, |vma| links(vma).get(key).height)
}

/// The mappings of one file. The tree and the mappings own each other, so all must be taken out before the last owner of
/// the file goes; a space does that before it lets go of its VMAs.
pub(crate) struct Mappings<P: Platform> {
    key: Key,
    root: Subtree<P>,
    came: u64,
}

impl<P: Platform> Mappings<P> {
    /// None.
    pub const fn new() -> Self {
        Mappings { key: Key::new(), root: None, came: 0 }
    }
    /// How many mappings were ever put in.
    pub fn came(&self) -> u64 {
        self.came
    }

    /// Puts a mapping in, if it is not there.
    pub fn insert(&mut self, vma: &Mapping<P>) {
        if !links(vma).bind(&self.key) {
            return;
        }
        links(vma).get_mut(&mut self.key).last = last(vma);
        let root = self.root.take();
        self.root = Some(insert(&mut self.key, root, vma.clone()));
        self.came += 1;
    }

    /// Takes a mapping out, if it is there; for ever. What is returned is dropped with no lock held.
    pub fn remove(&mut self, vma: &Vma<P>) -> Option<Mapping<P>> {
        if !links(vma).is_bound(&self.key) {
            return None;
        }
        let root = self.root.take();
        let (root, out) = remove(&mut self.key, root, place(vma));
        self.root = root;
        out
    }

    /// The first mapping behind `after` that shows a page of `first..=last`, and its place.
    pub fn next(&self, after: Option<Place>, first: u64, last: u64) -> Option<(Place, Mapping<P>)> {
        let found = next(&self.key, self.root.as_ref(), after, first, last)?;
        Some((place(found), found.clone()))
    }
}

fn next<'t, P: Platform>(
    key: &'t Key,
    tree: Option<&'t Mapping<P>>,
    after: Option<Place>,
    first: u64,
    until: u64,
) -> Option<&'t Mapping<P>> {
    let vma = tree?;
    let Links { below: [before, behind], last: most, .. } = links(vma).get(key);
    if *most < first {
        return None;
    }
    let at = place(vma);
    if after.is_none_or(|after| after < at) {
        let found = next(key, before.as_ref(), after, first, until);
        if found.is_some() {
            return found;
        }
        if at.first > until {
            return None;
        }
        if last(vma) >= first {
            return Some(vma);
        }
    }
    next(key, behind.as_ref(), after, first, until)
}

fn insert<P: Platform>(key: &mut Key, tree: Subtree<P>, new: Mapping<P>) -> Mapping<P> {
    let Some(vma) = tree else { return new };
    let side = (place(&vma) < place(&new)) as usize;
    let below = take(&mut links(&vma).get_mut(key).below[side]);
    let below = insert(key, below, new);
    links(&vma).get_mut(key).below[side] = Some(below);
    balance(key, vma)
}

/// The tree without the mapping at `at`, and that mapping.
fn remove<P: Platform>(key: &mut Key, tree: Subtree<P>, at: Place) -> (Subtree<P>, Subtree<P>) {
    let Some(vma) = tree else { return (None, None) };
    let side = match at.cmp(&place(&vma)) {
        Ordering::Equal => {
            let [before, behind] = take(&mut links(&vma).get_mut(key).below);
            return (join(key, before, behind), Some(vma));
        }
        Ordering::Less => 0,
        Ordering::Greater => 1,
    };
    let below = take(&mut links(&vma).get_mut(key).below[side]);
    let (below, out) = remove(key, below, at);
    links(&vma).get_mut(key).below[side] = below;
    (Some(balance(key, vma)), out)
}

/// Both sides of a mapping that was taken out.
fn join<P: Platform>(key: &mut Key, before: Subtree<P>, behind: Subtree<P>) -> Subtree<P> {
    let Some(behind) = behind else { return before };
    let (behind, least) = remove_least(key, behind);
    links(&least).get_mut(key).below = [before, behind];
    Some(balance(key, least))
}

fn remove_least<P: Platform>(key: &mut Key, vma: Mapping<P>) -> (Subtree<P>, Mapping<P>) {
    let below = &mut links(&vma).get_mut(key).below;
    let Some(before) = take(&mut below[0]) else { return (take(&mut below[1]), vma) };
    let (before, least) = remove_least(key, before);
    links(&vma).get_mut(key).below[0] = before;
    (Some(balance(key, vma)), least)
}

/// What a node knows of those below it.
fn refresh<P: Platform>(key: &mut Key, vma: &Vma<P>) {
    let (mut height, mut most) = (0, last(vma));
    for below in links(vma).get(key).below.iter().flatten() {
        let below = links(below).get(key);
        height = height.max(below.height);
        most = most.max(below.last);
    }
    let links = links(vma).get_mut(key);
    (links.height, links.last) = (height + 1, most);
}

/// How much higher what comes behind is than what comes before.
fn lean<P: Platform>(key: &Key, vma: &Vma<P>) -> i32 {
    let [before, behind] = &links(vma).get(key).below;
    height(key, behind) as i32 - height(key, before) as i32
}

/// The top of a tree of which one side may have become one higher, or lower, than balance allows.
fn balance<P: Platform>(key: &mut Key, vma: Mapping<P>) -> Mapping<P> {
    let side = match lean(key, &vma) {
        -1..=1 => {
            refresh(key, &vma);
            return vma;
        }
        lean => (lean > 0) as usize,
    };
    let Some(below) = take(&mut links(&vma).get_mut(key).below[side]) else { return vma };
    let leans_back = if side == 1 { lean(key, &below) < 0 } else { lean(key, &below) > 0 };
    let below = if leans_back { rotate(key, below, 1 - side) } else { below };
    links(&vma).get_mut(key).below[side] = Some(below);
    rotate(key, vma, side)
}

/// Puts what is on that side of the top in its place.
fn rotate<P: Platform>(key: &mut Key, vma: Mapping<P>, side: usize) -> Mapping<P> {
    let Some(up) = take(&mut links(&vma).get_mut(key).below[side]) else { return vma };
    links(&vma).get_mut(key).below[side] = take(&mut links(&up).get_mut(key).below[1 - side]);
    refresh(key, &vma);
    links(&up).get_mut(key).below[1 - side] = Some(vma);
    refresh(key, &up);
    up
}

#[cfg(all(test, not(loom)))]
mod tests;
