//! What is written is read again; what is damaged is refused, with the place, and never a panic.

use pagefirst_record::{
    Access, Address, Advice, Arch, Backing, Checker, Event, FileId, FileInfo, FormatError, Header, Loss,
    LossKind, MAGIC, Map, MapKind, MappingId, Native, NativeRun, Place, Problem, ProcessId, Prot, Recording,
    ThreadId, Trailer, VERSION, Writer, check,
};

const PAGE: u64 = 4096;
const T0: ThreadId = ThreadId(0);
const P0: ProcessId = ProcessId(0);
const P1: ProcessId = ProcessId(1);
const P2: ProcessId = ProcessId(2);

fn header() -> Header {
    Header {
        version: VERSION,
        arch: Arch::X86_64,
        page_size: 4096,
        program: "program".into(),
        emulator: "emulator 1".into(),
    }
}

fn map(id: u32, len: u64) -> Map {
    Map {
        thread: T0,
        id: MappingId(id),
        len,
        reserve: len,
        prot: Prot::READ_WRITE,
        backing: Backing::Anonymous,
        shared: false,
        populate: false,
        grows_down: false,
        no_reserve: false,
        kind: MapKind::Mmap,
        place: Place::Anywhere { recorded: 0x4000 },
    }
}

fn at(mapping: u32, page: u64) -> Address {
    Address { mapping: MappingId(mapping), offset: page * PAGE }
}

fn touch(thread: u32, mapping: u32, page: u64, access: Access, by_kernel: bool) -> Event {
    Event::Touch { thread: ThreadId(thread), at: at(mapping, page), access, by_kernel }
}

/// An event of each kind, with all that can vary.
fn events() -> Vec<Event> {
    let prot = Prot { read: true, write: false, execute: true };
    let file = FileId(0);
    let backing = Backing::File { file, offset: 3 * PAGE };
    let thread = ThreadId(1);
    let stack =
        Map { len: 4 * PAGE, reserve: 64 * PAGE, grows_down: true, kind: MapKind::Stack, ..map(1, PAGE) };
    let heap = Map { len: 0, reserve: 0, kind: MapKind::Heap, ..map(2, 0) };
    let over =
        Map { prot, backing, shared: true, populate: true, place: Place::At(at(0, 2)), ..map(0, 5 * PAGE) };
    let fixed =
        Map { no_reserve: true, place: Place::FixedRecorded(1 << 40), kind: MapKind::Vdso, ..map(3, PAGE) };
    vec![
        Event::File(FileInfo { number: file, name: "libc.so.6".into(), size: 123_456 }),
        Event::FileSize { file, size: 1 << 40 },
        Event::Map(map(0, 100 * PAGE)),
        Event::Map(stack),
        Event::Map(heap),
        Event::Map(over),
        Event::Map(fixed),
        Event::ThreadStart { thread },
        touch(0, 0, 99, Access::Write, false),
        touch(1, 0, 0, Access::Read, true),
        touch(1, 1, 63, Access::Write, true),
        touch(0, 0, 3, Access::Execute, false),
        Event::Brk { thread, heap: MappingId(2), old: 0, new: 8 * PAGE },
        touch(1, 2, 7, Access::Read, false),
        Event::Protect { thread, at: at(0, 1), len: 2 * PAGE, prot: Prot::NONE },
        Event::Advise { thread: T0, at: at(0, 9), len: PAGE, advice: Advice::DontNeed },
        Event::Advise { thread: T0, at: at(0, 9), len: PAGE, advice: Advice::Other(77) },
        Event::Remap {
            thread,
            from: at(0, 50),
            old_len: 2 * PAGE,
            new_len: 9 * PAGE,
            id: MappingId(4),
            moved: true,
            recorded: 1 << 30,
            keep: true,
        },
        touch(1, 4, 8, Access::Write, false),
        Event::Stray { thread, recorded: 0xffff_ffff_ff60_0000, access: Access::Execute, by_kernel: false },
        Event::Unmap { thread: T0, at: at(0, 0), len: 100 * PAGE },
        Event::ThreadExit { thread },
    ]
}

fn trailer() -> Trailer {
    Trailer {
        touches: 7,
        unexplained: 1,
        accesses: 1 << 50,
        exit_status: 139,
        losses: vec![Loss { process: ProcessId(0), kind: LossKind::Exec, name: "ls".into(), count: 2 }],
        native: Some(Native {
            kernel: "6.18".into(),
            huge_pages: "madvise".into(),
            runs: vec![
                NativeRun { minor_faults: 1, major_faults: 2, vm_hwm_kib: 3, vm_pte_kib: 4, exit_status: 0 },
                NativeRun { minor_faults: 5, vm_hwm_kib: 1, ..NativeRun::default() },
                NativeRun { minor_faults: 3, vm_hwm_kib: 9, ..NativeRun::default() },
            ],
        }),
    }
}

const END: Event = Event::End { exit_status: Some(0), accesses: 0 };

/// A recording of a process that does this and ends.
fn write(events: &[Event], trailer: &Trailer) -> Vec<u8> {
    let events: Vec<_> = events.iter().cloned().chain([END]).map(|event| (P0, event)).collect();
    write_all(&events, trailer)
}

/// A recording of several processes.
fn write_all(events: &[(ProcessId, Event)], trailer: &Trailer) -> Vec<u8> {
    let mut writer = Writer::create(Vec::new(), &header(), 3).unwrap();
    for (process, event) in events {
        writer.event(*process, event).unwrap();
    }
    writer.finish(trailer).unwrap()
}

/// Three processes: the first makes the others, the third, from a mapping of the first's, executes a program.
fn several() -> Vec<(ProcessId, Event)> {
    let fork = |child, shares_memory| Event::Fork { thread: T0, child, shares_memory };
    let end = |status| Event::End { exit_status: status, accesses: 77 };
    vec![
        (P0, Event::Map(map(0, 4 * PAGE))),
        (P0, Event::ThreadStart { thread: ThreadId(1) }),
        (P0, touch(1, 0, 3, Access::Write, false)),
        (P0, fork(P1, false)),
        (P1, touch(0, 0, 3, Access::Write, false)),
        (P0, touch(1, 0, 2, Access::Read, false)),
        (P1, Event::ThreadStart { thread: ThreadId(1) }),
        (P1, Event::Map(map(1, PAGE))),
        (P0, Event::Map(map(1, 9 * PAGE))),
        (P0, fork(P2, true)),
        (P2, touch(0, 1, 8, Access::Write, true)),
        (P2, Event::Exec { thread: T0, program: "ls".into() }),
        (P2, Event::Map(map(0, 2 * PAGE))),
        (P1, touch(1, 1, 0, Access::Write, false)),
        (P1, end(None)),
        (P2, touch(0, 0, 1, Access::Read, true)),
        (P2, end(Some(255))),
        (P0, end(Some(0))),
    ]
}

fn several_trailer() -> Trailer {
    let loss = Loss { process: P1, kind: LossKind::Cut, name: String::new(), count: 1 };
    Trailer { touches: 6, losses: vec![loss], ..Trailer::default() }
}

type All = Vec<(ProcessId, Event)>;

fn read_all(file: &[u8]) -> Result<(Header, All, Trailer), FormatError> {
    let mut recording = Recording::open(file)?;
    let mut events = Vec::new();
    while let Some(event) = recording.next_event()? {
        events.push(event);
    }
    assert!(recording.next_event()?.is_none(), "the end stays the end");
    Ok((recording.header().clone(), events, recording.trailer().cloned().unwrap()))
}

/// Reads a recording of one process, without its end.
fn read(file: &[u8]) -> Result<(Header, Vec<Event>, Trailer), FormatError> {
    let (header, mut events, trailer) = read_all(file)?;
    assert!(matches!(events.pop(), Some((P0, Event::End { .. }))));
    Ok((header, events.into_iter().map(|(_, event)| event).collect(), trailer))
}

/// The decompressed stream of a recording.
fn stream(file: &[u8]) -> Vec<u8> {
    zstd::decode_all(&file[MAGIC.len() + 2..]).unwrap()
}

/// A recording with this stream.
fn wrap(stream: &[u8]) -> Vec<u8> {
    let mut file = MAGIC.to_vec();
    file.extend(VERSION.to_le_bytes());
    file.extend(zstd::encode_all(stream, 1).unwrap());
    file
}

/// A recording with a sound header, the events, and then these bytes.
fn with_record(events: &[Event], record: &[u8]) -> Vec<u8> {
    let end = stream(&write(&[], &Trailer::default())).len();
    let trailer_len = end - stream_header_len();
    let mut bytes = stream(&write(events, &Trailer::default()));
    bytes.truncate(bytes.len() - trailer_len);
    bytes.extend(record);
    wrap(&bytes)
}

/// Three processes, of which the first two have not ended, and then these bytes.
fn several_with(record: &[u8]) -> Vec<u8> {
    let mut events = several();
    events.truncate(14);
    events.push((P2, END));
    let mut writer = Writer::create(Vec::new(), &header(), 3).unwrap();
    events.iter().for_each(|(process, event)| writer.event(*process, event).unwrap());
    let mut bytes = stream(&writer.finish(&Trailer::default()).unwrap());
    bytes.truncate(bytes.len() - TRAILER);
    bytes.extend(record);
    wrap(&bytes)
}

/// The bytes of an empty trailer: its tag, touches, unexplained, accesses, status, losses, native runs.
const TRAILER: usize = 7;

fn stream_header_len() -> usize {
    // Architecture, page size in two bytes, two texts with their lengths.
    1 + 2 + 1 + header().program.len() + 1 + header().emulator.len()
}

fn problem(file: &[u8]) -> Problem {
    read(file).expect_err("the file is damaged").problem
}

#[test]
fn every_event_is_read_as_it_was_written() {
    let (found_header, found, found_trailer) = read(&write(&events(), &trailer())).unwrap();
    assert_eq!(found_header, header());
    assert_eq!(found, events());
    assert_eq!(found_trailer, trailer());
}

#[test]
fn the_median_is_of_each_figure_for_itself() {
    let median = trailer().native.unwrap().median();
    let NativeRun { minor_faults, major_faults, vm_hwm_kib, vm_pte_kib, exit_status } = median;
    assert_eq!((minor_faults, major_faults, vm_hwm_kib, vm_pte_kib, exit_status), (3, 0, 3, 0, 0));
}

#[test]
fn several_processes_are_read_as_they_were_written() {
    let (_, found, trailer) = read_all(&write_all(&several(), &several_trailer())).unwrap();
    assert_eq!(found, several());
    assert_eq!(trailer, several_trailer());
}

#[test]
fn each_process_of_several_is_checked() {
    let file = write_all(&several(), &several_trailer());
    let report = check(&mut Recording::open(&file[..]).unwrap()).unwrap();
    assert!(report.passes(), "{report:?}");
    let found: Vec<_> = report.processes.iter().map(|process| (process.parent, process.touches)).collect();
    assert_eq!(found, [(None, 2), (Some(P0), 2), (Some(P0), 2)]);
    assert_eq!(report.processes[2].programs, ["program", "ls"]);
    // Without the child's own mapping only the child is not explained.
    let mut events = several();
    events.retain(|(process, event)| (*process, matches!(event, Event::Map(_))) != (P1, true));
    let mut checker = Checker::new("program");
    events.iter().for_each(|(process, event)| checker.event(*process, event));
    let unexplained: Vec<_> = checker.report().processes.iter().map(|process| process.unexplained).collect();
    assert_eq!(unexplained, [0, 1, 0]);
    assert_eq!(checker.report().examples[0].process, P1);
}

#[test]
fn several_processes_cut_or_damaged_anywhere_are_refused() {
    let file = write_all(&several(), &several_trailer());
    let bytes = stream(&file);
    let mut places = Vec::new();
    for len in 0..bytes.len() {
        let error = read_all(&wrap(&bytes[..len])).unwrap_err();
        assert!(matches!(error.problem, Problem::Truncated { .. }), "cut after {len}: {error}");
        places.push(error.process);
    }
    // Every process is named, and none before there are several.
    for process in [None, Some(0), Some(1), Some(2)] {
        assert!(places.contains(&process), "{process:?}");
    }
    for index in 0..file.len() {
        let mut damaged = file.clone();
        damaged[index] ^= 0x55;
        if let Ok((_, found, _)) = read_all(&damaged) {
            assert_eq!(found, several(), "byte {index} was damaged");
        }
    }
}

#[test]
fn what_is_wrong_with_a_process_is_named() {
    let wrong = |record: &[u8]| read_all(&several_with(record)).unwrap_err().to_string();
    let expect = |record: &[u8], process: &str, what: &str| {
        let message = wrong(record);
        let place = format!("event 15, of process {process}, at byte ");
        assert!(message.starts_with(&place) && message.ends_with(what), "{message}");
    };
    let other = "expected the number of another process that has not ended, found";
    // Switches to a process that was never made, that has ended, and to the same one.
    expect(&[0x0c, 9], "2", &format!("{other} 0x9"));
    expect(&[0x0c, 1, 0x0c, 2], "1", "found 0x0c");
    expect(&[0x0c, 2], "2", &format!("{other} 0x2"));
    // An event of one that has ended.
    expect(&[0x0a, 1], "2", "expected an event of a process that has not ended, found 0xa");
    // A mapping of the other process's.
    expect(&[0x0c, 1, 4, 0, 1, 5, 1], "1", "found 0x1000 bytes at 0x5000");
    // A child that is not the next one, and a thread that was not copied.
    expect(&[0x0c, 1, 0x0d, 0, 7, 0], "1", "expected the next process's number, found 0x7");
    let message = wrong(&[0x0c, 0, 0x0d, 0, 3, 0, 0x0c, 3, 0x0b, 1]);
    assert!(message.starts_with("event 16, of process 3, at byte "), "{message}");
    assert!(message.ends_with("expected the number of a thread that has started, found 0x1"), "{message}");
    // The end of the recording before that of a process.
    expect(&[0x7f, 0, 0, 0, 0, 0, 0], "2", "expected the end of process 0, found the trailer");
}

#[test]
fn an_empty_recording_is_one() {
    let (_, found, found_trailer) = read(&write(&[], &Trailer::default())).unwrap();
    assert!(found.is_empty());
    assert_eq!(found_trailer, Trailer::default());
}

#[test]
fn another_kind_of_file_is_refused() {
    assert!(matches!(problem(b"GIF89a and so on"), Problem::Magic { .. }));
    assert!(matches!(problem(b""), Problem::Magic { .. }));
    assert!(matches!(problem(&MAGIC), Problem::Truncated { .. }));
}

#[test]
fn another_version_is_refused() {
    let mut file = write(&[], &Trailer::default());
    file[MAGIC.len()] = 9;
    let error = read(&file).unwrap_err();
    assert!(matches!(error.problem, Problem::Version { found: 9 }));
    assert_eq!(error.to_string(), "at byte 8 of the file: expected version 2 of the format, found 9");
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let file = write(&events(), &trailer());
    for len in 0..file.len() {
        assert!(read(&file[..len]).is_err(), "cut after {len} of {} bytes", file.len());
    }
    let bytes = stream(&file);
    for len in 0..bytes.len() {
        let error = read(&wrap(&bytes[..len])).unwrap_err();
        assert!(matches!(error.problem, Problem::Truncated { .. }), "cut after {len}: {error}");
    }
}

#[test]
fn more_after_the_end_is_refused() {
    let mut file = write(&events(), &trailer());
    let mut bytes = stream(&file);
    file.push(0);
    assert!(matches!(problem(&file), Problem::TrailingBytes));
    bytes.push(0);
    assert!(matches!(problem(&wrap(&bytes)), Problem::TrailingBytes));
}

#[test]
fn a_bad_checksum_is_refused() {
    let mut file = write(&events(), &trailer());
    *file.last_mut().unwrap() ^= 1;
    assert!(matches!(problem(&file), Problem::Compression(_)));
}

#[test]
fn a_damaged_byte_of_the_file_is_refused() {
    let file = write(&events(), &trailer());
    for index in 0..file.len() {
        let mut damaged = file.clone();
        damaged[index] ^= 0x55;
        // Bits of the frame's header say nothing about the content, so some damage changes nothing.
        if let Ok((_, found, _)) = read(&damaged) {
            assert_eq!(found, events(), "byte {index} was damaged");
        }
    }
}

#[test]
fn the_place_of_what_is_wrong_is_named() {
    let events = [Event::Map(map(0, PAGE))];
    let error = read(&with_record(&events, &[0x33])).unwrap_err();
    assert!(matches!(error.problem, Problem::Tag { found: 0x33 }));
    assert_eq!(error.event, Some(1));
    assert!(error.to_string().starts_with("event 1, at byte "), "{error}");
    assert!(error.to_string().ends_with("expected the tag of a record, found 0x33"), "{error}");
}

#[test]
fn a_mapping_never_made_is_refused() {
    // unmap by thread 0, mapping 0, page 0, one page
    assert!(matches!(
        problem(&with_record(&[], &[4, 0, 0, 0, 1])),
        Problem::UnknownMapping { found: 0, known: 0 }
    ));
    // a touch of the mapping that is the last one touched, and one of mapping 5
    assert!(matches!(problem(&with_record(&[], &[0x80, 0])), Problem::UnknownMapping { .. }));
    let events = [Event::Map(map(0, PAGE))];
    assert!(matches!(
        problem(&with_record(&events, &[0x90, 10, 0])),
        Problem::UnknownMapping { found: 5, known: 1 }
    ));
    // and one whose distance leads below 0
    assert!(matches!(problem(&with_record(&events, &[0x90, 1, 0])), Problem::UnknownMapping { .. }));
}

#[test]
fn a_file_or_thread_never_named_is_refused() {
    assert!(matches!(problem(&with_record(&[], &[2, 4, 1])), Problem::UnknownFile { found: 4, known: 0 }));
    assert!(matches!(problem(&with_record(&[], &[0x0b, 3])), Problem::Value { found: 3, .. }));
    assert!(matches!(problem(&with_record(&[], &[0x0a, 7])), Problem::Value { found: 7, .. }));
}

#[test]
fn a_range_beyond_its_mapping_is_refused() {
    let events = [Event::Map(map(0, 2 * PAGE))];
    let error = problem(&with_record(&events, &[4, 0, 0, 1, 2]));
    assert!(matches!(error, Problem::Range { reserve: 0x2000, offset: 0x1000, len: 0x2000, .. }), "{error}");
    // Touches of page 2 and of page -1.
    for distance in [4, 1] {
        assert!(matches!(problem(&with_record(&events, &[0x80, distance])), Problem::Range { .. }));
    }
    // A touch of a page whose number overflows.
    let far = [0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
    assert!(matches!(problem(&with_record(&events, &far)), Problem::Range { .. }));
    assert!(matches!(problem(&with_record(&events, &[4, 0, 0, 0, 0])), Problem::Range { len: 0, .. }));
}

#[test]
fn absurd_numbers_are_refused() {
    const HUGE: [u8; 10] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
    // a mapping of 2^64 - 1 pages
    let record = [&[3, 0, 0, 3, 0, 0, 0][..], &HUGE].concat();
    assert!(matches!(problem(&with_record(&[], &record)), Problem::Value { .. }));
    // a name of that many bytes
    let record = [&[1, 0][..], &HUGE].concat();
    assert!(matches!(problem(&with_record(&[], &record)), Problem::Value { .. }));
    // a number of more than 64 bits
    let record = [&[2][..], &[0xff; 11]].concat();
    assert!(matches!(problem(&with_record(&[], &record)), Problem::Varint { .. }));
    // that many losses
    let record = [&[0x0f, 0, 0, 0x7f, 0, 0, 0, 0][..], &HUGE].concat();
    assert!(matches!(problem(&with_record(&[], &record)), Problem::Value { .. }));
    // a file's name with a path, and one that is no text
    let record = [&[1, 0, 3][..], b"a/b", &[0]].concat();
    assert!(matches!(problem(&with_record(&[], &record)), Problem::Value { .. }));
    let record = [&[1, 0, 1, 0xff, 0][..]].concat();
    assert!(matches!(problem(&with_record(&[], &record)), Problem::Text { .. }));
}

#[test]
fn a_wrong_count_is_refused() {
    let trailer = Trailer { touches: 5, ..Trailer::default() };
    assert!(matches!(problem(&write(&[], &trailer)), Problem::Count { expected: 5, found: 0 }));
}

#[test]
fn a_writer_refuses_a_mapping_out_of_order() {
    let mut writer = Writer::create(Vec::new(), &header(), 3).unwrap();
    assert!(writer.event(P0, &Event::Map(map(1, PAGE))).is_err());
    assert!(writer.event(P0, &touch(0, 0, 0, Access::Read, false)).is_err());
    assert!(writer.event(P1, &Event::ThreadExit { thread: T0 }).is_err());
}

#[test]
fn no_damage_of_the_stream_panics() {
    let (one, more) = (write(&events(), &trailer()), write_all(&several(), &several_trailer()));
    let streams = [stream(&one), stream(&more)];
    // A small generator of numbers, so that a failure can be repeated.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..20_000 {
        let mut damaged = streams[next() as usize % 2].clone();
        for _ in 0..=next() % 3 {
            let index = next() as usize % damaged.len();
            match next() % 3 {
                0 => damaged[index] = next() as u8,
                1 => damaged.insert(index, next() as u8),
                _ => drop(damaged.remove(index)),
            }
        }
        if let Ok(mut recording) = Recording::open(&wrap(&damaged)[..]) {
            // Whatever the events say, the checker takes it.
            let _ = check(&mut recording);
        }
    }
}
