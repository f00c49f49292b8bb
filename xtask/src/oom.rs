//! `cargo xtask oom`: has every place of the library that wants memory been told that there is none?
//!
//! While tests run, the embedded machine writes down where in the library memory was wanted and where it was refused
//! (`PAGEFIRST_SITES`). The places that any test comes to are the list; the tests of `oom.rs` refuse at each.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Result, cmd};

/// Runs the tests of the library and of the machine, and looks.
pub(crate) fn run() -> Result {
    let sites = Sites::begin()?;
    let mut command =
        cmd::cargo(&["test", "--package", "pagefirst", "--package", "pagefirst-machine", "--quiet"]);
    cmd::check(sites.told(&mut command))?;
    sites.check()
}

/// Where the machine writes down what it sees.
pub(crate) struct Sites(PathBuf);

impl Sites {
    /// Nothing is written down yet.
    pub(crate) fn begin() -> Result<Sites> {
        let directory = cmd::target_dir().join("sites");
        if directory.exists() {
            fs::remove_dir_all(&directory).map_err(|e| told(&directory, &e))?;
        }
        fs::create_dir_all(&directory).map_err(|e| told(&directory, &e))?;
        Ok(Sites(directory))
    }
    /// The command with that in its environment.
    pub(crate) fn told<'c>(&self, command: &'c mut std::process::Command) -> &'c mut std::process::Command {
        command.env("PAGEFIRST_SITES", &self.0)
    }
    /// Prints how many there are; fails if there is one that never failed.
    pub(crate) fn check(&self) -> Result {
        let mut found = Found::default();
        for entry in fs::read_dir(&self.0).map_err(|e| told(&self.0, &e))? {
            let path = entry.map_err(|e| told(&self.0, &e))?.path();
            let text = fs::read_to_string(&path).map_err(|e| told(&path, &e))?;
            text.lines().try_for_each(|line| found.add(line))?;
        }
        found.check()
    }
}

fn told(path: &Path, error: &std::io::Error) -> String {
    format!("{}: {error}", path.display())
}

#[derive(Default)]
struct Found {
    seen: BTreeSet<String>,
    refused: BTreeSet<String>,
    points: u64,
}

impl Found {
    fn add(&mut self, line: &str) -> Result {
        let (what, rest) =
            line.split_once(' ').ok_or_else(|| format!("not a line of the machine's: {line}"))?;
        let all = match what {
            "seen" => &mut self.seen,
            "refused" => &mut self.refused,
            _ => {
                self.points += rest.parse::<u64>().map_err(|e| format!("{line}: {e}"))?;
                return Ok(());
            }
        };
        // Tests want memory themselves.
        if rest.starts_with("crates/pagefirst/src/") && !rest.contains("/test") {
            all.insert(rest.to_owned());
        }
        Ok(())
    }
    fn check(&self) -> Result {
        println!(
            "memory was refused at {} points, in {} places of the library",
            self.points,
            self.refused.len()
        );
        if self.seen.is_empty() {
            return Err(
                "no place that wants memory was seen: do the tests run without debug assertions?".into()
            );
        }
        let never: Vec<_> = self.seen.difference(&self.refused).map(String::as_str).collect();
        if never.is_empty() {
            return Ok(());
        }
        Err(format!(
            "memory is wanted here and was never refused (add a case to tests/oom.rs):\n  {}",
            never.join("\n  ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_never_failed_is_told() -> Result {
        let mut found = Found::default();
        for line in [
            "seen crates/pagefirst/src/a.rs:1:2",
            "seen crates/pagefirst/src/file/test/b.rs:1:2",
            "seen crates/pagefirst-machine/tests/c.rs:1:2",
            "points 3",
            "points 4",
        ] {
            found.add(line)?;
        }
        assert_eq!((found.points, found.seen.len()), (7, 1));
        assert!(found.check().is_err_and(|e| e.ends_with("a.rs:1:2")));
        found.add("refused crates/pagefirst/src/a.rs:1:2")?;
        found.check()?;
        assert!(Found::default().check().is_err() && found.add("what").is_err());
        Ok(())
    }
}
