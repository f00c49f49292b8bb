//! Stub of the tree of VMAs.
use crate::platform::Platform;
/// C
pub struct TreeNode<P: Platform>(core::marker::PhantomData<P>);
