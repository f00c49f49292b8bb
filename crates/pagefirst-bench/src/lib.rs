//! What the benchmarks share: a platform that costs nothing of its own, and paired measuring.
//!
//! `cargo bench` runs `benches/`; `docs/benchmarks.md` says how to read what they print.

pub mod measure;
mod platform;
mod random;

pub use platform::{Bench, Cpus};
pub use random::Random;
