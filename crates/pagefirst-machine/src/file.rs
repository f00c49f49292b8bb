//! Files for the machine's file mappings: in memory, or on the host's disk.

use crate::late::{Device, Late, Work};
use crate::sync::{Mutex, sleep, unique};
use pagefirst::file::{
    Ask, AskGuard, Direct, File, FillGuard, Hint, Io, IoError, Shmem, ShmemHuge, StoreGuard,
};
use pagefirst::types::PAGE_SIZE;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};

/// A file. Clones are the same file; its size is its cache's.
///
/// ```
/// use pagefirst::file::File;
/// use pagefirst_machine::MachineFile;
/// let file = MachineFile::from_bytes(b"contents");
/// assert!(file.clone() == file && MachineFile::zeros() != file);
/// assert_eq!(file.stored(0), b""); // nothing was written
/// ```
#[derive(Clone)]
pub struct MachineFile(Arc<Inner>);

struct Inner {
    id: u64,
    body: Body,
    tracks_writes: bool,
    /// Which folios it wants.
    folios: Shmem,
    failing: Mutex<BTreeSet<u64>>,
    failing_writes: Mutex<BTreeSet<u64>>,
    /// Writes end later too.
    stores_late: bool,
    /// Held while one of the reads and writes that end later is taken and done.
    busy: Mutex<()>,
    read_ahead: u32,
    /// What it says when it is asked before a page becomes writable.
    says: Option<Says>,
    /// Questions it has not answered yet.
    asked: Mutex<Vec<(u64, Ask)>>,
    /// Where it is, if it is memory itself.
    place: Option<Place>,
    /// There if reads end later.
    late: Option<Device>,
    reads: AtomicU64,
    writes: AtomicU64,
}

type Place = Box<dyn Fn(u64, bool) -> Result<Direct, IoError> + Send + Sync>;
type Says = Box<dyn Fn(u64, Range<u64>) -> Io + Send + Sync>;

enum Body {
    /// What `unwritten` says at an offset, except for pages that were stored, and zero where it is to forget.
    Memory { stored: Mutex<Stored>, unwritten: Unwritten },
    /// A file of the host.
    Host(std::fs::File),
    /// Memory and nothing else.
    Shmem,
}

enum Unwritten {
    Zeros,
    Says(Box<dyn Fn(u64) -> u8 + Send + Sync>),
}

/// What a file in memory was told to keep.
struct Stored {
    pages: BTreeMap<u64, Vec<u8>>,
    holes: Vec<Range<u64>>,
}

impl MachineFile {
    fn new(body: Body, tracks_writes: bool) -> Self {
        let id = unique();
        let failing = Mutex::default();
        let (reads, writes) = (AtomicU64::new(0), AtomicU64::new(0));
        let folios = Shmem::new(id, ShmemHuge::Never);
        MachineFile(Arc::new(Inner {
            id,
            body,
            tracks_writes,
            folios,
            failing,
            failing_writes: Mutex::default(),
            stores_late: false,
            busy: Mutex::default(),
            read_ahead: 0,
            says: None,
            asked: Mutex::default(),
            place: None,
            late: None,
            reads,
            writes,
        }))
    }

    /// In memory, zero until written. It does not track writes.
    pub fn zeros() -> Self {
        Self::memory(Unwritten::Zeros)
    }

    /// In memory, with this function's value at each offset until written. It does not track writes.
    pub fn pattern(unwritten: impl Fn(u64) -> u8 + Send + Sync + 'static) -> Self {
        Self::memory(Unwritten::Says(Box::new(unwritten)))
    }

    fn memory(unwritten: Unwritten) -> Self {
        let stored = Mutex::new(Stored { pages: BTreeMap::new(), holes: Vec::new() });
        Self::new(Body::Memory { stored, unwritten }, false)
    }

    /// In memory, with these contents and zeros after them. It does not track writes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let bytes = bytes.to_vec();
        Self::pattern(move |at| usize::try_from(at).ok().and_then(|i| bytes.get(i).copied()).unwrap_or(0))
    }

    /// A memory file ([`Shmem`]).
    pub fn shmem(huge: ShmemHuge) -> Self {
        let mut file = Self::new(Body::Shmem, false);
        file.inner().folios = Shmem::new(file.id(), huge);
        file
    }

    /// The same file, fresh, with folios of at most 2^`order` pages. One that never had any has them within its size.
    ///
    /// # Panics
    /// When the file was cloned before: that is settled when it is made.
    #[must_use]
    pub fn with_folios(mut self, order: u8) -> Self {
        let huge = match self.0.folios.huge() {
            ShmemHuge::Never => ShmemHuge::WithinSize,
            huge => huge,
        };
        self.inner().folios = Shmem::new(self.0.id, huge).with_order(order);
        self
    }

    fn inner(&mut self) -> &mut Inner {
        Arc::get_mut(&mut self.0).expect("a file not cloned yet")
    }

    /// A file of the host, read and written at offsets. It tracks writes.
    pub fn host(file: std::fs::File) -> Self {
        Self::new(Body::Host(file), true)
    }

    /// The same file, fresh, that tracks writes or does not.
    ///
    /// # Panics
    /// When the file was cloned before: that is settled when it is made.
    #[must_use]
    pub fn with_tracking(mut self, tracks_writes: bool) -> Self {
        self.inner().tracks_writes = tracks_writes;
        self
    }

    /// The same file, fresh, which is memory itself: where its pages are, by index, for a write or not.
    ///
    /// # Panics
    /// When the file was cloned before: that is settled when it is made.
    #[must_use]
    pub fn placed(
        mut self,
        place: impl Fn(u64, bool) -> Result<Direct, IoError> + Send + Sync + 'static,
    ) -> Self {
        self.inner().place = Some(Box::new(place));
        self
    }

    /// The same file, fresh, which tracks writes and is asked before a page becomes writable: what it says then of each, and
    /// the pages of its folio. What is [`Io::Pending`] waits for [`answer`](Self::answer).
    ///
    /// # Panics
    /// When the file was cloned before.
    #[must_use]
    pub fn with_mkwrite(mut self, says: impl Fn(u64, Range<u64>) -> Io + Send + Sync + 'static) -> Self {
        self.inner().says = Some(Box::new(says));
        self.with_tracking(true)
    }

    /// Lets those ask again who wait for an answer about this page; false if nobody does.
    pub fn answer(&self, index: u64) -> bool {
        let mut asked = self.0.asked.lock();
        let at = asked.iter().position(|(of, _)| *of == index);
        let ask = at.map(|at| asked.swap_remove(at));
        drop(asked);
        ask.is_some()
    }

    /// The same file, fresh, of which up to so many pages are read ahead.
    ///
    /// # Panics
    /// When the file was cloned before.
    #[must_use]
    pub fn with_read_ahead(mut self, pages: u32) -> Self {
        self.inner().read_ahead = pages;
        self
    }

    /// The same file, fresh, whose reads end later: by another thread, which is one more CPU of the machine, or when
    /// [`finish`](Self::finish) says so.
    ///
    /// # Panics
    /// When the file was cloned before.
    #[must_use]
    pub fn late(mut self, late: Late) -> Self {
        self.inner().late = Some(Device::new(late));
        self
    }

    /// The same for writes.
    ///
    /// # Panics
    /// When the file was cloned before.
    #[must_use]
    pub fn late_writes(mut self) -> Self {
        self.inner().stores_late = true;
        self
    }

    /// The pages whose reads, or writes, have begun and not ended, of a file whose reads end later. One that is just being
    /// done is waited for.
    pub fn pending(&self) -> Vec<u64> {
        let _busy = self.0.busy.lock();
        self.queued()
    }

    fn queued(&self) -> Vec<u64> {
        self.0.late.as_ref().map(Device::queued).unwrap_or_default()
    }

    /// Ends the read of this page; false if it has not begun.
    pub fn finish(&self, index: u64) -> bool {
        let _busy = self.0.busy.lock();
        let work = self.0.late.as_ref().and_then(|device| device.take(index));
        work.map(|work| self.end(index, work)).is_some()
    }

    /// Ends the read that began first.
    pub fn finish_one(&self) -> bool {
        self.queued().first().is_some_and(|index| self.finish(*index))
    }

    /// Loses the page of a read that has begun, as a driver's mistake would.
    pub fn lose(&self, index: u64) {
        drop(self.0.late.as_ref().and_then(|device| device.take(index)));
    }

    /// What a thread of the file's does once; false when there is nothing to do.
    pub(crate) fn work(&self) -> bool {
        let busy = self.0.busy.lock();
        match self.0.late.as_ref().and_then(Device::next) {
            Some(Ok((index, work))) => self.end(index, work),
            Some(Err(left)) => {
                drop(busy);
                sleep(left);
            }
            None => return false,
        }
        true
    }

    fn end(&self, index: u64, work: Work) {
        let result = |io| if io == Io::Ready { Ok(()) } else { Err(IoError) };
        match work {
            Work::Fill(mut fill) => {
                let io = self.0.read(index, &mut fill);
                fill.complete(result(io));
            }
            Work::Store(store) => {
                let io = self.0.write(index, &store);
                store.complete(result(io));
            }
        }
    }

    /// Reads of this page fail from now on, or no longer do.
    pub fn fail_reads(&self, index: u64, fail: bool) {
        let mut failing = self.0.failing.lock();
        if fail {
            failing.insert(index)
        } else {
            failing.remove(&index)
        };
    }

    /// Writes of this page fail from now on, or no longer do.
    pub fn fail_writes(&self, index: u64, fail: bool) {
        let mut failing = self.0.failing_writes.lock();
        if fail {
            failing.insert(index)
        } else {
            failing.remove(&index)
        };
    }

    /// Pages asked for so far.
    pub fn reads(&self) -> u64 {
        self.0.reads.load(Relaxed)
    }

    /// Pages stored so far.
    pub fn writes(&self) -> u64 {
        self.0.writes.load(Relaxed)
    }

    /// What was stored for this page; empty for a page never stored, and for a file of the host.
    pub fn stored(&self, index: u64) -> Vec<u8> {
        match &self.0.body {
            Body::Memory { stored, .. } => stored.lock().pages.get(&index).cloned().unwrap_or_default(),
            Body::Host(_) | Body::Shmem => Vec::new(),
        }
    }
}

impl Stored {
    /// What is stored of a page, and the holes that reach into it.
    fn page(&self, index: u64) -> (Vec<u8>, Vec<Range<u64>>) {
        let (start, end) = (index * PAGE_SIZE, (index + 1).saturating_mul(PAGE_SIZE));
        let holes = self.holes.iter().filter(|hole| hole.start < end && start < hole.end);
        (self.pages.get(&index).cloned().unwrap_or_default(), holes.cloned().collect())
    }
    fn forget(&mut self, hole: Range<u64>) {
        self.pages.retain(|index, page| {
            let at = |byte: u64| byte.saturating_sub(index * PAGE_SIZE).min(page.len() as u64) as usize;
            let part = at(hole.start)..at(hole.end);
            let whole = part.len() == page.len();
            page[part].fill(0);
            !whole
        });
        let overlaps = |known: &Range<u64>| known.start <= hole.end && hole.start <= known.end;
        let known = self.holes.iter().filter(|known| overlaps(known));
        let hole = known.fold(hole.clone(), |a, b| a.start.min(b.start)..a.end.max(b.end));
        self.holes.retain(|known| !overlaps(known));
        self.holes.push(hole);
    }
}

/// Makes these bytes of a file of the host read as zero, those beyond its end included.
fn cut(file: &std::fs::File, bytes: Range<u64>) -> std::io::Result<()> {
    let end = file.metadata()?.len();
    if bytes.end >= end {
        return if bytes.start < end { file.set_len(bytes.start) } else { Ok(()) };
    }
    let mut at = bytes.start;
    while at < bytes.end {
        let n = (bytes.end - at).min(PAGE_SIZE);
        file.write_all_at(&[0; PAGE_SIZE as usize][..n as usize], at)?;
        at += n;
    }
    Ok(())
}

impl Inner {
    /// Reads a page, zeroed, now.
    fn read(&self, index: u64, page: &mut [u8]) -> Io {
        if self.failing.lock().contains(&index) {
            return Io::Error;
        }
        let start = index * PAGE_SIZE;
        match &self.body {
            Body::Memory { stored, unwritten } => {
                let (known, holes) = stored.lock().page(index);
                let n = known.len().min(page.len());
                page[..n].copy_from_slice(&known[..n]);
                // The rest is zero already.
                if let Unwritten::Says(unwritten) = unwritten {
                    for (at, byte) in (start..).zip(page.iter_mut()).skip(n) {
                        *byte = if holes.iter().any(|hole| hole.contains(&at)) { 0 } else { unwritten(at) };
                    }
                }
                Io::Ready
            }
            Body::Host(file) => {
                let mut done = 0;
                while done < page.len() {
                    match file.read_at(&mut page[done..], start + done as u64) {
                        Ok(0) => break, // the end; the rest of the page is zero
                        Ok(n) => done += n,
                        Err(e) if e.kind() == ErrorKind::Interrupted => {}
                        Err(_) => return Io::Error,
                    }
                }
                Io::Ready
            }
            // Zeroed already.
            Body::Shmem => Io::Ready,
        }
    }

    /// Stores a page, now.
    fn write(&self, index: u64, bytes: &[u8]) -> Io {
        if self.failing_writes.lock().contains(&index) {
            return Io::Error;
        }
        match &self.body {
            Body::Memory { stored, .. } => {
                stored.lock().pages.insert(index, bytes.to_vec());
                Io::Ready
            }
            Body::Host(file) => match file.write_all_at(bytes, index * PAGE_SIZE) {
                Ok(()) => Io::Ready,
                Err(_) => Io::Error,
            },
            Body::Shmem => Io::Error,
        }
    }
}

/// A file that may be gone.
pub(crate) struct WeakFile(Weak<Inner>);

impl WeakFile {
    pub fn of(file: &MachineFile) -> Self {
        WeakFile(Arc::downgrade(&file.0))
    }
    pub fn get(&self) -> Option<MachineFile> {
        self.0.upgrade().map(MachineFile)
    }
}

impl PartialEq for MachineFile {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}
impl Eq for MachineFile {}

impl fmt::Debug for MachineFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.0.body {
            Body::Memory { .. } => "in memory",
            Body::Host(_) => "of the host",
            Body::Shmem => "that is memory",
        };
        write!(f, "file {} {kind}", self.0.id)
    }
}

impl File for MachineFile {
    fn id(&self) -> u64 {
        self.0.id
    }

    fn read(&self, index: u64, mut page: FillGuard<'_>) -> Io {
        self.0.reads.fetch_add(1, Relaxed);
        match &self.0.late {
            Some(device) => {
                device.begin(self, index, Work::Fill(page.keep()));
                Io::Pending
            }
            None => self.0.read(index, &mut page),
        }
    }

    fn write(&self, index: u64, bytes: StoreGuard<'_>) -> Io {
        self.0.writes.fetch_add(1, Relaxed);
        match &self.0.late {
            Some(device) if self.0.stores_late => {
                device.begin(self, index, Work::Store(bytes.keep()));
                Io::Pending
            }
            _ => self.0.write(index, &bytes),
        }
    }

    fn forget(&self, bytes: Range<u64>) {
        // What has not been stored yet is not to be.
        let _busy = self.0.busy.lock();
        if let Some(device) = &self.0.late {
            let pages = bytes.start / PAGE_SIZE..bytes.end.div_ceil(PAGE_SIZE);
            device.give_up_stores(&pages).into_iter().for_each(|store| store.complete(Err(IoError)));
        }
        match &self.0.body {
            Body::Memory { stored, .. } => stored.lock().forget(bytes),
            Body::Host(file) => cut(file, bytes).expect("the host forgets what it stored"),
            Body::Shmem => {}
        }
    }

    fn tracks_writes(&self) -> bool {
        self.0.tracks_writes
    }

    fn max_folio_order(&self) -> u8 {
        self.0.folios.max_folio_order()
    }

    fn folio_order(&self, index: u64, size: u64, hint: Hint) -> u8 {
        self.0.folios.folio_order(index, size, hint)
    }

    fn is_direct(&self) -> bool {
        self.0.place.is_some()
    }

    fn direct(&self, index: u64, write: bool) -> Result<Direct, IoError> {
        let asked = if write { &self.0.writes } else { &self.0.reads };
        asked.fetch_add(1, Relaxed);
        self.0.place.as_ref().ok_or(IoError).and_then(|place| place(index, write))
    }

    fn has_mkwrite(&self) -> bool {
        self.0.says.is_some()
    }

    fn page_mkwrite(&self, index: u64, pages: Range<u64>, ask: AskGuard<'_>) -> Io {
        let answer = self.0.says.as_ref().map_or(Io::Ready, |says| says(index, pages));
        if answer == Io::Pending {
            self.0.asked.lock().extend(ask.keep().map(|ask| (index, ask)));
        }
        answer
    }

    fn read_ahead(&self) -> u32 {
        self.0.read_ahead
    }

    fn is_stored(&self) -> bool {
        !matches!(self.0.body, Body::Shmem)
    }
}
