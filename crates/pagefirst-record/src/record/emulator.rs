//! The emulator: where it is, and how it is run with the plugin.

use std::env;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};

use super::initial::{self, STACK};
use super::{RecordError, doing};

/// The plugin, as the build script compiled it.
const PLUGIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libpagefirst_plugin.so"));
/// What follows the number of the interface's version in the plugin.
const MARK: &[u8] = b"pagefirst's version\0";

/// An emulator that was found.
pub(super) struct Emulator {
    path: PathBuf,
    /// Its name and version.
    pub(super) version: String,
    /// The plugin interface's version that it understands.
    interface: i32,
}

/// A program that is running under the emulator.
pub(super) struct Run {
    /// What the plugin reports.
    pub(super) stream: BufReader<File>,
    waiter: JoinHandle<io::Result<ExitStatus>>,
    // Below: undone when dropped.
    _directory: tempfile::TempDir,
    _signals: IgnoreSignals,
}

impl Emulator {
    /// Looks for it in `PATH`.
    pub(super) fn find() -> Result<Self, RecordError> {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            return Err(RecordError::Architecture);
        }
        let path = in_path(OsStr::new("qemu-x86_64")).ok_or(RecordError::NoEmulator)?;
        let output = Command::new(&path).arg("--version").output().map_err(doing("running qemu-x86_64"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let number =
            text.split_whitespace().find(|word| word.starts_with(|first: char| first.is_ascii_digit()));
        let number = number.unwrap_or("unknown");
        let major = number.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0_u32);
        let interface = match major {
            0..9 => 1,
            9 => 2,
            _ => 4,
        };
        Ok(Self { path, version: format!("qemu-x86_64 {number}"), interface })
    }

    /// Starts a program.
    pub(super) fn start(
        &self,
        program: &Path,
        name: &OsStr,
        arguments: &[OsString],
    ) -> Result<Run, RecordError> {
        let directory = tempfile::Builder::new().prefix("pagefirst-").tempdir();
        let directory = directory.map_err(doing("making a temporary directory"))?;
        let plugin = directory.path().join("plugin.so");
        fs::write(&plugin, self.plugin()).map_err(doing("writing the plugin"))?;
        let pipe = directory.path().join("stream");
        make_pipe(&pipe).map_err(doing("making a named pipe"))?;
        // Kept open for writing until the emulator has ended, so that reading ends then and not before.
        let keeper =
            OpenOptions::new().read(true).write(true).open(&pipe).map_err(doing("opening the pipe"))?;
        let stream = File::open(&pipe).map_err(doing("opening the pipe"))?;

        let mut command = Command::new(&self.path);
        command.arg("-cpu").arg("max").arg("-s").arg(STACK.to_string());
        command.arg("-plugin").arg(plugin_argument(&plugin, &pipe));
        command.arg("-0").arg(name).arg(program).args(arguments);
        command.stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
        let mut child = command.spawn().map_err(doing("running qemu-x86_64"))?;
        let signals = IgnoreSignals::new();
        let waiter = thread::spawn(move || {
            let status = child.wait();
            drop(keeper);
            status
        });
        Ok(Run {
            stream: BufReader::with_capacity(1 << 16, stream),
            waiter,
            _directory: directory,
            _signals: signals,
        })
    }

    /// The plugin for this emulator.
    fn plugin(&self) -> Vec<u8> {
        let mut plugin = PLUGIN.to_vec();
        if let Some(mark) = plugin.windows(MARK.len()).position(|window| window == MARK)
            && mark >= 4
        {
            plugin[mark - 4..mark].copy_from_slice(&self.interface.to_ne_bytes());
        }
        plugin
    }
}

impl Run {
    /// Waits for the program's end.
    pub(super) fn wait(self) -> Result<i32, RecordError> {
        // Nobody reads any more, so a plugin that is still writing must not wait for it.
        drop(self.stream);
        let status =
            self.waiter.join().unwrap_or_else(|_| Err(io::Error::other("the waiting thread panicked")));
        status.map(exit_status).map_err(doing("waiting for the program"))
    }
}

/// An exit status as shells give it.
fn exit_status(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// `file,stream=pipe,process=0`, where a comma in a path is doubled.
fn plugin_argument(plugin: &Path, pipe: &Path) -> OsString {
    let double = |path: &Path| {
        let doubled = path.as_os_str().as_bytes().iter().flat_map(|&byte| {
            let times = if byte == b',' { 2 } else { 1 };
            std::iter::repeat_n(byte, times)
        });
        doubled.collect::<Vec<u8>>()
    };
    let argument = [&double(plugin)[..], b",stream=", &double(pipe), b",process=0"].concat();
    OsStr::from_bytes(&argument).to_owned()
}

fn make_pipe(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `path` is a string that ends with a zero, as mkfifo asks for.
    match unsafe { libc::mkfifo(path.as_ptr(), 0o600) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An interrupt from the keyboard is for the program, not for us: the recording is written to its end.
struct IgnoreSignals([(libc::c_int, libc::sighandler_t); 2]);

impl IgnoreSignals {
    fn new() -> Self {
        // SAFETY: ignoring a signal runs no code of ours.
        Self(
            [libc::SIGINT, libc::SIGQUIT]
                .map(|signal| (signal, unsafe { libc::signal(signal, libc::SIG_IGN) })),
        )
    }
}

impl Drop for IgnoreSignals {
    fn drop(&mut self) {
        for (signal, handler) in self.0 {
            // SAFETY: this is the handler that was installed before.
            unsafe { libc::signal(signal, handler) };
        }
    }
}

/// The program's path, and whether the emulator can run it.
pub(super) fn find_program(name: &OsStr) -> Result<PathBuf, RecordError> {
    let missing = || RecordError::NoProgram(name.into());
    let path = if name.as_bytes().contains(&b'/') {
        Some(PathBuf::from(name)).filter(|path| executable(path))
    } else {
        in_path(name)
    };
    let path = path.ok_or_else(missing)?;
    let file = fs::read(&path).map_err(doing(format!("reading {}", path.display())))?;
    if initial::is_program(&file) { Ok(path) } else { Err(RecordError::NotElf(path)) }
}

fn in_path(name: &OsStr) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|directory| directory.join(name)).find(|path| executable(path))
}

fn executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// The bytes that `execve` puts on a new stack: arguments, environment, pointers to them, auxiliary vector.
pub(super) fn argument_bytes(program: &Path, name: &OsStr, arguments: &[OsString]) -> u64 {
    const POINTER: usize = 8;
    const AUXILIARY: usize = 24 * 16 + 64;
    let text = |text: &OsStr| text.len() + 1 + POINTER;
    let environment = env::vars_os().map(|(name, value)| text(&name) + value.len() + 1);
    let arguments = arguments.iter().map(|argument| text(argument));
    let names = text(name) + text(program.as_os_str());
    (environment.sum::<usize>() + arguments.sum::<usize>() + names + AUXILIARY) as u64
}
