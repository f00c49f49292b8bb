//! Fork and what comes of it, each as one defined order of events (r12).

mod stage;

use pagefirst::arch::Attrs;
use pagefirst::frame::FrameFlags;
use pagefirst::platform::Platform;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::MachineFile;
use stage::*;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::mpsc::channel;

const BASE: VirtAddr = VirtAddr(1 << 40);

fn fork(s: &Space) -> Result<Space> {
    Ok(Arc::new(s.fork()?))
}
/// A page that parent and child share, and that CPU 1 may have cached in either.
fn shared(stage: &'static Stage) -> Result<(Space, Space)> {
    let parent = stage.space()?;
    anonymous(&parent, BASE, 1, RW)?;
    assert_eq!(fault(&parent, BASE, Access::Write), "mapped");
    let child = fork(&parent)?;
    for s in [&parent, &child] {
        s.page_table().activate(1);
    }
    Ok((parent, child))
}

/// Who copies a page reads it by a reference. Then it is not reused, though only one mapping is left (CVE-2020-29374).
#[test]
fn r12_a_page_that_somebody_reads_is_not_reused() -> Result {
    let stage = Stage::new(256);
    let (parent, child) = shared(stage)?;
    let old = frame(&parent, BASE);
    let (p, c) = (parent.clone(), child.clone());
    stage.at(is_frame_allocated, move || {
        on(1, || {
            c.unmap(BASE, PAGE_SIZE).expect("a range");
            assert_eq!(stage.meta(old.expect("mapped")).counts().maps, 1, "the parent's");
            assert_eq!(fault(&p, BASE, Access::Write), "mapped");
            assert_ne!(frame(&p, BASE), old, "somebody reads it");
        });
    });
    assert_ne!(fault(&child, BASE, Access::Write), "mapped");
    assert!(stage.is_done());
    drop((parent, child));
    stage.nothing_held(&[]);
    Ok(())
}

/// A copy is stored read-only and being flushed when its space forks: it is shared by then, and stays read-only.
#[test]
fn r12_a_copy_that_is_shared_before_it_is_settled_stays_read_only() -> Result {
    let stage = Stage::new(256);
    let (parent, child) = shared(stage)?;
    let p = parent.clone();
    let (tx, rx) = channel();
    stage.at(
        |step| matches!(step, Step::Flush { .. }),
        move || on(2, || tx.send(fork(&p).map_err(|error| error.to_string())).expect("received")),
    );
    fault(&parent, BASE, Access::Write);
    let third = rx.recv()??;
    assert_eq!(frame(&parent, BASE), frame(&third, BASE));
    assert!(!attrs(&parent, BASE).contains(Attrs::WRITE) && !attrs(&third, BASE).contains(Attrs::WRITE));
    drop((parent, child, third));
    stage.nothing_held(&[]);
    Ok(())
}

/// A fault in the parent is held up until the flush, and not longer.
#[test]
fn r12_faults_wait_for_the_flush_of_a_fork() -> Result {
    let stage = Stage::new(256);
    let (parent, child) = shared(stage)?;
    assert_eq!(fault(&parent, BASE, Access::Write), "mapped");
    let p = parent.clone();
    stage.at(
        |step| matches!(step, Step::Flush { .. }),
        move || on(2, || assert_eq!(fault(&p, BASE, Access::Write), "blocked")),
    );
    let third = fork(&parent)?;
    assert!(stage.is_done());
    let old = frame(&parent, BASE).ok_or("mapped")?;
    assert!(!stage.meta(old).flags().contains(FrameFlags::EXCLUSIVE));
    assert_eq!(fault(&parent, BASE, Access::Write), "mapped");
    assert_eq!(frame(&third, BASE), Some(old));
    drop((parent, child, third));
    stage.nothing_held(&[]);
    Ok(())
}

/// A file shrinks while a space that has private copies beyond its new end forks. The removal waits, and fork takes out of both
/// spaces what it has copied.
#[test]
fn a_file_shrinks_while_its_private_copies_are_forked() -> Result {
    let stage = Stage::new(512);
    let cache = stage.cache(&MachineFile::zeros(), 2048)?;
    let parent = stage.space()?;
    private(&parent, BASE, &cache, 2048, RW)?;
    for i in [50, 600, 1100] {
        assert_eq!(fault(&parent, page(BASE, i), Access::Write), "mapped");
    }
    let (waits, is_waiting) = (Arc::new(AtomicBool::new(false)), cache.clone());
    let waited = waits.clone();
    stage.at(|step| *step == Step::Wait, move || waits.store(true, Release));
    // The root; three tables, which are published; three more, one of which is; one more.
    let shrink = stage.begin_at(
        nth(8, is_table_allocated),
        move || is_waiting.set_size(stage, 100 * PAGE_SIZE),
        move || waited.load(Acquire),
    );
    let child = fork(&parent)?;
    shrink.end()?;
    assert!(stage.is_done());
    for s in [&parent, &child] {
        assert_eq!([50, 600, 1100].map(|i| frame(s, page(BASE, i)).is_some()), [true, false, false]);
    }
    stage.nothing_held(&[&parent, &child]);
    Ok(())
}
