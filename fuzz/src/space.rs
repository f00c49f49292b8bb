//! Steps by one or two CPUs in two spaces on files, in any format, beside the oracle of the machine's tests.
//!
//! There is one generator of cases, that of the tests. Of each step, bytes say who does it and what kind it is, and are
//! the seed from which the generator draws the rest, so that a change to one step leaves the others alone.

use crate::Target;
use crate::oracle::hardware::Machines;
use crate::oracle::plan::{self, Op, Setting, Step};
use pagefirst::arch::{Aarch64, Ept, Sv48, X86_64, X86_64La57};
use proptest::strategy::{BoxedStrategy, Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::fmt::{Debug, Write};

/// Operations on two spaces and two files, against plain maps.
pub static SPACE: Target = Target { name: "space", try_out, show };

/// The bytes of a seed, and of a step.
const SEED: usize = 2;
const STEP: usize = SEED + 2;
/// The most steps that are taken, so that no input takes long.
const MOST: usize = 100;

/// Draws a value from a seed.
fn draw<T: Debug>(strategy: &BoxedStrategy<T>, seed: &[u8]) -> T {
    let mut bytes = [0; 32];
    bytes[..seed.len()].copy_from_slice(seed);
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config { failure_persistence: None, ..Config::default() }, rng);
    strategy.new_tree(&mut runner).expect("no strategy rejects anything").current()
}

struct Generators {
    /// For one CPU, and for two.
    settings: [BoxedStrategy<Setting>; 2],
    first: BoxedStrategy<Vec<Step>>,
    kinds: Vec<(u32, BoxedStrategy<Op>)>,
}

impl Generators {
    fn new() -> Generators {
        let settings = [1, 2].map(|cpus| plan::settings(cpus).boxed());
        Generators { settings, first: plan::first_steps(), kinds: plan::kinds() }
    }

    fn op(&self, kind: u8, seed: &[u8]) -> Op {
        let all: u32 = self.kinds.iter().map(|(weight, _)| weight).sum();
        let mut at = (u32::from(kind) * all) >> 8;
        let chosen = self.kinds.iter().find(|(weight, _)| {
            let is_chosen = at < *weight;
            at = at.saturating_sub(*weight);
            is_chosen
        });
        draw(&chosen.expect("it is below the sum of all").1, seed)
    }
}

/// A case, and the number of its format.
fn decode(bytes: &[u8]) -> (u8, Setting, Vec<Step>) {
    thread_local!(static GENERATORS: Generators = Generators::new());
    let (&first, bytes) = bytes.split_first().unwrap_or((&0, &[]));
    let (cpus, format) = (usize::from(first % 2 + 1), first / 2);
    let (setting, bytes) = bytes.split_at(bytes.len().min(SEED));
    let (first, bytes) = bytes.split_at(bytes.len().min(SEED));
    GENERATORS.with(|all| {
        let step = |bytes: &[u8]| {
            let (who, space) = (usize::from(bytes[0] % 2), usize::from(bytes[0] > 216));
            Step { cpu: who % cpus, space, op: all.op(bytes[1], &bytes[2..]) }
        };
        let steps = bytes.chunks_exact(STEP).take(MOST).map(step);
        let setting = draw(&all.settings[cpus - 1], setting);
        (format, setting, draw(&all.first, first).into_iter().chain(steps).collect())
    })
}

/// Machines of each format. (Sv39 has no room for the addresses of the oracle's sequences.)
#[derive(Default)]
struct All(Machines<X86_64>, Machines<X86_64La57>, Machines<Ept>, Machines<Sv48>, Machines<Aarch64>);

fn try_out(bytes: &[u8]) {
    thread_local!(static MACHINES: All = All::default());
    let (format, setting, steps) = decode(bytes);
    let end = MACHINES.with(|all| match format % 8 {
        0 => all.1.in_turn(setting, &steps),
        1 => all.2.in_turn(setting, &steps),
        2 => all.3.in_turn(setting, &steps),
        3 => all.4.in_turn(setting, &steps),
        _ => all.0.in_turn(setting, &steps),
    });
    if let Err(left) = end {
        panic!("left behind: {left}");
    }
}

fn show(bytes: &[u8]) -> String {
    let (format, setting, steps) = decode(bytes);
    let format =
        ["x86-64, 5 levels", "EPT", "Sv48", "AArch64"].get(usize::from(format % 8)).unwrap_or(&"x86-64");
    let mut shown = format!("{format}: {setting:?}");
    for (n, step) in steps.iter().enumerate() {
        let Step { cpu, space, op } = step;
        write!(shown, "\n{n:3}: CPU {cpu}, space {space}: {op:?}").expect("strings take everything");
    }
    shown
}
