//! Up to four CPUs, each a thread, of which one at a time is at work: so steps are in a total order, and yet each CPU
//! has its own translations, caches and epoch.

use super::kit::Space;
use pagefirst::arch::Format;
use pagefirst_machine::{Machine, Vcpu};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread::JoinHandle;

/// Lets a CPU run a space.
pub fn enter<F: Format>(cpu: &mut Vcpu<F>, space: &Space<F>) {
    if cpu.space().is_none_or(|running| !Arc::ptr_eq(running, space)) {
        cpu.switch_to(space);
    }
}

type Job<F> = Box<dyn FnOnce(&mut Vcpu<F>) + Send>;

struct Worker<F: Format> {
    jobs: Sender<Job<F>>,
    thread: JoinHandle<()>,
}

pub struct Crew<F: Format> {
    machine: &'static Machine<F>,
    /// CPU 0 is this thread.
    here: Vcpu<F>,
    others: Vec<Worker<F>>,
}

impl<F: Format> Crew<F> {
    pub fn new(machine: &'static Machine<F>, cpus: usize) -> Self {
        let here = machine.vcpu();
        let worker = |_| {
            let (jobs, queue) = channel::<Job<F>>();
            let work = move || {
                let mut cpu = machine.vcpu();
                queue.into_iter().for_each(|job| job(&mut cpu));
            };
            Worker { jobs, thread: std::thread::spawn(work) }
        };
        Crew { machine, here, others: (1..cpus).map(worker).collect() }
    }

    /// How many they are.
    pub fn cpus(&self) -> usize {
        1 + self.others.len()
    }
    /// The CPU that is this thread.
    pub fn here(&mut self) -> &mut Vcpu<F> {
        &mut self.here
    }

    /// Runs `job` on one of the CPUs, while the others rest. Its panic becomes one here.
    pub fn on<T: Send + 'static>(
        &mut self,
        cpu: usize,
        job: impl FnOnce(&mut Vcpu<F>) -> T + Send + 'static,
    ) -> T {
        let Some(at) = cpu.checked_sub(1) else { return job(&mut self.here) };
        let (send, receive) = sync_channel(1);
        let job = move |cpu: &mut Vcpu<F>| {
            // The other side waits for it.
            let _ = send.send(job(cpu));
        };
        let sent = self.others[at].jobs.send(Box::new(job)).is_ok();
        match receive.recv() {
            Ok(done) if sent => done,
            _ => match self.others.swap_remove(at).thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => unreachable!("a CPU that left its work"),
            },
        }
    }
}

impl<F: Format> Drop for Crew<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Whatever a CPU waits for will not come.
            self.machine.give_up();
        }
        for Worker { jobs, thread } in self.others.drain(..) {
            drop(jobs);
            let joined = thread.join();
            assert!(joined.is_ok() || std::thread::panicking(), "a CPU ended with a panic");
        }
    }
}
