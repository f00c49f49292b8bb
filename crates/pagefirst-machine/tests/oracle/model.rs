//! The oracle: an address space as POSIX and Linux describe it, of plain maps, with what a program sees of it and what
//! it should cost. Nothing here is looked up by the library.

use super::areas::{Area, Areas, GUARD, Shows};
use super::files::{Bytes, File, zeros};
use super::fork::Folio;
use pagefirst::account::Faults;
use pagefirst::arch::{Format, MAX_LEVELS};
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::file::ShmemHuge;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::VmaFlags;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// Pages spanned by one leaf table.
pub const LEAF: u64 = 512;

/// The first page of those that share a leaf table, or a huge page, with `page`.
pub fn leaf(page: u64) -> u64 {
    page / LEAF * LEAF
}

/// What is in the tables for one page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Entry {
    /// The page of zeros that all share.
    Zero,
    /// The page of the file, as the area says, and how the entry is marked.
    File { writable: bool, used: bool, dirty: bool },
    /// A page of its own, marked as used and dirty from the first; others may have it too since a fork.
    Own { bytes: Bytes, folio: Folio },
}

impl Entry {
    /// A page that nobody else has.
    pub fn own(bytes: Bytes) -> Entry {
        Entry::Own { bytes, folio: Folio::new(true) }
    }
    /// Whether the entry allows an access that its area allows.
    fn allows(&self, access: Access) -> bool {
        match self {
            _ if access != Access::Write => true,
            Entry::Zero => false,
            Entry::File { writable, .. } => *writable,
            Entry::Own { folio, .. } => folio.is_exclusive(),
        }
    }
    /// Marks the entry for an access; says whether it was not yet.
    pub fn mark(&mut self, access: Access) -> bool {
        let Entry::File { used, dirty, .. } = self else { return false };
        let before = (*used, *dirty);
        (*used, *dirty) = (true, *dirty || access == Access::Write);
        before != (*used, *dirty)
    }
}

/// An address space.
pub struct Space {
    pub policy: Policy,
    /// Levels of tables, and the end of what a program can map, in pages.
    levels: usize,
    pub user_end: u64,
    /// Whether an address may end in a page fault, and not in another trap.
    is_canonical: fn(VirtAddr) -> bool,
    pub areas: Areas,
    /// The pages that are in the tables.
    pub entries: BTreeMap<u64, Entry>,
    /// The first pages of what is mapped by one huge entry; its pages are in `entries`, all of a kind.
    pub huge: BTreeSet<u64>,
    /// Whether a huge page can be had depends on which memory is free, which the oracle does not know: this tells of a
    /// page by an entry of which level it is mapped after a step, 1 for a huge page's. That it may be is for the oracle to
    /// say.
    pub level: Level,
    /// Whoever accesses marks entries himself; otherwise it takes a fault.
    pub marks: bool,
    /// Start and end of the heap, in bytes.
    pub heap: Range<u64>,
    pub faults: Faults,
    /// Neighbours that were mapped by fault-around.
    pub around: u64,
    /// Entries that went without ever having been used.
    pub unused: u64,
}

pub type Level = Box<dyn Fn(u64) -> Option<u8> + Send>;
pub type Outcome<T = ()> = Result<T, FaultError>;

impl Space {
    pub fn new<F: Format>(policy: Policy, heap: u64, level: Level) -> Space {
        let is_canonical = |va| F::is_canonical(va) || !F::NON_CANONICAL_TRAPS;
        Space::empty(policy, (F::LEVELS.into(), F::USER_END.0 / PAGE_SIZE, is_canonical), heap..heap, level)
    }
    /// One like this, with nothing in it.
    pub fn another(&self, level: Level) -> Space {
        Space::empty(self.policy, (self.levels, self.user_end, self.is_canonical), self.heap.clone(), level)
    }
    fn empty(
        policy: Policy,
        (levels, user_end, is_canonical): (usize, u64, fn(VirtAddr) -> bool),
        heap: Range<u64>,
        level: Level,
    ) -> Space {
        Space {
            policy,
            levels,
            user_end,
            is_canonical,
            areas: Areas::default(),
            entries: BTreeMap::new(),
            huge: BTreeSet::new(),
            level,
            marks: true,
            heap,
            faults: Faults::default(),
            around: 0,
            unused: 0,
        }
    }

    /// Bytes of tables of each level, computed from the pages that are mapped: one for each part of the address space
    /// with a page in it, and the root.
    pub fn table_bytes(&self) -> [u64; MAX_LEVELS] {
        let levels = self.levels;
        let tables = |level: usize| {
            let span = LEAF.pow(level as u32 + 1);
            let is_small = |page: &&u64| level > 0 || !self.huge.contains(&leaf(**page));
            let mut all: Vec<u64> = self.entries.keys().filter(is_small).map(|page| page / span).collect();
            all.dedup();
            if level + 1 == levels { 1 } else { all.len() as u64 }
        };
        std::array::from_fn(|level| if level < levels { tables(level) * PAGE_SIZE } else { 0 })
    }
    /// Entries in the tables: one for each huge page.
    pub fn present(&self) -> u64 {
        self.entries.len() as u64 - self.huge.len() as u64 * (LEAF - 1)
    }
    /// What is in `other`, where nothing is in this one, becomes part of it; its files are numbered from `files` on.
    pub fn absorb(&mut self, other: Space, files: usize) {
        self.entries.extend(other.entries);
        self.huge.extend(other.huge);
        self.areas.absorb(other.areas, files);
    }
    /// Bytes of resident private memory, what of that is in huge pages, and the same of files.
    pub fn resident(&self) -> (u64, u64, u64, u64) {
        let own = |entry: &Entry| matches!(entry, Entry::Own { .. });
        let is_file = |entry: &&Entry| matches!(entry, Entry::File { .. });
        let anon = self.entries.values().filter(|entry| own(entry)).count() as u64;
        let huge = self.huge.iter().filter(|page| own(&self.entries[page])).count() as u64;
        let file = self.entries.values().filter(is_file).count() as u64;
        let huge_file = self.huge.iter().filter(|page| is_file(&&self.entries[page])).count() as u64;
        (anon * PAGE_SIZE, huge * LEAF * PAGE_SIZE, file * PAGE_SIZE, huge_file * LEAF * PAGE_SIZE)
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

    /// A page of a file is written back. If the file tracks writes, whoever writes to it is to be told of again.
    pub fn clean(&mut self, file: usize, index: u64, tracks: bool) {
        for (page, entry) in &mut self.entries {
            let shown = self.areas.at(*page).and_then(|area| area.shows.file());
            if let Entry::File { writable, dirty, .. } = entry
                && shown == Some((file, index))
            {
                (*writable, *dirty) = (*writable && !tracks, false);
            }
        }
    }

    /// Makes small pages of the huge ones that lie in a range in part.
    pub fn split(&mut self, range: &Range<u64>) {
        for edge in [range.start, range.end] {
            if edge != leaf(edge) {
                self.scatter(leaf(edge));
            }
        }
    }
    /// Takes what is mapped in a range out of the tables.
    pub fn zap(&mut self, range: Range<u64>) {
        self.split(&range);
        self.huge.retain(|page| !range.contains(page));
        let gone: Vec<u64> = self.entries.range(range).map(|(page, _)| *page).collect();
        for page in gone {
            let entry = self.entries.remove(&page);
            self.unused += matches!(entry, Some(Entry::File { used: false, .. })) as u64;
        }
    }

    /// Pages of a file, from the first of `lost` on, are no longer the file's: they leave the tables, and with them private
    /// copies, if they do not stay.
    pub fn lose(&mut self, file: usize, lost: &Range<u64>, copies_stay: bool) {
        let is_gone = |page: &u64, entry: &Entry| {
            let shown = self.areas.at(*page).and_then(|area| area.shows.file());
            shown.is_some_and(|(f, index)| f == file && lost.contains(&index))
                && !(copies_stay && matches!(entry, Entry::Own { .. }))
        };
        let gone: Vec<u64> =
            self.entries.iter().filter(|(page, entry)| is_gone(page, entry)).map(|(page, _)| *page).collect();
        for page in gone {
            // Cutting a huge page would need memory: it goes whole.
            let whole = self.is_huge_of_file(page);
            self.zap(if whole { leaf(page)..leaf(page) + LEAF } else { page..page + 1 });
        }
    }

    /// Grows a stack down to `page`, if one is above and may.
    pub fn grow_stack(&mut self, page: u64) -> bool {
        let Some(stack) = self.areas.stack_above(page) else { return false };
        // Parts one above the other, whoever cut them, have one limit.
        let bytes = (self.areas.end_of_stacks(stack.end) - page) * PAGE_SIZE;
        let below = self.areas.before(page).filter(|(end, _)| *end > page.saturating_sub(GUARD));
        let is_near = below
            .is_some_and(|(_, area)| !area.prot.is_empty() && !area.flags.contains(VmaFlags::GROWS_DOWN));
        let moved = self.areas.at(stack.start).map_or(0, |area| area.moved);
        let grown = self.areas.pages() + stack.start - page;
        let may = bytes <= self.policy.max_stack
            && page >= self.policy.min_addr.0 / PAGE_SIZE
            && !is_near
            && page as i64 >= moved
            && grown * PAGE_SIZE <= self.policy.max_bytes;
        if may {
            self.areas.grow(stack, page);
        }
        may
    }

    /// Whether a huge page goes where `page` is: nothing is mapped, not even under the same leaf table, and one
    /// mapping of private memory that wants them covers all of it.
    fn wants_huge(&self, page: u64) -> bool {
        let span = leaf(page)..leaf(page) + LEAF;
        let wanted = |area: &Area| match self.policy.huge {
            HugePolicy::Never => false,
            HugePolicy::Advise => area.flags.contains(VmaFlags::HUGE),
            HugePolicy::Always => !area.flags.contains(VmaFlags::NO_HUGE),
        };
        self.entries.range(span.clone()).next().is_none()
            && self.areas.mapping(page).is_some_and(|(mapping, area)| {
                area.shows == Shows::Anonymous
                    && wanted(&area)
                    && mapping.start <= span.start
                    && span.end <= mapping.end
            })
    }
    /// Whether `page` is in the huge page of zeros.
    fn is_huge_zero(&self, page: u64) -> bool {
        self.huge.contains(&leaf(page)) && self.entries.get(&page) == Some(&Entry::Zero)
    }
    fn map_huge(&mut self, page: u64, entry: &Entry) {
        self.faults.huge += 1;
        self.huge.insert(leaf(page));
        self.entries.extend((leaf(page)..leaf(page) + LEAF).map(|page| (page, entry.clone())));
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
            Err(FaultError::OverLimit(_)) => unreachable!("no space has a limit"),
        }
        done
    }
    /// A page fault for which there was no memory. No huge page was to be had, then, either.
    pub fn out_of_memory(&mut self, page: u64, access: Access) {
        self.faults.no_memory += 1;
        if access == Access::Write && self.is_huge_zero(page) {
            self.faults.no_huge += 1;
            self.zap(leaf(page)..leaf(page) + LEAF);
        } else if self.wants_huge(page) {
            self.faults.no_huge += 1;
        }
    }

    fn answer(&mut self, files: &mut [File], page: u64, access: Access) -> Outcome<bool> {
        if !(self.is_canonical)(VirtAddr(page * PAGE_SIZE)) {
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
        let now = if write { Entry::own(zeros()) } else { Entry::Zero };
        if self.wants_huge(page) {
            if (self.level)(page) == Some(1) {
                let faults = &mut self.faults;
                *(if write { &mut faults.anon_write } else { &mut faults.anon_read }) += 1;
                self.map_huge(page, &now);
                return Ok(true);
            }
            self.faults.no_huge += 1;
        }
        if write && self.is_huge_zero(page) {
            if (self.level)(page) == Some(1) {
                self.faults.copy += 1;
                self.map_huge(page, &now);
                return Ok(true);
            }
            // Small pages of zeros come instead, each when it is touched.
            self.faults.no_huge += 1;
            self.zap(leaf(page)..leaf(page) + LEAF);
        }
        if write && !area.shows.is_shared() && self.is_huge_of_file(page) {
            self.zap(leaf(page)..leaf(page) + LEAF);
        }
        if write && self.is_shared_own(page) {
            self.unshare(page);
            return Ok(true);
        }
        let faults = &mut self.faults;
        let now = match (self.entries.get_mut(&page), area.shows) {
            (None, Shows::Anonymous) if write => {
                faults.anon_write += 1;
                now
            }
            (None, Shows::Anonymous) => {
                faults.anon_read += 1;
                now
            }
            (None, Shows::Private { file, first } | Shows::Shared { file, first }) => {
                let file = &mut files[file];
                if first >= file.pages() {
                    return Err(FaultError::Bus(Bus::BeyondEnd));
                }
                file.fetch(first);
                if write && !area.shows.is_shared() {
                    faults.file_copy += 1;
                    Entry::own(file.bytes(first))
                } else {
                    if write {
                        faults.shared_write += 1;
                        file.cached.insert(first, true);
                    } else {
                        faults.file_read += 1;
                    }
                    let writable = write || writable_at_once(&area, file);
                    let entry = Entry::File { writable, used: true, dirty: write };
                    if file.huge != ShmemHuge::Never {
                        self.map_of_memory(files, page, &entry);
                        return Ok(true);
                    }
                    self.entries.insert(page, entry.clone());
                    if !write {
                        self.map_around(files, page);
                    }
                    entry
                }
            }
            (Some(entry), _) if entry.allows(access) => {
                let marked = self.mark(page, access);
                self.faults.marked += marked as u64;
                return Ok(marked);
            }
            (Some(Entry::Zero), _) => {
                faults.copy += 1;
                Entry::own(zeros())
            }
            (Some(Entry::File { .. }), Shows::Shared { file, first }) => {
                faults.reuse += 1;
                files[file].cached.insert(first, true);
                Entry::File { writable: true, used: true, dirty: true }
            }
            (Some(Entry::File { .. }), Shows::Private { file, first }) => {
                faults.copy += 1;
                Entry::own(files[file].bytes(first))
            }
            (Some(entry), shows) => unreachable!("{entry:?} refuses {access:?} in {shows:?}"),
        };
        self.entries.insert(page, now);
        Ok(true)
    }

    /// Maps the neighbours of `page` that are in memory: those in its window, in its mapping, under its leaf table.
    fn map_around(&mut self, files: &[File], page: u64) {
        let Some((mapping, area)) = self.areas.mapping(page) else { return };
        let Some((file, first)) = area.shows.file() else { return };
        let window = self.window(page, &mapping) / PAGE_SIZE;
        let start = page / window * window;
        let writable = writable_at_once(&area, &files[file]);
        let entry = Entry::File { writable, used: self.policy.prefault_young, dirty: false };
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
            if let Some(area) = self.areas.at(page).filter(|area| area.prot.allows(access))
                && let Some(entry) = self.entries.get_mut(&page).filter(|entry| entry.allows(access))
                && (self.marks || !entry.clone().mark(access))
            {
                self.mark(page, access);
                return Ok(area);
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
            (Some(Entry::Own { bytes, .. }), _) => {
                Arc::make_mut(bytes)[place..place + from.len()].copy_from_slice(from);
            }
            (_, Shows::Shared { file, first }) => files[file].write(first * PAGE_SIZE + place as u64, from),
            (entry, shows) => unreachable!("a write to {entry:?} of {shows:?}"),
        }
        Ok(())
    }
    /// The word that a load would find; 0 where it would find none.
    pub fn peek(&self, files: &[File], at: VirtAddr) -> u64 {
        let (page, place) = (at.0 / PAGE_SIZE, (at.0 % PAGE_SIZE) as usize);
        let Some(area) = self.areas.at(page) else { return 0 };
        let bytes = match (self.entries.get(&page), area.shows.file()) {
            (None, Some((file, index))) => files[file].bytes(index),
            _ => self.bytes(files, page, &area),
        };
        u64::from_le_bytes(std::array::from_fn(|i| bytes[place + i]))
    }
    /// What a program sees in a page that is in the tables.
    pub fn bytes(&self, files: &[File], page: u64, area: &Area) -> Bytes {
        match (self.entries.get(&page), area.shows.file()) {
            (Some(Entry::Own { bytes, .. }), _) => bytes.clone(),
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
