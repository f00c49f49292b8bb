//! Checks of tables that read the arena alone: what is there, not what the library says is there.
//!
//! The one thing taken from the library's layout: a table's record is what the second word of its frame's metadata
//! points to (`FrameMeta` is `repr(C)`: counts, owner).

use crate::inner::Points;
use crate::machine::Machine;
use crate::tlb::{Entry, Rights};
use pagefirst::arch::{Attrs, Format, MAX_LEVELS};
use pagefirst::frame::{FrameFlags, head_of};
use pagefirst::space::AddressSpace;
use pagefirst::table::{PageTable, TableRecord};
use pagefirst::types::{PAGE_SIZE, Pfn, VirtAddr, VirtRange};
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
    /// Pages they map that count in the resident set: not the zero pages, not device memory.
    pub counted: u64,
    /// Entries that are neither empty nor present.
    pub software: u64,
    /// Every entry that points to no table: its address, its level, its bits.
    pub entries: Vec<(VirtAddr, u8, u64)>,
    /// How often each counted folio is mapped, by its head.
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

    /// Compares the tables of a space, as they lie in the arena, with what the library says of them and with what the
    /// CPUs have cached. For moments in which nothing changes.
    ///
    /// # Errors
    /// What differs.
    pub fn compare(&'static self, table: &PageTable<Machine<F>>) -> Result<Found, String> {
        let mut found = Found::default();
        self.visit(table.root_frame(), F::LEVELS - 1, VirtAddr(0), &mut found)?;
        self.compare_cached(table.tag(), table.root_frame())?;
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

    /// Every CPU's translations of a space say no more than its tables.
    fn compare_cached(&'static self, tag: u64, root: Pfn) -> Result<(), String> {
        for (cpu, state) in self.cpus.iter().enumerate() {
            let mmu = state.mmu.lock();
            let all = VirtRange { start: VirtAddr(0), end: VirtAddr(u64::MAX) };
            for (va, e) in mmu.translations(tag, all) {
                let (raw, level, rights) = self.look(root, va);
                let inside = (va.0 & (F::span(level) - 1)) / PAGE_SIZE;
                let there = F::frame(raw, level).filter(|_| !F::attrs(raw).contains(Attrs::NONE));
                let name = format!("CPU {cpu} still translates {va} to {:?}", Pfn(e.frame));
                if there.map(|first| first.add(inside as u32)) != Some(Pfn(e.frame)) {
                    return Err(format!("{name}, and the tables to {there:?}"));
                }
                for (what, cached, allowed) in
                    [("stores", e.rights.write, rights.write), ("fetches", e.rights.exec, rights.exec)]
                {
                    if cached && !allowed {
                        return Err(format!("{name} for {what}, which the tables do not allow"));
                    }
                }
                if self.is_mark_lost(va, e) {
                    return Err(mark_lost(va, e));
                }
            }
            for (span, e) in mmu.inner.of_tag(tag) {
                if let Points::Table(table, _) = e.to
                    && !self.hook_path(root, span.start).contains(&table)
                {
                    return Err(format!(
                        "CPU {cpu} still goes from {span:?} to {table:?}, which is not there"
                    ));
                }
            }
        }
        Ok(())
    }

    /// The last entry on the way to an address, its level, and what all entries down to it allow.
    fn look(&self, root: Pfn, va: VirtAddr) -> (u64, u8, Rights) {
        let mut rights = Rights { write: true, exec: true, dirty: false };
        let (mut table, mut level) = (root, F::LEVELS - 1);
        loop {
            let raw = self.hook_entry(table, level, va).load(Acquire);
            let child = F::child(raw, level);
            let allows = child.map_or_else(|| F::attrs(raw), |_| F::allows(raw));
            rights.write &= allows.contains(Attrs::WRITE);
            rights.exec &= allows.contains(Attrs::EXEC);
            let Some(child) = child else { return (raw, level, rights) };
            (table, level) = (child, level - 1);
        }
    }

    /// The page was written through this translation, which hardware marked in its entry first; and neither the entry,
    /// which is still there, nor the page's metadata says so, that it is dirty or being stored. Whoever changes an entry keeps the mark or moves it to
    /// the page, in one step: it went if that step was a load and a store. Where frames are
    /// not counted there is nobody whom the mark is for.
    pub(crate) fn is_mark_lost(&'static self, va: VirtAddr, e: &Entry) -> bool {
        let raw = self.hook_entry(Pfn(e.table), e.level, va).load(Acquire);
        let Some(first) = F::frame(raw, e.level) else { return false };
        let inside = (va.0 & (F::span(e.level) - 1)) / PAGE_SIZE;
        e.rights.dirty
            && first.add(inside as u32) == Pfn(e.frame)
            && !F::attrs(raw).intersects(Attrs::DIRTY | Attrs::SPECIAL)
            && self.arena.is_memory(first)
            && !self
                .arena
                .meta(head_of(self, first))
                .flags()
                .intersects(FrameFlags::DIRTY | FrameFlags::STORING)
    }

    /// Where the format asks for break-before-make: what a CPU has cached and is now to drop led to another page than the
    /// entry does that has come in its place already. In words.
    pub(crate) fn is_made_before_broken(&self, va: VirtAddr, e: &Entry) -> Option<String> {
        if !F::BREAK_BEFORE_MAKE {
            return None;
        }
        let raw = self.hook_entry(Pfn(e.table), e.level, va).load(Acquire);
        let there = F::frame(raw, e.level).filter(|_| !F::attrs(raw).contains(Attrs::NONE));
        let inside = (va.0 & (F::span(e.level) - 1)) / PAGE_SIZE;
        let other = there.is_some_and(|first| first.add(inside as u32) != Pfn(e.frame));
        (other || F::child(raw, e.level).is_some())
            .then(|| format!("{va} leads to {raw:#x} while a CPU still translates it to {:?}", Pfn(e.frame)))
    }

    /// [`compare`](Machine::compare), for a space, as a check: panics with the history.
    ///
    /// # Panics
    /// When something differs.
    pub fn check_space(&'static self, space: &AddressSpace<Machine<F>>) -> Found {
        let found = self.compare(space.page_table()).unwrap_or_else(|what| self.fail(&what));
        self.require(self.check_entries(space, &found));
        found
    }

    fn visit(&'static self, table: Pfn, level: u8, base: VirtAddr, found: &mut Found) -> Result<(), String> {
        found.tables[level as usize] += 1;
        if let Some(shadow) = &self.shadow {
            shadow.is_table(table, "linked")?;
        }
        let mut entries = 0;
        let (user, kernel) = self.arena.words(table)[..F::ENTRIES].split_at(F::user_entries(level));
        if kernel.iter().any(|cell| cell.load(Acquire) != kernel_entry::<F>()) {
            return Err(format!("the kernel's half of root {table:?} was changed"));
        }
        for (i, cell) in user.iter().enumerate() {
            let raw = cell.load(Acquire);
            if raw == 0 {
                continue;
            }
            entries += 1;
            let va = VirtAddr(base.0 + i as u64 * F::span(level));
            if let Some(child) = F::child(raw, level) {
                self.visit(child, level - 1, va, found)?;
                continue;
            }
            found.entries.push((va, level, raw));
            self.shows_nothing(raw, va)?;
            if let Some(frame) = F::frame(raw, level) {
                found.present += 1;
                if !F::attrs(raw).contains(Attrs::SPECIAL) {
                    let head = head_of(self, frame);
                    let zero = self.arena.meta(head).flags().contains(FrameFlags::ZERO);
                    found.counted += if zero { 0 } else { F::span(level) / PAGE_SIZE };
                    *found.frames.entry(head).or_default() += 1;
                    let flags = self.arena.meta(head).flags();
                    // A part may be writable that a fork left out, when it shared other parts of the folio.
                    let is_part = F::order(level) < self.arena.meta(head).order();
                    if F::attrs(raw).contains(Attrs::WRITE)
                        && !is_part
                        && flags & (FrameFlags::ANON | FrameFlags::EXCLUSIVE) == FrameFlags::ANON
                    {
                        return Err(format!("{frame:?} at {va} can be written, and others may have it"));
                    }
                }
                if let Some(shadow) = &self.shadow {
                    for i in 0..(F::span(level) / PAGE_SIZE) as u32 {
                        shadow.is_page(frame.add(i), "mapped").map_err(|e| format!("at {va}: {e}"))?;
                    }
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

/// What stands in the kernel's half of each root: not present, and whoever takes it for a user's entry comes to a frame
/// that there is not.
pub(crate) fn kernel_entry<F: Format>() -> u64 {
    F::leaf(Pfn(u32::MAX), F::LEVELS - 1, Attrs::NONE)
}

/// What [`Machine::is_mark_lost`] found, in words.
pub(crate) fn mark_lost(va: VirtAddr, e: &Entry) -> String {
    format!(
        "hardware marked {va} as dirty, mapped to {:?}, and its entry was overwritten without",
        Pfn(e.frame)
    )
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, says: T) -> Result<(), String> {
    if found == says { Ok(()) } else { Err(format!("{what}: found {found:?}, the library says {says:?}")) }
}
