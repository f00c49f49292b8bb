//! Private pages in which hardware reported a memory error: their entries are replaced by poison.
//!
//! Poison is neither empty nor present, so nothing comes in its place: who touches the page gets SIGBUS, and never zeros.
//! It moves with its mapping, goes with it, and a child gets it as well.

use super::AddressSpace;
use crate::arch::{Attrs, Format};
use crate::fault::{HUGE_LEVEL, Ticket};
use crate::frame::{FrameFlags, Part, folio_of, root_of};
use crate::platform::Platform;
use crate::table::{Counted, Flow, Guard, Pass, Stock, Visitor};
use crate::tlb::Gather;
use crate::types::{NoMemory, PAGE_SIZE, Pfn, VirtAddr, VirtRange};

impl<P: Platform> AddressSpace<P> {
    /// Takes private pages that [`Vm::poison`](crate::Vm::poison) has marked out of this space; returns how many. Who is told
    /// [`Poisoned::Private`](crate::Poisoned::Private) of a huge page calls this for every space, the one that used the page
    /// first.
    ///
    /// A huge page is split for it: its other parts stay.
    ///
    /// # Errors
    /// [`NoMemory`] for that, with nothing taken out: call again.
    pub fn lose_poisoned(&self) -> Result<u64, NoMemory> {
        let _writing = self.write();
        let table = self.page_table();
        let mut gather = Gather::new(table);
        // All that may fail, before anything is taken out.
        while let Flow::Full(bad) = table.descend(self.usable(), &mut FindHuge, &mut gather) {
            let mut cuts = Stock::new(self.p, HUGE_LEVEL.into())?;
            table.visit(VirtRange::page_of(bad), &mut Pass { cuts: true }, &mut cuts, &mut gather);
        }
        let mut lose = Lose { lost: 0 };
        table.visit(self.usable(), &mut lose, &mut Stock::empty(self.p), &mut gather);
        gather.flush();
        Ok(lose.lost)
    }
}

/// Takes a small page of private memory that is marked out of every space. Called unpinned, with no lock held.
pub(crate) fn lose<P: Platform>(p: &'static P, page: &Part<P>) {
    let folio = page.folio();
    while let Some(root) = root_of(p, folio) {
        root.for_each_place(folio.meta().index(), |table, at| {
            let mut gather = Gather::new(table);
            let mut lose = Lose { lost: 0 };
            table.visit(VirtRange::page_of(at), &mut lose, &mut Stock::empty(p), &mut gather);
            gather.flush();
            // A mapping call that is at work there may have the entry in hand.
            if folio.meta().maps_ordered() > 0
                && let Some(ticket) = Ticket::for_writer(table)
            {
                p.wait(&ticket);
            }
        });
        if folio.meta().maps_ordered() == 0 || folio.meta().is_saturated() || cfg!(mutant = "lose_looks_once")
        {
            break;
        }
        // It was on its way.
        p.relax();
    }
}

/// The folio that an entry of private memory maps, and which page of the entry is bad, if one is.
#[inline]
fn bad_part<P: Platform>(p: &'static P, raw: u64, level: u8) -> Option<(Pfn, u32)> {
    let pfn = P::Format::frame(raw, level)?;
    if P::Format::attrs(raw).contains(Attrs::SPECIAL) {
        return None;
    }
    let (folio, _, flags) = folio_of(p, pfn);
    if !flags.contains(FrameFlags::ANON) || !flags.intersects(FrameFlags::HURT | FrameFlags::POISON) {
        return None;
    }
    let is_bad = |i: &u32| p.meta(pfn.add(*i)).flags().contains(FrameFlags::POISON);
    Some((folio, (0..P::Format::pages(level) as u32).find(is_bad)?))
}

/// Stops at the first bad page in a huge one.
struct FindHuge;

impl<P: Platform> Visitor<P> for FindHuge {
    fn leaf(&mut self, guard: &mut Guard<'_, P>, range: VirtRange, _: &mut Gather<'_, P>) -> Flow {
        let (p, level) = (guard.table().platform(), guard.table().level());
        if level > 0
            && let Some((_, i)) = bad_part(p, guard.entry(P::Format::index(range.start, level)), level)
        {
            return Flow::Full(VirtAddr(range.start.0 + u64::from(i) * PAGE_SIZE));
        }
        Flow::Done
    }
    fn splits(&self, _: VirtRange, _: VirtRange) -> bool {
        false
    }
}

/// Puts poison in the place of bad small pages.
pub(super) struct Lose {
    pub(super) lost: u64,
}

impl<P: Platform> Visitor<P> for Lose {
    fn leaf(&mut self, guard: &mut Guard<'_, P>, range: VirtRange, gather: &mut Gather<'_, P>) -> Flow {
        let (p, level) = (guard.table().platform(), guard.table().level());
        if level > 0 {
            return Flow::Done;
        }
        let mut va = range.start;
        for index in P::Format::slots(range, 0) {
            if let Some((folio, _)) = bad_part(p, guard.entry(index), 0) {
                if gather.is_full() {
                    return Flow::Full(va);
                }
                guard.update(index, |_| P::Format::poison());
                guard.count(Counted::Anon, -1);
                gather.page(VirtRange::page_of(va), folio);
                self.lost += 1;
            }
            va = VirtAddr(va.0.saturating_add(PAGE_SIZE));
        }
        Flow::Done
    }
    fn splits(&self, _: VirtRange, _: VirtRange) -> bool {
        false
    }
}
