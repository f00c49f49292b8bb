//! CPUs are threads: which thread is which CPU.
//!
//! A thread claims the lowest free number when it first asks for it and gives it back when it ends.

use crate::sync::{Mutex, thread_local};
use std::cell::{Cell, RefCell};

/// The CPU numbers of one machine.
pub(crate) struct CpuSet {
    taken: Mutex<Vec<bool>>,
}

struct Claim {
    set: &'static CpuSet,
    cpu: usize,
}

impl Drop for Claim {
    fn drop(&mut self) {
        // At the thread's end it may be gone already.
        let _ = LAST.try_with(|last| last.set((0, 0)));
        self.set.taken.lock()[self.cpu] = false;
    }
}

thread_local! {
    /// The claim this thread used last: the set's address and the number.
    static LAST: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
    /// All claims of this thread, one for each machine it uses.
    static CLAIMS: RefCell<Vec<Claim>> = const { RefCell::new(Vec::new()) };
}

impl CpuSet {
    pub fn new(cpus: usize) -> Self {
        CpuSet { taken: Mutex::new(vec![false; cpus]) }
    }

    fn key(&'static self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    /// The number of the CPU that this thread is.
    ///
    /// # Panics
    /// When more threads use the machine than it has CPUs.
    #[inline]
    pub fn current(&'static self) -> usize {
        let (key, cpu) = LAST.with(Cell::get);
        if key == self.key() { cpu } else { self.look() }
    }

    #[cold]
    fn look(&'static self) -> usize {
        CLAIMS.with(|claims| {
            let mut claims = claims.borrow_mut();
            let known = claims.iter().find(|c| std::ptr::eq(c.set, self)).map(|c| c.cpu);
            let cpu = known.unwrap_or_else(|| {
                let cpu = self.claim();
                claims.push(Claim { set: self, cpu });
                cpu
            });
            LAST.with(|last| last.set((self.key(), cpu)));
            cpu
        })
    }

    fn claim(&self) -> usize {
        let mut taken = self.taken.lock();
        let Some(cpu) = taken.iter().position(|t| !t) else {
            let n = taken.len();
            drop(taken);
            panic!("more threads use the machine than it has CPUs ({n})");
        };
        taken[cpu] = true;
        cpu
    }

    /// Gives this thread's number back before it ends.
    pub fn release(&'static self) {
        let claim = CLAIMS.with(|claims| {
            let mut claims = claims.borrow_mut();
            claims.iter().position(|c| std::ptr::eq(c.set, self)).map(|i| claims.swap_remove(i))
        });
        drop(claim);
    }
}

/// Gives all numbers of this thread back before it ends.
pub(crate) fn release_all() {
    let claims = CLAIMS.with(|claims| std::mem::take(&mut *claims.borrow_mut()));
    drop(claims);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(cpus: usize) -> &'static CpuSet {
        Box::leak(Box::new(CpuSet::new(cpus)))
    }

    #[test]
    fn a_thread_keeps_its_number_and_gives_it_back() {
        let (a, b) = (set(2), set(1));
        assert_eq!((a.current(), b.current(), a.current()), (0, 0, 0));
        assert_eq!(std::thread::spawn(move || a.current()).join().ok(), Some(1));
        assert_eq!(
            std::thread::spawn(move || a.current()).join().ok(),
            Some(1),
            "the first one gave it back"
        );
        a.release();
        assert_eq!(std::thread::spawn(move || a.current()).join().ok(), Some(0));
    }

    #[test]
    fn too_many_threads_panic() {
        let a = set(1);
        assert_eq!(a.current(), 0);
        assert!(std::thread::spawn(move || a.current()).join().is_err());
    }
}
