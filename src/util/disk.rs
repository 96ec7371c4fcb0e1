//! Files of a run: errors of the system with a remedy, files replaced as a whole, permissions by the umask.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{Error, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// An error of the system as one that names `path`, what was done with it (such as "read") and a remedy.
pub fn cannot(verb: &str, path: &Path, error: Error) -> anyhow::Error {
    let remedy = if verb == "lock" && is_without_locks(&error) { Some(NO_LOCKS) } else { remedy(&error) };
    let text = format!("cannot {verb} {}", path.display());
    match remedy {
        Some(remedy) => anyhow::Error::new(error).context(format!("{text}; {remedy}")),
        None => anyhow::Error::new(error).context(text),
    }
}

/// Remedy for a file system without locks.
const NO_LOCKS: &str =
    "its file system offers no locks (NFS without a lock service, for example); use a directory on another one";

/// Error number with which NFS refuses an operation that it does not support (`ENOTSUPP` of the Linux kernel).
const ENOTSUPP: i32 = 524;

/// Returns whether an error in locking a file says that its file system has no locks.
fn is_without_locks(error: &Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP | ENOTSUPP))
}

/// Returns the remedy for `error`, for a person to read.
fn remedy(error: &Error) -> Option<&'static str> {
    Some(match (error.kind(), error.raw_os_error()?) {
        (ErrorKind::PermissionDenied, _) => {
            "give the user of this process the right to it (chown, chmod), or start the program as its owner"
        }
        (ErrorKind::StorageFull | ErrorKind::QuotaExceeded, _) => "make room on the disk",
        (ErrorKind::FileTooLarge, _) => "raise the limit of a file's size (ulimit -f)",
        (ErrorKind::ReadOnlyFilesystem, _) => "mount the file system writable, or use another directory",
        (ErrorKind::OutOfMemory, _) => "free memory",
        (_, libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n)",
        (_, libc::EIO) => "look for a fault of the disk in the system's log",
        (_, libc::ENOLCK) => NO_LOCKS,
        _ => return None,
    })
}

/// `path` with a leading `~` replaced by the home directory, as a shell replaces it.
///
/// # Errors
/// There is no home directory, or `~` names that of another user.
pub fn expand_home(path: &Path) -> Result<PathBuf, String> {
    let mut parts = path.components();
    let Some(std::path::Component::Normal(first)) = parts.next() else { return Ok(path.to_owned()) };
    let Some(user) = first.to_str().and_then(|first| first.strip_prefix('~')) else { return Ok(path.to_owned()) };
    if !user.is_empty() {
        return Err(format!("{} begins with the home directory of {user}; write the path in full", path.display()));
    }
    match std::env::home_dir().filter(|home| home.is_absolute()) {
        Some(home) => Ok(home.join(parts.as_path())),
        None => Err(format!("{} needs a home directory; set HOME, or write the path in full", path.display())),
    }
}

/// Whether there is something at `path`; unlike [`Path::exists`], an error is not taken for absence.
///
/// # Errors
/// Names the path that cannot be looked at.
pub fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(|error| cannot("read", path, error))
}

/// Returns the length of the file at `path`; `None` if it does not exist.
///
/// # Errors
/// Names the path that cannot be looked at, or is not a regular file: opening a named pipe would wait for its other end.
pub fn length(path: &Path) -> Result<Option<u64>> {
    match std::fs::metadata(path) {
        Ok(found) if found.is_file() => Ok(Some(found.len())),
        Ok(_) => bail!("{} is not a regular file; remove it or move it away", path.display()),
        Err(error) if is_absence(&error) => Ok(None),
        Err(error) => Err(cannot("read", path, error)),
    }
}

/// Whether the cause of the error may pass by itself, as a full disk or a server that is away does. A file that is missing
/// or that may not be read stays so until a person acts.
pub fn may_pass(error: &Error) -> bool {
    use std::io::ErrorKind::{
        AlreadyExists, InvalidData, InvalidInput, IsADirectory, NotADirectory, NotFound, PermissionDenied,
        UnexpectedEof,
    };
    let stays = matches!(
        error.kind(),
        NotFound
            | PermissionDenied
            | InvalidData
            | InvalidInput
            | IsADirectory
            | NotADirectory
            | AlreadyExists
            | UnexpectedEof
    );
    !stays && !is_without_locks(error)
}

/// Whether `error` says that a file is not there.
pub fn is_absence(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Writes `bytes` as the file at `path`: readers see the file before or the one after, whatever happens in between.
///
/// # Errors
/// Names the file that cannot be written.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let aside = beside(path);
    let write = || {
        // What an earlier process left may be anything.
        match std::fs::remove_file(&aside) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).open(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&aside, path)
    };
    write().map_err(|error| {
        // The first error says more.
        let _ = std::fs::remove_file(&aside);
        cannot("write", path, error)
    })
}

/// The name that [`replace`] writes `path` under.
fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.partial"))
}

/// Waits until the file or folder at `path` is on the disk.
///
/// # Errors
/// Names the path that cannot be synced.
pub fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| cannot("sync", path, error))
}

/// As [`sync`], of many at a time: a disk that is slow to answer answers them together.
///
/// # Errors
/// Names a path that cannot be synced.
pub fn sync_all(paths: &[PathBuf]) -> Result<()> {
    /// Threads at most; they wait and do nothing else.
    const MOST: usize = 32;
    let each = |paths: &[PathBuf]| paths.iter().try_for_each(|path| sync(path));
    std::thread::scope(|scope| {
        let parts = paths.chunks(paths.len().div_ceil(MOST).max(1));
        let started: Vec<_> = parts
            .map(|part| {
                // Where no thread can be started, the caller's has to do.
                std::thread::Builder::new().spawn_scoped(scope, move || each(part)).map_err(|_| part)
            })
            .collect();
        started.into_iter().try_for_each(|one| match one {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(part) => each(part),
        })
    })
}

/// Gives the file at `path`, which a library made for its owner alone, the permissions that the umask leaves to new files.
///
/// # Errors
/// Names the file whose permissions cannot be changed.
pub fn open_to_umask(path: &Path) -> Result<()> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let digits = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    let Some(umask) = digits.and_then(|digits| u32::from_str_radix(digits.trim(), 8).ok()) else { return Ok(()) };
    std::fs::set_permissions(path, Permissions::from_mode(0o666 & !umask))
        .with_context(|| format!("cannot change the permissions of {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_path_and_a_remedy() {
        let path = Path::new("a/b");
        let text = |code| format!("{:#}", cannot("read", path, Error::from_raw_os_error(code)));
        assert!(
            text(libc::EMFILE).starts_with("cannot read a/b; raise the limit of open files"),
            "{}",
            text(libc::EMFILE)
        );
        assert!(text(libc::EACCES).contains("chown") && text(libc::ENOLCK).contains("no locks"));
        assert!(text(libc::EXDEV).starts_with("cannot read a/b: "), "{}", text(libc::EXDEV));
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_and_a_pipe_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!((length(&path).unwrap(), length(&dir.path().join("b")).unwrap()), (Some(3), None));
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let error = length(&pipe).unwrap_err().to_string();
        assert!(error.contains("pipe is not a regular file"), "{error}");
    }
}
