//! Processes that fork and exit, with files that are cut, that answer late and wrongly, with devices, limits and errors of
//! hardware, in any format: at every access, and of all that is in the tables, what is there is what plain maps say
//! (`model.rs`); and in the end nothing is left. What it costs is not looked at: that is for the target `space`.

mod files;
mod look;
mod model;
mod plan;
mod world;

use crate::Target;
use crate::oracle::hardware::{Machines, Walked};
use crate::oracle::seeds::Tally;
use pagefirst::arch::{Aarch64, Sv48, X86_64};
use plan::{Setting, Step};
use std::fmt::Write;

/// Everything that a kernel does with memory, against what is in it.
pub static CONTENTS: Target = Target { name: "contents", try_out, show };

/// Machines of three formats; those of which frames may be lost apart.
#[derive(Default)]
struct All([(Machines<X86_64>, Machines<Sv48>, Machines<Aarch64>); 2]);

fn run<F: Walked>(machines: &Machines<F>, setting: &Setting, steps: Vec<Step>) {
    let end = machines.with(setting.hardware, |machine| {
        world::run(machine, setting, steps)?;
        Ok(Tally::default())
    });
    if let Err(left) = end {
        panic!("{left}");
    }
}

fn try_out(bytes: &[u8]) {
    thread_local!(static MACHINES: All = All::default());
    let (setting, rest) = plan::setting(bytes);
    let steps = plan::steps(rest);
    MACHINES.with(|All(all)| {
        let (x86_64, sv48, aarch64) = &all[usize::from(setting.may_poison)];
        match setting.format {
            0 | 1 => run(x86_64, &setting, steps),
            2 => run(sv48, &setting, steps),
            _ => run(aarch64, &setting, steps),
        }
    });
}

fn show(bytes: &[u8]) -> String {
    let (setting, rest) = plan::setting(bytes);
    let mut shown = format!("{setting:?}");
    for (n, step) in plan::steps(rest).iter().enumerate() {
        write!(shown, "\n{n:3}: {step:?}").expect("strings take everything");
    }
    shown
}
