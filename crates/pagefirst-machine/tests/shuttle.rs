//! Random schedules of the whole stack with `shuttle`.
#![cfg(shuttle)]

#[path = "shuttle/run.rs"]
mod run;
#[path = "shuttle/scheduler.rs"]
mod scheduler;
#[path = "shuttle/worker.rs"]
mod worker;
#[path = "shuttle/world.rs"]
mod world;

use pagefirst::arch::{Aarch64, Format, Sv39, Tiny, X86_64};
use run::explore;

fn everything<F: Format>(name: &'static str) {
    explore(name, |dice, threads| world::run::<F>(dice, threads));
}

#[test]
fn everything_on_tiny() {
    everything::<Tiny>("everything_on_tiny");
}

#[test]
fn everything_on_x86_64() {
    everything::<X86_64>("everything_on_x86_64");
}

#[test]
fn everything_on_sv39() {
    everything::<Sv39>("everything_on_sv39");
}

#[test]
fn everything_on_aarch64() {
    everything::<Aarch64>("everything_on_aarch64");
}
