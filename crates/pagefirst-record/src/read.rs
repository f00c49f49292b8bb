//! Reads a recording as a stream. Nothing in the file is trusted.

use std::collections::HashMap;
use std::io::{BufReader, ErrorKind, Read};

use crate::error::{FormatError, Problem};
use crate::event::{
    Access, Address, Advice, Arch, Backing, Event, FileId, FileInfo, Header, Map, MapKind, MappingId, Place,
    ProcessId, Prot, ThreadId, Trailer,
};
use crate::input::Input;
use crate::wire::{
    ADDRESS_LIMIT, Context, FILE_LIMIT, Known, MAGIC, MAPPING_LIMIT, PAGE, PROCESS_LIMIT, TOUCH,
    TOUCH_KERNEL, TOUCH_MAPPING, TOUCH_THREAD, TOUCH_UNUSED, VERSION, WINDOW_LOG, tag, unzigzag,
};

mod trailer;

type Stream<R> = BufReader<zstd::stream::read::Decoder<'static, BufReader<R>>>;

/// What is known of a process.
#[derive(Debug)]
struct Process {
    context: Context,
    threads: u32,
    ended: bool,
}

/// A recording that is being read.
///
/// It never holds more than one event, and 16 bytes for each mapping of a living process, of which there may be 2^24 in
/// all: a file of any length can be read, and a malicious one can't exhaust the memory. What an event names was introduced
/// before, and every range lies within its mapping's reservation; whether it is *mapped* there is what [`Checker`](crate::Checker) finds out.
pub struct Recording<R: Read> {
    input: Input<Stream<R>>,
    header: Header,
    /// The process of the last event, and what is known of it.
    process: ProcessId,
    current: Process,
    /// The other processes that have not ended.
    others: HashMap<ProcessId, Process>,
    /// Processes, and mappings of those that have not ended.
    processes: u32,
    mappings: u32,
    files: u32,
    touches: u64,
    trailer: Option<Trailer>,
}

impl<R: Read> Recording<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// When the file is no recording, is one of another version, or is damaged.
    pub fn open(mut file: R) -> Result<Self, FormatError> {
        let mut start = [0; MAGIC.len() + 2];
        let mut filled = 0;
        let outside = |offset: usize, problem| FormatError {
            offset: offset as u64,
            event: None,
            process: None,
            problem,
        };
        while filled < start.len() {
            match file.read(&mut start[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(outside(filled, Problem::Io(error))),
            }
        }
        let magic = &start[..filled.min(MAGIC.len())];
        if magic != MAGIC {
            return Err(outside(0, Problem::Magic { found: magic.to_vec() }));
        }
        if filled < start.len() {
            return Err(outside(filled, Problem::Truncated { expected: "the format's version" }));
        }
        let version = u16::from_le_bytes([start[8], start[9]]);
        if version != VERSION {
            return Err(outside(MAGIC.len(), Problem::Version { found: version }));
        }
        let mut decoder = zstd::stream::read::Decoder::new(file)
            .map_err(|error| outside(start.len(), Problem::Compression(error)))?
            .single_frame();
        decoder
            .window_log_max(WINDOW_LOG)
            .map_err(|error| outside(start.len(), Problem::Compression(error)))?;
        let mut input = Input::new(BufReader::new(decoder));
        let arch = match input.byte("the architecture")? {
            1 => Arch::X86_64,
            found => return Err(input.value("architecture 1 (x86-64)", u64::from(found))),
        };
        let page_size = input.number("the page size")?;
        if page_size != PAGE {
            return Err(input.value("a page size of 4096 bytes", page_size));
        }
        let program = input.text("the program's name")?;
        let emulator = input.text("the emulator's name")?;
        let header = Header { version, arch, page_size: PAGE as u32, program, emulator };
        Ok(Self {
            input,
            header,
            process: ProcessId(0),
            current: Process { context: Context::default(), threads: 1, ended: false },
            others: HashMap::new(),
            processes: 1,
            mappings: 0,
            files: 0,
            touches: 0,
            trailer: None,
        })
    }

    /// What the recording begins with.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What the recording ends with, once [`next_event`](Self::next_event) has returned `None`.
    pub fn trailer(&self) -> Option<&Trailer> {
        self.trailer.as_ref()
    }

    /// The events read so far.
    pub fn events(&self) -> u64 {
        self.input.event
    }

    /// Reads the next event and the process that it is of; `None` after the last, once the trailer is read and found
    /// sound.
    ///
    /// # Errors
    /// When the file is damaged. The events returned before are sound.
    pub fn next_event(&mut self) -> Result<Option<(ProcessId, Event)>, FormatError> {
        if self.trailer.is_some() {
            return Ok(None);
        }
        let mut first = self.input.byte("an event or the trailer")?;
        if first == tag::PROCESS {
            self.switch()?;
            first = self.input.byte("an event")?;
        }
        if self.current.ended && first != tag::TRAILER {
            return Err(self.input.value("an event of a process that has not ended", first.into()));
        }
        let process = self.process;
        let event = if first & TOUCH != 0 {
            self.touch(first)?
        } else {
            match first {
                tag::FILE => self.file()?,
                tag::FILE_SIZE => {
                    let file = self.known_file()?;
                    Event::FileSize { file, size: self.input.below("a file's size", FILE_LIMIT)? }
                }
                tag::MAP => self.map()?,
                tag::UNMAP => {
                    let thread = self.known_thread()?;
                    let (at, len) = self.range()?;
                    Event::Unmap { thread, at, len }
                }
                tag::PROTECT => {
                    let thread = self.known_thread()?;
                    let (at, len) = self.range()?;
                    Event::Protect { thread, at, len, prot: self.prot()? }
                }
                tag::REMAP => self.remap()?,
                tag::ADVISE => {
                    let thread = self.known_thread()?;
                    let (at, len) = self.range()?;
                    let advice = self.input.below("an advice's number", 1 << 32)?;
                    Event::Advise { thread, at, len, advice: Advice::from_number(advice as u32) }
                }
                tag::BRK => self.brk()?,
                tag::STRAY => {
                    let thread = self.known_thread()?;
                    let flags = self.input.byte("a touch's kind")?;
                    let access = self.access(flags & !TOUCH_KERNEL)?;
                    let page = self.input.below("a page's number", 1 << 52)?;
                    self.touches += 1;
                    Event::Stray {
                        thread,
                        recorded: page * PAGE,
                        access,
                        by_kernel: flags & TOUCH_KERNEL != 0,
                    }
                }
                tag::THREAD_START => {
                    let thread = self.input.number("a thread's number")?;
                    if thread != u64::from(self.current.threads) {
                        return Err(self.input.value("the next thread's number", thread));
                    }
                    let next = self.current.threads.checked_add(1);
                    self.current.threads = next.ok_or_else(|| self.input.value("fewer threads", thread))?;
                    Event::ThreadStart { thread: ThreadId(thread as u32) }
                }
                tag::THREAD_EXIT => Event::ThreadExit { thread: self.known_thread()? },
                tag::FORK => self.fork()?,
                tag::EXEC => {
                    let thread = self.known_thread()?;
                    let program = self.name("a program's name")?;
                    self.mappings -= self.current.context.mappings.len() as u32;
                    self.current = Process { context: Context::default(), threads: 1, ended: false };
                    Event::Exec { thread, program }
                }
                tag::END => {
                    let status = self.input.below("an exit status", 257)?;
                    let accesses = self.input.number("the number of accesses")?;
                    self.mappings -= self.current.context.mappings.len() as u32;
                    self.current = Process { context: Context::default(), threads: 0, ended: true };
                    Event::End { exit_status: status.checked_sub(1).map(|status| status as i32), accesses }
                }
                tag::TRAILER => {
                    self.trailer = Some(self.read_trailer()?);
                    return Ok(None);
                }
                found => return Err(self.input.error(Problem::Tag { found })),
            }
        };
        self.input.event += 1;
        Ok(Some((process, event)))
    }

    /// The events that follow are of another process.
    fn switch(&mut self) -> Result<(), FormatError> {
        let found = self.input.number("a process's number")?;
        let number = u32::try_from(found).ok().map(ProcessId).filter(|number| *number != self.process);
        let Some((number, next)) = number.and_then(|number| self.others.remove_entry(&number)) else {
            return Err(self.input.value("the number of another process that has not ended", found));
        };
        let last = std::mem::replace(&mut self.current, next);
        if !last.ended {
            self.others.insert(self.process, last);
        }
        self.process = number;
        self.input.process = Some(number.0);
        Ok(())
    }

    fn fork(&mut self) -> Result<Event, FormatError> {
        let thread = self.known_thread()?;
        let found = self.input.number("a process's number")?;
        if found != u64::from(self.processes) {
            return Err(self.input.value("the next process's number", found));
        }
        let shares_memory = self.input.below("0 or 1", 2)? == 1;
        let copied = self.current.context.mappings.len() as u32;
        let next = self.processes.checked_add(1).filter(|_| self.others.len() + 1 < PROCESS_LIMIT);
        let mappings = self.mappings.checked_add(copied).filter(|&all| all <= MAPPING_LIMIT);
        let Some((next, mappings)) = next.zip(mappings) else {
            return Err(self.input.value("fewer processes and mappings at the same time", found));
        };
        let child = ProcessId(self.processes);
        let born = Process { context: self.current.context.child(), threads: 1, ended: false };
        self.others.insert(child, born);
        (self.processes, self.mappings) = (next, mappings);
        // From the first fork on, messages say which process they are about.
        self.input.process = Some(self.process.0);
        Ok(Event::Fork { thread, child, shares_memory })
    }

    fn touch(&mut self, first: u8) -> Result<Event, FormatError> {
        if first & TOUCH_UNUSED != 0 {
            return Err(self.input.error(Problem::Tag { found: first }));
        }
        let access = self.access(first & 3)?;
        if first & TOUCH_THREAD != 0 {
            self.current.context.thread = self.known_thread()?.0;
        }
        if first & TOUCH_MAPPING != 0 {
            let delta = unzigzag(self.input.number("a mapping's distance")?);
            let mapping = i64::from(self.current.context.mapping).wrapping_add(delta);
            self.current.context.mapping = self.known_mapping(mapping as u64)?.0;
        }
        let delta = unzigzag(self.input.number("a page's distance")?);
        let Context { mappings, thread, mapping } = &mut self.current.context;
        let (thread, mapping, count) = (*thread, *mapping, mappings.len() as u32);
        let Some(known) = mappings.get_mut(mapping as usize) else {
            return Err(self.input.error(Problem::UnknownMapping { found: mapping.into(), known: count }));
        };
        let page = (known.last as i64).wrapping_add(delta) as u64;
        if page >= known.pages {
            let (reserve, offset) = (known.pages * PAGE, page.wrapping_mul(PAGE));
            return Err(self.input.error(Problem::Range { mapping, reserve, offset, len: PAGE }));
        }
        known.last = page;
        self.touches += 1;
        let at = Address { mapping: MappingId(mapping), offset: page * PAGE };
        Ok(Event::Touch { thread: ThreadId(thread), at, access, by_kernel: first & TOUCH_KERNEL != 0 })
    }

    fn file(&mut self) -> Result<Event, FormatError> {
        let number = self.input.number("a file's number")?;
        if number != u64::from(self.files) {
            return Err(self.input.value("the next file's number", number));
        }
        let Some(next) = self.files.checked_add(1) else {
            return Err(self.input.value("fewer files", number));
        };
        let name = self.name("a file's name")?;
        let size = self.input.below("a file's size", FILE_LIMIT)?;
        self.files = next;
        Ok(Event::File(FileInfo { number: FileId(number as u32), name, size }))
    }

    /// A name without a path.
    fn name(&mut self, expected: &'static str) -> Result<String, FormatError> {
        let name = self.input.text(expected)?;
        match name.contains('/') {
            true => Err(self.input.value("a name without a path", b'/'.into())),
            false => Ok(name),
        }
    }

    fn map(&mut self) -> Result<Event, FormatError> {
        let thread = self.known_thread()?;
        let kind = match self.input.byte("a mapping's kind")? {
            0 => MapKind::Mmap,
            1 => MapKind::Program,
            2 => MapKind::Interpreter,
            3 => MapKind::Stack,
            4 => MapKind::Heap,
            5 => MapKind::Vdso,
            found => return Err(self.input.value("a mapping's kind from 0 to 5", found.into())),
        };
        let prot = self.prot()?;
        let flags = self.input.below("a mapping's flags", 32)?;
        let [shared, populate, grows_down, no_reserve, of_file] =
            [1, 2, 4, 8, 16].map(|bit| flags & bit != 0);
        let backing = if of_file {
            let file = self.known_file()?;
            Backing::File { file, offset: self.pages("an offset in a file", FILE_LIMIT)? }
        } else {
            Backing::Anonymous
        };
        let place = self.input.byte("a mapping's place")?;
        let (id, place, len, reserve) = match place {
            0 | 1 => {
                let recorded = self.pages("a mapping's address", ADDRESS_LIMIT)?;
                let len = self.pages("a mapping's length", ADDRESS_LIMIT)?;
                if (len == 0) != (kind == MapKind::Heap) {
                    return Err(self.input.value("a length of 0 for a heap, and above for all others", len));
                }
                let reserve = len + self.pages("what is reserved beyond a mapping", ADDRESS_LIMIT - len)?;
                let id = self.new_mapping(reserve)?;
                let place =
                    if place == 0 { Place::Anywhere { recorded } } else { Place::FixedRecorded(recorded) };
                (id, place, len, reserve)
            }
            2 => {
                let (at, len) = self.range()?;
                (at.mapping, Place::At(at), len, len)
            }
            found => return Err(self.input.value("a mapping's place from 0 to 2", found.into())),
        };
        Ok(Event::Map(Map {
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
        }))
    }

    fn remap(&mut self) -> Result<Event, FormatError> {
        let thread = self.known_thread()?;
        let (from, old_len) = self.range_from(0)?;
        let new_len = old_len + self.pages("a mapping's growth", ADDRESS_LIMIT - old_len)?;
        if new_len == 0 {
            return Err(self.input.value("a mapping's new length above 0", 0));
        }
        let flags = self.input.below("the flags of mremap", 4)?;
        let recorded = self.pages("a mapping's address", ADDRESS_LIMIT)?;
        let id = self.new_mapping(new_len)?;
        let (moved, keep) = (flags & 1 != 0, flags & 2 != 0);
        Ok(Event::Remap { thread, from, old_len, new_len, id, moved, recorded, keep })
    }

    fn brk(&mut self) -> Result<Event, FormatError> {
        let thread = self.known_thread()?;
        let found = self.input.number("a heap's number")?;
        let heap = self.known_mapping(found)?;
        let old = self.pages("a heap's old size", ADDRESS_LIMIT)?;
        let new = self.pages("a heap's new size", ADDRESS_LIMIT)?;
        if let Some(known) = self.current.context.mappings.get_mut(heap.0 as usize) {
            known.pages = known.pages.max(new / PAGE).max(old / PAGE);
        }
        Ok(Event::Brk { thread, heap, old, new })
    }

    fn access(&self, bits: u8) -> Result<Access, FormatError> {
        match bits {
            0 => Ok(Access::Read),
            1 => Ok(Access::Write),
            2 => Ok(Access::Execute),
            found => Err(self.input.value("an access from 0 to 2", found.into())),
        }
    }

    fn prot(&mut self) -> Result<Prot, FormatError> {
        Ok(Prot::from_bits(self.input.below("a protection from 0 to 7", 8)?))
    }

    fn pages(&mut self, expected: &'static str, limit: u64) -> Result<u64, FormatError> {
        Ok(self.input.below(expected, limit / PAGE)? * PAGE)
    }

    fn known_thread(&mut self) -> Result<ThreadId, FormatError> {
        let thread = self.input.number("a thread's number")?;
        if thread >= self.current.threads.into() {
            return Err(self.input.value("the number of a thread that has started", thread));
        }
        Ok(ThreadId(thread as u32))
    }

    fn known_file(&mut self) -> Result<FileId, FormatError> {
        let found = self.input.number("a file's number")?;
        if found >= self.files.into() {
            return Err(self.input.error(Problem::UnknownFile { found, known: self.files }));
        }
        Ok(FileId(found as u32))
    }

    fn known_mapping(&mut self, found: u64) -> Result<MappingId, FormatError> {
        let known = self.current.context.mappings.len() as u32;
        if found >= known.into() {
            return Err(self.input.error(Problem::UnknownMapping { found, known }));
        }
        Ok(MappingId(found as u32))
    }

    fn new_mapping(&mut self, reserve: u64) -> Result<MappingId, FormatError> {
        let mappings = &mut self.current.context.mappings;
        let id = mappings.len() as u32;
        if self.mappings >= MAPPING_LIMIT {
            return Err(self.input.value("fewer mappings", id.into()));
        }
        self.mappings += 1;
        mappings.push(Known { pages: reserve / PAGE, last: 0 });
        Ok(MappingId(id))
    }

    fn range(&mut self) -> Result<(Address, u64), FormatError> {
        self.range_from(1)
    }

    fn range_from(&mut self, least: u64) -> Result<(Address, u64), FormatError> {
        let found = self.input.number("a mapping's number")?;
        let mapping = self.known_mapping(found)?;
        let offset = self.pages("an offset in a mapping", ADDRESS_LIMIT)?;
        let len = self.pages("a range's length", ADDRESS_LIMIT)?;
        let reserve = self.current.context.mappings[mapping.0 as usize].pages * PAGE;
        if len < least || offset + len > reserve {
            return Err(self.input.error(Problem::Range { mapping: mapping.0, reserve, offset, len }));
        }
        Ok((Address { mapping, offset }, len))
    }
}
