//! Real programs are recorded. Without QEMU these tests say so and do nothing.

use std::ffi::OsString;

use pagefirst_record::{
    Event, LossKind, MapKind, ProcessId, RecordError, RecordOptions, Recording, Summary, record,
};

/// Records a program and reads the recording; `None` without QEMU.
fn run(program: &str, arguments: &[&str]) -> Option<(Summary, Vec<(ProcessId, Event)>)> {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("it.pfrec");
    let arguments = arguments.iter().map(OsString::from).collect();
    let options = RecordOptions {
        program: program.into(),
        arguments,
        output: output.clone(),
        native_runs: 3,
        level: 3,
    };
    let summary = match record(&options) {
        Err(error @ (RecordError::NoEmulator | RecordError::Architecture)) => {
            eprintln!("skipped: {error}");
            return None;
        }
        result => result.unwrap(),
    };
    let mut recording = Recording::open(std::fs::File::open(output).unwrap()).unwrap();
    let mut events = Vec::new();
    while let Some(event) = recording.next_event().unwrap() {
        events.push(event);
    }
    assert_eq!(recording.trailer(), Some(&summary.trailer));
    assert_eq!(summary.report.unexplained, 0, "{:?}", summary.report.examples);
    Some((summary, events))
}

#[test]
fn a_program_is_recorded_with_its_status_and_native_figures() {
    let Some((summary, events)) = run("sh", &["-c", "exit 7"]) else { return };
    assert_eq!(summary.trailer.exit_status, 7);
    assert!(summary.trailer.losses.is_empty(), "{:?}", summary.trailer.losses);
    assert!(summary.trailer.accesses > 10_000);
    let native = summary.trailer.native.expect("native figures");
    assert_eq!(native.runs.len(), 3);
    let native = native.median();
    assert_eq!(native.exit_status, 7);
    // Few programs start with fewer faults; many more would mean that something else was counted.
    assert!((30..5_000).contains(&native.minor_faults), "{native:?}");
    assert!(native.vm_hwm_kib > 300 && native.vm_pte_kib > 0, "{native:?}");
    for kind in [MapKind::Program, MapKind::Stack, MapKind::Heap] {
        let made =
            events.iter().filter(|event| matches!(event, (_, Event::Map(map)) if map.kind == kind)).count();
        assert!(made > 0, "{kind:?}");
    }
}

#[test]
fn children_and_their_programs_are_recorded() {
    // A pipeline: two children that execute a program each, which must be there and be none of the shell's own.
    let Some((summary, events)) = run("sh", &["-c", "ls / | sort > /dev/null; (exit 3)"]) else { return };
    assert_eq!(summary.trailer.exit_status, 3);
    assert!(summary.trailer.losses.is_empty(), "{:?}", summary.trailer.losses);
    let found = &summary.report.processes;
    let programs: Vec<_> = found.iter().map(|process| process.programs[1..].join(" ")).collect();
    assert_eq!(programs, ["", "ls", "sort", ""]);
    assert!(found.iter().skip(1).all(|process| process.parent == Some(ProcessId(0))), "{found:?}");
    // The children come from the first process, each begins after its fork and ends on its own.
    for child in 1..4 {
        let child = ProcessId(child);
        let born = events.iter().position(|(process, event)| {
            *process == ProcessId(0) && matches!(event, Event::Fork { child: other, .. } if *other == child)
        });
        let own: Vec<_> = (0..events.len()).filter(|&index| events[index].0 == child).collect();
        assert!(born.unwrap() < own[0], "{child:?}");
        let status = if child == ProcessId(3) { 3 } else { 0 };
        let last = &events[*own.last().unwrap()].1;
        assert!(
            matches!(last, Event::End { exit_status: Some(found), accesses } if *found == status && *accesses > 0),
            "{last:?}"
        );
        // It writes to pages of its parent's, which a fork makes fault once more.
        let first = own.iter().find(|&&index| matches!(events[index].1, Event::Touch { .. }));
        assert!(
            first.is_some_and(
                |&index| matches!(&events[index].1, Event::Touch { at, .. } if at.mapping.0 < 40)
            )
        );
        // A program that it executes has mappings of its own, from 0 on.
        let exec = own.iter().position(|&index| matches!(events[index].1, Event::Exec { .. }));
        assert_eq!(exec.is_some(), child != ProcessId(3));
        if let Some(exec) = exec {
            let map = own[exec..].iter().find_map(|&index| match &events[index].1 {
                Event::Map(map) => Some(map),
                _ => None,
            });
            assert!(map.is_some_and(|map| (map.id.0, map.kind) == (0, MapKind::Program)), "{map:?}");
        }
    }
}

#[test]
fn a_script_is_run_and_what_cannot_be_run_fails_as_it_should() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("script");
    std::fs::write(&script, "#!/bin/sh -e\nexit $1\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let line = "$0 5; [ $? = 5 ] || exit 1; /nonexistent; [ $? = 127 ] || exit 2; /; [ $? = 126 ] || exit 3";
    let Some((summary, _)) = run("sh", &["-c", line, script.to_str().unwrap()]) else { return };
    assert_eq!(summary.trailer.exit_status, 0);
    assert!(summary.trailer.losses.is_empty(), "{:?}", summary.trailer.losses);
    let programs = &summary.report.processes[1].programs;
    assert_eq!(programs.len(), 2, "{programs:?}");
}

#[test]
fn a_program_that_is_killed_leaves_a_sound_recording() {
    let Some((summary, events)) = run("sh", &["-c", "kill -SEGV $$"]) else { return };
    assert_eq!(summary.trailer.exit_status, 139);
    assert_eq!(summary.trailer.losses.first().map(|loss| loss.kind), Some(LossKind::Cut));
    assert!(events.len() > 100);
}

#[test]
fn what_is_no_program_is_refused() {
    let options = |program: &str| RecordOptions {
        program: program.into(),
        arguments: Vec::new(),
        output: "/nonexistent/it.pfrec".into(),
        native_runs: 0,
        level: 3,
    };
    let error = record(&options("there-is-no-such-program")).unwrap_err();
    assert!(matches!(error, RecordError::NoProgram(_)), "{error}");
    let script = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&script, "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let error = record(&options(script.path().to_str().unwrap())).unwrap_err();
    assert!(matches!(error, RecordError::NotElf(_)), "{error}");
}
