//! Which model must catch which planted mistake, and what is missing.

use std::collections::{BTreeMap, BTreeSet};

use crate::Result;
use crate::rust_source::Source;

/// The mistakes in the sources, and the models that name them.
pub(super) struct Plan {
    planted: BTreeSet<String>,
    /// From the name of a test to the mistakes that it must catch; a test that names none is not here.
    declared: BTreeMap<String, BTreeSet<String>>,
    /// From the path of a model to the mistakes that it must catch.
    models: BTreeMap<String, BTreeSet<String>>,
    /// The mistakes that others than models catch.
    elsewhere: BTreeSet<String>,
    /// Whether only some of the models were asked for.
    filtered: bool,
    problems: Vec<String>,
}

impl Plan {
    /// Reads the plan from the library's sources; others catch the mistakes in `elsewhere`.
    pub(super) fn of(sources: &[Source], elsewhere: BTreeSet<String>) -> Self {
        let mut plan = Self {
            planted: sources.iter().flat_map(Source::mutants).collect(),
            declared: BTreeMap::new(),
            models: BTreeMap::new(),
            elsewhere,
            filtered: false,
            problems: Vec::new(),
        };
        for (source, test) in
            sources.iter().flat_map(|source| source.tests().into_iter().map(move |test| (source, test)))
        {
            let catches: BTreeSet<String> = test.comments.iter().flat_map(|line| names(line)).collect();
            if catches.is_empty() {
                continue;
            }
            for unknown in catches.difference(&plan.planted) {
                plan.problems
                    .push(format!("{}: {} names `{unknown}`, which is not planted", source.path, test.name));
            }
            if plan.declared.insert(test.name.clone(), catches).is_some() {
                plan.problems.push(format!("{}: two models are called {}", source.path, test.name));
            }
        }
        plan
    }

    /// Matches the plan with the models that the compiled program has, of which those that contain `filter` are kept.
    pub(super) fn keep_existing(&mut self, paths: &[String], filter: Option<&str>) -> Result {
        self.filtered = filter.is_some();
        let name = |path: &str| path.rsplit("::").next().unwrap_or(path).to_owned();
        for path in paths.iter().filter(|path| filter.is_none_or(|filter| path.contains(filter))) {
            let catches = self.declared.get(&name(path)).cloned().unwrap_or_default();
            if catches.is_empty() {
                self.problems
                    .push(format!("{path} names no mistake that it catches (`// catches: NAME` above it)"));
            }
            self.models.insert(path.clone(), catches.intersection(&self.planted).cloned().collect());
        }
        if self.models.is_empty() {
            return Err(
                "model: there is none (a test in the library whose path contains `model`, under cfg(loom))"
                    .into(),
            );
        }
        let existing: BTreeSet<String> = paths.iter().map(|path| name(path)).collect();
        for missing in self.declared.keys().filter(|name| !existing.contains(*name)) {
            self.problems
                .push(format!("{missing} says what it catches, but is no model of the compiled program"));
        }
        Ok(())
    }

    /// The paths of the models to run.
    pub(super) fn models(&self) -> Vec<String> {
        self.models.keys().cloned().collect()
    }

    /// What a model must catch.
    pub(super) fn catches(&self, model: &str) -> &BTreeSet<String> {
        static NOTHING: BTreeSet<String> = BTreeSet::new();
        self.models.get(model).unwrap_or(&NOTHING)
    }

    /// The planted mistakes that the models to run must catch, each with these models.
    pub(super) fn by_mutant(&self) -> BTreeMap<&str, Vec<String>> {
        let mut by_mutant: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (model, mutants) in &self.models {
            for mutant in mutants {
                by_mutant.entry(mutant).or_default().push(model.clone());
            }
        }
        by_mutant
    }

    /// What is wrong with the plan itself.
    pub(super) fn problems(&self) -> Vec<String> {
        let caught = self.by_mutant();
        let uncaught = self
            .planted
            .difference(&self.elsewhere)
            .filter(|mutant| !self.filtered && !caught.contains_key(mutant.as_str()));
        let uncaught =
            uncaught.map(|mutant| format!("`{mutant}` is planted, but no model says that it catches it"));
        self.problems.iter().cloned().chain(uncaught).collect()
    }
}

/// The names in a line `catches: NAME, NAME`.
fn names(comment: &str) -> Vec<String> {
    let Some(list) = comment.strip_prefix("catches:") else { return Vec::new() };
    list.split(',')
        .map(|name| name.trim().trim_matches('`').to_owned())
        .filter(|name| !name.is_empty())
        .collect()
}

/// Why a test failed: the first line of its first panic's message.
pub(crate) fn reason(stderr: &str) -> Option<String> {
    let mut lines =
        stderr.lines().skip_while(|line| !(line.starts_with("thread ") && line.contains("panicked at")));
    lines.next()?;
    let text = lines.find(|line| !line.trim().is_empty())?.trim();
    Some(text.chars().take(140).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = r#"
        fn f() -> bool { cfg!(mutant = "a") || cfg!(mutant = "b") || cfg!(mutant = "nobody") }
        #[cfg(all(test, loom))]
        mod models {
            // catches: a, b
            #[test]
            fn one() {}
            // Some remark.
            // catches: a
            #[test]
            fn one_rotated() {}
            #[test]
            fn names_nothing() {}
            // catches: mistyped
            #[test]
            fn two() {}
        }
    "#;

    fn plan(paths: &[&str], filter: Option<&str>) -> Plan {
        let mut plan =
            Plan::of(&[Source::parse("lib.rs", SAMPLE).expect("the sample is Rust")], BTreeSet::new());
        let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
        plan.keep_existing(&paths, filter).expect("there are models");
        plan
    }

    #[test]
    fn mistakes_go_to_the_models_that_name_them() {
        let plan = plan(&["models::one", "models::one_rotated", "models::two"], None);
        let expected = [
            ("a", vec!["models::one".to_owned(), "models::one_rotated".to_owned()]),
            ("b", vec!["models::one".to_owned()]),
        ];
        assert_eq!(plan.by_mutant().into_iter().collect::<Vec<_>>(), expected);
        let problems = plan.problems().join("\n");
        assert!(problems.contains("`nobody` is planted"), "{problems}");
        assert!(problems.contains("two names `mistyped`, which is not planted"), "{problems}");
        assert_eq!(plan.problems().len(), 2, "{problems}");
    }

    #[test]
    fn a_model_that_catches_nothing_and_one_that_is_missing_are_problems() {
        let plan = plan(&["models::names_nothing", "models::one", "models::two"], None);
        let problems = plan.problems().join("\n");
        assert!(problems.contains("models::names_nothing names no mistake"), "{problems}");
        assert!(problems.contains("one_rotated says what it catches, but is no model"), "{problems}");
    }

    #[test]
    fn a_filter_keeps_some_models_and_asks_for_no_others() {
        let plan = plan(&["models::one", "models::one_rotated", "models::two"], Some("one_r"));
        assert_eq!(plan.models(), ["models::one_rotated"]);
        assert!(!plan.problems().join("\n").contains("nobody"));
    }

    #[test]
    fn the_reason_is_the_first_panics_message() {
        let text = "running 1 test\n\nthread 'a' (1) panicked at src/x.rs:1:2:\nassertion failed: x\nnote: more\nthread 'b' panicked at y:\nsecond\n";
        assert_eq!(reason(text).as_deref(), Some("assertion failed: x"));
        assert_eq!(reason("killed"), None);
    }
}
