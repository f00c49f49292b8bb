//! What one CPU did in its windows.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};

/// A store: where to, and by which instruction.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Store {
    /// Whether it went to a device.
    pub is_device: bool,
    /// The physical address of the cache line.
    pub line: u64,
    /// The address of the instruction.
    pub pc: u64,
}

/// A CPU's case, its window, and its counts so far.
#[derive(Default)]
pub struct Cpu {
    case: u8,
    /// Entries not yet left.
    depth: u32,
    /// What the open window has executed, in order, repetitions joined.
    executed: Vec<(u64, u64)>,
    /// What it has stored to, likewise.
    stored: Vec<(Store, u64)>,
    counts: BTreeMap<u8, Counts>,
}

#[derive(Default)]
struct Counts {
    windows: u64,
    executed: HashMap<u64, u64>,
    stored: HashMap<Store, u64>,
}

impl Cpu {
    /// Works on this case from now on. An open window is given up: it belongs to neither case.
    pub fn mark(&mut self, case: u8) {
        self.case = case;
        self.depth = 0;
        self.executed.clear();
        self.stored.clear();
    }

    /// Enters a trap; says whether its window is counted.
    pub fn enter(&mut self) -> bool {
        if self.case != 0 {
            self.depth += 1;
        }
        self.depth > 0
    }

    /// Executes an instruction of the window.
    pub fn execute(&mut self, pc: u64) {
        push(&mut self.executed, pc);
    }

    /// Stores from the window.
    pub fn store(&mut self, store: Store) {
        push(&mut self.stored, store);
    }

    /// Leaves a trap; says whether a window is still open.
    pub fn leave(&mut self) -> bool {
        self.depth = self.depth.saturating_sub(1);
        if self.depth == 0 {
            let counts = self.counts.entry(self.case).or_default();
            counts.windows += 1;
            for (pc, count) in self.executed.drain(..) {
                *counts.executed.entry(pc).or_default() += count;
            }
            for (store, count) in self.stored.drain(..) {
                *counts.stored.entry(store).or_default() += count;
            }
        }
        self.depth > 0
    }

    /// Writes all counts, sorted.
    pub fn write(&self, cpu: usize, out: &mut impl Write) -> io::Result<()> {
        for (case, counts) in &self.counts {
            writeln!(out, "windows {case} {cpu} {}", counts.windows)?;
            let mut executed: Vec<_> = counts.executed.iter().collect();
            executed.sort_unstable();
            for (pc, count) in executed {
                writeln!(out, "exec {case} {cpu} {pc:#x} {count}")?;
            }
            let mut stored: Vec<_> = counts.stored.iter().collect();
            stored.sort_unstable();
            for (Store { is_device, line, pc }, count) in stored {
                let kind = if *is_device { "device" } else { "store" };
                writeln!(out, "{kind} {case} {cpu} {line:#x} {pc:#x} {count}")?;
            }
        }
        Ok(())
    }
}

fn push<T: PartialEq>(list: &mut Vec<(T, u64)>, item: T) {
    match list.last_mut() {
        Some((last, count)) if *last == item => *count += 1,
        _ => list.push((item, 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(cpu: &Cpu) -> String {
        let mut out = Vec::new();
        cpu.write(1, &mut out).expect("a vector takes everything");
        String::from_utf8(out).expect("it is ASCII")
    }

    #[test]
    fn a_window_counts_when_it_is_closed() {
        let mut cpu = Cpu::default();
        assert!(!cpu.enter(), "no case yet");
        cpu.mark(3);
        assert!(cpu.enter());
        for pc in [0x10, 0x20, 0x20, 0x10] {
            cpu.execute(pc);
        }
        cpu.store(Store { is_device: false, line: 0x40, pc: 0x20 });
        cpu.store(Store { is_device: true, line: 0x80, pc: 0x20 });
        assert_eq!(written(&cpu), "");
        assert!(!cpu.leave());
        let expected = "windows 3 1 1\nexec 3 1 0x10 2\nexec 3 1 0x20 2\n\
                        store 3 1 0x40 0x20 1\ndevice 3 1 0x80 0x20 1\n";
        assert_eq!(written(&cpu), expected);
    }

    #[test]
    fn a_trap_within_a_window_belongs_to_it() {
        let mut cpu = Cpu::default();
        cpu.mark(1);
        assert!(cpu.enter() && cpu.enter());
        cpu.execute(0x10);
        assert!(cpu.leave(), "the outer one is open");
        cpu.execute(0x20);
        assert!(!cpu.leave());
        assert_eq!(written(&cpu), "windows 1 1 1\nexec 1 1 0x10 1\nexec 1 1 0x20 1\n");
    }

    #[test]
    fn a_window_with_a_mark_in_it_counts_for_nothing() {
        let mut cpu = Cpu::default();
        cpu.mark(1);
        assert!(cpu.enter());
        cpu.execute(0x10);
        cpu.mark(2);
        assert!(cpu.enter(), "the next window counts");
        assert!(!cpu.leave());
        assert_eq!(written(&cpu), "windows 2 1 1\n");
    }
}
