//! A file of JSON lines that is bounded: a full one becomes `NAME.1`, that one `NAME.2`, and the oldest is removed.
//!
//! Each line has a `step`. A resumed run cuts the lines of later steps by it, in rotated files, too, so that it does not
//! matter how often the file was rotated since the checkpoint or which old files a person removed.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use super::log::Log;

/// Bytes that are read at a time from the end of a file.
const CHUNK: usize = 1 << 16;

/// Bounds on such a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Size beyond which a file is rotated before the next entry; 0 for never.
    pub most_bytes: u64,
    /// Rotated files that are kept.
    pub keep: usize,
}

/// A bounded file of lines.
pub struct Rotating {
    log: Log,
    bounds: Bounds,
    /// Bytes that this process rotated away.
    before: u64,
}

impl Rotating {
    /// Opens the file at `path` and cuts off the lines of steps after `step`, and an incomplete last line.
    ///
    /// # Errors
    /// Names the file that cannot be read, renamed or shortened.
    pub fn open(path: &Path, step: u64, bounds: Bounds) -> Result<Self> {
        let mut length = end_of(path, step)?;
        // Nothing of it belongs to the steps up to `step`: the file before it becomes the current one again.
        while length == 0 && rotated(path, 1).exists() {
            unrotate(path)?;
            length = end_of(path, step)?;
        }
        Ok(Self { log: Log::open(path, length)?, bounds, before: 0 })
    }

    /// Appends `bytes`, lines of one step; rotates before where the file is full.
    ///
    /// # Errors
    /// As [`Log::append`]; a file that cannot be rotated grows on.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let full = self.bounds.most_bytes > 0 && self.log.length() >= self.bounds.most_bytes;
        // What waits for room on the disk has to be written to the file that it belongs to.
        let rotated = if full { self.log.flush().and_then(|()| self.rotate()) } else { Ok(()) };
        self.log.append(bytes).and(rotated)
    }

    fn rotate(&mut self) -> Result<()> {
        let path = self.log.path().to_owned();
        for n in (0..self.bounds.keep).rev() {
            rename(&rotated(&path, n), &rotated(&path, n + 1))?;
        }
        self.before += self.log.length();
        // With no rotated file to keep, the lines are cut off in place.
        self.log = Log::open(&path, 0)?;
        // Files of a time when more were kept.
        let mut surplus = self.bounds.keep + 1;
        while std::fs::remove_file(rotated(&path, surplus)).is_ok() {
            surplus += 1;
        }
        Ok(())
    }

    /// Takes back what came after `length`, a value of [`Self::length`] since the last append.
    ///
    /// # Errors
    /// Names the file that cannot be shortened.
    pub fn rewind(&mut self, length: u64) -> Result<()> {
        self.log.rewind(length.saturating_sub(self.before))
    }

    /// Bytes that were appended and those that the file had, including those that this process rotated away.
    pub fn length(&self) -> u64 {
        self.before + self.log.length()
    }

    /// Writes what waits. Returns the files that may not be on the disk yet: the current one and the one before it.
    ///
    /// # Errors
    /// As [`Log::flush`].
    pub fn flush(&mut self) -> Result<Vec<PathBuf>> {
        self.log.flush()?;
        let files = [0, 1].map(|n| rotated(self.log.path(), n));
        Ok(files.into_iter().filter(|path| path.exists()).collect())
    }
}

/// The file that was rotated `n` times; the current one for 0.
fn rotated(path: &Path, n: usize) -> PathBuf {
    if n == 0 {
        return path.to_owned();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{n}"));
    name.into()
}

/// Renames a file if it is there.
fn rename(from: &Path, to: &Path) -> Result<()> {
    match std::fs::rename(from, to) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
        }
        _ => Ok(()),
    }
}

/// Makes each rotated file the one before it.
fn unrotate(path: &Path) -> Result<()> {
    let mut n = 0;
    while rotated(path, n + 1).exists() {
        rename(&rotated(path, n + 1), &rotated(path, n))?;
        n += 1;
    }
    Ok(())
}

/// Returns the offset at which the complete lines of steps up to `step` end in the file at `path`; 0 if there is no file.
pub(super) fn end_of(path: &Path, step: u64) -> Result<u64> {
    let cannot = || format!("cannot read {}", path.display());
    let mut file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        opened => opened.with_context(cannot)?,
    };
    let mut end = file.metadata().with_context(cannot)?.len();
    // The bytes from `from` to `end`.
    let (mut tail, mut from) = (Vec::new(), end);
    let mut complete = false;
    loop {
        // The last line but for its end, if there is one.
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

/// Whether a line belongs to a step after `step`. A line that says nothing of a step stays.
fn is_after(line: &[u8], step: u64) -> bool {
    serde_json::from_slice::<Value>(line).is_ok_and(|line| line["step"].as_u64().is_some_and(|one| one > step))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { most_bytes: 60, keep: 2 };

    fn line(step: u64) -> String {
        format!("{{\"step\":{step},\"text\":\"é\"}}\n")
    }

    /// Steps in each of the files that there are, the current one first.
    fn steps(path: &Path) -> Vec<Vec<u64>> {
        let files = (0..).map(|n| rotated(path, n)).take_while(|path| path.exists());
        let of = |path: PathBuf| -> Vec<u64> {
            let text = std::fs::read_to_string(path).unwrap();
            text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap()).collect()
        };
        files.map(of).collect()
    }

    fn written(path: &Path, steps: std::ops::RangeInclusive<u64>) -> Rotating {
        let mut file = Rotating::open(path, steps.start() - 1, BOUNDS).unwrap();
        for step in steps {
            file.append(line(step).as_bytes()).unwrap();
        }
        file
    }

    #[test]
    fn a_full_file_is_rotated_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        let file = written(&path, 1..=10);
        assert_eq!(steps(&path), [vec![10], vec![7, 8, 9], vec![4, 5, 6]]);
        assert_eq!(file.length(), (1..=10).map(|step| line(step).len() as u64).sum::<u64>());
        // With fewer to keep, what is beyond them goes at the next rotation.
        let mut file = Rotating::open(&path, 10, Bounds { most_bytes: 10, keep: 0 }).unwrap();
        file.append(line(11).as_bytes()).unwrap();
        assert_eq!(steps(&path), [vec![11]]);
        let unbounded = Bounds { most_bytes: 0, keep: 2 };
        let mut file = Rotating::open(&path, 11, unbounded).unwrap();
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
            drop(Rotating::open(&path, step, BOUNDS).unwrap());
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
        drop(Rotating::open(&path, 1, BOUNDS).unwrap());
        assert!(std::fs::read_to_string(&path).unwrap() == kept);
        drop(Rotating::open(&path, 0, BOUNDS).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a note\n");
        assert!(Rotating::open(&dir.path().join("none"), 5, BOUNDS).is_ok());
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
