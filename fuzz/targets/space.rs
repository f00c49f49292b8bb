//! `cargo fuzz run space`; see [`pagefirst_fuzz::SPACE`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pagefirst_fuzz::SPACE.run(bytes));
