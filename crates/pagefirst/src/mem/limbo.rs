//! Limbo: where retired objects wait for their grace period, in intrusive lists.
//!
//! Objects are pushed under the epoch in which they were retired; [`Limbo::pop`] hands out those whose grace period
//! is over (`sync::epoch`), so the collector decides how many it takes at a time.

use crate::sync::epoch::Epoch;

/// Objects that can stand on one list, through a link of their own.
pub(crate) trait Chain {
    type At: Copy;
    fn next(&self, at: Self::At) -> Option<Self::At>;
    fn set_next(&self, at: Self::At, next: Option<Self::At>);
}

struct List<A> {
    tag: u64,
    ends: Option<(A, A)>,
}

/// Three lists by epoch and one of objects that are past it.
pub(crate) struct Limbo<A> {
    waiting: [List<A>; 3],
    ready: Option<(A, A)>,
    len: usize,
}

impl<A: Copy> Limbo<A> {
    pub const fn new() -> Self {
        const fn list<A>() -> List<A> {
            List { tag: 0, ends: None }
        }
        Limbo { waiting: [list(), list(), list()], ready: None, len: 0 }
    }

    /// Objects waiting or ready.
    pub fn len(&self) -> usize {
        self.len
    }

    fn append<C: Chain<At = A>>(chain: &C, onto: &mut Option<(A, A)>, list: (A, A)) {
        chain.set_next(list.1, None);
        *onto = Some(match *onto {
            None => list,
            Some((head, tail)) => {
                chain.set_next(tail, Some(list.0));
                (head, list.1)
            }
        });
    }

    /// Adds `n` objects that were unlinked, a chain from the first to the last. Their tag is read here, under the lock
    /// that the caller holds: a tag read before could be older than those of objects that were retired meanwhile.
    pub fn push<C: Chain<At = A>>(&mut self, chain: &C, ends: (A, A), n: usize, epoch: &Epoch) {
        self.push_tagged(chain, ends, n, epoch.retire_tag());
    }

    fn push_tagged<C: Chain<At = A>>(&mut self, chain: &C, ends: (A, A), n: usize, tag: u64) {
        let list = &mut self.waiting[(tag % 3) as usize];
        if list.tag != tag {
            // Tags only rise, so what is here is three epochs or more old: past its grace period.
            debug_assert!(tag > list.tag);
            if let Some(old) = list.ends.take() {
                Self::append(chain, &mut self.ready, old);
            }
            list.tag = tag;
        }
        Self::append(chain, &mut list.ends, ends);
        self.len += n;
    }

    /// Takes one object whose grace period is over in epoch `now`.
    pub fn pop<C: Chain<At = A>>(&mut self, chain: &C, now: u64) -> Option<A> {
        if self.ready.is_none() {
            for list in &mut self.waiting {
                if Epoch::is_past(list.tag, now)
                    && let Some(old) = list.ends.take()
                {
                    Self::append(chain, &mut self.ready, old);
                }
            }
        }
        let (head, tail) = self.ready?;
        self.ready = chain.next(head).map(|next| (next, tail));
        self.len -= 1;
        Some(head)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    extern crate std;
    use super::*;
    use std::cell::RefCell;
    use std::vec::Vec;

    struct Links(RefCell<Vec<Option<usize>>>);
    impl Chain for Links {
        type At = usize;
        fn next(&self, at: usize) -> Option<usize> {
            self.0.borrow()[at]
        }
        fn set_next(&self, at: usize, next: Option<usize>) {
            self.0.borrow_mut()[at] = next;
        }
    }

    #[test]
    fn nothing_leaves_before_its_grace_period_and_nothing_stays() {
        let links = Links(RefCell::new(std::vec![None; 64]));
        let mut limbo = Limbo::new();
        let mut waiting = Vec::new();
        for at in 0..64 {
            let now = 1 + at as u64 / 5;
            limbo.push_tagged(&links, (at, at), 1, now);
            waiting.push((at, now));
            if at % 3 == 0 {
                while let Some(got) = limbo.pop(&links, now) {
                    let i = waiting.iter().position(|w| w.0 == got).expect("handed out twice");
                    assert!(Epoch::is_past(waiting.remove(i).1, now));
                }
                assert!(waiting.iter().all(|w| !Epoch::is_past(w.1, now)), "kept too long");
                assert_eq!(limbo.len(), waiting.len());
            }
        }
        while limbo.pop(&links, 100).is_some() {}
        assert_eq!(limbo.len(), 0);
    }
}
