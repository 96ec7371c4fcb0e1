//! Disk cache of a hub, in the layout of Hugging Face's own libraries: `blobs` by ETag, `snapshots` by commit, `refs`
//! by revision. Every name from a server is checked before it becomes part of a path.

use std::fs::{File, TryLockError};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::util::read_bounded;

/// Largest number of characters of a name from a server.
const LONGEST: usize = 128;

/// Returns the folder that holds the cache, `hub`, and the token that `hf auth login` wrote: `$HF_HOME`, or
/// `~/.cache/huggingface`.
///
/// # Errors
/// If `HF_HOME` is not set and no home directory is known.
pub(super) fn home() -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("HF_HOME").filter(|home| !home.is_empty()) {
        return Ok(home.into());
    }
    let home = std::env::home_dir().filter(|home| home.is_absolute());
    let home = home.context("no home directory for the hub's models is known; set HOME, or HF_HOME to a folder")?;
    Ok(home.join(".cache/huggingface"))
}

/// Returns whether `text` may be one component of a path in the cache: letters, digits and some punctuation, no leading
/// dot.
pub(super) fn is_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.+=~".contains(c);
    !text.is_empty() && text.len() <= LONGEST && !text.starts_with('.') && text.chars().all(allowed)
}

/// Returns whether `path` is a relative path that stays within the folder to which it is joined.
pub(super) fn is_inside(path: &str) -> bool {
    let normal = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    !path.is_empty() && path.len() <= 512 && normal && !path.chars().any(char::is_control) && !path.contains('\\')
}

/// Kind of a hub's repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A model.
    Model,
    /// A data set.
    Dataset,
}

impl Kind {
    /// Returns the plural of the kind, which is used in addresses and folder names.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// Cache of one repository at one revision.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    folder: PathBuf,
    revision: String,
}

impl Cache {
    /// Opens the cache of `repo`, which is `owner/name`, at `revision`, below `home`.
    ///
    /// # Errors
    /// If `repo` or `revision` is not a valid name.
    pub(super) fn new(home: &Path, kind: Kind, repo: &str, revision: &str) -> Result<Self> {
        let parts: Vec<&str> = repo.split('/').collect();
        ensure!(
            parts.len() == 2 && parts.iter().all(|part| is_name(part)),
            "{repo:?} is not a repository; write it as owner/name"
        );
        ensure!(
            revision.len() <= LONGEST && revision.split('/').all(is_name),
            "revision = {revision:?} is not a branch, tag or commit"
        );
        let folder = home.join("hub").join(format!("{}--{}", kind.plural(), repo.replace('/', "--")));
        Ok(Self { folder, revision: revision.to_owned() })
    }

    /// Returns the path of the file `name` at the commit that the revision last referred to, if it is cached.
    pub(super) fn get(&self, name: &str) -> Option<PathBuf> {
        let commit = read_bounded::text(&self.folder.join("refs").join(&self.revision), LONGEST as u64).ok()?;
        let path = self.snapshot(commit.trim()).ok()?.join(name);
        path.exists().then_some(path)
    }

    /// Returns the list of files of the commit that the revision last referred to, if [`Self::keep_list`] stored it.
    pub(super) fn list(&self) -> Option<Vec<String>> {
        let commit = read_bounded::text(&self.folder.join("refs").join(&self.revision), LONGEST as u64).ok()?;
        let path = self.list_path(commit.trim()).ok()?;
        serde_json::from_str(&read_bounded::text(&path, read_bounded::DESCRIPTION).ok()?).ok()
    }

    /// Stores the list of files of the revision's commit, so that the hub need not be contacted again.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn keep_list(&self, names: &[String]) -> Result<()> {
        let commit = read_bounded::text(&self.folder.join("refs").join(&self.revision), LONGEST as u64)?;
        let path = self.list_path(commit.trim())?;
        let folder = path.parent().context("a file is in a folder")?;
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        std::fs::write(&path, serde_json::to_vec(names)?).with_context(|| format!("cannot write {}", path.display()))
    }

    fn list_path(&self, commit: &str) -> Result<PathBuf> {
        ensure!(is_name(commit), "{commit:?} is not a commit");
        Ok(self.folder.join("files").join(format!("{commit}.json")))
    }

    fn snapshot(&self, commit: &str) -> Result<PathBuf> {
        ensure!(is_name(commit), "{commit:?} is not a commit");
        Ok(self.folder.join("snapshots").join(commit))
    }

    /// Returns the path of the content with this ETag.
    pub(super) fn blob(&self, etag: &str) -> Result<PathBuf> {
        ensure!(is_name(etag), "{etag:?} is not a file name");
        Ok(self.folder.join("blobs").join(etag))
    }

    /// Takes the lock for writing the content with this ETag, or returns `None` if another process holds it. Dropping
    /// the file releases the lock.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub(super) fn lock(&self, etag: &str) -> Result<Option<File>> {
        let path = self.blob(etag)?;
        let parent = path.parent().context("a file is in a folder")?;
        std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        let path = parent.join(format!("{etag}.lock"));
        let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// Links the content with this ETag as the file `name` of `commit`, and makes the revision refer to `commit`.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub(super) fn keep(&self, etag: &str, commit: &str, name: &str) -> Result<PathBuf> {
        ensure!(is_inside(name), "{name:?} is outside of the model");
        let path = self.snapshot(commit)?.join(name);
        let parent = path.parent().context("a file is in a folder")?;
        std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        if !path.exists() {
            // The path may be a link to deleted content.
            let _ = std::fs::remove_file(&path);
            let up = "../".repeat(Path::new(name).components().count() + 1);
            let blob = PathBuf::from(format!("{up}blobs/{etag}"));
            link(&blob, &path, &self.blob(etag)?).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let revision = self.folder.join("refs").join(&self.revision);
        let refs = revision.parent().context("a file is in a folder")?;
        std::fs::create_dir_all(refs).with_context(|| format!("cannot create {}", refs.display()))?;
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
    fn only_valid_names_become_parts_of_a_path() {
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
