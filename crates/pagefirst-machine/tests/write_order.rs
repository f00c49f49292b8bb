//! What a fault found and what it rests on may change before it has the table's lock: writes to what is mapped, folios of
//! several pages, files that are asked, files that are memory. Each change as one defined order of events.

mod stage;

use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::file::{Direct, FileCache, Io};
use pagefirst::frame::{FrameFlags, head_of};
use pagefirst::platform::Platform;
use pagefirst::space::{MemoryType, RemapTo};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, VirtAddr};
use pagefirst_machine::MachineFile;
use stage::*;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

const BASE: VirtAddr = VirtAddr(1 << 40);

fn is_writable(space: &Space) -> bool {
    attrs(space, BASE).contains(Attrs::WRITE)
}
/// The first frame that is mapped at an address, by an entry of any size.
fn shown(space: &Space, va: VirtAddr) -> Option<Pfn> {
    let (raw, level) = leaf(space, va);
    X86_64::frame(raw, level)
}

fn is_flush(step: &Step) -> bool {
    matches!(step, Step::Flush { .. })
}
/// The entry of a table that leads to a leaf was read.
fn is_walk(step: &Step) -> bool {
    matches!(step, Step::Read(_, 1))
}
/// At the `n`th look at a frame's metadata once a table is locked.
fn when_looked_at(stage: &'static Stage, pfn: Pfn, n: u32, then: impl FnOnce() + Send + 'static) {
    stage.at_after(is_table_locked, nth(n, move |step| *step == Step::Meta(pfn)), move || on(1, then));
}

/// The mapping loses its right to be written to between the look and the lock; the entry, read-only before and after, shows
/// nothing of it.
#[test]
fn c19_a_write_does_not_widen_what_is_protected_meanwhile() -> Result {
    for kind in ["zero page", "shared", "shared once", "file"] {
        let stage = Stage::new(256);
        let s = stage.space()?;
        let file = stage.cache(&MachineFile::zeros().with_tracking(true), 1)?;
        let mut child = None;
        match kind {
            "file" => shared(&s, BASE, &file, 1, RW)?,
            _ => anonymous(&s, BASE, 1, RW)?,
        }
        let first = if kind.starts_with("shared") { Access::Write } else { Access::Read };
        assert_eq!(fault(&s, BASE, first), "mapped");
        if kind.starts_with("shared") {
            child = Some(s.fork()?).filter(|_| kind == "shared");
        }
        let read = entry(&s, BASE);
        let meanwhile = s.clone();
        let protect = move || on(1, || meanwhile.protect(BASE, PAGE_SIZE, R).expect("mapped"));
        match kind {
            "zero page" | "shared" => stage.at(is_frame_allocated, protect),
            _ => stage.at(move |step| *step == Step::Attrs(read), protect),
        }
        assert_eq!(fault(&s, BASE, Access::Write), "Segv(Access)", "{kind}");
        assert!(stage.is_done());
        assert!(entry(&s, BASE) == read && !is_writable(&s), "{kind}");
        drop(child);
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

/// The same for a copy that is stored and not yet flushed, and for one that is flushed and not yet made writable.
#[test]
fn r12_a_copy_that_is_protected_before_it_is_settled_stays_read_only() -> Result {
    for flushed in [false, true] {
        let stage = Stage::new(256);
        let s = stage.space()?;
        s.page_table().activate(1);
        let file = stage.cache(&MachineFile::zeros(), 1)?;
        private(&s, BASE, &file, 1, RW)?;
        assert_eq!(fault(&s, BASE, Access::Read), "mapped");
        let meanwhile = s.clone();
        let protect = move || on(1, || meanwhile.protect(BASE, PAGE_SIZE, R).expect("mapped"));
        match flushed {
            false => stage.at(is_flush, protect),
            true => stage.at_after(is_flush, is_walk, protect),
        }
        fault(&s, BASE, Access::Write);
        assert!(stage.is_done());
        assert!(!is_writable(&s), "flushed: {flushed}");
        assert_eq!(fault(&s, BASE, Access::Write), "Segv(Access)");
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

/// The page is mapped, and announced to go: it does not become writable, nor dirty.
#[test]
fn x09_a_page_on_its_way_out_does_not_become_writable() -> Result {
    for (shrinks, end) in [(true, "Bus(BeyondEnd)"), (false, "blocked")] {
        let stage = Stage::new(256);
        let s = stage.space()?;
        let file = stage.cache(&MachineFile::zeros().with_tracking(true), 2)?;
        shared(&s, BASE, &file, 2, RW)?;
        assert_eq!(fault(&s, BASE, Access::Read), "mapped");
        let pfn = frame(&s, BASE).ok_or("mapped")?;
        let meanwhile = s.clone();
        stage.at(is_walk, move || {
            on(1, || {
                assert_eq!(frame(&meanwhile, BASE), Some(pfn), "it is mapped still");
                assert_eq!(fault(&meanwhile, BASE, Access::Write), end);
                assert!(!is_writable(&meanwhile));
                assert!(!stage.meta(pfn).flags().contains(FrameFlags::DIRTY));
            });
        });
        match shrinks {
            true => file.set_size(stage, 0),
            false => file.punch(stage, 0..PAGE_SIZE),
        }
        assert!(stage.is_done());
        assert_eq!((frame(&s, BASE), file.pages()), (None, 0));
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

/// Two folios of 2^order pages each, mapped at `BASE` by `s`, and the first frames of both.
fn two_folios(order: u8) -> Result<(&'static Stage, Space, Cache, [Pfn; 2])> {
    let pages = 1_u64 << order;
    let stage = Stage::new(256 + 3 * pages as u32);
    let (s, other) = (stage.space()?, stage.space()?);
    let content = MachineFile::zeros().with_tracking(true).with_folios(order);
    let file = FileCache::new(stage, content, 2 * pages * PAGE_SIZE)?;
    shared(&s, BASE, &file, 2 * pages, RW)?;
    let mut heads = [Pfn(0); 2];
    for (i, head) in (0..).zip(&mut heads) {
        stage.warm(&file, i * pages)?;
        shared(&other, BASE, &file, 2 * pages, RW)?;
        let at = page(BASE, i * pages);
        assert_eq!(fault(&other, at, Access::Read), "mapped");
        *head = head_of(stage, shown(&other, at).ok_or("mapped")?);
        other.unmap(BASE, 2 * pages * PAGE_SIZE)?;
    }
    stage.nothing_held(&[&s, &other]);
    Ok((stage, s, file, heads))
}

/// Where the library looks at the first folio's metadata, under the lock, the two folios change places: each is valid, and
/// not what was found. What is mapped then is the page that belongs there, nothing but that is dirty, and nothing that
/// failed its check is counted.
#[test]
fn c47_a_folio_that_became_another_is_not_mapped() -> Result {
    let mut changed = [0; 10];
    for (order, access) in
        [0, 2, 9].into_iter().flat_map(|order| [(order, Access::Read), (order, Access::Write)])
    {
        // Which way round they have to be read in to change places, the allocator knows.
        for (n, again) in (1..=6).flat_map(|n| [(n, [0, 1]), (n, [1, 0])]) {
            let name = format!("order {order}, {access:?}, look {n}, {again:?}");
            let (stage, s, file, heads) = two_folios(order)?;
            let pages = 1_u64 << order;
            let cache = file.clone();
            when_looked_at(stage, heads[0], n, move || {
                if cache.evict(stage) == 2 * pages {
                    again.iter().try_for_each(|i| stage.warm(&cache, i * pages)).expect("memory");
                }
            });
            assert_eq!(fault(&s, BASE, access), "mapped", "{name}");
            let other = stage.space()?;
            shared(&other, BASE, &file, 2 * pages, RW)?;
            fault(&other, BASE, Access::Read);
            assert_eq!(shown(&s, BASE), shown(&other, BASE), "{name}");
            let head = head_of(stage, shown(&s, BASE).ok_or("mapped")?);
            changed[usize::from(order)] += (stage.is_done() && head == heads[1]) as u32;
            for each in heads {
                let is_dirty = stage.meta(each).flags().contains(FrameFlags::DIRTY);
                assert_eq!(is_dirty, each == head && access == Access::Write, "{name}");
            }
            drop(other);
            s.unmap(BASE, 2 * pages * PAGE_SIZE)?;
            file.write_back(stage)?;
            let there = file.pages();
            assert_eq!(file.evict(stage), there, "{name}: a count is left");
        }
    }
    // Folios of 16 KiB come from larger blocks, and need not.
    assert!([0, 9].iter().all(|order| changed[*order] > 0), "they never changed places: {changed:?}");
    Ok(())
}

/// A write that maps a part of a folio, or all of it, makes it dirty at once: it is stored while it is mapped.
#[test]
fn c68_what_is_written_of_a_folio_is_stored() -> Result {
    for order in [0, 2, 9] {
        let (stage, s, file, _) = two_folios(order)?;
        assert_eq!(fault(&s, BASE, Access::Write), "mapped");
        assert_eq!(file.write_back(stage)?, 1 << order, "order {order}");
        assert!(!attrs(&s, BASE).contains(Attrs::WRITE));
        assert_eq!(file.write_back(stage)?, 0);
    }
    Ok(())
}

/// The file gave leave for a page that is gone before it is mapped: for the one in its place it is asked anew.
#[test]
fn c68_leave_is_for_the_page_that_was_asked_about() -> Result {
    for order in [0, 2] {
        let stage = Stage::new(256);
        let s = stage.space()?;
        let asked = Arc::new(AtomicU32::new(0));
        let counts = asked.clone();
        let content = MachineFile::zeros().with_folios(order).with_mkwrite(move |_, _| {
            counts.fetch_add(1, Relaxed);
            Io::Ready
        });
        let file = stage.cache(&content, 8)?;
        [0, 4].into_iter().try_for_each(|index| stage.warm(&file, index))?;
        shared(&s, BASE, &file, 8, RW)?;
        let cache = file.clone();
        // The leave is there, and no lock is held yet.
        stage.at(is_table_allocated, move || {
            on(1, || {
                cache.punch(stage, 0..PAGE_SIZE << order);
                stage.warm(&cache, 0).expect("memory");
            });
        });
        assert_eq!(fault(&s, BASE, Access::Write), "mapped");
        assert!(stage.is_done());
        assert_eq!((asked.load(Relaxed), is_writable(&s)), (2, true), "order {order}");
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

/// A file of four pages that is memory itself, from this frame on.
fn placed(first: Pfn, memory: MemoryType) -> MachineFile {
    MachineFile::zeros().placed(move |_, _| Ok(Direct { index: 0, pages: 4, first, memory }))
}

/// Nor is it asked where its memory is while some of it is being removed: the walk that takes entries out may have passed.
#[test]
fn r05_a_file_that_is_memory_is_not_asked_during_a_removal() -> Result {
    let stage = Stage::new(256);
    let s = stage.space()?;
    let file = stage.cache(&placed(Pfn(0xf_ee00), MemoryType::Device), 4)?;
    shared(&s, BASE, &file, 4, RW)?;
    assert_eq!(fault(&s, BASE, Access::Write), "mapped");
    let meanwhile = s.clone();
    stage.at(is_flush, move || on(1, || assert_eq!(fault(&meanwhile, BASE, Access::Write), "blocked")));
    file.punch(stage, 0..PAGE_SIZE);
    assert!(stage.is_done());
    assert_eq!(shown(&s, BASE), None);
    stage.nothing_held(&[&s]);
    Ok(())
}

/// A discard has taken the entry out and has not flushed: who removes the memory, or calls it clean, flushes it before he is
/// back, for a CPU may still write there.
#[test]
fn r05_memory_of_a_file_that_is_removed_or_clean_is_in_no_tlb() -> Result {
    for removes in [false, true] {
        let stage = Stage::new(256);
        let s = stage.space()?;
        let content = placed(Pfn(0xf_ee00), MemoryType::Device).with_tracking(true);
        let file = stage.cache(&content, 4)?;
        shared(&s, BASE, &file, 4, RW)?;
        assert_eq!(fault(&s, BASE, Access::Write), "mapped");
        let cache = file.clone();
        let flushed = Arc::new(AtomicU32::new(0));
        let told = flushed.clone();
        stage.at(is_flush, move || {
            stage.steps();
            on(1, || match removes {
                true => cache.punch(stage, 0..PAGE_SIZE),
                false => cache.clean(0..1),
            });
            told.store(count(&stage.steps(), is_flush) as u32, Relaxed);
        });
        s.discard(BASE, PAGE_SIZE)?;
        assert!(stage.is_done());
        assert_eq!(flushed.load(Relaxed), 1, "removes: {removes}");
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

/// A fault has taken the entry out that its copy is to follow, and has not flushed: a call by which the mapping goes does, for
/// who removes the memory after that finds nothing to flush.
#[test]
fn r05_memory_of_a_file_whose_mapping_is_gone_is_in_no_tlb() -> Result {
    for how in 0..3 {
        let stage = Stage::new(256);
        let s = stage.space()?;
        let file = stage.cache(&placed(Pfn(100), MemoryType::Normal), 4)?;
        private(&s, BASE, &file, 1, RW)?;
        anonymous(&s, page(BASE, 8), 1, RW)?;
        assert_eq!(fault(&s, page(BASE, 8), Access::Write), "mapped");
        assert_eq!(fault(&s, BASE, Access::Read), "mapped");
        let (meanwhile, flushed) = (s.clone(), Arc::new(AtomicU32::new(0)));
        let told = flushed.clone();
        stage.at(is_flush, move || {
            stage.steps();
            on(1, || match how {
                0 => meanwhile.unmap(BASE, PAGE_SIZE).expect("mapped"),
                1 => anonymous(&meanwhile, BASE, 1, RW).expect("room"),
                _ => {
                    let to = RemapTo::Fixed(page(BASE, 16));
                    meanwhile.remap(BASE, PAGE_SIZE, PAGE_SIZE, to).map(drop).expect("mapped");
                }
            });
            told.store(count(&stage.steps(), is_flush) as u32, Relaxed);
        });
        fault(&s, BASE, Access::Write);
        assert!(stage.is_done());
        assert!(flushed.load(Relaxed) > 0, "{how}");
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

/// A page that the file had at once is kept until the fault has looked again.
#[test]
fn x20_a_page_that_was_read_at_once_is_there_when_the_fault_looks_again() -> Result {
    for access in [Access::Read, Access::Write] {
        let stage = Stage::new(256);
        let s = stage.space()?;
        let content = MachineFile::zeros().with_tracking(true);
        let file = stage.cache(&content, 1)?;
        shared(&s, BASE, &file, 1, RW)?;
        let cache = file.clone();
        // The second walk begins.
        stage.at(nth(2, |step| matches!(step, Step::Read(_, 3))), move || {
            on(1, || assert_eq!((cache.pages(), cache.evict(stage)), (1, 0)));
        });
        assert_eq!(fault(&s, BASE, access), "mapped");
        assert!(stage.is_done());
        assert_eq!(content.reads(), 1);
        stage.nothing_held(&[&s]);
    }
    Ok(())
}

/// A file that is memory itself moves its page after it was asked where that is, and before the entry is made.
#[test]
fn r05_an_answer_that_a_removal_overtakes_is_not_used() -> Result {
    for shrinks in [false, true] {
        let stage = Stage::new(256);
        let s = stage.space()?;
        let first = Arc::new(AtomicU32::new(0xf_ee00));
        let at = first.clone();
        let content = MachineFile::zeros().placed(move |_, _| {
            Ok(Direct { index: 0, pages: 4, first: Pfn(at.load(Relaxed)), memory: MemoryType::Device })
        });
        let file = stage.cache(&content, 4)?;
        shared(&s, BASE, &file, 4, RW)?;
        let cache = file.clone();
        stage.at(is_table_allocated, move || {
            on(1, || {
                first.store(0xf_dd00, Relaxed);
                match shrinks {
                    true => cache.set_size(stage, 0),
                    false => cache.punch(stage, 0..PAGE_SIZE),
                }
            });
        });
        let (end, there) = if shrinks { ("Bus(BeyondEnd)", None) } else { ("mapped", Some(Pfn(0xf_dd00))) };
        assert_eq!(fault(&s, BASE, Access::Write), end);
        assert!(stage.is_done());
        assert_eq!(shown(&s, BASE), there);
        stage.nothing_held(&[&s]);
    }
    Ok(())
}
