//! Bytes, numbers and texts out of the decompressed stream, with the place of what is wrong.

use std::io::{ErrorKind, Read};

use crate::error::{FormatError, Problem};
use crate::wire::NAME_LIMIT;

/// A stream that knows where it is.
pub(crate) struct Input<S> {
    /// Where it comes from.
    pub(crate) stream: S,
    offset: u64,
    /// The events read so far.
    pub(crate) event: u64,
    /// The process that is being read about, if there are several.
    pub(crate) process: Option<u32>,
}

impl<S: Read> Input<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, offset: 0, event: 0, process: None }
    }

    /// What is wrong, here.
    pub(crate) fn error(&self, problem: Problem) -> FormatError {
        FormatError { offset: self.offset, event: Some(self.event), process: self.process, problem }
    }

    /// A number that can't be there, here.
    pub(crate) fn value(&self, expected: &'static str, found: u64) -> FormatError {
        self.error(Problem::Value { expected, found })
    }

    /// As many bytes as there are, up to the buffer's length.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, FormatError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.stream.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(n) => {
                    filled += n;
                    self.offset += n as u64;
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::UnexpectedEof => break,
                    // What zstd finds wrong comes as `Other`, what the system does as a kind of its own.
                    ErrorKind::Other => return Err(self.error(Problem::Compression(error))),
                    _ => return Err(self.error(Problem::Io(error))),
                },
            }
        }
        Ok(filled)
    }

    pub(crate) fn byte(&mut self, expected: &'static str) -> Result<u8, FormatError> {
        let mut byte = [0];
        match self.fill(&mut byte)? {
            0 => Err(self.error(Problem::Truncated { expected })),
            _ => Ok(byte[0]),
        }
    }

    pub(crate) fn number(&mut self, expected: &'static str) -> Result<u64, FormatError> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte(expected)?;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.error(Problem::Varint { expected }))
    }

    pub(crate) fn below(&mut self, expected: &'static str, limit: u64) -> Result<u64, FormatError> {
        match self.number(expected)? {
            value if value < limit => Ok(value),
            found => Err(self.value(expected, found)),
        }
    }

    pub(crate) fn text(&mut self, expected: &'static str) -> Result<String, FormatError> {
        let len = self.below(expected, NAME_LIMIT + 1)? as usize;
        let mut bytes = vec![0; len];
        if self.fill(&mut bytes)? < len {
            return Err(self.error(Problem::Truncated { expected }));
        }
        String::from_utf8(bytes).map_err(|_| self.error(Problem::Text { expected }))
    }

    /// Nothing may follow; reading to the end also has the checksum verified.
    pub(crate) fn end(&mut self) -> Result<(), FormatError> {
        loop {
            return match self.stream.read(&mut [0]) {
                Ok(0) => Ok(()),
                Ok(_) => Err(self.error(Problem::TrailingBytes)),
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => continue,
                    ErrorKind::UnexpectedEof => {
                        Err(self.error(Problem::Truncated { expected: "a checksum" }))
                    }
                    ErrorKind::Other => Err(self.error(Problem::Compression(error))),
                    _ => Err(self.error(Problem::Io(error))),
                },
            };
        }
    }
}
