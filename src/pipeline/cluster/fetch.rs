//! The weights of a run as a worker reads them: from a folder that its machine sees, or fetched from an object store or an
//! HTTP server into a local folder.

mod download;
mod origin;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::protocol::WeightsNotice;
use crate::config::WeightsPlace;
use crate::lm::source::ResolveOptions;
use crate::pipeline::served::{is_plain, verify};
use crate::status;
use crate::util::disk;
use download::{Downloads, Job};
use origin::{FailureKind, Origin};

/// Time between two lines about a long download of the base model.
const TOLD: Duration = Duration::from_secs(10);
/// Time between two looks for the end of a download.
const LOOK: Duration = Duration::from_millis(200);
/// Maximum number of workers of a machine that fetch weights into one cache.
const MOST_WORKERS: usize = 1024;

/// Bearer token of an HTTP server. It has no readable `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct StoreToken(String);

impl StoreToken {
    /// Takes the value of an environment variable.
    pub fn new(token: String) -> Self {
        Self(token)
    }
}

impl std::fmt::Debug for StoreToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StoreToken(…)")
    }
}

/// Where a worker reads weights.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StorePlan {
    /// Place of the weights; `None` if it is that of the coordinator.
    pub place: Option<WeightsPlace>,
    /// Bearer token for a place on an HTTP server.
    pub token: Option<StoreToken>,
    /// Folder for fetched weights; `None` for `weights` in the cache of the program.
    pub cache: Option<PathBuf>,
}

/// The weights of a run, on this machine.
pub enum WorkerStore {
    /// A folder that this machine sees.
    Folder(PathBuf),
    /// A local folder to which a thread fetches what is wanted.
    Fetched(Fetched),
}

/// Weights that a thread fetches.
pub struct Fetched {
    place: WeightsPlace,
    folder: PathBuf,
    downloads: Downloads,
    /// Locked for as long as this process uses the folder.
    _lock: std::fs::File,
}

impl WorkerStore {
    /// Opens the store of the run `run`, whose coordinator announced `announced` as the place of its weights. `earlier` is
    /// the store of another lineage, which is used again if its place is the same.
    ///
    /// # Errors
    /// If the folder does not exist here, the URL cannot be used, or there is no local folder to fetch to.
    pub fn open(plan: &StorePlan, run: &str, announced: &str, earlier: Option<Self>) -> Result<Self> {
        let place = match &plan.place {
            Some(place) => place.clone(),
            None => WeightsPlace::parse(announced).map_err(|error| {
                anyhow::anyhow!(
                    "the run's place of weights is not known to this program: {error}; give it with --store"
                )
            })?,
        };
        if let WeightsPlace::Folder(folder) = &place {
            if !disk::exists(folder)? {
                ensure!(plan.place.is_none(), "--store {} does not exist on this machine", folder.display());
                bail!(
                    "the run's weights are in the folder {} of its node's machine, which does not exist here; mount it here and give its path with --store DIR, or fetch them from the node's HTTP server with --store http://NODE:PORT/weights (its serve.listen), or set cluster.store = \"s3://BUCKET/FOLDER\" in the configuration of the run",
                    folder.display()
                );
            }
            return Ok(Self::Folder(folder.clone()));
        }
        if let Some(Self::Fetched(earlier)) = earlier
            && earlier.place == place
        {
            return Ok(Self::Fetched(earlier));
        }
        let token = plan.token.clone().filter(|_| plan.place.is_some());
        let origin = Origin::open(&place, token)?;
        let cache = plan.cache.clone().unwrap_or_else(|| ResolveOptions::default().cache_dir.join("weights"));
        let (folder, lock) = own_folder(&cache.join(run), "--cache")?;
        status!("worker    fetches weights from {place} to {}", folder.display());
        let downloads = Downloads::start(origin, folder.clone())?;
        Ok(Self::Fetched(Fetched { place, folder, downloads, _lock: lock }))
    }

    /// Returns the folder of a model, given by its name and the SHA-256 of its list of checksums, once it is here and verified;
    /// `None` if `is_over` returned true before. A store that cannot be read is tried again for as long as `patience` without
    /// any progress.
    ///
    /// # Errors
    /// If the folder is missing or damaged, or the store refuses this worker or cannot be read for too long.
    pub fn folder(
        &self,
        (name, sha256): (&str, &str),
        patience: Duration,
        is_over: &dyn Fn() -> bool,
    ) -> Result<Option<PathBuf>> {
        ensure!(is_plain(name), "the run's model has the name {name:?}, which no store has");
        let fetched = match self {
            Self::Fetched(fetched) => fetched,
            Self::Folder(store) => {
                let dir = store.join(name);
                verify(&dir, sha256).with_context(|| {
                    format!(
                        "the model of the run cannot be read in {}; give the place of its weights with --store",
                        store.display()
                    )
                })?;
                return Ok(Some(dir));
            }
        };
        let downloads = &fetched.downloads;
        downloads.want(Job { name: name.to_owned(), sha256: sha256.to_owned(), notice: None });
        let (mut moved, mut told, mut bytes) = (Instant::now(), Instant::now(), downloads.bytes());
        let before = bytes;
        loop {
            if downloads.take(name, LOOK).is_some() {
                return Ok(Some(fetched.folder.join(name)));
            }
            if is_over() {
                return Ok(None);
            }
            let (now, trouble) = (downloads.bytes(), downloads.trouble());
            // To download a damaged file again is no progress.
            let is_useful = trouble.as_ref().is_none_or(|trouble| trouble.kind == FailureKind::Interrupted);
            if now > bytes && is_useful {
                moved = Instant::now();
            }
            bytes = now;
            if let Some(trouble) = trouble {
                let refused = trouble.kind == FailureKind::Refused;
                ensure!(!refused, "the model of the run cannot be fetched: {}", trouble.why);
                ensure!(
                    moved.elapsed() < patience,
                    "the model of the run could not be fetched within {} s: {}; correct --store, or start the run's node",
                    patience.as_secs(),
                    trouble.why
                );
            } else if told.elapsed() >= TOLD {
                told = Instant::now();
                status!("worker    has fetched {:.1} MB of the run's model", (bytes - before) as f64 / 1e6);
            }
        }
    }

    /// Returns weights that can be loaded, with their verified folder: those of `notice` if the store is a folder; else the
    /// last ones that were fetched, while those of `notice` are fetched. `None` if there are none yet.
    ///
    /// # Errors
    /// If a file of a folder is damaged.
    pub fn follow(&self, notice: WeightsNotice) -> Result<Option<(WeightsNotice, PathBuf)>> {
        ensure!(is_plain(&notice.name), "the weights have the name {:?}, which no store has", notice.name);
        let fetched = match self {
            Self::Fetched(fetched) => fetched,
            Self::Folder(store) => {
                let dir = store.join(&notice.name);
                return match verify(&dir, &notice.sha256) {
                    Ok(()) => Ok(Some((notice, dir))),
                    // A newer version may have replaced it meanwhile.
                    Err(error) if !dir.exists() => {
                        tracing::warn!("version {} is no longer there: {error:#}", notice.version);
                        Ok(None)
                    }
                    Err(error) => Err(error),
                };
            }
        };
        let lineage = notice.lineage;
        let here = fetched.downloads.follow(notice).filter(|here| here.lineage == lineage);
        Ok(here.map(|here| {
            let dir = fetched.folder.join(&here.name);
            (here, dir)
        }))
    }

    /// Returns why weights cannot be fetched, while that is so.
    pub fn trouble(&self) -> Option<String> {
        match self {
            Self::Folder(_) => None,
            Self::Fetched(fetched) => fetched.downloads.trouble().map(|trouble| trouble.why),
        }
    }
}

/// Returns a folder below `run` that no other process uses, with its lock. A folder that an earlier process left is used
/// again, so that its downloads continue. `option` is the option that names another place.
pub(super) fn own_folder(run: &Path, option: &str) -> Result<(PathBuf, std::fs::File)> {
    for number in 0..MOST_WORKERS {
        let folder = run.join(number.to_string());
        std::fs::create_dir_all(&folder).map_err(|error| disk::cannot("create", &folder, error)).with_context(
            || format!("the folder for weights cannot be used; name another one with {option}, or set PRECEPTOR_CACHE"),
        )?;
        let path = folder.join("lock");
        let file = std::fs::File::create(&path).map_err(|error| disk::cannot("write", &path, error))?;
        match file.try_lock() {
            Ok(()) => return Ok((folder, file)),
            Err(std::fs::TryLockError::WouldBlock) => {}
            Err(std::fs::TryLockError::Error(error)) => return Err(disk::cannot("lock", &path, error)),
        }
    }
    bail!("{} is used by {MOST_WORKERS} workers; give another folder with {option}", run.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_folder_names_the_ways_to_reach_the_weights() {
        let open =
            |plan: &StorePlan| format!("{:#}", WorkerStore::open(plan, "r", "/nowhere/weights", None).err().unwrap());
        let error = open(&StorePlan::default());
        for remedy in ["--store DIR", "--store http://NODE:PORT/weights", "cluster.store = \"s3://BUCKET/FOLDER\""] {
            assert!(error.contains(remedy), "{error}");
        }
        let place = Some(WeightsPlace::Folder("/nowhere".into()));
        let error = open(&StorePlan { place, ..StorePlan::default() });
        assert!(error.contains("--store /nowhere does not exist on this machine"), "{error}");
    }

    #[test]
    fn a_token_is_not_shown_and_each_process_has_a_folder() {
        assert!(!format!("{:?}", StoreToken::new("secret".into())).contains("secret"));
        let dir = tempfile::tempdir().unwrap();
        let first = own_folder(dir.path(), "--cache").unwrap();
        let second = own_folder(dir.path(), "--cache").unwrap();
        assert_ne!(first.0, second.0);
        let again = first.0.clone();
        drop(first);
        assert_eq!(own_folder(dir.path(), "--cache").unwrap().0, again, "a folder that nobody uses is used again");
    }
}
