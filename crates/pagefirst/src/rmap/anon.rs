//! Where private memory is mapped.
//!
//! A page belongs to the *root* of the space that filled it (Linux: `anon_vma`), at the index of the address where that was;
//! both stay as they are, wherever the page goes. A space joins the roots of those it descends from (Linux:
//! `anon_vma_chain`): by fork the page may be mapped there, and nowhere else. In each of these spaces it is mapped at the
//! address of its index, or, where a mapping was moved there, where that one shows it. So who looks for a page visits a few
//! addresses, and looks at the entries there: what is at the others is not the page's.
//!
//! A root for each space and not for each mapping: so a mapping call, a fault and an unmap have nothing to do for it. A root
//! whose space has exited goes on in the spaces that descend from it; a child takes it for its own if no more than one
//! root was made below it, so chains of forks do not grow roots without end (Linux, commit 7a3ef208e662).
//!
//! | | look for a page | fork | move | exit |
//! |---|---|---|---|---|
//! | look for a page | the locks of trees | the child joins before entries are copied, and stands behind the parent | entries on their way are counted by their page: look again | the space leaves after its entries; who found it keeps it |

use super::tree::{Links, Order, Place, Tree};
use crate::arch::Format;
use crate::mem::{Past, Pooled, Shared};
use crate::platform::Platform;
use crate::space::Vma;
use crate::sync::{Keyed, Spin, SpinGuard};
use crate::table::PageTable;
use crate::types::{NoMemory, PAGE_SHIFT, VirtAddr};
use core::ops::Deref;

/// Whose pages may be mapped in which spaces.
pub(crate) struct Root<P: Platform> {
    p: &'static P,
    state: Spin<P, State<P>>,
    /// Below which it was made.
    above: Option<Shared<P, Root<P>>>,
}

struct State<P: Platform> {
    /// The spaces in which pages of the root may be mapped.
    spaces: Tree<P, OfRoot>,
    /// Whether a space fills pages for it.
    is_owned: bool,
    /// The roots that were made below it.
    below: u32,
}

/// The spaces of a root, in the order in which they were made.
pub(crate) struct OfRoot;

impl<P: Platform> Order<P> for OfRoot {
    type Node = Joined<P>;
    fn links(joined: &Joined<P>) -> &Keyed<Links<P, Self>> {
        &joined.links
    }
    fn place(joined: &Joined<P>) -> Place {
        Place { first: 0, id: joined.id }
    }
    fn last(_: &Joined<P>) -> u64 {
        0
    }
}

/// That pages of a root may be mapped in a space.
pub(crate) struct Joined<P: Platform> {
    root: Shared<P, Root<P>>,
    /// The space's number.
    id: u64,
    /// The space, until it exits.
    space: Keyed<Option<Shared<P, Space<P>>>>,
    links: Keyed<Links<P, OfRoot>>,
    /// The same for the space's next root.
    next: Option<Shared<P, Joined<P>>>,
}

/// What stays of a space as long as somebody looks for pages in it: its tables, and the roots it has joined.
///
/// Who has taken entries of pages out of the tables and has not given the pages back holds it.
pub(crate) struct Space<P: Platform> {
    pub table: PageTable<P>,
    own: Own<P>,
    joined: Option<Shared<P, Joined<P>>>,
    /// Its mappings of private memory that show it elsewhere than where it was filled.
    moved: Spin<P, Tree<P, Moved>>,
}

/// Possession proves: pages are filled for this root by one space, the owner's.
struct Own<P: Platform>(Shared<P, Root<P>>);

impl<P: Platform> Drop for Own<P> {
    fn drop(&mut self) {
        self.0.state.lock(self.0.p).is_owned = false;
    }
}

/// Mappings that were moved, by the indexes that they show.
pub(crate) struct Moved;

impl<P: Platform> Order<P> for Moved {
    type Node = Vma<P>;
    fn links(vma: &Vma<P>) -> &Keyed<Links<P, Self>> {
        match vma.spot() {
            Some(spot) => &spot.moved,
            None => unreachable!("a mapping that was not moved among those that were"),
        }
    }
    fn place(vma: &Vma<P>) -> Place {
        Place { first: vma.anon_index(vma.range.start), id: vma.id }
    }
    fn last(vma: &Vma<P>) -> u64 {
        vma.anon_index(vma.range.start) + vma.range.pages() - 1
    }
}

impl<P: Platform> Root<P> {
    /// One below `above`, whose owner is being made.
    fn make(p: &'static P, above: Option<&Shared<P, Root<P>>>) -> Result<Own<P>, NoMemory> {
        let slot = p.vm().or_drain(p, || p.vm().roots.reserve())?;
        if let Some(above) = above {
            above.state.lock(p).below += 1;
        }
        let state = Spin::new(State { spaces: Tree::new(), is_owned: true, below: 0 });
        Ok(Own(slot.fill(Root { p, state, above: above.cloned() })))
    }
    /// Takes it over, if nobody owns it and it has no more than one root below it.
    fn adopt(this: &Shared<P, Self>) -> Option<Own<P>> {
        let mut state = this.state.lock(this.p);
        if state.is_owned || state.below > 1 {
            return None;
        }
        state.is_owned = true;
        Some(Own(this.clone()))
    }

    /// Calls `f` with the tables and the address of each place where a page with this index may be mapped. Called unpinned,
    /// with no lock held; so is `f`. Spaces and mappings that come meanwhile may be missed: entries go there from places
    /// that are not, and are counted by their page.
    pub fn for_each_place(&self, index: u64, mut f: impl FnMut(&PageTable<P>, VirtAddr)) {
        let mut after = None;
        while let Some((place, space)) = self.next_space(after) {
            after = Some(place);
            // In spaces of its own size, for a mapping that was moved may have grown beyond its end.
            if index < P::Format::USER_END.0 >> PAGE_SHIFT {
                f(&space.table, VirtAddr(index << PAGE_SHIFT));
            }
            let mut after = None;
            let next = |after| space.moved().next(after, index, index);
            while let Some((place, vma)) = next(after) {
                after = Some(place);
                let pages = index - vma.anon_index(vma.range.start);
                f(&space.table, VirtAddr(vma.range.start.0 + (pages << PAGE_SHIFT)));
            }
        }
    }
    fn next_space(&self, after: Option<Place>) -> Option<(Place, Shared<P, Space<P>>)> {
        let mut state = self.state.lock(self.p);
        let (place, joined) = state.spaces.next(after, 0, 0)?;
        let space = joined.space.get(state.spaces.key()).clone();
        drop(state);
        space.map(|space| (place, space))
    }
}

impl<P: Platform> Pooled for Root<P> {}

impl<P: Platform> Drop for Root<P> {
    fn drop(&mut self) {
        if let Some(above) = &self.above {
            above.state.lock(self.p).below -= 1;
        }
    }
}

impl<P: Platform> Joined<P> {
    fn each(first: &Option<Shared<P, Joined<P>>>) -> impl Iterator<Item = &Shared<P, Joined<P>>> {
        core::iter::successors(first.as_ref(), |joined| joined.next.as_ref())
    }
}

impl<P: Platform> Pooled for Joined<P> {
    fn end(&mut self, past: &Past) {
        if let Some(next) = self.next.take() {
            next.end(past);
        }
    }
}

impl<P: Platform> Space<P> {
    fn new(p: &'static P, parent: Option<&Space<P>>) -> Result<Shared<P, Self>, NoMemory> {
        let slot = p.vm().or_drain(p, || p.vm().spaces.reserve())?;
        let table = PageTable::new(p)?;
        let mut joined = None;
        let mut join = |root: &Shared<P, Root<P>>| {
            let slot = p.vm().or_drain(p, || p.vm().joined.reserve())?;
            let links = Keyed::new(Links::new());
            let (root, id, next) = (root.clone(), table.tag(), joined.take());
            joined = Some(slot.fill(Joined { root, id, space: Keyed::new(None), links, next }));
            Ok(())
        };
        let inherited = parent.map(|parent| &parent.joined);
        let adopted = inherited.and_then(|roots| Joined::each(roots).find_map(|j| Root::adopt(&j.root)));
        inherited.into_iter().flat_map(Joined::each).try_for_each(|j| join(&j.root))?;
        let own = match adopted {
            Some(own) => own,
            None => {
                let own = Root::make(p, parent.map(|parent| &parent.own.0))?;
                join(&own.0)?;
                own
            }
        };
        Ok(slot.fill(Space { table, own, joined, moved: Spin::new(Tree::new()) }))
    }
    /// Who owns the pages that are filled here.
    #[inline]
    pub fn root(&self) -> &Shared<P, Root<P>> {
        &self.own.0
    }
    pub(super) fn moved(&self) -> SpinGuard<'_, P, Tree<P, Moved>> {
        self.moved.lock(self.table.platform())
    }
}

impl<P: Platform> Pooled for Space<P> {}

/// Possession proves: who looks for private pages finds the space. Dropped when it has no entries of pages any more.
pub(crate) struct Present<P: Platform>(Shared<P, Space<P>>);

impl<P: Platform> Present<P> {
    /// A new space, or the child of one.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn new(p: &'static P, parent: Option<&Space<P>>) -> Result<Self, NoMemory> {
        let space = Space::new(p, parent)?;
        for joined in Joined::each(&space.joined) {
            let mut state = joined.root.state.lock(p);
            state.spaces.insert(joined);
            joined.space.bind(state.spaces.key());
            *joined.space.get_mut(state.spaces.key()) = Some(space.clone());
        }
        Ok(Present(space))
    }
}

impl<P: Platform> Drop for Present<P> {
    fn drop(&mut self) {
        for joined in Joined::each(&self.0.joined) {
            let out = {
                let mut state = joined.root.state.lock(joined.root.p);
                let space = joined.space.get_mut(state.spaces.key()).take();
                (state.spaces.remove(joined), space)
            };
            drop(out);
        }
    }
}

impl<P: Platform> Deref for Present<P> {
    type Target = Shared<P, Space<P>>;
    fn deref(&self) -> &Shared<P, Space<P>> {
        &self.0
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
