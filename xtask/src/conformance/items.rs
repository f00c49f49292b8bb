//! The items of the specification, as `docs/conformance-reasons.toml` lists them.

use toml::{Table, Value};

use crate::Result;

/// How many items there are of each kind.
const KINDS: [(char, usize); 3] = [('c', 70), ('r', 15), ('x', 22)];

/// One item.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Item {
    /// `c11`, `r02`, `x08`.
    pub(super) number: String,
    /// What it demands, in one line.
    pub(super) must: String,
    /// Why it has no test, or not all that it should have.
    pub(super) why: Option<Why>,
}

/// What stands beside or instead of tests.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// There is no test: what it speaks of comes with this work.
    WaitsFor(String),
    /// There are tests, and this work adds to what they must show.
    Later(String),
    /// The tests of another item show this one too.
    With {
        /// The other item's number.
        other: String,
        /// Why that is enough.
        because: String,
    },
}

/// Reads the list, which must hold every item exactly once.
pub(super) fn parse(text: &str) -> Result<Vec<Item>> {
    let mut table: Table = text.parse().map_err(|e: toml::de::Error| e.to_string())?;
    let mut items = Vec::new();
    for number in
        KINDS.into_iter().flat_map(|(letter, count)| (1..=count).map(move |n| format!("{letter}{n:02}")))
    {
        let Some(Value::Table(entry)) = table.remove(&number) else {
            return Err(format!("[{number}] is missing"));
        };
        items.push(item(number, entry)?);
    }
    match table.keys().next() {
        Some(key) => Err(format!("[{key}] is no item")),
        None => Ok(items),
    }
}

fn item(number: String, mut entry: Table) -> Result<Item> {
    let mut take = |key: &str| match entry.remove(key) {
        None => Ok(None),
        Some(Value::String(text)) if !text.trim().is_empty() && !text.contains('\n') => Ok(Some(text)),
        Some(_) => Err(format!("[{number}] `{key}` must be one line of text")),
    };
    let must = take("must")?.ok_or_else(|| format!("[{number}] has no `must`"))?;
    let why = match (take("waits_for")?, take("later")?, take("with")?, take("because")?) {
        (None, None, None, None) => None,
        (Some(work), None, None, None) => Some(Why::WaitsFor(work)),
        (None, Some(work), None, None) => Some(Why::Later(work)),
        (None, None, Some(other), Some(because)) => Some(Why::With { other, because }),
        _ => return Err(format!("[{number}] has one of `waits_for`, `later`, or `with` and `because`")),
    };
    match entry.keys().next() {
        Some(key) => Err(format!("[{number}] `{key}` is unknown")),
        None => Ok(Item { number, must, why }),
    }
}
