//! `cargo xtask kernel --profile CASE`: which functions the instructions of a case belong to, and which lines.

use std::collections::BTreeMap;

use super::counts::{self, Count};
use super::plugin;
use super::run::{Built, Run};
use super::symbols::{Part, Place, Symbols};
use crate::Result;

/// What takes less of the whole is only counted.
const LEAST: u64 = 400;

/// Runs the kernel with the plugin, and prints the profile of one case, given by number or name.
pub(super) fn run(built: &Built, case: &str) -> Result {
    let image = counts::read(built)?;
    let symbols = Symbols::new(&image)?;
    let (serial, counted) = plugin::run(built, Run::Count, &symbols)?;
    let all = counts::parse(&serial)?;
    let count = find(&all, case)?;
    let executed = counted.executed.iter().filter(|did| did.case == count.case);
    let places: Vec<(Place, u64)> = executed.map(|did| (symbols.place(did.pc), did.count)).collect();
    println!("{}: {} operations\n", count.name, count.ops);
    println!("Instructions for an operation, by function:\n");
    print(count, &sums(&places, |place| (Part::of(place), function(place))));
    println!("\nBy line:\n");
    print(count, &sums(&places, |place| (Part::of(place), line(place))));
    Ok(())
}

fn find<'a>(all: &'a [Count], case: &str) -> Result<&'a Count> {
    let found = all.iter().find(|count| count.name == case || count.case.to_string() == case);
    found.ok_or_else(|| {
        let names: Vec<String> =
            all.iter().map(|count| format!("  {:2} {}", count.case, count.name)).collect();
        format!("there is no case `{case}`, but these:\n{}", names.join("\n"))
    })
}

fn function(place: &Place) -> String {
    let file = place.file.as_ref().map_or("assembly".into(), |file| file.display().to_string());
    format!("{} ({file})", place.function)
}

/// A place as a person reads it.
pub(super) fn line(place: &Place) -> String {
    match &place.file {
        Some(file) => format!("{} ({}:{})", place.function, file.display(), place.line),
        None => format!("{} (assembly)", place.function),
    }
}

/// Adds up what has the same key, most first.
fn sums<K: Ord>(places: &[(Place, u64)], key: impl Fn(&Place) -> K) -> Vec<(u64, K)> {
    let mut sums = BTreeMap::new();
    for (place, count) in places {
        *sums.entry(key(place)).or_default() += count;
    }
    let mut sums: Vec<(u64, K)> = sums.into_iter().map(|(key, count)| (count, key)).collect();
    sums.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
    sums
}

fn print(count: &Count, sums: &[(u64, (Part, String))]) {
    let each = |instructions: u64| instructions as f64 / count.ops as f64;
    let all: u64 = sums.iter().map(|(instructions, _)| instructions).sum();
    let listed = sums.partition_point(|(instructions, _)| instructions * LEAST >= all);
    for (instructions, (part, name)) in &sums[..listed] {
        println!("{:9.1}  {:16}  {name}", each(*instructions), part.name());
    }
    let rest = &sums[listed..];
    println!("{:9.1}  in {} others", each(rest.iter().map(|(count, _)| count).sum()), rest.len());
    println!("{:9.1}  in all", each(all));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_comes_first() {
        let place =
            |function: &str, line| Place { function: function.into(), file: Some("f.rs".into()), line };
        let places = [(place("a", 1), 5), (place("b", 1), 7), (place("a", 2), 4)];
        assert_eq!(sums(&places, function), [(9, "a (f.rs)".to_owned()), (7, "b (f.rs)".to_owned())]);
        assert_eq!(sums(&places, line)[0], (7, "b (f.rs:1)".to_owned()));
    }

    #[test]
    fn a_case_is_found_by_number_and_name() {
        let all = [Count { case: 3, ops: 1, instructions: 1, name: "file read".into() }];
        assert!(find(&all, "3").is_ok() && find(&all, "file read").is_ok());
        assert!(find(&all, "4").is_err_and(|failure| failure.contains("3 file read")));
    }
}
