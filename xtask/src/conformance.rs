//! `cargo xtask conformance`: from the names of the tests to `docs/conformance.md`.
//!
//! A test whose name begins with an item's number (`c11_failed_file_fault_leaves_no_table`) shows that item. So does a
//! function of such a name in an example of the documentation that must not compile. What each item demands, and why one
//! has no test of its own, stands in `docs/conformance-reasons.toml`.

mod items;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;

use crate::rust_source::{Source, rust_files};
use crate::{Result, cmd};
use items::{Item, Why};

const REASONS: &str = "docs/conformance-reasons.toml";
const PAGE: &str = "docs/conformance.md";
const AGAIN: &str = "run `cargo xtask conformance`";

/// From an item's number to the tests that show it, as `path::name`.
type Tests = BTreeMap<String, BTreeSet<String>>;

/// Writes the page. What is missing is only reported; `check` is strict.
pub(crate) fn write() -> Result {
    let (items, tests) = (read_items()?, collect()?);
    fs::write(cmd::root().join(PAGE), page(&items, &tests)).map_err(|e| format!("{PAGE}: {e}"))?;
    let problems = problems(&items, &tests);
    println!("wrote {PAGE}: {}", counts(&items, &tests));
    if !problems.is_empty() {
        println!("`--check` will complain:\n  {}", problems.join("\n  "));
    }
    Ok(())
}

/// Fails when an item has neither a test nor a reason, or waits for one, or the page is not what would be written.
pub(crate) fn check() -> Result {
    let (items, tests) = (read_items()?, collect()?);
    let mut problems = problems(&items, &tests);
    let waits = |item: &&Item| matches!(item.why, Some(Why::WaitsFor(_)));
    problems.extend(items.iter().filter(waits).map(|item| format!("{} waits for its test", item.number)));
    if fs::read_to_string(cmd::root().join(PAGE)).ok() != Some(page(&items, &tests)) {
        problems.push(format!("{PAGE} is not up to date: {AGAIN}"));
    }
    if !problems.is_empty() {
        return Err(format!("conformance:\n  {}", problems.join("\n  ")));
    }
    println!("{}", counts(&items, &tests));
    Ok(())
}

fn read_items() -> Result<Vec<Item>> {
    let text = fs::read_to_string(cmd::root().join(REASONS)).map_err(|e| format!("{REASONS}: {e}"))?;
    items::parse(&text).map_err(|problem| format!("{REASONS}: {problem}"))
}

fn collect() -> Result<Tests> {
    let root = cmd::root();
    let mut tests = Tests::new();
    for path in rust_files(&root, "")? {
        let source = Source::read(&root, &path)?;
        let names = source.tests().into_iter().map(|test| test.name).chain(source.compile_fail_examples());
        for name in names {
            if let Some(number) = number_of(&name) {
                tests.entry(number).or_default().insert(format!("{}::{name}", source.path));
            }
        }
    }
    Ok(tests)
}

/// The item's number with which the name of a test begins: a letter and two digits, then `_` and more.
fn number_of(name: &str) -> Option<String> {
    let (number, rest) = name.split_once('_')?;
    let digits = number.strip_prefix(['c', 'r', 'x'])?;
    let is_number = digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && !rest.is_empty()).then(|| number.to_owned())
}

fn problems(items: &[Item], tests: &Tests) -> Vec<String> {
    let known: BTreeSet<&str> = items.iter().map(|item| item.number.as_str()).collect();
    let unknown = tests.iter().filter(|(number, _)| !known.contains(number.as_str()));
    let unknown = unknown.flat_map(|(number, names)| {
        names.iter().map(move |name| format!("{name}: there is no item {number}"))
    });
    unknown.chain(items.iter().filter_map(|item| problem(item, tests))).collect()
}

fn problem(item: &Item, tests: &Tests) -> Option<String> {
    let Item { number, must, why } = item;
    match (tests.contains_key(number), why) {
        (true, Some(Why::WaitsFor(_))) => {
            Some(format!("{number} has a test, so it does not wait: remove `waits_for`, or call it `later`"))
        }
        (true, Some(Why::With { .. })) => {
            Some(format!("{number} has a test of its own: remove `with` and `because`"))
        }
        (false, None | Some(Why::Later(_))) => {
            Some(format!("{number} has neither a test nor a reason: {must}"))
        }
        (false, Some(Why::With { other, .. })) if !tests.contains_key(other) => {
            Some(format!("{number} is said to be shown with {other}, which has no test"))
        }
        _ => None,
    }
}

fn counts(items: &[Item], tests: &Tests) -> String {
    let (mut tested, mut with, mut waiting, mut open) = (0, 0, 0, 0);
    for item in items {
        match (tests.contains_key(&item.number), &item.why) {
            (true, _) => tested += 1,
            (false, Some(Why::With { .. })) => with += 1,
            (false, Some(Why::WaitsFor(_))) => waiting += 1,
            (false, _) => open += 1,
        }
    }
    let open = if open == 0 { String::new() } else { format!(", {open} open") };
    format!(
        "{} items: {tested} with tests of their own, {with} shown with another, {waiting} waiting{open}",
        items.len()
    )
}

fn page(items: &[Item], tests: &Tests) -> String {
    let mut page = format!(
        "# Conformance\n\n\
         What the fault path must do, item by item, and the tests that show it. Written by `cargo xtask conformance` from\n\
         the names of the tests and from `conformance-reasons.toml`; do not edit.\n\n{}.\n",
        counts(items, tests)
    );
    let sections = [
        (
            'c',
            "The fault path",
            "Items of the design and of Linux's April 2016 change to postpone page tables.",
        ),
        ('r', "Races", "Model-checked with loom, or stressed on the embedded machine."),
        (
            'x',
            "Defects that must not come back",
            "Found in that change, in its descendants, or in its peers.",
        ),
    ];
    for (letter, title, line) in sections {
        let _ = write!(page, "\n## {title}\n\n{line}\n\n| | what must hold | shown by |\n|---|---|---|\n");
        for item in items.iter().filter(|item| item.number.starts_with(letter)) {
            let _ = writeln!(page, "| {} | {} | {} |", item.number, cell(&item.must), shown_by(item, tests));
        }
    }
    page
}

fn shown_by(item: &Item, tests: &Tests) -> String {
    let names = tests.get(&item.number).into_iter().flatten().map(|name| format!("`{name}`"));
    let why = item.why.as_ref().map(|why| match why {
        Why::WaitsFor(work) => format!("Waits for {}.", cell(work)),
        Why::Later(work) => format!("More with {}.", cell(work)),
        Why::With { other, because } => format!("With {other}: {}.", cell(because)),
    });
    let parts: Vec<String> = names.chain(why).collect();
    if parts.is_empty() { "Nothing yet.".into() } else { parts.join("<br>") }
}

/// Text that stands in one cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
mod tests;
