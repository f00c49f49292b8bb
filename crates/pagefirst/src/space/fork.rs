//! Fork: a space that shows what this one shows, its private memory shared until one of the two writes to it.
//!
//! The parent's writer lock is held. The child gets VMAs of its own. Faults in the parent are held up from the first entry
//! on until the flush at the end is done: so what the child sees of private memory is one moment's, and nobody copies, or
//! makes writable, a page to which a CPU may still have a writable translation. (User copies are not held up: they go
//! by the entries, as the MMU does.)
//!
//! Then the entries of private mappings, table by table. Under the lock of the parent's table, each page of private memory
//! gets a reference and a mapping more, and stops being exclusive; its entry is made read-only, and the same entry goes
//! into a leaf table that nobody else sees yet ([`NewLeaf`]). Without the lock, that is then published in the child.
//! Zero pages and pages of files are left out: the child faults them in again. A pinned page stays the parent's,
//! exclusive and as writable as it was, for a device may write to it; the child gets a copy at once. Of a page in which
//! hardware reported an error it gets nothing but the word that it is lost.
//!
//! Memory can run out at every step. Then the child goes, and the parent is as it was, but that entries may be read-only
//! and pages not exclusive: the next write makes them so again, with no copy unless they are parts of a larger folio
//! (`fault::wp`).
//!
//! | | fork |
//! |---|---|
//! | fault in the parent | its table's lock: before, its entry is copied; after, it finds the VMA held up |
//! | write by a CPU with a translation from before the flush | to the page that is shared: the child, which does not run yet, sees it too |
//! | write fault in the parent that was at work before | the page it copied is held, so it is not reused; a copy that fork shared stays read-only |
//! | mapping call, discard, fork in the parent | the writer lock |
//! | pin | the table's lock: a pinned page is copied, and one that is shared is made exclusive again before it is pinned; what that makes read-only, fork flushes as well |
//! | a file that shrinks | finds the parent's mappings not live and waits; fork takes out of both what lies beyond the end by then |
//! | exit of either | map counts and references fall after their flush; the last one reuses the page |

use super::tree::{MAX_NEW, VmaTree};
use super::{AddressSpace, EVERYTHING, MapError, State, Vma, VmaFlags};
use crate::arch::{Attrs, Format};
use crate::frame::{Frame, FrameFlags, Part, folio_of, is_bad};
use crate::limit::{Payer, Unavailable};
use crate::mem::Shared;
use crate::platform::Platform;
use crate::rmap::{self, Present};
use crate::table::{Counted, Flow, Guard, NewEntry, NewLeaf, PageTable, Reserve, Visitor};
use crate::tlb::{Gather, NOTHING, SmallGather};
use crate::types::{NoMemory, PAGE_SIZE, VirtAddr, VirtRange};

impl<P: Platform> AddressSpace<P> {
    /// Makes a space like this one: the same mappings, limits, heap and policy, but for mappings advised
    /// [`DontFork`](super::Advice::DontFork). Private memory is shared, page by page, until it is written to; that of
    /// mappings advised [`WipeOnFork`](super::Advice::WipeOnFork) the child finds empty.
    ///
    /// Faults in this space are [`Blocked`](crate::fault::Outcome::Blocked) meanwhile. What a
    /// [`Mapper`](crate::table::Mapper) mapped is not inherited: who wants it in the child maps it there.
    ///
    /// ```
    /// use pagefirst::policy::Policy;
    /// use pagefirst::space::{AddressSpace, Map};
    /// use pagefirst::types::Prot;
    /// use pagefirst_machine::{Config, Machine};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let machine: &'static Machine = Machine::new(Config::default());
    /// let parent = AddressSpace::new(machine, Policy::default())?;
    /// let at = parent.map(Map::anonymous(4096, Prot::READ | Prot::WRITE))?.range.start;
    /// parent.copy_out(at, b"before").map_err(|stopped| stopped.to_string())?;
    /// let child = parent.fork()?;
    /// parent.copy_out(at, b"parent").map_err(|stopped| stopped.to_string())?;
    /// let mut seen = [0; 6];
    /// child.copy_in(at, &mut seen).map_err(|stopped| stopped.to_string())?;
    /// assert_eq!(&seen, b"before");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MapError::NoMemory`] or [`MapError::OverLimit`]; there is no child then, and nothing that this space shows has changed.
    #[inline(never)]
    pub fn fork(&self) -> Result<AddressSpace<P>, MapError> {
        let writing = self.write();
        let shared = Present::new(self.p, Some(&self.shared))?;
        let (tree, bytes) = self.child_mappings(&shared)?;
        let state = State { bytes, heap: writing.state.heap, reserve: tree.reserve(self.p, 0)? };
        let child = AddressSpace::with(self.p, self.policy, self.gap, tree, state, shared);
        drop(child.limit.replace(self.limit.share()));
        child.tree.overlapping(EVERYTHING).for_each(|vma| rmap::insert(&vma));
        let copied =
            held_up(self.page_table(), |hold| self.hold(hold), |gather| self.copy_to(&child, gather));
        for tree in [&self.tree, &child.tree] {
            tree.overlapping(EVERYTHING).for_each(|vma| rmap::help(&vma));
        }
        copied?;
        Ok(child)
    }

    /// Faults in this space are held up from now on, or no more.
    pub(super) fn hold(&self, hold: bool) {
        let each = |vma: &Vma<P>| if hold { vma.retire() } else { vma.resume() };
        self.tree.overlapping(EVERYTHING).for_each(|vma| each(&vma));
    }

    /// Copies the entries of private memory to the child.
    #[inline(never)]
    fn copy_to(&self, child: &AddressSpace<P>, gather: &mut Gather<'_, P>) -> Result<(), Unavailable> {
        let mut copier = Copier::new(child.page_table(), child.root().name(), child.payer());
        for vma in child.tree.overlapping(EVERYTHING) {
            if vma.is_private() && !vma.flags.contains(VmaFlags::WIPE_ON_FORK) {
                copier.copy(self.page_table(), vma.range, gather)?;
            }
        }
        Ok(())
    }

    /// The child's mappings, and their bytes. Apart from the copying, for both take stack.
    #[inline(never)]
    fn child_mappings(&self, space: &Shared<P, rmap::Space<P>>) -> Result<(VmaTree<P>, u64), NoMemory> {
        let (p, tree, mut bytes) = (self.p, VmaTree::new(), 0);
        let mut reserve = tree.reserve(p, MAX_NEW)?;
        let mut inherited = self
            .tree
            .overlapping(EVERYTHING)
            .filter(|vma| !vma.flags.contains(VmaFlags::DONT_FORK))
            .peekable();
        while inherited.peek().is_some() {
            let (mut new, mut n, mut range) = ([const { None }; MAX_NEW], 0, NOTHING);
            for vma in inherited.by_ref().take(MAX_NEW) {
                let slot = p.vm().or_drain(p, || p.vm().vmas.reserve())?;
                let id = p.vm().new_id();
                let mut child = vma.part(vma.range, vma.prot, vma.flags);
                child.id = id;
                child.enter(space)?;
                new[n] = Some(slot.fill(child));
                n += 1;
                range = range.union(vma.range);
                bytes += vma.range.len();
            }
            reserve.refill(p, &tree, n)?;
            tree.replace(range, &mut new[..n], &mut reserve);
        }
        Ok((tree, bytes))
    }
}

/// Runs `copy` while faults in the space of these tables are held up, until what it gathered is flushed.
pub(crate) fn held_up<P: Platform, R>(
    table: &PageTable<P>,
    hold: impl Fn(bool),
    copy: impl FnOnce(&mut Gather<'_, P>) -> R,
) -> R {
    hold(true);
    let mut gather = Gather::new(table);
    let done = copy(&mut gather);
    if cfg!(mutant = "fork_resumes_before_flush") {
        hold(false);
    }
    gather.flush();
    hold(false);
    done
}

/// What must be had before the copying goes on.
enum Want<P: Platform> {
    /// A leaf table, with those above it; what was filled is published first.
    Tables,
    /// A copy of what is pinned, mapped at this address with these attributes.
    Copy(VirtAddr, Part<P>, Attrs),
}

/// Copies the entries of one space to another, which nobody uses yet.
pub(crate) struct Copier<'a, P: Platform> {
    p: &'static P,
    child: &'a PageTable<P>,
    /// The child's: fork takes nothing out there, but who takes pages away by a reverse map does, from what is published.
    gather: SmallGather<'a, P>,
    reserve: Reserve<P>,
    /// The leaf table that is being filled.
    leaf: Option<NewLeaf<P>>,
    /// A huge page's entry on its way to the child: its address, its level, its bits.
    huge: Option<(VirtAddr, u8, u64)>,
    /// A copy, and what it is a copy of.
    copy: Option<(Frame<P>, Part<P>)>,
    want: Want<P>,
    /// Who owns copies.
    owner: *mut (),
    /// Who pays for them.
    payer: Payer<'a, P>,
}

impl<'a, P: Platform> Copier<'a, P> {
    /// Pages that are copied are `owner`'s; what they cost is charged to `payer`.
    pub fn new(child: &'a PageTable<P>, owner: *mut (), payer: Payer<'a, P>) -> Self {
        let p = child.platform();
        Copier {
            p,
            child,
            gather: Gather::small(child),
            reserve: Reserve::new(p),
            leaf: None,
            huge: None,
            copy: None,
            want: Want::Tables,
            owner,
            payer,
        }
    }

    /// Copies the entries in `range` of the parent. What must be flushed there is in `gather`.
    pub fn copy(
        &mut self,
        parent: &PageTable<P>,
        mut range: VirtRange,
        gather: &mut Gather<'_, P>,
    ) -> Result<(), Unavailable> {
        let whole = range;
        while let Flow::Full(at) = parent.descend(range, self, gather) {
            range.start = self.prepare(at)?;
            if range.is_empty() {
                break;
            }
        }
        // What a pin made read-only before an entry was looked at here, and has not flushed yet.
        if parent.is_unflushed() && !cfg!(mutant = "fork_ignores_unflushed") {
            gather.touch(whole);
        }
        Ok(())
    }
    /// Gets what is missing, with nothing locked or pinned, to go on at `at`; tells where to go on.
    fn prepare(&mut self, at: VirtAddr) -> Result<VirtAddr, Unavailable> {
        match core::mem::replace(&mut self.want, Want::Tables) {
            Want::Tables => Ok(self.tables().map(|()| at)?),
            Want::Copy(va, part, attrs) => self.copy_pinned(va, part, attrs).map(|end| end.unwrap_or(at)),
        }
    }
    fn tables(&mut self) -> Result<(), NoMemory> {
        self.publish();
        let (p, reserve) = (self.p, &mut self.reserve);
        p.vm().or_drain(p, || reserve.refill(P::Format::LEVELS - 1))
    }
    /// The reserve had tables for it before it was begun.
    fn publish(&mut self) {
        if let Some(leaf) = self.leaf.take() {
            leaf.publish(self.child, &mut self.reserve, &mut self.gather);
        }
        if let Some((va, level, raw)) = self.huge.take() {
            let entry = NewEntry { raw, counted: Counted::Anon };
            self.child.put(va, level, entry, &mut self.reserve, &mut self.gather);
        }
    }

    /// Whether there are tables for the entry of a page at `va`, in a table at `level`.
    fn is_ready(&self, va: VirtAddr, level: u8) -> bool {
        let is_open = self.leaf.as_ref().is_some_and(|leaf| level == 0 && leaf.base() == base::<P>(va));
        let idle = self.leaf.is_none() && self.huge.is_none();
        is_open || idle && self.reserve.len() >= P::Format::LEVELS - 1
    }

    /// Puts an entry for a page whose mapping is counted into what becomes the child's.
    #[inline]
    fn put(&mut self, va: VirtAddr, level: u8, raw: u64) {
        if level > 0 {
            self.huge = Some((va, level, raw));
            return;
        }
        self.put_small(va, NewEntry { raw, counted: Counted::Anon });
    }
    #[inline]
    fn put_small(&mut self, va: VirtAddr, entry: NewEntry) {
        let (p, reserve) = (self.p, &mut self.reserve);
        let leaf = match &mut self.leaf {
            Some(leaf) => leaf,
            none => none.insert(NewLeaf::open(p, base::<P>(va), reserve).expect("`is_ready` counted them")),
        };
        leaf.set(va, entry);
    }

    /// What is lost is lost to both.
    #[cold]
    fn put_lost(&mut self, va: VirtAddr) {
        self.put_small(va, NewEntry { raw: P::Format::poison(), counted: Counted::Nothing });
    }

    /// A copy of what is pinned. Where no huge page can be had for it, or a part of it is lost, it is copied to small ones,
    /// and the answer is where to go on.
    #[cold]
    fn copy_pinned(
        &mut self,
        va: VirtAddr,
        part: Part<P>,
        attrs: Attrs,
    ) -> Result<Option<VirtAddr>, Unavailable> {
        let p = self.p;
        let frame = match part.order() {
            // There are tables for it: it comes into the leaf that is open, or opens one.
            0 if part.is_bad() => {
                self.put_lost(va);
                return Ok(Some(VirtAddr(va.0 + PAGE_SIZE)));
            }
            _ if part.is_bad() => None,
            0 => self.payer.frame(p).map(Some)?,
            order => self.payer.block(p, order).ok(),
        };
        if let Some(mut frame) = frame {
            frame.copy_of(&part);
            self.copy = Some((frame, part));
            return Ok(None);
        }
        self.tables()?;
        let mut at = va;
        for i in 0..1 << part.order() {
            let small = part.small(i);
            if small.is_bad() {
                self.put_lost(at);
            } else {
                let mut frame = self.payer.frame(p)?;
                frame.copy_of(&small);
                self.put_copy(at, 0, frame, &small, attrs);
            }
            at = VirtAddr(at.0 + PAGE_SIZE);
        }
        Ok(Some(at))
    }
    /// The entry of a page that is the child's alone.
    #[cold]
    fn put_copy(&mut self, va: VirtAddr, level: u8, frame: Frame<P>, of: &Part<P>, attrs: Attrs) {
        if attrs.contains(Attrs::EXEC) {
            frame.frames().for_each(|pfn| self.p.sync_instructions(pfn));
        }
        self.put(va, level, P::Format::leaf(frame.into_anonymous(self.owner, of.index()), level, attrs));
    }
}

/// What is filled is published, though it be for a child that cannot be finished: its entries are counted.
impl<P: Platform> Drop for Copier<'_, P> {
    fn drop(&mut self) {
        self.publish();
    }
}

impl<P: Platform> Visitor<P> for Copier<'_, P> {
    #[inline(always)]
    fn leaf(&mut self, guard: &mut Guard<'_, P>, range: VirtRange, gather: &mut Gather<'_, P>) -> Flow {
        let (p, level) = (self.p, guard.table().level());
        if !self.is_ready(range.start, level) {
            return Flow::Full(range.start);
        }
        let (mut va, size) = (range.start, P::Format::span(level));
        let (mut narrowed, mut flow) = (false, Flow::Done);
        let mut left = guard.entries();
        for index in P::Format::slots(range, level) {
            let raw = guard.entry(index);
            left -= (raw != 0) as u64;
            if let Some(pfn) = P::Format::frame(raw, level)
                && !P::Format::attrs(raw).contains(Attrs::SPECIAL)
                && let (_, meta, flags) = folio_of(p, pfn)
                && flags.contains(FrameFlags::ANON)
            {
                let attrs = P::Format::attrs(raw);
                if level == 0 && is_bad(p, flags, pfn, 0) {
                    // The child gets none of what is lost, and no copy.
                    self.put_lost(va);
                } else if meta.try_share() {
                    let mut raw = raw;
                    if attrs.contains(Attrs::WRITE) {
                        raw = P::Format::read_only(guard.update(index, P::Format::read_only));
                        narrowed = true;
                    }
                    self.put(va, level, raw);
                } else if let Some((frame, of)) = self.copy.take_if(|(_, of)| of.pfn() == pfn) {
                    self.put_copy(va, level, frame, &of, attrs);
                } else {
                    let part = Part::try_get(p, pfn, P::Format::order(level));
                    self.want = part.map_or(Want::Tables, |part| Want::Copy(va, part, attrs));
                    flow = Flow::Full(va);
                    break;
                }
            } else if raw == P::Format::poison() && level == 0 {
                self.put_lost(va);
            }
            if left == 0 {
                break;
            }
            va.0 += size;
        }
        if narrowed {
            gather.touch(range);
        }
        flow
    }
    fn splits(&self, _: VirtRange, _: VirtRange) -> bool {
        false
    }
}

/// The first address of the leaf table for `va`.
fn base<P: Platform>(va: VirtAddr) -> VirtAddr {
    P::Format::span_of(va, 1).start
}
