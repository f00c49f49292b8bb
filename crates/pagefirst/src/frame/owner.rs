//! From a page to whom it belongs to.
//!
//! A page names its owner, and does not count for it. So whoever follows the name sees to it that the owner is there.

use super::{Frame, FrameFlags};
use crate::file::FileCache;
use crate::mem::Shared;
use crate::platform::Platform;
use crate::rmap::Root;
use crate::sync::epoch::Pin;

/// Runs `f` with the file that a folio is a page of, up to date, if it is; the file does not end meanwhile. Called with no lock
/// held; the caller has a reference to the folio.
pub(crate) fn with_file<P: Platform, R>(
    p: &'static P,
    folio: &Frame<P>,
    f: impl FnOnce(&FileCache<P>) -> R,
) -> Option<R> {
    let _not_ending = p.vm().ending_files.lock(p);
    let meta = folio.meta();
    let valid = FrameFlags::FILE | FrameFlags::UP_TO_DATE;
    if !meta.flags().contains(valid) {
        return None;
    }
    // SAFETY: the owner of a page that is up to date is the cache that it is attached to, stored from a reference to it. A
    // cache that ends clears the owner of each of its pages, and takes this lock after that, while it is still shared
    // (`Pooled::ending`); so the owner that is read here is alive, and nobody has it alone, until the lock is given back.
    let file = unsafe { meta.owner().cast::<FileCache<P>>().as_ref() };
    file.map(f)
}

/// The root of a page of private memory that is mapped; `None` if it is neither. The caller has a reference to the folio.
pub(crate) fn root_of<P: Platform>(p: &'static P, folio: &Frame<P>) -> Option<Shared<P, Root<P>>> {
    let pin = Pin::new(p);
    let meta = folio.meta();
    if !meta.flags().contains(FrameFlags::ANON) || meta.maps_ordered() == 0 {
        return None;
    }
    // SAFETY: the owner of private memory is a root, stored before the flag that was seen, and it stays as long as the caller
    // refers to the folio. The page was mapped when its count was read, under the pin: so somebody had a space that has
    // joined the root, for one that has taken entries out of a space's tables holds it until it has given their pages back
    // (`rmap::Space`), and a space counts for its roots. So the root's last reference goes later, and no root ends without a
    // grace period: none is let go of by `Shared::end`.
    unsafe { Shared::of(meta.owner(), &pin) }
}
