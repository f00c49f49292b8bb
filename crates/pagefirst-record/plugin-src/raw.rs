//! The stream from the plugins to the driver. All processes write to one pipe, in frames of at most [`FRAME`] bytes,
//! which the kernel never mixes: the process's key (`u64`), the length of what follows (`u16`), and a piece
//! of the process's records. The records of a process may be cut anywhere between its frames.
//!
//! Records are little-endian: a byte that says the kind, then the fields listed there. `thread` is a `u32`, numbers
//! are `u64`, a text is a `u32` length and that many bytes.
//! Both sides are built together: the stream is no file format and has no version.

/// The most bytes of a frame: what a pipe takes at once (`PIPE_BUF`).
pub const FRAME: usize = 4096;
/// What comes before a frame's piece: the key and the length.
pub const FRAME_HEADER: usize = 10;
/// The key of the first process. The others have random ones.
pub const FIRST_PROCESS: u64 = 0;

/// thread, address: a touch. The low four bits of the kind are flags.
pub const TOUCH: u8 = 0x10;
/// In a touch: a write.
pub const TOUCH_WRITE: u8 = 1;
/// In a touch: an execution.
pub const TOUCH_EXECUTE: u8 = 2;
/// In a touch: by the kernel.
pub const TOUCH_KERNEL: u8 = 4;

/// thread, number of the call, six arguments: a call that takes memory away begins.
pub const ENTER: u8 = 0x01;
/// thread, number of the call, six arguments, result: a call about memory is over.
pub const RETURN: u8 = 0x02;
/// text: `/proc/self/maps` before the first instruction.
pub const MAPS: u8 = 0x03;
/// thread, device, inode, size, text: the file that the thread's next `mmap` maps, and its base name.
pub const FILE: u8 = 0x04;
/// device, inode, size: a file's size now.
pub const FILE_SIZE: u8 = 0x05;
/// thread: it starts.
pub const THREAD_START: u8 = 0x06;
/// thread: it ended.
pub const THREAD_EXIT: u8 = 0x07;
/// thread, child's key, byte: a child process is about to be made, from what the stream says up to here. The byte is
/// 1 when the child is to share the memory of its parent until it executes a program or ends (`vfork`).
pub const FORK: u8 = 0x08;
/// key: the child was not made.
pub const FORK_FAILED: u8 = 0x09;
/// thread, accesses, bytes, text: `execve` of a program of this name is about to be called, after so many accesses,
/// with so many bytes of arguments and environment. If the emulator runs the program, its [`MAPS`] follow.
pub const EXEC: u8 = 0x0a;
/// The last `execve` failed.
pub const EXEC_FAILED: u8 = 0x0b;
/// accesses, status: the end, with the exit status, or [`UNKNOWN`].
pub const END: u8 = 0x0c;

/// No exit status is known.
pub const UNKNOWN: u64 = u64::MAX;

/// Numbers of system calls on x86-64.
pub mod number {
    pub const MMAP: u64 = 9;
    pub const MPROTECT: u64 = 10;
    pub const MUNMAP: u64 = 11;
    pub const BRK: u64 = 12;
    pub const MREMAP: u64 = 25;
    pub const MADVISE: u64 = 28;
    pub const PKEY_MPROTECT: u64 = 329;
}
