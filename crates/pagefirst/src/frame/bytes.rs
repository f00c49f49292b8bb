//! Bytes of pages that user code may write to meanwhile.
//!
//! Such a page is touched through its words, word by word, never through a slice: a racing copy is torn at word
//! boundaries as it would be on hardware, and a part of a word is changed in one atomic step, so that a store by
//! user code to its other part is not lost.

use crate::sync::atomic::plain::AtomicU64;
use crate::sync::atomic::{AcqRel, Acquire, Relaxed};
use core::ops::Range;

const WORD: usize = size_of::<u64>();

/// Zeroes these bytes of the page.
pub(crate) fn zero(cells: &[AtomicU64], bytes: Range<usize>) {
    let words = bytes.start / WORD..bytes.end.div_ceil(WORD);
    for (i, cell) in words.clone().zip(&cells[words]) {
        let keep = bytes.start.saturating_sub(i * WORD);
        let to = WORD.min(bytes.end - i * WORD);
        if keep == 0 && to == WORD {
            cell.store(0, Relaxed);
            continue;
        }
        let mut mask = [0xff; WORD];
        mask[keep..to].fill(0);
        cell.fetch_and(u64::from_ne_bytes(mask), Relaxed);
    }
}

/// Copies bytes out of the page, from byte `at` on.
pub(crate) fn read(cells: &[AtomicU64], at: usize, to: &mut [u8]) {
    let (head, to) = to.split_at_mut(head(at).min(to.len()));
    if !head.is_empty() {
        read_part(&cells[at / WORD], at % WORD, head);
    }
    let cells = &cells[(at + head.len()) / WORD..];
    let (whole, tail) = to.as_chunks_mut();
    for (to, cell) in whole.iter_mut().zip(cells) {
        *to = cell.load(Relaxed).to_ne_bytes();
    }
    if !tail.is_empty() {
        read_part(&cells[whole.len()], 0, tail);
    }
}

/// Copies bytes into the page, from byte `at` on.
pub(crate) fn write(cells: &[AtomicU64], at: usize, from: &[u8]) {
    let (head, from) = from.split_at(head(at).min(from.len()));
    if !head.is_empty() {
        write_part(&cells[at / WORD], at % WORD, head);
    }
    let cells = &cells[(at + head.len()) / WORD..];
    let (whole, tail) = from.as_chunks();
    for (from, cell) in whole.iter().zip(cells) {
        cell.store(u64::from_ne_bytes(*from), Relaxed);
    }
    if !tail.is_empty() {
        write_part(&cells[whole.len()], 0, tail);
    }
}

/// Bytes from `at` to the next word.
fn head(at: usize) -> usize {
    at.next_multiple_of(WORD) - at
}

fn read_part(cell: &AtomicU64, byte: usize, to: &mut [u8]) {
    let word = cell.load(Relaxed).to_ne_bytes();
    to.copy_from_slice(&word[byte..byte + to.len()]);
}

fn write_part(cell: &AtomicU64, byte: usize, from: &[u8]) {
    let (mut mask, mut value) = ([0; WORD], [0; WORD]);
    mask[byte..byte + from.len()].fill(0xff);
    value[byte..byte + from.len()].copy_from_slice(from);
    let (mask, value) = (u64::from_ne_bytes(mask), u64::from_ne_bytes(value));
    let mut old = cell.load(Relaxed);
    while let Err(newer) = cell.compare_exchange(old, old & !mask | value, Relaxed, Relaxed) {
        old = newer;
    }
}

/// Puts `new` in place of `old`, if that is what stands from byte `at` on, in one atomic step; what stood there is
/// told, as success or failure. The bytes lie in one word.
pub(crate) fn compare_exchange<const N: usize>(
    cells: &[AtomicU64],
    at: usize,
    old: [u8; N],
    new: [u8; N],
) -> Result<[u8; N], [u8; N]> {
    let (cell, byte) = (&cells[at / WORD], at % WORD);
    let mut word = cell.load(Acquire);
    loop {
        let mut bytes = word.to_ne_bytes();
        let mut found = [0; N];
        found.copy_from_slice(&bytes[byte..byte + N]);
        if found != old {
            return Err(found);
        }
        bytes[byte..byte + N].copy_from_slice(&new);
        // Fails also when the rest of the word has changed: then nothing is wrong yet.
        match cell.compare_exchange(word, u64::from_ne_bytes(bytes), AcqRel, Acquire) {
            Ok(_) => return Ok(found),
            Err(newer) => word = newer,
        }
    }
}
