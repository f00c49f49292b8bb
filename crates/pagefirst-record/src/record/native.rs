//! Runs the program without the emulator, for what Linux takes for it.
//!
//! The figures are read when its threads are about to end (`PTRACE_EVENT_EXIT`), while their memory is still there.
//! Only threads are traced; children run free and don't count.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::ptr;
use std::thread;

use crate::event::{Native, NativeRun};

/// Runs it so often.
pub(super) fn run(
    program: &Path,
    name: &OsStr,
    arguments: &[OsString],
    mut input: File,
    runs: u32,
) -> io::Result<Native> {
    let path = CString::new(program.as_os_str().as_bytes())?;
    let words = [name].into_iter().chain(arguments.iter().map(OsString::as_os_str));
    let words = words.map(|word| CString::new(word.as_bytes())).collect::<Result<Vec<_>, _>>()?;
    let output = File::options().write(true).open("/dev/null")?;
    // A thread of its own, so that it waits for its own children only.
    let tracer = thread::spawn(move || {
        // Fails where there is nothing to seek in, as in the null device.
        let position = input.stream_position();
        let run = |_| {
            if let Ok(position) = position {
                input.seek(SeekFrom::Start(position))?;
            }
            trace(&path, &words, &input, &output)
        };
        (0..runs).map(run).collect()
    });
    let runs = tracer.join().unwrap_or_else(|_| Err(io::Error::other("the tracing thread panicked")))?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(Native { kernel: kernel.trim().to_owned(), huge_pages: huge_page_setting(), runs })
}

/// What this machine's kernel says of transparent huge pages: `always`, `madvise`, `never`, or nothing if it has none.
pub fn huge_page_setting() -> String {
    let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let word = setting.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    word.map_or_else(String::new, |(word, _)| word.to_owned())
}

/// The standard input once more, if it is a file; to be called before the program reads it.
pub(super) fn input(notes: &mut Vec<String>) -> io::Result<File> {
    const STDIN: &str = "/proc/self/fd/0";
    let null = || File::open("/dev/null");
    let Ok(kind) = fs::metadata(STDIN).map(|metadata| metadata.file_type()) else { return null() };
    if kind.is_file() {
        let position = File::from(io::stdin().as_fd().try_clone_to_owned()?).stream_position()?;
        let mut file = File::open(STDIN)?;
        file.seek(SeekFrom::Start(position))?;
        return Ok(file);
    }
    if !(kind.is_char_device() && fs::read_link(STDIN).is_ok_and(|path| path == Path::new("/dev/null"))) {
        notes.push("the native run has no input: standard input is no file that can be read twice".into());
    }
    null()
}

fn trace(path: &CString, words: &[CString], input: &File, output: &File) -> io::Result<NativeRun> {
    let mut pointers: Vec<_> = words.iter().map(|word| word.as_ptr()).collect();
    pointers.push(ptr::null());
    let (input, output) = (input.as_raw_fd(), output.as_raw_fd());
    // SAFETY: the child calls nothing but what is safe after a fork of a process with threads (the system calls
    // below), with descriptors and pointers that were made before and live until it has called `execv`.
    let child = unsafe {
        match libc::fork() {
            0 => {
                libc::dup2(input, 0);
                libc::dup2(output, 1);
                libc::dup2(output, 2);
                libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
                libc::raise(libc::SIGSTOP);
                libc::execv(path.as_ptr(), pointers.as_ptr());
                libc::_exit(127)
            }
            child => child,
        }
    };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    let ended_early = || io::Error::other("the program could not be run");
    let (_, status) = wait(child)?;
    if !libc::WIFSTOPPED(status) {
        return Err(ended_early());
    }
    // What the fork cost is not the program's.
    let before = faults(child).unwrap_or_default();
    let options = libc::PTRACE_O_TRACEEXIT | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACEEXEC;
    ptrace(libc::PTRACE_SETOPTIONS, child, options | libc::PTRACE_O_EXITKILL)?;
    ptrace(libc::PTRACE_CONT, child, 0)?;

    let (mut executed, mut figures) = (false, None);
    loop {
        let (thread, status) = wait(-1)?;
        if libc::WIFSTOPPED(status) {
            let mut signal = libc::WSTOPSIG(status);
            match status >> 16 {
                // A thread that was just made begins with a stop.
                0 if signal == libc::SIGSTOP && thread != child => signal = 0,
                0 => {}
                event => {
                    signal = 0;
                    executed |= event == libc::PTRACE_EVENT_EXEC;
                    if event == libc::PTRACE_EVENT_EXIT {
                        figures = read(thread, child).or(figures);
                    }
                }
            }
            // It may have been killed meanwhile.
            let _ = ptrace(libc::PTRACE_CONT, thread, signal);
        } else if thread == child {
            let exit_status = if libc::WIFSIGNALED(status) {
                128 + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            };
            let ((minor, major), vm_hwm_kib, vm_pte_kib) =
                figures.filter(|_| executed).ok_or_else(ended_early)?;
            let (minor_faults, major_faults) =
                (minor.saturating_sub(before.0), major.saturating_sub(before.1));
            return Ok(NativeRun { minor_faults, major_faults, vm_hwm_kib, vm_pte_kib, exit_status });
        }
    }
}

/// Waits for a child of this thread.
fn wait(process: libc::pid_t) -> io::Result<(libc::pid_t, libc::c_int)> {
    let mut status = 0;
    loop {
        // SAFETY: `status` can be written.
        let found = unsafe { libc::waitpid(process, &mut status, libc::__WALL | libc::__WNOTHREAD) };
        if found > 0 {
            return Ok((found, status));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn ptrace(request: libc::c_uint, process: libc::pid_t, data: libc::c_int) -> io::Result<()> {
    // SAFETY: none of the requests made here writes to this process's memory.
    match unsafe { libc::ptrace(request, process, 0, libc::c_long::from(data)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The faults of a process so far: minor, major.
fn faults(process: libc::pid_t) -> Option<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name before may hold anything.
    let fields: Vec<_> = text[text.rfind(')')? + 1..].split_whitespace().collect();
    Some((fields.get(7)?.parse().ok()?, fields.get(9)?.parse().ok()?))
}

/// Faults, `VmHWM`, `VmPTE`.
fn read(thread: libc::pid_t, process: libc::pid_t) -> Option<((u64, u64), u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse().ok()
    };
    Some((faults(process)?, field("VmHWM")?, field("VmPTE")?))
}
