//! Files are cut, and what was there is gone.
//!
//! In each file one worker cuts at a time, and counts: the count is odd while the file is being cut, or is short. While it is
//! even and stays the same, no word is lost and no page lies beyond the end. Who cuts looks whether what was written before
//! is gone.
//!
//! Between one quiet point and the next a file is cut, and after that left alone, so that what is lost is noticed.

use crate::Host;
use crate::board::MAX_WORKERS;
use crate::files::Kind;
use crate::layout::{PAGES, place_of};
use crate::tally::Op;
use crate::worker::{Word, Worker};
use core::ops::Range;
use core::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use core::sync::atomic::{AtomicU32, fence};
use pagefirst::types::PAGE_SIZE;
use spin::{Mutex, MutexGuard};

/// The cuts of a file.
pub(crate) struct Cuts {
    one: Mutex<()>,
    count: AtomicU32,
}

impl Cuts {
    pub const fn new() -> Self {
        Cuts { one: Mutex::new(()), count: AtomicU32::new(0) }
    }
    /// The count before something is looked at or written.
    pub fn count(&self) -> u32 {
        self.count.load(Acquire)
    }
    /// Whether nothing was cut since the count was this, as far as what was looked at shows.
    pub fn is_whole_since(&self, count: u32) -> bool {
        fence(SeqCst);
        count.is_multiple_of(2) && self.count.load(Relaxed) == count
    }
    /// Keeps others from cutting, if nobody is at it.
    pub fn hold(&self) -> Option<MutexGuard<'_, ()>> {
        self.one.try_lock()
    }
    /// Begins a cut, if nobody else is at one.
    fn begin(&self) -> Option<Cut<'_>> {
        let one = self.one.try_lock()?;
        let count = self.count.load(Relaxed) | 1;
        let was_short = self.count.swap(count, SeqCst) == count;
        fence(SeqCst);
        Some(Cut { cuts: self, was_short, _one: one })
    }
}

struct Cut<'a> {
    cuts: &'a Cuts,
    /// The file was short before.
    was_short: bool,
    _one: MutexGuard<'a, ()>,
}

impl Cut<'_> {
    /// The file has its full size.
    fn end(self) {
        self.cuts.count.fetch_add(1, SeqCst);
    }
}

impl<H: Host> Worker<'_, '_, H> {
    /// Where to cut: often at somebody's word.
    fn border(&mut self, kind: Kind) -> u64 {
        if self.dice.once_in(2) {
            kind.offset(self.dice.roll(PAGES), self.dice.roll(self.stress.config.workers as u64) as usize)
        } else {
            self.dice.roll(kind.size() / 64) * 64
        }
    }

    pub fn resize(&mut self, kind: Kind) {
        if self.may_cut(kind) {
            let size = self.border(kind);
            self.begin(Op::Resize);
            self.shrink(kind, size);
        }
    }

    /// Whether the file is left alone until the next quiet point.
    fn is_left_alone(&self, kind: Kind) -> bool {
        (self.stress.board.rounds.load(Relaxed) + kind as u32).is_multiple_of(2)
    }

    /// Whether the file may be cut now; so it may while it is short, for it has to have its size again.
    pub fn may_cut(&self, kind: Kind) -> bool {
        let is_short = !self.stress.board.cuts[kind as usize].count().is_multiple_of(2);
        kind.is_cut() && (is_short || !self.is_left_alone(kind))
    }

    /// Lets the file end at `size`; mostly it has its full size again when this is back, and nothing behind.
    pub fn shrink(&mut self, kind: Kind, size: u64) {
        let Some(cut) = self.stress.board.cuts[kind as usize].begin() else { return };
        let begun = self.stress.board.all_begun();
        self.file(kind).set_size(self.p, size);
        if self.dice.once_in(4) && !self.is_left_alone(kind) {
            return;
        }
        self.file(kind).set_size(self.p, kind.size());
        self.expect_gone(kind, size..kind.size(), &begun);
        cut.end();
    }

    pub fn punch(&mut self, kind: Kind) {
        if self.may_cut(kind) {
            let start = self.border(kind);
            let len = self.dice.roll(16 * PAGE_SIZE / 64) * 64;
            self.begin(Op::Punch);
            self.punch_out(kind, start..start + len);
        }
    }

    /// Punches these bytes out.
    pub fn punch_out(&mut self, kind: Kind, bytes: Range<u64>) {
        let Some(cut) = self.stress.board.cuts[kind as usize].begin() else { return };
        let begun = self.stress.board.all_begun();
        self.file(kind).punch(self.p, bytes.clone());
        self.expect_gone(kind, bytes.start..bytes.end.min(kind.size()), &begun);
        if !cut.was_short {
            cut.end();
        }
    }

    /// Words in this part of a file are gone if their writes ended before the cut: before the worker had begun the write
    /// of this number. All of the first and the last page are looked at, and of some others.
    fn expect_gone(&mut self, kind: Kind, part: Range<u64>, begun: &[u32; MAX_WORKERS]) {
        let workers = self.stress.config.workers;
        let pages = kind.index_of(part.start)..kind.index_of(part.end.saturating_sub(1)) + 1;
        let mut page = pages.start;
        while page < pages.end {
            for writer in (0..workers).filter(|writer| part.contains(&kind.offset(page, *writer))) {
                let Some(found) = self.word_of_file(kind, page, writer) else { continue };
                let word = Word::of(found);
                if found != 0 && word.write < begun[writer] {
                    self.violation(format_args!(
                        "page {page} of {kind:?}, the word of worker {writer}: {word}: it was cut off at {part:#x?}"
                    ));
                }
            }
            let next = page + 1 + self.dice.roll(PAGES / 2);
            page = if page + 1 < pages.end { next.min(pages.end - 1) } else { next };
        }
    }

    /// Reads a word, unless memory is short or it lies beyond the end.
    fn word_of_file(&self, kind: Kind, page: u64, writer: usize) -> Option<u64> {
        let mut bytes = [0; 8];
        loop {
            match self.file(kind).read_at(self.p, kind.offset(page, writer), &mut bytes) {
                Ok(n) => return (n == 8).then(|| u64::from_ne_bytes(bytes)),
                Err(error) => {
                    if !self.again(kind, page, error) {
                        return None;
                    }
                }
            }
        }
    }
}

/// The words of a page lie in its beginning.
const _: () = assert!(place_of(MAX_WORKERS) <= PAGE_SIZE);
