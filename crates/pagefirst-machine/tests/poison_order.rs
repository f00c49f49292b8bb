//! Memory errors that hardware reports in the middle of something, each race as one defined order of events.

mod stage;

use pagefirst::Poisoned;
use pagefirst::file::{ReadError, ShmemHuge};
use pagefirst::frame::FrameFlags;
use pagefirst::platform::{Note, Platform};
use pagefirst::types::{PAGE_SIZE, Pfn};
use pagefirst_machine::MachineFile;
use stage::*;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Acquire, Release};

/// A page is reported as bad between two attempts to put it into its file.
#[test]
fn the_mark_of_a_page_that_is_being_put_into_its_file_stays() -> Result {
    let stage = Stage::new(256);
    let cache = stage.cache(&MachineFile::zeros(), 4)?;
    let bad = Arc::new(AtomicU32::new(0));
    let (first, then) = (bad.clone(), bad.clone());
    // The page, then a node of the index.
    stage.at_after(
        move |step| match step {
            Step::Note(Note::FrameAllocated(pfn, 0)) => {
                first.store(pfn.0, Release);
                true
            }
            _ => false,
        },
        is_frame_allocated,
        move || {
            let pfn = Pfn(then.load(Acquire));
            let said = on(1, || stage.vm().poison(stage, pfn));
            assert_eq!(said, Poisoned::File { lost: false });
        },
    );
    let read = cache.read_at(stage, 0, &mut [0]);
    assert!(stage.is_done());
    let pfn = Pfn(bad.load(Acquire));
    assert!(stage.meta(pfn).flags().contains(FrameFlags::POISON), "the mark is gone; read: {read:?}");
    Ok(())
}

/// The same for a part of a folio that is about to get its tails.
#[test]
fn the_mark_of_a_part_of_a_folio_that_is_being_made_stays() -> Result {
    let stage = Stage::new(2560);
    let cache = stage.cache(&MachineFile::shmem(ShmemHuge::Always), 512)?;
    let head = Arc::new(AtomicU32::new(0));
    let (first, then) = (head.clone(), head.clone());
    // Its metadata as the tails are made: the head's first, then theirs one by one.
    let made = move |step: &Step| {
        let head = Pfn(then.load(Acquire));
        head.0 != 0
            && *step == Step::Meta(head.add(5))
            && stage.counts(head).0 > 0
            && stage.meta(head).flags().contains(FrameFlags::FILE)
    };
    let bad = head.clone();
    stage.at_after(
        move |step| match step {
            Step::Note(Note::FrameAllocated(pfn, 9)) => {
                first.store(pfn.0, Release);
                true
            }
            _ => false,
        },
        made,
        move || {
            let pfn = Pfn(bad.load(Acquire)).add(5);
            on(1, || stage.vm().poison(stage, pfn));
            assert!(stage.meta(pfn).flags().contains(FrameFlags::POISON));
        },
    );
    cache.write_at(stage, 0, &[1]).map_err(|e| format!("{e:?}"))?;
    assert!(stage.is_done());
    let pfn = Pfn(head.load(Acquire)).add(5);
    assert!(stage.meta(pfn).flags().contains(FrameFlags::POISON), "the mark is gone");
    let read = cache.read_at(stage, 5 * PAGE_SIZE, &mut [0]);
    assert!(matches!(read, Err(ReadError::Poisoned)), "{read:?}");
    Ok(())
}
