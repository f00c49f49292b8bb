//! Each check of the machine fires when the thing it looks for happens.

use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::fault::Outcome;
use pagefirst::frame::Frame;
use pagefirst::platform::{Note, Platform};
use pagefirst::policy::Policy;
use pagefirst::space::{AddressSpace, Map};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr};
use pagefirst_machine::{Config, Machine, Mistake, POISON, Vcpu};
use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Barrier};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;
type Space = Arc<AddressSpace<Machine>>;
const RW: Prot = Prot::READ.union(Prot::WRITE);

/// A machine with a space in which one page is mapped, written, and known to the TLB. Leaked: after a mistake nothing
/// can be torn down in order.
fn one_page(config: Config) -> Result<(&'static Machine, &'static Space, VirtAddr, Vcpu)> {
    let machine = Machine::new(Config { checks: true, ..config });
    let space: &'static Space = Box::leak(Box::new(Arc::new(AddressSpace::new(machine, Policy::default())?)));
    let at = space.map(Map::anonymous(1 << 20, RW))?.range.start;
    let mut cpu = machine.vcpu();
    cpu.switch_to(space);
    cpu.store_u64(at, 1)?;
    Ok((machine, space, at, cpu))
}

/// What `f` panics with; it must be a mistake that the machine found, with its history.
fn found<R>(f: impl FnOnce() -> R) -> Result<String> {
    let Err(panic) = catch_unwind(AssertUnwindSafe(f)) else { return Err("no check fired".into()) };
    let text = *panic.downcast::<String>().map_err(|_| "a panic without a text")?;
    assert!(text.starts_with("the machine found a mistake: "), "{text}");
    assert!(text.contains("the last ") && text.contains(" cpu "), "no history: {text}");
    Ok(text)
}

#[track_caller]
fn contains(text: &str, what: &str) {
    assert!(text.contains(what), "expected {what:?} in: {text}");
}

#[test]
fn machine_finds_a_live_table_that_is_empty() -> Result {
    let (machine, space, at, mut cpu) = one_page(Config::default())?;
    let path = machine.hook_path(space.page_table().root_frame(), at);
    machine.hook_empty_record(path[3]);
    machine.hook_flush_all(space.page_table().tag());
    let text = found(|| cpu.touch(at, Access::Read))?;
    contains(&text, "of level 0 is alive and empty");
    contains(&text, "misses the TLB");
    std::mem::forget(cpu);
    Ok(())
}

#[test]
fn machine_compare_finds_an_entry_that_is_gone() -> Result {
    let (machine, space, at, cpu) = one_page(Config::default())?;
    let table = space.page_table();
    let found = machine.compare(table)?;
    assert_eq!((found.present, found.counted, found.tables[..4].to_vec()), (1, 1, vec![1; 4]));
    let path = machine.hook_path(table.root_frame(), at);
    let entry = machine.hook_entry(path[3], 0, at);
    let raw = entry.swap(0, Relaxed);
    contains(&machine.compare(table).expect_err("gone"), "is alive and empty");
    entry.store(raw, Relaxed);
    let other = VirtAddr(at.0 + 5 * PAGE_SIZE);
    machine.hook_entry(path[3], 0, other).store(raw, Relaxed);
    contains(&machine.compare(table).expect_err("one more"), "entries of table");
    std::mem::forget(cpu);
    Ok(())
}

#[test]
fn machine_finds_a_walk_into_a_freed_frame() -> Result {
    let (machine, space, at, mut cpu) = one_page(Config::default())?;
    let path = machine.hook_path(space.page_table().root_frame(), at);
    let freed = Frame::new(machine)?.pfn();
    machine.hook_entry(path[2], 1, at).store(X86_64::table(freed), Relaxed);
    machine.hook_flush_all(space.page_table().tag());
    let text = found(|| cpu.touch(at, Access::Read))?;
    contains(&text, &format!("{freed:?} is walked as a page table while it is free"));
    std::mem::forget(cpu);
    Ok(())
}

#[test]
fn machine_finds_the_use_of_a_freed_frame() -> Result {
    let (machine, space, at, mut cpu) = one_page(Config::default())?;
    let path = machine.hook_path(space.page_table().root_frame(), at);
    let entry = machine.hook_entry(path[3], 0, at);
    let freed = Frame::new(machine)?.pfn();
    entry.store(X86_64::leaf(freed, 0, X86_64::attrs(entry.load(Relaxed))), Relaxed);
    machine.hook_flush_all(space.page_table().tag());
    let text = found(|| cpu.load_u64(at))?;
    contains(&text, &format!("{freed:?} is used as a page while it is free"));
    std::mem::forget(cpu);
    Ok(())
}

#[test]
fn machine_finds_a_frame_freed_while_a_tlb_maps_it() -> Result {
    let (machine, space, at, cpu) = one_page(Config::default())?;
    let path = machine.hook_path(space.page_table().root_frame(), at);
    let entry = machine.hook_entry(path[3], 0, at).load(Relaxed);
    let pfn = X86_64::frame(entry, 0).ok_or("mapped")?;
    let text = found(|| machine.note(Note::FrameFreed(pfn, 0)))?;
    contains(&text, "is freed while 1 translations lead to it");
    contains(&text, &format!("CPU {} translates {at} of space", cpu.cpu()));
    std::mem::forget(cpu);
    Ok(())
}

#[test]
fn machine_finds_a_frame_freed_twice_and_one_handed_out_twice() -> Result {
    let machine = Machine::<X86_64>::new(Config { checks: true, ..Config::default() });
    let freed = Frame::new(machine)?.pfn();
    contains(&found(|| machine.note(Note::FrameFreed(freed, 0)))?, "is freed while it is free");
    let machine = Machine::<X86_64>::new(Config { checks: true, ..Config::default() });
    let frame = Frame::new(machine)?;
    let text = found(|| machine.note(Note::FrameAllocated(frame.pfn(), 0)))?;
    contains(&text, "is allocated while it is owned");
    Ok(())
}

#[test]
fn machine_finds_a_write_to_a_freed_frame() -> Result {
    let machine = Machine::<X86_64>::new(Config { checks: true, ..Config::default() });
    let freed = Frame::new(machine)?.pfn();
    machine.cells(freed)[5].store(1, Relaxed);
    let text = found(|| Frame::new(machine))?; // the latest comes back first
    contains(&text, &format!("{freed:?} was written to while it was free: 0x1 at offset 0x28"));
    Ok(())
}

#[test]
fn machine_finds_a_freed_table_locked() -> Result {
    let (machine, space, at, cpu) = one_page(Config::default())?;
    space.unmap(at, 1 << 20)?;
    space.quiesce();
    let free = Frame::new(machine)?.pfn();
    contains(
        &found(|| machine.note(Note::TableLocked(free, 0)))?,
        "is locked as a page table while it is free",
    );
    std::mem::forget(cpu);
    Ok(())
}

#[test]
fn machine_finds_a_stale_translation_after_its_flush() -> Result {
    let plant = Some(Mistake::SkipCpu(1));
    let machine = Machine::<X86_64>::new(Config { checks: true, plant, ..Config::default() });
    let space: &'static Space = Box::leak(Box::new(Arc::new(AddressSpace::new(machine, Policy::default())?)));
    let at = space.map(Map::anonymous(1 << 20, RW))?.range.start;
    let cpu = machine.vcpu();
    assert_eq!(cpu.cpu(), 0);
    let (ready, go) = (Barrier::new(2), Barrier::new(2));
    let text = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut other = machine.vcpu();
            other.switch_to(space);
            let stored = other.store_u64(at, 1);
            ready.wait();
            go.wait();
            std::mem::forget(other);
            stored
        });
        ready.wait();
        let text = found(|| space.discard(at, PAGE_SIZE));
        go.wait();
        text
    })?;
    contains(&text, "CPU 1, named in it, still translates");
    std::mem::forget(cpu);
    Ok(())
}

#[test]
fn machine_finds_a_translation_on_a_cpu_that_left() -> Result {
    let plant = Some(Mistake::LeaveWithoutFlush);
    let (_, space, at, mut cpu) = one_page(Config { plant, ..Config::default() })?;
    cpu.leave();
    let text = found(|| space.unmap(at, 1 << 20))?;
    contains(&text, "not in the space's mask, still translates");
    Ok(())
}

/// What is found when the entry of a page that was written says something else.
fn found_with(policy: Policy, prot: Prot, change: impl FnOnce(u64) -> u64) -> Result<String> {
    let machine = Machine::new(Config { checks: true, ..Config::default() });
    let space: &'static Space = Box::leak(Box::new(Arc::new(AddressSpace::new(machine, policy)?)));
    let at = space.map(Map { populate: true, ..Map::anonymous(PAGE_SIZE, prot) })?.range.start;
    machine.check_space(space);
    let path = machine.hook_path(space.page_table().root_frame(), at);
    let entry = machine.hook_entry(path[3], 0, at);
    entry.store(change(entry.load(Relaxed)), Relaxed);
    found(|| machine.check_space(space))
}

#[test]
fn machine_finds_an_entry_that_gives_more_than_its_mapping() -> Result {
    let with = |attrs: Attrs| move |raw: u64| X86_64::with_attrs(raw, X86_64::attrs(raw) | attrs);
    let policy = Policy::default();
    let read = Prot::READ;
    contains(&found_with(policy, read, with(Attrs::WRITE))?, "gives more than its mapping, Prot(READ)");
    contains(&found_with(policy, RW, with(Attrs::EXEC))?, "gives more than its mapping, Prot(READ | WRITE)");
    contains(&found_with(policy, RW, with(Attrs::NONE))?, "is not as present as its mapping");
    let deny = Policy { deny_wx: true, ..policy };
    contains(&found_with(deny, RW, with(Attrs::EXEC))?, "gives more");
    Ok(())
}

#[test]
fn machine_finds_an_address_of_memory_in_an_entry_that_is_not_present() -> Result {
    let text = found_with(Policy::default(), RW, |raw| raw & !1)?;
    contains(&text, "is not present and shows hardware the address 0x");
    Ok(())
}

#[test]
fn machine_finds_bytes_from_before_in_a_page() -> Result {
    let (machine, space, first, mut cpu) = one_page(Config::default())?;
    // Mapped, and not used by a CPU yet: what a CPU has used is known to be its program's.
    let at = VirtAddr(first.0 + PAGE_SIZE);
    assert!(matches!(space.fault(at, Access::Write), Outcome::Mapped { .. }));
    let path = machine.hook_path(space.page_table().root_frame(), at);
    let pfn = X86_64::frame(machine.hook_entry(path[3], 0, at).load(Relaxed), 0).ok_or("mapped")?;
    machine.cells(pfn)[511].store(POISON, Relaxed);
    contains(&found(|| machine.check_space(space))?, "holds what was there before, at offset 0xff8");
    let text = found(|| cpu.touch(at, Access::Read))?;
    contains(&text, &format!("{pfn:?}, mapped at {at}, holds what was there before, at offset 0xff8"));
    std::mem::forget(cpu);
    Ok(())
}

#[test]
fn machine_finds_a_livelock() -> Result {
    let (machine, space, at, mut cpu) = one_page(Config { livelock: 1_000, ..Config::default() })?;
    let path = machine.hook_path(space.page_table().root_frame(), at);
    // Hardware refuses the page, and the library, by whose mapping it may be read, sees nothing to do.
    let entry = machine.hook_entry(path[3], 0, at);
    let raw = entry.load(Relaxed);
    entry.store(X86_64::with_attrs(raw, X86_64::attrs(raw) | Attrs::NONE), Relaxed);
    machine.hook_flush_all(space.page_table().tag());
    let text = found(|| cpu.touch(at, Access::Read))?;
    contains(&text, &format!("Read at {at}: 1000 faults in a row did nothing"));
    contains(&text, "ends: spurious");
    std::mem::forget(cpu);
    Ok(())
}

#[test]
fn machine_tells_the_other_cpus_to_stop() -> Result {
    let machine = Machine::<X86_64>::new(Config { checks: true, ..Config::default() });
    let freed = Frame::new(machine)?.pfn();
    found(|| machine.note(Note::FrameFreed(freed, 0)))?;
    let stopped = std::thread::spawn(|| machine.relax()).join();
    assert!(stopped.is_err(), "a CPU that waits would wait for ever");
    Ok(())
}
