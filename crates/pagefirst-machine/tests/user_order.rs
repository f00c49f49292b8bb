//! Copies between the kernel and user memory, with another CPU's work between two steps of them.

mod stage;

use pagefirst::arch::Attrs;
use pagefirst::fault::{FaultError, Segv};
use pagefirst::platform::Note;
use pagefirst::space::{Stopped, Why};
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::MachineFile;
use stage::*;

const BASE: VirtAddr = VirtAddr(1 << 40);
const TWO_PAGES: usize = 2 * PAGE_SIZE as usize;

/// A copy's end in words: the count, and why it stopped.
fn ended(end: std::result::Result<(), Stopped<'_, Stage>>) -> (usize, String) {
    match end {
        Ok(()) => (usize::MAX, "done".into()),
        Err(Stopped { done, why: Why::Error(error) }) => (done, format!("{error:?}")),
        Err(Stopped { done, why }) => (done, why.to_string()),
    }
}

fn write(s: &Space, text: &[u8]) -> (usize, String) {
    ended(s.copy_out(BASE, text))
}

fn read(s: &Space) -> u8 {
    let mut byte = [0];
    assert!(s.copy_in(BASE, &mut byte).is_ok());
    byte[0]
}

/// CPU 1 does `meanwhile` after CPU 0 has walked to the entry of the page at `BASE`, before it locks the table.
fn after_walk(s: &Space, meanwhile: impl FnOnce(&Space) + Send + 'static) {
    let (seen, other) = (entry(s, BASE), s.clone());
    let walked = move |step: &Step| *step == Step::Read(seen, 0);
    s.platform().at(walked, move || on(1, || meanwhile(&other)));
}

fn written(text: &[u8]) -> Result<(&'static Stage, Space)> {
    let stage = Stage::new(256);
    let s = stage.space()?;
    anonymous(&s, BASE, 8, RW)?;
    assert_eq!(write(&s, text).1, "done");
    Ok((stage, s))
}

#[test]
fn a_page_taken_away_after_the_walk_is_not_written() -> Result {
    for (name, end) in [("unmap", "Segv(NotMapped)"), ("protect", "Segv(Access)"), ("discard", "done")] {
        let (stage, s) = written(b"before")?;
        let old = frame(&s, BASE).ok_or("mapped")?;
        after_walk(&s, move |s| {
            let gone = match name {
                "unmap" => s.unmap(BASE, PAGE_SIZE),
                "protect" => s.protect(BASE, PAGE_SIZE, R),
                _ => s.discard(BASE, PAGE_SIZE),
            };
            assert_eq!(gone, Ok(()));
        });
        assert_eq!(write(&s, b"after").1, end, "{name}");
        assert!(stage.is_done());
        match name {
            "protect" => assert_eq!(read(&s), b'b', "as it was"),
            // Nobody has the old page: it is free, or cleared and somebody's.
            "discard" => assert_eq!((read(&s), attrs(&s, BASE).contains(Attrs::DIRTY)), (b'a', true)),
            _ => assert_eq!(stage.words(old)[0].load(std::sync::atomic::Ordering::Relaxed), STALE),
        }
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

#[test]
fn a_page_that_was_copied_after_the_walk_is_read_and_written_in_the_copy() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    let c = stage.cache(&MachineFile::pattern(|_| b'f'), 1)?;
    private(&s, BASE, &c, 1, RW)?;
    s.page_table().activate(1);
    for access in [Access::Read, Access::Write] {
        s.discard(BASE, PAGE_SIZE)?;
        assert_eq!(read(&s), b'f');
        let file = frame(&s, BASE);
        after_walk(&s, |s| assert_eq!(write(s, b"12").1, "done"));
        match access {
            Access::Write => assert_eq!(write(&s, b"3").1, "done"),
            _ => assert_eq!(read(&s), b'1'),
        }
        assert!(stage.is_done() && frame(&s, BASE) != file);
        let mut text = [0; 3];
        assert!(s.copy_in(BASE, &mut text).is_ok());
        assert_eq!(&text, if access == Access::Write { b"32f" } else { b"12f" });
    }
    let mut byte = [0];
    assert!(c.read_at(stage, 0, &mut byte).is_ok());
    assert_eq!(byte, *b"f", "the file's page is not written");
    drop(c);
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn a_copy_not_flushed_yet_is_not_written_until_it_is() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    anonymous(&s, BASE, 1, RW)?;
    s.page_table().activate(1);
    assert_eq!(read(&s), 0);
    // CPU 0 has stored its copy read-only and flushes; CPU 1 may still translate to the old page meanwhile.
    let other = s.clone();
    stage.at(
        |step| matches!(step, Step::Flush { .. }),
        move || {
            on(1, || {
                assert!(!attrs(&other, BASE).contains(Attrs::WRITE));
                other.platform().steps();
                assert_eq!(write(&other, b"w").1, "done");
                let steps = other.platform().steps();
                assert_eq!(count(&steps, |step| matches!(step, Step::Flush { .. })), 1, "flushed first");
            });
        },
    );
    assert!(matches!(s.compare_exchange_u32(BASE, 1, 2), Ok(Err(found)) if found == b'w' as u32));
    assert!(stage.is_done());
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn a_copy_blocks_on_a_mapping_call_half_way_and_goes_on() -> Result {
    let (stage, s) = written(&[7; TWO_PAGES])?;
    let other = s.clone();
    let mut to = [0; TWO_PAGES];
    // Page 1 is being unmapped: its entry is gone, its VMA not yet.
    stage.at(
        |step| matches!(step, Step::Flush { .. }),
        move || {
            let end = on(1, || other.copy_in(BASE, &mut to));
            let Err(Stopped { done, why: Why::Blocked(ticket) }) = end else { panic!("{end:?}") };
            assert_eq!((done, to[done - 1], to[done], ticket.is_ready()), (TWO_PAGES / 2, 7, 0, false));
        },
    );
    s.unmap(VirtAddr(BASE.0 + PAGE_SIZE), PAGE_SIZE)?;
    assert!(stage.is_done());
    let end = write(&s, &[8; TWO_PAGES]);
    assert_eq!(end, (TWO_PAGES / 2, format!("{:?}", FaultError::Segv(Segv::NotMapped))));
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn a_copy_locks_one_table_for_each_page_and_takes_no_reference() -> Result {
    let (stage, s) = written(&[7; TWO_PAGES])?;
    let before = stage.counts(frame(&s, BASE).ok_or("mapped")?);
    let seen = s.clone();
    stage.at(is_table_locked, move || {
        assert_eq!(seen.platform().counts(frame(&seen, BASE).expect("mapped")), before);
    });
    stage.steps();
    assert_eq!(write(&s, &[8; TWO_PAGES]).1, "done");
    let steps = stage.steps();
    assert_eq!((count(&steps, |_| true), count(&steps, is_table_locked)), (2, 2), "{steps:?}");
    assert!(steps.iter().all(|step| matches!(step, Step::Note(Note::TableLocked(_, 0)))));
    assert!(stage.is_done());
    Ok(())
}

#[test]
fn a_fault_for_a_copy_syncs_the_space_it_copies_to() -> Result {
    // This CPU runs one space and copies into another, whose translations it may have kept by tag.
    let stage = Stage::new(256);
    let (runs, other) = (stage.space()?, stage.space()?);
    runs.page_table().activate(0);
    other.page_table().activate(0);
    anonymous(&other, BASE, 1, RW)?;
    assert_eq!(read(&other), 0);
    stage.steps();
    assert_eq!(write(&other, b"w").1, "done");
    let synced: Vec<_> = stage.steps().into_iter().filter(|step| matches!(step, Step::Sync { .. })).collect();
    let sync = Step::Sync { tag: other.page_table().tag(), addr: BASE, tables: false };
    assert_eq!(
        synced,
        [sync, sync],
        "before the copy becomes writable, and before the access is tried again"
    );
    Ok(())
}
