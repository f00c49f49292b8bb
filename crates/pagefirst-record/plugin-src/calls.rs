//! System calls: which are reported, when, and what of the filter they invalidate.
//!
//! What takes memory away is reported before it happens, what brings memory after it has happened. So when another
//! thread gets the same addresses meanwhile, the stream has both in the order in which the addresses changed hands.

use std::cell::Cell;
use std::fs::{self, File};
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use crate::buffers::{self, Side};
use crate::raw::number::{BRK, MADVISE, MMAP, MPROTECT, MREMAP, MUNMAP, PKEY_MPROTECT};
use crate::stream::{self, Sized, Stream};
use crate::{filter, processes, raw, touch};

const WRITE: u64 = 1;
const CLOSE: u64 = 3;
const PWRITE: u64 = 18;
const WRITEV: u64 = 20;
const DUP2: u64 = 33;
const SENDFILE: u64 = 40;
const CLONE: u64 = 56;
const FORK: u64 = 57;
const VFORK: u64 = 58;
const EXECVE: u64 = 59;
const EXIT: u64 = 60;
const FTRUNCATE: u64 = 77;
const EXIT_GROUP: u64 = 231;
const FALLOCATE: u64 = 285;
const DUP3: u64 = 292;
const PWRITEV: u64 = 296;
const EXECVEAT: u64 = 322;
const COPY_FILE_RANGE: u64 = 326;
const CLONE3: u64 = 435;
const CLOSE_RANGE: u64 = 436;

thread_local! {
    /// The arguments of the call that this thread is in.
    static ARGUMENTS: Cell<[u64; 6]> = const { Cell::new([0; 6]) };
}

/// A call begins.
pub fn enter(cpu: u32, number: u64, arguments: [u64; 6]) {
    ARGUMENTS.set(arguments);
    let [a, b, c, d, ..] = arguments;
    match number {
        EXECVE => processes::exec(cpu, None, a, b, c),
        EXECVEAT => processes::exec(cpu, Some(a as i32), b, c, d),
        FORK | VFORK | CLONE | CLONE3 => processes::enter_fork(cpu, shares_memory(number, a)),
        EXIT_GROUP | EXIT => crate::note_status(a),
        _ => {}
    }
    let mut stream = stream::lock();
    match number {
        MUNMAP | MREMAP => {
            stream.enter(cpu, number, &arguments);
            filter::forget(a, b);
        }
        _ if closes(number, a, b) => stream.step_aside(),
        _ => {}
    }
    // A program that is killed says no good-bye: what is lost then happened after its last call.
    stream.flush();
}

/// The call that this thread is in is over.
pub fn leave(cpu: u32, number: u64, result: i64) {
    let arguments @ [a, b, c, ..] = ARGUMENTS.get();
    let failed = (-4095..0).contains(&result);
    match number {
        MMAP | MPROTECT | PKEY_MPROTECT | MREMAP | MADVISE | BRK => {
            let mut stream = stream::lock();
            if !failed && number == MMAP {
                name_file(&mut stream, cpu, &arguments);
            }
            stream.leave(cpu, number, &arguments, result as u64);
            match number {
                _ if failed => {}
                MMAP => filter::forget(result as u64, b),
                MREMAP => {
                    filter::forget(a, b);
                    filter::forget(result as u64, c);
                }
                MADVISE if !forgets(c) => {}
                BRK => {
                    let (old, new) = (stream.brk, result as u64);
                    if old != 0 {
                        filter::forget(old.min(new).next_multiple_of(4096), old.abs_diff(new));
                    }
                    stream.brk = new;
                }
                _ => filter::forget(a, b),
            }
        }
        FORK | VFORK | CLONE | CLONE3 => processes::leave_fork(failed),
        EXECVE | EXECVEAT => stream::lock().exec_failed(),
        CLOSE | DUP2 | DUP3 | CLOSE_RANGE => stream::lock().step_back(),
        WRITE | WRITEV | PWRITE | PWRITEV | FTRUNCATE | FALLOCATE | SENDFILE if !failed => resized(a),
        COPY_FILE_RANGE if !failed => resized(c),
        _ => {}
    }
    buffers::of_call(number, &arguments, result, |address, len, side| {
        let (bit, flag) = match side {
            Side::Filled => (filter::WRITE, raw::TOUCH_WRITE),
            Side::Taken => (filter::READ, 0),
        };
        if address != 0 && len > 0 {
            for page in address >> 12..=address.saturating_add(len - 1) >> 12 {
                touch(cpu, page, bit, flag | raw::TOUCH_KERNEL);
            }
        }
    });
}

/// Whether advice takes pages away: `MADV_DONTNEED`, `FREE`, `REMOVE`, `PAGEOUT`, `DONTNEED_LOCKED`.
fn forgets(advice: u64) -> bool {
    matches!(advice, 4 | 8 | 9 | 21 | 24)
}

/// Whether the call would close the stream.
fn closes(number: u64, a: u64, b: u64) -> bool {
    let ours = stream::descriptor();
    let is_ours = |fd: u64| ours >= 0 && fd as i32 == ours;
    match number {
        CLOSE => is_ours(a),
        DUP2 | DUP3 => is_ours(b),
        CLOSE_RANGE => ours >= 0 && (a as u32..=b as u32).contains(&(ours as u32)),
        _ => false,
    }
}

/// Whether a new process has the memory of its parent until it executes a program, and the parent waits for that.
fn shares_memory(number: u64, first: u64) -> bool {
    const CLONE_VM: u64 = 0x100;
    const CLONE_VFORK: u64 = 0x4000;
    let flags = match number {
        CLONE => first,
        CLONE3 => buffers::number(first),
        VFORK => return true,
        _ => return false,
    };
    flags & (CLONE_VM | CLONE_VFORK) == CLONE_VM | CLONE_VFORK
}

/// Says which file an `mmap` has mapped.
fn name_file(stream: &mut Stream, cpu: u32, arguments: &[u64; 6]) {
    const MAP_ANONYMOUS: u64 = 0x20;
    let descriptor = arguments[4] as i32;
    if arguments[3] & MAP_ANONYMOUS != 0 || descriptor < 0 {
        return;
    }
    let Some((device, inode, size)) = identity(descriptor) else { return };
    let path = fs::read_link(format!("/proc/self/fd/{descriptor}")).unwrap_or_default();
    let name = path.file_name().unwrap_or_default().as_bytes();
    stream.mapped_file(cpu, device, inode, size, name);
    if let Some(known) = stream.sized.iter_mut().find(|file| (file.device, file.inode) == (device, inode)) {
        known.size = size;
    } else {
        stream.sized.push(Sized { device, inode, size });
    }
}

/// Says a file's size if the file was mapped and the size has changed.
fn resized(descriptor: u64) {
    let mut stream = stream::lock();
    if stream.sized.is_empty() {
        return;
    }
    let Some((device, inode, size)) = identity(descriptor as i32) else { return };
    let known = stream.sized.iter_mut().find(|file| (file.device, file.inode) == (device, inode));
    if let Some(known) = known
        && known.size != size
    {
        known.size = size;
        stream.file_size(device, inode, size);
    }
}

/// A regular file's device, inode and size.
fn identity(descriptor: i32) -> Option<(u64, u64, u64)> {
    if descriptor < 0 {
        return None;
    }
    // SAFETY: the file is never dropped, so the program's descriptor stays open; if it is closed or replaced
    // meanwhile by another thread of the program, the answer is an error or of the other file.
    let file = ManuallyDrop::new(unsafe { File::from_raw_fd(descriptor) });
    let metadata = file.metadata().ok().filter(|metadata| metadata.is_file())?;
    Some((metadata.dev(), metadata.ino(), metadata.size()))
}
