//! File system helpers: I/O errors with a remedy, atomic replacement of files, permissions by the umask.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{Error, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Converts an I/O error into one that names `path`, the failed operation `verb` (such as "read") and a remedy.
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
    "its file system does not support locks (for example NFS without a lock service); use a directory on another one";

/// Error number with which NFS refuses an operation that it does not support (`ENOTSUPP` of the Linux kernel).
const ENOTSUPP: i32 = 524;

/// Returns whether an error of locking a file means that its file system does not support locks.
fn is_without_locks(error: &Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP | ENOTSUPP))
}

/// Returns the remedy for `error`, if one is known.
fn remedy(error: &Error) -> Option<&'static str> {
    Some(match (error.kind(), error.raw_os_error()?) {
        (ErrorKind::PermissionDenied, _) => {
            "grant access to the user of this process (chown, chmod), or start the program as the owner"
        }
        (ErrorKind::StorageFull | ErrorKind::QuotaExceeded, _) => "free disk space",
        (ErrorKind::FileTooLarge, _) => "raise the file size limit (ulimit -f)",
        (ErrorKind::ReadOnlyFilesystem, _) => "mount the file system writable, or use another directory",
        (ErrorKind::OutOfMemory, _) => "free memory",
        (_, libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n)",
        (_, libc::EIO) => "check the system log for disk faults",
        (_, libc::ENOLCK) => NO_LOCKS,
        _ => return None,
    })
}

/// Returns `path` with a leading `~` replaced by the home directory, as by a shell.
///
/// # Errors
/// If no home directory is known, or the path begins with the home directory of another user (`~user`).
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

/// Returns whether `path` exists. Unlike [`Path::exists`], an error is not treated as absence.
///
/// # Errors
/// If the path cannot be accessed; the error names it.
pub fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(|error| cannot("read", path, error))
}

/// Returns the length of the file at `path`; `None` if it does not exist.
///
/// # Errors
/// If the path cannot be accessed, or is not a regular file, because opening a named pipe would block. The error names
/// it.
pub fn length(path: &Path) -> Result<Option<u64>> {
    match std::fs::metadata(path) {
        Ok(found) if found.is_file() => Ok(Some(found.len())),
        Ok(_) => bail!("{} is not a regular file; remove it or move it away", path.display()),
        Err(error) if is_absence(&error) => Ok(None),
        Err(error) => Err(cannot("read", path, error)),
    }
}

/// Returns whether the cause of an I/O error may be temporary, such as a full disk or an unavailable server. A missing
/// or unreadable file needs manual action.
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

/// Returns whether `error` means that a file does not exist.
pub fn is_absence(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Atomically replaces the file at `path` by one with the content `bytes`. Readers see the old or the new file, even
/// after a crash.
///
/// # Errors
/// If the file cannot be written; the error names it.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary_path(path);
    let write = || {
        // An earlier process may have left anything at this path.
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|error| {
        // An error of the removal is ignored in favour of the first error.
        let _ = std::fs::remove_file(&temporary);
        cannot("write", path, error)
    })
}

/// Checks, before work whose result belongs there, that a file can be written at `path`. An existing file stays as it is, and
/// none is left behind. A pipe or a device is not opened, because that could block.
///
/// # Errors
/// If it is a directory, or cannot be written; the error names it.
pub fn check_writable(path: &Path) -> Result<()> {
    let opened = match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => bail!("cannot write {}, because it is a directory; name a file", path.display()),
        Ok(found) if !found.is_file() => Ok(()),
        Ok(_) => OpenOptions::new().append(true).open(path).map(drop),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            OpenOptions::new().write(true).create_new(true).open(path).and_then(|_| std::fs::remove_file(path))
        }
        Err(error) => Err(error),
    };
    opened.map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            anyhow::anyhow!("cannot write {}, because its directory does not exist; create it", path.display())
        }
        ErrorKind::AlreadyExists => anyhow::anyhow!(
            "cannot write {}, because it is a link to a file that does not exist; remove the link",
            path.display()
        ),
        _ => cannot("write", path, error),
    })
}

/// Returns the path of the temporary file of [`replace`].
fn temporary_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.partial"))
}

/// Syncs the file or directory at `path` to the disk.
///
/// # Errors
/// If the path cannot be synced; the error names it.
pub fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| cannot("sync", path, error))
}

/// Syncs many files or directories concurrently, which is faster on a disk with high latency.
///
/// # Errors
/// If a path cannot be synced; the error names it.
pub fn sync_all(paths: &[PathBuf]) -> Result<()> {
    /// Maximum number of threads, which only wait.
    const MAX_THREADS: usize = 32;
    let each = |paths: &[PathBuf]| paths.iter().try_for_each(|path| sync(path));
    std::thread::scope(|scope| {
        let parts = paths.chunks(paths.len().div_ceil(MAX_THREADS).max(1));
        let started: Vec<_> = parts
            .map(|part| {
                // If no thread can be started, the calling thread syncs the part.
                std::thread::Builder::new().spawn_scoped(scope, move || each(part)).map_err(|_| part)
            })
            .collect();
        started.into_iter().try_for_each(|thread| match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(part) => each(part),
        })
    })
}

/// Sets the permissions of the file at `path`, which a library created for its owner only, to those of the umask.
///
/// # Errors
/// If the permissions cannot be changed; the error names the file.
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
        assert!(text(libc::EACCES).contains("chown") && text(libc::ENOLCK).contains("does not support locks"));
        assert!(text(libc::EXDEV).starts_with("cannot read a/b: "), "{}", text(libc::EXDEV));
    }

    #[test]
    fn a_file_that_cannot_be_written_is_found_before_the_work() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("old"), b"old").unwrap();
        for name in ["old", "new"] {
            check_writable(&path(name)).unwrap();
        }
        assert_eq!(std::fs::read(path("old")).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no file was created");
        std::os::unix::fs::symlink(path("absent"), path("link")).unwrap();
        let error = |path: &Path| check_writable(path).unwrap_err().to_string();
        assert!(error(&path("link")).contains("is a link to a file that does not exist"), "{}", error(&path("link")));
        assert!(error(&path("new/")).contains("cannot write"), "{}", error(&path("new/")));
        assert!(error(dir.path()).contains("it is a directory; name a file"), "{}", error(dir.path()));
        assert!(
            error(&path("none/new")).contains("none/new, because its directory does not exist"),
            "{}",
            error(&path("none/new"))
        );
        assert!(error(&path("old/new")).contains("cannot write"), "{}", error(&path("old/new")));
    }

    #[test]
    fn files_are_replaced_atomically_and_pipes_are_not_opened() {
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
