//! The oracle: an address space as POSIX and Linux describe it, of plain maps, with what a program sees of it and what
//! it should cost. Nothing here is looked up by the library.

use super::areas::{Area, Areas, GUARD, Shows};
use super::files::{Bytes, File, zeros};
use pagefirst::account::Faults;
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::policy::Policy;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// The end of what a program can map, in pages: half of what four levels of tables reach, but for the last page.
pub const USER_END: u64 = (1 << 35) - 1;
/// Pages spanned by one leaf table.
pub const LEAF: u64 = 512;

/// What is in the tables for one page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Entry {
    /// The page of zeros that all share.
    Zero,
    /// The page of the file, as the area says.
    File { writable: bool, used: bool },
    /// A page of its own.
    Own(Bytes),
}

/// An address space.
pub struct Space {
    pub policy: Policy,
    pub areas: Areas,
    /// The pages that are in the tables.
    pub entries: BTreeMap<u64, Entry>,
    /// Start and end of the heap, in bytes.
    pub heap: Range<u64>,
    pub faults: Faults,
    /// Neighbours that were mapped by fault-around.
    pub around: u64,
    /// Entries that went without ever having been used.
    pub unused: u64,
}

pub type Outcome<T = ()> = Result<T, FaultError>;

impl Space {
    pub fn new(policy: Policy) -> Space {
        Space {
            policy,
            areas: Areas::default(),
            entries: BTreeMap::new(),
            heap: 0..0,
            faults: Faults::default(),
            around: 0,
            unused: 0,
        }
    }

    /// Bytes of tables of each level, computed from the pages that are mapped: one for each part of the address space
    /// with a page in it, and the root.
    pub fn table_bytes(&self, levels: usize) -> Vec<u64> {
        let tables = |level: usize| {
            let span = LEAF.pow(level as u32 + 1);
            let mut all: Vec<u64> = self.entries.keys().map(|page| page / span).collect();
            all.dedup();
            if level + 1 == levels { 1 } else { all.len() as u64 }
        };
        (0..levels).map(|level| tables(level) * PAGE_SIZE).collect()
    }
    /// Bytes of resident private memory and of files.
    pub fn resident(&self) -> (u64, u64) {
        let count = |which: fn(&Entry) -> bool| self.entries.values().filter(|e| which(e)).count() as u64;
        let own = count(|e| matches!(e, Entry::Own(_)));
        (own * PAGE_SIZE, count(|e| matches!(e, Entry::File { .. })) * PAGE_SIZE)
    }
    /// Entries never used, those that are gone included.
    pub fn never_used(&self) -> u64 {
        let now = self.entries.values().filter(|e| matches!(e, Entry::File { used: false, .. })).count();
        self.unused + now as u64
    }
    /// Whether a page of a file is mapped here; `from` this index on.
    pub fn maps(&self, file: usize, from: u64, to: u64) -> bool {
        self.entries.iter().any(|(page, entry)| {
            let shown = self.areas.at(*page).and_then(|area| area.shows.file());
            matches!(entry, Entry::File { .. })
                && shown.is_some_and(|(f, index)| f == file && (from..to).contains(&index))
        })
    }

    /// Takes what is mapped in a range out of the tables.
    pub fn zap(&mut self, range: Range<u64>) {
        let gone: Vec<u64> = self.entries.range(range).map(|(page, _)| *page).collect();
        for page in gone {
            let entry = self.entries.remove(&page);
            self.unused += matches!(entry, Some(Entry::File { used: false, .. })) as u64;
        }
    }

    /// Grows a stack down to `page`, if one is above and may.
    pub fn grow_stack(&mut self, page: u64) -> bool {
        let Some(stack) = self.areas.stack_above(page) else { return false };
        let bytes = (stack.end - page) * PAGE_SIZE;
        let guard = page.saturating_sub(GUARD)..page;
        let grown = self.areas.pages() + stack.start - page;
        let may = bytes <= self.policy.max_stack
            && page >= self.policy.min_addr.0 / PAGE_SIZE
            && self.areas.within(guard).next().is_none()
            && grown * PAGE_SIZE <= self.policy.max_bytes;
        if may {
            self.areas.grow(stack.start, page);
        }
        may
    }

    /// What a page fault comes to. True: something was mapped; false: nothing was left to do.
    pub fn fault(&mut self, files: &mut [File], page: u64, access: Access) -> Outcome<bool> {
        let done = self.answer(files, page, access);
        match done {
            Ok(true) => {}
            Ok(false) => self.faults.spurious += 1,
            Err(FaultError::Segv(_)) => self.faults.segv += 1,
            Err(FaultError::Bus(_)) => self.faults.bus += 1,
            Err(FaultError::NoMemory) => self.faults.no_memory += 1,
        }
        done
    }

    fn answer(&mut self, files: &mut [File], page: u64, access: Access) -> Outcome<bool> {
        if (1 << 35..(1 << 52) - (1 << 35)).contains(&page) {
            return Err(FaultError::Segv(Segv::NonCanonical));
        }
        let area = match self.areas.at(page) {
            Some(area) => area,
            None => {
                if !self.grow_stack(page) {
                    return Err(FaultError::Segv(Segv::NotMapped));
                }
                self.areas.at(page).ok_or(FaultError::Segv(Segv::NotMapped))?
            }
        };
        if !area.prot.allows(access) {
            return Err(FaultError::Segv(Segv::Access));
        }
        let write = access == Access::Write;
        let faults = &mut self.faults;
        let now = match (self.entries.get(&page), area.shows) {
            (None, Shows::Anonymous) if write => {
                faults.anon_write += 1;
                Entry::Own(zeros())
            }
            (None, Shows::Anonymous) => {
                faults.anon_read += 1;
                Entry::Zero
            }
            (None, Shows::Private { file, first } | Shows::Shared { file, first }) => {
                let file = &mut files[file];
                if first >= file.pages() {
                    return Err(FaultError::Bus(Bus::BeyondEnd));
                }
                file.fetch(first);
                if write && !area.shows.is_shared() {
                    faults.file_copy += 1;
                    Entry::Own(file.bytes(first))
                } else {
                    if write {
                        faults.shared_write += 1;
                        file.cached.insert(first, true);
                    } else {
                        faults.file_read += 1;
                    }
                    let writable = write || writable_at_once(&area, file);
                    let entry = Entry::File { writable, used: true };
                    self.entries.insert(page, entry.clone());
                    if !write {
                        self.map_around(files, page);
                    }
                    entry
                }
            }
            (Some(_), _) if !write => return Ok(false),
            (Some(Entry::Own(_) | Entry::File { writable: true, .. }), _) => return Ok(false),
            (Some(Entry::Zero), _) => {
                faults.copy += 1;
                Entry::Own(zeros())
            }
            (Some(Entry::File { .. }), Shows::Shared { file, first }) => {
                faults.reuse += 1;
                files[file].cached.insert(first, true);
                Entry::File { writable: true, used: true }
            }
            (Some(Entry::File { .. }), Shows::Private { file, first }) => {
                faults.copy += 1;
                Entry::Own(files[file].bytes(first))
            }
            (Some(Entry::File { .. }), Shows::Anonymous) => unreachable!("a file's page in anonymous memory"),
        };
        self.entries.insert(page, now);
        Ok(true)
    }

    /// Maps the neighbours of `page` that are in memory: those in its window, in its mapping, under its leaf table.
    fn map_around(&mut self, files: &[File], page: u64) {
        let Some((mapping, area)) = self.areas.mapping(page) else { return };
        let Some((file, first)) = area.shows.file() else { return };
        let window = (self.policy.fault_around / PAGE_SIZE).clamp(1, LEAF);
        let start = page / window * window;
        let entry =
            Entry::File { writable: writable_at_once(&area, &files[file]), used: self.policy.prefault_young };
        for near in start.max(mapping.start)..(start + window).min(mapping.end) {
            let index = first + near - mapping.start;
            let there = index < files[file].pages() && files[file].cached.contains_key(&index);
            if there && !self.entries.contains_key(&near) {
                self.entries.insert(near, entry.clone());
                self.around += 1;
            }
        }
    }

    /// An access by a program to bytes that lie in one page: faults, if it has to, until it goes through.
    fn reach(&mut self, files: &mut [File], page: u64, access: Access) -> Outcome<Area> {
        loop {
            if let Some(area) = self.areas.at(page).filter(|area| area.prot.allows(access)) {
                match self.entries.get_mut(&page) {
                    Some(Entry::Own(_)) => return Ok(area),
                    Some(Entry::Zero) if access != Access::Write => return Ok(area),
                    Some(Entry::File { writable, used }) if access != Access::Write || *writable => {
                        *used = true;
                        return Ok(area);
                    }
                    _ => {}
                }
            }
            self.fault(files, page, access)?;
        }
    }
    /// Reads bytes that lie in one page.
    pub fn load(&mut self, files: &mut [File], at: VirtAddr, to: &mut [u8], access: Access) -> Outcome {
        let (page, place) = (at.0 / PAGE_SIZE, (at.0 % PAGE_SIZE) as usize);
        let area = self.reach(files, page, access)?;
        to.copy_from_slice(&self.bytes(files, page, &area)[place..place + to.len()]);
        Ok(())
    }
    /// Writes bytes that lie in one page.
    pub fn store(&mut self, files: &mut [File], at: VirtAddr, from: &[u8]) -> Outcome {
        let (page, place) = (at.0 / PAGE_SIZE, (at.0 % PAGE_SIZE) as usize);
        let area = self.reach(files, page, Access::Write)?;
        match (self.entries.get_mut(&page), area.shows) {
            (Some(Entry::Own(bytes)), _) => {
                Arc::make_mut(bytes)[place..place + from.len()].copy_from_slice(from);
            }
            (_, Shows::Shared { file, first }) => files[file].write(first * PAGE_SIZE + place as u64, from),
            (entry, shows) => unreachable!("a write to {entry:?} of {shows:?}"),
        }
        Ok(())
    }
    /// What a program sees in a page that is in the tables.
    pub fn bytes(&self, files: &[File], page: u64, area: &Area) -> Bytes {
        match (self.entries.get(&page), area.shows.file()) {
            (Some(Entry::Own(bytes)), _) => bytes.clone(),
            (Some(Entry::File { .. }), Some((file, index))) => files[file].bytes(index),
            _ => zeros(),
        }
    }
    /// Whether a store to `at` would write to a file's last page beyond the file's end: what becomes of that is
    /// unspecified.
    pub fn is_beyond_end(&self, files: &[File], at: VirtAddr, len: u64) -> bool {
        (at.0 / PAGE_SIZE..=(at.0 + len - 1) / PAGE_SIZE).any(|page| {
            self.areas.at(page).is_some_and(|area| match area.shows {
                Shows::Shared { file, first } => {
                    let end = (at.0 + len).min((page + 1) * PAGE_SIZE) - page * PAGE_SIZE;
                    first * PAGE_SIZE + end > files[file].size && first < files[file].pages()
                }
                _ => false,
            })
        })
    }
}

/// Whether a page of a file is mapped writable from the first: shared, and nobody wants to know who writes.
pub fn writable_at_once(area: &Area, file: &File) -> bool {
    area.shows.is_shared() && area.prot.allows(Access::Write) && !file.tracks
}
