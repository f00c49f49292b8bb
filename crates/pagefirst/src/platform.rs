//! All that the embedding kernel supplies: one trait.
//!
//! The library is `no_std`, has no statics and no allocator of its own: memory comes from the regions given to
//! [`Vm::init`](crate::Vm::init), everything else from here. The embedded machine, the models and a kernel on a
//! real MMU run the same library over three implementations of this trait.

use crate::arch::Format;
use crate::fault::Ticket;
use crate::file::File;
use crate::frame::{self, FrameMeta};
use crate::limit::Limit;
use crate::mem::Shared;
use crate::sync::RawLock;
use crate::sync::atomic::AtomicU64;
use crate::tlb::Flush;
use crate::types::{Pfn, VirtAddr};
use crate::vm::{Local, Vm};
use core::panic::Location;
use core::ptr::NonNull;

/// The most CPUs a space can run on: the width of its CPU mask.
pub const MAX_CPUS: usize = 256;

/// What the library tells the platform about its memory, and its faults, as it happens, for counting and for checking.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Note {
    /// 2^order frames from this one on left the allocator for a new owner.
    FrameAllocated(Pfn, u8),
    /// 2^order frames came back: from here nobody may touch them.
    FrameFreed(Pfn, u8),
    /// A page table was taken into a reserve.
    TableAllocated(Pfn),
    /// A page table, empty and past its grace period, was given back.
    TableFreed(Pfn),
    /// A page table's lock was taken, its level beside it.
    TableLocked(Pfn, u8),
    /// A page table's entries were read in a scan.
    TableScanned(Pfn, u8),
    /// A fault ended that looked more than once: so often, at most [`MOST_LOOKS`](crate::fault::MOST_LOOKS).
    FaultLooked(u32),
}

/// What pagefirst needs from the kernel around it.
///
/// # Safety
/// The implementor promises what the methods say; the library's memory safety rests on
/// - [`cells`](Platform::cells), [`meta`](Platform::meta) and [`page`](Platform::page) answering, for every frame
///   of the regions given to `Vm::init`, with memory that nobody else uses, at one address for ever, and `page` also
///   for frames of which [`is_memory`](Platform::is_memory) says so;
/// - [`cpu`](Platform::cpu) naming a CPU that runs nothing else of the library between
///   [`enter`](Platform::enter) and [`leave`](Platform::leave);
/// - [`clear_page`](Platform::clear_page) and [`copy_page`](Platform::copy_page), where they are not the defaults,
///   doing what they say and nothing else, all of it done, for every CPU that learns of the page afterwards, when they
///   return;
/// - [`shootdown`](Platform::shootdown) returning only when no CPU named can use the translations named.
pub unsafe trait Platform: Sync + Sized + 'static {
    /// The format of page tables.
    type Format: Format;
    /// What a file mapping maps.
    type File: File;
    /// A lock that spins, with preemption off. Every spin calls [`relax`](Platform::relax).
    type SpinLock: RawLock<Self>;
    /// A lock that may sleep: one for each space, held by mapping calls.
    type WriterLock: RawLock<Self>;

    /// The library's state on this machine, embedded in the platform.
    fn vm(&'static self) -> &'static Vm<Self>;
    /// The library's state of one CPU; a CPU number is below [`cpus`](Platform::cpus).
    fn local(&'static self, cpu: usize) -> &'static Local<Self>;
    /// The number of CPUs, at most [`MAX_CPUS`].
    fn cpus(&'static self) -> usize;
    /// The CPU this runs on.
    fn cpu(&'static self) -> usize;
    /// Turns preemption off (it nests) and says which CPU this is.
    fn enter(&'static self) -> usize {
        self.cpu()
    }
    /// Undoes one [`enter`](Platform::enter).
    fn leave(&'static self) {}

    /// The entries of the page table in frame `pfn`: [`Format::ENTRIES`] of them.
    fn cells(&'static self, pfn: Pfn) -> &'static [AtomicU64];
    /// The metadata of frame `pfn`; see [`Region::meta_frames`](crate::frame::Region::meta_frames) for where they lie.
    fn meta(&'static self, pfn: Pfn) -> &'static FrameMeta;
    /// The bytes of frame `pfn` in the direct map, page-aligned.
    fn page(&'static self, pfn: Pfn) -> NonNull<u8>;

    /// Whether the frame is memory that [`page`](Platform::page) reaches, now and for as long as a program has it mapped:
    /// asked of frames that the embedder maps ([`Backing::Physical`](crate::space::Backing::Physical),
    /// [`File::direct`]), which user copies then use, and private writes copy.
    #[inline]
    fn is_memory(&'static self, _pfn: Pfn) -> bool {
        false
    }

    /// Zeroes the page in frame `pfn`. Every page and every table that is cleared whole is cleared by this, huge pages
    /// one small page at a time, with no lock held; so a kernel's own routine goes here (`rep stosq`,
    /// `DC ZVA`, stores past the caches, which it fences). The default is [`core::ptr::write_bytes`].
    ///
    /// # Safety
    /// The caller owns the frame alone: nobody else uses its bytes.
    #[inline]
    unsafe fn clear_page(&'static self, pfn: Pfn) {
        // SAFETY: the caller's promise.
        unsafe { frame::clear_page(self, pfn) }
    }
    /// Copies the page in frame `from` to frame `to`. Every page that is copied whole is copied by this, with no lock
    /// held.
    ///
    /// User code may write to `from` meanwhile (a shared page of a file). So each of its aligned 64-bit words is read
    /// whole, once, as the CPU's own word copies do (`rep movsq`, aligned vector loads); which of the racing writes are
    /// in the copy does not matter. In Rust that is an atomic load, and the default is a loop of them.
    ///
    /// # Safety
    /// The caller owns `to` alone: nobody else uses its bytes. It holds a reference to `from`, another frame.
    #[inline]
    unsafe fn copy_page(&'static self, to: Pfn, from: Pfn) {
        // SAFETY: the caller's promise.
        unsafe { frame::copy_page(self, to, from) }
    }

    /// The limit of the program that this CPU runs: whom pages are charged to that its reads and writes of files bring in.
    #[inline]
    fn limit(&'static self) -> Option<Shared<Self, Limit<Self>>> {
        None
    }

    /// Fills in the part of a new root table that lies beyond [`Format::USER_END`], before any CPU uses the table: a
    /// kernel's half, the same in every space. The library does not look at it, and clears it when the space is dropped,
    /// which no CPU may then still use. Nothing to do where the kernel has tables of its own.
    #[inline]
    fn kernel_half(&'static self, _root: Pfn) {}

    /// Makes translations unusable on the CPUs named and waits until they are. Called with no lock and no pin held.
    fn shootdown(&'static self, flush: &Flush<'_>);
    /// What this CPU needs before it retries the access at `addr` in the space of this tag, which need not be the one
    /// it runs; `tables` says that a table was published. Whatever it had cached of a page there, huge or small, goes.
    fn sync_local(&'static self, tag: u64, addr: VirtAddr, tables: bool);
    /// Called before the page in frame `pfn` can be executed; not for physical memory, nor files that are memory themselves
    /// ([`File::direct`]): whoever writes code to these sees to it. Nothing to do where instruction fetches see stores (x86);
    /// elsewhere the data cache is cleaned and the instruction cache invalidated for it.
    #[inline]
    fn sync_instructions(&'static self, _pfn: Pfn) {}
    /// Told that what is waited for under this [key](crate::fault::Ticket::key) is ready: called by whoever did it, with no
    /// lock held but the caller's own, in an interrupt if a file's page is completed there. A store that is completed within
    /// [`File::write`] is so with the lock of the cache that this is called with. So what is called here wakes, and
    /// does not call the library but for [`Vm::wake`]. The default wakes the futures that wait; who replaces it, to wake queues of
    /// his own, calls that for those.
    #[inline]
    fn ready(&'static self, key: u64) {
        self.vm().wake(self, key);
    }
    /// Waits, asleep if it can, until what this ticket is for is ready: as a kernel waits that a fault handed one. Called by
    /// what may sleep, with a [`WriterLock`](Platform::WriterLock) held perhaps: a removal of a file's pages waits so for
    /// those that are being stored, and for mapping calls that are at work where the file is mapped, and so does who makes memory
    /// of a file clean, or takes a bad page away. The default spins.
    #[inline]
    fn wait(&'static self, ticket: &Ticket<'_, Self>) {
        while !ticket.is_ready() {
            self.relax();
        }
    }
    /// Asked in debug builds before memory is taken, with the place in the library that wants it: whether to be told that
    /// there is none. For tests of what happens then.
    #[doc(hidden)]
    #[inline]
    fn refuses(&'static self, _site: &'static Location<'static>) -> bool {
        false
    }
    /// Called in every spin; must answer pending shootdowns.
    fn relax(&'static self);
    /// Random bits for placement.
    fn random(&'static self) -> u64;
    /// Told of what happens to frames and tables, and of faults that take long; for counting and checking.
    #[inline]
    fn note(&'static self, _note: Note) {}
}
