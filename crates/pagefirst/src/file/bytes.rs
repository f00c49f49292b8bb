//! Bytes of pages that user code may write to meanwhile.
//!
//! Such a page is touched through its words, word by word, never through a slice: a racing copy is torn at word
//! boundaries as it would be on hardware, and a part of a word is changed in one atomic step, so that a store by
//! user code to its other part is not lost.

use crate::sync::atomic::Relaxed;
use crate::sync::atomic::plain::AtomicU64;

const WORD: usize = size_of::<u64>();

/// Zeroes the page from byte `from` on.
pub(super) fn zero_from(cells: &[AtomicU64], from: usize) {
    for (i, cell) in cells.iter().enumerate().skip(from / WORD) {
        match from.saturating_sub(i * WORD) {
            0 => cell.store(0, Relaxed),
            keep => {
                let mut mask = [0; WORD];
                mask[..keep].fill(0xff);
                cell.fetch_and(u64::from_ne_bytes(mask), Relaxed);
            }
        }
    }
}

/// Copies bytes out of the page, from byte `at` on.
pub(super) fn read(cells: &[AtomicU64], at: usize, to: &mut [u8]) {
    let mut done = 0;
    while done < to.len() {
        let (word, byte) = ((at + done) / WORD, (at + done) % WORD);
        let n = (WORD - byte).min(to.len() - done);
        let value = cells[word].load(Relaxed).to_ne_bytes();
        to[done..done + n].copy_from_slice(&value[byte..byte + n]);
        done += n;
    }
}

/// Copies bytes into the page, from byte `at` on.
pub(super) fn write(cells: &[AtomicU64], at: usize, from: &[u8]) {
    let mut done = 0;
    while done < from.len() {
        let (word, byte) = ((at + done) / WORD, (at + done) % WORD);
        let n = (WORD - byte).min(from.len() - done);
        let (mut mask, mut value) = ([0; WORD], [0; WORD]);
        mask[byte..byte + n].fill(0xff);
        value[byte..byte + n].copy_from_slice(&from[done..done + n]);
        let (mask, value) = (u64::from_ne_bytes(mask), u64::from_ne_bytes(value));
        let cell = &cells[word];
        if n == WORD {
            cell.store(value, Relaxed);
        } else {
            let mut old = cell.load(Relaxed);
            while let Err(newer) = cell.compare_exchange(old, old & !mask | value, Relaxed, Relaxed) {
                old = newer;
            }
        }
        done += n;
    }
}
