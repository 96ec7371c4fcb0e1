//! Where answers are kept: a file that is opened again after a disk has failed, and answers that wait for it.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Key;
use super::database::{Fault, File};
use super::entry::{Found, decode, encode};
use crate::telemetry;

/// Most bytes of answers that wait to be written.
const MOST_WAITING: usize = 64 << 20;

/// The pause after the first failure to write; it doubles.
const PAUSE: Duration = Duration::from_millis(250);

/// The longest pause between two tries to write.
const MOST_PAUSE: Duration = Duration::from_secs(15);

/// How long answers that wait keep a program from ending.
const LAST: Duration = Duration::from_secs(30);

/// How often a failure that persists is logged.
const REPEAT: Duration = Duration::from_secs(60);

/// Free room on the disk that a write needs at least, in bytes, and for each entry, whose pages are copied.
const ROOM: (u64, u64) = (256 << 10, 4 << 10);

/// Most answers that are written at a time.
const AT_ONCE: usize = 256;

/// The store of answers. One process has its file open at a time.
pub struct Store {
    path: PathBuf,
    most: u64,
    file: RwLock<Opened>,
    waiting: Mutex<Waiting>,
    /// Held while what waits is written, so that it is written once.
    writing: Mutex<()>,
    health: Mutex<Health>,
}

/// The file, unless a failure has closed it, and how many times it was opened.
#[derive(Default)]
struct Opened {
    file: Option<File>,
    times: u64,
}

/// Answers that are not in the file yet, in the order in which they came.
#[derive(Default)]
struct Waiting {
    order: VecDeque<Key>,
    entries: HashMap<Key, Vec<u8>>,
    bytes: usize,
    /// Answers that were given up, since too many waited.
    lost: u64,
}

/// How the file has done of late.
#[derive(Default)]
struct Health {
    /// Since when it cannot be written.
    failing: Option<Instant>,
    pause: Duration,
    /// When it may be tried again.
    again: Option<Instant>,
    told: Option<Instant>,
    damaged: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Opens the cache in the folder `dir`, which is made if need be. Beyond `most` answers the oldest go.
    ///
    /// # Errors
    /// A folder that cannot be written; a file that is damaged or is held by another process.
    pub fn open(dir: &Path, most: u64) -> Result<Self> {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot make the label cache's folder {}", dir.display()))?;
        let path = dir.join("labels.redb");
        let file = File::open(&path).map_err(|fault| match fault {
            Fault::InUse => anyhow!(
                "the label cache {} is in use by another run; give this one another labeler.cache",
                path.display()
            ),
            Fault::Damaged(why) => anyhow!(
                "the label cache {} is damaged: {why}; move it away or remove it, and labels are bought again, or put a sound copy in its place",
                path.display()
            ),
            // As an error of the system, which may pass.
            other => anyhow::Error::new(std::io::Error::other(other.to_string())).context(format!(
                "cannot open the label cache {}; see that the file can be read and written, or set labeler.cache to another folder",
                path.display()
            )),
        })?;
        let store = Self {
            path,
            most: most.max(1),
            file: RwLock::new(Opened { file: Some(file), times: 1 }),
            waiting: Mutex::default(),
            writing: Mutex::default(),
            health: Mutex::default(),
        };
        telemetry::label_cache(store.len()?);
        Ok(store)
    }

    /// Answers in it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn len(&self) -> Result<u64> {
        self.on_file(true, File::len)
            .map_err(|fault| anyhow!("the label cache {} cannot be read: {fault}", self.path.display()))
    }

    /// Whether there are none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// The answers to `keys`. What is damaged or cannot be read counts as missing, and is logged.
    pub(super) fn get<T: DeserializeOwned>(&self, keys: &[Key]) -> Vec<Option<T>> {
        if lock(&self.health).failing.is_some()
            && let Ok(writing) = self.writing.try_lock()
        {
            self.write_waiting(&writing, false);
        }
        let found = self.on_file(self.is_due(), |file| file.get(keys)).unwrap_or_else(|fault| {
            self.failed(&fault, "read");
            vec![None; keys.len()]
        });
        let waiting = lock(&self.waiting);
        let entry = |(key, found): (&Key, Option<Vec<u8>>)| {
            let entry = waiting.entries.get(key).cloned().or(found)?;
            match decode(key, &entry) {
                Found::Answer(answer) => Some(answer),
                Found::Other => None,
                Found::Damaged => {
                    self.entry_damaged();
                    None
                }
            }
        };
        keys.iter().zip(found).map(entry).collect()
    }

    /// Keeps answers. They are on the disk when this returns, or wait in memory for a disk that fails.
    pub(super) fn put<'a, T: Serialize + 'a>(&self, replies: impl Iterator<Item = (Key, &'a T)>) {
        {
            let mut waiting = lock(&self.waiting);
            for (key, reply) in replies {
                match encode(&key, reply) {
                    Ok(entry) => {
                        if waiting.push(key, entry) {
                            // Two actors asked the same at the same time.
                            telemetry::label_bought_again();
                        }
                    }
                    Err(error) => tracing::error!("an answer cannot be kept in the label cache: {error}"),
                }
            }
        }
        self.write_waiting(&lock(&self.writing), false);
    }

    /// Whether what failed may be tried again by now.
    fn is_due(&self) -> bool {
        lock(&self.health).again.is_none_or(|again| Instant::now() >= again)
    }

    /// Writes what waits, unless it is too early to try again; `last` tries in any case.
    fn write_waiting(&self, _writing: &MutexGuard<'_, ()>, last: bool) {
        if !last && !self.is_due() {
            return;
        }
        let batch = lock(&self.waiting).all();
        for part in batch.chunks(AT_ONCE) {
            if let Err(fault) = self.write(part) {
                return self.failed(&fault, "written");
            }
        }
        if !batch.is_empty() {
            self.works_again(batch.len());
        }
    }

    fn write(&self, part: &[(Key, Vec<u8>)]) -> Result<(), Fault> {
        let is_sound = |key: &Key, entry: &[u8]| !matches!(decode::<serde_json::Value>(key, entry), Found::Damaged);
        self.room(part)?;
        let written = self.on_file(true, |file| file.put(part, self.most, is_sound))?;
        (0..written.again).for_each(|_| telemetry::label_bought_again());
        telemetry::label_cache(written.entries);
        lock(&self.waiting).written(part);
        Ok(())
    }

    /// Makes sure that a full disk is found before the file is touched: a write that fails half way closes it, and it cannot
    /// be read either until it is opened again.
    fn room(&self, batch: &[(Key, Vec<u8>)]) -> Result<(), Fault> {
        let bytes: usize = batch.iter().map(|(_, entry)| entry.len()).sum();
        let needed = ROOM.0 + ROOM.1 * batch.len() as u64 + 2 * bytes as u64;
        match free_bytes(&self.path) {
            Some(free) if free < needed => {
                Err(Fault::Disk(format!("no space left on device: {free} bytes are free, and {needed} are needed")))
            }
            _ => Ok(()),
        }
    }

    /// Runs `work` on the file. Where it fails, or was closed by a failure before, the file is opened again if that `may` be
    /// done, and `work` is tried once more.
    fn on_file<T>(&self, may: bool, work: impl Fn(&File) -> Result<T, Fault>) -> Result<T, Fault> {
        let (fault, times) = {
            let opened = self.file.read().unwrap_or_else(PoisonError::into_inner);
            match opened.file.as_ref().map(&work) {
                Some(Ok(done)) => return Ok(done),
                Some(Err(fault)) => (fault, opened.times),
                None if may => (Fault::Closed, opened.times),
                None => return Err(Fault::Closed),
            }
        };
        let mut opened = self.file.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have met the same failure, and have opened the file again.
        if opened.times == times {
            match fault {
                Fault::Damaged(why) => self.set_aside(&mut opened, &why)?,
                _ => self.reopen(&mut opened)?,
            }
        }
        let done = opened.file.as_ref().map_or(Err(Fault::Closed), work);
        if done.is_err() {
            // What cannot be written may still be read. What it fails with is the reason that counts.
            let _ = self.reopen(&mut opened);
        }
        done
    }

    /// Opens the file again: after one failed write the library refuses all use of an open file.
    fn reopen(&self, opened: &mut Opened) -> Result<(), Fault> {
        opened.file = None;
        match File::open(&self.path) {
            Ok(file) => {
                *opened = Opened { file: Some(file), times: opened.times + 1 };
                Ok(())
            }
            Err(Fault::Damaged(why)) => self.set_aside(opened, &why),
            Err(fault) => Err(fault),
        }
    }

    /// Puts a damaged file out of the way and begins a new one.
    fn set_aside(&self, opened: &mut Opened, why: &str) -> Result<(), Fault> {
        opened.file = None;
        let aside = (1..).map(|n| self.path.with_extension(format!("redb.damaged-{n}"))).find(|path| !path.exists());
        let Some(aside) = aside else { return Err(Fault::Damaged(why.to_owned())) };
        std::fs::rename(&self.path, &aside)
            .map_err(|error| Fault::Disk(format!("it is damaged ({why}) and cannot be set aside: {error}")))?;
        telemetry::label_cache_damaged();
        tracing::error!(
            "the label cache {} is damaged: {why}; it was set aside as {}, and labels that were in it are bought again unless a sound copy is put in its place",
            self.path.display(),
            aside.display()
        );
        *opened = Opened { file: Some(File::open(&self.path)?), times: opened.times + 1 };
        Ok(())
    }

    fn entry_damaged(&self) {
        telemetry::label_cache_damaged();
        let mut health = lock(&self.health);
        health.damaged += 1;
        if health.damaged == 1 {
            tracing::error!(
                "the label cache {} has an entry whose checksum is wrong; it counts as missing, and the label is bought again (further ones are only counted, in preceptor_label_cache_damaged_total)",
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
        health.pause = (health.pause * 2).clamp(PAUSE, MOST_PAUSE);
        health.again = Some(now + health.pause);
        if health.told.is_none_or(|told| now - told >= REPEAT) {
            health.told = Some(now);
            let lost = if lost > 0 { format!(", {lost} were given up") } else { String::new() };
            tracing::error!(
                "the label cache {} cannot be {what}: {fault}; {count} answers wait in memory{lost}, and it is tried again",
                self.path.display()
            );
        }
    }

    fn works_again(&self, count: usize) {
        let mut health = lock(&self.health);
        let Some(since) = health.failing.take() else { return };
        (health.pause, health.again, health.told) = (Duration::ZERO, None, None);
        tracing::warn!(
            "the label cache {} is written again after {:.0} s; {count} answers that waited are in it",
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
            tracing::warn!("{left} answers wait for the label cache {}, for {LAST:?} at most", self.path.display());
        }
        while left > 0 && began.elapsed() < LAST {
            std::thread::sleep(PAUSE);
            self.write_waiting(&writing, true);
            left = lock(&self.waiting).order.len();
        }
        if left > 0 {
            tracing::error!(
                "{left} answers could not be written into the label cache {}; they are bought again",
                self.path.display()
            );
        }
    }
}

impl Waiting {
    /// Adds an entry, and says whether it takes the place of another.
    fn push(&mut self, key: Key, entry: Vec<u8>) -> bool {
        self.bytes += entry.len();
        let before = self.entries.insert(key, entry);
        match &before {
            Some(before) => self.bytes -= before.len(),
            None => self.order.push_back(key),
        }
        while self.bytes > MOST_WAITING {
            let Some(entry) = self.order.pop_front().and_then(|oldest| self.entries.remove(&oldest)) else { break };
            self.bytes -= entry.len();
            self.lost += 1;
        }
        before.is_some()
    }

    fn all(&self) -> Vec<(Key, Vec<u8>)> {
        self.order.iter().filter_map(|key| Some((*key, self.entries.get(key)?.clone()))).collect()
    }

    /// Takes out what was written, unless another answer has come since.
    fn written(&mut self, batch: &[(Key, Vec<u8>)]) {
        for (key, entry) in batch {
            if self.entries.get(key) == Some(entry) {
                self.entries.remove(key);
                self.bytes -= entry.len();
            }
        }
        let entries = &self.entries;
        self.order.retain(|key| entries.contains_key(key));
    }
}

/// Bytes that are free on the disk of `path`, where the system says.
#[cfg(unix)]
fn free_bytes(path: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: all zeros is a valid value of this structure of numbers.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` ends with a zero byte, and `stat` is a valid place to write to.
    let done = unsafe { libc::statvfs(path.as_ptr(), &raw mut stat) };
    (done == 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(not(unix))]
fn free_bytes(_path: &Path) -> Option<u64> {
    None
}
