//! Reads the plugin's stream.

use std::io::{self, ErrorKind, Read};

use super::RecordError;
use crate::event::{Access, ThreadId};

#[path = "../../plugin-src/raw.rs"]
mod layout;
pub(super) use layout::number;

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
    Fork,
    Exec { accesses: u64, name: String },
    ExecFailed,
    End { accesses: u64 },
}

/// Why there is no record.
enum Stop {
    /// The stream ends within it.
    Cut,
    Failed(RecordError),
}

/// Reads the next record. `None` at the end, also when the emulator was killed in the middle of a record.
pub(super) fn next(stream: &mut impl Read) -> Result<Option<Raw>, RecordError> {
    match read(stream) {
        Ok(raw) => Ok(Some(raw)),
        Err(Stop::Cut) => Ok(None),
        Err(Stop::Failed(error)) => Err(error),
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
        layout::FORK => Raw::Fork,
        layout::EXEC => Raw::Exec { accesses: number64(stream)?, name: text(stream)? },
        layout::EXEC_FAILED => Raw::ExecFailed,
        layout::END => Raw::End { accesses: number64(stream)? },
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
