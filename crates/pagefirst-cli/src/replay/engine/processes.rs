//! Processes: made by forks, running one program after another, ending.

use super::super::Huge;
use super::super::crew::Crew;
use super::super::place::Placer;
use super::super::touched::Touched;
use super::{Engine, Options, Process, Program, Space};
use pagefirst::types::NoMemory;
use pagefirst_machine::Machine;
use pagefirst_record::ProcessId;
use std::sync::Arc;

impl Process {
    pub(super) fn new(
        machine: &'static Machine,
        options: &Options,
        number: ProcessId,
        program: &str,
    ) -> Result<Self, NoMemory> {
        let placer = Placer::new(options.place);
        let space = Arc::new(Space::new(machine, options.policy(&placer))?);
        let touched = (options.huge == Huge::Always).then(Touched::default);
        Ok(Process::running(number, program, space, placer, Vec::new(), touched))
    }
    fn running(
        number: ProcessId,
        program: &str,
        space: Arc<Space>,
        placer: Placer,
        bases: Vec<u64>,
        touched: Option<Touched>,
    ) -> Self {
        let program = program.to_owned();
        let (touches, refused, calls, failed) = (0, (0, 0), 0, 0);
        Process {
            number,
            program,
            space,
            placer,
            bases,
            touched,
            touches,
            refused,
            calls,
            failed,
            ended: false,
        }
    }
    /// A copy of it.
    fn fork(&self, number: ProcessId) -> Result<Self, NoMemory> {
        // Of all the reasons that a mapping call may fail for, this one has no other.
        let space = Arc::new(self.space.fork().map_err(|_| NoMemory)?);
        let (placer, bases, touched) = (self.placer.clone(), self.bases.clone(), self.touched.clone());
        Ok(Process::running(number, &self.program, space, placer, bases, touched))
    }
}

impl Engine<'_> {
    /// Goes on with another process.
    pub(super) fn switch(&mut self, to: ProcessId, crew: &mut Crew) -> Result<(), NoMemory> {
        self.settle(crew)?;
        let next = match self.others.remove(&to) {
            Some(process) => process,
            // The reader sees to it that nobody acts before it is made.
            None => Process::new(self.machine, self.options, to, "")?,
        };
        crew.switch_to(&next.space);
        let before = std::mem::replace(&mut self.now, next);
        if !before.ended {
            self.others.insert(before.number, before);
        }
        Ok(())
    }
    fn settle(&mut self, crew: &mut Crew) -> Result<(), NoMemory> {
        crew.settle()?;
        let (segv, bus) = crew.take_refused();
        self.now.refused = (self.now.refused.0 + segv, self.now.refused.1 + bus);
        Ok(())
    }
    pub(super) fn fork(&mut self, child: ProcessId, crew: &mut Crew) -> Result<(), NoMemory> {
        self.settle(crew)?;
        self.others.insert(child, self.now.fork(child)?);
        Ok(())
    }
    pub(super) fn exec(&mut self, program: &str, crew: &mut Crew) -> Result<(), NoMemory> {
        self.end(crew)?;
        let next = Process::new(self.machine, self.options, self.now.number, program)?;
        crew.switch_to(&next.space);
        self.now = next;
        Ok(())
    }
    /// The process ends, or its program.
    pub(super) fn end(&mut self, crew: &mut Crew) -> Result<(), NoMemory> {
        self.settle(crew)?;
        self.sample();
        let now = &mut self.now;
        now.ended = true;
        let account = now.space.account();
        if now.number == ProcessId(0) {
            self.run.account = account;
            let touched = now.touched.as_ref().map(|touched| touched.of_huge_pages(&now.space));
            self.run.huge_untouched = touched.map_or(0, |touched| account.huge_bytes.saturating_sub(touched));
        }
        let run = &mut self.run;
        run.touches += now.touches;
        run.refused = (run.refused.0 + now.refused.0, run.refused.1 + now.refused.1);
        run.calls += now.calls;
        run.failed += now.failed;
        run.programs.push(Program {
            process: now.number,
            name: now.program.clone(),
            touches: now.touches,
            refused: now.refused,
            calls: now.calls,
            failed: now.failed,
            account,
        });
        Ok(())
    }
    /// The recording ends, and whoever lives yet.
    pub(super) fn end_all(&mut self, crew: &mut Crew) -> Result<(), NoMemory> {
        loop {
            if !self.now.ended {
                self.end(crew)?;
            }
            let Some(next) = self.others.keys().min().copied() else { return Ok(()) };
            self.switch(next, crew)?;
        }
    }
}
