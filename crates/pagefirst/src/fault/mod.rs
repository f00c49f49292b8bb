//! The life of a fault.
//!
//! [`AddressSpace::fault`] *looks*, pinned: it finds the VMA, checks the access, walks the tables without a lock, and
//! from what is mapped and what is in hand either finishes or says what it needs. Then it *fetches* that, unpinned
//! and unlocked: a page of the file, a huge page, memory that has to be drained from somewhere, a flush. Then it looks
//! again, with what it has in hand; nothing that was seen before is trusted. A small page that can be had at once, cleared
//! or a copy, and tables, it fetches while it looks (`docs/decisions/008`). The page comes first: tables are asked for only when there is a page
//! to put in them, and what is in hand when a fault fails goes back where it came from.
//!
//! # Every fault ends
//! A fault looks at most [`MOST_LOOKS`] times. It looks more often than it has things to fetch only if somebody else has
//! changed what is there each time: a mapping call, a removal, another fault, a flush that others made necessary since. When it
//! has looked that often it ends as [`Outcome::Spurious`], with what was in hand given back, and the access is tried again: so
//! whoever the fault is for can be interrupted between. How often it looked, the platform is told
//! ([`Note::FaultLooked`]). A look itself ends:
//!
//! | loop | why it ends |
//! |---|---|
//! | `install` | it goes down by at least one level each time; or a table was dead, which it then unlinks, and walks from the root: so again only if another CPU has published a table there and emptied it meanwhile, which is a whole fault and a whole call each time |
//! | `unshare` | twice at most: the second time a copy is in hand |
//! | a file's look-up | who takes a page out has marked it, and takes a few instructions with the lock held until it is out |
//! | reading a page in | bounded: then the fault looks again |
//! | waiting for memory (`Vm::drain`) | bounded: then memory is out |
//! | locks | held for one table, one node of an index, one list; never over a wait |
//!
//! Waiting is no part of it: it is the caller's ([`Outcome::Blocked`]). A ticket becomes ready when the one call, removal, read
//! or store it names has ended, whatever comes after. User copies, pins and populating fault again as often as what they
//! need is taken away before they get to use it, as a program's own access would.
//!
//! | file | what is there, and the access | what is mapped |
//! |---|---|---|
//! | `anon` | nothing; private memory | the zero page, or a cleared page |
//! | `huge` | nothing, no table either; private memory | the huge zero page, or a huge cleared page |
//! | `file` | nothing; a file, read or shared write | the file's page, with its neighbours (`around`) |
//! | `cow` | nothing, or a page that is not ours; a private write | a copy |
//! | `broken` | the same, where nothing may take a page's place before a flush | a copy |
//! | `direct` | nothing, or read-only; a file that is memory itself | its memory, by the largest entry that fits; a copy |
//! | `physical` | nothing; physical memory or a device | frames, by the largest entry that fits |
//! | `wp` | a page that may be written where it is | the same page, writable |
//! | here | a page whose entry allows it, not marked accessed or dirty | the same entry, marked |
//!
//! What is frequent and short is inlined into the one function that all faults go through; a file's pages with their
//! neighbours, huge pages, and what is rare are functions that are not, for there all would pay for the registers, the
//! stack and the arithmetic of each. (Measured: `docs/benchmarks.md`.)

mod anon;
mod around;
mod broken;
mod cow;
mod direct;
mod file;
mod hand;
mod huge;
mod outcome;
mod physical;
mod retry;
mod ticket;
mod wp;

pub use crate::sync::Wait;
pub(crate) use huge::{LEVEL as HUGE_LEVEL, order as huge_order};
pub use outcome::{Bus, FaultError, Outcome, Segv, Signal};
pub use ticket::Ticket;
pub(crate) use ticket::{For, page_key, removal_key, writer_key};

use crate::arch::{Attrs, Format};
use crate::file::File as _;
use crate::platform::{Note, Platform};
#[cfg(feature = "__baseline")]
use crate::policy::TablePolicy;
use crate::space::{AddressSpace, Backing, Vma, VmaFlags};
use crate::sync::atomic::Relaxed;
use crate::sync::epoch::Pin;
use crate::table::{Batch, FaultKind, Nothing, Refused, Reserve, Seen, Slot, Walk, install};
use crate::types::{Access, VirtAddr};
use hand::{Hand, Need, Why};

/// How often one fault looks at most. With nobody in its way it looks a dozen times: a stack, a page of a file, the file's
/// leave, a copy, tables, three flushes.
pub const MOST_LOOKS: u32 = 64;

/// What a look came to.
pub(crate) enum Look<'a, P: Platform> {
    /// The fault ends.
    Done(Outcome<'a, P>),
    /// Something is missing: fetch it and look again.
    Need(Need<P>),
    /// Something changed meanwhile: look again.
    Again,
}

impl<P: Platform> AddressSpace<P> {
    /// Answers a page fault at `addr`.
    ///
    /// Called from the context of a thread, with no lock and no pin held. Never sleeps: what would wait is
    /// [`Outcome::Blocked`]. Whatever happens, nothing is left behind but what the outcome says.
    pub fn fault(&self, addr: VirtAddr, access: Access) -> Outcome<'_, P> {
        let mut hand = Hand::new(self);
        self.fault_with(addr, access, &mut hand)
    }
    /// Maps what a read finds at `addr`, and if that is a page of private memory, makes it this mapping's alone: for a pin.
    /// Where it is that already, the fault is spurious. Called like `fault`.
    #[cold]
    pub(crate) fn unshare(&self, addr: VirtAddr) -> Outcome<'_, P> {
        let mut hand = Hand::new(self);
        hand.unshares = true;
        self.fault_with(addr, Access::Read, &mut hand)
    }
    #[inline]
    fn fault_with<'a>(&'a self, addr: VirtAddr, access: Access, hand: &mut Hand<'a, P>) -> Outcome<'a, P> {
        let outcome = self.answer(addr, access, hand);
        let mapped = matches!(outcome, Outcome::Mapped { .. });
        if !mapped {
            self.count(&outcome);
        }
        if (mapped || matches!(outcome, Outcome::Spurious)) && !cfg!(mutant = "fault_without_sync") {
            // What makes it spurious may be a table that another fault has published.
            self.platform().sync_local(self.page_table().tag(), addr, hand.published || !mapped);
        }
        outcome
    }

    #[cold]
    fn count(&self, outcome: &Outcome<'_, P>) {
        let count = match outcome {
            Outcome::Mapped { .. } => return,
            Outcome::Spurious => &self.failures.spurious,
            Outcome::Blocked(_) => &self.failures.blocked,
            Outcome::Error(error) => return self.failures.count(*error),
        };
        count.fetch_add(1, Relaxed);
    }

    #[inline]
    fn answer<'a>(&'a self, addr: VirtAddr, access: Access, hand: &mut Hand<'a, P>) -> Outcome<'a, P> {
        if !P::Format::is_canonical(addr) {
            return Outcome::Error(FaultError::Segv(Segv::nowhere::<P::Format>(addr)));
        }
        match self.look(addr, access, hand) {
            Look::Done(outcome) => outcome,
            look => self.look_again(addr, access, hand, look),
        }
    }

    /// Fetches what a look said was missing, and looks again, until the fault ends, or has looked often enough.
    #[cold]
    fn look_again<'a>(
        &'a self,
        addr: VirtAddr,
        access: Access,
        hand: &mut Hand<'a, P>,
        mut look: Look<'a, P>,
    ) -> Outcome<'a, P> {
        let mut looks = 1;
        let end = loop {
            match look {
                Look::Done(outcome) => break outcome,
                Look::Again => self.platform().relax(),
                Look::Need(need) => {
                    if let Err(end) = hand.fetch(self, addr, need) {
                        break end;
                    }
                }
            }
            if looks == MOST_LOOKS {
                break self.give_up(hand);
            }
            looks += 1;
            look = match hand.holds(Why::Unflushed) {
                Some(_) => self.settle(addr, access, hand),
                None => self.look(addr, access, hand),
            };
        };
        if looks > 1 {
            self.platform().note(Note::FaultLooked(looks));
        }
        end
    }

    /// The fault ends, and may come again. A copy that was to be made writable stays read-only, or its entry broken: the next
    /// fault sees to it.
    #[cold]
    fn give_up<'a>(&'a self, hand: &mut Hand<'a, P>) -> Outcome<'a, P> {
        if hand.take(Why::Unflushed).is_some() {
            // Before its end is told: what was taken out goes.
            hand.gather.flush();
            self.page_table().end_unflushed();
        }
        Outcome::Spurious
    }

    /// One look, pinned while it takes.
    #[inline(never)]
    fn look<'a>(&'a self, addr: VirtAddr, access: Access, hand: &mut Hand<'a, P>) -> Look<'a, P> {
        let pin = Pin::new(self.platform());
        Fault { space: self, pin: &pin, addr, access, hand }.look()
    }

    /// The same after the flush of a copy that is not writable yet.
    fn settle<'a>(&'a self, addr: VirtAddr, access: Access, hand: &mut Hand<'a, P>) -> Look<'a, P> {
        let pin = Pin::new(self.platform());
        let mut fault = Fault { space: self, pin: &pin, addr, access, hand };
        if P::Format::BREAK_BEFORE_MAKE { fault.make_anew() } else { fault.settle_copy() }
    }
}

/// One look at a fault, pinned.
pub(crate) struct Fault<'f, 'a, P: Platform> {
    space: &'a AddressSpace<P>,
    pin: &'f Pin<P>,
    addr: VirtAddr,
    access: Access,
    hand: &'f mut Hand<'a, P>,
}

impl<'f, 'a, P: Platform> Fault<'f, 'a, P> {
    #[inline]
    fn look(mut self) -> Look<'a, P> {
        let Some(vma) = self.space.find(self.pin, self.addr) else { return self.nowhere() };
        if vma.is_retired() {
            return self.wait_for_writer(self.space.turn());
        }
        if !vma.prot.allows(self.access) {
            return Look::error(FaultError::Segv(Segv::Access));
        }
        #[cfg(feature = "__baseline")]
        if let Some(look) = self.tables_first(vma) {
            return look;
        }
        match self.space.page_table().walk(self.pin, self.addr) {
            Walk::Nothing(slot) => self.nothing_there(vma, slot),
            Walk::Seen(slot) | Walk::Huge(slot) => self.entry_there(vma, slot),
        }
    }

    #[inline]
    fn nothing_there(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Nothing>) -> Look<'a, P> {
        let write = self.access == Access::Write;
        match &vma.backing {
            Backing::Anonymous if write => self.fresh_page(vma, slot),
            Backing::Anonymous => self.zero_page(vma, slot),
            Backing::File { file, .. } if file.file().is_direct() => self.direct_page(vma, file, slot),
            Backing::File { file, .. } if write && vma.is_private() => self.private_copy(vma, file, slot),
            Backing::File { file, .. } => self.file_page(vma, file, slot),
            Backing::Physical(physical) => self.physical(vma, *physical, slot),
        }
    }

    #[inline]
    fn entry_there(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Seen>) -> Look<'a, P> {
        let Some(page) = P::Format::frame(slot.raw(), slot.level()) else { return not_a_page(slot) };
        let attrs = P::Format::attrs(slot.raw());
        if P::Format::BREAK_BEFORE_MAKE && attrs.contains(Attrs::NONE) {
            return self.broken(vma, slot);
        }
        let write = self.access == Access::Write;
        if write && !attrs.contains(Attrs::WRITE) {
            return self.write_protected(vma, slot);
        }
        if self.hand.unshares {
            return self.make_exclusive(vma, slot, page);
        }
        // Whatever else the VMA allows, the entry allows: it was made, or changed, to the VMA's rights; but for code in a
        // file that is memory, and not cached. So hardware wants it marked, where it does not do that itself (RISC-V Svade,
        // AArch64 without FEAT_HAFDBS).
        let marks = if write { Attrs::ACCESSED | Attrs::DIRTY } else { Attrs::ACCESSED };
        if attrs.contains(marks) || cfg!(mutant = "fault_leaves_unmarked") {
            if self.access == Access::Execute && attrs.intersects(Attrs::UNCACHED | Attrs::DEVICE) {
                return Look::error(FaultError::Segv(Segv::Access));
            }
            return Look::Done(Outcome::Spurious);
        }
        self.mark(vma, slot, marks)
    }

    #[inline(never)]
    fn mark(&mut self, vma: &'f Vma<P>, slot: Slot<'f, P, Seen>, marks: Attrs) -> Look<'a, P> {
        let Ok(mut slot) = slot.lock(|| !vma.is_retired()) else { return Look::Again };
        slot.widen(marks);
        slot.tally(FaultKind::Marked);
        Look::mapped(self.hand.major, slot.level() > 0, 0)
    }

    /// No VMA: a mapping call may be about to put one here, a stack above may grow, or the address is wrong.
    #[cold]
    fn nowhere(&mut self) -> Look<'a, P> {
        let turn = self.space.turn();
        if turn % 2 == 1 {
            return self.wait_for_writer(turn);
        }
        // A call may have ended between the look and now.
        let above = self.space.find_next(self.pin, self.addr);
        if above.is_some_and(|vma| vma.range.contains(self.addr)) {
            return Look::Again;
        }
        // How near it is must be looked at again; what is too far from it keeps nobody from the lock.
        let stack = above.is_some_and(|vma| {
            let len = vma.range.end.0 - self.addr.page().0;
            vma.flags.contains(VmaFlags::GROWS_DOWN) && len <= self.space.policy().max_stack
        });
        if !stack || self.hand.grown {
            return Look::error(FaultError::Segv(Segv::NotMapped));
        }
        // Growing changes the tree, so it is done unpinned.
        Look::Need(Need::Stack)
    }

    #[cold]
    fn wait_for_writer(&self, turn: u64) -> Look<'a, P> {
        if turn.is_multiple_of(2) {
            return Look::Again;
        }
        Look::Done(Outcome::Blocked(Ticket(For::Writer(self.space.page_table(), turn))))
    }

    /// Installs what is in hand, with the tables in hand.
    fn install<B: Batch>(&mut self, slot: Slot<'f, P, Nothing>, batch: &mut B) -> Look<'a, P> {
        #[cfg(feature = "__baseline")]
        if self.space.policy().tables == TablePolicy::Linux && slot.level() > batch.level() {
            return self.tables_down_to(batch.level()).unwrap_or(Look::Again);
        }
        // With luck the tables can be had without leaving: no lock is held yet.
        let _ = self.hand.reserve.refill(slot.level().saturating_sub(batch.level()));
        let (reserve, gather) = (&mut self.hand.reserve, &mut self.hand.gather);
        match install(self.space.page_table(), self.pin, slot, batch, reserve, gather) {
            Ok(done) => {
                self.hand.published |= done.tables > 0;
                Look::mapped(self.hand.major, batch.level() > 0, done.around)
            }
            Err(Refused::Short(tables)) => Look::Need(Need::Tables(tables)),
            Err(Refused::Unflushed(taken)) => Look::Need(Need::FlushBefore(taken, batch.level())),
            // A table, or another huge page, is there by now.
            Err(Refused::Raced) if batch.level() > 0 => Look::Again,
            Err(Refused::Raced) => {
                if cfg!(mutant = "lost_race_keeps_tables") {
                    core::mem::forget(core::mem::replace(reserve, Reserve::new(self.pin.platform())));
                }
                Look::Done(Outcome::Spurious)
            }
            Err(Refused::Again) => Look::Again,
        }
    }

    /// The baselines: tables first, whatever comes of the fault. Linux's leaf tables for files wait for the page.
    #[cfg(feature = "__baseline")]
    fn tables_first(&mut self, vma: &Vma<P>) -> Option<Look<'a, P>> {
        let tables = self.space.policy().tables;
        if tables == TablePolicy::Postponed {
            return None;
        }
        let span = P::Format::span_of(self.addr, huge::LEVEL);
        let huge = !self.hand.small && vma.takes_huge(self.space.policy().huge, span);
        let waits = tables == TablePolicy::Linux && matches!(vma.backing, Backing::File { .. });
        self.tables_down_to(if huge { huge::LEVEL } else { waits.into() })
    }

    /// Publishes empty tables, down to a level. `None` when they are there.
    #[cfg(feature = "__baseline")]
    fn tables_down_to(&mut self, lowest: u8) -> Option<Look<'a, P>> {
        let (reserve, gather) = (&mut self.hand.reserve, &mut self.hand.gather);
        let table = self.space.page_table();
        match crate::table::publish_empty(table, self.pin, self.addr, lowest, reserve, gather) {
            Ok(()) => None,
            Err(tables) => Some(Look::Need(Need::Tables(tables))),
        }
    }
}

/// A huge page that is being split, or a page that is lost.
#[cold]
fn not_a_page<'a, P: Platform>(slot: Slot<'_, P, Seen>) -> Look<'a, P> {
    match slot.level() == 0 && slot.raw() == P::Format::poison() {
        true => Look::error(FaultError::Bus(Bus::Poison)),
        false => Look::Done(Outcome::Spurious),
    }
}

impl<P: Platform> Look<'_, P> {
    fn error(error: FaultError) -> Self {
        Look::Done(Outcome::Error(error))
    }
    fn mapped(major: bool, huge: bool, around: u32) -> Self {
        Look::Done(Outcome::Mapped { major, huge, around })
    }
}
