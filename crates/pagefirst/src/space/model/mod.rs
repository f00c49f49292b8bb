//! Models for loom of whole calls: faults, mapping calls and removals of a file's pages as an embedder makes them, on the
//! machine and by the rules of `table::model`.

extern crate std;

mod fault;
mod remap;

use super::{AddressSpace, Backing, Map, Place, VmaFlags};
use crate::fault::{Bus, FaultError, Outcome, Segv, Ticket};
use crate::file::FileCache;
use crate::frame::Frame;
use crate::mem::Shared;
use crate::platform::Platform;
use crate::policy::{HugePolicy, Policy};
use crate::table::model::{KEPT, Machine, Zeros, become_cpu};
use crate::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr};
use std::boxed::Box;
use std::sync::{Mutex, OnceLock};
use std::vec::Vec;

/// What they work on.
#[derive(Default)]
pub(crate) struct Whole {
    space: OnceLock<&'static AddressSpace<Machine>>,
    file: Mutex<Option<Shared<Machine, FileCache<Machine>>>>,
    /// What a fault was told to wait for.
    ticket: Mutex<Option<Ticket<'static, Machine>>>,
}

/// The address of a page, by its number.
const fn at(page: u64) -> VirtAddr {
    VirtAddr(page * PAGE_SIZE)
}

/// What a fault came to.
const MAPPED: u64 = 1;
const SPURIOUS: u64 = 2;
const BLOCKED: u64 = 3;
const NOT_MAPPED: u64 = 4;
const BEYOND_END: u64 = 5;

fn said(outcome: &Outcome<'_, Machine>) -> u64 {
    match outcome {
        Outcome::Mapped { .. } => MAPPED,
        Outcome::Spurious => SPURIOUS,
        Outcome::Blocked(_) => BLOCKED,
        Outcome::Error(FaultError::Segv(Segv::NotMapped)) => NOT_MAPPED,
        Outcome::Error(FaultError::Bus(Bus::BeyondEnd)) => BEYOND_END,
        Outcome::Error(error) => panic!("{error:?}"),
    }
}

impl Machine {
    /// One with an empty space, whose CPUs have so many tables and frames in their caches.
    fn whole(tables: [usize; 3], frames: [usize; 3], huge: HugePolicy) -> &'static Machine {
        // The root, and the zero page.
        let m = Machine::with_pages([1 + tables[0], tables[1], tables[2]], 1 + frames.iter().sum::<usize>());
        let mut free = (m.tables as u32..).map(Pfn);
        m.give(0, 1, &mut free);
        assert!(m.vm.init(m, &[]).is_ok());
        frames.into_iter().enumerate().for_each(|(cpu, n)| m.give(cpu, n, &mut free));
        become_cpu(0);
        let policy = Policy { min_addr: at(0), huge, ..Policy::default() };
        let space = AddressSpace::new(m, policy).unwrap();
        assert!(m.whole.space.set(Box::leak(Box::new(space))).is_ok());
        m
    }
    /// The frame that CPU 0 takes first when it was given one.
    fn first_frame(&self) -> Pfn {
        Pfn(self.tables as u32 + 1)
    }
    /// Leaves frames in a CPU's cache.
    fn give(&'static self, cpu: usize, frames: usize, free: &mut impl Iterator<Item = Pfn>) {
        become_cpu(cpu);
        for pfn in free.take(frames) {
            self.meta(pfn).adopt();
            drop(Frame::from_held(self, pfn));
        }
    }
    fn process(&self) -> &'static AddressSpace<Machine> {
        self.whole.space.get().unwrap()
    }
    /// A new file of so many pages.
    fn open(&'static self, pages: u64, is_slow: bool) {
        let file = FileCache::new(self, Zeros { is_slow }, pages * PAGE_SIZE).unwrap();
        *self.whole.file.lock().unwrap() = Some(file);
    }
    fn file(&self) -> Shared<Machine, FileCache<Machine>> {
        self.whole.file.lock().unwrap().clone().unwrap()
    }
    fn frame_at(&'static self, page: u64) -> Option<Pfn> {
        let pin = crate::sync::epoch::Pin::new(self);
        self.process().page_table().translate(&pin, at(page)).map(|there| there.pfn)
    }

    /// Maps private memory: so many pages from one on.
    fn map_private(&'static self, first: u64, pages: u64) {
        let prot = Prot::READ | Prot::WRITE;
        let map = Map { place: Place::Fixed(at(first)), ..Map::anonymous(pages * PAGE_SIZE, prot) };
        assert!(self.process().map(map).is_ok());
    }
    /// Maps pages of the file, from the first of them on, shared.
    fn map_file(&'static self, first: u64, pages: u64) {
        let map = Map {
            place: Place::Fixed(at(first)),
            flags: VmaFlags::SHARED,
            backing: Backing::File { file: self.file(), first: 0 },
            ..Map::anonymous(pages * PAGE_SIZE, Prot::READ | Prot::WRITE)
        };
        assert!(self.process().map(map).is_ok());
    }
    fn fault(&'static self, page: u64, access: Access) -> u64 {
        said(&self.process().fault(at(page), access))
    }
    /// Moves the epoch on if it can, and frees what is past it.
    fn collect(&'static self) {
        (0..2).for_each(|_| _ = self.vm.collect(self, usize::MAX));
    }

    /// The pages that are mapped, and their frames. The tables are as they should be.
    fn mapped(&'static self) -> Vec<(u64, Pfn)> {
        let (found, _) = self.audit_of(self.process().page_table());
        found.iter().map(|(va, _)| va / PAGE_SIZE).map(|page| (page, self.frame_at(page).unwrap())).collect()
    }
    /// Exits, closes the file, and sees that nothing is left: no table, no frame, no object.
    fn exit(&'static self) {
        drop(self.whole.ticket.lock().unwrap().take());
        // SAFETY: leaked by `whole`, and nobody uses it any more.
        drop(unsafe { Box::from_raw(core::ptr::from_ref(self.process()).cast_mut()) });
        drop(self.whole.file.lock().unwrap().take());
        self.assert_nothing_left();
    }
    fn assert_nothing_left(&'static self) {
        while self.vm.in_limbo(self) > 0 {
            self.vm.collect(self, usize::MAX);
        }
        let objects = self.vm.held(self).objects;
        let tables = self.watch[..self.tables].iter().filter(|table| table.is_owned()).count();
        let frames = self.held[self.tables..].iter().filter(|frame| frame.is_owned()).count();
        // The root of the machine's own space, and the zero page.
        assert_eq!((objects, tables, frames), (0, 1, 1), "something is left");
    }
}
