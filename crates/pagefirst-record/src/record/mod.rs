//! Records a program: runs it under the emulator, turns the plugin's stream into a recording, runs it again, several times,
//! without the emulator for Linux's own figures, and checks what was written.

mod emulator;
mod files;
mod initial;
mod native;
mod processes;
mod raw;
mod track;
mod translate;

pub use native::huge_page_setting;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::check::{Report, check};
use crate::error::FormatError;
use crate::event::{Arch, Header, Trailer};
use crate::read::Recording;
use crate::wire::{PAGE, VERSION};
use crate::write::Writer;

use processes::Processes;
use translate::Output;

/// What to record, and how.
#[derive(Clone, Debug)]
pub struct RecordOptions {
    /// The program: a path, or a name to be looked up in `PATH`.
    pub program: OsString,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// The recording.
    pub output: PathBuf,
    /// How often to run the program without the emulator, for Linux's figures.
    pub native_runs: u32,
    /// zstd's level.
    pub level: i32,
}

/// What [`record`] did.
#[derive(Clone, Debug)]
pub struct Summary {
    /// What the recording ends with: losses, the program's exit status, native figures.
    pub trailer: Trailer,
    /// What the check of the written file found.
    pub report: Report,
    /// The recording's bytes.
    pub file_bytes: u64,
    /// How long the program ran under the emulator.
    pub emulated: Duration,
    /// How long the program ran without it, on average.
    pub native: Option<Duration>,
    /// What the user should know besides.
    pub notes: Vec<String>,
}

/// Why a program could not be recorded.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// QEMU is not there.
    #[error(
        "qemu-x86_64, QEMU's user-mode emulator, is not in PATH. It comes with: apt-get install qemu-user \
         (Debian, Ubuntu), dnf install qemu-user (Fedora), pacman -S qemu-user (Arch), zypper install qemu-linux-user (openSUSE)"
    )]
    NoEmulator,
    /// This machine's programs are of another architecture.
    #[error("only x86-64 Linux programs can be recorded so far")]
    Architecture,
    /// The program is not there.
    #[error("{}: no such program in PATH", .0.display())]
    NoProgram(PathBuf),
    /// The program is none for the emulator.
    #[error("{}: not an x86-64 ELF program (a script is recorded by naming its interpreter)", .0.display())]
    NotElf(PathBuf),
    /// The emulator did not load the plugin, or ended before the program began.
    #[error("the emulator ended before the program began (status {0}); does it support plugins?")]
    NotStarted(i32),
    /// The plugin's stream makes no sense.
    #[error("the emulator's stream: expected {expected}, found {found:#x}")]
    Stream {
        /// What should have come.
        expected: &'static str,
        /// What came.
        found: u64,
    },
    /// Something of the system failed.
    #[error("{doing}: {error}")]
    System {
        /// What was tried.
        doing: String,
        /// How it failed.
        #[source]
        error: io::Error,
    },
    /// What was written can't be read back.
    #[error("the recording can't be read back: {0}")]
    Format(#[from] FormatError),
}

/// For `map_err`: what was tried.
fn doing(what: impl Into<String>) -> impl FnOnce(io::Error) -> RecordError {
    |error| RecordError::System { doing: what.into(), error }
}

/// Records a program. Its standard streams are those of this process.
///
/// # Errors
/// When the program can't be run or recorded; no recording is left then. Losses are no errors: the [`Summary`] has them.
pub fn record(options: &RecordOptions) -> Result<Summary, RecordError> {
    let program = emulator::find_program(&options.program)?;
    let emulator = emulator::Emulator::find()?;
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let header = Header {
        version: VERSION,
        arch: Arch::X86_64,
        page_size: PAGE as u32,
        program: name,
        emulator: emulator.version.clone(),
    };
    let file = File::create(&options.output).map_err(doing(writing(options)))?;
    let regular = file.metadata().is_ok_and(|metadata| metadata.is_file());
    let result = record_into(file, &header, options, &program, &emulator);
    if result.is_err() && regular {
        // What is there has no end. The error is the one to report.
        let _ = fs::remove_file(&options.output);
    }
    result
}

fn writing(options: &RecordOptions) -> String {
    format!("writing {}", options.output.display())
}

fn record_into(
    file: File,
    header: &Header,
    options: &RecordOptions,
    program: &Path,
    emulator: &emulator::Emulator,
) -> Result<Summary, RecordError> {
    let writer =
        Writer::create(BufWriter::new(file), header, options.level).map_err(doing(writing(options)))?;

    let mut notes = Vec::new();
    let input = (options.native_runs > 0).then(|| native::input(&mut notes));
    let start = Instant::now();
    let mut run = emulator.start(program, &options.program, &options.arguments)?;
    let argument_bytes = emulator::argument_bytes(program, &options.program, &options.arguments);
    let mut processes = Processes::new(Output::new(writer, &header.program), argument_bytes);
    let translated = processes.all(&mut run.stream);
    let exit_status = run.wait()?;
    let emulated = start.elapsed();
    translated?;
    if !processes.started() {
        return Err(RecordError::NotStarted(exit_status));
    }

    let mut native_time = None;
    let mut native = None;
    if let Some(input) = input {
        let start = Instant::now();
        let runs = options.native_runs;
        let figures =
            input.and_then(|input| native::run(program, &options.program, &options.arguments, input, runs));
        match figures {
            Ok(figures) => {
                native = Some(figures);
                native_time = Some(start.elapsed() / runs);
            }
            Err(error) => notes.push(format!("no native figures: {error}")),
        }
    }
    let trailer = processes.finish(exit_status, native)?;

    let file = File::open(&options.output).map_err(doing(format!("reading {}", options.output.display())))?;
    let file_bytes = file.metadata().map_or(0, |metadata| metadata.len());
    let report = check(&mut Recording::open(BufReader::new(file))?)?;
    Ok(Summary { trailer, report, file_bytes, emulated, native: native_time, notes })
}
