//! Taking away what is mapped in a range.

use crate::arch::{Attrs, Format};
use crate::frame::FrameFlags;
use crate::platform::Platform;
use crate::table::{Counted, FaultKind, Flow, Guard, PageTable, Stock, Visitor};
use crate::tlb::Gather;
use crate::types::{VirtAddr, VirtRange};

struct Zap {
    unpins: Option<VirtRange>,
}

impl<P: Platform> Visitor<P> for Zap {
    fn leaf(&mut self, guard: &mut Guard<'_, P>, range: VirtRange, gather: &mut Gather<'_, P>) -> Flow {
        let (p, level) = (guard.table().platform(), guard.table().level());
        let mut va = range.start;
        while va < range.end && guard.entries() > 0 {
            if gather.is_full() {
                return Flow::Full(va);
            }
            if let Some(raw) = guard.take(P::Format::index(va, level)) {
                let attrs = P::Format::attrs(raw);
                if !attrs.contains(Attrs::ACCESSED) {
                    guard.tally(FaultKind::Unused, 1);
                }
                let span = P::Format::span_of(va, level);
                let counted = Counted::of(p, raw, level);
                guard.count(counted, -1);
                match P::Format::frame(raw, level) {
                    Some(pfn) if !attrs.contains(Attrs::SPECIAL) => {
                        let is_dirty = attrs.contains(Attrs::DIRTY) && !cfg!(mutant = "zap_loses_dirty");
                        if counted == Counted::File && is_dirty {
                            p.meta(pfn).set(FrameFlags::DIRTY);
                        }
                        gather.page(span, pfn);
                    }
                    _ => gather.touch(span),
                }
            }
            va = VirtAddr(va.0 + P::Format::span(level));
        }
        Flow::Done
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
        self.visit(range, &mut Zap { unpins }, cuts, gather);
    }
}
