//! Rules of the house that no compiler checks.

use std::path::{Path, PathBuf};

fn sources(dir: &Path) -> Vec<PathBuf> {
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

/// Lines of code in `module` (a path under src/, `x.rs` and `x/` alike) that mention any of `words`.
fn mentions(module: &str, words: &[&str]) -> Vec<String> {
    let prefix = root().join("src").join(module);
    let files = sources(&root().join("src"));
    let own = files.iter().filter(|path| path.starts_with(&prefix) || **path == prefix.with_extension("rs"));
    own.flat_map(|path| {
        let text = std::fs::read_to_string(path).unwrap();
        let lines = text.lines().enumerate();
        let found = lines
            .filter(|(_, line)| !line.trim_start().starts_with("//") && words.iter().any(|word| line.contains(word)));
        found.map(|(n, line)| format!("{}:{}: {}", path.display(), n + 1, line.trim())).collect::<Vec<_>>()
    })
    .collect()
}

#[test]
fn modules_use_only_what_they_may() {
    for (module, forbidden) in [
        ("rollout", &["crate::", "candle", "preceptor_actors"][..]),
        ("seed", &["crate::"]),
        ("bounded", &["crate::", "candle"]),
        ("template", &["crate::", "candle"]),
        ("vetted", &["crate::model", "crate::tokens", "crate::config", "preceptor_actors"]),
        ("ops", &["crate::model", "crate::algo", "crate::learn", "crate::rollout", "preceptor_actors"]),
        (
            "model",
            &["crate::learn", "crate::rollout", "crate::config", "crate::label", "preceptor_actors", "crate::tokens"],
        ),
        ("algo", &["crate::", "candle", "preceptor_actors"]),
        ("statistics", &["candle", "preceptor_actors", "crate::model", "crate::label", "crate::learn"]),
        ("config", &["candle", "preceptor_actors", "crate::run", "crate::model"]),
        ("remote", &["candle", "preceptor_actors", "crate::model", "crate::topology", "crate::run"]),
        (
            "label",
            &["crate::learn", "crate::topology", "crate::run", "crate::config", "crate::remote", "crate::reward"],
        ),
        ("reward", &["crate::learn", "crate::topology", "crate::run", "crate::config", "crate::label"]),
        ("data", &["crate::learn", "crate::topology", "crate::run", "crate::config", "crate::label", "candle"]),
        ("tokens", &["preceptor_actors", "crate::model", "crate::learn"]),
    ] {
        let found = mentions(module, forbidden);
        assert!(found.is_empty(), "{module} must not use any of {forbidden:?}:\n{}", found.join("\n"));
    }
}

#[test]
fn the_runtime_knows_no_language_model() {
    let manifest = std::fs::read_to_string(root().join("actors/Cargo.toml")).unwrap();
    for word in ["candle", "tokenizers", "preceptor =", "metrics"] {
        assert!(!manifest.contains(word), "actors/Cargo.toml mentions {word}");
    }
    let lines: usize = sources(&root().join("actors/src"))
        .iter()
        .map(|path| std::fs::read_to_string(path).unwrap().lines().count())
        .sum();
    assert!(lines < 3000, "the runtime has grown to {lines} lines");
}

#[test]
fn there_is_no_mod_rs_and_no_stub() {
    for path in sources(&root().join("src")).into_iter().chain(sources(&root().join("actors/src"))) {
        assert_ne!(path.file_name().unwrap(), "mod.rs", "{}", path.display());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//!"), "{} does not say what it is", path.display());
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
