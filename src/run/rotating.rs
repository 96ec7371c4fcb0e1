//! A bounded file of JSON lines: a full file is renamed to `NAME.1`, the previous one to `NAME.2`, and the oldest is
//! removed.
//!
//! Each line has a `step`. A resumed run cuts off later steps by this field, in rotated files as well. The result does
//! not depend on the number of rotations since the checkpoint, or on old files that the user removed.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use super::log::Log;

/// Number of bytes that are read at a time from the end of a file.
const CHUNK: usize = 1 << 16;

/// Limits of a [`RotatingLog`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RotationLimits {
    /// Size in bytes from which a file is rotated before the next entry; 0 for no limit.
    pub max_bytes: u64,
    /// Number of rotated files that are kept.
    pub keep: usize,
}

/// An append-only file of JSON lines, which is renamed to `NAME.1`, `NAME.2` and so on when it reaches its size limit.
pub struct RotatingLog {
    log: Log,
    limits: RotationLimits,
    /// Bytes that this process has moved to rotated files.
    rotated_bytes: u64,
}

impl RotatingLog {
    /// Opens the file at `path` and cuts off lines of steps after `step` and an incomplete last line.
    ///
    /// # Errors
    /// Names the file that cannot be read, renamed or shortened.
    pub fn open(path: &Path, step: u64, limits: RotationLimits) -> Result<Self> {
        let mut length = end_of_step(path, step)?;
        // If no line is left, the previous file becomes the current one again.
        while length == 0 && rotated(path, 1).exists() {
            unrotate(path)?;
            length = end_of_step(path, step)?;
        }
        Ok(Self { log: Log::open(path, length)?, limits, rotated_bytes: 0 })
    }

    /// Appends `bytes`, the lines of one step, and rotates a full file before.
    ///
    /// # Errors
    /// See [`Log::append`]. A file that cannot be rotated keeps growing.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let full = self.limits.max_bytes > 0 && self.log.length() >= self.limits.max_bytes;
        // Pending bytes belong to the file that is rotated.
        let rotated = if full { self.log.flush().and_then(|()| self.rotate()) } else { Ok(()) };
        self.log.append(bytes).and(rotated)
    }

    fn rotate(&mut self) -> Result<()> {
        let path = self.log.path().to_owned();
        for n in (0..self.limits.keep).rev() {
            rename(&rotated(&path, n), &rotated(&path, n + 1))?;
        }
        self.rotated_bytes += self.log.length();
        // Without rotated files, the lines are cut off in place.
        self.log = Log::open(&path, 0)?;
        // Surplus files remain from a larger `keep`.
        let mut surplus = self.limits.keep + 1;
        while std::fs::remove_file(rotated(&path, surplus)).is_ok() {
            surplus += 1;
        }
        Ok(())
    }

    /// Removes all bytes after `length`, an earlier value of [`Self::length`] that is not before the last rotation.
    ///
    /// # Errors
    /// Names the file that cannot be shortened.
    pub fn rewind(&mut self, length: u64) -> Result<()> {
        self.log.rewind(length.saturating_sub(self.rotated_bytes))
    }

    /// Returns the number of bytes that the file had when it was opened and that were appended since, including rotated
    /// ones.
    pub fn length(&self) -> u64 {
        self.rotated_bytes + self.log.length()
    }

    /// Writes all pending bytes. Returns the files that may not be synced yet: the current one and the previous one.
    ///
    /// # Errors
    /// See [`Log::flush`].
    pub fn flush(&mut self) -> Result<Vec<PathBuf>> {
        self.log.flush()?;
        let files = [0, 1].map(|n| rotated(self.log.path(), n));
        Ok(files.into_iter().filter(|path| path.exists()).collect())
    }
}

/// Returns the path of the file after `n` rotations; 0 is the current file.
fn rotated(path: &Path, n: usize) -> PathBuf {
    if n == 0 {
        return path.to_owned();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{n}"));
    name.into()
}

/// Renames a file if it exists.
fn rename(from: &Path, to: &Path) -> Result<()> {
    match std::fs::rename(from, to) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
        }
        _ => Ok(()),
    }
}

/// Undoes one rotation.
fn unrotate(path: &Path) -> Result<()> {
    let mut n = 0;
    while rotated(path, n + 1).exists() {
        rename(&rotated(path, n + 1), &rotated(path, n))?;
        n += 1;
    }
    Ok(())
}

/// Returns the offset at which the complete lines of steps up to `step` end in the file at `path`; 0 if there is no
/// file.
pub(super) fn end_of_step(path: &Path, step: u64) -> Result<u64> {
    let cannot = || format!("cannot read {}", path.display());
    let mut file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        opened => opened.with_context(cannot)?,
    };
    let mut end = file.metadata().with_context(cannot)?.len();
    // `tail` has the bytes from `from` to `end`.
    let (mut tail, mut from) = (Vec::new(), end);
    let mut complete = false;
    loop {
        // The last line without its line feed, if it has one.
        let inside = tail.len().saturating_sub(usize::from(complete));
        match tail[..inside].iter().rposition(|byte| *byte == b'\n') {
            None if from > 0 => {
                let size = from.min(CHUNK as u64);
                from -= size;
                let mut chunk = vec![0; size as usize];
                file.seek(SeekFrom::Start(from)).and_then(|_| file.read_exact(&mut chunk)).with_context(cannot)?;
                chunk.append(&mut tail);
                tail = chunk;
                complete = complete || tail.last() == Some(&b'\n');
            }
            found => {
                let start = found.map_or(0, |at| at + 1);
                if tail.is_empty() || (complete && !is_after(&tail[start..], step)) {
                    return Ok(end);
                }
                end = from + start as u64;
                tail.truncate(start);
                complete = start > 0;
            }
        }
    }
}

/// Returns whether a line belongs to a step after `step`. A line without a step is kept.
fn is_after(line: &[u8], step: u64) -> bool {
    serde_json::from_slice::<Value>(line).is_ok_and(|line| line["step"].as_u64().is_some_and(|one| one > step))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: RotationLimits = RotationLimits { max_bytes: 60, keep: 2 };

    fn line(step: u64) -> String {
        format!("{{\"step\":{step},\"text\":\"é\"}}\n")
    }

    /// Returns the steps in each of the existing files, the current one first.
    fn steps(path: &Path) -> Vec<Vec<u64>> {
        let files = (0..).map(|n| rotated(path, n)).take_while(|path| path.exists());
        let of = |path: PathBuf| -> Vec<u64> {
            let text = std::fs::read_to_string(path).unwrap();
            text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap()).collect()
        };
        files.map(of).collect()
    }

    fn written(path: &Path, steps: std::ops::RangeInclusive<u64>) -> RotatingLog {
        let mut file = RotatingLog::open(path, steps.start() - 1, LIMITS).unwrap();
        for step in steps {
            file.append(line(step).as_bytes()).unwrap();
        }
        file
    }

    #[test]
    fn a_full_file_is_rotated_and_the_oldest_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        let file = written(&path, 1..=10);
        assert_eq!(steps(&path), [vec![10], vec![7, 8, 9], vec![4, 5, 6]]);
        assert_eq!(file.length(), (1..=10).map(|step| line(step).len() as u64).sum::<u64>());
        // A smaller `keep` takes effect at the next rotation.
        let mut file = RotatingLog::open(&path, 10, RotationLimits { max_bytes: 10, keep: 0 }).unwrap();
        file.append(line(11).as_bytes()).unwrap();
        assert_eq!(steps(&path), [vec![11]]);
        let unbounded = RotationLimits { max_bytes: 0, keep: 2 };
        let mut file = RotatingLog::open(&path, 11, unbounded).unwrap();
        (12..40).for_each(|step| file.append(line(step).as_bytes()).unwrap());
        assert_eq!(steps(&path), [(11..40).collect::<Vec<_>>()]);
    }

    #[test]
    fn a_resumed_run_cuts_later_steps_in_rotated_files_too() {
        for (step, left) in [
            (10, vec![vec![10], vec![7, 8, 9], vec![4, 5, 6]]),
            (9, vec![vec![7, 8, 9], vec![4, 5, 6]]),
            (8, vec![vec![7, 8], vec![4, 5, 6]]),
            (5, vec![vec![4, 5]]),
            (2, vec![vec![]]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("samples.jsonl");
            drop(written(&path, 1..=10));
            // The writer was killed in the middle of a line.
            std::io::Write::write_all(
                &mut std::fs::OpenOptions::new().append(true).open(&path).unwrap(),
                b"{\"step\":1",
            )
            .unwrap();
            drop(RotatingLog::open(&path, step, LIMITS).unwrap());
            assert_eq!(steps(&path), left, "up to step {step}");
        }
    }

    #[test]
    fn lines_longer_than_a_chunk_and_lines_without_a_step_are_cut_at_their_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        let long = |step: u64| format!("{{\"step\":{step},\"text\":\"{}\"}}\n", "x".repeat(3 * CHUNK));
        let kept = format!("a note\n{}", long(1));
        std::fs::write(&path, format!("{kept}{}{}", long(2), long(3))).unwrap();
        drop(RotatingLog::open(&path, 1, LIMITS).unwrap());
        assert!(std::fs::read_to_string(&path).unwrap() == kept);
        drop(RotatingLog::open(&path, 0, LIMITS).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a note\n");
        assert!(RotatingLog::open(&dir.path().join("none"), 5, LIMITS).is_ok());
    }

    #[test]
    fn a_step_that_is_written_again_takes_its_own_place_after_a_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        let mut file = written(&path, 1..=3);
        let before = file.length();
        file.append(line(4).as_bytes()).unwrap();
        file.rewind(before).unwrap();
        file.append(line(4).as_bytes()).unwrap();
        assert_eq!(steps(&path), [vec![4], vec![1, 2, 3]]);
    }
}
