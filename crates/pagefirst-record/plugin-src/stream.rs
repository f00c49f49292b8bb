//! The stream to the driver: one for the process, behind one lock.
//!
//! - The recorded program shares the emulator's file descriptors. Ours has a high number; a call that would close it
//!   makes us close it first and open the pipe again afterwards.
//! - A child process writes to the same pipe, under a key of its own. The lock is held while the process is copied, so
//!   that what the parent reports before is what the child begins with.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::raw;

/// Bytes gathered before they are written.
const BUFFER: usize = 1 << 16;

/// The pipe's descriptor, or -1, for those who can't take the lock.
static DESCRIPTOR: AtomicI32 = AtomicI32::new(-1);
static STREAM: Mutex<Stream> = Mutex::new(Stream {
    path: String::new(),
    process: raw::FIRST_PROCESS,
    file: None,
    buffer: Vec::new(),
    threads: Vec::new(),
    started: 0,
    sized: Vec::new(),
    brk: 0,
    ended: false,
});

unsafe extern "C" {
    safe fn fcntl(fd: i32, command: i32, argument: i64) -> i32;
    fn getrandom(buffer: *mut u64, len: usize, flags: u32) -> isize;
}

/// A file that was mapped, and its size when last seen.
pub struct Sized {
    pub device: u64,
    pub inode: u64,
    pub size: u64,
}

/// What the lock protects.
pub struct Stream {
    path: String,
    /// This process's key.
    process: u64,
    file: Option<File>,
    buffer: Vec<u8>,
    /// By index of the virtual CPU, which are reused: the number of the thread that it is now.
    threads: Vec<u32>,
    started: u32,
    /// The files that were mapped.
    pub sized: Vec<Sized>,
    /// The end of the heap when last seen.
    pub brk: u64,
    ended: bool,
}

/// Opens the pipe.
pub fn open(path: String, process: u64) -> std::io::Result<()> {
    let mut stream = lock();
    (stream.path, stream.process) = (path, process);
    stream.buffer.reserve(BUFFER + 4096);
    stream.reopen()
}

/// The stream.
pub fn lock() -> MutexGuard<'static, Stream> {
    STREAM.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A key that no other process has.
fn key() -> u64 {
    let mut key = 0;
    // SAFETY: `key` can be written, for 8 bytes.
    let got = unsafe { getrandom(&mut key, size_of::<u64>(), 0) };
    // Only kernels older than 3.17 have no random numbers.
    if got == size_of::<u64>() as isize { key } else { u64::from(std::process::id()) << 32 }
}

/// The pipe's descriptor.
pub fn descriptor() -> RawFd {
    DESCRIPTOR.load(Ordering::Relaxed)
}

impl Stream {
    fn reopen(&mut self) -> std::io::Result<()> {
        const F_DUPFD_CLOEXEC: i32 = 1030;
        let low = OpenOptions::new().write(true).open(&self.path)?;
        // The first of these that the limit on descriptors allows.
        let high = |least| fcntl(low.as_raw_fd(), F_DUPFD_CLOEXEC, least);
        let file = match [65_000, 4_000, 1_000, 200].into_iter().map(high).find(|&fd| fd >= 0) {
            // SAFETY: fcntl has just made this descriptor, and nobody else knows it.
            Some(fd) => unsafe { File::from_raw_fd(fd) },
            None => low,
        };
        DESCRIPTOR.store(file.as_raw_fd(), Ordering::Relaxed);
        self.file = Some(file);
        Ok(())
    }

    /// Before a call of the program that may close the pipe.
    pub fn step_aside(&mut self) {
        self.flush();
        self.file = None;
        DESCRIPTOR.store(-1, Ordering::Relaxed);
    }

    /// After that call.
    pub fn step_back(&mut self) {
        if self.file.is_none() && !self.ended {
            // If that fails, the stream ends here; the driver notices that its end is missing.
            self.ended = self.reopen().is_err();
        }
    }

    /// Writes what was gathered.
    pub fn flush(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        if let Some(file) = &mut self.file {
            for piece in self.buffer.chunks(raw::FRAME - raw::FRAME_HEADER) {
                let head = [&self.process.to_le_bytes()[..], &(piece.len() as u16).to_le_bytes()].concat();
                // One call for one frame, so that frames of several processes don't mix.
                self.ended |= file.write_all(&[&head, piece].concat()).is_err();
            }
        }
        self.buffer.clear();
    }

    fn done(&mut self) {
        if self.ended {
            self.buffer.clear();
        } else if self.buffer.len() >= BUFFER && self.file.is_some() {
            self.flush();
        }
    }

    fn kind(&mut self, kind: u8) -> &mut Self {
        self.byte(kind)
    }

    fn thread(&mut self, cpu: u32) -> &mut Self {
        let thread = self.threads.get(cpu as usize).copied().unwrap_or(0);
        self.buffer.extend(thread.to_le_bytes());
        self
    }

    fn byte(&mut self, byte: u8) -> &mut Self {
        self.buffer.push(byte);
        self
    }

    fn numbers(&mut self, numbers: &[u64]) -> &mut Self {
        self.buffer.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        self
    }

    fn text(&mut self, text: &[u8]) -> &mut Self {
        self.buffer.extend((text.len() as u32).to_le_bytes());
        self.buffer.extend(text);
        self
    }

    pub fn touch(&mut self, cpu: u32, flags: u8, page: u64) {
        self.kind(raw::TOUCH | flags).thread(cpu).numbers(&[page << 12]).done();
    }

    pub fn enter(&mut self, cpu: u32, number: u64, arguments: &[u64; 6]) {
        self.kind(raw::ENTER).thread(cpu).numbers(&[number]).numbers(arguments).done();
    }

    pub fn leave(&mut self, cpu: u32, number: u64, arguments: &[u64; 6], result: u64) {
        self.kind(raw::RETURN).thread(cpu).numbers(&[number]).numbers(arguments).numbers(&[result]).done();
    }

    pub fn maps(&mut self, maps: &[u8]) {
        self.kind(raw::MAPS).text(maps).done();
    }

    pub fn mapped_file(&mut self, cpu: u32, device: u64, inode: u64, size: u64, name: &[u8]) {
        self.kind(raw::FILE).thread(cpu).numbers(&[device, inode, size]).text(name).done();
    }

    pub fn file_size(&mut self, device: u64, inode: u64, size: u64) {
        self.kind(raw::FILE_SIZE).numbers(&[device, inode, size]).done();
    }

    pub fn thread_start(&mut self, cpu: u32) {
        let (cpu, thread) = (cpu as usize, self.started);
        if self.threads.len() <= cpu {
            self.threads.resize(cpu + 1, 0);
        }
        self.threads[cpu] = thread;
        self.started += 1;
        if thread > 0 {
            self.kind(raw::THREAD_START).thread(cpu as u32).done();
        }
    }

    pub fn thread_exit(&mut self, cpu: u32) {
        self.kind(raw::THREAD_EXIT).thread(cpu).done();
    }

    /// Before the process is copied: the child's key.
    pub fn fork(&mut self, cpu: u32, shares_memory: bool) -> u64 {
        let child = key();
        self.kind(raw::FORK).thread(cpu).numbers(&[child]).byte(shares_memory.into());
        self.flush();
        child
    }

    /// In the copy. Of the threads only the one that made it is there.
    pub fn become_child(&mut self, key: u64) {
        self.process = key;
        self.buffer.clear();
        self.threads.clear();
        self.started = 1;
    }

    pub fn fork_failed(&mut self, child: u64) {
        self.kind(raw::FORK_FAILED).numbers(&[child]).done();
    }

    pub fn exec(&mut self, cpu: u32, accesses: u64, argument_bytes: u64, name: &[u8]) {
        self.kind(raw::EXEC).thread(cpu).numbers(&[accesses, argument_bytes]).text(name).flush();
    }

    pub fn exec_failed(&mut self) {
        self.kind(raw::EXEC_FAILED).done();
    }

    /// This process's key.
    pub fn process(&self) -> u64 {
        self.process
    }

    pub fn end(&mut self, accesses: u64, status: u64) {
        if !self.ended {
            self.kind(raw::END).numbers(&[accesses, status]);
            self.flush();
            self.ended = true;
        }
    }
}
