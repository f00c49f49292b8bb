//! Calls: what a recording says of mappings and files, done to the space of the process that runs.

use super::super::Huge;
use super::super::place::fixed;
use super::{Engine, File, Process};
use pagefirst::fault::FaultError;
use pagefirst::file::FileCache;
use pagefirst::space::{
    Advice as Told, Backing as Shows, Map as Mapping, MapError, Place as At, RemapTo, Unpopulated, VmaFlags,
    Why,
};
use pagefirst::types::{NoMemory, PAGE_SIZE, Prot as Rights, VirtAddr};
use pagefirst_machine::{Machine, MachineFile};
use pagefirst_record::{Address, Advice, Backing, Event, Map, MapKind, MappingId, Place, ProcessId, Prot};

fn rights(prot: Prot) -> Rights {
    let mut rights = Rights::empty();
    rights.set(Rights::READ, prot.read);
    rights.set(Rights::WRITE, prot.write);
    rights.set(Rights::EXEC, prot.execute);
    rights
}

impl Engine<'_> {
    pub(super) fn address(&self, at: Address) -> VirtAddr {
        VirtAddr(self.now.bases.get(at.mapping.0 as usize).copied().unwrap_or(0).wrapping_add(at.offset))
    }

    /// Resident set and tables only grow between calls: looked at before each call that may shrink them and at the end,
    /// the peaks are exact.
    pub(super) fn sample(&mut self) {
        let tables = |p: &Process| p.space.page_table().table_bytes().iter().sum::<u64>();
        let all = || std::iter::once(&self.now).chain(self.others.values());
        let (tables, resident) =
            (all().map(tables).sum(), all().map(|process| process.space.resident_bytes()).sum());
        self.run.peak_tables = self.run.peak_tables.max(tables);
        self.run.peak_resident = self.run.peak_resident.max(resident);
        if self.now.number == ProcessId(0) {
            self.run.first_peak = self.run.first_peak.max(self.now.space.resident_bytes());
        }
    }

    pub(super) fn call(&mut self, event: Event) -> Result<(), NoMemory> {
        let what = event.clone();
        let done = match event {
            // One that an earlier round has left as it was is taken again.
            Event::File(info) if self.files.open.get(&info.number).is_some_and(|f| f.size() == info.size) => {
                Ok(())
            }
            Event::File(info) => {
                let file = FileCache::new(self.machine, MachineFile::zeros(), info.size)?;
                self.files.open.insert(info.number, file);
                self.files.warmed.retain(|(number, ..)| *number != info.number);
                Ok(())
            }
            Event::FileSize { file, size } => {
                if let Some(file) = self.files.open.get(&file) {
                    file.set_size(self.machine, size);
                }
                Ok(())
            }
            // Processes were seen to before.
            Event::ThreadStart { .. }
            | Event::ThreadExit { .. }
            | Event::Stray { .. }
            | Event::Touch { .. }
            | Event::Fork { .. }
            | Event::Exec { .. }
            | Event::End { .. } => Ok(()),
            call => {
                if may_shrink(&call) {
                    self.sample();
                }
                self.now.calls += 1;
                self.perform(call)
            }
        };
        match done {
            Ok(()) => Ok(()),
            Err(Failed::Map(MapError::NoMemory)) => Err(NoMemory),
            Err(why) => {
                self.now.failed += 1;
                self.run.first_failed.get_or_insert_with(|| format!("{what:?}: {why}"));
                Ok(())
            }
        }
    }

    fn perform(&mut self, event: Event) -> Result<(), Failed> {
        match event {
            Event::Map(map) => self.map(&map)?,
            Event::Unmap { at, len, .. } => {
                self.now.space.unmap(self.address(at), len)?;
                self.forget(self.address(at), len);
            }
            Event::Protect { at, len, prot, .. } => {
                self.now.space.protect(self.address(at), len, rights(prot))?
            }
            Event::Remap { old_len: 0, .. } => {
                return Err(Failed::Unknown("a second mapping of the same pages"));
            }
            Event::Remap { from, old_len, new_len, id, recorded, keep, moved, .. } => {
                let from = self.address(from);
                let to = match self.now.placer.is_recorded() && moved {
                    true => RemapTo::Fixed(VirtAddr(recorded)),
                    false => RemapTo::Anywhere,
                };
                let at = self.now.space.remap(from, old_len, new_len, to)?;
                self.born(id, at.0);
                if let Some(touched) = &mut self.now.touched {
                    touched.shift(from, old_len.min(new_len), at);
                }
                if keep && at != from {
                    let map = Mapping::anonymous(old_len, Rights::READ | Rights::WRITE);
                    self.now.space.map(Mapping { place: At::Fixed(from), ..map })?;
                }
            }
            Event::Advise { at, len, advice: Advice::DontNeed, .. } => {
                self.now.space.discard(self.address(at), len)?;
                self.forget(self.address(at), len);
            }
            Event::Advise { at, len, advice: Advice::Huge, .. } => {
                self.now.space.advise(self.address(at), len, Told::Huge)?;
                if self.options.huge == Huge::Advise {
                    self.now.touched.get_or_insert_default();
                }
            }
            Event::Advise { at, len, advice: Advice::NoHuge, .. } => {
                self.now.space.advise(self.address(at), len, Told::NoHuge)?
            }
            // Other advice may be ignored; MADV_FREE is as good as ignored while memory is not short.
            Event::Advise { .. } => {}
            Event::Brk { heap, new, .. } => {
                let start = self.address(Address { mapping: heap, offset: 0 });
                self.now.space.brk(VirtAddr(start.0 + new))?;
            }
            _ => {}
        }
        Ok(())
    }

    fn forget(&mut self, at: VirtAddr, len: u64) {
        if let Some(touched) = &mut self.now.touched {
            touched.forget(at, len);
        }
    }

    fn born(&mut self, id: MappingId, base: u64) {
        let i = id.0 as usize;
        if self.now.bases.len() <= i {
            self.now.bases.resize(i + 1, 0);
        }
        self.now.bases[i] = base;
    }

    fn map(&mut self, map: &Map) -> Result<(), Failed> {
        let base = match map.place {
            Place::At(at) => Some(self.address(at).0),
            _ => match self.now.placer.reservation(map) {
                Some(base) => Some(base),
                None if map.reserve > map.len => {
                    // A place large enough for what comes beside it later.
                    let whole = Mapping::anonymous(map.reserve, Rights::empty());
                    let range = self.now.space.map(whole)?.range;
                    self.now.space.unmap(range.start, range.len())?;
                    Some(range.start.0)
                }
                None => None,
            },
        };
        if map.kind == MapKind::Heap {
            let base = base.unwrap_or(0);
            self.born(map.id, base);
            return Ok(self.now.space.set_heap(VirtAddr(base))?);
        }
        let start = base.map(|b| if map.grows_down { b + map.reserve - map.len } else { b });
        let mut flags = VmaFlags::empty();
        flags.set(VmaFlags::SHARED, map.shared);
        flags.set(VmaFlags::GROWS_DOWN, map.grows_down);
        let backing = match map.backing {
            Backing::File { file: number, offset } => {
                let file =
                    self.files.open.get(&number).ok_or(Failed::Unknown("a file that was not named"))?.clone();
                if self.files.warmed.insert((number, offset, map.len)) {
                    warm(self.machine, &file, offset, map.len);
                }
                Shows::File { file, first: offset / PAGE_SIZE }
            }
            Backing::Anonymous if map.shared => {
                let file =
                    FileCache::new(self.machine, MachineFile::zeros(), map.len).map_err(MapError::from)?;
                Shows::File { file, first: 0 }
            }
            Backing::Anonymous => Shows::Anonymous,
        };
        let mapped = self.now.space.map(Mapping {
            len: map.len,
            prot: rights(map.prot),
            flags,
            backing,
            place: start.map_or(At::Anywhere, fixed),
            populate: map.populate,
        })?;
        let short =
            matches!(mapped.unpopulated, Some(Unpopulated { why: Why::Error(FaultError::NoMemory), .. }));
        let range = mapped.range;
        self.forget(range.start, range.len());
        if short {
            return Err(Failed::Map(MapError::NoMemory));
        }
        if !matches!(map.place, Place::At(_)) {
            let start = range.start.0;
            self.born(map.id, if map.grows_down { start + map.len - map.reserve } else { start });
        }
        Ok(())
    }
}

/// Whether a call takes away what is mapped.
fn may_shrink(call: &Event) -> bool {
    match call {
        Event::Map(map) => matches!(map.place, Place::At(_)),
        Event::Protect { .. } => false,
        Event::Advise { advice, .. } => *advice == Advice::DontNeed,
        Event::Brk { old, new, .. } => new < old,
        _ => true,
    }
}

/// Brings what is mapped of a file into the cache, as it is on a machine that ran the program before.
fn warm(machine: &'static Machine, file: &File, offset: u64, len: u64) {
    let end = file.size().min(offset.saturating_add(len));
    let mut at = offset;
    while at < end {
        // What cannot be had now will be asked for by a fault.
        if file.read_at(machine, at, &mut [0]).is_err() {
            return;
        }
        at += PAGE_SIZE;
    }
}

/// Why a call of the recording was not performed.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("{0} cannot be replayed")]
    Unknown(&'static str),
}
