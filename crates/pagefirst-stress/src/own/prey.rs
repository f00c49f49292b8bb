//! A part of a stretch that its worker offers to the adversary, who takes rights away from it and gives them back: an access
//! may be refused meanwhile, but no word may change.

use super::{RW, What};
use crate::tally::Op;
use crate::worker::{Tag, Worker, is_short};
use crate::{HOMES, Host};
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use pagefirst::fault::{FaultError, Segv};
use pagefirst::platform::Platform;
use pagefirst::types::{PAGE_SIZE, Prot, VirtAddr};

/// Accesses to what is offered.
const ACCESSES: u64 = 200;
/// How often whoever comes by takes it away.
const SHOTS: u64 = 20;

/// What is offered: an address, the pages times 8, and
/// - that somebody is at it,
const BUSY: u64 = 1;
/// - that somebody was,
const HUNTED: u64 = 2;
/// - that memory did not allow to give the right to write back.
const READ_ONLY: u64 = 4;

impl<H: Host> Worker<'_, '_, H> {
    /// What is offered in the space it works in.
    fn offer(&self) -> Option<&'static AtomicU64> {
        (self.at < HOMES).then(|| &self.stress.board.prey[self.at])
    }

    /// Offers a part, touches it, and is told what became of it.
    pub(super) fn be_hunted(&mut self, space: &H::Space, cpu: &mut H::Cpu) {
        let i = self.dice.roll(self.own.pages.len() as u64) as usize;
        let page = self.own.pages[i];
        let offered = self.own.start(i).0 | self.own.part << 3;
        let Some(offer) = self.offer() else { return };
        if page.what != What::Anonymous
            || page.prot != RW
            || offer.compare_exchange(0, offered, AcqRel, Relaxed).is_err()
        {
            return;
        }
        let at = self.mine(self.own.start(i));
        self.note(Op::Prey, i..i + 1);
        for _ in 0..ACCESSES {
            self.p.relax();
            if self.dice.once_in(2) {
                let found = self.load(space, Some(cpu), at);
                self.compare(space, at, found, Ok(self.own.pages[i].word));
                continue;
            }
            let word = self.new_word(Tag::Own, i as u64);
            match self.store(space, cpu, at, word) {
                Ok(()) => self.wrote(i, word),
                Err(error) if is_short(error) => self.tally().short(),
                Err(FaultError::Segv(Segv::Access)) if offer.load(Acquire) & HUNTED != 0 => {
                    self.tally().refused()
                }
                Err(error) => self.violation(format_args!("at {at}: {error}")),
            }
        }
        let became = loop {
            let now = offer.load(Acquire) & !BUSY;
            if offer.compare_exchange(now, 0, AcqRel, Relaxed).is_ok() {
                break now;
            }
            self.p.relax();
        };
        if became & READ_ONLY != 0 {
            self.own.pages[i].prot = Prot::READ;
        }
        if became & HUNTED != 0 {
            self.begin(Op::Prey);
        }
    }

    /// Hunts what another worker offers.
    pub fn hunt_offered(&mut self, space: &H::Space) {
        for _ in 0..SHOTS {
            if !self.shoot_offered(space) {
                return;
            }
            self.p.relax();
        }
    }

    /// Takes the right to write to what is offered away, and gives it back; whether anything was offered.
    fn shoot_offered(&mut self, space: &H::Space) -> bool {
        let Some(offer) = self.offer() else { return false };
        let offered = offer.load(Relaxed);
        let taken = offered | BUSY | HUNTED;
        if offered == 0
            || offered & (BUSY | READ_ONLY) != 0
            || offer.compare_exchange(offered, taken, AcqRel, Relaxed).is_err()
        {
            return false;
        }
        self.begin(Op::Hunt);
        let (at, len) = (VirtAddr(offered).page(), offered % PAGE_SIZE / 8 * PAGE_SIZE);
        let mut became = taken & !BUSY;
        match space.protect(at, len, Prot::READ) {
            Ok(()) => {
                self.p.relax();
                if let Err(error) = space.protect(at, len, RW) {
                    self.expect_short(error);
                    became |= READ_ONLY;
                }
            }
            Err(error) => self.expect_short(error),
        }
        offer.store(became, Release);
        true
    }
}
