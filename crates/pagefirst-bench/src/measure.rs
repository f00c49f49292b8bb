//! Paired measuring: everything that is compared runs in turn, in one process, round after round.
//!
//! A machine's speed drifts, so times are compared within a round and the median of the ratios is what counts.
//! Instructions do not drift: one run of one contender under `valgrind --tool=callgrind` counts them exactly, those
//! that clear tables left out, as they are the same for everybody.

use rustix::time::{ClockId, clock_gettime};
use std::collections::HashMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::time::Duration;

/// Runs `section`, and says how long it took. Under valgrind only what runs in here is counted.
#[inline(never)]
fn measured<R>(section: impl FnOnce() -> R) -> (Duration, R) {
    let start = now();
    let result = std::hint::black_box(section());
    (now() - start, result)
}

/// This thread's time on a CPU: what others run meanwhile is not in it, but for the caches they take.
fn now() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// The figures of one contender.
#[derive(Default)]
pub struct Sheet {
    /// Row, operations, nanoseconds an operation of each round.
    times: Vec<(String, u64, Vec<f64>)>,
    /// Row and figure, of the last round.
    notes: Vec<(String, u64)>,
}

impl Sheet {
    /// Runs `section`, which does `operations` of what `row` says.
    pub fn time<R>(&mut self, row: &str, operations: u64, section: impl FnOnce() -> R) -> R {
        let (took, result) = measured(section);
        let at = self.times.iter().position(|(name, ..)| name == row).unwrap_or_else(|| {
            self.times.push((row.to_owned(), operations, Vec::new()));
            self.times.len() - 1
        });
        self.times[at].2.push(took.as_nanos() as f64 / operations as f64);
        result
    }
    /// A figure that is no time.
    pub fn note(&mut self, row: &str, figure: u64) {
        self.notes.retain(|(name, _)| name != row);
        self.notes.push((row.to_owned(), figure));
    }
    fn row(&self, name: &str) -> Option<&(String, u64, Vec<f64>)> {
        self.times.iter().find(|(row, ..)| row == name)
    }
}

/// One of those that are compared: its name, and one round of all it does.
pub type Contender<'a, S> = (&'a str, fn(&S, &mut Sheet));

/// Runs all contenders for so many rounds and prints a table of medians, beside each the ratio to the first contender
/// that has the row. With valgrind there, counts instructions as well.
///
/// For that this program runs itself, with the contender in the environment: then it runs one round of that one.
pub fn compare<S>(title: &str, rounds: usize, stage: &S, contenders: &[Contender<'_, S>]) {
    let mut sheets: Vec<Sheet> = contenders.iter().map(|_| Sheet::default()).collect();
    if let Ok(counted) = env::var(COUNTED) {
        for ((name, run), sheet) in contenders.iter().zip(&mut sheets).filter(|(c, _)| c.0 == counted) {
            run(stage, sheet);
            sheet.times.iter().for_each(|(row, ..)| println!("{name}{SEPARATOR}{row}"));
        }
        return;
    }
    for round in 0..rounds {
        // Nobody always comes after the same one, which leaves its caches.
        for i in 0..contenders.len() {
            let i = (i + round) % contenders.len();
            (contenders[i].1)(stage, &mut sheets[i]);
        }
    }
    let counts: Vec<_> = contenders.iter().map(|c| count(c.0)).collect();
    let names: Vec<&str> = contenders.iter().map(|c| c.0).collect();
    println!(
        "\n{title}: ns an operation (ratio), instructions an operation without clearing; {rounds} rounds\n"
    );
    println!("| | {} |\n|---|{}", names.join(" | "), "---|".repeat(names.len()));
    let mut rows: Vec<&str> = Vec::new();
    for (row, ..) in sheets.iter().flat_map(|s| &s.times) {
        if !rows.contains(&row.as_str()) {
            rows.push(row);
        }
    }
    for row in rows {
        let first = sheets.iter().find_map(|s| s.row(row)).map(|r| &r.2);
        let mut line = format!("| {row} |");
        for (counts, sheet) in counts.iter().zip(&sheets) {
            let Some((_, operations, times)) = sheet.row(row) else {
                line += " |";
                continue;
            };
            let ratios = first.iter().flat_map(|first| times.iter().zip(*first)).map(|(a, b)| a / b);
            let _ = write!(line, " {:.1} ({:.2})", median(times.iter().copied()), median(ratios));
            if let Some(count) = counts.as_ref().and_then(|counts| counts.get(row)) {
                let _ = write!(line, ", {:.0}", *count as f64 / *operations as f64);
            }
            line += " |";
        }
        println!("{line}");
    }
    println!();
    for (name, sheet) in names.iter().zip(&sheets) {
        for (row, figure) in &sheet.notes {
            println!("{name}: {row}: {figure}");
        }
    }
    if counts.iter().all(Option::is_none) {
        println!("no instructions counted: that needs valgrind, and no `--quick`");
    }
}

/// The middle one of some values.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

const COUNTED: &str = "PAGEFIRST_BENCH_COUNTED";
const SEPARATOR: &str = ": ";

/// Whether this run is one under valgrind, so that what only times need can be left out.
pub fn is_counting() -> bool {
    env::var_os(COUNTED).is_some()
}

/// The instructions of each row of a contender: callgrind writes one profile at the end of each section.
fn count(contender: &str) -> Option<HashMap<String, u64>> {
    if env::args().any(|a| a == "--quick") {
        return None;
    }
    let out = env::temp_dir().join(format!("pagefirst-bench-{}", std::process::id()));
    let done = Command::new("valgrind")
        .args([
            "--tool=callgrind",
            "--toggle-collect=pagefirst_bench::measure::measured",
            "--dump-after=pagefirst_bench::measure::measured",
        ])
        .args(["--dump-line=no", "--compress-strings=no"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(env::current_exe().ok()?)
        .env(COUNTED, contender)
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&done.stdout);
    let rows = text.lines().filter_map(|line| line.strip_prefix(contender)?.strip_prefix(SEPARATOR));
    let counted = rows.zip(1..).filter_map(|(row, i)| {
        let profile = fs::read_to_string(format!("{}.{i}", out.display())).ok()?;
        Some((row.to_owned(), instructions(&profile)))
    });
    let counted = counted.collect();
    for i in 0.. {
        let file = if i == 0 { out.clone() } else { format!("{}.{i}", out.display()).into() };
        if fs::remove_file(file).is_err() && i > 0 {
            break;
        }
    }
    done.status.success().then_some(counted)
}

/// The instructions of a callgrind profile ("Callgrind Format Specification", Valgrind manual), without those of
/// `memset`: there tables are cleared.
fn instructions(profile: &str) -> u64 {
    let (mut sum, mut counts, mut is_call) = (0, false, false);
    for line in profile.lines() {
        if let Some(name) = line.strip_prefix("fn=") {
            counts = !name.contains("memset");
        } else if line.starts_with("calls=") {
            is_call = true; // the next line has what the call cost, counted at the callee
        } else if line.starts_with(|c: char| c.is_ascii_digit() || "+-*".contains(c)) {
            let cost = line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
            sum += if counts && !is_call { cost.unwrap_or(0) } else { 0 };
            is_call = false;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_of_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 3.0, 2.0].into_iter()), 2.5);
    }

    #[test]
    fn clearing_and_calls_are_left_out() {
        let profile =
            "fn=a\n0 10\ncfn=__memset_avx2\ncalls=1 0\n0 500\nfn=__memset_avx2\n0 500\nfn=b\n+0 7\n";
        assert_eq!(instructions(profile), 17);
    }
}
