//! What was seen of pages that are everybody's: a word is no older than any thread has seen it before, unless a call has
//! changed what the page is meanwhile.
//!
//! Calls that give pages other contents are counted, by page, when they begin and when they have ended; those that change
//! files count for all pages in which a file was ever mapped. In a time in which no such call is at work on a page, the page's
//! words only grow: whoever reads one afterwards finds at least what anybody had found or written there before he began. (Pages
//! of private mappings of files are not looked at: a copy may be older than what somebody has seen of the file.)
//!
//! These are no atomics of shuttle's: nobody is interrupted here.

use super::world::{MOST, PAGES};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// Calls that were begun, and calls that have ended.
#[derive(Default)]
pub struct Calls([AtomicU64; 2]);

impl Calls {
    fn begin(&self) {
        self.0[0].fetch_add(1, Relaxed);
    }
    fn end(&self) {
        self.0[1].fetch_add(1, Relaxed);
    }
    /// How many there were, if none is at work.
    fn still(&self) -> Option<u64> {
        let [begun, ended] = self.0.each_ref().map(|n| n.load(Relaxed));
        (begun == ended).then_some(ended)
    }
}

/// Something that changes what pages, or files, hold, at work.
pub struct Change<'c>(Vec<&'c Calls>);

impl<'c> Change<'c> {
    pub fn of(calls: impl IntoIterator<Item = &'c Calls>) -> Self {
        let calls: Vec<_> = calls.into_iter().collect();
        calls.iter().for_each(|calls| calls.begin());
        Change(calls)
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|calls| calls.end());
    }
}

/// A word: of this page, of this thread.
pub type Place = (u64, usize);

/// A time in which no call changes a page: the number of calls before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Still(u64, u64);

/// What is known before a word is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Before {
    still: Still,
    /// How far its owner had counted by the newest that was seen.
    count: u64,
}

/// What was seen in one space.
#[derive(Default)]
pub struct Seen {
    calls: [Calls; PAGES as usize],
    /// Whether a file may be mapped there.
    of_files: [AtomicBool; PAGES as usize],
    words: Mutex<BTreeMap<Place, (u64, Still)>>,
    /// By thread, the page in which its word was seen last.
    recent: Mutex<[Option<u64>; MOST]>,
}

impl Seen {
    /// Pages of the space get other contents.
    pub fn change(&self, pages: impl IntoIterator<Item = Range<u64>>) -> Change<'_> {
        Change::of(pages.into_iter().flatten().map(|page| &self.calls[page as usize]))
    }
    /// A file may be mapped in these pages from now on.
    pub fn may_be_of_file(&self, pages: Range<u64>) {
        pages.for_each(|page| self.of_files[page as usize].store(true, Relaxed));
    }
    /// Whether it may be so in one of them.
    pub fn is_of_file(&self, mut pages: Range<u64>) -> bool {
        pages.any(|page| self.of_files[page as usize].load(Relaxed))
    }
    /// The time it is for a page; `None` while a call is at work.
    pub fn still(&self, page: u64, files: &Calls) -> Option<Still> {
        let files = if self.is_of_file(page..page + 1) { files.still()? } else { 0 };
        Some(Still(self.calls[page as usize].still()?, files))
    }
    /// Before a word is read or written.
    pub fn before(&self, place: Place, files: &Calls) -> Option<Before> {
        let still = self.still(place.0, files)?;
        let known = self.words.lock().expect("no panic").get(&place).copied();
        let count = known.filter(|(_, then)| *then == still).map_or(0, |(count, _)| count);
        Some(Before { still, count })
    }
    /// A word was read or written; tells what was known before, if this one is older.
    pub fn saw(&self, place: Place, count: u64, before: Option<Before>, files: &Calls) -> Option<u64> {
        let before = before.filter(|before| self.still(place.0, files) == Some(before.still))?;
        if count < before.count {
            return Some(before.count);
        }
        self.recent.lock().expect("no panic")[place.1] = Some(place.0);
        let mut words = self.words.lock().expect("no panic");
        let (known, then) = words.entry(place).or_insert((count, before.still));
        *known = if *then == before.still { count.max(*known) } else { count };
        *then = before.still;
        None
    }
    /// The page in which a thread's word was seen last.
    pub fn recent(&self, owner: usize) -> Option<u64> {
        self.recent.lock().expect("no panic")[owner]
    }
}
