//! The thread that downloads folders of a store: each file from where an earlier download stopped, verified by its SHA-256,
//! and visible only when the folder is complete.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::super::protocol::WeightsNotice;
use super::origin::{Failure, FailureKind, Origin};
use crate::observe::telemetry::worker as telemetry;
use crate::pipeline::served::{SUMS, listed, sha256, sha256_of_file, verify};
use crate::status;
use crate::util::disk;
use crate::util::mutex::lock;

/// Maximum size of a list of checksums in bytes.
const MAX_LIST: usize = 1 << 20;
/// Shortest and longest pause after a failure.
const PAUSE: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(15)];
/// Time between two looks whether a download is still wanted.
const LOOK: Duration = Duration::from_millis(100);
/// Number of seconds without any byte after which a download counts as interrupted. The client of object stores tries again for
/// minutes before it reports a failure.
const SILENCE_S: u32 = 30;

/// A folder to download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Job {
    /// Name of the folder.
    pub(super) name: String,
    /// SHA-256 of its list of checksums.
    pub(super) sha256: String,
    /// Announcement of the weights in it; `None` for the base model.
    pub(super) notice: Option<WeightsNotice>,
}

impl Job {
    /// Returns whether a download of this folder is of use while `wanted` is wanted: an older version of the same lineage is.
    fn serves(&self, wanted: &Self) -> bool {
        match (&self.notice, &wanted.notice) {
            (Some(own), Some(wanted)) => own.lineage == wanted.lineage,
            _ => self == wanted,
        }
    }
}

/// Reason for which nothing can be downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trouble {
    pub(super) why: String,
    pub(super) kind: FailureKind,
}

/// Downloads of one worker.
pub(super) struct Downloads {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    bytes: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Folder to download next.
    wanted: Option<Job>,
    /// Folder that was downloaded and not taken yet.
    done: Option<Job>,
    /// Names of the models that do not change, and of the version that was taken last, which are kept.
    kept: (Vec<String>, String),
    trouble: Option<Trouble>,
    ended: bool,
}

impl Downloads {
    /// Starts the thread, which writes to `folder`.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(super) fn start(origin: Origin, folder: PathBuf) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        let worker = Worker { origin, folder, shared: Arc::clone(&shared) };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("weights".into()).spawn(move || worker.run(&runtime))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Sets the folder to download next.
    pub(super) fn want(&self, job: Job) {
        lock(&self.shared.state).wanted = Some(job);
        self.shared.changed.notify_all();
    }

    /// Takes the folder `name` if it was downloaded, waiting for it up to `wait`.
    pub(super) fn take(&self, name: &str, wait: Duration) -> Option<()> {
        let state = lock(&self.shared.state);
        let is_there = |state: &State| state.done.as_ref().is_some_and(|done| done.name == name);
        let waited = self.shared.changed.wait_timeout_while(state, wait, |state| !is_there(state));
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        is_there(&state).then(|| state.done = None)
    }

    /// Downloads the weights of `notice` after those under way. Returns the weights that were downloaded since the last call,
    /// if there are any.
    pub(super) fn follow(&self, notice: WeightsNotice) -> Option<WeightsNotice> {
        let mut state = lock(&self.shared.state);
        let is_known = |job: &Option<Job>| job.as_ref().is_some_and(|job| job.name == notice.name);
        if !is_known(&state.wanted) && !is_known(&state.done) {
            let (name, sha256) = (notice.name.clone(), notice.sha256.clone());
            state.wanted = Some(Job { name, sha256, notice: Some(notice) });
            self.shared.changed.notify_all();
        }
        let here = state.done.take()?.notice?;
        here.name.clone_into(&mut state.kept.1);
        Some(here)
    }

    /// Returns why nothing can be downloaded, while that is so.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        lock(&self.shared.state).trouble.clone()
    }

    /// Returns the number of bytes that were received.
    pub(super) fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Downloads {
    fn drop(&mut self) {
        lock(&self.shared.state).ended = true;
        self.shared.changed.notify_all();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("internal error: the thread that fetches weights panicked");
        }
    }
}

struct Worker {
    origin: Origin,
    folder: PathBuf,
    shared: Arc<Shared>,
}

impl Worker {
    fn run(&self, runtime: &tokio::runtime::Runtime) {
        let (mut under_way, mut pause) = (None, PAUSE[0]);
        while let Some(job) = self.job(under_way.take()) {
            let (began, before) = (Instant::now(), self.shared.bytes.load(Ordering::Relaxed));
            let fetched = runtime.block_on(async {
                tokio::select! {
                    fetched = self.fetch(&job) => Some(fetched),
                    () = self.ended() => None,
                    () = self.silent() => {
                        Some(Err(anyhow!("{} has sent nothing for {SILENCE_S} s", self.origin).into()))
                    }
                }
            });
            let bytes = self.shared.bytes.load(Ordering::Relaxed) - before;
            match fetched {
                None => return,
                Some(Ok(())) => {
                    pause = PAUSE[0];
                    self.finished(job, began.elapsed(), bytes);
                }
                Some(Err(failure)) => {
                    if bytes > 0 && failure.kind == FailureKind::Interrupted {
                        pause = PAUSE[0];
                    }
                    self.failed(&job, &failure);
                    // A download that was interrupted continues. Weights that are gone, or damaged, are replaced by newer ones.
                    under_way = Some(job).filter(|_| failure.kind == FailureKind::Interrupted);
                    let state = lock(&self.shared.state);
                    let waited = self.shared.changed.wait_timeout_while(state, pause, |state| !state.ended);
                    drop(waited);
                    pause = PAUSE[1].min(2 * pause);
                }
            }
        }
    }

    /// Returns the next download, which is the one under way if it is still of use. `None` at the end.
    fn job(&self, under_way: Option<Job>) -> Option<Job> {
        let mut state = lock(&self.shared.state);
        loop {
            if state.ended {
                return None;
            }
            match (&under_way, &state.wanted) {
                (Some(job), Some(wanted)) if job.serves(wanted) => return under_way,
                (_, Some(wanted)) => return Some(wanted.clone()),
                (_, None) => {}
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    async fn ended(&self) {
        while !lock(&self.shared.state).ended {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until nothing was received for some time. Seconds are counted, and not measured, since the thread does not look
    /// while it computes a checksum.
    async fn silent(&self) {
        let (mut seconds, mut bytes) = (0, 0);
        while seconds < SILENCE_S {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let now = self.shared.bytes.load(Ordering::Relaxed);
            seconds = if now == bytes { seconds + 1 } else { 0 };
            bytes = now;
        }
    }

    fn finished(&self, job: Job, took: Duration, bytes: u64) {
        telemetry::downloaded(took);
        tracing::debug!("fetched {} in {:.1} s, {bytes} bytes", job.name, took.as_secs_f64());
        let mut state = lock(&self.shared.state);
        if state.trouble.take().is_some() {
            status!("worker    {} answers again", self.origin);
        }
        if state.wanted.as_ref() == Some(&job) {
            state.wanted = None;
        }
        if job.notice.is_none() && !state.kept.0.contains(&job.name) {
            state.kept.0.push(job.name.clone());
        }
        let kept: Vec<&str> = state.kept.0.iter().chain([&state.kept.1, &job.name]).map(String::as_str).collect();
        self.prune(&kept);
        state.done = Some(job);
        self.shared.changed.notify_all();
    }

    fn failed(&self, job: &Job, failure: &Failure) {
        let why = format!("cannot fetch {}: {:#}", job.name, failure.why);
        tracing::debug!("{why}");
        telemetry::download_failed();
        let mut state = lock(&self.shared.state);
        // A version that a newer one has replaced is not missed.
        if failure.kind == FailureKind::Unusable && state.wanted.as_ref() != Some(job) {
            return;
        }
        // Without the base model a refusal ends the worker, with this reason.
        if state.trouble.is_none() && (failure.kind != FailureKind::Refused || job.notice.is_some()) {
            status!("worker    {why}; it is tried again");
        }
        state.trouble = Some(Trouble { why, kind: failure.kind });
    }

    /// Removes folders other than `kept`, and what is left of downloads that were given up. Failures are logged.
    fn prune(&self, kept: &[&str]) {
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let of = name.strip_prefix('.').and_then(|name| name.strip_suffix(".partial")).unwrap_or(&name);
            if !kept.contains(&of)
                && let Err(error) = std::fs::remove_dir_all(entry.path())
            {
                tracing::warn!("cannot remove old weights {}: {error}", entry.path().display());
            }
        }
    }

    /// Downloads a folder, unless it is there.
    async fn fetch(&self, job: &Job) -> Result<(), Failure> {
        let (dir, partial) = (self.folder.join(&job.name), self.folder.join(format!(".{}.partial", job.name)));
        if disk::exists(&dir)? {
            if verify(&dir, &job.sha256).is_ok() {
                return Ok(());
            }
            std::fs::remove_dir_all(&dir).map_err(|error| disk::cannot("remove", &dir, error))?;
        }
        std::fs::create_dir_all(&partial).map_err(|error| disk::cannot("create", &partial, error))?;
        let list = self.list(job, &partial.join(SUMS)).await?;
        let unusable = |error: anyhow::Error| Failure::new(FailureKind::Unusable, error);
        let list = String::from_utf8(list).map_err(|error| unusable(error.into()))?;
        for (hex, file) in listed(&list).map_err(unusable)? {
            self.file(job, file, hex, &partial.join(file)).await?;
        }
        std::fs::rename(&partial, &dir).map_err(|error| disk::cannot("rename", &partial, error))?;
        Ok(())
    }

    /// Returns the list of checksums, from the file `path` if an earlier download has written it.
    async fn list(&self, job: &Job, path: &Path) -> Result<Vec<u8>, Failure> {
        if let Ok(list) = std::fs::read(path)
            && sha256(&list) == job.sha256
        {
            return Ok(list);
        }
        let list = self.origin.read(&job.name, SUMS, MAX_LIST).await?;
        let found = sha256(&list);
        if found != job.sha256 {
            let why = anyhow!("{SUMS} has the SHA-256 {found}, and the run announced {}", job.sha256);
            return Err(Failure::new(FailureKind::Unusable, why));
        }
        disk::replace(path, &list)?;
        Ok(list)
    }

    /// Downloads a file, unless it is there.
    async fn file(&self, job: &Job, file: &str, hex: &str, path: &Path) -> Result<(), Failure> {
        loop {
            let began = disk::length(path)?.unwrap_or(0);
            if began > 0 && sha256_of_file(path)? == hex {
                return Ok(());
            }
            let received = |bytes: u64| {
                self.shared.bytes.fetch_add(bytes, Ordering::Relaxed);
                telemetry::received(bytes);
            };
            self.origin.append(&job.name, file, path, &received).await?;
            let found = sha256_of_file(path)?;
            if found == hex {
                return Ok(());
            }
            std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
            // What an earlier download left may have been of another file; then the file is downloaded as a whole.
            if began == 0 {
                let why = anyhow!("{file} has the SHA-256 {found}, and its list {hex}");
                return Err(Failure::new(FailureKind::Unusable, why));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(name: &str, lineage: Option<u64>) -> Job {
        let notice = lineage.map(|lineage| WeightsNotice {
            lineage,
            version: 1,
            fingerprint: 2,
            name: name.into(),
            sha256: "sum".into(),
            adapters: false,
        });
        Job { name: name.into(), sha256: "sum".into(), notice }
    }

    #[test]
    fn a_download_of_another_lineage_or_of_another_base_is_given_up() {
        let older = job("policy-1", Some(1));
        assert!(older.serves(&job("policy-2", Some(1))) && !older.serves(&job("policy-2", Some(2))));
        let base = job("base-1", None);
        assert!(base.serves(&base.clone()) && !base.serves(&job("base-2", None)));
        assert!(!base.serves(&older) && !older.serves(&base));
    }
}
