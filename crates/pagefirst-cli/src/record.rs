//! `pagefirst record`: records what a program does to its memory.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::describe::{self, line};
use pagefirst_record::{RecordOptions, Summary, record};

/// The exit status of a recording that lacks something.
const INCOMPLETE: u8 = 3;
/// The exit status when nothing could be recorded, or the check of the recording fails.
const FAILED: u8 = 1;

/// Record what a program does to its memory.
#[derive(clap::Args, Debug)]
pub struct RecordArgs {
    /// The recording to write [default: the program's name with .pfrec]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// How often to run the program again, without the emulator, for Linux's own figures
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub native_runs: u32,
    /// Exit with the program's status even if the recording lacks something: a program that the emulator can't run
    /// was executed, or a process was killed
    #[arg(long)]
    pub allow_untraced: bool,
    /// How hard to compress, from 1 to 19
    #[arg(long, value_name = "LEVEL", default_value_t = 19, value_parser = clap::value_parser!(i32).range(1..=19))]
    pub level: i32,
    /// The program, and its arguments
    #[arg(required = true, trailing_var_arg = true, value_names = ["PROGRAM", "ARGS"])]
    pub command: Vec<OsString>,
}

/// Records the program and says what came of it, on standard error: standard output is the program's. The exit status
/// is the program's, or 3 when the recording lacks something, or 1 when there is none or it fails its check.
pub fn run(args: RecordArgs) -> ExitCode {
    let mut command = args.command.into_iter();
    let program = command.next().unwrap_or_default();
    let output = args.output.unwrap_or_else(|| {
        let mut name = PathBuf::from(&program).file_name().unwrap_or_default().to_owned();
        name.push(".pfrec");
        name.into()
    });
    let options = RecordOptions {
        program,
        arguments: command.collect(),
        output,
        native_runs: args.native_runs,
        level: args.level,
    };
    let summary = match record(&options) {
        Ok(summary) => summary,
        Err(error) => {
            eprintln!("pagefirst: {error}");
            return FAILED.into();
        }
    };
    eprint!("{}", describe(&options, &summary));
    if !summary.report.passes() {
        eprintln!(
            "pagefirst: the recording does not explain itself: more than 0.01 % of its touches are unexplained"
        );
        return FAILED.into();
    }
    if !summary.trailer.losses.is_empty() && !args.allow_untraced {
        eprintln!("pagefirst: the recording lacks what is listed above (--allow-untraced accepts that)");
        return INCOMPLETE.into();
    }
    u8::try_from(summary.trailer.exit_status).unwrap_or(FAILED).into()
}

/// The summary.
fn describe(options: &RecordOptions, summary: &Summary) -> String {
    let Summary { trailer, report, .. } = summary;
    let mut text = format!("pagefirst: recorded {}\n", options.program.display());
    let size = describe::group(summary.file_bytes.div_ceil(1024));
    line(&mut text, "recording", &format!("{} ({size} KiB)", options.output.display()));
    describe::events(&mut text, trailer, report);
    let seconds = |duration: std::time::Duration| format!("{:.2} s", duration.as_secs_f64());
    let native_time =
        summary.native.map_or_else(String::new, |time| format!(", {} without it", seconds(time)));
    line(&mut text, "time", &format!("{} under the emulator{native_time}", seconds(summary.emulated)));
    describe::end(&mut text, trailer, report);
    for note in &summary.notes {
        line(&mut text, "note", note);
    }
    text
}
