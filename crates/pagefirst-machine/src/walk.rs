//! The hardware walker: from an address to a frame, setting accessed and dirty bits on the way (x86).
//!
//! Intel SDM volume 3A, section 4.8: the accessed flag of every entry used is set, the dirty flag of the leaf on a
//! write, each by a locked update that finds the entry unchanged. Section 4.10.4.1: a fault is taken from a cached
//! translation that refuses the access, and invalidates it.
//!
//! It runs under the CPU's TLB lock, so a table it has found cannot be freed under it: its owner must first have
//! flushed this CPU.

use crate::history::Event;
use crate::machine::Machine;
use crate::tlb::{Entry, Rights, Tlb};
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
    /// The frame behind `addr`, from the TLB or by a walk. When refused, the TLB forgets the page.
    #[inline]
    pub(crate) fn translate(
        &'static self,
        cpu: usize,
        tlb: &mut Tlb,
        at: Context,
        addr: VirtAddr,
        access: Access,
    ) -> Result<Pfn, Refused> {
        let page = addr.0 >> PAGE_SHIFT;
        if let Some(known) = tlb.look_up(at.tag, page) {
            match access {
                Access::Read => return Ok(Pfn(known.frame)),
                Access::Write if known.rights.dirty => return Ok(Pfn(known.frame)),
                Access::Execute if known.rights.exec => return Ok(Pfn(known.frame)),
                // Allowed, but the entry is not known to be dirty: walk to mark it.
                Access::Write if known.rights.write => {}
                Access::Write | Access::Execute => {
                    tlb.drop_page(at.tag, page);
                    return Err(Refused);
                }
            }
        }
        self.miss(cpu, tlb, at, addr, access)
    }

    fn miss(
        &'static self,
        cpu: usize,
        tlb: &mut Tlb,
        at: Context,
        addr: VirtAddr,
        access: Access,
    ) -> Result<Pfn, Refused> {
        self.cpus[cpu].counters.miss();
        self.record(Event::Miss { tag: at.tag, addr, access });
        let stamp = self.clock.load(SeqCst);
        let page = addr.0 >> PAGE_SHIFT;
        match self.walk(at.root, addr, access) {
            Ok((pfn, rights)) => {
                tlb.insert(Entry { tag: at.tag, page, stamp, frame: pfn.0, rights });
                Ok(pfn)
            }
            Err(Refused) => {
                tlb.drop_page(at.tag, page);
                Err(Refused)
            }
        }
    }

    fn walk(&'static self, root: Pfn, addr: VirtAddr, access: Access) -> Result<(Pfn, Rights), Refused> {
        if !F::is_canonical(addr) {
            return Err(Refused);
        }
        'again: loop {
            let (mut table, mut level) = (root, F::LEVELS - 1);
            loop {
                self.check_table(table, level);
                let cell = &self.arena.words(table)[F::index(addr, level)];
                let raw = cell.load(Acquire);
                let attrs = F::attrs(raw);
                // Marks the entry, if it is still what was read.
                let mark = |more: Attrs| {
                    attrs.contains(more)
                        || cell
                            .compare_exchange(raw, F::with_attrs(raw, attrs | more), AcqRel, Relaxed)
                            .is_ok()
                };
                if let Some(child) = F::child(raw, level) {
                    if !mark(Attrs::ACCESSED) {
                        continue 'again;
                    }
                    (table, level) = (child, level - 1);
                    continue;
                }
                let frame = F::frame(raw, level).ok_or(Refused)?;
                let write = access == Access::Write;
                let allowed = !attrs.contains(Attrs::NONE)
                    && match access {
                        Access::Read => true,
                        Access::Write => attrs.contains(Attrs::WRITE),
                        Access::Execute => attrs.contains(Attrs::EXEC),
                    };
                if !allowed {
                    return Err(Refused);
                }
                if !mark(if write { Attrs::ACCESSED | Attrs::DIRTY } else { Attrs::ACCESSED }) {
                    continue 'again;
                }
                let inside = (addr.0 & (F::span(level) - 1)) >> PAGE_SHIFT;
                let rights = Rights {
                    write: attrs.contains(Attrs::WRITE),
                    exec: attrs.contains(Attrs::EXEC),
                    dirty: attrs.contains(Attrs::WRITE) && (write || attrs.contains(Attrs::DIRTY)),
                };
                return Ok((frame.add(inside as u32), rights));
            }
        }
    }
}
