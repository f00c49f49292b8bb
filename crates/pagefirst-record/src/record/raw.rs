//! Reads the plugins' stream.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read};

use super::RecordError;
use crate::event::{Access, ThreadId};

#[path = "../../plugin-src/raw.rs"]
mod layout;
pub(super) use layout::{FIRST_PROCESS, number};

/// The longest text that the plugin sends: `/proc/self/maps`.
const TEXT_LIMIT: u32 = 1 << 26;

/// A file as the system knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// A system call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) thread: ThreadId,
    pub(super) number: u64,
    pub(super) arguments: [u64; 6],
}

/// A record of the stream; `layout` describes them.
#[derive(Debug)]
pub(super) enum Raw {
    Touch { thread: ThreadId, address: u64, access: Access, by_kernel: bool },
    Enter(Call),
    Return(Call, u64),
    Maps(String),
    File { thread: ThreadId, identity: Identity, size: u64, name: String },
    FileSize { identity: Identity, size: u64 },
    ThreadStart(ThreadId),
    ThreadExit(ThreadId),
    Fork { thread: ThreadId, child: u64, shares_memory: bool },
    ForkFailed { child: u64 },
    Exec { thread: ThreadId, accesses: u64, argument_bytes: u64, name: String },
    ExecFailed,
    End { accesses: u64, exit_status: Option<i32> },
}

/// Why there is no record.
enum Stop {
    /// The stream ends within it.
    Cut,
    Failed(RecordError),
}

/// The stream, taken apart by process.
pub(super) struct Records<R> {
    stream: R,
    /// By process: the piece of a record that waits for its rest.
    pieces: HashMap<u64, Vec<u8>>,
    ready: VecDeque<(u64, Raw)>,
}

impl<R: Read> Records<R> {
    pub(super) fn new(stream: R) -> Self {
        Self { stream, pieces: HashMap::new(), ready: VecDeque::new() }
    }

    /// Reads the next record and its process's key. `None` at the end, also when an emulator was killed in the middle
    /// of a record.
    pub(super) fn next(&mut self) -> Result<Option<(u64, Raw)>, RecordError> {
        loop {
            if let Some(record) = self.ready.pop_front() {
                return Ok(Some(record));
            }
            match self.frame() {
                Ok(()) => {}
                Err(Stop::Cut) => return Ok(None),
                Err(Stop::Failed(error)) => return Err(error),
            }
        }
    }

    /// Reads a frame, and the records that end in it.
    fn frame(&mut self) -> Result<(), Stop> {
        let key = number64(&mut self.stream)?;
        let len = bytes(&mut self.stream).map(u16::from_le_bytes)?;
        if usize::from(len) > layout::FRAME - layout::FRAME_HEADER {
            return Err(Stop::Failed(RecordError::Stream {
                expected: "a frame's length",
                found: len.into(),
            }));
        }
        let piece = self.pieces.entry(key).or_default();
        let old = piece.len();
        piece.resize(old + usize::from(len), 0);
        self.stream.read_exact(&mut piece[old..]).map_err(failed)?;
        let mut rest = &piece[..];
        loop {
            let mut next = rest;
            match read(&mut next) {
                Ok(raw) => self.ready.push_back((key, raw)),
                Err(Stop::Cut) => break,
                Err(failed) => return Err(failed),
            }
            rest = next;
        }
        if rest.is_empty() {
            self.pieces.remove(&key);
        } else {
            let done = piece.len() - rest.len();
            piece.drain(..done);
        }
        Ok(())
    }
}

fn read(stream: &mut impl Read) -> Result<Raw, Stop> {
    let [kind] = bytes(stream)?;
    Ok(match kind {
        layout::ENTER => Raw::Enter(call(stream)?),
        layout::RETURN => Raw::Return(call(stream)?, number64(stream)?),
        layout::MAPS => Raw::Maps(text(stream)?),
        layout::FILE => Raw::File {
            thread: thread(stream)?,
            identity: identity(stream)?,
            size: number64(stream)?,
            name: text(stream)?,
        },
        layout::FILE_SIZE => Raw::FileSize { identity: identity(stream)?, size: number64(stream)? },
        layout::THREAD_START => Raw::ThreadStart(thread(stream)?),
        layout::THREAD_EXIT => Raw::ThreadExit(thread(stream)?),
        layout::FORK => Raw::Fork {
            thread: thread(stream)?,
            child: number64(stream)?,
            shares_memory: bytes(stream)? == [1],
        },
        layout::FORK_FAILED => Raw::ForkFailed { child: number64(stream)? },
        layout::EXEC => Raw::Exec {
            thread: thread(stream)?,
            accesses: number64(stream)?,
            argument_bytes: number64(stream)?,
            name: text(stream)?,
        },
        layout::EXEC_FAILED => Raw::ExecFailed,
        layout::END => Raw::End {
            accesses: number64(stream)?,
            exit_status: Some(number64(stream)?)
                .filter(|&status| status != layout::UNKNOWN)
                .map(|status| status as i32),
        },
        touch if touch & !7 == layout::TOUCH => Raw::Touch {
            thread: thread(stream)?,
            address: number64(stream)?,
            access: match touch & (layout::TOUCH_WRITE | layout::TOUCH_EXECUTE) {
                layout::TOUCH_WRITE => Access::Write,
                layout::TOUCH_EXECUTE => Access::Execute,
                _ => Access::Read,
            },
            by_kernel: touch & layout::TOUCH_KERNEL != 0,
        },
        found => {
            return Err(Stop::Failed(RecordError::Stream {
                expected: "a kind of record",
                found: found.into(),
            }));
        }
    })
}

fn failed(error: io::Error) -> Stop {
    match error.kind() {
        ErrorKind::UnexpectedEof => Stop::Cut,
        _ => Stop::Failed(RecordError::System { doing: "reading the emulator's stream".into(), error }),
    }
}

fn bytes<const N: usize>(stream: &mut impl Read) -> Result<[u8; N], Stop> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn number64(stream: &mut impl Read) -> Result<u64, Stop> {
    bytes(stream).map(u64::from_le_bytes)
}

fn thread(stream: &mut impl Read) -> Result<ThreadId, Stop> {
    bytes(stream).map(u32::from_le_bytes).map(ThreadId)
}

fn identity(stream: &mut impl Read) -> Result<Identity, Stop> {
    Ok(Identity { device: number64(stream)?, inode: number64(stream)? })
}

fn call(stream: &mut impl Read) -> Result<Call, Stop> {
    let (thread, number) = (thread(stream)?, number64(stream)?);
    let mut arguments = [0; 6];
    for argument in &mut arguments {
        *argument = number64(stream)?;
    }
    Ok(Call { thread, number, arguments })
}

fn text(stream: &mut impl Read) -> Result<String, Stop> {
    let len = bytes(stream).map(u32::from_le_bytes)?;
    if len > TEXT_LIMIT {
        return Err(Stop::Failed(RecordError::Stream { expected: "a text's length", found: len.into() }));
    }
    let mut text = vec![0; len as usize];
    stream.read_exact(&mut text).map_err(failed)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}
