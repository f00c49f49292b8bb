//! What a recording holds, a line for each thing to know.

use std::fmt::Write as _;

use pagefirst_record::{Event, Loss, LossKind, ProcessReport, Reason, Report, Trailer, Unexplained};

/// The most processes that are listed.
const PROCESSES: usize = 20;

/// Adds a line.
pub fn line(text: &mut String, name: &str, value: &str) {
    // Writing to a string cannot fail.
    _ = writeln!(text, "  {name:<12} {value}");
}

/// What happened, and whether it explains itself.
pub fn events(text: &mut String, trailer: &Trailer, report: &Report) {
    let mut events =
        format!("{}, of which {} first touches of pages", group(report.events), group(report.touches));
    if trailer.accesses > 0 {
        _ = write!(events, ", out of {} reads and writes", group(trailer.accesses));
    }
    line(text, "events", &events);
    let (explained, unexplained) = (group(report.explained), group(report.unexplained));
    line(text, "explained", &format!("{explained} touches by a live mapping; {unexplained} not"));
    for example in &report.examples {
        let Unexplained { event, process, ref touch, reason } = *example;
        line(text, "", &format!("event {event}, of process {}: {}", process.0, why(touch, reason)));
    }
    if report.processes.len() > 1 {
        for (number, process) in report.processes.iter().enumerate().take(PROCESSES) {
            line(text, if number == 0 { "processes" } else { "" }, &of_process(number, process));
        }
        if report.processes.len() > PROCESSES {
            let more = group((report.processes.len() - PROCESSES) as u64);
            line(text, "", &format!("and {more} more"));
        }
    }
}

/// How it ended, what Linux took, and what is missing.
pub fn end(text: &mut String, trailer: &Trailer, report: &Report) {
    line(text, "exit status", &trailer.exit_status.to_string());
    if let Some(native) = &trailer.native {
        let median = native.median();
        let took = format!(
            "{} minor and {} major faults, {} KiB resident at the peak, {} KiB of page tables at the end",
            group(median.minor_faults),
            group(median.major_faults),
            group(median.vm_hwm_kib),
            group(median.vm_pte_kib)
        );
        line(text, "Linux took", &took);
        let (runs, several) = (native.runs.len(), report.processes.len() > 1);
        let whose = if several { ", of the first process alone" } else { "" };
        line(text, "", &format!("(median of {runs} runs on Linux {}{whose})", native.kernel));
        if let Some(other) = native.runs.iter().find(|run| run.exit_status != trailer.exit_status) {
            line(text, "note", &format!("a native run ended with status {}", other.exit_status));
        }
    }
    for loss in &trailer.losses {
        line(text, "lost", &lost(loss));
    }
}

/// A process: who made it, what it ran, what was found of it.
fn of_process(number: usize, process: &ProcessReport) -> String {
    let origin = process.parent.map_or_else(String::new, |parent| format!(", made by {}", parent.0));
    format!(
        "{number}{origin}: {}; {} touches, {} unexplained",
        process.programs.join(", then "),
        group(process.touches),
        group(process.unexplained)
    )
}

fn lost(loss: &Loss) -> String {
    let process = loss.process.0;
    match loss.kind {
        LossKind::Exec => format!("what happened after process {process} replaced itself by {}", loss.name),
        LossKind::Cut => format!("perhaps the last events of process {process}, which was killed"),
    }
}

fn why(touch: &Event, reason: Reason) -> String {
    let reason = match reason {
        Reason::NotMapped => "nothing is mapped there",
        Reason::NotAllowed => "the mapping does not allow it",
        Reason::BeyondEnd => "it is beyond the end of the mapped file",
    };
    match touch {
        Event::Touch { at, access, .. } => {
            format!("{access:?} at {:#x} of mapping {}: {reason}", at.offset, at.mapping.0)
        }
        Event::Stray { recorded, access, .. } => format!("{access:?} at address {recorded:#x}: {reason}"),
        other => format!("{other:?}: {reason}"),
    }
}

/// A number with its digits in groups of three.
pub fn group(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
