//! Mistakes that were found by reading, each with the interleaving or the input that showed it.

mod stage;

use pagefirst::arch::Attrs;
use pagefirst::frame::FrameFlags;
use pagefirst::platform::Platform;
use pagefirst::space::{Backing, Map, MapError, Place, RemapTo, VmaFlags};
use pagefirst::types::{Access, PAGE_SIZE, Prot, VirtAddr};
use pagefirst_machine::MachineFile;
use stage::*;

const BASE: VirtAddr = VirtAddr(1 << 40);

#[test]
fn r12_a_copy_is_not_recognised_by_its_frames_number() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    s.page_table().activate(1);
    let file = stage.cache(&MachineFile::pattern(|_| 7), 1)?;
    anonymous(&s, page(BASE, 1), 1, RW)?;
    fault(&s, page(BASE, 1), Access::Write); // keeps the leaf alive
    private(&s, BASE, &file, 1, RW)?;
    assert_eq!(fault(&s, BASE, Access::Read), "mapped");
    let (s2, f2) = (s.clone(), file.clone());
    stage.at(
        |st| matches!(st, Step::Flush { .. }),
        move || {
            stage.at(
                |st| matches!(st, Step::Read(_, 1)),
                move || {
                    on(1, || {
                        assert_eq!(f2.evict(stage), 1);
                        s2.discard(BASE, PAGE_SIZE).unwrap();
                        assert_eq!(fault(&s2, BASE, Access::Read), "mapped");
                        assert!(!attrs(&s2, BASE).contains(Attrs::WRITE));
                    })
                },
            );
        },
    );
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    assert!(stage.is_done());
    let pfn = frame(&s, BASE).unwrap();
    let flags = stage.meta(pfn).flags();
    assert!(
        !(flags.contains(FrameFlags::FILE) && attrs(&s, BASE).contains(Attrs::WRITE)),
        "page cache page writable through a private mapping"
    );
    Ok(())
}

#[test]
fn r14_a_move_of_a_file_that_shrank_ends() -> Result {
    let stage = Stage::new(6000);
    let s = stage.space()?;
    let file = stage.cache(&MachineFile::zeros(), 2048)?;
    for i in 0..2048 {
        stage.warm(&file, i)?;
    }
    shared(&s, BASE, &file, 2048, RW)?;
    for i in 0..2048 {
        fault(&s, page(BASE, i), Access::Read);
    }
    file.set_size(stage, PAGE_SIZE);
    stage.at(nth(200_000, |st| matches!(st, Step::Read(..))), || panic!("remap never ends"));
    let to = VirtAddr(1 << 41);
    assert_eq!(s.remap(BASE, 2048 * PAGE_SIZE, 2048 * PAGE_SIZE, RemapTo::Fixed(to)), Ok(to));
    Ok(())
}

#[test]
fn r06_memory_in_limbo_is_not_out() -> Result {
    let stage = Stage::new(1100);
    let s = stage.space()?;
    let file = stage.cache(&MachineFile::zeros(), 800)?;
    for i in 0..800 {
        stage.warm(&file, i)?;
    }
    let other = VirtAddr(1 << 41);
    anonymous(&s, other, 400, RW)?;
    fault(&s, other, Access::Write);
    shared(&s, BASE, &file, 800, R)?;
    s.quiesce();
    let _all = stage.take_all();
    s.unmap(BASE, 800 * PAGE_SIZE)?;
    drop(file);
    for i in 1..4 {
        assert_eq!(fault(&s, page(other, i), Access::Write), "mapped");
    }
    Ok(())
}

#[test]
fn a_file_does_not_grow_down() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    let file = stage.cache(&MachineFile::zeros(), 16)?;
    for flags in [VmaFlags::GROWS_DOWN, VmaFlags::GROWS_DOWN | VmaFlags::SHARED] {
        let backing = Backing::File { file: file.clone(), first: 4 };
        let map = Map { place: Place::Fixed(BASE), backing, flags, ..Map::anonymous(2 * PAGE_SIZE, R) };
        assert!(matches!(s.map(map), Err(MapError::Denied(_))));
    }
    assert_eq!(s.vma_count(), 0);
    Ok(())
}

#[test]
fn x09_a_write_to_a_page_mapped_before_the_file_shrank_is_refused() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    let file = stage.cache(&MachineFile::zeros().with_tracking(true), 2)?;
    stage.warm(&file, 1)?;
    shared(&s, BASE, &file, 2, RW)?;
    assert_eq!(fault(&s, page(BASE, 1), Access::Read), "mapped");
    file.set_size(stage, PAGE_SIZE);
    let w = fault(&s, page(BASE, 1), Access::Write);
    assert!(w.contains("Bus"), "write fault beyond the end: {w}");
    Ok(())
}

#[test]
fn r12_protect_does_not_widen_a_copy_before_its_flush() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    s.page_table().activate(1);
    s.page_table().activate(2);
    let file = stage.cache(&MachineFile::zeros(), 1)?;
    private(&s, BASE, &file, 1, RW)?;
    fault(&s, BASE, Access::Read);
    let s2 = s.clone();
    stage.at(
        |st| matches!(st, Step::Flush { .. }),
        move || {
            // the copy's flush is under way, not done
            let s3 = s2.clone();
            stage.at(
                |st| matches!(st, Step::Flush { .. }),
                move || {
                    assert!(
                        !attrs(&s3, BASE).contains(Attrs::WRITE),
                        "writable before any flush of the old page's translation"
                    );
                },
            );
            on(1, || s2.protect(BASE, PAGE_SIZE, RW | Prot::EXEC).unwrap());
        },
    );
    fault(&s, BASE, Access::Write);
    Ok(())
}

#[test]
fn r06_a_stack_that_cannot_grow_for_want_of_memory_says_so() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    s.map(Map {
        place: Place::Fixed(page(BASE, 1024)),
        flags: VmaFlags::GROWS_DOWN,
        ..Map::anonymous(PAGE_SIZE, RW)
    })?;
    let _all = stage.take_all();
    // Until no slab has a slot for another VMA.
    while s.map(Map { flags: VmaFlags::GROWS_DOWN, ..Map::anonymous(PAGE_SIZE, RW) }).is_ok() {}
    assert_eq!(fault(&s, page(BASE, 1000), Access::Write), "NoMemory");
    Ok(())
}

#[test]
fn a_file_opened_for_reading_is_never_made_writable() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    let file = stage.cache(&MachineFile::zeros(), 1)?;
    let map = |prot| Map {
        place: Place::Fixed(BASE),
        backing: Backing::File { file: file.clone(), first: 0 },
        flags: VmaFlags::SHARED | VmaFlags::NEVER_WRITE,
        ..Map::anonymous(PAGE_SIZE, prot)
    };
    assert!(matches!(s.map(map(RW)), Err(MapError::Denied(_))));
    s.map(map(R))?;
    assert!(matches!(s.protect(BASE, PAGE_SIZE, RW), Err(MapError::Denied(_))));
    assert!(fault(&s, BASE, Access::Write).contains("Access"));
    assert_eq!(s.protect(BASE, PAGE_SIZE, R | Prot::EXEC), Ok(()));
    Ok(())
}

#[test]
#[should_panic]
fn pins_do_not_nest() {
    let stage = Stage::new(256);
    let s = stage.space().expect("a space");
    anonymous(&s, BASE, 1, RW).expect("mapped");
    s.for_each_vma(|_| {
        s.tables();
    });
}
