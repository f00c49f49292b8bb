//! Random sequences of all calls and accesses, by one to four CPUs, against an oracle that is not the library: plain
//! maps of pages to bytes and rights (`oracle/areas.rs`, `files.rs`, `model.rs`, `calls.rs`). CPUs take turns, and all is
//! compared after each step (`turns.rs`), or work at the same time (`together.rs`).
//!
//! A failure prints its seed and the shrunk case. `PAGEFIRST_SEED` runs a seed again, `PAGEFIRST_CASES` says how many
//! cases a seed has, `PAGEFIRST_MINUTES` goes on with fresh seeds (`cargo xtask oracle --minutes 30`).

#[path = "oracle/mod.rs"]
mod oracle;

use oracle::hardware::Machines;
use oracle::{parts, plan, seeds, together};
use pagefirst::arch::X86_64;
use proptest::prelude::*;

/// Steps in a total order, made by `cpus` CPUs in turn.
fn in_turn(name: &'static str, cpus: usize, cases: u32) -> seeds::End {
    let machines = Machines::<X86_64>::default();
    let strategy = (plan::settings(cpus), plan::steps(cpus, 120));
    seeds::run(name, cases, &strategy, |(setting, steps)| {
        machines.in_turn(setting, &steps).map_err(TestCaseError::fail)
    })
}

// catches: around_past_mapping, merge_any_index, huge_past_mapping, stack_without_guard, evict_dirty
// catches: protect_writes_to_file, split_counts_twice, growth_repeats_file, fork_keeps_exclusive
#[test]
fn one_cpu() -> seeds::End {
    in_turn("one_cpu", 1, 1500)
}

#[test]
fn two_cpus_in_turn() -> seeds::End {
    in_turn("two_cpus_in_turn", 2, 500)
}

#[test]
fn four_cpus_in_turn() -> seeds::End {
    in_turn("four_cpus_in_turn", 4, 500)
}

/// Steps by CPUs that do not wait for each other.
fn together(name: &'static str, cpus: usize, cases: u32) -> seeds::End {
    let machines = Machines::<X86_64>::default();
    let strategy = (plan::settings_together(cpus + 1), parts::steps_together(cpus, 100));
    seeds::run(name, cases, &strategy, |(setting, steps)| {
        let run = |machine| together::run(machine, &setting, &steps);
        machines.with(setting.hardware, run).map_err(TestCaseError::fail)
    })
}

#[test]
fn two_cpus_together() -> seeds::End {
    together("two_cpus_together", 2, 400)
}

#[test]
fn four_cpus_together() -> seeds::End {
    together("four_cpus_together", 4, 250)
}
