//! Doors for tests, through which the machine's state is broken so that its checks can be seen to notice.

use crate::machine::Machine;
use pagefirst::arch::Format;
use pagefirst::frame::FrameFlags;
use pagefirst::types::{Pfn, VirtAddr};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicU32, AtomicU64};

impl<F: Format> Machine<F> {
    /// The tables on the way from `root` to `va`, the lowest last, as the walker would find them.
    #[doc(hidden)]
    pub fn hook_path(&self, root: Pfn, va: VirtAddr) -> Vec<Pfn> {
        let mut path = vec![root];
        let mut level = F::LEVELS - 1;
        let mut table = root;
        while let Some(child) = F::child(self.hook_entry(table, level, va).load(Acquire), level) {
            (table, level) = (child, level - 1);
            path.push(table);
        }
        path
    }

    /// The entry for `va` in the table of `level`.
    #[doc(hidden)]
    pub fn hook_entry(&self, table: Pfn, level: u8, va: VirtAddr) -> &AtomicU64 {
        &self.arena.words(table)[F::index(va, level)]
    }

    /// Makes a table's record say that it is alive, unlocked and has no entry.
    #[doc(hidden)]
    pub fn hook_empty_record(&self, table: Pfn) {
        let record = self.record_of(table).map(std::ptr::from_ref);
        // SAFETY: `record_of` answers with a record in the arena; `TableRecord` is `repr(C)` and its first word is
        // the atomic one that says all this.
        let word = record.map(|r| unsafe { &*r.cast::<AtomicU64>() });
        word.expect("a table").store(0, Relaxed);
    }

    /// Makes a frame's counts of references and mappings stand at what the library lets them reach.
    #[doc(hidden)]
    pub fn hook_counts(&self, pfn: Pfn, refs: u32, maps: u32) {
        let meta = std::ptr::from_ref(self.arena.meta(pfn)).cast::<AtomicU64>();
        // SAFETY: `FrameMeta` is `repr(C)`, and its first word is the atomic one that holds both.
        unsafe { &*meta }.store(u64::from(maps) << 32 | u64::from(refs), Relaxed);
    }

    /// Interrupts the library at whatever it notes, with the locks it holds there.
    #[doc(hidden)]
    pub fn hook_interrupt(&self, interrupt: impl Fn() + Send + Sync + 'static) {
        assert!(self.interrupt.set(Box::new(interrupt)).is_ok(), "one for a machine");
    }

    /// Sets flags of a frame by hand.
    #[doc(hidden)]
    pub fn hook_set_flags(&self, pfn: Pfn, on: FrameFlags) {
        let words = std::ptr::from_ref(self.arena.meta(pfn)).cast::<AtomicU32>();
        // SAFETY: `FrameMeta` is `repr(C)`, 32 bytes of atomics: counts, owner and index of 8 bytes each, then the flags.
        unsafe { &*words.add(6) }.fetch_or(on.bits(), AcqRel);
    }

    /// Forgets every translation, as a CPU may at any time.
    #[doc(hidden)]
    pub fn hook_flush_all(&self, tag: u64) {
        self.cpus.iter().for_each(|cpu| cpu.mmu.lock().drop_tag(tag));
    }
}
