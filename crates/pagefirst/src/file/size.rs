//! Growing and shrinking a file.
//!
//! Whatever lies beyond the end is zero or invalid, and stays so until the size is stored that makes it part of the
//! file. Pages that are mapped beyond the end keep their mappings: to take those away through the reverse map is
//! truncation's work, to come; until then such a page refuses the growth that would make it valid again.

use super::cache::{FileCache, LOOKED_AT, Outs, pages_of};
use super::error::SizeError;
use super::index::{Found, LAST_INDEX, Writer};
use crate::frame::{FrameFlags, bytes, words};
use crate::platform::Platform;
use crate::sync::atomic::{Relaxed, Release};
use crate::sync::epoch::Pin;
use crate::types::PAGE_SIZE;
use core::ops::ControlFlow::{Break, Continue};

/// Why what lies beyond the end is not gone.
pub(super) enum Left {
    /// There is more, from this index on: drop what was taken out, and call again.
    More(u64),
    /// This page is mapped.
    Mapped(u64),
}

/// What to do about pages beyond the end that are mapped.
#[derive(Clone, Copy)]
enum Mapped {
    /// They are in the way.
    Stop,
    /// Leave them; look at the pages from this index on.
    Skip { from: u64 },
}

impl<P: Platform> FileCache<P> {
    /// Sets the file's size in bytes. Called unpinned, with no lock held.
    ///
    /// Shrinking, faults beyond the new end fail from the moment the size is stored; pages beyond it are taken out
    /// before this returns, except those still mapped. Shrinking never fails. It does not wait for write-back: who
    /// does both to one file keeps them apart, or [`File::write`](super::File::write) may be given bytes beyond the
    /// new end.
    ///
    /// # Errors
    /// [`SizeError::StillMapped`] when a page from before the file shrank is mapped still; the size is as before.
    pub fn set_size(&self, p: &'static P, new: u64) -> Result<(), SizeError> {
        let mut stored = false;
        let mut from = 0;
        loop {
            let mut outs = Outs::new();
            let pin = Pin::new(p);
            let mut w = self.writer.lock(p);
            let old = self.size.load(Relaxed);
            let left = if stored || new <= old {
                if !stored && new < old {
                    self.size.store(new, Release);
                    self.cut_last(p, &mut w, new, &mut outs);
                }
                stored = true;
                self.drop_beyond(p, &pin, &mut w, &mut outs, Mapped::Skip { from })
            } else {
                let left = self.clear_beyond(p, &pin, &mut w, &mut outs);
                if left.is_ok() {
                    self.size.store(new, Release);
                }
                left
            };
            drop((w, pin));
            match left {
                Ok(()) => return Ok(()),
                Err(Left::More(index)) => from = index,
                Err(Left::Mapped(index)) => return Err(SizeError::StillMapped { index }),
            }
        }
    }

    /// The file has shrunk to `size`: its last page ends there. If it is being read in it goes, for what is read may
    /// be from before; its reader notices. A large folio that reaches beyond becomes small pages, or if somebody maps it or
    /// refers to it, what of it lies beyond is zeroed.
    fn cut_last(&self, p: &'static P, w: &mut Writer, size: u64, outs: &mut Outs<P>) {
        let (index, at) = (size / PAGE_SIZE, (size % PAGE_SIZE) as usize);
        let Some(found) = self.index.get(w, index) else { return };
        let (folio, indexes) = (p.meta(found.folio()), found.indexes(index));
        if at == 0 && indexes.start == index {
            return;
        }
        if folio.stop_filling() {
            self.detach(w, indexes.start, folio, outs);
            return;
        }
        bytes::zero_from(words(p, found.pfn), at);
        let whole = Found { pfn: found.folio(), ..found };
        if found.order > 0 && !self.split(w, indexes.start, whole) {
            let beyond = 1..(indexes.end - index) as u32;
            beyond.for_each(|i| bytes::zero_from(words(p, found.pfn.add(i)), 0));
        }
    }

    /// Sees that everything beyond the end is zero, so that the file may grow, if this answers `Ok`, before the lock
    /// is left.
    pub(super) fn clear_beyond(
        &self,
        p: &'static P,
        pin: &Pin<P>,
        w: &mut Writer,
        outs: &mut Outs<P>,
    ) -> Result<(), Left> {
        self.drop_beyond(p, pin, w, outs, Mapped::Stop)?;
        let size = self.size.load(Relaxed);
        let at = (size % PAGE_SIZE) as usize;
        // A page that is being read in is zeroed by its reader: it was inserted with this size, or a smaller one.
        if at != 0
            && let Some(found) = self.index.get(w, size / PAGE_SIZE)
            && p.meta(found.folio()).flags().contains(FrameFlags::UP_TO_DATE)
        {
            bytes::zero_from(words(p, found.pfn), at);
        }
        Ok(())
    }

    /// Takes out the pages beyond the end, as many as there is room for.
    fn drop_beyond(
        &self,
        p: &'static P,
        pin: &Pin<P>,
        w: &mut Writer,
        outs: &mut Outs<P>,
        mapped: Mapped,
    ) -> Result<(), Left> {
        let end = pages_of(self.size.load(Relaxed));
        let first = match mapped {
            Mapped::Stop => end,
            Mapped::Skip { from } => from.max(end),
        };
        let mut left = LOOKED_AT;
        let stopped = self.index.scan(pin, first, LAST_INDEX, &mut |index, found| {
            if outs.is_full() || left == 0 {
                return Break(Left::More(index));
            }
            left -= 1;
            // What of a folio across the end lies beyond it is zero, and stays.
            if found.indexes(index).start < end {
                return Continue(());
            }
            let meta = p.meta(found.folio());
            meta.set(FrameFlags::GOING);
            let filling =
                meta.flags() & (FrameFlags::FILLING | FrameFlags::UP_TO_DATE) == FrameFlags::FILLING;
            // One that is filling cannot be mapped: whoever raised its count will find it invalid.
            if filling || meta.maps_ordered() == 0 {
                self.detach(w, index, meta, outs);
                return Continue(());
            }
            meta.clear(FrameFlags::GOING);
            match mapped {
                Mapped::Stop => Break(Left::Mapped(index)),
                Mapped::Skip { .. } => Continue(()),
            }
        });
        match stopped {
            Break(left) => Err(left),
            Continue(()) => Ok(()),
        }
    }
}
