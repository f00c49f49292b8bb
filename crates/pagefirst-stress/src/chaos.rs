//! Private memory, huge pages and physical memory that all workers map, change and touch.

use crate::Host;
use crate::layout::{Area, place_of};
use crate::tally::Op;
use crate::worker::{Tag, Word, Worker, is_short};
use core::sync::atomic::Ordering::Relaxed;
use pagefirst::fault::{FaultError, Segv};
use pagefirst::frame::Frame;
use pagefirst::platform::Platform;
use pagefirst::space::{self, Advice, Backing, Map, MemoryType, Place, VmaFlags};
use pagefirst::types::{NoMemory, PAGE_SIZE, Prot, VirtAddr};

const RW: Prot = Prot::READ.union(Prot::WRITE);
/// log2 of the pages of physical memory.
const ORDER: u8 = 4;

/// Physical memory to map: as long as the run, nobody's but the run's.
pub(crate) struct Physical<P: Platform>(Frame<P>);

impl<P: Platform> Physical<P> {
    pub fn new(p: &'static P) -> Result<Self, NoMemory> {
        let block = Frame::block(p, ORDER)?;
        (0..1 << ORDER)
            .for_each(|i| p.cells(block.pfn().add(i)).iter().for_each(|cell| cell.store(0, Relaxed)));
        Ok(Physical(block))
    }
}

/// An area, what is in it, and where else its pages may be.
struct Scene {
    tag: Tag,
    area: Area,
    other: Option<Area>,
}

impl<H: Host> Worker<'_, '_, H> {
    fn scene(&mut self) -> Scene {
        match self.dice.roll(8) {
            0..3 => Scene { tag: Tag::Huge, area: Area::huge(), other: None },
            3 => Scene { tag: Tag::Physical, area: Area::physical(1 << ORDER), other: None },
            which => {
                let which = which as usize;
                Scene { tag: Tag::Chaos, area: Area::chaos(which), other: Some(Area::chaos(which + 1)) }
            }
        }
    }

    pub fn work_on_chaos(&mut self, space: &H::Space, cpu: &mut H::Cpu) {
        let scene = self.scene();
        match self.dice.roll(32) {
            0..21 => {
                let page = self.dice.roll(scene.area.pages);
                (0..self.how_often()).for_each(|_| self.touch_scene(space, cpu, &scene, page));
            }
            21 => self.hunt(space),
            22..26 => self.map_scene(space, &scene),
            26..31 => self.change(space, scene.area, scene.other),
            _ => self.limit(),
        }
    }

    fn touch_scene(&mut self, space: &H::Space, cpu: &mut H::Cpu, scene: &Scene, page: u64) {
        let stores = self.dice.once_in(2);
        let writer = if stores { self.me } else { self.somebody() };
        let at = VirtAddr(scene.area.page(page).0 + place_of(writer));
        self.aim_at(at);
        let done = if stores {
            let word = self.new_word(scene.tag, page);
            self.store(space, cpu, at, word).map(|()| word)
        } else {
            self.load(space, Some(cpu), at)
        };
        match done {
            Ok(found) => {
                let word = Word::of(found);
                let valid = word.is(scene.tag, writer, page) && word.write <= self.stress.board.begun(writer);
                if found != 0 && !valid {
                    self.violation(format_args!("page {page} at {at}, the word of worker {writer}: {word}"));
                }
            }
            Err(error) if is_short(error) => self.tally().short(),
            Err(FaultError::Segv(Segv::NotMapped | Segv::Access)) => self.tally().refused(),
            Err(error) => self.violation(format_args!("at {at}: {error}")),
        }
    }

    fn map_scene(&mut self, space: &H::Space, scene: &Scene) {
        let area = scene.area;
        let whole = scene.tag == Tag::Huge && !self.dice.once_in(3);
        let (first, n) = if whole { (0, area.pages) } else { self.dice.pages(area.pages) };
        let (at, len) = (area.page(first), n * PAGE_SIZE);
        let place = Place::Fixed(at);
        let map = match scene.tag {
            Tag::Physical => {
                let first = self.stress.physical.0.pfn().add(first as u32);
                let backing = Backing::Physical(space::Physical { first, memory: MemoryType::Normal });
                Map { backing, place, flags: VmaFlags::SHARED, ..Map::anonymous(len, RW) }
            }
            _ => Map { place, ..Map::anonymous(len, RW) },
        };
        self.begin(if scene.tag == Tag::Physical { Op::MapPhysical } else { Op::MapAnonymous });
        if let Err(error) = space.map(map) {
            return self.expect_short(error);
        }
        if whole {
            self.begin(Op::Huge);
            match space.advise(at, len, Advice::Huge) {
                Ok(()) => {}
                Err(space::MapError::NotMapped(_)) => self.tally().refused(),
                Err(error) => self.expect_short(error),
            }
        }
    }

    /// Makes memory short for the homes or the guests, or no more.
    fn limit(&mut self) {
        self.begin(Op::Limit);
        let limit = &self.stress.limits[self.dice.roll(2) as usize];
        let max = if self.dice.once_in(3) { limit.charged() / 2 } else { self.stress.root.max() };
        limit.set_max(max);
    }
}
