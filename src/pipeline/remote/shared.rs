//! Rate limit state in a small file that all processes of a machine share which ask the same server with the same key.
//!
//! The file is locked only while one line is read and written, and the lock ends with its process. Times are seconds
//! since the machine started, because its calendar clock may be changed while processes run.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use super::limit::State;
use crate::lm::source::ResolveOptions;
use crate::util::mutex::lock;

/// First word of a file, with the version of its format.
const FORMAT: &str = "preceptor-rate-limit-1";

/// Size of a file in bytes. All its lines have the same length, so that one write replaces the previous one.
const LENGTH: usize = 128;

/// Files that were not written for this long are removed; by then any limit has recovered.
const STALE: Duration = Duration::from_secs(3 * 24 * 3600);

/// Number of seconds by which the last write may be in the future before it is attributed to another clock.
const TOLERANCE: f64 = 1.0;

/// File with the state of one account's rate limits, shared by the processes of a machine.
pub struct Shared {
    path: PathBuf,
    file: Mutex<Option<File>>,
}

impl Shared {
    /// Opens the file of `account`, a name that does not contain a secret, in the first writable one of these folders:
    /// `limits` in the program's cache, `$XDG_RUNTIME_DIR`, a folder of this user in the temporary directory.
    ///
    /// # Errors
    /// If none of the folders can be written, or the system does not report the time since its start.
    pub fn open(account: &str) -> Result<Self> {
        let mut last = Error::from(ErrorKind::NotFound);
        for folder in folders() {
            match folder.and_then(|folder| Self::inside(&folder, account)) {
                Ok(shared) => return Ok(shared),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Opens the file of `account` in `folder`. The file name contains an identifier of the machine's boot, because a
    /// folder may be mounted by several machines and the clock restarts with each boot.
    fn inside(folder: &Path, account: &str) -> Result<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let boot: String = boot.chars().filter(char::is_ascii_hexdigit).take(12).collect();
        let shared = Self { path: folder.join(format!("{account}-{boot}")), file: Mutex::default() };
        // Checks that the file can be written.
        shared.update(|_, _| ())?;
        remove_stale(folder, &shared.path);
        Ok(shared)
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Calls `change` with the state and the current time. Returns `None` without calling it if another process holds
    /// the lock.
    ///
    /// # Errors
    /// If the file cannot be opened, locked, read or written.
    pub fn update<T>(&self, change: impl FnOnce(&mut State, f64) -> T) -> Result<Option<T>> {
        let mut open_file = lock(&self.file);
        let file = match open_file.take() {
            Some(file) => file,
            None => open(&self.path)?,
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                *open_file = Some(file);
                return Ok(None);
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // If another process has removed the file, the others use a new file of that name, which is opened next time.
        if file.metadata()?.nlink() == 0 {
            return Ok(None);
        }
        let now = since_start()?;
        let mut state = read(&file, now)?;
        let result = change(&mut state, now);
        file.write_all_at(line(&state, now).as_bytes(), 0)?;
        file.unlock()?;
        *open_file = Some(file);
        Ok(Some(result))
    }
}

/// Returns the possible folders of limit files, in the order in which they are tried.
fn folders() -> impl Iterator<Item = Result<PathBuf>> {
    let cache = || {
        let folder = ResolveOptions::default().cache_dir.join("limits");
        std::fs::create_dir_all(&folder).map(|()| folder)
    };
    let runtime = || {
        let folder = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty());
        let folder = PathBuf::from(folder.ok_or(ErrorKind::NotFound)?).join("preceptor-limits");
        std::fs::create_dir_all(&folder).map(|()| folder)
    };
    let temporary = || {
        let user = std::fs::metadata("/proc/self")?.uid();
        let folder = std::env::temp_dir().join(format!("preceptor-limits-{user}"));
        match DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        // Any user may create folders there.
        let found = std::fs::symlink_metadata(&folder)?;
        if !found.is_dir() || found.uid() != user || found.mode() & 0o022 != 0 {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                format!("{} belongs to another user", folder.display()),
            ));
        }
        Ok(folder)
    };
    let each: [Box<dyn FnOnce() -> Result<PathBuf>>; 3] = [Box::new(cache), Box::new(runtime), Box::new(temporary)];
    each.into_iter().map(|folder| folder())
}

fn open(path: &Path) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(Error::other("it is not a regular file")) }
}

/// Returns the seconds since the machine started, including suspended time.
fn since_start() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/uptime")?;
    let seconds = text.split(' ').next().and_then(|seconds| seconds.parse().ok());
    seconds.ok_or_else(|| Error::other("/proc/uptime has no number of seconds"))
}

/// Formats the line of a file, of [`LENGTH`] bytes.
fn line(state: &State, now: f64) -> String {
    let State { requests, tokens, hold } = state;
    let text = format!("{FORMAT} {now:.3} {requests:.6} {tokens:.6} {hold:.3}");
    format!("{text:<width$}\n", width = LENGTH - 1)
}

/// Reads the state from a file. Returns the initial state if the file is empty, or was not written by this program with
/// this clock.
fn read(file: &File, now: f64) -> Result<State> {
    let mut bytes = [0; LENGTH];
    match file.read_exact_at(&mut bytes, 0) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(State::default()),
        other => other?,
    }
    Ok(parse(&bytes, now).unwrap_or_default())
}

fn parse(bytes: &[u8], now: f64) -> Option<State> {
    let text = std::str::from_utf8(bytes).ok()?;
    let mut words = text.split_whitespace();
    if words.next()? != FORMAT {
        return None;
    }
    let mut number = || words.next()?.parse::<f64>().ok().filter(|number| number.is_finite());
    let (written, requests, tokens, hold) = (number()?, number()?, number()?, number()?);
    (written <= now + TOLERANCE).then_some(State { requests, tokens, hold })
}

/// Removes files that have not been used for a long time, including those of earlier boots.
fn remove_stale(folder: &Path, own: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| path != own) {
        let stale = || {
            let found = std::fs::symlink_metadata(&path).ok().filter(std::fs::Metadata::is_file)?;
            let age = found.modified().ok()?.elapsed().ok()?;
            (age > STALE).then(|| open(&path).ok()).flatten()
        };
        // A process that holds the lock uses the file.
        if let Some(file) = stale()
            && file.try_lock().is_ok()
        {
            let _ = std::fs::remove_file(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::limit::{Limits, Turn};
    use super::*;
    use crate::config::RemoteJudge;

    fn limits(requests_per_minute: u64) -> Limits {
        Limits::of(&RemoteJudge { requests_per_minute, ..RemoteJudge::default() }).unwrap()
    }

    fn take(shared: &Shared, limits: &Limits) -> Turn {
        shared.update(|state, now| limits.take(state, now, 0.0)).unwrap().unwrap()
    }

    #[test]
    fn two_users_of_a_file_share_one_burst() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "a"].map(|account| Shared::inside(dir.path(), account).unwrap());
        // One request per minute, after a burst of one.
        let limits = Limits::of(&RemoteJudge { requests_per_minute: 1, ..RemoteJudge::default() }).unwrap();
        assert_eq!(take(&a, &limits), Turn::Now);
        let Turn::Later(wait) = take(&b, &limits) else { panic!("the limit is not shared") };
        assert!(wait <= 60.0, "{wait}");
        let other = Shared::inside(dir.path(), "other").unwrap();
        assert_eq!(take(&other, &limits), Turn::Now, "another account has its own limit");
    }

    #[test]
    fn a_pause_that_the_server_asks_one_user_for_applies_to_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "a"].map(|account| Shared::inside(dir.path(), account).unwrap());
        a.update(|state, now| state.hold = now + 500.0).unwrap().unwrap();
        let Turn::Held(wait) = take(&b, &limits(1000)) else { panic!("the hold is not shared") };
        assert!(wait <= 500.1, "{wait}");
    }

    #[test]
    fn a_locked_file_is_not_waited_for_and_a_removed_one_is_created_again() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::inside(dir.path(), "a").unwrap();
        let other = open(shared.path()).unwrap();
        other.lock().unwrap();
        assert!(shared.update(|_, _| ()).unwrap().is_none());
        drop(other);
        assert!(shared.update(|_, _| ()).unwrap().is_some(), "a lock ends with its process");
        std::fs::remove_file(shared.path()).unwrap();
        assert!(shared.update(|_, _| ()).unwrap().is_none());
        assert!(shared.update(|_, _| ()).unwrap().is_some() && shared.path().exists());
    }

    #[test]
    fn a_state_round_trips_and_one_of_another_clock_or_program_is_ignored() {
        let state = State { requests: 1e6 + 0.25, tokens: 7.5, hold: 1e9 };
        let written = line(&state, 1e6);
        assert_eq!((written.len(), parse(written.as_bytes(), 1e6)), (LENGTH, Some(state)));
        assert_eq!(parse(written.as_bytes(), 1e6 - 2.0), None, "the clock was behind");
        for odd in
            ["", "preceptor-rate-limit-2 1 1 1 1", "preceptor-rate-limit-1 1 NaN 1 1", "preceptor-rate-limit-1 1 1"]
        {
            assert_eq!(parse(odd.as_bytes(), 1e6), None, "{odd}");
        }
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::inside(dir.path(), "a").unwrap();
        std::fs::write(shared.path(), "odd").unwrap();
        assert_eq!(take(&shared, &limits(1)), Turn::Now);
        assert_eq!(std::fs::metadata(shared.path()).unwrap().len(), LENGTH as u64);
    }
}
