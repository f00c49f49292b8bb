//! Memory errors that hardware reports in the middle of something, each race as one defined order of events.

mod stage;

use pagefirst::Poisoned;
use pagefirst::arch::Attrs;
use pagefirst::file::{ReadError, ShmemHuge};
use pagefirst::frame::FrameFlags;
use pagefirst::platform::Platform;
use pagefirst::space::RemapTo;
use pagefirst::types::{Access, PAGE_SIZE, Pfn, VirtAddr};
use pagefirst_machine::MachineFile;
use stage::*;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Acquire;
use std::sync::{Arc, Mutex};

/// A page is reported as bad between two attempts to put it into its file.
#[test]
fn the_mark_of_a_page_that_is_being_put_into_its_file_stays() -> Result {
    let stage = Stage::new(256);
    let cache = stage.cache(&MachineFile::zeros(), 4)?;
    let bad = Arc::new(AtomicU32::new(0));
    let then = bad.clone();
    // The page, then a node of the index.
    stage.at_after(allocates(0, &bad), is_frame_allocated, move || {
        let pfn = Pfn(then.load(Acquire));
        let said = on(1, || stage.vm().poison(stage, pfn));
        assert_eq!(said, Poisoned::File { lost: false });
    });
    let read = cache.read_at(stage, 0, &mut [0]);
    assert!(stage.is_done());
    let pfn = Pfn(bad.load(Acquire));
    assert!(stage.flags(pfn).contains(FrameFlags::POISON), "the mark is gone; read: {read:?}");
    Ok(())
}

/// The same for a part of a folio that is about to get its tails.
#[test]
fn the_mark_of_a_part_of_a_folio_that_is_being_made_stays() -> Result {
    let stage = Stage::new(2560);
    let cache = stage.cache(&MachineFile::shmem(ShmemHuge::Always), 512)?;
    let head = Arc::new(AtomicU32::new(0));
    let then = head.clone();
    // Its metadata as the tails are made: the head's first, then theirs one by one.
    let made = move |step: &Step| {
        let head = Pfn(then.load(Acquire));
        head.0 != 0
            && *step == Step::Meta(head.add(5))
            && stage.counts(head).0 > 0
            && stage.flags(head).contains(FrameFlags::FILE)
    };
    let bad = head.clone();
    stage.at_after(allocates(9, &head), made, move || {
        let pfn = Pfn(bad.load(Acquire)).add(5);
        on(1, || stage.vm().poison(stage, pfn));
        assert!(stage.flags(pfn).contains(FrameFlags::POISON));
    });
    cache.write_at(stage, 0, &[1]).map_err(|e| format!("{e:?}"))?;
    assert!(stage.is_done());
    let pfn = Pfn(head.load(Acquire)).add(5);
    assert!(stage.flags(pfn).contains(FrameFlags::POISON), "the mark is gone");
    let read = cache.read_at(stage, 5 * PAGE_SIZE, &mut [0]);
    assert!(matches!(read, Err(ReadError::Poisoned)), "{read:?}");
    Ok(())
}

/// A page that is dirty by its entry alone is on its way from one place to another when it is reported as bad.
#[test]
fn x12_a_dirty_page_on_the_move_is_lost_and_that_is_said() -> Result {
    const BASE: VirtAddr = VirtAddr(1 << 30);
    let stage = Stage::new(256);
    let cache = stage.cache(&MachineFile::zeros(), 4)?;
    let s = stage.space()?;
    shared(&s, BASE, &cache, 1, RW)?;
    assert_eq!(fault(&s, BASE, Access::Read), "mapped");
    hardware_marks(&s, BASE, Attrs::DIRTY);
    let pfn = frame(&s, BASE).ok_or("mapped")?;
    let said = Arc::new(Mutex::new(None));
    let says = said.clone();
    let report = stage.begin_at(
        |step| matches!(step, Step::Flush { .. }),
        move || *says.lock().expect("nobody panicked") = Some(stage.vm().poison(stage, pfn)),
        move || stage.flags(pfn).contains(FrameFlags::POISON),
    );
    s.remap(BASE, PAGE_SIZE, PAGE_SIZE, RemapTo::Fixed(page(BASE, 512)))?;
    report.end()?;
    assert_eq!(*said.lock().map_err(|_| "panicked")?, Some(Poisoned::File { lost: true }));
    cache.evict(stage);
    let read = cache.read_at(stage, 0, &mut [0]);
    assert!(matches!(read, Err(ReadError::Poisoned)), "{read:?}");
    Ok(())
}
