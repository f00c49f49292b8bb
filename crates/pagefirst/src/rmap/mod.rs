//! From a page to every place where it is mapped.
//!
//! Who takes pages away, or write-protects them, walks the places where their owner's pages are, and visits the tables of
//! each by space and range (protocol 2). It holds no lock meanwhile: what it found stays, for it is counted, tables
//! included, and what it does there is harmless if something else is mapped there by now, for it looks at each entry's page.

mod anon;
mod clean;
mod file;
mod tree;

pub(crate) use anon::{Joined, Present, Root, Space};
pub(crate) use clean::Clean;
pub(crate) use file::{Mappings, Spot, help, insert, part, remove};
