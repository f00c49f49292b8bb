//! Models of waiting for loom: the code above, with a flag to wait for.
//!
//! As in `table::model`: every thread starts at one gate, and each model runs once for each rotation of its roles.

extern crate std;

use super::super::atomic::{Acquire, AtomicU32, Relaxed, Release};
use super::{Awaited, Bells, Wait};
use crate::table::model::{explorer, is_in_turn};
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use loom::sync::{Arc, Mutex};
use std::boxed::Box;
use std::sync::atomic::AtomicUsize;
use std::task::Wake;

/// What the models wait for: two things, and the bells.
struct Things {
    bells: Bells,
    done: [AtomicU32; 2],
    /// Whether who waits for each was woken.
    woken: [std::sync::Arc<Woken>; 2],
    /// How often somebody waited for who has a list.
    turns: AtomicUsize,
}
/// More turns than any list is worked on: nobody is at work, and who leaves waits for ever.
const FOR_EVER: usize = 1000;

struct Woken(AtomicU32);

impl Wake for Woken {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.store(1, Release);
    }
}

/// One of the things, awaited.
struct One(Arc<Things>, usize);

impl Awaited for One {
    fn is_ready(&self) -> bool {
        self.0.done[self.1].load(Acquire) != 0
    }
    fn key(&self) -> u64 {
        self.1 as u64
    }
    fn bells(&self) -> &Bells {
        &self.0.bells
    }
    fn undisturbed<T>(&self, f: impl FnOnce() -> T) -> T {
        f()
    }
    fn relax(&self) {
        let turns = self.0.turns.fetch_add(1, Relaxed);
        assert!(turns < FOR_EVER, "nobody has the node that leaves, and it is on no list");
        loom::thread::yield_now();
    }
}

type Waiting = Pin<Box<Wait<One>>>;

impl Things {
    fn new() -> Arc<Things> {
        let woken = || std::sync::Arc::new(Woken(AtomicU32::new(0)));
        Arc::new(Things {
            bells: Bells::new(),
            done: [AtomicU32::new(0), AtomicU32::new(0)],
            woken: [woken(), woken()],
            turns: AtomicUsize::new(0),
        })
    }
    /// Does one of them, and rings.
    fn finish(&self, i: usize) {
        self.done[i].store(1, Release);
        self.bells.ring(i as u64, |take| take());
    }
    fn was_woken(&self, i: usize) -> bool {
        self.woken[i].0.load(Relaxed) != 0
    }
}

fn wait(things: &Arc<Things>, i: usize) -> Waiting {
    Box::pin(Wait::new(One(things.clone(), i)))
}

/// Whether it was ready.
fn poll(waiting: &mut Waiting, things: &Things, i: usize) -> bool {
    let waker = Waker::from(things.woken[i].clone());
    matches!(waiting.as_mut().poll(&mut Context::from_waker(&waker)), Poll::Ready(_))
}

/// What one thread does, with the future that it was given.
type Role = fn(&Arc<Things>, Option<Waiting>) -> Option<(Waiting, bool)>;

/// Runs two roles at once, over things that `listed` wait for already; `end` sees what they handed back.
#[track_caller]
fn check(main: usize, listed: [Option<usize>; 2], roles: [Role; 2], end: fn(&Things)) {
    let executions = std::sync::Arc::new(AtomicUsize::new(0));
    let count = executions.clone();
    explorer(4).check(move || {
        count.fetch_add(1, Relaxed);
        let things = Things::new();
        let mut given = listed.map(|listed| {
            listed.map(|i| {
                let mut waiting = wait(&things, i);
                assert!(!poll(&mut waiting, &things, i));
                waiting
            })
        });
        if is_in_turn() {
            let handed = [main, 1 - main].map(|role| roles[role](&things, given[role].take()));
            end(&things);
            return drop(handed);
        }
        let gate = Arc::new(Mutex::new(()));
        let other = {
            let (things, gate, given) = (things.clone(), gate.clone(), SendIt(given[1 - main].take()));
            loom::thread::spawn(move || {
                drop(gate.lock().unwrap());
                let given = given;
                SendIt(roles[1 - main](&things, given.0))
            })
        };
        drop(gate.lock().unwrap());
        let mine = roles[main](&things, given[main].take());
        let theirs = other.join().unwrap();
        end(&things);
        drop((mine, theirs));
    });
    std::println!("{} executions", executions.load(Relaxed));
}

struct SendIt<T>(T);
// SAFETY: what is sent is `Wait`, which may be.
unsafe impl<T> Send for SendIt<T> {}

fn finish_0(things: &Arc<Things>, kept: Option<Waiting>) -> Option<(Waiting, bool)> {
    things.finish(0);
    kept.map(|kept| (kept, false))
}
fn finish_1(things: &Arc<Things>, kept: Option<Waiting>) -> Option<(Waiting, bool)> {
    things.finish(1);
    kept.map(|kept| (kept, false))
}
/// Waits for the first, once: it is ready, or who waits is woken.
fn wait_for_0(things: &Arc<Things>, _: Option<Waiting>) -> Option<(Waiting, bool)> {
    let mut waiting = wait(things, 0);
    if poll(&mut waiting, things, 0) {
        things.woken[0].0.store(1, Relaxed);
    }
    Some((waiting, true))
}
/// Waits no longer; then the node is its owner's alone.
fn leave(_: &Arc<Things>, given: Option<Waiting>) -> Option<(Waiting, bool)> {
    let waiting = given?;
    waiting.leave();
    // SAFETY: nobody else knows of it.
    unsafe { waiting.node.inside.with_mut(|inside| inside.key = 7) };
    None
}

fn wait_against_ring(main: usize) {
    check(main, [None, None], [wait_for_0, finish_0], |things| {
        assert!(things.was_woken(0), "a wake-up was lost");
    });
}
// catches: ring_without_fence, wait_looks_first, wait_without_fence
#[test]
fn wait_against_ring_main_0() {
    wait_against_ring(0);
}
// catches: ring_without_fence, wait_looks_first, wait_without_fence
#[test]
fn wait_against_ring_main_1() {
    wait_against_ring(1);
}

fn two_rings(main: usize) {
    check(main, [Some(0), Some(1)], [finish_0, finish_1], |things| {
        assert!(things.was_woken(0) && things.was_woken(1), "a wake-up was lost");
    });
}
// catches: bell_forgets_kept
#[test]
fn two_rings_main_0() {
    two_rings(0);
}
// catches: bell_forgets_kept
#[test]
fn two_rings_main_1() {
    two_rings(1);
}

/// The one that leaves is rung for, too.
fn leave_against_ring(main: usize) {
    check(main, [Some(0), None], [leave, finish_0], |_| ());
}
// catches: unlisted_early
#[test]
fn leave_against_ring_main_0() {
    leave_against_ring(0);
}
// catches: unlisted_early
#[test]
fn leave_against_ring_main_1() {
    leave_against_ring(1);
}

/// The other is rung for.
fn leave_against_another_ring(main: usize) {
    check(main, [Some(0), Some(1)], [leave, finish_1], |things| {
        assert!(things.was_woken(1), "a wake-up was lost");
    });
}
// catches: bell_forgets_kept, unlisted_early
#[test]
fn leave_against_another_ring_main_0() {
    leave_against_another_ring(0);
}
// catches: bell_forgets_kept, unlisted_early
#[test]
fn leave_against_another_ring_main_1() {
    leave_against_another_ring(1);
}
