//! Storage of answers: a file that processes share and that is reopened after disk failures, and a queue of answers not
//! yet written.

use std::collections::{HashMap, VecDeque};
use std::fs::TryLockError;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Key;
use super::database::{Fault, File, Keys, NewEntry, StoredEntry};
use super::earlier;
use super::entry::{Found, decode, encode};
use crate::observe::telemetry;
use crate::util::mutex::lock;

/// Maximum size in bytes of the answers that wait to be written.
const MAX_WAITING: usize = 64 << 20;

/// Pause after the first write failure; it doubles with each further one.
const PAUSE: Duration = Duration::from_millis(250);

/// Maximum pause between two attempts to write.
const MAX_PAUSE: Duration = Duration::from_secs(15);

/// Maximum time by which unwritten answers delay the end of the program.
const EXIT_DELAY: Duration = Duration::from_secs(30);

/// Interval at which a persistent failure is logged again.
const REPEAT: Duration = Duration::from_secs(60);

/// Time that a process waits for another one that is opening the cache before it logs a warning.
const SLOW_OPEN: Duration = Duration::from_secs(2);

/// Maximum number of answers per write transaction.
const MAX_BATCH: usize = 256;

/// The store of answers. Any number of processes may use its file concurrently.
pub struct Store {
    path: PathBuf,
    most: u64,
    file: RwLock<Opened>,
    waiting: Mutex<Waiting>,
    /// Held while waiting answers are written, so that they are written once.
    writing: Mutex<()>,
    health: Mutex<Health>,
}

/// The file, if it is open, and the number of times it was opened.
#[derive(Default)]
struct Opened {
    file: Option<File>,
    times: u64,
}

/// Answers that are not in the file yet, in insertion order.
#[derive(Default)]
struct Waiting {
    order: VecDeque<Key>,
    entries: HashMap<Key, NewEntry>,
    bytes: usize,
    /// Number of answers discarded because too many waited.
    lost: u64,
}

/// Recent state of the file.
#[derive(Default)]
struct Health {
    /// Start of the present write failure.
    failing: Option<Instant>,
    pause: Duration,
    /// Earliest time of the next attempt.
    again: Option<Instant>,
    last_logged: Option<Instant>,
    damaged: u64,
}

impl Store {
    /// Opens the cache in the folder `dir`, creating it if needed. If there are more than `most` answers, the oldest
    /// are removed. Several processes may have it open at the same time; the smallest of their limits applies.
    ///
    /// A damaged file is renamed, and a new one is created. If the disk fails or cannot be written, the store keeps
    /// answers in memory and retries. Each such event is logged.
    ///
    /// # Errors
    /// If a person has to intervene: the file is another program's database, or the folder is a file.
    pub fn open(dir: &Path, most: u64) -> Result<Self> {
        let store = Self {
            path: dir.join("labels.sqlite"),
            most: most.max(1),
            file: RwLock::default(),
            waiting: Mutex::default(),
            writing: Mutex::default(),
            health: Mutex::default(),
        };
        let opened = store.open_again(&mut store.file.write().unwrap_or_else(PoisonError::into_inner), None);
        match opened {
            Ok(()) => {}
            Err(Fault::Foreign(why)) => bail!(
                "the label cache {} cannot be used: {why}; move it away or remove it, or set labeler.cache to another folder",
                store.path.display()
            ),
            Err(fault) => store.failed(&fault, "opened"),
        }
        if let Ok(entries) = store.len() {
            telemetry::label_cache(entries);
        }
        Ok(store)
    }

    /// Returns the number of answers in the file.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn len(&self) -> Result<u64> {
        self.on_file(true, File::len)
            .map_err(|fault| anyhow!("the label cache {} cannot be read: {fault}", self.path.display()))
    }

    /// Returns whether the file has no answers.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Returns the answers to `keys`. Damaged or unreadable answers are logged and count as missing.
    pub(super) fn get<T: DeserializeOwned + Serialize>(&self, keys: &[Keys]) -> Vec<Option<T>> {
        if lock(&self.health).failing.is_some()
            && let Ok(writing) = self.writing.try_lock()
        {
            self.write_waiting(&writing, false);
        }
        let found = self.on_file(self.is_due(), |file| file.get(keys)).unwrap_or_else(|fault| {
            self.failed(&fault, "read");
            vec![None; keys.len()]
        });
        let mut answers = Vec::with_capacity(keys.len());
        let mut renamed = Vec::new();
        {
            let waiting = lock(&self.waiting);
            for (keys, found) in keys.iter().zip(found) {
                let new = waiting.entries.get(&keys.key).map(|new| new.entry.clone());
                // The checksum of an entry under an earlier key covers that key.
                let (key, entry, earlier) = match (new, found) {
                    (Some(entry), _) => (keys.key, entry, false),
                    (None, Some(StoredEntry { entry, earlier })) => {
                        (keys.earlier.filter(|_| earlier).unwrap_or(keys.key), entry, earlier)
                    }
                    (None, None) => {
                        answers.push(None);
                        continue;
                    }
                };
                answers.push(match decode(&key, &entry) {
                    Found::Answer(answer) => {
                        if earlier && let Ok(entry) = encode(&keys.key, &answer) {
                            renamed.push(NewEntry { key: keys.key, entry, replaces: keys.earlier });
                        }
                        Some(answer)
                    }
                    Found::Other => None,
                    Found::Damaged => {
                        self.entry_damaged();
                        None
                    }
                });
            }
        }
        // The earlier key did not name the complete configuration. Its answer is assigned to the first configuration
        // that asks; another one that differs in the parts the earlier key left out buys its own.
        self.keep(renamed);
        answers
    }

    /// Stores answers. On return they are on disk, or wait in memory if the disk fails.
    pub(super) fn put<'a, T: Serialize + 'a>(&self, replies: impl Iterator<Item = (Key, &'a T)>) {
        let entry = |(key, reply): (Key, &T)| match encode(&key, reply) {
            Ok(entry) => Some(NewEntry { key, entry, replaces: None }),
            Err(error) => {
                tracing::error!("an answer cannot be stored in the label cache: {error}");
                None
            }
        };
        self.keep(replies.filter_map(entry).collect());
    }

    fn keep(&self, entries: Vec<NewEntry>) {
        if entries.is_empty() {
            return;
        }
        {
            let mut waiting = lock(&self.waiting);
            for new in entries {
                if waiting.push(new) {
                    // Two actors asked the same question at the same time.
                    telemetry::label_bought_again();
                }
            }
        }
        self.write_waiting(&lock(&self.writing), false);
    }

    /// Returns whether a failed operation may be retried now.
    fn is_due(&self) -> bool {
        lock(&self.health).again.is_none_or(|again| Instant::now() >= again)
    }

    /// Writes the waiting answers, unless it is too early to retry; `last` forces an attempt.
    fn write_waiting(&self, _writing: &MutexGuard<'_, ()>, last: bool) {
        if !last && !self.is_due() {
            return;
        }
        let batch = lock(&self.waiting).all();
        for part in batch.chunks(MAX_BATCH) {
            if let Err(fault) = self.write(part) {
                return self.failed(&fault, "written");
            }
        }
        if !batch.is_empty() {
            self.recovered(batch.len());
        }
    }

    fn write(&self, part: &[NewEntry]) -> Result<(), Fault> {
        let is_sound = |key: &Key, entry: &[u8]| !matches!(decode::<serde_json::Value>(key, entry), Found::Damaged);
        let written = self.on_file(true, |file| file.put(part, self.most, is_sound))?;
        (0..written.again).for_each(|_| telemetry::label_bought_again());
        telemetry::label_cache(written.entries);
        lock(&self.waiting).written(part);
        Ok(())
    }

    /// Runs `work` on the file. If the file is damaged or no longer at its path, or is not open, and if `may` allows
    /// it, the file is opened again and `work` is run once more.
    fn on_file<T>(&self, may: bool, work: impl Fn(&File) -> Result<T, Fault>) -> Result<T, Fault> {
        let (fault, times) = {
            let opened = self.file.read().unwrap_or_else(PoisonError::into_inner);
            let done = match &opened.file {
                Some(file) if file.is_moved() => Err(Fault::Moved),
                Some(file) => work(file),
                None => Err(Fault::Closed),
            };
            match done {
                Ok(done) => return Ok(done),
                Err(fault) => (fault, opened.times),
            }
        };
        if !(may && matches!(fault, Fault::Closed | Fault::Damaged(_) | Fault::Moved)) {
            return Err(fault);
        }
        let mut opened = self.file.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have seen the same fault and reopened the file already.
        if opened.times == times {
            self.open_again(&mut opened, Some(&fault))?;
        }
        opened.file.as_ref().map_or(Err(Fault::Closed), work)
    }

    /// Opens the file again after `fault`; `fault` is `None` at the first opening. If it cannot be opened for writing,
    /// it is opened read-only if possible.
    fn open_again(&self, opened: &mut Opened, fault: Option<&Fault>) -> Result<(), Fault> {
        let damaged = match fault {
            Some(Fault::Damaged(why)) => opened.file.as_ref().map(|file| (file, why.as_str())),
            _ => None,
        };
        if let Some(Fault::Moved) = fault {
            tracing::warn!("the label cache {} was moved or removed while it was in use", self.path.display());
        }
        match self.open_file(damaged) {
            Ok(file) => {
                *opened = Opened { file: Some(file), times: opened.times + 1 };
                Ok(())
            }
            Err(fault) => {
                // A file that is open and still at its path stays open for reading.
                if !matches!(fault, Fault::Foreign(_)) && opened.file.as_ref().is_none_or(File::is_moved) {
                    *opened = Opened { file: File::open_unchanging(&self.path).ok(), times: opened.times + 1 };
                }
                Err(fault)
            }
        }
    }

    /// Opens the file and imports the answers of earlier versions, under a lock against other processes. A damaged file
    /// is set aside first, including the open file `damaged`, given with the reason.
    fn open_file(&self, damaged: Option<(&File, &str)>) -> Result<File, Fault> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let disk = |what: &str, error: std::io::Error| match error.kind() {
            ErrorKind::NotADirectory | ErrorKind::AlreadyExists => Fault::Foreign(format!("{what}: {error}")),
            _ => Fault::Disk(format!("{what}: {error}")),
        };
        std::fs::create_dir_all(folder).map_err(|error| disk("its folder cannot be made", error))?;
        let locked = self.path.with_extension("lock");
        let lock = std::fs::File::options().create(true).truncate(false).write(true).open(locked);
        let lock = lock.map_err(|error| disk("labels.lock in its folder cannot be written", error))?;
        self.wait_for(&lock).map_err(|error| disk("labels.lock in its folder cannot be locked", error))?;
        // If another process has set it aside already, a new file is at the path.
        if let Some((file, why)) = damaged
            && !file.is_moved()
        {
            self.set_aside(why)?;
        }
        let file = match File::open(&self.path) {
            Err(Fault::Damaged(why)) => {
                self.set_aside(&why)?;
                File::open(&self.path)?
            }
            other => other?,
        };
        if let Err(fault) = earlier::import(&file, &self.path, self.most) {
            tracing::error!(
                "the labels of an earlier program cannot be imported into the label cache {}: {fault}; the import is tried again when the cache is next opened",
                self.path.display()
            );
        }
        Ok(file)
    }

    /// Locks `lock`, and logs a warning if that takes longer than [`SLOW_OPEN`].
    fn wait_for(&self, lock: &std::fs::File) -> std::io::Result<()> {
        let began = Instant::now();
        while began.elapsed() < SLOW_OPEN {
            match lock.try_lock() {
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(5)),
                Err(TryLockError::Error(error)) => return Err(error),
                Ok(()) => return Ok(()),
            }
        }
        tracing::warn!(
            "another process is opening the label cache {} or importing labels of an earlier program into it; waiting for it",
            self.path.display()
        );
        lock.lock()
    }

    /// Renames a damaged file.
    fn set_aside(&self, why: &str) -> Result<(), Fault> {
        let name = |n: u64| self.path.with_extension(format!("sqlite.damaged-{n}"));
        let Some(aside) = (1..).map(name).find(|path| !path.exists()) else {
            return Err(Fault::Damaged(why.to_owned()));
        };
        // SQLite's auxiliary files first, so that they are never next to another database.
        for end in ["-wal", "-shm", "-journal", ""] {
            let with = |path: &Path| {
                let mut name = path.as_os_str().to_owned();
                name.push(end);
                PathBuf::from(name)
            };
            match std::fs::rename(with(&self.path), with(&aside)) {
                Err(error) if end.is_empty() || error.kind() != ErrorKind::NotFound => {
                    return Err(Fault::Disk(format!("it is damaged ({why}) and cannot be set aside: {error}")));
                }
                _ => {}
            }
        }
        telemetry::label_cache_damaged();
        tracing::error!(
            "the label cache {} is damaged: {why}; it was set aside as {}, and its labels will be requested again. To use an intact copy of it, stop all processes that use it and put the copy in its place",
            self.path.display(),
            aside.display()
        );
        Ok(())
    }

    fn entry_damaged(&self) {
        telemetry::label_cache_damaged();
        let mut health = lock(&self.health);
        health.damaged += 1;
        if health.damaged == 1 {
            tracing::error!(
                "the label cache {} has an entry whose checksum is wrong; the label will be requested again (further damaged entries are only counted, in preceptor_label_cache_damaged_total)",
                self.path.display()
            );
        }
    }

    fn failed(&self, fault: &Fault, what: &str) {
        if matches!(fault, Fault::Closed) {
            return;
        }
        telemetry::disk_error();
        let (count, lost) = {
            let waiting = lock(&self.waiting);
            (waiting.order.len(), waiting.lost)
        };
        let now = Instant::now();
        let mut health = lock(&self.health);
        health.failing.get_or_insert(now);
        health.pause = (health.pause * 2).clamp(PAUSE, MAX_PAUSE);
        health.again = Some(now + health.pause);
        if health.last_logged.is_none_or(|last_logged| now - last_logged >= REPEAT) {
            health.last_logged = Some(now);
            let lost = if lost > 0 { format!(", {lost} were discarded") } else { String::new() };
            tracing::error!(
                "the label cache {} cannot be {what}: {fault}; {count} answers wait in memory{lost}; the program keeps retrying",
                self.path.display()
            );
        }
    }

    fn recovered(&self, count: usize) {
        let mut health = lock(&self.health);
        let Some(since) = health.failing.take() else { return };
        (health.pause, health.again, health.last_logged) = (Duration::ZERO, None, None);
        tracing::warn!(
            "the label cache {} can be written again after {:.0} s; {count} waiting answers were written",
            self.path.display(),
            since.elapsed().as_secs_f64()
        );
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let began = Instant::now();
        let writing = lock(&self.writing);
        self.write_waiting(&writing, true);
        let mut left = lock(&self.waiting).order.len();
        if left > 0 {
            tracing::warn!(
                "waiting up to {EXIT_DELAY:?} to write {left} answers into the label cache {}",
                self.path.display()
            );
        }
        while left > 0 && began.elapsed() < EXIT_DELAY {
            std::thread::sleep(PAUSE);
            self.write_waiting(&writing, true);
            left = lock(&self.waiting).order.len();
        }
        if left > 0 {
            tracing::error!(
                "{left} answers could not be written into the label cache {}; they will be requested again",
                self.path.display()
            );
        }
    }
}

impl Waiting {
    /// Adds an entry. Returns whether it replaces another answer that was bought.
    fn push(&mut self, new: NewEntry) -> bool {
        let (key, bought) = (new.key, new.replaces.is_none());
        self.bytes += new.entry.len();
        let before = self.entries.insert(key, new);
        match &before {
            Some(before) => self.bytes -= before.entry.len(),
            None => self.order.push_back(key),
        }
        while self.bytes > MAX_WAITING {
            let Some(new) = self.order.pop_front().and_then(|oldest| self.entries.remove(&oldest)) else { break };
            self.bytes -= new.entry.len();
            self.lost += 1;
        }
        bought && before.is_some()
    }

    fn all(&self) -> Vec<NewEntry> {
        self.order.iter().filter_map(|key| self.entries.get(key).cloned()).collect()
    }

    /// Removes the written entries of `batch`, except those replaced since.
    fn written(&mut self, batch: &[NewEntry]) {
        for new in batch {
            if self.entries.get(&new.key) == Some(new) {
                self.entries.remove(&new.key);
                self.bytes -= new.entry.len();
            }
        }
        let entries = &self.entries;
        self.order.retain(|key| entries.contains_key(key));
    }
}
