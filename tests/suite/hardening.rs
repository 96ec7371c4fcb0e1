//! Replays all fuzzing seeds and past findings through the same functions, in the ordinary test build.

use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use crate::common::PATIENCE;

#[path = "../fuzz/entries.rs"]
mod entries;

use entries::{ALL, Entry};

fn corpus(target: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Runs a file and returns whether it was accepted. Waits as long as a busy machine may need, but not for ever.
fn run(entry: Entry, path: &Path) -> bool {
    let bytes = std::fs::read(path).unwrap();
    let (ends, ended) = sync_channel(1);
    std::thread::spawn(move || ends.send(entry(&bytes)));
    ended.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn all_fuzzing_inputs_are_handled_without_a_panic_or_hang() {
    let mut bytes = 0;
    for (target, entry) in ALL {
        let files = corpus(target);
        assert!(!files.is_empty(), "{target} has no corpus");
        for path in files {
            let size = path.metadata().unwrap().len();
            assert!(size < 4096, "{} has {size} bytes; minimise it", path.display());
            bytes += size;
            run(entry, &path);
        }
    }
    assert!(bytes < 200_000, "the corpora have {bytes} bytes together");
}

/// Seeds that are refused at once would not exercise the code behind the check.
#[test]
fn the_valid_seeds_are_accepted() {
    for (target, names) in [
        ("config", &["offline", "quickstart", "panel", "served", "models"][..]),
        ("rows", &["prompts", "hh", "pairs", "packed", "turns"]),
        ("gguf", &["llama", "spm", "gemma", "llama-bpe", "qwen2", "gpt-2"]),
        ("safetensors", &["two", "f16", "f64", "i64", "u8", "scalar"]),
        ("model_config", &["gemma3", "llama3", "mistral", "qwen2-window", "scorer", "bert"]),
        ("tokenizer", &["bpe", "spm", "bert", "word-level", "metaspace"]),
        ("template", &["chatml", "llama", "namespace", "macro", "json", "methods", "filters", "recursive"]),
        ("judge", &["chat", "completions", "space", "plain", "null", "usage"]),
    ] {
        let (_, entry) = ALL.into_iter().find(|(name, _)| *name == target).unwrap();
        let refused: Vec<&&str> = names
            .iter()
            .filter(|name| {
                let path = corpus(target).into_iter().find(|path| path.ends_with(name));
                !run(entry, &path.unwrap_or_else(|| panic!("there is no seed {target}/{name}")))
            })
            .collect();
        assert!(refused.is_empty(), "{target} refuses {refused:?}");
    }
}

#[test]
fn every_target_is_built_and_replayed() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz");
    let manifest = std::fs::read_to_string(dir.join("Cargo.toml")).unwrap();
    let targets: Vec<&str> = manifest.lines().filter_map(|line| line.strip_prefix("path = \"fuzz_targets/")).collect();
    assert_eq!(targets.len(), ALL.len());
    for (target, _) in ALL {
        assert!(targets.contains(&format!("{target}.rs\"").as_str()), "{target} is not in tests/fuzz/Cargo.toml");
        let text = std::fs::read_to_string(dir.join(format!("fuzz_targets/{target}.rs"))).unwrap();
        assert!(text.contains(&format!("entries::{target}(data)")), "{target} fuzzes something else");
    }
}
