//! Folders of files in an object store (S3, Google Cloud Storage, a local folder): opening, upload, listing, removal.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use futures_util::StreamExt;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, WriteMultipart};
use tokio::io::AsyncReadExt;

/// Size in bytes of the parts of an upload; smaller files are uploaded at once.
pub const PART_BYTES: usize = 8 << 20;

/// Number of concurrent part uploads.
const CONCURRENT_PARTS: usize = 4;

/// Time between two looks whether work was cancelled.
const LOOK: Duration = Duration::from_millis(100);

/// Opens the location `url`: `s3://bucket/folder`, `gs://bucket/folder` or `file:///folder`. Region, endpoint and
/// credentials come from environment variables (`AWS_…`, `GOOGLE_…`). Returns the store and the folder's key. `name` is
/// the setting with the URL, for error messages.
///
/// # Errors
/// If the URL is invalid or names an unknown kind of store.
pub fn open(url: &str, name: &str) -> Result<(Arc<dyn ObjectStore>, Key)> {
    let parsed = url::Url::parse(url).with_context(|| format!("{name} = {url:?} is not a URL"))?;
    if parsed.scheme() == "file" {
        let path = parsed.to_file_path().map_err(|()| anyhow!("{name} = {url:?} does not name a folder"))?;
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    let variables = std::env::vars().map(|(name, value)| (name.to_lowercase(), value));
    let (store, prefix) = object_store::parse_url_opts(&parsed, variables).with_context(|| {
        format!("{name} = {url:?} cannot be used; give s3://bucket/folder, gs://bucket/folder or file:///folder, and credentials in the environment")
    })?;
    Ok((Arc::from(store), prefix))
}

/// Drops the chain of causes, which the store's error already contains in its own message.
pub fn flat_error(error: object_store::Error) -> anyhow::Error {
    anyhow!("{error}")
}

/// A location in an object store, with a thread for its transfers.
pub struct Bucket {
    /// The store.
    pub store: Arc<dyn ObjectStore>,
    /// Key of the location, above all keys that are used.
    pub prefix: Key,
    /// Name of the location in messages.
    pub url: String,
    runtime: Option<tokio::runtime::Runtime>,
    cancelled: AtomicBool,
}

impl Bucket {
    /// Opens the location `url`; see [`open`].
    ///
    /// # Errors
    /// If the URL cannot be used, or the thread cannot be started.
    pub fn open(url: &str, name: &str) -> Result<Self> {
        let (store, prefix) = open(url, name)?;
        Self::with_store(store, prefix, url, name)
    }

    /// Creates a location below `prefix` in `store`; `url` and the setting `name` are its names in messages.
    ///
    /// # Errors
    /// If its thread cannot be started.
    pub fn with_store(store: Arc<dyn ObjectStore>, prefix: Key, url: &str, name: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("bucket")
            .enable_all()
            .build()
            .with_context(|| format!("cannot start the thread for {name}"))?;
        Ok(Self { store, prefix, url: url.to_owned(), runtime: Some(runtime), cancelled: AtomicBool::new(false) })
    }

    /// Runs `work` on the location's own runtime and blocks until it ends, or until [`Self::cancel`] is called. Can be
    /// called from any thread, including an async one.
    ///
    /// # Errors
    /// Those of `work`, and cancellation.
    pub fn wait<T: Send>(&self, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
        let runtime = self.runtime.as_ref().context("internal error: the location is closed")?;
        let cancelled = async {
            while !self.cancelled.load(Ordering::SeqCst) {
                tokio::time::sleep(LOOK).await;
            }
        };
        let until_cancelled = async {
            tokio::select! {
                // Work that is done at once must not begin after the end.
                biased;
                () = cancelled => bail!("the transfer with {} was stopped", self.url),
                done = work => done,
            }
        };
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| runtime.block_on(until_cancelled));
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Ends transfers under way and later ones with an error.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Returns the key of the file `inside` of the folder `name`.
    pub fn key(&self, name: &str, inside: &Path) -> Key {
        let start = self.prefix.clone().join(name);
        inside.iter().fold(start, |key, part| key.join(part.to_string_lossy().as_ref()))
    }

    /// Returns the names of all folders, complete or not.
    ///
    /// # Errors
    /// If the store does not respond.
    pub async fn folders(&self) -> Result<Vec<String>> {
        let listed = self.store.list_with_delimiter(Some(&self.prefix)).await.map_err(flat_error);
        let listed = listed.with_context(|| format!("{} cannot be listed", self.url))?;
        Ok(listed.common_prefixes.iter().filter_map(|folder| folder.filename().map(str::to_owned)).collect())
    }

    /// Uploads `file` as the object `key`; a large file in parts.
    ///
    /// # Errors
    /// If the file cannot be read, or the store refuses it or does not respond.
    pub async fn upload(&self, file: &Path, key: &Key) -> Result<()> {
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
            let read = match open.read(&mut buffer).await {
                Ok(read) => parts.wait_for_capacity(CONCURRENT_PARTS).await.map_err(flat_error).map(|()| read),
                Err(error) => Err(error.into()),
            };
            match read {
                Ok(0) => break,
                Ok(n) => parts.write(&buffer[..n]),
                Err(error) => {
                    // Parts of an upload that is neither completed nor aborted would be paid for.
                    if let Err(failure) = parts.abort().await {
                        tracing::warn!("parts of {key} remain in {}: {failure}", self.url);
                    }
                    return Err(error);
                }
            }
        }
        parts.finish().await.map_err(flat_error)?;
        Ok(())
    }

    /// Removes the folder `name`, its file `first` before all others, so that a partly removed folder does not count.
    ///
    /// # Errors
    /// If the store does not respond.
    pub async fn remove(&self, name: &str, first: &str) -> Result<()> {
        let cannot = || format!("{name} in {} cannot be removed", self.url);
        match self.store.delete(&self.key(name, Path::new(first))).await {
            // A folder whose upload broke off has no such file.
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(flat_error(error)).with_context(cannot),
        }
        let mut listed = self.store.list(Some(&self.key(name, Path::new(""))));
        while let Some(object) = listed.next().await {
            let object = object.map_err(flat_error).with_context(cannot)?;
            self.store.delete(&object.location).await.map_err(flat_error).with_context(cannot)?;
        }
        Ok(())
    }
}

impl Drop for Bucket {
    fn drop(&mut self) {
        // No task is running at this point. Shutting down in the background is allowed on an async thread.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
