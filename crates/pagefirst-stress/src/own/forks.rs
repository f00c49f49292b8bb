//! A child of the stretch's space, and its parent: neither sees what the other writes.

use super::{AS_IT_IS, Forks, NOTHING, Page, What};
use crate::tally::Op;
use crate::worker::Worker;
use crate::{Cpu, Host};
use pagefirst::types::Access;

impl<H: Host> Worker<'_, '_, H> {
    /// Forks, and sees that neither sees what the other writes. The child becomes a guest.
    pub(super) fn fork_own(&mut self, space: &H::Space, cpu: &mut H::Cpu) {
        self.begin(Op::Fork);
        self.note(Op::Fork, 0..self.own.pages.len());
        let child = match space.fork() {
            Ok(child) => self.stress.host.share(child),
            Err(error) => return self.expect_short(error),
        };
        let pages = self.own.pages.map(|page| match page.forks {
            Forks { left_out: true, .. } => NOTHING,
            Forks { wiped: true, .. } => Page { what: What::Anonymous, word: 0, ..page },
            AS_IT_IS => page,
        });
        cpu.enter(&child);
        let mut own = core::mem::replace(&mut self.own.pages, pages);
        self.own.past.in_child = true;
        self.verify_own_in(&child, Some(cpu));
        for _ in 0..4 {
            self.touch_own(&child, cpu, Access::Write);
        }
        core::mem::swap(&mut own, &mut self.own.pages);
        self.own.past.in_child = false;
        cpu.enter(space);
        for _ in 0..4 {
            self.touch_own(space, cpu, Access::Write);
        }
        self.device_writes();
        self.verify_own_in(space, Some(cpu));
        cpu.enter(&child);
        core::mem::swap(&mut own, &mut self.own.pages);
        self.own.past.in_child = true;
        self.verify_own_in(&child, Some(cpu));
        self.own.past.in_child = false;
        self.own.pages = own;
        cpu.enter(space);
        self.put_up(child);
    }
}
