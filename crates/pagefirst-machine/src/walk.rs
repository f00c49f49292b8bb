//! The hardware walker: from an address to a frame, setting accessed and dirty bits on the way.
//!
//! Intel SDM volume 3A, 4.8: the accessed flag of every entry used is set, the dirty flag of the leaf on a write, each
//! by a locked update that finds the entry unchanged. 4.6.1: an access is allowed if every entry on the way allows it.
//! 4.10.3: the walk starts at the lowest entry in the paging-structure cache, which keeps the rights of those above.
//! 4.10.4.1: a fault is taken from a cached translation that refuses the access, and invalidates it.
//! Without [`Config::sets_accessed`](crate::Config) the walk ends in a fault where it would set a bit of a leaf (RISC-V
//! privileged architecture, 4.3.2 "Virtual Address Translation Process", Svade; Arm ARM D8.5 without FEAT_HAFDBS).
//! Inner entries are marked where the format has a bit for it ([`Format::TABLES_MARKED`]), and restrict what lies below
//! where it has rights for them ([`Format::allows`]: R/W and U/S of x86, R, W and X of EPT, APTable and UXNTable).
//!
//! It runs under the CPU's TLB lock, so a table it has found cannot be freed under it: its owner must first have
//! flushed this CPU.

use crate::history::Event;
use crate::inner::Points;
use crate::machine::Machine;
use crate::mmu::{Mmu, page_of};
use crate::tlb::{Entry, Rights};
use pagefirst::arch::{Attrs, Format};
use pagefirst::types::{Access, PAGE_SHIFT, Pfn, VirtAddr};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};

/// What a CPU runs in: the space's tag and its root table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    pub tag: u64,
    pub root: Pfn,
}

/// The access is refused: the CPU traps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Refused;

impl<F: Format> Machine<F> {
    /// The frame behind `addr`, from the TLB or by a walk.
    #[inline]
    pub(crate) fn translate(
        &'static self,
        cpu: usize,
        mmu: &mut Mmu,
        at: Context,
        addr: VirtAddr,
        access: Access,
    ) -> Result<Pfn, Refused> {
        if let Some((pfn, rights)) = mmu.look_up(at.tag, page_of(addr)) {
            match access {
                Access::Read => return Ok(pfn),
                Access::Write if rights.dirty => return Ok(pfn),
                Access::Execute if rights.exec => return Ok(pfn),
                // Allowed, but the entry is not known to be dirty: walk to mark it.
                Access::Write if rights.write => {}
                Access::Write | Access::Execute => {
                    mmu.refused(at.tag, addr);
                    return Err(Refused);
                }
            }
        }
        self.cpus[cpu].counters.miss();
        self.record(Event::Miss { tag: at.tag, addr, access });
        match self.walk(mmu, at, addr, access) {
            Ok(entry) => {
                let pfn = Pfn(entry.frame);
                if let Some(shadow) = &self.shadow {
                    let filled = || shadow.once_filled(pfn, || self.is_filled(pfn, addr.page()));
                    self.require(shadow.is_page(pfn, "used").and_then(|()| filled()));
                }
                mmu.insert(entry);
                Ok(pfn)
            }
            Err(Refused) => {
                mmu.refused(at.tag, addr);
                Err(Refused)
            }
        }
    }

    fn walk(
        &'static self,
        mmu: &mut Mmu,
        at: Context,
        addr: VirtAddr,
        access: Access,
    ) -> Result<Entry, Refused> {
        if !F::is_canonical(addr) {
            return Err(Refused);
        }
        let (tag, stamp) = (at.tag, self.clock.load(SeqCst));
        'again: loop {
            let (mut table, mut level, mut rights) = match mmu.inner.look_up(tag, addr) {
                Some((_, Points::Nothing)) => return Err(Refused),
                Some((level, Points::Table(table, rights))) => (table, level - 1, rights),
                None => (at.root, F::LEVELS - 1, Rights { write: true, exec: true, dirty: false }),
            };
            loop {
                self.check_table(table, level);
                let cell = &self.arena.cells(table)[F::index(addr, level)];
                let raw = cell.load(Acquire);
                // Marks the entry, if it is still what was read.
                let mark = |attrs: Attrs, more: Attrs| {
                    attrs.contains(more)
                        || cell
                            .compare_exchange(raw, F::with_attrs(raw, attrs | more), AcqRel, Relaxed)
                            .is_ok()
                };
                if let Some(child) = F::child(raw, level) {
                    if self.config.sets_accessed && F::TABLES_MARKED && !mark(F::attrs(raw), Attrs::ACCESSED)
                    {
                        continue 'again;
                    }
                    let allows = F::allows(raw);
                    if allows.contains(Attrs::NONE) {
                        return Err(Refused);
                    }
                    rights.write &= allows.contains(Attrs::WRITE);
                    rights.exec &= allows.contains(Attrs::EXEC);
                    mmu.inner.insert(tag, addr, level, stamp, Points::Table(child, rights));
                    (table, level) = (child, level - 1);
                    continue;
                }
                let attrs = F::attrs(raw);
                let Some(frame) = F::frame(raw, level).filter(|_| !attrs.contains(Attrs::NONE)) else {
                    if self.config.caches_nothing {
                        mmu.inner.insert(tag, addr, level, stamp, Points::Nothing);
                    }
                    return Err(Refused);
                };
                let pages = (F::span(level) >> PAGE_SHIFT) as u32;
                if level > F::TOP_LEAF || !frame.0.is_multiple_of(pages) {
                    self.fail(&format!("{raw:#x} at {addr} is not a leaf that level {level} can have"));
                }
                rights.write &= attrs.contains(Attrs::WRITE);
                rights.exec &= attrs.contains(Attrs::EXEC);
                let write = access == Access::Write;
                if write && !rights.write || access == Access::Execute && !rights.exec {
                    return Err(Refused);
                }
                let marks = if write { Attrs::ACCESSED | Attrs::DIRTY } else { Attrs::ACCESSED };
                if !self.config.sets_accessed && !attrs.contains(marks) {
                    return Err(Refused);
                }
                if !mark(attrs, marks) {
                    continue 'again;
                }
                rights.dirty = rights.write && (write || attrs.contains(Attrs::DIRTY));
                let inside = (addr.0 & (F::span(level) - 1)) >> PAGE_SHIFT;
                return Ok(Entry {
                    tag,
                    unit: page_of(addr),
                    stamp,
                    frame: frame.add(inside as u32).0,
                    table: table.0,
                    level,
                    rights,
                });
            }
        }
    }
}
