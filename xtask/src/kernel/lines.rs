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

/// A line that is written by both, and may be.
struct Known {
    /// A function that stores to it.
    function: &'static str,
    /// Why that cannot be helped, or does not matter.
    reason: &'static str,
}

static KNOWN: [Known; 0] = [];

/// Cases whose names begin so may share lines: they are listed apart.
const APART: &str = "apart:";

/// Memory that the kernel gave a name.
#[derive(PartialEq, Eq, Debug)]
struct Region {
    name: String,
    first: u64,
    last: u64,
}

/// What the kernel says of this run.
#[derive(PartialEq, Eq, Debug)]
struct Said {
    regions: Vec<Region>,
    cases: Vec<(u8, String)>,
}

/// A line, and the places that store to it, by CPU.
struct Shared {
    line: u64,
    /// By CPU: what stores to it, and how often.
    stores: BTreeMap<u8, BTreeMap<String, u64>>,
}

/// Runs the kernel with the plugin, and prints what both CPUs store to.
pub(super) fn run(built: &Built) -> Result {
    let image = counts::read(built)?;
    let symbols = Symbols::new(&image)?;
    let (serial, counted) = plugin::run(built, Run::Lines, &symbols)?;
    let said = parse(&serial)?;
    let place = |pc| profile::line(&symbols.place(pc));
    let is_apart = |case: &&(u8, String)| case.1.starts_with(APART);
    let mut problems = 0;
    println!("Cache lines that both CPUs store to:");
    for (case, name) in said.cases.iter().filter(|case| !is_apart(case)) {
        check_windows(&counted, *case, name)?;
        let lines = shared(&counted, *case, place);
        println!("  {name}: {}{}", lines.len(), windows(&counted, *case));
        for line in &lines {
            let reason = reason(line);
            problems += usize::from(reason.is_none());
            print!("{}", describe(line, &said.regions, &symbols));
            reason.iter().for_each(|reason| println!("      known: {reason}"));
        }
    }
    println!("Apart, where new tables or refills are in it:");
    for (case, name) in said.cases.iter().filter(is_apart) {
        let lines = shared(&counted, *case, place);
        println!("  {}: {}{}", name[APART.len()..].trim(), lines.len(), windows(&counted, *case));
        lines.iter().for_each(|line| print!("{}", describe(line, &said.regions, &symbols)));
    }
    if problems == 0 { Ok(()) } else { Err(format!("{problems} cache lines are written by both CPUs")) }
}

/// Reads the lines `region NAME FIRST LAST` and `case NUMBER NAME`.
fn parse(serial: &str) -> Result<Said> {
    let region = |line: &str| {
        let mut words = line.rsplitn(3, ' ');
        let (last, first) = (number(words.next()?)?, number(words.next()?)?);
        Some(Region { name: words.next()?.to_owned(), first, last })
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

/// Why a line may be shared: each store to it must have a reason.
fn reason(line: &Shared) -> Option<&'static str> {
    let mut reasons = line
        .stores
        .values()
        .flat_map(BTreeMap::keys)
        .map(|place| KNOWN.iter().find(|known| place.contains(known.function)).map(|known| known.reason));
    let first = reasons.next()??;
    reasons.all(|reason| reason.is_some()).then_some(first)
}

fn describe(line: &Shared, regions: &[Region], symbols: &Symbols) -> String {
    let region = regions.iter().find(|region| (region.first..=region.last).contains(&line.line));
    let region = region.map_or("unnamed memory", |region| &region.name);
    let symbol = symbols.at_physical(line.line).map_or(String::new(), |symbol| format!(", {symbol}"));
    let mut text = format!("    {:#x}: {region}{symbol}\n", line.line);
    for (cpu, places) in &line.stores {
        for (place, count) in places {
            let _ = writeln!(text, "      CPU {cpu}: {count:6} {place}");
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
        let serial = "region kernel data 0x1000 0x1fff\ncase 2 anonymous write\ncase 3 apart: new tables\n";
        let region = Region { name: "kernel data".into(), first: 0x1000, last: 0x1fff };
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
        assert_eq!(reason(&lines[0]), None);
    }

    #[test]
    fn one_cpu_alone_shows_nothing() {
        let windows = BTreeMap::from([((1, 0), 5), ((2, 0), 5), ((2, 1), 5)]);
        let counted = Counted { windows, ..Counted::default() };
        assert!(check_windows(&counted, 1, "a").is_err());
        assert_eq!(check_windows(&counted, 2, "b"), Ok(()));
    }
}
