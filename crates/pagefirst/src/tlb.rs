//! What must be flushed, and what may be freed only afterwards.
//!
//! A `Gather` collects, while tables are locked, the pages and tables that were taken away. Its flush comes first,
//! with no lock and no pin held; then mappings' references are dropped and tables go to limbo. So no frame is
//! freed, called clean or reused while a translation to it can be used.

use crate::frame;
use crate::mem::{Few, Room};
use crate::platform::{MAX_CPUS, Platform};
use crate::sync::atomic::{AcqRel, AtomicU64, Relaxed, SeqCst, fence};
use crate::sync::held;
use crate::table::{self, PageTable, Unlinked};
use crate::types::{Pfn, VirtAddr, VirtRange};
use core::mem::MaybeUninit;

/// The set of CPUs that may hold translations of a space.
///
/// A context switch sets its CPU's bit, fences, and then loads the root; so a CPU that is not in the mask, read
/// after a store to an entry and a fence, cannot have cached what the entry said before.
pub struct CpuMask {
    words: [AtomicU64; MAX_CPUS / 64],
}

impl CpuMask {
    pub(crate) fn new() -> Self {
        CpuMask { words: core::array::from_fn(|_| AtomicU64::new(0)) }
    }
    /// Whether `cpu` is in the set.
    pub fn contains(&self, cpu: usize) -> bool {
        self.words[cpu / 64].load(Relaxed) >> (cpu % 64) & 1 == 1
    }
    pub(crate) fn insert(&self, cpu: usize) {
        self.words[cpu / 64].fetch_or(1 << (cpu % 64), AcqRel);
    }
    pub(crate) fn remove(&self, cpu: usize) {
        self.words[cpu / 64].fetch_and(!(1 << (cpu % 64)), AcqRel);
    }
    /// Whether no CPU but `cpu`, of those below `cpus`, is in the set.
    pub(crate) fn is_only(&self, cpu: usize, cpus: usize) -> bool {
        self.words[..cpus.div_ceil(64)].iter().enumerate().all(|(i, w)| {
            let mine = if i == cpu / 64 { 1 << (cpu % 64) } else { 0 };
            w.load(Relaxed) & !mine == 0
        })
    }
    /// The CPUs in the set, in order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.words.iter().enumerate().flat_map(|(i, word)| {
            let mut left = word.load(Relaxed);
            core::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
                left &= left - 1;
                Some(i * 64 + bit)
            })
        })
    }
}

/// One request to make translations unusable.
pub struct Flush<'a> {
    /// The CPUs that may hold them.
    pub cpus: &'a CpuMask,
    /// The space they belong to; unique among living spaces.
    pub tag: u64,
    /// The addresses concerned.
    pub range: VirtRange,
    /// Tables were unlinked: cached intermediate entries of the range must go as well.
    pub tables: bool,
}

/// Pages that a mapping call takes away between two flushes.
const MANY: usize = 256;
/// Pages that a fault takes away: one, and it settles that before it looks again.
const FEW: usize = 2;

/// The gather of a fault, small for a kernel's stack.
pub(crate) type SmallGather<'a, P> = Gather<'a, P, Room<Pfn, FEW>>;

/// The range whose union with any other is the other.
pub(crate) const NOTHING: VirtRange = VirtRange { start: VirtAddr(u64::MAX), end: VirtAddr(0) };

/// Pages and tables taken away and not flushed yet. Dropping it flushes. Whoever is lent one sees its room as a slice.
pub(crate) struct Gather<'a, P: Platform, R: Pages + ?Sized = [MaybeUninit<Pfn>]> {
    space: &'a PageTable<P>,
    /// What must be flushed, from the lowest address to the highest; nothing while they are the other way round.
    range: VirtRange,
    tables: Unlinked,
    /// Tables were unlinked in the range.
    unlinked: bool,
    /// Pages taken out in the range that nothing may take the place of before.
    taken: u64,
    /// What was flushed last before an install, and how much had been taken out of the space before that.
    before: Option<(VirtRange, u64)>,
    pages: Few<Pfn, R>,
}

/// Room for pages.
pub(crate) trait Pages: AsRef<[MaybeUninit<Pfn>]> + AsMut<[MaybeUninit<Pfn>]> {}
impl<R: AsRef<[MaybeUninit<Pfn>]> + AsMut<[MaybeUninit<Pfn>]> + ?Sized> Pages for R {}

impl<'a, P: Platform> Gather<'a, P, Room<Pfn, MANY>> {
    /// An empty gather for `space`.
    pub fn new(space: &'a PageTable<P>) -> Self {
        Gather::empty(space)
    }
}

impl<'a, P: Platform> SmallGather<'a, P> {
    /// An empty gather for `space` that takes few pages.
    pub fn small(space: &'a PageTable<P>) -> Self {
        Gather::empty(space)
    }
}

impl<'a, P: Platform, const N: usize> Gather<'a, P, Room<Pfn, N>> {
    fn empty(space: &'a PageTable<P>) -> Self {
        let (tables, pages) = (Unlinked::new(), Few::new());
        Gather { space, range: NOTHING, tables, unlinked: false, taken: 0, before: None, pages }
    }
}

impl<P: Platform, R: Pages + ?Sized> Gather<'_, P, R> {
    /// No room for another page: unlock, unpin, flush, look again.
    pub fn is_full(&self) -> bool {
        self.pages.is_full()
    }
    /// Translations of `range` must go.
    pub fn touch(&mut self, range: VirtRange) {
        self.range = self.range.union(range);
    }
    /// The same of what of it lies in `part`, if any does.
    pub fn touch_within(&mut self, range: VirtRange, part: VirtRange) {
        if range.overlaps(part) {
            self.touch(range.intersect(part));
        }
    }
    /// The entry of a page was taken out that spanned `span`; its mapping and reference are dropped after the flush.
    pub fn page(&mut self, span: VirtRange, pfn: Pfn) {
        self.touch(span);
        self.keep(pfn);
    }
    /// The same when its span is touched before the table is unlocked.
    pub fn keep(&mut self, pfn: Pfn) {
        debug_assert!(!self.is_full());
        if cfg!(mutant = "free_before_flush") {
            return frame::unmap(self.space.platform(), pfn);
        }
        self.pages.push(pfn);
    }
    /// So many pages are being taken out, under their table's lock, that nothing may take the place of before the flush:
    /// huge ones, and all where a format asks for it. Their spans are touched as well.
    pub(crate) fn taken(&mut self, n: u64) {
        self.space.pages_taken.take(n);
        self.taken += n;
    }
    /// Flushes `span`, of which nothing is mapped, tables included: `taken` was taken out of the space by then.
    pub fn flush_before(&mut self, span: VirtRange, taken: u64) {
        self.tables_of(span);
        self.flush();
        self.before = Some((span, taken));
    }
    /// Whether what is around `va` was flushed when just so much had been taken out.
    pub fn is_flushed_before(&self, va: VirtAddr, taken: u64) -> bool {
        self.before.is_some_and(|(span, then)| span.contains(va) && then == taken)
    }
    /// Whatever tables were unlinked from `span`, what is cached of them must go.
    pub fn tables_of(&mut self, span: VirtRange) {
        self.touch(span);
        self.unlinked = true;
    }
    /// A dead table was unlinked by the caller, who cleared the slot that spans `span`.
    pub(crate) fn table(&mut self, pfn: Pfn, span: VirtRange) {
        self.tables_of(span);
        self.tables.push(self.space.platform(), pfn);
    }
    /// Flushes, then frees. Called with no lock and no pin held.
    pub fn flush(&mut self) {
        let range = core::mem::replace(&mut self.range, NOTHING);
        if range.is_empty() {
            let nothing = self.pages.is_empty() && self.taken == 0 && self.tables.len() == 0;
            debug_assert!(nothing, "taken away and not touched");
            return;
        }
        let p = self.space.platform();
        held::none(p, "flush");
        // Before the mask is read: a CPU that is not in it walks the tables as they are now.
        fence(SeqCst);
        p.shootdown(&Flush {
            cpus: &self.space.cpus,
            tag: self.space.tag(),
            range,
            tables: core::mem::take(&mut self.unlinked) && !cfg!(mutant = "flush_without_tables"),
        });
        frame::unmap_all(p, self.pages.take());
        let tables = core::mem::replace(&mut self.tables, Unlinked::new());
        let unlinked = tables.len() as u64;
        table::retire(p, tables);
        self.space.changing.unlinked.flush(unlinked);
        self.space.pages_taken.flush(core::mem::take(&mut self.taken));
    }
}

impl<P: Platform, R: Pages + ?Sized> Drop for Gather<'_, P, R> {
    #[inline]
    fn drop(&mut self) {
        if !self.range.is_empty() {
            self.flush();
        }
    }
}
