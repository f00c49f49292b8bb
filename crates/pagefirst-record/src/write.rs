//! Writes a recording as a stream.

use std::collections::HashMap;
use std::io::{self, Write};

use crate::event::{
    Access, Arch, Backing, Event, Header, LossKind, Map, MapKind, MappingId, Place, ProcessId, Trailer,
};
use crate::wire::{
    Context, Known, MAGIC, PAGE, TOUCH, TOUCH_KERNEL, TOUCH_MAPPING, TOUCH_THREAD, VERSION, put, put_text,
    tag, zigzag,
};

/// A recording that is being written.
///
/// The events must be what [`event`](crate::event) describes, with names no longer than 4,096 bytes: this side
/// checks only what the encoding needs, and [`Recording`](crate::Recording) refuses the rest.
pub struct Writer<W: Write> {
    output: zstd::stream::write::Encoder<'static, W>,
    record: Vec<u8>,
    /// The processes that have not ended.
    living: HashMap<ProcessId, Context>,
    /// The process of the last event.
    process: ProcessId,
}

impl<W: Write> Writer<W> {
    /// Writes the header. `level` is zstd's: 19 is slow and small, 3 is fast.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn create(mut file: W, header: &Header, level: i32) -> io::Result<Self> {
        file.write_all(&MAGIC)?;
        file.write_all(&VERSION.to_le_bytes())?;
        let mut output = zstd::stream::write::Encoder::new(file, level)?;
        output.include_checksum(true)?;
        let mut record = Vec::with_capacity(64);
        record.push(match header.arch {
            Arch::X86_64 => 1,
        });
        put(&mut record, header.page_size.into());
        put_text(&mut record, &header.program);
        put_text(&mut record, &header.emulator);
        output.write_all(&record)?;
        let living = HashMap::from([(ProcessId(0), Context::default())]);
        Ok(Self { output, record, living, process: ProcessId(0) })
    }

    /// Writes the next event, which is of this process.
    ///
    /// # Errors
    /// When it can't be written, or names a process or a mapping that no event before it made.
    pub fn event(&mut self, process: ProcessId, event: &Event) -> io::Result<()> {
        self.record.clear();
        let context = self.living.get_mut(&process).ok_or_else(unknown)?;
        let out = &mut self.record;
        if process != self.process {
            out.push(tag::PROCESS);
            put(out, process.0.into());
            self.process = process;
        }
        match *event {
            Event::File(ref info) => {
                out.push(tag::FILE);
                put(out, info.number.0.into());
                put_text(out, &info.name);
                put(out, info.size);
            }
            Event::FileSize { file, size } => {
                out.push(tag::FILE_SIZE);
                put(out, file.0.into());
                put(out, size);
            }
            Event::Map(ref map) => put_map(out, context, map)?,
            Event::Unmap { thread, at, len } => {
                out.push(tag::UNMAP);
                put_all(out, [thread.0.into(), at.mapping.0.into(), at.offset / PAGE, len / PAGE]);
            }
            Event::Protect { thread, at, len, prot } => {
                out.push(tag::PROTECT);
                put_all(
                    out,
                    [thread.0.into(), at.mapping.0.into(), at.offset / PAGE, len / PAGE, prot.bits()],
                );
            }
            Event::Remap { thread, from, old_len, new_len, id, moved, recorded, keep } => {
                out.push(tag::REMAP);
                put_all(out, [thread.0.into(), from.mapping.0.into(), from.offset / PAGE, old_len / PAGE]);
                let flags = u64::from(moved) | u64::from(keep) << 1;
                put_all(out, [(new_len - old_len) / PAGE, flags, recorded / PAGE]);
                new_mapping(context, id, new_len)?;
            }
            Event::Advise { thread, at, len, advice } => {
                out.push(tag::ADVISE);
                put_all(out, [thread.0.into(), at.mapping.0.into(), at.offset / PAGE, len / PAGE]);
                put(out, advice.number().into());
            }
            Event::Brk { thread, heap, old, new } => {
                out.push(tag::BRK);
                put_all(out, [thread.0.into(), heap.0.into(), old / PAGE, new / PAGE]);
            }
            Event::Touch { thread, at, access, by_kernel } => {
                let known = context.mappings.get_mut(at.mapping.0 as usize).ok_or_else(unknown)?;
                let page = at.offset / PAGE;
                let delta = zigzag(page as i64 - known.last as i64);
                known.last = page;
                let mut first = TOUCH | access_bits(access) | if by_kernel { TOUCH_KERNEL } else { 0 };
                let (other_thread, other_mapping) =
                    (thread.0 != context.thread, at.mapping.0 != context.mapping);
                first |= if other_thread { TOUCH_THREAD } else { 0 };
                first |= if other_mapping { TOUCH_MAPPING } else { 0 };
                out.push(first);
                if other_thread {
                    put(out, thread.0.into());
                }
                if other_mapping {
                    put(out, zigzag(i64::from(at.mapping.0) - i64::from(context.mapping)));
                }
                put(out, delta);
                (context.thread, context.mapping) = (thread.0, at.mapping.0);
            }
            Event::Stray { thread, recorded, access, by_kernel } => {
                out.push(tag::STRAY);
                put(out, thread.0.into());
                out.push(access_bits(access) | if by_kernel { TOUCH_KERNEL } else { 0 });
                put(out, recorded / PAGE);
            }
            Event::ThreadStart { thread } => {
                out.push(tag::THREAD_START);
                put(out, thread.0.into());
            }
            Event::ThreadExit { thread } => {
                out.push(tag::THREAD_EXIT);
                put(out, thread.0.into());
            }
            Event::Fork { thread, child, shares_memory } => {
                out.push(tag::FORK);
                put_all(out, [thread.0.into(), child.0.into(), shares_memory.into()]);
                let born = context.child();
                self.living.insert(child, born);
            }
            Event::Exec { thread, ref program } => {
                out.push(tag::EXEC);
                put(out, thread.0.into());
                put_text(out, program);
                *context = Context::default();
            }
            Event::End { exit_status, accesses } => {
                out.push(tag::END);
                put(out, exit_status.map_or(0, |status| 1 + (status as u64 & 0xff)));
                put(out, accesses);
                self.living.remove(&process);
            }
        }
        self.output.write_all(&self.record)
    }

    /// Writes the trailer and whatever is still buffered, and gives the file back.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn finish(mut self, trailer: &Trailer) -> io::Result<W> {
        self.record.clear();
        let out = &mut self.record;
        out.push(tag::TRAILER);
        put_all(out, [trailer.touches, trailer.unexplained, trailer.accesses]);
        put(out, trailer.exit_status as u64 & 0xff);
        put(out, trailer.losses.len() as u64);
        for loss in &trailer.losses {
            put(out, loss.process.0.into());
            out.push(match loss.kind {
                LossKind::Exec => 0,
                LossKind::Cut => 1,
            });
            put_text(out, &loss.name);
            put(out, loss.count);
        }
        put(out, trailer.native.as_ref().map_or(0, |native| native.runs.len() as u64));
        if let Some(native) = &trailer.native {
            put_text(out, &native.kernel);
            put_text(out, &native.huge_pages);
            for run in &native.runs {
                put_all(out, [run.minor_faults, run.major_faults, run.vm_hwm_kib, run.vm_pte_kib]);
                put(out, run.exit_status as u64 & 0xff);
            }
        }
        self.output.write_all(&self.record)?;
        let mut file = self.output.finish()?;
        file.flush()?;
        Ok(file)
    }
}

fn put_map(out: &mut Vec<u8>, context: &mut Context, map: &Map) -> io::Result<()> {
    out.push(tag::MAP);
    put(out, map.thread.0.into());
    out.push(match map.kind {
        MapKind::Mmap => 0,
        MapKind::Program => 1,
        MapKind::Interpreter => 2,
        MapKind::Stack => 3,
        MapKind::Heap => 4,
        MapKind::Vdso => 5,
    });
    put(out, map.prot.bits());
    let of_file = matches!(map.backing, Backing::File { .. });
    let flags = [map.shared, map.populate, map.grows_down, map.no_reserve, of_file];
    out.push(flags.iter().zip(0..).fold(0, |bits, (flag, shift)| bits | u8::from(*flag) << shift));
    if let Backing::File { file, offset } = map.backing {
        put_all(out, [file.0.into(), offset / PAGE]);
    }
    let (place, recorded) = match map.place {
        Place::Anywhere { recorded } => (0, recorded),
        Place::FixedRecorded(recorded) => (1, recorded),
        Place::At(at) => {
            out.push(2);
            put_all(out, [at.mapping.0.into(), at.offset / PAGE, map.len / PAGE]);
            return Ok(());
        }
    };
    out.push(place);
    put_all(out, [recorded / PAGE, map.len / PAGE, (map.reserve - map.len) / PAGE]);
    new_mapping(context, map.id, map.reserve)
}

fn new_mapping(context: &mut Context, id: MappingId, reserve: u64) -> io::Result<()> {
    if id.0 as usize != context.mappings.len() {
        return Err(unknown());
    }
    context.mappings.push(Known { pages: reserve / PAGE, last: 0 });
    Ok(())
}

fn put_all<const N: usize>(out: &mut Vec<u8>, values: [u64; N]) {
    for value in values {
        put(out, value);
    }
}

fn access_bits(access: Access) -> u8 {
    match access {
        Access::Read => 0,
        Access::Write => 1,
        Access::Execute => 2,
    }
}

fn unknown() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "an event names a process or a mapping out of order")
}
