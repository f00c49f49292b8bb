//! What `cargo metadata` says about the workspace.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Result, cmd};

/// A package, of ours or of others.
pub(crate) struct Package {
    /// What cargo calls it.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
    /// Its version.
    pub(crate) version: String,
    /// Its licence, as it states it.
    pub(crate) licence: Option<String>,
    /// Whether it is a member of the workspace.
    pub(crate) ours: bool,
    /// The crates that its `Cargo.toml` names, for whatever purpose, our own left out.
    pub(crate) dependencies: BTreeSet<String>,
    /// Its features.
    pub(crate) features: Vec<String>,
    /// The folders in which the first files of its library, programs, tests and build script lie.
    pub(crate) folders: BTreeSet<PathBuf>,
    is_macro: bool,
}

/// The workspace and everything that it is built from.
pub(crate) struct Metadata {
    /// All packages.
    pub(crate) packages: Vec<Package>,
    /// From a package's id to the ids of those that are linked into it.
    links: BTreeMap<String, Vec<String>>,
}

/// Reads every package in the lock file.
pub(crate) fn all() -> Result<Metadata> {
    read(&[])
}

/// Reads every package that is needed on `target`.
pub(crate) fn for_target(target: &str) -> Result<Metadata> {
    read(&["--filter-platform", target])
}

fn read(args: &[&str]) -> Result<Metadata> {
    let mut command = cmd::cargo(&["metadata", "--format-version", "1"]);
    let text = cmd::capture(command.args(args), None)?.into_stdout("`cargo metadata`")?;
    parse(&text)
}

fn parse(text: &str) -> Result<Metadata> {
    let value: Value = serde_json::from_str(text).map_err(|e| format!("`cargo metadata`: {e}"))?;
    let members: BTreeSet<String> = list(&value["workspace_members"]).map(string).collect();
    let packages = list(&value["packages"]).map(|package| {
        let is_foreign = |dependency: &&Value| dependency["path"].is_null();
        let folder = |target: &Value| Path::new(target["src_path"].as_str()?).parent().map(Path::to_path_buf);
        let kinds = list(&package["targets"]).flat_map(|target| list(&target["kind"]));
        Package {
            id: string(&package["id"]),
            name: string(&package["name"]),
            version: string(&package["version"]),
            licence: package["license"].as_str().map(str::to_owned),
            ours: members.contains(&string(&package["id"])),
            dependencies: list(&package["dependencies"])
                .filter(is_foreign)
                .map(|d| string(&d["name"]))
                .collect(),
            features: package["features"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, _)| name.clone())
                .collect(),
            folders: list(&package["targets"]).filter_map(folder).collect(),
            is_macro: kinds.into_iter().any(|kind| kind == "proc-macro"),
        }
    });
    let nodes = list(&value["resolve"]["nodes"]);
    Ok(Metadata {
        packages: packages.collect(),
        links: nodes.map(|node| (string(&node["id"]), linked(node))).collect(),
    })
}

fn linked(node: &Value) -> Vec<String> {
    let normal = |dependency: &&Value| list(&dependency["dep_kinds"]).any(|kind| kind["kind"].is_null());
    list(&node["deps"]).filter(normal).map(|dependency| string(&dependency["pkg"])).collect()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn string(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

impl Metadata {
    /// Our package of that name.
    pub(crate) fn member(&self, name: &str) -> Result<&Package> {
        let found = self.packages.iter().find(|package| package.ours && package.name == name);
        found.ok_or_else(|| format!("the workspace has no package `{name}`"))
    }

    /// What is linked into a package besides itself; macros run at build time and are left out.
    pub(crate) fn linked_into(&self, package: &Package) -> Vec<&Package> {
        let mut seen = BTreeSet::from([package.id.as_str()]);
        let mut open = vec![package.id.as_str()];
        let mut found = Vec::new();
        while let Some(id) = open.pop() {
            for next in self.links.get(id).into_iter().flatten() {
                let package = self.packages.iter().find(|package| package.id == *next && !package.is_macro);
                if let Some(package) = package
                    && seen.insert(next)
                {
                    found.push(package);
                    open.push(next);
                }
            }
        }
        found.sort_by_key(|package| &package.name);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = r#"{
        "workspace_members": ["a 1"],
        "packages": [
            {"id": "a 1", "name": "a", "version": "1", "license": "MIT", "features": {"x": []},
             "targets": [{"kind": ["lib"], "src_path": "/w/a/src/lib.rs"}],
             "dependencies": [{"name": "b", "path": null}, {"name": "own", "path": "/x"}, {"name": "t", "kind": "dev"}]},
            {"id": "b 1", "name": "b", "version": "1", "license": null, "features": {}, "targets": [{"kind": ["lib"]}],
             "dependencies": []},
            {"id": "m 1", "name": "m", "version": "1", "license": null, "features": {},
             "targets": [{"kind": ["proc-macro"]}], "dependencies": []},
            {"id": "t 1", "name": "t", "version": "1", "license": null, "features": {}, "targets": [{"kind": ["lib"]}],
             "dependencies": []}
        ],
        "resolve": {"nodes": [
            {"id": "a 1", "deps": [{"pkg": "b 1", "dep_kinds": [{"kind": null}]},
                                   {"pkg": "t 1", "dep_kinds": [{"kind": "dev"}]}]},
            {"id": "b 1", "deps": [{"pkg": "m 1", "dep_kinds": [{"kind": null}]}]}
        ]}
    }"#;

    #[test]
    fn packages_and_links_are_read() {
        let metadata = parse(SAMPLE).expect("the sample is valid");
        let a = metadata.member("a").expect("a is a member");
        assert_eq!(a.dependencies, BTreeSet::from(["b".to_owned(), "t".to_owned()]));
        assert_eq!(a.features, ["x"]);
        assert_eq!(a.folders, BTreeSet::from([PathBuf::from("/w/a/src")]));
        assert!(metadata.member("b").is_err());
        let names: Vec<&str> = metadata.linked_into(a).iter().map(|package| package.name.as_str()).collect();
        assert_eq!(names, ["b"], "neither the macro nor what only tests use");
    }
}
