//! How threads wait: for each other, without waiting for one that has panicked, and for what must come.
#![allow(dead_code, reason = "each test program uses its own part")]

use pagefirst_machine::MachineFile;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a test waits for what must come. A machine that is slow, or busy with other things, lets a thread wait for
/// seconds.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Does something again and again until it says that it is enough, or [`PATIENCE`] ends.
pub fn until(mut is_enough: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_enough() && Instant::now() < end {}
}

/// Lets others run until it is so, or [`PATIENCE`] ends.
pub fn wait_until(is_so: impl Fn() -> bool) {
    until(|| {
        std::thread::yield_now();
        is_so()
    });
}

/// Waits until no read or write of a file is under way.
pub fn settle(file: &MachineFile) {
    wait_until(|| file.pending().is_empty());
}

/// Opens each time that all its members have come.
pub struct Gate {
    members: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    came: usize,
    is_broken: bool,
}

/// One thread's way through a gate.
pub struct Member<'a>(&'a Gate);

impl Gate {
    pub fn new(members: usize) -> Self {
        Gate { members, state: Mutex::default(), changed: Condvar::new() }
    }
    pub fn member(&self) -> Member<'_> {
        Member(self)
    }
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member<'_> {
    /// Waits for the others; whether this one came last.
    pub fn pass(&self) -> bool {
        let Gate { members, changed, .. } = self.0;
        let mut state = self.0.state();
        let all = (state.came / members + 1) * members;
        state.came += 1;
        let is_last = state.came == all;
        if is_last {
            changed.notify_all();
        }
        let closed = |state: &mut State| state.came < all && !state.is_broken;
        let state = changed.wait_while(state, closed).unwrap_or_else(PoisonError::into_inner);
        let is_open = state.came >= all;
        drop(state);
        assert!(is_open, "another thread has panicked");
        is_last
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.state().is_broken = true;
            self.0.changed.notify_all();
        }
    }
}
