//! Reading Rust source as trees of tokens: tests, planted mistakes, and what is compiled only under `cfg(test)`.
//!
//! Tokens, not a syntax tree: tests inside macros (`proptest! { #[test] fn … }`) are seen too, and text in strings and
//! comments is never mistaken for code.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use proc_macro2::{Delimiter, Ident, TokenStream, TokenTree};

use crate::Result;

/// A Rust file and its tokens.
pub(crate) struct Source {
    /// Where it is, from the top folder of the workspace, with `/`.
    pub(crate) path: String,
    text: String,
    tokens: TokenStream,
}

/// A test function.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Test {
    /// Its name, without its module.
    pub(crate) name: String,
    /// The lines of ordinary comments directly above its first attribute or doc line, from top to bottom.
    pub(crate) comments: Vec<String>,
}

/// A mention of something the library must not use, with its line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mention {
    /// What is mentioned.
    pub(crate) what: String,
    /// In which line.
    pub(crate) line: usize,
}

impl Source {
    /// Reads a file whose place is `root` joined with `path`.
    pub(crate) fn read(root: &Path, path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(root.join(path)).map_err(|e| format!("{}: {e}", path.display()))?;
        Self::parse(&path.to_string_lossy(), &text)
    }

    /// Takes the text of a file apart.
    pub(crate) fn parse(path: &str, text: &str) -> Result<Self> {
        let tokens = TokenStream::from_str(text)
            .map_err(|e| format!("{path}:{}: not Rust: {e}", e.span().start().line))?;
        Ok(Self { path: path.to_owned(), text: text.to_owned(), tokens })
    }

    /// Every function with a `#[test]` attribute, those inside modules and macros included.
    pub(crate) fn tests(&self) -> Vec<Test> {
        let lines: Vec<&str> = self.text.lines().collect();
        let mut tests = Vec::new();
        each_level(&self.tokens, &mut |level| {
            for item in items(level) {
                if !item.attributes.iter().any(is_test) {
                    continue;
                }
                if let Some(name) = item.function() {
                    tests.push(Test { name: name.to_string(), comments: comments_above(&lines, item.line) });
                }
            }
        });
        tests
    }

    /// Lines that name planted mistakes, and belong to no test: what is wrong with each.
    pub(crate) fn stray_catches(&self) -> Vec<String> {
        let is_one = |line: &str| line.starts_with("catches: ") || line.starts_with("catches in turn: ");
        let mut named: Vec<String> = self.tests().into_iter().flat_map(|test| test.comments).collect();
        let mut stray = Vec::new();
        for line in self.text.lines().filter_map(|line| line.trim_start().strip_prefix("// ")) {
            match named.iter().position(|named| named == line) {
                Some(at) => drop(named.swap_remove(at)),
                None if is_one(line) => stray.push(format!("{}: `{line}` stands above no test", self.path)),
                None => {}
            }
        }
        stray
    }

    /// The functions that stand in ```` ```compile_fail ```` examples of the documentation.
    pub(crate) fn compile_fail_examples(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut inside = None;
        for line in self.text.lines() {
            let Some(doc) =
                line.trim_start().strip_prefix("///").or_else(|| line.trim_start().strip_prefix("//!"))
            else {
                inside = None;
                continue;
            };
            match (doc.trim().strip_prefix("```"), inside) {
                (Some(info), None) => inside = Some(info.contains("compile_fail")),
                (Some(_), Some(_)) => inside = None,
                (None, Some(true)) => {
                    if let Some((_, rest)) = doc.split_once("fn ") {
                        names.push(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
                    }
                }
                (None, _) => {}
            }
        }
        names
    }

    /// The names of mistakes planted with `cfg!(mutant = "NAME")` or `#[cfg(mutant = "NAME")]`.
    pub(crate) fn mutants(&self) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        each_level(&self.tokens, &mut |level| {
            for window in level.windows(3) {
                if let [TokenTree::Ident(key), TokenTree::Punct(equals), TokenTree::Literal(value)] = window
                    && key == "mutant"
                    && equals.as_char() == '='
                {
                    names.insert(value.to_string().trim_matches('"').to_owned());
                }
            }
        });
        names
    }

    /// Every word of the code, keywords included.
    pub(crate) fn words(&self) -> BTreeSet<String> {
        let mut words = BTreeSet::new();
        each_level(&self.tokens, &mut |level| {
            words.extend(level.iter().filter_map(|token| match token {
                TokenTree::Ident(word) => Some(word.to_string()),
                _ => None,
            }));
        });
        words
    }

    /// Mentions of `std` and `alloc` as crates in code that is compiled without `test`, `loom` and `shuttle`; also the files
    /// (without `.rs`) of modules that are declared only under these.
    pub(crate) fn std_mentions(&self) -> (Vec<Mention>, Vec<PathBuf>) {
        let mut found = Found { mentions: Vec::new(), skipped: Vec::new(), own_alloc: false };
        each_level(&self.tokens, &mut |level| {
            found.own_alloc |=
                items(level).iter().any(|item| item.module().is_some_and(|name| name == "alloc"));
        });
        find_std(&self.tokens, &module_folder(Path::new(&self.path)), &mut found);
        (found.mentions, found.skipped)
    }
}

/// All Rust files under `root` joined with `folder`, in order, paths from `root`.
pub(crate) fn rust_files(root: &Path, folder: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        let entries =
            std::fs::read_dir(root.join(&folder)).map_err(|e| format!("{}: {e}", folder.display()))?;
        for entry in entries {
            let entry = entry.map_err(|e| format!("{}: {e}", folder.display()))?;
            let (name, path) = (entry.file_name(), folder.join(entry.file_name()));
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_folder && name != "target" && !name.to_string_lossy().starts_with('.') {
                folders.push(path);
            } else if !is_folder && path.extension().is_some_and(|ext| ext == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Attributes, and the tokens that follow them up to the end of the item.
struct Item {
    attributes: Vec<TokenStream>,
    line: usize,
    body: Vec<TokenTree>,
}

impl Item {
    /// Whether this is an item with a keyword, in which a comma ends nothing (`fn f<A, B>() {}`), and not a field, a
    /// variant or an arm.
    fn is_named(&self) -> bool {
        const KEYWORDS: [&str; 11] =
            ["fn", "impl", "struct", "enum", "union", "trait", "type", "static", "const", "let", "mod"];
        self.body
            .iter()
            .any(|token| matches!(token, TokenTree::Ident(word) if KEYWORDS.iter().any(|k| word == k)))
    }

    fn name_after(&self, keyword: &str) -> Option<&Ident> {
        self.body.windows(2).find_map(|window| match window {
            [TokenTree::Ident(word), TokenTree::Ident(name)] if word == keyword => Some(name),
            _ => None,
        })
    }

    fn function(&self) -> Option<&Ident> {
        self.name_after("fn")
    }

    fn module(&self) -> Option<&Ident> {
        self.name_after("mod")
    }

    /// A module whose text is in another file.
    fn outside_module(&self) -> Option<&Ident> {
        let ends = matches!(self.body.last(), Some(TokenTree::Punct(p)) if p.as_char() == ';');
        if ends { self.module() } else { None }
    }
}

/// Cuts one level of tokens into items. Each ends with `;` or a block in braces, a field or variant with a comma too.
/// Attributes belong to what follows.
fn items(level: &[TokenTree]) -> Vec<Item> {
    let new = || Item { attributes: Vec::new(), line: 0, body: Vec::new() };
    let (mut items, mut item) = (Vec::new(), new());
    let mut at = 0;
    while at < level.len() {
        let token = &level[at];
        if item.attributes.is_empty() && item.body.is_empty() {
            item.line = token.span().start().line;
        }
        at += 1;
        if matches!(token, TokenTree::Punct(hash) if hash.as_char() == '#') {
            let inner = matches!(level.get(at), Some(TokenTree::Punct(bang)) if bang.as_char() == '!');
            if let Some(TokenTree::Group(group)) = level.get(at + usize::from(inner)) {
                at += 1 + usize::from(inner);
                if !inner {
                    item.attributes.push(group.stream());
                }
                continue;
            }
        }
        item.body.push(token.clone());
        let ends = match token {
            TokenTree::Punct(punct) if punct.as_char() == ',' => !item.is_named(),
            TokenTree::Punct(punct) => punct.as_char() == ';',
            TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
            _ => false,
        };
        if ends {
            items.push(std::mem::replace(&mut item, new()));
        }
    }
    items.push(item);
    items
}

fn each_level(tokens: &TokenStream, visit: &mut impl FnMut(&[TokenTree])) {
    let level: Vec<TokenTree> = tokens.clone().into_iter().collect();
    visit(&level);
    for token in &level {
        if let TokenTree::Group(group) = token {
            each_level(&group.stream(), visit);
        }
    }
}

fn is_test(attribute: &TokenStream) -> bool {
    let mut tokens = attribute.clone().into_iter();
    matches!((tokens.next(), tokens.next()), (Some(TokenTree::Ident(name)), None) if name == "test")
}

/// Whether an attribute keeps what follows out of the library that others link.
fn is_gated(attribute: &TokenStream) -> bool {
    let tokens: Vec<TokenTree> = attribute.clone().into_iter().collect();
    match tokens.as_slice() {
        [TokenTree::Ident(name), TokenTree::Group(condition)] => {
            name == "cfg" && needs_test(condition.stream())
        }
        _ => false,
    }
}

/// Whether a condition can only hold under `test`, `loom` or `shuttle`: `any` needs all its parts to say so, `not` never does.
fn needs_test(condition: TokenStream) -> bool {
    let tokens: Vec<TokenTree> = condition.into_iter().collect();
    let mut parts = tokens.split(|token| matches!(token, TokenTree::Punct(p) if p.as_char() == ','));
    parts.any(|part| match part {
        [TokenTree::Ident(name)] => name == "test" || name == "loom" || name == "shuttle",
        [TokenTree::Ident(name), TokenTree::Group(inner)] if name == "all" => needs_test(inner.stream()),
        [TokenTree::Ident(name), TokenTree::Group(inner)] if name == "any" => {
            let tokens: Vec<TokenTree> = inner.stream().into_iter().collect();
            let mut parts = tokens
                .split(|token| matches!(token, TokenTree::Punct(p) if p.as_char() == ','))
                .filter(|part| !part.is_empty());
            parts.all(|part| needs_test(part.iter().cloned().collect()))
        }
        _ => false,
    })
}

struct Found {
    mentions: Vec<Mention>,
    skipped: Vec<PathBuf>,
    own_alloc: bool,
}

fn find_std(tokens: &TokenStream, folder: &Path, found: &mut Found) {
    let level: Vec<TokenTree> = tokens.clone().into_iter().collect();
    for item in items(&level) {
        if item.attributes.iter().any(is_gated) {
            if let Some(name) = item.outside_module() {
                found.skipped.push(folder.join(name.to_string()));
            }
            continue;
        }
        look_at(&item.body, found);
        let inner = item.module().map_or_else(|| folder.to_path_buf(), |name| folder.join(name.to_string()));
        for token in &item.body {
            if let TokenTree::Group(group) = token {
                find_std(&group.stream(), &inner, found);
            }
        }
    }
}

fn look_at(body: &[TokenTree], found: &mut Found) {
    let is = |at: Option<usize>, text: &str| {
        at.and_then(|at| body.get(at)).is_some_and(|token| token.to_string() == text)
    };
    for (at, token) in body.iter().enumerate() {
        let TokenTree::Ident(name) = token else { continue };
        if name != "std" && name != "alloc" {
            continue;
        }
        let back = |n: usize| at.checked_sub(n);
        let declared = is(back(1), "crate") && is(back(2), "extern");
        let leads_a_path = is(Some(at + 1), ":") && is(Some(at + 2), ":");
        let inside_a_path = is(back(1), ":") && is(back(2), ":");
        // `::std` at the start of a path: what is before it is apart from it (`use ::std`), or no part of a path.
        let goes_on = |before: &TokenTree, colon: &TokenTree| {
            let of_a_path = matches!(before, TokenTree::Ident(_)) || before.to_string() == ">";
            of_a_path && before.span().end() == colon.span().start()
        };
        let absolute = inside_a_path && !back(3).is_some_and(|at| goes_on(&body[at], &body[at + 1]));
        let used = is(back(1), "use") && !leads_a_path;
        let ours = name == "alloc" && found.own_alloc && !absolute;
        if declared || (!ours && (used || leads_a_path) && (!inside_a_path || absolute)) {
            found.mentions.push(Mention { what: name.to_string(), line: name.span().start().line });
        }
    }
}

/// The folder in which the modules that a file declares have their files.
fn module_folder(file: &Path) -> PathBuf {
    let folder = file.parent().unwrap_or(Path::new(""));
    match file.file_stem() {
        Some(stem) if stem != "lib" && stem != "main" && stem != "mod" => folder.join(stem),
        _ => folder.to_path_buf(),
    }
}

/// The ordinary comments that stand directly above a line, counted from 1.
fn comments_above(lines: &[&str], line: usize) -> Vec<String> {
    let above = &lines[..line.saturating_sub(1).min(lines.len())];
    let comment = |line: &&str| {
        let text = line.trim_start().strip_prefix("//")?;
        (!text.starts_with(['/', '!'])).then(|| text.trim().to_owned())
    };
    let mut comments: Vec<String> = above.iter().rev().map_while(comment).collect();
    comments.reverse();
    comments
}

#[cfg(test)]
mod tests;
