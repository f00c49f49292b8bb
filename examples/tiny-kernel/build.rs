//! Compiles the user programs, and says how the kernel is linked.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=user");
    println!("cargo::rerun-if-changed=kernel.ld");
    println!("cargo::rerun-if-env-changed=CC");
    if env::var_os("CARGO_FEATURE_BOOT").is_none() {
        return;
    }
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".into());
    let mut programs = String::new();
    for mode in ["test", "count", "lines"] {
        let folder = fs::read_dir(format!("user/{mode}")).expect("a folder of programs");
        let mut sources: Vec<_> = folder.map(|entry| entry.expect("a file").path()).collect();
        sources.sort();
        for source in sources {
            let name = source.file_stem().expect("a name").to_str().expect("in ASCII");
            let mut cc = Command::new(&compiler);
            cc.args([
                "-O2",
                "-Wall",
                "-Werror",
                "-std=gnu11",
                "-ffreestanding",
                "-fno-stack-protector",
                "-Iuser",
            ]);
            cc.args(["-fno-pie", "-no-pie", "-static", "-nostdlib", "-fno-asynchronous-unwind-tables"]);
            cc.arg("-Wl,-z,noexecstack,--build-id=none")
                .arg(&source)
                .arg("-o")
                .arg(Path::new(&out).join(name));
            let status = cc.status().unwrap_or_else(|e| panic!("no C compiler `{compiler}` (set CC): {e}"));
            assert!(status.success(), "{} does not compile", source.display());
            programs +=
                &format!("({mode:?}, {name:?}, include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}\"))),");
        }
    }
    let list = format!("pub static PROGRAMS: &[(&str, &str, &[u8])] = &[{programs}];");
    fs::write(Path::new(&out).join("programs.rs"), list).expect("OUT_DIR can be written");
    let script = format!("{}/kernel.ld", env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    for arg in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,-z,max-page-size=4096"] {
        println!("cargo::rustc-link-arg-bins={arg}");
    }
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{script},-z,noexecstack,--build-id=none,--no-eh-frame-hdr");
}
