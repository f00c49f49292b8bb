//! Tests of the reading of Rust source.

use super::*;

fn source(text: &str) -> Source {
    Source::parse("crates/x/src/lib.rs", text).expect("the sample is Rust")
}

#[test]
fn tests_are_found_in_modules_and_macros_but_not_in_strings() {
    let text = r##"
        fn c01_not_a_test() { let s = "#[test] fn c02_in_a_string() {}"; }
        mod tests {
            use super::*;
            // catches: one, two
            #[test]
            fn c03_plain() { #[test] fn c04_inner() {} }
            /* #[test] fn c05_in_a_comment() {} */
            proptest! {
                #![proptest_config(C)]
                /// Doc.
                #[test]
                fn r01_in_a_macro(x in 0..3) {}
            }
            #[cfg(unix)] #[test] #[should_panic(expected = "x")]
            fn x01_many_attributes() {}
            #[test_case(1)]
            fn c06_another_attribute() {}
        }
    "##;
    let tests = source(text).tests();
    let names: Vec<&str> = tests.iter().map(|test| test.name.as_str()).collect();
    let mut sorted = names.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, ["c03_plain", "c04_inner", "r01_in_a_macro", "x01_many_attributes"]);
    let plain = tests.iter().find(|test| test.name == "c03_plain").expect("found above");
    assert_eq!(plain.comments, ["catches: one, two"]);
}

#[test]
fn comments_end_at_the_first_line_that_is_none() {
    let lines = ["// far", "", "// near", "// nearest", "#[test]"];
    assert_eq!(comments_above(&lines, 5), ["near", "nearest"]);
    assert_eq!(comments_above(&["/// doc", "#[test]"], 2), Vec::<String>::new());
}

#[test]
fn a_mistake_that_is_named_where_no_test_sees_it_is_told() {
    let text = "// catches: a\n#[test]\nfn f() {}\n/// doc\n// catches: b\n#[test]\nfn g() {}\n";
    let stray = source(text).stray_catches();
    assert_eq!(stray, ["crates/x/src/lib.rs: `catches: b` stands above no test"]);
}

#[test]
fn examples_that_must_not_compile_are_named_by_their_functions() {
    let text = "/// Text fn none()\n/// ```\n/// fn runs() {}\n/// ```\n/// ```compile_fail,E0382\n/// fn c01_reserve_moves() {}\n/// ```\n/// fn after()\nfn f() {}\n";
    assert_eq!(source(text).compile_fail_examples(), ["c01_reserve_moves"]);
}

#[test]
fn mutants_are_found_in_both_forms() {
    let text = r#"
        // cfg!(mutant = "comment")
        fn f() -> bool { cfg!(mutant = "a") || cfg!(all(loom, mutant = "b")) }
        #[cfg(mutant = "c")] fn g() {}
        #[cfg(not(mutant = "d"))] fn h() { let s = "mutant = \"e\""; }
    "#;
    assert_eq!(source(text).mutants().into_iter().collect::<Vec<_>>(), ["a", "b", "c", "d"]);
}

fn mentions(text: &str) -> Vec<(String, usize)> {
    source(text).std_mentions().0.into_iter().map(|mention| (mention.what, mention.line)).collect()
}

#[test]
fn std_and_alloc_are_found() {
    let found = |what: &str, line| vec![(what.to_owned(), line)];
    assert_eq!(mentions("extern crate alloc;"), found("alloc", 1));
    assert_eq!(mentions("#![no_std]\nextern crate std as s;"), found("std", 2));
    assert_eq!(mentions("use std::vec::Vec;"), found("std", 1));
    assert_eq!(mentions("use ::alloc::vec::Vec;"), found("alloc", 1));
    assert_eq!(mentions("fn f() {\n let x = std::mem::size_of::<u8>();\n}"), found("std", 2));
    assert_eq!(mentions("use {core::fmt, std::io};"), found("std", 1));
    assert_eq!(mentions("#[cfg(feature = \"x\")] extern crate alloc;"), found("alloc", 1));
    assert_eq!(mentions("struct S {\n #[cfg(test)] a: u8,\n b: std::io::Error }"), found("std", 3));
    assert_eq!(mentions("#[cfg(not(test))] extern crate std;"), found("std", 1));
    assert_eq!(mentions("#[cfg(any(test, feature = \"x\"))] extern crate std;"), found("std", 1));
}

#[test]
fn what_only_tests_and_models_use_is_no_mention() {
    for text in [
        "#[cfg(test)] extern crate std;",
        "#[cfg(any(test, loom))] extern crate alloc;",
        "#[cfg(all(test, not(loom)))] mod tests { use std::vec::Vec; fn f() { std::process::exit(1) } }",
        "/// Like std::vec::Vec, see alloc::vec.\nfn f() { let s = \"std::x\"; }",
        "mod alloc { pub fn f() {} } fn g() { alloc::f(); self::alloc::f() }",
        "fn f(frame: Frame) { frame.alloc(); crate::frame::alloc::f(); fn alloc() {} }",
        "use crate::std::x;",
        "#[cfg(test)] fn f<A, B>(a: A) where A: C, B: D { std::process::exit(1) }",
    ] {
        assert_eq!(mentions(text), [], "{text}");
    }
}

#[test]
fn modules_declared_for_tests_are_skipped_with_their_files() {
    let source =
        Source::parse("crates/x/src/table/publish.rs", "#[cfg(all(test, loom))] mod models; mod real;");
    let (_, skipped) = source.expect("the sample is Rust").std_mentions();
    assert_eq!(skipped, [PathBuf::from("crates/x/src/table/publish/models")]);
}
