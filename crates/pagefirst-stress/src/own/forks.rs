//! A child of the stretch's space, and its parent: neither sees what the other writes.

use super::{Forks, NOTHING, Page, What};
use crate::tally::Op;
use crate::worker::Worker;
use crate::{Cpu, Host};
use pagefirst::types::Access;

impl<H: Host> Worker<'_, '_, H> {
    /// Forks, and sees that neither sees what the other writes. The child becomes a guest.
    pub(super) fn fork_own(&mut self, space: &H::Space, cpu: &mut H::Cpu) {
        self.begin(Op::Fork);
        let child = match space.fork() {
            Ok(child) => self.stress.host.share(child),
            Err(error) => return self.expect_short(error),
        };
        let pages = self.own.pages.map(|page| match page.forks {
            Forks::AsItIs => page,
            Forks::Wiped => Page { what: What::Anonymous, word: 0, ..page },
            Forks::Not => NOTHING,
        });
        cpu.enter(&child);
        self.verify_pages(&child, Some(cpu), &pages);
        let mut own = core::mem::replace(&mut self.own.pages, pages);
        for _ in 0..4 {
            self.touch_own(&child, cpu, Access::Write);
        }
        core::mem::swap(&mut own, &mut self.own.pages);
        let childs = own;
        cpu.enter(space);
        for _ in 0..4 {
            self.touch_own(space, cpu, Access::Write);
        }
        self.device_writes();
        let pages = self.own.pages;
        self.verify_pages(space, Some(cpu), &pages);
        cpu.enter(&child);
        self.verify_pages(&child, Some(cpu), &childs);
        cpu.enter(space);
        self.put_up(child);
    }
}
