//! Records a program: `cargo run --example record -- OUTPUT PROGRAM ARGS…`

use std::env;
use std::error::Error;

use pagefirst_record::{RecordOptions, record};

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = env::args_os().skip(1);
    let (Some(output), Some(program)) = (words.next(), words.next()) else {
        return Err("usage: record OUTPUT PROGRAM ARGS…".into());
    };
    let options = RecordOptions {
        program,
        arguments: words.collect(),
        output: output.into(),
        native_runs: 1,
        level: 19,
    };
    let summary = record(&options)?;
    println!("{summary:#?}");
    Ok(())
}
