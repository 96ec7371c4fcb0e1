//! Where a run's checkpoints stand: which there are, which are kept, and how one comes to be there whole.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

use super::{Form, Mirror, Opened, Snapshot, Written};
use crate::fault;

/// What follows the name of a checkpoint whose place a newer one of the same step takes.
const REPLACED: &str = ".replaced";

/// A run's `checkpoints` folder.
pub struct Shelf {
    dir: PathBuf,
    /// The last ones that are kept.
    keep: usize,
    /// Whether the best one is, besides.
    best: bool,
    /// Where copies go.
    mirror: Option<Mirror>,
}

impl Shelf {
    /// Checkpoints under `run_dir/checkpoints`, the last `keep` kept, and the `best` if there is one. Of one that was never
    /// finished, nothing is left.
    pub fn new(run_dir: &Path, keep: usize, best: bool) -> Self {
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
    pub fn put(&self, form: &Form, snapshot: &Snapshot) -> Result<Written> {
        let began = Instant::now();
        let name = name(snapshot.step());
        let (aside, path) = (self.dir.join(format!(".{name}.partial")), self.dir.join(&name));
        let write = || -> Result<u64> {
            if aside.exists() {
                std::fs::remove_dir_all(&aside).with_context(|| format!("cannot clear {}", aside.display()))?;
            }
            std::fs::create_dir_all(&aside).with_context(|| format!("cannot make {}", aside.display()))?;
            for file in &snapshot.files {
                let synced = File::open(file).and_then(|file| file.sync_all());
                synced.with_context(|| format!("cannot sync {}", file.display()))?;
            }
            fault::point("checkpoint.fill")?;
            let bytes = form.fill(&aside, snapshot)?;
            fault::point("checkpoint.rename")?;
            let replaced = self.dir.join(format!(".{name}{REPLACED}"));
            if path.exists() {
                std::fs::rename(&path, &replaced).with_context(|| format!("cannot rename {}", path.display()))?;
            }
            std::fs::rename(&aside, &path).with_context(|| format!("cannot rename {} into place", aside.display()))?;
            fault::point("checkpoint.renamed")?;
            File::open(&self.dir)?.sync_all().with_context(|| format!("cannot sync {}", self.dir.display()))?;
            // If it stays, it is removed when the run is resumed.
            let _ = std::fs::remove_dir_all(replaced);
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
        let here = self.all().last().and_then(|path| step(path));
        match mirror.latest()?.filter(|there| Some(*there) > here) {
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
        if path.exists() || !mirror.has(&name)? { Ok(None) } else { mirror.fetch(&name, into).map(Some) }
    }

    /// All that are complete, oldest first.
    pub fn all(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut all: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| step(path).is_some()).collect();
        all.sort_by_key(|path| step(path));
        all
    }

    /// The latest that is whole. Those after it that are damaged are told, and set aside.
    ///
    /// # Errors
    /// There are some, and none can be used.
    pub fn latest(&self, mut tell: impl FnMut(&str)) -> Result<Option<Opened>> {
        let all = self.all();
        let mut last = None;
        for path in all.iter().rev() {
            match Opened::open(path) {
                Ok(opened) => return Ok(Some(opened)),
                // What this program cannot read is no damage, and the one before is of the same kind.
                Err(error) if error.downcast_ref::<super::read::Unreadable>().is_some() => return Err(error),
                Err(error) => {
                    tell(&format!("{error:#}; the checkpoint before it is used"));
                    set_aside(path, "damaged")?;
                    last = Some(error);
                }
            }
        }
        match last {
            None => Ok(None),
            Some(error) => Err(error.context(format!("no checkpoint in {} can be used", self.dir.display()))),
        }
    }

    /// Sets aside what comes after `step`: the run goes on from there on another way.
    ///
    /// # Errors
    /// Names the directory that cannot be renamed.
    pub fn supersede(&self, after: u64) -> Result<Vec<PathBuf>> {
        let later: Vec<PathBuf> = self.all().into_iter().filter(|path| step(path) > Some(after)).collect();
        later.iter().map(|path| set_aside(path, "superseded")).collect()
    }

    /// Removes all but the last few and the best. One that cannot be removed only costs room.
    fn prune(&self) {
        let all = self.all();
        let old = &all[..all.len().saturating_sub(self.keep)];
        let figures: Vec<Option<f64>> = all.iter().map(|path| figure(path)).collect();
        let best = self.best.then(|| best(&figures)).flatten();
        for (i, path) in old.iter().enumerate().filter(|(i, _)| Some(*i) != best) {
            tracing::debug!("checkpoint {i} is no longer kept");
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

fn set_aside(path: &Path, why: &str) -> Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let free = (1..).map(|n| path.with_file_name(format!("{name}.{why}-{n}"))).find(|to| !to.exists());
    let to = free.ok_or_else(|| anyhow!("no name is free beside {}", path.display()))?;
    std::fs::rename(path, &to).with_context(|| format!("cannot set {} aside", path.display()))?;
    Ok(to)
}

/// What the checkpoint of `step` is called.
pub fn name(step: u64) -> String {
    format!("step-{step:06}")
}

/// The step of a checkpoint's directory, if it is one.
pub fn step(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
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
        let shelf = Shelf::new(dir.path(), 2, true);
        for (step, value) in [(1, 0.5), (2, 0.9), (3, 0.1), (10, 0.2), (1_000_000, 0.3)] {
            let path = shelf.dir().join(name(step));
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("preceptor.json"), format!("{{\"best\": {{\"value\": {value}}}}}")).unwrap();
        }
        std::fs::create_dir_all(shelf.dir().join("step-000004.damaged-1")).unwrap();
        shelf.prune();
        let steps: Vec<u64> = shelf.all().iter().filter_map(|path| step(path)).collect();
        assert_eq!(steps, [2, 10, 1_000_000]);
        assert_eq!(shelf.supersede(9).unwrap().len(), 2);
        assert_eq!(shelf.all().len(), 1);
        assert!(shelf.dir().join("step-000010.superseded-1").exists());
        let plain = Shelf::new(dir.path(), 1, false);
        std::fs::create_dir_all(plain.dir().join(name(3))).unwrap();
        std::fs::create_dir_all(plain.dir().join(".step-000005.partial")).unwrap();
        plain.prune();
        assert_eq!(plain.all(), [plain.dir().join(name(3))]);
        // A program that died while it replaced one left the old one beside, or both.
        std::fs::create_dir_all(plain.dir().join(".step-000007.replaced")).unwrap();
        std::fs::create_dir_all(plain.dir().join(".step-000003.replaced")).unwrap();
        Shelf::new(dir.path(), 1, false);
        let names: Vec<String> = std::fs::read_dir(plain.dir())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| !name.contains("damaged") && !name.contains("superseded"))
            .collect();
        assert!(names.len() == 2 && plain.all() == [plain.dir().join(name(3)), plain.dir().join(name(7))], "{names:?}");
    }
}
