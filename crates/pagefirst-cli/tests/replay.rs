//! `pagefirst replay` and `pagefirst check`, as a user calls them.

use std::path::Path;
use std::process::{Command, Output};

use pagefirst_record::{
    Arch, Backing, Event, Header, Map, MapKind, MappingId, Place, ProcessId, Prot, Recording, ThreadId,
    Trailer, VERSION, Writer,
};
use serde_json::Value;

fn pagefirst(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pagefirst")).args(arguments).output().unwrap()
}

fn replay(arguments: &[&str]) -> Output {
    pagefirst(&[&["replay"], arguments].concat())
}

/// What the bundled recording says of Linux.
fn trailer(name: &str) -> Trailer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recordings").join(name).with_extension("pfrec");
    let mut recording = Recording::open(std::fs::File::open(path).unwrap()).unwrap();
    while recording.next_event().unwrap().is_some() {}
    recording.trailer().unwrap().clone()
}

#[test]
fn replays_of_the_bundled_recordings_come_close_to_linux() {
    for name in ["cc1", "sqlite", "python", "shell"] {
        let output = replay(&[name, "--policy", "linux", "--json"]);
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let native = trailer(name).native.expect("native figures");
        assert_eq!(native.runs.len(), 5, "{name}");
        let median = native.median();
        let linux = [median.minor_faults, median.vm_hwm_kib, median.vm_pte_kib];
        let rows = report["beside_linux"].as_array().unwrap();
        assert_eq!(rows.len(), linux.len(), "{name}");
        for (row, linux) in rows.iter().zip(linux) {
            assert_eq!(row["linux"], linux, "{name}: {row}");
            let bound = (linux * 15 / 100).max(16);
            let error = row["replay"].as_u64().unwrap().abs_diff(linux);
            assert!(error <= bound && row["within"] == true, "{name}: {row}");
        }
        assert_eq!(report["runs"][0]["calls_failed"], 0, "{name}");
    }
}

#[test]
fn the_comparison_is_printed_with_its_errors() {
    let output = replay(&["python", "--policy", "linux"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for what in ["minor faults ", "VmHWM, kB ", "VmPTE, kB "] {
        let line = text.lines().find(|line| line.starts_with(what)).expect(what);
        assert!(line.ends_with("  within"), "{line}");
    }
}

#[test]
fn linux_has_its_own_tables_window_and_placement() {
    for other in [["--tables", "postponed"], ["--fault-around", "4K"], ["--place", "ours"]] {
        let output = replay(&["python", "--policy", "linux", other[0], other[1]]);
        assert_eq!(output.status.code(), Some(2), "{other:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(other[0]), "{other:?}");
    }
}

/// Writes a recording of a shell that maps a page and does this.
fn write(path: &Path, event: Event) {
    let header = Header {
        version: VERSION,
        arch: Arch::X86_64,
        page_size: 4096,
        program: "sh".into(),
        emulator: "emulator".into(),
    };
    let mut writer = Writer::create(std::fs::File::create(path).unwrap(), &header, 3).unwrap();
    let map = Map {
        thread: ThreadId(0),
        id: MappingId(0),
        len: 4096,
        reserve: 4096,
        prot: Prot::READ_WRITE,
        backing: Backing::Anonymous,
        shared: false,
        populate: false,
        grows_down: false,
        no_reserve: false,
        kind: MapKind::Mmap,
        place: Place::Anywhere { recorded: 0x4000 },
    };
    let end = Event::End { exit_status: Some(0), accesses: 0 };
    let child = matches!(event, Event::Fork { .. }).then_some(ProcessId(1));
    for event in [Event::Map(map), event, end.clone()] {
        writer.event(ProcessId(0), &event).unwrap();
    }
    if let Some(child) = child {
        writer.event(child, &end).unwrap();
    }
    writer.finish(&Trailer::default()).unwrap();
}

/// What a replay says of each process.
fn programs(arguments: &[&str]) -> Vec<Value> {
    let output = replay(&[arguments, &["--json", "--checks"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for run in report["runs"].as_array().unwrap() {
        assert_eq!((&run["left"]["frames"], &run["left"]["tables"]), (&0.into(), &0.into()));
        assert_eq!(
            (&run["calls_failed"], &run["sigsegv"], &run["sigbus"]),
            (&0.into(), &0.into(), &0.into())
        );
    }
    report["runs"][0]["programs"].as_array().unwrap().clone()
}

/// `sh -c 'ls | sort'`: two children, each with a program of its own after the shell's.
#[test]
fn processes_and_programs_are_replayed_each_in_its_space() {
    for cpus in ["1", "2"] {
        let programs = programs(&["shell", "--cpus", cpus]);
        let mut said: Vec<_> = programs
            .iter()
            .map(|program| {
                let name = program["program"].as_str().unwrap();
                (program["process"].as_u64().unwrap(), name, program["touches"].as_u64().unwrap())
            })
            .collect();
        said.sort_by_key(|(process, ..)| *process);
        assert_eq!(said, [(0, "sh", 290), (1, "sh", 51), (1, "ls", 320), (2, "sh", 51), (2, "sort", 284)]);
        for program in &programs {
            let copies = program["copy"].as_u64().unwrap();
            assert!(copies > 0, "each writes to what it shares with another, or to a file's page: {program}");
        }
    }
}

#[test]
fn a_process_that_is_alone_in_a_recording_is_replayed_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("it.pfrec");
    let name = path.to_str().unwrap();
    let thread = ThreadId(0);
    let fork = Event::Fork { thread, child: ProcessId(1), shares_memory: false };
    let exec = Event::Exec { thread, program: "ls".into() };
    for (event, processes) in [(fork, [(0, "sh"), (1, "sh")]), (exec, [(0, "sh"), (0, "ls")])] {
        write(&path, event);
        let programs = programs(&[name]);
        let said = programs.iter().map(|p| (p["process"].as_u64().unwrap(), p["program"].as_str().unwrap()));
        assert_eq!(said.collect::<Vec<_>>(), processes);
    }
}

#[test]
fn a_check_says_what_each_process_did() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("it.pfrec");
    write(&path, Event::Fork { thread: ThreadId(0), child: ProcessId(1), shares_memory: false });
    let check = |path: &Path| {
        let output = pagefirst(&["check", path.to_str().unwrap()]);
        let text = String::from_utf8(if output.status.success() { output.stdout } else { output.stderr });
        (output.status.code(), text.unwrap())
    };
    let (status, text) = check(&path);
    assert_eq!(status, Some(0));
    assert!(text.contains("1, made by 0: sh; 0 touches, 0 unexplained"), "{text}");
    assert!(text.contains("check        passes"), "{text}");
    // The same, cut short.
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let (status, text) = check(&path);
    assert_eq!(status, Some(1));
    assert!(
        text.starts_with(&format!("pagefirst: {}: event 4, of process 1, at byte ", path.display())),
        "{text}"
    );
    assert!(text.contains("found the end"), "{text}");
}
