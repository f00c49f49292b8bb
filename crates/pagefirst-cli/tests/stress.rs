//! `pagefirst stress`, as a user calls it. The mistakes that its tests name are planted in the library by
//! `cargo xtask plants`.

use std::collections::BTreeSet;
use std::process::{Command, Output};

fn stress(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pagefirst")).arg("stress").args(arguments).output().unwrap()
}

/// Runs it, and sees that it is content.
fn holds(arguments: &[&str]) -> String {
    let output = stress(arguments);
    let (said, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "\n{wrong}");
    assert!(said.contains(" 0 violations, nothing left over"), "{said}");
    assert!(said.contains(&format!("again: pagefirst stress --threads {}", arguments[1])), "{said}");
    said.into_owned()
}

// catches: evict_memory, fork_keeps_exclusive, cut_zeroes_nothing, split_loses_contents
#[test]
fn many_threads_on_two_cpus() {
    // Every operation is done, on a busy machine not within a few seconds; but for what is rare.
    let mut done = BTreeSet::new();
    let mut undone = Vec::new();
    for seed in 1..=6 {
        let said = holds(&["--threads", "16", "--for", "6s", "--seed", &seed.to_string()]);
        let counted = said.lines().skip_while(|line| !line.starts_with("load"));
        for line in counted.take_while(|line| !line.starts_with("operations")) {
            let (name, count) = line.split_at(24);
            if count.split_whitespace().next() != Some("0") {
                done.insert(name.trim().to_owned());
            } else if !matches!(name.trim(), "poison" | "poison of a file" | "be hunted") {
                undone.push(name.trim().to_owned());
            }
        }
        undone.retain(|name| !done.contains(name));
        // Where a mistake is to be found, it has all of them.
        if undone.is_empty() && std::env::var_os("PAGEFIRST_ALL_SEEDS").is_none() {
            break;
        }
    }
    assert!(done.len() > 30 && undone.is_empty(), "not done: {undone:?}; done: {done:?}");
}

#[test]
fn the_shortest_run_ends_with_a_look_at_everything() {
    let said = holds(&["--threads", "2", "--for", "1s"]);
    let end = said.lines().find(|line| line.contains(" 0 violations"));
    assert!(end.is_some_and(|line| !line.contains(" 0 quiet points")), "{said}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_host_without_memory_is_no_violation() {
    let program = env!("CARGO_BIN_EXE_pagefirst");
    let script = format!("ulimit -v 1000000; exec {program} stress --memory 8G");
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Cannot allocate memory") && !said.contains("violation"), "{said}");
}

#[test]
fn memory_is_short() {
    holds(&["--threads", "4", "--for", "3s", "--memory", "8M"]);
}

#[test]
fn the_hardware_is_harsh() {
    holds(&["--threads", "8", "--for", "3s", "--hardware", "harsh"]);
}

#[test]
fn bad_arguments_are_refused() {
    for (arguments, says) in [
        (["--threads", "0"], "0 is not in 1..=64"),
        (["--threads", "65"], "65 is not in 1..=64"),
        (["--for", "ten"], "is not a time"),
        (["--for", "0s"], "is not a time"),
        (["--memory", "1M"], "is not from 4M to 64G"),
        (["--seed", "x"], "invalid digit"),
        (["--hardware", "arm"], "possible values: x86, harsh"),
    ] {
        let output = stress(&arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
    }
}
