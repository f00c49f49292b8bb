//! Huge pages against faults and mapping calls, each race as one defined order of events.

mod stage;

use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::frame::Frame;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use stage::*;
use std::sync::Mutex;

const BASE: VirtAddr = VirtAddr(1 << 40);
const SMALL: u64 = 512;
const HUGE: u64 = SMALL * PAGE_SIZE;
const ORDER: u8 = 9;

/// A stage with room for a few huge pages, and a space that wants them, with one mapped at `BASE`.
fn wanting() -> Result<(&'static Stage, Space)> {
    let stage = Stage::new(2560);
    let s = stage.space_with(Policy { huge: HugePolicy::Always, ..Policy::default() })?;
    anonymous(&s, BASE, SMALL, RW)?;
    Ok((stage, s))
}

/// The entry at the level of huge pages.
fn huge(space: &Space) -> Option<u64> {
    Some(entry(space, BASE)).filter(|raw| X86_64::frame(*raw, 1).is_some() && raw & 0x80 != 0)
}

fn hoard(stage: &'static Stage) -> Vec<Frame<Stage>> {
    std::iter::from_fn(|| Frame::block(stage, ORDER).ok()).collect()
}

fn is_flush(step: &Step) -> bool {
    matches!(step, Step::Flush { .. })
}

#[test]
fn c14_a_fault_on_a_huge_page_that_is_being_split_is_spurious() -> Result {
    for access in [Access::Read, Access::Write] {
        let (stage, s) = wanting()?;
        fault(&s, BASE, Access::Write);
        let meanwhile = s.clone();
        stage.at(is_flush, move || {
            on(1, || {
                // X13: it is neither there nor nothing, and says of no frame where it is.
                let raw = entry(&meanwhile, BASE);
                assert!(raw != 0 && raw & 1 == 0 && X86_64::frame(raw, 1).is_none(), "{raw:#x}");
                for i in [0, 1, 511] {
                    assert_eq!(fault(&meanwhile, page(BASE, i), access), "spurious");
                }
            });
        });
        s.discard(page(BASE, 1), PAGE_SIZE)?;
        assert!(stage.is_done());
        assert_eq!(s.tables().anon, SMALL - 1, "nothing was mapped over what was split");
        assert_eq!(fault(&s, page(BASE, 1), access), "mapped");
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

#[test]
fn x13_a_discard_finds_all_of_what_was_split() -> Result {
    let (stage, s) = wanting()?;
    fault(&s, BASE, Access::Write);
    let first = frame_of_huge(&s);
    // Up to the last page, so that one is left: each page that goes is freed, and the last one stays itself.
    s.discard(BASE, HUGE - PAGE_SIZE)?;
    assert_eq!((s.tables().anon, s.tables().huge), (1, 0));
    assert_eq!(frame(&s, page(BASE, SMALL - 1)).map(|f| f.0), Some(first + 511));
    assert_eq!(stage.counts(pagefirst::types::Pfn(first)), (0, 0));
    s.discard(BASE, HUGE)?;
    assert_eq!(s.tables().tables, [0, 0, 0, 1, 0]);
    stage.nothing_held(&[&s]);
    Ok(())
}

fn frame_of_huge(space: &Space) -> u32 {
    X86_64::frame(entry(space, BASE), 1).map_or(0, |f| f.0)
}

#[test]
fn r15_hardware_marks_before_the_split_and_nothing_is_lost() -> Result {
    let (stage, s) = wanting()?;
    fault(&s, BASE, Access::Read);
    fault(&s, BASE, Access::Write);
    s.protect(BASE, HUGE, R)?;
    s.protect(BASE, HUGE, RW)?;
    // Until the swap: the table is reserved, the entry not yet looked at.
    let meanwhile = s.clone();
    stage.at(is_table_allocated, move || {
        on(1, || hardware_marks(&meanwhile, BASE, Attrs::DIRTY | Attrs::ACCESSED))
    });
    s.protect(BASE, PAGE_SIZE, R)?;
    assert!(stage.is_done());
    for i in 0..SMALL {
        assert!(attrs(&s, page(BASE, i)).contains(Attrs::DIRTY | Attrs::ACCESSED), "x12 page {i}");
    }
    Ok(())
}

#[test]
fn r03_the_loser_of_two_huge_faults_gives_its_page_back() -> Result {
    let (stage, s) = wanting()?;
    let meanwhile = s.clone();
    stage.at(is_frame_allocated, move || {
        on(1, || assert_eq!(fault(&meanwhile, page(BASE, 9), Access::Write), "mapped"));
    });
    let before = stage.held().frames;
    // It looks again, and finds the page there.
    assert_eq!(fault(&s, BASE, Access::Write), "spurious");
    assert!(stage.is_done() && huge(&s).is_some());
    stage.nothing_held(&[&s]);
    assert_eq!(stage.held().frames, before + SMALL + 2, "one huge page and two tables");
    Ok(())
}

static HOARD: Mutex<Vec<Frame<Stage>>> = Mutex::new(Vec::new());

#[test]
fn r03_a_huge_fault_that_finds_a_table_goes_on_small() -> Result {
    let (stage, s) = wanting()?;
    let meanwhile = s.clone();
    // With the huge page in hand; another CPU, for which none is left, maps a small one.
    stage.at(is_frame_allocated, move || {
        on(1, || {
            let hoarded = hoard(stage);
            assert_eq!(fault(&meanwhile, page(BASE, 9), Access::Write), "mapped");
            drop(hoarded);
        });
    });
    stage.steps();
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    assert!(stage.is_done() && huge(&s).is_none());
    assert_eq!((s.tables().anon, s.tables().tables), (2, [1, 1, 1, 1, 0]));
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn c33_a_small_install_that_finds_a_huge_page_ends_as_lost() -> Result {
    let (stage, s) = wanting()?;
    *HOARD.lock().expect("one thread") = hoard(stage);
    let meanwhile = s.clone();
    // No huge page is left for the first; for the second there is one again.
    stage.at(is_frame_allocated, move || {
        on(1, || {
            HOARD.lock().expect("one thread").clear();
            assert_eq!(fault(&meanwhile, page(BASE, 9), Access::Write), "mapped");
            assert!(huge(&meanwhile).is_some());
        });
    });
    assert_eq!(fault(&s, BASE, Access::Write), "spurious");
    assert!(stage.is_done() && huge(&s).is_some());
    stage.nothing_held(&[&s]);
    Ok(())
}

#[test]
fn c15_a_huge_page_that_is_gone_at_the_second_look_is_not_walked_into() -> Result {
    for access in [Access::Read, Access::Write] {
        let (stage, s) = wanting()?;
        fault(&s, BASE, Access::Read);
        let (raw, meanwhile) = (entry(&s, BASE), s.clone());
        let saw_it = move |step: &Step| matches!(step, Step::Attrs(seen) if *seen == raw);
        stage.at(saw_it, move || on(1, || assert!(meanwhile.discard(BASE, HUGE).is_ok())));
        let expected = if access == Access::Read { "spurious" } else { "mapped" };
        assert_eq!(fault(&s, BASE, access), expected);
        assert!(stage.is_done());
        assert_eq!(s.tables().present, (access == Access::Write) as u64);
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

/// Another CPU discards the range at each step of a huge fault that is outside its locks, with nothing there and with
/// the huge zero page.
#[test]
fn r04_a_huge_fault_against_discard_at_each_step() -> Result {
    for (access, there) in
        [(Access::Read, false), (Access::Write, false), (Access::Read, true), (Access::Write, true)]
    {
        for n in 1.. {
            let (stage, s) = wanting()?;
            if there {
                fault(&s, BASE, Access::Read);
            }
            let meanwhile = s.clone();
            let outside = |step: &Step| match step {
                Step::Read(..) | Step::Flush { .. } => true,
                step => is_frame_allocated(step) || is_table_allocated(step),
            };
            stage.at(nth(n, outside), move || {
                on(1, || assert!(meanwhile.discard(BASE, HUGE).is_ok()));
            });
            let said = fault(&s, BASE, access);
            assert!(said == "mapped" || said == "spurious", "step {n}: {said}");
            if !stage.is_done() {
                assert!(n > 3, "{access:?} {there}: {n} steps");
                break;
            }
            let t = s.tables();
            assert_eq!(t.empty, 0);
            assert!(t.anon == 0 || t.anon == SMALL, "step {n}: {t:?}");
            stage.nothing_held(&[&s]);
        }
    }
    Ok(())
}

/// A table was unlinked and is not flushed: small translations may be cached where the huge page would go.
#[test]
fn huge_page_goes_over_a_table_that_was_unlinked_after_its_flush() -> Result {
    let (stage, s) = wanting()?;
    let hoarded = hoard(stage);
    fault(&s, BASE, Access::Write);
    drop(hoarded);
    let meanwhile = s.clone();
    stage.at(is_flush, move || {
        on(1, || {
            stage.steps();
            assert_eq!(fault(&meanwhile, BASE, Access::Write), "mapped");
            assert!(huge(&meanwhile).is_some());
            let steps = stage.steps();
            let flushed = |step: &Step| {
                matches!(step, Step::Flush { range, tables: true } if range.contains(BASE) && range.len() >= HUGE)
            };
            assert_eq!(count(&steps, flushed), 1, "{steps:?}");
        });
    });
    s.discard(BASE, PAGE_SIZE)?;
    assert!(stage.is_done() && huge(&s).is_some());
    // Nothing is unflushed now, so nothing is flushed.
    s.discard(BASE, HUGE)?;
    stage.steps();
    fault(&s, BASE, Access::Write);
    assert_eq!(count(&stage.steps(), is_flush), 0);
    stage.nothing_held(&[&s]);
    Ok(())
}
