//! Limbo: where retired objects wait for their grace period, in intrusive lists.
//!
//! Objects are pushed under the epoch in which they were retired; [`Limbo::take`] hands out those whose grace period
//! is over (`sync::epoch`), so the collector decides how many it takes at a time. It takes the lock only when there
//! may be some.

use super::{Few, Room};
use crate::platform::Platform;
use crate::sync::Spin;
use crate::sync::atomic::Relaxed;
use crate::sync::atomic::plain::AtomicU64;
use crate::sync::epoch::Epoch;

/// Objects that can stand on one list, through a link of their own.
pub(crate) trait Chain {
    type At: Copy;
    fn next(&self, at: Self::At) -> Option<Self::At>;
    fn set_next(&self, at: Self::At, next: Option<Self::At>);
}

/// How many objects leave limbo with one lock.
pub(crate) const BATCH: usize = 16;

/// Retired objects.
pub(crate) struct Limbo<P: Platform, A> {
    lists: Spin<P, Lists<A>>,
    /// No grace period ends before this epoch; written with the lock held.
    due: AtomicU64,
}

impl<P: Platform, A: Copy> Limbo<P, A> {
    pub fn new() -> Self {
        Limbo { lists: Spin::new(Lists::new()), due: AtomicU64::new(u64::MAX) }
    }

    /// Objects waiting or past their grace period.
    pub fn len(&self, p: &'static P) -> usize {
        self.lists.lock(p).len
    }

    /// Adds `n` objects that were unlinked, a chain from the first to the last. Their tag is read here, under the lock:
    /// a tag read before could be older than those of objects that were retired meanwhile.
    pub fn push<C: Chain<At = A>>(&self, p: &'static P, chain: &C, ends: (A, A), n: usize, epoch: &Epoch) {
        let mut lists = self.lists.lock(p);
        let tag = epoch.retire_tag();
        lists.push(chain, ends, n, tag);
        self.due.store(self.due.load(Relaxed).min(Epoch::past(tag)), Relaxed);
    }

    /// Takes objects whose grace period is over in epoch `now`, at most so many, into an empty batch.
    #[inline]
    pub fn take<C: Chain<At = A>>(
        &self,
        p: &'static P,
        chain: &C,
        now: u64,
        most: usize,
        batch: &mut Few<A, Room<A, BATCH>>,
    ) {
        if now < self.due.load(Relaxed) {
            return;
        }
        let mut lists = self.lists.lock(p);
        lists.ripen(chain, now);
        for _ in 0..most.min(BATCH) {
            match lists.pop(chain) {
                Some(at) => batch.push(at),
                None => break,
            }
        }
        self.due.store(lists.due(), Relaxed);
    }
}

struct List<A> {
    tag: u64,
    ends: Option<(A, A)>,
}

/// Three lists by epoch and one of objects that are past it.
struct Lists<A> {
    waiting: [List<A>; 3],
    ready: Option<(A, A)>,
    len: usize,
}

impl<A: Copy> Lists<A> {
    const fn new() -> Self {
        const fn list<A>() -> List<A> {
            List { tag: 0, ends: None }
        }
        Lists { waiting: [list(), list(), list()], ready: None, len: 0 }
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

    fn push<C: Chain<At = A>>(&mut self, chain: &C, ends: (A, A), n: usize, tag: u64) {
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

    /// Moves objects whose grace period is over in epoch `now` to those that are ready.
    fn ripen<C: Chain<At = A>>(&mut self, chain: &C, now: u64) {
        for list in &mut self.waiting {
            if let Some(old) = list.ends
                && now >= Epoch::past(list.tag)
            {
                list.ends = None;
                Self::append(chain, &mut self.ready, old);
            }
        }
    }

    /// Takes one that is ready.
    fn pop<C: Chain<At = A>>(&mut self, chain: &C) -> Option<A> {
        let (head, tail) = self.ready?;
        self.ready = chain.next(head).map(|next| (next, tail));
        self.len -= 1;
        Some(head)
    }

    /// The epoch in which there will be some to take.
    fn due(&self) -> u64 {
        if self.ready.is_some() {
            return 0;
        }
        let waiting = self.waiting.iter().filter(|list| list.ends.is_some());
        waiting.map(|list| Epoch::past(list.tag)).min().unwrap_or(u64::MAX)
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
        let mut lists = Lists::new();
        let mut waiting = Vec::new();
        for at in 0..64 {
            let now = 1 + at as u64 / 5;
            lists.push(&links, (at, at), 1, now);
            waiting.push((at, now));
            if at % 3 == 0 {
                assert_eq!(lists.due() <= now, waiting.iter().any(|w| Epoch::past(w.1) <= now));
                lists.ripen(&links, now);
                while let Some(got) = lists.pop(&links) {
                    let i = waiting.iter().position(|w| w.0 == got).expect("handed out twice");
                    assert!(Epoch::past(waiting.remove(i).1) <= now);
                }
                assert!(waiting.iter().all(|w| Epoch::past(w.1) > now), "kept too long");
                assert_eq!(lists.len, waiting.len());
            }
        }
        lists.ripen(&links, 100);
        while lists.pop(&links).is_some() {}
        assert_eq!((lists.len, lists.due()), (0, u64::MAX));
    }
}
