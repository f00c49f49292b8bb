//! Stub.
use crate::platform::Platform;
/// F
pub trait File: Clone + Eq + Send + Sync + 'static {}
/// C
pub struct FileCache<P: Platform>(core::marker::PhantomData<P>);
/// N
pub struct CacheNode<P: Platform>(core::marker::PhantomData<P>);
