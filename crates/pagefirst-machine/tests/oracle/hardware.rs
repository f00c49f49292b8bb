//! What cases run on: of each format, the hardware that walks it.

use super::plan::{Hardware, Setting, Step};
use super::seeds::Tally;
use super::turns;
use pagefirst::arch::{Aarch64, Ept, Format, Sv39, Sv48, X86_64, X86_64La57};
use pagefirst::types::PAGE_SIZE;
use pagefirst_machine::{Config, Machine};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// A format, and the hardware that its manual describes.
pub trait Walked: Format {
    /// That hardware; `harsh` with small caches and late shootdowns.
    fn config(harsh: bool) -> Config;
}

fn like(base: Config, harsh: bool) -> Config {
    let Config { lean_flush, caches_nothing, sets_accessed, .. } = base;
    let harsh = harsh.then(|| Config { lean_flush, caches_nothing, sets_accessed, ..Config::harsh(1) });
    Config { checks: true, ..harsh.unwrap_or(base) }
}

impl Walked for X86_64 {
    /// Harsh is all that any manual allows hardware to do.
    fn config(harsh: bool) -> Config {
        if harsh { Config::harsh(1) } else { Config { checks: true, ..Config::default() } }
    }
}
impl Walked for X86_64La57 {
    fn config(harsh: bool) -> Config {
        like(Config::default(), harsh)
    }
}
impl Walked for Ept {
    fn config(harsh: bool) -> Config {
        like(Config::default(), harsh)
    }
}
impl Walked for Sv39 {
    fn config(harsh: bool) -> Config {
        like(Config::riscv64(), harsh)
    }
}
impl Walked for Sv48 {
    fn config(harsh: bool) -> Config {
        like(Config::riscv64(), harsh)
    }
}
impl Walked for Aarch64 {
    fn config(harsh: bool) -> Config {
        like(Config::aarch64(), harsh)
    }
}

/// The most threads of files whose reads end later.
const DEVICES: usize = 12;

/// With more bad frames a machine is not used again.
const MOST_BAD: u64 = 200;

/// Machines on which no case has failed, so that nothing was left on them.
pub struct Machines<F: Format>(RefCell<BTreeMap<Hardware, &'static Machine<F>>>);

impl<F: Format> Default for Machines<F> {
    fn default() -> Self {
        Machines(RefCell::default())
    }
}

impl<F: Walked> Machines<F> {
    /// Runs a case on a machine of that hardware.
    ///
    /// # Errors
    /// What is left on the machine after it.
    pub fn with(
        &self,
        hardware: Hardware,
        run: impl FnOnce(&'static Machine<F>) -> Result<Tally, String>,
    ) -> Result<Tally, String> {
        let known = self.0.borrow_mut().remove(&hardware);
        let Hardware { cpus, is_harsh, keep_tags } = hardware;
        let new = || {
            let memory = 8192 * PAGE_SIZE;
            let cpus = cpus + DEVICES;
            Machine::new(Config { memory, cpus, keep_tags, ..F::config(is_harsh) })
        };
        let machine = known.unwrap_or_else(new);
        let tally = run(machine)?;
        if machine.vm().frames.bad_frames() < MOST_BAD {
            self.0.borrow_mut().insert(hardware, machine);
        }
        Ok(tally)
    }

    /// Runs steps in a total order.
    ///
    /// # Errors
    /// What is left on the machine after them.
    pub fn in_turn(&self, mut setting: Setting, steps: &[Step]) -> Result<Tally, String> {
        self.with(setting.hardware, |machine| {
            // Hardware that leaves more to faults than the oracle expects of hardware that is not harsh.
            setting.hardware.is_harsh |= machine.config().lean_flush;
            turns::run(machine, &setting, steps)
        })
    }
}
