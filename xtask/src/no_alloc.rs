//! `cargo xtask no-alloc`: proof that the library links neither std nor alloc.
//!
//! - A tiny program without std that has a panic handler and no allocator links the library. Were alloc anywhere in it
//!   or below it, the compiler would ask for an allocator; were std, there would be two panic handlers.
//! - The same is tried with a copy of the library that does name alloc, and one that names std: both must be refused,
//!   or the proof proves nothing.
//! - The sources do not mention either crate outside what only tests and models compile. That finds what a feature or a
//!   target hides from the proof.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::metadata::{self, Metadata};
use crate::rust_source::{Source, rust_files};
use crate::{Result, cmd};

const LIBRARY: &str = "crates/pagefirst";
const PROBE: &str = "\
//! Links the library without std and without an allocator.
#![no_std]
extern crate pagefirst as _;
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
";

/// A line that must make the proof fail, and what the compiler then says.
const PLANTED: [(&str, &str); 2] = [
    ("extern crate alloc;", "no global memory allocator found"),
    ("extern crate std;", "duplicate lang item"),
];

/// Checks the sources, then links the library, then shows that a library that cheats is refused.
pub(crate) fn run() -> Result {
    check_sources()?;
    let metadata = metadata::for_target(&host()?)?;
    let folder = cmd::target_dir().join("no-alloc");
    for features in feature_sets(&metadata)? {
        let probe = write_probe(&folder, &cmd::root(), &features)?;
        let what = format!("linking the library without std and alloc (features: {features:?})");
        build(&probe, "build")?.into_stdout(&what)?;
        println!("links without std and without an allocator, features {features:?}");
    }
    for (line, expected) in PLANTED {
        let output = build(&write_probe(&folder, &plant(&folder, line)?, &[])?, "check")?;
        if output.success() || !output.stderr.contains(expected) {
            return Err(format!("a library with `{line}` was not refused as it should:\n{}", output.stderr));
        }
        println!("refuses a copy of the library with `{line}`");
    }
    let library = metadata.member("pagefirst")?;
    let linked: Vec<&str> =
        metadata.linked_into(library).iter().map(|package| package.name.as_str()).collect();
    println!(
        "linked into the library: {}",
        if linked.is_empty() { "core alone".into() } else { linked.join(", ") }
    );
    Ok(())
}

fn check_sources() -> Result {
    let root = cmd::root();
    let (mut mentions, mut skipped) = (Vec::new(), Vec::new());
    for path in rust_files(&root, &format!("{LIBRARY}/src"))? {
        let (found, gated) = Source::read(&root, &path)?.std_mentions();
        mentions.extend(found.into_iter().map(|mention| (path.clone(), mention)));
        skipped.extend(gated);
    }
    let is_skipped =
        |path: &Path| skipped.iter().any(|module: &PathBuf| path.with_extension("").starts_with(module));
    let mut text = String::new();
    for (path, mention) in mentions.iter().filter(|(path, _)| !is_skipped(path)) {
        let _ = write!(text, "\n  {}:{}: mentions `{}`", path.display(), mention.line, mention.what);
    }
    if text.is_empty() { Ok(()) } else { Err(format!("the library must do without std and alloc:{text}")) }
}

fn host() -> Result<String> {
    let text = cmd::capture(Command::new("rustc").arg("-vV"), None)?.into_stdout("`rustc -vV`")?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).ok_or_else(|| "`rustc -vV` names no host".into())
}

/// No features, the default ones if there are any, and all.
fn feature_sets(metadata: &Metadata) -> Result<Vec<Vec<String>>> {
    let all = metadata.member("pagefirst")?.features.clone();
    let mut sets = vec![Vec::new()];
    sets.extend(all.iter().filter(|name| *name == "default").map(|name| vec![name.clone()]));
    if !all.is_empty() {
        sets.push(all);
    }
    Ok(sets)
}

/// Writes the package of the program that links the library of the workspace at `root`.
fn write_probe(folder: &Path, root: &Path, features: &[String]) -> Result<PathBuf> {
    let probe = folder.join("probe");
    let manifest = format!(
        "[package]\nname = \"probe\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n\
         [lib]\npath = \"probe.rs\"\ncrate-type = [\"staticlib\"]\n\n\
         [dependencies]\npagefirst = {{ path = {:?}, default-features = false, features = {features:?} }}\n\n\
         [profile.release]\npanic = \"abort\"\n\n[workspace]\n",
        root.join(LIBRARY)
    );
    write(&probe.join("Cargo.toml"), &manifest)?;
    write(&probe.join("probe.rs"), PROBE)?;
    // The same versions of everything as in the workspace.
    copy(&cmd::root().join("Cargo.lock"), &probe.join("Cargo.lock"))?;
    Ok(probe)
}

fn build(probe: &Path, how: &str) -> Result<cmd::Output> {
    let mut command = cmd::cargo(&[how, "--release", "--quiet"]);
    command.current_dir(probe).env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    cmd::capture(command.env("CARGO_TARGET_DIR", probe.with_file_name("build")), None)
}

/// A workspace with a copy of the library alone, to which `line` is added.
fn plant(folder: &Path, line: &str) -> Result<PathBuf> {
    let (root, copied) = (cmd::root(), folder.join("planted"));
    if copied.exists() {
        fs::remove_dir_all(&copied).map_err(|e| format!("{}: {e}", copied.display()))?;
    }
    let manifest = fs::read_to_string(root.join("Cargo.toml")).map_err(|e| format!("Cargo.toml: {e}"))?;
    write(&copied.join("Cargo.toml"), &only_member(&manifest, LIBRARY)?)?;
    copy(&root.join(LIBRARY).join("Cargo.toml"), &copied.join(LIBRARY).join("Cargo.toml"))?;
    for file in rust_files(&root, LIBRARY)? {
        copy(&root.join(&file), &copied.join(&file))?;
    }
    let path = copied.join(LIBRARY).join("src/lib.rs");
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    write(&path, &format!("{text}\n/// Planted.\n{line}\n"))?;
    Ok(copied)
}

/// The text of a workspace's `Cargo.toml`, with `member` alone.
fn only_member(manifest: &str, member: &str) -> Result<String> {
    let mut manifest: toml::Table = manifest.parse().map_err(|e| format!("Cargo.toml: {e}"))?;
    let workspace = manifest.get_mut("workspace").and_then(toml::Value::as_table_mut);
    let workspace = workspace.ok_or("Cargo.toml: there is no [workspace]")?;
    for key in ["default-members", "exclude"] {
        workspace.remove(key);
    }
    workspace.insert("members".into(), vec![member].into());
    Ok(manifest.to_string())
}

fn write(path: &Path, text: &str) -> Result {
    make_parent(path)?;
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

fn copy(from: &Path, to: &Path) -> Result {
    make_parent(to)?;
    fs::copy(from, to).map(drop).map_err(|e| format!("{}: {e}", from.display()))
}

fn make_parent(path: &Path) -> Result {
    path.parent().map_or(Ok(()), fs::create_dir_all).map_err(|e| format!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workspace_is_cut_down_to_one_member() {
        let text = "[workspace]\nmembers = [\"a\", \"b\"]\ndefault-members = [\"a\"]\n[workspace.package]\nedition = \"2024\"\n";
        let cut: toml::Table =
            only_member(text, "b").expect("it is a workspace").parse().expect("it is TOML");
        let workspace = cut["workspace"].as_table().expect("it is kept");
        assert_eq!(workspace["members"], vec!["b"].into());
        assert_eq!(workspace["package"]["edition"].as_str(), Some("2024"));
        assert!(!workspace.contains_key("default-members"));
        assert!(only_member("[package]\n", "b").is_err());
    }
}
