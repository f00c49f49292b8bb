//! What a thread does to files that are everybody's, and what must be gone when it took something out.

use super::seen::Change;
use super::worker::Worker;
use super::world::PAGES;
use pagefirst::arch::Format;
use pagefirst::space::Backing;
use pagefirst::sync::epoch::Pin;
use pagefirst::types::PAGE_SIZE;

impl<F: Format> Worker<'_, F> {
    /// Something done to a file that is everybody's.
    pub fn file_step(&mut self) {
        let (machine, which) = (self.world.machine, self.dice.below(2) as usize);
        let file = &self.world.files[which];
        let any = &self.world.files[self.dice.below(3) as usize];
        let (from, to) = (self.dice.below(PAGES), self.dice.below(PAGES));
        let kind = self.dice.below(12);
        let place = |page| page * PAGE_SIZE + 8 * self.me as u64;
        let some = self.dice.below(2) * 100;
        self.tell(|| format!("file {which}, call {kind}, pages {from} and {to}"));
        let sizes = &self.world.sizes[which];
        let change = || Change::of([&self.world.file_calls]);
        match kind {
            0..=2 => {
                let _alone = sizes.lock();
                let _change = change();
                let end = from * PAGE_SIZE + some;
                file.set_size(machine, end);
                self.require_nothing_beyond(which, end.div_ceil(PAGE_SIZE));
                if self.dice.one_in(2) {
                    file.set_size(machine, PAGES * PAGE_SIZE);
                    self.require_gone(which, place(from + (to + 1) % (PAGES - from)).max(end));
                }
            }
            3 | 4 => {
                let _change = change();
                let hole = from.min(to)..from.max(to);
                file.punch(machine, hole.start * PAGE_SIZE..hole.end * PAGE_SIZE + some);
                if !hole.is_empty() {
                    self.require_gone(which, place(hole.start));
                }
            }
            5 => drop(any.evict(machine)),
            6 => drop(any.write_back(machine)),
            7 => {
                let _alone = sizes.lock();
                let _change = change();
                drop(file.write_at(machine, place(from), &self.world.count(self.me).to_le_bytes()));
            }
            8 => file.file().fail_reads(from, some > 0),
            _ => {
                let mut bytes = [0; 8];
                if file.read_at(machine, place(from), &mut bytes).is_ok() {
                    self.world.counted(u64::from_le_bytes(bytes), self.me);
                }
            }
        }
    }
    /// Of a file that has just shrunk nothing is mapped beyond its end: not in children, in which nobody else works.
    fn require_nothing_beyond(&self, which: usize, end: u64) {
        for view in &self.views[1..] {
            let mut beyond = Vec::new();
            view.space.for_each_vma(|vma| {
                if let Backing::File { file, first } = &vma.backing
                    && file.same(&self.world.files[which])
                {
                    let pages = self.world.page(vma.range.start)..self.world.page(vma.range.end);
                    beyond.extend(pages.clone().filter(|page| page - pages.start + first >= end));
                }
            });
            for page in beyond {
                let table = view.space.page_table();
                let found = table.translate(&Pin::new(self.world.machine), self.world.at(page));
                assert!(found.is_none(), "page {page} is mapped, of file {which} beyond page {end}");
            }
        }
    }
    /// A word of its own that was taken out of a file is 0: nobody else writes it.
    fn require_gone(&self, which: usize, place: u64) {
        let mut bytes = [0; 8];
        if self.world.files[which].read_at(self.world.machine, place, &mut bytes).is_ok() {
            assert_eq!(u64::from_le_bytes(bytes), 0, "file {which} at {place:#x}: it was taken out");
        }
    }
}
