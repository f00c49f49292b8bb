//! What is fuzzed: functions that take any bytes and panic when something is not as it must be.
//!
//! `cargo xtask fuzz` runs them under libFuzzer (`targets/`); `cargo xtask fuzz-corpus` replays the inputs in `corpus/`
//! with no fuzzer and no nightly compiler. Whoever panics prints first what the bytes stand for.

mod contents;
mod formats;
#[path = "../../crates/pagefirst-machine/tests/oracle/mod.rs"]
mod oracle;
mod recording;
mod space;

pub use contents::CONTENTS;
pub use formats::FORMATS;
pub use recording::RECORDING;
pub use space::SPACE;

use std::panic;
use std::sync::{Mutex, Once, PoisonError};

/// All targets.
pub const TARGETS: [&Target; 4] = [&SPACE, &CONTENTS, &RECORDING, &FORMATS];

/// A way to take any bytes.
pub struct Target {
    /// Its name, and that of its folder in `corpus/`.
    pub name: &'static str,
    try_out: fn(&[u8]),
    show: fn(&[u8]) -> String,
}

/// What is being tried out, so that a panic can tell.
static NOW: Mutex<Option<(&'static Target, Vec<u8>)>> = Mutex::new(None);

impl Target {
    /// Tries these bytes out.
    ///
    /// # Panics
    /// When what they lead to is not as it must be; it prints what they stand for.
    pub fn run(&'static self, bytes: &[u8]) {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            // The fuzzer's ends the process.
            let usual = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                let now = NOW.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some((target, bytes)) = now {
                    eprintln!("{}, {} bytes:\n{}", target.name, bytes.len(), target.show(&bytes));
                }
                usual(info);
            }));
        });
        *NOW.lock().unwrap_or_else(PoisonError::into_inner) = Some((self, bytes.to_vec()));
        (self.try_out)(bytes);
        *NOW.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What these bytes stand for.
    pub fn show(&self, bytes: &[u8]) -> String {
        (self.show)(bytes)
    }
}
