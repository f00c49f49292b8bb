//! Each check of the machine sees a mistake in the library that it is there for.
//!
//! The mistakes are planted in the library (`cfg!(mutant = "NAME")`), and `cargo xtask plants` compiles it with each in
//! turn: the tests that name it must fail, by the machine's check that says so, and pass without.

mod doors;
mod kit;

use doors::{Doors, DoorsOf, Point, arm};
use kit::*;
use pagefirst::arch::Aarch64;
use pagefirst::frame::Frame;
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr};
use pagefirst_machine::{Config, Machine, Vcpu};
use std::sync::{Arc, Mutex};

const AT: VirtAddr = VirtAddr(1 << 30);
const PAGES: u64 = 16;

fn on(config: Config) -> &'static Machine {
    Machine::new(Config { checks: true, livelock: 1_000, ..config })
}

/// A space with 16 pages of anonymous memory, and a CPU that runs it and has written to the first of them.
fn one_page(config: Config) -> Result<(&'static Machine, Space, Vcpu)> {
    let machine = on(config);
    let s = space(machine)?;
    s.map(at(AT, anonymous(PAGES, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    cpu.store_u64(AT, 1)?;
    Ok((machine, s, cpu))
}

/// Ends all that is left, and sees that nothing is.
fn end(machine: &'static Machine, s: Space, cpu: Vcpu) -> Result {
    check(&s);
    drop((cpu, s));
    Ok(machine.nothing_left()?)
}

// catches: protect_without_flush
// says: for stores, which the tables do not allow
#[test]
fn a_stale_translation_after_a_change_of_rights() -> Result {
    let (machine, s, cpu) = one_page(Config::default())?;
    s.protect(AT, PAGES * PAGE_SIZE, R)?;
    end(machine, s, cpu)
}

// catches: activate_without_mask
// says: not in the space's mask, still translates
#[test]
fn a_stale_translation_on_a_cpu_that_nobody_knows_of() -> Result {
    let (machine, s, cpu) = one_page(Config::default())?;
    s.unmap(AT, PAGES * PAGE_SIZE)?;
    end(machine, s, cpu)
}

// catches: free_before_flush
// says: is freed while 1 translations lead to it
#[test]
fn a_frame_to_be_used_again_before_the_flush() -> Result {
    let (machine, s, cpu) = one_page(Config::default())?;
    s.discard(AT, PAGES * PAGE_SIZE)?;
    end(machine, s, cpu)
}

// catches: entry_without_reference
// says: is used as a page while it is free
#[test]
fn a_freed_frame_used() -> Result {
    let (machine, s, mut cpu) = one_page(Config::default())?;
    assert_eq!(cpu.load_u64(AT)?, 1);
    end(machine, s, cpu)
}

// catches: clear_after_free
// says: was written to while it was free
#[test]
fn a_freed_frame_written_to() -> Result {
    let machine = on(Config::default());
    drop(Frame::new(machine)?);
    drop(Frame::new(machine)?); // the latest comes back first
    Ok(machine.nothing_left()?)
}

// catches: unlink_keeps_slot
// says: is walked as a page table while it is free
#[test]
fn a_freed_table_walked() -> Result {
    let (machine, s, mut cpu) = one_page(Config::default())?;
    s.discard(AT, PAGES * PAGE_SIZE)?;
    s.quiesce();
    cpu.store_u64(AT, 2)?;
    end(machine, s, cpu)
}

// catches: flush_without_tables
// says: is given back as a table while 1 translations lead to it
#[test]
fn a_table_to_be_used_again_before_the_flush() -> Result {
    let (machine, s, cpu) = one_page(Config { lean_flush: true, ..Config::default() })?;
    s.discard(AT, PAGES * PAGE_SIZE)?;
    s.quiesce();
    end(machine, s, cpu)
}

// catches: lock_ignores_dead
// says: is given back with entry
#[test]
fn an_entry_put_into_a_dead_table() -> Result {
    let machine = machine_of::<Doors>();
    let s = space(machine)?;
    s.map(at(AT, anonymous(PAGES, RW)))?;
    assert!(matches!(fault(&s, AT, Access::Write), End::Mapped(..)));
    // A fault has seen an empty slot, and the table dies before it locks it.
    let inner = s.clone();
    arm(Point::SawNothing, 0, move || inner.discard(AT, PAGES * PAGE_SIZE).expect("mapped"));
    assert!(matches!(fault(&s, page(AT, 1), Access::Write), End::Mapped(..)));
    assert!(doors::has_happened());
    s.quiesce();
    check(&s);
    drop(s);
    Ok(machine.nothing_left()?)
}

// catches: settle_shared_copy
// says: can be written, and others may have it
#[test]
fn a_page_that_is_shared_and_can_be_written() -> Result {
    let machine = Machine::<Doors>::new(Config { keep_tags: true, checks: true, ..Config::default() });
    let s = space(machine)?;
    s.map(at(AT, anonymous(PAGES, RW)))?;
    assert!(matches!(fault(&s, AT, Access::Read), End::Mapped(..)));
    // Another CPU may have what a copy takes the place of.
    let visit = || {
        let mut cpu = machine.vcpu();
        cpu.switch_to(&s);
        cpu.load_u64(AT).is_ok()
    };
    assert!(std::thread::scope(|scope| scope.spawn(visit).join()).is_ok_and(|read| read));
    // The copy is stored read-only and flushed, and its space forks before it is made writable.
    let (inner, child) = (s.clone(), Arc::new(Mutex::new(None)));
    let to = child.clone();
    arm(Point::Found, 1, move || *to.lock().expect("nobody panics") = inner.fork().ok());
    assert!(matches!(fault(&s, AT, Access::Write), End::Mapped(..)));
    assert!(doors::has_happened());
    let child = child.lock().expect("nobody panics").take().ok_or("no memory")?;
    check(&s);
    drop((s, child));
    Ok(machine.nothing_left()?)
}

// catches: unlock_forgets_dead
// says: is alive and empty
#[test]
fn an_empty_live_table() -> Result {
    let (machine, s, mut cpu) = one_page(Config::default())?;
    s.discard(AT, PAGES * PAGE_SIZE)?;
    cpu.store_u64(AT, 2)?;
    end(machine, s, cpu)
}

// catches: update_by_store
// says: and its entry was overwritten without
#[test]
fn an_entry_changed_by_a_plain_store() -> Result {
    // The other CPU's translations stay when its thread is done.
    let config = Config { checks: true, keep_tags: true, ..Config::default() };
    let machine = Machine::<Doors>::new(config);
    let (s, c) = (space(machine)?, cache(machine, &marked(), PAGES)?);
    s.map(at(AT, shared(&c, 0, PAGES, RW)))?;
    // Mapped writable, and clean.
    assert!(matches!(fault(&s, AT, Access::Read), End::Mapped(..)));
    // Between the look at the entry and its change the other CPU writes to the page.
    let inner = s.clone();
    arm(Point::Edits, 0, move || {
        let mut cpu = machine.vcpu();
        cpu.switch_to(&inner);
        cpu.store_u8(AT, 1).expect("mapped writable");
    });
    s.protect(AT, PAGES * PAGE_SIZE, R)?;
    assert!(doors::has_happened());
    check(&s);
    drop((s, c));
    Ok(machine.nothing_left()?)
}

// catches: fault_without_sync
// says: 1000 faults in a row did nothing
#[test]
fn a_fault_that_leaves_the_entry_cached_as_not_present() -> Result {
    let config = Config { caches_nothing: true, lean_flush: true, ..Config::default() };
    let (machine, s, cpu) = one_page(config)?;
    end(machine, s, cpu)
}

// catches: fault_leaves_unmarked
// says: 1000 faults in a row did nothing
#[test]
fn a_fault_that_leaves_accessed_and_dirty_to_hardware_without() -> Result {
    let machine = on(Config { sets_accessed: false, ..Config::default() });
    let (s, c) = (space(machine)?, cache(machine, &marked(), PAGES)?);
    warm(machine, &c, 0..PAGES)?;
    s.map(at(AT, shared(&c, 0, PAGES, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    for i in 0..PAGES {
        assert_eq!(cpu.load_u8(page(AT, i))?, mark(i));
    }
    assert_eq!(s.account().faults.marked, PAGES - 1, "each neighbour was marked in a fault");
    cpu.store_u8(page(AT, 3), 1)?;
    assert_eq!(s.account().faults.marked, PAGES);
    drop((cpu, s, c));
    Ok(machine.nothing_left()?)
}

// catches: table_entry_read_only
// says: 1000 faults in a row did nothing
#[test]
fn a_right_that_an_upper_level_does_not_give() -> Result {
    let (machine, s, cpu) = one_page(Config::default())?;
    end(machine, s, cpu)
}

// catches: copy_without_break
// says: while a CPU still translates it to
#[test]
fn a_copy_put_in_place_of_a_page_that_is_cached() -> Result {
    let machine = Machine::<Aarch64>::new(Config { checks: true, ..Config::aarch64() });
    let s = space(machine)?;
    s.map(at(AT, anonymous(PAGES, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    assert_eq!(cpu.load_u64(AT)?, 0);
    cpu.store_u64(AT, 1)?;
    assert_eq!(cpu.load_u64(AT)?, 1);
    check(&s);
    drop((cpu, s));
    Ok(machine.nothing_left()?)
}

// catches: make_before_flush
// says: while a CPU still translates it to
#[test]
fn a_page_put_in_place_of_one_that_is_cached() -> Result {
    const TABLE: u64 = 512;
    let machine = Machine::<DoorsOf<Aarch64>>::new(Config { checks: true, ..Config::aarch64() });
    let s = space(machine)?;
    s.map(at(AT, anonymous(2 * TABLE, RW)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    for i in [0, 1, TABLE + 1] {
        cpu.store_u64(page(AT, i), i + 1)?;
    }
    // Page 1 was taken out, the first leaf table lives on, and the second is still to come before all is flushed.
    let inner = s.clone();
    arm(Point::SawTable, 2, move || {
        let mut cpu = machine.vcpu();
        cpu.switch_to(&inner);
        cpu.store_u64(page(AT, 1), 7).expect("mapped");
    });
    s.discard(page(AT, 1), (2 * TABLE - 1) * PAGE_SIZE)?;
    assert!(doors::has_happened());
    assert_eq!((cpu.load_u64(AT)?, cpu.load_u64(page(AT, 1))?), (1, 7));
    check(&s);
    drop((cpu, s));
    Ok(machine.nothing_left()?)
}

// catches: exec_without_sync
// says: is executed and was not synchronised for it
#[test]
fn a_page_executed_that_fetches_do_not_see() -> Result {
    let machine = on(Config { fetch_sees_stores: false, ..Config::default() });
    let (s, c) = (space(machine)?, cache(machine, &marked(), PAGES)?);
    s.map(at(AT, private(&c, 0, PAGES, Prot::READ | Prot::EXEC)))?;
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    assert_eq!(cpu.fetch(AT)?, mark(0));
    drop((cpu, s, c));
    Ok(machine.nothing_left()?)
}
