//! The records of the format, as bytes: what the reader and the writer must agree on.

/// The bytes that a recording begins with.
pub const MAGIC: [u8; 8] = *b"PFREC\r\n\x1a";
/// The version of the format that this crate reads and writes.
pub const VERSION: u16 = 2;

/// The only page size so far.
pub(crate) const PAGE: u64 = 4096;
/// Addresses and sizes stay below this, so that sums of two never overflow.
pub(crate) const ADDRESS_LIMIT: u64 = 1 << 48;
/// File sizes and offsets stay below this.
pub(crate) const FILE_LIMIT: u64 = 1 << 62;
/// The longest name in bytes.
pub(crate) const NAME_LIMIT: u64 = 4096;
/// The most mappings of all living processes, for each of which a reader keeps 16 bytes.
pub(crate) const MAPPING_LIMIT: u32 = 1 << 24;
/// The most processes that live at the same time.
pub(crate) const PROCESS_LIMIT: usize = 1 << 16;
/// The most losses that are told apart.
pub(crate) const LOSS_LIMIT: u64 = 1024;
/// The most native runs.
pub(crate) const NATIVE_LIMIT: u64 = 1024;
/// The largest window that a reader grants to zstd, as a power of two: 16 MiB.
pub(crate) const WINDOW_LOG: u32 = 24;

/// Touches have this bit in their tag. Below it: bits 0-1 the access, 2 by the kernel, 3 another thread than the
/// last touch's follows, 4 another mapping follows.
pub(crate) const TOUCH: u8 = 0x80;
pub(crate) const TOUCH_KERNEL: u8 = 1 << 2;
pub(crate) const TOUCH_THREAD: u8 = 1 << 3;
pub(crate) const TOUCH_MAPPING: u8 = 1 << 4;
/// The bits that no touch has.
pub(crate) const TOUCH_UNUSED: u8 = 0x60;

/// The first byte of every other record.
pub(crate) mod tag {
    pub(crate) const FILE: u8 = 0x01;
    pub(crate) const FILE_SIZE: u8 = 0x02;
    pub(crate) const MAP: u8 = 0x03;
    pub(crate) const UNMAP: u8 = 0x04;
    pub(crate) const PROTECT: u8 = 0x05;
    pub(crate) const REMAP: u8 = 0x06;
    pub(crate) const ADVISE: u8 = 0x07;
    pub(crate) const BRK: u8 = 0x08;
    pub(crate) const STRAY: u8 = 0x09;
    pub(crate) const THREAD_START: u8 = 0x0a;
    pub(crate) const THREAD_EXIT: u8 = 0x0b;
    pub(crate) const PROCESS: u8 = 0x0c;
    pub(crate) const FORK: u8 = 0x0d;
    pub(crate) const EXEC: u8 = 0x0e;
    pub(crate) const END: u8 = 0x0f;
    pub(crate) const TRAILER: u8 = 0x7f;
}

/// What both sides know of a process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Context {
    /// By number.
    pub(crate) mappings: Vec<Known>,
    /// The thread and the mapping of the last touch.
    pub(crate) thread: u32,
    pub(crate) mapping: u32,
}

impl Context {
    /// What a process begins with that this one makes.
    pub(crate) fn child(&self) -> Self {
        Self { thread: 0, ..self.clone() }
    }
}

/// What both sides know of a mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    /// The pages of its reservation.
    pub(crate) pages: u64,
    /// The page that was touched last.
    pub(crate) last: u64,
}

/// Small numbers of either sign as small numbers.
pub(crate) const fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

/// The inverse of [`zigzag`].
pub(crate) const fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

/// Writes a number, seven bits a byte, the lowest first.
pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Writes a text and its length before it.
pub(crate) fn put_text(out: &mut Vec<u8>, text: &str) {
    put(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::{unzigzag, zigzag};

    #[test]
    fn zigzag_keeps_every_number() {
        for value in [0, 1, -1, 63, -64, i64::MAX, i64::MIN] {
            assert_eq!(unzigzag(zigzag(value)), value);
        }
    }
}
