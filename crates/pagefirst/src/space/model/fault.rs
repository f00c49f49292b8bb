//! Faults while the mapping goes.

use super::*;
use crate::table::model::{Role, check};

const ALL: u64 = 4;

fn unmap(m: &'static Machine) -> u64 {
    assert!(m.process().unmap(at(0), ALL * PAGE_SIZE).is_ok());
    m.collect();
    0
}

/// A fault was told to wait for its page. The page comes, and the fault comes again, while its mapping is unmapped and what the
/// library knew of it is freed: it maps the page and that is taken out, or it finds that there is no mapping, or is to wait for
/// the call that takes it away.
fn blocked_against_unmap(main: usize) {
    let setup = || {
        let m = Machine::whole([2, 0, 0], [1, 0, 0], HugePolicy::Never);
        m.open(ALL, true);
        m.map_file(0, ALL);
        let Outcome::Blocked(ticket) = m.process().fault(at(1), Access::Read) else {
            panic!("it takes long")
        };
        *m.whole.ticket.lock().unwrap() = Some(ticket);
        m
    };
    let retry: Role = |m| {
        KEPT.take().unwrap().complete(Ok(()));
        let ticket = m.whole.ticket.lock().unwrap().take().unwrap();
        assert!(ticket.is_ready());
        said(&m.process().retry(at(1), Access::Read, ticket))
    };
    check(3, main, setup, [retry, unmap], |m, said| {
        assert_eq!(m.mapped(), [], "mapping left in an unmapped range, {said:?}");
        assert!([MAPPED, BLOCKED, NOT_MAPPED].contains(&said[0]), "{said:?}");
        assert_eq!(m.file().pages(), 1);
        m.exit();
    });
}

// catches: around_overwrites, epoch_ignores_pins, install_validates_unlocked, install_without_validation
// catches: pin_without_fence, unlock_forgets_dead, unpin_relaxed, zap_skips_empty
#[test]
fn r07_blocked_fault_against_unmap_main_0() {
    blocked_against_unmap(0);
}
// catches: around_overwrites, epoch_ignores_pins, install_validates_unlocked, install_without_validation
// catches: pin_without_fence, unlock_forgets_dead, unpin_relaxed, zap_skips_empty
#[test]
fn r07_blocked_fault_against_unmap_main_1() {
    blocked_against_unmap(1);
}
