//! `cargo fuzz run recording`; see [`pagefirst_fuzz::RECORDING`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pagefirst_fuzz::RECORDING.run(bytes));
