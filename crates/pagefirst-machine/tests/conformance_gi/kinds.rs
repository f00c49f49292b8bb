//! The kinds of file faults, how each fails, and what a lost race comes to (c66 to c70).

use crate::kit::*;
use pagefirst::fault::{Bus, FaultError};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr};
use pagefirst_machine::Machine;

const AT: VirtAddr = VirtAddr(1 << 30);
const NO_MEMORY: End = End::Error(FaultError::NoMemory);

fn bus(why: Bus) -> End {
    End::Error(FaultError::Bus(why))
}

/// What must be as before after a fault that failed.
fn kept(machine: &'static Machine, s: &Space) -> impl PartialEq + std::fmt::Debug + use<> {
    let held = machine.vm().held(machine);
    let found = check(s);
    (held.tables, held.frames, found, vmas(s), s.account().table_bytes)
}

#[test]
fn c66_a_read_fault_ends_with_the_files_answer_and_drops_what_it_held() -> Result {
    let machine = machine();
    let file = marked();
    let c = cache(machine, &file, 8)?;
    let s = space(machine)?;
    s.map(at(AT, private(&c, 0, 16, R)))?;
    warm(machine, &c, [0, 1])?;
    let pages = [cached_frame(machine, &c, 0)?, cached_frame(machine, &c, 1)?];
    s.quiesce();
    let before = kept(machine, &s);
    file.fail_reads(5, true);
    for (i, why) in [(5, Bus::Io), (8, Bus::BeyondEnd), (15, Bus::BeyondEnd)] {
        assert_eq!(fault(&s, page(AT, i), Access::Read), bus(why));
        s.quiesce();
        assert_eq!(kept(machine, &s), before, "page {i}");
        assert_eq!(c.pages(), 2, "page {i}");
    }
    // No memory for the page; for the tables, with the page in the cache.
    let taken = machine.leave_free(0);
    assert_eq!((fault(&s, page(AT, 6), Access::Read), c.pages()), (NO_MEMORY, 2));
    assert_eq!(fault(&s, page(AT, 1), Access::Read), NO_MEMORY);
    assert_eq!(pages.map(|pfn| counts(machine, pfn)), [(1, 0); 2]);
    drop(taken);
    s.quiesce();
    assert_eq!(kept(machine, &s), before);
    // An error is told each time the page is tried, and gone when it can be read.
    assert_eq!(fault(&s, page(AT, 5), Access::Read), bus(Bus::Io));
    file.fail_reads(5, false);
    assert_eq!(fault(&s, page(AT, 5), Access::Read), End::Mapped(true, 2));
    check(&s);
    Ok(())
}

#[test]
fn c67_a_private_copy_that_fails_gives_copy_and_file_page_back_once() -> Result {
    let machine = machine();
    let (file, hook) = hooked();
    let c = cache(machine, &file, 8)?;
    let s = space(machine)?;
    s.map(at(AT, private(&c, 0, 8, RW)))?;
    warm(machine, &c, [1])?;
    let source = cached_frame(machine, &c, 1)?;
    s.quiesce();
    let before = kept(machine, &s);
    for free in 0..4 {
        let taken = machine.leave_free(free); // the copy takes one frame, tables three
        assert_eq!(fault(&s, page(AT, 1), Access::Write), NO_MEMORY, "{free} frames");
        assert_eq!(counts(machine, source), (1, 0));
        drop(taken);
        s.quiesce();
        assert_eq!(kept(machine, &s), before);
    }
    // The page it copies is taken from the file while it looks for memory: the copy is dropped with it.
    let inner = c.clone();
    hook.arm(3, move || inner.set_size(machine, 2 * PAGE_SIZE));
    assert_eq!(fault(&s, page(AT, 3), Access::Write), bus(Bus::BeyondEnd));
    assert_eq!(c.pages(), 1);
    s.quiesce();
    assert_eq!(kept(machine, &s), before);

    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    cpu.store_u8(page(AT, 1), 77)?;
    let copy = frame(&s, page(AT, 1)).ok_or("mapped")?;
    assert_ne!(copy, source);
    assert_eq!((counts(machine, copy), counts(machine, source)), ((1, 1), (1, 0)));
    let mut bytes = [0; 2];
    c.read_at(machine, PAGE_SIZE, &mut bytes).map_err(|e| e.to_string())?;
    assert_eq!(bytes, [mark(1); 2], "the file's page is what it was");
    assert_eq!((cpu.load_u8(page(AT, 1))?, cpu.load_u8(VirtAddr(page(AT, 1).0 + 1))?), (77, mark(1)));
    Ok(())
}

#[test]
fn c68_a_shared_write_makes_a_page_dirty_only_once_it_is_mapped() -> Result {
    let machine = machine();
    let file = marked().with_tracking(true);
    let c = cache(machine, &file, 4)?;
    let s = space(machine)?;
    s.map(at(AT, shared(&c, 0, 4, RW)))?;
    warm(machine, &c, 0..4)?;
    let stored = || c.write_back(machine).map_err(|e| e.to_string());
    // Failing, for want of a table, of rights, of a page.
    let taken = machine.leave_free(2);
    assert_eq!(fault(&s, AT, Access::Write), NO_MEMORY);
    drop(taken);
    let read_only = space(machine)?;
    read_only.map(at(AT, shared(&c, 0, 4, R)))?;
    assert!(matches!(fault(&read_only, AT, Access::Write), End::Error(FaultError::Segv(_))));
    assert_eq!((stored()?, file.writes()), (0, 0));
    // A read maps all four and makes none dirty; then one is written.
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    cpu.load_u8(AT)?;
    assert_eq!((mapped(&s, AT, 4).len(), stored()?), (4, 0));
    cpu.store_u8(page(AT, 2), 9)?;
    assert_eq!(stored()?, 1);
    assert_eq!((file.stored(2)[0], file.stored(1).len()), (9, 0));
    // Mapped by a write where nothing was.
    s.discard(AT, 4 * PAGE_SIZE)?;
    cpu.store_u8(page(AT, 3), 8)?;
    s.discard(AT, 4 * PAGE_SIZE)?;
    stored()?;
    assert_eq!((file.stored(3)[0], c.evict(machine), stored()?), (8, 4, 0));
    Ok(())
}

#[test]
fn c69_a_file_fault_is_a_read_a_private_copy_or_a_shared_write_or_sigbus() -> Result {
    let machine = machine();
    let c = cache(machine, &marked(), 4)?;
    warm(machine, &c, 0..4)?;
    let rx = Prot::READ | Prot::EXEC;
    let kinds = |map, access| -> Result<_> {
        let s = space_with(machine, policy().with_fault_around(PAGE_SIZE).ok_or("a window")?)?;
        s.map(at(AT, map))?;
        let end = fault(&s, AT, access);
        let f = s.account().faults;
        let own = frame(&s, AT).is_some_and(|pfn| counts(machine, pfn) == (1, 1));
        Ok((end, f.file_read, f.file_copy, f.shared_write, f.bus, own))
    };
    let done = End::Mapped(false, 0);
    assert_eq!(kinds(private(&c, 0, 4, RW), Access::Read)?, (done, 1, 0, 0, 0, false));
    assert_eq!(kinds(private(&c, 0, 4, rx), Access::Execute)?, (done, 1, 0, 0, 0, false));
    assert_eq!(kinds(private(&c, 0, 4, RW), Access::Write)?, (done, 0, 1, 0, 0, true));
    assert_eq!(kinds(shared(&c, 0, 4, RW), Access::Read)?, (done, 1, 0, 0, 0, false));
    assert_eq!(kinds(shared(&c, 0, 4, RW), Access::Write)?, (done, 0, 0, 1, 0, false));
    // Nothing that could supply the page: a file without pages, or a mapping beyond its end.
    let empty = cache(machine, &marked(), 0)?;
    for map in [private(&empty, 0, 4, RW), shared(&empty, 0, 4, RW), shared(&c, 4, 4, RW)] {
        let access = if map.flags.is_empty() { Access::Read } else { Access::Write };
        assert_eq!(kinds(map, access)?, (bus(Bus::BeyondEnd), 0, 0, 0, 1, false));
    }
    Ok(())
}

#[test]
fn c70_losing_a_race_is_no_error_and_that_a_page_was_read_stays_known() -> Result {
    let machine = machine();
    let (file, hook) = hooked();
    let c = cache(machine, &file, 16)?;
    let s = space(machine)?;
    s.map(at(AT, private(&c, 0, 16, RW)))?;
    // The mapping changes under the fault, so that it has to look again: it is the same fault, which had to read.
    for (i, access) in [(2, Access::Read), (9, Access::Write)] {
        let inner = s.clone();
        hook.arm(i, move || {
            inner.protect(AT, 16 * PAGE_SIZE, R).expect("mapped");
            inner.protect(AT, 16 * PAGE_SIZE, RW).expect("mapped");
        });
        assert_eq!(fault(&s, page(AT, i), access), End::Mapped(true, 0));
    }
    // Another is faster: handled, not an error, and the page is there for the access that is tried again.
    let inner = s.clone();
    hook.arm(5, move || {
        inner.map(at(AT, anonymous(16, RW))).expect("mapped over");
        assert_eq!(fault(&inner, page(AT, 5), Access::Write), End::Mapped(false, 0));
    });
    let failures =
        |s: &Space| (s.account().faults.segv, s.account().faults.bus, s.account().faults.no_memory);
    assert_eq!(fault(&s, page(AT, 5), Access::Read), End::Spurious);
    assert_eq!((s.account().faults.spurious, failures(&s)), (1, (0, 0, 0)));
    assert_eq!(first_byte(&s, page(AT, 5)), Some(0));
    check(&s);
    Ok(())
}
