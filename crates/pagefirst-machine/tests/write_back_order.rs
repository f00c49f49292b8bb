//! Write-back in one order of steps (x12).

mod stage;

use pagefirst::arch::Attrs;
use pagefirst::file::{Direct, Syncing};
use pagefirst::frame::Frame;
use pagefirst::space::MemoryType;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::MachineFile;
use stage::*;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};

const BASE: VirtAddr = VirtAddr(1 << 30);

fn is_flush(step: &Step) -> bool {
    matches!(step, Step::Flush { .. })
}

// The entry is read-only already, and the program writes by the translation that it still has.
// catches: size_before_cleaning
#[test]
fn x12_what_is_written_while_the_file_grows_is_not_lost_to_write_back() -> Result {
    let stage = Stage::new(256);
    let store = MachineFile::zeros().with_tracking(true);
    let (s, file) = (stage.space()?, stage.cache(&store, 1)?);
    file.set_size(stage, 8);
    shared(&s, BASE, &file, 1, RW)?;
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    let page = frame(&s, BASE).ok_or("mapped")?;
    let grown = file.clone();
    stage.at(is_flush, move || {
        on(1, || grown.set_size(stage, PAGE_SIZE));
        stage.words(page)[1].store(7, SeqCst);
    });
    assert_eq!(file.write_back(stage)?, 1);
    assert!(stage.is_done());
    let stored = store.stored(0);
    assert_eq!((stored.get(8).copied(), stored.len()), (Some(7), PAGE_SIZE as usize), "lost");
    Ok(())
}

/// A mapping call is at work where a file is mapped that is memory itself.
#[test]
fn c68_who_makes_memory_clean_waits_asleep_for_a_mapping_call() -> Result {
    let stage = Stage::new(256);
    let memory = Frame::new(stage)?;
    let first = memory.pfn();
    let direct = Direct { index: 0, pages: 1, first, memory: MemoryType::Normal };
    let store = MachineFile::zeros().with_tracking(true).placed(move |_, _| Ok(direct));
    let (s, file) = (stage.space()?, stage.cache(&store, 1)?);
    shared(&s, BASE, &file, 1, RW)?;
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    let (waits, cleaned) = (Arc::new(AtomicBool::new(false)), file.clone());
    let has_begun = waits.clone();
    stage.at(|step| *step == Step::Wait, move || waits.store(true, SeqCst));
    let clean = stage.begin_at(is_flush, move || cleaned.clean(0..1), move || has_begun.load(SeqCst));
    s.protect(BASE, PAGE_SIZE, R)?;
    clean.end()?;
    assert!(stage.is_done() && !attrs(&s, BASE).contains(Attrs::WRITE));
    drop((s, file, memory));
    Ok(())
}

#[test]
fn what_is_to_be_stored_is_looked_for_with_preemption_on_now_and_then() -> Result {
    let stage = Stage::new(1200);
    let file = stage.cache(&MachineFile::zeros().with_tracking(true), 1000)?;
    file.will_need(stage, 0, 1000);
    assert_eq!(file.pages(), 1000);
    let most = Arc::new(AtomicU64::new(0));
    let (seen, mut looks) = (most.clone(), 0);
    let counts = move |step: &Step| {
        looks = if *step == Step::Enter { 0 } else { looks + matches!(step, Step::Meta(_)) as u64 };
        seen.fetch_max(looks, SeqCst);
        false
    };
    stage.at(counts, || {});
    assert_eq!(file.write_back(stage)?, 0);
    assert!(file.storing(stage).is_none());
    file.sync(&mut Syncing::all(), &mut file.store_errors())?;
    let most = most.load(SeqCst);
    assert!((1..=64).contains(&most), "{most} pages looked at in one go");
    Ok(())
}
