//! What a recording says: its header, its events, its trailer.
//!
//! # How addresses are named
//! No event but a mapping's birth carries an address of the recorded process. An [`Address`] is a mapping and an
//! offset from the *start of that mapping's reservation*, so that a replay may place the mapping where it likes.
//! - A [`Event::Map`] whose place is [`Place::Anywhere`] or [`Place::FixedRecorded`] creates a new [`MappingId`],
//!   one more than the last, and reserves [`Map::reserve`] bytes of addresses for it.
//! - A [`Event::Map`] whose place is [`Place::At`] creates no id: it maps over a part of an existing reservation (as
//!   the dynamic loader does with a library's segments), and its `id` is that of the reservation.
//! - A [`Event::Remap`] creates a new id for what it moved or grew, even where it grew in place.
//! - Where a call's range covers parts of several mappings, there is one event for each part, by rising address.
//!   Parts of the range that no mapping covers have none.
//!
//! All offsets and lengths are in bytes and multiples of the page size.

/// A mapping: dense, from 0, in the order of birth, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MappingId(pub u32);

/// A file that was mapped: dense, from 0, in the order of its [`Event::File`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// A thread of the recorded program: dense, from 0 (its first thread), never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ThreadId(pub u32);

/// A process: dense, from 0 (the program that was recorded), in the order of [`Event::Fork`], never reused.
///
/// Mappings and threads are numbered for each process, files for the whole recording. A process begins with the mappings
/// of its parent, under the same numbers, and with one thread, 0, which is the one that made it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId(pub u32);

/// A place in the recorded program's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// The mapping whose reservation holds it.
    pub mapping: MappingId,
    /// The bytes from the start of that reservation.
    pub offset: u64,
}

/// The architecture of the recorded program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// x86-64.
    X86_64,
}

/// What a program may do with a mapping, as it asked for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prot {
    /// `PROT_READ`.
    pub read: bool,
    /// `PROT_WRITE`; on x86 it also allows reading.
    pub write: bool,
    /// `PROT_EXEC`; on x86 it also allows reading.
    pub execute: bool,
}

impl Prot {
    /// `PROT_NONE`.
    pub const NONE: Self = Self { read: false, write: false, execute: false };
    /// `PROT_READ | PROT_WRITE`.
    pub const READ_WRITE: Self = Self { read: true, write: true, execute: false };

    /// From the bits that system calls take: 1 read, 2 write, 4 execute.
    pub const fn from_bits(bits: u64) -> Self {
        Self { read: bits & 1 != 0, write: bits & 2 != 0, execute: bits & 4 != 0 }
    }

    /// The bits that system calls take.
    pub const fn bits(self) -> u64 {
        self.read as u64 | (self.write as u64) << 1 | (self.execute as u64) << 2
    }
}

/// What a mapping shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Zeroes at first.
    Anonymous,
    /// A file, from an offset on.
    File {
        /// The file.
        file: FileId,
        /// The file's byte at the mapping's first.
        offset: u64,
    },
}

/// How a mapping came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// By `mmap`.
    Mmap,
    /// The program's segments, by `execve`.
    Program,
    /// The dynamic loader's segments, by `execve`.
    Interpreter,
    /// The first thread's stack, by `execve`.
    Stack,
    /// The area of `brk`. Its [`Map::len`] is 0: [`Event::Brk`] says how it grows.
    Heap,
    /// The kernel's page of code, by `execve`.
    Vdso,
}

/// Where a mapping lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Where the kernel chose.
    Anywhere {
        /// The start of the reservation in the recorded process.
        recorded: u64,
    },
    /// Over a part of a reservation that is there, replacing what is mapped there.
    At(Address),
    /// Where the program asked for by its absolute address (`MAP_FIXED` and nothing was there, or `execve` of a program
    /// that is not position-independent). A replay that places mappings itself may treat it as
    /// [`Place::Anywhere`]: nothing else names it by its address.
    FixedRecorded(u64),
}

/// A new mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    /// Who asked for it.
    pub thread: ThreadId,
    /// The reservation it lies in: a new one, or with [`Place::At`] that of the address.
    pub id: MappingId,
    /// How much is mapped. With `grows_down` it is the *last* `len` bytes of the reservation, else the first.
    pub len: u64,
    /// How much address space the reservation takes: `len`, or more where later mappings will be put beside it
    /// ([`MapKind::Program`], [`MapKind::Interpreter`]) or where it may grow ([`MapKind::Stack`]). With
    /// [`Place::At`] it is `len`.
    pub reserve: u64,
    /// What the program may do with it.
    pub prot: Prot,
    /// What it shows.
    pub backing: Backing,
    /// `MAP_SHARED`: writes go to the file, or to all processes.
    pub shared: bool,
    /// `MAP_POPULATE` or `MAP_LOCKED`.
    pub populate: bool,
    /// `MAP_GROWSDOWN`, or the stack: a touch below it, within the reservation, extends it.
    pub grows_down: bool,
    /// `MAP_NORESERVE`.
    pub no_reserve: bool,
    /// How it came about.
    pub kind: MapKind,
    /// Where it lies.
    pub place: Place,
}

/// What `madvise` was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// `MADV_DONTNEED`.
    DontNeed,
    /// `MADV_FREE`.
    Free,
    /// `MADV_HUGEPAGE`.
    Huge,
    /// `MADV_NOHUGEPAGE`.
    NoHuge,
    /// Another, by Linux's number.
    Other(u32),
}

impl Advice {
    /// From Linux's number.
    pub const fn from_number(number: u32) -> Self {
        match number {
            4 => Self::DontNeed,
            8 => Self::Free,
            14 => Self::Huge,
            15 => Self::NoHuge,
            other => Self::Other(other),
        }
    }

    /// Linux's number.
    pub const fn number(self) -> u32 {
        match self {
            Self::DontNeed => 4,
            Self::Free => 8,
            Self::Huge => 14,
            Self::NoHuge => 15,
            Self::Other(other) => other,
        }
    }
}

/// What was done to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Data were read.
    Read,
    /// Data were written.
    Write,
    /// Code was executed.
    Execute,
}

/// A file that is about to be mapped. No path: they belong to the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// Its number.
    pub number: FileId,
    /// The last part of its path.
    pub name: String,
    /// Its bytes now.
    pub size: u64,
}

/// What happened, in the order in which it happened. The order between processes is that of their system calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A file's first appearance, before the first mapping of it.
    File(FileInfo),
    /// A file that was mapped has another size.
    FileSize {
        /// The file.
        file: FileId,
        /// Its bytes now.
        size: u64,
    },
    /// A mapping.
    Map(Map),
    /// `munmap`, or what a moved mapping replaced.
    Unmap {
        /// Who.
        thread: ThreadId,
        /// From where.
        at: Address,
        /// How much.
        len: u64,
    },
    /// `mprotect`.
    Protect {
        /// Who.
        thread: ThreadId,
        /// From where.
        at: Address,
        /// How much.
        len: u64,
        /// What is allowed from now on.
        prot: Prot,
    },
    /// `mremap` that moved or grew. (One that shrank is an [`Event::Unmap`] of the tail, before a move of the rest.)
    Remap {
        /// Who.
        thread: ThreadId,
        /// From where.
        from: Address,
        /// How much there was; 0 asks for a second mapping of the same shared pages.
        old_len: u64,
        /// How much there is now, at least `old_len`.
        new_len: u64,
        /// The new name: offset 0 is what `from` was. `from..from + old_len` has no other name from now on.
        id: MappingId,
        /// The kernel moved it, in the recorded process.
        moved: bool,
        /// Where it starts now in the recorded process.
        recorded: u64,
        /// `MREMAP_DONTUNMAP`: `from..from + old_len` stays mapped under its old name too, and is empty.
        keep: bool,
    },
    /// `madvise`.
    Advise {
        /// Who.
        thread: ThreadId,
        /// From where.
        at: Address,
        /// How much.
        len: u64,
        /// What.
        advice: Advice,
    },
    /// `brk` that changed the heap's size in pages.
    Brk {
        /// Who.
        thread: ThreadId,
        /// The heap.
        heap: MappingId,
        /// Its bytes before.
        old: u64,
        /// Its bytes from now on.
        new: u64,
    },
    /// The first access of its kind to a page since the last call that may have changed the page's mapping.
    Touch {
        /// Who.
        thread: ThreadId,
        /// The page's first byte.
        at: Address,
        /// What was done.
        access: Access,
        /// The kernel did it, in a system call.
        by_kernel: bool,
    },
    /// A touch of a page that was in no mapping that the recorder knew: it can't be replayed.
    Stray {
        /// Who.
        thread: ThreadId,
        /// The page's first byte in the recorded process.
        recorded: u64,
        /// What was done.
        access: Access,
        /// The kernel did it, in a system call.
        by_kernel: bool,
    },
    /// A thread begins. The first one has no event.
    ThreadStart {
        /// Which.
        thread: ThreadId,
    },
    /// A thread ended. Threads that end with the process have none.
    ThreadExit {
        /// Which.
        thread: ThreadId,
    },
    /// A process makes another one. Every page of both may fault again.
    Fork {
        /// Who.
        thread: ThreadId,
        /// The new process.
        child: ProcessId,
        /// Linux lets the child have the memory of its parent, which waits, until it executes a program or ends
        /// (`vfork`). The emulator copies the memory all the same.
        shares_memory: bool,
    },
    /// The process replaces its program by another: all mappings and threads are gone, and numbered from 0 again.
    Exec {
        /// Who.
        thread: ThreadId,
        /// The program, without its path.
        program: String,
    },
    /// The process ends; it has no event after this one.
    End {
        /// Its exit status, as in [`Trailer::exit_status`]; `None` when a signal ended a process other than the first.
        exit_status: Option<i32>,
        /// The reads and writes of memory that it did; 0 if unknown.
        accesses: u64,
    },
}

/// What a recording begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The format's version.
    pub version: u16,
    /// The recorded program's architecture.
    pub arch: Arch,
    /// Its page size in bytes.
    pub page_size: u32,
    /// The program's name, without its path and arguments.
    pub program: String,
    /// What emulated it, with its version.
    pub emulator: String,
}

/// What a recording ends with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trailer {
    /// The recorded touches, [`Event::Stray`] included.
    pub touches: u64,
    /// Those of them that no live mapping allows.
    pub unexplained: u64,
    /// The reads and writes of memory that all processes did, of which the touches are the first ones; 0 if unknown.
    pub accesses: u64,
    /// The first process's exit status; 128 and the signal's number when a signal ended it.
    pub exit_status: i32,
    /// What the recording lacks.
    pub losses: Vec<Loss>,
    /// What Linux took for the same program, run without the emulator.
    pub native: Option<Native>,
}

/// Something that a recorded process did and the recording does not follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Who.
    pub process: ProcessId,
    /// What.
    pub kind: LossKind,
    /// The name of the program executed, without its path; empty if there is none.
    pub name: String,
    /// How often.
    pub count: u64,
}

/// A kind of [`Loss`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LossKind {
    /// The process replaced itself by a program that the emulator can't run, or not with the rights that it asks for.
    Exec,
    /// The emulator ended without saying so, killed perhaps: the last events may be missing.
    Cut,
}

/// What Linux took for the program, run without the emulator: the first process alone, as far as there are several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Native {
    /// The kernel's release.
    pub kernel: String,
    /// What the kernel says of transparent huge pages: `always`, `madvise`, `never`, or nothing if it has none.
    pub huge_pages: String,
    /// The runs, at least one.
    pub runs: Vec<NativeRun>,
}

/// What Linux took for one run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NativeRun {
    /// Page faults that read nothing.
    pub minor_faults: u64,
    /// Page faults that read from a disk.
    pub major_faults: u64,
    /// `VmHWM` at the end: the resident set's peak, in KiB.
    pub vm_hwm_kib: u64,
    /// `VmPTE` at the end: bytes of page tables, in KiB.
    pub vm_pte_kib: u64,
    /// The exit status of that run, as in [`Trailer::exit_status`]: where it differs, the runs differ.
    pub exit_status: i32,
}

impl Native {
    /// The median of the runs, each figure for itself; of an even number of runs the upper one.
    pub fn median(&self) -> NativeRun {
        let of = |figure: fn(&NativeRun) -> u64| {
            let mut figures: Vec<_> = self.runs.iter().map(figure).collect();
            figures.sort_unstable();
            figures.get(figures.len() / 2).copied().unwrap_or(0)
        };
        NativeRun {
            minor_faults: of(|run| run.minor_faults),
            major_faults: of(|run| run.major_faults),
            vm_hwm_kib: of(|run| run.vm_hwm_kib),
            vm_pte_kib: of(|run| run.vm_pte_kib),
            exit_status: of(|run| run.exit_status as u64) as i32,
        }
    }
}
