//! Sources of data sets: files, folders, glob patterns, and data sets of a hub, read one after another.

mod files;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use toml::Value;

use super::{ResolveOptions, hub};
use crate::util::disk::expand_home;
use crate::util::suggest::nearest;

pub use files::expand;
pub(super) use files::of_split;

/// Source from which rows are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataPlace {
    /// A file, a folder, or a glob pattern.
    Path(PathBuf),
    /// A data set of a hub.
    Hub {
        /// Repository, `owner/name`.
        repo: String,
        /// Branch, tag or commit; `None` for `main`.
        revision: Option<String>,
        /// Configuration (subset) of the data set, which is the folder of its files.
        name: Option<String>,
        /// Split; `None` for `train`.
        split: Option<String>,
        /// Name of a file in the repository, or a glob pattern; `None` for the files of the split.
        file: Option<String>,
    },
}

impl DataPlace {
    fn to_toml(&self) -> Value {
        let Self::Hub { repo, revision, name, split, file } = self else { return Value::String(self.to_string()) };
        let others = [("revision", revision), ("name", name), ("split", split), ("file", file)];
        let others = others.into_iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
        let pairs = std::iter::once(("hub", repo)).chain(others);
        Value::Table(pairs.map(|(key, value)| (key.to_owned(), Value::String(value.clone()))).collect())
    }
}

impl fmt::Display for DataPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Hub { repo, .. } => write!(f, "hub {repo}"),
        }
    }
}

/// Data set as a list of sources, whose rows are read in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DataRef(pub Vec<DataPlace>);

impl fmt::Display for DataRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&places.join(", "))
    }
}

impl DataRef {
    /// Parses a configuration value: a path as text, `{ path = }`, `{ hub = }`, or a list of these.
    ///
    /// # Errors
    /// If the value is none of these; the error shows the invalid part.
    pub fn from_toml(value: &Value) -> Result<Self, String> {
        match value {
            Value::Array(list) if list.is_empty() => Err("an empty list names no data".into()),
            Value::Array(list) => list.iter().map(place).collect::<Result<_, _>>().map(Self),
            one => Ok(Self(vec![place(one)?])),
        }
    }

    /// Returns the TOML value that [`Self::from_toml`] parses: a text for a single path, otherwise a list.
    pub fn to_toml(&self) -> Value {
        match self.0.as_slice() {
            [one @ DataPlace::Path(_)] => one.to_toml(),
            many => Value::Array(many.iter().map(DataPlace::to_toml).collect()),
        }
    }

    /// Parses a command-line argument: a path, or a configuration value in braces or brackets.
    ///
    /// # Errors
    /// If the text in braces or brackets is not TOML, and the errors of [`Self::from_toml`].
    pub fn from_argument(text: &str) -> Result<Self, String> {
        if !text.trim_start().starts_with(['{', '[']) || Path::new(text).exists() {
            return Ok(Self(vec![DataPlace::Path(text.into())]));
        }
        let table = format!("data = {text}").parse::<toml::Table>();
        let table = table.map_err(|error| format!("{text} is not TOML: {}", error.message()))?;
        Self::from_toml(&table["data"])
    }

    /// Makes paths relative to `folder`, and replaces a leading `~` by the home directory. A path may have no data only
    /// if `must_exist` is false.
    ///
    /// # Errors
    /// If a path has no data, or begins with `~` and no home directory is known.
    pub fn below(mut self, folder: &Path, must_exist: bool) -> Result<Self, String> {
        for place in &mut self.0 {
            if let DataPlace::Path(path) = place {
                let given = expand_home(path)?;
                let joined = folder.join(&given);
                // The folder's own name must not be interpreted as a pattern.
                let pattern = || Path::new(&glob::Pattern::escape(&folder.to_string_lossy())).join(&given);
                *path = if joined.exists() { joined } else { pattern() };
                if must_exist {
                    expand(path).map_err(|error| format!("{error:#}"))?;
                }
            }
        }
        Ok(self)
    }

    /// Returns the files of the data set, downloading them if necessary.
    ///
    /// # Errors
    /// If a source is not available, or a file is named twice.
    pub fn files(&self, options: &ResolveOptions) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for place in &self.0 {
            files.extend(match place {
                DataPlace::Path(path) => expand(path)?,
                DataPlace::Hub { repo, revision, name, split, file } => {
                    let choice = Choice { name: name.as_deref(), split: split.as_deref(), file: file.as_deref() };
                    hub::fetch_dataset(repo, revision.as_deref(), &choice, options)
                        .with_context(|| format!("cannot get the data set {repo} from the hub"))?
                }
            });
        }
        let mut seen = std::collections::HashSet::new();
        for file in &files {
            let one = file.canonicalize().unwrap_or_else(|_| file.clone());
            ensure!(seen.insert(one), "the file {} is named twice, so that its rows would count twice", file.display());
        }
        Ok(files)
    }
}

/// Selection of files of a hub's data set.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Choice<'a> {
    /// Folder of the configuration.
    pub(super) name: Option<&'a str>,
    /// Name of the split.
    pub(super) split: Option<&'a str>,
    /// Name of a file, or a glob pattern.
    pub(super) file: Option<&'a str>,
}

fn place(value: &Value) -> Result<DataPlace, String> {
    let table = match value {
        Value::String(path) if path.is_empty() => return Err("an empty text names no data".into()),
        Value::String(path) => return Ok(DataPlace::Path(path.into())),
        Value::Table(table) => table,
        other => return Err(format!("{other} names no data; give a path, {{ hub = … }}, or a list of these")),
    };
    let text = |key: &str| match table.get(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(format!("{key} = {other} is not a text in quotes")),
    };
    let (known, found) = if let Some(path) = text("path")? {
        (&["path"][..], DataPlace::Path(path.into()))
    } else if let Some(repo) = text("hub")? {
        let [revision, name, split, file] = ["revision", "name", "split", "file"].map(text);
        let hub = DataPlace::Hub { repo, revision: revision?, name: name?, split: split?, file: file? };
        (&["hub", "revision", "name", "split", "file"][..], hub)
    } else {
        let meant = table.keys().find_map(|key| Some((key, nearest(key, &["path", "hub"])?)));
        let hint = meant.map_or(String::new(), |(key, near)| format!("; {key} is unknown, did you mean {near}?"));
        return Err(format!("{value} names no data: it has neither path nor hub{hint}"));
    };
    let Some(key) = table.keys().find(|key| !known.contains(&key.as_str())) else { return Ok(found) };
    let hint = nearest(key, known).map_or(String::new(), |near| format!("; did you mean {near}?"));
    Err(format!("{key} is unknown next to {}, known are {}{hint}", known[0], known.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<DataRef, String> {
        DataRef::from_toml(&format!("v = {text}").parse::<toml::Table>().unwrap()["v"])
    }

    #[test]
    fn a_reference_in_each_form_round_trips() {
        for (text, places) in [
            ("'a.jsonl'", 1),
            ("['a.jsonl', 'b/*.csv']", 2),
            ("{ path = 'a.jsonl' }", 1),
            ("{ hub = 'o/n' }", 1),
            ("[{ hub = 'o/n', revision = 'r', name = 'c', split = 'test', file = '*.csv' }, 'a.jsonl']", 2),
        ] {
            let data = read(text).unwrap();
            assert_eq!(data.0.len(), places, "{text}");
            assert_eq!(DataRef::from_toml(&data.to_toml()).unwrap(), data, "{text}");
        }
        assert_eq!(read("'a.jsonl'").unwrap().to_toml(), Value::String("a.jsonl".into()));
        for (text, words) in [
            ("[]", "an empty list"),
            ("''", "an empty text"),
            ("3", "3 names no data"),
            ("{ paths = 'a' }", "did you mean path?"),
            ("{ hub = 'o/n', splits = 'x' }", "splits is unknown next to hub"),
            ("{ hub = 'o/n', split = 3 }", "split = 3 is not a text"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn a_folder_whose_name_looks_like_a_pattern_is_read_as_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("runs[1]");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("a.jsonl"), "{}\n").unwrap();
        for text in ["'a.jsonl'", "'*.jsonl'"] {
            let files = read(text).unwrap().below(&folder, true).unwrap().files(&ResolveOptions::default()).unwrap();
            assert_eq!(files, [folder.join("a.jsonl")]);
        }
    }

    #[test]
    fn a_file_that_is_named_twice_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.jsonl"), "{}\n").unwrap();
        let data = read("['a.jsonl', '*.jsonl']").unwrap().below(dir.path(), true).unwrap();
        let error = data.files(&ResolveOptions::default()).unwrap_err().to_string();
        assert!(error.contains("a.jsonl is named twice"), "{error}");
        assert!(read("'none.jsonl'").unwrap().below(dir.path(), true).unwrap_err().contains("none.jsonl"));
    }
}
