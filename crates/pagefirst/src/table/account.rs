//! Counting by a walk: what the tables hold now.

use super::PageTable;
use super::record::{FaultKind, Table};
use crate::arch::{Attrs, Format, MAX_LEVELS};
use crate::platform::Platform;
use crate::sync::atomic::Relaxed;
use crate::sync::epoch::Pin;

/// What a walk over all tables of a space counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tables {
    /// Tables by level, the root's last.
    pub tables: [u64; MAX_LEVELS],
    /// Small pages of private memory, those in huge pages included.
    pub anon: u64,
    /// Small pages of files.
    pub file: u64,
    /// Of the pages of private memory, those in huge pages.
    pub huge: u64,
    /// Of the pages of files, those mapped by entries for huge pages.
    pub huge_file: u64,
    /// Faults that mapped huge pages, those of tables that are gone included.
    pub huge_faults: u64,
    /// Present leaf entries, the zero page's included.
    pub present: u64,
    /// Present leaf entries that were never used.
    pub unused: u64,
    /// Tables below the root that are alive and empty: none, ever.
    pub empty: u64,
    /// Faults and other events by [`FaultKind`], those of tables that are gone included.
    pub tally: [u64; FaultKind::COUNT],
}

impl Tables {
    /// The number of events of one kind.
    pub fn of(&self, kind: FaultKind) -> u64 {
        self.tally[kind as usize]
    }
}

impl<P: Platform> PageTable<P> {
    /// Walks all tables without locks. Exact when nothing changes meanwhile.
    pub fn count(&self) -> Tables {
        let pin = Pin::new(self.p);
        let mut sum = Tables::default();
        for (to, from) in sum.tally.iter_mut().zip(&self.changing.tally) {
            *to = from.load(Relaxed) as u64;
        }
        sum.huge_faults = self.changing.huge_faults.load(Relaxed);
        visit(self.root(&pin), &mut sum);
        sum.tally[FaultKind::Unused as usize] += sum.unused;
        sum
    }
}

impl<P: Platform> PageTable<P> {
    /// Pages of private memory and of files, summed over the tables' records.
    pub(crate) fn resident(&self) -> (u64, u64) {
        resident(self.root(&Pin::new(self.p)))
    }
}

fn resident<P: Platform>(table: Table<'_, P>) -> (u64, u64) {
    let mut sum = table.record().resident();
    if table.level() > 0 {
        for child in (0..P::Format::user_entries(table.level())).filter_map(|i| table.child(table.entry(i))) {
            let (anon, file) = resident(child);
            sum = (sum.0 + anon, sum.1 + file);
        }
    }
    sum
}

fn visit<P: Platform>(table: Table<'_, P>, sum: &mut Tables) {
    let record = table.record();
    if record.is_dead() {
        return;
    }
    sum.tables[table.level() as usize] += 1;
    let (anon, file) = record.resident();
    sum.anon += anon;
    sum.file += file;
    if table.level() > 0 {
        sum.huge += anon;
        sum.huge_file += file;
    }
    sum.huge_faults += record.huge_faults(table.level());
    for (to, n) in sum.tally.iter_mut().zip(record.tally()) {
        *to += n as u64;
    }
    let mut entries = 0;
    for i in 0..P::Format::user_entries(table.level()) {
        let raw = table.entry(i);
        entries += (raw != 0) as u64;
        if let Some(child) = table.child(raw) {
            visit(child, sum);
        } else if P::Format::frame(raw, table.level()).is_some() {
            sum.present += 1;
            sum.unused += !P::Format::attrs(raw).contains(Attrs::ACCESSED) as u64;
        }
    }
    sum.empty += (entries == 0 && !record.is_pinned()) as u64;
}
