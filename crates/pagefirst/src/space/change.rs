//! A change of the tree of VMAs: prepared beside the published one, then made visible whole.

use super::tree::VmaTree;
use super::{AddressSpace, MapError, State, Vma, Writing};
use crate::mem::Shared;
use crate::platform::Platform;
use crate::sync::LockGuard;
use crate::types::{VirtAddr, VirtRange};

/// A new tree in the making. Dropped, nothing has happened.
///
/// Pieces are pushed in the order of their addresses; neighbours that continue each other become one VMA, those
/// just before and after the range included.
pub(super) struct Change<'a, P: Platform> {
    space: &'a AddressSpace<P>,
    next: VmaTree<P>,
    /// Where VMAs are replaced: around each range that was cut, neighbours that are merged included.
    replaced: [Option<VirtRange>; 2],
    pending: Option<Vma<P>>,
    before: Option<Shared<P, Vma<P>>>,
    bytes: u64,
}

impl<'a, P: Platform> Change<'a, P> {
    /// Starts with `range` cut out: what lies in it is gone, what reaches beyond it is kept up to its edges.
    pub fn cut(writing: &mut Writing<'a, P>, range: VirtRange) -> Result<Self, MapError> {
        let space = writing.space;
        let mut change = Change {
            space,
            next: space.tree.fork(),
            replaced: [None; 2],
            pending: None,
            before: None,
            bytes: writing.state.bytes,
        };
        change.cut_out(range, &mut writing.state)?;
        Ok(change)
    }

    /// Ends what was begun and cuts another range out of what there is then: the other end of a move.
    pub fn cut_also(&mut self, range: VirtRange, state: &mut State<P>) -> Result<(), MapError> {
        if let Some(last) = self.pending.take() {
            self.emit(last, state)?;
        }
        self.cut_out(range, state)
    }

    fn cut_out(&mut self, range: VirtRange, state: &mut State<P>) -> Result<(), MapError> {
        let first = self.next.overlapping(range).next();
        let last = self.next.before(range.end).filter(|v| v.range.overlaps(range));
        let head = first.filter(|v| v.range.start < range.start);
        let tail = last.filter(|v| v.range.end > range.end);
        self.before = match head {
            Some(_) => None,
            None => self.next.before(range.start).filter(|v| v.range.end == range.start),
        };
        for vma in self.next.overlapping(range) {
            self.bytes -= vma.range.intersect(range).len();
        }
        let whole = VirtRange::new(
            head.as_ref().map_or(range.start, |v| v.range.start),
            tail.as_ref().map_or(range.end, |v| v.range.end),
        );
        self.replaces(whole);
        self.remove(whole, state)?;
        let part =
            |v: &Vma<P>, range: VirtRange| Vma::new(0, range, v.prot, v.flags, v.backing_at(range.start));
        // The tail is put back at once; the head waits to be continued.
        if let Some(v) = &tail {
            self.emit(part(v, VirtRange::new(range.end, v.range.end)), state)?;
        }
        if let Some(v) = &head {
            self.pending = Some(part(v, VirtRange::new(v.range.start, range.start)));
        }
        Ok(())
    }

    /// The VMAs published now that overlap `range` will be replaced.
    fn replaces(&mut self, range: VirtRange) {
        match self.replaced {
            [None, _] => self.replaced[0] = Some(range),
            [Some(a), None] if a.overlaps(range) || a.end == range.start || range.end == a.start => {
                self.replaced[0] = Some(a.union(range));
            }
            [Some(_), None] => self.replaced[1] = Some(range),
            [_, Some(b)] => self.replaced[1] = Some(b.union(range)),
        }
    }

    fn remove(&mut self, range: VirtRange, state: &mut State<P>) -> Result<(), MapError> {
        let p = self.space.p;
        state.reserve.refill(p, &self.next, 0)?;
        self.next.replace(range, None, &mut state.reserve);
        Ok(())
    }

    fn emit(&mut self, mut piece: Vma<P>, state: &mut State<P>) -> Result<(), MapError> {
        let p = self.space.p;
        piece.id = p.vm().new_id();
        let range = piece.range;
        let slot = p.vm().or_drain(p, || p.vm().vmas.reserve())?;
        let vma = slot.fill(piece);
        state.reserve.refill(p, &self.next, 1)?;
        self.next.replace(range, Some(vma), &mut state.reserve);
        Ok(())
    }

    /// Adds a piece, which lies in the range that was cut and behind all pieces so far.
    pub fn push(&mut self, piece: Vma<P>, state: &mut State<P>) -> Result<(), MapError> {
        self.bytes += piece.range.len();
        if let Some(before) = self.before.take()
            && before.continues(&piece)
        {
            self.remove(before.range, state)?;
            self.replaces(before.range);
            self.pending = Some(Vma::new(0, before.range, before.prot, before.flags, before.backing.clone()));
        }
        match self.pending.take() {
            Some(mut last) if last.continues(&piece) => {
                last.range.end = piece.range.end;
                self.pending = Some(last);
            }
            Some(last) => {
                self.emit(last, state)?;
                self.pending = Some(piece);
            }
            None => self.pending = Some(piece),
        }
        Ok(())
    }

    /// Ends the pieces and checks the limits: from here nothing can fail.
    pub fn finish(mut self, state: &mut State<P>) -> Result<Ready<'a, P>, MapError> {
        if let Some(mut last) = self.pending.take() {
            if let Some(after) = self.next.after(last.range.end)
                && last.continues(&after)
            {
                self.remove(after.range, state)?;
                last.range.end = after.range.end;
                self.replaces(after.range);
            }
            self.emit(last, state)?;
        }
        let policy = &self.space.policy;
        if self.next.len() > policy.max_vmas && self.next.len() > self.space.tree.len() {
            return Err(MapError::TooMany(policy.max_vmas));
        }
        if self.bytes > policy.max_bytes && self.bytes > state.bytes {
            return Err(MapError::TooLarge(policy.max_bytes));
        }
        Ok(Ready { space: self.space, next: self.next, replaced: self.replaced, bytes: self.bytes })
    }
}

/// A tree that waits to be published.
pub(super) struct Ready<'a, P: Platform> {
    space: &'a AddressSpace<P>,
    next: VmaTree<P>,
    replaced: [Option<VirtRange>; 2],
    bytes: u64,
}

impl<P: Platform> Ready<'_, P> {
    /// Announces: faults that work from the VMAs about to be replaced notice from now on.
    pub fn announce(&self) {
        for range in self.replaced.into_iter().flatten() {
            self.space.tree.overlapping(range).for_each(|vma| vma.retire());
        }
    }
    /// A tree like the published one, in which those VMAs are replaced by others like them: to take an announcement
    /// back.
    pub fn undo(&self) -> Result<VmaTree<P>, MapError> {
        let (p, tree) = (self.space.p, self.space.tree.fork());
        let mut reserve = tree.reserve(p, 1)?;
        for range in self.replaced.into_iter().flatten() {
            for vma in self.space.tree.overlapping(range) {
                let again = Vma::new(p.vm().new_id(), vma.range, vma.prot, vma.flags, vma.backing.clone());
                let slot = p.vm().or_drain(p, || p.vm().vmas.reserve())?;
                reserve.refill(p, &tree, 1)?;
                tree.replace(vma.range, Some(slot.fill(again)), &mut reserve);
            }
        }
        Ok(tree)
    }
    /// The range whose empty tables nobody needs once this is published: up to the neighbours that stay.
    pub fn unneeded(&self, cut: VirtRange) -> VirtRange {
        let start = self.next.before(cut.start).map_or(VirtAddr(0), |v| v.range.end);
        let end = self.next.after(cut.end).map_or(VirtAddr(u64::MAX), |v| v.range.start);
        VirtRange::new(start.min(cut.start), end)
    }
    /// Makes the new tree visible with one store.
    pub fn publish(self, state: &mut LockGuard<'_, P, P::WriterLock, State<P>>) {
        state.bytes = self.bytes;
        self.space.tree.adopt(self.next);
    }
}
