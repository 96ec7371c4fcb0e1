//! Where a run's checkpoints stand: which there are, which are kept, and how one comes to be there whole.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

use super::read::Unreadable;
use super::sums::Damage;
use super::{CheckpointFormat, Mirror, Opened, Snapshot, WinRates, Written};
use crate::status;
use crate::util::disk;
use crate::util::failpoints;

/// What follows the name of a checkpoint whose place a newer one of the same step takes.
const REPLACED: &str = ".replaced";

/// Names the file in a run's directory that says that the run has had no checkpoint yet, so that it may be begun again.
pub const PENDING: &str = "first-checkpoint.pending";

/// The checkpoint to resume from.
pub struct Latest {
    /// The latest one that is complete and undamaged; none where the folder has no checkpoint.
    pub checkpoint: Option<Opened>,
    /// Later ones that are damaged.
    pub damaged: Vec<PathBuf>,
}

/// Which checkpoint is kept besides the latest ones.
#[derive(Debug, Clone)]
pub enum Best {
    /// None.
    None,
    /// The one with the highest figure in its `preceptor.json`.
    Figure,
    /// The one with the highest win rate.
    WinRate(WinRates),
}

/// A run's `checkpoints` folder.
pub struct CheckpointStore {
    dir: PathBuf,
    /// The last ones that are kept.
    keep: usize,
    /// The one that is kept besides.
    best: Best,
    /// Where copies go.
    mirror: Option<Mirror>,
}

impl CheckpointStore {
    /// Checkpoints under `run_dir/checkpoints`, of which the last `keep` are kept, and the `best`. Of one that was never
    /// finished, nothing is left.
    pub fn new(run_dir: &Path, keep: usize, best: Best) -> Self {
        let dir = run_dir.join("checkpoints");
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let replaced =
                name.strip_prefix('.').and_then(|name| name.strip_suffix(REPLACED)).map(|name| dir.join(name));
            let done = match replaced {
                // The program died between the two renames: the old one is the one that is whole.
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

    /// The same, with copies in `mirror`.
    pub fn mirrored(self, mirror: Option<Mirror>) -> Self {
        Self { mirror, ..self }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes `snapshot` aside, syncs it, renames it: whatever happens in between leaves no half of one. It takes the place
    /// of one of the same step, which knows less of what is under way.
    ///
    /// # Errors
    /// Names what could not be written, with the room it takes.
    pub fn put(&self, form: &CheckpointFormat, snapshot: &Snapshot) -> Result<Written> {
        let began = Instant::now();
        let name = name(snapshot.step());
        let (aside, path) = (self.dir.join(format!(".{name}.partial")), self.dir.join(&name));
        let write = || -> Result<u64> {
            if aside.exists() {
                std::fs::remove_dir_all(&aside).with_context(|| format!("cannot clear {}", aside.display()))?;
            }
            std::fs::create_dir_all(&aside).map_err(|error| disk::cannot("make", &aside, error))?;
            sync_logs(&snapshot.files)?;
            failpoints::point("checkpoint.fill")?;
            let bytes = form.fill(&aside, snapshot)?;
            failpoints::point("checkpoint.rename")?;
            let replaced = self.dir.join(format!(".{name}{REPLACED}"));
            if path.exists() {
                std::fs::rename(&path, &replaced).with_context(|| format!("cannot rename {}", path.display()))?;
            }
            std::fs::rename(&aside, &path).with_context(|| format!("cannot rename {} into place", aside.display()))?;
            failpoints::point("checkpoint.renamed")?;
            File::open(&self.dir)?.sync_all().with_context(|| format!("cannot sync {}", self.dir.display()))?;
            // If one of them stays, it is removed when the run is resumed.
            let _ = std::fs::remove_dir_all(replaced);
            let _ = std::fs::remove_file(self.dir.with_file_name(PENDING));
            Ok(bytes)
        };
        match write() {
            Ok(bytes) => {
                self.prune();
                Ok(Written { path, bytes, took: began.elapsed() })
            }
            Err(error) => {
                // What was written aside is of no use; if it cannot be removed either, the first error says more.
                let _ = std::fs::remove_dir_all(&aside);
                // Weights, and two moments of each.
                let need = (snapshot.learner.policy.config().parameters() * (form.dtype.size_in_bytes() + 8)) >> 20;
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
    /// What could not be copied where. The next one is tried anew.
    pub fn copy(&self, path: &Path) -> Result<()> {
        self.mirror.as_ref().map_or(Ok(()), |mirror| mirror.put(path, self.keep))
    }

    /// Brings the mirror's latest here, if it is later than what is here.
    ///
    /// # Errors
    /// A mirror that does not answer, or whose copy is damaged.
    pub fn bring(&self) -> Result<Option<PathBuf>> {
        let Some(mirror) = &self.mirror else { return Ok(None) };
        let here = self.all()?.last().and_then(|path| step(path));
        // One that was set aside here belongs to steps that the run left.
        let aside = list(&self.dir)?;
        let left = |there: u64| aside.iter().any(|path| step_set_aside(path) == Some(there));
        match mirror.latest()?.filter(|there| Some(*there) > here && !left(*there)) {
            None => Ok(None),
            Some(step) => {
                std::fs::create_dir_all(&self.dir).with_context(|| format!("cannot make {}", self.dir.display()))?;
                mirror.fetch(&name(step), &self.dir).map(Some)
            }
        }
    }

    /// Copies what belongs to the run beside its checkpoints, sealed as they are, to the mirror, if there is one and it has
    /// no such copy yet.
    ///
    /// # Errors
    /// What could not be copied where.
    pub fn copy_beside(&self, path: &Path) -> Result<()> {
        let (Some(mirror), Some(name)) = (&self.mirror, path.file_name()) else { return Ok(()) };
        if mirror.has(&name.to_string_lossy())? { Ok(()) } else { mirror.copy(path) }
    }

    /// Brings what stands in the mirror as `path` does here, if it is there and not here.
    ///
    /// # Errors
    /// A mirror that does not answer, or whose copy is damaged.
    pub fn bring_beside(&self, path: &Path) -> Result<Option<PathBuf>> {
        let (Some(mirror), Some(name), Some(into)) = (&self.mirror, path.file_name(), path.parent()) else {
            return Ok(None);
        };
        let name = name.to_string_lossy();
        if disk::exists(path)? || !mirror.has(&name)? { Ok(None) } else { mirror.fetch(&name, into).map(Some) }
    }

    /// All that are complete, oldest first.
    ///
    /// # Errors
    /// A folder that is there and cannot be listed.
    pub fn all(&self) -> Result<Vec<PathBuf>> {
        let mut all: Vec<PathBuf> = list(&self.dir)?.into_iter().filter(|path| step(path).is_some()).collect();
        all.sort_by_key(|path| step(path));
        Ok(all)
    }

    /// The latest that is undamaged. Those after it that are damaged are told, and stay where they are.
    ///
    /// # Errors
    /// Every checkpoint is damaged; one has another format; or one cannot be read, which does not count as damage.
    pub fn latest(&self, mut tell: impl FnMut(&str)) -> Result<Latest> {
        let mut damaged = Vec::new();
        let mut last = None;
        for path in self.all()?.into_iter().rev() {
            match Opened::open(&path) {
                Ok(opened) => return Ok(Latest { checkpoint: Some(opened), damaged }),
                // The ones before are of the same format, and a file that cannot be read now can perhaps be read later.
                Err(error) if error.downcast_ref::<Damage>().is_none() => {
                    let other = error.downcast_ref::<Unreadable>().is_some();
                    let kept = if other { "" } else { "; nothing was changed: mend that, and resume again" };
                    return Err(anyhow!("{error:#}{kept}"));
                }
                Err(error) => {
                    tell(&format!("{error:#}; the checkpoint before it is used"));
                    damaged.push(path);
                    last = Some(error);
                }
            }
        }
        match last {
            None => Ok(Latest { checkpoint: None, damaged }),
            Some(error) => Err(error.context(format!(
                "no checkpoint in {} can be used, and nothing was changed; put an undamaged copy back, or move the run's directory away to begin again",
                self.dir.display()
            ))),
        }
    }

    /// The ones after `step`, oldest first.
    ///
    /// # Errors
    /// As [`Self::all`].
    pub fn later(&self, than: u64) -> Result<Vec<PathBuf>> {
        Ok(self.all()?.into_iter().filter(|path| step(path) > Some(than)).collect())
    }

    /// Removes all but the last few and the best. One that cannot be removed only costs room.
    fn prune(&self) {
        let all = match self.all() {
            Ok(all) => all,
            Err(error) => return tracing::warn!("{error:#}; no old checkpoint is removed"),
        };
        let old = &all[..all.len().saturating_sub(self.keep)];
        let steps: Vec<u64> = all.iter().filter_map(|path| step(path)).collect();
        let kept = match &self.best {
            Best::None => Vec::new(),
            Best::Figure => {
                let figures: Vec<Option<f64>> = all.iter().map(|path| figure(path)).collect();
                best(&figures).map(|i| steps[i]).into_iter().collect()
            }
            Best::WinRate(win_rates) => win_rates.kept(&steps),
        };
        for path in old.iter().filter(|path| step(path).is_some_and(|step| !kept.contains(&step))) {
            tracing::debug!("{} is no longer kept", path.display());
            if let Err(error) = remove(path) {
                tracing::warn!("cannot remove the old checkpoint {}: {error}", path.display());
            }
        }
    }
}

/// Out of the way first, so that no half of it is ever seen under its name.
fn remove(path: &Path) -> std::io::Result<()> {
    let aside = path.with_file_name(format!(".{}.partial", path.file_name().unwrap_or_default().to_string_lossy()));
    std::fs::rename(path, &aside)?;
    std::fs::remove_dir_all(aside)
}

/// Waits until the logs at `paths` are on the disk. Where one was removed or moved away during the run, the checkpoint is
/// written all the same: it is all that is left.
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
/// A folder that cannot be listed.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let cannot = |error| disk::cannot("list", dir, error);
    match std::fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry.map_err(cannot)?.path())).collect(),
        Err(error) if disk::is_absence(&error) => Ok(Vec::new()),
        Err(error) => Err(cannot(error)),
    }
}

/// Returns a free name in the folder of the checkpoint at `path`, under which it can be set aside for a reason such as
/// "superseded".
///
/// # Errors
/// A name that cannot be looked at.
pub fn name_aside(path: &Path, why: &str) -> Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for n in 1u64.. {
        let to = path.with_file_name(format!("{name}.{why}-{n}"));
        if !disk::exists(&to)? {
            return Ok(to);
        }
    }
    Err(anyhow!("no name is free beside {}", path.display()))
}

/// The step of a checkpoint that was set aside, from its name.
pub fn step_set_aside(path: &Path) -> Option<u64> {
    let (name, why) = path.file_name()?.to_str()?.split_once('.')?;
    let (why, n) = why.split_once('-')?;
    let known = ["superseded", "damaged"].contains(&why) && n.parse::<u64>().is_ok();
    known.then(|| step(Path::new(name))).flatten()
}

/// Where the checkpoint that was at `path` may be now, for an error; empty where nobody knows.
pub(super) fn set_aside_as(path: &Path) -> String {
    let (Some(dir), Some(own)) = (path.parent(), step(path)) else { return String::new() };
    let aside = list(dir).unwrap_or_default().into_iter().filter(|path| step_set_aside(path) == Some(own));
    let mut aside: Vec<String> = aside.map(|path| path.display().to_string()).collect();
    aside.sort();
    if aside.is_empty() { String::new() } else { format!("; it was set aside as {}", aside.join(" and as ")) }
}

/// What the checkpoint of `step` is called.
pub fn name(step: u64) -> String {
    format!("step-{step:06}")
}

/// The step of a checkpoint's directory, if it is one.
pub fn step(path: &Path) -> Option<u64> {
    let digits = path.file_name()?.to_str()?.strip_prefix("step-")?;
    digits.bytes().all(|digit| digit.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

fn figure(path: &Path) -> Option<f64> {
    let text = std::fs::read_to_string(path.join("preceptor.json")).ok()?;
    serde_json::from_str::<serde_json::Value>(&text).ok()?["best"]["value"].as_f64()
}

/// The place of the highest figure; of equal ones the later.
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
        let shelf = CheckpointStore::new(dir.path(), 2, Best::Figure);
        for (step, value) in [(1, 0.5), (2, 0.9), (3, 0.1), (10, 0.2), (1_000_000, 0.3)] {
            let path = shelf.dir().join(name(step));
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("preceptor.json"), format!("{{\"best\": {{\"value\": {value}}}}}")).unwrap();
        }
        std::fs::create_dir_all(shelf.dir().join("step-000004.damaged-1")).unwrap();
        shelf.prune();
        let steps: Vec<u64> = shelf.all().unwrap().iter().filter_map(|path| step(path)).collect();
        assert_eq!(steps, [2, 10, 1_000_000]);
        assert_eq!(shelf.later(9).unwrap().len(), 2);
        let later = shelf.dir().join(name(10));
        std::fs::rename(&later, name_aside(&later, "superseded").unwrap()).unwrap();
        assert!(shelf.dir().join("step-000010.superseded-1").exists());
        assert!(name_aside(&later, "superseded").unwrap().ends_with("step-000010.superseded-2"));
        assert!(set_aside_as(&later).ends_with("step-000010.superseded-1"), "{}", set_aside_as(&later));
        std::fs::remove_dir_all(shelf.dir().join(name(1_000_000))).unwrap();
        let plain = CheckpointStore::new(dir.path(), 1, Best::None);
        std::fs::create_dir_all(plain.dir().join(name(3))).unwrap();
        std::fs::create_dir_all(plain.dir().join(".step-000005.partial")).unwrap();
        plain.prune();
        assert_eq!(plain.all().unwrap(), [plain.dir().join(name(3))]);
        // A program that died while it replaced one left the old one beside, or both.
        std::fs::create_dir_all(plain.dir().join(".step-000007.replaced")).unwrap();
        std::fs::create_dir_all(plain.dir().join(".step-000003.replaced")).unwrap();
        CheckpointStore::new(dir.path(), 1, Best::None);
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
