//! Runs a case on the library and on the oracle, and compares them after each step: outcomes, contents, the list of
//! mappings, counters, bytes of tables.

use super::calls::Called;
use super::crew::Crew;
use super::files::{File, mark, pages_of};
use super::kit::{Cache, Space as Real, check, entry};
use super::model::{self, Entry};
use super::plan::{FILES, Op, Setting, Step};
use pagefirst::account::{Account, Faults};
use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::fault::FaultError;
use pagefirst::file::{FileCache, ReadError, WriteBackError, WriteError};
use pagefirst::frame::Frame;
use pagefirst::platform::Platform;
use pagefirst::space::{AddressSpace, Backing, Map, MapError, Unpopulated};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr, VirtRange};
use pagefirst_machine::{Machine, MachineFile, Vcpu};
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;

/// After so many steps all entries are looked at.
const LOOK: usize = 8;

/// What must not be dropped after a failure: the library may be in the middle of anything.
struct Things {
    spaces: Vec<Real>,
    caches: Vec<Cache>,
    /// Keeps memory short.
    _taken: Vec<Frame<Machine>>,
}

struct Case {
    machine: &'static Machine,
    setting: Setting,
    crew: Crew,
    real: ManuallyDrop<Things>,
    spaces: Vec<model::Space>,
    files: Vec<File>,
    stores: Vec<MachineFile>,
}

/// Runs a case; panics when the library does what the oracle does not expect.
///
/// # Errors
/// What is left on the machine after it.
pub fn run(machine: &'static Machine, setting: &Setting, steps: &[Step]) -> Result<(), String> {
    let mut case = Case::new(machine, *setting);
    for (n, step) in steps.iter().enumerate() {
        case.step(step);
        case.compare(step, n);
        if n % LOOK == 0 {
            case.compare_entries(step.space, 1);
        }
    }
    for space in 0..case.spaces.len() {
        case.compare_entries(space, PAGE_SIZE as usize / 8);
    }
    let Case { crew, real, stores, .. } = case;
    drop(crew);
    drop(ManuallyDrop::into_inner(real));
    drop(stores);
    machine.nothing_left()
}

impl Case {
    fn new(machine: &'static Machine, setting: Setting) -> Case {
        let memory = "memory for an empty case";
        let files: Vec<File> =
            FILES.iter().enumerate().map(|(id, &size)| File::new(id, size, setting.tracks)).collect();
        let store = |(id, &size): (usize, &u64)| {
            MachineFile::pattern(move |at| if at < size { mark(id, at) } else { 0 })
                .with_tracking(setting.tracks)
        };
        let stores: Vec<_> = FILES.iter().enumerate().map(store).collect();
        let cache = |(store, &size): (&MachineFile, &u64)| FileCache::new(machine, store.clone(), size);
        let caches: Result<Vec<_>, _> = stores.iter().zip(&FILES).map(cache).collect();
        let spaces: Result<Vec<_>, _> =
            (0..2).map(|_| Ok(Arc::new(AddressSpace::new(machine, setting.policy)?))).collect();
        let spaces: Vec<Real> = spaces.map_err(|e: pagefirst::types::NoMemory| e).expect(memory);
        let mut models: Vec<_> = (0..2).map(|_| model::Space::new(setting.policy)).collect();
        for (space, model) in spaces.iter().zip(&mut models) {
            space.set_heap(VirtAddr(setting.heap)).expect("the heap starts where things can be mapped");
            model.heap = setting.heap..setting.heap;
        }
        let crew = Crew::new(machine, setting.hardware.cpus);
        let taken = setting.free.map_or_else(Vec::new, |free| machine.leave_free(free));
        let real = ManuallyDrop::new(Things { spaces, caches: caches.expect(memory), _taken: taken });
        Case { machine, setting, crew, real, spaces: models, files, stores }
    }

    /// Whether memory may run out.
    fn is_short(&self) -> bool {
        self.setting.free.is_some()
    }
    fn real(&self, step: &Step) -> Real {
        self.real.spaces[step.space].clone()
    }

    /// A mapping call: on the library first; if memory ran out there, nothing happened.
    fn call<T: PartialEq + std::fmt::Debug + Send + 'static>(
        &mut self,
        step: &Step,
        call: impl FnOnce(Real) -> Result<T, MapError> + Send + 'static,
        model: impl FnOnce(&mut model::Space, &[File]) -> Called<T>,
    ) -> Option<T> {
        let real = self.real(step);
        let found = self.crew.on(step.cpu, move |_| call(real));
        if found == Err(MapError::NoMemory) && self.is_short() {
            return None;
        }
        let expected = model(&mut self.spaces[step.space], &self.files);
        assert_eq!(found, expected, "{step:?}");
        found.ok()
    }

    fn step(&mut self, step: &Step) {
        match step.op.clone() {
            Op::Map { map, populate } => {
                let backing = match map.shows.file() {
                    Some((file, first)) => Backing::File { file: self.real.caches[file].clone(), first },
                    None => Backing::Anonymous,
                };
                let new = Map {
                    len: map.pages * PAGE_SIZE,
                    prot: map.prot,
                    flags: map.flags,
                    backing,
                    place: map.place,
                    populate: false,
                };
                let range = self.call(
                    step,
                    move |space| space.map(new).map(|mapped| mapped.range),
                    |space, _| space.map(map).map(|range| super::calls::bytes_of(&range)),
                );
                if let Some(range) = range.filter(|_| populate) {
                    self.populate(step, range, map.prot);
                }
            }
            Op::Unmap(range) => {
                let (at, len) = sized(&range);
                self.call(step, move |space| space.unmap(at, len), |space, _| space.unmap(range));
            }
            Op::Protect(range, prot) => {
                let (at, len) = sized(&range);
                self.call(
                    step,
                    move |space| space.protect(at, len, prot),
                    |space, files| space.protect(files, range, prot),
                );
            }
            Op::Discard(range) => {
                let (at, len) = sized(&range);
                self.call(step, move |space| space.discard(at, len), |space, _| space.discard(range));
            }
            Op::Remap { old, pages, to } => {
                let (at, len) = sized(&old);
                self.call(
                    step,
                    move |space| space.remap(at, len, pages * PAGE_SIZE, to),
                    |space, _| space.remap(old, pages, to).map(|page| VirtAddr(page * PAGE_SIZE)),
                );
            }
            Op::Brk(up) => {
                let end = (self.setting.heap + up).saturating_sub(PAGE_SIZE);
                self.call(
                    step,
                    move |space| space.brk(VirtAddr(end)),
                    |space, _| space.brk(end).map(|()| VirtAddr(end)),
                );
            }
            Op::Load { at, wide } => self.access(step, at, if wide { 8 } else { 1 }, Access::Read, 0),
            Op::Fetch(at) => self.access(step, at, 1, Access::Execute, 0),
            Op::Store { at, wide, value } => {
                let len = if wide { 8 } else { 1 };
                if !self.spaces[step.space].is_beyond_end(&self.files, VirtAddr(at), len) {
                    self.access(step, at, len, Access::Write, value);
                }
            }
            Op::Leave => self.crew.on(step.cpu, |cpu| cpu.leave()),
            Op::Drain => {
                let machine = self.machine;
                self.crew.on(step.cpu, move |_| machine.vm().drain(machine));
            }
            Op::ReadFile { file, at, len } => self.read_file(step, file, at, len),
            Op::WriteFile { file, at, len, value } => self.write_file(step, file, at, vec![value; len]),
            Op::Resize { file, size } => self.resize(step, file, size),
            Op::Evict(file) => self.evict(step, file),
            Op::WriteBack(file) => self.write_back(step, file),
        }
    }

    fn populate(&mut self, step: &Step, range: VirtRange, prot: Prot) {
        let real = self.real(step);
        let stopped: Option<Unpopulated> = self.crew.on(step.cpu, move |_| real.populate(range, prot));
        let limit = stopped.filter(|_| self.is_short());
        let pages = range.start.0 / PAGE_SIZE..range.end.0 / PAGE_SIZE;
        let expected = self.spaces[step.space].populate(&mut self.files, pages, prot, limit);
        assert_eq!(stopped, expected, "{step:?}");
    }

    fn access(&mut self, step: &Step, at: u64, len: u64, access: Access, value: u64) {
        let real = self.real(step);
        let found = self.crew.on(step.cpu, move |cpu: &mut Vcpu| {
            if cpu.space().is_none_or(|space| !Arc::ptr_eq(space, &real)) {
                cpu.switch_to(&real);
            }
            let mut bytes = value.to_le_bytes();
            let slice = &mut bytes[..len as usize];
            let done = match access {
                Access::Read => cpu.load(VirtAddr(at), slice),
                Access::Write => cpu.store(VirtAddr(at), slice),
                Access::Execute => cpu.fetch(VirtAddr(at)).map(|byte| slice[0] = byte),
            };
            done.map(|()| bytes).map_err(|trap| (trap.addr, trap.error))
        });
        let limit = match found {
            Err((addr, FaultError::NoMemory)) if self.is_short() => Some(addr),
            _ => None,
        };
        let mut bytes = value.to_le_bytes();
        let expected = self.expect(step, VirtAddr(at), &mut bytes[..len as usize], access, limit);
        assert_eq!(found, expected.map(|()| bytes), "{step:?}");
    }

    /// An access by the oracle, as far as `limit`, where memory ran out.
    fn expect(
        &mut self,
        step: &Step,
        at: VirtAddr,
        mut bytes: &mut [u8],
        access: Access,
        limit: Option<VirtAddr>,
    ) -> Result<(), (VirtAddr, FaultError)> {
        let mut at = at;
        while !bytes.is_empty() {
            let space = &mut self.spaces[step.space];
            if limit == Some(at) {
                space.faults.no_memory += 1;
                // A stack may have grown before that.
                let page = at.0 / PAGE_SIZE;
                let mut is_mapped = false;
                self.real.spaces[step.space].for_each_vma(|vma| is_mapped |= vma.range.contains(at));
                if is_mapped && space.areas.at(page).is_none() {
                    assert!(space.grow_stack(page), "{step:?}: no stack to grow");
                }
                return Err((at, FaultError::NoMemory));
            }
            let (now, rest) = bytes.split_at_mut(bytes.len().min((PAGE_SIZE - at.0 % PAGE_SIZE) as usize));
            match access {
                Access::Write => space.store(&mut self.files, at, now),
                _ => space.load(&mut self.files, at, now, access),
            }
            .map_err(|error| (at, error))?;
            at = VirtAddr(at.0.wrapping_add(now.len() as u64));
            bytes = rest;
        }
        Ok(())
    }

    fn read_file(&mut self, step: &Step, file: usize, at: u64, len: usize) {
        let (machine, cache) = (self.machine, self.real.caches[file].clone());
        let read = self.crew.on(step.cpu, move |_| {
            let mut bytes = vec![0; len];
            cache.read_at(machine, at, &mut bytes).map(|n| {
                bytes.truncate(n);
                bytes
            })
        });
        let short = self.is_short();
        let file = &mut self.files[file];
        let found = match read {
            Ok(found) => found,
            Err(ReadError::NoMemory) if short => return,
            Err(e) => panic!("{step:?}: {e}"),
        };
        let n = (len as u64).min(file.size.saturating_sub(at));
        assert!(found.len() as u64 == n || short, "{step:?}: {} bytes of {n}", found.len());
        for (i, byte) in found.iter().enumerate() {
            let at = at + i as u64;
            assert_eq!(*byte, file.bytes(at / PAGE_SIZE)[(at % PAGE_SIZE) as usize], "{step:?}: byte {i}");
            file.fetch(at / PAGE_SIZE);
        }
    }

    fn write_file(&mut self, step: &Step, file: usize, at: u64, bytes: Vec<u8>) {
        let (machine, cache, from) = (self.machine, self.real.caches[file].clone(), bytes.clone());
        let written = match self.crew.on(step.cpu, move |_| cache.write_at(machine, at, &from)) {
            Ok(written) => written,
            Err(WriteError::Page(ReadError::NoMemory)) if self.is_short() => return,
            Err(e) => panic!("{step:?}: {e}"),
        };
        assert!(written == bytes.len() || self.is_short(), "{step:?}: {written} bytes");
        let file = &mut self.files[file];
        file.size = file.size.max(at + written as u64);
        let mut at = at;
        let mut rest = &bytes[..written];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min((PAGE_SIZE - at % PAGE_SIZE) as usize));
            file.write(at, now);
            (at, rest) = (at + now.len() as u64, later);
        }
    }

    fn resize(&mut self, step: &Step, file: usize, size: u64) {
        // Mapped pages beyond the end are truncation's, which the library does not do yet.
        if self.spaces.iter().any(|space| space.maps(file, pages_of(size), u64::MAX)) {
            return;
        }
        let (machine, cache) = (self.machine, self.real.caches[file].clone());
        let found = self.crew.on(step.cpu, move |_| cache.set_size(machine, size));
        assert_eq!(found, Ok(()), "{step:?}");
        self.stores[file].truncate(size).expect("it is in memory");
        self.files[file].resize(size);
    }

    fn evict(&mut self, step: &Step, file: usize) {
        let (machine, cache) = (self.machine, self.real.caches[file].clone());
        let found = self.crew.on(step.cpu, move |_| cache.evict(machine));
        let (spaces, short) = (&self.spaces, self.is_short());
        let is_mapped = |index| spaces.iter().any(|space| space.maps(file, index, index + 1));
        let model = &mut self.files[file];
        let before = model.cached.len();
        model.cached.retain(|index, dirty| *dirty || is_mapped(*index));
        let gone = before - model.cached.len();
        assert!(found == gone as u64 || short, "{step:?}: {found} pages, not {gone}");
        let left = self.real.caches[file].pages();
        assert!(left == model.cached.len() as u64 || short, "{step:?}: {left} pages are left");
    }

    fn write_back(&mut self, step: &Step, file: usize) {
        let (machine, cache) = (self.machine, self.real.caches[file].clone());
        let stored = match self.crew.on(step.cpu, move |_| cache.write_back(machine)) {
            Err(WriteBackError::NoMemory(_)) if self.is_short() => return,
            stored => stored.unwrap_or_else(|e| panic!("{step:?}: {e}")),
        };
        let spaces = &self.spaces;
        let model = &mut self.files[file];
        let dirty = model.cached.values().filter(|dirty| **dirty).count() as u64;
        assert!(stored <= dirty, "{step:?}: {stored} pages stored, {dirty} were written");
        for (index, dirty) in &mut model.cached {
            *dirty &= spaces.iter().any(|space| space.maps(file, *index, index + 1));
        }
    }

    /// What the library says of a space, and what it should.
    fn compare(&self, step: &Step, n: usize) {
        let (real, model) = (&self.real.spaces[step.space], &self.spaces[step.space]);
        let found = real.account();
        let (anon_bytes, file_bytes) = model.resident();
        let mut table_bytes = found.table_bytes.map(|_| 0);
        for (to, from) in table_bytes.iter_mut().zip(model.table_bytes(X86_64::LEVELS as usize)) {
            *to = from;
        }
        let mut faults = model.faults;
        if self.setting.hardware.cpus > 1 {
            // Another CPU may know less than the entry allows, and fault for nothing.
            assert!(found.faults.spurious >= faults.spurious, "step {n}, {step:?}");
            faults = Faults { spurious: found.faults.spurious, ..faults };
        }
        let (around, unused) = (model.around, model.never_used());
        let expected = Account { anon_bytes, huge_bytes: 0, file_bytes, table_bytes, faults, around, unused };
        assert_eq!(found, expected, "step {n}, {step:?}");
        assert_eq!(real.heap_end().0, model.heap.end, "step {n}, {step:?}");

        let mut mappings = Vec::new();
        real.for_each_vma(|vma| {
            let shown = match &vma.backing {
                Backing::Anonymous => None,
                Backing::File { file, first } => {
                    self.real.caches.iter().position(|c| c.same(file)).map(|id| (id, *first))
                }
            };
            mappings.push((vma.range, vma.prot, vma.flags, shown));
        });
        let expected: Vec<_> = model
            .areas
            .mappings()
            .into_iter()
            .map(|(range, area)| (super::calls::bytes_of(&range), area.prot, area.flags, area.shows.file()))
            .collect();
        assert_eq!(mappings, expected, "step {n}, {step:?}");
        assert_eq!(real.vma_count(), expected.len(), "step {n}, {step:?}");
    }

    /// What lies in the tables, and what should; of each page the first `words` words are compared.
    fn compare_entries(&self, space: usize, words: usize) {
        let (real, model) = (&self.real.spaces[space], &self.spaces[space]);
        let found = check(real);
        assert_eq!(found.present, model.entries.len() as u64, "entries");
        for (&page, expected) in &model.entries {
            let (raw, level) = entry(real, VirtAddr(page * PAGE_SIZE));
            let (frame, attrs) = (X86_64::frame(raw, level), X86_64::attrs(raw));
            let frame = frame.unwrap_or_else(|| panic!("page {page:#x} is not mapped, but {expected:?} is"));
            let area = model.areas.at(page).unwrap_or_else(|| panic!("page {page:#x} is in no mapping"));
            let writable = match expected {
                Entry::Zero => false,
                Entry::File { writable, .. } => *writable,
                Entry::Own(_) => area.prot.contains(Prot::WRITE),
            };
            let used = !matches!(expected, Entry::File { used: false, .. });
            let rights = |attrs: Attrs| {
                [Attrs::WRITE, Attrs::EXEC, Attrs::NONE, Attrs::ACCESSED].map(|a| attrs.contains(a))
            };
            let expected_rights = [writable, area.prot.contains(Prot::EXEC), area.prot.is_empty(), used];
            assert_eq!(rights(attrs), expected_rights, "page {page:#x}: writable, executable, none, used");
            let bytes = model.bytes(&self.files, page, &area);
            let cells = &self.machine.cells(frame)[..words];
            let differs = cells.iter().zip(bytes.chunks(8)).position(|(cell, bytes)| {
                cell.load(std::sync::atomic::Ordering::Acquire).to_le_bytes() != *bytes
            });
            assert_eq!(differs, None, "page {page:#x}: this word is not as it should be");
        }
    }
}

fn sized(range: &Range<u64>) -> (VirtAddr, u64) {
    (VirtAddr(range.start * PAGE_SIZE), (range.end - range.start) * PAGE_SIZE)
}
