//! What the kernel reads and fills of the program's memory in system calls, as far as their arguments and
//! results tell it. Not followed: lists of messages, signal frames, asynchronous reads and writes.

/// What the kernel does to a buffer.
#[derive(Clone, Copy)]
pub enum Side {
    /// It fills it.
    Filled,
    /// It reads it.
    Taken,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Slice {
    start: u64,
    len: u64,
}

unsafe extern "C" {
    fn process_vm_readv(
        process: i32,
        local: *const Slice,
        locals: u64,
        remote: *const Slice,
        remotes: u64,
        flags: u64,
    ) -> isize;
}

/// Reads the program's memory; it may end early, and never faults.
fn read(address: u64, buffer: &mut [u8]) -> usize {
    let local = Slice { start: buffer.as_mut_ptr() as u64, len: buffer.len() as u64 };
    let remote = Slice { start: address, len: local.len };
    let process = std::process::id() as i32;
    // SAFETY: `local` is `buffer`, which is writable for its length; the kernel checks `remote`.
    let read = unsafe { process_vm_readv(process, &local, 1, &remote, 1, 0) };
    usize::try_from(read).unwrap_or(0)
}

/// Reads a string that ends with a zero, of less than `limit` bytes; `None` if there is none.
pub fn read_string(address: u64, limit: usize) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    while text.len() < limit {
        // Never beyond a page: the next one may not be readable.
        let at = address.checked_add(text.len() as u64)?;
        let mut page = vec![0; 4096 - at as usize % 4096];
        let len = read(at, &mut page);
        let end = page[..len].iter().position(|&byte| byte == 0);
        text.extend(&page[..end.unwrap_or(len)]);
        match end {
            Some(_) => return Some(text).filter(|text| text.len() < limit),
            None if len == 0 => return None,
            None => {}
        }
    }
    None
}

/// Reads a list of pointers to strings that ends with a null pointer, as `execve` takes it.
pub fn read_strings(address: u64, limit: usize) -> Option<Vec<Vec<u8>>> {
    /// No list may be longer: its strings would not fit on a stack.
    const LONGEST: u64 = 1 << 20;
    let mut strings = Vec::new();
    if address == 0 {
        return Some(strings);
    }
    for index in 0..LONGEST {
        let mut pointer = [0; 8];
        if read(address.checked_add(index * 8)?, &mut pointer) < 8 {
            return None;
        }
        match u64::from_le_bytes(pointer) {
            0 => return Some(strings),
            pointer => strings.push(read_string(pointer, limit)?),
        }
    }
    None
}

/// Reads a number; 0 if there is none.
pub fn number(address: u64) -> u64 {
    let mut bytes = [0; 8];
    read(address, &mut bytes);
    u64::from_le_bytes(bytes)
}

/// The buffers of a list, up to the number of bytes that were transferred.
fn list(address: u64, count: u64, mut bytes: u64, side: Side, found: &mut impl FnMut(u64, u64, Side)) {
    found(address, count.min(1024) * 16, Side::Taken);
    for index in 0..count.min(1024) {
        let entry = address + index * 16;
        let len = number(entry + 8).min(bytes);
        if len == 0 {
            break;
        }
        found(number(entry), len, side);
        bytes -= len;
    }
}

/// Calls `found` for each buffer of a call that is over: its address, its length, what the kernel did to it. Buffers
/// may be at 0 or empty.
pub fn of_call(call: u64, arguments: &[u64; 6], result: i64, mut found: impl FnMut(u64, u64, Side)) {
    use Side::{Filled, Taken};
    const BAD_ADDRESS: i64 = -14;
    let [a, b, c, d, e, _] = *arguments;
    let result = match result {
        BAD_ADDRESS => return,
        // A path was read, whatever came of it.
        -4095..0 => {
            if let Some(path) = path(call, arguments) {
                found(path, 1, Taken);
            }
            return;
        }
        result => result as u64,
    };
    if let Some(path) = path(call, arguments) {
        found(path, 1, Taken);
    }
    match call {
        // read, pread64, recvfrom, getdents, readlink, getdents64; getxattr and its kin
        0 | 17 | 45 | 78 | 89 | 217 => found(b, result, Filled),
        191..=193 => found(c, result.min(d), Filled),
        // getcwd, getrandom; readlinkat; sched_getaffinity
        79 | 318 => found(a, result, Filled),
        267 => found(c, result, Filled),
        204 => found(c, result, Filled),
        // write, pwrite64, sendto
        1 | 18 | 44 => found(b, result, Taken),
        // readv, preadv, preadv2; writev, pwritev, pwritev2
        19 | 295 | 327 => list(b, c, result, Filled, &mut found),
        20 | 296 | 328 => list(b, c, result, Taken, &mut found),
        // recvmsg, sendmsg: the list and its length are in the message's header
        46 | 47 => {
            found(b, 56, Taken);
            let side = if call == 47 { Filled } else { Taken };
            list(number(b + 16), number(b + 24), result, side, &mut found);
        }
        // stat, fstat, lstat; newfstatat; statx; statfs, fstatfs
        4..=6 => found(b, 144, Filled),
        262 => found(c, 144, Filled),
        332 => found(e, 256, Filled),
        137 | 138 => found(b, 120, Filled),
        // poll, ppoll; select and pselect6 are not followed; epoll_wait, epoll_pwait; epoll_ctl
        7 | 271 => found(a, b * 8, Filled),
        232 | 281 => found(b, result * 12, Filled),
        233 => found(d, 12, Taken),
        // rt_sigaction, rt_sigprocmask, sigaltstack
        13 => {
            found(b, 32, Taken);
            found(c, 32, Filled);
        }
        14 => {
            found(b, 8, Taken);
            found(c, 8, Filled);
        }
        131 => {
            found(a, 24, Taken);
            found(b, 24, Filled);
        }
        // ioctl of a terminal: its settings, its size
        16 if b == 0x5401 => found(c, 36, Filled),
        16 if b == 0x5413 => found(c, 8, Filled),
        // pipe, pipe2; socketpair; getsockname, getpeername
        22 | 293 => found(a, 8, Filled),
        53 => found(d, 8, Filled),
        51 | 52 => found(b, 16, Filled),
        // wait4
        61 => {
            found(b, 4, Filled);
            found(d, 144, Filled);
        }
        // uname; gettimeofday, times, sysinfo, time
        63 => found(a, 390, Filled),
        96 => found(a, 16, Filled),
        100 => found(a, 32, Filled),
        99 => found(a, 112, Filled),
        201 => found(a, 8, Filled),
        // getrlimit, getrusage; prlimit64
        97 => found(b, 16, Filled),
        98 => found(b, 144, Filled),
        302 => {
            found(c, 16, Taken);
            found(d, 16, Filled);
        }
        // clock_gettime, clock_getres; nanosleep, clock_nanosleep
        228 | 229 => found(b, 16, Filled),
        35 => found(a, 16, Taken),
        230 => found(c, 16, Taken),
        // getresuid, getresgid
        118 | 120 => [a, b, c].into_iter().for_each(|address| found(address, 4, Filled)),
        // futex, sendfile, connect, bind
        202 => found(a, 4, Taken),
        40 => found(c, 8, Filled),
        42 | 49 => found(b, c.min(128), Taken),
        _ => {}
    }
}

/// The path that a call takes. Only its first byte is known to be read.
fn path(call: u64, arguments: &[u64; 6]) -> Option<u64> {
    match call {
        // open, stat, lstat, access, execve, chdir, rename, mkdir, rmdir, creat, unlink, readlink, chmod, statfs
        2 | 4 | 6 | 21 | 59 | 80 | 82..=87 | 89 | 90 | 137 => Some(arguments[0]),
        // openat, mkdirat, newfstatat, unlinkat, renameat, readlinkat, faccessat, renameat2, execveat, statx
        257 | 258 | 262..=264 | 267 | 269 | 316 | 322 | 332 | 437 | 439 => Some(arguments[1]),
        _ => None,
    }
}
