//! Planted mistakes, chosen when tests run: the library's own, and those under `cfg(shuttle)`.
//!
//! `cfg!(mutant = "NAME")` stands in the library where somebody could have gone wrong, and makes the mistake if it is compiled
//! with `--cfg mutant="NAME"`. In these tests, of which the loom models are some, `cfg!` is the macro below: one program has
//! all mistakes in it, and [`CHOSEN`] in its environment names the one to make. So `cargo xtask model` and `cargo xtask shuttle`
//! compile once, and not for each mistake.

extern crate std;

use std::string::String;
use std::sync::OnceLock;

/// The environment variable that names the mistake to make.
const CHOSEN: &str = "PAGEFIRST_MUTANT";

macro_rules! cfg {
    (mutant = $name:literal) => {
        $crate::planted::is_chosen($name)
    };
    ($($other:tt)*) => {
        ::core::cfg!($($other)*)
    };
}

/// Whether this is the mistake to make.
pub(crate) fn is_chosen(name: &str) -> bool {
    static CHOICE: OnceLock<Option<String>> = OnceLock::new();
    CHOICE.get_or_init(|| std::env::var(CHOSEN).ok()).as_deref() == Some(name)
}
