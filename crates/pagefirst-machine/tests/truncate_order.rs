//! Removals in one order of steps (r05, r13, r14).

mod stage;

use pagefirst::file::{ReadError, ShmemHuge, SyncError, Syncing};
use pagefirst::platform::Note;
use pagefirst::space::{Backing, Map, Place, RemapTo};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr, VirtRange};
use pagefirst_machine::{Late, MachineFile};
use stage::*;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

const BASE: VirtAddr = VirtAddr(1 << 30);
const THERE: VirtAddr = VirtAddr((1 << 30) + (64 << 12));

fn is_flush(step: &Step) -> bool {
    matches!(step, Step::Flush { .. })
}

fn filled(stage: &'static Stage, pages: u64) -> Result<Cache> {
    let file = stage.cache(&MachineFile::zeros(), pages)?;
    (0..pages).try_for_each(|index| stage.warm(&file, index))?;
    Ok(file)
}

/// Maps eight pages of a file privately.
fn eight(space: &Space, at: VirtAddr, file: &Cache, index: u64, prot: Prot) -> Result {
    let backing = Backing::File { file: file.clone(), first: index };
    let map = Map { backing, place: Place::Fixed(at), ..Map::anonymous(8 * PAGE_SIZE, prot) };
    Ok(space.map(map).map(drop)?)
}

/// Another space maps what is to be removed, and one shows it in the second of two mappings that become one, when the second
/// is made read-only: a walk finds that one behind its place, if it was with the other space before. All is copied.
fn two_that_become_one(stage: &'static Stage) -> Result<(Space, Space, Cache)> {
    let (first, s) = (stage.space()?, stage.space()?);
    let file = filled(stage, 16)?;
    eight(&first, BASE, &file, 8, RW)?;
    eight(&s, BASE, &file, 0, R)?;
    eight(&s, page(BASE, 8), &file, 8, RW)?;
    for i in 0..8 {
        for (space, i) in [(&first, i), (&s, 8 + i)] {
            assert_eq!(fault(space, page(BASE, i), Access::Write), "mapped");
        }
    }
    Ok((first, s, file))
}

fn make_one(s: &Space) {
    s.protect(page(BASE, 8), 8 * PAGE_SIZE, R).expect("mapped");
}

fn make_two(s: &Space) {
    s.protect(page(BASE, 8), 8 * PAGE_SIZE, RW).expect("mapped");
}

fn mapped(space: &Space, at: VirtAddr, pages: u64) -> Vec<u64> {
    (0..pages).filter(|i| frame(space, page(at, *i)).is_some()).collect()
}

#[test]
fn r05_a_fault_that_meets_a_removal_waits_for_its_turn_and_beyond_the_end_does_not() -> Result {
    for punches in [true, false] {
        let stage = Stage::new(256);
        let (s, file) = (stage.space()?, filled(stage, 8)?);
        shared(&s, BASE, &file, 8, RW)?;
        assert_eq!(fault(&s, page(BASE, 0), Access::Read), "mapped");
        // The pages have left the tables, and are in the cache still.
        let (meanwhile, cache) = (s.clone(), file.clone());
        stage.at(is_flush, move || {
            on(1, || {
                assert_eq!((mapped(&meanwhile, BASE, 8), cache.pages()), (vec![0, 1], 8));
                let end = if punches { "blocked" } else { "Bus(BeyondEnd)" };
                for access in [Access::Read, Access::Write] {
                    assert_eq!(fault(&meanwhile, page(BASE, 3), access), end);
                }
                assert_eq!(fault(&meanwhile, page(BASE, 0), Access::Read), "spurious");
            });
        });
        match punches {
            true => file.punch(stage, 2 * PAGE_SIZE..8 * PAGE_SIZE),
            false => file.set_size(stage, 2 * PAGE_SIZE),
        }
        assert!(stage.is_done());
        assert_eq!((mapped(&s, BASE, 8), file.pages()), (vec![0, 1], 2));
        assert_eq!(fault(&s, page(BASE, 3), Access::Read), if punches { "mapped" } else { "Bus(BeyondEnd)" });
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

// catches: insert_while_removing
#[test]
fn r05_a_page_that_was_not_there_is_not_put_into_a_hole_in_the_making() -> Result {
    let stage = Stage::new(256);
    let (s, file) = (stage.space()?, stage.cache(&MachineFile::zeros(), 8)?);
    shared(&s, BASE, &file, 8, RW)?;
    stage.warm(&file, 3)?;
    assert_eq!(fault(&s, page(BASE, 3), Access::Read), "mapped");
    let (meanwhile, cache) = (s.clone(), file.clone());
    stage.at(is_flush, move || {
        on(1, || {
            for i in [1, 2, 5] {
                assert_eq!(fault(&meanwhile, page(BASE, i), Access::Read), "blocked", "page {i}");
            }
            assert_eq!(fault(&meanwhile, page(BASE, 6), Access::Read), "mapped");
            assert_eq!(cache.pages(), 2);
        });
    });
    // Pages 1 and 5 lie in it in part.
    file.punch(stage, PAGE_SIZE + 8..5 * PAGE_SIZE + 8);
    assert!(stage.is_done());
    assert_eq!(file.pages(), 1);
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn r13_a_mapping_that_comes_behind_the_walk_hides_nothing() -> Result {
    let stage = Stage::new(256);
    let (first, s) = (stage.space()?, stage.space()?);
    let file = filled(stage, 16)?;
    // Two mappings that become one, which begins before what is removed.
    eight(&first, BASE, &file, 8, R)?;
    eight(&s, BASE, &file, 0, R)?;
    eight(&s, page(BASE, 8), &file, 8, RW)?;
    for i in 0..8 {
        fault(&first, page(BASE, i), Access::Read);
        fault(&s, page(BASE, 8 + i), if i % 2 == 0 { Access::Read } else { Access::Write });
    }
    let merged = s.clone();
    stage.at(is_flush, move || {
        on(1, || merged.protect(page(BASE, 8), 8 * PAGE_SIZE, R).expect("mapped"));
    });
    file.set_size(stage, 8 * PAGE_SIZE);
    assert!(stage.is_done());
    assert_eq!(s.vma_count(), 1);
    assert_eq!((mapped(&s, BASE, 16), mapped(&first, BASE, 8)), (vec![], vec![]));
    assert_eq!(file.pages(), 8);
    stage.nothing_held(&[&first, &s]);
    Ok(())
}

#[test]
fn r14_what_is_on_the_move_does_not_arrive_beyond_the_end() -> Result {
    for copies in [false, true] {
        let stage = Stage::new(256);
        let (s, file) = (stage.space()?, filled(stage, 16)?);
        private(&s, BASE, &file, 16, RW)?;
        for i in 0..16 {
            fault(&s, page(BASE, i), if copies { Access::Write } else { Access::Read });
        }
        // The entries have left the source and are flushed: the file shrinks before they go to the destination. The
        // removal has to wait for the move, so it is another thread's.
        let cut = file.clone();
        let size = file.clone();
        let removal = std::sync::Arc::new(std::sync::Mutex::new(None));
        let thread = removal.clone();
        stage.at(nth(1, is_flush), move || {
            let begun = std::thread::spawn(move || {
                stage.play(2);
                cut.set_size(stage, 4 * PAGE_SIZE);
            });
            while size.size() > 4 * PAGE_SIZE {
                std::thread::yield_now();
            }
            *thread.lock().expect("nobody panicked") = Some(begun);
        });
        s.remap(BASE, 16 * PAGE_SIZE, 16 * PAGE_SIZE, RemapTo::Fixed(THERE))?;
        assert!(stage.is_done());
        let begun = removal.lock().expect("nobody panicked").take().ok_or("not begun")?;
        begun.join().map_err(|_| "the removal failed")?;
        assert_eq!(mapped(&s, THERE, 16), [0, 1, 2, 3]);
        assert_eq!(mapped(&s, BASE, 16), [0; 0]);
        assert_eq!(file.pages(), 4);
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

#[test]
fn r13_what_is_being_stored_is_stored_before_a_hole_is_forgotten() -> Result {
    let stage = Stage::new(256);
    let store = MachineFile::zeros();
    let file = stage.cache(&store, 4)?;
    file.write_at(stage, 0, &[7; 3 * PAGE_SIZE as usize]).map_err(|e| format!("{e:?}"))?;
    file.punch(stage, PAGE_SIZE..2 * PAGE_SIZE);
    assert_eq!(file.write_back(stage)?, 2);
    assert_eq!([0, 1, 2].map(|index| store.stored(index).len()), [4096, 0, 4096]);
    file.punch(stage, 0..3 * PAGE_SIZE);
    assert_eq!([0, 1, 2].map(|index| store.stored(index).len()), [0; 3]);
    let mut seen = [1; 3 * PAGE_SIZE as usize];
    file.read_at(stage, 0, &mut seen).map_err(|e: ReadError<Stage>| format!("{e:?}"))?;
    assert!(seen.iter().all(|byte| *byte == 0));
    Ok(())
}

/// A mapping call takes private copies to behind the walk's place, and is still at work when the walk has ended.
#[test]
fn r13_a_removal_waits_for_a_call_that_went_behind_its_walk() -> Result {
    let stage = Stage::new(256);
    let (first, s, file) = two_that_become_one(stage)?;
    let goes_on = Arc::new(AtomicBool::new(false));
    let (merged, may_go_on, has_begun) = (s.clone(), goes_on.clone(), Arc::new(AtomicBool::new(false)));
    let begun = has_begun.clone();
    let call = stage.begin_at(
        is_flush,
        move || {
            // It has announced, and is to publish.
            stage.at(is_flush, move || {
                begun.store(true, Release);
                while !may_go_on.load(Acquire) {
                    std::thread::yield_now();
                }
            });
            make_one(&merged);
        },
        move || has_begun.load(Acquire),
    );
    let waits = goes_on.clone();
    stage.at(|step| *step == Step::Wait, move || waits.store(true, Release));
    file.set_size(stage, 8 * PAGE_SIZE);
    let left = (mapped(&s, BASE, 16), mapped(&first, BASE, 8));
    goes_on.store(true, Release);
    call.end()?;
    assert_eq!(left, (vec![], vec![]));
    stage.nothing_held(&[&first, &s]);
    Ok(())
}

// Mapping calls hide private copies from both walks: each time, they are where the walk has been.
// catches: calls_do_not_help
#[test]
fn r13_a_call_that_begins_after_a_removal_hides_nothing() -> Result {
    let stage = Stage::new(256);
    let zeroth = stage.space()?;
    let (first, s, file) = two_that_become_one(stage)?;
    shared(&zeroth, BASE, &file, 16, R)?;
    assert_eq!(fault(&zeroth, page(BASE, 1), Access::Read), "mapped");
    let root_of = |space: &Space| space.page_table().root_frame();
    let (roots, spaces) = ((root_of(&zeroth), root_of(&first)), (s.clone(), s.clone(), s.clone()));
    let scans = move |root, n| nth(n, move |step| *step == Step::Note(Note::TableScanned(root, 3)));
    stage.at(scans(roots.1, 1), move || on(1, || make_one(&spaces.0)));
    stage.at(scans(roots.0, 2), move || {
        on(1, || make_two(&spaces.1));
        stage.at(scans(roots.1, 1), move || on(1, || make_one(&spaces.2)));
    });
    file.set_size(stage, 8 * PAGE_SIZE);
    assert_eq!((mapped(&s, BASE, 16), mapped(&first, BASE, 8)), (vec![], vec![]));
    assert!(stage.is_done());
    stage.nothing_held(&[&zeroth, &first, &s]);
    Ok(())
}

/// A file is mapped and unmapped whenever a removal takes a table's lock.
#[test]
fn a_removal_ends_though_the_file_is_mapped_again_and_again() -> Result {
    fn arm(stage: &'static Stage, s: &Space, cache: &Cache, times: &Arc<AtomicU32>) {
        let (s, cache, times) = (s.clone(), cache.clone(), times.clone());
        stage.at(is_table_locked, move || {
            on(1, || {
                shared(&s, BASE, &cache, 4, R).expect("room");
                s.unmap(BASE, 4 * PAGE_SIZE).expect("a range");
            });
            if times.fetch_add(1, Relaxed) < 100 {
                arm(stage, &s, &cache, &times);
            }
        });
    }
    let stage = Stage::new(256);
    let cache = stage.cache(&MachineFile::zeros(), 4)?;
    let (s, other) = (stage.space()?, stage.space()?);
    shared(&s, BASE, &cache, 4, R)?;
    assert_eq!(fault(&s, BASE, Access::Read), "mapped");
    let times = Arc::new(AtomicU32::new(0));
    arm(stage, &other, &cache, &times);
    cache.set_size(stage, PAGE_SIZE);
    let times = times.load(Relaxed);
    assert!(times < 20, "it walked {times} times for nothing");
    Ok(())
}

/// While a mapping moves, pages that have come to its destination are punched out of the file. If they went from there, the
/// tables would too, and the next page needed others: the removal waits for the move.
#[test]
fn a_move_has_tables_enough_though_pages_are_removed_at_its_destination() -> Result {
    let stage = Stage::new(256);
    let cache = filled(stage, 6)?;
    let s = stage.space()?;
    shared(&s, BASE, &cache, 6, RW)?;
    (0..6).for_each(|i| assert_ne!(fault(&s, page(BASE, i), Access::Write), "blocked"));
    let (punched, begun) = (cache.clone(), Arc::new(AtomicBool::new(false)));
    let has_begun = begun.clone();
    stage.at(|step| *step == Step::Wait, move || begun.store(true, Release));
    // A page has come, and the next is on its way.
    let punch = stage.begin_at(
        nth(2, |step| matches!(step, Step::Read(1.., 3))),
        move || punched.punch(stage, 0..4 * PAGE_SIZE),
        move || has_begun.load(Acquire),
    );
    // A part of the root of its own.
    let there = VirtAddr(8 << 40);
    s.remap(BASE, 6 * PAGE_SIZE, 6 * PAGE_SIZE, RemapTo::Fixed(there))?;
    punch.end()?;
    assert_eq!(mapped(&s, there, 6), [4, 5]);
    assert_eq!(cache.pages(), 2);
    stage.nothing_held(&[&s]);
    Ok(())
}

/// A removal waits asleep for what is being stored, and has taken the mappings out once.
#[test]
fn a_removal_waits_once_for_what_is_being_stored() -> Result {
    let stage = Stage::new(256);
    let store = MachineFile::zeros().with_tracking(true).late(Late::Held).late_writes();
    let file = stage.cache(&store, 4)?;
    let s = stage.space()?;
    shared(&s, BASE, &file, 4, RW)?;
    assert_eq!(fault(&s, page(BASE, 2), Access::Write), "blocked");
    assert!(store.finish(2));
    assert_eq!(fault(&s, page(BASE, 2), Access::Write), "mapped");
    assert_eq!(file.write_back(stage)?, 1);
    let late = store.clone();
    stage.at(|step| *step == Step::Wait, move || assert!(late.finish(2)));
    stage.steps();
    file.set_size(stage, PAGE_SIZE);
    assert!(stage.is_done());
    let steps = stage.steps();
    assert_eq!((count(&steps, is_flush), count(&steps, |step| *step == Step::Relax)), (1, 0));
    assert_eq!((file.pages(), store.stored(2).len()), (0, 0));
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn what_stays_of_a_folio_across_the_end_is_zeroed_with_no_spin_lock_held() -> Result {
    let stage = Stage::new(256);
    let file = stage.cache(&MachineFile::shmem(ShmemHuge::Always).with_folios(3), 8)?;
    let s = stage.space()?;
    shared(&s, BASE, &file, 8, RW)?;
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    let first = frame(&s, BASE).ok_or("mapped")?;
    let pin = s.pin(VirtRange::new(BASE, page(BASE, 1)), true).map_err(|e| e.to_string())?;
    for grows in [false, true] {
        let other = file.clone();
        let takes_it = move || {
            stage.at(|step| *step == Step::Relax, || panic!("the file's lock is held"));
            on(1, || assert_eq!(other.pages(), 8));
        };
        stage.at(move |step| *step == Step::Page(first.add(5)), takes_it);
        file.set_size(stage, if grows { 8 * PAGE_SIZE } else { PAGE_SIZE });
        // Only the step that would have been wrong is left.
        assert_eq!(stage.left(), 1 + grows as usize);
    }
    drop(pin);
    Ok(())
}

#[test]
fn a_page_beyond_the_end_is_not_read_with_its_folio() -> Result {
    let stage = Stage::new(256);
    let file = stage.cache(&MachineFile::zeros().with_folios(3), 8)?;
    let cut = file.clone();
    stage.at(is_frame_allocated, move || on(1, || cut.set_size(stage, 2 * PAGE_SIZE)));
    let mut byte = [7];
    let read = file.read_at(stage, 5 * PAGE_SIZE, &mut byte).map_err(|e| format!("{e:?}"))?;
    assert!(stage.is_done());
    assert_eq!((read, byte, file.pages()), (0, [7], 0));
    Ok(())
}

// The hole is zero in memory, and the storage has yet to forget it: bytes at its edge, and a page of a folio across it.
// catches: store_beside_removal
#[test]
fn r05_what_is_written_into_a_hole_in_the_making_is_not_forgotten() -> Result {
    for (pages, order, hole) in [(2, 0, 100..PAGE_SIZE + 200), (8, 3, 4 * PAGE_SIZE..8 * PAGE_SIZE)] {
        let stage = Stage::new(256);
        let store = MachineFile::zeros().with_tracking(true).with_folios(order);
        let (s, file) = (stage.space()?, stage.cache(&store, pages)?);
        let write = |at: u64, bytes: &[u8]| file.write_at(stage, at, bytes).map_err(|e| format!("{e:?}"));
        let read = |to: &mut [u8]| file.read_at(stage, hole.start, to).map_err(|e| format!("{e:?}"));
        write(0, &vec![7; (pages * PAGE_SIZE) as usize])?;
        assert_eq!(file.write_back(stage)?, pages);
        shared(&s, BASE, &file, pages, RW)?;
        assert_eq!(fault(&s, BASE, Access::Read), "mapped");
        // Its first page is zero when its last one is about to be.
        let last = frame(&s, page(BASE, (hole.end - 1) / PAGE_SIZE)).ok_or("mapped")?;
        let is_zeroed = move |step: &Step| *step == Step::Page(last);
        let (written, start) = (file.clone(), hole.start);
        let waited = Arc::new(AtomicBool::new(false));
        let told = waited.clone();
        // Nothing of the folio is stored now, and nobody who asks for that is kept: he may have a store to complete.
        stage.at(is_zeroed, move || {
            on(1, || {
                written.write_at(stage, start, &[9]).expect("it is there");
                written.write_back(stage).expect("it can be stored");
                let synced = written.sync(&mut Syncing::all(), &mut written.store_errors());
                let waits = matches!(synced, Err(SyncError::Blocked(ticket)) if !ticket.is_ready());
                told.store(waits, Release);
            });
        });
        file.punch(stage, hole.clone());
        assert!(stage.is_done());
        file.write_back(stage)?;
        s.discard(BASE, pages * PAGE_SIZE)?;
        let mut seen = [1; 100];
        read(&mut seen)?;
        assert_eq!(seen[..2], [9, 0]);
        assert_eq!(file.evict(stage), pages);
        read(&mut seen)?;
        assert_eq!((seen[0], seen[1..].iter().max()), (9, Some(&0)), "what was stored is forgotten");
        assert!(waited.load(Acquire), "it was not told to come again");
    }
    Ok(())
}

/// A folio lies across a hole's edge and across the end. The one who maps it goes when the hole is being made, at whatever
/// moment, and it is evicted as far as that goes.
#[test]
fn r05_a_folio_that_comes_apart_while_a_hole_is_made_is_zero_there() -> Result {
    let mut seen = 0;
    for moment in 1.. {
        let stage = Stage::new(256);
        let file = stage.cache(&MachineFile::shmem(ShmemHuge::Always).with_folios(3), 8)?;
        let s = stage.space()?;
        shared(&s, BASE, &file, 1, RW)?;
        assert_eq!(fault(&s, BASE, Access::Write), "mapped");
        file.set_size(stage, 6 * PAGE_SIZE);
        file.write_at(stage, 0, &[7; 6 * PAGE_SIZE as usize]).map_err(|e| format!("{e:?}"))?;
        assert_eq!(file.pages(), 8);
        let (mapped, evicted) = (s.clone(), file.clone());
        stage.at(nth(moment, |step| *step == Step::Leave), move || {
            on(1, || {
                mapped.discard(BASE, PAGE_SIZE).expect("mapped");
                evicted.evict(stage);
            });
        });
        file.punch(stage, 4 * PAGE_SIZE..8 * PAGE_SIZE);
        if !stage.is_done() {
            break;
        }
        seen = moment;
        let mut bytes = [1; 6 * PAGE_SIZE as usize];
        file.read_at(stage, 0, &mut bytes).map_err(|e| format!("{e:?}"))?;
        let (before, hole) = bytes.split_at(4 * PAGE_SIZE as usize);
        assert_eq!((before.iter().min(), hole.iter().max()), (Some(&7), Some(&0)), "moment {moment}");
    }
    assert!(seen > 5);
    Ok(())
}
