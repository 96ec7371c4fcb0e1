//! The checkpoints of a run: listing, atomic writing, retention, and copies in a mirror.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

use super::read::OtherFormat;
use super::sums::Damage;
use super::{CheckpointFormat, Mirror, OpenedCheckpoint, Snapshot, WinRates, WrittenCheckpoint};
use crate::status;
use crate::util::disk;
use crate::util::failpoints;

/// Suffix of a checkpoint that is being replaced by a newer one of the same step.
const REPLACED: &str = ".replaced";

/// Name of the file in a run's directory that marks a run without a checkpoint, which may be started again.
pub const PENDING: &str = "first-checkpoint.pending";

/// The checkpoint to resume from.
pub struct Latest {
    /// The latest undamaged checkpoint; `None` if the folder has no checkpoint.
    pub checkpoint: Option<OpenedCheckpoint>,
    /// Damaged checkpoints after it.
    pub damaged: Vec<PathBuf>,
}

/// Selection of a checkpoint that is kept in addition to the latest ones.
#[derive(Debug, Clone)]
pub enum BestCheckpoint {
    /// Keeps no additional checkpoint.
    None,
    /// Keeps the checkpoint with the highest figure in its `preceptor.json`.
    ByMetric,
    /// Keeps the checkpoint with the highest win rate, and those under evaluation.
    ByWinRate(WinRates),
}

/// The `checkpoints` folder of a run.
pub struct CheckpointStore {
    dir: PathBuf,
    /// Number of latest checkpoints that are kept.
    keep: usize,
    /// Checkpoint that is kept in addition.
    best: BestCheckpoint,
    /// Destination of copies.
    mirror: Option<Mirror>,
}

impl CheckpointStore {
    /// Creates a store for `run_dir/checkpoints` that keeps the last `keep` checkpoints and the `best` one. Removes
    /// unfinished checkpoints of a killed process.
    pub fn new(run_dir: &Path, keep: usize, best: BestCheckpoint) -> Self {
        let dir = run_dir.join("checkpoints");
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let replaced =
                name.strip_prefix('.').and_then(|name| name.strip_suffix(REPLACED)).map(|name| dir.join(name));
            let done = match replaced {
                // The process was killed between the two renames; the replaced checkpoint is the complete one.
                Some(path) if !path.exists() => std::fs::rename(entry.path(), path),
                Some(_) => std::fs::remove_dir_all(entry.path()),
                None if name.ends_with(".partial") => std::fs::remove_dir_all(entry.path()),
                None => Ok(()),
            };
            if let Err(error) = done {
                tracing::warn!("cannot clear {}: {error}", entry.path().display());
            }
        }
        Self { dir, keep: keep.max(1), best, mirror: None }
    }

    /// Sets the mirror that receives copies.
    pub fn mirrored(self, mirror: Option<Mirror>) -> Self {
        Self { mirror, ..self }
    }

    /// Returns the folder of the checkpoints.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes `snapshot` to a temporary directory, syncs it and renames it, so that an incomplete checkpoint never
    /// appears under its final name. Replaces a checkpoint of the same step, whose ledger is older. Then removes
    /// checkpoints that are no longer kept.
    ///
    /// # Errors
    /// If the checkpoint cannot be written. The error names the space that it takes.
    pub fn put(&self, format: &CheckpointFormat, snapshot: &Snapshot) -> Result<WrittenCheckpoint> {
        let began = Instant::now();
        let name = name(snapshot.step());
        let (partial, path) = (self.dir.join(format!(".{name}.partial")), self.dir.join(&name));
        let write = || -> Result<u64> {
            if partial.exists() {
                std::fs::remove_dir_all(&partial).with_context(|| format!("cannot clear {}", partial.display()))?;
            }
            std::fs::create_dir_all(&partial).map_err(|error| disk::cannot("make", &partial, error))?;
            sync_logs(&snapshot.files)?;
            failpoints::point("checkpoint.fill")?;
            let bytes = format.fill(&partial, snapshot)?;
            failpoints::point("checkpoint.rename")?;
            let replaced = self.dir.join(format!(".{name}{REPLACED}"));
            if path.exists() {
                std::fs::rename(&path, &replaced).with_context(|| format!("cannot rename {}", path.display()))?;
            }
            std::fs::rename(&partial, &path)
                .with_context(|| format!("cannot rename {} into place", partial.display()))?;
            failpoints::point("checkpoint.renamed")?;
            File::open(&self.dir)?.sync_all().with_context(|| format!("cannot sync {}", self.dir.display()))?;
            // A leftover is removed when the run is resumed.
            let _ = std::fs::remove_dir_all(replaced);
            let _ = std::fs::remove_file(self.dir.with_file_name(PENDING));
            Ok(bytes)
        };
        match write() {
            Ok(bytes) => {
                self.prune();
                Ok(WrittenCheckpoint { path, bytes, took: began.elapsed() })
            }
            Err(error) => {
                // The first error is more informative than one of this removal.
                let _ = std::fs::remove_dir_all(&partial);
                // Weights, and two moments of each in `f32`.
                let need = (snapshot.learner.policy.config().parameters() * (format.dtype.size_in_bytes() + 8)) >> 20;
                Err(error.context(format!(
                    "the checkpoint of step {} was not written; it takes about {need} MiB in {}",
                    snapshot.step(),
                    self.dir.display()
                )))
            }
        }
    }

    /// Copies the checkpoint at `path` to the mirror, if there is one.
    ///
    /// # Errors
    /// Names the file and the store. The next checkpoint is copied independently.
    pub fn copy(&self, path: &Path) -> Result<()> {
        self.mirror.as_ref().map_or(Ok(()), |mirror| mirror.put(path, self.keep))
    }

    /// Fetches the mirror's latest checkpoint, if it is later than the local ones.
    ///
    /// # Errors
    /// If the mirror does not respond or its copy is damaged.
    pub fn fetch_latest(&self) -> Result<Option<PathBuf>> {
        let Some(mirror) = &self.mirror else { return Ok(None) };
        let here = self.all()?.last().and_then(|path| step(path));
        // A set-aside checkpoint belongs to steps that the run has discarded.
        let aside = list(&self.dir)?;
        let left = |there: u64| aside.iter().any(|path| step_of_aside(path) == Some(there));
        match mirror.latest()?.filter(|there| Some(*there) > here && !left(*there)) {
            None => Ok(None),
            Some(step) => {
                std::fs::create_dir_all(&self.dir).with_context(|| format!("cannot create {}", self.dir.display()))?;
                mirror.fetch(&name(step), &self.dir).map(Some)
            }
        }
    }

    /// Copies another directory with checksums to the mirror, unless there is no mirror or it already has a copy.
    ///
    /// # Errors
    /// Names the file and the store.
    pub fn mirror_directory(&self, path: &Path) -> Result<()> {
        let (Some(mirror), Some(name)) = (&self.mirror, path.file_name()) else { return Ok(()) };
        if mirror.has(&name.to_string_lossy())? { Ok(()) } else { mirror.copy(path) }
    }

    /// Fetches the directory `path` from the mirror, if a copy exists and `path` does not.
    ///
    /// # Errors
    /// If the mirror does not respond or its copy is damaged.
    pub fn fetch_directory(&self, path: &Path) -> Result<Option<PathBuf>> {
        let (Some(mirror), Some(name), Some(into)) = (&self.mirror, path.file_name(), path.parent()) else {
            return Ok(None);
        };
        let name = name.to_string_lossy();
        if disk::exists(path)? || !mirror.has(&name)? { Ok(None) } else { mirror.fetch(&name, into).map(Some) }
    }

    /// Returns the paths of all complete checkpoints, oldest first.
    ///
    /// # Errors
    /// If the folder exists but cannot be listed.
    pub fn all(&self) -> Result<Vec<PathBuf>> {
        let mut all: Vec<PathBuf> = list(&self.dir)?.into_iter().filter(|path| step(path).is_some()).collect();
        all.sort_by_key(|path| step(path));
        Ok(all)
    }

    /// Opens the latest undamaged checkpoint. Damaged ones after it are reported to `report` and not changed.
    ///
    /// # Errors
    /// If all checkpoints are damaged, one has another format, or one cannot be read, which does not count as damage.
    pub fn latest(&self, mut report: impl FnMut(&str)) -> Result<Latest> {
        let mut damaged = Vec::new();
        let mut last = None;
        for path in self.all()?.into_iter().rev() {
            match OpenedCheckpoint::open(&path) {
                Ok(opened) => return Ok(Latest { checkpoint: Some(opened), damaged }),
                // Earlier checkpoints have the same format, and a file that cannot be read now may be readable later.
                Err(error) if error.downcast_ref::<Damage>().is_none() => {
                    let other = error.downcast_ref::<OtherFormat>().is_some();
                    let kept = if other { "" } else { "; nothing was changed: fix this and resume again" };
                    return Err(anyhow!("{error:#}{kept}"));
                }
                Err(error) => {
                    report(&format!("{error:#}; the previous checkpoint is used"));
                    damaged.push(path);
                    last = Some(error);
                }
            }
        }
        match last {
            None => Ok(Latest { checkpoint: None, damaged }),
            Some(error) => Err(error.context(format!(
                "no checkpoint in {} can be used, and nothing was changed; restore an undamaged copy, or move the run's directory away to start again",
                self.dir.display()
            ))),
        }
    }

    /// Returns the paths of the checkpoints after the step `after`, oldest first.
    ///
    /// # Errors
    /// See [`Self::all`].
    pub fn later(&self, after: u64) -> Result<Vec<PathBuf>> {
        Ok(self.all()?.into_iter().filter(|path| step(path) > Some(after)).collect())
    }

    /// Removes all checkpoints except the latest ones and the best one. A failure is logged, since it costs only space.
    fn prune(&self) {
        let all = match self.all() {
            Ok(all) => all,
            Err(error) => return tracing::warn!("{error:#}; no old checkpoint is removed"),
        };
        let old = &all[..all.len().saturating_sub(self.keep)];
        let steps: Vec<u64> = all.iter().filter_map(|path| step(path)).collect();
        let kept = match &self.best {
            BestCheckpoint::None => Vec::new(),
            BestCheckpoint::ByMetric => {
                let figures: Vec<Option<f64>> = all.iter().map(|path| figure(path)).collect();
                best(&figures).map(|i| steps[i]).into_iter().collect()
            }
            BestCheckpoint::ByWinRate(win_rates) => win_rates.retained(&steps),
        };
        for path in old.iter().filter(|path| step(path).is_some_and(|step| !kept.contains(&step))) {
            tracing::debug!("{} is no longer kept", path.display());
            if let Err(error) = remove(path) {
                tracing::warn!("cannot remove the old checkpoint {}: {error}", path.display());
            }
        }
    }
}

/// Renames a directory before it removes it, so that an incomplete one never has the name of a checkpoint.
fn remove(path: &Path) -> std::io::Result<()> {
    let partial = path.with_file_name(format!(".{}.partial", path.file_name().unwrap_or_default().to_string_lossy()));
    std::fs::rename(path, &partial)?;
    std::fs::remove_dir_all(partial)
}

/// Syncs the log files at `paths`. A file that was removed during the run is skipped with a message, because the
/// checkpoint is more important.
fn sync_logs(paths: &[PathBuf]) -> Result<()> {
    let mut there = Vec::new();
    for path in paths {
        if disk::exists(path)? {
            there.push(path.clone());
        } else {
            status!(
                "{} was removed or moved away during the run; the checkpoint is written without it",
                path.display()
            );
        }
    }
    disk::sync_all(&there)
}

/// Returns the paths of the entries of the folder `dir`; an empty list if the folder does not exist.
///
/// # Errors
/// If the folder cannot be listed.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let cannot = |error| disk::cannot("list", dir, error);
    match std::fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry.map_err(cannot)?.path())).collect(),
        Err(error) if disk::is_absence(&error) => Ok(Vec::new()),
        Err(error) => Err(cannot(error)),
    }
}

/// Returns an unused path next to the checkpoint at `path` to which it can be renamed, with a reason such as
/// "superseded" in its name.
///
/// # Errors
/// If a path cannot be checked.
pub fn aside_path(path: &Path, why: &str) -> Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for n in 1u64.. {
        let to = path.with_file_name(format!("{name}.{why}-{n}"));
        if !disk::exists(&to)? {
            return Ok(to);
        }
    }
    Err(anyhow!("no name is free next to {}", path.display()))
}

/// Returns the step of a set-aside checkpoint, parsed from its name.
pub fn step_of_aside(path: &Path) -> Option<u64> {
    let (name, why) = path.file_name()?.to_str()?.split_once('.')?;
    let (why, n) = why.split_once('-')?;
    let known = ["superseded", "damaged"].contains(&why) && n.parse::<u64>().is_ok();
    known.then(|| step(Path::new(name))).flatten()
}

/// Returns a hint for an error message, with the paths to which the checkpoint at `path` was set aside; empty if there
/// are none.
pub(super) fn aside_hint(path: &Path) -> String {
    let (Some(dir), Some(own)) = (path.parent(), step(path)) else { return String::new() };
    let aside = list(dir).unwrap_or_default().into_iter().filter(|path| step_of_aside(path) == Some(own));
    let mut aside: Vec<String> = aside.map(|path| path.display().to_string()).collect();
    aside.sort();
    if aside.is_empty() { String::new() } else { format!("; it was set aside as {}", aside.join(" and as ")) }
}

/// Returns the directory name of the checkpoint of `step`.
pub fn name(step: u64) -> String {
    format!("step-{step:06}")
}

/// Returns the step of a checkpoint, parsed from its directory name; `None` for other names.
pub fn step(path: &Path) -> Option<u64> {
    let digits = path.file_name()?.to_str()?.strip_prefix("step-")?;
    digits.bytes().all(|digit| digit.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

fn figure(path: &Path) -> Option<f64> {
    let text = std::fs::read_to_string(path.join("preceptor.json")).ok()?;
    serde_json::from_str::<serde_json::Value>(&text).ok()?["best"]["value"].as_f64()
}

/// Returns the index of the highest figure; of equal ones the last.
fn best(figures: &[Option<f64>]) -> Option<usize> {
    let known = figures.iter().enumerate().filter_map(|(i, figure)| figure.map(|figure| (i, figure)));
    known.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_and_the_best_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path(), 2, BestCheckpoint::ByMetric);
        for (step, value) in [(1, 0.5), (2, 0.9), (3, 0.1), (10, 0.2), (1_000_000, 0.3)] {
            let path = store.dir().join(name(step));
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("preceptor.json"), format!("{{\"best\": {{\"value\": {value}}}}}")).unwrap();
        }
        std::fs::create_dir_all(store.dir().join("step-000004.damaged-1")).unwrap();
        store.prune();
        let steps: Vec<u64> = store.all().unwrap().iter().filter_map(|path| step(path)).collect();
        assert_eq!(steps, [2, 10, 1_000_000]);
        assert_eq!(store.later(9).unwrap().len(), 2);
        let later = store.dir().join(name(10));
        std::fs::rename(&later, aside_path(&later, "superseded").unwrap()).unwrap();
        assert!(store.dir().join("step-000010.superseded-1").exists());
        assert!(aside_path(&later, "superseded").unwrap().ends_with("step-000010.superseded-2"));
        assert!(aside_hint(&later).ends_with("step-000010.superseded-1"), "{}", aside_hint(&later));
        std::fs::remove_dir_all(store.dir().join(name(1_000_000))).unwrap();
        let plain = CheckpointStore::new(dir.path(), 1, BestCheckpoint::None);
        std::fs::create_dir_all(plain.dir().join(name(3))).unwrap();
        std::fs::create_dir_all(plain.dir().join(".step-000005.partial")).unwrap();
        plain.prune();
        assert_eq!(plain.all().unwrap(), [plain.dir().join(name(3))]);
        // A process that was killed while it replaced a checkpoint left the old one, or both.
        std::fs::create_dir_all(plain.dir().join(".step-000007.replaced")).unwrap();
        std::fs::create_dir_all(plain.dir().join(".step-000003.replaced")).unwrap();
        CheckpointStore::new(dir.path(), 1, BestCheckpoint::None);
        let names: Vec<String> = std::fs::read_dir(plain.dir())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| !name.contains("damaged") && !name.contains("superseded"))
            .collect();
        assert!(
            names.len() == 2 && plain.all().unwrap() == [plain.dir().join(name(3)), plain.dir().join(name(7))],
            "{names:?}"
        );
    }
}
