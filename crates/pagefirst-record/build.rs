//! Compiles the plugin that the driver carries in itself.
//!
//! Not as a dependency: cargo can't yet hand a package the file of another that is a `cdylib`.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=plugin-src");
    let variable = |name| PathBuf::from(env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}")));
    let plugin = variable("OUT_DIR").join("libpagefirst_plugin.so");
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--edition", "2024", "--crate-type", "cdylib", "--crate-name", "pagefirst_plugin"]);
    rustc.args(["-O", "-C", "panic=abort", "-C", "strip=symbols", "plugin-src/lib.rs", "-o"]).arg(plugin);
    let status = rustc.status().unwrap_or_else(|error| panic!("rustc can't be run: {error}"));
    assert!(status.success(), "the plugin does not compile");
}
