//! `cargo fuzz run formats`; see [`pagefirst_fuzz::FORMATS`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pagefirst_fuzz::FORMATS.run(bytes));
