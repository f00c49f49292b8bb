//! How many instructions each kind of fault takes, and where.

use std::collections::BTreeMap;

use super::peers;
use super::plugin::{self, Counted};
use super::run::{self, Built, Run};
use super::symbols::{Part, Symbols};
use crate::Result;

/// What the kernel counted of a case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Count {
    /// Its number, also that of its mark.
    pub(super) case: u8,
    /// How many operations.
    pub(super) ops: u64,
    /// How many instructions in all, from the user's side.
    pub(super) instructions: u64,
    /// Its name.
    pub(super) name: String,
}

/// A case's instructions by part.
type Parts = BTreeMap<(u8, Part), u64>;

/// Counts twice, then once with the plugin, and prints the table.
pub(super) fn run(built: &Built) -> Result {
    let first = run::qemu(built, Run::Count, None)?;
    let counts = parse(&first)?;
    let second = parse(&run::qemu(built, Run::Count, None)?)?;
    same("the second run", &counts, &second)?;
    let (counts, counted) = with_plugin(built, &counts)?;
    let image = read(built)?;
    let symbols = Symbols::new(&image)?;
    println!("Counted twice, the same both times. Instructions for an operation:\n");
    println!("{}", table(&counts, &parts(&counted, &symbols)));
    Ok(())
}

/// Counts once more, with the plugin, which must change nothing.
fn with_plugin(built: &Built, expected: &[Count]) -> Result<(Vec<Count>, Counted)> {
    let image = read(built)?;
    let (serial, counted) = plugin::run(built, Run::Count, &Symbols::new(&image)?)?;
    let counts = parse(&serial)?;
    same("the run with the plugin", expected, &counts)?;
    Ok((counts, counted))
}

/// The kernel's image.
pub(super) fn read(built: &Built) -> Result<Vec<u8>> {
    std::fs::read(&built.kernel).map_err(|e| format!("{}: {e}", built.kernel.display()))
}

/// Reads the lines `count CASE OPS INSTRUCTIONS NAME`.
pub(super) fn parse(serial: &str) -> Result<Vec<Count>> {
    let lines = serial.lines().filter_map(|line| line.strip_prefix("count "));
    let counts: Vec<Count> = lines
        .map(|line| {
            let mut words = line.splitn(4, ' ');
            let mut word = || words.next().unwrap_or_default();
            let numbers = (word().parse().ok(), word().parse().ok(), word().parse().ok());
            match (numbers, word()) {
                ((Some(case), Some(ops @ 1..), Some(instructions)), name) if !name.is_empty() => {
                    Ok(Count { case, ops, instructions, name: name.to_owned() })
                }
                _ => Err(format!("the kernel printed `count {line}`")),
            }
        })
        .collect::<Result<_>>()?;
    if counts.is_empty() { Err(format!("{serial}the kernel counted nothing")) } else { Ok(counts) }
}

fn same(what: &str, expected: &[Count], found: &[Count]) -> Result {
    let show = |count: Option<&Count>| {
        count.map_or("nothing".into(), |c| format!("{} for {} times {}", c.instructions, c.ops, c.name))
    };
    let length = expected.len().max(found.len());
    let pairs = (0..length).map(|index| (expected.get(index), found.get(index)));
    let different = pairs.filter(|(expected, found)| expected != found);
    let text: Vec<String> =
        different.map(|(expected, found)| format!("  {}, then {}", show(expected), show(found))).collect();
    if text.is_empty() { Ok(()) } else { Err(format!("{what} counted differently:\n{}", text.join("\n"))) }
}

fn parts(counted: &Counted, symbols: &Symbols) -> Parts {
    let mut parts = Parts::new();
    let mut known = BTreeMap::new();
    for did in &counted.executed {
        let part = known.entry(did.pc).or_insert_with(|| Part::of(&symbols.place(did.pc)));
        *parts.entry((did.case, *part)).or_default() += did.count;
    }
    parts
}

/// The table, in Markdown.
fn table(counts: &[Count], parts: &Parts) -> String {
    let mut rows = vec![["case", "ops", "all"].map(str::to_owned).to_vec()];
    rows[0].extend(Part::ALL.map(|part| part.name().to_owned()));
    rows[0].extend(["user", "Linux 6.1", "Linux 6.12", "goal", "ratio to 6.1"].map(str::to_owned));
    for count in counts {
        let each = |instructions: u64| format!("{:.0}", instructions as f64 / count.ops as f64);
        let by_part = Part::ALL.map(|part| parts.get(&(count.case, part)).copied().unwrap_or(0));
        let mut row = vec![count.name.clone(), count.ops.to_string(), each(count.instructions)];
        row.extend(by_part.map(each));
        row.push(each(count.instructions.saturating_sub(by_part.iter().sum())));
        let peer = peers::find(&count.name);
        let figures = peer.map_or([None; 3], |peer| [peer.linux_6_1, peer.linux_6_12, peer.goal]);
        row.extend(figures.map(|figure| figure.map_or("-".into(), |figure| figure.to_string())));
        let ratio = |linux| count.instructions as f64 / count.ops as f64 / f64::from(linux);
        row.push(figures[0].map_or("-".into(), |linux| format!("{:.2}", ratio(linux))));
        rows.push(row);
    }
    markdown(&rows)
}

/// A table in Markdown that can be read as it is; the first column to the left, the others to the right.
fn markdown(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column == 0 { format!("| {cell:width$} |") } else { format!(" {cell:>width$} |") }
        });
        text.extend(cells);
        text.push('\n');
        if number == 0 {
            let rules = widths.iter().enumerate().map(|(column, &width)| {
                if column == 0 {
                    format!("|{:-<1$}|", "", width + 2)
                } else {
                    format!("{:-<1$}:|", "", width + 1)
                }
            });
            text.extend(rules);
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(case: u8, ops: u64, instructions: u64, name: &str) -> Count {
        Count { case, ops, instructions, name: name.into() }
    }

    #[test]
    fn the_kernels_counts_are_read() {
        let serial = "hello\ncount 1 100 5000 anonymous write, 4 KiB\ncount 2 1 7 other\n";
        let expected = [count(1, 100, 5000, "anonymous write, 4 KiB"), count(2, 1, 7, "other")];
        assert_eq!(parse(serial).expect("they are valid"), expected);
        assert!(parse("count 1 0 7 no operation\n").is_err());
        assert!(parse("hello\n").is_err());
    }

    #[test]
    fn two_runs_are_compared() {
        let (one, other) =
            ([count(1, 2, 3, "a"), count(2, 2, 3, "b")], [count(1, 2, 3, "a"), count(2, 2, 4, "b")]);
        assert_eq!(same("it", &one, &one), Ok(()));
        let expected = "it counted differently:\n  3 for 2 times b, then 4 for 2 times b";
        assert_eq!(same("it", &one, &other), Err(expected.into()));
        assert!(same("it", &one, &one[..1]).is_err());
    }

    #[test]
    fn the_table_has_all_that_is_known() {
        let parts = BTreeMap::from([((1, Part::Library), 400), ((1, Part::EntryExit), 100)]);
        let counts = [count(1, 2, 666, "anonymous write, 4 KiB"), count(2, 1, 5, "new")];
        let text = table(&counts, &parts);
        let rows: Vec<Vec<&str>> =
            text.lines().map(|line| line.trim_matches('|').split('|').map(str::trim).collect()).collect();
        let expected = [
            "anonymous write, 4 KiB",
            "2",
            "333",
            "50",
            "200",
            "0",
            "0",
            "0",
            "83",
            "3330",
            "3569",
            "1100",
            "0.10",
        ];
        assert_eq!(rows[2], expected);
        assert_eq!(rows[3][8..], ["5", "-", "-", "-", "-"]);
        assert!(text.lines().all(|line| line.len() == text.lines().next().map_or(0, str::len)), "{text}");
    }
}
