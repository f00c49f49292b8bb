//! Running other programs, with a time limit.

use std::ffi::OsStr;
use std::io::{IsTerminal, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::Result;

/// How often a running program is looked at.
const POLL: Duration = Duration::from_millis(20);

static DEADLINE: OnceLock<Instant> = OnceLock::new();

/// Sets the moment after which every program still running is stopped.
pub(crate) fn set_deadline(limit: Duration) {
    DEADLINE.get_or_init(|| Instant::now() + limit);
}

/// The top folder of the workspace.
pub(crate) fn root() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    package.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// The cargo that runs us, started in the workspace's top folder.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = in_workspace(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args);
    command
}

/// Cargo of the nightly toolchain, by rustup.
pub(crate) fn nightly(args: &[&str]) -> Command {
    let mut command = in_workspace("rustup");
    command.args(["run", "nightly", "cargo"]).args(args);
    // The one that runs us is of another toolchain.
    command.env_remove("CARGO").env_remove("CARGO_ENCODED_RUSTFLAGS");
    command
}

/// A program started in the workspace's top folder.
pub(crate) fn in_workspace(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    // These describe the package xtask, and would make build scripts believe that they belong to it.
    for name in ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_PKG_NAME"] {
        command.env_remove(name);
    }
    command
}

/// How a program ended.
pub(crate) enum End {
    /// By itself.
    Exited(ExitStatus),
    /// It was stopped because its time was over.
    TimedOut,
}

/// Runs `command` with its output on ours; succeeds only if it does.
pub(crate) fn check(command: &mut Command) -> Result {
    let shown = show(command);
    let status = match wait(&mut spawn(command)?, None)? {
        End::Exited(status) => status,
        End::TimedOut => return Err(format!("`{shown}` was stopped: the time for the whole run is over")),
    };
    if status.success() { Ok(()) } else { Err(format!("`{shown}` failed ({status})")) }
}

/// What a captured program printed, and how it ended.
pub(crate) struct Output {
    /// How it ended.
    pub(crate) end: End,
    /// Its standard output.
    pub(crate) stdout: String,
    /// Its standard error.
    pub(crate) stderr: String,
}

impl Output {
    /// Whether it ended by itself, and well.
    pub(crate) fn success(&self) -> bool {
        matches!(self.end, End::Exited(status) if status.success())
    }

    /// Its standard output if it succeeded, or else an error that shows what it complained of.
    pub(crate) fn into_stdout(self, what: &str) -> Result<String> {
        match self.end {
            End::Exited(status) if status.success() => Ok(self.stdout),
            End::Exited(status) => Err(format!("{what} failed ({status})\n{}", self.stderr.trim_end())),
            End::TimedOut => Err(format!("{what} was stopped, its time is over\n{}", self.stderr.trim_end())),
        }
    }
}

/// Runs `command`, keeps what it prints, and stops it after `limit`.
pub(crate) fn capture(command: &mut Command, limit: Option<Duration>) -> Result<Output> {
    let mut child = spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        let stdout = scope.spawn(move || read_all(out.as_mut()));
        let stderr = scope.spawn(move || read_all(err.as_mut()));
        let end = wait(&mut child, limit)?;
        let text = |reader: std::thread::ScopedJoinHandle<'_, String>| reader.join().unwrap_or_default();
        Ok(Output { end, stdout: text(stdout), stderr: text(stderr) })
    })
}

fn read_all(stream: Option<&mut impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        // A stream that breaks off yields what arrived until then, which is what we want to show.
        let _ = stream.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn spawn(command: &mut Command) -> Result<Child> {
    if has_own_group() {
        command.process_group(0);
    }
    command.spawn().map_err(|error| format!("cannot start `{}`: {error}", show(command)))
}

/// Without a terminal a program gets its own process group, so that a time limit reaches its children too. On a
/// terminal it stays in ours: Ctrl-C must reach it.
fn has_own_group() -> bool {
    !std::io::stdin().is_terminal()
}

fn wait(child: &mut Child, limit: Option<Duration>) -> Result<End> {
    let own = limit.map(|limit| Instant::now() + limit);
    let deadline = [own, DEADLINE.get().copied()].into_iter().flatten().min();
    loop {
        if let Some(status) =
            child.try_wait().map_err(|error| format!("cannot wait for a program: {error}"))?
        {
            return Ok(End::Exited(status));
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            stop(child);
            return Ok(End::TimedOut);
        }
        std::thread::sleep(POLL);
    }
}

/// Stops a program. That it has just ended by itself is no error, so failures are not looked at.
fn stop(child: &mut Child) {
    if has_own_group() {
        let group = format!("-{}", child.id());
        let _ = Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// The command as a person would type it.
pub(crate) fn show(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy();
    let args = command.get_args().map(|arg| arg.to_string_lossy());
    std::iter::once(program).chain(args).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_takes_too_long_is_stopped_with_its_children() {
        let start = Instant::now();
        let output =
            capture(Command::new("sh").args(["-c", "echo one; sleep 60"]), Some(Duration::from_secs(5)));
        let output = output.expect("sh starts");
        assert!(matches!(output.end, End::TimedOut));
        assert_eq!(output.stdout, "one\n");
        assert!(has_own_group() || start.elapsed() >= Duration::from_secs(60));
        assert!(!has_own_group() || start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_failure_shows_what_was_printed() {
        let output =
            capture(Command::new("sh").args(["-c", "echo reason >&2; exit 3"]), None).expect("sh starts");
        assert!(!output.success());
        let failure = output.into_stdout("the script").expect_err("it exited with 3");
        assert!(failure.contains("the script failed") && failure.contains("reason"), "{failure}");
    }

    #[test]
    fn a_command_is_shown_without_the_folder_of_its_program() {
        assert_eq!(show(Command::new("/usr/bin/cargo").args(["test", "-p", "x"])), "cargo test -p x");
    }
}
