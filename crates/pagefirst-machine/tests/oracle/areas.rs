//! What is mapped where: a plain map from the first page of each area to what holds in it.
//!
//! Areas are cut wherever a call begins or ends and never put together again; the mappings that a program would read
//! in `/proc/self/maps` are made of them only when they are asked for.

use pagefirst::space::VmaFlags;
use pagefirst::types::Prot;
use std::collections::BTreeMap;
use std::ops::Range;

/// What is kept free below a stack, in pages (Linux: `stack_guard_gap`).
pub const GUARD: u64 = 256;

/// What an area shows. Files are named by their number; `first` is the index in the file of the area's first page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shows {
    Anonymous,
    Private { file: usize, first: u64 },
    Shared { file: usize, first: u64 },
}

impl Shows {
    /// What is shown `n` pages further on.
    pub fn further(self, n: u64) -> Shows {
        match self {
            Shows::Anonymous => Shows::Anonymous,
            Shows::Private { file, first } => Shows::Private { file, first: first + n },
            Shows::Shared { file, first } => Shows::Shared { file, first: first + n },
        }
    }
    pub fn file(self) -> Option<(usize, u64)> {
        match self {
            Shows::Anonymous => None,
            Shows::Private { file, first } | Shows::Shared { file, first } => Some((file, first)),
        }
    }
    pub fn is_shared(self) -> bool {
        matches!(self, Shows::Shared { .. })
    }
}

/// What holds in a range of pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Area {
    pub prot: Prot,
    pub flags: VmaFlags,
    pub shows: Shows,
    /// How many pages further on its private pages are than where they were filled.
    pub moved: i64,
    /// Stacks never become one mapping with what lies beside them: each has a number of its own. 0 for all others.
    pub stack: u64,
}

impl Area {
    /// What is `n` pages further on.
    pub fn further(self, n: u64) -> Area {
        Area { shows: self.shows.further(n), ..self }
    }
}

#[derive(Clone, Default)]
pub struct Areas {
    /// From the first page to the page past the last, and what holds there.
    map: BTreeMap<u64, (u64, Area)>,
    stacks: u64,
}

impl Areas {
    /// Makes `at` a border, if it lies inside an area.
    fn cut(&mut self, at: u64) {
        if let Some((&start, &(end, area))) = self.map.range(..at).next_back()
            && at < end
        {
            self.map.insert(start, (at, area));
            self.map.insert(at, (end, area.further(at - start)));
        }
    }
    /// The areas that overlap `range`, clipped to it.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Area)> {
        let from = self.map.range(..=range.start).next_back().map_or(range.start, |(&start, _)| start);
        self.map.range(from..range.end.max(from)).filter_map(move |(&start, &(end, area))| {
            let part = start.max(range.start)..end.min(range.end);
            (part.start < part.end).then(|| (part.clone(), area.further(part.start - start)))
        })
    }
    pub fn at(&self, page: u64) -> Option<Area> {
        self.within(page..page + 1).next().map(|(_, area)| area)
    }
    /// The first page at or above `page` where something is mapped, and what.
    fn next(&self, page: u64) -> Option<(u64, Area)> {
        self.within(page..u64::MAX).next().map(|(range, area)| (range.start, area))
    }
    /// The first part of `range` where nothing is mapped.
    pub fn hole(&self, range: Range<u64>) -> Option<Range<u64>> {
        let mut at = range.start;
        for (part, _) in self.within(range.clone()) {
            if part.start > at {
                return Some(at..part.start);
            }
            at = part.end;
        }
        (at < range.end).then_some(at..range.end)
    }
    /// Whether nothing is mapped in `range`, and it keeps out of the guard gap of a stack above.
    pub fn is_free(&self, range: Range<u64>) -> bool {
        self.next(range.start).is_none_or(|(start, area)| fence(start, area) >= range.end)
    }

    pub fn remove(&mut self, range: Range<u64>) {
        self.cut(range.start);
        self.cut(range.end);
        self.map.retain(|start, _| !range.contains(start));
    }
    /// Puts an area where nothing is mapped.
    pub fn insert(&mut self, range: Range<u64>, area: Area) {
        let is_stack = area.flags.contains(VmaFlags::GROWS_DOWN);
        self.stacks += is_stack as u64;
        self.map.insert(range.start, (range.end, Area { stack: self.stacks * is_stack as u64, ..area }));
    }
    /// Gives what is mapped in `range` other rights or flags, unless `change` leaves all as it is; says whether it did.
    pub fn change(&mut self, range: Range<u64>, change: impl Fn(Area) -> Area) -> bool {
        let parts: Vec<_> = self.within(range).collect();
        if parts.iter().all(|(_, area)| change(*area) == *area) {
            return false;
        }
        // What is cut out of a stack is a stack of its own.
        let mut renumbered = BTreeMap::new();
        for (part, area) in parts {
            self.remove(part.clone());
            let stack = *renumbered.entry(area.stack).or_insert_with(|| {
                self.stacks += (area.stack != 0) as u64;
                if area.stack == 0 { 0 } else { self.stacks }
            });
            self.map.insert(part.start, (part.end, Area { stack, ..change(area) }));
        }
        true
    }
    /// Lets this stack start at `page`; it becomes no part of what it may have been cut out of, and now grows down to.
    pub fn grow(&mut self, stack: Range<u64>, page: u64) {
        if let Some((end, area)) = self.map.remove(&stack.start) {
            self.map.insert(page, (end, area));
        }
        self.stacks += 1;
        self.map.range_mut(page..stack.end).for_each(|(_, (_, area))| area.stack = self.stacks);
    }
    /// Where the stacks end that follow one upon the other from `page` on.
    pub fn end_of_stacks(&self, mut page: u64) -> u64 {
        while let Some((end, area)) = self.map.get(&page)
            && area.flags.contains(VmaFlags::GROWS_DOWN)
        {
            page = *end;
        }
        page
    }
    /// What is mapped next below `page`, and where that ends.
    pub fn before(&self, page: u64) -> Option<(u64, Area)> {
        self.map.range(..page).next_back().map(|(_, there)| *there)
    }
    /// The stack to grow for an access to `page`, where nothing is mapped: its first page and the page past its last.
    pub fn stack_above(&self, page: u64) -> Option<Range<u64>> {
        let (start, area) = self.next(page)?;
        let whole = self.mapping(start)?.0;
        area.flags.contains(VmaFlags::GROWS_DOWN).then_some(whole)
    }

    /// What the child of a fork has.
    pub fn inherited(&self) -> Areas {
        let mut child = self.clone();
        child.map.retain(|_, (_, area)| !area.flags.contains(VmaFlags::DONT_FORK));
        child
    }

    /// Adds the areas of `other`, which lie elsewhere, and whose files are numbered from `files` on.
    pub fn absorb(&mut self, other: Areas, files: usize) {
        let renamed = |shows| match shows {
            Shows::Anonymous => Shows::Anonymous,
            Shows::Private { file, first } => Shows::Private { file: file + files, first },
            Shows::Shared { file, first } => Shows::Shared { file: file + files, first },
        };
        for (start, (end, area)) in other.map {
            self.map.insert(start, (end, Area { shows: renamed(area.shows), ..area }));
        }
    }

    /// The mappings as a program sees them: neighbours that continue each other are one.
    pub fn mappings(&self) -> Vec<(Range<u64>, Area)> {
        let mut all: Vec<(Range<u64>, Area)> = Vec::new();
        for (&start, &(end, area)) in &self.map {
            match all.last_mut() {
                Some((last, first)) if last.end == start && first.further(start - last.start) == area => {
                    last.end = end;
                }
                _ => all.push((start..end, area)),
            }
        }
        all
    }
    /// The mapping that holds `page`.
    pub fn mapping(&self, page: u64) -> Option<(Range<u64>, Area)> {
        self.mappings().into_iter().find(|(range, _)| range.contains(&page))
    }
    pub fn pages(&self) -> u64 {
        self.map.iter().map(|(start, (end, _))| end - start).sum()
    }

    /// The highest multiple of `align` in `within` from which `len` pages are free; the lowest if `bottom_up`.
    pub fn room(&self, len: u64, align: u64, within: &Range<u64>, bottom_up: bool) -> Option<u64> {
        let mut gaps = Vec::new();
        let mut at = 0;
        for (&start, &(end, area)) in &self.map {
            gaps.push(at..fence(start, area));
            at = end;
        }
        gaps.push(at..u64::MAX);
        let fit = |gap: Range<u64>| {
            let (low, high) = (gap.start.max(within.start), gap.end.min(within.end));
            let first = low.next_multiple_of(align);
            let last = high.checked_sub(len)? / align * align;
            (low <= last && first <= last).then_some(if bottom_up { first } else { last })
        };
        let mut fitting = gaps.into_iter().filter_map(fit);
        if bottom_up { fitting.next() } else { fitting.next_back() }
    }
}

/// Where what is mapped from `start` begins for those that look for room.
fn fence(start: u64, area: Area) -> u64 {
    if area.flags.contains(VmaFlags::GROWS_DOWN) { start.saturating_sub(GUARD) } else { start }
}
