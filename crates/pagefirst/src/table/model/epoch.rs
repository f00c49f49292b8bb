//! The epoch alone, and counted objects over it.

use super::{Item, Machine, Role, check};
use crate::mem::Link;
use crate::sync::atomic::{AcqRel, Acquire};
use crate::sync::epoch::{Epoch, Pin};

fn machine() -> &'static Machine {
    Machine::new([0; 3])
}

/// Reads the object under a pin if it finds it.
fn read(m: &'static Machine) -> u64 {
    let _pin = Pin::new(m);
    let found = m.linked.load(Acquire);
    if found == 1 {
        m.object.touch();
    }
    found as u64
}
fn advance(m: &'static Machine, times: usize) -> u64 {
    (0..times).map(|_| m.vm.epoch.advance(m)).last().unwrap_or(0)
}
/// Unlinks the object, advances so many times, and destroys the object if it may; 1 if it did.
fn reclaim(m: &'static Machine, advances: usize) -> u64 {
    m.linked.swap(0, AcqRel);
    let tag = m.vm.epoch.retire_tag();
    let past = Epoch::past(tag) <= advance(m, advances);
    if past {
        m.object.change(false);
    }
    past as u64
}

/// One reader, one writer who advances: the reader is not overtaken, and its read happened before the end.
fn pin_against_retire(main: usize) {
    check(6, main, machine, [read, |m| reclaim(m, 2)], |_, _| {});
}

// catches: epoch_ignores_pins, pin_without_fence, unpin_relaxed
#[test]
fn epoch_pin_against_retire_main_0() {
    pin_against_retire(0);
}
// catches: epoch_ignores_pins, pin_without_fence, unpin_relaxed
#[test]
fn epoch_pin_against_retire_main_1() {
    pin_against_retire(1);
}

/// The writer finds the reader pinned again: it has seen the end of the first pin.
fn pin_twice(main: usize) {
    check(6, main, machine, [|m| read(m) + read(m), |m| reclaim(m, 2)], |_, _| {});
}

// catches: epoch_ignores_pins, pin_without_fence, repin_relaxed, unpin_relaxed
#[test]
fn epoch_pinned_again_main_0() {
    pin_twice(0);
}
// catches: epoch_ignores_pins, pin_without_fence, repin_relaxed, unpin_relaxed
#[test]
fn epoch_pinned_again_main_1() {
    pin_twice(1);
}

/// The reader advances after its read; the writer is told the epoch that the reader made.
fn reader_advances(main: usize) {
    let reader: Role = |m| {
        read(m);
        advance(m, 2)
    };
    check(6, main, machine, [reader, |m| reclaim(m, 1)], |_, _| {});
}

// catches: advance_relaxed, advance_without_fence
#[test]
fn epoch_advanced_by_another_main_0() {
    reader_advances(0);
}
// catches: advance_relaxed, advance_without_fence
#[test]
fn epoch_advanced_by_another_main_1() {
    reader_advances(1);
}

/// The epoch moves on before the reader pins: the writer's tag is not older than the reader's pin.
fn tag_against_pin(main: usize) {
    let reader: Role = |m| {
        advance(m, 2);
        read(m)
    };
    check(6, main, machine, [reader, |m| reclaim(m, 1)], |_, _| {});
}

// catches: pin_without_fence, retire_without_fence
#[test]
fn epoch_tag_is_never_too_old_main_0() {
    tag_against_pin(0);
}
// catches: pin_without_fence, retire_without_fence
#[test]
fn epoch_tag_is_never_too_old_main_1() {
    tag_against_pin(1);
}

/// A third thread advances: it has seen the reader's pin, or the reader the writer's unlink.
fn third_advances(main: usize) {
    check(3, main, machine, [read, |m| reclaim(m, 1), |m| advance(m, 2)], |_, _| {});
}

// catches: advance_relaxed, advance_without_fence, epoch_ignores_pins, pin_without_fence, retire_without_fence
// catches: unpin_relaxed
#[test]
fn epoch_three_threads_main_0() {
    third_advances(0);
}
// catches: advance_relaxed, advance_without_fence, epoch_ignores_pins, pin_without_fence, retire_without_fence
// catches: unpin_relaxed
#[test]
fn epoch_three_threads_main_1() {
    third_advances(1);
}
// catches: advance_relaxed, advance_without_fence, epoch_ignores_pins, pin_without_fence, retire_without_fence
// catches: unpin_relaxed
#[test]
fn epoch_three_threads_main_2() {
    third_advances(2);
}

/// A link is replaced and the old object collected; a reader under a pin sees the old or the new one whole.
fn link(main: usize) {
    let setup = || {
        let m = machine();
        assert!(m.link.set(Link::new(m.items.share(Item::above(None)).ok())).is_ok());
        m
    };
    let read: Role = |m| {
        let pin = Pin::new(m);
        m.link.get().unwrap().load(&pin).unwrap().touch();
        0
    };
    let replace: Role = |m| {
        let new = m.items.reserve().unwrap().fill(Item::above(None));
        drop(m.link.get().unwrap().replace(Some(new)));
        (0..2).map(|_| m.items.collect(m.vm.epoch.advance(m), usize::MAX) as u64).sum()
    };
    check(4, main, setup, [read, replace], |m, said| assert_eq!(m.items.in_limbo() as u64, 1 - said[1]));
}

// catches: epoch_ignores_pins, pin_without_fence, unpin_relaxed
#[test]
fn link_against_replace_main_0() {
    link(0);
}
// catches: epoch_ignores_pins, pin_without_fence, unpin_relaxed
#[test]
fn link_against_replace_main_1() {
    link(1);
}

/// The link leads to an item that an older one, retired long ago, refers to as well. The writer takes it out of the link
/// first, and then ends the older one, whose grace period is over: the item's is not.
fn linked_and_below(main: usize) {
    let setup = || {
        let m = machine();
        let item = m.items.share(Item::above(None)).ok();
        assert!(m.link.set(Link::new(item.clone())).is_ok());
        drop(m.items.share(Item::above(item)));
        (0..2).for_each(|_| _ = m.vm.epoch.advance(m));
        m
    };
    let read: Role = |m| {
        let pin = Pin::new(m);
        m.link.get().unwrap().load(&pin).inspect(|item| item.touch());
        0
    };
    let replace: Role = |m| {
        drop(m.link.get().unwrap().replace(None));
        (0..3).for_each(|_| _ = m.items.collect(m.vm.epoch.advance(m), usize::MAX));
        0
    };
    check(4, main, setup, [read, replace], |m, _| {
        (0..4).for_each(|_| _ = m.items.collect(m.vm.epoch.advance(m), usize::MAX));
        assert_eq!((m.items.in_limbo(), m.items.live()), (0, 0));
    });
}

// catches: end_what_was_linked, epoch_ignores_pins, pin_without_fence, unpin_relaxed
#[test]
fn linked_and_below_main_0() {
    linked_and_below(0);
}
// catches: end_what_was_linked, epoch_ignores_pins, pin_without_fence, unpin_relaxed
#[test]
fn linked_and_below_main_1() {
    linked_and_below(1);
}

/// Two items in turn link to one below them, which ends with the second, whatever of them a reader has.
fn shared_link(main: usize) {
    let setup = || {
        let m = machine();
        let below = m.items.share(Item::above(None)).ok();
        assert!(m.link.set(Link::new(m.items.share(Item::above(below)).ok())).is_ok());
        m
    };
    let read: Role = |m| {
        let pin = Pin::new(m);
        m.link.get().unwrap().load(&pin).unwrap().touch();
        0
    };
    let replace: Role = |m| {
        let link = m.link.get().unwrap();
        let below = link.get().unwrap().below.clone();
        for below in [below, None] {
            drop(link.replace(m.items.share(Item::above(below)).ok()));
            m.items.collect(m.vm.epoch.advance(m), usize::MAX);
        }
        m.items.collect(m.vm.epoch.advance(m), usize::MAX);
        0
    };
    check(4, main, setup, [read, replace], |m, _| {
        (0..2).for_each(|_| _ = m.items.collect(m.vm.epoch.advance(m), usize::MAX));
        assert_eq!((m.items.in_limbo(), m.items.live()), (0, 1));
    });
}

// catches: epoch_ignores_pins, pin_without_fence, unpin_relaxed
#[test]
fn link_to_what_is_shared_main_0() {
    shared_link(0);
}
// catches: epoch_ignores_pins, pin_without_fence, unpin_relaxed
#[test]
fn link_to_what_is_shared_main_1() {
    shared_link(1);
}
