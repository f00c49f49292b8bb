//! Files that are memory and nothing else: tmpfs, `memfd`, shared anonymous memory.

use super::{File, FillGuard, Hint, Io, MAX_FOLIO_ORDER, StoreGuard};
use crate::types::PAGE_SIZE;
use core::ops::Range;

/// When a memory file gets large folios, as the mount option `huge=` of tmpfs says (`transhuge.rst` of Linux's
/// administration guide). Where advice was not to have them there are none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ShmemHuge {
    /// Never.
    #[default]
    Never,
    /// Wherever a page is missing. A folio may reach beyond the end of the file, and is there when the file grows.
    ///
    /// Linux then maps all of it by one entry, beyond the end as well; here nothing beyond the end is mapped, so a huge
    /// entry needs a file that reaches to its end.
    Always,
    /// Where the folio lies below the file's end: near the end smaller ones that do. With advice, everywhere.
    WithinSize,
    /// With advice alone.
    Advise,
}

/// A memory file: zero until written, kept in memory for as long as its cache.
///
/// ```
/// use pagefirst::file::{File, Hint, Shmem, ShmemHuge};
/// let file = Shmem::new(1, ShmemHuge::WithinSize);
/// let size = (2 << 20) + 4096;
/// assert_eq!(file.folio_order(511, size, Hint::None), 9); // the first 2 MiB
/// assert_eq!(file.folio_order(512, size, Hint::None), 0);
/// assert_eq!(file.folio_order(512, size, Hint::Huge), 9);
/// ```
#[derive(Clone, Debug)]
pub struct Shmem {
    id: u64,
    huge: ShmemHuge,
    order: u8,
}

impl Shmem {
    /// The file of this number among all files, with folios of 2 MiB.
    pub const fn new(id: u64, huge: ShmemHuge) -> Self {
        Shmem { id, huge, order: MAX_FOLIO_ORDER }
    }
    /// The same file with folios of 2^`order` pages, at most [`MAX_FOLIO_ORDER`].
    #[must_use]
    pub const fn with_order(self, order: u8) -> Self {
        let order = if order < MAX_FOLIO_ORDER { order } else { MAX_FOLIO_ORDER };
        Shmem { order, ..self }
    }
    /// When it gets large folios.
    pub const fn huge(&self) -> ShmemHuge {
        self.huge
    }

    /// The largest order at which the folio that holds the page lies below the size.
    fn within(&self, index: u64, size: u64) -> u8 {
        let pages = size.div_ceil(PAGE_SIZE);
        (1..=self.order).rev().find(|order| ((index >> order) + 1) << order <= pages).unwrap_or(0)
    }
}

impl PartialEq for Shmem {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}
impl Eq for Shmem {}

impl File for Shmem {
    fn id(&self) -> u64 {
        self.id
    }
    fn read(&self, _: u64, _: FillGuard<'_>) -> Io {
        Io::Ready // it is zero
    }
    fn write(&self, _: u64, _: StoreGuard<'_>) -> Io {
        Io::Error
    }
    fn forget(&self, _: Range<u64>) {}
    fn tracks_writes(&self) -> bool {
        false
    }
    fn max_folio_order(&self) -> u8 {
        if self.huge == ShmemHuge::Never { 0 } else { self.order }
    }
    fn folio_order(&self, index: u64, size: u64, hint: Hint) -> u8 {
        match (self.huge, hint) {
            (ShmemHuge::Never, _) | (_, Hint::Small) => 0,
            (ShmemHuge::Always, _) | (_, Hint::Huge) => self.order,
            (ShmemHuge::WithinSize, Hint::None) => self.within(index, size),
            (ShmemHuge::Advise, Hint::None) => 0,
        }
    }
    fn is_stored(&self) -> bool {
        false
    }
}
