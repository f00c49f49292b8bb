//! Where mappings go.
//!
//! Only what stands in for `execve`'s mappings, and reservations larger than what is mapped first, are placed here, in
//! an order like Linux's: the program low, the heap behind it, the stack on top. Everything else goes where the
//! library puts it, or where the recording says.

use super::Placement;
use pagefirst::policy::Policy;
use pagefirst::space::Place as At;
use pagefirst::types::{PAGE_SIZE, VirtAddr};
use pagefirst_record::{Map, MapKind, Place};

/// Where Linux puts position-independent programs at least: two thirds of the user half.
const PROGRAM: u64 = 0x5555_5555_4000;
/// The top of the user half.
const TOP: u64 = 0x7fff_ffff_f000;
/// Linux keeps the stack's limit and a gap free above the mappings.
const STACK_GAP: u64 = 256 << 20;

// What Linux adds or subtracts at random on x86-64, at most, as the tables depend on it: each of the four areas has
// upper tables of its own where they are not near each other by chance.
//
/// To a program's place, and from that of mappings: `vm.mmap_rnd_bits` is 28, in pages.
const MAPS_RANDOM: u64 = 4096 << 28;
/// To the heap's place behind the program.
const HEAP_RANDOM: u64 = 1 << 30;
/// From the stack's place. Mappings stay below all of that.
const STACK_RANDOM: u64 = 16 << 30;
/// Half of what a leaf table spans: what is random is on average as far from a table's end.
const HALF_TABLE: u64 = 1 << 20;
/// The stack's limit and the gap below it.
const STACK_LIMIT: u64 = 9 << 20;

/// Chooses places.
#[derive(Clone)]
pub struct Placer {
    how: Placement,
    /// The next free address for what goes low.
    low: u64,
    /// The lowest address taken by what goes on top.
    high: u64,
}

impl Placer {
    /// Nothing placed yet.
    pub fn new(how: Placement) -> Self {
        let (low, high) = match how {
            Placement::Linux => (PROGRAM + MAPS_RANDOM / 2, TOP - STACK_RANDOM / 2 - HALF_TABLE),
            Placement::Ours | Placement::Recorded => (Policy::default().min_addr.0, TOP),
        };
        Placer { how, low, high }
    }

    /// The policy for placement by the library.
    pub fn policy(&self, policy: Policy) -> Policy {
        match self.how {
            Placement::Linux => {
                let map_top = TOP - STACK_LIMIT - STACK_RANDOM - MAPS_RANDOM / 2 - HALF_TABLE;
                Policy { map_top: VirtAddr(map_top), align_large: 2 << 20, ..policy }
            }
            Placement::Ours | Placement::Recorded => {
                Policy { map_top: VirtAddr(TOP - STACK_GAP), align_large: 0, ..policy }
            }
        }
    }

    /// Where the reservation of a mapping starts, or that the library is to choose (`None`). A place inside another
    /// reservation is not asked for here.
    pub fn reservation(&mut self, map: &Map) -> Option<u64> {
        let recorded = match map.place {
            Place::Anywhere { recorded } | Place::FixedRecorded(recorded) => recorded,
            Place::At(_) => return None,
        };
        if self.how == Placement::Recorded {
            return Some(recorded);
        }
        match map.kind {
            MapKind::Program | MapKind::Heap => {
                let gap = if (self.how, map.kind) == (Placement::Linux, MapKind::Heap) {
                    HEAP_RANDOM / 2
                } else {
                    0
                };
                let at = self.low + gap;
                // The heap has the rest of the low part to itself, from the page after next on.
                self.low = at + map.reserve.next_multiple_of(PAGE_SIZE) + PAGE_SIZE;
                Some(at)
            }
            MapKind::Stack => {
                let at = self.high - map.reserve.next_multiple_of(PAGE_SIZE);
                self.high = at;
                Some(at)
            }
            MapKind::Interpreter | MapKind::Mmap | MapKind::Vdso => {
                // Room for what comes beside it later is found by mapping the whole first; see `engine`.
                None
            }
        }
    }
}

/// The library's word for a place at an address.
pub fn fixed(at: u64) -> At {
    At::Fixed(VirtAddr(at))
}

impl Placer {
    /// Whether mappings go where they were while recording.
    pub fn is_recorded(&self) -> bool {
        self.how == Placement::Recorded
    }
}
