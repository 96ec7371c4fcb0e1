//! The hub's cache on disk, laid out as Hugging Face's own libraries lay it out: `blobs` by ETag, `snapshots` by commit,
//! `refs` by revision. Every name that comes from a server is checked before it becomes part of a path.

use std::fs::{File, TryLockError};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::util::read_bounded;

/// Most characters of a name that comes from a server.
const LONGEST: usize = 128;

/// The folder that holds the cache, `hub`, and the token that `hf auth login` wrote: `$HF_HOME`, or
/// `~/.cache/huggingface`.
///
/// # Errors
/// Neither `HF_HOME` nor a home directory.
pub(super) fn home() -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("HF_HOME").filter(|home| !home.is_empty()) {
        return Ok(home.into());
    }
    let home = std::env::home_dir().filter(|home| home.is_absolute());
    let home =
        home.context("there is no home directory to keep the hub's models in; set HOME, or HF_HOME to a folder")?;
    Ok(home.join(".cache/huggingface"))
}

/// Whether `text` can be one component of a path below the cache: letters, digits and a few signs, no leading dot.
pub(super) fn is_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.+=~".contains(c);
    !text.is_empty() && text.len() <= LONGEST && !text.starts_with('.') && text.chars().all(allowed)
}

/// Whether `path` is a relative path that stays below the folder that it is joined to.
pub(super) fn is_inside(path: &str) -> bool {
    let normal = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    !path.is_empty() && path.len() <= 512 && normal && !path.chars().any(char::is_control) && !path.contains('\\')
}

/// The kinds of repositories of a hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A model.
    Model,
    /// A data set.
    Dataset,
}

impl Kind {
    /// The word for several of its kind, in addresses and in names of folders.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// One repository at one revision in the cache.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    folder: PathBuf,
    revision: String,
}

impl Cache {
    /// `repo`, which is `owner/name`, at `revision`, in the cache below `home`.
    ///
    /// # Errors
    /// Names that are not those of a repository and of a revision.
    pub(super) fn new(home: &Path, kind: Kind, repo: &str, revision: &str) -> Result<Self> {
        let parts: Vec<&str> = repo.split('/').collect();
        ensure!(
            parts.len() == 2 && parts.iter().all(|part| is_name(part)),
            "{repo:?} is no repository; write it as owner/name"
        );
        ensure!(
            revision.len() <= LONGEST && revision.split('/').all(is_name),
            "revision = {revision:?} is no branch, tag or commit"
        );
        let folder = home.join("hub").join(format!("{}--{}", kind.plural(), repo.replace('/', "--")));
        Ok(Self { folder, revision: revision.to_owned() })
    }

    /// The file `name` of the commit that the revision last stood for, if the cache has it.
    pub(super) fn get(&self, name: &str) -> Option<PathBuf> {
        let commit = read_bounded::text(&self.folder.join("refs").join(&self.revision), LONGEST as u64).ok()?;
        let path = self.snapshot(commit.trim()).ok()?.join(name);
        path.exists().then_some(path)
    }

    /// The list of files of the commit that the revision last stood for, if [`Self::keep_list`] kept one.
    pub(super) fn list(&self) -> Option<Vec<String>> {
        let commit = read_bounded::text(&self.folder.join("refs").join(&self.revision), LONGEST as u64).ok()?;
        let path = self.list_path(commit.trim()).ok()?;
        serde_json::from_str(&read_bounded::text(&path, read_bounded::DESCRIPTION).ok()?).ok()
    }

    /// Keeps the list of files of the commit that the revision stands for, so that the hub need not be asked again.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub(super) fn keep_list(&self, names: &[String]) -> Result<()> {
        let commit = read_bounded::text(&self.folder.join("refs").join(&self.revision), LONGEST as u64)?;
        let path = self.list_path(commit.trim())?;
        let folder = path.parent().context("a file is in a folder")?;
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        std::fs::write(&path, serde_json::to_vec(names)?).with_context(|| format!("cannot write {}", path.display()))
    }

    fn list_path(&self, commit: &str) -> Result<PathBuf> {
        ensure!(is_name(commit), "{commit:?} is no commit");
        Ok(self.folder.join("files").join(format!("{commit}.json")))
    }

    fn snapshot(&self, commit: &str) -> Result<PathBuf> {
        ensure!(is_name(commit), "{commit:?} is no commit");
        Ok(self.folder.join("snapshots").join(commit))
    }

    /// Where the content with this ETag is kept.
    pub(super) fn blob(&self, etag: &str) -> Result<PathBuf> {
        ensure!(is_name(etag), "{etag:?} is no name of a file");
        Ok(self.folder.join("blobs").join(etag))
    }

    /// Takes the right to write the content with this ETag, unless another process has it; it is given back with the file.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub(super) fn lock(&self, etag: &str) -> Result<Option<File>> {
        let path = self.blob(etag)?;
        let parent = path.parent().context("a file is in a folder")?;
        std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        let path = parent.join(format!("{etag}.lock"));
        let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// Makes the content with this ETag the file `name` of `commit`, and `commit` what the revision stands for.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub(super) fn keep(&self, etag: &str, commit: &str, name: &str) -> Result<PathBuf> {
        ensure!(is_inside(name), "{name:?} is outside of the model");
        let path = self.snapshot(commit)?.join(name);
        let parent = path.parent().context("a file is in a folder")?;
        std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        if !path.exists() {
            // A link to content that is gone.
            let _ = std::fs::remove_file(&path);
            let up = "../".repeat(Path::new(name).components().count() + 1);
            let blob = PathBuf::from(format!("{up}blobs/{etag}"));
            link(&blob, &path, &self.blob(etag)?).with_context(|| format!("cannot make {}", path.display()))?;
        }
        let revision = self.folder.join("refs").join(&self.revision);
        let refs = revision.parent().context("a file is in a folder")?;
        std::fs::create_dir_all(refs).with_context(|| format!("cannot make {}", refs.display()))?;
        std::fs::write(&revision, commit).with_context(|| format!("cannot write {}", revision.display()))?;
        Ok(path)
    }
}

#[cfg(unix)]
fn link(target: &Path, path: &Path, _blob: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(not(unix))]
fn link(_target: &Path, path: &Path, blob: &Path) -> std::io::Result<()> {
    std::fs::rename(blob, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_become_parts_of_a_path() {
        for name in ["abc", "c0ffee", "0x8D-2", "config.json", "5f3a-5e8b", "a+b=~"] {
            assert!(is_name(name), "{name}");
        }
        let long = "x".repeat(LONGEST + 1);
        for name in ["", ".", "..", "../x", "a/b", "/etc", "a\\b", "a\0b", "a b", "ä", "\u{1b}[2J", ".hidden", &long] {
            assert!(!is_name(name), "{name:?}");
        }
        assert!(is_inside("parts/model-1.safetensors"));
        for path in ["", "../x", "/x", "a/../../x", "a\nb", "a\\..\\b"] {
            assert!(!is_inside(path), "{path:?}");
        }
    }

    #[test]
    fn a_revision_stays_in_the_folder_of_references() {
        let home = tempfile::tempdir().unwrap();
        for revision in ["main", "v1.0", "refs/pr/1", "c0ffee"] {
            assert!(Cache::new(home.path(), Kind::Model, "o/n", revision).is_ok(), "{revision}");
        }
        for revision in ["", "/etc", "../../x", "a//b", "a/../b", "main?x", "a b", "a#b", "a%2e"] {
            assert!(Cache::new(home.path(), Kind::Model, "o/n", revision).is_err(), "{revision}");
        }
    }

    #[test]
    fn a_reference_to_a_path_outside_counts_as_missing() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::new(home.path(), Kind::Model, "o/n", "main").unwrap();
        std::fs::write(home.path().join("config.json"), "{}").unwrap();
        std::fs::create_dir_all(home.path().join("hub/models--o--n/refs")).unwrap();
        std::fs::create_dir_all(home.path().join("hub/models--o--n/snapshots")).unwrap();
        std::fs::write(home.path().join("hub/models--o--n/refs/main"), "../../..").unwrap();
        assert_eq!(cache.get("config.json"), None);
    }
}
