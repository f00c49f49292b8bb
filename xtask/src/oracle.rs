//! `cargo xtask oracle`: the oracle of the machine's tests, at fresh seeds, for as long as one likes.
//!
//! What CI runs of it for seconds runs here for minutes: optimised, with debug assertions and the machine's checks. Each
//! kind of sequence gets an equal part of the time. The first failure ends it and names its seed.

use crate::{Result, cmd};

/// The tests of `crates/pagefirst-machine/tests/oracle.rs` that go on for `PAGEFIRST_MINUTES`.
const KINDS: [&str; 5] =
    ["one_cpu", "two_cpus_in_turn", "four_cpus_in_turn", "two_cpus_together", "four_cpus_together"];

/// Runs the oracle for `minutes` in all.
pub(crate) fn run(minutes: &str) -> Result {
    let minutes: f64 = minutes.parse().map_err(|_| format!("`{minutes}` is no number of minutes"))?;
    for kind in KINDS {
        let args =
            ["--package", "pagefirst-machine", "--test", "oracle", "--", "--exact", kind, "--nocapture"];
        let mut command = cmd::cargo(&["test", "--release", "--quiet"]);
        command
            .args(args)
            .env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true")
            .env("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "true")
            .env("CARGO_TARGET_DIR", cmd::target_dir().join("oracle"))
            .env("PAGEFIRST_MINUTES", (minutes / KINDS.len() as f64).to_string());
        cmd::check(&mut command)?;
    }
    Ok(())
}
