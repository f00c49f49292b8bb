//! Compiles the user programs, and says how the kernel is linked.

use std::env;
use std::path::Path;
use std::process::Command;

const PROGRAMS: [&str; 11] =
    ["anon", "errors", "file", "huge", "lines", "measure", "pointer", "private", "shared", "shoot", "two"];

fn main() {
    println!("cargo::rerun-if-changed=user");
    println!("cargo::rerun-if-changed=kernel.ld");
    if env::var_os("CARGO_FEATURE_BOOT").is_none() {
        return;
    }
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".into());
    for program in PROGRAMS {
        let mut cc = Command::new(&compiler);
        cc.args([
            "-O2",
            "-Wall",
            "-Werror",
            "-std=gnu11",
            "-ffreestanding",
            "-fno-pie",
            "-fno-stack-protector",
        ]);
        cc.args(["-fno-asynchronous-unwind-tables", "-nostdlib", "-static", "-no-pie", "-Wl,-z,noexecstack"]);
        cc.arg("-Wl,--build-id=none").arg(format!("user/{program}.c"));
        cc.arg("-o").arg(Path::new(&out).join(program));
        let status = cc.status().unwrap_or_else(|e| panic!("no C compiler `{compiler}` (set CC): {e}"));
        assert!(status.success(), "user/{program}.c does not compile");
    }
    let script = format!("{}/kernel.ld", env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    for arg in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,-z,max-page-size=4096"] {
        println!("cargo::rustc-link-arg-bins={arg}");
    }
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{script},-z,noexecstack,--build-id=none,--no-eh-frame-hdr");
}
