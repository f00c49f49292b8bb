//! Building the kernel and starting QEMU.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::Result;
use crate::cmd::{self, End};

const QEMU: &str = "qemu-system-x86_64";
const MACHINE: &str = "-machine q35 -nodefaults -no-user-config -display none -no-reboot -m 256 -serial stdio \
    -device isa-debug-exit,iobase=0xf4,iosize=4";
/// Two CPUs at the same time.
const TWO: &str = "-accel tcg,thread=multi -smp 2 -cpu max";
const TWO_KVM: &str = "-accel kvm -smp 2 -cpu host";
/// One CPU whose clock ticks once an instruction, whose random numbers are the same each time, and that does not clear
/// and copy by microcode.
const COUNTED: &str = "-accel tcg,thread=single -smp 1 -icount shift=0,sleep=off -rtc clock=vm,base=2024-01-01 -seed 1 \
    -cpu max,erms=off,fsrm=off";
/// QEMU's exit status when the kernel is content: twice 0x10, and one.
const SUCCESS: i32 = 33;
/// How long a run may take. Alone on two CPUs it takes seconds; where others use them too, the emulated CPUs wait long
/// for each other.
const LIMIT: Duration = Duration::from_secs(120);

/// The files that were built.
pub(super) struct Built {
    /// The kernel's image.
    pub(super) kernel: PathBuf,
    /// QEMU's plugin.
    pub(super) plugin: PathBuf,
}

/// Which machine the kernel gets, and what it does there.
#[derive(Clone, Copy)]
pub(super) enum Run {
    /// The user programs, on two CPUs.
    Test {
        /// On the host's virtualisation.
        is_kvm: bool,
    },
    /// All cases, on one CPU that counts.
    Count,
    /// All cases, on two CPUs.
    Lines,
    /// The stress, on two CPUs.
    Stress {
        /// On the host's virtualisation.
        is_kvm: bool,
        /// Where chance starts.
        seed: u64,
        /// How long.
        seconds: u64,
    },
}

/// How often the test run is repeated.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Repeat {
    /// That often.
    Boots(u64),
    /// For so long.
    Minutes(f64),
}

impl Eq for Repeat {}

/// Looks for QEMU, then builds the kernel, with these features, and the plugin.
pub(super) fn build(features: &str) -> Result<Built> {
    if cmd::capture(Command::new(QEMU).arg("--version"), None).is_err() {
        return Err(format!("there is no `{QEMU}` here; on Debian: apt-get install qemu-system-x86"));
    }
    let cargo = |args: &[&str]| {
        let mut command = cmd::cargo(&["build", "--quiet", "--message-format", "json-render-diagnostics"]);
        let what = format!("`cargo build {}`", args.join(" "));
        cmd::capture(command.args(args), None)?.into_stdout(&what)
    };
    let kernel = cargo(&["--package", "tiny-kernel", "--features", features, "--profile", "kernel"])?;
    let plugin = cargo(&["--package", "tiny-kernel-plugin", "--release"])?;
    Ok(Built {
        kernel: crate::model::executable(&kernel).ok_or("cargo named no kernel")?,
        plugin: library(&plugin).ok_or("cargo named no plugin")?,
    })
}

/// The last shared library that cargo's messages name.
fn library(messages: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let files = messages.flat_map(|message| message["filenames"].as_array().cloned().unwrap_or_default());
    let mut paths = files.filter_map(|file| file.as_str().map(PathBuf::from));
    paths.rfind(|path| path.extension().is_some_and(|extension| extension == "so"))
}

/// Runs the kernel, with an argument for `-plugin` if there is one, and hands over what it printed. An error has all
/// of that.
pub(super) fn qemu(built: &Built, run: Run, plugin: Option<&str>) -> Result<String> {
    let two = |is_kvm| if is_kvm { TWO_KVM } else { TWO };
    let (machine, append, limit) = match run {
        Run::Test { is_kvm } => (two(is_kvm), "test".to_owned(), LIMIT),
        Run::Count => (COUNTED, "count".into(), LIMIT),
        Run::Lines => (TWO, "lines".into(), LIMIT),
        Run::Stress { is_kvm, seed, seconds } => {
            (two(is_kvm), format!("stress {seed} {seconds}"), LIMIT + Duration::from_secs(seconds))
        }
    };
    let mut command = Command::new(QEMU);
    command.args(MACHINE.split_whitespace()).args(machine.split_whitespace());
    command.arg("-kernel").arg(&built.kernel).args(["-append", &append]);
    if let Some(plugin) = plugin {
        command.args(["-plugin", plugin]);
    }
    let output = cmd::capture(&mut command, Some(limit))?;
    let serial = output.stdout.replace('\r', "");
    let problem = match output.end {
        End::Exited(status) if status.code() == Some(SUCCESS) => return Ok(serial),
        End::Exited(status) => format!("ended with {status}, not with {SUCCESS}"),
        End::TimedOut => format!("was stopped after {} seconds", limit.as_secs()),
    };
    Err(format!("{serial}{}`{}` {problem}", output.stderr, cmd::show(&command)))
}

/// An argument of `-plugin`, in which a comma ends a value and two are one.
pub(super) fn escape(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Runs the user programs, and prints what the kernel says.
pub(super) fn test(built: &Built, is_kvm: bool) -> Result {
    let serial = qemu(built, Run::Test { is_kvm }, None)?;
    print!("{serial}");
    judge(&serial)
}

/// Runs the stress, and prints how it ended.
pub(super) fn stress(built: &Built, is_kvm: bool, seed: u64, seconds: u64) -> Result {
    println!("stress with seed {seed} for {seconds} s");
    let serial = qemu(built, Run::Stress { is_kvm, seed, seconds }, None)?;
    let last: Vec<&str> = serial.lines().rev().take(3).collect();
    last.iter().rev().for_each(|line| println!("{line}"));
    judge(&serial)?;
    match stressed(&serial) {
        Some((took, operations)) if took >= seconds && operations > 0 => Ok(()),
        found => {
            Err(format!("the stress was to take {seconds} s; it told of {found:?} (seconds, operations)"))
        }
    }
}

/// How many seconds the stress took, and how many operations it did, by its last word at a quiet point.
fn stressed(serial: &str) -> Option<(u64, u64)> {
    let told = |line: &str| {
        let (seconds, rest) = line.strip_prefix("stress: ")?.split_once(" s, ")?;
        let (operations, _) = rest.split_once(" operations")?;
        Some((seconds.parse().ok()?, operations.parse().ok()?))
    };
    serial.lines().rev().find_map(told)
}

/// Every program must have said that it is content.
fn judge(serial: &str) -> Result {
    let programs = || serial.lines().filter(|line| line.starts_with("program "));
    let failed: Vec<&str> = programs().filter(|line| !line.ends_with(": ok")).collect();
    match failed.as_slice() {
        [] if programs().next().is_none() => Err("the kernel ran no program".into()),
        [] => Ok(()),
        failed => Err(failed.join("\n")),
    }
}

/// Repeats the test run until the first failure.
pub(super) fn repeat(built: &Built, is_kvm: bool, repeat: Repeat) -> Result {
    let start = Instant::now();
    let bar = match repeat {
        Repeat::Boots(boots) => ProgressBar::new(boots),
        Repeat::Minutes(minutes) => ProgressBar::new((minutes * 60.0) as u64),
    };
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:40}] {percent}% {eta}") {
        bar.set_style(style);
    }
    let mut boots = 0;
    loop {
        let position = match repeat {
            Repeat::Boots(_) => boots,
            Repeat::Minutes(_) => start.elapsed().as_secs(),
        };
        bar.set_position(position);
        if bar.length().is_some_and(|length| position >= length) {
            break;
        }
        boots += 1;
        bar.set_message(format!("boot {boots}"));
        qemu(built, Run::Test { is_kvm }, None)
            .and_then(|serial| judge(&serial).map_err(|failure| format!("{serial}{failure}")))
            .map_err(|failure| format!("boot {boots}:\n{failure}"))?;
    }
    bar.finish_and_clear();
    println!("{boots} boots in {:.1} s, all well", start.elapsed().as_secs_f64());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_must_be_content() {
        assert_eq!(judge("hello\nprogram a: ok\nprogram b: ok\n"), Ok(()));
        assert_eq!(judge("program a: ok\nprogram b: FAILED why\n"), Err("program b: FAILED why".into()));
        assert!(judge("hello\n").is_err());
    }

    #[test]
    fn the_stress_tells_how_long_it_took() {
        let serial = "stress: 4 s, 7 operations, 2 pages mapped\nstress: 11 s, 900 operations, 2 pages mapped\n\
                      stress: 950 operations with seed 1\nprogram stress: ok\n";
        assert_eq!(stressed(serial), Some((11, 900)));
        assert_eq!(stressed("stress: 950 operations with seed 1\n"), None);
    }

    #[test]
    fn the_plugin_is_found_and_its_path_escaped() {
        let messages =
            "{\"filenames\":[\"/a/x.rlib\"]}\n{\"filenames\":[\"/a/lib,x.so\"]}\n{\"reason\":\"end\"}\n";
        let path = library(messages).expect("it is named");
        assert_eq!(path, PathBuf::from("/a/lib,x.so"));
        assert_eq!(escape(&path), "/a/lib,,x.so");
    }
}
