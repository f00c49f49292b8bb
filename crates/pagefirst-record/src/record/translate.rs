//! Turns the plugin's stream into events.

use std::collections::HashMap;
use std::io::{self, Read, Write};

use super::files::{Files, base_name};
use super::initial::{self, Image, Initial, STACK};
use super::raw::{self, Call, Raw, number};
use super::track::{Span, Tracker};
use super::{RecordError, doing};
use crate::check::Checker;
use crate::event::{
    Access, Advice, Backing, Event, FileId, Loss, LossKind, Map, MapKind, MappingId, Native, Place, Prot,
    ThreadId, Trailer,
};
use crate::wire::{ADDRESS_LIMIT, LOSS_LIMIT, PAGE};
use crate::write::Writer;

const MAP_SHARED: u64 = 0x01;
const MAP_FIXED: u64 = 0x10;
const MAP_GROWSDOWN: u64 = 0x100;
const MAP_LOCKED: u64 = 0x2000;
const MAP_NORESERVE: u64 = 0x4000;
const MAP_POPULATE: u64 = 0x8000;
const MAP_FIXED_NOREPLACE: u64 = 0x10_0000;
const MREMAP_DONTUNMAP: u64 = 4;
/// What Linux gives a stack besides its arguments.
const STACK_AT_FIRST: u64 = 132 << 10;

const FIRST: ThreadId = ThreadId(0);

/// The heap.
struct Heap {
    mapping: MappingId,
    base: u64,
    end: u64,
}

/// Follows a program.
pub(super) struct Translator<W: Write> {
    writer: Writer<W>,
    /// Counts while the recording is written.
    checker: Checker,
    tracker: Tracker,
    files: Files,
    /// The file that a thread's next `mmap` maps.
    mapped: HashMap<ThreadId, FileId>,
    /// What a thread's `mremap` took away.
    moving: HashMap<ThreadId, Vec<Span>>,
    /// The emulator's descriptor tables.
    tables: Vec<(u64, u64)>,
    argument_bytes: u64,
    program_end: Option<u64>,
    heap: Option<Heap>,
    executing: Option<String>,
    losses: Vec<Loss>,
    accesses: u64,
    ended: bool,
}

impl<W: Write> Translator<W> {
    pub(super) fn new(writer: Writer<W>, argument_bytes: u64) -> Self {
        Self {
            writer,
            checker: Checker::default(),
            tracker: Tracker::default(),
            files: Files::default(),
            mapped: HashMap::new(),
            moving: HashMap::new(),
            tables: Vec::new(),
            argument_bytes,
            program_end: None,
            heap: None,
            executing: None,
            losses: Vec::new(),
            accesses: 0,
            ended: false,
        }
    }

    /// The program has begun.
    pub(super) fn started(&self) -> bool {
        self.program_end.is_some()
    }

    /// Follows the stream to its end.
    pub(super) fn all(&mut self, stream: &mut impl Read) -> Result<(), RecordError> {
        while let Some(raw) = raw::next(stream)? {
            self.record(raw)?;
        }
        match self.executing.take() {
            Some(name) => self.lose(LossKind::Exec, name),
            None if !self.ended => self.lose(LossKind::Cut, String::new()),
            None => {}
        }
        Ok(())
    }

    /// Writes the trailer.
    pub(super) fn finish(self, exit_status: i32, native: Option<Native>) -> io::Result<Trailer> {
        let report = self.checker.report();
        let trailer = Trailer {
            touches: report.touches,
            unexplained: report.unexplained,
            accesses: self.accesses,
            exit_status,
            losses: self.losses,
            native,
        };
        self.writer.finish(&trailer)?;
        Ok(trailer)
    }

    fn emit(&mut self, event: Event) -> Result<(), RecordError> {
        self.checker.event(&event);
        self.writer.event(&event).map_err(doing("writing the recording"))
    }

    fn lose(&mut self, kind: LossKind, name: String) {
        let full = self.losses.len() as u64 == LOSS_LIMIT;
        match self.losses.iter_mut().find(|loss| loss.kind == kind && loss.name == name) {
            Some(loss) => loss.count += 1,
            None if full => {}
            None => self.losses.push(Loss { kind, name, count: 1 }),
        }
    }

    fn record(&mut self, raw: Raw) -> Result<(), RecordError> {
        match raw {
            Raw::Touch { thread, address, access, by_kernel } => {
                let event = match self.tracker.find(address) {
                    Some(at) => Event::Touch { thread, at, access, by_kernel },
                    None if self.is_table(address) => return Ok(()),
                    None => Event::Stray { thread, recorded: address, access, by_kernel },
                };
                self.emit(event)
            }
            Raw::Enter(call) => self.enter(call),
            Raw::Return(call, result) => self.leave(call, result),
            Raw::Maps(maps) => self.initial(initial::read(&maps)?),
            Raw::File { thread, identity, size, name } => {
                let (file, news) = self.files.number(identity, &name, size);
                self.mapped.insert(thread, file);
                news.map_or(Ok(()), |event| self.emit(event))
            }
            Raw::FileSize { identity, size } => {
                self.files.resized(identity, size).flatten().map_or(Ok(()), |event| self.emit(event))
            }
            Raw::ThreadStart(thread) => self.emit(Event::ThreadStart { thread }),
            Raw::ThreadExit(thread) => self.emit(Event::ThreadExit { thread }),
            Raw::Fork => {
                self.lose(LossKind::Fork, String::new());
                Ok(())
            }
            Raw::Exec { accesses, name } => {
                self.accesses = accesses;
                self.executing = Some(base_name(&name));
                Ok(())
            }
            Raw::ExecFailed => {
                self.executing = None;
                Ok(())
            }
            Raw::End { accesses } => {
                self.accesses = accesses;
                self.ended = true;
                Ok(())
            }
        }
    }

    fn is_table(&self, address: u64) -> bool {
        self.tables.iter().any(|&(start, end)| (start..end).contains(&address))
    }

    fn initial(&mut self, initial: Initial) -> Result<(), RecordError> {
        self.tables = initial.tables;
        let kinds = [MapKind::Program, MapKind::Interpreter];
        self.program_end = Some(initial.images.first().map_or(0, |image| image.range().1));
        for (image, kind) in initial.images.iter().zip(kinds) {
            self.image(image, kind)?;
        }
        let map = Map {
            thread: FIRST,
            id: MappingId(0),
            len: 0,
            reserve: 0,
            prot: Prot::READ_WRITE,
            backing: Backing::Anonymous,
            shared: false,
            populate: false,
            grows_down: false,
            no_reserve: false,
            kind: MapKind::Vdso,
            place: Place::FixedRecorded(0),
        };
        if let Some(start) = initial.stack {
            let used = self.argument_bytes.next_multiple_of(PAGE).min(STACK);
            let (len, grows_down, kind) = ((used + STACK_AT_FIRST).min(STACK), true, MapKind::Stack);
            let id = self.map_new(start, Map { len, reserve: STACK, grows_down, kind, ..map })?;
            for offset in (STACK - used..STACK).step_by(PAGE as usize) {
                let at = crate::Address { mapping: id, offset };
                self.emit(Event::Touch { thread: FIRST, at, access: Access::Write, by_kernel: true })?;
            }
        }
        for (start, end) in initial.others {
            let (len, prot) = (end - start, Prot { read: true, write: false, execute: true });
            self.map_new(start, Map { len, reserve: len, prot, ..map })?;
        }
        Ok(())
    }

    fn image(&mut self, image: &Image, kind: MapKind) -> Result<(), RecordError> {
        let (file, news) = self.files.number(image.identity, &image.path, image.size);
        news.map_or(Ok(()), |event| self.emit(event))?;
        let (base, end) = image.range();
        let mut first = None;
        for segment in &image.segments {
            let len = segment.end - segment.start;
            let map = Map {
                thread: FIRST,
                id: MappingId(0),
                len,
                reserve: len,
                prot: segment.prot,
                backing: segment.offset.map_or(Backing::Anonymous, |offset| Backing::File { file, offset }),
                shared: false,
                populate: false,
                grows_down: false,
                no_reserve: false,
                kind,
                place: Place::FixedRecorded(base),
            };
            let Some(mapping) = first else {
                let place = if image.relocatable { Place::Anywhere { recorded: base } } else { map.place };
                let id = self.map_new(base, Map { reserve: end - base, place, ..map })?;
                self.tracker.remove(segment.end, end);
                first = Some(id);
                continue;
            };
            let span = Span { start: segment.start, end: segment.end, mapping, base };
            self.tracker.insert(span);
            self.emit(Event::Map(Map { id: mapping, place: Place::At(span.at()), ..map }))?;
        }
        Ok(())
    }

    /// Makes a mapping with a new name; its reservation starts at `base`. With a place fixed at 0, that is its place.
    fn map_new(&mut self, base: u64, map: Map) -> Result<MappingId, RecordError> {
        let id = self.tracker.name();
        self.tracker.insert(Span { start: base, end: base + map.reserve, mapping: id, base });
        let place =
            if map.place == Place::FixedRecorded(0) { Place::Anywhere { recorded: base } } else { map.place };
        self.emit(Event::Map(Map { id, place, ..map }))?;
        Ok(id)
    }

    fn enter(&mut self, call: Call) -> Result<(), RecordError> {
        let [start, len, ..] = call.arguments;
        let Some((start, end)) = range(start, len) else { return Ok(()) };
        match call.number {
            number::MUNMAP => self.unmap(call.thread, start, end),
            number::MREMAP => {
                let taken = self.tracker.remove(start, end);
                self.moving.insert(call.thread, taken);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn unmap(&mut self, thread: ThreadId, start: u64, end: u64) -> Result<(), RecordError> {
        for span in self.tracker.remove(start, end) {
            self.emit(Event::Unmap { thread, at: span.at(), len: span.len() })?;
        }
        Ok(())
    }

    fn leave(&mut self, call: Call, result: u64) -> Result<(), RecordError> {
        let (thread, [start, len, third, ..]) = (call.thread, call.arguments);
        let failed = (-4095..0).contains(&(result as i64));
        if call.number == number::MREMAP {
            return self.remap(call, (!failed).then_some(result));
        }
        if failed {
            return Ok(());
        }
        match call.number {
            number::MMAP => self.map(call, result),
            number::BRK => self.brk(thread, start, result),
            number::MPROTECT | number::PKEY_MPROTECT => {
                let Some((start, end)) = range(start, len) else { return Ok(()) };
                for span in self.tracker.live(start, end) {
                    let (at, len, prot) = (span.at(), span.len(), Prot::from_bits(third));
                    self.emit(Event::Protect { thread, at, len, prot })?;
                }
                Ok(())
            }
            number::MADVISE => {
                let Some((start, end)) = range(start, len) else { return Ok(()) };
                for span in self.tracker.live(start, end) {
                    let (at, len, advice) = (span.at(), span.len(), Advice::from_number(third as u32));
                    self.emit(Event::Advise { thread, at, len, advice })?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn map(&mut self, call: Call, result: u64) -> Result<(), RecordError> {
        let (thread, [_, len, prot, flags, _, offset]) = (call.thread, call.arguments);
        let file = self.mapped.remove(&thread);
        let Some((start, end)) = range(result, len) else { return Ok(()) };
        let backing = |from: u64| match file {
            Some(file) => Backing::File { file, offset: offset.wrapping_add(from - start) / PAGE * PAGE },
            None => Backing::Anonymous,
        };
        let piece = |start: u64, end: u64| Map {
            thread,
            id: MappingId(0),
            len: end - start,
            reserve: end - start,
            prot: Prot::from_bits(prot),
            backing: backing(start),
            shared: flags & MAP_SHARED != 0,
            populate: flags & (MAP_POPULATE | MAP_LOCKED) != 0,
            grows_down: flags & MAP_GROWSDOWN != 0,
            no_reserve: flags & MAP_NORESERVE != 0,
            kind: MapKind::Mmap,
            place: Place::Anywhere { recorded: start },
        };
        if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) == 0 {
            // Nothing should be there; if something is, we missed how it went.
            self.unmap(thread, start, end)?;
            return self.map_new(start, piece(start, end)).map(drop);
        }
        for span in self.tracker.live(start, end) {
            let place = Place::At(span.at());
            self.emit(Event::Map(Map { id: span.mapping, place, ..piece(span.start, span.end) }))?;
        }
        for (start, end) in self.tracker.gaps(start, end) {
            self.map_new(start, Map { place: Place::FixedRecorded(start), ..piece(start, end) })?;
        }
        Ok(())
    }

    fn remap(&mut self, call: Call, result: Option<u64>) -> Result<(), RecordError> {
        let (thread, [from, old_len, new_len, flags, ..]) = (call.thread, call.arguments);
        let mut spans = self.moving.remove(&thread).unwrap_or_default();
        let sizes = range(from, old_len).zip(result.and_then(|result| range(result, new_len)));
        let Some(((_, old_end), (to, new_end))) = sizes else {
            spans.into_iter().for_each(|span| self.tracker.insert(span));
            return Ok(());
        };
        let kept_end = old_end.min(from + (new_end - to));
        for span in &mut spans {
            if span.end > kept_end {
                let start = span.start.max(kept_end);
                let tail = Span { start, ..*span };
                self.emit(Event::Unmap { thread, at: tail.at(), len: tail.len() })?;
                span.end = start;
            }
        }
        spans.retain(|span| span.len() > 0);
        let keep = flags & MREMAP_DONTUNMAP != 0;
        let moved = to != from;
        if moved {
            self.unmap(thread, to, new_end)?;
            if keep {
                spans.iter().for_each(|&span| self.tracker.insert(span));
            }
        }
        if old_len == 0 {
            spans = self.tracker.live(from, from + PAGE);
        }
        let count = spans.len();
        for (index, span) in spans.into_iter().enumerate() {
            let last = index + 1 == count;
            let old_len = if old_len == 0 { 0 } else { span.len() };
            let start = to + (span.start - from);
            let end = if last { new_end } else { start + span.len() };
            if !moved && end - start == old_len {
                self.tracker.insert(span);
                continue;
            }
            let id = self.tracker.name();
            self.tracker.insert(Span { start, end, mapping: id, base: start });
            let (from, new_len) = (span.at(), end - start);
            self.emit(Event::Remap { thread, from, old_len, new_len, id, moved, recorded: start, keep })?;
        }
        Ok(())
    }

    fn brk(&mut self, thread: ThreadId, asked: u64, result: u64) -> Result<(), RecordError> {
        let end = result.next_multiple_of(PAGE);
        let (mapping, base, old) = match &mut self.heap {
            Some(heap) => (heap.mapping, heap.base, std::mem::replace(&mut heap.end, end)),
            None => {
                // The first call usually asks where the heap is; else it begins behind the program.
                let base = if asked == 0 { end } else { self.program_end.unwrap_or(end).min(end) };
                let mapping = self.tracker.name();
                self.heap = Some(Heap { mapping, base, end });
                self.emit(Event::Map(Map {
                    thread,
                    id: mapping,
                    len: 0,
                    reserve: 0,
                    prot: Prot::READ_WRITE,
                    backing: Backing::Anonymous,
                    shared: false,
                    populate: false,
                    grows_down: false,
                    no_reserve: false,
                    kind: MapKind::Heap,
                    place: Place::Anywhere { recorded: base },
                }))?;
                (mapping, base, base)
            }
        };
        if end == old || end < base {
            return Ok(());
        }
        if end > old {
            self.tracker.insert(Span { start: old, end, mapping, base });
        } else {
            self.tracker.remove(end, old);
        }
        self.emit(Event::Brk { thread, heap: mapping, old: old - base, new: end - base })
    }
}

/// A call's range in whole pages, if a call with it can succeed.
fn range(start: u64, len: u64) -> Option<(u64, u64)> {
    let end = start.checked_add(len)?.checked_next_multiple_of(PAGE)?;
    (start.is_multiple_of(PAGE) && end < ADDRESS_LIMIT).then_some((start, end))
}
