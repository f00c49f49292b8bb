//! Values inside shared objects that are reached with the key that a lock keeps.
//!
//! An intrusive tree or list has its links in the objects themselves, one lock for all of them elsewhere. That lock keeps
//! a [`Key`]; a [`Keyed`] value is bound to one key, for ever, when it first enters what the key is for, and is reached
//! with that key alone: shared with `&Key`, alone with `&mut Key`. So who uses it is safe code. (The technique is that of
//! the crate `qcell`, its `QCellOwnerPinned`.)
//!
//! A key is known by its address, and it is a byte large, so no two are at one place at a time. Should a key be moved away
//! and another one come in its place, that one reaches the values bound there: it is still one at a time, and who put it
//! there comes after who took the first away.

use super::atomic::plain::AtomicUsize;
use super::atomic::{AcqRel, Acquire};
use core::cell::UnsafeCell;

/// Possession, or a borrow, proves access to the values bound to it.
#[derive(Debug)]
pub(crate) struct Key {
    /// Takes up room, so that each key is at a place of its own.
    _place: u8,
}

impl Key {
    /// A key to which nothing is bound.
    pub const fn new() -> Self {
        Key { _place: 0 }
    }
    fn place(&self) -> usize {
        core::ptr::from_ref(self).addr()
    }
}

/// A value that is reached with a key.
pub(crate) struct Keyed<T> {
    /// Where the key is; 0 while there is none.
    key: AtomicUsize,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached by `&mut self`, by `&Key` (shared) or by `&mut Key` (alone); a key is borrowed as anything
// else, and is where the value says for one key at a time.
unsafe impl<T: Send + Sync> Sync for Keyed<T> {}

impl<T> Keyed<T> {
    /// A value that nobody reaches yet.
    pub const fn new(value: T) -> Self {
        Keyed { key: AtomicUsize::new(0), value: UnsafeCell::new(value) }
    }
    /// Binds it to `key`; false when it was bound to it before.
    ///
    /// # Panics
    /// When it is bound to another.
    pub fn bind(&self, key: &Key) -> bool {
        match self.key.compare_exchange(0, key.place(), AcqRel, Acquire) {
            Ok(_) => true,
            Err(other) => {
                assert_eq!(other, key.place(), "a value bound to another key");
                false
            }
        }
    }
    /// Whether it is bound to `key`.
    pub fn is_bound(&self, key: &Key) -> bool {
        self.key.load(Acquire) == key.place()
    }
    /// The value, shared.
    ///
    /// # Panics
    /// When it is not bound to this key; so do the others.
    pub fn get<'k>(&'k self, key: &'k Key) -> &'k T {
        assert!(self.is_bound(key), "a value reached with another key");
        // SAFETY: it is bound to this key, which is borrowed shared for as long; nobody has `&mut` of the key meanwhile.
        unsafe { &*self.value.get() }
    }
    /// The value, alone.
    pub fn get_mut<'k>(&'k self, key: &'k mut Key) -> &'k mut T {
        assert!(self.is_bound(key), "a value reached with another key");
        // SAFETY: as in `get`; the key is borrowed alone, so no other value bound to it is borrowed either.
        unsafe { &mut *self.value.get() }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_bound_once() {
        let (mut key, other) = (Key::new(), Key::new());
        let value = Keyed::new(1);
        assert!(!value.is_bound(&key));
        assert!(value.bind(&key) && !value.bind(&key) && !value.is_bound(&other));
        *value.get_mut(&mut key) += 1;
        assert_eq!(*value.get(&key), 2);
    }

    #[test]
    #[should_panic = "another key"]
    fn another_key_does_not_open_it() {
        let (key, other) = (Key::new(), Key::new());
        let value = Keyed::new(());
        value.bind(&key);
        value.get(&other);
    }
}
