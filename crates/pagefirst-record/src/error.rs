//! What can be wrong with a recording.

use std::io;

/// A recording that can't be read: what is wrong, and where.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", place(*.offset, *.event, *.process))]
pub struct FormatError {
    /// Bytes from the start of the decompressed stream, or of the file when `event` is `None`.
    pub offset: u64,
    /// The events before the one at fault; `None` in what comes before the stream.
    pub event: Option<u64>,
    /// The process that is being read about; `None` before the first fork.
    pub process: Option<u32>,
    /// What was expected and what was found.
    #[source]
    pub problem: Problem,
}

fn place(offset: u64, event: Option<u64>, process: Option<u32>) -> String {
    match (event, process) {
        (Some(event), Some(process)) => {
            format!("event {event}, of process {process}, at byte {offset} of the decompressed stream")
        }
        (Some(event), None) => format!("event {event}, at byte {offset} of the decompressed stream"),
        (None, _) => format!("at byte {offset} of the file"),
    }
}

/// What is wrong with a recording.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// Another kind of file.
    #[error("expected the magic bytes {:02x?} of a recording, found {found:02x?}", crate::MAGIC)]
    Magic {
        /// The first bytes.
        found: Vec<u8>,
    },
    /// A recording of another version.
    #[error("expected version {} of the format, found {found}", crate::VERSION)]
    Version {
        /// That version.
        found: u16,
    },
    /// The end comes too early.
    #[error("expected {expected}, found the end")]
    Truncated {
        /// What should be here.
        expected: &'static str,
    },
    /// Something follows the trailer.
    #[error("expected the end, found more bytes")]
    TrailingBytes,
    /// The compressed data are damaged: their checksum, or what they are made of.
    #[error("expected a sound zstd frame, found: {0}")]
    Compression(#[source] io::Error),
    /// The file can't be read.
    #[error("expected to read on: {0}")]
    Io(#[source] io::Error),
    /// A byte that no record starts with.
    #[error("expected the tag of a record, found {found:#04x}")]
    Tag {
        /// That byte.
        found: u8,
    },
    /// A number that can't be there.
    #[error("expected {expected}, found {found:#x}")]
    Value {
        /// What should be here.
        expected: &'static str,
        /// What is.
        found: u64,
    },
    /// A number in more bytes than 64 bits need.
    #[error("expected {expected}, found a number of more than 64 bits")]
    Varint {
        /// What should be here.
        expected: &'static str,
    },
    /// Text that isn't.
    #[error("expected {expected} in UTF-8, found other bytes")]
    Text {
        /// What should be here.
        expected: &'static str,
    },
    /// A mapping that was never made.
    #[error("expected one of {known} mappings, found number {found}")]
    UnknownMapping {
        /// The number found.
        found: u64,
        /// The mappings so far.
        known: u32,
    },
    /// A file that was never named.
    #[error("expected one of {known} files, found number {found}")]
    UnknownFile {
        /// The number found.
        found: u64,
        /// The files so far.
        known: u32,
    },
    /// A range that its mapping has no room for.
    #[error(
        "expected a range within mapping {mapping} of {reserve:#x} bytes, found {len:#x} bytes at {offset:#x}"
    )]
    Range {
        /// The mapping.
        mapping: u32,
        /// The size of its reservation.
        reserve: u64,
        /// The start of the range found.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// The trailer comes before the end of a process.
    #[error("expected the end of process {process}, found the trailer")]
    NotEnded {
        /// The process.
        process: u32,
    },
    /// The trailer's count is not what was read.
    #[error("expected {expected} touches as the trailer says, found {found}")]
    Count {
        /// The trailer's count.
        expected: u64,
        /// What was read.
        found: u64,
    },
}
