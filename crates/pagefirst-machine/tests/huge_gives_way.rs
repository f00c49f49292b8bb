//! Huge pages that are cut, given up and raced for, each as one defined order of events.

mod stage;
use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::frame::Frame;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::Advice;
use pagefirst::types::{Access, PAGE_SIZE, Pfn, VirtAddr, VirtRange};
use stage::*;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::{Arc, mpsc};

const BASE: VirtAddr = VirtAddr(1 << 40);
const SMALL: u64 = 512;
const HUGE: u64 = SMALL * PAGE_SIZE;

fn wanting(pages: u64) -> Result<(&'static Stage, Space)> {
    let stage = Stage::new(2560);
    let s = stage.space_with(Policy { huge: HugePolicy::Always, ..Policy::default() })?;
    anonymous(&s, BASE, pages, RW)?;
    Ok((stage, s))
}
fn huge(space: &Space, at: VirtAddr) -> bool {
    let raw = entry(space, at);
    X86_64::frame(raw, 1).is_some() && raw & 0x80 != 0
}
fn hoard(stage: &'static Stage) -> Vec<Frame<Stage>> {
    std::iter::from_fn(|| Frame::block(stage, 9).ok()).collect()
}
fn is_flush(step: &Step) -> bool {
    matches!(step, Step::Flush { .. })
}

#[test]
fn small_page_comes_after_the_flush_of_the_huge_zero_page() -> Result {
    let (stage, s) = wanting(2 * SMALL)?;
    fault(&s, page(BASE, 512), Access::Write);
    fault(&s, BASE, Access::Read);
    assert!(huge(&s, BASE));
    let _hoarded = hoard(stage);
    let m = s.clone();
    stage.at(is_flush, move || {
        on(1, || {
            stage.steps();
            assert_eq!(fault(&m, page(BASE, 7), Access::Write), "mapped");
            let steps = stage.steps();
            let covers = |st: &Step| matches!(st, Step::Flush{range,..} if range.contains(page(BASE,7)));
            assert!(attrs(&m, page(BASE, 7)).contains(Attrs::WRITE));
            assert!(
                count(&steps, covers) > 0,
                "writable page, and no CPU has flushed the huge zero page: {steps:?}"
            );
        });
    });
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    assert!(stage.is_done());
    Ok(())
}

/// A fault that has seen that its mapping is not retired, and has not stored its entry, is waited for by advice as by
/// every call that announces: the huge page that it maps is there when a later call looks for what it cuts.
#[test]
fn advice_waits_for_a_fault_that_is_about_to_store() -> Result {
    let (stage, s) = wanting(3 * SMALL)?;
    let hoarded = hoard(stage);
    fault(&s, BASE, Access::Write);
    fault(&s, page(BASE, 1024), Access::Write);
    drop(hoarded);
    let (tx, rx) = mpsc::channel();
    let m = s.clone();
    let waits = Arc::new(AtomicBool::new(false));
    stage.at_after(
        |st| matches!(st, Step::Note(pagefirst::platform::Note::TableLocked(_, 1))),
        |st| matches!(st, Step::Meta(_)),
        move || {
            let waiting = waits.clone();
            stage.at(|st| *st == Step::Relax, move || waiting.store(true, Release));
            let advice = move || on(1, || m.advise(page(BASE, 1), 2 * HUGE, Advice::NoHuge).is_ok());
            let _ = tx.send(std::thread::spawn(advice));
            while !waits.load(Acquire) {
                std::thread::yield_now();
            }
        },
    );
    assert_eq!(fault(&s, page(BASE, 512 + 5), Access::Write), "mapped");
    assert!(stage.is_done());
    assert!(rx.recv()?.join().is_ok_and(|advised| advised));
    assert!(huge(&s, page(BASE, 512)));
    s.unmap(page(BASE, 600), PAGE_SIZE)?;
    assert!(!huge(&s, page(BASE, 512)));
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn copy_that_meets_a_split_relaxes() -> Result {
    let (stage, s) = wanting(SMALL)?;
    fault(&s, BASE, Access::Write);
    let m = s.clone();
    let (tx, rx) = mpsc::channel();
    stage.at(is_flush, move || {
        stage.steps();
        let m2 = m.clone();
        let copy = move || on(1, || m2.copy_in(page(BASE, 9), &mut [0u8; 8]).is_ok());
        let copy = std::thread::spawn(copy);
        let (mut relaxed, mut syncs) = (0, 0);
        until(|| {
            std::thread::yield_now();
            let has_ended = copy.is_finished();
            let steps = stage.steps();
            relaxed += count(&steps, |s| *s == Step::Relax);
            syncs += count(&steps, |s| matches!(s, Step::Sync { .. }));
            relaxed > 0 || has_ended
        });
        assert!(relaxed > 0, "{syncs} rounds, no relax");
        let _ = tx.send(copy);
    });
    s.discard(page(BASE, 1), PAGE_SIZE)?;
    assert!(rx.recv()?.join().is_ok_and(|copied| copied));
    Ok(())
}

#[test]
fn write_that_races_with_a_read_stays_huge() -> Result {
    let (stage, s) = wanting(SMALL)?;
    let m = s.clone();
    stage.at_after(
        is_frame_allocated,
        |st| matches!(st, Step::Read(0, _)),
        move || {
            on(1, || assert_eq!(fault(&m, page(BASE, 9), Access::Read), "mapped"));
        },
    );
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    assert!(stage.is_done());
    assert!(!stage.steps().is_empty());
    assert!(huge(&s, BASE), "small, with a cleared huge page in hand");
    Ok(())
}

#[test]
fn fault_that_gives_up_the_huge_zero_page_and_fails_leaves_no_dead_table() -> Result {
    let (stage, s) = wanting(SMALL)?;
    let s2 = stage.space_with(Policy { huge: HugePolicy::Always, ..Policy::default() })?;
    anonymous(&s2, BASE, SMALL, RW)?;
    fault(&s2, BASE, Access::Read);
    fault(&s, BASE, Access::Read);
    let _hoarded = hoard(stage);
    let _rest = stage.take_all();
    assert_eq!(fault(&s, BASE, Access::Write), "NoMemory");
    let t: u64 = s.tables().tables.iter().sum();
    assert_eq!(t * 4096, s.page_table().table_bytes().iter().sum::<u64>(), "{:?}", s.tables());
    Ok(())
}

#[test]
fn populate_steps_over_a_huge_page_at_once() -> Result {
    let (stage, s) = wanting(SMALL)?;
    fault(&s, BASE, Access::Write);
    stage.steps();
    s.populate(VirtRange::new(BASE, page(BASE, 512)), RW);
    let n = count(&stage.steps(), |s| matches!(s, Step::Sync { .. }));
    assert!(n <= 1, "{n} faults to populate what one huge page covers");
    Ok(())
}

#[test]
fn mapper_cuts_a_page_of_1_gib_twice() -> Result {
    let stage = Stage::new(256);
    let table = pagefirst::table::PageTable::new(stage)?;
    let g = 1u64 << 30;
    table.mapper().map(VirtRange::new(VirtAddr(g), VirtAddr(2 * g)), Pfn(0x40000), 2, Attrs::WRITE)?;
    table.mapper().unmap(VirtRange::new(VirtAddr(g + 0x1000), VirtAddr(2 * g)))?;
    Ok(())
}

#[test]
fn unmap_beyond_a_mapping_cuts_what_a_mapper_mapped() -> Result {
    let stage = Stage::new(256);
    let s = stage.space_with(Policy { huge: HugePolicy::Never, ..Policy::default() })?;
    anonymous(&s, BASE, SMALL, RW)?;
    let there = VirtRange::new(VirtAddr(BASE.0 + HUGE), VirtAddr(BASE.0 + 2 * HUGE));
    s.page_table().mapper().map(there, Pfn(0x40000), 1, Attrs::WRITE)?;
    // A program unmaps more than it has mapped, which is no error.
    s.unmap(BASE, HUGE + PAGE_SIZE)?;
    Ok(())
}
