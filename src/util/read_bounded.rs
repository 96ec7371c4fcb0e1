//! Reading of complete files with a size limit, so that an oversized file is refused before memory is spent on it.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Size limit in bytes of files written by people: a configuration, a template set, a chat template.
pub const WRITTEN: u64 = 1 << 20;
/// Size limit in bytes of the JSON files of a model directory.
pub const DESCRIPTION: u64 = 64 << 20;
/// Size limit in bytes of a `tokenizer.json`. The largest known vocabularies take 30 MB.
pub const TOKENIZER: u64 = 256 << 20;

/// The byte order mark of UTF-8.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// Describes content that a download left in place of a model's file (a Git LFS pointer, an HTML page), given the file's
/// first bytes. Returns `None` for any other content.
pub fn misplaced_content(bytes: &[u8]) -> Option<&'static str> {
    let begins = |text: &str| {
        bytes.trim_ascii_start().get(..text.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(text.as_bytes()))
    };
    if begins("version https://git-lfs") {
        return Some("it is a pointer of Git LFS and not the file itself; fetch the file with git lfs pull");
    }
    let page = begins("<!doctype html") || begins("<html");
    page.then_some(
        "it is an HTML page and not the file itself; download it again, with the permissions that its server asks for",
    )
}

/// Reads the text of the file at `path`, without a byte order mark.
///
/// # Errors
/// If the file cannot be read; [`ErrorKind::FileTooLarge`] beyond `limit` bytes, and [`ErrorKind::InvalidData`] if it is
/// not UTF-8.
pub fn text(path: &Path, limit: u64) -> Result<String> {
    let mut bytes = Vec::new();
    // The size is not queried first, because devices and pipes have none.
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let words = format!("it has more than {limit} bytes, the maximum for such a file");
        return Err(Error::new(ErrorKind::FileTooLarge, words));
    }
    if bytes.starts_with(MARK) {
        bytes.drain(..MARK.len());
    }
    if let Some(words) = misplaced_content(&bytes) {
        return Err(Error::new(ErrorKind::InvalidData, words));
    }
    let wide = bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff");
    let words = if wide { "it is UTF-16; convert it to UTF-8" } else { "it is not UTF-8" };
    String::from_utf8(bytes).map_err(|_| Error::new(ErrorKind::InvalidData, words))
}

/// Reads a text as [`text`] does and converts line ends to line feeds, as Python does: for texts that a model or a
/// judge reads.
///
/// # Errors
/// See [`text`].
pub fn prose(path: &Path, limit: u64) -> Result<String> {
    Ok(line_feeds(text(path, limit)?))
}

/// Replaces each CR LF and each CR by a line feed.
pub fn line_feeds(text: String) -> String {
    if text.contains('\r') { text.replace("\r\n", "\n").replace('\r', "\n") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_limit_is_enforced_and_reported() {
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

    #[test]
    fn byte_order_marks_are_removed_and_line_ends_of_prose_converted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"\xef\xbb\xbfa\r\nb\rc\n").unwrap();
        assert_eq!(text(&path, 100).unwrap(), "a\r\nb\rc\n");
        assert_eq!(prose(&path, 100).unwrap(), "a\nb\nc\n");
        std::fs::write(&path, b"\xff\xfea\0").unwrap();
        assert!(text(&path, 100).unwrap_err().to_string().contains("UTF-16"));
    }
}
