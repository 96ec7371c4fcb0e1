//! An append-only file of a run, which tolerates a full disk and is cut off when the run is resumed.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::util::disk;
use crate::util::failpoints;

/// Maximum number of bytes that are kept in memory; further entries are dropped.
const MAX_PENDING_BYTES: usize = 64 << 20;

/// An append-only file. Bytes that cannot be written, for example because the disk is full, are kept in memory, up to
/// 64 MiB, and written with the next append. Entries beyond that are dropped and counted.
pub struct Log {
    path: PathBuf,
    file: File,
    written: u64,
    pending: Vec<u8>,
    /// Appends that were dropped because too many bytes were pending.
    dropped: u64,
}

impl Log {
    /// Opens the file at `path` and cuts it off after `length` bytes. Creates an empty file if there is none, since the
    /// run may have been copied without it.
    ///
    /// # Errors
    /// If the file cannot be opened or is shorter than `length`.
    pub fn open(path: &Path, length: u64) -> Result<Self> {
        let length = if disk::length(path)?.is_some() { length } else { 0 };
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(|error| disk::cannot("open", path, error))?;
        let found = file.metadata()?.len();
        ensure!(
            found >= length,
            "{} has {found} bytes, but the checkpoint recorded {length}; restore the file, or resume from an earlier checkpoint",
            path.display()
        );
        file.set_len(length).with_context(|| format!("cannot shorten {}", path.display()))?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self { path: path.to_owned(), file, written: length, pending: Vec::new(), dropped: 0 })
    }

    /// Appends `bytes` after all pending bytes.
    ///
    /// # Errors
    /// Names the file that cannot be written. The bytes remain pending, unless there are already more than 64 MiB.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if self.pending.len() + bytes.len() > MAX_PENDING_BYTES {
            self.dropped += 1;
        } else {
            self.pending.extend_from_slice(bytes);
        }
        failpoints::point("log.append")?;
        self.flush()
    }

    /// Writes all pending bytes.
    ///
    /// # Errors
    /// Names the file that cannot be written, with the number of pending bytes and dropped entries.
    pub fn flush(&mut self) -> Result<()> {
        let mut done = 0;
        let result = loop {
            if done == self.pending.len() {
                break Ok(());
            }
            match self.file.write(&self.pending[done..]) {
                Ok(0) => break Err(std::io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        self.pending.drain(..done);
        self.written += done as u64;
        let dropped = if self.dropped > 0 { format!(", {} entries were dropped", self.dropped) } else { String::new() };
        result.with_context(|| {
            format!(
                "cannot write {}; {} bytes wait for the next attempt{dropped}",
                self.path.display(),
                self.pending.len()
            )
        })
    }

    /// Removes all bytes after the first `length`, also those that are pending.
    ///
    /// # Errors
    /// Names the file that cannot be shortened.
    pub fn rewind(&mut self, length: u64) -> Result<()> {
        let kept = length.saturating_sub(self.written) as usize;
        self.pending.truncate(kept);
        if length < self.written {
            self.file.set_len(length).with_context(|| format!("cannot shorten {}", self.path.display()))?;
            self.file.seek(SeekFrom::Start(length))?;
            self.written = length;
        }
        Ok(())
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the number of bytes in the file and pending.
    pub fn length(&self) -> u64 {
        self.written + self.pending.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reopened_log_continues_at_the_given_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Log::open(&path, 0).unwrap();
        log.append(b"one\n").unwrap();
        let length = log.length();
        log.append(b"two\n").unwrap();
        drop(log);
        let mut log = Log::open(&path, length).unwrap();
        log.append(b"three\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one\nthree\n");
        log.rewind(length).unwrap();
        log.append(b"four\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one\nfour\n");
        let error = Log::open(&path, 100).err().unwrap().to_string();
        assert!(error.contains("log has 9 bytes") && error.contains("100"), "{error}");
    }

    #[test]
    fn bytes_that_a_full_disk_refuses_are_written_later_and_once() {
        // `/dev/full` fails each write like a full disk.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Log::open(&path, 0).unwrap();
        log.file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = log.append(b"one\n").unwrap_err().to_string();
        assert!(error.contains("4 bytes wait"), "{error}");
        assert_eq!(log.length(), 4);
        log.file = File::create(&path).unwrap();
        log.append(b"two\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one\ntwo\n");
        assert_eq!(log.length(), 8);
    }
}
