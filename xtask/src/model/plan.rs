//! Which model must catch which planted mistake, and what is missing.

use std::collections::{BTreeMap, BTreeSet};

use crate::Result;
use crate::rust_source::Source;

/// The mistakes that a model must catch.
#[derive(Clone, Default)]
pub(super) struct Catches {
    /// Those that its roles bring to light only side by side.
    pub(super) racing: BTreeSet<String>,
    /// Those that show as well when its roles are played one after another.
    pub(super) in_turn: BTreeSet<String>,
}

impl Catches {
    pub(super) fn all(&self) -> impl Iterator<Item = &String> {
        self.racing.iter().chain(&self.in_turn)
    }
    pub(super) fn contains(&self, mutant: &str) -> bool {
        self.racing.contains(mutant) || self.in_turn.contains(mutant)
    }
    fn of(comments: &[String]) -> Self {
        let of = |key: &str| comments.iter().flat_map(|line| names(line, key)).collect();
        Self { racing: of("catches:"), in_turn: of("catches in turn:") }
    }
}

/// The mistakes in the sources, and the models that name them.
pub(super) struct Plan {
    planted: BTreeSet<String>,
    /// From the name of a test to the mistakes that it must catch; a test that names none is not here.
    declared: BTreeMap<String, Catches>,
    /// From the path of a model that was asked for to the mistakes that it must catch.
    models: BTreeMap<String, Catches>,
    /// All models, by the name that the rotations of one have in common.
    rotations: BTreeMap<String, Vec<String>>,
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
            rotations: BTreeMap::new(),
            elsewhere,
            filtered: false,
            problems: sources.iter().flat_map(Source::stray_catches).collect(),
        };
        for (source, test) in
            sources.iter().flat_map(|source| source.tests().into_iter().map(move |test| (source, test)))
        {
            let catches = Catches::of(&test.comments);
            if catches.all().next().is_none() {
                continue;
            }
            for unknown in catches.all().filter(|name| !plan.planted.contains(*name)) {
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
        for path in paths {
            self.rotations.entry(family(path).to_owned()).or_default().push(path.clone());
        }
        for path in paths.iter().filter(|path| filter.is_none_or(|filter| path.contains(filter))) {
            let mut catches = self.declared.get(&name(path)).cloned().unwrap_or_default();
            if catches.racing.is_empty() {
                self.problems
                    .push(format!("{path} names no mistake that it catches (`// catches: NAME` above it)"));
            }
            catches.racing.retain(|mutant| self.planted.contains(mutant));
            catches.in_turn.retain(|mutant| self.planted.contains(mutant));
            self.models.insert(path.clone(), catches);
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
    pub(super) fn catches(&self, model: &str) -> &Catches {
        static NOTHING: Catches = Catches { racing: BTreeSet::new(), in_turn: BTreeSet::new() };
        self.models.get(model).unwrap_or(&NOTHING)
    }

    /// Whether a model names a mistake among those that show in turn.
    pub(super) fn is_known_in_turn(&self, mutant: &str) -> bool {
        self.declared.values().any(|catches| catches.in_turn.contains(mutant))
    }

    /// A model with all rotations of its roles, itself among them.
    pub(super) fn rotations(&self, model: &str) -> &[String] {
        self.rotations.get(family(model)).map_or(&[], Vec::as_slice)
    }

    /// The planted mistakes that the models to run must catch, each with these models.
    pub(super) fn by_mutant(&self) -> BTreeMap<&str, Vec<String>> {
        let mut by_mutant: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (model, catches) in &self.models {
            for mutant in catches.all() {
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

/// What the rotations of one model have in common.
fn family(path: &str) -> &str {
    match path.rsplit_once("_main_") {
        Some((family, number)) if number.bytes().all(|digit| digit.is_ascii_digit()) => family,
        _ => path,
    }
}

/// The names in a line `KEY NAME, NAME`.
fn names(comment: &str, key: &str) -> Vec<String> {
    let Some(list) = comment.strip_prefix(key) else { return Vec::new() };
    list.split(',')
        .map(|name| name.trim().trim_matches('`').to_owned())
        .filter(|name| !name.is_empty())
        .collect()
}

/// Where a test panicked first, and the first line of the message.
fn first_panic(stderr: &str) -> Option<(&str, &str)> {
    let mut lines =
        stderr.lines().skip_while(|line| !(line.starts_with("thread ") && line.contains("panicked at")));
    let (_, place) = lines.next()?.split_once("panicked at ")?;
    Some((place, lines.find(|line| !line.trim().is_empty())?.trim()))
}

/// Why a test failed: the first line of its first panic's message.
pub(crate) fn reason(stderr: &str) -> Option<String> {
    first_panic(stderr).map(|(_, text)| text.chars().take(140).collect())
}

/// Whether a test failed as a model means to: by one of its own checks, or because loom saw two accesses race or all threads
/// wait. The library's panics, loom's limits and its own errors say nothing of what the model is about.
pub(super) fn is_meant(stderr: &str) -> bool {
    first_panic(stderr).is_some_and(|(place, text)| {
        let is_models = place.starts_with("crates/pagefirst/src/") && place.contains("/model");
        is_models || ["Causality violation", "deadlock"].iter().any(|said| text.starts_with(said))
    })
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
            // catches in turn: b
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
            ("b", vec!["models::one".to_owned(), "models::one_rotated".to_owned()]),
        ];
        assert_eq!(plan.by_mutant().into_iter().collect::<Vec<_>>(), expected);
        assert!(plan.is_known_in_turn("b") && !plan.is_known_in_turn("a"));
        let rotated = plan.catches("models::one_rotated");
        assert!(
            rotated.racing.contains("a") && rotated.in_turn.contains("b") && !rotated.racing.contains("b")
        );
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

    #[test]
    fn a_model_dies_as_it_means_to_by_its_own_check_or_by_a_race_that_loom_saw() {
        let died =
            |place: &str, text: &str| is_meant(&format!("thread 'a' panicked at {place}:1:2:\n{text}\n"));
        assert!(died("crates/pagefirst/src/table/model/huge.rs", "a page is lost"));
        assert!(died("crates/pagefirst/src/sync/wait/model.rs", "a wake-up was lost"));
        let loom = "registry/loom-0.7.3/src/rt/location.rs";
        assert!(died(loom, "Causality violation: Concurrent write accesses"));
        assert!(!died(loom, "Model exceeded maximum number of branches."));
        assert!(!died(loom, "[loom internal bug]"));
        assert!(!died("crates/pagefirst/src/table/split.rs", "internal error: entered unreachable code"));
        assert!(!is_meant(""));
    }

    #[test]
    fn rotations_of_a_model_have_one_name() {
        let plan = plan(&["models::one", "m::r01_x_main_0", "m::r01_x_main_1"], None);
        assert_eq!(plan.rotations("m::r01_x_main_1"), ["m::r01_x_main_0", "m::r01_x_main_1"]);
        assert_eq!(plan.rotations("models::one"), ["models::one"]);
    }
}
