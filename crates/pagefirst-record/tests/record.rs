//! Real programs are recorded. Without QEMU these tests say so and do nothing.

use std::ffi::OsString;

use pagefirst_record::{Event, LossKind, MapKind, RecordError, RecordOptions, Recording, Summary, record};

/// Records a program and reads the recording; `None` without QEMU.
fn run(program: &str, arguments: &[&str]) -> Option<(Summary, Vec<Event>)> {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("it.pfrec");
    let arguments = arguments.iter().map(OsString::from).collect();
    let options =
        RecordOptions { program: program.into(), arguments, output: output.clone(), native: true, level: 3 };
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
    assert_eq!(native.exit_status, 7);
    // Few programs start with fewer faults; many more would mean that something else was counted.
    assert!((30..5_000).contains(&native.minor_faults), "{native:?}");
    assert!(native.vm_hwm_kib > 300 && native.vm_pte_kib > 0, "{native:?}");
    for kind in [MapKind::Program, MapKind::Stack, MapKind::Heap] {
        let made = events.iter().filter(|event| matches!(event, Event::Map(map) if map.kind == kind)).count();
        assert!(made > 0, "{kind:?}");
    }
}

#[test]
fn children_and_other_programs_are_listed_as_lost() {
    let Some((summary, _)) = run("sh", &["-c", "(exit 1); (exit 2); exec true"]) else { return };
    let losses: Vec<_> =
        summary.trailer.losses.iter().map(|loss| (loss.kind, loss.name.as_str(), loss.count)).collect();
    assert_eq!(losses, [(LossKind::Fork, "", 2), (LossKind::Exec, "true", 1)]);
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
        native: false,
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
