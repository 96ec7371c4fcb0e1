//! The published weights of a run, for workers without a shared folder: `GET /weights/NAME/FILE`, with ranges.
//!
//! Only files in the lists of checksums of this run's folders are sent: those of its base model, its judges and its versions.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex};

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::Node;
use super::connections::Progress;
use crate::observe::monitor::PublishedWeights;
use crate::pipeline::served::{SUMS, Tag, is_plain, listed, sha256};
use crate::util::mutex::lock;

/// Number of bytes that are read and sent at once.
const CHUNK: usize = 256 << 10;

/// A file of the published weights.
struct Published {
    file: File,
    /// Size in bytes.
    size: u64,
    /// SHA-256 in hexadecimal digits.
    sha256: String,
}

/// Answers with a file, or with a part of it.
pub(super) async fn weights(
    State(monitor): Node,
    Path((name, file)): Path<(String, String)>,
    Extension(progress): Extension<Progress>,
    headers: HeaderMap,
) -> Response {
    let Some(weights) = monitor.published_weights() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "this node has published no weights for workers yet\n")
            .into_response();
    };
    let found = tokio::task::spawn_blocking(move || find(&weights, &name, &file)).await;
    let Some(found) = found.ok().flatten() else {
        return (StatusCode::NOT_FOUND, "there are no such weights\n").into_response();
    };
    answer(found, &headers, progress)
}

/// Returns the file `file` of the folder `name`, if it is published.
fn find(weights: &PublishedWeights, name: &str, file: &str) -> Option<Published> {
    let is_own =
        weights.models.iter().any(|model| model == name) || Tag::parse(name).is_some_and(|(run, _)| run == weights.run);
    if !is_own || !is_plain(name) || !is_plain(file) {
        return None;
    }
    let dir = weights.folder.join(name);
    if !dir.symlink_metadata().is_ok_and(|found| found.is_dir()) {
        return None;
    }
    // A folder without a list is not complete. Symbolic links are not followed.
    let open = |file: &str| -> Option<(File, u64)> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(dir.join(file));
        let file = file.ok()?;
        let found = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        Some((file, found.len()))
    };
    let (mut list, size) = open(SUMS)?;
    let mut sums = String::new();
    list.read_to_string(&mut sums).ok()?;
    if file == SUMS {
        list.rewind().ok()?;
        return Some(Published { file: list, size, sha256: sha256(sums.as_bytes()) });
    }
    let (hex, _) = *listed(&sums).ok()?.iter().find(|(_, listed)| *listed == file)?;
    let (file, size) = open(file)?;
    Some(Published { file, size, sha256: hex.to_owned() })
}

/// Part of a file that a request asks for: its first byte, and the byte after its last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Whole,
    Range(u64, u64),
    /// The requested range begins after the end of the file.
    None,
}

/// Returns the part that the header `Range: value` asks for of a file of `size` bytes. Several ranges, and other units, are
/// answered with the whole file, which the standard allows.
fn part(value: &str, size: u64) -> Part {
    let range =
        value.strip_prefix("bytes=").filter(|range| !range.contains(',')).and_then(|range| range.split_once('-'));
    let Some((first, last)) = range else { return Part::Whole };
    let (from, to) = match (first.trim().parse::<u64>(), last.trim().parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => (first, size.min(last.saturating_add(1))),
        (Ok(first), Err(_)) if last.trim().is_empty() => (first, size),
        (Err(_), Ok(last)) if first.trim().is_empty() => (size.saturating_sub(last), size),
        _ => return Part::Whole,
    };
    if from < to { Part::Range(from, to) } else { Part::None }
}

fn answer(found: Published, headers: &HeaderMap, progress: Progress) -> Response {
    let Published { mut file, size, sha256 } = found;
    let tag = format!("\"{sha256}\"");
    let text = |name: header::HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    // A part of another file than the client has the beginning of is of no use to it.
    let is_same = text(header::IF_RANGE).is_none_or(|known| known == tag);
    let part = text(header::RANGE).filter(|_| is_same).map_or(Part::Whole, |value| part(value, size));
    let (status, from, to) = match part {
        Part::Whole => (StatusCode::OK, 0, size),
        Part::Range(from, to) => (StatusCode::PARTIAL_CONTENT, from, to),
        Part::None => (StatusCode::RANGE_NOT_SATISFIABLE, 0, 0),
    };
    if file.seek(SeekFrom::Start(from)).is_err() {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    let mut response = Response::new(body(file, to - from, progress));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    let mut set = |name, text: String| {
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.insert(name, value);
        }
    };
    set(header::CONTENT_TYPE, "application/octet-stream".into());
    set(header::ACCEPT_RANGES, "bytes".into());
    set(header::ETAG, tag);
    set(header::CONTENT_LENGTH, (to - from).to_string());
    match part {
        Part::Whole => {}
        Part::Range(from, to) => set(header::CONTENT_RANGE, format!("bytes {from}-{}/{size}", to - 1)),
        Part::None => set(header::CONTENT_RANGE, format!("bytes */{size}")),
    }
    response
}

/// Returns a body of the next `bytes` bytes of `file`. Its connection stays open while the client reads it.
fn body(file: File, bytes: u64, progress: Progress) -> Body {
    let file = Arc::new(Mutex::new(file));
    Body::from_stream(futures_util::stream::unfold((file, bytes), move |(file, left)| {
        let progress = progress.clone();
        async move {
            if left == 0 {
                return None;
            }
            progress.made();
            let reader = Arc::clone(&file);
            let read = tokio::task::spawn_blocking(move || -> std::io::Result<Vec<u8>> {
                let mut chunk = vec![0; usize::try_from(left).unwrap_or(CHUNK).min(CHUNK)];
                lock(&reader).read_exact(&mut chunk)?;
                Ok(chunk)
            });
            let chunk = read.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
            // An error ends the response early, which the client sees by its length.
            let left = chunk.as_ref().map_or(0, |chunk| left - chunk.len() as u64);
            Some((chunk.map(Bytes::from), (file, left)))
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_standard_says() {
        for (value, expected) in [
            ("bytes=0-3", Part::Range(0, 4)),
            ("bytes=4-", Part::Range(4, 10)),
            ("bytes=-3", Part::Range(7, 10)),
            ("bytes=-30", Part::Range(0, 10)),
            ("bytes=8-30", Part::Range(8, 10)),
            ("bytes=10-", Part::None),
            ("bytes=-0", Part::None),
            ("bytes=5-4", Part::Whole),
            ("bytes=0-1,4-5", Part::Whole),
            ("bytes=a-b", Part::Whole),
            ("lines=0-3", Part::Whole),
        ] {
            assert_eq!(part(value, 10), expected, "{value}");
        }
        assert_eq!(part("bytes=0-", 0), Part::None);
        assert_eq!(part(&format!("bytes=0-{}", u64::MAX), 10), Part::Range(0, 10));
    }

    #[test]
    fn only_listed_files_of_this_run_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let hex = "0".repeat(64);
        for name in ["policy-00000007-3-00000009", "policy-00000008-3-00000009", "base-1", "base-2", ".base-1.partial"]
        {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            let file = dir.path().join(name).join("model.safetensors");
            std::fs::write(&file, "weights").unwrap();
            std::fs::write(file.with_file_name("other"), "x").unwrap();
            std::os::unix::fs::symlink("other", file.with_file_name("link")).unwrap();
            let list = format!("{hex}  model.safetensors\n{hex}  link\n{hex}  missing\n");
            std::fs::write(file.with_file_name(SUMS), list).unwrap();
        }
        std::fs::create_dir(dir.path().join("policy-00000007-4-00000009")).unwrap();
        std::fs::write(dir.path().join("policy-00000007-4-00000009/model.safetensors"), "half").unwrap();
        std::os::unix::fs::symlink("base-2", dir.path().join("policy-00000007-5-00000009")).unwrap();
        let weights = PublishedWeights { folder: dir.path().to_owned(), run: 7, models: vec!["base-1".into()] };
        let found = |name: &str, file: &str| find(&weights, name, file).map(|found| found.size);
        assert_eq!(found("policy-00000007-3-00000009", "model.safetensors"), Some(7));
        assert_eq!(found("base-1", "model.safetensors"), Some(7));
        assert!(found("base-1", SUMS).is_some_and(|size| size > 3 * 64));
        for (name, file) in [
            ("policy-00000008-3-00000009", "model.safetensors"), // another run's
            ("base-2", "model.safetensors"),
            (".base-1.partial", "model.safetensors"),
            ("policy-00000007-4-00000009", "model.safetensors"), // not complete
            ("policy-00000007-5-00000009", "model.safetensors"), // a symbolic link
            ("base-1", "link"),
            ("base-1", "other"), // not listed
            ("base-1", "missing"),
            ("base-1", "../base-1/model.safetensors"),
            ("base-1", ".."),
            ("..", "base-1"),
            ("base-1/../base-2", "model.safetensors"),
            ("", ""),
        ] {
            assert_eq!(found(name, file), None, "{name}/{file}");
        }
    }
}
