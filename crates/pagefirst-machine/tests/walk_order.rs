//! Walks by range while others are at work, each as one defined order of events: what comes into the range meanwhile, and how
//! long a walk stays pinned.

mod stage;

use pagefirst::platform::{Note, Platform};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, VirtAddr};
use stage::*;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::channel;

const BASE: VirtAddr = VirtAddr(1 << 40);
/// Pages of a leaf table.
const LEAF: u64 = 512;

fn is_leaf_scanned(step: &Step) -> bool {
    matches!(step, Step::Note(Note::TableScanned(_, 0)))
}

// catches: zap_skips_empty
/// A fault is about to publish a table in the first slot when an unmap comes there. It does not pass it by: in the second
/// slot there are more pages than it takes out in one go, and when it has flushed them, it does not look back.
#[test]
fn r11_what_comes_where_an_unmap_has_passed_is_taken_out_though_it_stopped_half_way() -> Result {
    let stage = Stage::new(1024);
    let s = stage.space()?;
    anonymous(&s, BASE, 2 * LEAF, RW)?;
    for i in LEAF..2 * LEAF {
        assert_eq!(fault(&s, page(BASE, i), Access::Write), "mapped");
    }
    let (passed, has_passed) = channel();
    let (ended, has_ended) = channel();
    let frame_of_page = Arc::new(AtomicU32::new(0));
    stage.at(allocates(0, &frame_of_page), || {});
    let other = s.clone();
    // It holds the lock, was told that nothing is announced, and makes the entry.
    stage.at_after(
        |step| matches!(step, Step::Note(Note::TableLocked(_, 1))),
        move |step| *step == Step::Meta(Pfn(frame_of_page.load(Relaxed))),
        move || {
            let passes = |step: &Step| is_leaf_scanned(step) || *step == Step::Relax;
            stage.at(passes, move || passed.send(()).expect("received"));
            std::thread::spawn(move || {
                stage.play(1);
                other.unmap(BASE, 2 * LEAF * PAGE_SIZE).expect("a range");
                ended.send(other).expect("received");
            });
            has_passed.recv_timeout(PATIENCE).expect("it passed, or it waits");
        },
    );
    assert_eq!(fault(&s, page(BASE, 5), Access::Write), "mapped");
    drop(has_ended.recv_timeout(PATIENCE).expect("it ended"));
    assert!(stage.is_done());
    let left = (0..2 * LEAF).find(|i| entry(&s, page(BASE, *i)) != 0);
    assert_eq!(left, None, "page {left:?} is mapped in no VMA");
    drop(s);
    stage.nothing_held(&[]);
    Ok(())
}

/// A walk over many tables gives its CPU, and the epoch, a chance between: what others retired meanwhile is freed before it
/// ends.
#[test]
fn a_long_walk_does_not_stay_pinned() -> Result {
    const TABLES: u64 = 300;
    let stage = Stage::new(1024);
    let (s, other) = (stage.space()?, stage.space()?);
    anonymous(&s, BASE, TABLES * LEAF, RW)?;
    for i in 0..TABLES {
        assert_eq!(fault(&s, page(BASE, i * LEAF), Access::Write), "mapped");
    }
    anonymous(&other, BASE, 1, RW)?;
    assert_eq!(fault(&other, BASE, Access::Write), "mapped");
    stage.vm_quiesce();
    let (scanned, left) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(u32::MAX)));
    let (n, counted) = (scanned.clone(), left.clone());
    let counts = move |step: &Step| is_leaf_scanned(step) && n.fetch_add(1, Relaxed) == 2;
    let meanwhile = other.clone();
    stage.at(counts, move || {
        on(1, || {
            meanwhile.unmap(BASE, PAGE_SIZE).expect("a range");
            assert!(stage.vm().in_limbo(stage) > 0);
        });
        stage.at(nth(250, is_leaf_scanned), move || {
            on(1, || {
                (0..4).for_each(|_| stage.collect());
                counted.store(stage.held().tables as u32, Relaxed);
            });
        });
    });
    s.protect(BASE, TABLES * LEAF * PAGE_SIZE, R)?;
    assert!(stage.is_done());
    stage.vm_quiesce();
    let live = stage.held().tables as u32;
    assert_eq!(left.load(Relaxed), live, "tables that a walk keeps from being freed");
    drop(other);
    Ok(())
}
