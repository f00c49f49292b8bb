//! Models for loom of whole calls: faults, mapping calls and removals of a file's pages as an embedder makes them, on the
//! machine and by the rules of `table::model`.
//!
//! | model | file | what it shows |
//! |---|---|---|
//! | `r01_…`, `r02_…`, `r03_…` | `touch` | two faults at one address, in one table, at a huge page and a small one: what is mapped is charged once, what a fault has in hand that loses goes back |
//! | `r06_…` | `touch` | two faults for which there is not memory enough, or the limit is reached: one maps, the other says so and leaves nothing |
//! | `r04_…` | `huge` | a fault against the discarding of a huge page: no translations of both sizes, nothing used that is free |
//! | `r05_…` | `cut` | a fault against a truncation and a hole: what is mapped afterwards is what the file has, below its end |
//! | `r07_…` | `fault` | a fault that waited for its page, against the unmapping of its mapping |
//! | `r08_…` | `around` | two faults in one window, whose pages come once each |
//! | `r09_…` | `around` | a window cut by its mapping, against a truncation: no page beyond the end |
//! | `r10_…` | `exit` | exit against who looks for pages: none is free while it can be used, and all sums are zero |
//! | `r12_…` | `copies` | copies against translations that other CPUs have of what is copied, against the exit of who shares it, and against fork; reuse against fork |
//! | `r12_…` | `pins` | a page that a pin takes out of a folio shared in part, against writes and fork: none is lost, none reaches what is shared; what is pinned is not shared |
//! | `r13_…` | `cut` | faults and reading in against truncation, growth and eviction: one page for an index, and nothing old comes back |
//! | `r13_…` | `split` | a merge of mappings against a truncation: no copy of what is beyond the end is hidden |
//! | `r14_…` | `remap` | a move against faults at both ends and a truncation: no page is lost, none is used where it was |
//! | `r15_…` | `huge` | a split against a fault: nobody takes what is split for nothing |
//! | `r15_…` | `split` | a split against a truncation, by the reverse map: no page stays mapped beyond the end, no dirty bit is lost |
//!
//! Three roles are not calls of the library as they stand, for those would be too much: fork is what it does with entries, held up
//! and flushed (`copy_to_child`), without making mappings and spaces; a truncation in one model of a move, and the look for a bad
//! page in one of exit, are a removal by the reverse map, of one page (`take_away`).
//!
//! Loops that wait for somebody by spinning end for loom because who spins yields, and sees what the other did before that did
//! the same ([`Platform::relax`]); waiting sleeps ([`Platform::wait`]). The longest models have one preemption or two, by which
//! their mistakes die in every rotation; `--deep` allows one more.

extern crate std;

mod around;
mod copies;
mod cut;
mod exit;
mod fault;
mod huge;
mod pins;
mod remap;
mod split;
mod touch;

use super::{AddressSpace, Backing, Map, Pinned, Place, VmaFlags};
use crate::arch::{Format, Tiny};
use crate::fault::{Bus, FaultError, Outcome, Segv, Ticket};
use crate::file::FileCache;
use crate::frame::Frame;
use crate::limit::{self, Limit};
use crate::mem::Shared;
use crate::platform::Platform;
use crate::policy::{HugePolicy, Policy};
use crate::rmap;
use crate::sync::atomic::Relaxed;
use crate::table::model::{KEPT, Machine, Zeros, become_cpu, pages};
use crate::table::{PageTable, Stock};
use crate::tlb::Gather;
use crate::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr, VirtRange};
use std::boxed::Box;
use std::sync::{Mutex, OnceLock, RwLock};
use std::vec::Vec;

/// What they work on.
#[derive(Default)]
pub(crate) struct Whole {
    space: OnceLock<&'static AddressSpace<Machine>>,
    file: RwLock<Option<Shared<Machine, FileCache<Machine>>>>,
    children: Mutex<Vec<AddressSpace<Machine>>>,
    /// What stays of the space when it exited, as long as somebody holds it.
    exited: Mutex<Option<Shared<Machine, rmap::Space<Machine>>>>,
    /// What a fault was told to wait for.
    ticket: Mutex<Option<Ticket<'static, Machine>>>,
    /// Who pays for pages, if they are counted.
    limit: Mutex<Option<Shared<Machine, Limit<Machine>>>>,
    /// What somebody refers to all the time.
    held: Mutex<Option<Frame<Machine>>>,
    /// What a device works on.
    pinned: Mutex<Option<Pinned<Machine>>>,
}

impl Whole {
    pub(crate) fn is_limited(&self) -> bool {
        self.limit.lock().unwrap().is_some()
    }
}

/// The address of a page, by its number.
const fn at(page: u64) -> VirtAddr {
    VirtAddr(page * PAGE_SIZE)
}

/// Small pages in a huge one.
const HUGE: usize = Tiny::ENTRIES;

/// What a fault came to.
const MAPPED: u64 = 1;
const SPURIOUS: u64 = 2;
const BLOCKED: u64 = 3;
const NOT_MAPPED: u64 = 4;
const BEYOND_END: u64 = 5;
const NO_MEMORY: u64 = 6;
const OVER_LIMIT: u64 = 7;

fn said(outcome: &Outcome<'_, Machine>) -> u64 {
    match outcome {
        Outcome::Mapped { .. } => MAPPED,
        Outcome::Spurious => SPURIOUS,
        Outcome::Blocked(_) => BLOCKED,
        Outcome::Error(FaultError::Segv(Segv::NotMapped)) => NOT_MAPPED,
        Outcome::Error(FaultError::Bus(Bus::BeyondEnd)) => BEYOND_END,
        Outcome::Error(FaultError::NoMemory) => NO_MEMORY,
        Outcome::Error(FaultError::OverLimit(_)) => OVER_LIMIT,
        Outcome::Error(error) => panic!("{error:?}"),
    }
}

impl Machine {
    /// One with an empty space, whose CPUs have so many tables and frames in their caches.
    fn whole(tables: [usize; 3], frames: [usize; 3], huge: HugePolicy) -> &'static Machine {
        Machine::with_common(tables, frames, 0, huge)
    }
    /// The same with so many frames beside that are for whichever CPU comes first.
    fn with_common(
        tables: [usize; 3],
        frames: [usize; 3],
        common: usize,
        huge: HugePolicy,
    ) -> &'static Machine {
        // The root, and the zero page.
        let small = 1 + frames.iter().sum::<usize>() + common;
        let large = if huge == HugePolicy::Never { 0 } else { 2 * HUGE - 1 };
        let m = Machine::with_pages([1 + tables[0], tables[1], tables[2]], small + large);
        let mut free = (m.tables as u32..).map(Pfn);
        m.give(0, 1, &mut free);
        assert!(m.vm.init(m, &[]).is_ok());
        frames.into_iter().enumerate().for_each(|(cpu, n)| m.give(cpu, n, &mut free));
        become_cpu(0);
        for pfn in free.take(common) {
            m.held[pfn.0 as usize].change(false);
            m.vm.frames.free(m, pfn, 0);
        }
        if large > 0 {
            m.held[m.tables + small..].iter().for_each(|frame| frame.change(false));
            m.vm.frames.free(m, m.huge_page(), 2);
        }
        let policy = Policy { min_addr: at(0), huge, ..Policy::default() };
        let space = AddressSpace::new(m, policy).unwrap();
        m.stale_in.store(space.page_table().tag(), Relaxed);
        assert!(m.whole.space.set(Box::leak(Box::new(space))).is_ok());
        m
    }
    /// The frame that CPU 0 takes first when it was given one.
    fn first_frame(&self) -> Pfn {
        Pfn(self.tables as u32 + 1)
    }
    /// The only huge page, of a machine that has one.
    fn huge_page(&self) -> Pfn {
        Pfn((self.held.len() - HUGE) as u32 & !(HUGE as u32 - 1))
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
        self.open_file(pages, Zeros { is_slow, order: 0 });
    }
    fn open_file(&'static self, pages: u64, file: Zeros) {
        let file = FileCache::new(self, file, pages * PAGE_SIZE).unwrap();
        *self.whole.file.write().unwrap() = Some(file);
    }
    fn file(&self) -> Shared<Machine, FileCache<Machine>> {
        self.whole.file.read().unwrap().clone().unwrap()
    }
    /// After that: nothing of it is mapped or there. Then all ends.
    fn end_cut(&'static self) {
        assert_eq!(
            (self.mapped(), self.file().pages()),
            (Vec::new(), 0),
            "what the file has no longer is there"
        );
        self.exit();
    }
    /// Cuts the file off at its start: a role.
    fn cut(&'static self) -> u64 {
        self.file().set_size(self, 0);
        0
    }
    /// The file's page with this index, if it is in memory.
    fn page_of_file(&'static self, index: u64) -> Option<Pfn> {
        self.file().cursor(&crate::sync::epoch::Pin::new(self)).look(index).map(|found| found.pfn)
    }
    /// Somebody refers to the file's page with this index, from now until the end.
    fn refer_to_page(&'static self, index: u64) {
        let page = Frame::try_get(self, self.page_of_file(index).unwrap());
        *self.whole.held.lock().unwrap() = page;
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
        self.map_from(0, first, pages, VmaFlags::SHARED);
    }
    /// Maps pages of the file, from one on.
    fn map_from(&'static self, index: u64, first: u64, pages: u64, flags: VmaFlags) {
        let map = Map {
            place: Place::Fixed(at(first)),
            flags,
            backing: Backing::File { file: self.file(), first: index },
            ..Map::anonymous(pages * PAGE_SIZE, Prot::READ | Prot::WRITE)
        };
        assert!(self.process().map(map).is_ok());
    }
    /// Another CPU has a translation to this frame, of page 0.
    fn translate_elsewhere(&'static self, page: Pfn) {
        *self.stale.lock().unwrap() = page.0.into();
        self.stale_frame.store(page.0, Relaxed);
    }
    fn fault(&'static self, page: u64, access: Access) -> u64 {
        said(&self.process().fault(at(page), access))
    }
    /// Charges what faults bring in to a limit of so many pages. It takes two frames.
    fn limit(&'static self, above: Option<&Shared<Machine, Limit<Machine>>>, pages: u64) {
        let limit = Limit::new(self, above, pages).unwrap();
        self.process().set_limit(Some(limit.clone()));
        *self.whole.limit.lock().unwrap() = Some(limit);
    }
    /// So many pages are charged, when what CPUs have charged in advance is given back.
    fn assert_charged(&'static self, pages: u64) {
        limit::drain(self);
        let limit = self.whole.limit.lock().unwrap().clone();
        if let Some(limit) = limit {
            assert_eq!(limit.charged(), pages, "pages charged");
        }
    }
    /// Forks; the child does nothing.
    fn fork(&'static self) {
        let child = self.process().fork();
        self.whole.children.lock().unwrap().push(child.unwrap());
    }
    /// Leaves an empty space for a child of a fork.
    fn child(&'static self) {
        let empty = AddressSpace::new(self, *self.process().policy()).unwrap();
        self.whole.children.lock().unwrap().push(empty);
    }
    /// Moves the epoch on if it can, and frees what is past it.
    fn collect(&'static self) {
        (0..2).for_each(|_| _ = self.vm.collect(self, usize::MAX));
    }

    /// Takes a page of the file away, as its removal does in one go: says so, walks the ranges where it may be mapped, and
    /// looks whether anybody maps it still. If not it is as good as free, and nobody can use it.
    fn take_away(&'static self, table: &PageTable<Machine>, page: Pfn, ranges: &[VirtRange]) -> bool {
        self.meta(page).go();
        for range in ranges {
            table.zap(*range, None, &mut Stock::empty(self), &mut Gather::new(table));
        }
        let is_free = self.meta(page).maps_ordered() == 0;
        assert!(!is_free || *self.stale.lock().unwrap() == 0, "a page is free, and another CPU can use it");
        is_free
    }
    /// The pages that are mapped, and their frames. The tables are as they should be.
    fn mapped(&'static self) -> Vec<(u64, Pfn)> {
        let (found, _) = self.audit_of(self.process().page_table());
        found.iter().map(|(va, _)| va / PAGE_SIZE).map(|page| (page, self.frame_at(page).unwrap())).collect()
    }
    /// Exits, closes the file, and sees that nothing is left: no table, no frame, no object.
    fn exit(&'static self) {
        drop(self.whole.ticket.lock().unwrap().take());
        drop(self.whole.held.lock().unwrap().take());
        self.whole.children.lock().unwrap().clear();
        // SAFETY: nobody uses it any more.
        unsafe { self.drop_space() };
        self.assert_nothing_left();
    }
    /// The exit alone.
    ///
    /// # Safety
    /// Called once, and nobody uses the space any more.
    unsafe fn drop_space(&'static self) {
        *self.whole.exited.lock().unwrap() = Some(self.process().shared.clone());
        // SAFETY: leaked by `whole`; the caller's promise.
        drop(unsafe { Box::from_raw(core::ptr::from_ref(self.process()).cast_mut()) });
    }
    fn assert_nothing_left(&'static self) {
        let exited = self.whole.exited.lock().unwrap().take().unwrap();
        assert_eq!(
            self.audit_of(&exited.table),
            (Vec::new(), 1),
            "all but the root is gone, and counted off"
        );
        assert_eq!(exited.table.resident(), (0, 0));
        drop(exited);
        drop(self.whole.file.write().unwrap().take());
        self.assert_charged(0);
        let limit = self.whole.limit.lock().unwrap().take();
        drop(limit);
        while self.vm.in_limbo(self) > 0 {
            self.vm.collect(self, usize::MAX);
        }
        self.vm.limit_records.trim(self);
        let held = self.vm.held(self);
        let tables = self.watch.iter().filter(|table| table.is_owned()).count();
        let frames = self.held[self.tables..].iter().filter(|frame| frame.is_owned()).count();
        // A frame that became a table is one still, in a cache, with those that always were.
        let became = held.cached_tables as usize - (self.tables - 2);
        // The root of the machine's own space, and the zero page.
        assert_eq!((held.objects, tables, frames - became), (0, 1, 1), "something is left");
    }
}
