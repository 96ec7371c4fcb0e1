//! Copies of checkpoints in an object store, from which a run can continue on another machine.
//!
//! An object store cannot rename a directory. `SHA256SUMS` is therefore written last and read first: a copy without it
//! does not count.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use futures_util::StreamExt;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::io::AsyncWriteExt;

use super::{store, sums};
use crate::util::bucket::{Bucket, flat_error};

/// Name of the setting with the URL, for error messages.
const SETTING: &str = "checkpoint.mirror";

/// A location in an object store for one run.
pub struct Mirror(Bucket);

impl Mirror {
    /// Opens the location `url`: `s3://bucket/folder`, `gs://bucket/folder` or `file:///folder`. Region, endpoint and
    /// credentials come from environment variables (`AWS_…`, `GOOGLE_…`).
    ///
    /// # Errors
    /// If the URL is invalid or names an unknown kind of store.
    pub fn open(url: &str) -> Result<Self> {
        Bucket::open(url, SETTING).map(Self)
    }

    /// Creates a mirror below `prefix` in `store`; `url` names it in messages.
    ///
    /// # Errors
    /// If its thread cannot be started.
    pub fn with_store(store: Arc<dyn ObjectStore>, prefix: Key, url: &str) -> Result<Self> {
        Bucket::with_store(store, prefix, url, SETTING).map(Self)
    }

    /// Copies the directory `dir`, which has checksums, under its own name.
    ///
    /// # Errors
    /// Names the file and the store. An incomplete copy has no `SHA256SUMS` and does not count.
    pub fn copy(&self, dir: &Path) -> Result<()> {
        let name = dir.file_name().context("a folder has a name")?.to_string_lossy();
        let mut files = sums::files(dir)?;
        // The checksums complete the copy.
        files.sort_by_key(|path| path.ends_with(sums::NAME));
        self.0.wait(async {
            for file in &files {
                let key = self.0.key(&name, file.strip_prefix(dir)?);
                self.0
                    .upload(file, &key)
                    .await
                    .with_context(|| format!("{} cannot be copied to {}", file.display(), self.0.url))?;
            }
            Ok(())
        })
    }

    /// Copies the checkpoint in `dir`, and then removes copies older than the last `keep` whose originals no longer
    /// exist next to `dir`.
    ///
    /// # Errors
    /// See [`Self::copy`]; also if an old copy cannot be listed or removed.
    pub fn put(&self, dir: &Path, keep: usize) -> Result<()> {
        store::step(dir).context("only checkpoints are kept by their number")?;
        self.copy(dir)?;
        self.0.wait(async {
            let steps = self.steps().await?;
            let old = steps.iter().rev().skip(keep).filter(|step| !dir.with_file_name(store::name(**step)).exists());
            for step in old {
                self.0.remove(&store::name(*step), sums::NAME).await?;
            }
            Ok(())
        })
    }

    /// Returns whether a complete copy called `name` exists.
    ///
    /// # Errors
    /// If the store does not respond.
    pub fn has(&self, name: &str) -> Result<bool> {
        self.0.wait(async {
            match self.0.store.head(&self.0.key(name, Path::new(sums::NAME))).await {
                Ok(_) => Ok(true),
                Err(object_store::Error::NotFound { .. }) => Ok(false),
                Err(error) => Err(flat_error(error)).with_context(|| format!("{} cannot be read", self.0.url)),
            }
        })
    }

    /// Returns the step of the latest complete copy, if there is one.
    ///
    /// # Errors
    /// If the store does not respond.
    pub fn latest(&self) -> Result<Option<u64>> {
        self.0.wait(async { Ok(self.steps().await?.pop()) })
    }

    /// Downloads the copy called `name` into the folder `into`, completely or not at all, and verifies its checksums.
    ///
    /// # Errors
    /// If an object cannot be read, a file cannot be written, or the copy is damaged.
    pub fn fetch(&self, name: &str, into: &Path) -> Result<PathBuf> {
        let (partial, path) = (into.join(format!(".{name}.partial")), into.join(name));
        if partial.exists() {
            std::fs::remove_dir_all(&partial).with_context(|| format!("cannot clear {}", partial.display()))?;
        }
        self.0.wait(async {
            let from = self.0.key(name, Path::new(""));
            let mut listed = self.0.store.list(Some(&from));
            while let Some(object) = listed.next().await {
                let object = object.map_err(flat_error).with_context(|| format!("{} cannot be listed", self.0.url))?;
                let parts = object
                    .location
                    .prefix_match(&from)
                    .with_context(|| "the store listed an object of another folder")?;
                let file = parts.fold(partial.clone(), |path, part| path.join(part.as_ref()));
                self.download(&object.location, &file)
                    .await
                    .with_context(|| format!("{} cannot be fetched from {}", file.display(), self.0.url))?;
            }
            anyhow::Ok(())
        })?;
        sums::verify(&partial).with_context(|| format!("the copy of {name} in {}", self.0.url))?;
        std::fs::rename(&partial, &path).with_context(|| format!("cannot rename {} into place", partial.display()))?;
        Ok(path)
    }

    /// Returns the steps of the complete copies, in ascending order.
    async fn steps(&self) -> Result<Vec<u64>> {
        let mut steps = Vec::new();
        for folder in self.0.folders().await? {
            let Some(step) = store::step(Path::new(&folder)) else { continue };
            match self.0.store.head(&self.0.key(&folder, Path::new(sums::NAME))).await {
                Ok(_) => steps.push(step),
                Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => {
                    return Err(flat_error(error)).with_context(|| format!("{} cannot be listed", self.0.url));
                }
            }
        }
        steps.sort_unstable();
        Ok(steps)
    }

    async fn download(&self, key: &Key, file: &Path) -> Result<()> {
        if let Some(folder) = file.parent() {
            tokio::fs::create_dir_all(folder).await?;
        }
        let mut to = tokio::fs::File::create(file).await?;
        let mut from = self.0.store.get(key).await.map_err(flat_error)?.into_stream();
        while let Some(bytes) = from.next().await {
            to.write_all(&bytes.map_err(flat_error)?).await?;
        }
        to.sync_all().await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use object_store::PutPayload;
    use object_store::memory::InMemory;

    use super::*;
    use crate::util::bucket::PART_BYTES;

    /// Creates a checkpoint with a file that is uploaded in parts.
    fn checkpoint(store: &Path, step: u64) -> PathBuf {
        let dir = store.join(store::name(step));
        std::fs::create_dir_all(dir.join("resume")).unwrap();
        let big: Vec<u8> = (0..(PART_BYTES * 5 / 2) as u32).map(|i| (i.wrapping_mul(2654435761) >> 24) as u8).collect();
        std::fs::write(dir.join("model.safetensors"), big).unwrap();
        std::fs::write(dir.join("resume/state.postcard"), step.to_string()).unwrap();
        sums::write_sums(&dir).unwrap();
        dir
    }

    fn check(mirror: &Mirror) {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert_eq!(mirror.latest().unwrap(), None);
        for step in [5, 10, 15] {
            let dir = checkpoint(here.path(), step);
            mirror.put(&dir, 2).unwrap();
        }
        // Copies of existing originals are kept. After the first original is removed, its copy is removed too.
        std::fs::remove_dir_all(here.path().join(store::name(5))).unwrap();
        mirror.put(&checkpoint(here.path(), 20), 2).unwrap();
        assert_eq!(mirror.0.wait(mirror.steps()).unwrap(), [10, 15, 20]);
        let path = mirror.fetch(&store::name(20), there.path()).unwrap();
        sums::verify(&path).unwrap();
        assert_eq!(std::fs::read_to_string(path.join("resume/state.postcard")).unwrap(), "20");
        // Another directory is copied like a checkpoint, but is not listed as one.
        let other = here.path().join("reference");
        std::fs::create_dir_all(&other).unwrap();
        std::fs::write(other.join("model.safetensors"), "first").unwrap();
        sums::write_sums(&other).unwrap();
        assert!(!mirror.has("reference").unwrap());
        mirror.copy(&other).unwrap();
        assert!(mirror.has("reference").unwrap() && mirror.latest().unwrap() == Some(20));
        let path = mirror.fetch("reference", there.path()).unwrap();
        assert_eq!(std::fs::read_to_string(path.join("model.safetensors")).unwrap(), "first");
        // A copy without checksums does not count.
        let sums_key = mirror.0.key(&store::name(20), Path::new(sums::NAME));
        mirror.0.wait(async { Ok(mirror.0.store.delete(&sums_key).await?) }).unwrap();
        assert_eq!(mirror.latest().unwrap(), Some(15));
        // A damaged copy is detected and leaves nothing that looks like a checkpoint.
        let file = mirror.0.key(&store::name(15), Path::new("resume/state.postcard"));
        mirror.0.wait(async { Ok(mirror.0.store.put(&file, PutPayload::from_static(b"51")).await?) }).unwrap();
        let error = format!("{:#}", mirror.fetch(&store::name(15), there.path()).unwrap_err());
        assert!(error.contains("state.postcard is damaged"), "{error}");
        assert!(!there.path().join(store::name(15)).exists());
    }

    #[test]
    fn copies_are_complete_or_absent_in_memory_and_in_a_folder() {
        check(&Mirror::with_store(Arc::new(InMemory::new()), Key::from("runs/a"), "memory").unwrap());
        let dir = tempfile::tempdir().unwrap();
        check(&Mirror::open(&format!("file://{}/runs/a", dir.path().display())).unwrap());
    }

    #[test]
    fn an_invalid_url_is_refused() {
        for url in ["runs/a", "ftp://host/a"] {
            let error = format!("{:#}", Mirror::open(url).err().unwrap());
            assert!(error.starts_with("checkpoint.mirror = "), "{error}");
        }
    }
}
