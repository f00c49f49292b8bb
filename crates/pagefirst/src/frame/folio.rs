//! Folios: blocks of frames with one set of metadata, their first frame's, the head's.
//!
//! Everything is counted on the head: one mapping and one reference for each entry, of any size, that maps any part of the
//! folio. The frames behind the head are *tails* where entries map them one by one, or a cache finds them: then they
//! are marked, and name their head. Until the folio is freed, or becomes so many small pages, that does not change; so
//! whoever keeps the folio (by a reference, or by the lock of a table that maps it) is told the right head.

use super::{Frame, FrameFlags, FrameMeta, WORDS, words};
use crate::platform::Platform;
use crate::sync::atomic::plain;
use crate::types::Pfn;

/// The head of the folio that this frame is part of; the frame itself unless it is a tail.
///
/// One look at one word: blocks lie at multiples of their size, so a tail's order tells its head. Who does not keep the
/// folio is told of some moment that may be past.
#[inline]
pub fn head_of<P: Platform>(p: &'static P, pfn: Pfn) -> Pfn {
    folio_of(p, pfn).0
}

/// The same, and the head's metadata and flags.
#[inline]
pub(crate) fn folio_of<P: Platform>(p: &'static P, pfn: Pfn) -> (Pfn, &'static FrameMeta, FrameFlags) {
    let meta = p.meta(pfn);
    let (flags, order) = meta.flags_and_order();
    if !flags.contains(FrameFlags::TAIL) {
        return (pfn, meta, flags);
    }
    of_tail(p, pfn, order)
}

#[cold]
fn of_tail<P: Platform>(p: &'static P, pfn: Pfn, order: u8) -> (Pfn, &'static FrameMeta, FrameFlags) {
    let head = first_of(pfn, order);
    let meta = p.meta(head);
    (head, meta, meta.flags())
}

/// The first frame of the block of 2^order frames that `pfn` is in.
#[inline]
pub(crate) const fn first_of(pfn: Pfn, order: u8) -> Pfn {
    Pfn(pfn.0 >> order << order)
}

/// Makes the frames behind the head tails. The caller has a mapping of the folio, or a reference.
pub(crate) fn link_tails<P: Platform>(p: &'static P, head: Pfn) {
    let order = p.meta(head).order();
    for i in 1..1u32 << order {
        p.meta(head.add(i)).restate(FrameFlags::TAIL, order);
    }
}

/// Ends that, for a folio that nobody refers to.
pub(super) fn unlink_tails<P: Platform>(p: &'static P, head: Pfn, order: u8) {
    if order > 0 && p.meta(head.add(1)).flags().contains(FrameFlags::TAIL) {
        (1..1u32 << order).for_each(|i| p.meta(head.add(i)).reset(FrameFlags::empty(), 0));
    }
}

/// Makes a folio of private memory that is mapped once into so many small pages, each mapped once; false, with nothing
/// changed, if somebody else maps it or holds a reference.
#[must_use]
pub(crate) fn split<P: Platform>(p: &'static P, folio: Pfn) -> bool {
    debug_assert!(p.meta(folio).flags().contains(FrameFlags::ANON));
    let frozen = p.meta(folio).freeze_mapped();
    if frozen {
        divide(p, folio, FrameMeta::thaw_mapped);
    }
    frozen
}

/// Makes a folio of a file that only its cache refers to into so many small pages, each referred to by the cache; false,
/// with nothing changed, if it is mapped or somebody else holds a reference. Under the cache's lock.
#[must_use]
pub(crate) fn split_cached<P: Platform>(p: &'static P, folio: Pfn) -> bool {
    debug_assert!(p.meta(folio).flags().contains(FrameFlags::FILE));
    let frozen = p.meta(folio).freeze();
    if frozen {
        divide(p, folio, FrameMeta::thaw);
    }
    frozen
}

/// Makes a frozen folio into small pages. Each is what the folio was: of the same owner, dirty if it was, but for a bad one
/// of which nothing is lost.
fn divide<P: Platform>(p: &'static P, folio: Pfn, thaw: impl Fn(&FrameMeta)) {
    let head = p.meta(folio);
    let (order, index, owner, link) = (head.order(), head.index(), head.owner(), head.link());
    let bad = FrameFlags::POISON | FrameFlags::SPARED;
    let flags = head.flags() - (FrameFlags::HURT | bad);
    for i in 0..1u32 << order {
        let meta = p.meta(folio.add(i));
        meta.set_owner(owner);
        meta.set_index(index + i as u64);
        meta.set_link(link);
        let own = meta.flags() & bad;
        // An error of storing is told once.
        let flags = if i == 0 { flags } else { flags - FrameFlags::UNTOLD };
        let flags = if own == bad { flags - FrameFlags::DIRTY } else { flags };
        meta.reset(flags | own & FrameFlags::POISON, 0);
        thaw(meta);
    }
}

/// What an entry maps: a folio, or some of it; and a reference to the folio.
pub(crate) struct Part<P: Platform> {
    folio: Frame<P>,
    first: Pfn,
    order: u8,
}

impl<P: Platform> Part<P> {
    /// The 2^order frames from `first` on. They may be free or somebody else's by now, unless the caller knows better (it
    /// has the lock of a table that maps them): it checks afterwards that they are what it meant.
    pub fn try_get(p: &'static P, first: Pfn, order: u8) -> Option<Self> {
        let folio = Frame::try_get(p, head_of(p, first))?;
        // A head that it has had before says nothing of it now.
        (head_of(p, first) == folio.pfn()).then_some(Part { folio, first, order })
    }
    /// A small page of a folio.
    pub fn of(folio: Frame<P>, page: Pfn) -> Self {
        Part { folio, first: page, order: 0 }
    }
    /// The contents of its first page, which others may use at the same time.
    pub fn words(&self) -> &[plain::AtomicU64; WORDS] {
        words(self.folio.platform(), self.first)
    }
    /// The folio.
    pub fn folio(&self) -> &Frame<P> {
        &self.folio
    }
    /// The folio's metadata.
    pub fn meta(&self) -> &'static FrameMeta {
        self.folio.meta()
    }
    /// Its first frame.
    pub fn pfn(&self) -> Pfn {
        self.first
    }
    /// log2 of the number of frames.
    pub fn order(&self) -> u8 {
        self.order
    }
    /// Whether it is private memory that nobody else can reach by a mapping.
    pub fn is_exclusive(&self) -> bool {
        self.folio.meta().flags().contains(FrameFlags::ANON | FrameFlags::EXCLUSIVE)
    }
    /// Its index in its owner.
    pub fn index(&self) -> u64 {
        self.folio.meta().index() + (self.first.0 - self.folio.pfn().0) as u64
    }
    /// One of its frames.
    pub fn small(&self, i: u32) -> Part<P> {
        Part { folio: self.folio.another(), first: self.first.add(i), order: 0 }
    }
    /// The numbers of all its frames.
    pub fn frames(&self) -> impl Iterator<Item = Pfn> + use<P> {
        let first = self.first;
        (0..1 << self.order).map(move |i| first.add(i))
    }
}

/// All of a folio.
impl<P: Platform> From<Frame<P>> for Part<P> {
    fn from(folio: Frame<P>) -> Self {
        let (first, order) = (folio.pfn(), folio.order());
        Part { folio, first, order }
    }
}

/// The folio's reference alone.
impl<P: Platform> From<Part<P>> for Frame<P> {
    fn from(part: Part<P>) -> Self {
        part.folio
    }
}
