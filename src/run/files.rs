//! The directory of a run, and the files that the run appends to.

use std::fs::{File, TryLockError};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Map, Value, json};

use super::begin;
use super::journal;
use super::log::Log;
use super::phases;
use super::resume::Change;
use super::rotating::{RotatingLog, RotationLimits};
use super::tensorboard::EventFile;
use crate::config::Config;
use crate::observe::monitor::samples;
use crate::pipeline::learn::Done;
use crate::pipeline::learn::StepRecord;
use crate::run::checkpoint::Lengths;
use crate::status;
use crate::types::Rewarded;
use crate::util::disk;
use crate::util::failpoints;

/// Name of the file of samples in a run's directory.
pub(super) const SAMPLES: &str = "samples.jsonl";

/// Directory of a run, locked by this process.
pub struct RunDir {
    path: PathBuf,
    /// Locks on the lock file and on the directory, held as long as the run lasts.
    _locks: [File; 2],
}

impl RunDir {
    /// Locks the directory of a new run: `given`, the configured directory, or the first of `NAME`, `NAME-2`, … in
    /// `runs` that is free.
    ///
    /// # Errors
    /// If the directory already holds a run, is in use, or cannot be written.
    pub fn create(config: &Config, given: Option<PathBuf>) -> Result<Self> {
        let explicit = given.or_else(|| config.run.dir.clone());
        let Some(path) = explicit else { return Self::first_free(Path::new("runs"), &config.run.name) };
        let dir = Self::lock(path)?;
        ensure!(
            !dir.has_run()?,
            "{} already holds a run; continue it with --resume, give another --run-dir, or remove it",
            dir.path.display()
        );
        Ok(dir)
    }

    /// Locks the directory of the run to resume: `given`, the configured directory, or the last of `NAME`, `NAME-2`, …
    /// in `runs` that exists. Creates the directory if it does not exist.
    ///
    /// # Errors
    /// If the directory is in use or cannot be written.
    pub fn resume(config: &Config, given: Option<PathBuf>) -> Result<Self> {
        let explicit = given.or_else(|| config.run.dir.clone());
        Self::lock(explicit.unwrap_or_else(|| last_existing(Path::new("runs"), &config.run.name)))
    }

    /// Locks the first of `NAME`, `NAME-2`, … that does not exist or holds only the lock of a refused run.
    fn first_free(parent: &Path, name: &str) -> Result<Self> {
        let mut candidates = std::iter::once(name.to_owned()).chain((2..).map(|n| format!("{name}-{n}")));
        loop {
            let path = parent.join(candidates.next().expect("the candidates never end"));
            if !path.exists() {
                return Self::lock(path);
            }
            // Locking fails if another process holds the directory.
            if has_only_lock(&path)
                && let Ok(dir) = Self::lock(path)
            {
                return Ok(dir);
            }
        }
    }

    fn lock(path: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&path).map_err(|error| disk::cannot("create the run directory", &path, error))?;
        let busy = || anyhow!("another process works on the run in {}; wait for it, or stop it", path.display());
        let lock = path.join(LOCK);
        disk::length(&lock)?;
        let file = File::create(&lock).map_err(|error| disk::cannot("write", &lock, error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(busy()),
            Err(TryLockError::Error(error)) => return Err(disk::cannot("lock", &lock, error)),
        }
        // The directory is locked as well, since the lock file may be removed. Not every file system can lock a
        // directory; in that case the lock file alone has to suffice.
        let folder = File::open(&path).map_err(|error| disk::cannot("open", &path, error))?;
        if let Err(TryLockError::WouldBlock) = folder.try_lock() {
            return Err(busy());
        }
        Ok(Self { path, _locks: [file, folder] })
    }

    /// Returns the path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether the directory has steps or checkpoints of a run.
    fn has_run(&self) -> Result<bool> {
        for name in ["checkpoints", phases::FINE_TUNING] {
            if disk::exists(&self.path.join(name))? {
                return Ok(true);
            }
        }
        Ok(!begin::step_files(&self.path)?.is_empty())
    }
}

/// Name of the lock file in a run's directory.
const LOCK: &str = "run.lock";

/// The files that a run appends to.
pub struct RunFiles {
    dir: RunDir,
    metrics: Log,
    samples: RotatingLog,
    /// Number of groups of a step that are written to the samples.
    samples_groups: usize,
    phases: Log,
    journal: Option<Log>,
    /// Size in bytes from which the journal records no more steps; 0 for no limit.
    journal_max_bytes: u64,
    journal_closed: bool,
    events: Option<EventFile>,
    /// The step that was written last, with the lengths of metrics, samples, journal and events before it.
    last_step: Option<(u64, [u64; 4])>,
}

impl RunFiles {
    /// Opens the files in `dir`, truncates each to its length in `lengths`, and removes the lines of steps after `step`
    /// from `samples.jsonl`, which is rotated. Writes the resolved configuration to `config.toml`, and TensorBoard's
    /// file again from `metrics.jsonl`.
    ///
    /// # Errors
    /// Names the file that cannot be opened or written, or is shorter than its recorded length.
    pub fn open(config: &Config, dir: RunDir, lengths: Lengths, step: u64) -> Result<Self> {
        let path = dir.path.join("config.toml");
        disk::replace(&path, config.to_toml().as_bytes())?;
        let log = |name: &str, length| Log::open(&dir.path.join(name), length);
        let closed = journal::closed_before(&dir.path.join(journal::NAME), lengths.journal)?;
        let journal = config.checkpoint.journal.then(|| log(journal::NAME, lengths.journal)).transpose()?;
        if let (Some(_), Some(step)) = (&journal, closed) {
            status!(
                "journal   was full before step {step} (checkpoint.journal_max_bytes); no later step is written into it"
            );
        }
        let limits = RotationLimits { max_bytes: config.run.samples_max_bytes, keep: config.run.samples_keep };
        let metrics = log("metrics.jsonl", lengths.metrics)?;
        let events =
            config.run.tensorboard.then(|| EventFile::open(&dir.path, records(metrics.path())?)).transpose()?;
        Ok(Self {
            metrics,
            samples: RotatingLog::open(&dir.path.join(SAMPLES), step, limits)?,
            samples_groups: if config.run.samples_groups == 0 { usize::MAX } else { config.run.samples_groups },
            phases: log("phases.jsonl", lengths.phases)?,
            journal,
            journal_max_bytes: config.checkpoint.journal_max_bytes,
            journal_closed: closed.is_some(),
            events,
            last_step: None,
            dir,
        })
    }

    /// Returns the run's directory.
    pub fn dir(&self) -> &Path {
        &self.dir.path
    }

    /// Records in the journal that `config` applies from here on.
    ///
    /// # Errors
    /// Names the file that cannot be written. The entry is kept in memory for the next attempt.
    pub fn record_config(&mut self, config: &Config) -> Result<()> {
        let Some(journal) = self.journal.as_mut().filter(|_| !self.journal_closed) else { return Ok(()) };
        journal.append(&journal::encode_config(&config.to_toml())?)
    }

    /// Records in the journal and in `phases.jsonl` the changes of the judge that were accepted at `step`.
    ///
    /// # Errors
    /// Names the file that cannot be written. The entry is kept in memory for the next attempt.
    pub fn record_accepted(&mut self, step: u64, changes: &[Change]) -> Result<()> {
        let changes: Vec<_> = changes.iter().filter(|change| change.is_accepted()).collect();
        if changes.is_empty() {
            return Ok(());
        }
        let figures: Map<String, Value> =
            changes.iter().map(|one| (one.key.clone(), json!({ "was": one.old, "is": one.new }))).collect();
        self.append_phase(&json!({ "phase": "resume", "step": step, "accepted": figures }))?;
        let Some(journal) = self.journal.as_mut().filter(|_| !self.journal_closed) else { return Ok(()) };
        let changes = changes.iter().map(|one| (one.key.clone(), one.old.clone(), one.new.clone())).collect();
        journal.append(&journal::encode_accepted(&journal::AcceptedChanges { step, changes })?)
    }

    /// Appends a step to the files: its figures to the metrics, its first groups to the samples, its batch to the
    /// journal. A step that is recorded again replaces its earlier lines.
    ///
    /// # Errors
    /// Names the file that cannot be written. The lines are kept in memory for the next attempt.
    pub fn step(&mut self, record: &StepRecord, done: Done<'_>) -> Result<()> {
        let step = record.0["step"].as_u64().unwrap_or_default();
        let (journal, events) = (self.journal.as_ref(), self.events.as_ref());
        let lengths = [
            self.metrics.length(),
            self.samples.length(),
            journal.map_or(0, Log::length),
            events.map_or(0, |events| events.log().length()),
        ];
        match self.last_step {
            Some((last, [metrics, samples, journal, events])) if last == step => {
                self.metrics.rewind(metrics)?;
                self.samples.rewind(samples)?;
                if let Some(log) = &mut self.journal
                    && log.length() > journal
                {
                    log.rewind(journal)?;
                    self.journal_closed = false;
                }
                self.events.as_mut().map_or(Ok(()), |log| log.rewind(events))?;
            }
            _ => self.last_step = Some((step, lengths)),
        }
        let mut lines = String::new();
        for group in done.batch.iter().take(self.samples_groups) {
            for line in samples::lines(&record.0["step"], group) {
                lines.push_str(&format!("{line}\n"));
            }
        }
        let samples = self.samples.append(lines.as_bytes());
        let metrics = self.metrics.append((serde_json::to_string(record)? + "\n").as_bytes());
        let journal = self.append_to_journal(step, &done);
        let events = self.events.as_mut().map_or(Ok(()), |events| events.step(&record.0));
        samples.and(metrics).and(journal).and(events)
    }

    /// Appends a step to the journal, or closes the journal if it is full.
    fn append_to_journal(&mut self, step: u64, done: &Done<'_>) -> Result<()> {
        let Some(journal) = self.journal.as_mut().filter(|_| !self.journal_closed) else { return Ok(()) };
        if self.journal_max_bytes == 0 || journal.length() < self.journal_max_bytes {
            return journal.append(&journal::encode_step(step, done.fingerprint, done.batch)?);
        }
        self.journal_closed = true;
        tracing::warn!(
            "{} has reached checkpoint.journal_max_bytes = {}: step {step} and later ones are not written into it and cannot be replayed; the run continues",
            journal.path().display(),
            self.journal_max_bytes
        );
        journal.append(&journal::encode_closed(step)?)
    }

    /// Returns the records of the steps in `metrics.jsonl`.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub fn metrics(&self) -> Result<impl Iterator<Item = Map<String, Value>>> {
        records(self.metrics.path())
    }

    /// Writes all pending bytes, and returns the lengths and the paths of the files.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn lengths(&mut self) -> Result<(Lengths, Vec<PathBuf>)> {
        let mut lengths = Lengths::default();
        let mut paths = Vec::new();
        paths.extend(self.samples.flush()?);
        lengths.samples = self.samples.length();
        for (log, length) in [
            (Some(&mut self.metrics), &mut lengths.metrics),
            (Some(&mut self.phases), &mut lengths.phases),
            (self.journal.as_mut(), &mut lengths.journal),
        ] {
            let Some(log) = log else { continue };
            log.flush()?;
            *length = log.length();
            paths.push(log.path().to_owned());
        }
        Ok((lengths, paths))
    }

    /// Writes all pending bytes, including those of the event file, which is not part of a checkpoint.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn flush(&mut self) -> Result<()> {
        failpoints::point("files.flush")?;
        self.lengths()?;
        self.events.as_mut().map_or(Ok(()), EventFile::flush)
    }

    /// Appends figures of a phase to `phases.jsonl`.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn append_phase(&mut self, figures: &serde_json::Value) -> Result<()> {
        self.phases.append(format!("{figures}\n").as_bytes())
    }

    /// Stores `text`, the last response of `/metrics`, as `metrics.prom`, since no scrape sees the final totals after
    /// the run ends.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn write_final_metrics(&self, text: &str) -> Result<()> {
        disk::replace(&self.dir().join("metrics.prom"), text.as_bytes())
    }

    /// Stores a batch whose loss or gradient was not finite, for analysis, and returns the path of its file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save_nonfinite(&self, step: u64, batch: &[Rewarded]) -> Result<PathBuf> {
        let path = self.dir().join(format!("nonfinite-step-{step}.json"));
        std::fs::write(&path, serde_json::to_vec(batch)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

/// Returns the objects of a file of JSON lines, one at a time; lines that are not objects are skipped.
fn records(path: &Path) -> Result<impl Iterator<Item = Map<String, Value>> + use<>> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    Ok(lines.filter_map(|line| serde_json::from_str(&line).ok()))
}

/// Returns whether a directory holds a lock file and nothing else.
fn has_only_lock(path: &Path) -> bool {
    let names = std::fs::read_dir(path).map(|entries| entries.flatten().map(|entry| entry.file_name()).collect());
    names.is_ok_and(|names: Vec<_>| names == [LOCK])
}

/// Returns the last existing one of `NAME`, `NAME-2`, …, or `NAME` if none exists.
fn last_existing(parent: &Path, name: &str) -> PathBuf {
    let mut last = parent.join(name);
    for next in (2..).map(|n| parent.join(format!("{name}-{n}"))) {
        if !next.exists() {
            break;
        }
        last = next;
    }
    last
}
