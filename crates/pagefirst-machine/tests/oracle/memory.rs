//! What comes with a page of a file: its neighbours, and huge pages of memory files. Which folios these have depends on which
//! memory is free, and that the oracle does not know: it is told what is in the tables after a fault, and says whether
//! that may be, and what it comes to.

use super::files::File;
use super::model::{Entry, LEAF, Space, leaf, writable_at_once};
use pagefirst::space::VmaFlags;
use pagefirst::types::{Access, PAGE_SIZE};
use std::ops::Range;

impl Space {
    /// What a fault mapped at `page`, where nothing was, of a memory file that may have huge pages.
    pub fn map_of_memory(&mut self, files: &[File], page: u64, entry: &Entry) {
        let Some((mapping, area)) = self.areas.mapping(page) else { unreachable!("{page:#x} was reached") };
        let Some((file, first)) = area.shows.file() else { unreachable!("{area:?} shows a file") };
        let (file, span) = (&files[file], leaf(page)..leaf(page) + LEAF);
        if (self.level)(page) == Some(1) {
            let may = !area.flags.contains(VmaFlags::NO_HUGE)
                && mapping.start <= span.start
                && span.end <= mapping.end
                && (first + span.start - mapping.start).is_multiple_of(LEAF)
                && first + span.end - mapping.start <= file.pages()
                && self.entries.range(span.clone()).next().is_none();
            assert!(may, "{page:#x} is in a huge page, in {area:?} of {mapping:x?}");
            self.faults.huge += 1;
            self.huge.insert(span.start);
            self.entries.extend(span.map(|page| (page, entry.clone())));
            return;
        }
        self.entries.insert(page, entry.clone());
        let Entry::File { dirty: false, .. } = entry else { return };
        let window = self.window(page, &mapping) / PAGE_SIZE;
        let start = page / window * window;
        let around = Entry::File {
            writable: writable_at_once(&area, file),
            used: self.policy.prefault_young,
            dirty: false,
        };
        for near in start.max(mapping.start)..(start + window).min(mapping.end) {
            if !self.entries.contains_key(&near) && (self.level)(near).is_some() {
                assert!(first + near - mapping.start < file.pages(), "{near:#x} is mapped, beyond the end");
                self.entries.insert(near, around.clone());
                self.around += 1;
            }
        }
    }

    /// Marks an entry for an access, all of it if it is a huge page's; says whether it was not marked.
    pub fn mark(&mut self, page: u64, access: Access) -> bool {
        let pages =
            if self.huge.contains(&leaf(page)) { leaf(page)..leaf(page) + LEAF } else { page..page + 1 };
        let mark = |(_, entry): (_, &mut Entry)| entry.mark(access);
        self.entries.range_mut(pages).map(mark).fold(false, |some, one| some | one)
    }

    /// Whether the page is in a file's huge page. A private write takes all of that out first.
    pub fn is_huge_of_file(&self, page: u64) -> bool {
        self.huge.contains(&leaf(page)) && matches!(self.entries.get(&page), Some(Entry::File { .. }))
    }

    /// The size of the window around `page`, where nothing was until now, in bytes. One that adapts is larger beside
    /// pages that were used, smaller beside pages that were not: of the 128 KiB that the page lies in, as far as they
    /// are in its mapping.
    pub fn window(&self, page: u64, mapping: &Range<u64>) -> u64 {
        let around = self.policy.fault_around;
        let (least, most, normal) = (around.least(), around.most(), 64 << 10);
        let pages = 2 * normal / PAGE_SIZE;
        let near = page / pages * pages;
        let near = near.max(mapping.start)..(near + pages).min(mapping.end);
        let there: Vec<&Entry> =
            self.entries.range(near).filter(|(other, _)| **other != page).map(|(_, entry)| entry).collect();
        let unused = there.iter().filter(|entry| matches!(entry, Entry::File { used: false, .. })).count();
        let used = there.len() - unused;
        let size = match () {
            _ if least == most => least,
            _ if there.len() < 8 => normal,
            _ if 4 * used >= 3 * there.len() => 4 * normal,
            _ if 5 * used < there.len() => normal / 4,
            _ => normal,
        };
        size.clamp(least, most)
    }
}
