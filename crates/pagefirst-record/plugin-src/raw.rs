//! The stream from the plugin to the driver: little-endian records, each a byte that says its kind, then the fields
//! listed there. `thread` is a `u32`, numbers are `u64`, a text is a `u32` length and that many bytes.
//! Both sides are built together: the stream is no file format and has no version.

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
/// A child process was started.
pub const FORK: u8 = 0x08;
/// number, text: `execve` of a program of this name is about to be called, after so many accesses.
pub const EXEC: u8 = 0x09;
/// The last `execve` failed.
pub const EXEC_FAILED: u8 = 0x0a;
/// number: the end, and the accesses counted.
pub const END: u8 = 0x0b;

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
