//! Files of entries with checksums, to which entries are appended.
//!
//! Each entry consists of the length and the CRC-32 of its body, both `u32` in little-endian order, and the body in
//! postcard format. An entry that was not written completely can only be the last one, and is recognized by its length
//! or checksum.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest size of an entry's body; a longer one is treated as damage.
pub const MAX_BYTES: u32 = 1 << 30;

/// Encodes an entry. `None` if its body is larger than [`MAX_BYTES`].
///
/// # Errors
/// If the entry cannot be encoded.
pub fn encode(entry: &impl Serialize) -> Result<Option<Vec<u8>>> {
    let body = postcard::to_stdvec(entry)?;
    let Some(length) = u32::try_from(body.len()).ok().filter(|length| *length <= MAX_BYTES) else { return Ok(None) };
    let mut bytes = Vec::with_capacity(body.len() + 8);
    bytes.extend(length.to_le_bytes());
    bytes.extend(crc32fast::hash(&body).to_le_bytes());
    bytes.extend(body);
    Ok(Some(bytes))
}

/// Reader of the entries of a file.
pub struct Frames {
    path: PathBuf,
    file: BufReader<File>,
    offset: u64,
}

impl Frames {
    /// Reads the entries of `file`, which is open at its beginning; `path` is for messages.
    pub fn new(path: &Path, file: File) -> Self {
        Self { path: path.to_owned(), file: BufReader::with_capacity(1 << 20, file), offset: 0 }
    }

    /// Returns the byte offset at which the next entry begins.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Reads the next entry. Returns `None` at the end of the file and before an incomplete entry.
    ///
    /// # Errors
    /// If the file cannot be read, or a complete entry has a wrong checksum or content.
    pub fn read<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let mut head = [0; 8];
        if !self.fill(&mut head)? {
            return Ok(None);
        }
        let word = |i: usize| u32::from_le_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
        let (length, sum) = (word(0), word(4));
        let place = format!("{} at byte {}", self.path.display(), self.offset);
        ensure!(length <= MAX_BYTES, "{place} has an entry of {length} bytes; it is damaged");
        let mut body = Vec::new();
        self.file.by_ref().take(length.into()).read_to_end(&mut body)?;
        if body.len() < length as usize {
            return Ok(None);
        }
        ensure!(crc32fast::hash(&body) == sum, "{place} has an entry whose checksum is wrong; it is damaged");
        let entry = postcard::from_bytes(&body).map_err(|error| anyhow!("{place} cannot be decoded: {error}"))?;
        self.offset += 8 + u64::from(length);
        Ok(Some(entry))
    }

    /// Fills `buffer`. Returns false if the file ends first.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<bool> {
        match self.file.read_exact(buffer) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", self.path.display())),
        }
    }
}
