//! The weights of a run in an object store, from which workers on other machines fetch them.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use object_store::ObjectStoreExt;

use crate::lm::model::Decoder;
use crate::pipeline::served::{FolderStore, SUMS, Stored, Tag, WeightStore, sha256};
use crate::status;
use crate::util::bucket::{Bucket, flat_error};

/// Time after which an upload is reported as slow. The client of object stores tries again for minutes before it reports a failure.
const SLOW: Duration = Duration::from_secs(30);

/// Store in an object store. Each version is written to a local folder first, and then uploaded: its files, and at last its
/// list of checksums, so that a folder with a list is complete.
pub struct BucketStore {
    local: FolderStore,
    bucket: Bucket,
}

impl BucketStore {
    /// Uploads to `bucket` what is written to `local`.
    pub fn new(local: FolderStore, bucket: Bucket) -> Self {
        Self { local, bucket }
    }

    /// Uploads the local folder `name`, whose list of checksums has the SHA-256 `sum`, unless the object store has it.
    fn upload(&self, name: &str, sum: &str) -> Result<()> {
        let (bucket, dir) = (&self.bucket, self.local.folder().join(name));
        let list = bucket.key(name, Path::new(SUMS));
        let upload = async {
            match bucket.store.get(&list).await {
                Ok(found) => {
                    if sha256(&found.bytes().await.map_err(flat_error)?) == sum {
                        return Ok(());
                    }
                    // Files of other weights under this name; without its list the folder does not count.
                    bucket.remove(name, SUMS).await?;
                }
                Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(flat_error(error)),
            }
            for entry in std::fs::read_dir(&dir)? {
                let path = entry?.path();
                if path.file_name() != Some(SUMS.as_ref()) {
                    bucket.upload(&path, &bucket.key(name, path.strip_prefix(&dir)?)).await?;
                }
            }
            bucket.upload(&dir.join(SUMS), &list).await
        };
        let told = async {
            tokio::pin!(upload);
            tokio::select! {
                done = &mut upload => return done,
                () = tokio::time::sleep(SLOW) => {}
            }
            status!("workers   the upload of {name} to {} takes longer than {} s", bucket.url, SLOW.as_secs());
            upload.await
        };
        bucket.wait(told).with_context(|| format!("cannot copy {name} to {} (cluster.store)", bucket.url))
    }
}

impl WeightStore for BucketStore {
    fn put(&self, tag: Tag, weights: &Decoder) -> Result<Stored> {
        let stored = self.local.put(tag, weights)?;
        self.upload(&tag.to_string(), &stored.sha256)?;
        Ok(Stored { location: format!("{}/{tag}", self.bucket.url), ..stored })
    }

    fn put_folder(&self, name: &str, fill: &dyn Fn(&Path) -> Result<()>) -> Result<String> {
        let sum = self.local.put_folder(name, fill)?;
        self.upload(name, &sum)?;
        Ok(sum)
    }

    fn retain(&self, run: u32, is_used: &dyn Fn(u64) -> bool) {
        self.local.retain(run, is_used);
        let bucket = &self.bucket;
        let stale = |name: &String| Tag::parse(name).is_some_and(|(of, version)| of == run && !is_used(version));
        let removed = bucket.wait(async { bucket.folders().await }).and_then(|folders| {
            let stale: Vec<String> = folders.into_iter().filter(stale).collect();
            bucket.wait(async {
                for name in &stale {
                    bucket.remove(name, SUMS).await?;
                }
                Ok(())
            })
        });
        if let Err(error) = removed {
            tracing::warn!("cannot remove old weights: {error:#}");
        }
    }

    fn cancel(&self) {
        self.bucket.cancel();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{DType, Device};
    use object_store::memory::InMemory;
    use object_store::{ObjectStore, PutPayload};

    use super::*;
    use crate::lm::model::{ModelConfig, Weights};

    fn names(bucket: &Bucket) -> Vec<String> {
        use futures_util::StreamExt;
        let list = async { Ok(bucket.store.list(None).map(|one| one.unwrap().location.to_string()).collect().await) };
        let mut names: Vec<String> = bucket.wait(list).unwrap();
        names.sort();
        names
    }

    #[test]
    fn versions_are_uploaded_completely_and_old_ones_removed() {
        let config = ModelConfig::tiny(50);
        let model = Decoder::new(&config, &Weights::scratch(&config, 0.2, 3, &Device::Cpu).unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let bucket = |memory: &Arc<dyn ObjectStore>| {
            Bucket::with_store(Arc::clone(memory), "runs/a".into(), "memory://runs/a", "cluster.store").unwrap()
        };
        let local = || FolderStore::new(&dir.path().join("local"), None, None, DType::F32).unwrap();
        let (store, seen) = (BucketStore::new(local(), bucket(&memory)), bucket(&memory));
        let fill = |dir: &Path| Ok(std::fs::write(dir.join("config.json"), "{}")?);
        store.put_folder("base-1", &fill).unwrap();
        let tag = Tag { run: 1, version: 3, fingerprint: 9 };
        let stored = store.put(tag, &model).unwrap();
        assert_eq!(stored.location, "memory://runs/a/policy-00000001-3-00000009");
        let version =
            ["runs/a/policy-00000001-3-00000009/SHA256SUMS", "runs/a/policy-00000001-3-00000009/model.safetensors"];
        let base = ["runs/a/base-1/SHA256SUMS", "runs/a/base-1/config.json"];
        assert_eq!(names(&seen), [&base[..], &version].concat());
        // A folder with the list of other files is replaced, one without a list completed.
        let key = seen.key("policy-00000001-3-00000009", Path::new(SUMS));
        seen.wait(async { Ok(seen.store.put(&key, PutPayload::from_static(b"other")).await?) }).unwrap();
        store.put(tag, &model).unwrap();
        let list = seen.wait(async { Ok(seen.store.get(&key).await?.bytes().await?) }).unwrap();
        assert_eq!(sha256(&list), stored.sha256);
        seen.wait(async { Ok(seen.store.delete(&key).await?) }).unwrap();
        store.put(tag, &model).unwrap();
        assert_eq!(names(&seen), [&base[..], &version].concat());
        // Versions of other runs, and bases, remain.
        let other = Tag { run: 2, ..tag };
        store.put(other, &model).unwrap();
        store.put(Tag { version: 4, ..tag }, &model).unwrap();
        store.retain(1, &|version| version > 3);
        let left = names(&seen);
        assert!(left.iter().all(|name| !name.contains("policy-00000001-3")), "{left:?}");
        assert_eq!(left.len(), 6, "{left:?}");
        store.cancel();
        let error = format!("{:#}", store.put(Tag { version: 5, ..tag }, &model).unwrap_err());
        assert!(error.contains("was stopped"), "{error}");
    }
}
