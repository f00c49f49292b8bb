//! `pagefirst check`: reads a recording to its end, checks each of its processes, and says what it holds.

use std::fs::File;
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::describe::{self, line};
use pagefirst_record::{FormatError, Recording, check};

/// Check a recording.
#[derive(clap::Args, Debug)]
pub struct CheckArgs {
    /// The recording
    pub file: PathBuf,
}

/// Why a recording could not be checked.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{}: {source}", path.display())]
    Open { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Format { path: PathBuf, source: FormatError },
}

/// Checks and prints. The exit status is 0, or 1 if the recording can't be read or does not explain itself.
pub fn run(args: CheckArgs) -> ExitCode {
    match describe(&args.file) {
        Ok((text, passes)) => {
            // Whoever closes standard output early has seen enough.
            _ = std::io::stdout().write_all(text.as_bytes());
            if passes { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("pagefirst: {error}");
            ExitCode::FAILURE
        }
    }
}

fn describe(path: &Path) -> Result<(String, bool), Error> {
    let file = File::open(path).map_err(|source| Error::Open { path: path.into(), source })?;
    let format = |source| Error::Format { path: path.into(), source };
    let mut recording = Recording::open(BufReader::new(file)).map_err(format)?;
    let report = check(&mut recording).map_err(format)?;
    let trailer = recording.trailer().cloned().unwrap_or_default();
    let header = recording.header();
    let mut text = format!("{}: {}, recorded under {}\n", path.display(), header.program, header.emulator);
    describe::events(&mut text, &trailer, &report);
    describe::end(&mut text, &trailer, &report);
    let verdict = match report.passes() {
        true => "passes: of each process at most 0.01 % of the touches are unexplained",
        false => "FAILS: of a process more than 0.01 % of the touches are unexplained",
    };
    line(&mut text, "check", verdict);
    Ok((text, report.passes()))
}
