//! Follows the program and the processes that it makes.

use std::collections::HashMap;
use std::io::{Read, Write};

use super::RecordError;
use super::files::base_name;
use super::raw::{FIRST_PROCESS, Raw, Records};
use super::translate::{Output, Translator};
use crate::event::{Event, Loss, LossKind, Native, ProcessId, ThreadId, Trailer};
use crate::wire::LOSS_LIMIT;

/// An `execve` that has begun.
struct Exec {
    thread: ThreadId,
    /// The accesses of the program that calls it.
    accesses: u64,
    name: String,
}

/// A process that has not ended.
struct Process {
    id: ProcessId,
    translator: Translator,
    /// What `execve` puts on the stack of the program that is next to begin.
    argument_bytes: u64,
    executing: Option<Exec>,
    /// The accesses of the programs that it ran before.
    accesses: u64,
}

/// The program and the processes that it made.
pub(super) struct Processes<W: Write> {
    out: Output<W>,
    /// By key.
    living: HashMap<u64, Process>,
    /// How many there have been.
    count: u32,
    started: bool,
    losses: Vec<Loss>,
    accesses: u64,
}

impl<W: Write> Processes<W> {
    /// The first one, with what `execve` puts on its stack.
    pub(super) fn new(out: Output<W>, argument_bytes: u64) -> Self {
        let first = Process {
            id: ProcessId(0),
            translator: Translator::default(),
            argument_bytes,
            executing: None,
            accesses: 0,
        };
        let living = HashMap::from([(FIRST_PROCESS, first)]);
        Self { out, living, count: 1, started: false, losses: Vec::new(), accesses: 0 }
    }

    /// The program has begun.
    pub(super) fn started(&self) -> bool {
        self.started
    }

    /// Follows the stream to its end, when all processes have ended.
    pub(super) fn all(&mut self, stream: &mut impl Read) -> Result<(), RecordError> {
        let mut records = Records::new(stream);
        while let Some((key, raw)) = records.next()? {
            self.record(key, raw)?;
        }
        Ok(())
    }

    /// Ends the processes that did not say that they end, and writes the trailer.
    pub(super) fn finish(mut self, exit_status: i32, native: Option<Native>) -> Result<Trailer, RecordError> {
        let mut rest: Vec<_> = self.living.drain().map(|(_, process)| process).collect();
        rest.sort_by_key(|process| process.id);
        for process in rest {
            let status = (process.id == ProcessId(0)).then_some(exit_status);
            let mut accesses = process.accesses;
            match process.executing {
                Some(exec) => {
                    accesses += exec.accesses;
                    self.lose(process.id, LossKind::Exec, exec.name);
                }
                None => self.lose(process.id, LossKind::Cut, String::new()),
            }
            self.end(process.id, status, accesses)?;
        }
        let Self { out, losses, accesses, .. } = self;
        let trailer = Trailer { accesses, exit_status, losses, native, ..Trailer::default() };
        out.finish(trailer).map_err(super::doing("writing the recording"))
    }

    fn end(&mut self, id: ProcessId, exit_status: Option<i32>, accesses: u64) -> Result<(), RecordError> {
        self.accesses += accesses;
        self.out.emit(id, Event::End { exit_status, accesses })
    }

    fn lose(&mut self, process: ProcessId, kind: LossKind, name: String) {
        let full = self.losses.len() as u64 == LOSS_LIMIT;
        let same = |loss: &&mut Loss| (loss.process, loss.kind, &loss.name) == (process, kind, &name);
        match self.losses.iter_mut().find(same) {
            Some(loss) => loss.count += 1,
            None if full => {}
            None => self.losses.push(Loss { process, kind, name, count: 1 }),
        }
    }

    fn record(&mut self, key: u64, raw: Raw) -> Result<(), RecordError> {
        let unknown = || RecordError::Stream { expected: "a process that is there", found: key };
        let process = self.living.get_mut(&key).ok_or_else(unknown)?;
        match raw {
            Raw::Maps(maps) => {
                self.started = true;
                if let Some(exec) = process.executing.take() {
                    let event = Event::Exec { thread: exec.thread, program: exec.name };
                    self.out.emit(process.id, event)?;
                    process.accesses += exec.accesses;
                    process.translator = process.translator.anew();
                }
                process.translator.initial(&mut self.out, &maps, process.argument_bytes)
            }
            Raw::Fork { thread, child: key, shares_memory } => {
                let child = ProcessId(self.count);
                self.count += 1;
                self.out.emit(process.id, Event::Fork { thread, child, shares_memory })?;
                let translator = process.translator.child(child);
                let born = Process { id: child, translator, argument_bytes: 0, executing: None, accesses: 0 };
                self.living.insert(key, born);
                Ok(())
            }
            Raw::ForkFailed { child } => match self.living.remove(&child) {
                Some(child) => self.end(child.id, None, 0),
                None => Err(unknown()),
            },
            Raw::Exec { thread, accesses, argument_bytes, name } => {
                process.argument_bytes = argument_bytes;
                process.executing = Some(Exec { thread, accesses, name: base_name(&name) });
                Ok(())
            }
            Raw::ExecFailed => {
                process.executing = None;
                Ok(())
            }
            Raw::End { accesses, exit_status } => {
                let (id, accesses) = (process.id, process.accesses + accesses);
                self.living.remove(&key);
                self.end(id, exit_status, accesses)
            }
            other => process.translator.record(&mut self.out, other),
        }
    }
}
