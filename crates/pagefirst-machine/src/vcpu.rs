//! A virtual CPU: loads, stores and fetches of user addresses, by the thread that is the CPU.
//!
//! The life of an access: under the CPU's TLB lock, translate (from the TLB, or by a walk) and touch the frame; if
//! that is refused, give the lock back, let the library answer the fault, and try again. The library is never called
//! with the TLB lock held, so a shootdown waits for one access at most.

use crate::arena::WORDS;
use crate::bytes;
use crate::config::Mistake;
use crate::history::{Answer, Event};
use crate::machine::Machine;
use crate::sync::again;
use crate::trap::Trap;
use crate::walk::Context;
use pagefirst::arch::{Format, X86_64};
use pagefirst::fault::Outcome;
use pagefirst::platform::Platform;
use pagefirst::space::AddressSpace;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Release};

/// What faults of one vCPU came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FaultCounts {
    /// Calls of the library's fault path.
    pub faults: u64,
    /// Faults that mapped something.
    pub mapped: u64,
    /// Of these, the ones that read from a file.
    pub major: u64,
    /// Of these, the ones that mapped a huge page.
    pub huge: u64,
    /// Neighbours mapped beside.
    pub around: u64,
    /// Faults that found nothing to do.
    pub spurious: u64,
    /// Faults that had to wait.
    pub blocked: u64,
    /// Faults that ended as a [`Trap`].
    pub errors: u64,
    /// The most calls of the library's fault path that one access took.
    pub most: u64,
}

/// The CPU that this thread is, to run user code on.
///
/// ```
/// use pagefirst::policy::Policy;
/// use pagefirst::space::{AddressSpace, Map};
/// use pagefirst::types::Prot;
/// use pagefirst_machine::{Config, Machine};
/// use std::sync::Arc;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let machine: &'static Machine = Machine::new(Config::default());
/// let space = Arc::new(AddressSpace::new(machine, Policy::default())?);
/// let at = space.map(Map::anonymous(64 << 10, Prot::READ | Prot::WRITE))?.range.start;
/// let mut vcpu = machine.vcpu();
/// vcpu.switch_to(&space);
/// vcpu.store(at, b"hello")?;
/// assert_eq!(vcpu.load_u64(at)?, u64::from_le_bytes(*b"hello\0\0\0"));
/// # Ok(())
/// # }
/// ```
pub struct Vcpu<F: Format = X86_64> {
    machine: &'static Machine<F>,
    cpu: usize,
    running: Option<Running<F>>,
    counts: FaultCounts,
    /// It is this thread's alone.
    thread: PhantomData<*mut ()>,
}

struct Running<F: Format> {
    space: Arc<AddressSpace<Machine<F>>>,
    at: Context,
}

impl<F: Format> Machine<F> {
    /// The CPU that this thread is.
    ///
    /// # Panics
    /// When there are more threads than CPUs, or when this thread has a [`Vcpu`] already.
    pub fn vcpu(&'static self) -> Vcpu<F> {
        let cpu = self.this_cpu();
        assert!(!self.cpus[cpu].running.swap(true, AcqRel), "this thread has a vCPU already");
        Vcpu { machine: self, cpu, running: None, counts: FaultCounts::default(), thread: PhantomData }
    }
}

impl<F: Format> Vcpu<F> {
    /// The CPU's number.
    pub fn cpu(&self) -> usize {
        self.cpu
    }
    /// The machine.
    pub fn machine(&self) -> &'static Machine<F> {
        self.machine
    }
    /// What its faults came to.
    pub fn counts(&self) -> FaultCounts {
        self.counts
    }
    /// The space it runs.
    pub fn space(&self) -> Option<&Arc<AddressSpace<Machine<F>>>> {
        self.running.as_ref().map(|r| &r.space)
    }

    /// Leaves the space it runs and enters another.
    pub fn switch_to(&mut self, space: &Arc<AddressSpace<Machine<F>>>) {
        self.leave();
        let table = space.page_table();
        let at = Context { tag: table.tag(), root: table.activate(self.cpu) };
        self.machine.record(Event::Enter { tag: at.tag });
        self.running = Some(Running { space: space.clone(), at });
    }

    /// Leaves the space it runs. Its translations are flushed, unless the machine keeps them by tag.
    pub fn leave(&mut self) {
        let Some(Running { space, at }) = self.running.take() else { return };
        let cpu = &self.machine.cpus[self.cpu];
        self.machine.record(Event::Leave { tag: at.tag });
        if !self.machine.config.keep_tags {
            if self.machine.config.plant != Some(Mistake::LeaveWithoutFlush) {
                cpu.mmu.lock().drop_tag(at.tag);
            }
            space.page_table().deactivate(self.cpu);
        }
    }

    /// Performs an access to one byte, without its data.
    ///
    /// # Errors
    /// [`Trap`].
    #[inline]
    pub fn touch(&mut self, addr: VirtAddr, access: Access) -> Result<(), Trap> {
        self.with(addr, access, |_| ())
    }

    /// Fetches an instruction.
    ///
    /// # Errors
    /// [`Trap`].
    pub fn fetch(&mut self, addr: VirtAddr) -> Result<u8, Trap> {
        let mut byte = [0];
        self.with(addr, Access::Execute, |frame| bytes::load(frame, offset(addr), &mut byte))?;
        Ok(byte[0])
    }

    /// Loads bytes.
    ///
    /// # Errors
    /// [`Trap`] at the first address that cannot be read; what comes before it is loaded.
    pub fn load(&mut self, addr: VirtAddr, to: &mut [u8]) -> Result<(), Trap> {
        let mut at = addr;
        let mut rest = to;
        while !rest.is_empty() {
            let n = rest.len().min(PAGE_SIZE as usize - offset(at));
            let (now, later) = rest.split_at_mut(n);
            self.with(at, Access::Read, |frame| bytes::load(frame, offset(at), now))?;
            (at, rest) = (VirtAddr(at.0.wrapping_add(n as u64)), later);
        }
        Ok(())
    }

    /// Stores bytes.
    ///
    /// # Errors
    /// [`Trap`] at the first address that cannot be written; what comes before it is stored.
    pub fn store(&mut self, addr: VirtAddr, from: &[u8]) -> Result<(), Trap> {
        let mut at = addr;
        let mut rest = from;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(PAGE_SIZE as usize - offset(at)));
            self.with(at, Access::Write, |frame| bytes::store(frame, offset(at), now))?;
            (at, rest) = (VirtAddr(at.0.wrapping_add(now.len() as u64)), later);
        }
        Ok(())
    }

    /// Loads a byte.
    ///
    /// # Errors
    /// [`Trap`].
    pub fn load_u8(&mut self, addr: VirtAddr) -> Result<u8, Trap> {
        let mut byte = [0];
        self.load(addr, &mut byte)?;
        Ok(byte[0])
    }
    /// Stores a byte.
    ///
    /// # Errors
    /// [`Trap`].
    pub fn store_u8(&mut self, addr: VirtAddr, value: u8) -> Result<(), Trap> {
        self.store(addr, &[value])
    }
    /// Loads eight bytes, little-endian.
    ///
    /// # Errors
    /// [`Trap`].
    pub fn load_u64(&mut self, addr: VirtAddr) -> Result<u64, Trap> {
        let mut bytes = [0; 8];
        self.load(addr, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
    /// Stores eight bytes, little-endian.
    ///
    /// # Errors
    /// [`Trap`].
    pub fn store_u64(&mut self, addr: VirtAddr, value: u64) -> Result<(), Trap> {
        self.store(addr, &value.to_le_bytes())
    }
    /// Adds to eight aligned bytes in one atomic step; returns what was there.
    ///
    /// # Errors
    /// [`Trap`].
    ///
    /// # Panics
    /// When the address is not aligned.
    pub fn fetch_add_u64(&mut self, addr: VirtAddr, n: u64) -> Result<u64, Trap> {
        assert!(addr.is_aligned(8), "an atomic access to {addr}, which is not aligned");
        self.with(addr, Access::Write, |frame| frame[offset(addr) / 8].fetch_add(n, AcqRel))
    }

    /// Translates and, under the TLB lock, runs `f` on the frame; faults as often as it takes.
    #[inline]
    fn with<R>(
        &mut self,
        addr: VirtAddr,
        access: Access,
        f: impl FnOnce(&[AtomicU64; WORDS]) -> R,
    ) -> Result<R, Trap> {
        let machine = self.machine;
        let Some(running) = &self.running else { panic!("an access on a vCPU that runs no space") };
        let at = running.at;
        let mut spurious = 0;
        let before = self.counts.faults;
        loop {
            {
                let mut mmu = machine.cpus[self.cpu].mmu.lock();
                if let Ok(pfn) = machine.translate(self.cpu, &mut mmu, at, addr, access) {
                    if let Some(shadow) = &machine.shadow {
                        machine.require(shadow.is_page(pfn, "used"));
                        if access == Access::Execute && !machine.config.fetch_sees_stores {
                            machine.require(shadow.is_synced(pfn));
                        }
                    }
                    return Ok(f(machine.arena.words(pfn)));
                }
            }
            let answer = self.fault(addr, access);
            self.counts.most = self.counts.most.max(self.counts.faults - before);
            if answer? == Answer::Spurious {
                again();
                spurious += 1;
                if spurious == machine.config.livelock {
                    machine.fail(&format!("{access:?} at {addr}: {spurious} faults in a row did nothing"));
                }
                // Whoever splits a huge page there may be a thread that the host lets wait for this one.
                machine.relax();
            } else {
                spurious = 0;
            }
        }
    }

    /// Lets the library answer a fault; waits while it is blocked.
    #[cold]
    fn fault(&mut self, addr: VirtAddr, access: Access) -> Result<Answer, Trap> {
        let machine = self.machine;
        machine.stop_if_failed();
        let Some(Running { space, at }) = &self.running else { unreachable!("checked by `with`") };
        let mut waited = None;
        loop {
            machine.cpus[self.cpu].counters.fault();
            self.counts.faults += 1;
            machine.record(Event::Fault { tag: at.tag, addr, access });
            let answered = |answer| machine.record(Event::Answer { addr, answer });
            let outcome = match waited.take() {
                Some(ticket) => space.retry(addr, access, ticket),
                None => space.fault(addr, access),
            };
            match outcome {
                Outcome::Mapped { major, huge, around } => {
                    answered(Answer::Mapped);
                    self.counts.mapped += 1;
                    self.counts.major += major as u64;
                    self.counts.huge += huge as u64;
                    self.counts.around += around as u64;
                    return Ok(Answer::Mapped);
                }
                Outcome::Spurious => {
                    answered(Answer::Spurious);
                    self.counts.spurious += 1;
                    return Ok(Answer::Spurious);
                }
                Outcome::Blocked(ticket) => {
                    answered(Answer::Blocked);
                    self.counts.blocked += 1;
                    while !ticket.is_ready() {
                        machine.relax();
                    }
                    waited = Some(ticket);
                }
                Outcome::Error(error) => {
                    answered(Answer::Error);
                    self.counts.errors += 1;
                    return Err(Trap { addr, access, error });
                }
            }
        }
    }
}

#[inline]
fn offset(addr: VirtAddr) -> usize {
    (addr.0 % PAGE_SIZE) as usize
}

impl<F: Format> Drop for Vcpu<F> {
    fn drop(&mut self) {
        self.leave();
        self.machine.cpus[self.cpu].running.store(false, Release);
    }
}
