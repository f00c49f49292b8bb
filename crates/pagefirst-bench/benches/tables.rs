//! The table layer beside the crates `x86_64` and `page_table_multiarch`: map, translate, unmap, single and by range,
//! sequential and random, small pages and large, in one arena. The space layer is another benchmark.

#[path = "tables/ours.rs"]
mod ours;
#[path = "tables/peers.rs"]
mod peers;

use pagefirst_bench::measure::{self, Contender, Sheet};
use pagefirst_bench::{Bench, Random};

const KIB4: u64 = 4 << 10;
const MIB2: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

/// Where everything is mapped, and to which frames: those of no memory that is there.
const BASE: u64 = 1 << 39;
const FIRST: u32 = (1 << 20) + 512; // no multiple of 1 GiB, so that pages of 2 MiB are the largest that fit

/// So many random pages of 64 GiB need 31,303 tables.
const RANDOM: usize = 100_400;

/// What each contender does.
trait Tables {
    fn new(platform: &'static Bench) -> Self;
    /// Maps pages in a row.
    fn map(&mut self, len: u64, size: u64);
    /// Maps small pages anywhere.
    fn map_at(&mut self, pages: &[u64]);
    /// Translates; the sum of the frames' addresses.
    fn translate(&self, addresses: &[u64]) -> u64;
    /// Unmaps pages in a row.
    fn unmap(&mut self, len: u64, size: u64);
    /// Unmaps small pages: all that were mapped.
    fn unmap_at(&mut self, pages: &[u64]);
    /// Frees empty tables, if unmapping does not.
    fn clean_up(&mut self) {}
    /// Bytes of tables.
    fn bytes(&self) -> u64;
}

/// What all contenders are run on.
struct Stage {
    platform: &'static Bench,
    /// All pages of 1 GiB, shuffled.
    dense: Vec<u64>,
    /// Pages of 64 GiB, and the same in another order.
    sparse: Vec<u64>,
    again: Vec<u64>,
}

impl Stage {
    fn new() -> Self {
        let platform = Bench::new(288 << 20);
        peers::take_memory(platform);
        let mut random = Random::new(1);
        let mut dense: Vec<u64> = (0..GIB / KIB4).map(|i| BASE + i * KIB4).collect();
        random.shuffle(&mut dense);
        let mut sparse: Vec<u64> = (0..RANDOM).map(|_| BASE + random.below(64 * GIB / KIB4) * KIB4).collect();
        sparse.sort_unstable();
        sparse.dedup();
        random.shuffle(&mut sparse);
        let mut again = sparse.clone();
        random.shuffle(&mut again);
        Stage { platform, dense, sparse, again }
    }
}

fn frame_of(va: u64) -> u64 {
    u64::from(FIRST) * KIB4 + (va - BASE)
}

fn round<T: Tables>(stage: &Stage, sheet: &mut Sheet) {
    let mut tables = T::new(stage.platform);
    let empty = tables.bytes();
    let pages = GIB / KIB4;
    sheet.time("map 4 KiB, sequential over 1 GiB", pages, || tables.map(GIB, KIB4));
    let sum = sheet.time("translate, random in 1 GiB", pages, || tables.translate(&stage.dense));
    assert_eq!(sum, stage.dense.iter().map(|va| frame_of(*va)).sum());
    sheet.time("unmap 4 KiB, sequential", pages, || tables.unmap(GIB, KIB4));
    sheet.note("bytes of tables left, sequential", tables.bytes() - empty);
    sheet.time("free its tables, sequential", pages, || tables.clean_up());
    assert_eq!(tables.bytes(), empty);

    let pages = stage.sparse.len() as u64;
    sheet.time("map 4 KiB, random in 64 GiB", pages, || tables.map_at(&stage.sparse));
    sheet.note("tables, random", (tables.bytes() - empty) / KIB4);
    let sum = sheet.time("translate, random in 64 GiB", pages, || tables.translate(&stage.again));
    assert_eq!(sum, stage.again.iter().map(|va| frame_of(*va)).sum());
    sheet.time("unmap 4 KiB, random", pages, || tables.unmap_at(&stage.again));
    sheet.note("bytes of tables left, random", tables.bytes() - empty);
    sheet.time("free its tables, random", pages, || tables.clean_up());
    assert_eq!(tables.bytes(), empty);

    let pages = 64 * GIB / MIB2;
    sheet.time("map 2 MiB, sequential over 64 GiB", pages, || tables.map(64 * GIB, MIB2));
    sheet.time("unmap 2 MiB, sequential", pages, || tables.unmap(64 * GIB, MIB2));
    sheet.note("bytes of tables left, 2 MiB", tables.bytes() - empty);
    tables.clean_up();
    assert_eq!(tables.bytes(), empty);
}

fn main() {
    let stage = Stage::new();
    let contenders: [Contender<'_, Stage>; 5] = [
        ("x86_64", round::<peers::Mapper>),
        ("page_table_multiarch", round::<peers::Multiarch>),
        ("its map_region", round::<peers::Regions>),
        ("pagefirst, single", round::<ours::Single>),
        ("pagefirst, by range", round::<ours::ByRange>),
    ];
    measure::compare("Page tables", 15, &stage, &contenders);
}
