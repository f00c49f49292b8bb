//! Changes to one entry that is there: widen it, or put another page in its place.

use super::record::FaultKind;
use super::slot::{Locked, Seen, Slot};
use crate::arch::{Attrs, Format};
use crate::platform::Platform;

/// The slot is not what was seen any more, or what the change rests on is going away: look again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EditError;

fn same<F: Format>(a: u64, b: u64) -> bool {
    let bare = |raw| F::with_attrs(raw, F::attrs(raw) - (Attrs::ACCESSED | Attrs::DIRTY));
    bare(a) == bare(b)
}

impl<'e, P: Platform> Slot<'e, P, Seen> {
    /// Locks the slot if it still holds what was seen, whatever hardware marked it as, and `is_current` under the
    /// lock says that nothing the change rests on was announced to go away.
    pub(crate) fn lock(
        self,
        is_current: impl FnOnce() -> bool,
    ) -> Result<Slot<'e, P, Locked<'e, P>>, EditError> {
        let guard = self.at.lock().ok_or(EditError)?;
        if !is_current() || !same::<P::Format>(guard.entry(self.index()), self.state.0) {
            return Err(EditError);
        }
        Ok(Slot { at: self.at, parent: self.parent, va: self.va, state: Locked(guard) })
    }
}

impl<P: Platform> Slot<'_, P, Locked<'_, P>> {
    /// Adds attributes.
    pub(crate) fn widen(&mut self, attrs: Attrs) {
        let index = self.index();
        self.state.0.update(index, |raw| P::Format::with_attrs(raw, P::Format::attrs(raw) | attrs));
    }
    /// Puts an anonymous page's entry in place of what is there, and returns what was there. `was_file` and
    /// `was_counted` say as what the old entry counted.
    pub(crate) fn replace(&mut self, raw: u64, was: super::Counted) -> u64 {
        match was {
            super::Counted::Anon => self.state.0.count_anon(-1),
            super::Counted::File => self.state.0.count_file(-1),
            super::Counted::Nothing => {}
        }
        self.state.0.count_anon(1);
        let index = self.index();
        self.state.0.update(index, |_| raw)
    }
    /// Counts a fault of this kind in the table's record.
    pub(crate) fn tally(&self, kind: FaultKind) {
        self.state.0.tally(kind, 1);
    }
}
