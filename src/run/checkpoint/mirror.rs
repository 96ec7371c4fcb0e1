//! Copies of checkpoints in an object store, so that a run can go on where its machine is gone.
//!
//! A store knows no renaming. `SHA256SUMS` is written last and read first: a checkpoint without it is not there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use futures_util::StreamExt;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{store, sums};

/// Files beyond this many bytes go in parts.
const PART: usize = 8 << 20;

/// Parts under way at a time.
const PARTS_AT_ONCE: usize = 4;

/// A place in an object store, for one run.
pub struct Mirror {
    store: Arc<dyn ObjectStore>,
    prefix: Key,
    url: String,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Mirror {
    /// The place that `url` names: `s3://bucket/folder`, `gs://bucket/folder`, `file:///folder`. What else is to be known of
    /// it (region, endpoint, credentials) is in the environment, as `AWS_…` and `GOOGLE_…`.
    ///
    /// # Errors
    /// An address that is none, or of a kind of store that is not known.
    pub fn open(url: &str) -> Result<Self> {
        let parsed = url::Url::parse(url).with_context(|| format!("checkpoint.mirror = {url:?} is no address"))?;
        if parsed.scheme() == "file" {
            let path = parsed.to_file_path().map_err(|()| anyhow!("checkpoint.mirror = {url:?} names no folder"))?;
            std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        let variables = std::env::vars().map(|(name, value)| (name.to_lowercase(), value));
        let (store, prefix) = object_store::parse_url_opts(&parsed, variables).with_context(|| {
            format!("checkpoint.mirror = {url:?} cannot be used; give s3://bucket/folder, gs://bucket/folder or file:///folder, and credentials in the environment")
        })?;
        Self::on(Arc::from(store), prefix, url)
    }

    /// A place below `prefix` in `store`, called `url` where it is spoken of.
    ///
    /// # Errors
    /// When its thread cannot be started.
    pub fn on(store: Arc<dyn ObjectStore>, prefix: Key, url: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("mirror")
            .enable_all()
            .build()
            .context("cannot start the thread for checkpoint.mirror")?;
        Ok(Self { store, prefix, url: url.to_owned(), runtime: Some(runtime) })
    }

    /// Copies the sealed folder `dir` under its name.
    ///
    /// # Errors
    /// Names the file and the store. What was copied of it is not there yet.
    pub fn copy(&self, dir: &Path) -> Result<()> {
        let name = dir.file_name().context("a folder has a name")?.to_string_lossy();
        let mut files = sums::files(dir)?;
        // The mark of a whole one goes last.
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

    /// Copies the checkpoint in `dir`, and then removes copies beyond the last `keep` that have no original beside `dir` any
    /// more.
    ///
    /// # Errors
    /// As [`Self::copy`].
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

    /// Whether there is a whole copy called `name`.
    ///
    /// # Errors
    /// A store that does not answer.
    pub fn has(&self, name: &str) -> Result<bool> {
        self.wait(async {
            match self.store.head(&self.key(name, Path::new(sums::NAME))).await {
                Ok(_) => Ok(true),
                Err(object_store::Error::NotFound { .. }) => Ok(false),
                Err(error) => Err(flat(error)).with_context(|| format!("{} cannot be read", self.url)),
            }
        })
    }

    /// The step of the latest whole copy, if there is one.
    ///
    /// # Errors
    /// A store that does not answer.
    pub fn latest(&self) -> Result<Option<u64>> {
        self.wait(async { Ok(self.steps().await?.pop()) })
    }

    /// Brings the copy called `name` into the folder `into`, whole or not at all.
    ///
    /// # Errors
    /// What cannot be read or written; a copy that is damaged.
    pub fn fetch(&self, name: &str, into: &Path) -> Result<PathBuf> {
        let (aside, path) = (into.join(format!(".{name}.partial")), into.join(name));
        if aside.exists() {
            std::fs::remove_dir_all(&aside).with_context(|| format!("cannot clear {}", aside.display()))?;
        }
        self.wait(async {
            let from = self.key(name, Path::new(""));
            let mut listed = self.store.list(Some(&from));
            while let Some(object) = listed.next().await {
                let object = object.map_err(flat).with_context(|| format!("{} cannot be listed", self.url))?;
                let parts = object.location.prefix_match(&from).with_context(|| "a listed name is another one")?;
                let file = parts.fold(aside.clone(), |path, part| path.join(part.as_ref()));
                self.download(&object.location, &file)
                    .await
                    .with_context(|| format!("{} cannot be brought from {}", file.display(), self.url))?;
            }
            anyhow::Ok(())
        })?;
        sums::verify(&aside).with_context(|| format!("the copy of {name} in {}", self.url))?;
        std::fs::rename(&aside, &path).with_context(|| format!("cannot rename {} into place", aside.display()))?;
        Ok(path)
    }

    /// Runs `work` on the store's own thread, and waits for it from any other, an asynchronous one included.
    fn wait<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        let runtime = self.runtime.as_ref().expect("it is there until the mirror is dropped");
        std::thread::scope(|scope| {
            scope.spawn(|| runtime.block_on(work)).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Steps of the whole copies, in order.
    async fn steps(&self) -> Result<Vec<u64>> {
        let cannot = || format!("{} cannot be listed", self.url);
        let listed = self.store.list_with_delimiter(Some(&self.prefix)).await.map_err(flat).with_context(cannot)?;
        let mut steps = Vec::new();
        for folder in listed.common_prefixes {
            let Some(step) = folder.filename().and_then(|name| store::step(Path::new(name))) else { continue };
            match self.store.head(&folder.clone().join(sums::NAME)).await {
                Ok(_) => steps.push(step),
                Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(flat(error)).with_context(cannot),
            }
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// Its mark first: what is left of it is no checkpoint.
    async fn remove(&self, name: &str) -> Result<()> {
        let cannot = || format!("the old copy of {name} in {} cannot be removed", self.url);
        self.store.delete(&self.key(name, Path::new(sums::NAME))).await.map_err(flat).with_context(cannot)?;
        let mut listed = self.store.list(Some(&self.key(name, Path::new(""))));
        while let Some(object) = listed.next().await {
            self.store
                .delete(&object.map_err(flat).with_context(cannot)?.location)
                .await
                .map_err(flat)
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
        if open.metadata().await?.len() <= PART as u64 {
            let bytes = tokio::fs::read(file).await?;
            self.store.put(key, PutPayload::from(bytes)).await.map_err(flat)?;
            return Ok(());
        }
        let mut parts = WriteMultipart::new_with_chunk_size(self.store.put_multipart(key).await.map_err(flat)?, PART);
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = open.read(&mut buffer).await?;
            if n == 0 {
                break;
            }
            parts.wait_for_capacity(PARTS_AT_ONCE).await.map_err(flat)?;
            parts.write(&buffer[..n]);
        }
        parts.finish().await.map_err(flat)?;
        Ok(())
    }

    async fn download(&self, key: &Key, file: &Path) -> Result<()> {
        if let Some(folder) = file.parent() {
            tokio::fs::create_dir_all(folder).await?;
        }
        let mut to = tokio::fs::File::create(file).await?;
        let mut from = self.store.get(key).await.map_err(flat)?.into_stream();
        while let Some(bytes) = from.next().await {
            to.write_all(&bytes.map_err(flat)?).await?;
        }
        to.sync_all().await?;
        Ok(())
    }
}

/// A store's error says all that its causes say, and is told once.
fn flat(error: object_store::Error) -> anyhow::Error {
    anyhow!("{error}")
}

impl Drop for Mirror {
    fn drop(&mut self) {
        // Nothing is under way any more, and an asynchronous thread may not wait for that.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    /// A checkpoint with a file that goes in parts.
    fn checkpoint(shelf: &Path, step: u64) -> PathBuf {
        let dir = shelf.join(store::name(step));
        std::fs::create_dir_all(dir.join("resume")).unwrap();
        let big: Vec<u8> = (0..(PART * 5 / 2) as u32).map(|i| (i.wrapping_mul(2654435761) >> 24) as u8).collect();
        std::fs::write(dir.join("model.safetensors"), big).unwrap();
        std::fs::write(dir.join("resume/state.postcard"), step.to_string()).unwrap();
        sums::seal(&dir).unwrap();
        dir
    }

    fn check(mirror: &Mirror) {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert_eq!(mirror.latest().unwrap(), None);
        for step in [5, 10, 15] {
            let dir = checkpoint(here.path(), step);
            mirror.put(&dir, 2).unwrap();
        }
        // All originals are there, so all copies are; with the first gone, its copy goes too.
        std::fs::remove_dir_all(here.path().join(store::name(5))).unwrap();
        mirror.put(&checkpoint(here.path(), 20), 2).unwrap();
        assert_eq!(mirror.wait(mirror.steps()).unwrap(), [10, 15, 20]);
        let path = mirror.fetch(&store::name(20), there.path()).unwrap();
        sums::verify(&path).unwrap();
        assert_eq!(std::fs::read_to_string(path.join("resume/state.postcard")).unwrap(), "20");
        // What stands beside the checkpoints is none of them, and is whole or not there as they are.
        let beside = here.path().join("reference");
        std::fs::create_dir_all(&beside).unwrap();
        std::fs::write(beside.join("model.safetensors"), "first").unwrap();
        sums::seal(&beside).unwrap();
        assert!(!mirror.has("reference").unwrap());
        mirror.copy(&beside).unwrap();
        assert!(mirror.has("reference").unwrap() && mirror.latest().unwrap() == Some(20));
        let path = mirror.fetch("reference", there.path()).unwrap();
        assert_eq!(std::fs::read_to_string(path.join("model.safetensors")).unwrap(), "first");
        // Without its mark it is not there.
        let mark = mirror.key(&store::name(20), Path::new(sums::NAME));
        mirror.wait(mirror.store.delete(&mark)).unwrap();
        assert_eq!(mirror.latest().unwrap(), Some(15));
        // A damaged copy is found out and leaves nothing that looks like a checkpoint.
        let file = mirror.key(&store::name(15), Path::new("resume/state.postcard"));
        mirror.wait(mirror.store.put(&file, PutPayload::from_static(b"51"))).unwrap();
        let error = format!("{:#}", mirror.fetch(&store::name(15), there.path()).unwrap_err());
        assert!(error.contains("state.postcard is damaged"), "{error}");
        assert!(!there.path().join(store::name(15)).exists());
    }

    #[test]
    fn copies_are_whole_or_not_there_in_memory_and_in_a_folder() {
        check(&Mirror::on(Arc::new(InMemory::new()), Key::from("runs/a"), "memory").unwrap());
        let dir = tempfile::tempdir().unwrap();
        check(&Mirror::open(&format!("file://{}/runs/a", dir.path().display())).unwrap());
    }

    #[test]
    fn an_address_of_no_store_is_refused() {
        for url in ["runs/a", "ftp://host/a"] {
            let error = format!("{:#}", Mirror::open(url).err().unwrap());
            assert!(error.starts_with("checkpoint.mirror = "), "{error}");
        }
    }
}
