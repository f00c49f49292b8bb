//! Stretches of private memory that one worker alone maps and touches: every answer and every word is known.
//!
//! A small one lies among those of others: in one leaf table, next to their mappings, and merged with them where both are
//! alike (`Area::own`). Some workers have a wide one beside it, of two huge pages.
//!
//! A stretch consists of parts, each mapped and unmapped as a whole, with a word in one page: a small one's of a page, a wide
//! one's of many.

mod forks;
mod past;
mod pins;
mod prey;

pub(crate) use pins::MOST_LOST;

use crate::Host;
use crate::files::Kind;
use crate::layout::{Area, OWN_PARTS, place_of};
use crate::tally::Op;
use crate::worker::{Tag, Word, Worker, is_short};
use core::fmt;
use core::ops::Range;
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::frame::FrameFlags;
use pagefirst::platform::Platform;
use pagefirst::space::{AddressSpace, Advice, Backing, Map, MapError, Pinned, Place, RemapTo, Why};
use pagefirst::sync::epoch::Pin;
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr, VirtRange};
use past::Past;

const RW: Prot = Prot::READ.union(Prot::WRITE);
const LOST: FaultError = FaultError::Bus(Bus::Poison);
/// Pages that may be pinned at a time.
const PINS: usize = 4;

/// What a part of the stretch is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    Nothing,
    Anonymous,
    /// A page of the file that stays as it is, not copied yet.
    Still(u64),
    /// A copy of one.
    Copied(u64),
    /// Private memory that is lost, for hardware reported an error in it: it was a copy of this page of that file, or of none.
    Lost(Option<u64>),
}

#[derive(Clone, Copy, Debug)]
struct Page {
    what: What,
    prot: Prot,
    /// What our word in it is; of an uncopied page the file says that.
    word: u64,
    /// What a child gets of it.
    forks: Forks,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Forks {
    left_out: bool,
    wiped: bool,
}

const AS_IT_IS: Forks = Forks { left_out: false, wiped: false };
const NOTHING: Page = Page { what: What::Nothing, prot: Prot::empty(), word: 0, forks: AS_IT_IS };

pub(crate) struct Stretch<P: Platform> {
    area: Area,
    pages: [Page; OWN_PARTS as usize],
    /// Pages of a part.
    part: u64,
    /// Pages that are pinned, for a device that writes.
    pins: [Option<(usize, Pinned<P>)>; PINS],
    past: Past,
}

impl<P: Platform> Stretch<P> {
    pub fn new(area: Area) -> Self {
        let part = area.pages / OWN_PARTS;
        let (pages, pins) = ([NOTHING; OWN_PARTS as usize], [const { None }; PINS]);
        Stretch { area, pages, part, pins, past: Past::new() }
    }
    fn is_wide(&self) -> bool {
        self.part > 1
    }
    /// Where part `i` begins: there its word is.
    fn start(&self, i: usize) -> VirtAddr {
        self.area.page(i as u64 * self.part)
    }
    /// Bytes of so many parts.
    fn bytes(&self, n: usize) -> u64 {
        n as u64 * self.part * PAGE_SIZE
    }
    /// Which part this address is in.
    fn index_of(&self, at: VirtAddr) -> Option<usize> {
        Some((self.area.index_of(at)? / self.part) as usize)
    }
    /// Gives up what is pinned.
    pub fn unpin(&mut self) {
        self.pins = [const { None }; PINS];
    }
    fn is_mapped(&self, range: Range<usize>) -> bool {
        self.pages[range].iter().all(|page| page.what != What::Nothing)
    }
    /// What these pages were is gone.
    fn gone(&mut self, range: &Range<usize>) {
        self.pins.iter_mut().for_each(|pin| drop(pin.take_if(|(i, _)| range.contains(i))));
    }
    fn each(&mut self, range: Range<usize>, mut f: impl FnMut(&mut Page)) {
        self.pages[range].iter_mut().for_each(&mut f);
    }
}

impl<H: Host> Worker<'_, '_, H> {
    /// Some parts; of a wide stretch often one huge page, or both.
    fn range(&mut self) -> (Range<usize>, VirtAddr, u64) {
        let half = OWN_PARTS / 2;
        let (first, n) = match self.own.is_wide() && self.dice.once_in(3) {
            true => [(0, half), (half, half), (0, OWN_PARTS)][self.dice.roll(3) as usize],
            false => self.dice.pages(OWN_PARTS),
        };
        let range = first as usize..(first + n) as usize;
        let (at, len) = (self.own.start(range.start), self.own.bytes(range.len()));
        (range, at, len)
    }

    /// Works on its small stretch, or on the wide one as on that.
    pub fn on_stretch(&mut self, is_wide: bool, work: impl FnOnce(&mut Self)) {
        let swap = |worker: &mut Self| {
            if is_wide {
                core::mem::swap(&mut worker.own, &mut worker.wide);
            }
        };
        swap(self);
        work(self);
        swap(self);
    }

    pub fn work_on_own(&mut self, space: &H::Space, cpu: &mut H::Cpu) {
        match self.dice.roll(64) {
            0..23 => self.touch_own(space, cpu, Access::Write),
            23 => self.be_hunted(space, cpu),
            24..40 => self.touch_own(space, cpu, Access::Read),
            40..46 => self.map_own(space),
            46..48 => self.unmap_own(space),
            48..51 => self.protect_own(space),
            51..54 => self.discard_own(space),
            54..57 => self.remap_own(space),
            57 => self.advise_own(space),
            58 => self.populate_own(space),
            59..61 => self.pin_own(space),
            61 => self.device_writes(),
            // Seldom; of a huge page, if it is one, not as seldom.
            62 if self.dice.once_in(if self.own.is_wide() { 15 } else { 100 }) => self.lose_own(space),
            62 => self.verify_own(Some(cpu)),
            _ if self.dice.once_in(4) => self.fork_own(space, cpu),
            _ => self.map_anywhere(space, cpu),
        }
        self.end_note();
    }

    /// What a page answers to an access.
    fn answer(&self, page: &Page, access: Access) -> Result<u64, FaultError> {
        match page.what {
            What::Nothing => Err(FaultError::Segv(Segv::NotMapped)),
            _ if !page.prot.allows(access) => Err(FaultError::Segv(Segv::Access)),
            What::Anonymous | What::Copied(_) => Ok(page.word),
            What::Still(index) => Ok(self.word_of_still(index)),
            What::Lost(_) => Err(LOST),
        }
    }
    fn word_of_still(&self, index: u64) -> u64 {
        match self.last[Kind::Still as usize][index as usize] {
            0 => 0,
            write => Word::pack(Tag::File, self.me, index, write),
        }
    }

    fn compare(
        &self,
        space: &AddressSpace<H::Platform>,
        at: VirtAddr,
        found: Result<u64, FaultError>,
        expected: Result<u64, FaultError>,
    ) -> bool {
        match (found, expected) {
            (Err(error), _) if is_short(error) => {
                self.tally().short();
                return false;
            }
            // A copy sees that before it sees the rights.
            (Err(LOST), Err(FaultError::Segv(Segv::Access))) if self.is_lost(at) => self.tally().refused(),
            (found, expected) if found == expected => {
                if found.is_err() {
                    self.tally().refused();
                }
            }
            (found, expected) => self.violation(format_args!(
                "at {at}: found {:?}, expected {:?}\n{}",
                found.map(Word::of),
                expected.map(Word::of),
                fmt::from_fn(|f| self.own.index_of(at).map_or(Ok(()), |part| self.tell(space, part, f)))
            )),
        }
        found.is_ok()
    }

    fn is_lost(&self, at: VirtAddr) -> bool {
        let page = self.own.index_of(at).map(|i| self.own.pages[i]);
        page.is_some_and(|page| matches!(page.what, What::Lost(_)))
    }

    fn touch_own(&mut self, space: &H::Space, cpu: &mut H::Cpu, access: Access) {
        let i = self.dice.roll(OWN_PARTS) as usize;
        let at = self.mine(self.own.start(i));
        let expected = self.answer(&self.own.pages[i], access);
        self.note(if access == Access::Write { Op::Store } else { Op::Load }, i..i + 1);
        if access != Access::Write {
            let found = self.load(space, Some(cpu), at);
            self.compare(space, at, found, expected);
            return;
        }
        let word = self.new_word(Tag::Own, i as u64);
        let stored = match expected {
            Ok(old) if self.dice.once_in(8) => self.exchange(space, at, old, word),
            _ => self.store(space, cpu, at, word).map(|()| expected.unwrap_or_default()),
        };
        if self.compare(space, at, stored, expected) {
            self.wrote(i, word);
        } else if expected.is_ok() {
            self.tried(space, i);
        }
    }

    fn exchange(&mut self, space: &H::Space, at: VirtAddr, old: u64, new: u64) -> Result<u64, FaultError> {
        self.begin(Op::Exchange);
        let mut found = Err(old);
        self.patiently(|| match space.compare_exchange_u64(at, old, new) {
            Ok(there) => {
                found = there;
                Ok(())
            }
            Err(why) => Err(pagefirst::space::Stopped { done: 0, why }),
        })?;
        found.or_else(|there| self.violation(format_args!("at {at}: {} was there", Word::of(there))))
    }

    /// A write to the page came to nothing, for want of memory. It may have had a copy, and wanted another: somebody looked at
    /// the first while it waited to be made writable.
    fn tried(&mut self, space: &H::Space, i: usize) {
        let there = space.page_table().translate(&Pin::new(self.p), self.own.start(i));
        let is_copy = there.is_some_and(|there| self.p.meta(there.pfn).flags().contains(FrameFlags::ANON));
        if let What::Still(index) = self.own.pages[i].what
            && is_copy
        {
            self.own.pages[i].word = self.word_of_still(index);
            self.own.pages[i].what = What::Copied(index);
        }
    }

    fn wrote(&mut self, i: usize, word: u64) {
        let page = &mut self.own.pages[i];
        page.word = word;
        if let What::Still(index) = page.what {
            page.what = What::Copied(index);
        }
    }

    fn map_own(&mut self, space: &H::Space) {
        let (range, at, len) = self.range();
        let prot = if self.dice.once_in(4) { Prot::READ } else { RW };
        let still = (!self.own.is_wide() && self.dice.once_in(3))
            .then(|| self.dice.roll(crate::layout::PAGES - range.len() as u64));
        let backing = match still {
            None => Backing::Anonymous,
            Some(first) => Backing::File { file: self.stress.files[Kind::Still as usize].clone(), first },
        };
        self.begin(if still.is_some() { Op::MapPrivate } else { Op::MapAnonymous });
        self.note(self.tally().doing().0, range.clone());
        let populate = self.dice.once_in(6);
        let map = Map { backing, place: Place::Fixed(at), populate, ..Map::anonymous(len, prot) };
        match space.map(map) {
            Ok(mapped) if mapped.range != VirtRange::new(at, VirtAddr(at.0 + len)) => {
                self.violation(format_args!("mapped {:?} and not {len:#x} bytes at {at}", mapped.range))
            }
            Ok(mapped) => {
                let stopped = mapped.unpopulated.and_then(|stopped| {
                    self.expect_stopped(&stopped.why);
                    self.own.index_of(stopped.at)
                });
                self.own.gone(&range);
                for (i, page) in range.clone().enumerate() {
                    let what = still.map_or(What::Anonymous, |first| What::Still(first + i as u64));
                    self.own.pages[page] = Page { what, prot, ..NOTHING };
                }
                if populate {
                    self.populated(range.start..stopped.unwrap_or(range.end));
                    if let Some(i) = stopped {
                        self.tried(space, i);
                    }
                }
                if self.own.is_wide() {
                    self.begin(Op::Huge);
                    space.advise(at, len, Advice::Huge).unwrap_or_else(|error| self.expect_short(error));
                }
            }
            Err(error) => self.expect_short(error),
        }
    }

    /// Populating stops where it would wait, or memory is short.
    fn expect_stopped(&self, why: &Why<'_, H::Platform>) {
        match why {
            Why::Blocked(_) => {}
            Why::Error(error) if is_short(*error) => self.tally().short(),
            why => self.violation(format_args!("populating stopped: {why}")),
        }
    }

    /// These pages were filled as if they had been written to.
    fn populated(&mut self, range: Range<usize>) {
        for i in range {
            let page = self.own.pages[i];
            if let What::Still(index) = page.what
                && page.prot.allows(Access::Write)
            {
                let word = self.word_of_still(index);
                self.own.pages[i] = Page { what: What::Copied(index), word, ..page };
            }
        }
    }

    fn populate_own(&mut self, space: &H::Space) {
        let (range, at, len) = self.range();
        let prot = self.own.pages[range.start].prot;
        let is_other = |page: &Page| matches!(page.what, What::Nothing | What::Lost(_)) || page.prot != prot;
        if self.own.pages[range.clone()].iter().any(is_other) {
            return;
        }
        self.begin(Op::Populate);
        self.note(Op::Populate, range.clone());
        let all = VirtRange::new(at, VirtAddr(at.0 + len));
        let mut start = at;
        let mut kept = None;
        loop {
            let stopped = space.populate(VirtRange::new(start, all.end), prot);
            drop(kept.take());
            match stopped {
                None => return self.populated(range),
                Some(stopped) => {
                    start = stopped.at;
                    match stopped.why {
                        Why::Blocked(ticket) => {
                            self.p.wait(&ticket);
                            kept = Some(ticket);
                        }
                        Why::Error(error) if is_short(error) => {
                            self.tally().short();
                            let Some(done) = self.own.index_of(start) else { return };
                            self.populated(range.start..done);
                            return self.tried(space, done);
                        }
                        why => self.violation(format_args!("at {start}: {why}")),
                    }
                }
            }
        }
    }

    fn unmap_own(&mut self, space: &H::Space) {
        self.begin(Op::Unmap);
        let (range, at, len) = self.range();
        self.note(Op::Unmap, range.clone());
        match space.unmap(at, len) {
            Ok(()) => {
                self.own.gone(&range);
                self.own.each(range, |page| *page = NOTHING);
            }
            Err(error) => self.expect_short(error),
        }
    }

    /// Whether a call on the range did what it should, as far as memory allows.
    fn is_done(&self, range: &Range<usize>, done: Result<(), MapError>) -> bool {
        let mapped = self.own.is_mapped(range.clone());
        match done {
            Ok(()) if mapped => return true,
            Ok(()) => self.violation(format_args!("pages {range:?} have a hole, and nobody minds")),
            Err(MapError::NotMapped(_)) if !mapped => self.tally().refused(),
            Err(error) => self.expect_short(error),
        }
        false
    }

    fn protect_own(&mut self, space: &H::Space) {
        self.begin(Op::Protect);
        let (range, at, len) = self.range();
        self.note(Op::Protect, range.clone());
        let prot = [Prot::empty(), Prot::READ, RW, RW][self.dice.roll(4) as usize];
        if self.is_done(&range, space.protect(at, len, prot)) {
            self.own.each(range, |page| page.prot = prot);
        }
    }

    fn discard_own(&mut self, space: &H::Space) {
        self.begin(Op::Discard);
        let (range, at, len) = self.range();
        self.note(Op::Discard, range.clone());
        if self.is_done(&range, space.discard(at, len)) {
            self.discarded(range);
        }
    }
    fn discarded(&mut self, range: Range<usize>) {
        self.own.gone(&range);
        self.own.each(range, |page| {
            page.word = 0;
            page.what = match page.what {
                What::Copied(index) | What::Lost(Some(index)) => What::Still(index),
                What::Lost(None) => What::Anonymous,
                what => what,
            };
        });
    }

    fn advise_own(&mut self, space: &H::Space) {
        use Advice::*;
        self.begin(Op::Advise);
        let (range, at, len) = self.range();
        let all =
            [Huge, NoHuge, DontFork, DoFork, WipeOnFork, KeepOnFork, Normal, Sequential, Random, WillNeed];
        let advice = all[self.dice.roll(all.len() as u64) as usize];
        self.note(Op::Advise, range.clone());
        self.own.past.advised(advice);
        let of_file =
            |page: &Page| matches!(page.what, What::Still(_) | What::Copied(_) | What::Lost(Some(_)));
        let done = space.advise(at, len, advice);
        if advice == WipeOnFork
            && self.own.is_mapped(range.clone())
            && self.own.pages[range.clone()].iter().any(of_file)
        {
            match done {
                Err(MapError::Invalid(_)) => self.tally().refused(),
                Err(error) => self.expect_short(error),
                Ok(()) => self.violation(format_args!("a file's pages are to be wiped, and nobody minds")),
            }
        } else if self.is_done(&range, done) {
            self.own.each(range, |page| match advice {
                DontFork | DoFork => page.forks.left_out = advice == DontFork,
                WipeOnFork | KeepOnFork => page.forks.wiped = advice == WipeOnFork,
                _ => {}
            });
        }
    }

    fn remap_own(&mut self, space: &H::Space) {
        self.begin(Op::Remap);
        let most = if self.dice.once_in(3) { OWN_PARTS / 2 } else { 3 };
        let n =
            if self.own.is_wide() && self.dice.once_in(2) { OWN_PARTS / 2 } else { 1 + self.dice.roll(most) };
        let from = self.dice.roll(OWN_PARTS - n + 1) as usize;
        let to = self.dice.roll(OWN_PARTS - n + 1) as usize;
        let n = n as usize;
        // The halves of a wide stretch are huge pages.
        let (from, to) = if n as u64 == OWN_PARTS / 2 { [(0, n), (n, 0)][from % 2] } else { (from, to) };
        if from.abs_diff(to) < n {
            return;
        }
        let (old, new, len) = (self.own.start(from), self.own.start(to), self.own.bytes(n));
        let mapped = self.own.is_mapped(from..from + n);
        self.note(Op::Unmap, to..to + n);
        self.note(Op::Remap, from..from + n);
        match space.remap(old, len, len, RemapTo::Fixed(new)) {
            Ok(at) if at != new || !mapped => {
                self.violation(format_args!("{n} pages at {old} (all there: {mapped}) moved to {at}"))
            }
            Ok(_) => {
                self.own.gone(&(to..to + n));
                for i in 0..n {
                    self.own.pages[to + i] = core::mem::replace(&mut self.own.pages[from + i], NOTHING);
                }
                for (i, _) in
                    self.own.pins.iter_mut().flatten().filter(|pin| (from..from + n).contains(&pin.0))
                {
                    *i = *i - from + to;
                }
            }
            // Several mappings are not moved at once; a page is one.
            Err(MapError::NotMapped(_)) if n > 1 || !mapped => self.tally().refused(),
            Err(error) => self.expect_short(error),
        }
    }

    /// Looks at every part of the stretch.
    pub fn verify_own(&mut self, cpu: Option<&mut H::Cpu>) {
        let stress = self.stress;
        let home = stress.spaces[self.home()].try_read().expect("homes stay");
        let Some(space) = &*home else { return };
        // Elsewhere this CPU runs another space.
        let cpu = cpu.filter(|_| self.is_inside && self.at == self.home());
        self.verify_own_in(space, cpu);
    }

    fn verify_own_in(&mut self, space: &AddressSpace<H::Platform>, mut cpu: Option<&mut H::Cpu>) {
        self.begin(Op::Verify);
        self.note(Op::Verify, 0..OWN_PARTS as usize);
        for i in 0..OWN_PARTS as usize {
            let at = self.mine(self.own.start(i));
            let found = self.load(space, cpu.as_deref_mut(), at);
            self.compare(space, at, found, self.answer(&self.own.pages[i], Access::Read));
        }
    }

    /// Maps where the library finds room, writes, moves to where there is more, reads, and unmaps.
    fn map_anywhere(&mut self, space: &H::Space, cpu: &mut H::Cpu) {
        self.begin(Op::MapAnywhere);
        let pages = 3 + self.dice.roll(700);
        let len = pages * PAGE_SIZE;
        let mut at = match space.map(Map::anonymous(len, RW)) {
            Ok(mapped) => mapped.range.start,
            Err(error) => return self.expect_short(error),
        };
        let places = [0, pages / 2, pages - 1].map(|i| i * PAGE_SIZE + place_of(self.me));
        let mut words = [0; 3];
        for (place, there) in places.iter().zip(&mut words) {
            let (at, word) = (VirtAddr(at.0 + place), self.new_word(Tag::Own, 0));
            let stored = self.store(space, cpu, at, word).map(|()| 0);
            if self.compare(space, at, stored, Ok(0)) {
                *there = word;
            }
        }
        self.begin(Op::Remap);
        let mut now = len;
        match space.remap(at, len, 2 * len, RemapTo::Anywhere) {
            Ok(moved) => (at, now) = (moved, 2 * len),
            Err(error) => self.expect_short(error),
        }
        for (place, there) in places.iter().zip(words) {
            let at = VirtAddr(at.0 + place);
            let found = self.load(space, Some(cpu), at);
            self.compare(space, at, found, Ok(there));
        }
        // A mapping that was merged with it may have to be cut.
        self.begin(Op::Unmap);
        if let Err(error) = space.unmap(at, now) {
            self.expect_short(error);
        }
    }
}
