//! Removal: pages leave the file for good, mapped or not, while faults go on (protocol 2).
//!
//! The file shrinks, or a hole is punched in it. One removal, or change of the size, at a time: a lock that may sleep
//! keeps the others waiting. A removal
//!
//! 1. *announces*: the size, where it shrinks; `removing`, the range that every insert checks; and `GOING` on each folio of
//!    the range. The file's turn is odd from here on;
//! 2. walks the mappings of the range, takes its pages out of their tables, and flushes; once more if mappings came
//!    meanwhile;
//! 3. takes each folio out of the cache whose map count, read with a read-modify-write, is zero, and that is not being
//!    stored. One that is being read in is mapped nowhere, and its reader notices;
//! 4. while one is left that is being stored waits for that, and while one is mapped (somebody has taken its entry out and
//!    has not flushed, or is about to notice) goes back to 2;
//! 5. waits for what of the folios at its edges is being stored, zeroes what stays of the range there, and has the storage
//!    forget the range. No store of these folios begins until the turn ends.
//!
//! **Two walks find everything**, whatever mapping calls do meanwhile. A walk takes entries out where a mapping is live,
//! looked at under the table's lock; so nothing goes from where a mapping call puts it. Where one is not, a mapping call
//! is at work: the walk waits for it, asleep, and goes on. For a mapping call that ends looks whether something is being
//! removed from the files whose mappings it replaced, and takes out itself what it has taken over; it looks after its
//! mappings are live, so it sees the removal or is seen. Calls that begin after the removal was announced therefore hide
//! nothing. One that was at work then and took entries to where the first walk had been already, the second waits for: its
//! mappings are in the tree until it ends.
//!
//! It needs no memory and cannot fail. A fault that meets `GOING` or `removing` is blocked until the turn ends; beyond the
//! end of a file that shrank it is told so at once.
//!
//! A folio across an edge is split when its pages in the range are mapped no more. If somebody maps or holds it, these
//! are zeroed instead and stay, beyond the end not valid. Entries for them are found without its count: the walk locks
//! every table, and who comes after it sees the size.
//!
//! | | removal |
//! |---|---|
//! | a fault validates | its map count, raised before, is found in step 3; or it sees `GOING` or the size |
//! | insert | `removing`, checked under the cache's lock |
//! | reading in | a page is made up to date in one step, and only if it is not `GOING` |
//! | `read_at`, `write_at` | what they hold stays readable; what is gone they ask for again, and wait for the turn |
//! | growth, another removal | the lock that may sleep |
//! | write-back | `GOING` is seen under the lock under which one folio at a time begins to be stored; `STORING` is waited for. Of a folio across an edge no store begins: what is written there after it was zeroed would be forgotten too, and be lost. Who syncs waits for the turn |
//! | evict | the cache's lock |
//! | a mapping call | the mapping that it makes is in the tree before the one that it replaces is out; at its end it sees the removal, or its mapping was seen live |
//! | fork | the child's mappings are in the tree before their entries are made; the parent's are not live meanwhile; then as a mapping call |
//! | exit | mappings leave the tree after their entries |
//!
//! **Private copies** of pages beyond the end go with them; those of a hole stay. They bear no mark of the file, and no more
//! do entries that lead to the memory of a file that is memory itself (`direct`): where a mapping of the file is live,
//! looked at under the table's lock, they are its own and nothing else's.

use super::File as _;
use super::cache::{FileCache, LOOKED_AT, Outs, pages_of};
use super::index::{Found, LAST_INDEX, Writer};
use super::sync::behind;
use crate::arch::{Attrs, Format};
use crate::fault::{Ticket, removal_key};
use crate::frame::{Frame, FrameFlags, FrameMeta, bytes, head_of, words};
use crate::platform::Platform;
use crate::rmap::part;
use crate::space::{Selects, Vma};
use crate::sync::LockGuard;
use crate::sync::atomic::{Acquire, Relaxed, Release, SeqCst, fence};
use crate::sync::epoch::Pin;
use crate::table::PageTable;
use crate::tlb::Gather;
use crate::types::{PAGE_SIZE, Pfn, VirtRange};
use core::ops::ControlFlow::{Break, Continue};
use core::ops::Range;

/// Possession proves that nobody else removes pages, or changes the size.
pub(super) type Alone<'a, P> = LockGuard<'a, P, <P as Platform>::WriterLock, ()>;

/// What is removed.
#[derive(Clone)]
pub(super) struct Removal {
    /// The bytes.
    bytes: Range<u64>,
    /// The pages that lie wholly in the range: from `first` to before `end`.
    first: u64,
    end: u64,
    /// Whether the file ends there from now on: private copies go as well.
    shrinks: bool,
    /// The only frame whose mappings go, in which hardware reported an error; else all.
    bad: Option<Pfn>,
}

impl Removal {
    /// The file is to end at `size`.
    fn beyond(size: u64) -> Self {
        Removal {
            bytes: size..u64::MAX,
            first: pages_of(size),
            end: LAST_INDEX + 1,
            shrinks: true,
            bad: None,
        }
    }
    /// These bytes are to be a hole.
    fn hole(bytes: Range<u64>) -> Self {
        let (first, end) = (pages_of(bytes.start), bytes.end / PAGE_SIZE);
        Removal { bytes, first, end, shrinks: false, bad: None }
    }
    /// The page at `index`, in this frame, is bad.
    pub(super) fn bad(index: u64, pfn: Pfn) -> Self {
        Removal { bad: Some(pfn), ..Removal::hole(index * PAGE_SIZE..(index + 1) * PAGE_SIZE) }
    }
    /// Whether any page lies wholly in the range.
    fn has_pages(&self) -> bool {
        self.first < self.end
    }
    /// Whether these pages all do.
    fn contains(&self, indexes: &Range<u64>) -> bool {
        self.first <= indexes.start && indexes.end <= self.end
    }
    /// The pages of which any byte is in the range.
    fn touched(&self) -> Range<u64> {
        self.bytes.start / PAGE_SIZE..pages_of(self.bytes.end)
    }
    /// The first and the last of these.
    fn edges(&self) -> impl Iterator<Item = u64> {
        let Range { start, end } = self.touched();
        let last = Some(end - 1).filter(|last| !self.shrinks && *last != start);
        [Some(start), last].into_iter().flatten()
    }
}

impl<P: Platform> FileCache<P> {
    /// Sets the file's size in bytes. Called unpinned, with no lock held; may sleep.
    ///
    /// When a file that shrank is back, nothing beyond its end is mapped anywhere or in memory, private copies included,
    /// and nothing of it is stored ([`File::forget`](super::File::forget)); what is left of the last page is zero.
    pub fn set_size(&self, p: &'static P, new: u64) {
        let alone = self.changes.lock(p);
        if new >= self.size() {
            return self.grow(p, new);
        }
        self.remove(p, alone, Removal::beyond(new));
    }

    /// Punches a hole: these bytes of the file read as zero, and pages that lie wholly in it are in memory no longer, but for
    /// those of a folio across an edge of it that somebody maps or holds: they stay, zeroed. The size stays, and so do private
    /// copies. Called unpinned, with no lock held; may sleep.
    pub fn punch(&self, p: &'static P, bytes: Range<u64>) {
        let alone = self.changes.lock(p);
        if bytes.start < bytes.end.min(self.size()) {
            self.remove(p, alone, Removal::hole(bytes));
        }
    }

    /// Sees that everything beyond the end is zero, as far as that, and lets the file end at `new`. `changes` is locked.
    pub(super) fn grow(&self, p: &'static P, new: u64) {
        self.clear_tail(new);
        let _w = self.writer.lock(p);
        self.size.store(new, Release);
    }

    /// Zeroes what lies beyond the end, up to that of the page before `new`: who maps the last page may have written there, and
    /// who held others when the file was cut, to those. What is being read in is zeroed by its reader: it was inserted with
    /// this size, or a smaller one. `changes` is locked.
    pub(super) fn clear_tail(&self, new: u64) {
        self.clear(self.size()..pages_of(new).saturating_mul(PAGE_SIZE));
    }

    /// Zeroes these bytes where pages are there; with no spin lock held, for they may be many.
    fn clear(&self, bytes: Range<u64>) {
        let pages = bytes.start / PAGE_SIZE..pages_of(bytes.end);
        let most = if cfg!(mutant = "grow_clears_one_folio") { 1 } else { usize::MAX };
        for folio in self.folios(pages.clone()).take(most) {
            let meta = folio.meta();
            if !meta.flags().contains(FrameFlags::UP_TO_DATE) {
                continue;
            }
            let first = meta.index();
            for index in first.max(pages.start)..behind(&folio).min(pages.end) {
                let at = |byte: u64| byte.saturating_sub(index * PAGE_SIZE).min(PAGE_SIZE) as usize;
                self.zero(folio.pfn().add((index - first) as u32), at(bytes.start)..at(bytes.end));
            }
        }
    }

    /// The folios of which there are pages among these, one after the other.
    fn folios(&self, mut pages: Range<u64>) -> impl Iterator<Item = Frame<P>> {
        core::iter::from_fn(move || {
            let (p, last) = (self.p, pages.end.checked_sub(1).filter(|last| pages.start <= *last)?);
            let pin = Pin::new(p);
            // By this the folio stays the cache's until it is referred to.
            let _w = self.writer.lock(p);
            let mut first = |index, found| Break((index, found));
            let (index, found): (u64, Found) =
                self.index.scan(&pin, pages.start, last, &mut first).break_value()?;
            pages.start = found.indexes(index).end;
            Frame::try_get(p, found.folio())
        })
    }

    /// Zeroes some of a page that stays. What hardware reported an error in is touched no more.
    fn zero(&self, page: Pfn, part: Range<usize>) {
        if !self.is_bad(page) && !cfg!(mutant = "cut_zeroes_nothing") {
            bytes::zero(words(self.p, page), part);
        }
    }

    fn remove(&self, p: &'static P, alone: Alone<'_, P>, removal: Removal) {
        self.announce(p, &removal);
        if removal.has_pages() {
            self.take_away(p, &removal);
        }
        self.forget(p, &removal);
        self.end_removal(p, alone);
        if removal.shrinks && cfg!(mutant = "size_after_removal") {
            self.size.store(removal.bytes.start, Release);
        }
        p.vm().collect_much(p);
    }

    /// Says what is removed from now on. Calls that have ended since are seen to have.
    pub(super) fn begin_removal(&self, w: &mut Writer, removal: &Removal) {
        self.turn.store(self.turn.load(Relaxed) + 1, Release);
        w.removal = Some(removal.clone());
        fence(SeqCst);
    }
    /// Nothing is, any more.
    pub(super) fn end_removal(&self, p: &'static P, alone: Alone<'_, P>) {
        let mut w = self.writer.lock(p);
        w.removal = None;
        self.turn.store(self.turn.load(Relaxed) + 1, Release);
        drop((w, alone));
        p.ready(removal_key(self));
    }

    /// Takes away the pages that lie wholly in the range, which are some: steps 2 to 4.
    fn take_away(&self, p: &'static P, removal: &Removal) {
        self.mark(p, removal);
        loop {
            self.unmap(removal);
            self.at_edges(p, removal, |w, found, indexes| {
                // Its pages go with the others, in the next round if they are mapped again.
                let _ = found.order > 0 && self.split(w, indexes.start, found);
            });
            self.mark(p, removal);
            // No store begins any more.
            drop(self.stores.lock(p));
            loop {
                match self.take_out(p, removal) {
                    Left::Nothing => return,
                    Left::Stored(page) => p.wait(&Ticket::for_store(page)),
                    Left::Mapped => break,
                }
            }
            p.relax();
        }
    }

    /// Says what is removed. A folio across an edge that is being read in goes, for what is read may be from before; its
    /// reader notices.
    fn announce(&self, p: &'static P, removal: &Removal) {
        let mut outs = Outs::new();
        let mut w = self.writer.lock(p);
        if removal.shrinks && !cfg!(mutant = "size_after_removal") {
            self.size.store(removal.bytes.start, Release);
        }
        self.begin_removal(&mut w, removal);
        for index in removal.edges() {
            let Some(found) = self.index.get(&w, index) else { continue };
            let (folio, indexes) = (p.meta(found.folio()), found.indexes(index));
            if removal.contains(&indexes) {
                continue;
            }
            if folio.stop_filling() {
                self.detach(&mut w, indexes.start, folio, &mut outs);
            }
        }
    }

    /// Zeroes what stays of the range, and has the storage forget the range. What is written there meanwhile is stored
    /// afterwards.
    fn forget(&self, p: &'static P, removal: &Removal) {
        // No store of what stays begins any more. Those that have begun are of what was there before.
        drop(self.stores.lock(p));
        for folio in self.folios(removal.touched()) {
            if folio.meta().flags().contains(FrameFlags::STORING) {
                p.wait(&Ticket::for_store(folio));
            }
        }
        self.clear(removal.bytes.clone());
        // Nor does one of anything else meanwhile: the storage need not bear both at once.
        let _stores = self.stores.lock(p);
        self.file.forget(removal.bytes.clone());
    }

    /// Calls `f`, the lock held, with the folios that lie across an edge of the range, and their pages' indexes.
    fn at_edges(&self, p: &'static P, removal: &Removal, f: impl Fn(&mut Writer, Found, Range<u64>)) {
        let mut w = self.writer.lock(p);
        for index in removal.edges() {
            if let Some(found) = self.index.get(&w, index)
                && let indexes = found.indexes(index)
                && !removal.contains(&indexes)
            {
                f(&mut w, Found { pfn: found.folio(), ..found }, indexes);
            }
        }
    }

    /// Marks every folio of the range.
    fn mark(&self, p: &'static P, removal: &Removal) {
        self.each(p, removal, |_, _, meta, _| {
            meta.go();
        });
    }

    /// Takes the pages of the range out of all tables.
    pub(super) fn unmap(&self, removal: &Removal) {
        let take = |vma: &Vma<P>, table: &PageTable<P>, range| self.take_from(removal, vma, table, range);
        let all = self.for_each_mapping(removal.first, removal.end - 1, take);
        if !all {
            self.for_each_mapping(removal.first, removal.end - 1, take);
        }
    }

    /// Takes the pages of the range out of one mapping's tables; where a mapping call is at work, waits until it has ended.
    fn take_from(&self, removal: &Removal, vma: &Vma<P>, table: &PageTable<P>, range: VirtRange) {
        loop {
            let mut takes = Takes { cache: self, removal, vma, is_split: false, was_live: vma.is_live() };
            let mut gather = Gather::new(table);
            table.zap_selected(range, &mut takes, &mut gather);
            self.touch_memory(range, &mut gather);
            gather.flush();
            let (is_split, was_live) = (takes.is_split, takes.was_live && vma.is_live());
            if was_live && !is_split {
                return;
            }
            if let Some(ticket) = Ticket::for_writer(table)
                && !cfg!(mutant = "removal_does_not_wait")
            {
                self.p.wait(&ticket);
            }
            if !was_live {
                return; // who was at work there has seen to it
            }
        }
    }

    /// Takes out of a mapping's tables what is being removed. Called by a mapping call, when the mapping that it has made
    /// is live.
    pub(crate) fn help_removal(&self, vma: &Vma<P>) {
        fence(SeqCst);
        if self.turn().is_multiple_of(2) || cfg!(mutant = "calls_do_not_help") {
            return;
        }
        let removal = self.writer.lock(self.p).removal.clone();
        if let Some(removal) = removal
            && removal.has_pages()
            && let Some(spot) = vma.spot()
            && let Some(range) = part(vma, removal.first, removal.end - 1)
        {
            let mut takes = Takes { cache: self, removal: &removal, vma, is_split: false, was_live: true };
            let mut gather = Gather::new(&spot.space.table);
            spot.space.table.zap_selected(range, &mut takes, &mut gather);
            self.touch_memory(range, &mut gather);
        }
    }

    /// Of a file that is memory itself, all of `range` is flushed, whatever was found there: a discard or a fault may have
    /// taken an entry out and not have flushed yet, and there is no map count that says so.
    fn touch_memory(&self, range: VirtRange, gather: &mut Gather<'_, P>) {
        if self.file.is_direct() {
            gather.touch(range);
        }
    }

    /// Takes the folios out of the cache that are neither mapped nor being stored; tells of one that is left.
    fn take_out(&self, p: &'static P, removal: &Removal) -> Left<P> {
        let mut left = Left::Nothing;
        self.each(p, removal, |w, index, meta, outs| {
            // A count that is full never falls. The walks have found the entries, and the frame is never free.
            let is_mapped = meta.maps_ordered() > 0 && !is_filling(meta) && !meta.is_saturated();
            if is_mapped {
                left = Left::Mapped;
                return;
            }
            if meta.flags().contains(FrameFlags::STORING) {
                if matches!(left, Left::Nothing)
                    && let Some(found) = self.index.get(w, index)
                    && let Some(page) = storing(p, found.folio())
                {
                    left = Left::Stored(page);
                }
                if !matches!(left, Left::Nothing) {
                    return;
                }
            }
            self.detach(w, index, meta, outs);
        });
        left
    }

    /// Calls `f` with each folio that lies in the range, the lock held, and room for one that is taken out.
    fn each(
        &self,
        p: &'static P,
        removal: &Removal,
        mut f: impl FnMut(&mut Writer, u64, &FrameMeta, &mut Outs<P>),
    ) {
        let mut next = removal.first;
        loop {
            let mut outs = Outs::new();
            let mut left = LOOKED_AT;
            let pin = Pin::new(p);
            let mut w = self.writer.lock(p);
            let stopped = self.index.scan(&pin, next, removal.end - 1, &mut |index, found| {
                if outs.is_full() || left == 0 {
                    return Break(index);
                }
                left -= 1;
                let indexes = found.indexes(index);
                if removal.contains(&indexes) {
                    f(&mut w, indexes.start, p.meta(found.folio()), &mut outs);
                }
                Continue(())
            });
            drop((w, pin));
            match stopped {
                Break(index) => next = index,
                Continue(()) => return,
            }
        }
    }

    /// Whether one of these pages is being removed, in part at least: nothing is put there.
    pub(super) fn is_removing(&self, w: &Writer, indexes: &Range<u64>) -> bool {
        // The edges as well: what is stored of them is from before.
        let touched = w.removal.as_ref().map(Removal::touched);
        touched.is_some_and(|touched| touched.start < indexes.end && indexes.start < touched.end)
    }
    /// The turn of the removal that is at work, if that is of some of these pages, or has an edge there.
    pub(super) fn removal_across(&self, indexes: Range<u64>) -> Option<u64> {
        let w = self.writer.lock(self.p);
        self.is_removing(&w, &indexes).then(|| self.turn())
    }
    /// The removals begun and ended so far: odd while one is at work.
    pub(crate) fn turn(&self) -> u64 {
        self.turn.load(Acquire)
    }
    /// Waits until the removal that is at work has ended. Called unpinned, with no lock held.
    pub(super) fn wait_for_removal(&self, p: &'static P) {
        drop(self.changes.lock(p));
    }
}

/// Being read in, so mapped nowhere: whoever raised its count will find it invalid.
fn is_filling(meta: &FrameMeta) -> bool {
    meta.flags() & (FrameFlags::FILLING | FrameFlags::UP_TO_DATE) == FrameFlags::FILLING
}

/// What is left of a range.
enum Left<P: Platform> {
    Nothing,
    /// A page that is mapped, perhaps others that are being stored.
    Mapped,
    /// A page that is being stored; none is mapped.
    Stored(Frame<P>),
}

/// The folio, if it is being stored. Called with the cache's lock held, by which it is the cache's.
pub(super) fn storing<P: Platform>(p: &'static P, folio: Pfn) -> Option<Frame<P>> {
    p.meta(folio).flags().contains(FrameFlags::STORING).then(|| Frame::try_get(p, folio)).flatten()
}

/// The entries that a removal takes out of a mapping's tables.
struct Takes<'a, P: Platform> {
    cache: &'a FileCache<P>,
    removal: &'a Removal,
    vma: &'a Vma<P>,
    /// A huge page was being split.
    is_split: bool,
    /// The mapping was live at every look.
    was_live: bool,
}

impl<P: Platform> Selects<P> for Takes<'_, P> {
    /// Under the table's lock, so the page is not free.
    fn selects(&mut self, raw: u64, level: u8) -> bool {
        self.was_live &= self.vma.is_live();
        if !self.was_live {
            return false;
        }
        let (p, removal) = (self.cache.p, self.removal);
        if P::Format::attrs(raw).contains(Attrs::SPECIAL) {
            return self.cache.file.is_direct();
        }
        let Some(pfn) = P::Format::frame(raw, level) else {
            self.is_split |= level > 0;
            return level == 0 && removal.shrinks; // a private copy that is lost
        };
        if let Some(bad) = removal.bad {
            let is_it = pfn.0 <= bad.0 && u64::from(bad.0 - pfn.0) < P::Format::pages(level);
            return is_it && head_of(p, pfn) == head_of(p, bad);
        }
        let head = head_of(p, pfn);
        let meta = p.meta(head);
        let flags = meta.flags();
        if flags.contains(FrameFlags::FILE) {
            // Wherever the mapping shows it.
            let index = meta.index() + (pfn.0 - head.0) as u64;
            let end = index + P::Format::pages(level);
            return meta.owner() == self.cache.owner() && index < removal.end && removal.first < end;
        }
        removal.shrinks && flags.contains(FrameFlags::ANON) && self.vma.is_private()
    }
}
