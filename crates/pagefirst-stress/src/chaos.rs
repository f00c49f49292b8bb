//! Private memory, huge pages, heaps, stacks and physical memory that all workers map, change and touch.

use crate::Host;
use crate::layout::{Area, place_of};
use crate::tally::Op;
use crate::worker::{Tag, Word, Worker, is_short};
use pagefirst::fault::{FaultError, Segv};
use pagefirst::space::{self, Advice, Backing, Map, MemoryType, Place, VmaFlags};
use pagefirst::types::{PAGE_SIZE, Prot, VirtAddr};

const RW: Prot = Prot::READ.union(Prot::WRITE);

/// An area, what is in it, and where else its pages may be.
struct Scene {
    tag: Tag,
    area: Area,
    other: Option<Area>,
}

impl<H: Host> Worker<'_, '_, H> {
    fn scene(&mut self) -> Scene {
        match self.dice.roll(10) {
            0..3 => Scene { tag: Tag::Huge, area: Area::huge(), other: None },
            3 => Scene { tag: Tag::Physical, area: Area::physical(), other: None },
            4 => Scene { tag: Tag::Heap, area: Area::heap(), other: None },
            5 => Scene { tag: Tag::Stack, area: Area::stack(), other: None },
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
        if scene.tag == Tag::Heap {
            return self.move_break(space, area);
        }
        let whole = scene.tag == Tag::Huge && !self.dice.once_in(3);
        let (first, n) = if whole { (0, area.pages) } else { self.dice.pages(area.pages) };
        let (at, len) = (area.page(first), n * PAGE_SIZE);
        let place = Place::Fixed(at);
        let map = match scene.tag {
            Tag::Physical => {
                let first = self.stress.physical.first().add(first as u32);
                let backing = Backing::Physical(space::Physical { first, memory: MemoryType::Normal });
                Map { backing, place, flags: VmaFlags::SHARED, ..Map::anonymous(len, RW) }
            }
            // Its top, from where it grows.
            Tag::Stack => {
                let place = Place::Fixed(area.page(area.pages - 1));
                Map { place, flags: VmaFlags::GROWS_DOWN, ..Map::anonymous(PAGE_SIZE, RW) }
            }
            _ => Map { place, ..Map::anonymous(len, RW) },
        };
        self.begin(match scene.tag {
            Tag::Physical => Op::MapPhysical,
            Tag::Stack => Op::MapStack,
            _ => Op::MapAnonymous,
        });
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

    fn move_break(&mut self, space: &H::Space, heap: Area) {
        self.begin(Op::Brk);
        let end = VirtAddr(heap.start.0 + self.dice.roll(heap.pages * PAGE_SIZE + 1));
        match space.brk(end) {
            Ok(there) if there == end => {}
            Ok(there) => self.violation(format_args!("the break is at {there}, not at {end}")),
            Err(error) => self.expect_short(error),
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
