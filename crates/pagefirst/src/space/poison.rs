//! Private pages in which hardware reported a memory error: their entries are replaced by poison.
//!
//! Poison is neither empty nor present, so nothing comes in its place: who touches the page gets SIGBUS, and never zeros.
//! It moves with its mapping, goes with it, and a child gets it as well.

use super::AddressSpace;
use crate::arch::{Attrs, Format};
use crate::fault::HUGE_LEVEL;
use crate::frame::{FrameFlags, Part, head_of, root_of};
use crate::platform::Platform;
use crate::table::{Counted, Flow, Guard, Pass, Stock, Visitor};
use crate::tlb::Gather;
use crate::types::{NoMemory, PAGE_SIZE, VirtAddr, VirtRange};

impl<P: Platform> AddressSpace<P> {
    /// Takes private pages that [`Vm::poison`](crate::Vm::poison) has marked out of this space; returns how many. Who is told
    /// [`Poisoned::Private`](crate::Poisoned::Private) of a huge page calls this for every space, the one that used the page
    /// first.
    ///
    /// A huge page is split for it: its other parts stay.
    ///
    /// # Errors
    /// [`NoMemory`] for that; call again.
    pub fn lose_poisoned(&self) -> Result<u64, NoMemory> {
        let _writing = self.write();
        let mut lost = 0;
        loop {
            let mut lose = Lose { lost: 0, huge: None };
            let mut gather = Gather::new(self.page_table());
            self.page_table().visit(self.usable(), &mut lose, &mut Stock::empty(self.p), &mut gather);
            gather.flush();
            lost += lose.lost;
            let Some(bad) = lose.huge else { return Ok(lost) };
            let mut cuts = Stock::new(self.p, HUGE_LEVEL.into())?;
            self.page_table().visit(VirtRange::page_of(bad), &mut Pass, &mut cuts, &mut gather);
        }
    }
}

/// Takes a small page of private memory that is marked out of every space. Called unpinned, with no lock held.
pub(crate) fn lose<P: Platform>(p: &'static P, page: &Part<P>) {
    let folio = page.folio();
    while let Some(root) = root_of(p, folio) {
        root.for_each_place(folio.meta().index(), |table, at| {
            let mut gather = Gather::new(table);
            let mut lose = Lose { lost: 0, huge: None };
            table.visit(VirtRange::page_of(at), &mut lose, &mut Stock::empty(p), &mut gather);
            gather.flush();
        });
        if folio.meta().maps_ordered() == 0 || folio.meta().is_saturated() || cfg!(mutant = "lose_looks_once")
        {
            break;
        }
        // An entry is on its way.
        p.relax();
    }
}

struct Lose {
    lost: u64,
    /// A bad page in a huge one.
    huge: Option<VirtAddr>,
}

impl<P: Platform> Visitor<P> for Lose {
    fn leaf(&mut self, guard: &mut Guard<'_, P>, range: VirtRange, gather: &mut Gather<'_, P>) -> Flow {
        let (p, level) = (guard.table().platform(), guard.table().level());
        let mut va = P::Format::span_of(range.start, level).start;
        for index in P::Format::slots(range, level) {
            let raw = guard.entry(index);
            if let Some(pfn) = P::Format::frame(raw, level)
                && !P::Format::attrs(raw).contains(Attrs::SPECIAL)
                && let folio = head_of(p, pfn)
                && let flags = p.meta(folio).flags()
                && flags.contains(FrameFlags::ANON)
                && flags.intersects(FrameFlags::HURT | FrameFlags::POISON)
            {
                let is_bad = |i| p.meta(pfn.add(i)).flags().contains(FrameFlags::POISON);
                let bad = (0..P::Format::pages(level) as u32).find(|i| is_bad(*i));
                match bad {
                    Some(i) if level > 0 => self.huge = Some(VirtAddr(va.0 + u64::from(i) * PAGE_SIZE)),
                    Some(_) if gather.is_full() => return Flow::Full(va),
                    Some(_) => {
                        guard.update(index, |_| P::Format::poison());
                        guard.count(Counted::Anon, -1);
                        gather.page(VirtRange::page_of(va), folio);
                        self.lost += 1;
                    }
                    None => {}
                }
            }
            va = VirtAddr(va.0.saturating_add(P::Format::span(level)));
        }
        Flow::Done
    }
    fn splits(&self, _: VirtRange, _: VirtRange) -> bool {
        false
    }
}
