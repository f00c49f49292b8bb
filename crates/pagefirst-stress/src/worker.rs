//! A worker: which operation comes next, and what all operations use.

use crate::dice::Dice;
use crate::direct::BLOCK;
use crate::files::Kind;
use crate::layout::{Area, PAGES, place_of};
use crate::own::Stretch;
use crate::tally::{Op, Tally};
use crate::{Cpu, HOMES, Host, SPACES, Stress};
use core::fmt;
use core::sync::atomic::Ordering::Relaxed;
use pagefirst::fault::FaultError;
use pagefirst::platform::Platform;
use pagefirst::space::{AddressSpace, MapError, Stopped, Why};
use pagefirst::types::VirtAddr;

/// What wrote a word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Tag {
    Own = 0x11,
    File = 0x22,
    Private = 0x33,
    Chaos = 0x44,
    Huge = 0x55,
    Physical = 0x66,
    Heap = 0x77,
    Stack = 0x88,
    Direct = 0x99,
}

/// A word says where it belongs, who wrote it, and by which write.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word {
    pub tag: u8,
    pub writer: usize,
    pub key: u64,
    pub write: u32,
}

impl Word {
    pub fn pack(tag: Tag, writer: usize, key: u64, write: u32) -> u64 {
        (tag as u64) << 56 | (writer as u64) << 48 | key << 32 | u64::from(write)
    }
    pub fn of(word: u64) -> Self {
        let (tag, writer) = ((word >> 56) as u8, (word >> 48 & 0xff) as usize);
        Word { tag, writer, key: word >> 32 & 0xffff, write: word as u32 }
    }
    pub fn is(self, tag: Tag, writer: usize, key: u64) -> bool {
        self.tag == tag as u8 && self.writer == writer && self.key == key
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Word::of(0) {
            return f.write_str("zero");
        }
        let Word { tag, writer, key, write } = self;
        write!(f, "write {write} of worker {writer} to page {key} ({tag:#x})")
    }
}

/// Whether memory, or a limit, is short.
pub(crate) fn is_short(error: FaultError) -> bool {
    matches!(error, FaultError::NoMemory | FaultError::OverLimit(_))
}

/// So many workers have a wide stretch.
const WIDE: usize = 6;

pub(crate) struct Worker<'s, 'h, H: Host> {
    pub stress: &'s Stress<'h, H>,
    pub p: &'static H::Platform,
    pub me: usize,
    pub dice: Dice,
    /// The number of the last write.
    write: u32,
    /// The number of the space it works in.
    pub at: usize,
    /// Whether its CPU runs that.
    pub is_inside: bool,
    pub own: Stretch<H::Platform>,
    /// Another one, if it is one of the first workers: it takes much memory.
    pub wide: Stretch<H::Platform>,
    /// By file and page, the last write to it that must be there still: 0 if it reads as zero.
    pub last: [[u32; PAGES as usize]; Kind::COUNT],
    /// By page, the last word that it wrote to the file that is memory.
    pub last_direct: [u64; BLOCK as usize],
}

impl<'s, 'h, H: Host> Worker<'s, 'h, H> {
    pub fn new(stress: &'s Stress<'h, H>, me: usize) -> Self {
        Worker {
            stress,
            p: stress.host.platform(),
            me,
            dice: Dice::new(stress.config.seed, me),
            write: 0,
            at: me % HOMES,
            is_inside: false,
            own: Stretch::new(Area::own(me)),
            wide: Stretch::new(Area::wide(me)),
            last: [[0; PAGES as usize]; Kind::COUNT],
            last_direct: [0; BLOCK as usize],
        }
    }

    pub fn tally(&self) -> &'static Tally {
        &self.stress.board.tallies[self.me]
    }
    pub fn begin(&self, op: Op) {
        self.tally().begin(op);
    }
    /// The number of its home.
    pub fn home(&self) -> usize {
        self.me % HOMES
    }
    /// What it found wrong, where, and what it came to.
    pub fn violation(&self, what: fmt::Arguments<'_>) -> ! {
        let (op, n) = self.tally().doing();
        panic!("violation: worker {} in space {}, operation {n} ({}): {what}", self.me, self.at, op.name())
    }
    /// The number of a write that is about to be made.
    pub fn next_write(&mut self) -> u32 {
        self.write += 1;
        self.stress.board.begin(self.me, self.write);
        self.write
    }
    /// A word that this worker is about to write.
    pub fn new_word(&mut self, tag: Tag, key: u64) -> u64 {
        let write = self.next_write();
        Word::pack(tag, self.me, key, write)
    }
    /// This worker's word in a page.
    pub fn mine(&self, page: VirtAddr) -> VirtAddr {
        VirtAddr(page.0 + place_of(self.me))
    }

    /// Works until all is over.
    pub fn work(mut self, cpu: &mut H::Cpu) {
        self.stress.host.charge_to(Some(&self.stress.limits[0]));
        while self.goes_on(cpu) {
            self.stay(cpu);
        }
        self.verify_all(None);
        self.stress.host.charge_to(None);
        self.park();
    }

    /// Some operations in one space.
    fn stay(&mut self, cpu: &mut H::Cpu) {
        self.at = if self.dice.once_in(2) { self.home() } else { self.dice.roll(SPACES as u64) as usize };
        let stress = self.stress;
        let Some(slot) = stress.spaces[self.at].try_read() else { return self.p.relax() };
        let Some(space) = &*slot else { return };
        cpu.enter(space);
        self.is_inside = true;
        for _ in 0..10 + self.dice.roll(150) {
            if !self.goes_on(cpu) {
                break;
            }
            self.operate(space, cpu);
            self.p.relax();
        }
        self.is_inside = false;
        cpu.leave();
    }

    fn operate(&mut self, space: &H::Space, cpu: &mut H::Cpu) {
        if self.dice.once_in(8) {
            self.hunt_offered(space);
        }
        match self.dice.roll(20) {
            which @ 0..9 if self.at == self.home() => {
                let is_wide = which < 3 && self.me < WIDE;
                self.on_stretch(is_wide, |worker| worker.work_on_own(space, cpu));
            }
            0..13 => self.work_on_file(space, cpu),
            13 => self.work_on_direct(space, cpu),
            14..19 => self.work_on_chaos(space, cpu),
            _ => self.work_on_spaces(),
        }
    }

    /// Ends a guest, and makes another in its place.
    fn work_on_spaces(&mut self) {
        self.begin(Op::Space);
        match self.stress.fresh_space(SPACES) {
            Ok(space) => self.put_up(self.stress.host.share(space)),
            Err(_) => self.tally().short(),
        }
    }

    /// Makes a space a guest; the one that was there ends, if its place can be had. Otherwise this one does.
    pub fn put_up(&mut self, space: H::Space) {
        let at = HOMES + self.dice.roll((SPACES - HOMES) as u64) as usize;
        let mut gone = Some(space);
        if at != self.at {
            for _ in 0..1000 {
                if let Some(mut slot) = self.stress.spaces[at].try_write() {
                    gone = core::mem::replace(&mut *slot, gone);
                    break;
                }
                // Those who are there may be waiting for a quiet point.
                if self.stress.board.state.load(Relaxed) != 0 {
                    break;
                }
                self.p.relax();
            }
        }
        self.begin(Op::Exit);
        drop(gone);
    }

    /// Counts what memory did not allow; otherwise it is wrong.
    pub fn expect_short(&self, error: MapError) {
        match error {
            MapError::NoMemory | MapError::OverLimit(_) => self.tally().short(),
            error => self.violation(format_args!("{error}")),
        }
    }

    /// Loads as the program does, or as the kernel for it.
    pub fn load(
        &mut self,
        space: &AddressSpace<H::Platform>,
        cpu: Option<&mut H::Cpu>,
        at: VirtAddr,
    ) -> Result<u64, FaultError> {
        if let Some(cpu) = cpu
            && !self.dice.once_in(8)
        {
            self.begin(Op::Load);
            return cpu.load(at);
        }
        self.begin(Op::CopyIn);
        let mut bytes = [0; 8];
        self.patiently(|| space.copy_in(at, &mut bytes))?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// Stores in either way.
    pub fn store(
        &mut self,
        space: &AddressSpace<H::Platform>,
        cpu: &mut H::Cpu,
        at: VirtAddr,
        word: u64,
    ) -> Result<(), FaultError> {
        if !self.dice.once_in(8) {
            self.begin(Op::Store);
            return cpu.store(at, word);
        }
        self.begin(Op::CopyOut);
        self.patiently(|| space.copy_out(at, &word.to_ne_bytes()))
    }

    /// Copies, and waits where that has to wait.
    pub fn patiently<'a>(
        &self,
        mut copy: impl FnMut() -> Result<(), Stopped<'a, H::Platform>>,
    ) -> Result<(), FaultError> {
        let mut kept = None;
        loop {
            let done = copy();
            drop(kept.take());
            match done.map_err(|stopped| stopped.why) {
                Ok(()) => return Ok(()),
                Err(Why::Error(error)) => return Err(error),
                Err(Why::Blocked(ticket)) => {
                    self.p.wait(&ticket);
                    kept = Some(ticket);
                }
                Err(Why::Misaligned) => self.violation(format_args!("a copy asked for alignment")),
            }
        }
    }
}
