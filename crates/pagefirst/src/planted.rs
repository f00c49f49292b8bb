//! Planted mistakes, chosen when tests run: the library's own, and those under `cfg(shuttle)`.
//!
//! `cfg!(mutant = "NAME")` stands in the library where somebody could have gone wrong, and makes the mistake if it is compiled
//! with `--cfg mutant="NAME"`. In these tests, of which the loom models are some, `cfg!` is the macro below: one program has
//! all mistakes in it, and [`CHOSEN`] in its environment names the one to make. So `cargo xtask model` and `cargo xtask shuttle`
//! compile once, and not for each mistake.

extern crate std;

use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::string::String;
use std::sync::OnceLock;

/// The environment variable that names the mistake to make.
const CHOSEN: &str = "PAGEFIRST_MUTANT";
/// And the one that asks to be told of each mistake that could have been made.
const TOLD: &str = "PAGEFIRST_TELL_MUTANTS";

macro_rules! cfg {
    (mutant = $name:literal) => {{
        static PASSED: ::core::sync::atomic::AtomicBool = ::core::sync::atomic::AtomicBool::new(false);
        $crate::planted::is_chosen($name, &PASSED)
    }};
    ($($other:tt)*) => {
        ::core::cfg!($($other)*)
    };
}

/// Whether this is the mistake to make, at a place that may have been passed already.
pub(crate) fn is_chosen(name: &str, passed: &AtomicBool) -> bool {
    static CHOICE: OnceLock<Option<String>> = OnceLock::new();
    if !passed.load(Relaxed) && !passed.swap(true, Relaxed) && std::env::var_os(TOLD).is_some() {
        std::println!("a place for {name}");
    }
    CHOICE.get_or_init(|| std::env::var(CHOSEN).ok()).as_deref() == Some(name)
}
