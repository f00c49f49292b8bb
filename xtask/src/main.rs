//! The tasks of this workspace: what CI runs, and what a person runs before it.
//!
//! `cargo xtask help` lists them. Each task is one module; `cmd` runs other programs, `rust_source` reads Rust.

mod ci;
mod cmd;
mod conformance;
mod deps;
mod fuzz;
mod kernel;
mod licence;
mod metadata;
mod miri;
mod mmu;
mod model;
mod no_alloc;
mod oom;
mod oracle;
mod plants;
mod rust_source;
mod shuttle;
mod tsan;

use std::process::ExitCode;

/// What a task says when it did not succeed.
type Failure = String;

/// The result of a task or of a part of one.
type Result<T = ()> = std::result::Result<T, Failure>;

const HELP: &str = "\
Usage: cargo xtask TASK

  ci                     everything below, cheapest first; stops at the first failure
  fmt                    check the formatting of every package
  clippy                 every target of every package, warnings denied
  doc                    build the documentation, warnings denied
  test [ARGS]            every test, documentation included; ARGS go to `cargo test`
  oom                    every place of the library that wants memory was refused it by a test (`test` checks it too)
  harsh [SEED]           tests again on a machine whose hardware does all that manuals allow
  no-alloc               prove that the library links neither std nor alloc
  mmu                    tables for RISC-V, AArch64 and LA57 are walked by QEMU's MMUs of these machines
  model [OPTIONS] [NAME] the loom models, or those with NAME in their path, and each planted mistake that they must catch;
                         --mutants each mistake against every model, --deep with more preemptions
  shuttle [OPTIONS] [TEST]
                         random schedules of the whole stack; --seed S runs one again, --runs N, --minutes N, --threads N;
                         --mutants [FILTER] for the mistakes that must be found, and found again by their seeds
  miri [--long]          tests of the library, and whole lives on the machine, under Miri; --long for half an hour
  tsan --minutes N       the stress under ThreadSanitizer for so long, and mistakes that it must see; with a nightly compiler
  oracle --minutes N     random sequences at fresh seeds against the oracle of the tests, for so long
  fuzz --minutes N       the fuzz targets, each for so long, with a nightly compiler and cargo-fuzz;
                         --target space|recording|formats, --keep to make fuzz/corpus anew
  fuzz-corpus            replay fuzz/corpus, with any compiler
  kernel [OPTIONS]       run the tiny kernel in QEMU, count its instructions, look for shared cache lines;
                         --only test|count|lines|stress, --accel kvm, --boots N, --minutes N, --seed S,
                         --profile CASE
  plants [FILTER]        the machine's checks, each with a mistake in the library that it must see
  conformance [--check]  write docs/conformance.md from the names of the tests, or check it
  deps                   docs/dependencies.md is complete and true, and every licence one we can use";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(code) = plants::as_compiler(&args) {
        return code;
    }
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("\nxtask: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result {
    let (task, rest) = args.split_first().map_or(("help", &[][..]), |(task, rest)| (task.as_str(), rest));
    let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
    match (task, rest.as_slice()) {
        ("ci", []) => ci::run(),
        ("fmt", []) => ci::fmt(),
        ("clippy", []) => ci::clippy(),
        ("doc", []) => ci::doc(),
        ("test", args) => ci::test(args),
        ("harsh", []) => ci::harsh("1"),
        ("harsh", [seed]) => ci::harsh(seed),
        ("no-alloc", []) => no_alloc::run(),
        ("mmu", []) => mmu::run(),
        ("model", args) => model::run(args),
        ("miri", []) => miri::run(false),
        ("miri", ["--long"]) => miri::run(true),
        ("tsan", ["--minutes", minutes]) => tsan::run(minutes),
        ("oom", []) => oom::run(),
        ("shuttle", args) => shuttle::run(args),
        ("oracle", ["--minutes", minutes]) => oracle::run(minutes),
        ("fuzz", args) => fuzz::run(args),
        ("fuzz-corpus", []) => fuzz::corpus(),
        ("kernel", args) => kernel::run(args),
        ("plants", []) => plants::run(None),
        ("plants", [filter]) => plants::run(Some(filter)),
        ("conformance", []) => conformance::write(),
        ("conformance", ["--check"]) => conformance::check(),
        ("deps", []) => deps::run(),
        ("help" | "--help" | "-h", _) => {
            println!("{HELP}");
            Ok(())
        }
        _ => Err(format!("cannot do `{}`\n\n{HELP}", args.join(" "))),
    }
}
