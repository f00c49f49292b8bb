//! `cargo xtask tsan`: the stress under ThreadSanitizer, which sees races on plain memory. It needs a nightly compiler.
//!
//! For each access to memory the sanitizer knows which others come before it, by locks and by the orders that atomics are
//! given, and not by what the hardware happens to do: an order that is too weak is told of on x86 as well. So it looks at
//! what loom does not see (values that are no atomics) and Miri has no time for (many threads). It does not know fences:
//! where plain memory depends on one, an order of an atomic has to say the same.
//!
//! First the library must show no race. Then each of [`MISTAKES`] is made, and must show one: so nobody takes the
//! silence of a tool that looks at nothing for an answer.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::cmd::{self, End};
use crate::{Result, plants};

const NEEDS: &str = "ThreadSanitizer needs a nightly compiler and the source of the standard library:
  rustup toolchain install nightly --profile minimal --component rust-src";

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Mistakes that are races on plain memory, planted in the library.
const MISTAKES: [&str; 2] = ["unpin_relaxed", "publish_relaxed"];

/// How long a mistake may go on unseen.
const PATIENCE: u64 = 60;

/// Runs the stress for so many minutes, and then the mistakes.
pub(crate) fn run(minutes: &str) -> Result {
    let minutes: u64 = minutes.parse().map_err(|_| format!("tsan --minutes {minutes}: that is no number"))?;
    let version = cmd::capture(&mut cmd::nightly(&["--version"]), None);
    if !version.is_ok_and(|version| version.success()) {
        return Err(NEEDS.to_owned());
    }
    cmd::check(&mut stress(&build(None)?, 60 * minutes))?;
    for mistake in MISTAKES {
        let mut command = stress(&build(Some(mistake))?, PATIENCE);
        command.env("TSAN_OPTIONS", "halt_on_error=1");
        let output = cmd::capture(&mut command, Some(Duration::from_secs(2 * PATIENCE)))?;
        let race = output.stderr.lines().find(|line| line.starts_with("SUMMARY: ThreadSanitizer: data race"));
        match (race, output.end) {
            (Some(_), End::Exited(_)) => println!("{mistake}: a race"),
            (Some(_) | None, _) => return Err(format!("tsan: no race is seen with `{mistake}`")),
        }
    }
    Ok(())
}

/// The program `pagefirst`, with the sanitizer in all of it, and a mistake in the library or none.
fn build(mistake: Option<&str>) -> Result<PathBuf> {
    let target = cmd::target_dir().join("tsan");
    let cargo = |args: &[&str]| {
        let mut command = cmd::nightly(args);
        command.env("RUSTFLAGS", "-Zsanitizer=thread").env("CARGO_BUILD_TARGET", TARGET);
        command.env("CARGO_TARGET_DIR", &target);
        command.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1").env("CARGO_PROFILE_DEV_DEBUG", "line-tables-only");
        command
    };
    let args = ["build", "--quiet", "-Zbuild-std", "--package", "pagefirst-cli"];
    let mut command = plants::planted(mistake, cargo, &args)?;
    cmd::check(&mut command)?;
    Ok(target.join(TARGET).join("debug/pagefirst"))
}

fn stress(program: &PathBuf, seconds: u64) -> Command {
    let mut command = cmd::in_workspace(program);
    command.args(["stress", "--threads", "16", "--seed", "1", "--for", &format!("{seconds}s")]);
    command
}
