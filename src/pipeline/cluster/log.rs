//! The log of a coordinator: completions and labels that are durable before their results are acknowledged.
//!
//! A result that is acknowledged is gone from the broker, and a checkpoint is written only every few minutes. The log
//! bridges the time between: a restored run continues with its checkpoint and the groups of the log. Training is a function
//! of the groups, so that the restored learner, which trains on the same groups in the same order, publishes the same
//! versions as the process before. The log keeps the fingerprints of all versions: if a version has another one, for
//! example because the learning rate was changed, the groups that it or a later version sampled are given up.
//!
//! The log is a folder of segments `000001.log`, `000002.log`, … in the format of [`crate::util::frames`]. Each checkpoint
//! begins a new one, and removes those whose groups are all trained on in the oldest checkpoint that is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::rl::ledger::{GroupState, LedgerLog};
use crate::status;
use crate::types::{Group, Labeled};
use crate::util::disk;
use crate::util::frames::{self, Frames};
use crate::util::mutex::lock;

/// Pause before a failed write is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// An entry of the log.
#[derive(Serialize, Deserialize)]
enum Entry {
    /// Completions of a group.
    Generated(Group),
    /// Labels of a group, with its completions.
    Labeled(Labeled),
    /// A version of the weights, and its fingerprint.
    Published(u64, u64),
    /// The groups before this entry that this version or a later one sampled are void, and so are these versions.
    GivenUp(u64),
}

/// Borrowed form of [`Entry`] for writing.
#[derive(Serialize)]
enum EntryRef<'a> {
    Generated(&'a Group),
    Labeled(&'a Labeled),
    Published(u64, u64),
    GivenUp(u64),
}

/// Point at which a run starts or is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// Number of the step, which is the version of the weights.
    pub step: u64,
    /// Fingerprint of the weights.
    pub fingerprint: u64,
    /// Number of groups in a step.
    pub batch: u64,
}

/// What a log has for a restored run.
#[derive(Debug, Default)]
pub struct Restored {
    /// States of groups that are not trained on.
    pub groups: Vec<GroupState>,
    /// Number of groups with completions only that cannot be used, because other weights sampled them.
    pub rollouts_lost: u64,
    /// Number of groups with labels that cannot be used, because other weights sampled them.
    pub labels_lost: u64,
}

type Job = Box<dyn FnOnce() + Send>;

/// Log of a coordinator. Entries are written and made durable by a thread of their own, many at once.
pub struct GroupLog {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pending: Vec<u8>,
    /// Work to do when the pending bytes are durable.
    jobs: Vec<Job>,
    /// Number of groups that the oldest checkpoint has trained on, if a new segment is to begin.
    checkpoint: Option<u64>,
    /// Smallest number of trained groups that makes the present segment superfluous.
    end: u64,
    /// Number of groups in a step.
    batch: u64,
    failure: Option<String>,
    ended: bool,
    /// Fingerprints that versions must have for the restored groups to be valid.
    expected: BTreeMap<u64, u64>,
    /// Newest version of each restored group that a version after the start sampled.
    restored: BTreeMap<u64, u64>,
}

/// A segment that is not written any more.
struct Segment {
    path: PathBuf,
    /// Smallest number of trained groups that makes it superfluous.
    end: u64,
}

/// Segment that is being written.
struct Writer {
    dir: PathBuf,
    number: u64,
    file: File,
    /// Number of durable bytes.
    durable: u64,
    before: Vec<Segment>,
}

impl GroupLog {
    /// Opens the log in the folder `dir`, which is created if needed, and returns what it has for a run that begins at
    /// `start`.
    ///
    /// # Errors
    /// If the folder cannot be read or written, or an entry before the last one is damaged.
    pub fn open(dir: &Path, start: Start) -> Result<(Self, Restored)> {
        std::fs::create_dir_all(dir).map_err(|error| disk::cannot("create", dir, error))?;
        let (found, before) = read(dir, start.batch)?;
        let number = before.last().and_then(|last| number(&last.path)).unwrap_or(0) + 1;
        let (restored, state) = found.restore(start)?;
        let writer = Writer::create(dir, number, before)?;
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let working = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("group-log".into()).spawn(move || working.write(writer))?;
        Ok((Self { shared, thread: Mutex::new(Some(thread)) }, restored))
    }

    /// Calls `job` once everything that was logged so far is durable.
    pub fn when_durable(&self, job: Job) {
        lock(&self.shared.state).jobs.push(job);
        self.shared.changed.notify_one();
    }

    /// Logs that a version is published. Returns the restored groups that are void if its fingerprint differs from that of
    /// the process before.
    pub fn published(&self, version: u64, fingerprint: u64) -> BTreeSet<u64> {
        let mut state = lock(&self.shared.state);
        let mut void = BTreeSet::new();
        match state.expected.get(&version) {
            Some(expected) if *expected == fingerprint => return void,
            Some(_) => {
                void = state.restored.iter().filter(|(_, newest)| **newest >= version).map(|(seq, _)| *seq).collect();
                state.expected.clear();
                state.restored.clear();
                state.push(&EntryRef::GivenUp(version));
            }
            None => {}
        }
        state.publish(version, fingerprint);
        self.shared.changed.notify_one();
        void
    }

    /// Begins a new segment, since a checkpoint was written. `oldest` is the number of groups that the oldest checkpoint to
    /// restore from has trained on.
    pub fn checkpointed(&self, oldest: u64) {
        lock(&self.shared.state).checkpoint = Some(oldest);
        self.shared.changed.notify_one();
    }

    /// Returns why entries cannot be written, while that lasts.
    pub fn failure(&self) -> Option<String> {
        lock(&self.shared.state).failure.clone()
    }

    fn append(&self, entry: &EntryRef<'_>, seq: u64) {
        let mut state = lock(&self.shared.state);
        state.push(entry);
        state.end = state.end.max(seq + 1);
        self.shared.changed.notify_one();
    }
}

impl LedgerLog for GroupLog {
    fn generated(&self, group: &Group) {
        self.append(&EntryRef::Generated(group), group.prompt.seq);
    }

    fn labeled(&self, labeled: &Labeled) {
        self.append(&EntryRef::Labeled(labeled), labeled.group.prompt.seq);
    }
}

impl Drop for GroupLog {
    fn drop(&mut self) {
        lock(&self.shared.state).ended = true;
        self.shared.changed.notify_one();
        // A job may have held the last reference: then this is the thread itself, which ends after its jobs.
        if let Some(thread) = lock(&self.thread).take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("internal error: the thread that writes the log of groups panicked");
        }
    }
}

impl State {
    fn push(&mut self, entry: &EntryRef<'_>) {
        match frames::encode(entry) {
            Ok(Some(bytes)) => self.pending.extend(bytes),
            Ok(None) => status!("warning: a group of more than a gigabyte is not in the log of groups"),
            Err(error) => status!("internal error: an entry of the log of groups cannot be encoded: {error:#}"),
        }
    }

    fn publish(&mut self, version: u64, fingerprint: u64) {
        self.push(&EntryRef::Published(version, fingerprint));
        // A run that is restored at this version compares the fingerprint.
        self.end = self.end.max(version * self.batch + 1);
    }

    fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.jobs.is_empty() && self.checkpoint.is_none() && !self.ended
    }
}

impl Shared {
    /// Writes entries until the log is dropped.
    fn write(&self, mut writer: Writer) {
        loop {
            let mut state = lock(&self.state);
            while state.is_idle() {
                state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
            let (bytes, jobs) = (std::mem::take(&mut state.pending), std::mem::take(&mut state.jobs));
            let (checkpoint, ended) = (state.checkpoint.take(), state.ended);
            let end = if checkpoint.is_some() { std::mem::take(&mut state.end) } else { 0 };
            drop(state);
            while let Err(error) = writer.append(&bytes) {
                if !self.failed(error) {
                    return;
                }
            }
            if let Some(oldest) = checkpoint {
                // The next checkpoint tries again.
                if let Err(error) = writer.rotate(end, oldest) {
                    status!("warning: {error:#}; the log of groups grows until it can be shortened");
                    let mut state = lock(&self.state);
                    state.end = state.end.max(end);
                }
            }
            if lock(&self.state).failure.take().is_some() {
                status!("workers   {} can be written again", writer.dir.display());
            }
            jobs.into_iter().for_each(|job| job());
            if ended {
                return;
            }
        }
    }

    /// Tells the first failure and waits; returns false if the log is dropped meanwhile.
    fn failed(&self, error: anyhow::Error) -> bool {
        let mut state = lock(&self.state);
        if state.failure.is_none() {
            status!("workers   {error:#}; results stay with the broker until it can be written");
        }
        state.failure = Some(format!("{error:#}"));
        if state.ended {
            return false;
        }
        drop(state);
        std::thread::sleep(RETRY);
        true
    }
}

impl Writer {
    fn create(dir: &Path, number: u64, before: Vec<Segment>) -> Result<Self> {
        let path = path_of(dir, number);
        let file = OpenOptions::new().create_new(true).write(true).open(&path);
        let file = file.map_err(|error| disk::cannot("create", &path, error))?;
        disk::sync(dir)?;
        Ok(Self { dir: dir.to_owned(), number, file, durable: 0, before })
    }

    /// Appends `bytes` and makes them durable. After an error, none of them are in the file.
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        crate::util::failpoints::point("group-log.append")?;
        let written = self.file.write_all(bytes).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            let cut = self.file.set_len(self.durable).and_then(|()| self.file.seek(SeekFrom::Start(self.durable)));
            let path = path_of(&self.dir, self.number);
            return Err(disk::cannot("write", &path, cut.err().unwrap_or(error)));
        }
        self.durable += bytes.len() as u64;
        Ok(())
    }

    /// Begins a new segment after one that `end` trained groups make superfluous, and removes those that `oldest` do.
    fn rotate(&mut self, end: u64, oldest: u64) -> Result<()> {
        if self.durable > 0 {
            let next = Self::create(&self.dir, self.number + 1, Vec::new())?;
            self.before.push(Segment { path: path_of(&self.dir, self.number), end });
            (self.number, self.file, self.durable) = (next.number, next.file, 0);
        }
        while let Some(first) = self.before.first().filter(|segment| segment.end <= oldest) {
            std::fs::remove_file(&first.path).map_err(|error| disk::cannot("remove", &first.path, error))?;
            self.before.remove(0);
        }
        Ok(())
    }
}

/// Content of the segments of a log.
#[derive(Default)]
struct Found {
    groups: BTreeMap<u64, GroupState>,
    versions: BTreeMap<u64, u64>,
}

impl Found {
    /// Adds an entry, and returns the smallest number of trained groups that makes it superfluous.
    fn add(&mut self, entry: Entry, batch: u64) -> u64 {
        match entry {
            Entry::Generated(group) => {
                let seq = group.prompt.seq;
                self.groups.insert(seq, GroupState::Generated(Arc::new(group)));
                seq + 1
            }
            Entry::Labeled(labeled) => {
                let seq = labeled.group.prompt.seq;
                self.groups.insert(seq, GroupState::Labeled(Arc::new(labeled)));
                seq + 1
            }
            Entry::Published(version, fingerprint) => {
                self.versions.insert(version, fingerprint);
                version * batch + 1
            }
            Entry::GivenUp(version) => {
                self.groups.retain(|_, state| versions(state).all(|used| used < version));
                self.versions.split_off(&version);
                0
            }
        }
    }

    /// Selects what a run that begins at `start` can use.
    fn restore(mut self, start: Start) -> Result<(Restored, State)> {
        let mut state = State { batch: start.batch, ..State::default() };
        if self.versions.get(&start.step) != Some(&start.fingerprint) {
            // Other weights: the run was resumed from another branch, or these are the files of another run.
            self.versions.split_off(&start.step);
            if !self.groups.is_empty() {
                state.push(&EntryRef::GivenUp(start.step));
            }
            state.publish(start.step, start.fingerprint);
        }
        let is_known = |version: u64| version < start.step || self.versions.contains_key(&version);
        let mut restored = Restored::default();
        for (seq, group) in self.groups.split_off(&(start.step * start.batch)) {
            let newest = versions(&group).max().unwrap_or(0);
            if versions(&group).all(is_known) {
                if newest > start.step {
                    state.restored.insert(seq, newest);
                }
                restored.groups.push(group);
            } else if matches!(group, GroupState::Labeled(_)) {
                restored.labels_lost += 1;
            } else {
                restored.rollouts_lost += 1;
            }
        }
        state.expected = self.versions.split_off(&(start.step + 1));
        Ok((restored, state))
    }
}

/// Returns the versions that sampled the tokens of a group.
fn versions(state: &GroupState) -> impl Iterator<Item = u64> {
    let group = match state {
        GroupState::Generated(group) => Some(&**group),
        GroupState::Labeled(labeled) => Some(&labeled.group),
        GroupState::Admitted | GroupState::Rewarded(_) => None,
    };
    group.into_iter().flat_map(|group| &group.completions).flat_map(|completion| completion.versions.iter().copied())
}

/// Reads all segments in `dir`. An entry that was not written completely is ignored.
fn read(dir: &Path, batch: u64) -> Result<(Found, Vec<Segment>)> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|error| disk::cannot("read", dir, error))? {
        numbers.extend(number(&entry.map_err(|error| disk::cannot("read", dir, error))?.path()));
    }
    numbers.sort_unstable();
    let (mut found, mut segments) = (Found::default(), Vec::new());
    for number in numbers {
        let path = path_of(dir, number);
        let file = File::open(&path).map_err(|error| disk::cannot("read", &path, error))?;
        let (mut frames, mut end) = (Frames::new(&path, file), 0);
        let remedy = || {
            format!(
                "move the folder {} away to continue from the checkpoint alone; its completions are then sampled again, and its labels bought again",
                dir.display()
            )
        };
        while let Some(entry) = frames.read::<Entry>().with_context(remedy)? {
            end = found.add(entry, batch).max(end);
        }
        segments.push(Segment { path, end });
    }
    Ok((found, segments))
}

fn path_of(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:06}.log"))
}

fn number(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?.strip_suffix(".log")?;
    name.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Completion, Finish, Prompt};

    fn group(seq: u64, version: u64) -> Group {
        let completion = Completion {
            ids: vec![1],
            logprobs: vec![-1.0],
            versions: vec![version],
            finish: Finish::Eos,
            text: "a".into(),
        };
        Group { prompt: Prompt::new(seq, "", [1]), completions: vec![completion] }
    }

    fn start(step: u64, fingerprint: u64) -> Start {
        Start { step, fingerprint, batch: 2 }
    }

    fn seqs(restored: &Restored) -> Vec<(u64, bool)> {
        let of = |state: &GroupState| match state {
            GroupState::Generated(group) => (group.prompt.seq, false),
            GroupState::Labeled(labeled) => (labeled.group.prompt.seq, true),
            GroupState::Admitted | GroupState::Rewarded(_) => unreachable!(),
        };
        restored.groups.iter().map(of).collect()
    }

    /// Writes the log of a run of three steps of two groups, whose last groups version 3 sampled.
    fn written(dir: &Path) {
        let (log, restored) = GroupLog::open(dir, start(0, 100)).unwrap();
        assert!(restored.groups.is_empty());
        for version in 0..4 {
            if version > 0 {
                assert!(log.published(version, 100 + version).is_empty());
            }
            for seq in [2 * version, 2 * version + 1] {
                log.generated(&group(seq, version));
            }
            log.labeled(&Labeled::from(group(2 * version, version)));
        }
    }

    #[test]
    fn a_restored_run_has_the_groups_of_its_own_versions() {
        let dir = tempfile::tempdir().unwrap();
        written(dir.path());
        // From the beginning and from a checkpoint, as often as it is killed.
        for step in [0, 2, 2, 1] {
            let (log, restored) = GroupLog::open(dir.path(), start(step, 100 + step)).unwrap();
            let expected: Vec<(u64, bool)> = (2 * step..8).map(|seq| (seq, seq % 2 == 0)).collect();
            assert_eq!((seqs(&restored), restored.labels_lost), (expected, 0));
            assert!(log.published(step + 1, 101 + step).is_empty());
        }
        // A learner that takes another path: what later versions of the first path sampled is void.
        let (log, _) = GroupLog::open(dir.path(), start(1, 101)).unwrap();
        assert_eq!(log.published(2, 777), BTreeSet::from([4, 5, 6, 7]));
        log.generated(&group(4, 2));
        drop(log);
        let (_, restored) = GroupLog::open(dir.path(), start(1, 101)).unwrap();
        assert_eq!(seqs(&restored), [(2, true), (3, false), (4, false)]);
        let (_, restored) = GroupLog::open(dir.path(), start(2, 777)).unwrap();
        assert_eq!(seqs(&restored), [(4, false)]);
        // Weights that the log does not know.
        let (_, restored) = GroupLog::open(dir.path(), start(2, 888)).unwrap();
        assert_eq!((seqs(&restored), restored.rollouts_lost), (vec![], 1));
    }

    #[test]
    fn an_incomplete_entry_is_ignored_and_a_damaged_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        written(dir.path());
        let path = path_of(dir.path(), 1);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        let (_, restored) = GroupLog::open(dir.path(), start(3, 103)).unwrap();
        assert_eq!(seqs(&restored), [(6, false), (7, false)]);
        let mut damaged = bytes.clone();
        damaged[20] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        let error = format!("{:#}", GroupLog::open(dir.path(), start(3, 103)).err().unwrap());
        assert!(error.contains("move the folder") && error.contains("checksum"), "{error}");
    }

    #[test]
    fn a_job_waits_for_what_was_logged_and_segments_end_with_their_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let (log, _) = GroupLog::open(dir.path(), start(0, 100)).unwrap();
        let wait = |log: &GroupLog| {
            let (sender, durable) = crossbeam::channel::bounded(1);
            log.when_durable(Box::new(move || sender.send(()).unwrap()));
            durable.recv().unwrap();
        };
        let files = || std::fs::read_dir(dir.path()).unwrap().count();
        for seq in 0..3u64 {
            log.generated(&group(seq, 0));
            wait(&log);
            let (found, _) = read(dir.path(), 2).unwrap();
            assert!(found.groups.contains_key(&seq));
            log.checkpointed(0);
            wait(&log);
        }
        assert_eq!(files(), 4);
        // The oldest checkpoint has trained on the first two groups.
        log.checkpointed(2);
        wait(&log);
        assert_eq!(files(), 2);
        let (found, _) = read(dir.path(), 2).unwrap();
        assert_eq!(found.groups.keys().copied().collect::<Vec<_>>(), [2]);
    }
}
