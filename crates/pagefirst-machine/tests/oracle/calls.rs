//! What mapping calls do to the oracle's address space, and what they answer.

use super::areas::{Area, Areas, Shows};
use super::files::File;
use super::model::{Entry, LEAF, Space, leaf};
use pagefirst::fault::FaultError;
use pagefirst::file::ShmemHuge;
use pagefirst::space::{Advice, MapError, Place, RemapTo, VmaFlags};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr, VirtRange};
use std::collections::BTreeMap;
use std::ops::Range;

pub type Called<T = ()> = Result<T, MapError>;

/// A mapping to be made, its length in pages.
#[derive(Clone, Copy, Debug)]
pub struct NewMap {
    pub pages: u64,
    pub prot: Prot,
    pub flags: VmaFlags,
    pub shows: Shows,
    pub place: Place,
}

pub fn bytes_of(range: &Range<u64>) -> VirtRange {
    VirtRange::new(VirtAddr(range.start * PAGE_SIZE), VirtAddr(range.end * PAGE_SIZE))
}

fn page_of(at: VirtAddr) -> u64 {
    at.0 / PAGE_SIZE
}

impl Space {
    fn min_page(&self) -> u64 {
        page_of(self.policy.min_addr)
    }
    fn usable(&self, range: &Range<u64>) -> Called {
        let inside = range.start >= self.min_page() && range.end <= self.user_end;
        if inside { Ok(()) } else { Err(MapError::OutOfRange(bytes_of(range))) }
    }
    /// Whether bytes lie where something can be mapped.
    pub fn is_usable(&self, at: VirtAddr, len: u64) -> bool {
        let end = at.0.checked_add(len).map(|end| end.div_ceil(PAGE_SIZE));
        page_of(at) >= self.min_page() && end.is_some_and(|end| end <= self.user_end)
    }
    fn place(&self, pages: u64, place: Place, large: bool) -> Called<Range<u64>> {
        let from = |at| page_of(at)..page_of(at) + pages;
        match place {
            Place::Fixed(at) => return self.usable(&from(at)).map(|()| from(at)),
            Place::FixedNoReplace(at) => {
                self.usable(&from(at))?;
                let free = self.areas.is_free(from(at));
                return if free { Ok(from(at)) } else { Err(MapError::Taken(bytes_of(&from(at)))) };
            }
            Place::Hint(at) if self.usable(&from(at)).is_ok() && self.areas.is_free(from(at)) => {
                return Ok(from(at));
            }
            Place::Hint(_) | Place::Anywhere => {}
        }
        let within = self.min_page()..page_of(self.policy.map_top).min(self.user_end);
        let room = |align| self.areas.room(pages, align, &within, self.policy.bottom_up);
        let align = self.policy.align_large / PAGE_SIZE;
        let aligned = if large && align > 1 && pages.is_multiple_of(align) { room(align) } else { None };
        let at = aligned.or_else(|| room(1)).ok_or(MapError::NoRoom(pages * PAGE_SIZE))?;
        Ok(at..at + pages)
    }
    fn check_prot(&self, prot: Prot, flags: VmaFlags, range: &Range<u64>) -> Called {
        let never = flags.contains(VmaFlags::NEVER_WRITE) && prot.contains(Prot::WRITE);
        let both = self.policy.deny_wx && prot.contains(Prot::WRITE | Prot::EXEC);
        if never || both { Err(MapError::Denied(bytes_of(range))) } else { Ok(()) }
    }
    /// Makes `next` what is mapped, unless that passes a limit.
    fn adopt(&mut self, next: Areas) -> Called {
        let (old, new) = (self.areas.mappings().len(), next.mappings().len());
        if new > self.policy.max_vmas && new > old {
            return Err(MapError::TooMany(self.policy.max_vmas));
        }
        let (old, new) = (self.areas.pages() * PAGE_SIZE, next.pages() * PAGE_SIZE);
        if new > self.policy.max_bytes && new > old {
            return Err(MapError::TooLarge(self.policy.max_bytes));
        }
        self.areas = next;
        Ok(())
    }

    pub fn map(&mut self, files: &[File], map: NewMap) -> Called<Range<u64>> {
        let large = match map.shows.file() {
            None => true,
            Some((file, first)) => {
                files[file].huge != ShmemHuge::Never
                    && (first * PAGE_SIZE).is_multiple_of(self.policy.align_large.max(1))
            }
        };
        self.map_large(map, large)
    }
    fn map_large(&mut self, map: NewMap, large: bool) -> Called<Range<u64>> {
        let anonymous = map.shows == Shows::Anonymous;
        let range = self.place(map.pages, map.place, large)?;
        self.check_prot(map.prot, map.flags, &range)?;
        if map.flags.contains(VmaFlags::GROWS_DOWN) && !anonymous {
            return Err(MapError::Denied(bytes_of(&range)));
        }
        let mut next = self.areas.clone();
        next.remove(range.clone());
        next.insert(
            range.clone(),
            Area { prot: map.prot, flags: map.flags, shows: map.shows, moved: 0, stack: 0 },
        );
        self.adopt(next)?;
        self.zap(range.clone());
        Ok(range)
    }

    /// Touches every page of a new mapping, as far as `limit` lets it; says where that stopped.
    pub fn populate(
        &mut self,
        files: &mut [File],
        range: Range<u64>,
        prot: Prot,
        limit: Option<(VirtAddr, FaultError)>,
    ) -> Option<(VirtAddr, FaultError)> {
        let wanted = match prot {
            p if p.contains(Prot::WRITE) => Access::Write,
            p if p.is_empty() => return None,
            _ => Access::Read,
        };
        let mut page = range.start;
        while page < range.end {
            // By that nothing of a file becomes dirty that is mapped shared.
            let is_shared = self.areas.at(page).is_some_and(|area| area.shows.is_shared());
            let access = if is_shared { Access::Read } else { wanted };
            let at = VirtAddr(page * PAGE_SIZE);
            if limit == Some((at, FaultError::NoMemory)) {
                self.out_of_memory(page, access);
                return limit;
            }
            match self.fault(files, page, access) {
                Ok(true) if self.huge.contains(&leaf(page)) => page = leaf(page) + LEAF,
                Ok(_) => page += 1,
                Err(why) => return Some((at, why)),
            }
        }
        None
    }

    pub fn unmap(&mut self, range: Range<u64>) -> Called {
        self.usable(&range)?;
        let mut next = self.areas.clone();
        next.remove(range.clone());
        self.adopt(next)?;
        self.zap(range);
        Ok(())
    }

    fn check_mapped(&self, range: &Range<u64>) -> Called {
        match self.areas.hole(range.clone()) {
            Some(hole) => Err(MapError::NotMapped(bytes_of(&hole))),
            None => Ok(()),
        }
    }

    pub fn protect(&mut self, files: &[File], range: Range<u64>, prot: Prot) -> Called {
        self.usable(&range)?;
        self.check_mapped(&range)?;
        for (mapping, area) in self.areas.mappings() {
            let part = mapping.start.max(range.start)..mapping.end.min(range.end);
            if !part.is_empty() {
                self.check_prot(prot, area.flags, &part)?;
            }
        }
        let mut next = self.areas.clone();
        if !next.change(range.clone(), |area| Area { prot, ..area }) {
            return Ok(());
        }
        self.adopt(next)?;
        self.split(&range);
        for (page, entry) in self.entries.range_mut(range) {
            let (Entry::File { writable, .. }, Some(area)) = (entry, self.areas.at(*page)) else { continue };
            let Shows::Shared { file, .. } = area.shows else { continue };
            // Where writes are tracked, a page gets write access by a fault alone.
            *writable = prot.contains(Prot::WRITE) && (*writable || !files[file].tracks);
        }
        Ok(())
    }

    pub fn advise(&mut self, range: Range<u64>, advice: Advice) -> Called {
        self.usable(&range)?;
        self.check_mapped(&range)?;
        let (on, off) = match advice {
            Advice::Huge => (VmaFlags::HUGE, VmaFlags::NO_HUGE),
            Advice::NoHuge => (VmaFlags::NO_HUGE, VmaFlags::HUGE),
            Advice::DontFork => (VmaFlags::DONT_FORK, VmaFlags::empty()),
            Advice::DoFork => (VmaFlags::empty(), VmaFlags::DONT_FORK),
            Advice::WipeOnFork => (VmaFlags::WIPE_ON_FORK, VmaFlags::empty()),
            Advice::KeepOnFork => (VmaFlags::empty(), VmaFlags::WIPE_ON_FORK),
            Advice::Normal => (VmaFlags::empty(), VmaFlags::SEQUENTIAL | VmaFlags::RANDOM),
            Advice::Sequential => (VmaFlags::SEQUENTIAL, VmaFlags::RANDOM),
            Advice::Random => (VmaFlags::RANDOM, VmaFlags::SEQUENTIAL),
            // No plan has it: what is in memory afterwards is not modelled.
            Advice::WillNeed => return Ok(()),
        };
        if advice == Advice::WipeOnFork {
            for (mapping, area) in self.areas.mappings() {
                let part = mapping.start.max(range.start)..mapping.end.min(range.end);
                if !part.is_empty() && area.shows != Shows::Anonymous {
                    return Err(MapError::Invalid(bytes_of(&part)));
                }
            }
        }
        let mut next = self.areas.clone();
        if next.change(range.clone(), |area| Area { flags: (area.flags - off) | on, ..area }) {
            self.adopt(next)?;
            self.split(&range);
        }
        Ok(())
    }

    pub fn discard(&mut self, range: Range<u64>) -> Called {
        self.usable(&range)?;
        self.check_mapped(&range)?;
        // A file's huge page is not cut: it goes whole.
        let (mut start, mut end) = (range.start, range.end);
        if self.is_huge_of_file(start) {
            start = leaf(start);
        }
        if self.is_huge_of_file(end - 1) {
            end = leaf(end - 1) + LEAF;
        }
        self.zap(start..end);
        Ok(())
    }

    pub fn remap(&mut self, old: Range<u64>, pages: u64, to: RemapTo) -> Called<u64> {
        self.usable(&old)?;
        let mapping = self.areas.mapping(old.start).filter(|(m, _)| old.end <= m.end);
        let (mapping, _) = mapping.ok_or(MapError::NotMapped(bytes_of(&old)))?;
        let area = self.areas.at(old.start).ok_or(MapError::NotMapped(bytes_of(&old)))?;
        if let RemapTo::Fixed(at) = to {
            let new = page_of(at)..page_of(at) + pages;
            self.usable(&new)?;
            if new.start < old.end && old.start < new.end {
                return Err(MapError::Invalid(bytes_of(&new)));
            }
            return self.relocate(old, new, area);
        }
        let wanted = old.start + pages;
        if wanted <= old.end {
            if wanted < old.end {
                self.unmap(wanted..old.end)?;
            }
            return Ok(old.start);
        }
        let tail = old.end..wanted;
        if old.end == mapping.end && self.usable(&tail).is_ok() && self.areas.is_free(tail.clone()) {
            let mut next = self.areas.clone();
            next.insert(tail, area.further(old.end - old.start));
            self.adopt(next)?;
            return Ok(old.start);
        }
        if to == RemapTo::InPlace {
            return Err(MapError::NoRoom(bytes_of(&tail).len()));
        }
        let new = self.place(pages, Place::Anywhere, area.shows == Shows::Anonymous)?;
        self.relocate(old, new, area)
    }

    fn relocate(&mut self, old: Range<u64>, new: Range<u64>, area: Area) -> Called<u64> {
        let mut next = self.areas.clone();
        next.remove(old.clone());
        next.remove(new.clone());
        let by = if area.shows.is_shared() { 0 } else { new.start as i64 - old.start as i64 };
        next.insert(new.clone(), Area { moved: area.moved + by, ..area });
        self.adopt(next)?;
        self.zap(new.clone());
        let moved = old.start..old.start + (old.end - old.start).min(new.end - new.start);
        self.split(&moved);
        let there = |page: u64| page - old.start + new.start;
        // A huge page stays one if it can.
        let huge: Vec<u64> = self.huge.range(moved.clone()).copied().collect();
        for page in huge {
            if there(page).is_multiple_of(LEAF) {
                self.huge.remove(&page);
                self.huge.insert(there(page));
            } else {
                self.scatter(page);
            }
        }
        let entries: BTreeMap<u64, Entry> =
            moved.filter_map(|page| Some((there(page), self.entries.remove(&page)?))).collect();
        self.entries.extend(entries);
        self.zap(old);
        Ok(new.start)
    }

    /// Moves the end of the heap, given in bytes.
    pub fn brk(&mut self, end: u64) -> Called {
        let heap = self.heap.clone();
        if end < heap.start || heap.start == 0 {
            return Err(MapError::Invalid(VirtRange::new(VirtAddr(end), VirtAddr(heap.start))));
        }
        let (old, new) = (heap.end.div_ceil(PAGE_SIZE), end.div_ceil(PAGE_SIZE));
        if new > old {
            let map = NewMap {
                pages: new - old,
                prot: Prot::READ | Prot::WRITE,
                flags: VmaFlags::HEAP,
                shows: Shows::Anonymous,
                place: Place::FixedNoReplace(VirtAddr(old * PAGE_SIZE)),
            };
            self.map_large(map, false)?;
        } else if new < old {
            self.unmap(new..old)?;
        }
        self.heap.end = end;
        Ok(())
    }
}
