//! Files as the oracle sees them: their bytes, and which of their pages are in memory.

use pagefirst::file::ShmemHuge;
use pagefirst::types::PAGE_SIZE;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, LazyLock};

/// The bytes of a page; copied when one of several owners writes.
pub type Bytes = Arc<[u8; PAGE_SIZE as usize]>;

/// The byte that file `id` holds at `at` until it is written or cut off: never 0, different for neighbours, in the
/// page and between pages.
pub fn mark(id: usize, at: u64) -> u8 {
    ((at / PAGE_SIZE * 31 + at % PAGE_SIZE * 7 + id as u64 * 101) % 251 + 1) as u8
}

pub fn zeros() -> Bytes {
    static ZEROS: LazyLock<Bytes> = LazyLock::new(|| Arc::new([0; PAGE_SIZE as usize]));
    ZEROS.clone()
}

/// A page of file `id`, marked throughout. Repeated after so many pages, so that they can be kept.
fn marks(id: usize, index: u64) -> Bytes {
    const PAGES: u64 = 251;
    static MARKS: [LazyLock<Vec<Bytes>>; 2] = [LazyLock::new(|| all(0)), LazyLock::new(|| all(1))];
    fn all(id: usize) -> Vec<Bytes> {
        let page = |index| Arc::new(std::array::from_fn(|i| mark(id, index * PAGE_SIZE + i as u64)));
        (0..PAGES).map(page).collect()
    }
    MARKS[id][(index % PAGES) as usize].clone()
}

pub fn pages_of(size: u64) -> u64 {
    size.div_ceil(PAGE_SIZE)
}

pub struct File {
    id: usize,
    pub size: u64,
    /// From here on there are no marks: the file had this size once.
    marked: u64,
    /// Pages whose bytes are not marks alone.
    changed: BTreeMap<u64, Bytes>,
    /// The pages in memory, and whether they are to be stored before they may go.
    pub cached: BTreeMap<u64, bool>,
    /// Shared pages are mapped read-only until they are written.
    pub tracks: bool,
    /// When it has huge pages.
    pub huge: ShmemHuge,
}

impl File {
    pub fn new(id: usize, size: u64, tracks: bool) -> File {
        File {
            id,
            size,
            marked: size,
            changed: BTreeMap::new(),
            cached: BTreeMap::new(),
            tracks,
            huge: ShmemHuge::Never,
        }
    }
    /// A memory file.
    pub fn memory(id: usize, size: u64, huge: ShmemHuge) -> File {
        File { marked: 0, huge, ..File::new(id, size, false) }
    }
    pub fn pages(&self) -> u64 {
        pages_of(self.size)
    }
    /// The bytes of a page.
    pub fn bytes(&self, index: u64) -> Bytes {
        if let Some(bytes) = self.changed.get(&index) {
            return bytes.clone();
        }
        match self.marked.saturating_sub(index * PAGE_SIZE) {
            0 => zeros(),
            PAGE_SIZE.. => marks(self.id, index),
            below => {
                let mut bytes = marks(self.id, index);
                Arc::make_mut(&mut bytes)[below as usize..].fill(0);
                bytes
            }
        }
    }
    /// Bytes below the end, in one page.
    pub fn write(&mut self, at: u64, from: &[u8]) {
        let (index, place) = (at / PAGE_SIZE, (at % PAGE_SIZE) as usize);
        let mut bytes = self.bytes(index);
        Arc::make_mut(&mut bytes)[place..place + from.len()].copy_from_slice(from);
        self.changed.insert(index, bytes);
        self.cached.insert(index, true);
    }
    /// Reads a page in, if it is not in memory.
    pub fn fetch(&mut self, index: u64) {
        self.cached.entry(index).or_insert(false);
    }
    /// Makes bytes a hole.
    pub fn punch(&mut self, hole: &Range<u64>) {
        if hole.start >= hole.end.min(self.size) {
            return;
        }
        for index in hole.start / PAGE_SIZE..pages_of(hole.end) {
            let at = |byte: u64| {
                (byte.clamp(index * PAGE_SIZE, (index + 1) * PAGE_SIZE) - index * PAGE_SIZE) as usize
            };
            let mut bytes = self.bytes(index);
            Arc::make_mut(&mut bytes)[at(hole.start)..at(hole.end)].fill(0);
            self.changed.insert(index, bytes);
        }
        let whole = pages_of(hole.start)..hole.end / PAGE_SIZE;
        self.cached.retain(|index, _| !whole.contains(index));
    }
    /// Gives the file another size.
    pub fn resize(&mut self, size: u64) {
        let last = size / PAGE_SIZE;
        if size < self.size {
            let mut bytes = self.bytes(last);
            Arc::make_mut(&mut bytes)[(size % PAGE_SIZE) as usize..].fill(0);
            self.changed.retain(|index, _| *index < last);
            self.changed.insert(last, bytes);
            self.cached.retain(|index, _| *index < pages_of(size));
            self.marked = self.marked.min(size);
        }
        self.size = size;
    }
}
