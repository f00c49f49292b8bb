//! `cargo xtask fuzz`: the fuzz targets under libFuzzer, with a nightly compiler; `cargo xtask fuzz-corpus`: the inputs
//! that it found worth keeping, with any compiler.
//!
//! What is found goes to `target/fuzz`, and what fails to `fuzz/artifacts`. `--keep` makes `fuzz/corpus` anew: the fewest
//! inputs that reach as much as all that were found.

use std::path::Path;
use std::process::Command;

use crate::{Result, cmd};

/// A target: its name, the longest input that it is given, and how it is built.
type Target = (&'static str, u32, &'static [&'static str]);

// What is compared with what tells nothing where bytes are seeds, and takes longer than all else.
const TARGETS: [Target; 4] = [
    ("space", 405, &["--no-trace-compares"]),
    ("contents", 304, &["--no-trace-compares"]),
    ("recording", 4096, &[]),
    ("formats", 22, &[]),
];

/// The longest input that is kept.
const KEEP: u32 = 512;

const NEEDS: &str = "fuzzing needs a nightly compiler, one for C++, and cargo-fuzz:
  rustup toolchain install nightly
  cargo install cargo-fuzz";

/// What is asked for.
struct Options {
    minutes: f64,
    targets: Vec<Target>,
    keeps: bool,
}

fn parse(args: &[&str]) -> Result<Options> {
    let mut options = Options { minutes: 0.0, targets: TARGETS.to_vec(), keeps: false };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().copied().ok_or_else(|| format!("`{arg}` needs a value"));
        match *arg {
            "--minutes" => {
                let text = value()?;
                let minutes = text.parse().ok().filter(|minutes: &f64| *minutes >= 0.0);
                options.minutes = minutes.ok_or_else(|| format!("`{text}` is no number of minutes"))?;
            }
            "--target" => {
                let name = value()?;
                options.targets.retain(|target| target.0 == name);
            }
            "--keep" => options.keeps = true,
            _ => return Err(format!("cannot do `{arg}`")),
        }
    }
    if options.targets.is_empty() {
        return Err(format!("the targets are {}", TARGETS.map(|target| target.0).join(", ")));
    }
    if options.minutes == 0.0 && !options.keeps {
        return Err("`--minutes` says how long each target runs".to_owned());
    }
    Ok(options)
}

/// Runs each target for so many minutes.
pub(crate) fn run(args: &[&str]) -> Result {
    let options = parse(args)?;
    let version = cmd::capture(&mut cargo_fuzz(&["--version"]), None);
    if !version.is_ok_and(|version| version.success()) {
        return Err(NEEDS.to_owned());
    }
    for target in options.targets {
        let found = cmd::target_dir().join("fuzz").join("found").join(target.0);
        let kept = cmd::root().join("fuzz").join("corpus").join(target.0);
        create(&found)?;
        create(&kept)?;
        if options.minutes > 0.0 {
            let seconds = format!("-max_total_time={}", (options.minutes * 60.0).ceil());
            let longest = format!("-max_len={}", target.1);
            fuzz(target, &[&found, &kept], &[&seconds, &longest])?;
        }
        if options.keeps {
            keep(target, &found, &kept)?;
        }
    }
    Ok(())
}

/// Replays the corpus.
pub(crate) fn corpus() -> Result {
    cmd::check(&mut cmd::cargo(&["run", "--quiet", "--package", "pagefirst-fuzz", "--example", "replay"]))
}

/// `cargo fuzz` of the nightly toolchain.
fn cargo_fuzz(args: &[&str]) -> Command {
    let mut command = cmd::nightly(&["fuzz"]);
    command.args(args);
    command.env("CARGO_TARGET_DIR", cmd::target_dir().join("fuzz"));
    command
}

/// Runs a target on folders of inputs; new ones go to the first. An input that takes long or much memory is a failure.
fn fuzz(target: Target, folders: &[&Path], options: &[&str]) -> Result {
    let (name, _, build) = target;
    let mut command =
        cargo_fuzz(&["run", "--fuzz-dir", "fuzz", "--features", "libfuzzer", "--sanitizer", "none"]);
    command
        .args(build)
        .arg(name)
        .args(folders)
        .args(["--", "-timeout=20", "-rss_limit_mb=4096"])
        .args(options);
    cmd::check(&mut command).map_err(|failure| {
        let replay = "cargo run --package pagefirst-fuzz --example replay --";
        format!("{failure}\n(what an input stands for: {replay} {name} fuzz/artifacts/{name}/FILE)")
    })
}

/// Makes what is kept anew.
fn keep(target: Target, found: &Path, kept: &Path) -> Result {
    let new = found.with_extension("new");
    let failed = |error| format!("{}: {error}", new.display());
    let _ = std::fs::remove_dir_all(&new);
    create(&new)?;
    fuzz(
        target,
        &[&new, found, kept],
        &["-set_cover_merge=1", "-use_counters=0", &format!("-max_len={}", target.1.min(KEEP))],
    )?;
    std::fs::remove_dir_all(kept).map_err(failed)?;
    create(kept)?;
    for entry in std::fs::read_dir(&new).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        std::fs::copy(entry.path(), kept.join(entry.file_name())).map_err(failed)?;
    }
    Ok(())
}

fn create(folder: &Path) -> Result {
    std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read() {
        let options = parse(&["--minutes", "0.5", "--target", "formats"]).expect("they are right");
        assert_eq!((options.minutes, options.targets), (0.5, vec![TARGETS[3]]));
        assert!(parse(&[]).is_err_and(|failure| failure.contains("--minutes")));
        assert!(parse(&["--minutes", "-1"]).is_err_and(|failure| failure.contains("`-1`")));
        assert!(
            parse(&["--keep", "--target", "x"]).is_err_and(|failure| failure.contains("space, contents"))
        );
        assert!(parse(&["--minutes"]).is_err() && parse(&["x"]).is_err());
    }
}
