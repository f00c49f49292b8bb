//! What `execve` sets up before a program's first instruction, from `/proc/self/maps` of the emulator and the ELF files
//! named there.
//!
//! The emulator's own mappings lie above two thirds of the user half, where Linux puts position-independent programs and
//! what they map; the recorded program's lie below. The emulator maps code without the right to execute it,
//! so what is allowed comes from the files' program headers.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::raw::Identity;
use super::{RecordError, doing};
use crate::event::Prot;
use crate::wire::PAGE;

/// The emulator's own mappings begin here: two thirds of the user half.
const EMULATOR: u64 = 0x5555_5555_4000;
/// The stack that the emulator is told to make: Linux's default limit.
pub(super) const STACK: u64 = 8 << 20;

/// A line of `/proc/self/maps`.
#[derive(Debug, PartialEq, Eq)]
struct Line<'a> {
    start: u64,
    end: u64,
    rights: &'a str,
    path: &'a str,
}

/// A part of a program in memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) prot: Prot,
    /// The file's byte at its start; `None` when it is not the file's.
    pub(super) offset: Option<u64>,
}

/// A program in memory.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) path: String,
    pub(super) identity: Identity,
    pub(super) size: u64,
    /// It could lie anywhere.
    pub(super) relocatable: bool,
    pub(super) segments: Vec<Segment>,
}

impl Image {
    /// The addresses that it takes.
    pub(super) fn range(&self) -> (u64, u64) {
        let start = self.segments.first().map_or(0, |segment| segment.start);
        (start, self.segments.last().map_or(start, |segment| segment.end))
    }
}

/// What `execve` sets up.
#[derive(Debug, Default)]
pub(super) struct Initial {
    /// The program first, then its interpreter.
    pub(super) images: Vec<Image>,
    /// The start of the stack.
    pub(super) stack: Option<u64>,
    /// Other mappings, which hold code of the kernel's.
    pub(super) others: Vec<(u64, u64)>,
    /// The emulator's descriptor tables, which it reads in the program's name.
    pub(super) tables: Vec<(u64, u64)>,
}

/// Finds it all.
pub(super) fn read(maps: &str) -> Result<Initial, RecordError> {
    let lines: Vec<_> = maps.lines().filter_map(parse).filter(|line| line.end <= EMULATOR).collect();
    let mut initial = Initial::default();
    for line in lines.iter().filter(|line| line.path.starts_with('/')) {
        if initial.images.iter().all(|image| image.path != line.path) {
            initial.images.push(image(line)?);
        }
    }
    // The emulator puts the program first, then the stack, then the interpreter, except for a program that is to lie
    // at a certain address: that one is lowest anyway.
    let taken = |line: &&Line| {
        initial.images.iter().map(Image::range).any(|(start, end)| line.start < end && line.end > start)
    };
    let free = || lines.iter().filter(|line| !taken(line) && line.path.is_empty());
    initial.stack = free()
        .find(|line| line.end - line.start >= STACK && line.rights.starts_with("rw"))
        // Another mapping may follow the stack without a gap; a guard page is before it.
        .map(|line| line.start);
    let stack = initial.stack;
    let others = free().filter(|line| line.rights.starts_with("r-") && Some(line.start) != stack);
    let others = others.map(|line| (line.start, line.end)).collect();
    initial.others = others;
    let ends = initial.images.iter().map(Image::range).chain(stack.map(|start| (start, start + STACK)));
    let ends: Vec<_> = ends.collect();
    for line in lines.iter().filter(|line| line.path.is_empty() && line.rights.starts_with("rw")) {
        // The system may show them as one with the program's memory before them.
        let overlapping = ends.iter().filter(|&&(start, end)| start < line.end && end > line.start);
        let start = overlapping.map(|&(_, end)| end).fold(line.start, u64::max);
        if start < line.end {
            initial.tables.push((start, line.end));
        }
    }
    Ok(initial)
}

fn parse(line: &str) -> Option<Line<'_>> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let rights = fields.next()?;
    let path = fields.nth(3).unwrap_or_default().trim_start();
    Some(Line { start, end, rights, path })
}

fn image(first: &Line) -> Result<Image, RecordError> {
    let path = first.path.to_owned();
    let metadata = fs::metadata(&path).map_err(doing(format!("looking at {path}")))?;
    let file = fs::read(&path).map_err(doing(format!("reading {path}")))?;
    let (relocatable, segments) =
        segments(&file, first.start).ok_or_else(|| RecordError::NotElf(path.clone().into()))?;
    let identity = Identity { device: metadata.dev(), inode: metadata.ino() };
    Ok(Image { path, identity, size: metadata.size(), relocatable, segments })
}

/// Whether it is an ELF file of x86-64 that can be executed.
pub(super) fn is_program(file: &[u8]) -> bool {
    const X86_64: u64 = 62;
    file.starts_with(b"\x7fELF\x02\x01") && number(file, 18, 2) == Some(X86_64)
}

fn number(file: &[u8], at: usize, len: usize) -> Option<u64> {
    let mut bytes = [0; 8];
    bytes[..len].copy_from_slice(file.get(at..at.checked_add(len)?)?);
    Some(u64::from_le_bytes(bytes))
}

/// The segments of an ELF file whose first page is at `start`, as Linux maps them.
fn segments(file: &[u8], start: u64) -> Option<(bool, Vec<Segment>)> {
    const DYNAMIC: u64 = 3;
    const LOAD: u64 = 1;
    if !is_program(file) {
        return None;
    }
    let relocatable = number(file, 16, 2)? == DYNAMIC;
    let (table, entry, count) = (number(file, 32, 8)?, number(file, 54, 2)?, number(file, 56, 2)?);
    let up = |address: u64| address.checked_next_multiple_of(PAGE);
    let mut segments = Vec::new();
    let mut shift = None;
    for index in 0..count {
        let header = usize::try_from(table.checked_add(index * entry)?).ok()?;
        let field = |at: usize, len| number(file, header.checked_add(at)?, len);
        if field(0, 4)? != LOAD {
            continue;
        }
        let (flags, offset, address) = (field(4, 4)?, field(8, 8)?, field(16, 8)?);
        let (in_file, in_memory) = (field(32, 8)?, field(40, 8)?);
        let low = address / PAGE * PAGE;
        let shift = *shift.get_or_insert(start.wrapping_sub(low));
        let place = |address: u64| address.wrapping_add(shift);
        // ELF's bits are 1 execute, 2 write, 4 read.
        let prot = Prot { read: flags & 4 != 0, write: flags & 2 != 0, execute: flags & 1 != 0 };
        let middle = if in_file == 0 { low } else { up(address.checked_add(in_file)?)? };
        let high = up(address.checked_add(in_memory)?)?;
        if middle > low {
            let offset = Some(offset / PAGE * PAGE);
            segments.push(Segment { start: place(low), end: place(middle), prot, offset });
        }
        if high > middle {
            segments.push(Segment { start: place(middle), end: place(high), prot, offset: None });
        }
    }
    let rising = segments.windows(2).all(|pair| pair[0].end <= pair[1].start);
    (rising && !segments.is_empty()).then_some((relocatable, segments))
}

#[cfg(test)]
mod tests {
    use super::{Line, parse};

    #[test]
    fn lines_with_and_without_a_path_are_read() {
        let line = parse("4000000000-4000002000 r--p 00000000 fe:00 131 /usr/bin/a file").unwrap();
        assert_eq!(
            line,
            Line { start: 0x40_0000_0000, end: 0x40_0000_2000, rights: "r--p", path: "/usr/bin/a file" }
        );
        let line = parse("400200b000-400280b000 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!((line.rights, line.path), ("rw-p", ""));
        assert_eq!(parse("nonsense"), None);
    }
}
