//! `pagefirst replay`: performs a recording's calls and touches on the embedded machine and prints what they cost.
//!
//! A recording is read whole and checked first, so that a malformed one does nothing. Then it is replayed twice, with
//! tables postponed and with tables upfront, on a machine of its own each time.

mod beside;
mod crew;
mod engine;
mod place;
mod report;
mod touched;

use engine::{Options, ReplayError, Run};
use pagefirst::policy::FaultAround;
use pagefirst_record::{Checker, FormatError, Header, Native, Recording, Report, Trailer};
use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::process::ExitCode;

/// A recording that comes with the program.
struct Bundled {
    name: &'static str,
    bytes: &'static [u8],
}

const BUNDLED: [Bundled; 4] = [
    Bundled { name: "cc1", bytes: include_bytes!("../../recordings/cc1.pfrec") },
    Bundled { name: "sqlite", bytes: include_bytes!("../../recordings/sqlite.pfrec") },
    Bundled { name: "python", bytes: include_bytes!("../../recordings/python.pfrec") },
    Bundled { name: "shell", bytes: include_bytes!("../../recordings/shell.pfrec") },
];

/// When tables are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tables {
    /// The page first, the tables after
    Postponed,
    /// Tables first, as Linux did before 2016
    Upfront,
    /// As Linux 6.18 keeps them
    Linux,
}

/// Where private memory gets huge pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Huge {
    /// Nowhere
    Never,
    /// Where the program asked for them
    Advise,
    /// Everywhere but where the program refused them
    Always,
}

impl Huge {
    /// From what Linux says of its setting.
    fn of_linux(setting: &str) -> Self {
        match setting {
            "always" => Self::Always,
            "madvise" => Self::Advise,
            _ => Self::Never,
        }
    }
}

/// Whose ways a replay follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ways {
    /// The library's own, as far as nothing else is asked for
    Pagefirst,
    /// Linux's: a window of 64 KiB, tables that stay until their range is unmapped, its placement and huge pages
    Linux,
}

/// Where mappings go that the program did not place itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// Where Linux 6.12 and later put them: anonymous mappings of whole 2 MiB aligned to that; at random, here as
    /// far as Linux goes on average
    Linux,
    /// Packed from the top, program and stack included
    Ours,
    /// Where they were while recording
    Recorded,
}

/// Replay a recording and print what it cost.
#[derive(clap::Args, Debug)]
pub struct ReplayArgs {
    /// A recording, or the name of a bundled one: cc1, sqlite, python, shell
    #[arg(default_value = "cc1")]
    pub file: PathBuf,
    /// Whose ways to follow. With Linux's, what Linux took for the program is printed beside it, with the errors
    #[arg(long, value_enum, default_value = "pagefirst")]
    pub policy: Ways,
    /// When tables are made; another way is printed beside it
    #[arg(long, value_enum, default_value = "postponed", conflicts_with = "policy")]
    pub tables: Tables,
    /// How much of a cached file a read fault maps: a power of two from 4K to 2M; or `adaptive`: 16K, 64K or 256K, by
    /// what was used nearby
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = parse_window,
        conflicts_with = "policy")]
    pub fault_around: FaultAround,
    /// Where mappings go
    #[arg(long, value_enum, default_value = "linux", conflicts_with = "policy")]
    pub place: Placement,
    /// Where private memory gets huge pages [default: advise; with Linux's policy what the recording says of Linux, or
    /// else this machine's setting]
    #[arg(long, value_enum)]
    pub huge: Option<Huge>,
    /// On how many CPUs the recorded threads run
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub cpus: u16,
    /// The machine's memory, from 64K to 8T
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = parse_memory)]
    pub memory: u64,
    /// Let the machine check the library while it runs it
    #[arg(long)]
    pub checks: bool,
    /// Replay so many times in a row, each time in a new space of one machine whose files stay cached, and print the
    /// speed instead
    #[arg(long, value_name = "ROUNDS", conflicts_with = "json",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub repeat: Option<u32>,
    /// In how many loops at once
    #[arg(long, value_name = "N", default_value_t = 1, requires = "repeat",
        value_parser = clap::value_parser!(u16).range(1..=64))]
    pub loops: u16,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: a number above 0, and K, M, G, T or nothing behind it");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(wrong()),
    };
    let bytes = number.checked_shl(shift).filter(|b| b >> shift == number).ok_or_else(wrong)?;
    if bytes == 0 { Err(wrong()) } else { Ok(bytes) }
}

fn parse_memory(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    let fits = (64 << 10..=8 << 40).contains(&bytes);
    if fits { Ok(bytes) } else { Err(format!("{text:?} is not from 64K to 8T")) }
}

fn parse_window(text: &str) -> Result<FaultAround, String> {
    let window = match text {
        "adaptive" => FaultAround::adaptive(16 << 10, 256 << 10),
        size => FaultAround::fixed(parse_size(size)?),
    };
    window.ok_or_else(|| format!("{text:?} is neither a power of two from 4K to 2M nor `adaptive`"))
}

/// The most bytes of a recording that are read, compressed.
const LARGEST: u64 = 1 << 30;

/// Why a recording was not replayed.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{name}: {source}")]
    Open { name: String, source: std::io::Error },
    #[error("{name}: larger than {LARGEST} bytes, the most a recording may have")]
    TooLarge { name: String },
    #[error("{name}: {source}")]
    Format { name: String, source: FormatError },
    #[error("{name}: {unexplained} of {touches} touches are unexplained: nothing that is mapped allows them")]
    Unexplained { name: String, unexplained: u64, touches: u64 },
    #[error("{name}: {source}")]
    Replay { name: String, source: ReplayError },
}

/// A recording in memory, whole and checked.
pub struct Checked {
    name: String,
    bytes: Vec<u8>,
    header: Header,
    trailer: Trailer,
    report: Report,
}

impl Checked {
    fn open(&self) -> Result<Recording<&[u8]>, FormatError> {
        Recording::open(self.bytes.as_slice())
    }
    /// What Linux took for the program.
    pub fn native(&self) -> Option<&Native> {
        self.trailer.native.as_ref()
    }
}

fn read(args: &ReplayArgs) -> Result<Checked, Error> {
    let name = args.file.display().to_string();
    let bundled = BUNDLED.iter().find(|b| b.name == name && !args.file.exists());
    let bytes = match bundled {
        Some(b) => b.bytes.to_vec(),
        None => {
            let mut bytes = Vec::new();
            let file = std::fs::File::open(&args.file);
            let read = file.and_then(|f| f.take(LARGEST + 1).read_to_end(&mut bytes));
            read.map_err(|source| Error::Open { name: name.clone(), source })?;
            if bytes.len() as u64 > LARGEST {
                return Err(Error::TooLarge { name });
            }
            bytes
        }
    };
    let format = |source| Error::Format { name: name.clone(), source };
    let mut recording = Recording::open(bytes.as_slice()).map_err(format)?;
    let header = recording.header().clone();
    let mut checker = Checker::new(&header.program);
    while let Some((process, event)) = recording.next_event().map_err(format)? {
        checker.event(process, &event);
    }
    let report = checker.report().clone();
    let trailer = recording.trailer().cloned().unwrap_or_default();
    if !report.passes() {
        let (unexplained, touches) = (report.unexplained, report.touches);
        return Err(Error::Unexplained { name, unexplained, touches });
    }
    Ok(Checked { name, bytes, header, trailer, report })
}

/// Replays, prints, and answers with the exit status: 0, or 1 when the recording or a replay of it is no good.
pub fn run(args: ReplayArgs) -> ExitCode {
    match replay(&args) {
        Ok(text) => {
            use std::io::Write;
            match std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush()) {
                // Whoever read it has read enough.
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("pagefirst: standard output: {error}");
                    ExitCode::FAILURE
                }
                Ok(()) => ExitCode::SUCCESS,
            }
        }
        Err(error) => {
            eprintln!("pagefirst: {error}");
            ExitCode::FAILURE
        }
    }
}

fn replay(args: &ReplayArgs) -> Result<String, Error> {
    let recording = read(args)?;
    let plans = match (args.policy, args.tables) {
        (Ways::Linux, _) => [("linux", Tables::Linux), ("pagefirst", Tables::Postponed)],
        (_, Tables::Postponed) => [("postponed", Tables::Postponed), ("upfront", Tables::Upfront)],
        (_, Tables::Upfront) => [("upfront", Tables::Upfront), ("postponed", Tables::Postponed)],
        (_, Tables::Linux) => [("linux", Tables::Linux), ("postponed", Tables::Postponed)],
    };
    let huge = args.huge.unwrap_or_else(|| match (args.policy, recording.native()) {
        (Ways::Pagefirst, _) => Huge::Advise,
        (Ways::Linux, Some(native)) => Huge::of_linux(&native.huge_pages),
        (Ways::Linux, None) => Huge::of_linux(&pagefirst_record::huge_page_setting()),
    });
    let options = |(name, tables)| Options {
        name,
        tables,
        fault_around: args.fault_around,
        place: args.place,
        huge,
        cpus: args.cpus as usize,
        memory: args.memory,
        checks: args.checks,
    };
    let failed = |source| Error::Replay { name: recording.name.clone(), source };
    if let Some(rounds) = args.repeat {
        let (times, all) =
            engine::repeat(&recording, &options(plans[0]), rounds, args.loops).map_err(failed)?;
        return Ok(report::speed(&recording, times, all, args.loops));
    }
    let run = |plan: (&'static str, _), n| -> Result<Run, Error> {
        let bar = progress(recording.report.events, &format!("replay {n} of 2, {}", plan.0));
        let run = engine::replay(&recording, &options(plan), &bar);
        bar.finish_and_clear();
        run.map_err(failed)
    };
    let [first, second] = plans;
    let (first, second) = (run(first, 1)?, run(second, 2)?);
    let report = report::Comparison { recording: &recording, args, huge, first: &first, second: &second };
    Ok(if args.json { report.json() } else { report.text() })
}

/// A progress bar when there is somebody to see it, and enough to wait for.
fn progress(events: u64, what: &str) -> indicatif::ProgressBar {
    const LONG: u64 = 200_000;
    if events < LONG || !std::io::stderr().is_terminal() {
        return indicatif::ProgressBar::hidden();
    }
    let style = indicatif::ProgressStyle::with_template("{msg} [{bar:40}] {percent}% {eta}");
    let bar = indicatif::ProgressBar::new(events).with_message(what.to_owned());
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_refused() {
        assert_eq!(parse_size("64K"), Ok(64 << 10));
        assert_eq!(parse_size("4G"), Ok(4 << 30));
        assert_eq!(parse_size("123"), Ok(123));
        assert_eq!(parse_memory("1T"), Ok(1 << 40));
        assert!(parse_memory("4K").is_err() && parse_memory("9T").is_err());
        for wrong in ["", "K", "12X", "-1", "0", "99999999999G"] {
            assert!(parse_size(wrong).is_err(), "{wrong:?}");
        }
        assert!(parse_window("adaptive").is_ok_and(|w| !w.is_fixed()));
        assert!(parse_window("2M").is_ok() && parse_window("4K").is_ok());
        assert!(parse_window("4M").is_err() && parse_window("2K").is_err() && parse_window("12K").is_err());
    }
}
