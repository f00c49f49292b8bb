//! Read-ahead: pages that will probably be wanted are read before they are.
//!
//! It keeps no record, for the cache is one. So it costs nothing where a page is found, whoever reads wherever in the
//! file, and several who read in sequence do not disturb each other.
//!
//! - A page is *missed*: it is wanted in sequence if the pages before it are there, the more of them the more are read
//!   beyond it. The first of a file starts a sequence. What comes from nowhere is read alone.
//! - One of the pages read ahead is *marked*. It is not mapped around others; so who comes that far is noticed. He takes
//!   the mark off, and twice as many pages are read as there are from there on, beyond those.
//!
//! [`File::read_ahead`](super::File::read_ahead) is the bound, and switches it off; advice on the mapping doubles it, or
//! switches it off there. Pages read ahead push nothing out: without a free frame it ends. One that cannot be read is
//! nobody's error: it is read again when it is wanted. Who wants one that is being read waits for it.

use super::cache::{FileCache, pages_of};
use super::fill::Refused;
use super::making::Making;
use super::{File as _, Hint};
use crate::frame::FrameFlags;
use crate::limit::Payer;
use crate::platform::Platform;
use crate::sync::epoch::Pin;
use crate::types::NoMemory;

/// The fewest pages a window has.
const LEAST: u64 = 4;
/// How far ahead of a page others are looked for that are there already.
const LOOK: u64 = 1024;

/// In which order pages are wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Pace {
    /// Nothing is known.
    #[default]
    Normal,
    /// One after the other.
    Sequential,
    /// In none.
    Random,
}

/// How a page is wanted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted {
    pub hint: Hint,
    pub pace: Pace,
}

impl<P: Platform> FileCache<P> {
    /// The most pages of a window.
    fn most(&self, pace: Pace) -> u64 {
        match (u64::from(self.file.read_ahead()), pace) {
            (_, Pace::Random) => 0,
            (most, Pace::Normal) => most,
            (most, Pace::Sequential) => 2 * most,
        }
    }

    /// The page at `index` was missed, and is being read: reads ahead of it.
    pub(super) fn ahead_of_miss(&self, p: &'static P, index: u64, wanted: Wanted, payer: &Payer<'_, P>) {
        let most = self.most(wanted.pace);
        if most == 0 {
            return;
        }
        let before = match wanted.pace {
            _ if index == 0 => LEAST / 2,
            Pace::Sequential => most,
            _ => {
                let pin = Pin::new(p);
                let mut pages = self.cursor(&pin);
                (1..=most.min(index)).take_while(|back| pages.look(index - back).is_some()).count() as u64
            }
        };
        if before > 0 {
            let window = (2 * before).next_power_of_two().max(LEAST).min(most);
            self.read_pages(
                p,
                index + 1,
                window.saturating_sub(1),
                Some(index + window / 2),
                wanted.hint,
                payer,
            );
        }
    }

    /// The page at `index`, which is there or on its way, was marked: reads beyond what is there.
    pub(super) fn ahead_of_mark(&self, p: &'static P, index: u64, wanted: Wanted, payer: &Payer<'_, P>) {
        let most = self.most(wanted.pace);
        let next = {
            let pin = Pin::new(p);
            let mut pages = self.cursor(&pin);
            (index + 1..index + LOOK).find(|next| pages.look(*next).is_none())
        };
        if let Some(next) = next.filter(|_| most > 0) {
            let window = (2 * (next - index)).max(LEAST).min(most);
            self.read_pages(p, next, window, Some(next), wanted.hint, payer);
        }
    }

    /// Begins to read those of `pages` pages from `first` on that are not there, as far as the file and free memory go:
    /// `readahead(2)`, `POSIX_FADV_WILLNEED`. Does not wait for them, if the file does not. Called unpinned, with no lock
    /// held.
    pub fn will_need(&self, p: &'static P, first: u64, pages: u64) {
        self.read_pages(p, first, pages, None, Hint::None, &Payer::Caller);
    }

    pub(crate) fn read_pages(
        &self,
        p: &'static P,
        first: u64,
        pages: u64,
        mark: Option<u64>,
        hint: Hint,
        payer: &Payer<'_, P>,
    ) {
        // Nothing of them is to be read.
        if self.file.is_direct() || !self.file.is_stored() {
            return;
        }
        let mut making = Making::at_hand(self, hint, payer);
        let mut at = first;
        let end = first.saturating_add(pages);
        while at < end.min(pages_of(self.size())) {
            let there = {
                let pin = Pin::new(p);
                self.cursor(&pin).look(at)
            };
            if let Some(there) = there {
                at = there.indexes(at).end;
                continue;
            }
            let Ok(made) = making.get(at, self.size()) else { return };
            let Some((folio, first)) = made else { continue };
            let behind = first + (1 << folio.order());
            let is_marked = mark.is_some_and(|mark| (first..behind).contains(&mark));
            let mark = if is_marked { FrameFlags::AHEAD } else { FrameFlags::empty() };
            self.prepare(&folio, first, FrameFlags::FILLING | mark);
            match self.insert_filling(p, at, &folio, &mut making.nodes) {
                Ok(size) => {
                    self.fill(&folio, first, size);
                    at = behind;
                }
                Err(Refused::Short(short)) => match making.more(folio, short) {
                    Ok(()) => {}
                    Err(NoMemory) => return,
                },
                // Another was faster, or the file is shorter by now.
                Err(Refused::Again) => at += 1,
                Err(Refused::Removing(_)) => at = behind,
            }
        }
    }
}
