//! Files that are read whole, with a bound: what is larger than any of its kind is refused before memory is spent on it.
//! A leaf.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Most bytes of what a person writes: a configuration, a template set, a chat template.
pub const WRITTEN: u64 = 1 << 20;
/// Most bytes of the JSON files beside a model's weights.
pub const DESCRIPTION: u64 = 64 << 20;
/// Most bytes of a `tokenizer.json`: the largest vocabularies there are take 30 MB.
pub const TOKENIZER: u64 = 256 << 20;

/// The text of the file at `path`.
///
/// # Errors
/// Those of reading; [`ErrorKind::FileTooLarge`] beyond `limit` bytes, [`ErrorKind::InvalidData`] for what is not UTF-8.
pub fn text(path: &Path, limit: u64) -> Result<String> {
    let mut bytes = Vec::new();
    // A device or a pipe has no size to ask for.
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let words = format!("it has more than {limit} bytes, the most that such a file may have");
        return Err(Error::new(ErrorKind::FileTooLarge, words));
    }
    String::from_utf8(bytes).map_err(|_| Error::new(ErrorKind::InvalidData, "it is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_kept_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(text(&path, 5).unwrap(), "12345");
        let error = text(&path, 4).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);
        assert!(error.to_string().contains("more than 4 bytes"), "{error}");
        // A file without an end.
        assert_eq!(text(Path::new("/dev/zero"), 100).unwrap_err().kind(), ErrorKind::FileTooLarge);
        std::fs::write(&path, b"\xff").unwrap();
        assert_eq!(text(&path, 5).unwrap_err().kind(), ErrorKind::InvalidData);
    }
}
