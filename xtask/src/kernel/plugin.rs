//! Runs with the plugin (`examples/tiny-kernel/plugin`), and what it wrote.

use std::collections::BTreeMap;

use super::run::{self, Built, Run};
use super::symbols::Symbols;
use crate::{Result, cmd};

/// The kernel's symbols at the first instructions of windows.
const ENTRY: [&str; 2] = ["page_fault_entry", "syscall_entry"];
/// Those at the last ones.
const EXIT: [&str; 1] = ["trap_exit"];
/// The function that marks case 0.
const MARKS: [&str; 1] = ["case_marks"];

/// What one instruction did in a case on a CPU, and how often.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Did {
    /// The case.
    pub(super) case: u8,
    /// The CPU.
    pub(super) cpu: u8,
    /// The instruction.
    pub(super) pc: u64,
    /// How often.
    pub(super) count: u64,
}

/// All that the plugin counted.
#[derive(Default)]
pub(super) struct Counted {
    /// Windows by case and CPU.
    pub(super) windows: BTreeMap<(u8, u8), u64>,
    /// Executions.
    pub(super) executed: Vec<Did>,
    /// Stores to memory, with the physical address of the cache line.
    pub(super) stored: Vec<(u64, Did)>,
}

/// Runs the kernel with the plugin; hands over what the kernel printed and what was counted.
pub(super) fn run(built: &Built, run: Run, symbols: &Symbols) -> Result<(String, Counted)> {
    let out = cmd::target_dir().join("kernel-counts.txt");
    // Of an earlier run, if there was one.
    let _ = std::fs::remove_file(&out);
    let argument = format!(
        "{},entry={},exit={},marks={},out={}",
        run::escape(&built.plugin),
        addresses(symbols, &ENTRY)?,
        addresses(symbols, &EXIT)?,
        addresses(symbols, &MARKS)?,
        run::escape(&out)
    );
    let serial = run::qemu(built, run, Some(&argument))?;
    let text = std::fs::read_to_string(&out).map_err(|e| format!("the plugin wrote nothing: {e}"))?;
    Ok((serial, parse(&text)?))
}

fn addresses(symbols: &Symbols, names: &[&str]) -> Result<String> {
    let address = |name: &&str| {
        let address = symbols.named(name).ok_or_else(|| format!("the kernel has no symbol `{name}`"))?;
        Ok(format!("{address:#x}"))
    };
    Ok(names.iter().map(address).collect::<Result<Vec<_>>>()?.join("+"))
}

fn parse(text: &str) -> Result<Counted> {
    let mut counted = Counted::default();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let numbers: Option<Vec<u64>> = words.iter().skip(1).map(|word| number(word)).collect();
        let did = |case: &u64, cpu: &u64, pc, count| Did { case: *case as u8, cpu: *cpu as u8, pc, count };
        match (words.first().copied(), numbers.as_deref()) {
            (Some("windows"), Some([case, cpu, count])) => {
                counted.windows.insert((*case as u8, *cpu as u8), *count);
            }
            (Some("exec"), Some([case, cpu, pc, count])) => {
                counted.executed.push(did(case, cpu, *pc, *count));
            }
            (Some("store"), Some([case, cpu, line, pc, count])) => {
                counted.stored.push((*line, did(case, cpu, *pc, *count)));
            }
            (Some("device"), Some([_, _, _, _, _])) => {}
            _ => return Err(format!("the plugin wrote `{line}`")),
        }
    }
    Ok(counted)
}

/// Reads a number, an address if it begins with `0x`.
pub(super) fn number(word: &str) -> Option<u64> {
    match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => word.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plugins_file_is_read() {
        let text = "windows 1 0 9\nexec 1 0 0xff 3\nstore 1 1 0x40 0xfe 2\ndevice 1 0 0x0 0xfe 1\n";
        let counted = parse(text).expect("it is valid");
        assert_eq!(counted.windows, BTreeMap::from([((1, 0), 9)]));
        assert_eq!(counted.executed, [Did { case: 1, cpu: 0, pc: 0xff, count: 3 }]);
        assert_eq!(counted.stored, [(0x40, Did { case: 1, cpu: 1, pc: 0xfe, count: 2 })]);
        assert!(parse("exec 1 0 0xff\n").is_err());
        assert!(parse("other\n").is_err());
    }
}
