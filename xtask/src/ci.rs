//! `cargo xtask ci`: every check of this project, cheapest first.

use std::time::{Duration, Instant};

use crate::{Result, cmd, conformance, deps, fuzz, kernel, miri, mmu, model, no_alloc, oom, plants, shuttle};

/// How long everything may take on two CPUs.
const LIMIT: Duration = Duration::from_secs(25 * 60);

/// A step's name and what it does.
type Step = (&'static str, fn() -> Result);

const STEPS: [Step; 15] = [
    ("fmt", fmt),
    ("deps", deps::run),
    ("conformance --check", conformance::check),
    ("clippy", clippy),
    ("doc", doc),
    ("no-alloc", no_alloc::run),
    ("test", || test(&[])),
    ("fuzz-corpus", fuzz::corpus),
    ("harsh", || harsh("1")),
    ("miri", || miri::run(false)),
    ("mmu", mmu::run),
    ("kernel", || kernel::run(&[])),
    ("shuttle", || shuttle::run(&[])),
    ("model", || model::run(&[])),
    ("plants", || plants::run(None)),
];

/// Runs all steps, stops at the first that fails, and prints how long each took.
pub(crate) fn run() -> Result {
    cmd::set_deadline(LIMIT);
    let start = Instant::now();
    let mut summary = Vec::new();
    let mut result = Ok(());
    for (name, step) in STEPS {
        println!("\n==> {name}");
        let began = Instant::now();
        result =
            step().map_err(|failure| format!("step `{name}` failed: {failure}\n(again: cargo xtask {name})"));
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        let line = format!("{name:20} {word:7} {:7.1} s", began.elapsed().as_secs_f64());
        println!("<== {line}");
        summary.push(line);
        if result.is_err() {
            break;
        }
    }
    println!("\n{}", summary.join("\n"));
    let skipped: Vec<&str> = STEPS[summary.len()..].iter().map(|(name, _)| *name).collect();
    if !skipped.is_empty() {
        println!("not run: {}", skipped.join(", "));
    }
    println!("{:20} {:15.1} s", "all", start.elapsed().as_secs_f64());
    result
}

/// Checks the formatting.
pub(crate) fn fmt() -> Result {
    cmd::check(&mut cmd::cargo(&["fmt", "--all", "--check"]))
}

/// Lints every target of every package; the tiny kernel apart, which is built for bare hardware alone.
pub(crate) fn clippy() -> Result {
    let clippy = |args: &[&str]| {
        let mut command = cmd::cargo(&["clippy", "--quiet"]);
        cmd::check(command.args(args).args(["--", "-D", "warnings"]))
    };
    clippy(&["--workspace", "--all-targets"])?;
    for features in ["boot", "boot,stress"] {
        clippy(&["--package", "tiny-kernel", "--features", features, "--profile", "kernel"])?;
    }
    Ok(())
}

/// Builds the documentation.
pub(crate) fn doc() -> Result {
    let mut command = cmd::cargo(&["doc", "--workspace", "--no-deps", "--quiet"]);
    cmd::check(command.env("RUSTDOCFLAGS", "-D warnings"))
}

/// Runs every test of every package, and looks whether all that can fail for want of memory did; with arguments for
/// `cargo test`, what these select.
pub(crate) fn test(args: &[&str]) -> Result {
    let mut command = cmd::cargo(&["test", "--workspace"]);
    if !args.is_empty() {
        return cmd::check(command.args(args));
    }
    let sites = oom::Sites::begin()?;
    cmd::check(sites.told(command.args(COMPILED_ONCE)))?;
    sites.check()
}

/// So that not each of the many test programs compiles the library (`crates/pagefirst-machine/src/instances.rs`).
const COMPILED_ONCE: [&str; 2] = ["--features", "pagefirst-machine/__instances"];

/// The tests that can run on any hardware.
const ANY_HARDWARE: [&str; 9] = [
    "races",
    "stress",
    "mapping",
    "regressions",
    "oom",
    "conformance_af",
    "conformance_ends",
    "conformance_gi",
    "conformance_x",
];

/// Runs the tests of the machine that can run on any hardware on the one that does all that manuals allow, with chance
/// from `seed` on.
pub(crate) fn harsh(seed: &str) -> Result {
    let mut command = cmd::cargo(&["test", "--package", "pagefirst-machine", "--quiet"]);
    command.args(COMPILED_ONCE).args(ANY_HARDWARE.iter().flat_map(|test| ["--test", test]));
    cmd::check(command.env("PAGEFIRST_HARSH", seed))
}
