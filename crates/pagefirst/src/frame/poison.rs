//! Frames in which hardware reported a memory error.
//!
//! The mark is on the frame's own metadata, on a tail's too, and [`HURT`](FrameFlags::HURT) on the head of its folio. It stays
//! with the frame, be it a page or the library's own: whatever is done with its folio, it is never free again. It is set by who
//! holds a reference, and nothing stores flags whole while others may. Who looks a page up, or validates one to map it,
//! is told; so, as for pages that go (protocol 2), the mark comes before the walk that takes the mappings away.

use super::{Frame, FrameFlags, MAX_ORDER, Part, drain, first_of, free_aside};
use crate::platform::{Note, Platform};
use crate::table;
use crate::types::Pfn;

/// How often a frame is looked for that is neither referred to nor free: it is on its way from the one to the other.
const PATIENCE: u32 = 1000;

/// Who uses a frame that is bad from now on.
pub(crate) enum Bad<P: Platform> {
    /// Nobody, ever again.
    Free,
    /// It is a page: marked.
    Page(Part<P>),
    /// The library itself, or it is about to become a page: marked.
    Other,
    /// It is no frame of the library's.
    Foreign,
}

/// Marks a frame as bad. Called unpinned, with no lock held.
pub(crate) fn mark<P: Platform>(p: &'static P, pfn: Pfn) -> Bad<P> {
    let frames = &p.vm().frames;
    if !frames.has(p, pfn) {
        return Bad::Foreign;
    }
    // Every space reads it, and it is never given back.
    if pfn == p.vm().zero_page() {
        return Bad::Other;
    }
    for _ in 0..PATIENCE {
        let Some(page) = Part::try_get(p, pfn, 0).or_else(|| part_of_block(p, pfn)) else {
            // In a cache, or put aside.
            free_aside(p);
            drain(p);
            let was_taken_out = p.meta(pfn).flags() == FrameFlags::POISON;
            if was_taken_out || frames.take_out(p, pfn) {
                return Bad::Free;
            }
            p.relax();
            continue;
        };
        if page.folio().order() > 0 {
            page.folio().meta().set(FrameFlags::HURT);
        }
        p.meta(pfn).set(FrameFlags::POISON);
        if !page.folio().meta().flags().intersects(FrameFlags::ANON | FrameFlags::FILE) {
            table::drain(p); // it may wait to be a table again
            return Bad::Other;
        }
        // Unless it was split meanwhile.
        if pfn.0 - page.folio().pfn().0 < 1 << page.folio().order() {
            return Bad::Page(page);
        }
    }
    Bad::Other
}

/// The frame, if it is behind the head of a folio whose tails do not name it: of private memory that is mapped whole.
fn part_of_block<P: Platform>(p: &'static P, pfn: Pfn) -> Option<Part<P>> {
    let heads = (1..=MAX_ORDER).map(|order| (order, first_of(pfn, order)));
    heads.filter(|(_, head)| head.0 < pfn.0 && p.vm().frames.has(p, *head)).find_map(|(order, head)| {
        let folio = Frame::try_get(p, head).filter(|folio| folio.order() >= order)?;
        Some(Part::of(folio, pfn))
    })
}

/// Frees what is good of a folio whose last reference is gone.
#[cold]
pub(super) fn release<P: Platform>(p: &'static P, folio: Pfn, order: u8) {
    p.note(Note::FrameFreed(folio, order));
    for pfn in (0..1 << order).map(|i| folio.add(i)) {
        let meta = p.meta(pfn);
        let bad = meta.flags() & FrameFlags::POISON;
        meta.reset(bad, 0);
        meta.set_owner(core::ptr::null_mut());
        match bad.is_empty() {
            true => p.vm().frames.free(p, pfn, 0),
            false => p.vm().frames.lose(),
        }
    }
}

/// Whether hardware reported an error in one of 2^order frames, parts of a folio with these flags.
#[inline]
pub(crate) fn is_bad<P: Platform>(p: &'static P, folio: FrameFlags, first: Pfn, order: u8) -> bool {
    folio.intersects(FrameFlags::HURT | FrameFlags::POISON) && is_any_bad(p, first, order)
}
#[cold]
fn is_any_bad<P: Platform>(p: &'static P, first: Pfn, order: u8) -> bool {
    (0..1 << order).any(|i| p.meta(first.add(i)).flags().contains(FrameFlags::POISON))
}

impl<P: Platform> Part<P> {
    /// Whether hardware reported an error in one of the frames.
    pub(crate) fn is_bad(&self) -> bool {
        is_bad(self.folio().platform(), self.folio().meta().flags(), self.pfn(), self.order())
    }
}
