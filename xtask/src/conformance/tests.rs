//! Tests of the conformance page.

use super::*;

fn item(number: &str, why: Option<Why>) -> Item {
    Item { number: number.into(), must: "Something | holds.".into(), why }
}

fn with(other: &str) -> Option<Why> {
    Some(Why::With { other: other.into(), because: "the same code".into() })
}

fn tests_of(numbers: &[&str]) -> Tests {
    let one = |number: &&str| {
        ((*number).to_owned(), BTreeSet::from([format!("crates/x/tests/a.rs::{number}_name")]))
    };
    numbers.iter().map(one).collect()
}

#[test]
fn numbers_are_read_from_names() {
    assert_eq!(number_of("c11_failed_file_fault").as_deref(), Some("c11"));
    assert_eq!(number_of("r02_x").as_deref(), Some("r02"));
    assert_eq!(number_of("x22_x").as_deref(), Some("x22"));
    for other in ["c1_x", "c111_x", "c11_", "c11", "d11_x", "copy_on_write", "c1a_x", "_c11_x"] {
        assert_eq!(number_of(other), None, "{other}");
    }
}

#[test]
fn an_item_needs_a_test_or_a_reason_but_not_a_stale_one() {
    let waits = || Some(Why::WaitsFor("fork".into()));
    let later = || Some(Why::Later("fork".into()));
    let tests = tests_of(&["c01"]);
    let complains = |number, why| problem(&item(number, why), &tests).is_some();
    assert!(!complains("c01", None) && !complains("c01", later()) && !complains("c02", waits()));
    assert!(!complains("c02", with("c01")));
    assert!(complains("c02", None) && complains("c02", later()) && complains("c01", waits()));
    assert!(complains("c02", with("c03")) && complains("c01", with("c01")));
}

#[test]
fn a_test_of_no_item_is_a_problem() {
    let problems = problems(&[item("c01", None)], &tests_of(&["c01", "c99"]));
    assert_eq!(problems, ["crates/x/tests/a.rs::c99_name: there is no item c99"]);
}

#[test]
fn the_page_has_a_row_for_each_item() {
    let items =
        [item("c01", None), item("c02", with("c01")), item("r01", Some(Why::WaitsFor("fork".into())))];
    let page = page(&items, &tests_of(&["c01"]));
    assert!(page.contains("| c01 | Something \\| holds. | `crates/x/tests/a.rs::c01_name` |"), "{page}");
    assert!(page.contains("| c02 | Something \\| holds. | With c01: the same code. |"), "{page}");
    assert!(page.contains("| r01 | Something \\| holds. | Waits for fork. |"), "{page}");
    assert!(
        page.contains("3 items: 1 with tests of their own, 1 shown with another, 1 waiting.\n"),
        "{page}"
    );
}

fn list(replace: &str, by: &str) -> String {
    let kinds = [('c', 70), ('r', 15), ('x', 22)];
    let numbers =
        kinds.iter().flat_map(|(letter, count)| (1..=*count).map(move |n| format!("{letter}{n:02}")));
    let text: String = numbers.map(|number| format!("[{number}]\nmust = \"M.\"\n")).collect();
    text.replacen(replace, by, 1)
}

#[test]
fn the_list_holds_every_item_once() {
    assert_eq!(items::parse(&list("", "")).expect("it is complete").len(), 107);
    for (replace, by, complaint) in [
        ("[c07]", "[c77]", "[c07] is missing"),
        ("[c07]", "[c71]\nmust = \"M.\"\n[c07]", "[c71] is no item"),
        ("[c01]\nmust = \"M.\"", "[c01]", "[c01] has no `must`"),
        ("must = \"M.\"", "must = \"\"", "must be one line"),
        ("must = \"M.\"", "must = \"M.\"\nwith = \"c02\"", "`with` and `because`"),
        ("must = \"M.\"", "must = \"M.\"\nwhy = \"x\"", "`why` is unknown"),
    ] {
        let problem = items::parse(&list(replace, by)).expect_err(complaint);
        assert!(problem.contains(complaint), "{problem}");
    }
}

#[test]
fn the_committed_list_can_be_read() {
    assert_eq!(read_items().expect("it is valid").len(), 107);
}
