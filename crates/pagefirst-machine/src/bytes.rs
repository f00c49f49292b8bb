//! User bytes in a frame, through its words: see `arena.rs` for why.

use crate::arena::WORDS;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

/// The words that hold `len` bytes from `at`: for each its index, the first byte in it, how many, and how many came
/// before.
fn words(at: usize, len: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let (word, first) = ((at + done) / 8, (at + done) % 8);
        let n = (8 - first).min(len - done);
        let item = (word, first, n, done);
        done += n;
        Some(item)
    })
}

/// Copies bytes out of a frame, from byte `at` on.
pub(crate) fn load(frame: &[AtomicU64; WORDS], at: usize, to: &mut [u8]) {
    for (word, first, n, done) in words(at, to.len()) {
        let bytes = frame[word].load(Acquire).to_le_bytes();
        to[done..done + n].copy_from_slice(&bytes[first..first + n]);
    }
}

/// Copies bytes into a frame, from byte `at` on. A part of a word is changed in one atomic step.
pub(crate) fn store(frame: &[AtomicU64; WORDS], at: usize, from: &[u8]) {
    for (word, first, n, done) in words(at, from.len()) {
        let put = |old: u64| {
            let mut bytes = old.to_le_bytes();
            bytes[first..first + n].copy_from_slice(&from[done..done + n]);
            u64::from_le_bytes(bytes)
        };
        let cell = &frame[word];
        if n == 8 {
            cell.store(put(0), Release);
            continue;
        }
        let mut old = cell.load(Relaxed);
        while let Err(now) = cell.compare_exchange_weak(old, put(old), AcqRel, Relaxed) {
            old = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_land_where_they_belong() {
        let frame: [AtomicU64; WORDS] = std::array::from_fn(|_| AtomicU64::new(u64::MAX));
        store(&frame, 5, b"across two words");
        let mut got = [0; 18];
        load(&frame, 4, &mut got);
        assert_eq!(&got, b"\xffacross two words\xff");
        assert_eq!(frame[0].load(Relaxed).to_le_bytes(), *b"\xff\xff\xff\xff\xffacr");
        store(&frame, 4095, b"z");
        load(&frame, 4095, &mut got[..1]);
        assert_eq!(got[0], b'z');
    }
}
