//! A few values in place, of which only those that are there are ever written.

use core::marker::PhantomData;
use core::mem::MaybeUninit;

/// Up to N values, on the stack or in what holds it: making it writes none of them. Whoever is lent one sees its room as
/// a slice.
pub(crate) struct Few<T, Room: ?Sized = [MaybeUninit<T>]> {
    len: usize,
    of: PhantomData<T>,
    /// The first `len` are initialised.
    room: Room,
}

/// Room for N values.
pub(crate) type Room<T, const N: usize> = [MaybeUninit<T>; N];

impl<T: Copy, const N: usize> Few<T, Room<T, N>> {
    /// None.
    #[inline]
    pub const fn new() -> Self {
        Few { len: 0, of: PhantomData, room: [const { MaybeUninit::uninit() }; N] }
    }
}

impl<T: Copy, R: AsRef<[MaybeUninit<T>]> + AsMut<[MaybeUninit<T>]> + ?Sized> Few<T, R> {
    /// No room for another.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.len == self.room.as_ref().len()
    }
    /// How many are there.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }
    /// None is there.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Adds one.
    ///
    /// # Panics
    /// When there is no room.
    #[inline]
    pub fn push(&mut self, value: T) {
        self.room.as_mut()[self.len].write(value);
        self.len += 1;
    }
    /// Takes the last one.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        self.len = self.len.checked_sub(1)?;
        // SAFETY: it was among the first `len`, all initialised; `T: Copy`, so nothing is dropped twice.
        Some(unsafe { self.room.as_ref()[self.len].assume_init() })
    }
    /// Takes them all; they can be read until another is added.
    #[inline]
    pub fn take(&mut self) -> &[T] {
        let len = core::mem::take(&mut self.len);
        // SAFETY: the first `len` are initialised.
        unsafe { self.room.as_ref()[..len].assume_init_ref() }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn what_was_pushed_is_there() {
        let mut few: Few<u32, Room<u32, 3>> = Few::new();
        assert!(few.pop().is_none() && few.take().is_empty());
        (0..3).for_each(|i| few.push(i));
        assert!(few.is_full());
        assert_eq!(few.pop(), Some(2));
        assert_eq!(few.take(), [0, 1]);
        assert!(few.pop().is_none());
    }
}
