//! The adversary: what somebody is about to touch, or just has, is taken away from under him. Of stretches whose every word is
//! known only what their workers offer (`own/prey.rs`).

use crate::Host;
use crate::files::Kind;
use crate::tally::Op;
use crate::worker::Worker;
use core::sync::atomic::Ordering::Relaxed;
use pagefirst::platform::Platform;
use pagefirst::space::MapError;
use pagefirst::types::{PAGE_SIZE, Prot, VirtAddr};

/// How often in one hunt.
const SHOTS: u64 = 40;
/// Turns of waiting for somebody to come.
const PATIENCE: u64 = 300;

impl<H: Host> Worker<'_, '_, H> {
    /// Tells where this worker is about to touch.
    pub fn aim_at(&self, at: VirtAddr) {
        self.stress.board.aims[self.at].store(at.0, Relaxed);
    }

    pub fn hunt(&mut self, space: &H::Space) {
        let (board, aim) = (self.stress.board, &self.stress.board.aims[self.at]);
        let mut before = 0;
        for _ in 0..SHOTS {
            let now = (0..PATIENCE).find_map(|_| {
                self.p.relax();
                let now = aim.load(Relaxed);
                (now != before).then_some(now)
            });
            let Some(now) = now.filter(|_| board.state.load(Relaxed) == 0) else { return };
            before = now;
            self.begin(Op::Hunt);
            self.shoot(space, VirtAddr(now).page());
        }
    }

    fn shoot(&mut self, space: &H::Space, at: VirtAddr) {
        let kind =
            Kind::ALL.into_iter().find(|kind| (0..3).any(|which| kind.area(which).index_of(at).is_some()));
        if let Some(kind) = kind
            && self.may_cut(kind)
            && self.dice.once_in(2)
        {
            let index = (0..3).find_map(|which| kind.area(which).index_of(at)).unwrap_or_default();
            return self.take_from_file(kind, index * PAGE_SIZE);
        }
        let done = match self.dice.roll(4) {
            // Of a huge page this splits it.
            0 | 1 => space.discard(at, PAGE_SIZE),
            _ => {
                let done = space.protect(at, PAGE_SIZE, Prot::READ);
                done.and_then(|()| space.protect(at, PAGE_SIZE, Prot::READ | Prot::WRITE))
            }
        };
        match done {
            Ok(()) => {}
            Err(MapError::NotMapped(_)) => self.tally().refused(),
            Err(error) => self.expect_short(error),
        }
    }

    fn take_from_file(&mut self, kind: Kind, offset: u64) {
        match self.dice.roll(3) {
            0 => self.punch_out(kind, offset..offset + PAGE_SIZE),
            _ => self.shrink(kind, offset),
        }
    }
}
