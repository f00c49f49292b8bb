//! A look at all that is in the tables, past the library.

use super::model::{File, Mapped, Shows, WORDS};
use super::world::{World, frame};
use crate::oracle::kit::{check, entry};
use pagefirst::arch::{Attrs, Format};
use pagefirst::platform::Platform;
use pagefirst::types::{PAGE_SIZE, Pfn, Prot};
use std::sync::atomic::Ordering::Acquire;

impl<F: Format> World<F> {
    /// What is in the tables is what should be; of what is not, the next access will tell.
    pub fn look(&self) {
        for (n, (real, model)) in self.real.spaces.iter().enumerate() {
            let found = check(real);
            for (va, level, raw) in found.entries {
                let first = va.0 / PAGE_SIZE;
                let all = F::frame(raw, level).is_none()
                    || (first..first + F::pages(level)).all(|page| model.0.contains_key(&page));
                assert!(all, "space {n}: {va} is mapped, to {raw:#x} at level {level}");
            }
            for (page, mapped) in &model.0 {
                let at = format!("space {n}, page {page:#x}, {mapped:x?}");
                let Some(pfn) = frame(real, *page) else {
                    assert!(mapped.own.is_none(), "{at}: it is gone");
                    continue;
                };
                let raw = entry(real, super::plan::address(*page)).0;
                let writable = F::attrs(raw).contains(Attrs::WRITE) && !F::attrs(raw).contains(Attrs::NONE);
                assert!(!mapped.lost, "{at}: it was lost");
                assert!(!writable || mapped.prot.contains(Prot::WRITE), "{at}: it can be written");
                self.compare(&at, mapped, pfn);
            }
        }
    }

    fn compare(&self, at: &str, mapped: &Mapped, pfn: Pfn) {
        if let (None, Shows::File { file, index, .. }) = (&mapped.own, mapped.shows) {
            let File { bad, .. } = &self.files[file];
            assert!(self.files[file].has_page(index), "{at}: it lies beyond the end");
            assert!(bad.get(&index) != Some(&true), "{at}: it is bad");
        }
        let cells = self.machine.cells(pfn);
        let found = WORDS.map(|word| cells[word as usize / 8].load(Acquire));
        let expected = mapped.page(&self.files).get();
        assert_eq!(found, expected, "{at}");
    }
}
