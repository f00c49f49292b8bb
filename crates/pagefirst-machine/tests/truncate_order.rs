//! Removals in one order of steps (r05, r13, r14).

mod stage;

use pagefirst::file::ReadError;
use pagefirst::space::RemapTo;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::MachineFile;
use stage::*;

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

// catches: remove_walks_once
#[test]
fn r13_a_mapping_that_comes_behind_the_walk_hides_nothing() -> Result {
    let stage = Stage::new(256);
    let (first, s) = (stage.space()?, stage.space()?);
    let file = filled(stage, 16)?;
    let of = |index| pagefirst::space::Backing::File { file: file.clone(), first: index };
    let map = |space: &Space, at, index, prot| {
        let map = pagefirst::space::Map::anonymous(8 * PAGE_SIZE, prot);
        let place = pagefirst::space::Place::Fixed(at);
        space.map(pagefirst::space::Map { backing: of(index), place, ..map }).map(drop)
    };
    // Two mappings that become one, which begins before what is removed.
    map(&first, BASE, 8, R)?;
    map(&s, BASE, 0, R)?;
    map(&s, page(BASE, 8), 8, RW)?;
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
