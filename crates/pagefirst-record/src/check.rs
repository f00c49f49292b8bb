//! Checks that a recording explains itself: for every touch there is a live mapping that allows it.
//!
//! The checker knows nothing but the events. It keeps what each mapping allows, by offset, and never sees an address,
//! whereas the recorder's tracker knows addresses and no protections: a mistake of one is not repeated by the other.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::sync::Arc;

use crate::error::FormatError;
use crate::event::{
    Access, Address, Backing, Event, FileId, Map, MapKind, MappingId, Place, ProcessId, Prot,
};
use crate::read::Recording;
use crate::wire::PAGE;

/// A stretch of a mapping in which all pages are alike.
#[derive(Clone, Copy, Debug)]
struct Piece {
    end: u64,
    prot: Prot,
    backing: Backing,
    grows_down: bool,
}

/// What is live in one reservation, by offset of the first byte.
type Pieces = BTreeMap<u64, Piece>;

/// What is live in a process. A child shares with its parent what neither has changed: a short file may hold thousands of
/// mappings, and fork thousands of times.
#[derive(Clone, Debug, Default)]
struct Memory {
    mappings: HashMap<MappingId, Arc<Pieces>>,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The events.
    pub events: u64,
    /// The events that are touches.
    pub touches: u64,
    /// The touches that a live mapping allows.
    pub explained: u64,
    /// The touches that none allows.
    pub unexplained: u64,
    /// The first few of them.
    pub examples: Vec<Unexplained>,
    /// By number: what was found of each process.
    pub processes: Vec<ProcessReport>,
}

/// What a check found of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessReport {
    /// The process that made it; `None` for the first.
    pub parent: Option<ProcessId>,
    /// The programs that it ran, in order. The first is that of its parent.
    pub programs: Vec<String>,
    /// The events that are touches.
    pub touches: u64,
    /// The touches that no live mapping allows.
    pub unexplained: u64,
}

impl Report {
    /// Of each process, at most one touch in 10,000 is unexplained.
    pub fn passes(&self) -> bool {
        self.processes.iter().all(|process| process.unexplained.saturating_mul(10_000) <= process.touches)
    }
}

/// A touch that no live mapping allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unexplained {
    /// The event's number, from 0.
    pub event: u64,
    /// Whose.
    pub process: ProcessId,
    /// The event, an [`Event::Touch`] or [`Event::Stray`].
    pub touch: Event,
    /// Why.
    pub reason: Reason,
}

/// Why a touch is unexplained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Nothing is mapped there.
    NotMapped,
    /// What is mapped there does not allow it.
    NotAllowed,
    /// It lies beyond the end of the mapped file.
    BeyondEnd,
}

/// How many examples a report keeps.
const EXAMPLES: usize = 16;

/// Follows the events of a recording.
#[derive(Debug)]
pub struct Checker {
    living: HashMap<ProcessId, Memory>,
    files: HashMap<FileId, u64>,
    report: Report,
}

/// Checks a recording from where it stands to its end.
///
/// # Errors
/// When it can't be read.
pub fn check<R: Read>(recording: &mut Recording<R>) -> Result<Report, FormatError> {
    let mut checker = Checker::new(&recording.header().program);
    while let Some((process, event)) = recording.next_event()? {
        checker.event(process, &event);
    }
    Ok(checker.report)
}

impl Checker {
    /// No event yet, of a recording of this program.
    pub fn new(program: &str) -> Self {
        let first =
            ProcessReport { parent: None, programs: vec![program.to_owned()], touches: 0, unexplained: 0 };
        Self {
            living: HashMap::from([(ProcessId(0), Memory::default())]),
            files: HashMap::new(),
            report: Report { processes: vec![first], ..Report::default() },
        }
    }

    /// Takes the next event into account, which is of this process.
    pub fn event(&mut self, process: ProcessId, event: &Event) {
        let number = process.0 as usize;
        match *event {
            Event::File(ref info) => drop(self.files.insert(info.number, info.size)),
            Event::FileSize { file, size } => drop(self.files.insert(file, size)),
            Event::Fork { child, .. } => {
                let memory = self.living.get(&process).cloned().unwrap_or_default();
                self.living.insert(child, memory);
                let program = self.report.processes.get(number).and_then(|parent| parent.programs.last());
                let programs = program.cloned().into_iter().collect();
                let born = ProcessReport { parent: Some(process), programs, touches: 0, unexplained: 0 };
                self.report.processes.push(born);
            }
            Event::Exec { ref program, .. } => {
                self.living.insert(process, Memory::default());
                if let Some(report) = self.report.processes.get_mut(number) {
                    report.programs.push(program.clone());
                }
            }
            Event::End { .. } => drop(self.living.remove(&process)),
            Event::Touch { at, access, .. } => {
                let memory = self.living.entry(process).or_default();
                let problem = memory.why_not(at, access, &self.files);
                if problem.is_none() {
                    memory.grow(at);
                }
                self.touch(process, event, problem);
            }
            Event::Stray { .. } => self.touch(process, event, Some(Reason::NotMapped)),
            _ => self.living.entry(process).or_default().call(event),
        }
        self.report.events += 1;
    }

    fn touch(&mut self, process: ProcessId, touch: &Event, problem: Option<Reason>) {
        self.report.touches += 1;
        let mut of_process = self.report.processes.get_mut(process.0 as usize);
        if let Some(report) = &mut of_process {
            report.touches += 1;
        }
        let Some(reason) = problem else {
            self.report.explained += 1;
            return;
        };
        self.report.unexplained += 1;
        if let Some(report) = of_process {
            report.unexplained += 1;
        }
        if self.report.examples.len() < EXAMPLES {
            let event = self.report.events;
            self.report.examples.push(Unexplained { event, process, touch: touch.clone(), reason });
        }
    }

    /// What was found so far.
    pub fn report(&self) -> &Report {
        &self.report
    }
}

impl Memory {
    /// Takes a call into account.
    fn call(&mut self, event: &Event) {
        match *event {
            Event::Map(ref map) => self.map(map),
            Event::Unmap { at, len, .. } => drop(self.cut(at, len)),
            Event::Protect { at, len, prot, .. } => {
                for (start, piece) in self.cut(at, len) {
                    self.insert(at.mapping, start, Piece { prot, ..piece });
                }
            }
            Event::Remap { from, old_len, new_len, id, keep, .. } => {
                self.remap(from, old_len, new_len, id, keep)
            }
            Event::Brk { heap, old, new, .. } => {
                let backing = Backing::Anonymous;
                if new < old {
                    self.cut(Address { mapping: heap, offset: new }, old - new);
                } else if new > old {
                    self.insert(
                        heap,
                        old,
                        Piece { end: new, prot: Prot::READ_WRITE, backing, grows_down: false },
                    );
                }
            }
            _ => {}
        }
    }

    fn insert(&mut self, mapping: MappingId, start: u64, piece: Piece) {
        Arc::make_mut(self.mappings.entry(mapping).or_default()).insert(start, piece);
    }

    /// Takes out what is live in the range, cut at its ends.
    fn cut(&mut self, at: Address, len: u64) -> Vec<(u64, Piece)> {
        let Some(pieces) = self.mappings.get_mut(&at.mapping) else { return Vec::new() };
        let pieces = Arc::make_mut(pieces);
        for edge in [at.offset, at.offset + len] {
            if let Some((&start, piece)) = pieces.range_mut(..edge).next_back()
                && piece.end > edge
            {
                let upper = Piece { backing: advance(piece.backing, edge - start), ..*piece };
                piece.end = edge;
                pieces.insert(edge, upper);
            }
        }
        let taken: Vec<_> =
            pieces.range(at.offset..at.offset + len).map(|(&start, &piece)| (start, piece)).collect();
        for (start, _) in &taken {
            pieces.remove(start);
        }
        if pieces.is_empty() {
            self.mappings.remove(&at.mapping);
        }
        taken
    }

    fn map(&mut self, map: &Map) {
        if map.kind == MapKind::Heap || map.len == 0 {
            return;
        }
        let start = match map.place {
            Place::At(at) => {
                self.cut(at, map.len);
                at.offset
            }
            _ if map.grows_down => map.reserve - map.len,
            _ => 0,
        };
        let piece =
            Piece { end: start + map.len, prot: map.prot, backing: map.backing, grows_down: map.grows_down };
        self.insert(map.id, start, piece);
    }

    fn remap(&mut self, from: Address, old_len: u64, new_len: u64, id: MappingId, keep: bool) {
        // A length of 0 asks for the same pages a second time.
        let taken = if old_len == 0 {
            let pieces = self.mappings.get(&from.mapping);
            let piece = pieces.and_then(|pieces| pieces.range(..=from.offset).next_back());
            piece
                .filter(|(_, piece)| piece.end > from.offset)
                .map(|(&start, piece)| Piece {
                    backing: advance(piece.backing, from.offset - start),
                    ..*piece
                })
                .map(|piece| (from.offset, piece))
                .into_iter()
                .collect()
        } else {
            self.cut(from, old_len)
        };
        for &(start, piece) in &taken {
            if keep {
                self.insert(from.mapping, start, piece);
            }
            self.insert(id, start - from.offset, Piece { end: piece.end - from.offset, ..piece });
        }
        if let Some(mut last) =
            self.mappings.get_mut(&id).and_then(|pieces| Arc::make_mut(pieces).last_entry())
        {
            last.get_mut().end = new_len;
        }
    }

    /// Why the access is not allowed; `None` when it is.
    fn why_not(&self, at: Address, access: Access, files: &HashMap<FileId, u64>) -> Option<Reason> {
        let Some(pieces) = self.mappings.get(&at.mapping) else { return Some(Reason::NotMapped) };
        let below = pieces.range(..=at.offset).next_back().filter(|(_, piece)| piece.end > at.offset);
        let grown = || pieces.range(at.offset..).next().filter(|(_, piece)| piece.grows_down);
        let Some((&start, piece)) = below.or_else(grown) else { return Some(Reason::NotMapped) };
        let Prot { read, write, execute } = piece.prot;
        let allowed = match access {
            // x86 has no page that can be written or executed and not read.
            Access::Read => read || write || execute,
            Access::Write => write,
            Access::Execute => execute,
        };
        if !allowed {
            return Some(Reason::NotAllowed);
        }
        match piece.backing {
            Backing::File { file, offset } => {
                let size = files.get(&file).copied().unwrap_or(0);
                let page = (offset + at.offset).saturating_sub(start);
                (page >= size.next_multiple_of(PAGE)).then_some(Reason::BeyondEnd)
            }
            Backing::Anonymous => None,
        }
    }

    /// Extends what grows down to a touch below it.
    fn grow(&mut self, at: Address) {
        let Some(pieces) = self.mappings.get_mut(&at.mapping) else { return };
        if pieces.range(..=at.offset).next_back().is_some_and(|(_, piece)| piece.end > at.offset) {
            return;
        }
        if let Some((&start, &piece)) = pieces.range(at.offset..).next() {
            let pieces = Arc::make_mut(pieces);
            pieces.remove(&start);
            pieces.insert(at.offset, piece);
        }
    }
}

/// What a mapping shows `by` bytes further on.
fn advance(backing: Backing, by: u64) -> Backing {
    match backing {
        Backing::File { file, offset } => Backing::File { file, offset: offset + by },
        Backing::Anonymous => Backing::Anonymous,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::ThreadId;

    /// Otherwise 2,000 mappings and 2,000 forks, in 28 KiB, take 2 GiB.
    #[test]
    fn a_child_shares_what_is_not_changed() {
        let (parent, child, thread) = (ProcessId(0), ProcessId(1), ThreadId(0));
        let map = |id| {
            let (len, reserve, place) = (PAGE, PAGE, Place::Anywhere { recorded: 0 });
            let (prot, backing, kind) = (Prot::READ_WRITE, Backing::Anonymous, MapKind::Mmap);
            let (shared, populate, grows_down, no_reserve) = (false, false, false, false);
            let id = MappingId(id);
            let map = Map {
                thread,
                id,
                len,
                reserve,
                prot,
                backing,
                shared,
                populate,
                grows_down,
                no_reserve,
                kind,
                place,
            };
            Event::Map(map)
        };
        let mut checker = Checker::new("program");
        [map(0), map(1), Event::Fork { thread, child, shares_memory: false }]
            .iter()
            .for_each(|event| checker.event(parent, event));
        let at = Address { mapping: MappingId(1), offset: 0 };
        checker.event(child, &Event::Protect { thread, at, len: PAGE, prot: Prot::from_bits(1) });
        let shares = |id| {
            let of = |process| checker.living[process].mappings[&MappingId(id)].clone();
            Arc::ptr_eq(&of(&parent), &of(&child))
        };
        assert_eq!([0, 1].map(shares), [true, false]);
    }
}
