//! Random sequences of all calls and accesses, by one to four CPUs, against an oracle that is not the library: plain
//! maps of pages to bytes and rights (`oracle/areas.rs`, `files.rs`, `model.rs`, `calls.rs`). CPUs take turns, and all is
//! compared after each step (`turns.rs`), or work at the same time (`together.rs`).
//!
//! A failure prints its seed and the shrunk case. `PAGEFIRST_SEED` runs a seed again, `PAGEFIRST_CASES` says how many
//! cases a seed has, `PAGEFIRST_MINUTES` goes on with fresh seeds (`cargo xtask oracle --minutes 30`).

#[path = "oracle/areas.rs"]
mod areas;
#[path = "oracle/calls.rs"]
mod calls;
#[path = "oracle/case.rs"]
mod case;
#[path = "oracle/compare.rs"]
mod compare;
#[path = "oracle/crew.rs"]
mod crew;
#[path = "oracle/files.rs"]
mod files;
mod kit;
#[path = "oracle/model.rs"]
mod model;
#[path = "oracle/parts.rs"]
mod parts;
#[path = "oracle/plan.rs"]
mod plan;
#[path = "oracle/seeds.rs"]
mod seeds;
#[path = "oracle/together.rs"]
mod together;
#[path = "oracle/turns.rs"]
mod turns;

use pagefirst_machine::Machine;
use plan::Hardware;
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeMap;

/// Machines on which no case has failed, so that nothing was left on them.
#[derive(Default)]
struct Machines(RefCell<BTreeMap<Hardware, &'static Machine>>);

impl Machines {
    fn with(
        &self,
        hardware: Hardware,
        run: impl FnOnce(&'static Machine) -> Result<seeds::Tally, String>,
    ) -> Result<seeds::Tally, TestCaseError> {
        let known = self.0.borrow_mut().remove(&hardware);
        let machine = known.unwrap_or_else(|| Machine::new(hardware.config()));
        let tally = run(machine).map_err(TestCaseError::fail)?;
        self.0.borrow_mut().insert(hardware, machine);
        Ok(tally)
    }
}

/// Steps in a total order, made by `cpus` CPUs in turn.
fn in_turn(name: &'static str, cpus: usize, cases: u32) -> seeds::End {
    let machines = Machines::default();
    let strategy = (plan::settings(cpus), plan::steps(cpus, 120));
    seeds::run(name, cases, &strategy, |(setting, steps)| {
        machines.with(setting.hardware, |machine| turns::run(machine, &setting, &steps))
    })
}

// catches: around_past_mapping, merge_any_index, huge_past_mapping, stack_without_guard, evict_dirty, zap_loses_dirty
// catches: protect_writes_to_file, split_counts_twice, growth_repeats_file
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
    let machines = Machines::default();
    let strategy = (plan::settings_together(cpus + 1), parts::steps_together(cpus, 100));
    seeds::run(name, cases, &strategy, |(setting, steps)| {
        machines.with(setting.hardware, |machine| together::run(machine, &setting, &steps))
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
