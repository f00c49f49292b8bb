//! Compares what the library holds with what the oracle says it should.

use super::calls::bytes_of;
use super::case::Case;
use super::kit::{check, entry};
use super::model::{Entry, LEAF, leaf};
use super::plan::{Setting, Step};
use pagefirst::account::{Account, Faults};
use pagefirst::arch::{Attrs, Format};
use pagefirst::file::ShmemHuge;
use pagefirst::platform::Platform;
use pagefirst::space::Backing;
use pagefirst::types::{PAGE_SIZE, Prot, VirtAddr};
use std::sync::atomic::Ordering::Acquire;

impl<F: Format> Case<F> {
    /// What the library says of a space, and what it should.
    pub fn compare(&self, step: &Step, n: usize) {
        let (real, model) = (&self.real.spaces[step.space], &self.spaces[step.space]);
        let found = real.account();
        let (anon_bytes, huge_bytes, file_bytes, huge_file_bytes) = model.resident();
        let table_bytes = model.table_bytes();
        let mut faults = model.faults;
        let Setting { hardware, late, .. } = self.setting;
        if hardware.cpus > 1 || hardware.is_harsh {
            // A CPU may know less than the entry allows, and fault for nothing.
            assert!(found.faults.spurious >= faults.spurious, "step {n}, {step:?}");
            faults = Faults { spurious: found.faults.spurious, ..faults };
        }
        if late {
            // A fault that reads waits once or twice, by chance.
            faults = Faults { blocked: found.faults.blocked, ..faults };
        }
        if self.setting.shmem != ShmemHuge::Never {
            // A folio may be smaller than was asked for.
            assert!(found.faults.no_huge >= faults.no_huge, "step {n}, {step:?}");
            faults = Faults { no_huge: found.faults.no_huge, ..faults };
        }
        let (around, unused) = (model.around, model.never_used());
        let expected = Account {
            anon_bytes,
            huge_bytes,
            file_bytes,
            huge_file_bytes,
            table_bytes,
            faults,
            around,
            unused,
        };
        assert_eq!(found, expected, "step {n}, {step:?}");
        assert_eq!(real.heap_end().0, model.heap.end, "step {n}, {step:?}");

        let mut mappings = Vec::new();
        real.for_each_vma(|vma| {
            let shown = match &vma.backing {
                Backing::Anonymous | Backing::Physical(_) => None,
                Backing::File { file, first } => {
                    self.real.caches.iter().position(|c| c.same(file)).map(|id| (id, *first))
                }
            };
            mappings.push((vma.range, vma.prot, vma.flags, shown));
        });
        let expected: Vec<_> = model
            .areas
            .mappings()
            .into_iter()
            .map(|(range, area)| (bytes_of(&range), area.prot, area.flags, area.shows.file()))
            .collect();
        assert_eq!(mappings, expected, "step {n}, {step:?}");
        assert_eq!(real.vma_count(), expected.len(), "step {n}, {step:?}");
    }

    /// The tables of a space hold as many entries as they should, and those that they should.
    pub fn compare_entries(&self, space: usize, words: usize) {
        let model = &self.spaces[space];
        assert_eq!(check(&self.real.spaces[space]).present, model.present(), "entries");
        self.compare_pages(space, words, true);
    }

    /// The entries that should be there, and what they map; of each page the first `words` words are compared. When
    /// others were at work (`alone` is false), a change of rights may have left write access to the next fault.
    pub fn compare_pages(&self, space: usize, words: usize, alone: bool) {
        let (real, model) = (&self.real.spaces[space], &self.spaces[space]);
        for (&page, expected) in &model.entries {
            let (raw, level) = entry(real, VirtAddr(page * PAGE_SIZE));
            let (frame, attrs) = (F::frame(raw, level), F::attrs(raw));
            let frame = frame.unwrap_or_else(|| panic!("page {page:#x} is not mapped"));
            let huge = model.huge.contains(&leaf(page));
            assert_eq!(level, huge as u8, "page {page:#x}: the level of its entry");
            let frame = frame.add(if huge { (page % LEAF) as u32 } else { 0 });
            let area = model.areas.at(page).unwrap_or_else(|| panic!("page {page:#x} is in no mapping"));
            let writable = match expected {
                Entry::Zero => false,
                Entry::File { writable, .. } => *writable,
                Entry::Own { folio, .. } => area.prot.contains(Prot::WRITE) && folio.is_exclusive(),
            };
            let used = !matches!(expected, Entry::File { used: false, .. });
            let rights = |attrs: Attrs| {
                [Attrs::WRITE, Attrs::EXEC, Attrs::NONE, Attrs::ACCESSED].map(|a| attrs.contains(a))
            };
            let writable = writable && (alone || attrs.contains(Attrs::WRITE));
            let expected_rights = [writable, area.prot.contains(Prot::EXEC), area.prot.is_empty(), used];
            assert_eq!(rights(attrs), expected_rights, "page {page:#x}: writable, executable, none, used");
            let bytes = model.bytes(&self.files, page, &area);
            let cells = &self.machine.cells(frame)[..words];
            let differs = cells
                .iter()
                .zip(bytes.chunks(8))
                .position(|(cell, bytes)| cell.load(Acquire).to_le_bytes() != *bytes);
            assert_eq!(differs, None, "page {page:#x}: this word is not as it should be");
        }
    }
}
