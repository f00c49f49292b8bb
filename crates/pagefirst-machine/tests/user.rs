//! Copies between the kernel and user memory: what they fault in, where they stop, what they leave in the entry.

mod kit;
#[path = "user/races.rs"]
mod races;

use kit::*;
use pagefirst::account::Faults;
use pagefirst::arch::{Attrs, Format, Tiny};
use pagefirst::fault::{Bus, FaultError, Segv};
use pagefirst::frame::FrameFlags;
use pagefirst::platform::Platform;
use pagefirst::policy::{HugePolicy, Policy};
use pagefirst::space::{Map, Stopped, VmaFlags, Why};
use pagefirst::types::{Access, PAGE_SIZE, Pfn, Prot, VirtAddr, VirtRange};
use pagefirst_machine::{Machine, MachineFile};
use std::result::Result as Either;

const AT: VirtAddr = VirtAddr(1 << 40);
const PAGE: usize = PAGE_SIZE as usize;

/// How a copy ended: nothing, or the count and the error.
type Ended = Either<(), (usize, FaultError)>;

fn ended<F: Format>(end: Either<(), Stopped<'_, Machine<F>>>) -> Ended {
    end.map_err(|Stopped { done, why }| match why {
        Why::Error(error) => (done, error),
        other => panic!("stopped after {done}: {other:?}"),
    })
}

fn copy_in<F: Format>(s: &Space<F>, from: VirtAddr, len: usize) -> (Ended, Vec<u8>) {
    let mut to = vec![0xee; len];
    (ended(s.copy_in(from, &mut to)), to)
}

fn copy_out<F: Format>(s: &Space<F>, to: VirtAddr, from: &[u8]) -> Ended {
    ended(s.copy_out(to, from))
}

const fn segv(done: usize, why: Segv) -> Ended {
    Err((done, FaultError::Segv(why)))
}

#[test]
fn each_kind_of_memory_is_faulted_in_by_a_copy() -> Result {
    let machine = machine();
    let s = space(machine)?; // runs on no CPU
    let c = cache(machine, &marked().with_tracking(true), 8)?;
    let (anon, private_at, shared_at) = (AT, VirtAddr(AT.0 + LEAF), VirtAddr(AT.0 + 2 * LEAF));
    s.map(at(anon, anonymous(8, RW)))?;
    s.map(at(private_at, private(&c, 0, 8, RW)))?;
    s.map(at(shared_at, shared(&c, 0, 8, RW)))?;
    // Read: the zero page, the file's pages.
    assert_eq!(copy_in(&s, VirtAddr(anon.0 + 100), 2 * PAGE), (Ok(()), vec![0; 2 * PAGE]));
    assert_eq!(frame(&s, anon), Some(machine.vm().zero_page()));
    let (end, bytes) = copy_in(&s, VirtAddr(private_at.0 + PAGE_SIZE - 3), 5);
    assert_eq!((end, bytes), (Ok(()), vec![mark(0), mark(0), mark(0), mark(1), mark(1)]));
    assert_eq!(frame(&s, page(private_at, 1)), Some(cached_frame(machine, &c, 1)?));
    // Written: a page in place of the zero page, one where nothing was, a copy, the file itself.
    let text: Vec<u8> = (0..3 * PAGE).map(|i| (i % 251) as u8).collect();
    for start in [anon, private_at, shared_at] {
        assert_eq!(copy_out(&s, VirtAddr(start.0 + 9), &text), Ok(()));
        assert_eq!(copy_in(&s, VirtAddr(start.0 + 9), text.len()), (Ok(()), text.clone()));
    }
    assert_eq!(first_byte(&s, private_at), Some(mark(0)), "what was not written stays");
    let mut from_file = vec![0; 3 * PAGE];
    assert_eq!(c.read_at(machine, 9, &mut from_file).map_err(|e| format!("{e:?}"))?, text.len());
    assert_eq!(from_file, text, "shared");
    let kinds = Faults {
        anon_read: 3,
        anon_write: 1,
        file_read: 2,
        file_copy: 2,
        shared_write: 4,
        copy: 5,
        ..Faults::default()
    };
    assert_eq!(s.account().faults, kinds);
    let mut cpu = machine.vcpu();
    cpu.switch_to(&s);
    assert_eq!(cpu.load_u8(VirtAddr(anon.0 + 9 + 300))?, text[300], "a program sees it");
    cpu.store_u8(VirtAddr(anon.0 + 9 + 300), 1)?;
    assert_eq!(copy_in(&s, VirtAddr(anon.0 + 9 + 300), 1), (Ok(()), vec![1]));
    check(&s);
    Ok(())
}

#[test]
fn a_copy_marks_the_entry_as_an_mmu_would() -> Result {
    let machine = machine();
    let s = space(machine)?;
    let file = marked().with_tracking(true);
    let c = cache(machine, &file, 16)?;
    warm(machine, &c, 0..16)?;
    s.map(at(AT, shared(&c, 0, 16, RW)))?;
    assert_eq!(fault(&s, AT, Access::Read), End::Mapped(false, 15));
    let bits = |i| attrs(&s, page(AT, i)) & (Attrs::ACCESSED | Attrs::DIRTY | Attrs::WRITE);
    assert_eq!(bits(1), Attrs::empty());
    assert_eq!(copy_in(&s, page(AT, 1), 1), (Ok(()), vec![mark(1)]));
    assert_eq!(bits(1), Attrs::ACCESSED);
    copy_out(&s, page(AT, 2), b"x").map_err(|e| format!("{e:?}"))?;
    assert_eq!(bits(2), Attrs::ACCESSED | Attrs::DIRTY | Attrs::WRITE);
    assert_eq!(s.account().unused, 13, "the others were not used");
    // Write protection comes back where the file tracks writes: the next copy faults again.
    s.protect(page(AT, 2), PAGE_SIZE, R)?;
    assert_eq!(copy_out(&s, page(AT, 2), b"x"), segv(0, Segv::Access));
    s.unmap(AT, 16 * PAGE_SIZE)?;
    assert_eq!(c.write_back(machine)?, 1);
    assert_eq!((file.stored(2)[0], file.stored(2)[1]), (b'x', mark(2)));
    Ok(())
}

#[test]
fn a_copy_stops_where_memory_stops_and_says_how_much_is_done() -> Result {
    let machine = machine();
    let s = space(machine)?;
    let file = marked();
    let c = cache(machine, &file, 2)?;
    let start = VirtAddr(AT.0 + 1000);
    let (first, all) = (PAGE - 1000, vec![7; 3 * PAGE]);
    let both = |end: Ended| {
        let (read, bytes) = copy_in(&s, start, all.len());
        let done = end.map_or_else(|(done, _)| done, |()| all.len());
        assert_eq!(read, end);
        assert!(bytes[done..].iter().all(|b| *b == 0xee), "nothing is written behind the count");
        assert_eq!(copy_out(&s, start, &all), end);
        assert_eq!(copy_in(&s, start, done), (Ok(()), vec![7; done]));
    };
    s.map(at(AT, anonymous(4, RW)))?;
    both(Ok(()));
    s.protect(page(AT, 2), PAGE_SIZE, NONE)?;
    both(segv(first + PAGE, Segv::Access));
    s.unmap(page(AT, 1), PAGE_SIZE)?;
    both(segv(first, Segv::NotMapped));
    s.unmap(AT, PAGE_SIZE)?;
    both(segv(0, Segv::NotMapped));
    // Rights: what may only be read, only executed (which x86 lets be read), or not touched.
    s.map(at(AT, anonymous(4, R)))?;
    assert_eq!(copy_in(&s, start, all.len()).0, Ok(()));
    assert_eq!(copy_out(&s, start, &all), segv(0, Segv::Access));
    s.protect(AT, PAGE_SIZE, Prot::EXEC)?;
    assert_eq!(copy_in(&s, start, 1).0, Ok(()));
    s.protect(AT, PAGE_SIZE, NONE)?;
    assert_eq!(copy_in(&s, start, 1).0, segv(0, Segv::Access));
    // The end of a file, and a page that cannot be read.
    s.map(at(AT, private(&c, 0, 4, RW)))?;
    both(Err((first + PAGE, FaultError::Bus(Bus::BeyondEnd))));
    s.map(at(AT, shared(&c, 0, 4, RW)))?;
    both(Err((first + PAGE, FaultError::Bus(Bus::BeyondEnd))));
    s.unmap(AT, 4 * PAGE_SIZE)?;
    c.write_back(machine)?;
    c.evict(machine);
    file.fail_reads(1, true);
    s.map(at(AT, private(&c, 0, 4, RW)))?;
    both(Err((first, FaultError::Bus(Bus::Io))));
    // A stack grows, and stops growing.
    let stack = Map { flags: VmaFlags::GROWS_DOWN, ..anonymous(1, RW) };
    let top = page(AT, 100_000);
    s.map(at(top, stack))?;
    assert_eq!(copy_out(&s, VirtAddr(top.0 - 2 * PAGE_SIZE), &all[..2 * PAGE]), Ok(()));
    assert_eq!(copy_in(&s, VirtAddr(top.0 - (64 << 20)), 1).0, segv(0, Segv::NotMapped));
    check(&s);
    Ok(())
}

#[test]
fn a_copy_stops_where_memory_is_out_and_goes_on_when_there_is_some() -> Result {
    let machine = small_machine(256);
    let s = space(machine)?;
    s.map(at(AT, anonymous(8, RW)))?;
    let text: Vec<u8> = (0..8 * PAGE).map(|i| (i % 253) as u8).collect();
    // Three tables, and pages as far as they go.
    let taken = machine.leave_free(3 + 2);
    let Err((done, error)) = copy_out(&s, AT, &text) else { return Err("memory was enough".into()) };
    assert_eq!((done, error), (2 * PAGE, FaultError::NoMemory));
    assert_eq!((Why::<Machine>::Error(error).errno(), check(&s).present), (Some(12), 2));
    drop(taken);
    assert_eq!(copy_out(&s, VirtAddr(AT.0 + done as u64), &text[done..]), Ok(()));
    assert_eq!(copy_in(&s, AT, text.len()), (Ok(()), text));
    // With no memory at all nothing is left behind.
    s.discard(AT, 8 * PAGE_SIZE)?;
    let taken = machine.leave_free(0);
    assert_eq!(copy_out(&s, AT, &[1]), Err((0, FaultError::NoMemory)));
    assert_eq!(tables(&s), 1);
    drop(taken);
    Ok(())
}

#[test]
fn addresses_no_program_can_have_are_refused_before_anything_is_looked_at() -> Result {
    let machine = machine();
    let s = space_with(machine, Policy { min_addr: page(VirtAddr(0), 16), ..policy() })?;
    let (low, end) = (s.usable().start, s.usable().end);
    s.map(at(low, anonymous(1, RW)))?;
    s.map(at(VirtAddr(end.0 - PAGE_SIZE), anonymous(1, RW)))?;
    let (none, odd) = (Segv::NotMapped, Segv::NonCanonical);
    for (start, len, why) in [
        (VirtAddr(low.0 - 1), 1, none),
        (VirtAddr(low.0 - 1), 2, none),
        (VirtAddr(0), PAGE, none),
        (end, 1, none),
        (VirtAddr(end.0 - 1), 2, none), // the first byte is there
        (VirtAddr(end.0 - 1), usize::MAX / 2, none),
        (VirtAddr(1 << 47), 1, odd),
        (VirtAddr((1 << 63) | 1), 8, odd),
        (VirtAddr(0xffff_8000_0000_0000), 8, none), // a kernel's half
        (VirtAddr(u64::MAX), 1, none),
        (VirtAddr(u64::MAX - 7), 8, none),
    ] {
        // No buffer of that size is needed to be refused one.
        let len = len.min(2 * PAGE);
        assert_eq!(copy_in(&s, start, len), (segv(0, why), vec![0xee; len]), "{start}, {len}");
        assert_eq!(copy_out(&s, start, &vec![1; len]), segv(0, why), "{start}, {len}");
        // Nothing is nowhere.
        assert_eq!(copy_in(&s, start, 0).0, Ok(()));
        assert_eq!(copy_out(&s, start, &[]), Ok(()));
        let word = s.compare_exchange_u64(VirtAddr(start.0 & !7), 0, 1);
        let inside = s.usable().contains(VirtAddr(start.0 & !7));
        assert_eq!(word.is_ok(), inside, "{start}");
    }
    assert_eq!(copy_in(&s, low, PAGE), (Ok(()), vec![0; PAGE]));
    assert_eq!(copy_in(&s, VirtAddr(end.0 - 8), 8).0, Ok(()));
    check(&s);
    Ok(())
}

#[test]
fn a_huge_page_is_copied_like_small_ones() -> Result {
    let machine = machine();
    let s = space_with(machine, Policy { huge: HugePolicy::Always, ..policy() })?;
    s.map(at(AT, anonymous(1024, RW)))?;
    // Across the edge of two huge pages; the first byte of each maps it.
    let text: Vec<u8> = (0..3 * PAGE).map(|i| (i % 250 + 1) as u8).collect();
    let start = VirtAddr(AT.0 + LEAF - 5000);
    assert_eq!(copy_out(&s, start, &text), Ok(()));
    assert_eq!((entry(&s, AT).1, entry(&s, page(AT, 512)).1, s.account().faults.mapped()), (1, 1, 2));
    assert_eq!(copy_in(&s, start, text.len()), (Ok(()), text.clone()));
    let mut whole = vec![0; 2 * LEAF as usize];
    let from = LEAF as usize - 5000;
    whole[from..from + text.len()].copy_from_slice(&text);
    assert_eq!(copy_in(&s, AT, whole.len()), (Ok(()), whole), "nothing else is written");
    assert!(matches!(s.compare_exchange_u64(page(AT, 7), 0, 5), Ok(Ok(0))));
    assert_eq!(first_byte(&s, AT), Some(0));
    // Split under it, it stops where a part of it does.
    s.protect(page(AT, 511), PAGE_SIZE, NONE)?;
    assert_eq!(copy_in(&s, start, text.len()).0, segv(5000 - PAGE, Segv::Access));
    assert_eq!(copy_out(&s, page(AT, 512), &text), Ok(()));
    check(&s);
    Ok(())
}

#[test]
fn a_device_in_the_space_is_not_user_memory() -> Result {
    let machine = machine();
    let s = space(machine)?;
    s.map(at(AT, anonymous(1, RW)))?;
    assert_eq!(copy_out(&s, AT, &[1]), Ok(()));
    // Its frames lie beyond memory, in the table of the page beside it.
    let device = VirtRange::new(page(AT, 1), page(AT, 3));
    s.page_table().mapper().map(device, Pfn(0xfee0_0000), 0, Attrs::WRITE | Attrs::DEVICE)?;
    assert_eq!(
        copy_in(&s, VirtAddr(AT.0 + 1), PAGE),
        (segv(PAGE - 1, Segv::Access), {
            let mut bytes = vec![0; PAGE - 1];
            bytes.push(0xee);
            bytes
        })
    );
    assert_eq!(copy_out(&s, page(AT, 2), &[1]), segv(0, Segv::Access));
    assert!(s.compare_exchange_u32(page(AT, 1), 0, 1).is_err());
    s.page_table().mapper().unmap(device)?;
    check(&s);
    Ok(())
}

#[test]
fn a_word_is_exchanged_if_it_is_what_it_should_be() -> Result {
    let machine = machine();
    let s = space(machine)?;
    s.map(at(AT, anonymous(2, RW)))?;
    let found = |end: Either<Either<u32, u32>, Why<'_, Machine>>| end.map_err(|why| why.errno());
    let (lower, upper) = (AT, VirtAddr(AT.0 + 4));
    // The first faults the page in.
    assert_eq!(found(s.compare_exchange_u32(upper, 0, 0x1122_3344)), Ok(Ok(0)));
    assert_eq!(found(s.compare_exchange_u32(upper, 0, 9)), Ok(Err(0x1122_3344)));
    assert_eq!(found(s.compare_exchange_u32(lower, 0, 0x5566_7788)), Ok(Ok(0)), "the other half is apart");
    let whole = 0x1122_3344_5566_7788;
    assert!(matches!(s.compare_exchange_u64(AT, 1, 2), Ok(Err(w)) if w == whole));
    assert!(matches!(s.compare_exchange_u64(AT, whole, u64::MAX), Ok(Ok(w)) if w == whole));
    assert_eq!(copy_in(&s, AT, 9), (Ok(()), [&[0xff; 8][..], &[0]].concat()));
    // Words that lie across something.
    for off in [1, 2, 3, 5, PAGE_SIZE - 2] {
        assert_eq!(found(s.compare_exchange_u32(VirtAddr(AT.0 + off), 0, 1)), Err(Some(22)), "EINVAL");
    }
    assert!(matches!(s.compare_exchange_u64(upper, 0, 1), Err(Why::Misaligned)));
    // Where it may not be written, it is not, whatever is there; the page is not even read in.
    s.protect(AT, PAGE_SIZE, R)?;
    assert_eq!(found(s.compare_exchange_u32(AT, 5, 6)), Err(Some(14)), "EFAULT");
    assert_eq!(found(s.compare_exchange_u32(page(AT, 2), 0, 1)), Err(Some(14)));
    let c = cache(machine, &marked(), 1)?;
    s.map(at(AT, shared(&c, 0, 2, R)))?;
    assert_eq!((found(s.compare_exchange_u32(AT, 5, 6)), c.pages()), (Err(Some(14)), 0));
    assert_eq!(found(s.compare_exchange_u32(page(AT, 1), 5, 6)), Err(Some(14)));
    // One that fails is a write all the same, as the instruction is.
    s.protect(AT, 2 * PAGE_SIZE, RW)?;
    assert_eq!(found(s.compare_exchange_u32(AT, 5, 6)), Ok(Err(0x0101_0101)));
    assert!(attrs(&s, AT).contains(Attrs::DIRTY));
    let pfn = frame(&s, AT).ok_or("mapped")?;
    assert!(machine.meta(pfn).flags().contains(FrameFlags::DIRTY));
    check(&s);
    Ok(())
}

#[test]
fn what_another_reads_in_blocks_a_copy_half_way() -> Result {
    let machine = machine();
    let s = space(machine)?;
    let (file, hook) = hooked();
    let c = cache(machine, &file, 4)?;
    s.map(at(AT, private(&c, 0, 4, R)))?;
    let inner = s.clone();
    hook.arm(2, move || {
        let mut to = vec![0; 3 * PAGE];
        let Err(Stopped { done, why }) = inner.copy_in(VirtAddr(AT.0 + 96), &mut to) else {
            panic!("page 2 is being read")
        };
        assert_eq!((done, why.errno()), (2 * PAGE - 96, None));
        assert_eq!(to[done - 1], mark(1));
        let Why::Blocked(ticket) = why else { panic!("{why:?}") };
        assert!(!ticket.is_ready());
    });
    assert_eq!(copy_in(&s, page(AT, 2), 1), (Ok(()), vec![mark(2)]));
    assert!(!hook.is_armed(), "it was met");
    assert_eq!(copy_in(&s, page(AT, 1), 2 * PAGE).0, Ok(()), "goes on where it stopped");
    Ok(())
}

#[test]
fn a_short_file_reads_as_zeros_behind_its_end_and_nothing_of_before() -> Result {
    let machine = machine();
    let s = space(machine)?;
    // Frames have been used before, so they hold poison.
    s.map(at(AT, anonymous(64, RW)))?;
    assert_eq!(copy_out(&s, AT, &vec![0x5a; 64 * PAGE]), Ok(()));
    s.discard(AT, 64 * PAGE_SIZE)?;
    let c = pagefirst::file::FileCache::new(machine, MachineFile::pattern(|_| 9), PAGE_SIZE + 100)?;
    s.map(at(AT, shared(&c, 0, 2, RW)))?;
    let expected = [vec![9; PAGE + 100], vec![0; PAGE - 100]].concat();
    assert_eq!(copy_in(&s, AT, 2 * PAGE), (Ok(()), expected));
    Ok(())
}

#[test]
fn small_tables_are_walked_the_same() -> Result {
    let machine = machine_of::<Tiny>();
    let s = space(machine)?;
    let start = page(VirtAddr(0), 1);
    s.map(at(start, anonymous(15, RW)))?;
    let text: Vec<u8> = (0..15 * PAGE).map(|i| (i % 255) as u8).collect();
    assert_eq!(copy_out(&s, start, &text), Ok(()));
    assert_eq!(copy_in(&s, start, text.len()), (Ok(()), text));
    assert_eq!(
        copy_in(&s, page(VirtAddr(0), 15), PAGE + 1).0,
        segv(0, Segv::NonCanonical).or(segv(0, Segv::NotMapped))
    );
    check(&s);
    Ok(())
}
