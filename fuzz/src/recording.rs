//! Any bytes as a recording: reading them gives events, and in the end the trailer or an error that names what and where.

use crate::Target;
use pagefirst_record::{Checker, Event, FormatError, MAGIC, ProcessId, Recording, Trailer, VERSION, Writer};
use std::fmt::Write;

/// The recording parser.
pub static RECORDING: Target = Target { name: "recording", try_out, show };

/// No more events than these are read: a few bytes of compressed data may stand for many.
const MOST: u64 = 1 << 16;

/// A recording, and the length of its stream if it is known.
struct Input {
    file: Vec<u8>,
    stream: Option<u64>,
}

/// The first byte says whether the others are the file, or what is compressed in it.
fn decode(bytes: &[u8]) -> Input {
    match bytes.split_first() {
        Some((kind, stream)) if kind % 2 == 0 => {
            let mut file = MAGIC.to_vec();
            file.extend(VERSION.to_le_bytes());
            file.extend(zstd::encode_all(stream, 1).expect("memory for the compressed stream"));
            Input { file, stream: Some(stream.len() as u64) }
        }
        Some((_, file)) => Input { file: file.to_vec(), stream: None },
        None => Input { file: Vec::new(), stream: None },
    }
}

type Events = Vec<(ProcessId, Event)>;

/// Reads on to the end, or as far as may be.
fn read(recording: &mut Recording<&[u8]>) -> (Events, Result<(), FormatError>) {
    let mut events = Vec::new();
    while recording.events() < MOST {
        match recording.next_event() {
            Ok(Some(event)) => events.push(event),
            Ok(None) => break,
            Err(error) => return (events, Err(error)),
        }
    }
    (events, Ok(()))
}

fn try_out(bytes: &[u8]) {
    let Input { file, stream } = decode(bytes);
    let mut recording = match Recording::open(&file[..]) {
        Ok(recording) => recording,
        Err(error) => return names_what_and_where(&error, stream, file.len()),
    };
    let (events, end) = read(&mut recording);
    assert_eq!(recording.events(), events.len() as u64);
    // Each event is a byte or more.
    assert!(stream.is_none_or(|stream| recording.events() <= stream));
    let mut checker = Checker::new(&recording.header().program);
    events.iter().for_each(|(process, event)| checker.event(*process, event));
    let report = checker.report();
    assert_eq!((report.events, report.touches), (recording.events(), report.explained + report.unexplained));
    if let Err(error) = end {
        assert_eq!(error.event, Some(recording.events()), "{error}");
        names_what_and_where(&error, stream, file.len());
        assert!(recording.trailer().is_none(), "{error}");
    } else if let Some(trailer) = recording.trailer().cloned() {
        assert!(matches!(recording.next_event(), Ok(None)), "the end stays the end");
        can_be_written(&recording, &events, &trailer);
    }
}

fn names_what_and_where(error: &FormatError, stream: Option<u64>, file: usize) {
    let message = error.to_string();
    assert!(message.contains("expected ") && message.contains(" byte "), "{message}");
    assert!(message.len() < 1000, "{message}");
    let end = if error.event.is_some() { stream } else { Some(file as u64) };
    assert!(end.is_none_or(|end| error.offset <= end), "{message}, of {end:?}");
}

/// What can be read can be written, and reads the same.
fn can_be_written(recording: &Recording<&[u8]>, events: &[(ProcessId, Event)], trailer: &Trailer) {
    let mut writer = Writer::create(Vec::new(), recording.header(), 1).expect("it is written to memory");
    for (process, event) in events {
        writer.event(*process, event).expect("what was read can be written");
    }
    let file = writer.finish(trailer).expect("it is written to memory");
    let mut again = Recording::open(&file[..]).expect("what was written can be read");
    assert_eq!(again.header(), recording.header());
    let (found, end) = read(&mut again);
    end.expect("what was written can be read");
    assert_eq!((&found[..], again.trailer()), (events, Some(trailer)));
}

fn show(bytes: &[u8]) -> String {
    let Input { file, stream } = decode(bytes);
    let mut shown = format!("a file of {} bytes, stream: {stream:?}", file.len());
    let mut line = |text: String| write!(shown, "\n{text}").expect("strings take everything");
    match Recording::open(&file[..]) {
        Ok(mut recording) => {
            line(format!("{:?}", recording.header()));
            let (events, end) = read(&mut recording);
            for (n, (process, event)) in events.iter().enumerate() {
                line(format!("{n:3}: process {}: {event:?}", process.0));
            }
            line(match (end, recording.trailer()) {
                (Err(error), _) => error.to_string(),
                (Ok(()), Some(trailer)) => format!("{trailer:?}"),
                (Ok(()), None) => format!("and more than {MOST} events"),
            });
        }
        Err(error) => line(error.to_string()),
    }
    shown
}
