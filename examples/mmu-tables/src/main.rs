//! `mmu-tables FORMAT FILE`: builds page tables with pagefirst as a kernel would, and writes them into FILE as a piece
//! of a guest's memory, with a list of accesses; prints what each access must come to, one a line:
//! kind, tab, what is tried, tab, what it must come to. `cargo xtask mmu` lets QEMU's MMUs try them.

mod guest;
mod platform;
mod probes;

use pagefirst::arch::{Aarch64, Sv39, Sv48};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [format, file] = args.as_slice() else { return Err("usage: mmu-tables FORMAT FILE".into()) };
    let (image, expected) = match format.as_str() {
        "sv39" => probes::build::<Sv39>()?,
        "sv48" => probes::build::<Sv48>()?,
        "aarch64" => probes::build::<Aarch64>()?,
        _ => return Err(format!("no format {format}: sv39, sv48, aarch64").into()),
    };
    std::fs::write(file, image)?;
    print!("{expected}");
    Ok(())
}
