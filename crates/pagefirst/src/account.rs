//! What a space holds and did: the numbers a kernel prints as `status`, `smaps` and `getrusage`.

use crate::arch::MAX_LEVELS;
use crate::fault::{Bus, FaultError, Segv};
use crate::platform::Platform;
use crate::space::AddressSpace;
use crate::sync::atomic::Relaxed;
use crate::sync::atomic::plain::AtomicU64;
use crate::table::FaultKind;
use crate::types::PAGE_SIZE;

/// Faults that mapped nothing. Counted by the space: there is no table to count them in.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    pub spurious: AtomicU64,
    pub blocked: AtomicU64,
    pub segv: AtomicU64,
    pub bus: AtomicU64,
    pub no_memory: AtomicU64,
    pub over_limit: AtomicU64,
    pub no_huge: AtomicU64,
}

impl Failures {
    pub fn count(&self, error: FaultError) {
        let at = match error {
            FaultError::Segv(Segv::NotMapped | Segv::Access | Segv::NonCanonical) => &self.segv,
            FaultError::Bus(Bus::BeyondEnd | Bus::Poison | Bus::Io | Bus::Refused) => &self.bus,
            FaultError::NoMemory => &self.no_memory,
            FaultError::OverLimit(_) => &self.over_limit,
        };
        at.fetch_add(1, Relaxed);
    }
}

/// Faults by kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Faults {
    /// The zero page was mapped.
    pub anon_read: u64,
    /// A cleared page was mapped.
    pub anon_write: u64,
    /// A file's page was mapped for reading.
    pub file_read: u64,
    /// A private copy of a file's page was mapped where nothing was.
    pub file_copy: u64,
    /// A file's page was mapped for shared writing.
    pub shared_write: u64,
    /// A mapped page was copied for a write.
    pub copy: u64,
    /// A mapped page was made writable where it is.
    pub reuse: u64,
    /// Physical memory or a device was mapped, or made writable.
    pub physical: u64,
    /// An entry was marked accessed, or dirty, for hardware that does not.
    pub marked: u64,
    /// Of these, the faults that mapped a huge page.
    pub huge: u64,
    /// Faults that wanted a huge page, found none free, and went on with a small one.
    pub no_huge: u64,
    /// Nothing was left to do: another fault was faster, or a translation was stale.
    pub spurious: u64,
    /// The fault has to wait and come again.
    pub blocked: u64,
    /// SIGSEGV.
    pub segv: u64,
    /// SIGBUS.
    pub bus: u64,
    /// Memory was out.
    pub no_memory: u64,
    /// A limit was reached.
    pub over_limit: u64,
}

impl Faults {
    /// Faults that mapped something, or changed what is mapped.
    pub fn mapped(&self) -> u64 {
        self.anon_read
            + self.anon_write
            + self.file_read
            + self.file_copy
            + self.shared_write
            + self.copy
            + self.reuse
            + self.physical
            + self.marked
    }
}

/// What a space holds and did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Account {
    /// Resident pages of private memory, in bytes. The zero page does not count.
    pub anon_bytes: u64,
    /// Of these, in huge pages.
    pub huge_bytes: u64,
    /// Resident pages of files, in bytes.
    pub file_bytes: u64,
    /// Of these, those mapped by entries for huge pages (`FilePmdMapped`, `ShmemPmdMapped`).
    pub huge_file_bytes: u64,
    /// Bytes of live tables by level, the root's last; limbo and caches are the machine's, see
    /// [`Vm::held`](crate::Vm::held).
    pub table_bytes: [u64; MAX_LEVELS],
    /// Faults by kind.
    pub faults: Faults,
    /// Neighbours mapped by fault-around.
    pub around: u64,
    /// Entries never used: those taken out so far and those there now. Faulted entries are used at once, so these
    /// are neighbours mapped in vain, unless they are prefaulted young.
    pub unused: u64,
}

impl Account {
    /// Resident set, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        self.anon_bytes + self.file_bytes
    }
    /// Bytes of live tables of all levels.
    pub fn tables_bytes(&self) -> u64 {
        self.table_bytes.iter().sum()
    }
}

impl<P: Platform> AddressSpace<P> {
    /// Resident set, in bytes, summed over tables: the entries of leaf tables are not read.
    pub fn resident_bytes(&self) -> u64 {
        let (anon, file) = self.page_table().resident();
        (anon + file) * PAGE_SIZE
    }
    /// Walks the tables and counts; exact when nothing changes meanwhile.
    pub fn account(&self) -> Account {
        let t = self.tables();
        let f = &self.failures;
        Account {
            anon_bytes: t.anon * PAGE_SIZE,
            huge_bytes: t.huge * PAGE_SIZE,
            file_bytes: t.file * PAGE_SIZE,
            huge_file_bytes: t.huge_file * PAGE_SIZE,
            table_bytes: self.page_table().table_bytes(),
            faults: Faults {
                anon_read: t.of(FaultKind::AnonRead),
                anon_write: t.of(FaultKind::AnonWrite),
                file_read: t.of(FaultKind::FileRead),
                file_copy: t.of(FaultKind::FileCopy),
                shared_write: t.of(FaultKind::SharedWrite),
                copy: t.of(FaultKind::Copy),
                reuse: t.of(FaultKind::Reuse),
                physical: t.of(FaultKind::Physical),
                marked: t.of(FaultKind::Marked),
                huge: t.huge_faults,
                no_huge: f.no_huge.load(Relaxed),
                spurious: f.spurious.load(Relaxed),
                blocked: f.blocked.load(Relaxed),
                segv: f.segv.load(Relaxed),
                bus: f.bus.load(Relaxed),
                over_limit: f.over_limit.load(Relaxed),
                no_memory: f.no_memory.load(Relaxed),
            },
            around: t.of(FaultKind::Around),
            unused: t.of(FaultKind::Unused),
        }
    }
}
