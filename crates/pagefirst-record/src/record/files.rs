//! The numbers of the files that are mapped.

use std::collections::HashMap;

use super::raw::Identity;
use crate::event::{Event, FileId, FileInfo};
use crate::wire::{FILE_LIMIT, NAME_LIMIT};

/// The files so far, with their size when last seen.
#[derive(Debug, Default)]
pub(super) struct Files {
    known: HashMap<Identity, (FileId, u64)>,
}

impl Files {
    /// A file's number, and what is new about it.
    pub(super) fn number(&mut self, identity: Identity, path: &str, size: u64) -> (FileId, Option<Event>) {
        let size = size.min(FILE_LIMIT - 1);
        if let Some(event) = self.resized(identity, size) {
            return (self.known[&identity].0, event);
        }
        let number = FileId(self.known.len() as u32);
        self.known.insert(identity, (number, size));
        (number, Some(Event::File(FileInfo { number, name: base_name(path), size })))
    }

    /// What is new about a file's size: `None` for a file that was never mapped.
    pub(super) fn resized(&mut self, identity: Identity, size: u64) -> Option<Option<Event>> {
        let (file, last) = self.known.get_mut(&identity)?;
        let changed = *last != size;
        *last = size;
        Some(changed.then_some(Event::FileSize { file: *file, size }))
    }
}

/// The last part of a path, as short as the format wants it.
pub(super) fn base_name(path: &str) -> String {
    let path = path.strip_suffix(" (deleted)").unwrap_or(path);
    let name = path.rsplit('/').next().unwrap_or_default();
    let mut end = name.len().min(NAME_LIMIT as usize);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name[..end].to_owned()
}
