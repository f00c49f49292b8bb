//! Checks of what programs that do not trust each other, or themselves, are owed: nobody sees bytes from before, and
//! no entry gives more than its mapping.

use crate::check::Found;
use crate::machine::Machine;
use crate::shadow::POISON;
use pagefirst::arch::{Attrs, Format};
use pagefirst::space::AddressSpace;
use pagefirst::types::{PAGE_SHIFT, PAGE_SIZE, Pfn, Prot, VirtAddr, VirtRange};
use std::sync::atomic::Ordering::Relaxed;

impl<F: Format> Machine<F> {
    /// A page that a program can use holds nothing of before it became that page: frames are handed out poisoned.
    pub(crate) fn is_filled(&self, pfn: Pfn, va: VirtAddr) -> Result<(), String> {
        let left = self.arena.words(pfn).iter().position(|w| w.load(Relaxed) == POISON);
        left.map_or(Ok(()), |i| {
            Err(format!("{pfn:?}, mapped at {va}, holds what was there before, at offset {:#x}", i * 8))
        })
    }

    /// An entry that hardware takes for not present names no memory.
    pub(crate) fn shows_nothing(&self, raw: u64, va: VirtAddr) -> Result<(), String> {
        let memory = u64::from(self.arena.frames()) * PAGE_SIZE;
        F::shown(raw).filter(|phys| *phys < memory).map_or(Ok(()), |phys| {
            Err(format!("entry {raw:#x} at {va} is not present and shows hardware the address {phys:#x}"))
        })
    }

    /// Every entry of a space lies in a mapping and gives no more than that mapping does; its pages are filled.
    pub(crate) fn check_entries(
        &'static self,
        space: &AddressSpace<Self>,
        found: &Found,
    ) -> Result<(), String> {
        let mut mappings = Vec::new();
        space.for_each_vma(|vma| mappings.push((vma.range, vma.prot)));
        for &(va, level, raw) in &found.entries {
            let name = format!("entry {raw:#x} of level {level} at {va}");
            let Some(first) = F::frame(raw, level) else { continue };
            let span = VirtRange::new(va, VirtAddr(va.0 + F::span(level)));
            let mapping = mappings.iter().find(|(range, _)| range.covers(span));
            let Some(&(_, prot)) = mapping else { return Err(format!("{name} lies in no mapping")) };
            let attrs = F::attrs(raw);
            let gives = |attr, right| attrs.contains(attr) && !prot.contains(right);
            if gives(Attrs::WRITE, Prot::WRITE) || gives(Attrs::EXEC, Prot::EXEC) {
                return Err(format!("{name} gives more than its mapping, {prot:?}"));
            }
            // A copy that was broken off half-way leaves an entry that the next fault makes again.
            let broken = F::BREAK_BEFORE_MAKE && attrs.contains(Attrs::NONE) && prot.contains(Prot::WRITE);
            if attrs.contains(Attrs::NONE) != prot.is_empty() && !broken {
                return Err(format!("{name} is not as present as its mapping, {prot:?}"));
            }
            if space.policy().deny_wx && attrs.contains(Attrs::WRITE | Attrs::EXEC) {
                return Err(format!("{name} can be written and executed"));
            }
            for i in 0..if self.arena.is_memory(first) { F::span(level) >> PAGE_SHIFT } else { 0 } {
                self.is_filled(first.add(i as u32), VirtAddr(va.0 + i * PAGE_SIZE))?;
            }
        }
        Ok(())
    }
}
