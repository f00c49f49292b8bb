//! Races as one defined order of events each: what another CPU does is put between two steps of a fault.

mod stage;

use pagefirst::arch::Attrs;
use pagefirst::platform::Note;
use pagefirst::sync::epoch::Pin;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::MachineFile;
use stage::*;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

const BASE: VirtAddr = VirtAddr(1 << 40);

/// The message with which `f` panics.
#[cfg(debug_assertions)]
fn refused(f: impl FnOnce()) -> Option<String> {
    let end = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
    end.err().map(|e| e.downcast_ref::<String>().cloned().unwrap_or_default())
}

#[test]
#[cfg(debug_assertions)]
fn c08_what_is_taken_against_the_lock_order_is_refused() -> Result {
    use pagefirst::table::Reserve;
    let stage = Stage::new(256);
    let s = stage.space()?;
    anonymous(&s, BASE, 8, RW)?;
    // While a table is locked, by a fault that is about to publish.
    let said = Arc::new(Mutex::new(Vec::new()));
    let (says, meanwhile) = (said.clone(), s.clone());
    stage.at(is_table_locked, move || {
        let mut says = says.lock().expect("one thread");
        says.push(refused(|| _ = Reserve::new(stage).refill(1)));
        says.push(refused(|| drop(Pin::new(stage))));
        says.push(refused(|| _ = meanwhile.unmap(BASE, PAGE_SIZE)));
        says.push(refused(|| stage.vm_quiesce()));
    });
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    let said = std::mem::take(&mut *said.lock().expect("one thread"));
    let starts = [
        "a table is reserved while",
        "lock order: 1 wanted",
        "a lock that may sleep is taken",
        "quiesce while",
    ];
    assert_eq!(said.len(), starts.len());
    for (said, start) in said.iter().zip(starts) {
        assert!(said.as_ref().is_some_and(|s| s.starts_with(start)), "{said:?}, not {start}");
    }
    // While pinned: what flushes, what waits, and another pin; a reserve may be filled.
    let pin = Pin::new(stage);
    assert!(refused(|| _ = s.discard(BASE, PAGE_SIZE)).is_some());
    assert!(refused(|| drop(Pin::new(stage))).is_some());
    assert_eq!(refused(|| _ = Reserve::new(stage).refill(1)), None);
    drop(pin);
    s.discard(BASE, PAGE_SIZE)?;
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn c16_an_entry_that_changed_since_it_was_read_is_not_overwritten() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    anonymous(&s, BASE, 1, RW)?;
    fault(&s, BASE, Access::Read);
    // CPU 0 has read the entry and has its page; before it locks the table, CPU 1 writes to the page.
    let meanwhile = s.clone();
    stage.at(is_frame_allocated, move || {
        on(1, || assert_eq!(fault(&meanwhile, BASE, Access::Write), "mapped"));
        let page = frame(&meanwhile, BASE).expect("mapped");
        stage.words(page)[0].store(77, Relaxed);
    });
    assert_eq!(fault(&s, BASE, Access::Write), "spurious");
    assert!(stage.is_done());
    let page = frame(&s, BASE).ok_or("mapped")?;
    assert_eq!(stage.words(page)[0].load(Relaxed), 77, "its write is not lost");
    assert_eq!((stage.counts(page), s.account().faults.copy), ((1, 1), 1));
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn c19_what_hardware_marks_meanwhile_is_no_change_and_is_kept() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    let file = stage.cache(&MachineFile::zeros().with_tracking(true), 1)?;
    shared(&s, BASE, &file, 1, RW)?;
    fault(&s, BASE, Access::Read);
    let read = entry(&s, BASE);
    let meanwhile = s.clone();
    stage.at(move |step| *step == Step::Attrs(read), move || hardware_marks(&meanwhile, BASE, Attrs::DIRTY));
    stage.steps();
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    assert!(stage.is_done());
    assert_eq!(count(&stage.steps(), is_table_locked), 1, "it did not have to look again");
    assert!(attrs(&s, BASE).contains(Attrs::WRITE | Attrs::DIRTY | Attrs::ACCESSED));
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn c20_a_fault_blocked_on_a_mapping_call_holds_nothing() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    anonymous(&s, BASE, 8, RW)?;
    fault(&s, BASE, Access::Write);
    let meanwhile = s.clone();
    stage.at(
        |step| matches!(step, Step::Flush { .. }),
        move || {
            on(1, || {
                stage.steps();
                for (i, access) in [(0, Access::Write), (1, Access::Read), (1, Access::Write)] {
                    assert_eq!(fault(&meanwhile, page(BASE, i), access), "blocked");
                }
                drop(Pin::new(stage));
                let steps = stage.steps();
                let took = |s: &Step| is_table_allocated(s) || is_table_locked(s) || is_frame_allocated(s);
                assert_eq!(count(&steps, took), 0, "{steps:?}");
            });
        },
    );
    s.unmap(BASE, 8 * PAGE_SIZE)?;
    assert!(stage.is_done());
    stage.nothing_held(&[&s]);
    assert_eq!(fault(&s, BASE, Access::Write), "Segv(NotMapped)");
    Ok(())
}

#[test]
fn c47_a_neighbour_whose_frame_is_another_page_by_then_is_not_mapped() -> Result {
    const PAGES: u64 = 16;
    let stage = Stage::new(256);
    let (s, other) = (stage.space()?, stage.space()?);
    let file = stage.cache(&MachineFile::zeros(), PAGES)?;
    (0..PAGES).try_for_each(|index| stage.warm(&file, index))?;
    private(&other, BASE, &file, PAGES, R)?;
    private(&s, BASE, &file, PAGES, R)?;
    fault(&other, BASE, Access::Read);
    let neighbour = frame(&other, page(BASE, 5)).ok_or("mapped around")?;
    other.discard(BASE, PAGES * PAGE_SIZE)?;
    // The neighbour was found in the cache, and is about to be counted and checked: then all that are not mapped leave the
    // cache, and their frames come back as other pages of it.
    let cache = file.clone();
    stage.at(
        move |step| *step == Step::Meta(neighbour),
        move || {
            on(1, || {
                assert_eq!(cache.evict(stage), PAGES - 5, "all but those that are mapped by now");
                (0..PAGES).try_for_each(|index| stage.warm(&cache, index)).expect("memory");
            });
        },
    );
    assert_eq!(fault(&s, page(BASE, 3), Access::Read), "mapped");
    assert!(stage.is_done());
    fault(&other, BASE, Access::Read);
    let shows = |space: &Space, i| frame(space, page(BASE, i));
    assert_ne!(shows(&other, 5), Some(neighbour), "it is another page now");
    for i in 0..PAGES {
        assert!(shows(&s, i).is_none_or(|pfn| Some(pfn) == shows(&other, i)), "page {i}");
    }
    assert_eq!(shows(&s, 3), shows(&other, 3));
    stage.nothing_held(&[&s, &other]);
    Ok(())
}

/// CPU 0 is about to reserve tables, its page in hand, when CPU 1 maps the same page.
fn lost_race(stage: &'static Stage, s: &Space) -> Vec<Step> {
    let meanwhile = s.clone();
    stage.at(is_table_allocated, move || {
        on(1, || assert_eq!(fault(&meanwhile, BASE, Access::Write), "mapped"));
    });
    stage.steps();
    assert_eq!(fault(s, BASE, Access::Write), "spurious");
    assert!(stage.is_done());
    stage.steps()
}

#[test]
fn c01_a_table_that_is_reserved_is_published_or_returns() -> Result {
    // What comes between when the first, second or third table is reserved, and how the fault ends.
    type Between = fn(&Space);
    let between: [(Between, &str); 4] = [
        (|_| (), "mapped"),
        (|s| assert_eq!(fault(s, page(BASE, 1), Access::Write), "mapped"), "mapped"),
        (|s| assert_eq!(fault(s, BASE, Access::Read), "mapped"), "spurious"),
        (|s| assert!(s.unmap(BASE, 8 * PAGE_SIZE).is_ok()), "Segv(NotMapped)"),
    ];
    for reserved in 1..=3 {
        for (happens, end) in between {
            let stage = Stage::new(256);
            let s = stage.space()?;
            anonymous(&s, BASE, 8, RW)?;
            let meanwhile = s.clone();
            stage.at(nth(reserved, is_table_allocated), move || on(1, || happens(&meanwhile)));
            stage.steps();
            assert_eq!(fault(&s, BASE, Access::Write), end);
            assert!(stage.is_done());
            let steps = stage.steps();
            let returned = |step: &Step| matches!(step, Step::Note(Note::TableFreed(_)));
            let published: u64 = s.account().table_bytes[..3].iter().sum::<u64>() / PAGE_SIZE;
            let (allocated, returned) = (count(&steps, is_table_allocated), count(&steps, returned));
            assert_eq!(allocated, published as usize + returned, "{end} after table {reserved}");
            stage.nothing_held(&[&s]);
        }
    }
    Ok(())
}

#[test]
fn c22_the_loser_of_the_race_gives_its_chain_back() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    anonymous(&s, BASE, 1, RW)?;
    let steps = lost_race(stage, &s);
    let freed = |step: &Step| matches!(step, Step::Note(Note::TableFreed(_)));
    assert_eq!((count(&steps, is_table_allocated), count(&steps, freed)), (6, 3));
    assert_eq!(s.tables().tables, [1, 1, 1, 1, 0]);
    assert_eq!(s.account().table_bytes, [PAGE_SIZE, PAGE_SIZE, PAGE_SIZE, PAGE_SIZE, 0], "counted once");
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn c26_the_loser_of_the_race_gives_its_page_and_counts_back() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    anonymous(&s, BASE, 1, RW)?;
    stage.nothing_held(&[&s]);
    lost_race(stage, &s);
    let winner = frame(&s, BASE).ok_or("mapped")?;
    assert_eq!(stage.counts(winner), (1, 1));
    assert!(stage.words(winner).iter().all(|w| w.load(Relaxed) == 0));
    let account = s.account();
    assert_eq!((account.anon_bytes, account.faults.anon_write, account.faults.spurious), (PAGE_SIZE, 1, 1));
    s.unmap(BASE, PAGE_SIZE)?;
    stage.nothing_held(&[&s]);
    let held = stage.held();
    lost_race_again(stage, &s)?;
    assert_eq!(stage.held(), held, "nothing more is held than after the first time");
    Ok(())
}

fn lost_race_again(stage: &'static Stage, s: &Space) -> Result {
    anonymous(s, BASE, 1, RW)?;
    lost_race(stage, s);
    s.unmap(BASE, PAGE_SIZE)?;
    stage.nothing_held(&[s]);
    Ok(())
}

#[test]
fn c36_an_install_that_cannot_go_on_hands_the_page_back() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    anonymous(&s, BASE, 8, RW)?;
    stage.nothing_held(&[&s]);
    let held = stage.held();
    // The mapping is taken away when the page and its tables are in hand: again, and there is nothing to map it in.
    let meanwhile = s.clone();
    stage.at(nth(3, is_table_allocated), move || {
        on(1, || assert!(meanwhile.unmap(BASE, 8 * PAGE_SIZE).is_ok()));
    });
    assert_eq!(fault(&s, BASE, Access::Write), "Segv(NotMapped)");
    assert!(stage.is_done());
    assert_eq!(s.tables().tables, [0, 0, 0, 1, 0]);
    stage.nothing_held(&[&s]);
    assert!(stage.held().frames <= held.frames, "the page came back");

    // Replaced by another mapping instead: the same page is mapped there, no second one is obtained.
    anonymous(&s, BASE, 8, RW)?;
    let meanwhile = s.clone();
    stage.at(nth(3, is_table_allocated), move || {
        on(1, || assert!(meanwhile.protect(BASE, 8 * PAGE_SIZE, R).is_ok()));
        on(1, || assert!(meanwhile.protect(BASE, 8 * PAGE_SIZE, RW).is_ok()));
    });
    let cleared = page_taken_first(stage);
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    assert!(stage.is_done());
    assert_eq!(frame(&s, BASE), *cleared.lock().expect("one thread"), "the page that was in hand");
    stage.nothing_held(&[&s]);
    Ok(())
}

/// Notes the first frame that is allocated from here on: the fault's page, for that comes first.
fn page_taken_first(stage: &'static Stage) -> Arc<Mutex<Option<pagefirst::types::Pfn>>> {
    let found = Arc::new(Mutex::new(None));
    let notes = found.clone();
    stage.at(
        move |step| {
            if let Step::Note(Note::FrameAllocated(pfn, _)) = step {
                *notes.lock().expect("one thread") = Some(*pfn);
            }
            is_frame_allocated(step)
        },
        || {},
    );
    found
}

#[test]
fn c38_a_slot_that_is_taken_when_the_lock_is_held_is_left_as_it_is() -> Result {
    // The leaf table is there, CPU 0 has found the slot empty and has its page: then CPU 1 fills it, by a read or by a
    // write.
    for access in [Access::Read, Access::Write] {
        let stage = Stage::new(256);
        let s = stage.space()?;
        anonymous(&s, BASE, 8, RW)?;
        fault(&s, page(BASE, 7), Access::Write);
        let meanwhile = s.clone();
        stage.at(is_frame_allocated, move || {
            on(1, || assert_eq!(fault(&meanwhile, BASE, access), "mapped"));
            *TAKEN.lock().expect("one thread") = entry(&meanwhile, BASE);
        });
        stage.steps();
        assert_eq!(fault(&s, BASE, Access::Write), "spurious");
        assert!(stage.is_done());
        assert_eq!(entry(&s, BASE), *TAKEN.lock().expect("one thread"), "left as it was");
        assert_eq!(count(&stage.steps(), is_table_allocated), 0);
        assert_eq!(s.account().anon_bytes, if access == Access::Write { 2 } else { 1 } * PAGE_SIZE);
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

static TAKEN: Mutex<u64> = Mutex::new(0);
