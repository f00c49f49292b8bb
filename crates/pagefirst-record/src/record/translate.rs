//! Turns the records of a process into events.

use std::collections::HashMap;
use std::io::{self, Write};

use super::files::Files;
use super::initial::{self, Image, STACK};
use super::raw::{Call, Raw, number};
use super::track::{Span, Tracker};
use super::{RecordError, doing};
use crate::check::Checker;
use crate::event::{
    Access, Advice, Backing, Event, FileId, Map, MapKind, MappingId, Place, ProcessId, Prot, ThreadId,
    Trailer,
};
use crate::wire::{ADDRESS_LIMIT, PAGE};
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
#[derive(Clone, Copy)]
struct Heap {
    mapping: MappingId,
    base: u64,
    end: u64,
}

/// What all processes write to.
pub(super) struct Output<W: Write> {
    writer: Writer<W>,
    /// Counts while the recording is written.
    checker: Checker,
    files: Files,
}

impl<W: Write> Output<W> {
    pub(super) fn new(writer: Writer<W>, program: &str) -> Self {
        Self { writer, checker: Checker::new(program), files: Files::default() }
    }

    pub(super) fn emit(&mut self, process: ProcessId, event: Event) -> Result<(), RecordError> {
        self.checker.event(process, &event);
        self.writer.event(process, &event).map_err(doing("writing the recording"))
    }

    /// Writes the trailer, but for what is counted here.
    pub(super) fn finish(self, trailer: Trailer) -> io::Result<Trailer> {
        let report = self.checker.report();
        let trailer = Trailer { touches: report.touches, unexplained: report.unexplained, ..trailer };
        self.writer.finish(&trailer)?;
        Ok(trailer)
    }
}

/// Follows a process.
#[derive(Clone, Default)]
pub(super) struct Translator {
    process: ProcessId,
    tracker: Tracker,
    /// The file that a thread's next `mmap` maps.
    mapped: HashMap<ThreadId, FileId>,
    /// What a thread's `mremap` took away.
    moving: HashMap<ThreadId, Vec<Span>>,
    /// The emulator's descriptor tables.
    tables: Vec<(u64, u64)>,
    program_end: Option<u64>,
    heap: Option<Heap>,
}

impl Translator {
    /// A process that begins with what this one has.
    pub(super) fn child(&self, process: ProcessId) -> Self {
        Self { process, mapped: HashMap::new(), moving: HashMap::new(), ..self.clone() }
    }

    /// The process, when it begins with another program.
    pub(super) fn anew(&self) -> Self {
        Self { process: self.process, ..Self::default() }
    }

    /// Translates what concerns memory, files and threads. The rest is no event of this process alone.
    pub(super) fn record<W: Write>(&mut self, out: &mut Output<W>, raw: Raw) -> Result<(), RecordError> {
        match raw {
            Raw::Touch { thread, address, access, by_kernel } => {
                let event = match self.tracker.find(address) {
                    Some(at) => Event::Touch { thread, at, access, by_kernel },
                    None if self.is_table(address) => return Ok(()),
                    None => Event::Stray { thread, recorded: address, access, by_kernel },
                };
                out.emit(self.process, event)
            }
            Raw::Enter(call) => self.enter(out, call),
            Raw::Return(call, result) => self.leave(out, call, result),
            Raw::File { thread, identity, size, name } => {
                let (file, news) = out.files.number(identity, &name, size);
                self.mapped.insert(thread, file);
                news.map_or(Ok(()), |event| out.emit(self.process, event))
            }
            Raw::FileSize { identity, size } => {
                let news = out.files.resized(identity, size).flatten();
                news.map_or(Ok(()), |event| out.emit(self.process, event))
            }
            Raw::ThreadStart(thread) => out.emit(self.process, Event::ThreadStart { thread }),
            Raw::ThreadExit(thread) => out.emit(self.process, Event::ThreadExit { thread }),
            Raw::Maps(_)
            | Raw::Fork { .. }
            | Raw::ForkFailed { .. }
            | Raw::Exec { .. }
            | Raw::ExecFailed
            | Raw::End { .. } => Ok(()),
        }
    }

    fn is_table(&self, address: u64) -> bool {
        self.tables.iter().any(|&(start, end)| (start..end).contains(&address))
    }

    /// What `execve` set up.
    pub(super) fn initial<W: Write>(
        &mut self,
        out: &mut Output<W>,
        maps: &str,
        argument_bytes: u64,
    ) -> Result<(), RecordError> {
        let initial = initial::read(maps)?;
        self.tables = initial.tables;
        let kinds = [MapKind::Program, MapKind::Interpreter];
        self.program_end = Some(initial.images.first().map_or(0, |image| image.range().1));
        for (image, kind) in initial.images.iter().zip(kinds) {
            self.image(out, image, kind)?;
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
            let used = argument_bytes.next_multiple_of(PAGE).min(STACK);
            let (len, grows_down, kind) = ((used + STACK_AT_FIRST).min(STACK), true, MapKind::Stack);
            let id = self.map_new(out, start, Map { len, reserve: STACK, grows_down, kind, ..map })?;
            for offset in (STACK - used..STACK).step_by(PAGE as usize) {
                let at = crate::Address { mapping: id, offset };
                out.emit(
                    self.process,
                    Event::Touch { thread: FIRST, at, access: Access::Write, by_kernel: true },
                )?;
            }
        }
        for (start, end) in initial.others {
            let (len, prot) = (end - start, Prot { read: true, write: false, execute: true });
            self.map_new(out, start, Map { len, reserve: len, prot, ..map })?;
        }
        Ok(())
    }

    fn image<W: Write>(
        &mut self,
        out: &mut Output<W>,
        image: &Image,
        kind: MapKind,
    ) -> Result<(), RecordError> {
        let (file, news) = out.files.number(image.identity, &image.path, image.size);
        news.map_or(Ok(()), |event| out.emit(self.process, event))?;
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
                let id = self.map_new(out, base, Map { reserve: end - base, place, ..map })?;
                self.tracker.remove(segment.end, end);
                first = Some(id);
                continue;
            };
            let span = Span { start: segment.start, end: segment.end, mapping, base };
            self.tracker.insert(span);
            out.emit(self.process, Event::Map(Map { id: mapping, place: Place::At(span.at()), ..map }))?;
        }
        Ok(())
    }

    /// Makes a mapping with a new name; its reservation starts at `base`. With a place fixed at 0, that is its place.
    fn map_new<W: Write>(
        &mut self,
        out: &mut Output<W>,
        base: u64,
        map: Map,
    ) -> Result<MappingId, RecordError> {
        let id = self.tracker.name();
        self.tracker.insert(Span { start: base, end: base + map.reserve, mapping: id, base });
        let place =
            if map.place == Place::FixedRecorded(0) { Place::Anywhere { recorded: base } } else { map.place };
        out.emit(self.process, Event::Map(Map { id, place, ..map }))?;
        Ok(id)
    }

    fn enter<W: Write>(&mut self, out: &mut Output<W>, call: Call) -> Result<(), RecordError> {
        let [start, len, ..] = call.arguments;
        let Some((start, end)) = range(start, len) else { return Ok(()) };
        match call.number {
            number::MUNMAP => self.unmap(out, call.thread, start, end),
            number::MREMAP => {
                let taken = self.tracker.remove(start, end);
                self.moving.insert(call.thread, taken);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn unmap<W: Write>(
        &mut self,
        out: &mut Output<W>,
        thread: ThreadId,
        start: u64,
        end: u64,
    ) -> Result<(), RecordError> {
        for span in self.tracker.remove(start, end) {
            out.emit(self.process, Event::Unmap { thread, at: span.at(), len: span.len() })?;
        }
        Ok(())
    }

    fn leave<W: Write>(&mut self, out: &mut Output<W>, call: Call, result: u64) -> Result<(), RecordError> {
        let (thread, [start, len, third, ..]) = (call.thread, call.arguments);
        let failed = (-4095..0).contains(&(result as i64));
        if call.number == number::MREMAP {
            return self.remap(out, call, (!failed).then_some(result));
        }
        if failed {
            return Ok(());
        }
        match call.number {
            number::MMAP => self.map(out, call, result),
            number::BRK => self.brk(out, thread, start, result),
            number::MPROTECT | number::PKEY_MPROTECT => {
                let Some((start, end)) = range(start, len) else { return Ok(()) };
                for span in self.tracker.live(start, end) {
                    let (at, len, prot) = (span.at(), span.len(), Prot::from_bits(third));
                    out.emit(self.process, Event::Protect { thread, at, len, prot })?;
                }
                Ok(())
            }
            number::MADVISE => {
                let Some((start, end)) = range(start, len) else { return Ok(()) };
                for span in self.tracker.live(start, end) {
                    let (at, len, advice) = (span.at(), span.len(), Advice::from_number(third as u32));
                    out.emit(self.process, Event::Advise { thread, at, len, advice })?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn map<W: Write>(&mut self, out: &mut Output<W>, call: Call, result: u64) -> Result<(), RecordError> {
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
            self.unmap(out, thread, start, end)?;
            return self.map_new(out, start, piece(start, end)).map(drop);
        }
        for span in self.tracker.live(start, end) {
            let place = Place::At(span.at());
            out.emit(
                self.process,
                Event::Map(Map { id: span.mapping, place, ..piece(span.start, span.end) }),
            )?;
        }
        for (start, end) in self.tracker.gaps(start, end) {
            self.map_new(out, start, Map { place: Place::FixedRecorded(start), ..piece(start, end) })?;
        }
        Ok(())
    }

    fn remap<W: Write>(
        &mut self,
        out: &mut Output<W>,
        call: Call,
        result: Option<u64>,
    ) -> Result<(), RecordError> {
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
                out.emit(self.process, Event::Unmap { thread, at: tail.at(), len: tail.len() })?;
                span.end = start;
            }
        }
        spans.retain(|span| span.len() > 0);
        let keep = flags & MREMAP_DONTUNMAP != 0;
        let moved = to != from;
        if moved {
            self.unmap(out, thread, to, new_end)?;
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
            out.emit(
                self.process,
                Event::Remap { thread, from, old_len, new_len, id, moved, recorded: start, keep },
            )?;
        }
        Ok(())
    }

    fn brk<W: Write>(
        &mut self,
        out: &mut Output<W>,
        thread: ThreadId,
        asked: u64,
        result: u64,
    ) -> Result<(), RecordError> {
        let end = result.next_multiple_of(PAGE);
        let (mapping, base, old) = match &mut self.heap {
            Some(heap) => (heap.mapping, heap.base, std::mem::replace(&mut heap.end, end)),
            None => {
                // The first call usually asks where the heap is; else it begins behind the program.
                let base = if asked == 0 { end } else { self.program_end.unwrap_or(end).min(end) };
                let mapping = self.tracker.name();
                self.heap = Some(Heap { mapping, base, end });
                out.emit(
                    self.process,
                    Event::Map(Map {
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
                    }),
                )?;
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
        out.emit(self.process, Event::Brk { thread, heap: mapping, old: old - base, new: end - base })
    }
}

/// A call's range in whole pages, if a call with it can succeed.
fn range(start: u64, len: u64) -> Option<(u64, u64)> {
    let end = start.checked_add(len)?.checked_next_multiple_of(PAGE)?;
    (start.is_multiple_of(PAGE) && end < ADDRESS_LIMIT).then_some((start, end))
}
