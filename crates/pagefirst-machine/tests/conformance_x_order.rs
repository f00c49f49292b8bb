//! Defects that must not come back, each as the one order of events that shows it.

mod stage;

use pagefirst::platform::Note;
use pagefirst::sync::epoch::Pin;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::MachineFile;
use stage::*;
use std::sync::atomic::Ordering::Relaxed;

const BASE: VirtAddr = VirtAddr(1 << 40);
const LEAF: u64 = 2 << 20;

#[test]
fn x02_a_table_that_vanishes_after_it_was_found_is_a_short_reserve() -> Result {
    for access in [Access::Write, Access::Read] {
        let stage = Stage::new(256);
        let s = stage.space()?;
        anonymous(&s, BASE, 8, RW)?;
        fault(&s, page(BASE, 7), Access::Write);
        // CPU 0 found the leaf table, so it has reserved none; then CPU 1 takes the last entry out of it.
        let meanwhile = s.clone();
        let vanish = move || {
            on(1, || {
                assert!(meanwhile.discard(page(BASE, 7), PAGE_SIZE).is_ok());
                assert_eq!(meanwhile.tables().tables, [0, 0, 0, 1, 0], "every table of the path has died");
            });
        };
        match access {
            Access::Write => stage.at(is_frame_allocated, vanish),
            _ => stage.at(is_empty_leaf_slot, vanish),
        }
        stage.steps();
        assert_eq!(fault(&s, BASE, access), "mapped");
        assert!(stage.is_done());
        let steps = stage.steps();
        assert_eq!(count(&steps, is_table_allocated), 3);
        // Its page and three tables: the page was not given up and obtained a second time.
        let pages = 3 + (access == Access::Write) as usize;
        assert_eq!(count(&steps, is_frame_allocated), pages, "{steps:?}");
        assert_eq!(s.tables().tables, [1, 1, 1, 1, 0]);
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

#[test]
fn x02_without_memory_for_the_table_that_vanished_nothing_is_mapped() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    anonymous(&s, BASE, 8, RW)?;
    fault(&s, page(BASE, 7), Access::Write);
    // The dead tables cannot be reused while CPU 3 may walk them, and everything else is taken away.
    let walker = on(3, || Pin::new(stage));
    let meanwhile = s.clone();
    stage.at(is_frame_allocated, move || {
        on(1, || assert!(meanwhile.discard(page(BASE, 7), PAGE_SIZE).is_ok()));
        *KEPT.lock().expect("one thread") = stage.take_all();
    });
    assert_eq!(fault(&s, BASE, Access::Write), "NoMemory");
    assert!(stage.is_done());
    on(3, || drop(walker));
    KEPT.lock().expect("one thread").clear();
    assert_eq!((s.tables().tables, s.tables().present), ([0, 0, 0, 1, 0], 0));
    stage.nothing_held(&[&s]);
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    Ok(())
}

static KEPT: std::sync::Mutex<Vec<pagefirst::frame::Frame<Stage>>> = std::sync::Mutex::new(Vec::new());

#[test]
fn x03_a_reserve_that_is_never_used_returns() -> Result {
    // Anonymous and file faults whose mapping goes away when the first, the second or the third table is in hand.
    for reserved in 1..=3 {
        for of_file in [false, true] {
            let stage = Stage::new(256);
            let s = stage.space()?;
            let file = stage.cache(&MachineFile::zeros(), 8)?;
            stage.warm(&file, 0)?;
            match of_file {
                true => private(&s, BASE, &file, 8, RW)?,
                false => anonymous(&s, BASE, 8, RW)?,
            }
            let meanwhile = s.clone();
            stage.at(nth(reserved, is_table_allocated), move || {
                on(1, || assert!(meanwhile.unmap(BASE, 8 * PAGE_SIZE).is_ok()));
            });
            stage.steps();
            assert_eq!(fault(&s, BASE, Access::Write), "Segv(NotMapped)");
            assert!(stage.is_done());
            let steps = stage.steps();
            let freed = |step: &Step| matches!(step, Step::Note(Note::TableFreed(_)));
            assert_eq!((count(&steps, is_table_allocated), count(&steps, freed)), (3, 3));
            stage.nothing_held(&[&s]);
        }
    }
    Ok(())
}

#[test]
fn x07_who_lost_the_race_drops_what_its_cpu_remembers() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    anonymous(&s, BASE, 8, RW)?;
    let synced = |steps: &[Step]| -> Vec<Step> {
        steps.iter().filter(|s| matches!(s, Step::Sync { .. })).copied().collect()
    };
    let tag = s.page_table().tag();
    // Lost to a write that came between; then an access that finds the page there already. Both, and the access that
    // maps, drop what is remembered of the address; of all levels, if a table appeared.
    let meanwhile = s.clone();
    stage.at(is_table_allocated, move || {
        on(1, || assert_eq!(fault(&meanwhile, BASE, Access::Write), "mapped"));
        meanwhile.platform().steps();
    });
    assert_eq!(fault(&s, BASE, Access::Write), "spurious");
    assert!(stage.is_done());
    assert_eq!(synced(&stage.steps()), [Step::Sync { tag, addr: BASE, tables: true }]);
    assert_eq!(fault(&s, BASE, Access::Read), "spurious");
    assert_eq!(synced(&stage.steps()), [Step::Sync { tag, addr: BASE, tables: true }]);
    assert_eq!(fault(&s, page(BASE, 1), Access::Read), "mapped");
    assert_eq!(synced(&stage.steps()), [Step::Sync { tag, addr: page(BASE, 1), tables: false }]);
    let far = VirtAddr(BASE.0 + LEAF);
    anonymous(&s, far, 1, RW)?;
    assert_eq!(fault(&s, far, Access::Write), "mapped");
    assert_eq!(synced(&stage.steps()), [Step::Sync { tag, addr: far, tables: true }]);
    Ok(())
}

#[test]
fn x09_a_neighbour_that_is_beyond_the_end_when_it_is_set_is_not_mapped() -> Result {
    let stage = Stage::new(256);
    let (s, other) = (stage.space()?, stage.space()?);
    let file = stage.cache(&MachineFile::zeros(), 16)?;
    for index in 0..16 {
        stage.warm(&file, index)?;
    }
    // Mapped elsewhere as well, the pages beyond the end go when the file shrinks.
    private(&other, BASE, &file, 16, R)?;
    fault(&other, BASE, Access::Read);
    assert_eq!(other.tables().present, 16);
    private(&s, BASE, &file, 16, R)?;
    // The neighbours are collected; then the file shrinks, before they are set.
    let shrinks = file.clone();
    stage.at(nth(3, is_table_allocated), move || {
        on(1, || shrinks.set_size(stage, 4 * PAGE_SIZE));
    });
    assert_eq!(fault(&s, page(BASE, 2), Access::Read), "mapped");
    assert!(stage.is_done());
    assert_eq!((file.pages(), other.tables().present), (4, 4));
    let mapped: Vec<_> = (0..16).filter(|i| frame(&s, page(BASE, *i)).is_some()).collect();
    assert_eq!(mapped, [0, 1, 2, 3]);
    // Nor afterwards, nor the page itself.
    s.discard(BASE, 16 * PAGE_SIZE)?;
    assert_eq!(fault(&s, page(BASE, 3), Access::Read), "mapped");
    assert_eq!(s.tables().present, 4);
    assert_eq!(fault(&s, page(BASE, 4), Access::Read), "Bus(BeyondEnd)");
    // The page of the fault falls beyond the end in the same moment: it is not mapped either.
    s.discard(BASE, 16 * PAGE_SIZE)?;
    let shrinks = file.clone();
    stage.at(nth(3, is_table_allocated), move || {
        on(1, || shrinks.set_size(stage, 2 * PAGE_SIZE));
    });
    assert_eq!(fault(&s, page(BASE, 2), Access::Read), "Bus(BeyondEnd)");
    assert!(stage.is_done());
    assert_eq!(s.tables().tables, [0, 0, 0, 1, 0]);
    stage.nothing_held(&[&s, &other]);
    // No count of a mapping that did not come about is left: each page is mapped once, in the other space.
    assert_eq!((file.pages(), other.tables().present), (2, 2));
    for i in 0..2 {
        let pfn = frame(&other, page(BASE, i)).ok_or("mapped still")?;
        assert_eq!(stage.counts(pfn), (2, 1), "page {i}");
    }
    Ok(())
}

#[test]
fn x14_a_table_is_given_back_after_its_flush_and_after_every_walker() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    anonymous(&s, BASE, 8, RW)?;
    fault(&s, BASE, Access::Write);
    // CPU 1 walks, and stays where it is.
    let walker = on(1, || Pin::new(stage));
    stage.steps();
    s.unmap(BASE, 8 * PAGE_SIZE)?;
    for _ in 0..10 {
        on(2, || stage.collect());
    }
    let freed = |step: &Step| matches!(step, Step::Note(Note::TableFreed(_)));
    let steps = stage.steps();
    assert_eq!(count(&steps, freed), 0, "a walker may still be in it");
    let flushes: Vec<_> = steps.iter().filter(|s| matches!(s, Step::Flush { .. })).collect();
    let [Step::Flush { range, tables: true }] = flushes[..] else { panic!("{flushes:?}") };
    // The inner levels are named by what the topmost table that went spans.
    assert!(range.start.0 <= BASE.0 && range.end.0 >= BASE.0 + LEAF, "{range:?}");
    assert!(stage.held().in_limbo >= 3);
    // A fault in the same place meanwhile makes tables of other frames.
    anonymous(&s, BASE, 8, RW)?;
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    let steps = stage.steps();
    assert_eq!((count(&steps, is_table_allocated), count(&steps, freed)), (3, 0));
    on(1, || drop(walker));
    stage.nothing_held(&[&s]);
    assert_eq!(count(&stage.steps(), freed), 3);
    Ok(())
}

#[test]
fn x16_a_table_that_was_refilled_meanwhile_is_not_taken_for_empty() -> Result {
    let stage = Stage::new(1024);
    let s = stage.space()?;
    anonymous(&s, BASE, 512, RW)?;
    for i in 0..512 {
        fault(&s, page(BASE, i), Access::Write);
    }
    // Half of the leaf's pages fill the gather: the lock is given up for a flush, and a fault fills a slot again that
    // the discard has passed.
    let meanwhile = s.clone();
    stage.at(
        |step| matches!(step, Step::Flush { .. }),
        move || {
            on(1, || assert_eq!(fault(&meanwhile, page(BASE, 3), Access::Write), "mapped"));
            let page = frame(&meanwhile, page(BASE, 3)).expect("mapped");
            stage.words(page)[0].store(33, Relaxed);
        },
    );
    s.discard(BASE, LEAF)?;
    assert!(stage.is_done());
    let kept = frame(&s, page(BASE, 3)).ok_or("the page that came after is there")?;
    assert_eq!((stage.words(kept)[0].load(Relaxed), stage.counts(kept)), (33, (1, 1)));
    let tables = s.tables();
    assert_eq!((tables.tables, tables.present, tables.anon, tables.empty), ([1, 1, 1, 1, 0], 1, 1, 0));
    s.discard(BASE, LEAF)?;
    assert_eq!(s.tables().tables, [0, 0, 0, 1, 0]);
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn x16_a_dead_table_that_is_refilled_is_another_table() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    anonymous(&s, BASE, 8, RW)?;
    fault(&s, BASE, Access::Write);
    // The last entry goes, and with it its table; before the flush that follows, the page is touched again.
    let meanwhile = s.clone();
    stage.at(
        |step| matches!(step, Step::Flush { .. }),
        move || {
            on(1, || assert_eq!(fault(&meanwhile, BASE, Access::Write), "mapped"));
        },
    );
    s.discard(BASE, 8 * PAGE_SIZE)?;
    assert!(stage.is_done());
    assert_eq!((s.tables().tables, s.tables().present), ([1, 1, 1, 1, 0], 1));
    stage.nothing_held(&[&s]);
    Ok(())
}
