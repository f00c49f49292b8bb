//! Replays inputs of the fuzz targets, with no fuzzer: without arguments all of `corpus/`, with a target's name and
//! files these, which it shows first.

use pagefirst_fuzz::{TARGETS, Target};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let Some(name) = args.next() else { return TARGETS.into_iter().try_for_each(corpus) };
    let target = TARGETS.into_iter().find(|target| target.name == name);
    let target = target.ok_or_else(|| format!("no target is called `{name}`"))?;
    for file in args {
        let bytes = std::fs::read(&file).map_err(|error| format!("{file}: {error}"))?;
        println!("{file}: {}", target.show(&bytes));
        target.run(&bytes);
    }
    Ok(())
}

/// Replays the inputs of a target.
fn corpus(target: &'static Target) -> Result<(), Box<dyn Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let entries = std::fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<PathBuf>>>()?;
    files.sort();
    let (start, mut all) = (Instant::now(), 0);
    for file in &files {
        let bytes = std::fs::read(file)?;
        all += bytes.len();
        let tried = std::panic::catch_unwind(|| target.run(&bytes));
        tried.map_err(|_| format!("see above: {}", file.display()))?;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{}: {} inputs of {all} bytes in {seconds:.1} s", target.name, files.len());
    match files.is_empty() {
        true => Err(format!("{} is empty", folder.display()).into()),
        false => Ok(()),
    }
}
