//! Project rules that the compiler does not check.

use std::path::{Path, PathBuf};

pub fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_runtime_does_not_depend_on_language_models() {
    let manifest = std::fs::read_to_string(root().join("actors/Cargo.toml")).unwrap();
    for word in ["candle", "tokenizers", "preceptor =", "metrics"] {
        assert!(!manifest.contains(word), "actors/Cargo.toml mentions {word}");
    }
    let lines: usize = sources(&root().join("actors/src"))
        .iter()
        .map(|path| std::fs::read_to_string(path).unwrap())
        .map(|text| text.lines().filter(|line| !line.trim_start().starts_with("//")).count())
        .sum();
    assert!(lines < 3000, "the runtime has grown to {lines} lines without comments");
}

#[test]
fn there_is_no_mod_rs_and_every_file_has_a_module_comment() {
    for path in sources(&root().join("src")).into_iter().chain(sources(&root().join("actors/src"))) {
        assert_ne!(path.file_name().unwrap(), "mod.rs", "{}", path.display());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//!"), "{} has no module comment", path.display());
    }
}

#[test]
fn every_configuration_is_valid() {
    for entry in std::fs::read_dir(root().join("configs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let config = preceptor::config::load(&path, &[]).unwrap_or_else(|errors| panic!("{errors}"));
            assert!(config.run.steps > 0);
        }
    }
}

/// Parses pairs of a file and the functions that `text` names after it, as in `` `a.rs`: `one`, `two`; `b.rs`: `three`
/// ``.
fn named_tests(text: &str) -> Vec<(String, Vec<String>)> {
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    for line in text.lines().filter(|line| line.starts_with("| ") && line.contains(".rs`: `")) {
        let cell = line.trim_end_matches([' ', '|']).rsplit(" | ").next().unwrap_or_default();
        for word in cell.split('`').skip(1).step_by(2) {
            match found.last_mut() {
                _ if word.ends_with(".rs") => found.push((word.to_owned(), Vec::new())),
                Some((_, names)) => names.push(word.to_owned()),
                None => panic!("{word} is named before any file: {line}"),
            }
        }
    }
    found
}

#[test]
fn every_guarantee_of_security_md_names_a_test_that_exists() {
    let text = std::fs::read_to_string(root().join("SECURITY.md")).unwrap();
    let named = named_tests(&text);
    assert!(named.len() >= 20, "only {} were found", named.len());
    for (file, names) in named {
        let code = std::fs::read_to_string(root().join(&file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(!names.is_empty(), "{file} is named without a test");
        for name in names {
            let place = code.find(&format!("fn {name}()")).unwrap_or_else(|| panic!("{file} has no test {name}"));
            let before = code[..place].rsplit("\n\n").next().unwrap_or_default();
            assert!(before.contains("#[test]"), "{name} in {file} is not a test");
        }
    }
    // Each row of the second part must name a test.
    let guarantees = text.split("## What it guarantees").nth(1).unwrap().lines();
    let rows = guarantees.filter(|line| line.starts_with("| ") && !line.starts_with("| guarantee"));
    for row in rows {
        assert!(row.contains(".rs`: `"), "no test is named: {row}");
    }
}

/// `cargo test` succeeds without a test if a filter matches none.
#[test]
fn test_filters_in_documents_match_a_test() {
    let suite = sources(&root().join("tests/suite"));
    let names: String = suite
        .iter()
        .flat_map(|path| {
            let text = std::fs::read_to_string(path).unwrap();
            let module = path.file_stem().unwrap().to_string_lossy().into_owned();
            let named = text.lines().filter_map(|line| line.strip_prefix("fn ")).map(str::to_owned).collect::<Vec<_>>();
            named.into_iter().map(move |name| format!("{module}::{name}\n"))
        })
        .collect();
    let documents =
        ["CONTRIBUTING.md", "ARCHITECTURE.md", "SECURITY.md", "docs", "grafana/METRICS.md", "tests/fixtures/README.md"];
    let mut checked = 0;
    for document in documents {
        let path = root().join(document);
        let files = match path.is_dir() {
            true => std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect(),
            false => vec![path],
        };
        for file in files.into_iter().filter(|file| file.extension().is_some_and(|extension| extension == "md")) {
            let text = std::fs::read_to_string(&file).unwrap();
            for command in text.split("--test suite").skip(1) {
                let words = command.split(['`', '\n', '#']).next().unwrap().split_whitespace();
                let Some(filter) = words.into_iter().find(|word| !word.starts_with('-')) else { continue };
                assert!(names.contains(filter), "{}: no test of the suite matches {filter:?}", file.display());
                checked += 1;
            }
        }
    }
    assert!(checked >= 6, "{checked}");
}

/// The fast tier, `cargo test` in a debug build, has a test of each file of the suite.
#[test]
fn a_debug_build_runs_a_test_of_each_file_of_the_suite() {
    // The tests of these files need hardware, a server or a download, or are one long test.
    let without = ["cuda", "optimum", "smollm2", "templates"];
    let slow = r#"#[cfg_attr(debug_assertions, ignore = "slow in a debug build; cargo test --release runs it")]"#;
    for path in sources(&root().join("tests/suite")) {
        let text = std::fs::read_to_string(&path).unwrap();
        let count = |wanted: &dyn Fn(&str) -> bool| text.lines().filter(|line| wanted(line)).count();
        let ignored = count(&|line| line.starts_with("#[cfg_attr(debug_assertions, ignore"));
        assert_eq!(ignored, count(&|line| line == slow), "another reason in {}", path.display());
        let tests = count(&|line| line == "#[test]");
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert!(tests == 0 || ignored < tests || without.contains(&name), "no test of {} is left", path.display());
    }
}
