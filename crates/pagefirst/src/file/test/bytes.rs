use super::{AtomicU64, Random, Relaxed, std};
use crate::frame::bytes;
use std::vec;
use std::vec::Vec;

fn cells(from: &[u8]) -> Vec<AtomicU64> {
    from.as_chunks().0.iter().map(|w| AtomicU64::new(u64::from_ne_bytes(*w))).collect()
}
fn all(cells: &[AtomicU64]) -> Vec<u8> {
    cells.iter().flat_map(|c| c.load(Relaxed).to_ne_bytes()).collect()
}

#[test]
fn words_and_parts_of_words_are_copied_and_zeroed() {
    let mut random = Random(7);
    for _ in 0..5000 {
        let mut model: Vec<u8> = (0..64).map(|_| random.next() as u8).collect();
        let cells = cells(&model);
        let at = random.below(65) as usize;
        let n = random.below(65 - at as u64) as usize;
        let new: Vec<u8> = (0..n).map(|_| random.next() as u8).collect();
        let mut out = vec![0; n];
        bytes::read(&cells, at, &mut out);
        assert_eq!(out, model[at..at + n]);
        bytes::write(&cells, at, &new);
        model[at..at + n].copy_from_slice(&new);
        assert_eq!(all(&cells), model);
        bytes::zero(&cells, at..at + n);
        model[at..at + n].fill(0);
        assert_eq!(all(&cells), model);
    }
}

#[test]
fn a_part_of_a_word_is_exchanged_and_the_rest_left() {
    let cells = cells(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
    assert_eq!(bytes::compare_exchange(&cells, 12, [13, 14, 15, 16], [0; 4]), Ok([13, 14, 15, 16]));
    assert_eq!(bytes::compare_exchange(&cells, 8, [13, 14, 15, 16], [0; 4]), Err([9, 10, 11, 12]));
    assert_eq!(all(&cells), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0, 0, 0]);
}
