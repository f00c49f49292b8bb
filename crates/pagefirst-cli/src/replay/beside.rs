//! A replay's figures beside Linux's own, with the errors.

use super::engine::Run;
use super::report::thousands;
use pagefirst::arch::Format;
use pagefirst::platform::Platform;
use pagefirst::types::PAGE_SIZE;
use pagefirst_machine::Machine;
use pagefirst_record::{Native, NativeRun};
use serde_json::{Value, json};
use std::fmt::Write;

/// How far off a figure may be, in percent of Linux's ...
const PERCENT: u64 = 15;
/// ... or in faults or KiB, whichever is more.
const LEAST: u64 = 16;

/// The level of the root.
const ROOT: usize = <<Machine as Platform>::Format as Format>::LEVELS as usize - 1;

/// The bytes of a huge page.
const HUGE: u64 = 2 << 20;

/// A figure of a replay beside Linux's.
pub struct Row {
    what: &'static str,
    replay: u64,
    /// The median of the native runs, the least, the most.
    linux: u64,
    range: (u64, u64),
}

impl Row {
    fn error(&self) -> i64 {
        self.replay as i64 - self.linux as i64
    }

    fn bound(&self) -> u64 {
        (self.linux * PERCENT / 100).max(LEAST)
    }

    fn within(&self) -> bool {
        self.error().unsigned_abs() <= self.bound()
    }

    /// For programs.
    pub fn json(&self) -> Value {
        json!({
            "what": self.what, "replay": self.replay, "linux": self.linux, "least": self.range.0, "most": self.range.1,
            "error": self.error(), "bound": self.bound(), "within": self.within(),
        })
    }
}

/// The figures that both have. Linux counts tables of all levels below the root, at the end, and keeps a leaf table for
/// each huge page of private memory, to split it with.
pub fn rows(run: &Run, native: &Native) -> [Row; 3] {
    let tables: u64 = run.account.table_bytes[..ROOT].iter().sum();
    let kept = run.account.huge_bytes / HUGE * PAGE_SIZE;
    let row = |what, replay, figure: fn(&NativeRun) -> u64| {
        let figures = || native.runs.iter().map(figure);
        let range = (figures().min().unwrap_or(0), figures().max().unwrap_or(0));
        Row { what, replay, linux: figure(&native.median()), range }
    };
    [
        row("minor faults", run.account.faults.mapped(), |n| n.minor_faults),
        row("VmHWM, kB", run.first_peak >> 10, |n| n.vm_hwm_kib),
        row("VmPTE, kB", (tables + kept) >> 10, |n| n.vm_pte_kib),
    ]
}

/// For people.
pub fn write(out: &mut String, run: &Run, native: &Native) -> std::fmt::Result {
    let runs = native.runs.len();
    writeln!(
        out,
        "Beside Linux {}, median of {runs} native runs, huge pages {}",
        native.kernel, native.huge_pages
    )?;
    writeln!(
        out,
        "{:<14}{:>10}{:>10}{:>18}{:>10}{:>9}",
        "", "replay", "Linux", "of all runs", "error", "bound"
    )?;
    for row in rows(run, native) {
        let (least, most) = row.range;
        writeln!(
            out,
            "{:<14}{:>10}{:>10}{:>18}{:>+10}{:>9}  {}",
            row.what,
            thousands(row.replay),
            thousands(row.linux),
            format!("{}-{}", thousands(least), thousands(most)),
            row.error(),
            format!("±{}", row.bound()),
            if row.within() { "within" } else { "BEYOND" }
        )?;
    }
    Ok(())
}
