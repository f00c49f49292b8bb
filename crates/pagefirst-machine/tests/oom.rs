//! Memory that runs out at every point of every call (r06): each fault and each mapping call either works or says
//! NoMemory with everything as it was, and works when memory is back; nothing leaks.

mod kit;
#[path = "oom/stage.rs"]
mod stage;

use kit::*;
use pagefirst::Poisoned;
use pagefirst::arch::Attrs;
use pagefirst::fault::FaultError;
use pagefirst::file::{ReadError, WriteBackError, WriteError};
use pagefirst::limit::Limit;
use pagefirst::space::{Advice, PinError, RemapTo, Unpopulated, Why};
use pagefirst::table::FramesError;
use pagefirst::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr, VirtRange};
use stage::*;
use std::cell::Cell;
use std::sync::Arc;

#[test]
fn r06_anonymous_faults() -> Result {
    let cases = [
        ("read", EMPTY, Access::Read, 0),
        ("write", EMPTY, Access::Write, 0),
        ("write in a table that is there", page(ANON, 6), Access::Write, 0),
        ("write over the zero page", page(ANON, 5), Access::Write, 0),
    ];
    for (name, va, access, shows) in cases {
        let writable = access == Access::Write;
        fails_at_each_point(
            name,
            |s| s.fault(va, access),
            |s| s.byte(va) == Some(shows) && attrs(&s.space, va).contains(Attrs::WRITE) == writable,
        )?;
    }
    Ok(())
}

#[test]
fn r06_file_faults() -> Result {
    let cases = [
        ("cached read", page(EMPTY_FILE, 3), Access::Read),
        ("read", page(EMPTY_FILE, 6), Access::Read),
        ("private write, cached", page(EMPTY_FILE, 3), Access::Write),
        ("private write", page(EMPTY_FILE, 6), Access::Write),
        ("private write over the file's page", FILE, Access::Write),
        ("shared read", page(EMPTY_SHARED, 3), Access::Read),
        ("shared write, cached", page(EMPTY_SHARED, 3), Access::Write),
        ("shared write", page(EMPTY_SHARED, 6), Access::Write),
        ("shared write to a page mapped for reading", page(SHARED, 2), Access::Write),
    ];
    for (name, va, access) in cases {
        let shows = mark((va.0 & 0xffff) / PAGE_SIZE);
        let writable = access == Access::Write;
        fails_at_each_point(
            name,
            |s| s.fault(va, access),
            |s| s.byte(va) == Some(shows) && attrs(&s.space, va).contains(Attrs::WRITE) == writable,
        )?;
    }
    Ok(())
}

/// The same with charges: the limit is far.
#[test]
fn r06_faults_that_are_charged() -> Result {
    let cases = [
        (EMPTY, Access::Write, 0),
        (page(EMPTY_FILE, 6), Access::Write, mark(6)),
        (FILE, Access::Write, mark(0)),
        (page(HUGE, 1024), Access::Write, 0),
    ];
    for (va, access, shows) in cases {
        let limit = std::cell::RefCell::new(None);
        fails_at_each_point_of(
            "charged",
            |s| {
                let new = Limit::new(s.machine, None, 10_000)?;
                s.space.set_limit(Some(new.clone()));
                *limit.borrow_mut() = Some(new);
                Ok(())
            },
            |s| s.fault(va, access),
            |s| {
                s.machine.vm().drain(s.machine);
                let limit = limit.borrow_mut().take();
                // What was read stays, and was charged.
                let charged = limit.map(|limit| limit.charged());
                charged.is_some_and(|n| [1, 2, 512].contains(&n)) && s.byte(va) == Some(shows)
            },
        )?;
    }
    Ok(())
}

#[test]
#[should_panic(expected = "too few to boot")]
fn r06_no_memory_at_boot() {
    let plant = Some(pagefirst_machine::Mistake::BootWithoutMemory);
    pagefirst_machine::Machine::<pagefirst::arch::X86_64>::new(pagefirst_machine::Config {
        plant,
        ..Default::default()
    });
}

#[test]
fn r06_a_stack_that_grows() -> Result {
    let below = VirtAddr(STACK.0 - 20 * PAGE_SIZE);
    fails_at_each_point("stack", |s| s.fault(below, Access::Write), |s| s.byte(below) == Some(0))
}

#[test]
fn r06_map() -> Result {
    fails_at_each_point(
        "anywhere",
        |s| came(s.space.map(anonymous(4, R))),
        |s| s.space.vma_count() == MAPPINGS + 1,
    )?;
    fails_at_each_point(
        "over the middle of another",
        |s| came(s.space.map(at(page(ANON, 1), private(&s.cache, 0, 2, RW)))),
        |s| s.space.vma_count() == MAPPINGS + 2 && mapped(&s.space, ANON, 8) == [0, 3, 5],
    )?;
    fails_at_each_point(
        "continuing another",
        |s| came(s.space.map(at(page(ANON, 8), anonymous(4, RW)))),
        |s| s.space.vma_count() == MAPPINGS && s.byte(ANON) == Some(100),
    )
}

/// Populating comes after the mapping is there: it stops where memory does, and goes on from there.
#[test]
fn r06_populate_stops_where_memory_does() -> Result {
    let range = VirtRange::new(NOWHERE, page(NOWHERE, 4));
    let stopped = Cell::new(None);
    let populate = |s: &Stage| match s.space.populate(range, RW) {
        None => Came::Done,
        Some(Unpopulated { at, why: Why::Error(FaultError::NoMemory) }) => {
            let there = (at.0 - NOWHERE.0) / PAGE_SIZE;
            assert_eq!(mapped(&s.space, NOWHERE, 4), (0..there).collect::<Vec<_>>());
            stopped.set(Some(there));
            // The pages that are there are no part of what is compared.
            s.space.discard(NOWHERE, 4 * PAGE_SIZE).expect("needs no memory");
            Came::NoMemory
        }
        Some(other) => panic!("{other:?}"),
    };
    let all = |s: &Stage| mapped(&s.space, NOWHERE, 4) == [0, 1, 2, 3];
    fails_at_each_point_of(
        "populate",
        |s| Ok(s.space.map(at(NOWHERE, anonymous(4, RW))).map(drop)?),
        populate,
        all,
    )?;
    assert_eq!(stopped.get(), Some(3), "the last page failed as well");
    Ok(())
}

#[test]
fn r06_unmap_and_discard() -> Result {
    fails_at_each_point(
        "in the middle",
        |s| came(s.space.unmap(page(ANON, 1), 2 * PAGE_SIZE)),
        |s| s.space.vma_count() == MAPPINGS + 1 && mapped(&s.space, ANON, 8) == [0, 3, 5],
    )?;
    fails_at_each_point(
        "across several",
        |s| came(s.space.unmap(page(ANON, 4), HEAP.0 - page(ANON, 4).0)),
        |s| s.space.vma_count() == MAPPINGS - 2 && mapped(&s.space, ANON, 8) == [0, 1, 2, 3],
    )?;
    fails_at_each_point(
        "discard",
        |s| came(s.space.discard(ANON, 8 * PAGE_SIZE)),
        |s| mapped(&s.space, ANON, 8).is_empty() && s.space.vma_count() == MAPPINGS,
    )
}

#[test]
fn r06_protect() -> Result {
    for prot in [R, NONE, RW | Prot::EXEC] {
        fails_at_each_point(
            "protect in the middle",
            |s| came(s.space.protect(page(ANON, 1), 4 * PAGE_SIZE, prot)),
            |s| s.space.vma_count() == MAPPINGS + 2 && s.byte(page(ANON, 1)) == Some(101),
        )?;
    }
    fails_at_each_point(
        "protect all",
        |s| came(s.space.protect(FILE, 8 * PAGE_SIZE, R)),
        |s| s.space.vma_count() == MAPPINGS && !attrs(&s.space, page(FILE, 1)).contains(Attrs::WRITE),
    )
}

#[test]
fn r06_remap() -> Result {
    let whole = 8 * PAGE_SIZE;
    fails_at_each_point(
        "shrink",
        |s| came(s.space.remap(ANON, whole, 2 * PAGE_SIZE, RemapTo::InPlace)),
        |s| mapped(&s.space, ANON, 8) == [0, 1],
    )?;
    fails_at_each_point(
        "grow in place",
        |s| came(s.space.remap(ANON, whole, 2 * whole, RemapTo::InPlace)),
        |s| vmas(&s.space)[0] == (ANON.0 >> 12, (ANON.0 >> 12) + 16, RW) && s.byte(ANON) == Some(100),
    )?;
    fails_at_each_point(
        "move",
        |s| came(s.space.remap(ANON, whole, whole, RemapTo::Fixed(NOWHERE))),
        |s| mapped(&s.space, NOWHERE, 8) == [0, 1, 2, 3, 5] && s.byte(page(NOWHERE, 3)) == Some(103),
    )?;
    fails_at_each_point(
        "move a part of one into the middle of another",
        |s| came(s.space.remap(page(ANON, 1), 2 * PAGE_SIZE, 4 * PAGE_SIZE, RemapTo::Fixed(page(FILE, 1)))),
        |s| {
            let moved = (s.byte(page(FILE, 1)), s.byte(page(FILE, 2)), s.byte(page(FILE, 3)));
            moved == (Some(101), Some(102), None) && mapped(&s.space, ANON, 8) == [0, 3, 5]
        },
    )?;
    fails_at_each_point(
        "move a file's pages",
        |s| came(s.space.remap(FILE, whole, 2 * whole, RemapTo::Fixed(NOWHERE))),
        |s| (s.byte(NOWHERE), s.byte(page(NOWHERE, 1))) == (Some(mark(0)), Some(111)),
    )
}

#[test]
fn r06_brk() -> Result {
    fails_at_each_point(
        "up",
        |s| came(s.space.brk(page(HEAP, 6))),
        |s| s.space.heap_end() == page(HEAP, 6) && s.byte(HEAP) == Some(120),
    )?;
    fails_at_each_point(
        "down",
        |s| came(s.space.brk(page(HEAP, 1))),
        |s| s.space.heap_end() == page(HEAP, 1) && s.byte(HEAP) == Some(120),
    )
}

/// Huge pages give way to small ones where there are none.
#[test]
fn r06_huge_pages() -> Result {
    let untouched = page(HUGE, 1024);
    for (access, va) in [
        (Access::Read, untouched),
        (Access::Write, untouched),
        (Access::Write, page(HUGE, 512 + 7)),
        (Access::Write, page(SHMEM, 512 + 7)),
        (Access::Read, page(SHMEM, 512 + 7)),
    ] {
        fails_at_each_point("huge fault", |s| s.fault(va, access), |s| s.byte(va) == Some(0))?;
    }
    fails_at_each_point_of(
        "the first huge zero page",
        |s| {
            s.space.unmap(page(HUGE, 512), 512 * PAGE_SIZE)?;
            s.machine.vm().drain(s.machine);
            Ok(())
        },
        |s| s.fault(untouched, Access::Read),
        |s| s.byte(untouched) == Some(0),
    )?;
    let cut = |va: VirtAddr| page(va, 100);
    for va in [HUGE, page(HUGE, 512), DEVICE, SHMEM] {
        fails_at_each_point(
            "cut by protect",
            |s| came(s.space.protect(cut(va), PAGE_SIZE, R)),
            |s| s.space.vma_count() == MAPPINGS + 2 && entry(&s.space, va).1 == 0,
        )?;
        fails_at_each_point(
            "cut by what is mapped over it",
            |s| came(s.space.map(at(cut(va), anonymous(200, R)))),
            |s| s.space.vma_count() == MAPPINGS + 2 && s.byte(cut(va)).is_none() && s.byte(va).is_some(),
        )?;
        fails_at_each_point(
            "cut by unmap",
            |s| came(s.space.unmap(cut(va), 200 * PAGE_SIZE)),
            |s| s.space.vma_count() == MAPPINGS + 1 && s.byte(cut(va)).is_none() && s.byte(va).is_some(),
        )?;
        fails_at_each_point(
            "cut by a move",
            |s| came(s.space.remap(cut(va), 200 * PAGE_SIZE, 200 * PAGE_SIZE, RemapTo::Fixed(NOWHERE))),
            |s| s.byte(cut(va)).is_none() && s.byte(va).is_some(),
        )?;
    }
    fails_at_each_point(
        "cut by discard",
        |s| came(s.space.discard(cut(HUGE), 200 * PAGE_SIZE)),
        |s| s.byte(HUGE) == Some(140) && s.byte(cut(HUGE)).is_none(),
    )?;
    fails_at_each_point(
        "moved to where it does not fit",
        |s| came(s.space.remap(HUGE, 2 << 20, 2 << 20, RemapTo::Fixed(page(NOWHERE, 1)))),
        |s| s.byte(page(NOWHERE, 1)) == Some(140) && s.byte(HUGE).is_none(),
    )
}

#[test]
fn r06_advice() -> Result {
    for (advice, more) in [(Advice::NoHuge, 2), (Advice::DontFork, 2), (Advice::WipeOnFork, 2)] {
        fails_at_each_point(
            "advise",
            |s| came(s.space.advise(page(HUGE, 100), 200 * PAGE_SIZE, advice)),
            |s| s.space.vma_count() == MAPPINGS + more && s.byte(HUGE) == Some(140),
        )?;
    }
    Ok(())
}

#[test]
fn r06_devices() -> Result {
    fails_at_each_point(
        "map a device",
        |s| came(s.space.map(at(NOWHERE, device(4)))),
        |s| s.space.vma_count() == MAPPINGS + 1,
    )?;
    for i in [512, 1023] {
        let va = page(DEVICE, i);
        fails_at_each_point(
            "device",
            |s| s.fault(va, Access::Write),
            |s| s.byte(va) == Some(0) && entry(&s.space, va).1 == 1,
        )?;
    }
    let frames = VirtRange::new(NOWHERE, VirtAddr(NOWHERE.0 + (4 << 20)));
    let table = |s: &Stage| s.space.page_table().mapper().map(frames, Pfn(4096), 0, Attrs::WRITE);
    fails_at_each_point_of(
        "mapper",
        |_| Ok(()),
        |s| match table(s) {
            Ok(()) => {
                // It is no mapping of the space.
                s.space.page_table().mapper().unmap(frames).expect("nothing is cut");
                Came::Done
            }
            Err(FramesError::NoMemory(_)) => Came::NoMemory,
            Err(error) => panic!("{error}"),
        },
        |_| true,
    )?;
    // Huge pages, one of which is cut.
    let small = VirtRange::page_of(page(NOWHERE, 100));
    let cut = |s: &Stage| {
        s.space.page_table().mapper().map(frames, Pfn(4096), 1, Attrs::WRITE)?;
        let cut = s.space.page_table().mapper().unmap(small);
        let is_left = |va| entry(&s.space, va).0 != 0;
        assert!(is_left(NOWHERE) && is_left(small.start) == cut.is_err());
        s.space.page_table().mapper().unmap(frames).expect("nothing is cut");
        cut
    };
    fails_at_each_point_of(
        "mapper, cut",
        |_| Ok(()),
        |s| match cut(s) {
            Ok(()) => Came::Done,
            Err(FramesError::NoMemory(_)) => Came::NoMemory,
            Err(error) => panic!("{error}"),
        },
        |_| true,
    )
}

/// No child, or a whole one; and writes in both afterwards.
#[test]
fn r06_fork() -> Result {
    fails_at_each_point("fork", |s| came(s.space.fork()), |_| true)?;
    for (va, shows) in [(page(ANON, 1), 101), (HUGE, 140), (page(FILE, 1), 111)] {
        for child_writes in [false, true] {
            let child = std::cell::RefCell::new(None);
            fails_at_each_point_of(
                "write after fork",
                |s| {
                    s.may_split.set(va == HUGE);
                    *child.borrow_mut() = Some(Arc::new(s.space.fork()?));
                    Ok(())
                },
                |s| match &*child.borrow() {
                    Some(child) if child_writes => {
                        let of = Stage {
                            space: child.clone(),
                            cache: s.cache.clone(),
                            file: s.file.clone(),
                            may_split: Cell::new(true),
                            ..*s
                        };
                        of.fault(va, Access::Write)
                    }
                    _ => s.fault(va, Access::Write),
                },
                |s| {
                    child.borrow_mut().take().is_some_and(|child| {
                        check(&child);
                        [&child, &s.space].iter().all(|space| {
                            let mut byte = [0];
                            space.copy_in(va, &mut byte).is_ok() && byte == [shows]
                        })
                    })
                },
            )?;
        }
    }
    Ok(())
}

/// What a device uses is copied by fork, huge pages to small ones where there are no others.
#[test]
fn r06_pins() -> Result {
    fails_at_each_point(
        "pin",
        |s| match s.space.pin(VirtRange::page_of(EMPTY), true) {
            Ok(_) => Came::Done,
            Err(PinError::Fault(FaultError::NoMemory)) => Came::NoMemory,
            Err(error) => panic!("{error}"),
        },
        |s| s.byte(EMPTY) == Some(0),
    )?;
    for va in [page(ANON, 1), HUGE] {
        let pinned = std::cell::RefCell::new(None);
        fails_at_each_point_of(
            "fork with pins",
            |s| {
                let pin = s.space.pin(VirtRange::page_of(va), true).map_err(|error| error.to_string())?;
                *pinned.borrow_mut() = Some(pin);
                Ok(())
            },
            |s| came(s.space.fork()),
            |_| pinned.borrow_mut().take().is_some(),
        )?;
    }
    Ok(())
}

fn read<T>(result: std::result::Result<T, ReadError<pagefirst_machine::Machine>>) -> Came {
    match result {
        Ok(_) => Came::Done,
        Err(ReadError::NoMemory) => Came::NoMemory,
        Err(error) => panic!("{error:?}"),
    }
}

#[test]
fn r06_files() -> Result {
    fails_at_each_point(
        "read_at",
        |s| read(s.cache.read_at(s.machine, 6 * PAGE_SIZE, &mut [0; 9])),
        |s| s.cache.pages() == 5,
    )?;
    for (offset, pages) in [(6 * PAGE_SIZE + 5, 5), (100 * PAGE_SIZE + 5, 5)] {
        fails_at_each_point(
            "write_at",
            |s| match s.cache.write_at(s.machine, offset, &[1]) {
                Ok(_) => Came::Done,
                Err(WriteError::Page(error)) => read::<()>(Err(error)),
                Err(error) => panic!("{error:?}"),
            },
            |s| s.cache.pages() == pages && s.cache.size() > offset,
        )?;
    }
    fails_at_each_point_of(
        "write back",
        |s| {
            s.cache.write_at(s.machine, 3 * PAGE_SIZE, &[7])?;
            Ok(())
        },
        |s| match s.cache.write_back(s.machine) {
            Ok(_) => Came::Done,
            Err(WriteBackError::NoMemory(_)) => Came::NoMemory,
            Err(error) => panic!("{error}"),
        },
        |s| s.file.stored(3).first() == Some(&7),
    )
}

/// Read-ahead ends where there is no memory, and says nothing.
#[test]
fn r06_read_ahead() -> Result {
    fails_at_each_point(
        "will need",
        |s| {
            s.cache.will_need(s.machine, 4, 4);
            Came::Done
        },
        |_| true,
    )?;
    fails_at_each_point(
        "will need, of a file that nothing is in memory of",
        |s| {
            let Ok(file) = cache(s.machine, &s.file, 128) else { return Came::NoMemory };
            file.will_need(s.machine, 100, 4);
            Came::Done
        },
        |_| true,
    )?;
    fails_at_each_point(
        "will need, of a mapping",
        |s| came(s.space.advise(EMPTY_SHARED, 8 * PAGE_SIZE, Advice::WillNeed)),
        |_| true,
    )?;
    // A huge page, or small ones in its place, as many as there is memory for.
    fails_at_each_point(
        "will need, of huge pages",
        |s| came(s.space.advise(page(SHMEM, 512), 512 * PAGE_SIZE, Advice::WillNeed)),
        |s| {
            s.fault(page(SHMEM, 512 + 7), Access::Read) == Came::Done
                && s.byte(page(SHMEM, 512 + 7)) == Some(0)
        },
    )
}

/// What a user copy needs is had by faults; it stops where memory does.
#[test]
fn r06_user_copies() -> Result {
    fails_at_each_point(
        "copy out",
        |s| match s.space.copy_out(EMPTY, &[9]) {
            Ok(()) => Came::Done,
            Err(stopped) => {
                assert!(matches!(stopped.why, Why::Error(FaultError::NoMemory)), "{stopped}");
                Came::NoMemory
            }
        },
        |s| s.byte(EMPTY) == Some(9),
    )
}

#[test]
fn r06_spaces_caches_and_limits() -> Result {
    let no_memory = |result: std::result::Result<(), pagefirst::types::NoMemory>| match result {
        Ok(()) => Came::Done,
        Err(_) => Came::NoMemory,
    };
    fails_at_each_point(
        "space",
        |s| no_memory(pagefirst::space::AddressSpace::new(s.machine, policy()).map(drop)),
        |_| true,
    )?;
    let cache = |s: &Stage| pagefirst::file::FileCache::new(s.machine, s.file.clone(), 4);
    fails_at_each_point("cache", |s| no_memory(cache(s).map(drop)), |_| true)?;
    fails_at_each_point("limit", |s| no_memory(Limit::new(s.machine, None, 4).map(drop)), |_| true)
}

/// A huge page of which a part is bad is split before that part is taken out.
#[test]
fn r06_bad_pages_are_lost() -> Result {
    fails_at_each_point_of(
        "lose poisoned",
        |s| {
            let pfn = frame(&s.space, HUGE).ok_or("mapped")?.add(7);
            assert_eq!(s.machine.vm().poison(s.machine, pfn), Poisoned::Private { huge: true });
            Ok(())
        },
        |s| match s.space.lose_poisoned() {
            Ok(lost) => {
                assert_eq!(lost, 1);
                Came::Done
            }
            Err(_) => Came::NoMemory,
        },
        |s| s.byte(page(HUGE, 7)).is_none() && s.byte(HUGE) == Some(140),
    )
}
