//! Pages of the stretch that are pinned: a device writes to them, or hardware reports an error in one.

use super::{PINS, What};
use crate::Host;
use crate::layout::{OWN_PARTS, place_of};
use crate::tally::Op;
use crate::worker::{Tag, Worker};
use core::sync::atomic::Ordering::{Relaxed, Release};
use pagefirst::Poisoned;
use pagefirst::platform::Platform;
use pagefirst::space::{PinError, Pinned};
use pagefirst::types::{Access, VirtRange};

/// Pages of stretches that are lost at most in a run, and of files: nobody gets them any more.
pub(crate) const MOST_LOST: u32 = 64;

impl<H: Host> Worker<'_, '_, H> {
    pub(super) fn pin_own(&mut self, space: &H::Space) {
        let i = self.dice.roll(OWN_PARTS) as usize;
        let place = self.dice.roll(PINS as u64) as usize;
        let page = self.own.pages[i];
        if matches!(page.what, What::Still(_)) {
            return;
        }
        self.begin(Op::Pin);
        if let Some(pinned) = self.pin_page(space, i) {
            self.own.pins[place] = Some((i, pinned));
        }
    }

    fn pin_page(&mut self, space: &H::Space, i: usize) -> Option<Pinned<H::Platform>> {
        let page = self.own.pages[i];
        let at = self.own.start(i);
        let mut kept = None;
        let expected = self.answer(&page, Access::Write);
        self.note(Op::Pin, i..i + 1);
        loop {
            let pinned = space.pin(VirtRange::page_of(at), true);
            drop(kept.take());
            match pinned {
                Ok(pinned) => {
                    self.compare(space, at, Ok(page.word), expected);
                    return Some(pinned);
                }
                Err(PinError::Fault(error)) => {
                    self.compare(space, at, Err(error), expected);
                    return None;
                }
                Err(PinError::Blocked(ticket)) => {
                    self.p.wait(&ticket);
                    kept = Some(ticket);
                }
                Err(error) => self.violation(format_args!("at {at}: {error}")),
            }
        }
    }

    /// Hardware reports an error in a page.
    pub(super) fn lose_own(&mut self, space: &H::Space) {
        let i = self.dice.roll(OWN_PARTS) as usize;
        let lost = match self.own.pages[i].what {
            What::Anonymous => What::Lost(None),
            What::Copied(index) => What::Lost(Some(index)),
            _ => return,
        };
        // Nobody but this worker puts another frame in its place.
        let Some(page) = self.pin_page(space, i).map(|pinned| pinned.first()) else { return };
        if self.stress.board.poisoned.fetch_add(1, Relaxed) >= MOST_LOST {
            return;
        }
        self.begin(Op::Poison);
        self.note(Op::Poison, i..i + 1);
        self.own.gone(&(i..i + 1));
        match self.p.vm().poison(self.p, page) {
            Poisoned::Private { huge: false } => self.own.pages[i].what = lost,
            Poisoned::Private { huge: true } if self.own.is_wide() => self.split_off(space, i, lost),
            other => self.violation(format_args!("an error in page {i} of the stretch: {other:?}")),
        }
    }

    /// What is lost has to be split off a huge page. It is still there while memory is short, and nothing tells: if others do
    /// not give any back, all of the huge page is discarded, which takes none.
    fn split_off(&mut self, space: &H::Space, i: usize, lost: What) {
        let half = OWN_PARTS as usize / 2;
        let whole = i / half * half..(i / half + 1) * half;
        for tries in 0.. {
            if space.lose_poisoned().is_ok() {
                self.own.pages[i].what = lost;
                return;
            }
            let is_mapped = tries > 100 && self.own.is_mapped(whole.clone());
            if is_mapped && space.discard(self.own.start(whole.start), self.own.bytes(half)).is_ok() {
                self.note(Op::Discard, whole.clone());
                return self.discarded(whole);
            }
            self.p.relax();
        }
    }

    /// A device writes to a page that is pinned.
    pub(super) fn device_writes(&mut self) {
        let place = self.dice.roll(PINS as u64) as usize;
        let Some((i, pfn)) = self.own.pins[place].as_ref().map(|(i, pin)| (*i, pin.first())) else { return };
        self.begin(Op::Device);
        let word = self.new_word(Tag::Own, i as u64);
        self.note(Op::Device, i..i + 1);
        self.p.cells(pfn)[place_of(self.me) as usize / 8].store(word, Release);
        self.wrote(i, word);
    }
}
