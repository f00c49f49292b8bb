//! An oracle that is not the library: plain maps of pages to bytes and rights (`areas.rs`, `files.rs`, `model.rs`,
//! `fork.rs`, `memory.rs`, `calls.rs`); what a case is made of (`plan.rs`), how it is run by CPUs that take turns, where all is compared after
//! each step (`turns.rs`), and by CPUs at work at the same time (`together.rs`).
//!
//! Shared by the tests in `oracle.rs` and `formats.rs` and the fuzz target `space`.
#![allow(dead_code, reason = "each uses its own part")]

mod areas;
mod calls;
mod case;
mod compare;
mod crew;
mod files;
mod fork;
pub mod hardware;
#[path = "../kit/mod.rs"]
pub mod kit;
mod memory;
mod model;
mod on_files;
pub mod parts;
pub mod plan;
pub mod seeds;
pub mod together;
pub mod turns;
