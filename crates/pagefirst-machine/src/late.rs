//! Reads and writes of files that end later.

use crate::cpu;
use crate::file::{MachineFile, WeakFile};
use crate::sync::{Mutex, spawn};
use pagefirst::file::{Fill, Store};
use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

/// When the reads of a file end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Late {
    /// When [`MachineFile::finish`] says so.
    Held,
    /// After a time up to this, each another; by a thread of the file's, not always in the order in which they began.
    Within(Duration),
}

/// What a file's reads wait in.
pub(crate) struct Device {
    late: Late,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    reads: VecDeque<Read>,
    begun: u64,
    has_thread: bool,
}

struct Read {
    index: u64,
    due: Instant,
    work: Work,
}

/// What is to be read, or written.
pub(crate) enum Work {
    Fill(Fill),
    Store(Store),
}

impl Device {
    pub fn new(late: Late) -> Self {
        Device { late, queue: Mutex::default() }
    }

    pub fn begin(&self, file: &MachineFile, index: u64, work: Work) {
        let mut queue = self.queue.lock();
        queue.begun += 1;
        let delay = match self.late {
            Late::Held => Duration::ZERO,
            // It knows no time.
            Late::Within(_) if cfg!(shuttle) => Duration::ZERO,
            // By chance enough, and the same in every run.
            Late::Within(most) => most * (queue.begun.wrapping_mul(0x9e37_79b9) >> 8 & 0xff) as u32 / 0xff,
        };
        queue.reads.push_back(Read { index, due: Instant::now() + delay, work });
        if self.late != Late::Held && !queue.has_thread {
            queue.has_thread = true;
            let file = WeakFile::of(file);
            spawn(move || while file.get().is_some_and(|file| file.work()) {});
        }
    }

    pub fn queued(&self) -> Vec<u64> {
        self.queue.lock().reads.iter().map(|read| read.index).collect()
    }

    pub fn take(&self, index: u64) -> Option<Work> {
        let mut queue = self.queue.lock();
        let at = queue.reads.iter().position(|read| read.index == index)?;
        queue.reads.remove(at).map(|read| read.work)
    }

    /// Takes out what was to be stored of these pages.
    pub fn give_up_stores(&self, pages: &Range<u64>) -> Vec<Store> {
        let mut stores = Vec::new();
        let mut queue = self.queue.lock();
        let mut left = VecDeque::new();
        for read in queue.reads.drain(..) {
            match read.work {
                Work::Store(store) if pages.contains(&read.index) => stores.push(store),
                work => left.push_back(Read { work, ..read }),
            }
        }
        queue.reads = left;
        stores
    }

    /// What is due first, when it is due; `None` when there is nothing left, and the thread ends.
    pub fn next(&self) -> Option<Result<(u64, Work), Duration>> {
        let mut queue = self.queue.lock();
        let Some((at, due)) = queue.reads.iter().map(|read| read.due).enumerate().min_by_key(|(_, due)| *due)
        else {
            // Before another thread may begin, which wants a number too.
            cpu::release_all();
            queue.has_thread = false;
            return None;
        };
        let left = due.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            return Some(Err(left));
        }
        queue.reads.remove(at).map(|read| Ok((read.index, read.work)))
    }
}
