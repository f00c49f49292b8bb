//! The vCPUs that perform a recording's touches.

use super::engine::Space;
use pagefirst::fault::Signal;
use pagefirst::types::{Access as Do, NoMemory, VirtAddr};
use pagefirst_machine::{Machine, Trap, Vcpu};
use pagefirst_record::{Access, ThreadId};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Touches of one vCPU that wait to be performed.
type Work = Vec<(VirtAddr, Do)>;
/// What a vCPU is to do.
enum Order {
    Touch(Work),
    SwitchTo(Arc<Space>),
}
/// The list they were in, and how many were refused, as SIGSEGV and as SIGBUS.
type Done = (Work, Result<(u64, u64), NoMemory>);

/// The vCPUs: one here, or several on threads of their own.
pub enum Crew {
    One { vcpu: Box<Vcpu>, refused: (u64, u64) },
    Many { workers: Vec<Worker>, refused: (u64, u64) },
}

pub struct Worker {
    work: Work,
    give: Sender<Order>,
    take: Receiver<Done>,
    busy: bool,
}

fn perform(vcpu: &mut Vcpu, addr: VirtAddr, access: Do, refused: &mut (u64, u64)) -> Result<(), NoMemory> {
    let Err(trap) = vcpu.touch(addr, access) else { return Ok(()) };
    count(&trap, refused)
}

fn count(trap: &Trap, refused: &mut (u64, u64)) -> Result<(), NoMemory> {
    match trap.signal() {
        Some((Signal::Segv, _)) => refused.0 += 1,
        Some((Signal::Bus, _)) => refused.1 += 1,
        None => return Err(NoMemory),
    }
    Ok(())
}

impl Crew {
    pub fn new<'s>(
        scope: &'s std::thread::Scope<'s, '_>,
        machine: &'static Machine,
        space: &Arc<Space>,
        cpus: usize,
    ) -> Self {
        if cpus == 1 {
            let mut vcpu = Box::new(machine.vcpu());
            vcpu.switch_to(space);
            return Crew::One { vcpu, refused: (0, 0) };
        }
        let workers = (0..cpus).map(|_| {
            let (give, orders) = channel::<Order>();
            let (done, take) = channel();
            let space = space.clone();
            scope.spawn(move || {
                let mut vcpu = machine.vcpu();
                vcpu.switch_to(&space);
                drop(space); // it is the vCPU that leaves it
                while let Ok(order) = orders.recv() {
                    let mut work = match order {
                        Order::Touch(work) => work,
                        Order::SwitchTo(space) => {
                            vcpu.switch_to(&space);
                            continue;
                        }
                    };
                    let mut refused = (0, 0);
                    let all = work.drain(..).try_for_each(|(a, d)| perform(&mut vcpu, a, d, &mut refused));
                    if done.send((work, all.map(|()| refused))).is_err() {
                        break;
                    }
                }
            });
            Worker { work: Vec::new(), give, take, busy: false }
        });
        Crew::Many { workers: workers.collect(), refused: (0, 0) }
    }

    pub fn touch(&mut self, thread: ThreadId, addr: VirtAddr, access: Access) -> Result<(), NoMemory> {
        let access = match access {
            Access::Read => Do::Read,
            Access::Write => Do::Write,
            Access::Execute => Do::Execute,
        };
        match self {
            Crew::One { vcpu, refused } => perform(vcpu, addr, access, refused),
            Crew::Many { workers, .. } => {
                let n = workers.len();
                workers[thread.0 as usize % n].work.push((addr, access));
                Ok(())
            }
        }
    }

    /// Waits until every touch so far is done.
    pub fn settle(&mut self) -> Result<(), NoMemory> {
        let Crew::Many { workers, refused } = self else { return Ok(()) };
        for worker in workers.iter_mut().filter(|w| !w.work.is_empty()) {
            worker.busy = worker.give.send(Order::Touch(std::mem::take(&mut worker.work))).is_ok();
        }
        let mut all = Ok(());
        for worker in workers.iter_mut().filter(|w| w.busy) {
            worker.busy = false;
            // A worker ends only when the machine panicked; the scope passes that on.
            let Ok((work, done)) = worker.take.recv() else { continue };
            worker.work = work;
            match done {
                Ok((segv, bus)) => *refused = (refused.0 + segv, refused.1 + bus),
                Err(error) => all = Err(error),
            }
        }
        all
    }

    /// Enters another space. Called when all touches are done.
    pub fn switch_to(&mut self, space: &Arc<Space>) {
        match self {
            Crew::One { vcpu, .. } => vcpu.switch_to(space),
            Crew::Many { workers, .. } => workers.iter().for_each(|worker| {
                let _ = worker.give.send(Order::SwitchTo(space.clone())); // ended: see `settle`
            }),
        }
    }

    /// How many touches were refused since this was last asked, as SIGSEGV and as SIGBUS.
    pub fn take_refused(&mut self) -> (u64, u64) {
        match self {
            Crew::One { refused, .. } | Crew::Many { refused, .. } => std::mem::take(refused),
        }
    }
}
