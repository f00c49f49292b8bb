//! A page of a file in which hardware reported a memory error.
//!
//! It is marked (`frame/poison.rs`), so nobody maps it any more, nor looks it up; then its mappings are taken away, as for a
//! removal, but for one page. A large folio is never mapped by a huge entry again; its other pages are used as before. The
//! page stays in the cache, and whoever faults on it gets SIGBUS, until it is removed, or dropped because what is stored is
//! the same. If it was written and not stored, that is lost, and stays so: the page is dirty for ever, and storing it fails.

use super::FileCache;
use crate::arch::Format;
use crate::frame::{FrameFlags, Part, head_of, with_file};
use crate::platform::Platform;
use crate::space::{Backing, Selects};
use crate::tlb::Gather;
use crate::types::Pfn;

/// Takes the mappings of a marked page away; tells whether something that was not stored is lost with it. Called unpinned,
/// with no lock held.
pub(crate) fn lose<P: Platform>(p: &'static P, page: &Part<P>) -> bool {
    let folio = page.folio();
    let index = folio.meta().index();
    let last = index + (1 << folio.order()) - 1;
    // Who is mapped has the file.
    let mapped = || with_file(p, folio, |file| file.mappings.lock(p).next(None, index, last)).flatten();
    while let Some((_, vma)) = mapped() {
        let Backing::File { file, .. } = &vma.backing else { break };
        let mut bad = Bad { p, pfn: page.pfn(), missed: false };
        let all = file.for_each_mapping(index, last, |_, table, range| {
            let mut gather = Gather::new(table);
            table.zap_selected(range, &mut bad, &mut gather);
            gather.flush();
        });
        if all && !bad.missed {
            break;
        }
        p.relax();
    }
    folio.meta().flags().contains(FrameFlags::DIRTY)
}

/// Selects the entries that lead to a frame.
struct Bad<P: Platform> {
    p: &'static P,
    pfn: Pfn,
    /// A huge page was being split.
    missed: bool,
}

impl<P: Platform> Selects<P> for Bad<P> {
    fn selects(&mut self, raw: u64, level: u8) -> bool {
        let Some(first) = P::Format::frame(raw, level) else {
            self.missed |= level > 0;
            return false;
        };
        let is_it = first.0 <= self.pfn.0 && u64::from(self.pfn.0 - first.0) < P::Format::pages(level);
        is_it && head_of(self.p, first) == head_of(self.p, self.pfn)
    }
}

impl<P: Platform> FileCache<P> {
    /// Whether hardware reported an error in the frame.
    pub(super) fn is_bad(&self, pfn: Pfn) -> bool {
        self.p.meta(pfn).flags().contains(FrameFlags::POISON)
    }
}
