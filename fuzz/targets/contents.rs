//! `cargo fuzz run contents`; see [`pagefirst_fuzz::CONTENTS`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pagefirst_fuzz::CONTENTS.run(bytes));
