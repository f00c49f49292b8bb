//! Who waits, and who wakes: what happens between.

mod stage;

use pagefirst::fault::{Outcome, Ticket};
use pagefirst::platform::Platform;
use pagefirst::types::{Access, PAGE_SIZE, VirtAddr};
use pagefirst_machine::{Late, MachineFile};
use stage::*;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, Wake, Waker};

const BASE: VirtAddr = VirtAddr(1 << 30);

struct Woken<F>(F);
impl<F: Fn() + Send + Sync> Wake for Woken<F> {
    fn wake(self: Arc<Self>) {
        self.0();
    }
}

/// Who leaves a list waits for whoever has taken it. So nobody who has is preempted, in a thread as in an interrupt; and
/// wakers are called when it is given back.
#[test]
fn who_rings_is_not_preempted_with_the_list_in_hand() -> Result {
    let stage = Stage::new(256);
    let file = MachineFile::zeros().late(Late::Held);
    let cache = stage.cache(&file, 4)?;
    let s = stage.space()?;
    shared(&s, BASE, &cache, 4, R)?;
    let Outcome::Blocked(ticket) = s.fault(BASE, Access::Read) else { return Err("not blocked".into()) };
    let key = Ticket::key(&ticket);
    let depth = Arc::new(AtomicI32::new(0));
    let sections = Arc::new(AtomicI32::new(0));
    let (now, were) = (depth.clone(), sections.clone());
    let waker = Waker::from(Arc::new(Woken(move || {
        assert_eq!((now.load(Relaxed), were.load(Relaxed)), (0, 1), "depth, and sections before");
        were.store(100, Relaxed);
    })));
    let mut wait = pin!(ticket.into_future());
    assert!(wait.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    let (now, were) = (depth.clone(), sections.clone());
    stage.at(
        move |step| {
            match step {
                Step::Enter => _ = now.fetch_add(1, Relaxed),
                Step::Leave => _ = (now.fetch_sub(1, Relaxed), were.fetch_add(1, Relaxed)),
                _ => {}
            }
            false
        },
        || {},
    );
    stage.vm().wake(stage, key);
    assert_eq!((depth.load(Relaxed), sections.load(Relaxed)), (0, 100), "woken once");
    assert!(file.finish_one());
    let Poll::Ready(ticket) = wait.as_mut().poll(&mut Context::from_waker(&waker)) else {
        return Err("not ready".into());
    };
    drop(ticket);
    assert_eq!(cache.size(), 4 * PAGE_SIZE);
    Ok(())
}
