//! A change of the tree of VMAs: prepared beside the published one, then made visible whole.

use super::tree::{MAX_NEW, VmaTree};
use super::{AddressSpace, MapError, State, Vma, Writing};
use crate::mem::Shared;
use crate::platform::Platform;
use crate::rmap;
use crate::sync::LockGuard;
use crate::tlb::NOTHING;
use crate::types::{VirtAddr, VirtRange};

/// A new tree in the making. Dropped, nothing has happened.
///
/// Pieces are pushed in the order of their addresses; neighbours that continue each other become one VMA, those
/// just before and after the range included. They go into the tree a few at a time, in the place of what they replace.
pub(super) struct Change<'a, P: Platform> {
    space: &'a AddressSpace<P>,
    next: VmaTree<P>,
    /// Where VMAs are replaced: around each range that was cut, neighbours that are merged included.
    replaced: [Option<VirtRange>; 2],
    /// The range that was cut last.
    range: VirtRange,
    /// Of `next`, what is not replaced yet, with room for the VMAs in `new`.
    stale: Option<VirtRange>,
    new: [Option<Shared<P, Vma<P>>>; MAX_NEW],
    len: usize,
    pending: Option<Vma<P>>,
    /// What is left of the VMA that reaches beyond the end of the range.
    tail: Option<Vma<P>>,
    /// Whether the piece that is pushed next is the first of the range.
    is_first: bool,
    bytes: u64,
    /// Of each range that was cut: where new mappings are that the reverse map finds by their own.
    found: [Option<VirtRange>; 2],
    /// Which of them the range is that was cut last.
    nth: usize,
    /// Whether such mappings are replaced.
    replaces_found: bool,
}

impl<'a, P: Platform> Change<'a, P> {
    /// Starts with `range` cut out: what lies in it is gone, what reaches beyond it is kept up to its edges.
    pub fn cut(writing: &Writing<'a, P>, range: VirtRange) -> Self {
        let space = writing.space;
        let mut change = Change {
            space,
            next: space.tree.fork(),
            replaced: [None; 2],
            range,
            stale: None,
            new: [const { None }; MAX_NEW],
            len: 0,
            pending: None,
            tail: None,
            is_first: true,
            bytes: writing.state.bytes,
            found: [None; 2],
            nth: 0,
            replaces_found: false,
        };
        change.cut_out(range);
        change
    }

    /// Ends what was begun and cuts another range out of what there is then: the other end of a move.
    pub fn cut_also(&mut self, range: VirtRange, state: &mut State<P>) -> Result<(), MapError> {
        self.end(state)?;
        self.nth += 1;
        self.cut_out(range);
        Ok(())
    }

    /// Whether something that was mapped is replaced or gone.
    pub fn replaces(&self) -> bool {
        self.replaced[0].is_some()
    }

    fn cut_out(&mut self, range: VirtRange) {
        (self.range, self.is_first) = (range, true);
        let part = |v: &Vma<P>, start, end| v.part(VirtRange::new(start, end), v.prot, v.flags);
        let mut whole = range;
        for vma in self.next.overlapping(range) {
            self.bytes -= vma.range.intersect(range).len();
            whole = whole.union(vma.range);
            self.replaces_found |= vma.spot().is_some();
            if vma.range.start < range.start {
                self.pending = Some(part(&vma, vma.range.start, range.start));
            }
            if vma.range.end > range.end {
                self.tail = Some(part(&vma, range.end, vma.range.end));
            }
            self.stale = Some(whole);
        }
        if self.stale.is_some() {
            self.replace(whole);
        }
    }

    /// The VMAs published now that overlap `range` will be replaced.
    fn replace(&mut self, range: VirtRange) {
        self.stale = Some(self.stale.map_or(range, |stale| stale.union(range)));
        match self.replaced {
            [None, _] => self.replaced[0] = Some(range),
            [Some(a), None] if a.overlaps(range) || a.end == range.start || range.end == a.start => {
                self.replaced[0] = Some(a.union(range));
            }
            [Some(_), None] => self.replaced[1] = Some(range),
            [_, Some(b)] => self.replaced[1] = Some(b.union(range)),
        }
    }

    /// Puts the new VMAs into the tree, in the place of what they replace.
    fn settle(&mut self, state: &mut State<P>) -> Result<(), MapError> {
        let Some(range) = self.stale else { return Ok(()) };
        state.reserve.refill(self.space.p, &self.next, self.len)?;
        self.next.replace(range, &mut self.new[..self.len], &mut state.reserve);
        (self.stale, self.len) = (None, 0);
        Ok(())
    }

    fn emit(&mut self, mut piece: Vma<P>, state: &mut State<P>) -> Result<(), MapError> {
        let p = self.space.p;
        if self.len == MAX_NEW {
            self.settle(state)?;
        }
        piece.id = p.vm().new_id();
        piece.enter(&self.space.shared)?;
        if piece.spot().is_some() {
            let found = &mut self.found[self.nth];
            *found = Some(found.map_or(piece.range, |found| found.union(piece.range)));
        }
        self.stale = Some(self.stale.map_or(piece.range, |stale| stale.union(piece.range)));
        let slot = p.vm().or_drain(p, || p.vm().vmas.reserve())?;
        self.new[self.len] = Some(slot.fill(piece));
        self.len += 1;
        Ok(())
    }

    /// Adds a piece, which lies in the range that was cut and behind all pieces so far.
    pub fn push(&mut self, piece: Vma<P>, state: &mut State<P>) -> Result<(), MapError> {
        self.bytes += piece.range.len();
        if core::mem::take(&mut self.is_first)
            && self.pending.is_none()
            && piece.range.start == self.range.start
            && let Some(before) = self.next.before(piece.range.start)
            && before.continues(&piece)
        {
            self.replace(before.range);
            self.replaces_found |= before.spot().is_some();
            self.pending = Some(before.part(before.range, before.prot, before.flags));
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

    /// Ends the pieces of the range that was cut last.
    fn end(&mut self, state: &mut State<P>) -> Result<(), MapError> {
        if let Some(mut last) = self.pending.take() {
            if let Some(tail) = self.tail.take_if(|tail| last.continues(tail)) {
                last.range.end = tail.range.end;
            } else if last.range.end == self.range.end
                && self.tail.is_none()
                && let Some(after) = self.next.after(last.range.end)
                && last.continues(&after)
            {
                last.range.end = after.range.end;
                self.replace(after.range);
                self.replaces_found |= after.spot().is_some();
            }
            self.emit(last, state)?;
        }
        if let Some(tail) = self.tail.take() {
            self.emit(tail, state)?;
        }
        self.settle(state)
    }

    /// Ends the pieces and checks the limits: from here nothing can fail.
    pub fn finish<'c>(&'c mut self, state: &mut State<P>) -> Result<Ready<'c, 'a, P>, MapError> {
        self.end(state)?;
        let policy = &self.space.policy;
        if self.next.len() > policy.max_vmas && self.next.len() > self.space.tree.len() {
            return Err(MapError::TooMany(policy.max_vmas));
        }
        if self.bytes > policy.max_bytes && self.bytes > state.bytes {
            return Err(MapError::TooLarge(policy.max_bytes));
        }
        Ok(Ready(self))
    }
}

/// A tree that waits to be published.
pub(super) struct Ready<'c, 'a, P: Platform>(&'c Change<'a, P>);

impl<P: Platform> Ready<'_, '_, P> {
    /// Announces: faults that work from the VMAs about to be replaced notice from now on, and who walks the reverse map
    /// finds those to come. Returns the addresses of those that map memory of a file: a call by which some go flushes all of
    /// that. A fault may have taken an entry out and not have flushed, and who removes the memory from the file later does not
    /// come by here any more.
    pub fn announce(&self) -> VirtRange {
        for range in self.0.found.iter().flatten() {
            self.0.next.overlapping(*range).for_each(|vma| {
                vma.set_to_come();
                rmap::insert(&vma);
            });
        }
        let mut memory = NOTHING;
        for range in self.0.replaced.iter().flatten() {
            self.0.space.tree.overlapping(*range).for_each(|vma| {
                vma.retire();
                if vma.is_memory_of_file() {
                    memory = memory.union(vma.range);
                }
            });
        }
        memory
    }
    /// A tree like the published one, in which those VMAs are replaced by others like them: to [take the announcement
    /// back](Ready::take_back).
    pub fn undo(&self) -> Result<VmaTree<P>, MapError> {
        let (p, tree) = (self.0.space.p, self.0.space.tree.fork());
        let mut reserve = tree.reserve(p, 1)?;
        for range in self.0.replaced.into_iter().flatten() {
            for vma in self.0.space.tree.overlapping(range) {
                let mut again = vma.part(vma.range, vma.prot, vma.flags);
                again.id = p.vm().new_id();
                again.enter(&self.0.space.shared)?;
                let slot = p.vm().or_drain(p, || p.vm().vmas.reserve())?;
                reserve.refill(p, &tree, 1)?;
                tree.replace(vma.range, &mut [Some(slot.fill(again))], &mut reserve);
            }
        }
        Ok(tree)
    }
    /// The range whose empty tables nobody needs once this is published: up to the neighbours that stay. `None` where
    /// no table but the root is kept while empty.
    pub fn unneeded(&self, cut: VirtRange) -> Option<VirtRange> {
        if !cfg!(feature = "__baseline") {
            return None;
        }
        let start = self.0.next.before(cut.start).map_or(VirtAddr(0), |v| v.range.end);
        let end = self.0.next.after(cut.end).map_or(VirtAddr(u64::MAX), |v| v.range.start);
        Some(VirtRange::new(start.min(cut.start), end))
    }
    /// Takes the announcement back.
    pub fn take_back(self, undo: &VmaTree<P>) {
        for range in self.0.replaced.iter().flatten().filter(|_| self.0.replaces_found) {
            undo.overlapping(*range).for_each(|vma| rmap::insert(&vma));
        }
        self.adopt(undo);
        for range in self.0.found.iter().flatten() {
            self.0.next.overlapping(*range).for_each(|vma| rmap::remove(&vma));
        }
        self.help(&self.0.replaced);
    }
    /// Makes the new tree visible with one store.
    pub fn publish(self, state: &mut LockGuard<'_, P, P::WriterLock, State<P>>) {
        state.bytes = self.0.bytes;
        for range in self.0.found.iter().flatten() {
            self.0.next.overlapping(*range).for_each(|vma| vma.go_live());
        }
        self.adopt(&self.0.next);
        self.help(&self.0.found);
    }
    /// What was taken over by the mappings that are published now, and is being removed from their files, is taken out.
    fn help(&self, ranges: &[Option<VirtRange>; 2]) {
        for range in ranges.iter().flatten().filter(|_| self.0.replaces_found) {
            self.0.space.tree.overlapping(*range).for_each(|vma| rmap::help(&vma));
        }
    }
    /// Puts another tree in place of the published one.
    fn adopt(&self, tree: &VmaTree<P>) {
        let published = &self.0.space.tree;
        let old = self.0.replaces_found.then(|| published.fork());
        published.adopt(tree);
        for old in old.iter() {
            for range in self.0.replaced.iter().flatten() {
                old.overlapping(*range).for_each(|vma| rmap::remove(&vma));
            }
        }
    }
}
