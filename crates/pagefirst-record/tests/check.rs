//! The bundled recordings explain themselves, and no longer do when something is taken out.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::PathBuf;

use pagefirst_record::{Checker, Event, Place, ProcessId, Prot, Reason, Recording, Trailer, check};

fn recordings() -> Vec<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../pagefirst-cli/recordings");
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|end| end == "pfrec")).collect();
    files.sort();
    assert_eq!(files.len(), 4);
    files
}

fn read(path: &PathBuf) -> (Vec<Event>, Trailer) {
    let mut recording = Recording::open(BufReader::new(File::open(path).unwrap())).unwrap();
    let mut events = Vec::new();
    while let Some((_, event)) = recording.next_event().unwrap() {
        events.push(event);
    }
    (events, recording.trailer().unwrap().clone())
}

#[test]
fn the_bundled_recordings_explain_themselves() {
    let mut bytes = 0;
    for path in recordings() {
        bytes += fs::metadata(&path).unwrap().len();
        let mut recording = Recording::open(BufReader::new(File::open(&path).unwrap())).unwrap();
        let report = check(&mut recording).unwrap();
        let trailer = recording.trailer().unwrap();
        assert!(report.passes(), "{}: {report:?}", path.display());
        assert!(report.touches > 100);
        assert_eq!(report.touches, report.explained + report.unexplained);
        assert_eq!((trailer.touches, trailer.unexplained), (report.touches, report.unexplained));
        assert!(trailer.losses.is_empty());
        assert_eq!(trailer.exit_status, 0);
        let native = trailer.native.as_ref().expect("native figures");
        assert_eq!(native.runs.len(), 5);
        let native = native.median();
        assert!(native.minor_faults > 50 && native.vm_hwm_kib > 1_000 && native.vm_pte_kib > 0);
        assert_eq!(native.exit_status, 0);
    }
    assert!(bytes < 2 << 20, "{bytes} bytes in all");
}

#[test]
fn no_path_is_in_the_bundled_recordings() {
    for path in recordings() {
        let (events, _) = read(&path);
        for event in events {
            if let Event::File(info) = event {
                assert!(!info.name.contains('/') && !info.name.is_empty(), "{}: {info:?}", path.display());
            }
        }
    }
}

/// Whether a check of the events without one of them fails, and what it says first.
fn fails_without(events: &[Event], index: usize) -> (bool, Option<Reason>) {
    let mut checker = Checker::new("");
    events
        .iter()
        .enumerate()
        .filter(|&(other, _)| other != index)
        .for_each(|(_, event)| checker.event(ProcessId(0), event));
    let report = checker.report();
    (!report.passes(), report.examples.first().map(|example| example.reason))
}

#[test]
fn a_recording_with_one_mmap_taken_out_fails_the_check() {
    for path in recordings() {
        let (events, _) = read(&path);
        let (mut taken, mut fatal) = (0, 0);
        let mut reasons = Vec::new();
        for (index, event) in events.iter().enumerate() {
            if !matches!(event, Event::Map(map) if map.prot != Prot::NONE) {
                continue;
            }
            taken += 1;
            let (fails, reason) = fails_without(&events, index);
            fatal += u32::from(fails);
            reasons.extend(reason);
        }
        // Mappings that were never touched aren't missed, nor those over others that allow the same.
        assert!(fatal * 2 > taken, "{}: only {fatal} of {taken} are missed", path.display());
        // One of each kind: nothing is mapped there; what the loader mapped before does not allow it.
        assert!(reasons.contains(&Reason::NotMapped), "{}", path.display());
        assert!(reasons.contains(&Reason::NotAllowed), "{}", path.display());
    }
}

#[test]
fn the_first_mapping_of_libc_is_missed() {
    for path in recordings() {
        let (events, _) = read(&path);
        let libc = events.iter().find_map(|event| match event {
            Event::File(info) if info.name.starts_with("libc.so") => Some(info.number),
            _ => None,
        });
        let index = events.iter().position(|event| {
            matches!(event, Event::Map(map) if matches!(map.place, Place::Anywhere { .. })
                && matches!(map.backing, pagefirst_record::Backing::File { file, .. } if Some(file) == libc))
        });
        let (fails, reason) = fails_without(&events, index.expect("libc is mapped"));
        assert!(fails, "{}", path.display());
        assert_eq!(reason, Some(Reason::NotMapped));
    }
}
