//! The last events on the machine, for the message of a check that fails.

use pagefirst::platform::Note;
use pagefirst::types::{Access, Pfn, VirtAddr, VirtRange};
use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// How many events are kept.
const EVENTS: usize = 256;

/// Something that happened.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    Note(Note),
    Miss { tag: u64, addr: VirtAddr, access: Access },
    Fault { tag: u64, addr: VirtAddr, access: Access },
    Answer { addr: VirtAddr, answer: Answer },
    Flush { tag: u64, range: VirtRange, tables: bool },
    Enter { tag: u64 },
    Leave { tag: u64 },
}

/// How a fault ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Answer {
    Mapped,
    Spurious,
    Blocked,
    Error,
}

/// A ring of events, each in four words; a writer never waits, and a reader may see one that is being written.
pub(crate) struct History {
    next: AtomicU64,
    ring: Box<[[AtomicU64; 4]]>,
}

const fn access_code(access: Access) -> u64 {
    match access {
        Access::Read => 0,
        Access::Write => 1,
        Access::Execute => 2,
    }
}

/// (kind, a, b, c) with `c` below 2^32.
fn encode(event: Event) -> (u64, u64, u64, u64) {
    match event {
        Event::Note(Note::FrameAllocated(pfn, order)) => (0, pfn.0 as u64, 0, order as u64),
        Event::Note(Note::FrameFreed(pfn, order)) => (1, pfn.0 as u64, 0, order as u64),
        Event::Note(Note::TableAllocated(pfn)) => (2, pfn.0 as u64, 0, 0),
        Event::Note(Note::TableFreed(pfn)) => (3, pfn.0 as u64, 0, 0),
        Event::Note(Note::TableLocked(pfn, level)) => (4, pfn.0 as u64, 0, level as u64),
        Event::Note(Note::TableScanned(pfn, level)) => (5, pfn.0 as u64, 0, level as u64),
        Event::Miss { tag, addr, access } => (6, tag, addr.0, access_code(access)),
        Event::Fault { tag, addr, access } => (7, tag, addr.0, access_code(access)),
        Event::Answer { addr, answer } => (8, 0, addr.0, answer as u64),
        Event::Flush { tag, range, tables } => {
            (9, tag, range.start.0, range.pages().min(u32::MAX as u64 >> 1) << 1 | tables as u64)
        }
        Event::Enter { tag } => (10, tag, 0, 0),
        Event::Leave { tag } => (11, tag, 0, 0),
        Event::Note(Note::FaultLooked(looks)) => (12, 0, 0, looks.into()),
    }
}

fn line(f: &mut fmt::Formatter<'_>, kind: u64, a: u64, b: u64, c: u64) -> fmt::Result {
    let access = ["read", "write", "execute"].get(c as usize).unwrap_or(&"?");
    let pfn = Pfn(a as u32);
    match kind {
        0 => write!(f, "{pfn:?} allocated"),
        1 => write!(f, "{pfn:?} freed"),
        2 => write!(f, "table {pfn:?} allocated"),
        3 => write!(f, "table {pfn:?} freed"),
        4 => write!(f, "table {pfn:?} locked, level {c}"),
        5 => write!(f, "table {pfn:?} scanned, level {c}"),
        6 => write!(f, "space {a}: {access} at {b:#x} misses the TLB"),
        7 => write!(f, "space {a}: {access} at {b:#x} faults"),
        8 => {
            let answer = ["mapped", "spurious", "blocked", "error"].get(c as usize).unwrap_or(&"?");
            write!(f, "fault at {b:#x} ends: {answer}")
        }
        9 => {
            let tables = if c & 1 == 1 { ", tables too" } else { "" };
            write!(f, "space {a}: {} pages from {b:#x} flushed{tables}", c >> 1)
        }
        10 => write!(f, "space {a} entered"),
        11 => write!(f, "space {a} left"),
        12 => write!(f, "a fault looked {c} times"),
        _ => write!(f, "?"),
    }
}

impl History {
    pub fn new() -> Self {
        History {
            next: AtomicU64::new(0),
            ring: (0..EVENTS).map(|_| std::array::from_fn(|_| AtomicU64::new(0))).collect(),
        }
    }

    pub fn push(&self, cpu: usize, event: Event) {
        let (kind, a, b, c) = encode(event);
        let slot = &self.ring[self.next.fetch_add(1, Relaxed) as usize % EVENTS];
        slot[0].store(kind, Relaxed);
        slot[1].store(a, Relaxed);
        slot[2].store(b, Relaxed);
        slot[3].store(c << 32 | cpu as u64, Relaxed);
    }
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.next.load(Relaxed);
        let start = end.saturating_sub(EVENTS as u64);
        writeln!(f, "the last {} of {end} events:", end - start)?;
        for n in start..end {
            let [kind, a, b, last] = &self.ring[n as usize % EVENTS];
            let last = last.load(Relaxed);
            write!(f, "  {n:>6} cpu {}: ", last as u32)?;
            line(f, kind.load(Relaxed), a.load(Relaxed), b.load(Relaxed), last >> 32)?;
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_history_reads_well_and_keeps_the_last() {
        let h = History::new();
        for i in 0..300 {
            h.push(1, Event::Note(Note::FrameAllocated(Pfn(i), 0)));
        }
        h.push(3, Event::Fault { tag: 9, addr: VirtAddr(0x5000), access: Access::Write });
        h.push(0, Event::Flush { tag: 9, range: VirtRange::page_of(VirtAddr(0x5000)), tables: true });
        let text = h.to_string();
        assert!(text.starts_with("the last 256 of 302 events:"), "{text}");
        assert!(text.contains("cpu 1: pfn 0x12b allocated"), "{text}");
        assert!(text.contains("cpu 3: space 9: write at 0x5000 faults"), "{text}");
        assert!(text.contains("cpu 0: space 9: 1 pages from 0x5000 flushed, tables too"), "{text}");
        assert!(!text.contains("pfn 0x1 "), "{text}");
    }
}
