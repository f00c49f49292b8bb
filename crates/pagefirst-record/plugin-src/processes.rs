//! Processes that the program makes, and programs that it executes.
//!
//! The emulator makes every process by copying its own, `vfork` too. The C library calls handlers of ours right before
//! and after, on the thread that copies, while no other thread runs code of the program.

use std::cell::{Cell, RefCell};
use std::ffi::{CString, OsStr, c_char, c_int};
use std::fs;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::ptr;
use std::sync::MutexGuard;

use crate::buffers::{read_string, read_strings};
use crate::stream::{self, Stream};
use crate::{accesses, filter};

unsafe extern "C" {
    safe fn pthread_atfork(
        prepare: extern "C" fn(),
        parent: extern "C" fn(),
        child: extern "C" fn(),
    ) -> c_int;
    fn execve(path: *const c_char, argv: *const *const c_char, envp: *const *const c_char) -> c_int;
    fn access(path: *const c_char, mode: c_int) -> c_int;
}

/// A process that is being made by this thread.
#[derive(Clone, Copy)]
struct Fork {
    cpu: u32,
    shares_memory: bool,
    /// The child's key, once it has one.
    child: Option<u64>,
}

thread_local! {
    static FORK: Cell<Option<Fork>> = const { Cell::new(None) };
    /// The stream, locked while this thread copies the process.
    static HELD: RefCell<Option<MutexGuard<'static, Stream>>> = const { RefCell::new(None) };
}

/// Has the handlers called.
pub fn install() -> bool {
    pthread_atfork(before, after_in_parent, after_in_child) == 0
}

/// This thread calls `fork` or its kin.
pub fn enter_fork(cpu: u32, shares_memory: bool) {
    FORK.set(Some(Fork { cpu, shares_memory, child: None }));
}

/// The call is over, in the parent or in the child.
pub fn leave_fork(failed: bool) {
    if let Some(Fork { child: Some(child), .. }) = FORK.take()
        && failed
    {
        stream::lock().fork_failed(child);
    }
}

extern "C" fn before() {
    let mut stream = stream::lock();
    if let Some(mut fork) = FORK.get() {
        fork.child = Some(stream.fork(fork.cpu, fork.shares_memory));
        FORK.set(Some(fork));
        if !fork.shares_memory {
            // Both processes take faults again.
            filter::forget_all();
        }
    }
    HELD.set(Some(stream));
}

extern "C" fn after_in_parent() {
    HELD.take();
}

extern "C" fn after_in_child() {
    if let Some(mut stream) = HELD.take()
        && let Some(Fork { child: Some(child), .. }) = FORK.take()
    {
        stream.become_child(child);
        crate::count_from_zero();
    }
}

/// The longest argument that Linux takes.
const LONGEST_ARGUMENT: usize = 32 * 4096;
const LONGEST_PATH: usize = 4096;

/// A program is about to be executed: `path`, `argv` and `envp` are addresses in its memory. `directory` is what the
/// path starts from. If the emulator can run the program, it is started in place of this one and this function does
/// not return; else the program's own call goes on, and fails or runs a program that is not recorded.
pub fn exec(cpu: u32, directory: Option<i32>, path: u64, argv: u64, envp: u64) {
    let Some(path) = read_string(path, LONGEST_PATH) else { return };
    let mut stream = stream::lock();
    let lists = read_strings(argv, LONGEST_ARGUMENT).zip(read_strings(envp, LONGEST_ARGUMENT));
    let path = absolute(directory, path);
    stream.exec(cpu, accesses(), 0, &base_name(&path));
    if let Some((arguments, environment)) = lists
        && let Some((program, arguments)) = program(path, arguments)
        && let Some(words) = command(stream.process(), &program, &arguments)
    {
        let bytes = argument_bytes(&program, &arguments, &environment);
        // Once more, now that it is known which program runs.
        stream.exec(cpu, accesses(), bytes, &base_name(&program));
        run(words, environment);
    }
}

fn base_name(path: &[u8]) -> Vec<u8> {
    path.rsplit(|&byte| byte == b'/').next().unwrap_or_default().to_vec()
}

/// The path of a call that takes a directory's descriptor.
fn absolute(directory: Option<i32>, path: Vec<u8>) -> Vec<u8> {
    const AT_FDCWD: i32 = -100;
    match directory {
        Some(fd) if fd != AT_FDCWD && !path.starts_with(b"/") => {
            // The descriptor may be gone when the emulator looks for the program, so its name is taken.
            let place = fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
            let mut place = place.into_os_string().into_vec();
            if !path.is_empty() {
                place.push(b'/');
                place.extend(path);
            }
            place
        }
        _ if path == b"/proc/self/exe" => own_program().unwrap_or(path),
        _ => path,
    }
}

/// The words of the emulator's command line before the program's name.
fn own_command() -> Option<Vec<Vec<u8>>> {
    let line = fs::read("/proc/self/cmdline").ok()?;
    let words = line.split(|&byte| byte == 0).map(<[u8]>::to_vec);
    Some(words.take_while(|word| word != b"-0").collect())
}

/// The program that this process runs.
fn own_program() -> Option<Vec<u8>> {
    let line = fs::read("/proc/self/cmdline").ok()?;
    line.split(|&byte| byte == 0).skip_while(|&word| word != b"-0").nth(2).map(<[u8]>::to_vec)
}

/// The program that runs a file, which may be a script, and its arguments; `None` if the emulator can't run it as it
/// should: a file that may not be executed, is no program of x86-64, or is to run with other rights.
fn program(mut path: Vec<u8>, mut arguments: Vec<Vec<u8>>) -> Option<(Vec<u8>, Vec<Vec<u8>>)> {
    const MAY_EXECUTE: c_int = 1;
    const SET_ID: u32 = 0o6000;
    /// Linux follows as many scripts that are run by scripts.
    const DEPTH: usize = 5;
    for _ in 0..DEPTH {
        let c_path = CString::new(path.clone()).ok()?;
        // SAFETY: `c_path` is a string that ends with a zero.
        let allowed = unsafe { access(c_path.as_ptr(), MAY_EXECUTE) } == 0;
        let metadata = fs::metadata(OsStr::from_bytes(&path)).ok()?;
        if !allowed || !metadata.is_file() || metadata.mode() & SET_ID != 0 {
            return None;
        }
        let mut start = Vec::new();
        fs::File::open(OsStr::from_bytes(&path)).ok()?.take(256).read_to_end(&mut start).ok()?;
        let Some(line) = start.strip_prefix(b"#!") else {
            let x86_64 = start.starts_with(b"\x7fELF\x02\x01") && start.get(18..20) == Some(&[62, 0]);
            return x86_64.then_some((path, arguments));
        };
        let line = line.split(|&byte| byte == b'\n').next()?.trim_ascii();
        let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
        let (interpreter, argument) = (line[..end].to_vec(), line[end..].trim_ascii_start().to_vec());
        let rest = arguments.into_iter().skip(1);
        let argument = Some(argument).filter(|argument| !argument.is_empty());
        arguments = [interpreter.clone()].into_iter().chain(argument).chain([path]).chain(rest).collect();
        path = interpreter;
    }
    None
}

/// The emulator's command line for the program, for the process with this key.
fn command(process: u64, program: &[u8], arguments: &[Vec<u8>]) -> Option<Vec<Vec<u8>>> {
    const KEY: &[u8] = b",process=";
    let mut words = own_command()?;
    let at = words.iter().position(|word| word == b"-plugin")? + 1;
    let plugin = words.get_mut(at)?;
    let end = plugin.windows(KEY.len()).rposition(|window| window == KEY)?;
    plugin.truncate(end + KEY.len());
    plugin.extend(process.to_string().into_bytes());
    let empty = Vec::new();
    words.extend([b"-0".to_vec(), arguments.first().unwrap_or(&empty).clone()]);
    // What begins with a dash would be taken for an option.
    let dash = if program.starts_with(b"-") { &b"./"[..] } else { b"" };
    words.push([dash, program].concat());
    words.extend(arguments.iter().skip(1).cloned());
    Some(words)
}

/// The bytes that `execve` puts on a new stack: arguments, environment, pointers to them, auxiliary vector.
fn argument_bytes(program: &[u8], arguments: &[Vec<u8>], environment: &[Vec<u8>]) -> u64 {
    const POINTER: usize = 8;
    const AUXILIARY: usize = 24 * 16 + 64;
    let texts = arguments.iter().chain(environment).map(|text| text.len() + 1 + POINTER);
    (texts.sum::<usize>() + program.len() + 1 + 2 * POINTER + AUXILIARY) as u64
}

/// Runs the emulator in place of this process; returns if that fails.
fn run(words: Vec<Vec<u8>>, environment: Vec<Vec<u8>>) {
    let Ok(emulator) = fs::read_link("/proc/self/exe") else { return };
    let strings = |list: Vec<Vec<u8>>| list.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>();
    let (Ok(emulator), Ok(words), Ok(environment)) =
        (CString::new(emulator.into_os_string().into_vec()), strings(words), strings(environment))
    else {
        return;
    };
    let pointers =
        |list: &[CString]| list.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect::<Vec<_>>();
    let (argv, envp) = (pointers(&words), pointers(&environment));
    // SAFETY: the path is a string and the lists are lists of strings, which all live during the call; the lists end
    // with null pointers.
    unsafe { execve(emulator.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
}
