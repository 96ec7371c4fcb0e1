//! The journal: the learner's input in its original order, from which the steps of a run can be replayed.
//!
//! `journal.bin` is a sequence of entries in the format of [`crate::util::frames`].

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::types::Rewarded;
use crate::util::frames::{self, Frames};

/// Name of the journal in a run's directory.
pub const NAME: &str = "journal.bin";

/// An entry of the journal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Entry {
    /// The resolved configuration (TOML) that applies to the following steps.
    Config(String),
    /// A learner step.
    Step(Step),
    /// Accepted changes of the judge when the run was resumed.
    Accepted(AcceptedChanges),
    /// The journal is full and has no steps from this one on. The step has a fixed width (little-endian), so that the
    /// entry can be found from the end of the file.
    Closed([u8; 8]),
}

/// Changes of the judge that were accepted when the run was resumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptedChanges {
    /// Step of the checkpoint that the run was resumed from.
    pub step: u64,
    /// The changed keys with their old and new values.
    pub changes: Vec<(String, String, String)>,
}

/// The input and the result of a learner step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Step {
    /// Number of the step, starting at 1.
    pub step: u64,
    /// Fingerprint of the weights after the step.
    pub fingerprint: u64,
    /// The groups of the batch, in order.
    pub batch: Vec<Rewarded>,
}

/// Borrowed form of [`Entry`] for writing, so that a batch is not copied.
#[derive(Serialize)]
enum EntryRef<'a> {
    Config(&'a str),
    Step(StepRef<'a>),
    Accepted(&'a AcceptedChanges),
    Closed([u8; 8]),
}

#[derive(Serialize)]
struct StepRef<'a> {
    step: u64,
    fingerprint: u64,
    batch: &'a [Rewarded],
}

/// Encodes an entry with the configuration that applies from here on.
///
/// # Errors
/// If the entry is larger than a gigabyte.
pub fn encode_config(config: &str) -> Result<Vec<u8>> {
    frame(&EntryRef::Config(config))
}

/// Encodes an entry with accepted changes of the judge.
///
/// # Errors
/// If the entry is larger than a gigabyte.
pub fn encode_accepted(accepted: &AcceptedChanges) -> Result<Vec<u8>> {
    frame(&EntryRef::Accepted(accepted))
}

/// Encodes the entry that closes the journal before `step`.
///
/// # Errors
/// If the entry cannot be encoded.
pub fn encode_closed(step: u64) -> Result<Vec<u8>> {
    frame(&EntryRef::Closed(step.to_le_bytes()))
}

/// Returns the step before which the journal at `path` was closed by its size limit, or `None` if there is no such file
/// or the entry that ends at byte `length` does not close it.
///
/// # Errors
/// Names the file that cannot be read.
pub fn closed_before(path: &Path, length: u64) -> Result<Option<u64>> {
    let size = encode_closed(0)?.len();
    let Some(start) = length.checked_sub(size as u64) else { return Ok(None) };
    let cannot = || format!("cannot read {}", path.display());
    let mut file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.with_context(cannot)?,
    };
    let mut bytes = vec![0; size];
    match file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(&mut bytes)) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        read => read.with_context(cannot)?,
    }
    let step = bytes.last_chunk().map_or(0, |step| u64::from_le_bytes(*step));
    Ok((bytes == encode_closed(step)?).then_some(step))
}

/// Encodes the entry of a step.
///
/// # Errors
/// If the entry is larger than a gigabyte.
pub fn encode_step(step: u64, fingerprint: u64, batch: &[Rewarded]) -> Result<Vec<u8>> {
    frame(&EntryRef::Step(StepRef { step, fingerprint, batch }))
}

fn frame(entry: &EntryRef<'_>) -> Result<Vec<u8>> {
    frames::encode(entry)?.context("a step's groups take more than a gigabyte, the limit of a journal entry")
}

/// Reader of a journal, an iterator over its entries.
pub struct Journal(Frames);

impl Journal {
    /// Opens the journal of the run in `dir`.
    ///
    /// # Errors
    /// If the journal does not exist or cannot be opened.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(NAME);
        let file = File::open(&path).with_context(|| {
            format!("cannot open {}; a run keeps one unless checkpoint.journal = false", path.display())
        })?;
        Ok(Self(Frames::new(&path, file)))
    }

    /// Returns the byte offset at which the next entry begins.
    pub fn offset(&self) -> u64 {
        self.0.offset()
    }
}

impl Iterator for Journal {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.read().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Completion, Finish, Group, Prompt, RewardScale};

    fn batch() -> Vec<Rewarded> {
        let prompt = Prompt {
            seq: 7,
            epoch: 1,
            row: 2,
            text: "why?".into(),
            ids: [1, 2, 300][..].into(),
            blank: [1][..].into(),
            reference: Some("since".into()),
        };
        let completion = Completion {
            ids: vec![4, 70_000],
            logprobs: vec![-0.1, f32::NAN],
            versions: vec![3, 4],
            finish: Finish::Eos,
            text: "so".into(),
        };
        vec![Rewarded {
            group: Group { prompt, completions: vec![completion] },
            feedback: None,
            scores: vec![0.1 + 0.2],
            rewards: vec![f64::MIN_POSITIVE],
            preferences: vec![(0, 1, 1.0 / 3.0)],
            reference: vec![vec![-1e-30, 2.5]],
            reward_model: Some(9),
            masked: Some("x".into()),
            scale: RewardScale { count: 3, mean: 1.0 / 7.0, m2: 1e300 },
        }]
    }

    #[test]
    fn a_closed_journal_is_recognized_from_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let open = encode_step(1, 42, &batch()).unwrap();
        let full = [open.clone(), encode_closed(2).unwrap()].concat();
        std::fs::write(&path, &full).unwrap();
        assert_eq!(closed_before(&path, full.len() as u64).unwrap(), Some(2));
        assert_eq!(closed_before(&path, open.len() as u64).unwrap(), None);
        assert_eq!(closed_before(&path, 3).unwrap(), None);
        assert_eq!(closed_before(&path, 1 << 40).unwrap(), None, "a shorter file is not an error here");
        assert_eq!(closed_before(&dir.path().join("none"), 100).unwrap(), None);
        let last = Journal::open(dir.path()).unwrap().last().unwrap().unwrap();
        assert!(matches!(last, Entry::Closed(step) if u64::from_le_bytes(step) == 2), "{last:?}");
    }

    #[test]
    fn entries_read_back_bit_for_bit_and_an_incomplete_one_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = encode_config("a = 1").unwrap();
        bytes.extend(encode_step(1, 42, &batch()).unwrap());
        let complete = bytes.len();
        bytes.extend(encode_step(2, 43, &batch()).unwrap());
        let path = dir.path().join(NAME);
        for cut in [complete, complete + 1, complete + 8, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let mut journal = Journal::open(dir.path()).unwrap();
            let entries: Vec<Entry> = journal.by_ref().collect::<Result<_>>().unwrap();
            assert_eq!(journal.offset(), complete as u64);
            let [Entry::Config(text), Entry::Step(read)] = entries.as_slice() else { panic!("{entries:?}") };
            assert_eq!((text.as_str(), read.step, read.fingerprint), ("a = 1", 1, 42));
            // Debug output shows the shortest form of each float, so that equal texts have equal bits, NaN included.
            assert_eq!(format!("{:?}", read.batch), format!("{:?}", batch()));
        }
        bytes[complete - 3] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = Journal::open(dir.path()).unwrap().find_map(Result::err).unwrap().to_string();
        assert!(error.contains("journal.bin at byte 15") && error.contains("checksum"), "{error}");
    }
}
