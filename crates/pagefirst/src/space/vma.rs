//! A mapping: a range of addresses with one backing and one set of rights.
//!
//! A VMA never changes. A mapping call that changes anything marks the old one `retired`, takes away what it covered,
//! and publishes new ones (protocol 2); so a fault that worked from the old one notices under the table's lock.

use super::Physical;
use crate::arch::Format;
use crate::fault::HUGE_LEVEL;
use crate::file::{File, FileCache, Hint, Pace, Wanted};
use crate::mem::{Past, Pooled, Shared};
use crate::platform::Platform;
use crate::policy::HugePolicy;
use crate::rmap::{Space, Spot};
use crate::sync::atomic::{Acquire, AtomicU32, Release};
use crate::types::{NoMemory, PAGE_SHIFT, Pfn, Prot, VirtAddr, VirtRange};

bitflags::bitflags! {
    /// Properties of a mapping beside its rights.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
    pub struct VmaFlags: u16 {
        /// Writes go to the file, not to a private copy.
        const SHARED = 1;
        /// A stack: grows down on a fault below it, with a guard gap kept free.
        const GROWS_DOWN = 2;
        /// The heap that `brk` moves.
        const HEAP = 4;
        /// Shared, of a file that was not opened for writing: never to be made writable.
        const NEVER_WRITE = 8;
        /// Huge pages are wanted ([`Advice::Huge`](super::Advice::Huge)).
        const HUGE = 16;
        /// Huge pages are not wanted ([`Advice::NoHuge`](super::Advice::NoHuge)).
        const NO_HUGE = 32;
        /// Not in the child of a fork ([`Advice::DontFork`](super::Advice::DontFork)).
        const DONT_FORK = 64;
        /// Empty in the child of a fork ([`Advice::WipeOnFork`](super::Advice::WipeOnFork)).
        const WIPE_ON_FORK = 128;
        /// Its file's pages are wanted one after the other ([`Advice::Sequential`](super::Advice::Sequential)).
        const SEQUENTIAL = 1 << 12;
        /// They are wanted in no order ([`Advice::Random`](super::Advice::Random)).
        const RANDOM = 1 << 13;
    }
}

/// What a mapping shows.
pub enum Backing<P: Platform> {
    /// Private memory, zero until written.
    Anonymous,
    /// A file, from this page of it on.
    File {
        /// The file's cache.
        file: Shared<P, FileCache<P>>,
        /// Index in the file, in pages, of the mapping's first page.
        first: u64,
    },
    /// Physical memory or a device.
    Physical(Physical),
}

impl<P: Platform> Clone for Backing<P> {
    fn clone(&self) -> Self {
        match self {
            Backing::Anonymous => Backing::Anonymous,
            Backing::File { file, first } => Backing::File { file: file.clone(), first: *first },
            Backing::Physical(physical) => Backing::Physical(*physical),
        }
    }
}

/// A mapping. Faults read it; on another cache line it is counted, by calls that change other mappings (docs/decisions/020).
#[repr(align(64))]
pub struct Vma<P: Platform> {
    /// Never reused: who looked a VMA up before it unpinned, compares the id after.
    pub id: u64,
    /// Its addresses, page-aligned, not empty.
    pub range: VirtRange,
    /// Its rights.
    pub prot: Prot,
    /// Its other properties.
    pub flags: VmaFlags,
    /// What it shows.
    pub backing: Backing<P>,
    /// Of private memory: how many pages further on it is shown than where it was filled, or would have been; modulo 2^64.
    moved_by: u64,
    /// [`LIVE`], [`RETIRED`], or [`TO_COME`].
    state: AtomicU32,
    /// Its places in the reverse map; of a file's mapping in a space, and of private memory that was moved.
    spot: Option<Shared<P, Spot<P>>>,
}

/// What faults find.
const LIVE: u32 = 0;
/// What the mapping shows is being taken away or changed; for ever.
const RETIRED: u32 = 1;
/// In the reverse map, and not published yet.
const TO_COME: u32 = 2;

impl<P: Platform> Pooled for Vma<P> {
    /// Who reads the tables by way of a VMA counts on it.
    fn end(&mut self, past: &Past) {
        if let Some(spot) = self.spot.take() {
            spot.end(past);
        }
    }
}

impl<P: Platform> Vma<P> {
    /// A mapping that is not retired.
    pub fn new(id: u64, range: VirtRange, prot: Prot, flags: VmaFlags, backing: Backing<P>) -> Self {
        debug_assert!(!range.is_empty());
        Vma { id, range, prot, flags, backing, moved_by: 0, state: AtomicU32::new(LIVE), spot: None }
    }
    /// What a mapping in `range` is that goes on with this one, with other rights and properties.
    pub(crate) fn part(&self, range: VirtRange, prot: Prot, flags: VmaFlags) -> Self {
        let backing = self.backing_at(range.start);
        Vma { moved_by: self.moved_by, ..Vma::new(0, range, prot, flags, backing) }
    }
    /// What one in `to` is that shows what this one shows from `from` on.
    pub(crate) fn moved(&self, from: VirtAddr, to: VirtRange) -> Self {
        let by = (to.start.0 >> PAGE_SHIFT).wrapping_sub(from.0 >> PAGE_SHIFT);
        let by = if self.has_anon() { by } else { 0 };
        let backing = self.backing_at(from);
        let moved_by = self.moved_by.wrapping_add(by);
        Vma { moved_by, ..Vma::new(0, to, self.prot, self.flags, backing) }
    }
    /// It is to be one of this space: it gets places in the reverse map if it has to be found by its own.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub(crate) fn enter(&mut self, space: &Shared<P, Space<P>>) -> Result<(), NoMemory> {
        if matches!(self.backing, Backing::File { .. }) || self.is_moved() {
            let p = space.table.platform();
            let slot = p.vm().or_drain(p, || p.vm().spots.reserve())?;
            self.spot = Some(slot.fill(Spot::new(space.clone())));
        }
        Ok(())
    }
    /// It is about to be put into the reverse map, and is not [live](Self::is_live) until [`go_live`](Self::go_live).
    pub(super) fn set_to_come(&self) {
        self.state.store(TO_COME, Release);
    }
    /// Its places in the reverse map.
    pub(crate) fn spot(&self) -> Option<&Spot<P>> {
        self.spot.as_deref()
    }
    /// It is about to be published, and nothing else is mapped where it is.
    pub(super) fn go_live(&self) {
        self.state.store(LIVE, Release);
    }
    /// Whether, looked at under a table's lock, what is mapped there is this mapping's and nothing else's.
    pub(crate) fn is_live(&self) -> bool {
        self.state.load(Acquire) == LIVE
    }
    /// Announces that what the mapping shows is being taken away or changed; for ever, but for a fork.
    pub(crate) fn retire(&self) {
        self.state.store(RETIRED, Release);
    }
    /// Takes it back: nothing was taken away or changed.
    pub(crate) fn resume(&self) {
        self.state.store(LIVE, Release);
    }
    /// Whether that was announced.
    pub fn is_retired(&self) -> bool {
        self.state.load(Acquire) != LIVE
    }
    /// Whether it shows private memory that was never anything else.
    pub(crate) fn is_anonymous(&self) -> bool {
        matches!(self.backing, Backing::Anonymous)
    }
    /// Whether it shows a file that is memory itself.
    pub(crate) fn is_memory_of_file(&self) -> bool {
        matches!(&self.backing, Backing::File { file, .. } if file.file().is_direct())
    }
    /// Whether it shows private memory or private copies of a file's pages.
    pub fn is_private(&self) -> bool {
        !self.flags.contains(VmaFlags::SHARED)
    }
    /// Whether a write to a mapped page needs nothing but the right to: shared pages of a file that does not track
    /// writes.
    pub(crate) fn is_written_in_place(&self) -> bool {
        match &self.backing {
            Backing::File { file, .. } => !self.is_private() && !file.file().tracks_writes(),
            Backing::Anonymous => false,
            Backing::Physical(_) => !self.is_private(),
        }
    }
    /// The level of the largest entry by which a fault at `va` may map something where nothing is.
    pub(crate) fn highest_level(&self, policy: HugePolicy, va: VirtAddr) -> u8 {
        match &self.backing {
            Backing::Physical(physical) => physical.level(self, va),
            // Wherever its memory is.
            Backing::File { .. } if self.is_memory_of_file() => self.largest_entry(va, |_, _| Some(Pfn(0))),
            Backing::File { .. } if self.takes_huge_of_file(P::Format::span_of(va, HUGE_LEVEL)) => HUGE_LEVEL,
            _ if self.takes_huge(policy, P::Format::span_of(va, HUGE_LEVEL)) => HUGE_LEVEL,
            _ => 0,
        }
    }
    /// Whether a huge page that spans `span` may be mapped where nothing is: private memory, all of it in this
    /// mapping, wanted by policy or advice.
    pub(crate) fn takes_huge(&self, policy: HugePolicy, span: VirtRange) -> bool {
        let wanted = match policy {
            HugePolicy::Never => false,
            HugePolicy::Advise => self.flags.contains(VmaFlags::HUGE),
            HugePolicy::Always => !self.flags.contains(VmaFlags::NO_HUGE),
        };
        wanted
            && matches!(self.backing, Backing::Anonymous)
            && (self.range.covers(span) || cfg!(mutant = "huge_past_mapping"))
    }
    /// The same for a file's: one whose folios are large enough, and lie in the mapping as they do in the file.
    pub(crate) fn takes_huge_of_file(&self, span: VirtRange) -> bool {
        let order = crate::fault::huge_order::<P::Format>();
        let Backing::File { file, .. } = &self.backing else { return false };
        file.file().max_folio_order() >= order
            && !self.flags.contains(VmaFlags::NO_HUGE)
            && (self.range.covers(span) || cfg!(mutant = "huge_past_mapping"))
            && self.index_of(span.start).is_multiple_of(1 << order)
    }
    /// Whether the file is asked before a page becomes writable.
    #[inline]
    pub(crate) fn asks_to_write(&self) -> bool {
        match &self.backing {
            Backing::File { file, .. } => !self.is_private() && file.file().has_mkwrite(),
            Backing::Anonymous | Backing::Physical(_) => false,
        }
    }
    /// How pages of its file are wanted for it.
    pub(crate) fn wanted(&self) -> Wanted {
        let pace = match () {
            _ if self.flags.contains(VmaFlags::RANDOM) => Pace::Random,
            _ if self.flags.contains(VmaFlags::SEQUENTIAL) => Pace::Sequential,
            _ => Pace::Normal,
        };
        let hint = match () {
            _ if self.flags.contains(VmaFlags::HUGE) => Hint::Huge,
            _ if self.flags.contains(VmaFlags::NO_HUGE) => Hint::Small,
            _ => Hint::None,
        };
        Wanted { hint, pace }
    }
    /// Whether there may be private pages in it.
    fn has_anon(&self) -> bool {
        self.is_private() && !matches!(self.backing, Backing::Physical(_))
    }
    /// Whether private memory is shown elsewhere than where it was filled.
    pub(crate) fn is_moved(&self) -> bool {
        self.moved_by != 0
    }
    /// The index in its root of a private page at `va`: the number of the page where it was filled, or would have been.
    #[inline]
    pub(crate) fn anon_index(&self, va: VirtAddr) -> u64 {
        (va.0 >> PAGE_SHIFT).wrapping_sub(self.moved_by)
    }
    /// Whether every page of it has an index: in no file, and in no root, they wrap around.
    pub(crate) fn has_indexes(&self) -> bool {
        let fits = |first: u64| {
            first.checked_add(self.range.pages()).is_some_and(|end| end <= u64::MAX >> PAGE_SHIFT)
        };
        let in_file = match &self.backing {
            Backing::File { first, .. } => fits(*first),
            Backing::Anonymous | Backing::Physical(_) => true,
        };
        in_file && fits(self.anon_index(self.range.start))
    }
    /// The index in the file of the page at `va`; for anonymous memory that in its root, for physical memory the
    /// frame's number.
    pub fn index_of(&self, va: VirtAddr) -> u64 {
        match &self.backing {
            Backing::Anonymous => self.anon_index(va),
            Backing::File { first, .. } => first + ((va.0 - self.range.start.0) >> PAGE_SHIFT),
            Backing::Physical(p) => u64::from(p.first.0) + ((va.0 - self.range.start.0) >> PAGE_SHIFT),
        }
    }
    /// The backing of the part that starts at `va`.
    pub fn backing_at(&self, va: VirtAddr) -> Backing<P> {
        match &self.backing {
            Backing::Anonymous => Backing::Anonymous,
            Backing::File { file, .. } => Backing::File { file: file.clone(), first: self.index_of(va) },
            Backing::Physical(p) => {
                Backing::Physical(Physical { first: Pfn(self.index_of(va) as u32), ..*p })
            }
        }
    }
    /// Whether `next`, which starts where this one ends, continues it in every respect.
    pub fn continues(&self, next: &Vma<P>) -> bool {
        let same = self.range.end == next.range.start && self.prot == next.prot && self.flags == next.flags;
        same && self.moved_by == next.moved_by
            && !self.flags.contains(VmaFlags::GROWS_DOWN)
            && match (&self.backing, &next.backing) {
                (Backing::Anonymous, Backing::Anonymous) => true,
                (Backing::File { file: a, .. }, Backing::File { file: b, first }) => {
                    let follows = self.index_of(self.range.end) == *first || cfg!(mutant = "merge_any_index");
                    a.same(b) && follows
                }
                (Backing::Physical(a), Backing::Physical(b)) => {
                    a.memory == b.memory && self.index_of(self.range.end) == u64::from(b.first.0)
                }
                _ => false,
            }
    }
}
