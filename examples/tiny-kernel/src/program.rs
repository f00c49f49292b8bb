//! Files, and programs: mapped, run, ended.

use crate::platform::{Kernel, kernel};
use crate::{cpu::boot_root, print, trap::enter_user};
use core::ptr::from_ref;
use core::sync::atomic::Ordering::*;
use elf::abi::{PF_W, PF_X, PT_LOAD};
use elf::{ElfBytes, endian::LittleEndian};
use pagefirst::file::{self, Direct, FileCache, FillGuard, Hint, Io, IoError, MAX_FOLIO_ORDER, StoreGuard};
use pagefirst::space::{AddressSpace, Advice, Backing, Map, Place, VmaFlags};
use pagefirst::types::{PAGE_SIZE, Prot, VirtAddr};
use pagefirst::{mem::Shared, platform::Platform};

// PROGRAMS: of each program in `user/` the mode that runs it, its name, and its image (`build.rs`).
include!(concat!(env!("OUT_DIR"), "/programs.rs"));

/// A file in memory. Its 64-bit words say where they are.
#[derive(Clone, PartialEq, Eq)]
pub struct File {
    id: u64,
    tracks_writes: bool,
    /// It is zero, and has folios of 2 MiB.
    huge: bool,
    /// Where it is, if it is memory itself.
    place: Option<Direct>,
}

impl File {
    /// A file for the stress: zero until it is written.
    #[cfg(feature = "stress")]
    pub fn zeros(number: u64, tracks_writes: bool, huge: bool) -> Self {
        File { id: 5 + number, tracks_writes, huge, place: None }
    }
    /// The same, which is memory itself.
    #[cfg(feature = "stress")]
    pub fn direct(place: Direct) -> Self {
        File { place: Some(place), ..File::zeros(u64::from(place.first.0) << 8, true, false) }
    }
    fn is_zero(&self) -> bool {
        self.huge || self.id > 4
    }
}

#[rustfmt::skip]
impl file::File for File {
    fn id(&self) -> u64 { self.id }
    fn forget(&self, _: core::ops::Range<u64>) {}

    fn tracks_writes(&self) -> bool { self.tracks_writes }
    fn max_folio_order(&self) -> u8 { if self.huge { MAX_FOLIO_ORDER } else { 0 } }
    fn folio_order(&self, _: u64, _: u64, _: Hint) -> u8 { self.max_folio_order() }
    fn read(&self, index: u64, mut page: FillGuard<'_>) -> Io {
        if self.is_zero() { return Io::Ready; }
        for (word, offset) in page.chunks_exact_mut(8).zip((index * PAGE_SIZE..).step_by(8)) {
            word.copy_from_slice(&(offset + 1).to_le_bytes());
        }
        Io::Ready
    }
    fn is_stored(&self) -> bool { self.id <= 4 }
    fn is_direct(&self) -> bool { self.place.is_some() }
    fn direct(&self, _: u64, _: bool) -> Result<Direct, IoError> { self.place.ok_or(IoError) }
    /// There is nothing behind the pages in memory, which are kept as long as the file is.
    fn write(&self, _: u64, _: StoreGuard<'_>) -> Io { Io::Error }
}

/// A program in its space.
pub struct Task {
    pub space: AddressSpace<Kernel>,
    /// Descriptor 3 and on: 4 MiB in memory; the same, but pages that are written are told apart; 6,000 bytes; 16 MiB of
    /// huge pages.
    files: [Shared<Kernel, FileCache<Kernel>>; 4],
    entry: u64,
}

impl Task {
    /// Maps a program into a space of its own; without an image it is the stress.
    pub fn load(image: &[u8]) -> Result<Task, &'static str> {
        let p = kernel();
        let space = AddressSpace::new(p, Default::default()).map_err(|_| "no memory for a space")?;
        let open = |id, size| {
            FileCache::new(p, File { id, tracks_writes: id == 2, huge: id == 4, place: None }, size)
        };
        let files = [open(1, 4 << 20), open(2, 4 << 20), open(3, 6000), open(4, 16 << 20)];
        let [Ok(a), Ok(b), Ok(c), Ok(d)] = files else { return Err("no memory for files") };
        #[cfg(feature = "stress")]
        if image.is_empty() {
            return Ok(Task { space, files: [a, b, c, d], entry: 0 });
        }
        let elf = ElfBytes::<LittleEndian>::minimal_parse(image).map_err(|_| "not an ELF file")?;
        for s in elf.segments().into_iter().flatten().filter(|s| s.p_type == PT_LOAD) {
            let (start, at) = (VirtAddr(s.p_vaddr).page(), VirtAddr(s.p_vaddr));
            let len = at.0 + s.p_memsz - start.0;
            let map = Map::anonymous(len, Prot::READ | Prot::WRITE);
            let bytes = elf.segment_data(&s).map_err(|_| "a segment beyond the file")?;
            space.map(Map { place: Place::Fixed(start), ..map }).map_err(|_| "a segment out of place")?;
            space.copy_out(at, bytes).map_err(|_| "no memory for a segment")?;
            let can = |flag, right| if s.p_flags & flag != 0 { right } else { Prot::empty() };
            let prot = Prot::READ | can(PF_W, Prot::WRITE) | can(PF_X, Prot::EXEC);
            space.protect(start, len, prot).map_err(|_| "no memory for a segment's rights")?;
        }
        Ok(Task { space, files: [a, b, c, d], entry: elf.ehdr.e_entry })
    }

    /// The same in another space, for the stress.
    #[cfg(feature = "stress")]
    pub fn with(&self, space: AddressSpace<Kernel>) -> Task {
        Task { space, files: self.files.clone(), entry: self.entry }
    }

    /// The program that this CPU runs.
    pub fn current() -> &'static Task {
        // SAFETY: user code runs, so `run` set it, and waits with the task borrowed.
        unsafe { &*kernel().this_cpu().task.load(Relaxed) }
    }

    /// Runs it on all CPUs at once.
    pub fn run_on_all(&self) {
        let second = &kernel().cpus[1];
        if kernel().running > 1 {
            second.job.store(from_ref(self).cast_mut(), Release);
        }
        self.run(0);
        while !second.job.load(Acquire).is_null() {
            kernel().relax();
        }
    }

    /// Runs it on this CPU.
    pub fn run(&self, number: usize) {
        #[cfg(feature = "stress")]
        if self.entry == 0 {
            return crate::stress::work(number);
        }
        let stack = self.space.map(Map::anonymous(64 << 10, Prot::READ | Prot::WRITE));
        let top = stack.expect("room for a stack").range.end.0;
        self.enter(top, number as u64, kernel().running as u64);
    }

    /// Runs it on this CPU with this stack and these arguments, until it exits; then the CPU is as it was.
    fn enter(&self, stack: u64, argument: u64, other: u64) {
        let (cpu, number, table) = (kernel().this_cpu(), kernel().cpu(), self.space.page_table());
        let before = (cpu.kernel_stack.load(Relaxed), cpu.recover.load(Relaxed));
        cpu.recover.store(0, Relaxed);
        let parent = cpu.task.swap(from_ref(self).cast_mut(), Relaxed);
        // In the mask before the root is loaded, and out of it when another is: then nothing of this space is cached.
        kernel().load_root(table.activate(number).phys());
        // SAFETY: the space's tables have the kernel's half, and a user can do no harm.
        unsafe { enter_user(self.entry, stack, argument, other) };
        // SAFETY: it waits in its system call, with its task borrowed.
        let root = unsafe { parent.as_ref() }.map(|task| task.space.page_table().root_frame().phys());
        kernel().load_root(root.unwrap_or_else(boot_root));
        table.deactivate(number);
        cpu.task.store(parent, Relaxed);
        cpu.kernel_stack.store(before.0, Relaxed);
        cpu.recover.store(before.1, Relaxed);
    }

    /// Runs a copy of the program's memory from `entry` on, until it exits. This CPU stays in the mask of the space that
    /// it leaves meanwhile: it may be asked for a flush too many.
    #[inline(never)]
    fn fork(&self, entry: u64, stack: u64, argument: u64, other: u64) -> Result<u64, i32> {
        if ![entry, stack].iter().all(|at| self.space.usable().contains(VirtAddr(*at))) {
            return Err(14);
        }
        let space = self.space.fork().map_err(|e| e.errno())?;
        let child = Task { space, files: self.files.clone(), entry };
        child.enter(stack, argument, other);
        Ok(0)
    }

    /// A system call: Linux's numbers, arguments and results; from 1000 on our own.
    pub fn system_call(&self, number: u64, [a, b, c, d, e, f]: [u64; 6]) -> Result<u64, i32> {
        let rights = |bits: u64| Prot::from_bits_truncate(bits as u8); // the same bits
        let done = match number {
            1 => return self.write(b, c),
            9 => return self.mmap(VirtAddr(a), b, rights(c), d, e, f),
            10 => self.space.protect(VirtAddr(a), b, rights(c)),
            11 => self.space.unmap(VirtAddr(a), b),
            28 if c == 4 => self.space.discard(VirtAddr(a), b),
            28 if c == 14 => self.space.advise(VirtAddr(a), b, Advice::Huge),
            39 => Ok(()), // getpid
            // Where to go on: IRETQ to an address that no program can have would fault in the kernel.
            1000 if a == 0 || self.space.usable().contains(VirtAddr(a)) => {
                return Ok(kernel().this_cpu().recover.swap(a, Relaxed));
            }
            1002 => {
                print(format_args!("count {a} {b} {c} "));
                return self.write(d, e);
            }
            1003 => return Ok(self.space.account().faults.mapped()),
            1004 => return self.fork(a, b, c, d),
            _ => return Err(38),
        };
        done.map(|()| 0).map_err(|e| e.errno())
    }

    /// `write(2)`, to the serial port whatever the descriptor.
    fn write(&self, from: u64, len: u64) -> Result<u64, i32> {
        let mut text = [0; 256];
        let text = &mut text[..len.min(256) as usize];
        self.space.copy_in(VirtAddr(from), text).map_err(|stopped| stopped.why.errno().unwrap_or(4))?;
        print(format_args!("{}", core::str::from_utf8(text).map_err(|_| 84)?));
        Ok(text.len() as u64)
    }

    /// `mmap(2)`: MAP_SHARED 1, MAP_FIXED 16, MAP_ANONYMOUS 32.
    fn mmap(&self, at: VirtAddr, len: u64, prot: Prot, how: u64, fd: u64, at_byte: u64) -> Result<u64, i32> {
        let file = self.files.get(fd.wrapping_sub(3) as usize).cloned();
        let file = file.map(|file| Backing::File { file, first: at_byte / PAGE_SIZE });
        if !at_byte.is_multiple_of(PAGE_SIZE) {
            return Err(22);
        }
        let map = Map {
            flags: if how & 1 != 0 { VmaFlags::SHARED } else { VmaFlags::empty() },
            place: if how & 16 != 0 { Place::Fixed(at) } else { Place::Anywhere },
            backing: if how & 32 != 0 { Backing::Anonymous } else { file.ok_or(9)? },
            ..Map::anonymous(len, prot)
        };
        self.space.map(map).map(|mapped| mapped.range.start.0).map_err(|e| e.errno())
    }
}
