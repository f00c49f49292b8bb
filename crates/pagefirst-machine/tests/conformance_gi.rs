//! The fault path, item by item: `conformance.md`, c40 to c70 and r07 to r10. (r06 is in `oom.rs`, r14 in `races.rs`.)

#[path = "conformance_gi/around.rs"]
mod around;
mod kit;
