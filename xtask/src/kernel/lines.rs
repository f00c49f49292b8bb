//! The cache lines that both CPUs store to while each takes faults of its own.
//!
//! The plugin sees the stores of instructions. It does not see what hardware stores: the frame of a trap, which goes to a
//! stack of that CPU, and accessed and dirty marks in entries, of which those of upper levels are set once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::counts;
use super::plugin::{self, Counted, number};
use super::profile;
use super::run::{Built, Run};
use super::symbols::Symbols;
use crate::Result;

/// Stores by both CPUs to one line, and why that cannot be helped or does not matter.
struct Known {
    /// The case.
    case: &'static str,
    /// What all of the stores to the line begin with, function and file.
    stores: &'static [&'static str],
    reason: &'static str,
}

static KNOWN: [Known; 4] = [
    Known {
        case: "anonymous write after read",
        stores: &[
            "shootdown (examples/tiny-kernel/src/platform.rs",
            "answer (examples/tiny-kernel/src/platform.rs",
        ],
        reason: "the other CPU may hold the zero page's translation: one asks it to forget that, and it answers",
    },
    Known {
        case: "anonymous write after read",
        stores: &[
            "begin_unflushed (crates/pagefirst/src/table/mod.rs",
            "end_unflushed (crates/pagefirst/src/table/mod.rs",
        ],
        reason: "the space counts copies that are not flushed yet, for faults that must flush before they go on",
    },
    Known {
        case: "anonymous write after read",
        stores: &["take (crates/pagefirst/src/frame/meta.rs", "give (crates/pagefirst/src/frame/meta.rs"],
        reason: "a fault that flushes because of the other's copy holds meanwhile what it saw: the one zero page",
    },
    Known {
        case: "access refused",
        stores: &["fault_with (crates/pagefirst/src/fault/mod.rs", "count (crates/pagefirst/src/fault/"],
        reason: "the space counts what it refuses; a signal follows, or the end",
    },
];

/// Cases whose names begin so may share lines: they are listed apart.
const APART: &str = "apart:";

/// Memory that the kernel gave a name.
#[derive(PartialEq, Eq, Debug)]
struct Region {
    name: String,
    first: u64,
    end: u64,
}

/// What the kernel says of this run.
#[derive(PartialEq, Eq, Debug)]
struct Said {
    regions: Vec<Region>,
    cases: Vec<(u8, String)>,
}

/// A line, and the places that store to it, by CPU, with how often.
#[derive(Clone)]
struct Shared {
    line: u64,
    stores: BTreeMap<u8, BTreeMap<String, u64>>,
}

/// Runs the kernel with the plugin, and prints what both CPUs store to; of the cases apart only how much, unless all was
/// asked for.
pub(super) fn run(built: &Built, is_all: bool) -> Result {
    let image = counts::read(built)?;
    let symbols = Symbols::new(&image)?;
    let (serial, counted) = plugin::run(built, Run::Lines, &symbols)?;
    let said = parse(&serial)?;
    let place = |pc| profile::line(&symbols.place(pc));
    let is_apart = |case: &&(u8, String)| case.1.starts_with(APART);
    let wheres = |line: &Shared| place_of(line.line, &said.regions, &symbols);
    let mut problems = 0;
    println!("Cache lines that both CPUs store to:");
    for (case, name) in said.cases.iter().filter(|case| !is_apart(case)) {
        check_windows(&counted, *case, name)?;
        let lines = shared(&counted, *case, place);
        let (known, new): (Vec<_>, Vec<_>) = lines.into_iter().partition(|line| reason(name, line).is_some());
        problems += new.len();
        println!("  {name}: {}, known {}{}", new.len(), known.len(), windows(&counted, *case));
        print!("{}", describe(&new, wheres));
        for reason in known.iter().filter_map(|line| reason(name, line)).collect::<BTreeSet<_>>() {
            println!("    known: {reason}");
        }
    }
    println!("Apart, where new tables or refills are in it:");
    for (case, name) in said.cases.iter().filter(is_apart) {
        let lines = shared(&counted, *case, place);
        println!("  {}: {}{}", name[APART.len()..].trim(), lines.len(), windows(&counted, *case));
        if is_all {
            print!("{}", describe(&lines, wheres));
        }
    }
    if problems == 0 { Ok(()) } else { Err(format!("{problems} cache lines are written by both CPUs")) }
}

/// Reads the lines `region NAME FIRST END` and `case NUMBER NAME`.
fn parse(serial: &str) -> Result<Said> {
    let region = |line: &str| {
        let mut words = line.rsplitn(3, ' ');
        let (end, first) = (number(words.next()?)?, number(words.next()?)?);
        Some(Region { name: words.next()?.to_owned(), first, end })
    };
    let case = |line: &str| {
        let (number, name) = line.split_once(' ')?;
        Some((number.parse().ok()?, name.to_owned()))
    };
    let of = |word: &'static str| serial.lines().filter_map(move |line| line.strip_prefix(word));
    let bad = |line: &str| format!("the kernel printed `{line}`");
    let said = Said {
        regions: of("region ").map(|line| region(line).ok_or_else(|| bad(line))).collect::<Result<_>>()?,
        cases: of("case ").map(|line| case(line).ok_or_else(|| bad(line))).collect::<Result<_>>()?,
    };
    if said.cases.is_empty() { Err(format!("{serial}the kernel ran no case")) } else { Ok(said) }
}

/// Without two CPUs there is nothing to share.
fn check_windows(counted: &Counted, case: u8, name: &str) -> Result {
    let cpus = counted.windows.iter().filter(|((of, _), count)| *of == case && **count > 0).count();
    if cpus >= 2 { Ok(()) } else { Err(format!("`{name}` ran on {cpus} CPUs")) }
}

fn windows(counted: &Counted, case: u8) -> String {
    let of_case = counted.windows.iter().filter(|((of, _), _)| *of == case);
    let counts: Vec<String> = of_case.map(|(_, count)| count.to_string()).collect();
    format!(" (traps: {})", counts.join(" and "))
}

/// The lines of a case that more than one CPU stores to.
fn shared(counted: &Counted, case: u8, place: impl Fn(u64) -> String) -> Vec<Shared> {
    let mut by_line: BTreeMap<u64, Vec<(u8, u64, u64)>> = BTreeMap::new();
    for (line, did) in counted.stored.iter().filter(|(_, did)| did.case == case) {
        by_line.entry(*line).or_default().push((did.cpu, did.pc, did.count));
    }
    let is_shared =
        |stores: &[(u8, u64, u64)]| stores.iter().map(|(cpu, ..)| cpu).collect::<BTreeSet<_>>().len() > 1;
    by_line.retain(|_, stores| is_shared(stores));
    let lines = by_line.into_iter().map(|(line, list)| {
        let mut stores: BTreeMap<u8, BTreeMap<String, u64>> = BTreeMap::new();
        for (cpu, pc, count) in list {
            *stores.entry(cpu).or_default().entry(place(pc)).or_default() += count;
        }
        Shared { line, stores }
    });
    lines.collect()
}

/// Why a line may be shared in a case, if it may be.
fn reason(case: &str, line: &Shared) -> Option<&'static str> {
    let is_of = |known: &Known, place: &str| known.stores.iter().any(|store| place.starts_with(store));
    let places = line.stores.values().flat_map(BTreeMap::keys);
    let known = KNOWN.iter().filter(|known| known.case == case);
    let mut found = known.filter(|known| places.clone().all(|place| is_of(known, place)));
    found.next().map(|known| known.reason)
}

/// What a line is part of.
fn place_of(line: u64, regions: &[Region], symbols: &Symbols) -> String {
    let region = regions.iter().find(|region| (region.first..region.end).contains(&line));
    let region = region.map_or("memory without a name", |region| &region.name);
    symbols.at_physical(line).map_or_else(|| region.to_owned(), |symbol| format!("{region}, {symbol}"))
}

/// Lines of the same thing together, with all that stores to them.
fn describe(lines: &[Shared], wheres: impl Fn(&Shared) -> String) -> String {
    let mut groups: BTreeMap<String, (usize, Shared)> = BTreeMap::new();
    for line in lines {
        let group = groups.entry(wheres(line)).and_modify(|(more, all)| {
            *more += 1;
            for (cpu, places) in &line.stores {
                let all = all.stores.entry(*cpu).or_default();
                places.iter().for_each(|(place, count)| *all.entry(place.clone()).or_default() += count);
            }
        });
        group.or_insert_with(|| (0, line.clone()));
    }
    let mut text = String::new();
    for (place, (more, all)) in groups {
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        let _ = writeln!(text, "    {place}: {:#x}{more}", all.line);
        for (cpu, places) in &all.stores {
            for (place, count) in places {
                let _ = writeln!(text, "      CPU {cpu}: {count:6} {place}");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::plugin::Did;

    #[test]
    fn what_the_kernel_says_is_read() {
        let serial = "region kernel data 0x1000 0x2000\ncase 2 anonymous write\ncase 3 apart: new tables\n";
        let region = Region { name: "kernel data".into(), first: 0x1000, end: 0x2000 };
        let cases = vec![(2, "anonymous write".to_owned()), (3, "apart: new tables".to_owned())];
        assert_eq!(parse(serial), Ok(Said { regions: vec![region], cases }));
        assert!(parse("region x y z\ncase 1 a\n").is_err());
        assert!(parse("hello\n").is_err());
    }

    #[test]
    fn a_line_of_both_is_found() {
        let did = |case, cpu, pc| Did { case, cpu, pc, count: 1 };
        let stored = vec![
            (0x40, did(1, 0, 1)),
            (0x40, did(1, 0, 2)),
            (0x80, did(1, 0, 1)),
            (0x80, did(1, 1, 2)),
            (0x40, did(2, 1, 1)),
        ];
        let counted = Counted { stored, ..Counted::default() };
        let lines = shared(&counted, 1, |pc| format!("f{pc}"));
        assert_eq!(lines.iter().map(|line| line.line).collect::<Vec<_>>(), [0x80]);
        let places: Vec<&String> = lines[0].stores.values().flat_map(BTreeMap::keys).collect();
        assert_eq!(places, ["f1", "f2"]);
        assert_eq!(reason("a", &lines[0]), None);
        let text = describe(&[lines[0].clone(), lines[0].clone()], |_| "frames".into());
        let expected = "    frames: 0x80 and 1 more\n      CPU 0:      2 f1\n      CPU 1:      2 f2\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn every_store_to_a_known_line_is_known() {
        let line = |place: &str| {
            let ask = "shootdown (examples/tiny-kernel/src/platform.rs:1)";
            let stores = |place: &str| BTreeMap::from([(place.to_owned(), 1)]);
            Shared { line: 0, stores: BTreeMap::from([(0, stores(ask)), (1, stores(place))]) }
        };
        let (known, other) =
            (line("answer (examples/tiny-kernel/src/platform.rs:2)"), line("other (a.rs:1)"));
        assert!(reason("anonymous write after read", &known).is_some());
        assert!(reason("anonymous write after read", &other).is_none());
        assert!(reason("another case", &known).is_none());
    }

    #[test]
    fn one_cpu_alone_shows_nothing() {
        let windows = BTreeMap::from([((1, 0), 5), ((2, 0), 5), ((2, 1), 5)]);
        let counted = Counted { windows, ..Counted::default() };
        assert!(check_windows(&counted, 1, "a").is_err());
        assert_eq!(check_windows(&counted, 2, "b"), Ok(()));
    }
}
