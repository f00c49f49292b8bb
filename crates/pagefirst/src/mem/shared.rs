//! `Shared`, `Link`, `Reserved`, `Pool`: counted objects in slabs, reclaimed through the epoch.
//!
//! A [`Shared`] is a counted pointer, a [`Link`] an atomic place for one that readers follow under a [`Pin`]. When
//! the last `Shared` (links included) goes, the object is retired; after its grace period its value is dropped,
//! which lets go of what it links to, and its slot returns. So trees whose nodes are shared between versions are
//! safe code: nothing but the count frees, and a reader's borrow ends with its pin.
//!
//! What an object links to may end with it ([`Pooled::end`]): a reader who got to the one below came by one above, all of
//! those above have ended by the time the count is zero, and each of them ended after the grace period of what was
//! unlinked by a writer. So nobody reads it, and it needs no grace period of its own. But a reader who comes by a
//! [`Link`] does not come by an object: what a link was ever made to lead to has a grace period of its own, always.
//!
//! | | load under a pin | share | replace, drop |
//! |---|---|---|---|
//! | load | free | free | the old object outlives the pin |
//! | share | | count | `share` needs a counted owner, so the count is never zero |
//! | replace, drop | | | one swap; links are written by one writer at a time |

use super::Few;
use super::limbo::{Chain, Limbo};
use super::slab::Slab;
use crate::platform::Platform;
use crate::sync::atomic::{AcqRel, Acquire, AtomicPtr, AtomicU32, Relaxed, Release};
use crate::sync::epoch::Pin;
use crate::types::NoMemory;
use core::cell::Cell;
use core::fmt;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use core::ops::Deref;
use core::ptr::NonNull;

/// What stands in a slab slot: the count, the pool it returns to, a link for limbo, and the value.
struct Object<P: Platform, T: 'static> {
    count: AtomicU32,
    /// Not zero once a [`Link`] has led to it.
    linked: AtomicU32,
    pool: &'static Pool<P, T>,
    next: Cell<Option<NonNull<Object<P, T>>>>,
    life: Life,
    value: ManuallyDrop<T>,
}

// loom watches that who reads an object does so before its value ends.
#[cfg(loom)]
use crate::table::model::Watch as Life;

/// Nothing: loom alone watches lives.
#[cfg(not(loom))]
struct Life;
#[cfg(not(loom))]
impl Life {
    fn new() -> Self {
        Life
    }
    #[inline(always)]
    fn touch(&self) {}
    #[inline(always)]
    fn change(&self, _to: bool) {}
}

/// A count that reached this says no more how many references there are: the object is never freed. It is set back to the
/// middle of what lies above, so that those who count at the same time do not leave it.
const SATURATED: u32 = 1 << 31;
const MIDDLE: u32 = 3 << 30;

impl<P: Platform, T: 'static> Object<P, T> {
    /// Gives a reference back; whether it was the last one.
    fn let_go(&self) -> bool {
        // AcqRel: who ends the object comes after all who let go of it, and so after their readers.
        let before = self.count.fetch_sub(1, AcqRel);
        if before >= SATURATED {
            self.count.store(MIDDLE, Relaxed);
        }
        before == 1
    }
}

struct Objects<P, T>(PhantomData<fn(P, T)>);
impl<P: Platform, T: 'static> Chain for Objects<P, T> {
    type At = NonNull<Object<P, T>>;
    fn next(&self, at: Self::At) -> Option<Self::At> {
        // SAFETY: `at` is in limbo, its slot is not reused; the link is touched under limbo's lock alone.
        unsafe { at.as_ref() }.next.get()
    }
    fn set_next(&self, at: Self::At, next: Option<Self::At>) {
        // SAFETY: as in `next`.
        unsafe { at.as_ref() }.next.set(next);
    }
}

/// What can be kept in a [`Pool`].
pub trait Pooled: Sized + 'static {
    /// The value is about to end: nobody may come to it any more by ways of his own, beside a count and a pin. Comes back
    /// when nobody is there who did.
    fn ending(&self) {}
    /// Ends what a value whose grace period is over refers to (`Shared::end`). Then the value is dropped.
    fn end(&mut self, _: &Past) {}
}

/// Possession proves: the grace period of the value being ended is over. It lasts for so many values more.
#[derive(Debug)]
pub struct Past {
    left: Cell<usize>,
}

/// All objects of one type.
pub struct Pool<P: Platform, T: 'static> {
    slab: Slab<P, Object<P, T>>,
    limbo: Limbo<P, NonNull<Object<P, T>>>,
    platform: AtomicPtr<P>,
}

// SAFETY: objects are reached through their counts and locks; the pointers in limbo are owned by it.
unsafe impl<P: Platform, T: Send + Sync> Send for Pool<P, T> {}
// SAFETY: as above.
unsafe impl<P: Platform, T: Send + Sync> Sync for Pool<P, T> {}

impl<P: Platform, T: 'static> Pool<P, T> {
    pub(crate) fn new() -> Self {
        Pool { slab: Slab::new(), limbo: Limbo::new(), platform: AtomicPtr::new(core::ptr::null_mut()) }
    }
    pub(crate) fn init(&self, p: &'static P) {
        self.platform.store(core::ptr::from_ref(p).cast_mut(), Release);
    }
    fn platform(&self) -> &'static P {
        let p = self.platform.load(Acquire);
        debug_assert!(!p.is_null(), "a pool used before Vm::init");
        // SAFETY: stored by `init` from a `&'static P`; objects exist only after `Vm::init`.
        unsafe { &*p }
    }

    /// A slot for one object, so that making it cannot fail later.
    ///
    /// # Errors
    /// [`NoMemory`].
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn reserve(&'static self) -> Result<Reserved<P, T>, NoMemory> {
        Ok(Reserved { pool: self, at: self.slab.take_one(self.platform())? })
    }
    /// The same for `n` objects. When memory runs out those that were there are passed on first.
    ///
    /// # Errors
    /// [`NoMemory`].
    #[cfg_attr(debug_assertions, track_caller)]
    pub(crate) fn reserve_all(
        &'static self,
        n: usize,
        mut each: impl FnMut(Reserved<P, T>),
    ) -> Result<(), NoMemory> {
        self.slab.take(self.platform(), n, |at| each(Reserved { pool: self, at }))
    }
    /// Makes an object.
    ///
    /// # Errors
    /// [`NoMemory`]; the value is dropped.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn share(&'static self, value: T) -> Result<Shared<P, T>, NoMemory> {
        Ok(self.reserve()?.fill(value))
    }
    /// Objects alive or in limbo, and slots reserved.
    pub fn live(&self) -> usize {
        self.slab.live()
    }
    /// Objects in limbo.
    pub fn in_limbo(&self) -> usize {
        self.limbo.len(self.platform())
    }
    pub(crate) fn trim(&self) -> usize {
        self.slab.trim(self.platform())
    }
}

impl<P: Platform, T: Pooled> Pool<P, T> {
    /// Ends up to `most` objects whose grace period is over; returns how many.
    pub(crate) fn collect(&self, now: u64, most: usize) -> usize {
        let p = self.platform();
        let past = Past { left: Cell::new(most) };
        loop {
            let mut batch = Few::new();
            self.limbo.take(p, &Objects(PhantomData), now, past.left.get(), &mut batch);
            let (is_full, objects) = (batch.is_full(), batch.take());
            past.left.set(past.left.get() - objects.len());
            // SAFETY: their counts reached zero, so nobody owns them, and their grace period is over, so nobody reads
            // them. Nobody else has taken them out of limbo.
            unsafe { self.end(objects, &past) };
            if !is_full || past.left.get() == 0 {
                return most - past.left.get();
            }
        }
    }
    /// # Safety
    /// Nobody owns these objects of this pool, nobody reads them, and nobody else ends them.
    unsafe fn end(&self, objects: &[NonNull<Object<P, T>>], past: &Past) {
        if objects.is_empty() {
            return;
        }
        for at in objects {
            // SAFETY: the object is alive; shared still, for who comes by ways of his own (`Pooled::ending`).
            unsafe { at.as_ref() }.value.ending();
            // SAFETY: as above.
            unsafe { at.as_ref() }.life.change(false);
            // SAFETY: the caller's promise, and what `ending` has seen to.
            let value = unsafe { &mut (*at.as_ptr()).value };
            value.end(past);
            // SAFETY: it is dropped once.
            unsafe { ManuallyDrop::drop(value) };
        }
        // SAFETY: slots taken by `reserve`, their values gone; the caller's promise.
        unsafe { self.slab.give(self.platform(), objects) };
    }
}

/// A pool of whatever objects.
pub(crate) trait AnyPool<P: Platform> {
    /// Called once, before it is used.
    fn init(&self, p: &'static P);
    /// Ends up to `most` objects whose grace period is over; returns how many.
    fn collect(&self, now: u64, most: usize) -> usize;
    /// Objects in limbo.
    fn in_limbo(&self) -> usize;
    /// Frees slabs without objects; returns how many frames.
    fn trim(&self) -> usize;
    /// Objects alive or in limbo, and slots reserved.
    fn live(&self) -> usize;
}

impl<P: Platform, T: Pooled> AnyPool<P> for Pool<P, T> {
    fn init(&self, p: &'static P) {
        Pool::init(self, p);
    }
    fn collect(&self, now: u64, most: usize) -> usize {
        Pool::collect(self, now, most)
    }
    fn in_limbo(&self) -> usize {
        Pool::in_limbo(self)
    }
    fn trim(&self) -> usize {
        Pool::trim(self)
    }
    fn live(&self) -> usize {
        Pool::live(self)
    }
}

/// An owned slot without a value; dropped, it returns.
pub struct Reserved<P: Platform, T: 'static> {
    pool: &'static Pool<P, T>,
    at: NonNull<Object<P, T>>,
}

// SAFETY: an owned slot that nobody else knows; it is filled by its owner, and returned under the slab's lock.
unsafe impl<P: Platform, T: Send + Sync> Send for Reserved<P, T> {}
// SAFETY: `&Reserved` reaches nothing.
unsafe impl<P: Platform, T: Send + Sync> Sync for Reserved<P, T> {}

/// The name of an object, kept in the object itself, so that who borrows that can refer to it.
pub(crate) struct Name<P: Platform, T: 'static>(core::sync::atomic::AtomicPtr<()>, PhantomData<fn(P, T)>);

impl<P: Platform, T: 'static> Name<P, T> {
    /// Another reference to the object that this is kept in; `None` if it has no other any more.
    pub fn share(&self, pin: &Pin<P>) -> Option<Shared<P, T>> {
        // SAFETY: a name is kept in its object alone (`Reserved::name`), which is borrowed by the caller: so it has a reference,
        // or the caller came to it under a pin that he has still, and its grace period is not over.
        unsafe { Shared::of(self.0.load(Relaxed), pin) }
    }
}

impl<P: Platform, T: 'static> Reserved<P, T> {
    /// The name of the object to be, for the value that will be it to keep, and for nobody else.
    pub(crate) fn name(&self) -> Name<P, T> {
        Name(core::sync::atomic::AtomicPtr::new(self.at.as_ptr().cast()), PhantomData)
    }
    /// Puts the value in. Cannot fail.
    pub fn fill(self, value: T) -> Shared<P, T> {
        let this = ManuallyDrop::new(self);
        let object = Object {
            count: AtomicU32::new(1),
            linked: AtomicU32::new(0),
            pool: this.pool,
            next: Cell::new(None),
            life: Life::new(),
            value: ManuallyDrop::new(value),
        };
        // SAFETY: the slot is ours, uninitialised, of this type's size and alignment.
        unsafe { this.at.write(object) };
        Shared { at: this.at, own: PhantomData }
    }
}

impl<P: Platform, T: 'static> Drop for Reserved<P, T> {
    fn drop(&mut self) {
        // SAFETY: taken from this pool's slab, never filled.
        unsafe { self.pool.slab.give(self.pool.platform(), &[self.at]) };
    }
}

/// A counted reference. When the last one goes the object is retired, never freed at once.
pub struct Shared<P: Platform, T: 'static> {
    at: NonNull<Object<P, T>>,
    own: PhantomData<Object<P, T>>,
}

// SAFETY: like `Arc`: shared access to T from every thread that holds one, dropped by any of them.
unsafe impl<P: Platform, T: Send + Sync> Send for Shared<P, T> {}
// SAFETY: as above.
unsafe impl<P: Platform, T: Send + Sync> Sync for Shared<P, T> {}

impl<P: Platform, T: 'static> Shared<P, T> {
    fn object(&self) -> &Object<P, T> {
        // SAFETY: this `Shared` counts, so the object is alive.
        unsafe { self.at.as_ref() }
    }
    /// Lets go of what a value that is being ended referred to. Was it the last reference, the object ends at once if no
    /// [`Link`] ever led to it, for then its grace period is over as well (see above); else it is retired.
    pub(crate) fn end(self, past: &Past)
    where
        T: Pooled,
    {
        let this = ManuallyDrop::new(self);
        if !this.object().let_go() {
            return;
        }
        let was_linked = this.object().linked.load(Relaxed) != 0 && !cfg!(mutant = "end_what_was_linked");
        let Some(left) = past.left.get().checked_sub(1).filter(|_| !was_linked) else { return this.retire() };
        past.left.set(left);
        // SAFETY: the last reference was ours. Readers came by objects above, which have all ended, each past its
        // grace period or, in turn, that of one above it.
        unsafe { this.object().pool.end(&[this.at], past) };
    }
    /// The last reference is gone: the object ends after a grace period.
    fn retire(&self) {
        let pool = self.object().pool;
        let p = pool.platform();
        pool.limbo.push(p, &Objects(PhantomData), (self.at, self.at), 1, &p.vm().epoch);
    }
    /// A name of the object, by which [`of`](Self::of) finds it; of no other while the object is there.
    pub(crate) fn name(&self) -> *mut () {
        self.at.as_ptr().cast()
    }
    /// Another reference to the object with this name; `None` if it has no other any more.
    ///
    /// # Safety
    /// It is a name of an object of this type which had a reference at some moment since the pin was taken, and did not end
    /// without a grace period since.
    pub(crate) unsafe fn of(name: *mut (), _pin: &Pin<P>) -> Option<Self> {
        let at = NonNull::new(name.cast::<Object<P, T>>())?;
        // SAFETY: the caller's promise: its grace period, if it has begun, is not over before the pin is gone. The count is
        // atomic, and nobody has the object alone until then.
        let count = unsafe { &(*at.as_ptr()).count };
        let more = |count: u32| match count {
            0 => None,
            many @ SATURATED.. => Some(many),
            count => Some(count + 1),
        };
        count.fetch_update(AcqRel, Relaxed, more).ok()?;
        Some(Shared { at, own: PhantomData })
    }
    /// Whether both refer to the same object.
    pub fn same(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl<P: Platform, T: 'static> Clone for Shared<P, T> {
    fn clone(&self) -> Self {
        let before = self.object().count.fetch_add(1, Relaxed);
        debug_assert!(before > 0);
        if before >= SATURATED {
            self.object().count.store(MIDDLE, Relaxed);
        }
        Shared { at: self.at, own: PhantomData }
    }
}

impl<P: Platform, T: 'static> Deref for Shared<P, T> {
    type Target = T;
    fn deref(&self) -> &T {
        let object = self.object();
        object.life.touch();
        &object.value
    }
}

impl<P: Platform, T: 'static> Drop for Shared<P, T> {
    fn drop(&mut self) {
        if self.object().let_go() {
            self.retire();
        }
    }
}

impl<P: Platform, T: fmt::Debug> fmt::Debug for Shared<P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

/// An atomic place for a [`Shared`] or for nothing, followed by readers under a pin.
pub struct Link<P: Platform, T: 'static> {
    at: AtomicPtr<Object<P, T>>,
    own: PhantomData<Shared<P, T>>,
}

// SAFETY: as for `Shared`, whose owner it is.
unsafe impl<P: Platform, T: Send + Sync> Send for Link<P, T> {}
// SAFETY: as above.
unsafe impl<P: Platform, T: Send + Sync> Sync for Link<P, T> {}

/// The value of an object that a link led to.
///
/// # Safety
/// It does not end while the value is borrowed.
#[inline(always)]
unsafe fn read<'e, P: Platform, T>(at: NonNull<Object<P, T>>) -> &'e T {
    let at = at.as_ptr();
    // SAFETY: the caller's promise. Others may be at work on the fields beside.
    unsafe {
        (*at).life.touch();
        &*(&raw const (*at).value).cast::<T>()
    }
}

impl<P: Platform, T: 'static> Link<P, T> {
    fn raw(to: Option<Shared<P, T>>) -> *mut Object<P, T> {
        let Some(to) = to else { return core::ptr::null_mut() };
        // Before readers find it, so before it is let go of.
        to.object().linked.store(1, Relaxed);
        ManuallyDrop::new(to).at.as_ptr()
    }
    fn owned(at: *mut Object<P, T>) -> Option<Shared<P, T>> {
        NonNull::new(at).map(|at| Shared { at, own: PhantomData })
    }
    /// A link to `to`.
    pub fn new(to: Option<Shared<P, T>>) -> Self {
        Link { at: AtomicPtr::new(Self::raw(to)), own: PhantomData }
    }
    /// What it links to, readable until the pin is dropped.
    #[inline]
    pub fn load<'e>(&self, _pin: &'e Pin<P>) -> Option<&'e T> {
        // SAFETY: whoever unlinks the object retires it after this pin was taken or before this load saw it; in the
        // first case its memory stays until the pin is gone (`sync::epoch`), the second cannot yield it.
        NonNull::new(self.at.load(Acquire)).map(|at| unsafe { read(at) })
    }
    /// Whether it links to nothing.
    #[inline]
    pub(crate) fn is_none(&self) -> bool {
        self.at.load(Relaxed).is_null()
    }
    /// Another counted reference to what it links to. Whoever calls it keeps writers away (holds the writer's lock,
    /// or owns the link's object before it is published).
    pub(crate) fn share(&self) -> Option<Shared<P, T>> {
        let held = ManuallyDrop::new(Self::owned(self.at.load(Acquire)));
        (*held).clone()
    }
    /// Borrows what it links to; for writers, who alone replace it.
    pub(crate) fn get(&self) -> Option<&T> {
        // SAFETY: the link owns a count, and only the writer, who is the caller, could take it away.
        NonNull::new(self.at.load(Acquire)).map(|at| unsafe { read(at) })
    }
    /// Puts `to` in place and returns what was there; readers see one or the other.
    pub fn replace(&self, to: Option<Shared<P, T>>) -> Option<Shared<P, T>> {
        Self::owned(self.at.swap(Self::raw(to), AcqRel))
    }
}

impl<P: Platform, T: 'static> Drop for Link<P, T> {
    fn drop(&mut self) {
        drop(Self::owned(self.at.load(Acquire)));
    }
}
