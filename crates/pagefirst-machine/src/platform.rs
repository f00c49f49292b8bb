//! What the library asks of a platform, answered by the machine.

use crate::check::{kernel_entry, mark_lost};
use crate::config::Mistake;
use crate::file::MachineFile;
use crate::history::Event;
use crate::lock::{SpinLock, WriterLock};
use crate::machine::Machine;
use crate::sync;
use pagefirst::arch::Format;
use pagefirst::frame::FrameMeta;
use pagefirst::limit::Limit;
use pagefirst::mem::Shared;
use pagefirst::platform::{Note, Platform};
use pagefirst::sync::atomic;
use pagefirst::tlb::Flush;
use pagefirst::types::{Pfn, VirtAddr, VirtRange};
use pagefirst::{Local, Vm};
use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use std::panic::Location;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU64, fence};

// SAFETY: the three promises of `Platform`:
// - `cells`, `meta`, `page` and `is_memory` answer from the arena, which is mapped as long as the machine, that is for ever, each
//   frame at one address; the machine itself reads and writes frames only as atomics;
// - `cpu` is the number this thread claimed, which no other thread has until this one ends (`cpu.rs`); threads are
//   not preempted by other users of their number, so `enter` and `leave` have nothing to do;
// - `shootdown` takes the TLB lock of every CPU named and invalidates under it; a CPU translates and accesses under
//   its TLB lock, so when the call returns no access under way uses the old translation and none later finds it.
unsafe impl<F: Format> Platform for Machine<F> {
    type Format = F;
    type File = MachineFile;
    type SpinLock = SpinLock;
    type WriterLock = WriterLock;

    #[inline]
    fn vm(&'static self) -> &'static Vm<Self> {
        &self.vm
    }
    #[inline]
    fn local(&'static self, cpu: usize) -> &'static Local<Self> {
        &self.locals[cpu]
    }
    fn cpus(&'static self) -> usize {
        self.cpus.len()
    }
    #[inline]
    fn cpu(&'static self) -> usize {
        self.this_cpu()
    }
    #[inline]
    fn cells(&'static self, pfn: Pfn) -> &'static [atomic::AtomicU64] {
        &self.arena.cells(pfn)[..F::ENTRIES]
    }
    #[inline]
    fn meta(&'static self, pfn: Pfn) -> &'static FrameMeta {
        self.arena.meta(pfn)
    }
    #[inline]
    fn page(&'static self, pfn: Pfn) -> NonNull<u8> {
        self.arena.page(pfn)
    }

    fn is_memory(&'static self, pfn: Pfn) -> bool {
        self.arena.is_memory(pfn)
    }

    fn limit(&'static self) -> Option<Shared<Self, Limit<Self>>> {
        self.limits[self.this_cpu()].lock().clone()
    }

    fn kernel_half(&'static self, root: Pfn) {
        let kernel = &self.arena.words(root)[..F::ENTRIES][F::user_entries(F::LEVELS - 1)..];
        kernel.iter().for_each(|entry| entry.store(kernel_entry::<F>(), Relaxed));
    }

    fn shootdown(&'static self, flush: &Flush<'_>) {
        let me = self.this_cpu();
        self.record(Event::Flush { tag: flush.tag, range: flush.range, tables: flush.tables });
        // A CPU that enters the space either sees the clock moved on, or is seen in the mask.
        let stamp = self.clock.fetch_add(1, SeqCst) + 1;
        fence(SeqCst);
        let mut ipis = 0;
        for (cpu, state) in self.cpus.iter().enumerate() {
            let named = flush.cpus.contains(cpu);
            if !named && self.shadow.is_none() {
                continue;
            }
            if named && cpu != me {
                ipis += 1;
                self.be_late();
            }
            let mut mmu = state.mmu.lock();
            if self.shadow.is_some() {
                let wrong = mmu.translations(flush.tag, flush.range).find_map(|(va, e)| {
                    let lost = self.is_mark_lost(va, e).then(|| mark_lost(va, e));
                    lost.or_else(|| self.is_made_before_broken(va, e))
                });
                if let Some(what) = wrong {
                    drop(mmu);
                    self.fail(&what);
                }
            }
            if named && self.config.plant != Some(Mistake::SkipCpu(cpu)) {
                mmu.flush(flush.tag, flush.range, flush.tables);
            }
            if self.shadow.is_some()
                && let Some(old) = mmu.older_than(flush.tag, flush.range, flush.tables, stamp)
            {
                drop(mmu);
                let why = if named { "named in it" } else { "not in the space's mask" };
                self.fail(&format!(
                    "after the flush of {:?} in space {} CPU {cpu}, {why}, still {old}",
                    flush.range, flush.tag
                ));
            }
        }
        self.cpus[me].counters.shootdown(ipis);
    }

    fn sync_local(&'static self, tag: u64, addr: VirtAddr, tables: bool) {
        let mut mmu = self.cpus[self.this_cpu()].mmu.lock();
        if F::BREAK_BEFORE_MAKE && self.shadow.is_some() {
            let range = VirtRange::page_of(addr);
            let mut cached = mmu.translations(tag, range);
            if let Some(what) = cached.find_map(|(va, e)| self.is_made_before_broken(va, e)) {
                drop(cached);
                drop(mmu);
                self.fail(&what);
            }
        }
        mmu.sync(tag, addr, tables);
    }

    fn sync_instructions(&'static self, pfn: Pfn) {
        if let Some(shadow) = &self.shadow {
            shadow.sync(pfn);
        }
    }

    fn refuses(&'static self, site: &'static Location<'static>) -> bool {
        self.refusals.refuses(site)
    }

    #[inline]
    fn relax(&'static self) {
        self.stop_if_failed();
        sync::relax();
    }

    fn random(&'static self) -> u64 {
        next(&self.random)
    }

    #[inline]
    fn note(&'static self, note: Note) {
        let cpu = self.this_cpu();
        self.cpus[cpu].counters.note(note);
        // In the middle of something, not at the end of a fault.
        if let Some(interrupt) = self.interrupt.get()
            && !matches!(note, Note::FaultLooked(_))
        {
            interrupt();
        }
        if let Some(shadow) = &self.shadow {
            self.history.push(cpu, Event::Note(note));
            if let Err(what) = shadow.note(&self.arena, note) {
                let whose = match note {
                    Note::FrameAllocated(pfn, _)
                    | Note::FrameFreed(pfn, _)
                    | Note::TableAllocated(pfn)
                    | Note::TableFreed(pfn)
                    | Note::TableLocked(pfn, _)
                    | Note::TableScanned(pfn, _) => self.translations_to(pfn),
                    Note::FaultLooked(_) => String::new(),
                };
                self.fail(&format!("{what}{whose}"));
            }
        }
    }
}

impl<F: Format> Machine<F> {
    /// Waits until a CPU takes an interrupt: it goes on with its own accesses meanwhile. Most take it at once.
    fn be_late(&'static self) {
        let most = self.config.late_shootdown as u64;
        if most > 0 {
            let turns = next(&self.lateness) % (8 * most);
            (0..turns).take_while(|_| turns <= most).for_each(|_| self.relax());
        }
    }
}

/// The next number of one sequence for all CPUs, by the step of SplitMix64.
fn next(state: &AtomicU64) -> u64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    SplitMix64::seed_from_u64(state.fetch_add(STEP, Relaxed)).next_u64()
}
