//! Steps on files: made on both, and what came of them compared.

use super::case::{Case, wait};
use super::files::pages_of;
use super::plan::{MEMORY, Step};
use pagefirst::arch::Format;
use pagefirst::file::{ReadError, ShmemHuge, WriteBackError, WriteError};
use pagefirst::types::PAGE_SIZE;
use std::ops::Range;

impl<F: Format> Case<F> {
    pub fn read_file(&mut self, step: &Step, file: usize, at: u64, len: usize) {
        let (machine, cache) = (self.machine, self.real.caches[file].clone());
        let read = self.crew.on(step.cpu, move |_| {
            let mut bytes = vec![0; len];
            let mut done = 0;
            while done < len {
                match cache.read_at(machine, at + done as u64, &mut bytes[done..]) {
                    Ok(0) => break,
                    Ok(n) => done += n,
                    Err(ReadError::Blocked(ticket)) => wait(machine, &ticket),
                    // As of what was begun by one call.
                    Err(_) if done > 0 => break,
                    Err(why) => return Err(why),
                }
            }
            bytes.truncate(done);
            Ok(bytes)
        });
        let short = self.is_short();
        // What is not there of a memory file is zero: it is not fetched to be read.
        let fetches = file != MEMORY;
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
            if fetches {
                file.fetch(at / PAGE_SIZE);
            }
        }
    }

    pub fn write_file(&mut self, step: &Step, file: usize, at: u64, bytes: Vec<u8>) {
        let (machine, cache, from) = (self.machine, self.real.caches[file].clone(), bytes.clone());
        let written = match self.crew.on(step.cpu, move |_| {
            let mut done = 0;
            while done < from.len() {
                match cache.write_at(machine, at + done as u64, &from[done..]) {
                    Ok(n) => done += n,
                    Err(WriteError::Page(ReadError::Blocked(ticket))) => wait(machine, &ticket),
                    Err(_) if done > 0 => break,
                    Err(why) => return Err(why),
                }
            }
            Ok(done)
        }) {
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

    pub fn resize(&mut self, step: &Step, file: usize, size: u64) {
        let (machine, cache) = (self.machine, self.real.caches[file].clone());
        self.crew.on(step.cpu, move |_| cache.set_size(machine, size));
        let lost = pages_of(size)..u64::MAX;
        self.spaces.iter_mut().for_each(|space| space.lose(file, &lost, false));
        self.files[file].resize(size);
    }

    pub fn punch(&mut self, step: &Step, file: usize, hole: Range<u64>) {
        let (machine, cache, bytes) = (self.machine, self.real.caches[file].clone(), hole.clone());
        self.crew.on(step.cpu, move |_| cache.punch(machine, bytes));
        let lost = pages_of(hole.start)..hole.end / PAGE_SIZE;
        self.spaces.iter_mut().for_each(|space| space.lose(file, &lost, true));
        self.files[file].punch(&hole);
    }

    pub fn evict(&mut self, step: &Step, file: usize) {
        if !self.is_alone() {
            // So that it is known what is clean.
            self.write_back(step, file);
        }
        let (machine, cache) = (self.machine, self.real.caches[file].clone());
        // A read that is not over keeps its page.
        self.settle();
        let found = self.crew.on(step.cpu, move |_| cache.evict(machine));
        if self.files[file].huge != ShmemHuge::Never {
            // Whole folios go that nobody wrote to: they are zero, and come back so.
            return;
        }
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

    pub fn write_back(&mut self, step: &Step, file: usize) {
        let (machine, cache) = (self.machine, self.real.caches[file].clone());
        let alone = self.is_alone();
        let write_back = move || {
            let stored = cache.write_back(machine)?;
            // What it missed while others were at work is dirty still.
            while !alone && cache.write_back(machine)? > 0 {}
            Ok(stored)
        };
        let stored = match self.crew.on(step.cpu, move |_| write_back()) {
            Err(WriteBackError::NoMemory(_)) if self.is_short() => return,
            stored => stored.unwrap_or_else(|e| panic!("{step:?}: {e}")),
        };
        let spaces = &mut self.spaces;
        let model = &mut self.files[file];
        if file == MEMORY {
            return assert_eq!(stored, 0, "{step:?}: it is stored nowhere");
        }
        let dirty = model.cached.values().filter(|dirty| **dirty).count() as u64;
        // A fault that others made look again may have marked a page that was not written to then.
        assert!(stored <= dirty || !alone, "{step:?}: {stored} pages stored, {dirty} were written");
        for (index, dirty) in &mut model.cached {
            if std::mem::take(dirty) {
                spaces.iter_mut().for_each(|space| space.clean(file, *index, model.tracks));
            }
        }
    }
}
