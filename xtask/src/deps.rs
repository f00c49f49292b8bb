//! `cargo xtask deps`: every dependency is listed with its reason, is used, and has a licence that we can use.

use std::collections::BTreeSet;

use crate::licence::is_accepted;
use crate::metadata::{self, Package};
use crate::rust_source::{Source, rust_files};
use crate::{Result, cmd};

const LIST: &str = "docs/dependencies.md";

/// A crate and the package of ours that names it.
type Use = (String, String);

/// Checks the list and the licences.
pub(crate) fn run() -> Result {
    let text = std::fs::read_to_string(cmd::root().join(LIST)).map_err(|e| format!("{LIST}: {e}"))?;
    let mut problems = Vec::new();
    let listed = parse(&text, &mut problems);
    let all = metadata::all()?;
    let ours: Vec<&Package> = all.packages.iter().filter(|package| package.ours).collect();
    compare(&listed, &uses(&ours), &mut problems);
    for package in ours {
        problems.extend(unused(&package.dependencies, &words(package)?, &package.name));
    }
    problems.extend(all.packages.iter().filter_map(licence_problem));
    if !problems.is_empty() {
        return Err(format!("dependencies:\n  {}", problems.join("\n  ")));
    }
    println!(
        "{} uses listed in {LIST}; {} packages have accepted licences",
        listed.len(),
        all.packages.len()
    );
    Ok(())
}

fn uses(packages: &[&Package]) -> BTreeSet<Use> {
    let pairs = packages.iter().flat_map(|package| {
        package.dependencies.iter().map(|dependency| (dependency.clone(), package.name.clone()))
    });
    pairs.collect()
}

/// Every word in the code of a package.
fn words(package: &Package) -> Result<BTreeSet<String>> {
    let mut words = BTreeSet::new();
    for folder in &package.folders {
        for path in rust_files(folder, "")? {
            words.extend(Source::read(folder, &path)?.words());
        }
    }
    Ok(words)
}

/// Complaints about dependencies that no code of their package names.
fn unused(dependencies: &BTreeSet<String>, words: &BTreeSet<String>, package: &str) -> Vec<String> {
    let unnamed = dependencies.iter().filter(|name| !words.contains(&name.replace('-', "_")));
    unnamed.map(|name| format!("no code of `{package}` uses `{name}`")).collect()
}

/// Reads the rows of the table: crate, packages separated by commas, reason.
fn parse(text: &str, problems: &mut Vec<String>) -> BTreeSet<Use> {
    let mut listed = BTreeSet::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| line.starts_with('|')) {
        let cells: Vec<&str> = line.trim().trim_matches('|').split('|').map(str::trim).collect();
        let [name, places, reason] = cells.as_slice() else {
            problems.push(format!("{LIST}:{}: a row has three cells: crate, where, why", number + 1));
            continue;
        };
        let Some(name) = name.strip_prefix('`').and_then(|name| name.strip_suffix('`')) else { continue };
        if reason.is_empty() {
            problems.push(format!("{LIST}:{}: `{name}` has no reason", number + 1));
        }
        for place in places.split(',').map(|place| place.trim().trim_matches('`')) {
            if !listed.insert((name.to_owned(), place.to_owned())) {
                problems.push(format!("{LIST}:{}: `{name}` in `{place}` is listed twice", number + 1));
            }
        }
    }
    listed
}

fn compare(listed: &BTreeSet<Use>, used: &BTreeSet<Use>, problems: &mut Vec<String>) {
    for (name, place) in used.difference(listed) {
        problems.push(format!("`{name}` is a dependency of `{place}`, but {LIST} does not say why"));
    }
    for (name, place) in listed.difference(used) {
        problems.push(format!("{LIST} lists `{name}` for `{place}`, which does not depend on it"));
    }
}

fn licence_problem(package: &Package) -> Option<String> {
    match package.licence.as_deref() {
        Some(licence) if is_accepted(licence) => None,
        Some(licence) => {
            Some(format!("{} {}: the licence `{licence}` is not accepted", package.name, package.version))
        }
        None => Some(format!("{} {}: states no licence", package.name, package.version)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(uses: &[(&str, &str)]) -> BTreeSet<Use> {
        uses.iter().map(|(name, place)| ((*name).to_owned(), (*place).to_owned())).collect()
    }

    #[test]
    fn the_table_is_read() {
        let mut problems = Vec::new();
        let text = "# Title\n| crate | where | why |\n|---|---|---|\n| `a` | `x`, `y` | Because. |\n| `b` | `x` | |\n| `c` |\n";
        assert_eq!(parse(text, &mut problems), set(&[("a", "x"), ("a", "y"), ("b", "x")]));
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains(":5: `b` has no reason"), "{problems:?}");
        assert!(problems[1].contains(":6: a row has three cells"), "{problems:?}");
    }

    #[test]
    fn a_dependency_must_be_named_by_code() {
        let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<BTreeSet<_>>();
        let problems =
            unused(&words(&["proc-macro2", "toml", "loom"]), &words(&["proc_macro2", "toml", "use"]), "x");
        assert_eq!(problems, ["no code of `x` uses `loom`"]);
    }

    #[test]
    fn differences_are_reported_both_ways() {
        let mut problems = Vec::new();
        compare(&set(&[("a", "x"), ("old", "x")]), &set(&[("a", "x"), ("new", "y")]), &mut problems);
        assert_eq!(problems.len(), 2);
        assert!(problems[0].starts_with("`new` is a dependency of `y`"), "{problems:?}");
        assert!(problems[1].contains("lists `old` for `x`"), "{problems:?}");
    }
}
