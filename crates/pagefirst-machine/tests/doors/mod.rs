//! Races made certain: something happens on another CPU at one point of what the library does, between two steps that
//! nothing else separates.
//!
//! The points are where the library asks the format of page tables something, so the format here is one with a door in
//! it.
#![allow(dead_code, reason = "each test program uses its own part")]

use pagefirst::arch::{Attrs, Format, X86_64};
use pagefirst::types::{Pfn, VirtAddr};
use std::cell::RefCell;
use std::marker::PhantomData;

/// A point that the library passes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Point {
    /// A fault has found its mapping and begins to walk the tables. (Passed again under the root's lock, if that is
    /// where tables are missing.)
    Found,
    /// A fault has seen that nothing is mapped, and has not locked the table yet.
    SawNothing,
    /// An entry that leads to a leaf table, or maps a huge page, was read without a lock.
    SawTable,
    /// Under the table's lock, a fault's own page is checked, its neighbours are not.
    Checked,
    /// An entry was read and is about to be changed.
    Edits,
}

/// How often the point is passed before something happens there, and what.
type Armed = (Point, u32, Box<dyn FnOnce() + Send>);

/// What happens each time.
type Always = (Point, std::sync::Arc<dyn Fn() + Send + Sync>);

/// Where the thread comes from that was begun.
type UnderWay = std::sync::mpsc::Receiver<std::thread::JoinHandle<()>>;

thread_local! {
    static ALWAYS: RefCell<Option<Always>> = const { RefCell::new(None) };
    static ARMED: RefCell<Option<Armed>> = const { RefCell::new(None) };
    static UNDER_WAY: RefCell<Option<UnderWay>> = const { RefCell::new(None) };
}

/// At the `nth` time that this thread passes the point, `then` happens on another CPU.
pub fn arm(point: Point, nth: u32, then: impl FnOnce() + Send + 'static) {
    ARMED.set(Some((point, nth, Box::new(then))));
}

/// At the `nth` time that this thread passes the point, `then` begins on another CPU, and this thread goes on as soon as
/// `until` says so. [`finish`] waits for its end.
pub fn arm_until(
    point: Point,
    nth: u32,
    until: impl Fn() -> bool + Send + 'static,
    then: impl FnOnce() + Send + 'static,
) {
    let (begun, end) = std::sync::mpsc::channel();
    UNDER_WAY.set(Some(end));
    arm(point, nth, move || {
        let thread = std::thread::spawn(then);
        while !until() && !thread.is_finished() {
            std::thread::yield_now();
        }
        assert!(begun.send(thread).is_ok(), "nobody waits for it");
    });
}

/// Waits for the end of what was begun.
pub fn finish() {
    let thread = UNDER_WAY.take().and_then(|end| end.recv().ok());
    assert!(thread.is_some_and(|thread| thread.join().is_ok()), "what was to happen meanwhile failed");
}

/// Each time that this thread passes the point, `then` happens on another CPU.
pub fn arm_always(point: Point, then: impl Fn() + Send + Sync + 'static) {
    ALWAYS.set(Some((point, std::sync::Arc::new(then))));
}

/// Takes back what was armed.
pub fn disarm() {
    ALWAYS.set(None);
    ARMED.set(None);
}

/// Whether what was armed has happened.
pub fn has_happened() -> bool {
    ARMED.with_borrow(|armed| armed.is_none())
}

fn pass(point: Point) {
    let always = ALWAYS.with_borrow(|always| always.clone()).filter(|(at, _)| *at == point);
    if let Some((_, then)) = always {
        assert!(std::thread::spawn(move || then()).join().is_ok(), "what was to happen each time failed");
    }
    let then = ARMED.with_borrow_mut(|armed| match armed {
        Some((at, 0, _)) if *at == point => armed.take().map(|(.., then)| then),
        Some((at, left, _)) if *at == point => {
            *left -= 1;
            None
        }
        _ => None,
    });
    if let Some(then) = then {
        assert!(std::thread::spawn(then).join().is_ok(), "what was to happen meanwhile failed");
    }
}

/// A format with a door at each point.
pub struct DoorsOf<F>(PhantomData<F>);

/// The format of x86-64, with doors.
pub type Doors = DoorsOf<X86_64>;

// SAFETY: every answer is that of `F`, which keeps the contract.
unsafe impl<F: Format> Format for DoorsOf<F> {
    const LEVELS: u8 = F::LEVELS;
    const TOP_LEAF: u8 = F::TOP_LEAF;
    const TABLES_MARKED: bool = F::TABLES_MARKED;
    const NON_CANONICAL_TRAPS: bool = F::NON_CANONICAL_TRAPS;
    const BREAK_BEFORE_MAKE: bool = F::BREAK_BEFORE_MAKE;
    const BITS: u32 = F::BITS;
    const USER_END: VirtAddr = F::USER_END;
    fn is_canonical(va: VirtAddr) -> bool {
        F::is_canonical(va)
    }
    fn table(pfn: Pfn) -> u64 {
        F::table(pfn)
    }
    fn transit(leaf: Pfn) -> u64 {
        F::transit(leaf)
    }
    fn leaf(pfn: Pfn, level: u8, attrs: Attrs) -> u64 {
        pass(Point::Checked);
        F::leaf(pfn, level, attrs)
    }
    fn child(raw: u64, level: u8) -> Option<Pfn> {
        if raw == 0 {
            pass(Point::SawNothing);
        } else if level == 1 {
            pass(Point::SawTable);
        }
        F::child(raw, level)
    }
    fn frame(raw: u64, level: u8) -> Option<Pfn> {
        F::frame(raw, level)
    }
    fn attrs(raw: u64) -> Attrs {
        F::attrs(raw)
    }
    fn allows(raw: u64) -> Attrs {
        F::allows(raw)
    }
    fn with_attrs(raw: u64, attrs: Attrs) -> u64 {
        pass(Point::Edits);
        F::with_attrs(raw, attrs)
    }
    fn index(va: VirtAddr, level: u8) -> usize {
        if level + 1 == Self::LEVELS {
            pass(Point::Found);
        }
        F::index(va, level)
    }
}
