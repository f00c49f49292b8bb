//! Steps in a total order, made by several CPUs in turn: after each, the library and the oracle agree in everything.

use super::case::{Case, spaces};
use super::model::LEAF;
use super::plan::{Setting, Step};
use super::seeds::Tally;
use pagefirst::account::Faults;
use pagefirst::arch::Format;
use pagefirst::types::PAGE_SIZE;
use pagefirst_machine::Machine;
use std::mem::ManuallyDrop;

/// After so many steps all entries are looked at.
const LOOK: usize = 8;

/// Runs a case; panics when the library does what the oracle does not expect.
///
/// # Errors
/// What is left on the machine after it.
pub fn run<F: Format>(
    machine: &'static Machine<F>,
    setting: &Setting,
    steps: &[Step],
) -> Result<Tally, String> {
    let mut case = Case::new(machine, *setting, spaces(machine, setting, 2), setting.hardware.cpus);
    for (n, step) in steps.iter().enumerate() {
        case.step(step);
        case.compare(step, n);
        if n % LOOK == 0 {
            case.compare_entries(step.space, 1);
        }
    }
    for space in 0..case.spaces.len() {
        case.compare_entries(space, PAGE_SIZE as usize / 8);
    }
    case.settle();
    let Case { crew, real, spaces, mut tally, .. } = case;
    for model in spaces {
        tally.add("huge of files in the end", model.resident().3 / (LEAF * PAGE_SIZE));
        tally_faults(&mut tally, &model.faults);
    }
    drop(crew);
    drop(ManuallyDrop::into_inner(real));
    machine.nothing_left().map(|()| tally)
}

pub fn tally_faults(tally: &mut Tally, f: &Faults) {
    let kinds = [
        ("anon_read", f.anon_read),
        ("anon_write", f.anon_write),
        ("file_read", f.file_read),
        ("file_copy", f.file_copy),
        ("shared_write", f.shared_write),
        ("copy", f.copy),
        ("reuse", f.reuse),
        ("marked", f.marked),
        ("huge", f.huge),
        ("no_huge", f.no_huge),
        ("segv", f.segv),
        ("bus", f.bus),
        ("no_memory", f.no_memory),
    ];
    kinds.into_iter().for_each(|(kind, n)| tally.add(format!("fault {kind}"), n));
}
