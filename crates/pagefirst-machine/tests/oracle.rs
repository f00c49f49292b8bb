//! Random sequences of all calls and accesses, by one to four CPUs, against an oracle that is not the library: plain
//! maps of pages to bytes and rights (`oracle/areas.rs`, `files.rs`, `model.rs`, `calls.rs`).
//!
//! A failure prints its seed and the shrunk case. `PAGEFIRST_SEED` runs a seed again, `PAGEFIRST_CASES` says how many
//! cases a seed has, `PAGEFIRST_MINUTES` goes on with fresh seeds (`cargo xtask oracle --minutes 30`).

#[path = "oracle/areas.rs"]
mod areas;
#[path = "oracle/calls.rs"]
mod calls;
#[path = "oracle/crew.rs"]
mod crew;
#[path = "oracle/drive.rs"]
mod drive;
#[path = "oracle/files.rs"]
mod files;
mod kit;
#[path = "oracle/model.rs"]
mod model;
#[path = "oracle/plan.rs"]
mod plan;
#[path = "oracle/seeds.rs"]
mod seeds;

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
        run: impl FnOnce(&'static Machine) -> Result<(), String>,
    ) -> Result<(), TestCaseError> {
        let known = self.0.borrow_mut().remove(&hardware);
        let machine = known.unwrap_or_else(|| Machine::new(hardware.config()));
        run(machine).map_err(TestCaseError::fail)?;
        self.0.borrow_mut().insert(hardware, machine);
        Ok(())
    }
}

/// Steps in a total order, made by `cpus` CPUs in turn.
fn in_turn(name: &'static str, cpus: usize, cases: u32) -> seeds::End {
    let machines = Machines::default();
    let strategy = (plan::settings(cpus), plan::steps(cpus, 120));
    seeds::run(name, cases, &strategy, |(setting, steps)| {
        machines.with(setting.hardware, |machine| drive::run(machine, &setting, &steps))?;
        Ok(steps.len())
    })
}

#[test]
fn one_cpu() -> seeds::End {
    in_turn("one_cpu", 1, 200)
}

#[test]
fn two_cpus_in_turn() -> seeds::End {
    in_turn("two_cpus_in_turn", 2, 60)
}

#[test]
fn four_cpus_in_turn() -> seeds::End {
    in_turn("four_cpus_in_turn", 4, 60)
}
