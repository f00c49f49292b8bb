//! Stub.
mod tree;
mod vma;
pub use tree::TreeNode;
pub use vma::{Backing, Vma, VmaFlags};
