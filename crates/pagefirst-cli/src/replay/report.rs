//! What a replay prints.

use super::engine::{Program, Run};
use super::{Checked, Huge, ReplayArgs, Ways, beside};
use pagefirst::policy::FaultAround;
use pagefirst_record::{LossKind, NativeRun};
use serde_json::{Value, json};
use std::fmt::Write;
use std::time::Duration;

/// A replay beside the one with tables made the other way.
pub struct Comparison<'a> {
    /// What was replayed.
    pub recording: &'a Checked,
    /// How.
    pub args: &'a ReplayArgs,
    /// Where private memory got huge pages.
    pub huge: Huge,
    /// As asked for.
    pub first: &'a Run,
    /// The other way.
    pub second: &'a Run,
}

/// How fast rounds of a recording were, in so many loops at once.
pub fn speed(recording: &Checked, mut times: Vec<Duration>, all: Duration, loops: u16) -> String {
    times.sort_unstable();
    let (rounds, touches) = (times.len(), recording.report.touches);
    let rate = |time: Duration, rounds: usize| touches as f64 * rounds as f64 / time.as_secs_f64() / 1e6;
    let median = times.get(rounds / 2).map_or(0.0, |round| rate(*round, loops as usize));
    format!(
        "{}: {rounds} rounds of {touches} touches, {loops} at once, in {:.2} s: {:.2} million touches a second, {median:.2} \
         by the median round\n",
        recording.name,
        all.as_secs_f64(),
        rate(all, rounds),
    )
}

const UNKNOWN: &str = "\
A replay cannot know which file pages were cached or in large folios (here: all that is mapped, in small ones),
reclaim and memory pressure, how real threads interleave, speculative walks, kernel accesses beyond system-call
buffers, or the code another CPU would select. No time is predicted.
";

/// The frame of the zero page, which stays.
const ZERO_PAGE: u64 = 1;

impl Comparison<'_> {
    /// For people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let (r, a, b) = (self.recording, self.first, self.second);
        writeln!(
            out,
            "{}: {} touches and {} calls of {}, recorded under {}",
            r.name,
            thousands(a.touches),
            thousands(a.calls),
            r.header.program,
            r.header.emulator
        )?;
        writeln!(
            out,
            "replayed on {} vCPU{}, fault-around {}, placement {}, huge pages {}, {} MiB of memory, in {:.2} s and {:.2} s\n",
            self.args.cpus,
            if self.args.cpus == 1 { "" } else { "s" },
            window(self.args.fault_around),
            format!("{:?}", self.args.place).to_lowercase(),
            format!("{:?}", self.huge).to_lowercase(),
            self.args.memory >> 20,
            a.time.as_secs_f64(),
            b.time.as_secs_f64()
        )?;
        let ways = if self.args.policy == Ways::Linux { "ways of" } else { "tables" };
        writeln!(out, "{ways:<34}{:>14}{:>14}{:>9}", a.name, b.name, "ratio")?;
        for (what, a, b) in self.rows() {
            writeln!(out, "{what:<34}{:>14}{:>14}{:>9}", thousands(a), thousands(b), ratio(a, b))?;
        }
        if (a.peak_tables, a.account.table_bytes) == (b.peak_tables, b.account.table_bytes) {
            writeln!(
                out,
                "Every table got a page, so both ways came to the same; they differ where faults fail or pages go."
            )?;
        }
        writeln!(out)?;
        match r.native() {
            Some(native) if self.args.policy == Ways::Linux => beside::write(out, a, native)?,
            Some(native) => {
                let n = native.median();
                writeln!(
                    out,
                    "Linux, natively (median of {}): {} minor faults, {} major, VmHWM {} kB, VmPTE {} kB",
                    native.runs.len(),
                    thousands(n.minor_faults),
                    thousands(n.major_faults),
                    thousands(n.vm_hwm_kib),
                    thousands(n.vm_pte_kib)
                )?
            }
            None => writeln!(out, "Linux's own figures were not recorded.")?,
        }
        if a.programs.len() > 1 {
            writeln!(
                out,
                "\nOf all this, calls, touches and peaks are everybody's, the rest is the first process's last program's."
            )?;
            writeln!(
                out,
                "{:<34}{:>10}{:>8}{:>10}{:>10}{:>14}",
                "process and program", "touches", "calls", "faults", "copies", "resident kB"
            )?;
            for program in &a.programs {
                let (name, faults) =
                    (format!("{} {}", program.process.0, program.name), program.account.faults);
                writeln!(
                    out,
                    "{name:<34}{:>10}{:>8}{:>10}{:>10}{:>14}",
                    thousands(program.touches),
                    thousands(program.calls),
                    thousands(faults.mapped()),
                    thousands(faults.copy),
                    thousands(program.account.resident_bytes() >> 10)
                )?;
            }
        }
        for run in [a, b] {
            if run.refused != (0, 0) {
                let (segv, bus) = run.refused;
                writeln!(out, "{ways} {}: {segv} touches ended as SIGSEGV, {bus} as SIGBUS", run.name)?;
            }
            if let Some(first) = &run.first_failed {
                writeln!(
                    out,
                    "{ways} {}: {} calls were not performed, the first: {first}",
                    run.name, run.failed
                )?;
            }
        }
        for loss in &r.trailer.losses {
            let what = match loss.kind {
                LossKind::Exec => "what the program it became did:",
                LossKind::Cut => "what came after the emulator was cut off",
            };
            writeln!(out, "not in the recording: {what} {} ({} times)", loss.name, loss.count)?;
        }
        for run in [a, b] {
            writeln!(
                out,
                "left after exit, {ways} {}: {} frames besides the zero page, {} tables, {} slab objects",
                run.name,
                run.left.frames - ZERO_PAGE,
                run.left.tables,
                run.left.objects
            )?;
        }
        write!(out, "\n{UNKNOWN}")
    }

    fn rows(&self) -> Vec<(&'static str, u64, u64)> {
        type Row = (&'static str, fn(&Run) -> u64);
        let rows: [Row; 23] = [
            ("faults that mapped something", |r| r.account.faults.mapped()),
            ("  anonymous read, zero page", |r| r.account.faults.anon_read),
            ("  anonymous write", |r| r.account.faults.anon_write),
            ("  file read", |r| r.account.faults.file_read),
            ("  private write to a file page", |r| r.account.faults.file_copy),
            ("  shared write to a file page", |r| r.account.faults.shared_write),
            ("  copy of a mapped page", |r| r.account.faults.copy),
            ("  reuse of a mapped page", |r| r.account.faults.reuse),
            ("  of all these, of huge pages", |r| r.account.faults.huge),
            ("faults that found nothing to do", |r| r.account.faults.spurious),
            ("faults that ended in a signal", |r| r.account.faults.segv + r.account.faults.bus),
            ("table bytes at peak", |r| r.peak_tables),
            ("table bytes at the end", |r| r.account.tables_bytes()),
            ("  of them leaf tables", |r| r.account.table_bytes[0]),
            ("tables allocated", |r| r.machine.tables_allocated),
            ("resident bytes at peak", |r| r.peak_resident),
            ("resident bytes at the end", |r| r.account.resident_bytes()),
            ("  of them files", |r| r.account.file_bytes),
            ("  of them in huge pages", |r| r.account.huge_bytes),
            ("    never touched", |r| r.huge_untouched),
            ("prefaulted pages", |r| r.account.around),
            ("  used", |r| r.account.around - r.account.unused.min(r.account.around)),
            ("  unused", |r| r.account.unused.min(r.account.around)),
        ];
        rows.iter().map(|(what, of)| (*what, of(self.first), of(self.second))).collect()
    }

    /// For programs.
    pub fn json(&self) -> String {
        let r = self.recording;
        let native = r.native().map(|native| {
            let figures = |n: &NativeRun| {
                json!({
                    "minor_faults": n.minor_faults, "major_faults": n.major_faults,
                    "vm_hwm_kib": n.vm_hwm_kib, "vm_pte_kib": n.vm_pte_kib,
                })
            };
            json!({
                "kernel": native.kernel, "huge_pages": native.huge_pages,
                "median": figures(&native.median()),
                "runs": native.runs.iter().map(figures).collect::<Vec<_>>(),
            })
        });
        let linux = r.native().filter(|_| self.args.policy == Ways::Linux);
        let beside = linux.map(|native| beside::rows(self.first, native).map(|row| row.json()));
        let value = json!({
            "recording": r.name,
            "program": r.header.program,
            "emulator": r.header.emulator,
            "options": {
                "policy": self.args.policy,
                "fault_around": [self.args.fault_around.least(), self.args.fault_around.most()],
                "place": self.args.place, "huge": self.huge,
                "cpus": self.args.cpus, "memory": self.args.memory,
            },
            "runs": [run(self.first), run(self.second)],
            "native": native,
            "beside_linux": beside,
        });
        format!("{value:#}\n")
    }
}

fn run(run: &Run) -> Value {
    let f = &run.account.faults;
    json!({
        "name": run.name,
        "touches": run.touches,
        "calls": run.calls,
        "calls_failed": run.failed,
        "first_failed": run.first_failed,
        "sigsegv": run.refused.0,
        "sigbus": run.refused.1,
        "faults": {
            "mapped": f.mapped(), "anon_read": f.anon_read, "anon_write": f.anon_write, "file_read": f.file_read,
            "file_copy": f.file_copy, "shared_write": f.shared_write, "copy": f.copy, "reuse": f.reuse, "huge": f.huge,
            "marked": f.marked, "spurious": f.spurious, "blocked": f.blocked, "segv": f.segv, "bus": f.bus,
        },
        "table_bytes": {
            "peak": run.peak_tables, "end": run.account.tables_bytes(), "by_level": run.account.table_bytes,
        },
        "tables_allocated": run.machine.tables_allocated,
        "resident_bytes": {
            "peak": run.peak_resident, "end": run.account.resident_bytes(),
            "anon": run.account.anon_bytes, "file": run.account.file_bytes, "huge": run.account.huge_bytes,
            "huge_untouched": run.huge_untouched,
        },
        "programs": run.programs.iter().map(program).collect::<Vec<_>>(),
        "prefaulted": { "pages": run.account.around, "unused": run.account.unused },
        "left": {
            "frames": run.left.frames - ZERO_PAGE, "tables": run.left.tables, "objects": run.left.objects,
        },
        "seconds": run.time.as_secs_f64(),
    })
}

fn program(program: &Program) -> Value {
    let f = &program.account.faults;
    json!({
        "process": program.process.0, "program": program.name, "touches": program.touches, "calls": program.calls,
        "calls_failed": program.failed, "sigsegv": program.refused.0, "sigbus": program.refused.1,
        "faults": f.mapped(), "copy": f.copy, "reuse": f.reuse,
        "resident_bytes": program.account.resident_bytes(), "table_bytes": program.account.tables_bytes(),
    })
}

/// A window of fault-around in words.
fn window(around: FaultAround) -> String {
    let (least, most) = (around.least() >> 10, around.most() >> 10);
    if around.is_fixed() { format!("{least} KiB") } else { format!("{least} to {most} KiB") }
}

/// A number with its thousands apart.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// The second figure as a multiple of the first.
fn ratio(first: u64, second: u64) -> String {
    match (first, second) {
        (0, 0) => "-".into(),
        (0, _) => "more".into(),
        (a, b) => format!("{:.2}", b as f64 / a as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!([0, 999, 1000, 1234567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(ratio(0, 3), "more");
        assert_eq!(ratio(2, 3), "1.50");
    }
}
