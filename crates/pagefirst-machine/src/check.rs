//! Checks of tables that read the arena alone: what is there, not what the library says is there.
//!
//! The one thing taken from the library's layout: a table's record is what the second word of its frame's metadata
//! points to (`FrameMeta` is `repr(C)`: counts, owner).

use crate::machine::Machine;
use pagefirst::arch::{Attrs, Format, MAX_LEVELS};
use pagefirst::space::AddressSpace;
use pagefirst::table::{PageTable, TableRecord};
use pagefirst::types::{PAGE_SIZE, Pfn, VirtAddr};
use std::collections::HashMap;
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering::Acquire;

/// What a walk over the arena found in one space.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Found {
    /// Tables by level, the root's last.
    pub tables: [u64; MAX_LEVELS],
    /// Present entries that map pages.
    pub present: u64,
    /// Of these, the ones whose frames are counted: not the zero page, not device memory.
    pub counted: u64,
    /// Entries that are neither empty nor present.
    pub software: u64,
    /// How often each counted frame is mapped.
    pub frames: HashMap<Pfn, u32>,
}

impl<F: Format> Machine<F> {
    /// The record of a table, by way of the arena.
    pub(crate) fn record_of(&self, table: Pfn) -> Option<&TableRecord> {
        let meta = std::ptr::from_ref(self.arena.meta(table)).cast::<AtomicPtr<()>>();
        // SAFETY: `FrameMeta` is 32 bytes, `repr(C)`, of atomics alone; the second word is the owner.
        let owner = unsafe { &*meta.add(1) }.load(Acquire).cast::<TableRecord>();
        let inside = self.arena.contains(owner as usize, size_of::<TableRecord>());
        // SAFETY: it lies in the arena, which is mapped for ever, aligned; a record is atomics alone, for which any
        // bits are valid. So even if the table is freed meanwhile this reads memory that is there.
        (inside && owner.is_aligned()).then(|| unsafe { &*owner })
    }

    /// The walker passes this table: it must be one, and not alive and empty.
    #[inline]
    pub(crate) fn check_table(&self, table: Pfn, level: u8) {
        let Some(shadow) = &self.shadow else { return };
        self.require(shadow.is_table(table, "walked"));
        let Some(record) = self.record_of(table) else {
            self.fail(&format!("table {table:?} of level {level} has no record"))
        };
        let empty = || record.entries() == Some(0) && !record.is_pinned() && !record.is_dead();
        // Three words are read one after another: the second look tells a table that is dying from one that is empty.
        if empty() && empty() {
            self.fail(&format!("table {table:?} of level {level} is alive and empty"));
        }
    }

    /// Compares the tables of a space, as they lie in the arena, with what the library says of them. For moments in
    /// which nothing changes.
    ///
    /// # Errors
    /// What differs.
    pub fn compare(&'static self, table: &PageTable<Machine<F>>) -> Result<Found, String> {
        let mut found = Found::default();
        self.visit(table.root_frame(), F::LEVELS - 1, VirtAddr(0), &mut found)?;
        let says = table.count();
        let bytes = table.table_bytes().map(|b| b / PAGE_SIZE);
        same("tables by a walk", found.tables, says.tables)?;
        same("tables by bytes", found.tables, bytes)?;
        same("present entries", found.present, says.present)?;
        same("resident pages", found.counted, says.anon + says.file)?;
        same("empty tables", 0, says.empty)?;
        for (pfn, n) in &found.frames {
            let counts = self.arena.meta(*pfn).counts();
            if counts.maps < *n || counts.refs < counts.maps {
                return Err(format!("{pfn:?} is mapped {n} times here and counts {counts:?}"));
            }
        }
        Ok(found)
    }

    /// [`compare`](Machine::compare), for a space, as a check: panics with the history.
    ///
    /// # Panics
    /// When something differs.
    pub fn check_space(&'static self, space: &AddressSpace<Machine<F>>) -> Found {
        self.compare(space.page_table()).unwrap_or_else(|what| self.fail(&what))
    }

    fn visit(&self, table: Pfn, level: u8, base: VirtAddr, found: &mut Found) -> Result<(), String> {
        found.tables[level as usize] += 1;
        if let Some(shadow) = &self.shadow {
            shadow.is_table(table, "linked")?;
        }
        let mut entries = 0;
        for (i, cell) in self.arena.words(table)[..F::ENTRIES].iter().enumerate() {
            let raw = cell.load(Acquire);
            if raw == 0 {
                continue;
            }
            entries += 1;
            let va = VirtAddr(base.0 + i as u64 * F::span(level));
            if let Some(child) = F::child(raw, level) {
                self.visit(child, level - 1, va, found)?;
            } else if let Some(frame) = F::frame(raw, level) {
                found.present += 1;
                if !F::attrs(raw).contains(Attrs::SPECIAL) {
                    found.counted += 1;
                    *found.frames.entry(frame).or_default() += 1;
                }
                if let Some(shadow) = &self.shadow {
                    shadow.is_page(frame, "mapped").map_err(|e| format!("at {va}: {e}"))?;
                }
            } else {
                found.software += 1;
            }
        }
        let name = format!("table {table:?} of level {level} at {base}");
        let record = self.record_of(table).ok_or_else(|| format!("{name} has no record"))?;
        if record.is_dead() {
            return Err(format!("{name} is dead and still linked"));
        }
        if entries == 0 && !record.is_pinned() {
            return Err(format!("{name} is alive and empty"));
        }
        match record.entries() {
            Some(n) => same(&format!("entries of {name}"), entries, n),
            None => Err(format!("{name} is locked")),
        }
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, says: T) -> Result<(), String> {
    if found == says { Ok(()) } else { Err(format!("{what}: found {found:?}, the library says {says:?}")) }
}
