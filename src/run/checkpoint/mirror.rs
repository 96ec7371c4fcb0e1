//! Copies of checkpoints in an object store, from which a run can continue on another machine.
//!
//! An object store cannot rename a directory. `SHA256SUMS` is therefore written last and read first: a copy without it
//! does not count.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use futures_util::StreamExt;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{store, sums};

/// Size in bytes of the parts of an upload; smaller files are uploaded at once.
const PART_BYTES: usize = 8 << 20;

/// Number of concurrent part uploads.
const CONCURRENT_PARTS: usize = 4;

/// A location in an object store for one run.
pub struct Mirror {
    store: Arc<dyn ObjectStore>,
    prefix: Key,
    url: String,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Mirror {
    /// Opens the location `url`: `s3://bucket/folder`, `gs://bucket/folder` or `file:///folder`. Region, endpoint and
    /// credentials come from environment variables (`AWS_…`, `GOOGLE_…`).
    ///
    /// # Errors
    /// If the URL is invalid or names an unknown kind of store.
    pub fn open(url: &str) -> Result<Self> {
        let parsed = url::Url::parse(url).with_context(|| format!("checkpoint.mirror = {url:?} is not a URL"))?;
        if parsed.scheme() == "file" {
            let path =
                parsed.to_file_path().map_err(|()| anyhow!("checkpoint.mirror = {url:?} does not name a folder"))?;
            std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let variables = std::env::vars().map(|(name, value)| (name.to_lowercase(), value));
        let (store, prefix) = object_store::parse_url_opts(&parsed, variables).with_context(|| {
            format!("checkpoint.mirror = {url:?} cannot be used; give s3://bucket/folder, gs://bucket/folder or file:///folder, and credentials in the environment")
        })?;
        Self::with_store(Arc::from(store), prefix, url)
    }

    /// Creates a mirror below `prefix` in `store`; `url` names it in messages.
    ///
    /// # Errors
    /// If its thread cannot be started.
    pub fn with_store(store: Arc<dyn ObjectStore>, prefix: Key, url: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("mirror")
            .enable_all()
            .build()
            .context("cannot start the thread for checkpoint.mirror")?;
        Ok(Self { store, prefix, url: url.to_owned(), runtime: Some(runtime) })
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
        self.wait(async {
            for file in &files {
                let key = self.key(&name, file.strip_prefix(dir)?);
                self.upload(file, &key)
                    .await
                    .with_context(|| format!("{} cannot be copied to {}", file.display(), self.url))?;
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
        self.wait(async {
            let steps = self.steps().await?;
            let old = steps.iter().rev().skip(keep).filter(|step| !dir.with_file_name(store::name(**step)).exists());
            for step in old {
                self.remove(&store::name(*step)).await?;
            }
            Ok(())
        })
    }

    /// Returns whether a complete copy called `name` exists.
    ///
    /// # Errors
    /// If the store does not respond.
    pub fn has(&self, name: &str) -> Result<bool> {
        self.wait(async {
            match self.store.head(&self.key(name, Path::new(sums::NAME))).await {
                Ok(_) => Ok(true),
                Err(object_store::Error::NotFound { .. }) => Ok(false),
                Err(error) => Err(flat_error(error)).with_context(|| format!("{} cannot be read", self.url)),
            }
        })
    }

    /// Returns the step of the latest complete copy, if there is one.
    ///
    /// # Errors
    /// If the store does not respond.
    pub fn latest(&self) -> Result<Option<u64>> {
        self.wait(async { Ok(self.steps().await?.pop()) })
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
        self.wait(async {
            let from = self.key(name, Path::new(""));
            let mut listed = self.store.list(Some(&from));
            while let Some(object) = listed.next().await {
                let object = object.map_err(flat_error).with_context(|| format!("{} cannot be listed", self.url))?;
                let parts = object
                    .location
                    .prefix_match(&from)
                    .with_context(|| "the store listed an object of another folder")?;
                let file = parts.fold(partial.clone(), |path, part| path.join(part.as_ref()));
                self.download(&object.location, &file)
                    .await
                    .with_context(|| format!("{} cannot be fetched from {}", file.display(), self.url))?;
            }
            anyhow::Ok(())
        })?;
        sums::verify(&partial).with_context(|| format!("the copy of {name} in {}", self.url))?;
        std::fs::rename(&partial, &path).with_context(|| format!("cannot rename {} into place", partial.display()))?;
        Ok(path)
    }

    /// Runs `work` on the mirror's own runtime and blocks until it ends. Can be called from any thread, including an
    /// async one.
    fn wait<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        let runtime = self.runtime.as_ref().expect("it is there until the mirror is dropped");
        std::thread::scope(|scope| {
            scope.spawn(|| runtime.block_on(work)).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Returns the steps of the complete copies, in ascending order.
    async fn steps(&self) -> Result<Vec<u64>> {
        let cannot = || format!("{} cannot be listed", self.url);
        let listed =
            self.store.list_with_delimiter(Some(&self.prefix)).await.map_err(flat_error).with_context(cannot)?;
        let mut steps = Vec::new();
        for folder in listed.common_prefixes {
            let Some(step) = folder.filename().and_then(|name| store::step(Path::new(name))) else { continue };
            match self.store.head(&folder.clone().join(sums::NAME)).await {
                Ok(_) => steps.push(step),
                Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(flat_error(error)).with_context(cannot),
            }
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// Removes a copy, its checksums first, so that a partly removed copy does not count.
    async fn remove(&self, name: &str) -> Result<()> {
        let cannot = || format!("the old copy of {name} in {} cannot be removed", self.url);
        self.store.delete(&self.key(name, Path::new(sums::NAME))).await.map_err(flat_error).with_context(cannot)?;
        let mut listed = self.store.list(Some(&self.key(name, Path::new(""))));
        while let Some(object) = listed.next().await {
            self.store
                .delete(&object.map_err(flat_error).with_context(cannot)?.location)
                .await
                .map_err(flat_error)
                .with_context(cannot)?;
        }
        Ok(())
    }

    fn key(&self, name: &str, inside: &Path) -> Key {
        let start = self.prefix.clone().join(name);
        inside.iter().fold(start, |key, part| key.join(part.to_string_lossy().as_ref()))
    }

    async fn upload(&self, file: &Path, key: &Key) -> Result<()> {
        let mut open = tokio::fs::File::open(file).await?;
        if open.metadata().await?.len() <= PART_BYTES as u64 {
            let bytes = tokio::fs::read(file).await?;
            self.store.put(key, PutPayload::from(bytes)).await.map_err(flat_error)?;
            return Ok(());
        }
        let mut parts =
            WriteMultipart::new_with_chunk_size(self.store.put_multipart(key).await.map_err(flat_error)?, PART_BYTES);
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = open.read(&mut buffer).await?;
            if n == 0 {
                break;
            }
            parts.wait_for_capacity(CONCURRENT_PARTS).await.map_err(flat_error)?;
            parts.write(&buffer[..n]);
        }
        parts.finish().await.map_err(flat_error)?;
        Ok(())
    }

    async fn download(&self, key: &Key, file: &Path) -> Result<()> {
        if let Some(folder) = file.parent() {
            tokio::fs::create_dir_all(folder).await?;
        }
        let mut to = tokio::fs::File::create(file).await?;
        let mut from = self.store.get(key).await.map_err(flat_error)?.into_stream();
        while let Some(bytes) = from.next().await {
            to.write_all(&bytes.map_err(flat_error)?).await?;
        }
        to.sync_all().await?;
        Ok(())
    }
}

/// Drops the chain of causes, which the store's error already contains in its own message.
fn flat_error(error: object_store::Error) -> anyhow::Error {
    anyhow!("{error}")
}

impl Drop for Mirror {
    fn drop(&mut self) {
        // No task is running at this point. Shutting down in the background is allowed on an async thread.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

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
        assert_eq!(mirror.wait(mirror.steps()).unwrap(), [10, 15, 20]);
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
        let sums_key = mirror.key(&store::name(20), Path::new(sums::NAME));
        mirror.wait(mirror.store.delete(&sums_key)).unwrap();
        assert_eq!(mirror.latest().unwrap(), Some(15));
        // A damaged copy is detected and leaves nothing that looks like a checkpoint.
        let file = mirror.key(&store::name(15), Path::new("resume/state.postcard"));
        mirror.wait(mirror.store.put(&file, PutPayload::from_static(b"51"))).unwrap();
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
