//! The directory of a run: resolved configuration, `metrics.jsonl`, `samples.jsonl`.

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
use super::rotating::{Bounds, Rotating};
use super::tensorboard::Events;
use crate::config::Config;
use crate::observe::monitor::samples;
use crate::pipeline::learn::Done;
use crate::pipeline::learn::StepRecord;
use crate::run::checkpoint::Lengths;
use crate::status;
use crate::types::Rewarded;
use crate::util::disk;
use crate::util::failpoints;

/// The file of samples to read, in a run's directory.
pub(super) const SAMPLES: &str = "samples.jsonl";

/// A run's directory, which one process has at a time.
pub struct RunDir {
    path: PathBuf,
    /// Held as long as the run lasts.
    _locks: [File; 2],
}

impl RunDir {
    /// The directory of a new run. Without `given`, the configured one is used, or the first of `-2`, `-3`, … that is free.
    ///
    /// # Errors
    /// A directory that holds a run already, is in use, or cannot be written.
    pub fn create(config: &Config, given: Option<PathBuf>) -> Result<Self> {
        let explicit = given.or_else(|| config.run.dir.clone());
        let Some(path) = explicit else { return Self::free(Path::new("runs"), &config.run.name) };
        let dir = Self::hold(path)?;
        ensure!(
            !dir.is_begun()?,
            "{} holds a run already; go on with it by --resume, give another --run-dir, or remove it",
            dir.path.display()
        );
        Ok(dir)
    }

    /// The directory of the run to go on with: the given one, the configured one, or the last of `NAME`, `NAME-2`, … that
    /// there is. A run that has not begun is begun.
    ///
    /// # Errors
    /// A directory that is in use, or cannot be written.
    pub fn resume(config: &Config, given: Option<PathBuf>) -> Result<Self> {
        let explicit = given.or_else(|| config.run.dir.clone());
        Self::hold(explicit.unwrap_or_else(|| last(Path::new("runs"), &config.run.name)))
    }

    /// The first of `NAME`, `NAME-2`, … that does not exist, or that a refused run left empty.
    fn free(parent: &Path, name: &str) -> Result<Self> {
        let mut candidates = std::iter::once(name.to_owned()).chain((2..).map(|n| format!("{name}-{n}")));
        loop {
            let path = parent.join(candidates.next().expect("the candidates never end"));
            if !path.exists() {
                return Self::hold(path);
            }
            // Another process may hold it.
            if is_left_empty(&path)
                && let Ok(dir) = Self::hold(path)
            {
                return Ok(dir);
            }
        }
    }

    fn hold(path: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&path).map_err(|error| disk::cannot("make the run directory", &path, error))?;
        let busy = || anyhow!("another process works on the run in {}; wait for it, or stop it", path.display());
        let lock = path.join(LOCK);
        disk::length(&lock)?;
        let file = File::create(&lock).map_err(|error| disk::cannot("write", &lock, error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(busy()),
            Err(TryLockError::Error(error)) => return Err(disk::cannot("lock", &lock, error)),
        }
        // Somebody may remove the file. Not every file system locks a directory; then the file alone has to do.
        let folder = File::open(&path).map_err(|error| disk::cannot("open", &path, error))?;
        if let Err(TryLockError::WouldBlock) = folder.try_lock() {
            return Err(busy());
        }
        Ok(Self { path, _locks: [file, folder] })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a run has begun in it.
    fn is_begun(&self) -> Result<bool> {
        for name in ["checkpoints", phases::FINE_TUNING] {
            if disk::exists(&self.path.join(name))? {
                return Ok(true);
            }
        }
        Ok(!begin::steps(&self.path)?.is_empty())
    }
}

/// The file by which a process holds a run's directory.
const LOCK: &str = "run.lock";

/// Files that a run appends to.
pub struct RunFiles {
    dir: RunDir,
    metrics: Log,
    samples: Rotating,
    phases: Log,
    journal: Option<Log>,
    /// Size beyond which the journal takes no more steps; 0 for none.
    journal_most: u64,
    journal_closed: bool,
    events: Option<Events>,
    /// The step that was written last, and lengths of metrics, samples, journal and events before it.
    last: Option<(u64, [u64; 4])>,
}

impl RunFiles {
    /// Opens the files in `dir`, cut off after `lengths` and `step`, and writes the resolved configuration beside them.
    ///
    /// # Errors
    /// Names the file that cannot be opened or is shorter than it was.
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
        let bounds = Bounds { most_bytes: config.run.samples_max_bytes, keep: config.run.samples_keep };
        let metrics = log("metrics.jsonl", lengths.metrics)?;
        let events = config.run.tensorboard.then(|| Events::open(&dir.path, records(metrics.path())?)).transpose()?;
        Ok(Self {
            metrics,
            samples: Rotating::open(&dir.path.join(SAMPLES), step, bounds)?,
            phases: log("phases.jsonl", lengths.phases)?,
            journal,
            journal_most: config.checkpoint.journal_max_bytes,
            journal_closed: closed.is_some(),
            events,
            last: None,
            dir,
        })
    }

    /// The run's directory.
    pub fn dir(&self) -> &Path {
        &self.dir.path
    }

    /// Notes in the journal that `config` holds from here on.
    ///
    /// # Errors
    /// Names the file that cannot be written; the entry waits for the next try.
    pub fn configured(&mut self, config: &Config) -> Result<()> {
        let Some(journal) = self.journal.as_mut().filter(|_| !self.journal_closed) else { return Ok(()) };
        journal.append(&journal::config(&config.to_toml())?)
    }

    /// Notes in the journal and in `phases.jsonl` which changes of the judge were accepted at `step`.
    ///
    /// # Errors
    /// Names the file that cannot be written; the entry waits for the next try.
    pub fn accepted(&mut self, step: u64, changes: &[Change]) -> Result<()> {
        let changes: Vec<_> = changes.iter().filter(|change| change.is_accepted()).collect();
        if changes.is_empty() {
            return Ok(());
        }
        let figures: Map<String, Value> =
            changes.iter().map(|one| (one.key.clone(), json!({ "was": one.was, "is": one.is }))).collect();
        self.phase(&json!({ "phase": "resume", "step": step, "accepted": figures }))?;
        let Some(journal) = self.journal.as_mut().filter(|_| !self.journal_closed) else { return Ok(()) };
        let changes = changes.iter().map(|one| (one.key.clone(), one.was.clone(), one.is.clone())).collect();
        journal.append(&journal::accepted(&journal::Accepted { step, changes })?)
    }

    /// Appends a step's figures, its first group to read, and what it learned from to the journal. A step that is told again
    /// takes its own place.
    ///
    /// # Errors
    /// Names the files that cannot be written; what was to be written waits for the next try.
    pub fn step(&mut self, record: &StepRecord, done: Done<'_>) -> Result<()> {
        let step = record.0["step"].as_u64().unwrap_or_default();
        let (journal, events) = (self.journal.as_ref(), self.events.as_ref());
        let lengths = [
            self.metrics.length(),
            self.samples.length(),
            journal.map_or(0, Log::length),
            events.map_or(0, |events| events.log().length()),
        ];
        match self.last {
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
            _ => self.last = Some((step, lengths)),
        }
        let mut lines = String::new();
        for group in done.batch.iter().take(1) {
            for line in samples::lines(&record.0["step"], group) {
                lines.push_str(&format!("{line}\n"));
            }
        }
        let samples = self.samples.append(lines.as_bytes());
        let metrics = self.metrics.append((serde_json::to_string(record)? + "\n").as_bytes());
        let journal = self.record(step, &done);
        let events = self.events.as_mut().map_or(Ok(()), |events| events.step(&record.0));
        samples.and(metrics).and(journal).and(events)
    }

    /// Writes a step into the journal, or its end where it is full.
    fn record(&mut self, step: u64, done: &Done<'_>) -> Result<()> {
        let Some(journal) = self.journal.as_mut().filter(|_| !self.journal_closed) else { return Ok(()) };
        if self.journal_most == 0 || journal.length() < self.journal_most {
            return journal.append(&journal::step(step, done.fingerprint, done.batch)?);
        }
        self.journal_closed = true;
        tracing::warn!(
            "{} has reached checkpoint.journal_max_bytes = {}: step {step} and later ones are not written into it and cannot be replayed; the run goes on",
            journal.path().display(),
            self.journal_most
        );
        journal.append(&journal::closed(step)?)
    }

    /// The figures of the steps that `metrics.jsonl` has.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub fn metrics(&self) -> Result<impl Iterator<Item = Map<String, Value>>> {
        records(self.metrics.path())
    }

    /// Lengths of the files, and the files, once all that waits is written.
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

    /// Writes what waits for any of the files, those that are made again when the run is resumed included.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn flush(&mut self) -> Result<()> {
        failpoints::point("files.flush")?;
        self.lengths()?;
        self.events.as_mut().map_or(Ok(()), Events::flush)
    }

    /// Appends figures of a phase before training to `phases.jsonl`.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn phase(&mut self, figures: &serde_json::Value) -> Result<()> {
        self.phases.append(format!("{figures}\n").as_bytes())
    }

    /// Keeps what `/metrics` said last, as `metrics.prom`: totals that no scrape would see after the end.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn last_metrics(&self, text: &str) -> Result<()> {
        disk::replace(&self.dir().join("metrics.prom"), text.as_bytes())
    }

    /// Saves a batch whose gradient was not finite, for study.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn nonfinite(&self, step: u64, batch: &[Rewarded]) -> Result<PathBuf> {
        let path = self.dir().join(format!("nonfinite-step-{step}.json"));
        std::fs::write(&path, serde_json::to_vec(batch)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

/// The objects of a file of JSON lines, one at a time.
fn records(path: &Path) -> Result<impl Iterator<Item = Map<String, Value>> + use<>> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    Ok(lines.filter_map(|line| serde_json::from_str(&line).ok()))
}

/// Whether a directory holds the lock of a run and nothing else.
fn is_left_empty(path: &Path) -> bool {
    let names = std::fs::read_dir(path).map(|entries| entries.flatten().map(|entry| entry.file_name()).collect());
    names.is_ok_and(|names: Vec<_>| names == [LOCK])
}

/// The last of `NAME`, `NAME-2`, … that there is; `NAME` where there is none.
fn last(parent: &Path, name: &str) -> PathBuf {
    let mut last = parent.join(name);
    for next in (2..).map(|n| parent.join(format!("{name}-{n}"))) {
        if !next.exists() {
            break;
        }
        last = next;
    }
    last
}
