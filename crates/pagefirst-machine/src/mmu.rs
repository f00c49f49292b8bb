//! What one CPU caches of page tables, and what takes it away again.
//!
//! | | x86 (Intel SDM volume 3A, 4.10.4.1) | lean ([`Config::lean_flush`]) |
//! |---|---|---|
//! | a flush of pages | these pages; every inner entry of the space | these pages, their entries found not present |
//! | a flush that says that tables went | the same | inner entries of the range as well |
//! | a fault | what led to the address | nothing: the fault's handler must ([`sync_local`](pagefirst::platform::Platform::sync_local)) |
//!
//! Lean is what RISC-V lets hardware do (privileged architecture, `SFENCE.VMA`: with an address it orders leaf entries
//! alone), and AArch64 (`TLBI VALE1IS`: last level alone).

use crate::config::Config;
use crate::inner::{InnerCache, Points};
use crate::tlb::{Entry, Mapped, Rights, Tlb};
use pagefirst::arch::MAX_LEVELS;
use pagefirst::types::{PAGE_SHIFT, Pfn, VirtAddr, VirtRange};

pub(crate) struct Mmu {
    small: Tlb,
    huge: Option<Tlb>,
    pub inner: InnerCache,
    /// log2 of the small pages in a huge one.
    bits: u32,
    lean: bool,
}

impl Mmu {
    /// For tables of 2^`bits` entries.
    pub fn new(config: &Config, bits: u32, mapped: Mapped) -> Self {
        Mmu {
            small: Tlb::new(config.tlb, 0, bits, mapped),
            huge: config.huge_tlb.map(|shape| Tlb::new(shape, bits, bits, mapped)),
            inner: InnerCache::new(config.walk_cache, bits, mapped),
            bits,
            lean: config.lean_flush,
        }
    }

    /// The translation of a small page.
    #[inline]
    pub fn look_up(&mut self, tag: u64, page: u64) -> Option<(Pfn, Rights)> {
        if let Some(e) = self.small.look_up(tag, page) {
            return Some((Pfn(e.frame), e.rights));
        }
        let e = self.huge.as_mut()?.look_up(tag, page >> self.bits)?;
        Some((Pfn(e.frame).add(page as u32 & ((1 << self.bits) - 1)), e.rights))
    }

    /// Keeps the translation of a small page; of the huge page around it, when it is part of one and there is a buffer
    /// for these. (A page of 1 GiB is kept as huge ones.)
    pub fn insert(&mut self, e: Entry) {
        match &mut self.huge {
            Some(huge) if e.level > 0 => {
                let inside = e.unit as u32 & ((1 << self.bits) - 1);
                huge.insert(Entry { unit: e.unit >> self.bits, frame: e.frame - inside, ..e });
            }
            _ => self.small.insert(e),
        }
    }

    /// An access was refused: what a fault invalidates by itself.
    pub fn refused(&mut self, tag: u64, va: VirtAddr) {
        if !self.lean {
            self.drop_range(tag, VirtRange::page_of(va), MAX_LEVELS);
        }
    }

    /// What a CPU does for itself before it tries an access again.
    pub fn sync(&mut self, tag: u64, va: VirtAddr, tables: bool) {
        self.drop_range(tag, VirtRange::page_of(va), if tables { MAX_LEVELS } else { 1 });
    }

    /// A shootdown has arrived.
    pub fn flush(&mut self, tag: u64, range: VirtRange, tables: bool) {
        self.drop_range(tag, range, if tables { MAX_LEVELS } else { 1 });
        if !self.lean {
            self.inner.drop_tag(tag);
        }
    }

    /// Forgets a space.
    pub fn drop_tag(&mut self, tag: u64) {
        self.tlbs_mut().for_each(|tlb| tlb.drop_tag(tag));
        self.inner.drop_tag(tag);
    }

    fn drop_range(&mut self, tag: u64, range: VirtRange, levels: usize) {
        self.tlbs_mut().for_each(|tlb| tlb.drop_range(tag, range));
        self.inner.drop_range(tag, range, levels);
    }

    fn tlbs(&self) -> impl Iterator<Item = &Tlb> {
        std::iter::once(&self.small).chain(&self.huge)
    }

    fn tlbs_mut(&mut self) -> impl Iterator<Item = &mut Tlb> {
        std::iter::once(&mut self.small).chain(&mut self.huge)
    }

    /// The translations of a range, each with the first address of its page.
    pub fn translations(&self, tag: u64, range: VirtRange) -> impl Iterator<Item = (VirtAddr, &Entry)> {
        self.tlbs().flat_map(move |tlb| tlb.of_range(tag, range).map(|e| (tlb.address(e), e)))
    }

    /// Something of the range that was cached before `stamp`: inner entries as well if `tables`. In words.
    pub fn older_than(&self, tag: u64, range: VirtRange, tables: bool, stamp: u64) -> Option<String> {
        let stale = self.translations(tag, range).find(|(_, e)| e.stamp < stamp);
        let stale = stale.map(|(va, e)| format!("translates {va} to {:?}", Pfn(e.frame)));
        let inner = || {
            self.inner.of_tag(tag).find_map(|(span, e)| match e.to {
                Points::Table(table, _) if e.stamp < stamp && !span.intersect(range).is_empty() => {
                    Some(format!("goes from {} to table {table:?}", span.start))
                }
                _ => None,
            })
        };
        stale.or_else(|| tables.then(inner).flatten())
    }

    /// What leads to this frame, in words.
    pub fn leads_to(&self, pfn: Pfn) -> Option<String> {
        let page = self.tlbs().find_map(|tlb| tlb.to_frame(pfn).map(|e| (e.tag, tlb.address(e))));
        let page = page.map(|(tag, va)| format!("translates {va} of space {tag} to {pfn:?}"));
        let table = || self.inner.to_table(pfn);
        page.or_else(|| table().map(|(tag, va)| format!("goes from {va} of space {tag} to table {pfn:?}")))
    }
}

/// The number of the small page that an address lies in.
#[inline]
pub(crate) fn page_of(va: VirtAddr) -> u64 {
    va.0 >> PAGE_SHIFT
}
