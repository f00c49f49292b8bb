//! Taking away what is mapped in a range.

use crate::arch::{Attrs, Format};
use crate::frame::{FrameFlags, folio_of};
use crate::platform::Platform;
use crate::table::{Counted, FaultKind, Flow, Guard, PageTable, Stock, Visitor};
use crate::tlb::{Gather, NOTHING};
use crate::types::{VirtAddr, VirtRange};

/// Which entries are taken out.
pub(crate) trait Selects<P: Platform> {
    /// Whether all are, and none is asked about.
    const ALL: bool = false;
    /// Whether a huge page that reaches beyond the range is split first. If not, all of it is taken out, or nothing.
    const SPLITS: bool = false;
    /// Whether this entry of a table at `level` is. Asked under the table's lock.
    fn selects(&mut self, raw: u64, level: u8) -> bool;
}

struct Everything;

impl<P: Platform> Selects<P> for Everything {
    const ALL: bool = true;
    const SPLITS: bool = true;
    fn selects(&mut self, _: u64, _: u8) -> bool {
        true
    }
}

/// The same, and what of a huge page lies beyond the range.
pub(super) struct Whole;

impl<P: Platform> Selects<P> for Whole {
    const ALL: bool = true;
    fn selects(&mut self, _: u64, _: u8) -> bool {
        true
    }
}

struct Zap<'s, S> {
    unpins: Option<VirtRange>,
    which: &'s mut S,
}

impl<P: Platform, S: Selects<P>> Visitor<P> for Zap<'_, S> {
    #[inline(always)]
    fn leaf(&mut self, guard: &mut Guard<'_, P>, range: VirtRange, gather: &mut Gather<'_, P>) -> Flow {
        let (p, level) = (guard.table().platform(), guard.table().level());
        let (mut va, size) = (P::Format::span_of(range.start, level).start, P::Format::span(level));
        let (mut anon, mut file, mut unused) = (0, 0, 0);
        let mut touched = NOTHING;
        let mut flow = Flow::Done;
        for index in P::Format::slots(range, level) {
            if gather.is_full() {
                flow = Flow::Full(va);
                break;
            }
            let is_selected =
                S::ALL || matches!(guard.entry(index), raw @ 1.. if self.which.selects(raw, level));
            if is_selected && let Some(raw) = guard.take(index) {
                touched = VirtRange { start: touched.start.min(va), end: VirtAddr(va.0 + size) };
                let attrs = P::Format::attrs(raw);
                unused += !attrs.contains(Attrs::ACCESSED) as u32;
                if let Some(pfn) = P::Format::frame(raw, level)
                    && !attrs.contains(Attrs::SPECIAL)
                {
                    let (head, _, flags) = folio_of(p, pfn);
                    match Counted::page(flags) {
                        Counted::Anon => anon += 1,
                        Counted::File => {
                            file += 1;
                            if attrs.contains(Attrs::DIRTY) && !cfg!(mutant = "zap_loses_dirty") {
                                p.meta(head).set(FrameFlags::DIRTY);
                            }
                        }
                        Counted::Nothing => {}
                    }
                    gather.keep(head);
                }
                if guard.entries() == 0 {
                    break;
                }
            }
            va.0 += size;
        }
        gather.touch(touched);
        if unused > 0 {
            guard.tally(FaultKind::Unused, unused);
        }
        guard.count(Counted::Anon, -anon);
        guard.count(Counted::File, -file);
        flow
    }
    fn splits(&self, span: VirtRange, range: VirtRange) -> bool {
        S::SPLITS && !range.covers(span)
    }
    fn unpins(&self) -> Option<VirtRange> {
        self.unpins
    }
}

impl<P: Platform> PageTable<P> {
    /// Takes every entry of `range` out, and every table that loses its last entry by it; tables kept while empty
    /// (`Upfront`) go if they span only addresses of `unpins`. Whatever had to be announced is announced. The gather
    /// flushes when it is full; its owner flushes the rest.
    pub(crate) fn zap(
        &self,
        range: VirtRange,
        unpins: Option<VirtRange>,
        cuts: &mut Stock<P>,
        gather: &mut Gather<'_, P>,
    ) {
        self.visit(range, &mut Zap { unpins, which: &mut Everything }, cuts, gather);
    }

    /// The same with the entries that are selected. A huge page that reaches beyond the range is not split: all of it is
    /// taken out, or nothing.
    pub(crate) fn zap_selected(
        &self,
        range: VirtRange,
        which: &mut impl Selects<P>,
        gather: &mut Gather<'_, P>,
    ) {
        self.visit(range, &mut Zap { unpins: None, which }, &mut Stock::empty(self.platform()), gather);
    }
}
