//! Which mapping an address of the recorded process belongs to. Only names: what is allowed where is not known here.

use std::collections::BTreeMap;

use crate::event::{Address, MappingId};

/// A stretch of live addresses that one mapping names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) mapping: MappingId,
    /// The address of the mapping's offset 0.
    pub(super) base: u64,
}

impl Span {
    /// The name of its first byte.
    pub(super) fn at(&self) -> Address {
        Address { mapping: self.mapping, offset: self.start - self.base }
    }

    pub(super) fn len(&self) -> u64 {
        self.end - self.start
    }

    fn within(&self, start: u64, end: u64) -> Self {
        Self { start: self.start.max(start), end: self.end.min(end), ..*self }
    }
}

/// The live addresses, by the start of each span.
#[derive(Clone, Debug, Default)]
pub(super) struct Tracker {
    spans: BTreeMap<u64, Span>,
    named: u32,
}

impl Tracker {
    /// The next mapping's name.
    pub(super) fn name(&mut self) -> MappingId {
        let id = MappingId(self.named);
        self.named += 1;
        id
    }

    /// The name of a live address.
    pub(super) fn find(&self, address: u64) -> Option<Address> {
        let (_, span) = self.spans.range(..=address).next_back()?;
        (address < span.end).then(|| span.within(address, span.end).at())
    }

    /// The live parts of a range, by rising address.
    pub(super) fn live(&self, start: u64, end: u64) -> Vec<Span> {
        let first =
            self.spans.range(..start).next_back().map(|(_, span)| span).filter(|span| span.end > start);
        let inside = self.spans.range(start..end.max(start)).map(|(_, span)| span);
        first
            .into_iter()
            .chain(inside)
            .map(|span| span.within(start, end))
            .filter(|span| span.len() > 0)
            .collect()
    }

    /// The parts of a range that are not live, by rising address.
    pub(super) fn gaps(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        let mut from = start;
        for span in self.live(start, end) {
            if span.start > from {
                gaps.push((from, span.start));
            }
            from = span.end;
        }
        if from < end {
            gaps.push((from, end));
        }
        gaps
    }

    /// Names a range that is not live.
    pub(super) fn insert(&mut self, span: Span) {
        if span.len() > 0 {
            self.spans.insert(span.start, span);
        }
    }

    /// Forgets a range, and says what was live in it.
    pub(super) fn remove(&mut self, start: u64, end: u64) -> Vec<Span> {
        let taken = self.live(start, end);
        for span in &taken {
            let Some((_, &whole)) = self.spans.range(..=span.start).next_back() else { continue };
            self.spans.remove(&whole.start);
            self.insert(whole.within(whole.start, span.start));
            self.insert(whole.within(span.end, whole.end));
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::{Span, Tracker};
    use crate::event::{Address, MappingId};

    fn span(start: u64, end: u64, mapping: u32, base: u64) -> Span {
        Span { start, end, mapping: MappingId(mapping), base }
    }

    #[test]
    fn a_hole_has_no_name_and_the_rest_keeps_its_own() {
        let mut tracker = Tracker::default();
        tracker.insert(span(0x1000, 0x9000, 0, 0x1000));
        tracker.insert(span(0x9000, 0xa000, 1, 0x9000));
        assert_eq!(tracker.remove(0x3000, 0x5000), [span(0x3000, 0x5000, 0, 0x1000)]);
        assert_eq!(tracker.find(0x2fff), Some(Address { mapping: MappingId(0), offset: 0x1fff }));
        assert_eq!(tracker.find(0x3000), None);
        assert_eq!(tracker.find(0x5000), Some(Address { mapping: MappingId(0), offset: 0x4000 }));
        assert_eq!(tracker.find(0xa000), None);
        assert_eq!(tracker.gaps(0, 0xb000), [(0, 0x1000), (0x3000, 0x5000), (0xa000, 0xb000)]);
        let live = tracker.live(0x2000, 0x9800);
        assert_eq!(
            live,
            [
                span(0x2000, 0x3000, 0, 0x1000),
                span(0x5000, 0x9000, 0, 0x1000),
                span(0x9000, 0x9800, 1, 0x9000)
            ]
        );
        assert_eq!(tracker.remove(0, u64::MAX).len(), 3);
        assert_eq!(tracker.gaps(0, 0xb000), [(0, 0xb000)]);
    }
}
