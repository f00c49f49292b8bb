//! Hardware reports an error in a page of a file: what was not stored of it is lost, and nothing else.
//!
//! Whether it was lost nobody knows for sure but who reads it: a write that was being made, or a store that was, may go wrong
//! after the report. So such a page may be told to be lost from then on; what is read of it must be what it was.

use crate::Host;
use crate::files::Kind;
use crate::layout::PAGES;
use crate::own::MOST_LOST;
use crate::tally::Op;
use crate::worker::Worker;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use pagefirst::Poisoned;
use pagefirst::platform::Platform;
use pagefirst::types::VirtRange;

impl<H: Host> Worker<'_, '_, H> {
    /// Whether an access to a page may be told that it is lost.
    pub fn may_be_lost(&self, kind: Kind, page: u64) -> bool {
        kind == Kind::Moving && self.stress.board.bad[page as usize].load(Acquire)
    }
    /// Whether any page is.
    pub fn has_lost(&self, kind: Kind) -> bool {
        (0..PAGES).any(|page| self.may_be_lost(kind, page))
    }

    /// Says of a page that it is bad, if it is mapped. Nobody cuts the file meanwhile.
    pub fn lose_page(&mut self, space: &H::Space) {
        let (kind, board) = (Kind::Moving, self.stress.board);
        let (page, which) = (self.dice.roll(PAGES), self.dice.roll(2) as usize);
        let Some(_whole) = board.cuts[kind as usize].hold() else { return };
        // Pinned, it stays the file's.
        let Ok(pinned) = space.pin(VirtRange::page_of(kind.area(which).page(page)), false) else { return };
        if board.bad_pages.fetch_add(1, Relaxed) >= MOST_LOST {
            return;
        }
        self.begin(Op::PoisonFile);
        board.bad[page as usize].store(true, Release);
        match self.p.vm().poison(self.p, pinned.first()) {
            Poisoned::File { .. } => {}
            other => self.violation(format_args!("an error in page {page} of {kind:?}: {other:?}")),
        }
    }
}
