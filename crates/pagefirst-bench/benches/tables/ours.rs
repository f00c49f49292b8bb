//! pagefirst's table layer.

use crate::{BASE, FIRST, KIB4, Tables};
use pagefirst::arch::Attrs;
use pagefirst::platform::Platform;
use pagefirst::sync::epoch::Pin;
use pagefirst::table::PageTable;
use pagefirst::types::{PAGE_SHIFT, Pfn, VirtAddr, VirtRange};
use pagefirst_bench::Bench;

/// Unmapping fails only where a huge page is cut.
const NO_CUT: &str = "no huge page is cut";

/// One call for each page.
pub struct Single(PageTable<Bench>);
/// One call for all pages.
pub struct ByRange(PageTable<Bench>);

fn range(va: u64, len: u64) -> VirtRange {
    VirtRange::new(VirtAddr(va), VirtAddr(va + len))
}
fn frame(va: u64) -> Pfn {
    Pfn(FIRST + ((va - BASE) >> PAGE_SHIFT) as u32)
}
fn level(size: u64) -> u8 {
    (size > KIB4) as u8
}
fn new(platform: &'static Bench) -> PageTable<Bench> {
    PageTable::new(platform).expect("memory for the root")
}
fn map_at(table: &PageTable<Bench>, pages: &[u64]) {
    let mut mapper = table.mapper();
    for &va in pages {
        mapper.map(range(va, KIB4), frame(va), 0, Attrs::WRITE).expect("free, and memory for tables");
    }
}
fn translate(table: &PageTable<Bench>, addresses: &[u64]) -> u64 {
    let pin = Pin::new(table.platform());
    addresses.iter().map(|&va| table.translate(&pin, VirtAddr(va)).expect("mapped").pfn.phys()).sum()
}
/// Tables that died are free when their grace period is over.
fn collect(table: &PageTable<Bench>) {
    let p = table.platform();
    while p.vm().in_limbo(p) > 0 {
        p.vm().collect(p, 64);
    }
}
fn bytes(table: &PageTable<Bench>) -> u64 {
    table.table_bytes().iter().sum()
}

impl Tables for Single {
    fn new(platform: &'static Bench) -> Self {
        Single(new(platform))
    }
    fn map(&mut self, len: u64, size: u64) {
        let mut mapper = self.0.mapper();
        for va in (BASE..BASE + len).step_by(size as usize) {
            let done = mapper.map(range(va, size), frame(va), level(size), Attrs::WRITE);
            done.expect("free, and memory for tables");
        }
    }
    fn map_at(&mut self, pages: &[u64]) {
        map_at(&self.0, pages);
    }
    fn translate(&self, addresses: &[u64]) -> u64 {
        translate(&self.0, addresses)
    }
    fn unmap(&mut self, len: u64, size: u64) {
        let mut mapper = self.0.mapper();
        for va in (BASE..BASE + len).step_by(size as usize) {
            mapper.unmap(range(va, size)).expect(NO_CUT);
        }
        drop(mapper);
        collect(&self.0);
    }
    fn unmap_at(&mut self, pages: &[u64]) {
        let mut mapper = self.0.mapper();
        for &va in pages {
            mapper.unmap(range(va, KIB4)).expect(NO_CUT);
        }
        drop(mapper);
        collect(&self.0);
    }
    fn bytes(&self) -> u64 {
        bytes(&self.0)
    }
}

impl Tables for ByRange {
    fn new(platform: &'static Bench) -> Self {
        ByRange(new(platform))
    }
    fn map(&mut self, len: u64, size: u64) {
        let done = self.0.mapper().map(range(BASE, len), Pfn(FIRST), level(size), Attrs::WRITE);
        done.expect("free, and memory for tables");
    }
    fn map_at(&mut self, pages: &[u64]) {
        map_at(&self.0, pages);
    }
    fn translate(&self, addresses: &[u64]) -> u64 {
        translate(&self.0, addresses)
    }
    fn unmap(&mut self, len: u64, _: u64) {
        self.0.mapper().unmap(range(BASE, len)).expect(NO_CUT);
        collect(&self.0);
    }
    fn unmap_at(&mut self, _: &[u64]) {
        self.unmap(64 << 30, KIB4);
    }
    fn bytes(&self) -> u64 {
        bytes(&self.0)
    }
}
