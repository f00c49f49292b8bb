//! Quiet points: all workers stop, and everything is looked at. So it is at the end.

use crate::tally::Op;
use crate::worker::Worker;
use crate::{Host, Quiet, Stress};
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use pagefirst::platform::Platform;
use pagefirst::types::PAGE_SIZE;

/// A quiet point is asked for.
const QUIET: u32 = 1;
/// All is over.
const OVER: u32 = 2;

impl<H: Host> Worker<'_, '_, H> {
    /// Stops where a quiet point is asked for; whether the run goes on. The first worker is the one who asks.
    pub fn goes_on(&mut self, cpu: &mut H::Cpu) -> bool {
        let (stress, board) = (self.stress, self.stress.board);
        if self.me == 0 && board.state.load(Relaxed) != OVER {
            if stress.host.is_over() {
                self.conduct(cpu);
                board.state.store(OVER, Release);
            } else if stress.host.is_quiet_due() {
                self.conduct(cpu);
            }
        }
        if board.state.load(Acquire) == QUIET && self.me != 0 {
            self.verify_all(Some(cpu));
            self.park();
            while board.state.load(Acquire) == QUIET {
                self.p.relax();
            }
            board.parked.fetch_sub(1, AcqRel);
        }
        board.state.load(Acquire) != OVER
    }

    /// Looks at both stretches, and gives up what is pinned of them.
    pub fn verify_all(&mut self, mut cpu: Option<&mut H::Cpu>) {
        for is_wide in [false, true] {
            self.on_stretch(is_wide, |worker| {
                worker.verify_own(cpu.as_deref_mut());
                worker.end_note();
                worker.own.unpin();
            });
        }
    }

    pub fn park(&self) {
        self.begin(Op::Stop);
        self.stress.board.parked.fetch_add(1, AcqRel);
    }

    fn conduct(&mut self, cpu: &mut H::Cpu) {
        let board = self.stress.board;
        // Who has seen that all is over stops no more, and would be waited for.
        assert_eq!(board.state.swap(QUIET, AcqRel), 0, "a quiet point within another, or after the end");
        self.verify_all(Some(cpu));
        self.begin(Op::Stop);
        while (board.parked.load(Acquire) as usize) < self.stress.config.workers - 1 {
            self.p.relax();
        }
        self.begin(Op::Quiet);
        self.stress.inspect();
        board.rounds.fetch_add(1, Relaxed);
        board.state.store(0, Release);
        // Before the next, all have gone on.
        while board.parked.load(Acquire) > 0 {
            self.p.relax();
        }
    }
}

impl<H: Host> Stress<'_, H> {
    fn inspect(&self) {
        let slots = self.spaces.each_ref().map(|slot| slot.try_read().expect("nobody changes it now"));
        let spaces = slots.each_ref().map(|slot| slot.as_ref());
        for space in spaces.into_iter().flatten() {
            let (found, bytes) = (space.tables(), space.page_table().table_bytes());
            assert_eq!(found.empty, 0, "violation: tables that are alive and empty");
            assert_eq!(
                found.tables.map(|n| n * PAGE_SIZE),
                bytes,
                "violation: bytes of tables, found and counted"
            );
        }
        self.host.inspect(Quiet { spaces, files: &self.files, limit: &self.root });
    }
}
