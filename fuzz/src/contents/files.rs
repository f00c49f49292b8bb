//! What is done to files, and by what is behind them.

use super::model::{File, WORDS, mark, set};
use super::plan::{MEMORY, Op, SIZES, Setting, Step};
use super::world::World;
use pagefirst::arch::Format;
use pagefirst::fault::Ticket;
use pagefirst::file::{ReadError, WriteError};
use pagefirst::types::PAGE_SIZE;
use pagefirst_machine::{Late, Machine, MachineFile};
use std::collections::BTreeSet;

/// What is behind a file's cache.
pub struct OnDisk {
    pub file: MachineFile,
    /// Pages that are being stored.
    storing: Vec<u64>,
    /// Pages that cannot be read or stored.
    failing: BTreeSet<u64>,
}

impl OnDisk {
    pub fn new(id: usize, setting: &Setting) -> OnDisk {
        let end = SIZES[id] * PAGE_SIZE;
        let marked = || MachineFile::pattern(move |at| if at < end { mark(id, at) } else { 0 });
        let file = match id {
            MEMORY => MachineFile::shmem(setting.shmem),
            0 => marked().with_read_ahead(if setting.read_ahead { 8 } else { 0 }),
            _ => marked().with_folios(4),
        };
        let file = if id == MEMORY { file } else { file.with_tracking(setting.tracks[id / 2]) };
        let is_late = id != MEMORY && setting.late[id / 2];
        let file = if is_late { file.late(Late::Held) } else { file };
        let file = if is_late && setting.late_writes { file.late_writes() } else { file };
        OnDisk { file, storing: Vec::new(), failing: BTreeSet::new() }
    }

    fn set_failing(&self, index: u64, fails: bool) {
        self.file.fail_reads(index, fails);
        self.file.fail_writes(index, fails);
    }
    /// Ends one of the reads and writes that have begun; or it fails.
    fn finish(&mut self, model: &mut File, nth: usize, fails: bool) {
        let pending = self.file.pending();
        let Some(&index) = pending.get(nth % pending.len().max(1)) else { return };
        if fails {
            model.failed.insert(index);
            self.set_failing(index, true);
        }
        self.file.finish(index);
        self.set_failing(index, self.failing.contains(&index));
        let at = self.storing.iter().position(|storing| *storing == index);
        at.map(|at| self.storing.swap_remove(at));
    }
    /// Whatever changes the size waits for what is being stored, and here nobody would end it meanwhile.
    fn finish_stores(&mut self) {
        for index in self.storing.drain(..) {
            self.file.finish(index);
        }
    }
}

impl<F: Format> World<F> {
    /// Ends all reads and writes that have begun.
    pub fn finish_all(&mut self) {
        for disk in &mut self.disks {
            while disk.file.finish_one() {}
            disk.storing.clear();
        }
    }

    pub fn file_step(&mut self, step: &Step) {
        let (machine, files) = (self.machine, &mut self.files);
        match step.op.clone() {
            Op::Resize { file, size } => {
                self.disks[file].finish_stores();
                self.real.caches[file].set_size(machine, size);
                files[file].resize(size);
                let lost = size.div_ceil(PAGE_SIZE)..u64::MAX;
                self.real.spaces.iter_mut().for_each(|(_, model)| model.lose(file, &lost));
            }
            Op::Punch { file, bytes } => {
                self.disks[file].finish_stores();
                self.real.caches[file].punch(machine, bytes.clone());
                if bytes.start < files[file].size.min(bytes.end) {
                    files[file].cut(bytes);
                }
            }
            Op::ReadFile { file, index, word } => self.read(step, file, index, word),
            Op::WriteFile { file, index, word, value } => self.write(step, file, index, word, value),
            Op::Evict(file) => {
                self.real.caches[file].evict(machine);
            }
            Op::WriteBack(file) => {
                let disk = &mut self.disks[file];
                let begun = disk.file.pending();
                let stored = self.real.caches[file].write_back(machine);
                let storing = disk.file.pending().split_off(begun.len());
                disk.storing.extend(storing);
                let may_fail = !(files[file].failed.is_empty() && files[file].bad.is_empty());
                assert!(stored.is_ok() || may_fail, "{step:?}: {stored:?}");
            }
            Op::Finish { file, nth, fails } => {
                self.disks[file].finish(&mut files[file], usize::from(nth), fails);
            }
            Op::Fail { file, index, fails } => {
                let disk = &mut self.disks[file];
                disk.set_failing(index, fails);
                if fails {
                    files[file].failed.insert(index);
                    disk.failing.insert(index);
                } else {
                    disk.failing.remove(&index);
                }
            }
            _ => unreachable!("it is no step of a file's"),
        }
    }

    /// Ends what is waited for.
    fn await_all(&mut self, step: &Step, ticket: &Ticket<'static, Machine<F>>) {
        self.finish_all();
        assert!(ticket.is_ready(), "{step:?}: what it waits for never comes");
    }
    /// Whether a page of a file may not be had, for this reason.
    fn may_refuse(&self, file: usize, index: u64, why: &ReadError<Machine<F>>) -> bool {
        match why {
            ReadError::Io => self.files[file].failed.contains(&index),
            ReadError::Poisoned => self.files[file].bad.contains_key(&index),
            ReadError::OverLimit(_) => self.is_limited(),
            _ => false,
        }
    }

    fn read(&mut self, step: &Step, file: usize, index: u64, word: usize) {
        let (at, cache) = (index * PAGE_SIZE + WORDS[word], self.real.caches[file].clone());
        let (mut bytes, mut _kept) = ([0; 8], None);
        let n = loop {
            match cache.read_at(self.machine, at, &mut bytes) {
                Ok(n) => break n,
                Err(ReadError::Blocked(ticket)) => {
                    self.await_all(step, &ticket);
                    _kept = Some(ticket);
                }
                Err(why) => {
                    assert!(self.may_refuse(file, index, &why), "{step:?}: {why}");
                    return;
                }
            }
        };
        let file = &mut self.files[file];
        let is_there = file.has_word(index, word);
        assert_eq!(n, if is_there { 8 } else { 0 }, "{step:?}");
        if is_there {
            assert_ne!(file.bad.remove(&index), Some(true), "{step:?}: it was lost");
            assert_eq!(u64::from_le_bytes(bytes), file.pages[index as usize].get()[word], "{step:?}");
        }
    }

    fn write(&mut self, step: &Step, file: usize, index: u64, word: usize, value: u64) {
        let (at, cache) = (index * PAGE_SIZE + WORDS[word], self.real.caches[file].clone());
        let mut _kept = None;
        loop {
            match cache.write_at(self.machine, at, &value.to_le_bytes()) {
                Ok(n) => break assert_eq!(n, 8, "{step:?}"),
                Err(WriteError::Page(ReadError::Blocked(ticket))) => {
                    self.await_all(step, &ticket);
                    _kept = Some(ticket);
                }
                Err(WriteError::Page(why)) => {
                    assert!(self.may_refuse(file, index, &why), "{step:?}: {why}");
                    return;
                }
                Err(why) => panic!("{step:?}: {why}"),
            }
        }
        let file = &mut self.files[file];
        assert_ne!(file.bad.remove(&index), Some(true), "{step:?}: it was lost");
        file.size = file.size.max(at + 8);
        set(&file.pages[index as usize], word, value);
    }
}
