//! A file that is memory itself, mapped shared and private in all spaces, cut and cleaned by all. Its memory stays as it is
//! while it is cut, so of what was written to it nothing is ever lost.

use crate::layout::{Area, place_of};
use crate::tally::Op;
use crate::worker::{Tag, Word, Worker, is_short};
use crate::{FileOf, Host};
use core::sync::atomic::Ordering::Relaxed;
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::file::FileCache;
use pagefirst::frame::Frame;
use pagefirst::platform::Platform;
use pagefirst::space::{Backing, Map, Place, VmaFlags};
use pagefirst::types::{NoMemory, PAGE_SIZE, Pfn, Prot, VirtAddr};

/// log2 of the pages of a block of memory.
const ORDER: u8 = 4;
/// Pages of a block.
pub(crate) const BLOCK: u64 = 1 << ORDER;

/// Memory that is nobody's but the run's, as long as that.
pub(crate) struct Block<P: Platform>(Frame<P>);

impl<P: Platform> Block<P> {
    pub fn new(p: &'static P) -> Result<Self, NoMemory> {
        let block = Frame::block(p, ORDER)?;
        (0..1 << ORDER)
            .for_each(|i| p.cells(block.pfn().add(i)).iter().for_each(|cell| cell.store(0, Relaxed)));
        Ok(Block(block))
    }
    pub fn first(&self) -> Pfn {
        self.0.pfn()
    }
}

/// The file, and where it is.
pub(crate) struct Direct<H: Host> {
    file: FileOf<H>,
    _memory: Block<H::Platform>,
}

impl<H: Host> Direct<H> {
    pub fn new(host: &H) -> Result<Self, NoMemory> {
        let memory = Block::new(host.platform())?;
        let file =
            FileCache::new(host.platform(), host.direct_file(memory.first(), BLOCK), BLOCK * PAGE_SIZE)?;
        Ok(Direct { file, _memory: memory })
    }
}

impl<H: Host> Worker<'_, '_, H> {
    pub fn work_on_direct(&mut self, space: &H::Space, cpu: &mut H::Cpu) {
        let file = &self.stress.direct.file;
        let which = self.dice.roll(3) as usize;
        let area = Area::direct(which);
        match self.dice.roll(16) {
            0..9 => {
                let page = self.dice.roll(BLOCK);
                (0..self.how_often()).for_each(|_| self.touch_direct(space, cpu, which, page));
            }
            9..12 => self.map_direct(space, which),
            12..14 => {
                let other = (which != Area::PRIVATE).then(|| Area::direct(1 - which));
                self.change(space, area, other);
            }
            14 => {
                self.begin(Op::CutDirect);
                if self.dice.once_in(2) {
                    let start = self.dice.roll(BLOCK) * PAGE_SIZE;
                    file.punch(self.p, start..start + PAGE_SIZE);
                } else {
                    file.set_size(self.p, self.dice.roll(BLOCK * PAGE_SIZE));
                    file.set_size(self.p, BLOCK * PAGE_SIZE);
                }
            }
            _ => {
                self.begin(Op::Clean);
                let (first, n) = self.dice.pages(BLOCK);
                file.clean(first..first + n);
            }
        }
    }

    fn touch_direct(&mut self, space: &H::Space, cpu: &mut H::Cpu, which: usize, page: u64) {
        let stores = self.dice.once_in(2);
        let writer = if stores { self.me } else { self.somebody() };
        let at = VirtAddr(Area::direct(which).page(page).0 + place_of(writer));
        self.aim_at(at);
        let done = if stores {
            let tag = if which == Area::PRIVATE { Tag::Private } else { Tag::Direct };
            let word = self.new_word(tag, page);
            self.store(space, cpu, at, word).map(|()| word)
        } else {
            self.load(space, Some(cpu), at)
        };
        match done {
            Ok(found) => self.check_direct(which, page, writer, stores, found),
            Err(error) if is_short(error) => self.tally().short(),
            Err(FaultError::Segv(Segv::NotMapped | Segv::Access) | FaultError::Bus(Bus::BeyondEnd)) => {
                self.tally().refused();
            }
            Err(error) => self.violation(format_args!("at {at}: {error}")),
        }
    }

    /// A word that was stored or found. In a shared mapping this worker's is its last.
    fn check_direct(&mut self, which: usize, page: u64, writer: usize, stored: bool, found: u64) {
        let (word, last) = (Word::of(found), &mut self.last_direct[page as usize]);
        let is_private = which == Area::PRIVATE;
        if stored && !is_private {
            *last = found;
            return;
        }
        let belongs = word.is(Tag::Direct, writer, page) || is_private && word.is(Tag::Private, writer, page);
        let is_wrong = match writer == self.me && !is_private {
            true => found != *last,
            false => found != 0 && !(belongs && word.write <= self.stress.board.begun(writer)),
        };
        if is_wrong {
            let last = Word::of(*last);
            self.violation(format_args!(
                "page {page} of the file that is memory ({which}), the word of worker {writer}: {word}; own last: {last}"
            ));
        }
    }

    fn map_direct(&mut self, space: &H::Space, which: usize) {
        self.begin(Op::MapDirect);
        let area = Area::direct(which);
        let (first, n) = if self.dice.once_in(3) { (0, area.pages) } else { self.dice.pages(area.pages) };
        let map = Map {
            backing: Backing::File { file: self.stress.direct.file.clone(), first },
            flags: if which == Area::PRIVATE { VmaFlags::empty() } else { VmaFlags::SHARED },
            place: Place::Fixed(area.page(first)),
            ..Map::anonymous(n * PAGE_SIZE, Prot::READ | Prot::WRITE)
        };
        if let Err(error) = space.map(map) {
            self.expect_short(error);
        }
    }
}
