//! `cargo xtask mmu`: tables that the library built (`examples/mmu-tables`) are walked by QEMU's MMUs of other machines.
//!
//! A stub in the machine's assembly makes a list of accesses as user code would, and prints what came of each; what must
//! come of it was said by whoever built the tables. Five levels of x86-64 are walked for the tiny kernel's programs.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::{Result, cmd, kernel};

/// How long one run may take. It takes a fraction of a second.
const LIMIT: Duration = Duration::from_secs(120);

/// A machine whose MMU walks tables.
struct Guest {
    /// The stub, without its extension.
    stub: &'static str,
    /// The compiler, its package, its options, and where the stub is linked to.
    compiler: (&'static str, &'static str),
    options: &'static [&'static str],
    text: &'static str,
    /// QEMU, its package and its machine.
    qemu: (&'static str, &'static str),
    machine: &'static str,
    /// Where the image lies in its memory.
    image: &'static str,
    /// What a line of the stub says; the kind of the probe beside it.
    decode: fn(&str, [u64; 3]) -> String,
}

const RISCV64: Guest = Guest {
    stub: "riscv64",
    compiler: ("riscv64-linux-gnu-gcc", "gcc-riscv64-linux-gnu"),
    options: &["-march=rv64gc_zicsr"],
    text: "0x80000000",
    qemu: ("qemu-system-riscv64", "qemu-system-misc"),
    machine: "-machine virt -cpu rv64,svpbmt=on -bios none",
    image: "0x84000000",
    decode: riscv64,
};

const AARCH64: Guest = Guest {
    stub: "aarch64",
    compiler: ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    options: &[],
    text: "0x40200000",
    qemu: ("qemu-system-aarch64", "qemu-system-arm"),
    machine: "-machine virt -cpu cortex-a57",
    image: "0x44000000",
    decode: aarch64,
};

const FORMATS: [(&str, Guest); 3] = [("sv39", RISCV64), ("sv48", RISCV64), ("aarch64", AARCH64)];

/// Checks every format.
pub(crate) fn run() -> Result {
    for (_, guest) in &FORMATS {
        for (program, package) in [guest.compiler, guest.qemu] {
            if cmd::capture(Command::new(program).arg("--version"), None).is_err() {
                return Err(format!("there is no `{program}` here; on Debian: apt-get install {package}"));
            }
        }
    }
    cmd::check(&mut cmd::cargo(&["build", "--quiet", "--package", "mmu-tables"]))?;
    let dir = cmd::target_dir().join("mmu");
    std::fs::create_dir_all(&dir).map_err(|error| format!("cannot make {}: {error}", dir.display()))?;
    for (format, guest) in &FORMATS {
        let probes = check(format, guest, &dir)?;
        println!("{format}: {probes} accesses by the MMU of {}, each as expected", guest.qemu.0);
    }
    println!("x86-64 with five levels: the tiny kernel");
    kernel::la57()
}

fn check(format: &str, guest: &Guest, dir: &Path) -> Result<usize> {
    let image = dir.join(format!("{format}.image"));
    let mut build = cmd::cargo(&["run", "--quiet", "--package", "mmu-tables", "--", format]);
    let expected = cmd::capture(build.arg(&image), None)?.into_stdout("building the tables")?;

    let elf = dir.join(format!("{}.elf", guest.stub));
    let link = format!("-Wl,-Ttext={},--build-id=none", guest.text);
    let mut assemble = Command::new(guest.compiler.0);
    assemble.args(guest.options).args(["-nostdlib", "-static", &link, "-o"]).arg(&elf);
    assemble.arg(cmd::root().join(format!("examples/mmu-tables/stubs/{}.S", guest.stub)));
    cmd::capture(&mut assemble, None)?.into_stdout("assembling the stub")?;

    let mut qemu = Command::new(guest.qemu.0);
    qemu.args(guest.machine.split(' '));
    qemu.args("-m 256 -nodefaults -no-user-config -display none -no-reboot -serial stdio -kernel".split(' '));
    qemu.arg(&elf).arg("-device");
    qemu.arg(format!("loader,file={},addr={},force-raw=on", image.display(), guest.image));
    let printed = cmd::capture(&mut qemu, Some(LIMIT))?.into_stdout(guest.qemu.0)?;
    compare(&expected, &printed, guest.decode).map_err(|what| format!("{format}: {what}"))
}

/// The number of accesses, if each came to what was expected of it.
fn compare(expected: &str, printed: &str, decode: fn(&str, [u64; 3]) -> String) -> Result<usize> {
    let mut failures = Vec::new();
    let mut lines = printed.lines();
    for probe in expected.lines() {
        let mut parts = probe.split('\t');
        let (Some(kind), Some(name), Some(expected)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(format!("not a line of three parts: {probe}"));
        };
        let Some(line) = lines.next() else { return Err(format!("the guest stopped before: {name}")) };
        let found = decode(kind, numbers(line).ok_or_else(|| format!("the guest printed: {line}"))?);
        if found != expected {
            failures.push(format!("  {name}: expected {expected}, found {found}"));
        }
    }
    match (failures.as_slice(), lines.next()) {
        ([], None) => Ok(expected.lines().count()),
        ([], Some(line)) => Err(format!("the guest printed more than was asked for: {line}")),
        _ => Err(format!("the MMU disagrees\n{}", failures.join("\n"))),
    }
}

fn numbers(line: &str) -> Option<[u64; 3]> {
    let all: Option<Vec<u64>> = line.split_whitespace().map(|n| u64::from_str_radix(n, 16).ok()).collect();
    all?.try_into().ok()
}

/// Privileged architecture, table "Machine cause register values after trap".
fn riscv64(_: &str, [cause, value, addr]: [u64; 3]) -> String {
    let access = match cause {
        0 => return format!("value {value:#x}"),
        12 => "fetch",
        13 => "load",
        15 => "store",
        _ => return format!("trap {cause} at {addr:#x}"),
    };
    format!("{access} fault at {addr:#x}")
}

/// Arm ARM, `PAR_EL1` and `ESR_EL1`: exception class in bits 31:26, 0x20 instruction abort from EL0, 0x25 data abort from
/// EL1 (an unprivileged load or store); fault status in bits 5:0, its lowest two the level.
fn aarch64(kind: &str, [syndrome, value, addr]: [u64; 3]) -> String {
    let why = |status: u64| match status >> 2 {
        1 => "translation".to_owned(),
        3 => "permission".to_owned(),
        _ => format!("status {status:#x}"),
    };
    let class = syndrome >> 26;
    match (kind.starts_with("translate"), value & 1, syndrome) {
        (true, 1, 0) => format!("{} fault", why(value >> 1 & 0x3f)),
        (true, _, 0) => {
            format!("physical {:#x}, memory type {:#x}", value & 0xffff_ffff_f000, value >> 56)
        }
        (false, _, 0) => format!("value {value:#x}"),
        _ if class == 0x20 || class == 0x25 => format!("{} fault at {addr:#x}", why(syndrome & 0x3f)),
        _ => format!("trap {syndrome:#x} at {addr:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPECTED: &str =
        "load\ta page, load at 0x10\tvalue 0x5\nstore\ta page, store\tstore fault at 0x20\n";

    #[test]
    fn what_the_guest_says_is_compared_line_by_line() {
        let compare = |printed| compare(EXPECTED, printed, riscv64);
        assert_eq!(compare("0 5 0\nf 0 20\n"), Ok(2));
        let told = |printed, what: &str| {
            let told = compare(printed).expect_err(what);
            assert!(told.contains(what), "{told}");
        };
        told("0 6 0\nf 0 20\n", "a page, load at 0x10: expected value 0x5, found value 0x6");
        told("0 5 0\nd 0 20\n", "expected store fault at 0x20, found load fault at 0x20");
        told("0 5 0\n", "stopped before: a page, store");
        told("0 5 0\nf 0 20\n0 0 0\n", "more than was asked for");
        told("0 5\n", "the guest printed: 0 5");
    }

    #[test]
    fn what_aarch64_says() {
        assert_eq!(aarch64("fetch", [0x8200_000f, 0, 0x1000]), "permission fault at 0x1000");
        assert_eq!(aarch64("load", [0x9600_0006, 0, 0x1000]), "translation fault at 0x1000");
        assert_eq!(aarch64("load", [0x5600_0000, 0, 0]), "trap 0x56000000 at 0x0");
        let physical = "physical 0x45000000, memory type 0xff";
        assert_eq!(aarch64("translate for a load", [0, 0xff00_0000_4500_0b80, 0]), physical);
        assert_eq!(aarch64("translate for a store", [0, 0x81f, 0]), "permission fault");
    }
}
