//! The peers, each used as its documentation shows, without flushes; their tables come from the same arena, off a stack
//! of frames, which costs next to nothing.

use crate::{BASE, KIB4, MIB2, Tables, frame_of};
use memory_addr::{PhysAddr, VirtAddr};
use page_table_entry::MappingFlags;
use page_table_entry::x86_64::X64PTE;
use page_table_multiarch::{PageSize, PageTable64, PagingHandler, PagingMetaData};
use pagefirst::frame::Frame;
use pagefirst_bench::Bench;
use std::cell::{Cell, RefCell};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use x86_64::structures::paging::mapper::CleanUp;
use x86_64::structures::paging::{
    FrameAllocator, FrameDeallocator, Mapper as _, OffsetPageTable, Page, PageTable, PageTableFlags,
    PhysFrame, Size2MiB, Size4KiB, Translate,
};

/// Enough for the sparse case.
const FRAMES: usize = 32 << 10;

/// Where the arena is.
static ARENA: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static FREE: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    static TAKEN: Cell<u64> = const { Cell::new(0) };
}

/// Takes memory for the peers' tables out of the library's hands, for good.
pub fn take_memory(platform: &'static Bench) {
    ARENA.store(platform.base().as_ptr() as usize, Relaxed);
    FREE.with_borrow_mut(|free| {
        for _ in 0..FRAMES {
            let frame = Frame::new(platform).expect("memory for the peers' tables");
            free.push(frame.pfn().phys());
            std::mem::forget(frame);
        }
    });
}

fn take() -> Option<u64> {
    TAKEN.set(TAKEN.get() + 1);
    FREE.with_borrow_mut(Vec::pop)
}
fn give(phys: u64) {
    TAKEN.set(TAKEN.get() - 1);
    FREE.with_borrow_mut(|free| free.push(phys));
}

struct Stack;
// SAFETY: frames that were taken from the library for good, each handed out once.
unsafe impl FrameAllocator<Size4KiB> for Stack {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        take().map(|phys| PhysFrame::containing_address(x86_64::PhysAddr::new(phys)))
    }
}
impl FrameDeallocator<Size4KiB> for Stack {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame) {
        give(frame.start_address().as_u64());
    }
}

/// `x86_64`: `OffsetPageTable`.
pub struct Mapper {
    table: OffsetPageTable<'static>,
    root: u64,
}

const FLAGS: PageTableFlags = PageTableFlags::PRESENT
    .union(PageTableFlags::WRITABLE)
    .union(PageTableFlags::USER_ACCESSIBLE)
    .union(PageTableFlags::NO_EXECUTE);

impl Mapper {
    #[inline]
    fn map_page(&mut self, va: u64) {
        let page = Page::<Size4KiB>::containing_address(x86_64::VirtAddr::new(va));
        let frame = PhysFrame::containing_address(x86_64::PhysAddr::new(frame_of(va)));
        // SAFETY: no hardware walks these tables.
        unsafe { self.table.map_to(page, frame, FLAGS, &mut Stack) }.expect("free, and memory").ignore();
    }
    #[inline]
    fn unmap_page(&mut self, va: u64) {
        let page = Page::<Size4KiB>::containing_address(x86_64::VirtAddr::new(va));
        self.table.unmap(page).expect("mapped").1.ignore();
    }
}

impl Tables for Mapper {
    fn new(platform: &'static Bench) -> Self {
        let (base, root) = (platform.base(), take().expect("memory"));
        // SAFETY: a frame inside the arena that is ours alone.
        let table = unsafe { base.add(root as usize).cast::<PageTable>().as_mut() };
        table.zero();
        // SAFETY: physical addresses are offsets into the arena.
        let table = unsafe { OffsetPageTable::new(table, x86_64::VirtAddr::new(base.as_ptr() as u64)) };
        Mapper { table, root }
    }
    fn map(&mut self, len: u64, size: u64) {
        for va in (BASE..BASE + len).step_by(size as usize) {
            if size == KIB4 {
                self.map_page(va);
                continue;
            }
            let page = Page::<Size2MiB>::containing_address(x86_64::VirtAddr::new(va));
            let frame = PhysFrame::containing_address(x86_64::PhysAddr::new(frame_of(va)));
            // SAFETY: no hardware walks these tables.
            unsafe { self.table.map_to(page, frame, FLAGS, &mut Stack) }.expect("free, and memory").ignore();
        }
    }
    fn map_at(&mut self, pages: &[u64]) {
        pages.iter().for_each(|va| self.map_page(*va));
    }
    fn translate(&self, addresses: &[u64]) -> u64 {
        let translate = |va| self.table.translate_addr(x86_64::VirtAddr::new(va)).expect("mapped").as_u64();
        addresses.iter().map(|va| translate(*va)).sum()
    }
    fn unmap(&mut self, len: u64, size: u64) {
        for va in (BASE..BASE + len).step_by(size as usize) {
            if size == KIB4 {
                self.unmap_page(va);
                continue;
            }
            let page = Page::<Size2MiB>::containing_address(x86_64::VirtAddr::new(va));
            self.table.unmap(page).expect("mapped").1.ignore();
        }
    }
    fn unmap_at(&mut self, pages: &[u64]) {
        pages.iter().for_each(|va| self.unmap_page(*va));
    }
    fn clean_up(&mut self) {
        // SAFETY: tables that are empty are used by nobody.
        unsafe { self.table.clean_up(&mut Stack) };
    }
    fn bytes(&self) -> u64 {
        TAKEN.get() * KIB4
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        give(self.root);
    }
}

/// x86-64 tables that no hardware walks: there is nothing to flush.
pub struct Meta;
impl PagingMetaData for Meta {
    const LEVELS: usize = 4;
    const PA_MAX_BITS: usize = 52;
    const VA_MAX_BITS: usize = 48;
    type VirtAddr = VirtAddr;
    fn flush_tlb(_: Option<VirtAddr>) {}
}
impl PagingHandler for Meta {
    fn alloc_frames(num: usize, _: usize) -> Option<PhysAddr> {
        assert_eq!(num, 1);
        take().map(|phys| PhysAddr::from_usize(phys as usize))
    }
    fn dealloc_frames(at: PhysAddr, _: usize) {
        give(at.as_usize() as u64);
    }
    #[inline]
    fn phys_to_virt(at: PhysAddr) -> VirtAddr {
        VirtAddr::from_usize(ARENA.load(Relaxed) + at.as_usize())
    }
}
type Table = PageTable64<Meta, X64PTE, Meta>;

/// `page_table_multiarch`: a cursor, page by page.
pub struct Multiarch(Option<Table>);
/// The same by region.
pub struct Regions(Multiarch);

const ALLOWED: MappingFlags = MappingFlags::READ.union(MappingFlags::WRITE).union(MappingFlags::USER);

fn size_of(size: u64) -> PageSize {
    if size == MIB2 { PageSize::Size2M } else { PageSize::Size4K }
}
fn at(va: u64) -> VirtAddr {
    VirtAddr::from_usize(va as usize)
}
fn to(va: u64) -> PhysAddr {
    PhysAddr::from_usize(frame_of(va) as usize)
}

impl Multiarch {
    fn table(&self) -> &Table {
        self.0.as_ref().expect("there but for a moment")
    }
    fn table_mut(&mut self) -> &mut Table {
        self.0.as_mut().expect("there but for a moment")
    }
}

impl Tables for Multiarch {
    fn new(_: &'static Bench) -> Self {
        Multiarch(Some(Table::try_new().expect("memory")))
    }
    fn map(&mut self, len: u64, size: u64) {
        let (mut cursor, size_class) = (self.table_mut().cursor(), size_of(size));
        for va in (BASE..BASE + len).step_by(size as usize) {
            cursor.map(at(va), to(va), size_class, ALLOWED).expect("free, and memory");
        }
    }
    fn map_at(&mut self, pages: &[u64]) {
        let mut cursor = self.table_mut().cursor();
        for &va in pages {
            cursor.map(at(va), to(va), PageSize::Size4K, ALLOWED).expect("free, and memory");
        }
    }
    fn translate(&self, addresses: &[u64]) -> u64 {
        let translate = |va| self.table().query(at(va)).expect("mapped").0.as_usize() as u64;
        addresses.iter().map(|va| translate(*va)).sum()
    }
    fn unmap(&mut self, len: u64, size: u64) {
        let mut cursor = self.table_mut().cursor();
        for va in (BASE..BASE + len).step_by(size as usize) {
            cursor.unmap(at(va)).expect("mapped");
        }
    }
    fn unmap_at(&mut self, pages: &[u64]) {
        let mut cursor = self.table_mut().cursor();
        for &va in pages {
            cursor.unmap(at(va)).expect("mapped");
        }
    }
    /// It frees tables only when it is dropped.
    fn clean_up(&mut self) {
        self.0 = None;
        self.0 = Table::try_new().ok();
    }
    fn bytes(&self) -> u64 {
        TAKEN.get() * KIB4
    }
}

impl Tables for Regions {
    fn new(platform: &'static Bench) -> Self {
        Regions(Multiarch::new(platform))
    }
    fn map(&mut self, len: u64, size: u64) {
        let frame = |va: VirtAddr| to(va.as_usize() as u64);
        let mut cursor = self.0.table_mut().cursor();
        let done = cursor.map_region(at(BASE), frame, len as usize, ALLOWED, size > KIB4);
        done.expect("free, and memory");
    }
    fn map_at(&mut self, pages: &[u64]) {
        self.0.map_at(pages);
    }
    fn translate(&self, addresses: &[u64]) -> u64 {
        self.0.translate(addresses)
    }
    fn unmap(&mut self, len: u64, _: u64) {
        self.0.table_mut().cursor().unmap_region(at(BASE), len as usize).expect("mapped");
    }
    fn unmap_at(&mut self, pages: &[u64]) {
        self.0.unmap_at(pages);
    }
    fn clean_up(&mut self) {
        self.0.clean_up();
    }
    fn bytes(&self) -> u64 {
        self.0.bytes()
    }
}
