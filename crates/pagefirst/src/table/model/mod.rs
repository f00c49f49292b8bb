//! Models of the tables' protocols for loom: the library's own code over a machine of a few tables.
//!
//! | model | file | what it shows | sentence of `lib.rs` |
//! |---|---|---|---|
//! | `r01_…`, `r02_…` | `install` | one mapping, one table, the other table given back | 1: the slot is what the fault saw |
//! | `r11_…` | `install` | an unmap that announced leaves nothing behind | 2: found before the lock, refused after it |
//! | `c24_install_against_retire` | `install` | an entry never lands in a dead table, the dead table has one owner | 3 |
//! | `r06_short_of_tables_…` | `install` | a table that vanishes when there is no memory for another | 3 |
//! | `dead_table_hides_no_…` | `install` | a dead table says nothing about what came after it | 2 and 3 together |
//! | `c35_…` | `install` | hardware and other walkers see no table before its entries | 1: one store publishes the chain |
//! | `r03_small_against_huge_…` | `huge` | a small or a huge page, never both | 1 |
//! | `huge_page_over_a_dead_table_…` | `huge` | a huge page comes after the flush of the table that was there | |
//! | `r11_huge_page_…` | `huge` | as `r11_…`, for a huge page | 2 |
//! | `r15_…` | `huge` | no bit is lost in a split, and nobody takes it for nothing | |
//! | `x12_write_back_…` | `clean` | no write is lost to write-back | `file::store` |
//! | `take_…` | `take` | what hardware marks is in what is taken, and does not come back | 2 |
//! | `c06_walk_against_retire_and_reuse` | `reuse` | a table found under a pin stays a table | 3: a grace period |
//! | `retire_tags_in_order` | `reuse` | who retires late does not shorten another's grace period | 3 |
//! | `r12_…` | `fork` | a page that fork shared is not reused while somebody reads it | |
//! | `epoch_…` | `epoch` | no reader is overtaken; what it read happened before the reuse | `sync::epoch` |
//! | `link_against_replace` | `epoch` | the same for [`Link`](crate::mem::Link) and the slabs | `mem::shared` |
//! | `link_to_what_is_shared` | `epoch` | what ends with what links to it is read by nobody | `mem::shared` |
//!
//! Beside these, `space::model` has models of whole calls, `file::model` of a page's state, `sync::wait` of waiting.
//!
//! loom's false greens (loom#392) are met as follows: every thread, main included, starts by locking and unlocking
//! one gate; every model is run once for each rotation of its roles, and each mutant it names must die in each. With the
//! roles played in turn ([`is_in_turn`]) it must live in one order at least, unless the model says that it does not.
//!
//! # What is left out on purpose
//! The steps that are most easily forgotten, and the mistakes that forget them:
//!
//! | step | mistake |
//! |---|---|
//! | the look under the lock, whether something was announced | `install_without_validation` |
//! | a table is published after its entries | `publish_relaxed` |
//! | a page is free after the flush | `free_before_flush` |
//! | a table that lost its last entry is dead, and a lock on it fails | `unlock_forgets_dead`, `lock_ignores_dead` |
//! | a table is locked before it is taken for empty | `zap_skips_empty` |
//! | what is unlinked is dead still under its parent's lock | `unlink_without_looking` |
//! | a copy is read-only until the page it replaces is flushed | `copy_writable_at_once` |
//! | that page stays a page until then | `copy_drops_old_before_flush` |
//! | a page on its way out of its file says so | `remove_without_going` |
//! | a page is in its file before it is read | `read_before_insert` |
//! | a mapping is counted before its page is validated | `validate_before_count` |
//!
//! (A zap that had cleared a dead table once had to look again, for a new one. It locks before it reads now, and what was
//! announced is refused after that, so one look is enough: `zap_skips_empty` is that mistake today.)
//!
//! # What loom does not see
//! loom runs every order of a few threads' atomic operations and locks, as far as its bound on preemptions goes, and of
//! weak orders those in which a load sees an older store. The rest is looked at elsewhere:
//!
//! | not seen | why | what looks at it |
//! |---|---|---|
//! | `SeqCst` of loads and stores | loom takes it for `AcqRel` | nothing has to: the library uses `fence(SeqCst)` alone, which loom models |
//! | loads that see stores to come | loom runs one operation after another | reasoned, where `Relaxed` stands; the table's lock or a fence orders what decides |
//! | hardware that walks tables, its TLBs and caches of tables, late shootdowns | a model has at most one cached translation | the embedded machine, with all of it (`cargo xtask harsh`), and mistakes that its checks must see (`cargo xtask plants`); QEMU's MMUs (`cargo xtask mmu`, `cargo xtask kernel`) |
//! | more than three threads, more preemptions, larger tables and trees, many calls in a row | the states would be too many | `cargo xtask model --deep`, random schedules (`cargo xtask shuttle`), `pagefirst stress` |
//! | who waits by spinning for another thread | has no end for loom | shuttle and stress; here waiting sleeps, and who spins yields and sees the newest, so of what comes after it weak orders are not seen (`space::model`) |
//! | what the compiler reorders or takes for granted; races on plain memory: values behind locks, bytes of pages, counters that decide nothing, and charges (`atomic::plain`; loom runs all orders of looking a charge up, not of changing it) | loom sees its own types alone | Miri (`cargo xtask miri`), ThreadSanitizer (`cargo xtask tsan`); tables and pages have a watch here |
//! | formats whose entries must be broken before they are made | the models' format is not one | the embedded machine, and shuttle, with the rules of AArch64 (`copy_without_break` and `make_before_flush` must be seen) |
//! | slabs | objects are boxed here, and no box is used twice | Miri; the machine's tests of the slabs as they are |
//! | interrupts on the CPU that is at work | a role is a CPU | tests that complete reads from interrupts; debug builds refuse locks there (`sync::held`) |
//!
//! A [`Watch`](machine::Watch) stands beside every table. It is a cell that loom checks for data races, and says whether the table is
//! anybody's: a touch of a freed table panics, and so does one that is not ordered against the table's next owner,
//! even where the value read would have been the right one. (This is stronger than poison in the entries, and costs
//! no atomic operations.)

mod clean;
mod epoch;
mod fork;
mod huge;
mod install;
mod machine;
mod reuse;
mod take;

pub(crate) use machine::{Item, KEPT, Machine, STORED, Watch, Zeros, become_cpu};

use crate::arch::{Attrs, Format, Tiny};
use crate::sync::atomic::Relaxed;
use crate::types::{PAGE_SIZE, Pfn, VirtAddr, VirtRange};
use loom::sync::Mutex;
use std::sync::atomic::AtomicUsize;

/// The entry for the page with this number.
pub(crate) fn entry(page: u32) -> u64 {
    Tiny::leaf(Pfn(page), 0, Attrs::empty())
}
/// The range of the pages `first..end`, by address.
pub(crate) fn pages(first: u64, end: u64) -> VirtRange {
    VirtRange::new(VirtAddr(first * PAGE_SIZE), VirtAddr(end * PAGE_SIZE))
}

/// What one thread does; the number it ends with is for the model's last check.
pub(crate) type Role = fn(&'static Machine) -> u64;

/// What runs a model, with so many preemptions; in a long run (`cargo xtask model --deep`) with more, as far as it comes in
/// so many seconds.
pub(crate) fn explorer(preemptions: usize) -> loom::model::Builder {
    fn number<T: core::str::FromStr>(name: &str) -> Option<T> {
        std::env::var(name).ok()?.parse().ok()
    }
    let mut model = loom::model::Builder::new();
    let more = number("PAGEFIRST_DEEPER").unwrap_or(0);
    model.preemption_bound = Some(preemptions.saturating_add_signed(more));
    model.max_duration = number("PAGEFIRST_SECONDS").map(core::time::Duration::from_secs);
    model.max_branches = 100_000;
    model
}

/// Whether the roles are played one after another, from the one numbered `main` on: what shows then needs no race.
pub(crate) fn is_in_turn() -> bool {
    std::env::var_os("PAGEFIRST_IN_TURN").is_some()
}

/// Runs a model: `setup`, all roles at once, `end`. The role numbered `main` runs on loom's first thread.
#[track_caller]
pub(crate) fn check<const N: usize>(
    bound: usize,
    main: usize,
    setup: fn() -> &'static Machine,
    roles: [Role; N],
    end: fn(&'static Machine, [u64; N]),
) {
    let executions = std::sync::Arc::new(AtomicUsize::new(0));
    let count = executions.clone();
    let model = explorer(bound);
    let preemptions = model.preemption_bound;
    let began = std::time::Instant::now();
    model.check(move || {
        count.fetch_add(1, Relaxed);
        let m = setup();
        if is_in_turn() {
            let mut results = [0; N];
            for role in (0..N).map(|i| (main + i) % N) {
                become_cpu(role);
                results[role] = roles[role](m);
            }
            become_cpu(0);
            return end(m, results);
        }
        let gate = loom::sync::Arc::new(Mutex::new(()));
        let start = |gate: &Mutex<()>, role: usize| {
            drop(gate.lock().unwrap());
            become_cpu(role);
        };
        let others: Vec<_> = (1..N)
            .map(|i| (main + i) % N)
            .map(|role| {
                let gate = gate.clone();
                let run = move || {
                    start(&gate, role);
                    drop(gate);
                    roles[role](m)
                };
                (role, loom::thread::spawn(run))
            })
            .collect();
        start(&gate, main);
        let mut results = [0; N];
        results[main] = roles[main](m);
        for (role, thread) in others {
            results[role] = thread.join().unwrap();
        }
        become_cpu(0);
        end(m, results);
        // SAFETY: all threads have ended.
        unsafe { m.free() };
    });
    std::println!(
        "{} executions in {:.2} s, preemptions up to {}",
        executions.load(Relaxed),
        began.elapsed().as_secs_f64(),
        preemptions.unwrap_or_default()
    );
}
