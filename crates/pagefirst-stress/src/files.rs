//! Files that all spaces share: mapped, read, written, cut, stored, and dropped from memory.

use crate::board::Seen;
use crate::layout::{Area, PAGES, place_of};
use crate::tally::Op;
use crate::worker::{Tag, Word, Worker, is_short};
use crate::{FileOf, Host};
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::file::{ReadError, SyncError, Syncing, WriteBackError, WriteError};
use pagefirst::platform::Platform;
use pagefirst::space::{Advice, Backing, Map, MapError, Place, RemapTo, VmaFlags};
use pagefirst::types::{PAGE_SIZE, Prot, VirtAddr};

/// A file of the run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Stored, and never cut: nothing that was written to it is ever lost.
    Still,
    /// Stored, cut.
    Moving,
    /// Memory, in folios of several pages, cut.
    Memory,
    /// Memory, in huge pages, cut.
    Huge,
}

impl Kind {
    /// How many there are.
    pub const COUNT: usize = 4;
    /// All of them.
    pub const ALL: [Kind; Kind::COUNT] = [Kind::Still, Kind::Moving, Kind::Memory, Kind::Huge];
    /// Its size when the run starts, in bytes.
    pub fn size(self) -> u64 {
        PAGES * self.stride() * PAGE_SIZE
    }
    /// Of so many pages one is looked at.
    fn stride(self) -> u64 {
        if self == Kind::Huge { 16 } else { 1 }
    }
    pub(crate) fn is_cut(self) -> bool {
        self != Kind::Still
    }
    fn key(self, page: u64) -> u64 {
        (self as u64) << 8 | page
    }
    pub(crate) fn area(self, which: usize) -> Area {
        Area::file(self as usize, which, PAGES * self.stride())
    }
    /// Where in the file this worker's word of a page is.
    pub(crate) fn offset(self, page: u64, worker: usize) -> u64 {
        page * self.stride() * PAGE_SIZE + place_of(worker)
    }
    /// The page, of those that are looked at, at an offset or before it.
    pub(crate) fn index_of(self, offset: u64) -> u64 {
        offset / (self.stride() * PAGE_SIZE)
    }
}

/// A page of a file, by the mappings of one of its areas.
#[derive(Clone, Copy)]
struct Spot {
    kind: Kind,
    page: u64,
    which: usize,
}

/// What was known before something was looked at.
#[derive(Clone, Copy)]
struct Before {
    /// The newest write to the word that was seen.
    newest: Seen,
    cuts: u32,
}

impl<H: Host> Worker<'_, '_, H> {
    pub fn file(&self, kind: Kind) -> &FileOf<H> {
        &self.stress.files[kind as usize]
    }

    pub fn work_on_file(&mut self, space: &H::Space, cpu: &mut H::Cpu) {
        let kind = Kind::ALL[self.dice.roll(Kind::COUNT as u64) as usize];
        match self.dice.roll(64) {
            0..38 => self.touch_file(space, cpu, kind),
            38..42 => {
                let (page, writer) = (self.dice.roll(PAGES), self.somebody());
                self.read_file(kind, page, writer);
            }
            42..46 => {
                let page = self.dice.roll(PAGES);
                self.write_file(kind, page);
            }
            46..50 => {
                let which = self.dice.roll(3) as usize;
                self.map_file(space, kind, which);
            }
            50..57 => self.change_mapping(space, kind),
            57 => self.resize(kind),
            58 => self.punch(kind),
            59 => self.store_file(kind),
            60 => self.sync_file(kind),
            61 => self.evict(kind),
            62 if kind == Kind::Moving && self.dice.once_in(50) => self.lose_page(space),
            _ => {
                self.begin(Op::Ahead);
                let (first, n) = self.dice.pages(PAGES * kind.stride());
                self.file(kind).will_need(self.p, first, n);
            }
        }
    }

    /// Whether it was done; what did not allow it may be so.
    fn allows<T>(
        &self,
        kind: Kind,
        page: u64,
        at: VirtAddr,
        before: Before,
        done: Result<T, FaultError>,
    ) -> Option<T> {
        match done {
            Ok(done) => return Some(done),
            Err(error) if is_short(error) => self.tally().short(),
            Err(FaultError::Segv(Segv::NotMapped | Segv::Access)) => self.tally().refused(),
            Err(FaultError::Bus(Bus::BeyondEnd)) if !self.is_whole_since(kind, before.cuts) => {
                self.tally().refused();
            }
            Err(FaultError::Bus(Bus::Poison)) if self.may_be_lost(kind, page) => {
                self.tally().refused();
            }
            Err(error) => self.violation(format_args!("{kind:?} at {at}: {error}")),
        }
        None
    }

    fn touch_file(&mut self, space: &H::Space, cpu: &mut H::Cpu, kind: Kind) {
        let spot = Spot { kind, page: self.dice.roll(PAGES), which: self.dice.roll(3) as usize };
        for _ in 0..self.how_often() {
            let done = match self.dice.once_in(2) {
                true => self.store_to_file(space, cpu, spot),
                false => self.load_of_file(space, cpu, spot),
            };
            if done.is_none() && self.dice.once_in(3) {
                self.map_file(space, kind, spot.which);
            }
        }
    }

    /// Once, or now and then many times at one place, for others to notice.
    pub fn how_often(&mut self) -> u64 {
        if self.dice.once_in(12) { 30 } else { 1 }
    }

    fn load_of_file(&mut self, space: &H::Space, cpu: &mut H::Cpu, spot: Spot) -> Option<()> {
        let Spot { kind, page, which } = spot;
        let writer = self.somebody();
        let (at, before) = self.aim_at_spot(spot, writer);
        let found = self.load(space, Some(cpu), at);
        let found = self.allows(kind, page, at, before, found)?;
        match which {
            Area::PRIVATE => self.check_private(kind, page, writer, found),
            _ => self.check(kind, page, writer, found, before),
        }
        Some(())
    }

    /// This worker half of the time, or any.
    pub fn somebody(&mut self) -> usize {
        if self.dice.once_in(2) {
            self.me
        } else {
            self.dice.roll(self.stress.config.workers as u64) as usize
        }
    }

    fn is_whole_since(&self, kind: Kind, cuts: u32) -> bool {
        self.stress.board.cuts[kind as usize].is_whole_since(cuts)
    }
    fn look_before(&self, kind: Kind, page: u64, writer: usize) -> Before {
        let board = self.stress.board;
        Before { newest: board.newest(kind, page, writer), cuts: board.cuts[kind as usize].count() }
    }

    /// Where a worker's word of a spot is, which somebody is about to touch, and what is known of it.
    fn aim_at_spot(&self, Spot { kind, page, which }: Spot, writer: usize) -> (VirtAddr, Before) {
        let at = VirtAddr(kind.area(which).start.0 + kind.offset(page, writer));
        let before = self.look_before(kind, page, writer);
        self.aim_at(at);
        (at, before)
    }

    /// A word of a file, and what was known before it was read.
    fn check(&mut self, kind: Kind, page: u64, writer: usize, found: u64, before: Before) {
        let board = self.stress.board;
        let word = Word::of(found);
        let Before { newest, cuts } = before;
        let last = &mut self.last[kind as usize][page as usize];
        let own_last = *last;
        let wrong = if found == 0 {
            *last = if writer == self.me { 0 } else { *last };
            let lost = newest.write > 0 && self.is_whole_since(kind, newest.cuts);
            lost.then_some("what was written is lost")
        } else if !word.is(Tag::File, writer, kind.key(page)) {
            Some("it does not belong there")
        } else if word.write > board.begun(writer) {
            Some("nobody wrote it")
        } else if word.write < newest.write {
            Some("a newer one was seen before")
        } else if writer == self.me && word.write != own_last {
            Some("it is not the last")
        } else {
            board.seen(kind, page, writer, Seen { write: word.write, cuts });
            None
        };
        if let Some(wrong) = wrong {
            self.violation(format_args!(
                "page {page} of {kind:?}, the word of worker {writer}: {word}: {wrong} ({newest:?}, own last {own_last}, cuts {cuts})"
            ));
        }
    }

    /// A word of a private mapping of a file.
    fn check_private(&self, kind: Kind, page: u64, writer: usize, found: u64) {
        let word = Word::of(found);
        let key = kind.key(page);
        let belongs = word.is(Tag::File, writer, key) || word.is(Tag::Private, writer, key);
        if found != 0 && !(belongs && word.write <= self.stress.board.begun(writer)) {
            self.violation(format_args!(
                "page {page} of {kind:?}, private, the word of worker {writer}: {word}"
            ));
        }
    }

    fn store_to_file(&mut self, space: &H::Space, cpu: &mut H::Cpu, spot: Spot) -> Option<()> {
        let Spot { kind, page, which } = spot;
        let tag = if which == Area::PRIVATE { Tag::Private } else { Tag::File };
        let word = self.new_word(tag, kind.key(page));
        let (at, before) = self.aim_at_spot(spot, self.me);
        let stored = self.store(space, cpu, at, word);
        self.allows(kind, page, at, before, stored)?;
        if which != Area::PRIVATE {
            self.wrote_to_file(kind, page, word, before.cuts);
        }
        Some(())
    }

    /// So many cuts had been before.
    fn wrote_to_file(&mut self, kind: Kind, page: u64, word: u64, cuts: u32) {
        let write = Word::of(word).write;
        self.last[kind as usize][page as usize] = write;
        self.stress.board.seen(kind, page, self.me, Seen { write, cuts });
    }

    /// Waits if that is what it takes; whether to try again.
    pub fn again(&self, kind: Kind, page: u64, error: ReadError<H::Platform>) -> bool {
        match error {
            ReadError::Blocked(ticket) => {
                self.p.wait(&ticket);
                return true;
            }
            ReadError::NoMemory | ReadError::OverLimit(_) => self.tally().short(),
            ReadError::Poisoned if self.may_be_lost(kind, page) => self.tally().refused(),
            error => self.violation(format_args!("{error:?}")),
        }
        false
    }

    fn read_file(&mut self, kind: Kind, page: u64, writer: usize) {
        self.begin(Op::Read);
        let before = self.look_before(kind, page, writer);
        let mut bytes = [0; 8];
        let n = loop {
            match self.file(kind).read_at(self.p, kind.offset(page, writer), &mut bytes) {
                Ok(n) => break n,
                Err(error) => {
                    if !self.again(kind, page, error) {
                        return;
                    }
                }
            }
        };
        match n {
            8 => self.check(kind, page, writer, u64::from_ne_bytes(bytes), before),
            0 if !self.is_whole_since(kind, before.cuts) => self.tally().refused(),
            n => self.violation(format_args!("{n} bytes read of page {page} of {kind:?}")),
        }
    }

    fn write_file(&mut self, kind: Kind, page: u64) {
        self.begin(Op::Write);
        let word = self.new_word(Tag::File, kind.key(page));
        let before = self.look_before(kind, page, self.me);
        loop {
            match self.file(kind).write_at(self.p, kind.offset(page, self.me), &word.to_ne_bytes()) {
                Ok(8) => return self.wrote_to_file(kind, page, word, before.cuts),
                Ok(n) => self.violation(format_args!("{n} bytes written to page {page} of {kind:?}")),
                Err(WriteError::Page(error)) => {
                    if !self.again(kind, page, error) {
                        return;
                    }
                }
                Err(WriteError::Size(error)) => self.violation(format_args!("{error}")),
            }
        }
    }

    /// Drops what need not be stored, and sees that a page just written, mapped nowhere perhaps, is none of that.
    fn evict(&mut self, kind: Kind) {
        let page = self.dice.roll(PAGES);
        self.write_file(kind, page);
        self.begin(Op::Evict);
        self.file(kind).evict(self.p);
        self.read_file(kind, page, self.me);
    }

    fn map_file(&mut self, space: &H::Space, kind: Kind, which: usize) {
        let private = which == Area::PRIVATE;
        self.begin(if private { Op::MapPrivate } else { Op::MapShared });
        let area = kind.area(which);
        let (first, n) = if self.dice.once_in(3) { (0, area.pages) } else { self.dice.pages(area.pages) };
        let map = Map {
            backing: Backing::File { file: self.file(kind).clone(), first },
            flags: if private { VmaFlags::empty() } else { VmaFlags::SHARED },
            place: Place::Fixed(area.page(first)),
            ..Map::anonymous(n * PAGE_SIZE, Prot::READ | Prot::WRITE)
        };
        if let Err(error) = space.map(map) {
            self.expect_short(error);
        }
    }

    fn change_mapping(&mut self, space: &H::Space, kind: Kind) {
        let which = self.dice.roll(3) as usize;
        let area = kind.area(which);
        let other = (which != Area::PRIVATE).then(|| kind.area(1 - which));
        self.change(space, area, other);
    }

    /// Does something to the mappings of a part of an area, on which others work as well.
    pub fn change(&mut self, space: &H::Space, area: Area, other: Option<Area>) {
        let (first, n) = self.dice.pages(area.pages);
        let (at, len) = (area.page(first), n * PAGE_SIZE);
        let rights = [Prot::empty(), Prot::READ, Prot::READ | Prot::WRITE, Prot::READ | Prot::WRITE];
        let advice = [Advice::Huge, Advice::NoHuge, Advice::Sequential, Advice::Random, Advice::WillNeed];
        let (op, done) = match self.dice.roll(12) {
            0..2 => (Op::Unmap, space.unmap(at, len)),
            2..6 => (Op::Protect, space.protect(at, len, rights[self.dice.roll(4) as usize])),
            6..9 => (Op::Discard, space.discard(at, len)),
            9..11 => {
                let Some(other) = other else { return };
                let to = RemapTo::Fixed(other.page(first));
                (Op::Remap, space.remap(at, len, len, to).map(drop))
            }
            _ => (Op::Advise, space.advise(at, len, advice[self.dice.roll(5) as usize])),
        };
        self.begin(op);
        match done {
            Ok(()) => {}
            Err(MapError::NotMapped(_)) => self.tally().refused(),
            Err(error) => self.expect_short(error),
        }
    }

    fn store_file(&mut self, kind: Kind) {
        self.begin(Op::WriteBack);
        match self.file(kind).write_back(self.p) {
            Ok(_) => {}
            Err(WriteBackError::NoMemory(_)) => self.tally().short(),
            Err(WriteBackError::Io(_)) if self.has_lost(kind) => self.tally().refused(),
            Err(error) => self.violation(format_args!("{kind:?}: {error}")),
        }
    }

    fn sync_file(&mut self, kind: Kind) {
        self.begin(Op::Sync);
        let file = self.file(kind);
        let (mut work, mut seen) = (Syncing::all(), file.store_errors());
        loop {
            match file.sync(&mut work, &mut seen) {
                Ok(()) => return,
                Err(SyncError::Blocked(ticket)) => self.p.wait(&ticket),
                Err(SyncError::NoMemory(_)) => return self.tally().short(),
                // What was cut while it was being stored was given up.
                Err(SyncError::Io(_)) if kind.is_cut() => return self.tally().refused(),
                Err(error) => self.violation(format_args!("{kind:?}: {error}")),
            }
        }
    }
}
