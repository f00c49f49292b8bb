//! Files, and programs: mapped from their images, run, ended.

use crate::cpu;
use crate::platform::{Kernel, kernel};
use crate::print;
use crate::trap::enter_user;
use core::ptr::{from_ref, null_mut};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use elf::ElfBytes;
use elf::abi::{PF_W, PF_X, PT_LOAD};
use elf::endian::LittleEndian;
use pagefirst::file::{self, FileCache, FillGuard, Io, IoError};
use pagefirst::mem::Shared;
use pagefirst::platform::Platform;
use pagefirst::policy::Policy;
use pagefirst::space::{AddressSpace, Advice, Backing, Map, MapError, Place, VmaFlags};
use pagefirst::types::{PAGE_SIZE, Prot, VirtAddr};

/// A program that is part of this kernel.
pub struct Program {
    pub name: &'static str,
    /// What the kernel was told to do when this program is run.
    pub mode: &'static str,
    pub cpus: usize,
    image: &'static [u8],
}

macro_rules! program {
    ($name:literal, $mode:literal, $cpus:literal) => {
        Program {
            name: $name,
            mode: $mode,
            cpus: $cpus,
            image: include_bytes!(concat!(env!("OUT_DIR"), "/", $name)),
        }
    };
}

/// All programs; their sources are in `user/`.
pub const PROGRAMS: [Program; 11] = [
    program!("anon", "test", 1),
    program!("huge", "test", 1),
    program!("file", "test", 1),
    program!("private", "test", 1),
    program!("shared", "test", 1),
    program!("errors", "test", 1),
    program!("pointer", "test", 1),
    program!("two", "test", 2),
    program!("shoot", "test", 2),
    program!("measure", "count", 1),
    program!("lines", "lines", 2),
];

/// A file that is in memory from the start: an image, or if that is empty, 64-bit words that say where they are.
#[derive(Clone)]
pub struct File {
    id: u64,
    image: &'static [u8],
    tracks_writes: bool,
}

impl PartialEq for File {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}
impl Eq for File {}

impl file::File for File {
    fn id(&self) -> u64 {
        self.id
    }
    fn read(&self, index: u64, mut page: FillGuard<'_>) -> Io {
        let at = index * PAGE_SIZE;
        if self.image.is_empty() {
            for (word, offset) in page.chunks_exact_mut(8).zip((at..).step_by(8)) {
                word.copy_from_slice(&(offset + 1).to_le_bytes());
            }
        } else if let Some(rest) = self.image.get(at as usize..) {
            let n = rest.len().min(page.len());
            page[..n].copy_from_slice(&rest[..n]);
        }
        Io::Ready
    }
    /// There is nothing behind the pages in memory, which are kept as long as the file is.
    fn write(&self, _: u64, _: &[u8]) -> Result<(), IoError> {
        Err(IoError)
    }
    fn tracks_writes(&self) -> bool {
        self.tracks_writes
    }
}

/// A program in its space.
pub struct Task {
    pub space: AddressSpace<Kernel>,
    /// Its open files, from descriptor 3 on: 4 MiB in memory; the same, but written pages are told apart; 6,000 bytes.
    files: [Shared<Kernel, FileCache<Kernel>>; 3],
    entry: u64,
}

impl Task {
    /// Maps a program into a space of its own.
    pub fn load(program: &Program) -> Result<Task, &'static str> {
        let p = kernel();
        let open = |id, image, tracks_writes, size| {
            FileCache::new(p, File { id, image, tracks_writes }, size).map_err(|_| "no memory for a file")
        };
        let space = AddressSpace::new(p, Policy::default()).map_err(|_| "no memory for a space")?;
        let image = open(0, program.image, false, program.image.len() as u64)?;
        let elf = ElfBytes::<LittleEndian>::minimal_parse(program.image).map_err(|_| "not an ELF file")?;
        let segments = elf.segments().ok_or("an ELF file without segments")?;
        for s in segments.iter().filter(|s| s.p_type == PT_LOAD) {
            let can = |flag, prot| if s.p_flags & flag != 0 { prot } else { Prot::empty() };
            let prot = Prot::READ | can(PF_W, Prot::WRITE) | can(PF_X, Prot::EXEC);
            let start = VirtAddr(s.p_vaddr).page();
            let (file_end, end) = (VirtAddr(s.p_vaddr + s.p_filesz), VirtAddr(s.p_vaddr + s.p_memsz));
            let bss = file_end.align_up(PAGE_SIZE).ok_or("a segment beyond the end")?;
            let map = |at: VirtAddr, end: VirtAddr, backing| {
                let map =
                    Map { backing, place: Place::FixedNoReplace(at), ..Map::anonymous(end.0 - at.0, prot) };
                space.map(map).map_err(|_| "a segment that cannot be mapped")
            };
            if start < bss {
                map(start, bss, Backing::File { file: image.clone(), first: s.p_offset / PAGE_SIZE })?;
            }
            if bss < end {
                map(bss, end, Backing::Anonymous)?;
            }
            if end > file_end && bss > file_end {
                let zeros = [0; PAGE_SIZE as usize];
                let tail = space.copy_out(file_end, &zeros[..(bss.0 - file_end.0) as usize]);
                tail.map_err(|_| "a segment's tail that cannot be zeroed")?;
            }
        }
        let files = [open(1, &[], false, 4 << 20)?, open(2, &[], true, 4 << 20)?, open(3, &[], false, 6000)?];
        Ok(Task { space, files, entry: elf.ehdr.e_entry })
    }

    /// The program that this CPU runs.
    pub fn current() -> &'static Task {
        let task = kernel().cpus[kernel().cpu()].task.load(Relaxed);
        // SAFETY: user code runs, so `run` set it and waits with the task borrowed.
        unsafe { &*task }
    }

    /// Runs it on this CPU, and on the second one at the same time if it wants two; 0 if all is well.
    pub fn run_on(&self, cpus: usize) -> u64 {
        if cpus == 1 {
            return self.run(0, 1);
        }
        let second = &kernel().cpus[1];
        second.job.store(from_ref(self).cast_mut(), Release);
        let status = self.run(0, 2);
        while !second.job.load(Acquire).is_null() {
            kernel().relax();
        }
        if status != 0 { status } else { second.status.load(Relaxed) }
    }

    /// Runs it on this CPU, as number `index` of `of`; returns its status.
    pub fn run(&self, index: u64, of: u64) -> u64 {
        let (p, number) = (kernel(), kernel().cpu());
        let stack = Map::anonymous(64 << 10, Prot::READ | Prot::WRITE);
        let Ok(stack) = self.space.map(stack) else { return 12 << 32 };
        p.cpus[number].recover.store(0, Relaxed);
        p.cpus[number].task.store(from_ref(self).cast_mut(), Relaxed);
        let table = self.space.page_table();
        p.load_root(table.activate(number).phys());
        // SAFETY: this CPU uses the space's tables, which have the kernel's half; a user can do no harm.
        let status = unsafe { enter_user(self.entry, stack.range.end.0 - 8, index, of) };
        p.load_root(cpu::boot_root());
        table.deactivate(number);
        p.cpus[number].task.store(null_mut(), Relaxed);
        status
    }

    /// `write(2)`: to the serial port, whatever the descriptor.
    pub fn write(&self, from: u64, len: u64) -> Result<u64, i32> {
        let mut text = [0; 256];
        let text = &mut text[..len.min(256) as usize];
        self.space.copy_in(VirtAddr(from), text).map_err(|stopped| stopped.why.errno().unwrap_or(4))?;
        print(format_args!("{}", core::str::from_utf8(text).map_err(|_| 84)?));
        Ok(text.len() as u64)
    }
    /// `mmap(2)`.
    pub fn mmap(&self, at: u64, len: u64, prot: u64, flags: u64, fd: u64, offset: u64) -> Result<u64, i32> {
        const SHARED: u64 = 1;
        const FIXED: u64 = 0x10;
        const ANONYMOUS: u64 = 0x20;
        const POPULATE: u64 = 0x8000;
        let backing = if flags & ANONYMOUS != 0 {
            Backing::Anonymous
        } else {
            let file = fd.checked_sub(3).and_then(|n| self.files.get(n as usize)).ok_or(9)?;
            Backing::File { file: file.clone(), first: offset / PAGE_SIZE }
        };
        let map = Map {
            len,
            prot: rights(prot),
            flags: if flags & SHARED != 0 { VmaFlags::SHARED } else { VmaFlags::empty() },
            backing,
            place: if flags & FIXED != 0 { Place::Fixed(VirtAddr(at)) } else { Place::Anywhere },
            populate: flags & POPULATE != 0,
        };
        self.space.map(map).map(|mapped| mapped.range.start.0).map_err(|e| e.errno())
    }
    /// `mprotect(2)`.
    pub fn mprotect(&self, at: u64, len: u64, prot: u64) -> Result<u64, i32> {
        done(self.space.protect(VirtAddr(at), len, rights(prot)))
    }
    /// `munmap(2)`.
    pub fn munmap(&self, at: u64, len: u64) -> Result<u64, i32> {
        done(self.space.unmap(VirtAddr(at), len))
    }
    /// `madvise(2)`: DONTNEED, HUGEPAGE, NOHUGEPAGE.
    pub fn madvise(&self, at: u64, len: u64, advice: u64) -> Result<u64, i32> {
        let at = VirtAddr(at);
        done(match advice {
            4 => self.space.discard(at, len),
            14 => self.space.advise(at, len, Advice::Huge),
            15 => self.space.advise(at, len, Advice::NoHuge),
            _ => return Err(22),
        })
    }
}

fn rights(prot: u64) -> Prot {
    let can = |bit, right| if prot & bit != 0 { right } else { Prot::empty() };
    can(1, Prot::READ) | can(2, Prot::WRITE) | can(4, Prot::EXEC)
}

fn done(result: Result<(), MapError>) -> Result<u64, i32> {
    result.map(|()| 0).map_err(|e| e.errno())
}
