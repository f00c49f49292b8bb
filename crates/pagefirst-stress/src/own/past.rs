//! What was done last to each part of a stretch, for whoever has to find out what went wrong.

use crate::Host;
use crate::tally::{Op, Tally};
use crate::worker::Worker;
use core::fmt;
use core::ops::Range;
use pagefirst::platform::Platform;
use pagefirst::space::{AddressSpace, Advice};
use pagefirst::sync::epoch::Pin;

/// So many operations are remembered.
const KEPT: usize = 128;

/// An operation on some parts.
#[derive(Clone, Copy)]
struct Done {
    op: Op,
    advice: Option<Advice>,
    /// How many operations its worker had done before.
    n: u64,
    first: u8,
    end: u8,
    /// Whether it was in a child of the space.
    in_child: bool,
    /// How much memory, or something else, had not allowed before it, and after it.
    before: (u64, u64),
    after: (u64, u64),
}

/// The last operations on a stretch.
pub(super) struct Past {
    done: [Done; KEPT],
    /// How many there were.
    len: usize,
    /// Whether the last has not ended.
    is_open: bool,
    pub in_child: bool,
}

impl Past {
    pub const fn new() -> Self {
        let none = Done {
            op: Op::Stop,
            advice: None,
            n: 0,
            first: 0,
            end: 0,
            in_child: false,
            before: (0, 0),
            after: (0, 0),
        };
        Past { done: [none; KEPT], len: 0, is_open: false, in_child: false }
    }
    /// An operation on these parts begins.
    fn begin(&mut self, tally: &Tally, op: Op, parts: Range<usize>) {
        self.end(tally);
        let before = tally.not_done();
        let (n, first, end, in_child) = (tally.doing().1, parts.start as u8, parts.end as u8, self.in_child);
        self.done[self.len % KEPT] =
            Done { op, advice: None, n, first, end, in_child, before, after: before };
        self.len += 1;
        self.is_open = true;
    }
    /// It is one that gives this advice.
    pub fn advised(&mut self, advice: Advice) {
        self.done[(self.len - 1) % KEPT].advice = Some(advice);
    }
    /// The last one, if it has not ended, ends.
    fn end(&mut self, tally: &Tally) {
        if core::mem::take(&mut self.is_open) {
            self.done[(self.len - 1) % KEPT].after = tally.not_done();
        }
    }
    /// What was done to this part, in words.
    fn of(&self, part: usize, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for at in self.len.saturating_sub(KEPT)..self.len {
            let Done { op, advice, n, first, end, in_child, before, after } = self.done[at % KEPT];
            let parts = usize::from(first)..usize::from(end);
            if !parts.contains(&part) {
                continue;
            }
            let child = if in_child { ", child" } else { "" };
            let short = if after.0 > before.0 { ": no memory" } else { "" };
            let refused = if after.1 > before.1 { ": refused" } else { "" };
            write!(f, "\n  {n}: {}", op.name())?;
            if let Some(advice) = advice {
                write!(f, " {advice:?}")?;
            }
            write!(f, " {parts:?}{child}{short}{refused}")?;
        }
        Ok(())
    }
}

impl<H: Host> Worker<'_, '_, H> {
    /// An operation on these parts of the stretch begins.
    pub(super) fn note(&mut self, op: Op, parts: Range<usize>) {
        self.own.past.begin(self.tally(), op, parts);
    }
    /// The last one, if it has not ended, ends.
    pub fn end_note(&mut self) {
        self.own.past.end(self.tally());
    }
    /// What is known of a part: what should be there, what is, and what was done to it.
    pub(super) fn tell(
        &self,
        space: &AddressSpace<H::Platform>,
        part: usize,
        f: &mut fmt::Formatter<'_>,
    ) -> fmt::Result {
        write!(f, "{:?}", self.own.pages[part])?;
        if let Some(there) = space.page_table().translate(&Pin::new(self.p), self.own.start(part)) {
            let meta = self.p.meta(there.pfn);
            write!(f, "\n{there:?}: {:?}, {:?}", meta.flags(), meta.counts())?;
        }
        self.own.past.of(part, f)
    }
}
