//! What the kernel's image says about addresses: function, file and line, and which part of the work that is.

use std::path::{Path, PathBuf};

use addr2line::Context;
use addr2line::gimli::{Dwarf, EndianSlice, LittleEndian, SectionId};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};

use crate::{Result, cmd};

type Reader<'a> = EndianSlice<'a, LittleEndian>;

/// An image's symbols and line tables.
pub(super) struct Symbols<'a> {
    context: Context<Reader<'a>>,
    /// By address: where it begins, how long it is, its name.
    symbols: Vec<(u64, u64, String)>,
    /// Physical address, virtual address, length.
    segments: Vec<(u64, u64, u64)>,
    root: PathBuf,
}

/// Where in the sources an instruction comes from.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Place {
    /// The function, inlined or not.
    pub(super) function: String,
    /// The file, from the workspace's top folder on if it lies there; none for assembly.
    pub(super) file: Option<PathBuf>,
    /// The line.
    pub(super) line: u32,
}

/// The parts that the work in a window consists of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Part {
    /// From the trap to the first Rust function, and back.
    EntryExit,
    /// The library.
    Library,
    /// The kernel's side of it.
    Platform,
    /// Bulk work, which each iteration counts for.
    Clearing,
    /// Functions of `core` and of other crates that were not inlined.
    Other,
}

const LIBRARY: &str = "crates/pagefirst/src";
const KERNEL: &str = "examples/tiny-kernel/src";
/// The kernel's files of entries and exits; so is all that was written in assembly.
const ENTRY_FILES: [&str; 1] = ["trap.rs"];
const CLEARING: [&str; 4] = ["clear_page", "copy_page", "memset", "memcpy"];

impl<'a> Symbols<'a> {
    /// Reads an image.
    pub(super) fn new(image: &'a [u8]) -> Result<Self> {
        let bad = |error: &dyn std::fmt::Display| format!("the kernel's image: {error}");
        let file = object::File::parse(image).map_err(|e| bad(&e))?;
        let section = |id: SectionId| {
            let section = file.section_by_name(id.name());
            let data = section.and_then(|section| section.data().ok()).unwrap_or_default();
            Ok::<_, addr2line::gimli::Error>(EndianSlice::new(data, LittleEndian))
        };
        let dwarf = Dwarf::load(section).map_err(|e| bad(&e))?;
        let kinds = [SymbolKind::Text, SymbolKind::Data, SymbolKind::Label, SymbolKind::Unknown];
        let mut symbols: Vec<_> = file
            .symbols()
            .filter(|symbol| symbol.is_definition() || kinds.contains(&symbol.kind()))
            .filter_map(|symbol| Some((symbol.address(), symbol.size(), symbol.name().ok()?.to_owned())))
            .filter(|(address, _, name)| *address != 0 && !name.is_empty())
            .collect();
        symbols.sort();
        Ok(Self {
            context: Context::from_dwarf(dwarf).map_err(|e| bad(&e))?,
            symbols,
            segments: segments(image).ok_or("the kernel's image is no 64-bit ELF")?,
            root: cmd::root(),
        })
    }

    /// The address of a symbol.
    pub(super) fn named(&self, name: &str) -> Option<u64> {
        self.symbols.iter().find(|(_, _, symbol)| symbol == name).map(|(address, ..)| *address)
    }

    /// Where an instruction comes from: the innermost inlined function of this workspace, or else the innermost one.
    pub(super) fn place(&self, pc: u64) -> Place {
        // What the compiler gives no line is counted to where the function begins.
        let begin = || self.before(pc).and_then(|(begin, ..)| self.framed(*begin));
        let place = self.framed(pc).or_else(begin);
        place.unwrap_or_else(|| Place { function: self.symbol(pc), file: None, line: 0 })
    }

    /// The same by the line tables alone.
    fn framed(&self, pc: u64) -> Option<Place> {
        let mut innermost = None;
        let mut frames = self.context.find_frames(pc).skip_all_loads().ok()?;
        while let Some(frame) = frames.next().ok().flatten() {
            let Some(location) = frame.location else { continue };
            let (Some(file), Some(line @ 1..)) = (location.file, location.line) else { continue };
            let function = frame.function.as_ref().and_then(|function| function.demangle().ok());
            let own = Path::new(file).strip_prefix(&self.root).ok();
            let place = Place {
                function: function.map_or_else(|| self.symbol(pc), |name| short(&name)),
                file: Some(own.unwrap_or(Path::new(file)).to_owned()),
                line,
            };
            if own.is_some() {
                return Some(place);
            }
            innermost.get_or_insert(place);
        }
        innermost
    }

    /// The last symbol that does not begin behind an address.
    fn before(&self, address: u64) -> Option<&(u64, u64, String)> {
        self.symbols[..self.symbols.partition_point(|(begin, ..)| *begin <= address)].last()
    }

    /// The symbol in which an address lies, or the last one before it.
    fn symbol(&self, address: u64) -> String {
        let name =
            self.before(address).map(|(.., name)| addr2line::demangle_auto(name.as_str().into(), None));
        name.map_or_else(|| "?".into(), |name| short(&name))
    }

    /// A physical address by the nearest symbol, if it is in the image.
    pub(super) fn at_physical(&self, physical: u64) -> Option<String> {
        let offset = |(first, _, len): &&(u64, u64, u64)| physical.checked_sub(*first).filter(|at| at < len);
        let segment = self.segments.iter().find(|segment| offset(segment).is_some())?;
        let address = segment.1 + offset(&segment)?;
        let (begin, size, _) = self.before(address)?;
        let offset = address - begin;
        if *size == 0 || offset < *size {
            return Some(format!("{} + {offset:#x}", self.symbol(address)));
        }
        // It has no name of its own: a stack, perhaps, whose end alone has one.
        let (next, ..) = self.symbols.iter().find(|(begin, ..)| *begin > address)?;
        Some(format!("{} - {:#x}", self.symbol(*next), next - address))
    }
}

/// The segments that are loaded.
fn segments(image: &[u8]) -> Option<Vec<(u64, u64, u64)>> {
    use object::read::elf::{FileHeader, ProgramHeader};
    let header = object::elf::FileHeader64::<object::Endianness>::parse(image).ok()?;
    let endian = header.endian().ok()?;
    let headers = header.program_headers(endian, image).ok()?.iter();
    let loaded = headers.filter(|header| header.p_type(endian) == object::elf::PT_LOAD);
    Some(loaded.map(|one| (one.p_paddr(endian), one.p_vaddr(endian), one.p_memsz(endian))).collect())
}

/// A function's name without what its type parameters are, which are the same throughout a kernel.
fn short(name: &str) -> String {
    let mut depth = 0_u32;
    let mut text = String::new();
    let mut previous = ' ';
    for letter in name.chars() {
        match letter {
            // `<T>` at the beginning is what a function belongs to, not a parameter.
            '<' if text.is_empty() => {}
            '<' => depth += 1,
            // The end of an arrow is no bracket.
            '>' if previous != '-' => depth = depth.saturating_sub(1),
            _ if depth == 0 => text.push(letter),
            _ => {}
        }
        previous = letter;
    }
    text.replace("::::", "::").trim_end_matches("::").to_owned()
}

impl Part {
    /// All of them.
    pub(super) const ALL: [Self; 5] =
        [Self::EntryExit, Self::Library, Self::Platform, Self::Clearing, Self::Other];

    /// The part that a place belongs to.
    pub(super) fn of(place: &Place) -> Self {
        let last = place.function.rsplit("::").next().unwrap_or_default();
        if CLEARING.contains(&last) {
            return Self::Clearing;
        }
        let Some(file) = &place.file else { return Self::EntryExit };
        if file.starts_with(LIBRARY) {
            Self::Library
        } else if let Ok(file) = file.strip_prefix(KERNEL) {
            let is_entry = ENTRY_FILES.iter().any(|entry| file == Path::new(entry));
            if is_entry { Self::EntryExit } else { Self::Platform }
        } else {
            Self::Other
        }
    }

    /// What it is called in tables.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::EntryExit => "entry/exit",
            Self::Library => "library",
            Self::Platform => "platform",
            Self::Clearing => "clearing/copying",
            Self::Other => "other",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(function: &str, file: Option<&str>) -> Part {
        Part::of(&Place { function: function.into(), file: file.map(Into::into), line: 1 })
    }

    #[test]
    fn places_belong_to_parts() {
        assert_eq!(part("a::install", Some("crates/pagefirst/src/table/publish.rs")), Part::Library);
        assert_eq!(part("trap_entry", None), Part::EntryExit);
        assert_eq!(part("k::handle", Some("examples/tiny-kernel/src/trap.rs")), Part::EntryExit);
        assert_eq!(part("k::meta", Some("examples/tiny-kernel/src/platform.rs")), Part::Platform);
        assert_eq!(part("k::clear_page", Some("examples/tiny-kernel/src/platform.rs")), Part::Clearing);
        assert_eq!(part("memcpy", None), Part::Clearing);
        assert_eq!(part("core::sort", Some("/rustc/core/sort.rs")), Part::Other);
    }

    #[test]
    fn names_are_shortened() {
        assert_eq!(short("<pagefirst::Space<kernel::Platform>>::fault"), "pagefirst::Space::fault");
        assert_eq!(short("pagefirst::table::walk::<kernel::P>"), "pagefirst::table::walk");
        assert_eq!(short("release<fn(u64) -> (), T>"), "release");
        assert_eq!(short("a::b::{closure#0}"), "a::b::{closure#0}");
    }
}
