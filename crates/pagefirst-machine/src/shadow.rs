//! What the machine knows of every frame, beside the library: its state, and how many translations lead to it.
//!
//! | state | entered by | the frame holds |
//! |---|---|---|
//! | `FRESH` | boot | zeros |
//! | `OWNED` | `FrameAllocated` | whatever its owner puts there; poison until then |
//! | `TABLE` | `TableAllocated`, from `OWNED` or `CACHED` | entries |
//! | `CACHED` | `TableFreed`, from `TABLE` | zeros: a zeroed table that waits for reuse |
//! | `FREE` | `FrameFreed`, from `OWNED` or `CACHED` | poison, until it is allocated again |
//! | `DEVICE` | boot | what was stored there: no memory of the library's |
//!
//! Any other step is a mistake of the library, and so are a translation to a frame that is freed, poison that has
//! changed, and a table that is not zero when it waits or is taken.

use crate::arena::Arena;
use pagefirst::fault::MOST_LOOKS;
use pagefirst::platform::Note;
use pagefirst::types::Pfn;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32};

/// What frames that are handed out hold, and freed ones. No byte repeated gives it.
pub const POISON: u64 = 0xf4ee_0bad_f4ee_0bad;

const FRESH: u8 = 0;
const OWNED: u8 = 1;
const TABLE: u8 = 2;
const CACHED: u8 = 3;
const FREE: u8 = 4;
const DEVICE: u8 = 5;

fn name(state: u8) -> &'static str {
    ["never allocated", "owned", "a page table", "a cached table", "free", "a device's"]
        .get(state as usize)
        .unwrap_or(&"?")
}

pub(crate) struct Shadow {
    state: Box<[AtomicU8]>,
    /// Frames whose contents were looked at since they were handed out, and found to be their owner's.
    filled: Box<[AtomicBool]>,
    /// Frames that were synchronised for execution since they were handed out.
    synced: Box<[AtomicBool]>,
    /// For each frame, the number of translations to it in all TLBs.
    pub mapped: &'static [AtomicU32],
}

impl Shadow {
    pub fn new(arena: &Arena) -> Self {
        let n = arena.frames() as usize;
        // SAFETY: zeroed memory is a valid atomic integer, and a valid atomic bool.
        let (state, filled, synced, mapped): (Box<[AtomicU8]>, _, _, _) = unsafe {
            (
                Box::new_zeroed_slice(n).assume_init(),
                Box::new_zeroed_slice(n).assume_init(),
                Box::new_zeroed_slice(n).assume_init(),
                Box::<[AtomicU32]>::new_zeroed_slice(n).assume_init(),
            )
        };
        state[arena.region().frames as usize..].iter().for_each(|state| state.store(DEVICE, Relaxed));
        Shadow { state, filled, synced, mapped: Box::leak(mapped) }
    }

    fn state(&self, pfn: Pfn) -> u8 {
        self.state[pfn.0 as usize].load(Acquire)
    }

    /// Takes a note of the library.
    pub fn note(&self, arena: &Arena, note: Note) -> Result<(), String> {
        match note {
            Note::FrameAllocated(first, order) => block(first, order).try_for_each(|pfn| {
                self.filled[pfn.0 as usize].store(false, Relaxed);
                self.synced[pfn.0 as usize].store(false, Relaxed);
                match self.go(pfn, &[FRESH, FREE], OWNED, "allocated")? {
                    FREE => is_poisoned(arena, pfn)?,
                    _ => arena.fill(pfn, POISON),
                }
                self.no_translation(pfn, "allocated")
            }),
            Note::FrameFreed(first, order) => block(first, order).try_for_each(|pfn| {
                self.no_translation(pfn, "freed")?;
                self.go(pfn, &[OWNED, CACHED], FREE, "freed")?;
                arena.fill(pfn, POISON);
                Ok(())
            }),
            Note::TableAllocated(pfn) => {
                is_zero(arena, pfn, "taken")?;
                self.go(pfn, &[OWNED, CACHED], TABLE, "taken as a table").map(drop)
            }
            Note::TableFreed(pfn) => {
                is_zero(arena, pfn, "given back")?;
                self.no_translation(pfn, "given back as a table")?;
                self.go(pfn, &[TABLE], CACHED, "given back as a table").map(drop)
            }
            Note::TableLocked(pfn, _) => self.is_table(pfn, "locked"),
            Note::TableScanned(pfn, _) => self.is_table(pfn, "scanned"),
            Note::FaultLooked(looks) if looks > MOST_LOOKS => Err(format!("a fault looked {looks} times")),
            Note::FaultLooked(_) => Ok(()),
        }
    }

    fn go(&self, pfn: Pfn, from: &[u8], to: u8, what: &str) -> Result<u8, String> {
        let before = self.state[pfn.0 as usize].swap(to, AcqRel);
        if from.contains(&before) {
            return Ok(before);
        }
        Err(format!("{pfn:?} is {what} while it is {}", name(before)))
    }

    fn no_translation(&self, pfn: Pfn, what: &str) -> Result<(), String> {
        match self.mapped[pfn.0 as usize].load(Relaxed) {
            0 => Ok(()),
            n => Err(format!("{pfn:?} is {what} while {n} translations lead to it")),
        }
    }

    /// The frame is a table now.
    pub fn is_table(&self, pfn: Pfn, what: &str) -> Result<(), String> {
        match self.state(pfn) {
            TABLE => Ok(()),
            other => Err(format!("{pfn:?} is {what} as a page table while it is {}", name(other))),
        }
    }

    /// The frame is owned, and no table, or a device's: it may be a page.
    #[inline]
    pub fn is_page(&self, pfn: Pfn, what: &str) -> Result<(), String> {
        match self.state(pfn) {
            OWNED | DEVICE => Ok(()),
            other => Err(format!("{pfn:?} is {what} as a page while it is {}", name(other))),
        }
    }

    /// Looks at a frame's contents, once for each owner.
    #[inline]
    pub fn once_filled(&self, pfn: Pfn, look: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        let filled = &self.filled[pfn.0 as usize];
        if !filled.load(Relaxed) {
            look()?;
            filled.store(true, Relaxed);
        }
        Ok(())
    }

    /// The frame was synchronised for execution.
    pub fn sync(&self, pfn: Pfn) {
        self.synced[pfn.0 as usize].store(true, Release);
    }

    /// The frame can be executed: whatever was stored to it, a fetch sees.
    pub fn is_synced(&self, pfn: Pfn) -> Result<(), String> {
        let synced = self.synced[pfn.0 as usize].load(Acquire);
        if synced || self.state(pfn) == DEVICE {
            Ok(())
        } else {
            Err(format!("{pfn:?} is executed and was not synchronised for it"))
        }
    }

    /// Frames owned and frames that are tables.
    pub fn in_use(&self) -> (u64, u64) {
        self.state.iter().fold((0, 0), |(owned, tables), s| match s.load(Relaxed) {
            OWNED => (owned + 1, tables),
            TABLE => (owned, tables + 1),
            _ => (owned, tables),
        })
    }
}

fn block(first: Pfn, order: u8) -> impl Iterator<Item = Pfn> {
    (0..1 << order).map(move |i| first.add(i))
}

fn is_poisoned(arena: &Arena, pfn: Pfn) -> Result<(), String> {
    arena.differs(pfn, POISON).map_or(Ok(()), |(i, word)| {
        Err(format!("{pfn:?} was written to while it was free: {word:#x} at offset {:#x}", i * 8))
    })
}

fn is_zero(arena: &Arena, pfn: Pfn, what: &str) -> Result<(), String> {
    arena
        .differs(pfn, 0)
        .map_or(Ok(()), |(i, word)| Err(format!("table {pfn:?} is {what} with entry {i} in it: {word:#x}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use Note::*;

    fn machine() -> (Arena, Shadow) {
        let arena = Arena::new(1 << 20, 0);
        let shadow = Shadow::new(&arena);
        (arena, shadow)
    }
    fn zero(arena: &Arena, pfn: Pfn) {
        arena.fill(pfn, 0);
    }

    #[test]
    fn machine_the_life_of_a_table_frame() -> Result<(), String> {
        let (arena, shadow) = machine();
        let f = Pfn(9);
        shadow.note(&arena, FrameAllocated(f, 0))?;
        assert!(shadow.note(&arena, TableAllocated(f)).is_err(), "not cleared");
        zero(&arena, f);
        shadow.note(&arena, TableAllocated(f))?;
        assert_eq!(shadow.in_use(), (0, 1));
        shadow.note(&arena, TableLocked(f, 0))?;
        assert!(shadow.is_page(f, "read").is_err());
        shadow.note(&arena, TableFreed(f))?;
        assert!(shadow.note(&arena, TableLocked(f, 0)).is_err(), "given back");
        shadow.note(&arena, TableAllocated(f))?;
        shadow.note(&arena, TableFreed(f))?;
        shadow.note(&arena, FrameFreed(f, 0))?;
        shadow.note(&arena, FrameAllocated(f, 0))?;
        assert_eq!(shadow.in_use(), (1, 0));
        Ok(())
    }

    #[test]
    fn machine_wrong_steps_are_told() -> Result<(), String> {
        let (arena, shadow) = machine();
        let f = Pfn(9);
        let told = |note, what: &str| {
            let told = shadow.note(&arena, note).expect_err(what);
            assert!(told.contains(what), "{told}");
        };
        told(FrameFreed(Pfn(8), 0), "freed while it is never allocated");
        shadow.note(&arena, FrameAllocated(f, 0))?;
        told(FrameAllocated(f, 0), "allocated while it is owned");
        shadow.note(&arena, FrameFreed(f, 0))?;
        told(FrameFreed(f, 0), "freed while it is free");
        arena.words(f)[3].store(1, Relaxed);
        told(FrameAllocated(f, 0), "written to while it was free: 0x1 at offset 0x18");
        zero(&arena, f);
        shadow.note(&arena, TableAllocated(f))?;
        arena.words(f)[7].store(5, Relaxed);
        told(TableFreed(f), "given back with entry 7 in it");
        told(FrameFreed(f, 0), "freed while it is a page table");
        shadow.note(&arena, FrameAllocated(Pfn(10), 0))?;
        shadow.mapped[10].store(2, Relaxed);
        told(FrameFreed(Pfn(10), 0), "freed while 2 translations lead to it");
        Ok(())
    }
}
