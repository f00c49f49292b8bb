//! The library's state on one machine, and of one CPU.

use crate::file::{self, CacheNode, FileCache};
use crate::frame::{self, Bad, Frame, FrameCache, FrameFlags, Frames, Region};
use crate::limit::{self, Limit};
use crate::mem::{AnyPool, Limbo, Pool, Slab};
use crate::platform::Platform;
use crate::rmap::{Joined, Root, Space, Spot};
use crate::space::{self, TreeNode, Vma};
use crate::sync::atomic::plain;
use crate::sync::atomic::{AcqRel, Acquire, AtomicU32, AtomicU64, Relaxed};
use crate::sync::epoch::Epoch;
use crate::sync::{Bells, Spin, held};
use crate::table::{TableCache, TableRecord};
use crate::types::{NoMemory, Pfn};

/// One CPU's words and caches; the platform keeps one for each CPU, on lines of its own.
#[repr(align(128))]
pub struct Local<P: Platform> {
    pub(crate) epoch: AtomicU64,
    pub(crate) held: plain::AtomicU32,
    pub(crate) cached_frames: frame::Cached,
    pub(crate) cached_tables: frame::Cached,
    pub(crate) frames: Spin<P, FrameCache>,
    pub(crate) tables: Spin<P, TableCache>,
}

impl<P: Platform> Local<P> {
    /// An unpinned CPU with empty caches.
    pub fn new() -> Self {
        Local {
            epoch: AtomicU64::new(0),
            held: plain::AtomicU32::new(0),
            cached_frames: frame::Cached::new(0),
            cached_tables: frame::Cached::new(0),
            frames: Spin::new(FrameCache::new()),
            tables: Spin::new(TableCache::new()),
        }
    }
}

impl<P: Platform> Default for Local<P> {
    fn default() -> Self {
        Self::new()
    }
}

/// Objects of each kind freed in one step at the end of a call.
const COLLECT: usize = 64;
/// Turns of waiting for a grace period that does not come, before memory is called out.
const PATIENCE: u32 = 20_000;

/// The library's state: frames, slabs, epoch. One for a machine, embedded in the platform.
pub struct Vm<P: Platform> {
    /// The frame allocator.
    pub frames: Frames<P>,
    pub(crate) epoch: Epoch,
    pub(crate) records: Slab<P, TableRecord>,
    pub(crate) tables_in_limbo: Limbo<P, Pfn>,
    pub(crate) spaces: Pool<P, Space<P>>,
    pub(crate) roots: Pool<P, Root<P>>,
    pub(crate) joined: Pool<P, Joined<P>>,
    pub(crate) vmas: Pool<P, Vma<P>>,
    pub(crate) spots: Pool<P, Spot<P>>,
    pub(crate) nodes: Pool<P, TreeNode<P>>,
    pub(crate) files: Pool<P, FileCache<P>>,
    pub(crate) cache_nodes: Pool<P, CacheNode<P>>,
    pub(crate) bells: Bells,
    pub(crate) limits: Pool<P, Limit<P>>,
    pub(crate) limit_records: limit::Records<P>,
    /// The first of the frames to be freed that were let go of where nothing can be freed; 0 for none.
    pub(crate) aside: AtomicU32,
    /// Held while a page's file is used that might end; see `frame::with_file`.
    pub(crate) ending_files: Spin<P, ()>,
    zero: plain::AtomicU32,
    /// The huge zero page; 0 while there is none. One reference is ours.
    huge_zero: AtomicU32,
    next_id: plain::AtomicU64,
}

/// Who had a frame in which hardware reported an error ([`Vm::poison`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Poisoned {
    /// Nobody. It is never handed out.
    Free,
    /// A file. Nobody has the page mapped any more. Who wants it next has it read anew, to another frame, if it is a folio by
    /// itself that nobody has pinned, and gets SIGBUS else.
    File {
        /// It was written and is not stored: that is lost, and who wants it gets SIGBUS until the page is removed. A store of
        /// the page or a write to it that has begun may find the same only later.
        lost: bool,
    },
    /// Programs, as private memory. Nobody has the page mapped any more, and who touches it gets SIGBUS.
    Private {
        /// It is part of a huge page, which has to be split first, by each space that maps it: until
        /// [`AddressSpace::lose_poisoned`](crate::space::AddressSpace::lose_poisoned) was called for every space that is so.
        huge: bool,
    },
    /// The library itself, or it is about to become a page. It is not handed out again when it is given back; but if it becomes
    /// a page, nobody is told: call again. Or it is the page of zeros, which programs read on.
    InUse,
    /// It is no frame of the library's.
    Foreign,
}

/// What the library itself holds at one moment. After every space and file is gone and [`Vm::quiesce`] ran, all
/// but `cached_*` and the zero page's frame are zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Held {
    /// Frames owned by somebody: pages, tables, slabs, the zero page.
    pub frames: u64,
    /// Page tables, alive, reserved or in limbo; those in caches not included.
    pub tables: u64,
    /// Slab objects: spaces, what the reverse map knows of them and of VMAs, VMAs, tree nodes, files and nodes of their caches,
    /// limits.
    pub objects: u64,
    /// Frames in per-CPU caches.
    pub cached_frames: u64,
    /// Zeroed tables in per-CPU caches.
    pub cached_tables: u64,
    /// Tables and objects waiting for their grace period.
    pub in_limbo: u64,
}

impl<P: Platform> Vm<P> {
    /// A machine without memory; [`init`](Vm::init) gives it some.
    pub fn new() -> Self {
        Vm {
            frames: Frames::new(),
            epoch: Epoch::new(),
            records: Slab::new(),
            tables_in_limbo: Limbo::new(),
            spaces: Pool::new(),
            roots: Pool::new(),
            joined: Pool::new(),
            vmas: Pool::new(),
            spots: Pool::new(),
            nodes: Pool::new(),
            files: Pool::new(),
            cache_nodes: Pool::new(),
            bells: Bells::new(),
            limits: Pool::new(),
            limit_records: limit::Records::new(),
            aside: AtomicU32::new(0),
            ending_files: Spin::ranked(held::TABLE, ()),
            zero: plain::AtomicU32::new(0),
            huge_zero: AtomicU32::new(0),
            next_id: plain::AtomicU64::new(1),
        }
    }

    /// Takes memory over, once, at boot. The metadata of the regions must be zeroed.
    ///
    /// # Errors
    /// [`NoMemory`] when there is not a single frame for the zero page.
    ///
    /// # Panics
    /// When called twice, given more than 16 regions, or regions that overlap: mistakes at boot.
    pub fn init(&'static self, p: &'static P, regions: &[Region]) -> Result<(), NoMemory> {
        debug_assert!(core::ptr::eq(self, p.vm()), "the platform answers with another Vm");
        assert!(self.zero.load(Relaxed) == 0 && self.frames.total_frames() == 0, "memory is taken over once");
        self.pools().iter().for_each(|pool| pool.init(p));
        for region in regions {
            self.frames.add(p, *region);
        }
        let mut zero = Frame::new(p)?;
        zero.clear();
        p.sync_instructions(zero.pfn()); // a mapping may be executable, and read first
        self.zero.store(zero.into_held().0, Relaxed);
        Ok(())
    }

    /// The frame that every untouched page of private memory reads as.
    pub fn zero_page(&self) -> Pfn {
        Pfn(self.zero.load(Relaxed))
    }

    /// A reference to the huge zero page, which is made when it is first wanted; `None` when no huge page is free.
    /// Called unpinned, with no lock held.
    pub(crate) fn huge_zero_page(&'static self, p: &'static P) -> Option<Frame<P>> {
        let there = Pfn(self.huge_zero.load(Acquire));
        if there.0 != 0 {
            // A number that was given up meanwhile is somebody else's, if anybody's.
            let page = Frame::try_get(p, there)?;
            // One in which hardware reported an error is mapped by nobody else.
            let flags = page.meta().flags();
            return (flags & (FrameFlags::ZERO | FrameFlags::HURT) == FrameFlags::ZERO).then_some(page);
        }
        let mut page = Frame::block(p, crate::fault::huge_order::<P::Format>()).ok()?;
        page.clear();
        page.frames().for_each(|pfn| p.sync_instructions(pfn));
        page.meta().restate(FrameFlags::ZERO | FrameFlags::UP_TO_DATE, page.order());
        let ours = page.another();
        if self.huge_zero.compare_exchange(0, page.pfn().0, AcqRel, Acquire).is_ok() {
            let _ = ours.into_held();
        }
        Some(page)
    }
    /// Gives the huge zero page up if nobody maps it; returns the frames freed.
    fn drop_huge_zero(&'static self, p: &'static P) -> usize {
        // Who takes the number out has its reference: nobody else frees the page meanwhile.
        let there = Pfn(self.huge_zero.swap(0, AcqRel));
        if there.0 == 0 {
            return 0;
        }
        let page = Frame::from_held(p, there);
        if page.meta().counts().refs > 1 {
            if self.huge_zero.compare_exchange(0, there.0, AcqRel, Relaxed).is_ok() {
                let _ = page.into_held();
            }
            return 0;
        }
        // Nobody finds it any more: it goes now, or with a reference taken just before.
        1 << page.order()
    }

    /// Wakes the futures that wait for this key. Takes no lock; may be called in an interrupt.
    #[inline]
    pub fn wake(&self, p: &'static P, key: u64) {
        self.bells.ring(key, |take| {
            p.enter();
            let more = take();
            p.leave();
            more
        });
    }

    /// Hardware reported a memory error in this frame: nobody gets it any more. What it is part of goes on without it. Once
    /// it is free it is never handed out again.
    ///
    /// Called unpinned, with no lock held.
    pub fn poison(&'static self, p: &'static P, pfn: Pfn) -> Poisoned {
        match frame::mark_bad(p, pfn) {
            Bad::Free => Poisoned::Free,
            Bad::Page(page) if page.folio().meta().flags().contains(FrameFlags::ANON) => {
                let huge = page.folio().order() > 0;
                if !huge {
                    space::poison::lose(p, &page);
                }
                Poisoned::Private { huge }
            }
            Bad::Page(page) => Poisoned::File { lost: file::lose(p, &page) },
            Bad::Other => Poisoned::InUse,
            Bad::Foreign => Poisoned::Foreign,
        }
    }

    /// All pools of objects.
    fn pools(&self) -> [&dyn AnyPool<P>; 9] {
        let Vm { spaces, roots, joined, vmas, spots, nodes, files, cache_nodes, limits, .. } = self;
        [spaces, roots, joined, vmas, spots, nodes, files, cache_nodes, limits]
    }

    pub(crate) fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Relaxed)
    }

    /// Moves the epoch on if it can, and frees at most `most` objects of each kind whose grace period is over;
    /// returns how many were freed. Called after mapping calls, never inside a fault.
    pub fn collect(&'static self, p: &'static P, most: usize) -> usize {
        frame::free_aside(p);
        let now = self.epoch.advance(p);
        self.pools().iter().map(|pool| pool.collect(now, most)).sum::<usize>()
            + crate::table::collect(p, now, most)
    }

    /// The same, as long as there is much of it: at the end of calls by which much goes there. Called unpinned, with no lock
    /// held.
    pub(crate) fn collect_much(&'static self, p: &'static P) {
        while self.collect(p, COLLECT) >= COLLECT {}
    }

    /// Tables and objects waiting for their grace period.
    pub fn in_limbo(&'static self, p: &'static P) -> usize {
        self.pools().iter().map(|pool| pool.in_limbo()).sum::<usize>() + self.tables_in_limbo.len(p)
    }

    /// Waits until nothing is in limbo, then empties every cache into the frame allocator, so that "nothing left"
    /// can be shown exactly. Called unpinned.
    pub fn quiesce(&'static self, p: &'static P) {
        crate::sync::held::none(p, "quiesce");
        while self.in_limbo(p) > 0 {
            if self.collect(p, usize::MAX) == 0 {
                p.relax();
            }
        }
        self.drain(p);
    }

    /// Frees what the library holds back: limbo as far as its grace period is over, cached tables, free slabs,
    /// cached frames. Returns how many frames went back to the allocator. Done before anybody is told `NoMemory`.
    pub fn drain(&'static self, p: &'static P) -> usize {
        let aside = self.settle(p);
        let huge_zero = self.drop_huge_zero(p);
        let tables = crate::table::drain(p);
        limit::drain(p);
        let slabs = self.pools().iter().map(|pool| pool.trim()).sum::<usize>()
            + self.limit_records.trim(p)
            + self.records.trim(p);
        aside + huge_zero + tables + slabs + frame::drain(p)
    }

    /// Frees what waits for a grace period, and what was put aside; returns how many frames those were. Called unpinned,
    /// with no lock held.
    pub(crate) fn settle(&'static self, p: &'static P) -> usize {
        crate::sync::held::none(p, "drain");
        // A grace period lasts as long as the longest pinned section, which is short: wait for it, but not for ever, and not
        // for what others go on putting there.
        for _ in 0..PATIENCE {
            if self.in_limbo(p) == 0 {
                break;
            }
            if self.collect(p, usize::MAX) == 0 {
                p.relax();
            }
        }
        frame::free_aside(p)
    }

    /// A frame, draining what is held back before giving up. Called unpinned, with no lock held.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(crate) fn frame(&'static self, p: &'static P) -> Result<Frame<P>, NoMemory> {
        // Not `or_drain`: a closure would hide who wants it.
        if let Ok(frame) = Frame::new(p) {
            return Ok(frame);
        }
        self.drain(p);
        Frame::new(p)
    }

    /// Runs `take`; when memory is out, drains and runs it once more.
    pub(crate) fn or_drain<T>(
        &'static self,
        p: &'static P,
        mut take: impl FnMut() -> Result<T, NoMemory>,
    ) -> Result<T, NoMemory> {
        take().or_else(|NoMemory| {
            self.drain(p);
            take()
        })
    }

    /// What the library holds now; see [`Held`].
    pub fn held(&'static self, p: &'static P) -> Held {
        let cached_frames = frame::cached(p);
        let cached_tables = crate::table::cached(p);
        let objects = self.pools().iter().map(|pool| pool.live()).sum::<usize>();
        Held {
            // Read one after another, so they may disagree while somebody is at work.
            frames: self.frames.total_frames().saturating_sub(self.frames.free_frames() + cached_frames),
            tables: (self.records.live() as u64).saturating_sub(cached_tables),
            objects: objects as u64,
            cached_frames,
            cached_tables,
            in_limbo: self.in_limbo(p) as u64,
        }
    }
}

impl<P: Platform> Default for Vm<P> {
    fn default() -> Self {
        Self::new()
    }
}
