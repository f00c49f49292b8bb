//! Random schedules of the whole stack: 2 to 8 threads that do everything at once, under `cfg(shuttle)`.
//!
//! `cargo xtask shuttle` runs them. One number, the seed, settles all: what hardware there is, what the threads do
//! (`worker.rs`), and who goes on at each atomic operation of the library, each lock, and each step of the machine's
//! walker (`scheduler.rs`). So `--seed` has a schedule again that failed. `docs/decisions/018-random-schedules.md` says why
//! it is made as it is.
//!
//! What must hold: all that the machine checks; what each thread knows of pages of its own, exactly; words of others: they
//! were written there once, never go back (`seen.rs`), and do not change in children of a fork; what devices find in pinned
//! pages; nothing of a file beyond its end; and in the end maps, charges, frames and tables, counted (`world.rs`).
//!
//! Shuttle runs one thread at a time: every schedule is sequentially consistent. Weak memory is what the loom models see
//! (`cargo xtask model`), of small parts and in every order.
#![cfg(shuttle)]

#[path = "shuttle/on_files.rs"]
mod on_files;
#[path = "shuttle/run.rs"]
mod run;
#[path = "shuttle/scheduler.rs"]
mod scheduler;
#[path = "shuttle/seen.rs"]
mod seen;
#[path = "shuttle/worker.rs"]
mod worker;
#[path = "shuttle/world.rs"]
mod world;

use pagefirst::arch::{Aarch64, Format, Sv39, Tiny, X86_64};
use run::explore;

fn everything<F: Format>(name: &'static str) {
    explore(name, 1, |dice, threads| world::run::<F>(dice, threads, false));
}

// catches: zap_skips_empty, free_before_flush, activate_without_mask, install_without_validation, remove_without_going
// catches: unlock_forgets_dead, lock_ignores_dead, epoch_ignores_pins, entry_without_reference, fork_keeps_exclusive
// catches: flush_without_tables, fault_without_sync, install_overwrites, protect_without_flush, split_counts_twice
// catches: unlink_keeps_slot, clear_after_free, evict_dirty
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

// catches: copy_without_break, install_over_unflushed, fork_shares_pinned, insert_while_removing
// catches: fault_leaves_unmarked
#[test]
fn everything_on_aarch64() {
    everything::<Aarch64>("everything_on_aarch64");
}

// catches: copy_writable_at_once
/// Of one page of private memory, which is shared again and again, everybody sees the same.
#[test]
fn one_page_on_x86_64() {
    explore("one_page_on_x86_64", 1, |dice, threads| world::run::<X86_64>(dice, threads, true));
}

/// Also what the machine and the library do in between is the same each time.
#[test]
fn a_seed_is_one_schedule() {
    explore("a_seed_is_one_schedule", 2, |dice, threads| world::run::<Tiny>(dice, threads, false));
}
