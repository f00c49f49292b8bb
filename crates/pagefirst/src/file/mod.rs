//! The page cache: the pages of a file that are in memory, found by their index.
//!
//! A page is *attached* while it is in the index: its frame's owner is the cache (the address of the [`FileCache`]),
//! its index is set, and the cache holds one reference. It is inserted `FILLING`, its contents are read only then,
//! and it becomes `UP_TO_DATE`, or `FAILED`, when they are there (`fill`).
//!
//! One spin lock orders whatever changes the index, the size, or whether a page is attached. It is a
//! leaf of the lock order: nodes are reserved before it is taken, what is taken out is dropped after it was left, and
//! files are read and written outside it. Look-ups and the validation of a fault take no lock:
//!
//! | | look-up | fault validates | read in | write | grow | remove | evict |
//! |---|---|---|---|---|---|---|---|
//! | look-up | free | free | sees `FILLING` | free | free | the size, or owner and slot, read after the reference was taken | the frozen count refuses it |
//! | fault validates | | table lock | needs `UP_TO_DATE` | free | size read before the owner | map count against `GOING` and the size | the frozen count refuses it |
//! | read in | | | the slot | waits for the page | zeroes beyond the size at its insert | a page that is filling is marked `GOING` in one step, so never up to date; it is taken out, and read anew | the reader's reference |
//! | write | | | | words | one at a time, and the lock | as if written before | the writer's reference; `DIRTY` is set before it goes |
//! | grow, remove | | | | | one at a time | one at a time | the lock |
//!
//! **Evict** freezes the count (one reference, no mapping, to none), and only then looks whether the page is dirty:
//! whoever wrote to it set `DIRTY` before giving his reference or mapping back.
//!
//! **Remove** (the file shrinks, or a hole is punched) is protocol 2; `truncate` states it.
//!
//! **Contents never return.** When a file has shrunk, no page beyond its end is in memory or mapped, and its storage has
//! forgotten them; but pages of a folio across the end that somebody holds stay, zeroed, and may be written to by who holds
//! them; small ones in the end. Growing zeroes the pages that are there beyond the old end, and only then stores the size.
//!
//! **Folios** of several pages are attached, read in and taken out whole: their first frame has the metadata, and each
//! page its slot in the index. Only a folio that nobody maps or refers to becomes small pages (its count is frozen
//! meanwhile, as for evict): at an edge of a removal. What of a folio lies beyond the end is zero by the time it is part of
//! the file.
//!
//! A page that hardware reported as bad is never free again (`poison`).

mod ahead;
mod ask;
mod cache;
mod direct;
mod error;
mod fill;
mod index;
mod io;
mod making;
#[cfg(all(test, loom))]
mod model;
mod poison;
mod shmem;
mod store;
mod sync;
#[cfg(all(test, not(loom)))]
pub(crate) mod test;
mod truncate;

pub(crate) use ahead::{Pace, Wanted};
pub(crate) use ask::MayWrite;
pub use ask::{Ask, AskGuard};
pub use cache::FileCache;
pub(crate) use cache::Lookup;
pub use direct::Direct;
pub use error::{IoError, ReadError, SizeError, SyncError, WriteBackError, WriteError};
pub(crate) use fill::Told;
pub use fill::{Fill, FillGuard};
pub use index::{CacheNode, MAX_FOLIO_ORDER};
pub(crate) use index::{Cursor, Found};
pub(crate) use poison::lose;
pub use shmem::{Shmem, ShmemHuge};
#[cfg(all(test, loom))]
pub(crate) use store::{Entries, clean_then_read};
pub use store::{Store, StoreGuard};
pub use sync::{StoreErrors, Syncing};

use core::ops::Range;

/// What the embedder supplies for a file: where its pages come from and go to.
///
/// The cache owns the size and the pages; the file, what is stored. What it stored beyond a size that was set must
/// not come back: the cache tells it what to [forget](File::forget). One file has one cache at a time.
pub trait File: Clone + Eq + Send + Sync + 'static {
    /// A number that names the file among all files.
    fn id(&self) -> u64;
    /// Fills the page at `index` (in pages of 4 KiB). It is zeroed beforehand, so what is not stored, holes and the
    /// rest of a short read, needs nothing done. Called with no lock and no pin held.
    ///
    /// A read that ends later [keeps](FillGuard::keep) the page and answers [`Io::Pending`]:
    /// ```
    /// use pagefirst::file::{Fill, FillGuard, Io, IoError};
    /// use std::sync::Mutex;
    /// struct Queue(Mutex<Vec<(u64, Fill)>>);
    /// impl Queue {
    ///     fn read(&self, index: u64, page: FillGuard<'_>) -> Io {
    ///         self.0.lock().unwrap().push((index, page.keep()));
    ///         Io::Pending
    ///     }
    ///     fn interrupt(&self, bytes: &[u8; 4096]) {
    ///         let Some((_, mut fill)) = self.0.lock().unwrap().pop() else { return };
    ///         fill.copy_from_slice(bytes);
    ///         fill.complete(Ok(()));
    ///     }
    /// }
    /// ```
    fn read(&self, index: u64, page: FillGuard<'_>) -> Io;
    /// Stores `bytes`, the part of the page at `index` that lies below the file's size; extends what is stored if
    /// need be. After [`Io::Error`] the page is dirty again. Called with no spin lock and no pin held, but with a lock of
    /// the cache: it must not store, cut or punch the same file ([`write_back`](FileCache::write_back),
    /// [`sync`](FileCache::sync), [`set_size`](FileCache::set_size), [`punch`](FileCache::punch)), nor wait for somebody who
    /// does.
    ///
    /// A write that ends later [keeps](StoreGuard::keep) the bytes, answers [`Io::Pending`], and [completes](Store::complete)
    /// them when they are stored.
    fn write(&self, index: u64, bytes: StoreGuard<'_>) -> Io;
    /// What is stored of these bytes is to read as zero from now on: the file has shrunk to where they start (then they
    /// have no end), or they are a hole. Called with no spin lock and no pin held, and before anybody reads in what of it
    /// may be read; nothing of the file begins to be stored meanwhile. It must not use the file's cache, nor wait for somebody
    /// who does.
    fn forget(&self, bytes: Range<u64>);
    /// Whether shared pages are mapped read-only until they are written, so that it is known at once which to store (a file
    /// on a disk), or writable from the first (a file in memory). What is written to a file that does not, and is stored all
    /// the same, is found by looking at every entry that maps a page of it.
    fn tracks_writes(&self) -> bool;
    /// log2 of the number of pages of the largest folio that [`folio_order`](File::folio_order) asks for, at most
    /// [`MAX_FOLIO_ORDER`]; always the same for one file.
    fn max_folio_order(&self) -> u8 {
        0
    }
    /// log2 of the number of pages of the folio to make for the page at `index`, which is not in memory, of a file of
    /// `size` bytes. A folio lies at a multiple of its size in the file, so the order says
    /// which pages are in it. The library makes a smaller one where pages are there already, where memory is short, and
    /// where one of the pages cannot be read.
    ///
    /// A folio of 2 MiB can be mapped by one entry. Whatever the order, no page is mapped that lies beyond the end.
    fn folio_order(&self, _index: u64, _size: u64, _hint: Hint) -> u8 {
        0
    }
    /// Whether [`page_mkwrite`](File::page_mkwrite) is to be called. Only for a file that tracks writes.
    fn has_mkwrite(&self) -> bool {
        false
    }
    /// Asked each time before the shared page at `index` of a file that tracks writes becomes writable, so that the file can
    /// find room for it, note the time, or slow down who writes too fast. With it all `pages` become dirty, which are of one
    /// folio, and one entry may map them all: room is found for them too, as far as they lie below the end; if the file
    /// grows later, for the rest of them then. [`Io::Error`] refuses: the program gets SIGBUS.
    ///
    /// Called with no lock and no pin held. A file that has to wait [keeps](AskGuard::keep) the question, drops it when
    /// it is time to ask again, from any context, and answers [`Io::Pending`]. After an answer the fault looks again, and
    /// may come to nothing, or ask again. Only a fault that succeeds makes the page dirty.
    fn page_mkwrite(&self, _index: u64, _pages: Range<u64>, _ask: AskGuard<'_>) -> Io {
        Io::Ready
    }
    /// The most pages to read ahead at a time of who reads in sequence; 0 for none, which is best where reading takes no
    /// time.
    fn read_ahead(&self) -> u32 {
        0
    }
    /// Whether the file is memory itself, and [`direct`](File::direct) tells where; always the same for one file. Its
    /// cache then has its size and no pages, and is not read or written.
    fn is_direct(&self) -> bool {
        false
    }
    /// Where the page at `index` is in memory, with what lies beside it: a fault maps that by the largest entry that fits.
    /// For a shared write the file takes all that it answers for written: it is asked about each page before that becomes
    /// writable, if it [tracks writes](File::tracks_writes), and again after it had that [taken
    /// back](FileCache::clean). The memory stays the file's until it is to
    /// [forget](File::forget) the page; it zeroes what a removal leaves of pages at its edges itself. A fault that began
    /// before may read it even then, for a private copy that it throws away: so it stays memory.
    ///
    /// Called with no lock and no pin held.
    ///
    /// # Errors
    /// [`IoError`]: the program gets SIGBUS.
    fn direct(&self, _index: u64, _write: bool) -> Result<Direct, IoError> {
        Err(IoError)
    }
    /// Whether pages can be stored and read again. What is written to a file that cannot, stays in memory, and what is not
    /// in memory of it is zero: nothing is read for that but for a mapping.
    fn is_stored(&self) -> bool {
        true
    }
}

/// What is known about a page that is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Hint {
    /// Nothing.
    #[default]
    None,
    /// It is wanted for a mapping that was advised to have huge pages ([`Advice::Huge`](crate::space::Advice::Huge)).
    Huge,
    /// It is wanted for a mapping that was advised to have none ([`Advice::NoHuge`](crate::space::Advice::NoHuge)).
    Small,
}

/// How a read ended. Whoever kept the page says so by [`Fill::complete`], whatever he answers here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Io {
    /// The page holds what the file says.
    Ready,
    /// The page is kept, and will be completed.
    Pending,
    /// It could not be read.
    Error,
}
