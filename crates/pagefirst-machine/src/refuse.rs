//! Memory that is refused: every attempt of the library to have some can be made to fail, to see what happens then.
//!
//! An attempt is known by its place in the library's code, its *site*. With a directory in `PAGEFIRST_SITES`, the sites that
//! were seen, and those that were refused, are written there, by process: so it is known of each whether it ever failed
//! (`cargo xtask oom`). In release builds nothing is asked.

use crate::machine::Machine;
use pagefirst::arch::Format;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::panic::Location;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::thread::ThreadId;

/// Which attempts fail, counted from 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refuse {
    /// This one alone.
    One(u64),
    /// This one, and later ones at its site.
    Site(u64),
    /// The same for two of them.
    Sites(u64, u64),
    /// This one and all later ones.
    From(u64),
}

/// What came of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Attempts {
    /// Attempts in all.
    pub made: u64,
    /// Of these, refused.
    pub refused: u64,
}

struct Plan {
    refuse: Refuse,
    /// Whose attempts.
    thread: ThreadId,
    sites: [Option<&'static Location<'static>>; 2],
    attempts: Attempts,
}

impl Plan {
    fn refuses_site(&mut self, now: u64, from: [u64; 2], site: &'static Location<'static>) -> bool {
        for (from, refused) in from.into_iter().zip(&mut self.sites) {
            if now == from {
                *refused = Some(site);
            }
        }
        self.sites.contains(&Some(site))
    }
}

#[derive(Default)]
pub(crate) struct Refusals {
    planned: AtomicBool,
    plan: Mutex<Option<Plan>>,
}

impl Refusals {
    pub fn refuses(&self, site: &'static Location<'static>) -> bool {
        record("seen", site);
        let refused = self.planned.load(Acquire) && self.is_refused(site);
        if refused {
            record("refused", site);
        }
        refused
    }
    fn is_refused(&self, site: &'static Location<'static>) -> bool {
        let mut plan = self.plan.lock();
        let Some(plan) = plan.as_mut().filter(|plan| plan.thread == std::thread::current().id()) else {
            return false;
        };
        let now = plan.attempts.made;
        plan.attempts.made += 1;
        let refused = match plan.refuse {
            Refuse::One(n) => now == n,
            Refuse::From(n) => now >= n,
            Refuse::Site(n) => plan.refuses_site(now, [n, u64::MAX], site),
            Refuse::Sites(n, m) => plan.refuses_site(now, [n, m], site),
        };
        plan.attempts.refused += refused as u64;
        refused
    }
}

impl<F: Format> Machine<F> {
    /// Runs `f`, in which attempts of this thread to have memory fail.
    pub fn refusing<R>(&'static self, refuse: Refuse, f: impl FnOnce() -> R) -> (R, Attempts) {
        let thread = std::thread::current().id();
        let plan = Plan { refuse, thread, sites: [None; 2], attempts: Attempts::default() };
        assert!(self.refusals.plan.lock().replace(plan).is_none(), "two plans at once");
        self.refusals.planned.store(true, Release);
        let result = f();
        self.refusals.planned.store(false, Release);
        let plan = self.refusals.plan.lock().take();
        (result, plan.map(|plan| plan.attempts).unwrap_or_default())
    }
}

fn directory() -> Option<&'static PathBuf> {
    static DIRECTORY: OnceLock<Option<PathBuf>> = OnceLock::new();
    DIRECTORY.get_or_init(|| std::env::var_os("PAGEFIRST_SITES").map(PathBuf::from)).as_ref()
}

/// Writes a site down the first time that it is met in this process.
fn record(what: &'static str, site: &'static Location<'static>) {
    static KNOWN: Mutex<BTreeSet<(&str, usize)>> = Mutex::new(BTreeSet::new());
    let Some(directory) = directory() else { return };
    if KNOWN.lock().insert((what, std::ptr::from_ref(site) as usize)) {
        note_down(directory, &format!("{what} {site}"));
    }
}

/// Adds to the number of points at which memory was refused.
pub fn count_points(points: u64) {
    if let Some(directory) = directory() {
        note_down(directory, &format!("points {points}"));
    }
}

fn note_down(directory: &std::path::Path, line: &str) {
    let path = directory.join(std::process::id().to_string());
    let file = OpenOptions::new().create(true).append(true).open(&path);
    // In one piece: other threads write as well.
    let written = file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
    written.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}
