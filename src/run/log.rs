//! A file that a run appends to, and that survives a full disk and a resumed run.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::util::disk;
use crate::util::failpoints;

/// Bytes that wait for room on the disk before more are refused.
const MOST_WAITING: usize = 64 << 20;

/// What cannot be written, since the disk is full perhaps, waits here and is tried again with the next.
pub struct Log {
    path: PathBuf,
    file: File,
    written: u64,
    waiting: Vec<u8>,
    /// Appends that were refused since too much waits.
    lost: u64,
}

impl Log {
    /// Opens the file at `path` and cuts off what is beyond `length`. One that is not there at all begins: what was before is
    /// where the run was before.
    ///
    /// # Errors
    /// A file that cannot be opened, or that is shorter.
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
            "{} has {found} bytes, and the checkpoint knows of {length}; put the file back, or resume from an earlier checkpoint",
            path.display()
        );
        file.set_len(length).with_context(|| format!("cannot shorten {}", path.display()))?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self { path: path.to_owned(), file, written: length, waiting: Vec::new(), lost: 0 })
    }

    /// Appends `bytes`, after whatever waits.
    ///
    /// # Errors
    /// Names the file; the bytes are kept and tried again with the next append, unless too many are.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if self.waiting.len() + bytes.len() > MOST_WAITING {
            self.lost += 1;
        } else {
            self.waiting.extend_from_slice(bytes);
        }
        failpoints::point("log.append")?;
        self.flush()
    }

    /// Writes what waits.
    ///
    /// # Errors
    /// Names the file, and what becomes of what could not be written.
    pub fn flush(&mut self) -> Result<()> {
        let mut done = 0;
        let result = loop {
            if done == self.waiting.len() {
                break Ok(());
            }
            match self.file.write(&self.waiting[done..]) {
                Ok(0) => break Err(std::io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        self.waiting.drain(..done);
        self.written += done as u64;
        let lost = if self.lost > 0 { format!(", {} entries are lost", self.lost) } else { String::new() };
        result.with_context(|| {
            format!("cannot write {}; {} bytes wait for the next try{lost}", self.path.display(), self.waiting.len())
        })
    }

    /// Takes back what came after `length`.
    ///
    /// # Errors
    /// Names the file that cannot be shortened.
    pub fn rewind(&mut self, length: u64) -> Result<()> {
        let waiting = length.saturating_sub(self.written) as usize;
        self.waiting.truncate(waiting);
        if length < self.written {
            self.file.set_len(length).with_context(|| format!("cannot shorten {}", self.path.display()))?;
            self.file.seek(SeekFrom::Start(length))?;
            self.written = length;
        }
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in the file and waiting for it.
    pub fn length(&self) -> u64 {
        self.written + self.waiting.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_where_it_is_told_to() {
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
    fn what_a_full_disk_refuses_waits_and_nothing_is_written_twice() {
        // The kernel's own full disk.
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
