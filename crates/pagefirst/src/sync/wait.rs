//! Waiting: futures of what becomes ready, and the bells that wake them.
//!
//! Who waits puts a node on the list of a bell, and only then looks whether it is ready. Who makes it ready does that
//! first, and then rings. A full fence stands between the two steps of each, so one of them sees the other: no wake-up
//! is lost.
//!
//! Rung in an interrupt, a bell must not wait for what was interrupted. So no lock keeps the list: whoever works on it
//! *takes it whole*, by a swap that leaves a mark of his own, and has its nodes for himself until he puts back those that
//! are to stay. He may put them back as they are only where his mark still stands. If it does not, somebody rang who found
//! none of them: they are marked to be woken, whatever they wait for.
//!
//! | | wait | ring | leave |
//! |---|---|---|---|
//! | wait | pushes; one store publishes a node | found on the list, or sees that it is ready | each its own node |
//! | ring | | the mark | the mark |
//! | leave | | waits for who has its node: never in an interrupt | the mark |
//!
//! Whoever works on a list is not preempted meanwhile: who leaves may spin until he is done.
//!
//! To be woken for nothing does no harm: who waits looks again. Wakers are called with no node and no lock in hand.

#[cfg(all(test, loom))]
mod model;

use super::atomic::{AcqRel, Acquire, AtomicPtr, AtomicU32, Relaxed, Release, SeqCst, fence};
use super::cell::Cell;
use core::fmt;
use core::future::Future;
use core::marker::PhantomPinned;
use core::pin::Pin;
use core::ptr::NonNull;
use core::task::{Context, Poll, Waker};

/// What can be waited for.
pub trait Awaited {
    /// Whether it has happened.
    fn is_ready(&self) -> bool;
    /// What is rung when it has.
    fn key(&self) -> u64;
    /// The bells that are rung.
    fn bells(&self) -> &Bells;
    /// Turns preemption off while `f` runs.
    fn undisturbed<T>(&self, f: impl FnOnce() -> T) -> T;
    /// One turn of a spin.
    fn relax(&self);
}

/// Rung for every key, to nodes that may have missed a ring.
const ANY: u64 = u64::MAX;
/// How many are woken at a time.
const BATCH: usize = 16;
/// Each execution of a model makes one, so few.
const BELLS: usize = if cfg!(loom) { 1 } else { 64 };

/// One who waits. It is on a list, or its owner's alone.
struct Node {
    is_listed: AtomicU32,
    /// Touched by the owner while it is not listed, and otherwise by whoever has the list.
    inside: Cell<Inside>,
}

struct Inside {
    next: *mut Node,
    key: u64,
    waker: Option<Waker>,
}

/// A list of those who wait, by hash of what they wait for.
pub(crate) struct Bell {
    first: AtomicPtr<Node>,
}

/// All bells of one machine.
pub struct Bells([Bell; BELLS]);

/// Which nodes are wanted.
#[derive(Clone, Copy)]
enum Want {
    Key(u64),
    Node(NonNull<Node>),
}

/// Wakers taken off their nodes.
struct Wakers {
    wakers: [Option<Waker>; BATCH],
    len: usize,
}

/// The node at the front of a list; `None` at its end, which is null or somebody's mark.
fn node(at: *mut Node) -> Option<NonNull<Node>> {
    NonNull::new(at).filter(|at| at.addr().get() & 1 == 0)
}

impl Bell {
    /// Takes the wanted nodes off the list, as many as there is room for. Tells whether to come again, for any.
    fn take(&self, want: Want, wakers: &mut Wakers) -> bool {
        // An address that nobody else uses meanwhile, marked as no node's.
        let here = 0u32;
        let mark = (&raw const here).cast_mut().cast::<Node>().map_addr(|at| at | 1);
        let mut at = self.first.swap(mark, AcqRel);
        let mut kept: Option<(NonNull<Node>, NonNull<Node>)> = None;
        let mut more = false;
        while let Some(node) = node(at) {
            // SAFETY: a listed node stays where it is until it is unlisted (`Wait::drop`), and whoever took the list,
            // which we did, alone touches what is inside its nodes.
            let (listed, is_wanted) = unsafe {
                let node = node.as_ref();
                if cfg!(mutant = "unlisted_early") {
                    node.is_listed.store(0, Release);
                }
                node.inside.with_mut(|inside| {
                    at = inside.next;
                    let is_wanted = match want {
                        Want::Key(key) => inside.key == key || inside.key == ANY,
                        Want::Node(one) => core::ptr::eq(node, one.as_ptr()),
                    };
                    if is_wanted && wakers.len < BATCH {
                        wakers.wakers[wakers.len] = inside.waker.take();
                        wakers.len += 1;
                        return (Some(&node.is_listed), true);
                    }
                    inside.next = kept.map_or(core::ptr::null_mut(), |(first, _)| first.as_ptr());
                    (None, is_wanted)
                })
            };
            match listed {
                // From here it may be gone.
                Some(listed) => listed.store(0, Release),
                None => {
                    more |= is_wanted;
                    kept = Some((node, kept.map_or(node, |(_, last)| last)));
                }
            }
        }
        let first = kept.map_or(core::ptr::null_mut(), |(first, _)| first.as_ptr());
        let unseen = self.first.compare_exchange(mark, first, AcqRel, Relaxed).is_err();
        match kept {
            Some((first, last)) if unseen && !cfg!(mutant = "bell_forgets_kept") => {
                self.put_back(first, last);
                true
            }
            _ => more,
        }
    }

    /// Puts nodes that we took back on the list, to be woken.
    #[cold]
    fn put_back(&self, first: NonNull<Node>, last: NonNull<Node>) {
        let mut at = first;
        loop {
            // SAFETY: as in `take`: they are ours until the exchange below succeeds.
            let next = unsafe {
                at.as_ref().inside.with_mut(|inside| {
                    inside.key = ANY;
                    inside.next
                })
            };
            match node(next) {
                Some(next) if at != last => at = next,
                _ => break,
            }
        }
        let mut head = self.first.load(Acquire);
        loop {
            // SAFETY: as above.
            unsafe { last.as_ref().inside.with_mut(|inside| inside.next = head) };
            match self.first.compare_exchange_weak(head, first.as_ptr(), AcqRel, Acquire) {
                Ok(_) => return,
                Err(newer) => head = newer,
            }
        }
    }

    /// A thread that leaves waits for who has its node; so whoever takes the list is not preempted meanwhile.
    fn ring(&self, key: u64, undisturbed: impl Fn(&mut dyn FnMut() -> bool) -> bool) {
        loop {
            let mut wakers = Wakers { wakers: [const { None }; BATCH], len: 0 };
            let more = undisturbed(&mut || self.take(Want::Key(key), &mut wakers));
            wakers.wakers.into_iter().flatten().for_each(Waker::wake);
            if !more {
                return;
            }
        }
    }
}

impl Bells {
    /// Bells that nobody waits for.
    pub(crate) fn new() -> Self {
        Bells(core::array::from_fn(|_| Bell { first: AtomicPtr::new(core::ptr::null_mut()) }))
    }
    fn bell(&self, key: u64) -> &Bell {
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.0[(hash >> 32) as usize % BELLS]
    }
    /// Wakes who waits for `key`, perhaps others too. It happened before. Called anywhere, in an interrupt too;
    /// `undisturbed` turns preemption off while it runs what it is given.
    #[inline]
    pub(crate) fn ring(&self, key: u64, undisturbed: impl Fn(&mut dyn FnMut() -> bool) -> bool) {
        let bell = self.bell(key);
        if !cfg!(mutant = "ring_without_fence") {
            fence(SeqCst);
        }
        if !bell.first.load(Relaxed).is_null() {
            self.wake(key, undisturbed);
        }
    }
    #[cold]
    fn wake(&self, key: u64, undisturbed: impl Fn(&mut dyn FnMut() -> bool) -> bool) {
        self.bell(key).ring(key, undisturbed);
    }
}

/// The future of what is awaited: once that is ready it is handed back.
///
/// Dropped before, it leaves nothing behind. Not to be polled or dropped in an interrupt.
#[must_use = "a future does nothing unless polled"]
pub struct Wait<T: Awaited> {
    what: Option<T>,
    /// The waker that the node was listed with.
    waker: Option<Waker>,
    node: Node,
    _pinned: PhantomPinned,
}

// SAFETY: the pointer in the node belongs to the list; the node's owner touches it under the list's rules alone.
unsafe impl<T: Awaited + Send> Send for Wait<T> {}

impl<T: Awaited> Wait<T> {
    pub(crate) fn new(what: T) -> Self {
        let inside = Inside { next: core::ptr::null_mut(), key: 0, waker: None };
        let node = Node { is_listed: AtomicU32::new(0), inside: Cell::new(inside) };
        Wait { what: Some(what), waker: None, node, _pinned: PhantomPinned }
    }

    fn is_listed(&self) -> bool {
        self.node.is_listed.load(Acquire) != 0
    }

    /// Puts the node on its list. It is not there, and stays where it is until it has left.
    fn list(&self, bell: &Bell, key: u64, waker: &Waker) {
        let at = (&raw const self.node).cast_mut();
        let mut head = bell.first.load(Acquire);
        let mut waker = Some(waker.clone());
        // Before others can take it off again.
        self.node.is_listed.store(1, Relaxed);
        loop {
            // SAFETY: not on a list yet, so ours alone.
            unsafe {
                self.node.inside.with_mut(|inside| {
                    let waker = waker.take().or(inside.waker.take());
                    *inside = Inside { next: head, key, waker };
                });
            }
            match bell.first.compare_exchange_weak(head, at, AcqRel, Acquire) {
                Ok(_) => return,
                Err(newer) => head = newer,
            }
        }
    }

    /// Takes the node off its list if it is there. Afterwards nobody knows of it.
    fn leave(&self) {
        let Some(what) = &self.what else { return };
        if !self.is_listed() {
            return;
        }
        let bell = what.bells().bell(what.key());
        let me = NonNull::from(&self.node);
        while self.is_listed() {
            let mut mine = Wakers { wakers: [const { None }; BATCH], len: 0 };
            // As in `ring`.
            if what.undisturbed(|| bell.take(Want::Node(me), &mut mine)) {
                bell.ring(ANY, |take| what.undisturbed(take));
            }
            if mine.len == 0 {
                what.relax();
            }
        }
    }
}

impl<T: Awaited> Future for Wait<T> {
    type Output = T;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        // SAFETY: the node is not moved; what is awaited is not pinned: it is only referred to, and taken out.
        let this = unsafe { self.get_unchecked_mut() };
        let Some(what) = &this.what else { panic!("polled after it was ready") };
        if !what.is_ready() {
            if this.is_listed() && this.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                return Poll::Pending;
            }
            this.leave();
            this.waker = Some(cx.waker().clone());
            this.list(what.bells().bell(what.key()), what.key(), cx.waker());
            if !cfg!(mutant = "wait_without_fence") {
                fence(SeqCst);
            }
            if cfg!(mutant = "wait_looks_first") || !what.is_ready() {
                return Poll::Pending;
            }
        }
        this.leave();
        match this.what.take() {
            Some(what) => Poll::Ready(what),
            None => unreachable!("it was there above"),
        }
    }
}

impl<T: Awaited> Drop for Wait<T> {
    fn drop(&mut self) {
        self.leave();
    }
}

impl<T: Awaited + fmt::Debug> fmt::Debug for Wait<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Wait").field(&self.what).finish()
    }
}
