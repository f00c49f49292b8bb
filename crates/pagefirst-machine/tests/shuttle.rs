//! Random schedules of the whole stack with `shuttle`.
#![cfg(shuttle)]

#[path = "shuttle/run.rs"]
mod run;
#[path = "shuttle/scheduler.rs"]
mod scheduler;

use pagefirst::arch::Tiny;
use pagefirst::fault::{FaultError, Segv};
use pagefirst::policy::Policy;
use pagefirst::space::{AddressSpace, Map, Place};
use pagefirst::types::{PAGE_SIZE, Prot, VirtAddr};
use pagefirst_machine::{Config, Machine};
use run::explore;
use std::sync::Arc;

const RW: Prot = Prot::READ.union(Prot::WRITE);

#[test]
fn touch_against_unmap() {
    explore("touch_against_unmap", |dice| {
        let machine = Machine::<Tiny>::new(Config {
            memory: 128 * PAGE_SIZE,
            cpus: 2,
            checks: true,
            ..Config::default()
        });
        let policy = Policy { min_addr: VirtAddr(PAGE_SIZE), ..Policy::default() };
        let space = Arc::new(AddressSpace::new(machine, policy).expect("memory"));
        let at = VirtAddr(4 * PAGE_SIZE);
        space.map(Map { place: Place::Fixed(at), ..Map::anonymous(4 * PAGE_SIZE, RW) }).expect("room");
        let other = space.clone();
        let first = dice.below(4);
        let user = shuttle::thread::spawn(move || {
            let mut cpu = machine.vcpu();
            cpu.switch_to(&other);
            for i in 0..4 {
                let va = VirtAddr(at.0 + (first + i) % 4 * PAGE_SIZE);
                match cpu.store_u64(va, 7).map_err(|trap| trap.error) {
                    Ok(()) | Err(FaultError::Segv(Segv::NotMapped)) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        });
        space.unmap(at, 4 * PAGE_SIZE).expect("a range");
        user.join().expect("it ends");
        assert_eq!(machine.check_space(&space).present, 0);
        drop(space);
        machine.nothing_left().expect("nothing");
    });
}
