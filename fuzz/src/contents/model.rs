//! What programs and files hold, in plain maps: of each page a few words, and of a process what it has mapped.

use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::types::{PAGE_SIZE, Prot};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;

/// Where in a page the words lie that are looked at: at both ends, and around the middle.
pub const WORDS: [u64; 4] = [0, 8, 2048, PAGE_SIZE - 8];

/// The words of a page. Clones are the same page.
pub type Page = Rc<Cell<[u64; WORDS.len()]>>;

pub fn zeros() -> Page {
    Page::default()
}
pub fn copy_of(page: &Page) -> Page {
    Rc::new(Cell::new(page.get()))
}
pub fn set(page: &Page, word: usize, value: u64) {
    let mut words = page.get();
    words[word] = value;
    page.set(words);
}

/// The byte that file `id` holds at `at` at first.
pub fn mark(id: usize, at: u64) -> u8 {
    ((at / PAGE_SIZE * 31 + at % PAGE_SIZE * 7 + id as u64 * 101) % 251 + 1) as u8
}

pub struct File {
    pub size: u64,
    /// All that it may ever have; beyond the size they are zero.
    pub pages: Vec<Page>,
    /// Whether its pages can be stored, and come back when they were dropped.
    pub is_stored: bool,
    pub is_late: bool,
    /// Pages that could not be read or stored at some time.
    pub failed: BTreeSet<u64>,
    /// Pages in which hardware reported an error, and whether what they held is lost.
    pub bad: BTreeMap<u64, bool>,
}

impl File {
    /// A file of marks, or, if it is not stored, of zeros.
    pub fn new(id: usize, size: u64, largest: u64, is_stored: bool, is_late: bool) -> File {
        let byte = |at| if is_stored && at < size { mark(id, at) } else { 0 };
        let word = |at| u64::from_le_bytes(std::array::from_fn(|i| byte(at + i as u64)));
        let page = |index| Rc::new(Cell::new(WORDS.map(|at| word(index * PAGE_SIZE + at))));
        let pages = (0..largest).map(page).collect();
        File { size, pages, is_stored, is_late, failed: BTreeSet::new(), bad: BTreeMap::new() }
    }
    pub fn has_page(&self, index: u64) -> bool {
        index < self.size.div_ceil(PAGE_SIZE)
    }
    /// Whether a word lies below the end. What becomes of one that a program writes beyond it, in the last page, nobody
    /// says.
    pub fn has_word(&self, index: u64, word: usize) -> bool {
        index * PAGE_SIZE + WORDS[word] < self.size
    }
    pub fn resize(&mut self, size: u64) {
        if size < self.size {
            self.cut(size..u64::MAX);
        }
        self.size = size;
    }
    /// Makes bytes zero. Pages that lie wholly in them are others from now on.
    pub fn cut(&mut self, bytes: Range<u64>) {
        for (index, page) in (0..).zip(&mut self.pages) {
            let start = index * PAGE_SIZE;
            if bytes.contains(&start) && start + PAGE_SIZE <= bytes.end {
                *page = zeros();
                self.bad.remove(&index);
            } else {
                let cut = (0..WORDS.len()).filter(|word| bytes.contains(&(start + WORDS[*word])));
                cut.for_each(|word| set(page, word, 0));
            }
        }
    }
}

/// What is mapped in one place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shows {
    Anonymous,
    File { file: usize, index: u64, shared: bool },
}

/// A page of a process.
#[derive(Clone, Debug)]
pub struct Mapped {
    pub prot: Prot,
    pub shows: Shows,
    pub dont_fork: bool,
    pub wipe: bool,
    /// Its own, once it has written to it.
    pub own: Option<Page>,
    /// Its own is lost: hardware reported an error.
    pub lost: bool,
}

impl Mapped {
    pub fn new(prot: Prot, shows: Shows) -> Mapped {
        Mapped { prot, shows, dont_fork: false, wipe: false, own: None, lost: false }
    }
    pub fn is_shared(&self) -> bool {
        matches!(self.shows, Shows::File { shared: true, .. })
    }
    /// What it shows, its own or not; zeros that are nobody's where it shows nothing yet.
    pub fn page(&self, files: &[File]) -> Page {
        match (&self.own, self.shows) {
            (Some(own), _) => own.clone(),
            (None, Shows::Anonymous) => zeros(),
            (None, Shows::File { file, index, .. }) => files[file].pages[index as usize].clone(),
        }
    }
    /// The page that a write goes to, which is its own from now on if it is private.
    pub fn page_to_write(&mut self, files: &[File]) -> Page {
        if !self.is_shared() && self.own.is_none() {
            self.own = Some(copy_of(&self.page(files)));
        }
        self.page(files)
    }
    pub fn forget(&mut self) {
        (self.own, self.lost) = (None, false);
    }
}

/// A process: what it has mapped, by the number of the page.
#[derive(Clone, Default)]
pub struct Space(pub BTreeMap<u64, Mapped>);

/// What an access may come to.
#[derive(Default, Debug)]
pub struct Expected {
    /// It ends like this, and not otherwise.
    must: Option<FaultError>,
    /// It may also end so: where nobody can tell whether a page was in memory.
    may: Vec<FaultError>,
    pub may_block: bool,
}

impl Expected {
    pub fn allows(&self, end: Option<FaultError>, is_limited: bool) -> bool {
        let over = matches!(end, Some(FaultError::OverLimit(_)));
        end == self.must || end.is_some_and(|error| self.may.contains(&error)) || over && is_limited
    }
    fn error(error: FaultError) -> Expected {
        Expected { must: Some(error), ..Expected::default() }
    }
}

impl Space {
    pub fn expect(&self, files: &[File], page: u64, write: bool) -> Expected {
        let Some(mapped) = self.0.get(&page) else {
            return Expected::error(FaultError::Segv(Segv::NotMapped));
        };
        if !mapped.prot.contains(if write { Prot::WRITE } else { Prot::READ }) {
            return Expected::error(FaultError::Segv(Segv::Access));
        }
        if mapped.lost {
            return Expected::error(FaultError::Bus(Bus::Poison));
        }
        let (None, Shows::File { file, index, .. }) = (&mapped.own, mapped.shows) else {
            return Expected::default();
        };
        let file = &files[file];
        if !file.has_page(index) {
            return Expected::error(FaultError::Bus(Bus::BeyondEnd));
        }
        let lost = file.bad.get(&index);
        let may_fail = file.failed.contains(&index).then_some(FaultError::Bus(Bus::Io));
        let may_be_bad = lost.map(|_| FaultError::Bus(Bus::Poison));
        Expected {
            must: may_be_bad.filter(|_| lost == Some(&true)),
            may: may_fail.into_iter().chain(may_be_bad).collect(),
            may_block: file.is_late,
        }
    }

    pub fn is_mapped(&self, range: &Range<u64>) -> bool {
        self.0.range(range.clone()).count() as u64 == range.end - range.start
    }
    pub fn change(&mut self, range: &Range<u64>, change: impl FnMut(&mut Mapped)) {
        self.0.range_mut(range.clone()).map(|(_, mapped)| mapped).for_each(change);
    }
    /// What a file lost: private copies go where it ends.
    pub fn lose(&mut self, of: usize, pages: &Range<u64>) {
        for mapped in self.0.values_mut() {
            if let Shows::File { file, index, .. } = mapped.shows
                && file == of
                && pages.contains(&index)
            {
                mapped.forget();
            }
        }
    }
    /// What a child has.
    pub fn fork(&self) -> Space {
        let inherited = self.0.iter().filter(|(_, mapped)| !mapped.dont_fork);
        let child = inherited.map(|(page, mapped)| {
            let mut child = Mapped { own: mapped.own.as_ref().map(copy_of), ..mapped.clone() };
            if child.wipe {
                child.forget();
            }
            (*page, child)
        });
        Space(child.collect())
    }
}
