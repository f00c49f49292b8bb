//! `pagefirst`: records what a real program did to its memory, and replays it through the library's fault path;
//! and stresses the library.

mod check;
mod describe;
mod record;
mod replay;
mod stress;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Record what a program did to its memory, and replay it through pagefirst's fault path.
///
/// Without a command, a bundled recording is replayed.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    replay: replay::ReplayArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Record a program's memory calls and the pages it touches
    Record(record::RecordArgs),
    /// Check a recording and say what it holds
    Check(check::CheckArgs),
    /// Replay a recording on the embedded machine and print what it cost
    Replay(replay::ReplayArgs),
    /// Do all that the library does, on many CPUs at once, and verify it
    Stress(stress::StressArgs),
}

fn main() -> ExitCode {
    let args = Args::parse();
    match args.command {
        Some(Command::Record(args)) => record::run(args),
        Some(Command::Check(args)) => check::run(args),
        Some(Command::Replay(args)) => replay::run(args),
        Some(Command::Stress(args)) => stress::run(args),
        None => replay::run(args.replay),
    }
}
