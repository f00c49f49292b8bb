//! Records what a program and the processes that it makes do to their memory, and reads and checks such recordings.
//!
//! A recording is the list of their memory calls and of the pages they touched, in order: the first read,
//! write and execute of each page since the last call that may have changed its mapping.
//! `docs/recording-format.md` describes the file.

mod check;
mod error;
pub mod event;
mod input;
mod read;
mod record;
mod wire;
mod write;

pub use check::{Checker, ProcessReport, Reason, Report, Unexplained, check};
pub use error::{FormatError, Problem};
pub use event::{
    Access, Address, Advice, Arch, Backing, Event, FileId, FileInfo, Header, Loss, LossKind, Map, MapKind,
    MappingId, Native, NativeRun, Place, ProcessId, Prot, ThreadId, Trailer,
};
pub use read::Recording;
pub use record::{RecordError, RecordOptions, Summary, huge_page_setting, record};
pub use wire::{MAGIC, VERSION};
pub use write::Writer;
