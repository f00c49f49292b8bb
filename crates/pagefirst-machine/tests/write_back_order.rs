//! Write-back in one order of steps (x12).

mod stage;

use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::MachineFile;
use stage::*;
use std::sync::atomic::Ordering::SeqCst;

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
