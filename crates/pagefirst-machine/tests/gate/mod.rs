//! Where threads wait for each other, without waiting for one that has panicked.
#![allow(dead_code, reason = "each test program uses its own part")]

use pagefirst::platform::Platform;
use pagefirst_machine::Machine;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

/// Opens each time that all its members have come.
pub struct Gate {
    machine: &'static Machine,
    members: usize,
    came: AtomicUsize,
    broken: AtomicBool,
}

/// One thread's way through a gate.
pub struct Member<'a>(&'a Gate);

impl Gate {
    pub fn new(machine: &'static Machine, members: usize) -> Self {
        Gate { machine, members, came: AtomicUsize::new(0), broken: AtomicBool::new(false) }
    }
    pub fn member(&self) -> Member<'_> {
        Member(self)
    }
}

impl Member<'_> {
    pub fn pass(&self) {
        let Gate { machine, members, came, broken } = self.0;
        let all = (came.fetch_add(1, AcqRel) / members + 1) * members;
        while came.load(Acquire) < all {
            assert!(!broken.load(Acquire), "another thread has panicked");
            machine.relax();
        }
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.broken.store(true, Release);
        }
    }
}
