//! The journal: what the learner was given, in the order in which it was given, so that its steps can be taken again.
//!
//! `journal.bin` is a row of entries, each a length and a CRC-32 (both `u32`, little-endian) and then the entry itself. An
//! entry that a dying program did not finish is at the end, and is found by its length or checksum.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::types::Rewarded;

/// The file's name in a run's directory.
pub const NAME: &str = "journal.bin";

/// Most bytes of an entry; a longer one is damage.
const MOST: u32 = 1 << 30;

/// One entry.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Entry {
    /// From here on the run goes by this configuration (TOML, resolved).
    Config(String),
    /// A learner step.
    Step(Step),
    /// The run was resumed with a judge that differs from the one before.
    Accepted(Accepted),
    /// The journal is full: the run's steps from this one on are not in it. The step has a fixed width (little-endian), so that
    /// the entry is found from the end of the file.
    Closed([u8; 8]),
}

/// Changes of the judge that a person accepted when the run was resumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The step of the checkpoint that the run was resumed from.
    pub step: u64,
    /// The keys with their old and new values.
    pub changes: Vec<(String, String, String)>,
}

/// What a step learned from, and what it led to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Step {
    /// Counted from one.
    pub step: u64,
    /// Fingerprint of the weights after it.
    pub fingerprint: u64,
    /// Its groups, in order.
    pub batch: Vec<Rewarded>,
}

/// A step to be written, without a copy of its batch. Reads back as [`Entry`].
#[derive(Serialize)]
enum Borrowed<'a> {
    Config(&'a str),
    Step(BorrowedStep<'a>),
    Accepted(&'a Accepted),
    Closed([u8; 8]),
}

#[derive(Serialize)]
struct BorrowedStep<'a> {
    step: u64,
    fingerprint: u64,
    batch: &'a [Rewarded],
}

/// The bytes of an entry that says which configuration holds from here on.
///
/// # Errors
/// When it is beyond a gigabyte.
pub fn config(config: &str) -> Result<Vec<u8>> {
    frame(&Borrowed::Config(config))
}

/// The bytes of an entry that says which changes of the judge were accepted.
///
/// # Errors
/// When it is beyond a gigabyte.
pub fn accepted(accepted: &Accepted) -> Result<Vec<u8>> {
    frame(&Borrowed::Accepted(accepted))
}

/// The bytes of an entry that says that the journal ends before `step`.
///
/// # Errors
/// When it cannot be encoded.
pub fn closed(step: u64) -> Result<Vec<u8>> {
    frame(&Borrowed::Closed(step.to_le_bytes()))
}

/// The step before which the journal at `path` was closed, if the entry that ends at `length` says so.
///
/// # Errors
/// Names the file that cannot be read.
pub fn closed_before(path: &Path, length: u64) -> Result<Option<u64>> {
    let size = closed(0)?.len();
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
    Ok((bytes == closed(step)?).then_some(step))
}

/// The bytes of a step's entry.
///
/// # Errors
/// When it is beyond a gigabyte.
pub fn step(step: u64, fingerprint: u64, batch: &[Rewarded]) -> Result<Vec<u8>> {
    frame(&Borrowed::Step(BorrowedStep { step, fingerprint, batch }))
}

fn frame(entry: &Borrowed<'_>) -> Result<Vec<u8>> {
    let body = postcard::to_stdvec(entry)?;
    let length = u32::try_from(body.len()).ok().filter(|length| *length <= MOST);
    let length = length.context("a step's groups are beyond a gigabyte, which the journal does not take")?;
    let mut bytes = Vec::with_capacity(body.len() + 8);
    bytes.extend(length.to_le_bytes());
    bytes.extend(crc32fast::hash(&body).to_le_bytes());
    bytes.extend(body);
    Ok(bytes)
}

/// Reads a journal entry by entry.
pub struct Journal {
    path: PathBuf,
    file: BufReader<File>,
    at: u64,
}

impl Journal {
    /// The journal of the run in `dir`.
    ///
    /// # Errors
    /// There is none.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(NAME);
        let file = File::open(&path).with_context(|| {
            format!("cannot open {}; a run keeps one unless checkpoint.journal = false", path.display())
        })?;
        Ok(Self { path, file: BufReader::with_capacity(1 << 20, file), at: 0 })
    }

    /// Where the next entry begins.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The next entry; none at the end, or where the writer was cut off.
    ///
    /// # Errors
    /// Damage: an entry that is there in full and does not bear its checksum.
    fn read(&mut self) -> Result<Option<Entry>> {
        let mut head = [0; 8];
        if !self.fill(&mut head)? {
            return Ok(None);
        }
        let word = |i: usize| u32::from_le_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
        let (length, sum) = (word(0), word(4));
        let place = format!("{} at byte {}", self.path.display(), self.at);
        ensure!(length <= MOST, "{place} has an entry of {length} bytes; it is damaged");
        let mut body = Vec::new();
        self.file.by_ref().take(length.into()).read_to_end(&mut body)?;
        if body.len() < length as usize {
            return Ok(None);
        }
        ensure!(crc32fast::hash(&body) == sum, "{place} has an entry whose checksum is wrong; it is damaged");
        let entry = postcard::from_bytes(&body).map_err(|error| anyhow!("{place} cannot be understood: {error}"))?;
        self.at += 8 + u64::from(length);
        Ok(Some(entry))
    }

    /// Fills `buffer`; false where the file ends before.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<bool> {
        match self.file.read_exact(buffer) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", self.path.display())),
        }
    }
}

impl Iterator for Journal {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
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
    fn a_full_journal_says_so_at_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let open = step(1, 42, &batch()).unwrap();
        let full = [open.clone(), closed(2).unwrap()].concat();
        std::fs::write(&path, &full).unwrap();
        assert_eq!(closed_before(&path, full.len() as u64).unwrap(), Some(2));
        assert_eq!(closed_before(&path, open.len() as u64).unwrap(), None);
        assert_eq!(closed_before(&path, 3).unwrap(), None);
        assert_eq!(closed_before(&path, 1 << 40).unwrap(), None, "a file that is shorter is the opener's business");
        assert_eq!(closed_before(&dir.path().join("none"), 100).unwrap(), None);
        let last = Journal::open(dir.path()).unwrap().last().unwrap().unwrap();
        assert!(matches!(last, Entry::Closed(step) if u64::from_le_bytes(step) == 2), "{last:?}");
    }

    #[test]
    fn what_is_written_reads_back_bit_for_bit_and_a_torn_end_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = config("a = 1").unwrap();
        bytes.extend(step(1, 42, &batch()).unwrap());
        let whole = bytes.len();
        bytes.extend(step(2, 43, &batch()).unwrap());
        let path = dir.path().join(NAME);
        for cut in [whole, whole + 1, whole + 8, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let mut journal = Journal::open(dir.path()).unwrap();
            let entries: Vec<Entry> = journal.by_ref().collect::<Result<_>>().unwrap();
            assert_eq!(journal.position(), whole as u64);
            let [Entry::Config(text), Entry::Step(read)] = entries.as_slice() else { panic!("{entries:?}") };
            assert_eq!((text.as_str(), read.step, read.fingerprint), ("a = 1", 1, 42));
            // Debug output shows every float's shortest form, so equal text is equal bits, NaN included.
            assert_eq!(format!("{:?}", read.batch), format!("{:?}", batch()));
        }
        bytes[whole - 3] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = Journal::open(dir.path()).unwrap().find_map(Result::err).unwrap().to_string();
        assert!(error.contains("journal.bin at byte 15") && error.contains("checksum"), "{error}");
    }
}
