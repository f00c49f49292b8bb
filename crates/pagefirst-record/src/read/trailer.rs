//! Reads what a recording ends with.

use std::io::{BufRead, Read};

use super::Recording;
use crate::error::{FormatError, Problem};
use crate::event::{Loss, LossKind, Native, NativeRun, ProcessId, Trailer};
use crate::wire::{LOSS_LIMIT, NATIVE_LIMIT};

impl<R: Read> Recording<R> {
    pub(super) fn read_trailer(&mut self) -> Result<Trailer, FormatError> {
        let living = self.others.keys().min().copied().or((!self.current.ended).then_some(self.process));
        if let Some(process) = living {
            return Err(self.input.error(Problem::NotEnded { process: process.0 }));
        }
        let touches = self.input.number("the number of touches")?;
        let unexplained = self.input.number("the number of unexplained touches")?;
        let accesses = self.input.number("the number of accesses")?;
        let exit_status = self.exit_status()?;
        let mut losses = Vec::new();
        for _ in 0..self.input.below("the number of losses", LOSS_LIMIT + 1)? {
            let process = self.input.below("a process's number", self.processes.into())?;
            let process = ProcessId(process as u32);
            let kind = match self.input.byte("a loss's kind")? {
                0 => LossKind::Exec,
                1 => LossKind::Cut,
                found => return Err(self.input.value("a loss's kind, 0 or 1", found.into())),
            };
            let name = self.input.text("a loss's name")?;
            losses.push(Loss { process, kind, name, count: self.input.number("a loss's count")? });
        }
        let native = match self.input.below("the number of native runs", NATIVE_LIMIT + 1)? {
            0 => None,
            runs => Some(self.native(runs)?),
        };
        self.input.end()?;
        let after_frame = self.input.stream.get_mut().get_mut().fill_buf().map(<[u8]>::is_empty);
        match after_frame {
            Ok(true) => {}
            Ok(false) => return Err(self.input.error(Problem::TrailingBytes)),
            Err(error) => return Err(self.input.error(Problem::Io(error))),
        }
        if touches != self.touches {
            return Err(self.input.error(Problem::Count { expected: touches, found: self.touches }));
        }
        Ok(Trailer { touches, unexplained, accesses, exit_status, losses, native })
    }

    fn native(&mut self, runs: u64) -> Result<Native, FormatError> {
        let kernel = self.input.text("the kernel's release")?;
        let huge_pages = self.input.text("the kernel's setting of huge pages")?;
        let run = |_| {
            Ok(NativeRun {
                minor_faults: self.input.number("native minor faults")?,
                major_faults: self.input.number("native major faults")?,
                vm_hwm_kib: self.input.number("the native VmHWM")?,
                vm_pte_kib: self.input.number("the native VmPTE")?,
                exit_status: self.exit_status()?,
            })
        };
        Ok(Native { kernel, huge_pages, runs: (0..runs).map(run).collect::<Result<_, FormatError>>()? })
    }

    fn exit_status(&mut self) -> Result<i32, FormatError> {
        Ok(self.input.below("an exit status", 256)? as i32)
    }
}
