//! Taking away what is mapped in a range.

use crate::arch::{Attrs, Format};
use crate::frame::{FrameFlags, head_and_flags};
use crate::platform::Platform;
use crate::table::{Counted, FaultKind, Flow, Guard, PageTable, Stock, Visitor};
use crate::tlb::{Gather, NOTHING};
use crate::types::{VirtAddr, VirtRange};

struct Zap {
    unpins: Option<VirtRange>,
}

impl<P: Platform> Visitor<P> for Zap {
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
            if let Some(raw) = guard.take(index) {
                touched = VirtRange { start: touched.start.min(va), end: VirtAddr(va.0 + size) };
                let attrs = P::Format::attrs(raw);
                unused += !attrs.contains(Attrs::ACCESSED) as u32;
                if let Some(pfn) = P::Format::frame(raw, level)
                    && !attrs.contains(Attrs::SPECIAL)
                {
                    let (head, flags) = head_and_flags(p, pfn);
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
