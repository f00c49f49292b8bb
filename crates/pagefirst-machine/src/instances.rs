//! The library for this machine, compiled once: with the feature `__instances`, for those who run all tests.
//!
//! Generic code is compiled by the crate that names its types: each of the test programs of this crate compiles all of the
//! library anew, which takes it ten seconds. With little optimization the compiler takes what a crate below has
//! (`-Z share-generics`, on by default up to `opt-level = 1`). So what they call is named here, for every format.

use crate::{Machine, Vcpu};
use pagefirst::Vm;
use pagefirst::arch::{Aarch64, Ept, Format, Sv39, Sv48, X86_64, X86_64La57};
use pagefirst::file::FileCache;
use pagefirst::limit::Limit;
use pagefirst::space::AddressSpace;
use std::hint::black_box;

type M<F> = Machine<F>;
type Space<F> = AddressSpace<M<F>>;
type Cache<F> = FileCache<M<F>>;

/// Not to be called: what it refers to is compiled.
pub fn instances() {
    of::<X86_64>();
    of::<X86_64La57>();
    of::<Ept>();
    of::<Sv39>();
    of::<Sv48>();
    of::<Aarch64>();
}

fn of<F: Format>() {
    macro_rules! compile {
        ($($function:expr => $($argument:ident)*;)+) => {
            $(black_box($function as fn($(compile!(@ $argument)),*) -> _);)+
        };
        (@ $any:ident) => { _ };
    }
    compile! {
        M::<F>::new => a;
        M::<F>::counts => a;
        M::<F>::nothing_left => a;
        M::<F>::check_space => a b;
        M::<F>::compare => a b;
        M::<F>::leave_free => a b;
        M::<F>::vcpu => a;
        Vcpu::<F>::switch_to => a b;
        Vcpu::<F>::leave => a;
        Vcpu::<F>::touch => a b c;
        Vcpu::<F>::load => a b c;
        Vcpu::<F>::store => a b c;
        Vcpu::<F>::load_u64 => a b;
        Vcpu::<F>::store_u64 => a b c;
        Space::<F>::new => a b;
        Space::<F>::map => a b;
        Space::<F>::unmap => a b c;
        Space::<F>::protect => a b c d;
        Space::<F>::discard => a b c;
        Space::<F>::remap => a b c d e;
        Space::<F>::advise => a b c d;
        Space::<F>::brk => a b;
        Space::<F>::fork => a;
        Space::<F>::fault => a b c;
        Space::<F>::retry => a b c d;
        Space::<F>::pin => a b c;
        Space::<F>::copy_in => a b c;
        Space::<F>::copy_out => a b c;
        Space::<F>::compare_exchange_u32 => a b c d;
        Space::<F>::compare_exchange_u64 => a b c d;
        Space::<F>::lose_poisoned => a;
        Space::<F>::account => a;
        Space::<F>::tables => a;
        Space::<F>::set_limit => a b;
        Cache::<F>::new => a b c;
        Cache::<F>::read_at => a b c d;
        Cache::<F>::write_at => a b c d;
        Cache::<F>::set_size => a b c;
        Cache::<F>::punch => a b c;
        Cache::<F>::evict => a b;
        Cache::<F>::write_back => a b;
        Cache::<F>::sync => a b c;
        Cache::<F>::will_need => a b c d;
        Cache::<F>::clean => a b;
        Limit::<M<F>>::new => a b c;
        Limit::<M<F>>::set_max => a b;
        Vm::<M<F>>::poison => a b c;
        Vm::<M<F>>::quiesce => a b;
        Vm::<M<F>>::held => a b;
        drop::<Space<F>> => a;
        drop::<pagefirst::mem::Shared<M<F>, Cache<F>>> => a;
        drop::<Vcpu<F>> => a;
    }
}
