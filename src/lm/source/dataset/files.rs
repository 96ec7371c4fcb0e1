//! Which files a path stands for, and which of a data set's files belong to a split.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use glob::{MatchOptions, Pattern};

use super::Choice;

/// Endings of the names of data files, each also with that of a compression.
const DATA: [&str; 6] = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"];
const PACKED: [&str; 3] = ["", ".gz", ".zst"];
/// Files of these names describe a data set, and are not part of it.
const DESCRIPTIONS: [&str; 4] = ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];
/// Words for splits, as names of files have them: the first word of each list is the split's name.
const SPLITS: [&[&str]; 3] =
    [&["train", "training"], &["test", "testing", "eval", "evaluation"], &["validation", "valid", "val", "dev"]];
/// Most names of files that an error lists.
const LISTED: usize = 20;

/// The files that `path` stands for: the file itself, all data files of a folder and the folders in it, or those that match
/// the glob pattern, in the order of their names.
///
/// # Errors
/// A path at which there is no data file; a folder that holds files of several splits.
pub fn expand(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    if path.is_dir() {
        return folder(path);
    }
    // Pipes and devices are read from once, and rows many times.
    ensure!(!path.exists(), "{} is neither a file nor a folder", path.display());
    let pattern = path.to_string_lossy();
    ensure!(pattern.contains(['*', '?', '[']), "there is no file or folder {}", path.display());
    let options = MatchOptions { require_literal_leading_dot: true, ..MatchOptions::default() };
    let found = glob::glob_with(&pattern, options).with_context(|| format!("{pattern} is not a glob pattern"))?;
    let mut files = Vec::new();
    for path in found {
        let path = path.context("a folder cannot be read")?;
        if path.is_file() {
            files.push(path);
        }
    }
    ensure!(!files.is_empty(), "no file matches {pattern}");
    files.sort();
    Ok(files)
}

/// The data files of a folder.
fn folder(path: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    walk(path, &mut found).with_context(|| format!("cannot read the folder {}", path.display()))?;
    found.sort();
    let names: Vec<String> =
        found.iter().map(|file| file.strip_prefix(path).unwrap_or(file).to_string_lossy().replace('\\', "/")).collect();
    if !names.iter().any(|name| is_data(name)) {
        let arrow = names.iter().any(|name| name.ends_with(".arrow"));
        let hint = if arrow {
            "; its Arrow files are what Dataset.save_to_disk of datasets writes: write parquet with Dataset.to_parquet"
        } else {
            ""
        };
        bail!("the folder {} holds no data file ({}){hint}", path.display(), DATA.join(", "));
    }
    let data: Vec<&str> = names.iter().map(String::as_str).filter(|name| is_data(name)).collect();
    let splits = splits_of(&data);
    if let [first, second, ..] = splits.as_slice() {
        bail!(
            "the folder {} holds files of several splits, {first} and {second} among them; name those that are meant by a pattern, such as {}",
            path.display(),
            path.join(format!("**/*{first}*")).display()
        );
    }
    let ignored: Vec<&str> = names.iter().map(String::as_str).filter(|name| !is_data(name)).take(LISTED).collect();
    if !ignored.is_empty() {
        tracing::info!("{}: not read, since they are not data files: {}", path.display(), ignored.join(", "));
    }
    Ok(data.into_iter().map(|name| path.join(name)).collect())
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(['.', '_']));
        if hidden {
            continue;
        }
        if path.is_dir() {
            walk(&path, found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

fn is_data(name: &str) -> bool {
    let own = name.rsplit('/').next().unwrap_or(name).to_lowercase();
    let own = own.as_str();
    let ends = DATA.iter().any(|ending| PACKED.iter().any(|packed| own.ends_with(&format!("{ending}{packed}"))));
    ends && !DESCRIPTIONS.contains(&own)
}

/// Whether a word of the file's path, between anything but letters, is one of `words`.
fn has_word(name: &str, words: &[&str]) -> bool {
    name.to_ascii_lowercase().split(|c: char| !c.is_ascii_alphabetic()).any(|word| words.contains(&word))
}

/// The splits that names of files have words for.
fn splits_of(names: &[&str]) -> Vec<&'static str> {
    let there = |words: &&[&str]| names.iter().any(|name| has_word(name, words));
    SPLITS.iter().filter(|words| there(words)).map(|words| words[0]).collect()
}

/// The files among `names` (paths within a data set) that are meant. As in `datasets`, a split is a word in the path, and all
/// files are the split `train` where no path has such a word.
///
/// # Errors
/// No such file; files of several configurations.
pub(in crate::lm::source) fn of_split(names: &[String], choice: &Choice<'_>) -> Result<Vec<String>> {
    let listed = |names: &[&str]| names.iter().take(LISTED).copied().collect::<Vec<_>>().join(", ");
    let mut data: Vec<&str> = names.iter().map(String::as_str).filter(|name| is_data(name)).collect();
    data.sort_unstable();
    let owned = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect();
    if let Some(file) = choice.file {
        let pattern = Pattern::new(file).with_context(|| format!("file = {file:?} is not a glob pattern"))?;
        let meant: Vec<&str> =
            names.iter().map(String::as_str).filter(|name| *name == file || pattern.matches(name)).collect();
        ensure!(!meant.is_empty(), "no file of it matches {file:?}; its data files: {}", listed(&data));
        return Ok(owned(meant));
    }
    ensure!(!data.is_empty(), "it has no data file ({}); name one by file, if it has any", DATA.join(", "));
    if let Some(name) = choice.name {
        let all = listed(&data);
        data.retain(|file| file.split('/').rev().skip(1).any(|folder| folder == name));
        ensure!(!data.is_empty(), "no folder {name:?} holds data files of it; its data files: {all}");
    }
    let split = choice.split.unwrap_or("train");
    let words: Vec<&str> =
        SPLITS.iter().find(|words| words.contains(&split)).map_or(vec![split], |words| words.to_vec());
    let mut meant: Vec<&str> =
        data.iter().copied().filter(|name| has_word(name, &words) || in_name(name, split)).collect();
    if meant.is_empty() && split == "train" && splits_of(&data).is_empty() {
        meant = data.clone();
    }
    ensure!(!meant.is_empty(), "it has no file of the split {split:?}; its data files: {}", listed(&data));
    let folder = |name: &&str| name.rsplit_once('/').map_or("", |(folder, _)| folder).to_owned();
    let mut folders: Vec<String> = meant.iter().map(folder).collect();
    folders.dedup();
    ensure!(
        folders.len() < 2,
        "it has files of the split {split:?} in several folders, which are its configurations: {}; choose one by name = \"…\"",
        folders.join(", ")
    );
    Ok(owned(meant))
}

/// Whether the name of the file has the split's name, which may have signs and digits of its own (`train_sft`).
fn in_name(name: &str, split: &str) -> bool {
    let own = name.rsplit('/').next().unwrap_or(name);
    let edge = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric());
    own.match_indices(split)
        .any(|(at, _)| edge(own[..at].chars().next_back()) && edge(own[at + split.len()..].chars().next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_stands_for_its_data_files_of_one_split() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        };
        let found = || -> Result<Vec<String>> {
            let files = expand(dir.path())?;
            Ok(files.iter().map(|file| file.strip_prefix(dir.path()).unwrap().display().to_string()).collect())
        };
        assert!(found().unwrap_err().to_string().contains("holds no data file"));
        write("data-00000.arrow");
        assert!(found().unwrap_err().to_string().contains("Dataset.to_parquet"));
        for name in [
            "b/train-1.parquet",
            "a.jsonl",
            "c.csv.gz",
            "README.md",
            "dataset_info.json",
            ".git/x.jsonl",
            "_old/y.json",
        ] {
            write(name);
        }
        assert_eq!(found().unwrap(), ["a.jsonl", "b/train-1.parquet", "c.csv.gz"]);
        write("b/test-1.parquet");
        let error = found().unwrap_err().to_string();
        assert!(error.contains("several splits, train and test"), "{error}");
        let matched = expand(&dir.path().join("**/*train*")).unwrap();
        assert_eq!(matched, [dir.path().join("b/train-1.parquet")]);
        for (path, words) in
            [("none", "there is no file or folder"), ("*.none", "no file matches"), ("a[", "not a glob pattern")]
        {
            let error = format!("{:#}", expand(&dir.path().join(path)).unwrap_err());
            assert!(error.contains(words), "{path}: {error}");
        }
    }

    fn choose(names: &[&str], choice: Choice<'_>) -> Result<Vec<String>> {
        of_split(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), &choice)
    }

    #[test]
    fn files_of_a_split_are_found_by_their_names() {
        let split = |split| Choice { split: Some(split), ..Choice::default() };
        let plain = [
            "README.md",
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
            "dataset_infos.json",
        ];
        assert_eq!(choose(&plain, Choice::default()).unwrap(), plain[1..3]);
        assert_eq!(choose(&plain, split("test")).unwrap(), plain[3..4]);
        assert_eq!(choose(&plain, Choice { file: Some("data/test*"), ..Choice::default() }).unwrap(), plain[3..4]);
        let named = ["data/train_sft-0.parquet", "data/train_prefs-0.parquet", "data/test_prefs-0.parquet"];
        assert_eq!(choose(&named, split("train_prefs")).unwrap(), named[1..2]);
        assert_eq!(choose(&["all.jsonl", "more.jsonl"], Choice::default()).unwrap(), ["all.jsonl", "more.jsonl"]);
        let subsets = ["a/train.jsonl", "b/train.jsonl", "b/dev.jsonl"];
        assert_eq!(choose(&subsets, Choice { name: Some("b"), ..Choice::default() }).unwrap(), subsets[1..2]);
        assert_eq!(
            choose(&subsets, Choice { name: Some("b"), split: Some("validation"), file: None }).unwrap(),
            subsets[2..3]
        );
        for (names, choice, words) in [
            (&subsets[..], Choice::default(), "in several folders, which are its configurations: a, b"),
            (&subsets, Choice { name: Some("c"), ..Choice::default() }, "no folder \"c\""),
            (&plain, split("validation"), "no file of the split \"validation\""),
            (&["README.md", "x.bin"], Choice::default(), "no data file"),
            (&plain, Choice { file: Some("*.csv"), ..Choice::default() }, "no file of it matches"),
        ] {
            let error = choose(names, choice).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
