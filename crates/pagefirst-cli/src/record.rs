//! `pagefirst record`: records what a program does to its memory.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use pagefirst_record::{
    Event, Loss, LossKind, ProcessReport, Reason, RecordOptions, Summary, Unexplained, record,
};

/// The exit status of a recording that lacks something.
const INCOMPLETE: u8 = 3;
/// The most processes that are listed.
const PROCESSES: usize = 20;
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

/// The summary, a line for each thing to know.
fn describe(options: &RecordOptions, summary: &Summary) -> String {
    let Summary { trailer, report, .. } = summary;
    let mut text = String::new();
    let mut line = |name: &str, value: String| _ = writeln!(text, "  {name:<12} {value}");
    let size = summary.file_bytes.div_ceil(1024);
    line("recording", format!("{} ({} KiB)", options.output.display(), group(size)));
    let mut events =
        format!("{}, of which {} first touches of pages", group(report.events), group(report.touches));
    if trailer.accesses > 0 {
        _ = write!(events, ", out of {} reads and writes", group(trailer.accesses));
    }
    line("events", events);
    let explained =
        format!("{} touches by a live mapping; {} not", group(report.explained), group(report.unexplained));
    line("explained", explained);
    for example in &report.examples {
        let Unexplained { event, process, ref touch, reason } = *example;
        line("", format!("event {event}, of process {}: {}", process.0, unexplained(touch, reason)));
    }
    if report.processes.len() > 1 {
        for (number, process) in report.processes.iter().enumerate().take(PROCESSES) {
            line(if number == 0 { "processes" } else { "" }, of_process(number, process));
        }
        if report.processes.len() > PROCESSES {
            line("", format!("and {} more", group((report.processes.len() - PROCESSES) as u64)));
        }
    }
    let seconds = |duration: std::time::Duration| format!("{:.2} s", duration.as_secs_f64());
    let native_time =
        summary.native.map_or_else(String::new, |time| format!(", {} without it", seconds(time)));
    line("time", format!("{} under the emulator{native_time}", seconds(summary.emulated)));
    line("exit status", trailer.exit_status.to_string());
    if let Some(native) = &trailer.native {
        let median = native.median();
        line(
            "Linux took",
            format!(
                "{} minor and {} major faults, {} KiB resident at the peak, {} KiB of page tables at the end",
                group(median.minor_faults),
                group(median.major_faults),
                group(median.vm_hwm_kib),
                group(median.vm_pte_kib)
            ),
        );
        let (runs, several) = (native.runs.len(), report.processes.len() > 1);
        let whose = if several { ", of the first process alone" } else { "" };
        line("", format!("(median of {runs} runs on Linux {}{whose})", native.kernel));
        if let Some(other) = native.runs.iter().find(|run| run.exit_status != trailer.exit_status) {
            line("note", format!("a native run ended with status {}", other.exit_status));
        }
    }
    for loss in &trailer.losses {
        line("lost", lost(loss));
    }
    for note in &summary.notes {
        line("note", note.clone());
    }
    format!("pagefirst: recorded {}\n{text}", options.program.display())
}

/// A process: who made it, what it ran, what was found of it.
fn of_process(number: usize, process: &ProcessReport) -> String {
    let origin = process.parent.map_or_else(String::new, |parent| format!(", made by {}", parent.0));
    format!(
        "{number}{origin}: {}; {} touches, {} unexplained",
        process.programs.join(", then "),
        group(process.touches),
        group(process.unexplained)
    )
}

fn lost(loss: &Loss) -> String {
    let process = loss.process.0;
    match loss.kind {
        LossKind::Exec => format!("what happened after process {process} replaced itself by {}", loss.name),
        LossKind::Cut => format!("perhaps the last events of process {process}, which was killed"),
    }
}

fn unexplained(touch: &Event, reason: Reason) -> String {
    let reason = match reason {
        Reason::NotMapped => "nothing is mapped there",
        Reason::NotAllowed => "the mapping does not allow it",
        Reason::BeyondEnd => "it is beyond the end of the mapped file",
    };
    match touch {
        Event::Touch { at, access, .. } => {
            format!("{access:?} at {:#x} of mapping {}: {reason}", at.offset, at.mapping.0)
        }
        Event::Stray { recorded, access, .. } => format!("{access:?} at address {recorded:#x}: {reason}"),
        other => format!("{other:?}: {reason}"),
    }
}

/// A number with its digits in groups of three.
fn group(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
