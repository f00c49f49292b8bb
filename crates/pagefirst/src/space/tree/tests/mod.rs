//! The tree against a `BTreeMap`, its shape against what AVL promises.

extern crate std;

use super::build::{MAX_NEW, Side, Tree, needed};
use super::{Order, STACK_GUARD, Subtree, TreeNode, TreeReserve, VmaTree};
use crate::arch::X86_64;
use crate::file::{File, FillGuard, Io, StoreGuard};
use crate::frame::{FrameMeta, Region};
use crate::mem::Shared;
use crate::platform::Platform;
use crate::space::{Backing, Vma, VmaFlags};
use crate::sync::RawLock;
use crate::sync::atomic::AtomicU64;
use crate::sync::epoch::Pin;
use crate::tlb::Flush;
use crate::types::{NoMemory, PAGE_SIZE, Pfn, Prot, VirtAddr, VirtRange};
use crate::vm::{Local, Vm};
use core::cell::{Cell, UnsafeCell};
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::boxed::Box;
use std::collections::BTreeMap;
use std::vec::Vec;

const CPUS: usize = 4;

#[repr(align(4096))]
struct Page(#[expect(dead_code, reason = "reached by address")] UnsafeCell<[u8; PAGE_SIZE as usize]>);

/// Memory, and CPUs that are threads.
struct Machine {
    vm: Vm<Machine>,
    locals: [Local<Machine>; CPUS],
    pages: Box<[Page]>,
    meta: Box<[FrameMeta]>,
}

// SAFETY: the bytes of the pages are reached through `Platform::page` alone, whose callers own them.
unsafe impl Sync for Machine {}

std::thread_local!(static CPU: Cell<usize> = const { Cell::new(0) });

#[derive(Clone, PartialEq, Eq)]
struct NoFile;
impl File for NoFile {
    fn id(&self) -> u64 {
        0
    }
    fn read(&self, _: u64, _: FillGuard<'_>) -> Io {
        Io::Error
    }
    fn write(&self, _: u64, _: StoreGuard<'_>) -> Io {
        Io::Error
    }
    fn forget(&self, _: Range<u64>) {}
    fn tracks_writes(&self) -> bool {
        false
    }
}

#[derive(Default)]
struct Lock(AtomicBool);
// SAFETY: the flag is taken by compare-exchange with Acquire and given back with Release.
unsafe impl RawLock<Machine> for Lock {
    fn lock(&self, p: &'static Machine) {
        while !self.try_lock(p) {
            p.relax();
        }
    }
    fn try_lock(&self, _: &'static Machine) -> bool {
        self.0.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }
    unsafe fn unlock(&self, _: &'static Machine) {
        self.0.store(false, Ordering::Release);
    }
}

// SAFETY: pages and metadata are leaked, never moved, one a frame; a CPU is a thread; there are no translations.
unsafe impl Platform for Machine {
    type Format = X86_64;
    type File = NoFile;
    type SpinLock = Lock;
    type WriterLock = Lock;

    fn vm(&'static self) -> &'static Vm<Self> {
        &self.vm
    }
    fn local(&'static self, cpu: usize) -> &'static Local<Self> {
        &self.locals[cpu]
    }
    fn cpus(&'static self) -> usize {
        CPUS
    }
    fn cpu(&'static self) -> usize {
        CPU.get()
    }
    fn cells(&'static self, _: Pfn) -> &'static [AtomicU64] {
        unreachable!("no tables here")
    }
    fn meta(&'static self, pfn: Pfn) -> &'static FrameMeta {
        &self.meta[pfn.0 as usize]
    }
    fn page(&'static self, pfn: Pfn) -> NonNull<u8> {
        NonNull::from(&self.pages[pfn.0 as usize]).cast()
    }
    fn shootdown(&'static self, _: &Flush<'_>) {}
    fn sync_local(&'static self, _: u64, _: VirtAddr, _: bool) {}
    fn relax(&'static self) {
        std::thread::yield_now();
    }
    fn random(&'static self) -> u64 {
        0
    }
}

fn machine(frames: u32) -> &'static Machine {
    let page = || Page(UnsafeCell::new([0; PAGE_SIZE as usize]));
    let p: &Machine = Box::leak(Box::new(Machine {
        vm: Vm::new(),
        locals: core::array::from_fn(|_| Local::new()),
        pages: (0..frames).map(|_| page()).collect(),
        meta: (0..frames).map(|_| FrameMeta::default()).collect(),
    }));
    p.vm.init(p, &[Region { first: Pfn(0), frames }]).expect("a frame for the zero page");
    p
}

/// Xorshift, after Marsaglia.
struct Random(u64);
impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

fn pages(start: u64, end: u64) -> VirtRange {
    VirtRange::new(VirtAddr(start * PAGE_SIZE), VirtAddr(end * PAGE_SIZE))
}

fn vma(p: &'static Machine, range: VirtRange, stack: bool) -> Shared<Machine, Vma<Machine>> {
    let flags = if stack { VmaFlags::GROWS_DOWN } else { VmaFlags::empty() };
    let vma = Vma::new(p.vm.new_id(), range, Prot::READ, flags, Backing::Anonymous);
    p.vm.vmas.share(vma).expect("memory for a VMA")
}

/// Checks order, balance and everything that is noted in the nodes, against what is below them.
fn check(node: Option<&TreeNode<Machine>>) -> Vec<(VirtRange, bool)> {
    let Some(n) = node else { return Vec::new() };
    let mut all = check(n.left.as_deref());
    all.push((n.vma.range, n.vma.flags.contains(VmaFlags::GROWS_DOWN)));
    all.extend(check(n.right.as_deref()));
    let height = |t: &Subtree<Machine>| t.as_ref().map_or(0, |n| n.height);
    let (l, r) = (height(&n.left), height(&n.right));
    assert!(l.abs_diff(r) <= 1);
    assert_eq!(n.height, l.max(r) + 1);
    assert_eq!(n.count as usize, all.len());
    assert_eq!((n.range, n.stack), (n.vma.range, n.vma.flags.contains(VmaFlags::GROWS_DOWN)));
    assert_eq!(n.span, VirtRange::new(all[0].0.start, all[all.len() - 1].0.end));
    assert_eq!(n.low_stack, all[0].1);
    assert!(all.windows(2).all(|w| w[0].0.end <= w[1].0.start));
    let gap = all.windows(2).map(|w| fence(w[1]).saturating_sub(w[0].0.end.0)).max();
    assert_eq!(n.gap, gap.unwrap_or(0));
    all
}

fn fence((range, stack): (VirtRange, bool)) -> u64 {
    range.start.0.saturating_sub(if stack { STACK_GUARD } else { 0 })
}

fn nothing_left(p: &'static Machine) {
    p.vm.quiesce(p);
    let held = p.vm.held(p);
    assert_eq!((held.objects, held.in_limbo, held.frames), (0, 0, 1), "the zero page is all that stays");
}

/// A tree beside the map that says what it must hold.
struct Both {
    p: &'static Machine,
    tree: VmaTree<Machine>,
    model: BTreeMap<u64, (VirtRange, bool, u64)>,
    spare: TreeReserve<Machine>,
    most: f64,
}

impl Both {
    fn new(p: &'static Machine) -> Self {
        Both { p, tree: VmaTree::new(), model: BTreeMap::new(), spare: TreeReserve::new(), most: 0.0 }
    }
    fn overlapping(&self, range: VirtRange) -> Vec<(VirtRange, bool, u64)> {
        self.model.values().filter(|v| v.0.overlaps(range)).copied().collect()
    }
    fn replace(&mut self, range: VirtRange, new: &[(VirtRange, bool)]) {
        let (height, limit) = (self.tree.height(), needed(self.tree.height(), new.len()));
        self.spare.refill(self.p, &self.tree, new.len()).expect("memory for nodes");
        let before = self.spare.len();
        let mut new: Vec<_> = new.iter().map(|&(range, stack)| Some(vma(self.p, range, stack))).collect();
        for old in self.overlapping(range) {
            self.model.remove(&old.0.start.0);
        }
        for v in new.iter().flatten() {
            self.model.insert(v.range.start.0, (v.range, v.flags.contains(VmaFlags::GROWS_DOWN), v.id));
        }
        self.tree.replace(range, &mut new, &mut self.spare);
        let used = before - self.spare.len();
        assert!(used <= limit, "{used} nodes for a change to a tree of height {height}");
        self.most = self.most.max(used as f64 / (height + 1) as f64);
    }
    fn check_shape(&self) {
        let all: Vec<_> = self.model.values().map(|v| (v.0, v.1)).collect();
        assert_eq!(check(self.tree.root.get()), all);
        assert_eq!(self.tree.len(), all.len());
    }
    fn check_queries(&self, at: VirtAddr, range: VirtRange) {
        let model = || self.model.values();
        let id = |v: Option<&(VirtRange, bool, u64)>| v.map(|v| v.2);
        {
            let pin = Pin::new(self.p);
            let found = self.tree.find(&pin, at).map(|v| v.id);
            assert_eq!(found, id(model().find(|v| v.0.contains(at))));
            let next = self.tree.find_next(&pin, at).map(|v| v.id);
            assert_eq!(next, id(model().find(|v| v.0.end > at)));
        }
        assert_eq!(self.tree.before(at).map(|v| v.id), id(model().rfind(|v| v.0.start < at)));
        assert_eq!(self.tree.after(at).map(|v| v.id), id(model().find(|v| v.0.start >= at)));
        let over: Vec<_> = self.overlapping(range).iter().map(|v| v.2).collect();
        assert_eq!(self.tree.overlapping(range).map(|v| v.id).collect::<Vec<_>>(), over);
        assert_eq!(self.tree.overlaps(range), !over.is_empty());
        assert_eq!(self.tree.is_free(range), self.is_free(range));
    }
    fn is_free(&self, range: VirtRange) -> bool {
        let above = self.model.values().find(|v| v.0.start >= range.start);
        self.overlapping(range).is_empty() && above.is_none_or(|v| fence((v.0, v.1)) >= range.end.0)
    }
    /// Tries every gap of the map.
    fn gap(&self, len: u64, align: u64, within: VirtRange, order: Order) -> Option<VirtAddr> {
        let starts = core::iter::once(0).chain(self.model.values().map(|v| v.0.end.0));
        let ends = self.model.values().map(|v| fence((v.0, v.1))).chain([u64::MAX]);
        let fits = starts.zip(ends).filter_map(|(start, end)| {
            let (start, end) = (start.max(within.start.0), end.min(within.end.0));
            let (first, last) = (start.div_ceil(align), end.checked_sub(len)? / align);
            let best = if order == Order::BottomUp { first } else { last };
            (first <= last).then_some(VirtAddr(best * align))
        });
        if order == Order::BottomUp { fits.min() } else { fits.max() }
    }
    /// Tries every aligned address.
    fn slow_gap(&self, len: u64, align: u64, within: VirtRange, order: Order) -> Option<VirtAddr> {
        let fits = |at: &u64| {
            let range = VirtRange::sized(VirtAddr(*at), len);
            range.is_some_and(|r| within.covers(r) && self.is_free(r))
        };
        let mut all = (within.start.0.div_ceil(align)..=within.end.0 / align).map(|i| i * align);
        let found = if order == Order::BottomUp { all.find(fits) } else { all.rfind(fits) };
        found.map(VirtAddr)
    }
    fn check_gap(&self, len: u64, align: u64, within: VirtRange) {
        for order in [Order::TopDown, Order::BottomUp] {
            let found = self.tree.gap(len, align, within, order);
            assert_eq!(
                found,
                self.gap(len, align, within, order),
                "{len:#x} {align:#x} {within:?} {order:?}"
            );
            if within.pages() < 100 && self.model.len() < 100 {
                assert_eq!(found, self.slow_gap(len, align, within, order));
            }
        }
    }
}

/// What a mapping call might do at `range`: the pieces that stay at its edges, and some within.
fn pieces(both: &Both, r: &mut Random, range: VirtRange) -> Vec<(VirtRange, bool)> {
    let old = both.overlapping(range);
    let mut new = Vec::new();
    if let Some(first) = old.first().filter(|v| v.0.start < range.start) {
        new.push((VirtRange::new(first.0.start, range.start), first.1));
    }
    let (start, end) = (range.start.0 / PAGE_SIZE, range.end.0 / PAGE_SIZE);
    match r.below(6) {
        0 | 1 => {}
        2 if end - start >= 2 => {
            let cut = start + 1 + r.below(end - start - 1);
            new.push((pages(start, cut), r.below(8) == 0));
            new.push((pages(cut + r.below(end - cut), end), r.below(8) == 0));
        }
        _ => new.push((range, r.below(16) == 0)),
    }
    if let Some(last) = old.last().filter(|v| v.0.end > range.end) {
        new.push((VirtRange::new(range.end, last.0.end), last.1));
    }
    new
}

#[test]
fn random_changes_agree_with_a_map() {
    let (steps, frames) = if cfg!(miri) { (60, 128) } else { (3000, 4096) };
    for (seed, size, longest) in [(1, 2000, 60), (2, 9000, 8), (3, 300, 40), (4, 40_000, 3), (5, 3000, 700)] {
        let p = machine(frames);
        let mut both = Both::new(p);
        let mut r = Random(0x9e37_79b9_7f4a_7c15 + seed);
        for step in 0..steps {
            let start = r.below(size);
            let len = if r.below(50) == 0 { size / 4 } else { 1 + r.below(longest) };
            let range = pages(start, (start + len).min(size));
            if !range.is_empty() {
                let new = pieces(&both, &mut r, range);
                both.replace(range, &new);
            }
            if step < 200 || step % 16 == 0 {
                both.check_shape();
            }
            let at = VirtAddr(r.below(size * PAGE_SIZE));
            let (a, b) = (r.below(size), r.below(size));
            let wide = pages(a.min(b), a.max(b) + 1);
            both.check_queries(at, wide);
            both.check_queries(at, pages(a, a + 1 + r.below(4)));
            let len = (1 + r.below(longest * 2)) * PAGE_SIZE;
            for (within, align) in
                [(pages(0, size), 1), (wide, 1), (wide, 1 << r.below(10)), (pages(a, a + 99), 2)]
            {
                both.check_gap(len, align * PAGE_SIZE, within);
            }
            if step % 8 == 0 {
                p.vm.collect(p, 1000);
            }
        }
        std::println!("seed {seed}: {} VMAs, at most {:.2} nodes a level", both.model.len(), both.most);
        drop(both);
        nothing_left(p);
    }
}

#[test]
fn gaps_at_the_ends_of_the_address_space() {
    let p = machine(64);
    let mut both = Both::new(p);
    let all = VirtRange::new(VirtAddr(0), VirtAddr(u64::MAX));
    assert_eq!(both.tree.gap(PAGE_SIZE, PAGE_SIZE, all, Order::BottomUp), Some(VirtAddr(0)));
    assert_eq!(
        both.tree.gap(PAGE_SIZE, PAGE_SIZE, all, Order::TopDown),
        Some(VirtAddr(u64::MAX - PAGE_SIZE).page())
    );
    assert_eq!(both.tree.gap(u64::MAX, 1, all, Order::TopDown), Some(VirtAddr(0)));
    assert_eq!(both.tree.gap(u64::MAX, 1, pages(0, 9), Order::TopDown), None);
    assert_eq!(both.tree.gap(0, 1, all, Order::TopDown), None);
    assert_eq!(
        both.tree.gap(1, 1 << 63, VirtRange::new(VirtAddr(1 << 63 | 1), all.end), Order::BottomUp),
        None
    );
    // A stack whose guard would reach below address 0.
    both.replace(pages(10, 20), &[(pages(10, 20), true)]);
    both.check_gap(PAGE_SIZE, PAGE_SIZE, pages(0, 40));
    assert!(!both.tree.is_free(pages(0, 1)) && both.tree.is_free(pages(20, 21)));
    // A mapping put into the guard by force ends it.
    both.replace(pages(5, 6), &[(pages(5, 6), false)]);
    both.check_gap(PAGE_SIZE, PAGE_SIZE, pages(0, 40));
    assert!(both.tree.is_free(pages(4, 5)) && !both.tree.is_free(pages(6, 7)));
    both.check_shape();
    drop(both);
    nothing_left(p);
}

#[test]
fn a_fork_is_a_tree_of_its_own() {
    let p = machine(256);
    let mut both = Both::new(p);
    (0..100).for_each(|i| both.replace(pages(2 * i, 2 * i + 1), &[(pages(2 * i, 2 * i + 1), false)]));
    // To change one VMA in its place copies its path and nothing else.
    for range in (0..100).map(|i| pages(2 * i, 2 * i + 1)) {
        both.spare.refill(p, &both.tree, 1).expect("memory for nodes");
        let (before, fork) = (both.spare.len(), both.tree.fork());
        fork.replace(range, &mut [Some(vma(p, range, false))], &mut both.spare);
        assert!(before - both.spare.len() <= both.tree.height());
        p.vm.collect(p, 100);
    }
    let next = both.tree.fork();
    let mut spare = next.reserve(p, 1).expect("memory for nodes");
    let new = vma(p, pages(50, 61), false);
    next.replace(pages(50, 61), &mut [Some(new.clone())], &mut spare);
    both.check_shape();
    assert_eq!((both.tree.len(), next.len()), (100, 95));
    both.tree.adopt(&next);
    assert!(both.tree.after(VirtAddr(50 * PAGE_SIZE)).is_some_and(|v| v.same(&new)));
    check(both.tree.root.get());
    drop((both, spare, new));
    nothing_left(p);
}

#[test]
fn no_memory_is_a_value() {
    let p = machine(24);
    let mut both = Both::new(p);
    both.replace(pages(0, 1), &[(pages(0, 1), false)]);
    let hoard: Vec<_> = core::iter::from_fn(|| p.vm.nodes.reserve().ok()).collect();
    assert_eq!(both.spare.refill(p, &both.tree, MAX_NEW), Err(NoMemory));
    assert_eq!(both.tree.reserve(p, MAX_NEW + 1).err(), Some(NoMemory));
    both.check_shape();
    both.spare = TreeReserve::new();
    drop(hoard);
    both.replace(pages(0, 3), &[(pages(1, 2), false)]);
    both.check_shape();
    drop(both);
    nothing_left(p);
}

/// The tree of this height with the fewest nodes; `lean` says which child of a node at a height is higher.
fn thin(
    p: &'static Machine,
    spare: &mut TreeReserve<Machine>,
    height: u32,
    next: &mut u64,
    lean: &dyn Fn(u32) -> Side,
) -> Tree<Machine> {
    if height == 0 {
        return Tree::EMPTY;
    }
    let lower = height.saturating_sub(2);
    let (l, r) = if lean(height) == Side::Low { (height - 1, lower) } else { (lower, height - 1) };
    let left = thin(p, spare, l, next, lean);
    *next += 2;
    let v = vma(p, pages(*next, *next + 1), false);
    let right = thin(p, spare, r, next, lean);
    spare.refill(p, &VmaTree::new(), 0).expect("memory for nodes");
    spare.node(Side::Low, left, v, right)
}

#[test]
fn thin_trees_stay_within_the_reserve() {
    let highest = if cfg!(miri) { 4 } else { 14 };
    for height in 1..=highest {
        let leans: [&dyn Fn(u32) -> Side; 3] =
            [&|_| Side::Low, &|_| Side::High, &|h| if h % 2 == 0 { Side::Low } else { Side::High }];
        for (which, lean) in leans.into_iter().enumerate() {
            let p = machine(1024);
            let mut spare = TreeReserve::new();
            let mut end = 0;
            let tree = thin(p, &mut spare, height, &mut end, lean);
            spare.refill(p, &VmaTree::new(), 0).expect("memory for nodes");
            let tree = VmaTree { root: crate::mem::Link::new(spare.place(tree)) };
            check(tree.root.get());
            let mut r = Random(height as u64 * 77 + which as u64);
            let exhaustive = height <= 6;
            let pairs: Vec<(u64, u64)> = if exhaustive {
                (2..end + 2).flat_map(|a| (a + 1..end + 3).map(move |b| (a, b))).collect()
            } else {
                (0..1500)
                    .map(|_| (r.below(end + 3), r.below(end + 3)))
                    .map(|(a, b)| (a.min(b), a.max(b) + 1))
                    .collect()
            };
            let mut most = [0; MAX_NEW + 1];
            for (a, b) in pairs {
                for n in 0..=MAX_NEW.min((b - a) as usize) as u64 {
                    let other = tree.fork();
                    let mut new: Vec<_> =
                        (0..n).map(|i| Some(vma(p, pages(a + i, a + i + 1), false))).collect();
                    spare.refill(p, &other, new.len()).expect("memory for nodes");
                    let before = spare.len();
                    other.replace(pages(a, b), &mut new, &mut spare);
                    most[n as usize] = most[n as usize].max(before - spare.len());
                    if exhaustive || r.below(50) == 0 {
                        check(other.root.get());
                    }
                }
                p.vm.collect(p, 4000);
            }
            for (n, used) in most.into_iter().enumerate() {
                assert!(used <= needed(height as usize, n));
            }
            std::println!(
                "height {height} lean {which}: {} VMAs, most nodes by new VMAs {most:?}",
                tree.len()
            );
            drop((tree, spare));
            nothing_left(p);
        }
    }
}

#[test]
fn readers_see_whole_versions() {
    let p = machine(1024);
    let mut both = Both::new(p);
    // Even places stay for ever; odd ones come and go.
    (0..64).for_each(|i| both.replace(pages(4 * i, 4 * i + 1), &[(pages(4 * i, 4 * i + 1), false)]));
    let (done, looked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let rounds = if cfg!(miri) { 60 } else { 20_000 };
    std::thread::scope(|s| {
        let tree = &both.tree;
        let (done, looked) = (&done, &looked);
        for cpu in 1..CPUS {
            s.spawn(move || {
                CPU.set(cpu);
                let mut r = Random(cpu as u64);
                while !done.load(Ordering::Relaxed) {
                    let pin = Pin::new(p);
                    let i = r.below(64);
                    let at = VirtAddr((4 * i + r.below(4)) * PAGE_SIZE);
                    let stays = tree.find(&pin, pages(4 * i, 4 * i + 1).start).expect("a VMA that stays");
                    assert_eq!(stays.range, pages(4 * i, 4 * i + 1));
                    assert!(tree.find(&pin, at).is_none_or(|v| v.range.contains(at)));
                    assert!(tree.find_next(&pin, at).is_none_or(|v| v.range.end > at));
                    looked.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut r = Random(99);
        let mut spare = TreeReserve::new();
        for round in 0..rounds {
            let range = pages(4 * r.below(64) + 1, 4 * 64).intersect(pages(0, 4 * 64));
            let range = VirtRange::new(range.start, VirtAddr(range.start.0 + (1 + r.below(3)) * PAGE_SIZE));
            let new = (r.below(3) > 0).then(|| {
                loop {
                    let vma =
                        Vma::new(p.vm.new_id(), range, Prot::READ, VmaFlags::empty(), Backing::Anonymous);
                    match p.vm.or_drain(p, || p.vm.vmas.reserve()) {
                        Ok(slot) => break slot.fill(vma),
                        Err(NoMemory) => p.relax(),
                    }
                }
            });
            // While a reader is pinned limbo may hold all memory.
            while spare.refill(p, tree, 1).is_err() {
                p.relax();
            }
            let mut new = [new];
            let n = new.iter().flatten().count();
            tree.replace(range, &mut new[..n], &mut spare);
            if round % 4 == 0 {
                p.vm.collect(p, 64);
            }
        }
        while looked.load(Ordering::Relaxed) < 100 {
            std::thread::yield_now();
        }
        done.store(true, Ordering::Relaxed);
    });
    check(both.tree.root.get());
    drop(both);
    nothing_left(p);
}
