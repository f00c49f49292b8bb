//! `cargo xtask miri`: tests of the library and whole lives on the machine under Miri, the interpreter that knows what
//! unsafe code may do. It needs a nightly compiler.
//!
//! Miri looks for memory that is used after it was given back or read before it was written, pointers that lead where
//! they may not (strict provenance, Tree Borrows), data races, and leaks. From a seed it decides which thread goes on
//! when, and which of the values that the memory model allows a load sees. Everything is some thousand times slower
//! there, so the short form runs what is quick, with few seeds.

use std::process::Command;

use crate::{Result, cmd};

const NEEDS: &str = "Miri needs a nightly compiler and two of its components:
  rustup toolchain install nightly --profile minimal --component miri --component rust-src";

/// The model of aliasing. What lies between the atomics of a slice is not told apart, which would take most of the time.
const TREE: &str = "-Zmiri-tree-borrows -Zmiri-tree-borrows-no-precise-interior-mut";
/// The older and stricter model, which is the default.
const STACKED: &str = "";

/// One run of a test program.
struct Job {
    package: &'static str,
    program: &'static [&'static str],
    /// Words in the names of the tests that are run; none for all.
    tests: &'static [&'static str],
    seeds: u32,
    aliasing: &'static str,
}

const LIB: Job = Job { package: "pagefirst", program: &["--lib"], tests: &QUICK, seeds: 1, aliasing: TREE };
const LIVES: Job = Job {
    package: "pagefirst-machine",
    program: &["--test", "lives"],
    tests: &[],
    seeds: 16,
    aliasing: TREE,
};

const SHORT: [Job; 2] = [LIB, Job { seeds: 1, tests: &LIVELY, ..LIVES }];
const LONG: [Job; 3] = [Job { seeds: 4, ..LIB }, LIVES, Job { seeds: 2, aliasing: STACKED, ..LIVES }];

/// Tests of the library that touch memory by pointers and take no time.
const QUICK: [&str; 8] = [
    "mem::",
    "frame::",
    "sync::",
    "a_child_joins_the_roots_of_its_parent",
    "a_failed_read_leaves_nothing",
    "another_thread_sees_the_page_being_read_in",
    "pages_survive_their_cache_while_they_are_held",
    "r13_what_is_read_while_the_file_shrinks_is_not_seen",
];

/// Lives of both kinds of memory, and races.
const LIVELY: [&str; 5] = ["private_memory_x86_64", "a_file", "r04_", "r05_", "r12_"];

/// Runs the short form, of a minute, or the long one, of some forty minutes of a CPU.
pub(crate) fn run(is_long: bool) -> Result {
    let version = cmd::capture(&mut miri(&["--version"]), None);
    if !version.is_ok_and(|version| version.success()) {
        return Err(NEEDS.to_owned());
    }
    let jobs = if is_long { LONG.as_slice() } else { &SHORT };
    jobs.iter().try_for_each(|job| cmd::check(&mut job.command()))
}

impl Job {
    fn command(&self) -> Command {
        let mut command = miri(&["test", "--quiet", "--package", self.package]);
        command.args(self.program).arg("--").args(self.tests);
        let seeds = format!("-Zmiri-many-seeds=0..{}", self.seeds);
        command.env("MIRIFLAGS", ["-Zmiri-strict-provenance", self.aliasing, &seeds].join(" "));
        command
    }
}

/// `cargo miri` of the nightly toolchain.
fn miri(args: &[&str]) -> Command {
    let mut command = cmd::nightly(&["miri"]);
    command.args(args);
    command
}
