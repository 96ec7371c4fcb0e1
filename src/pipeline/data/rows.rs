//! Rows of one or several files, accessed by number and read on demand: JSON lines, JSON arrays, CSV and parquet, plain
//! or compressed.

mod array;
mod offsets;
mod packed;
mod table;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::lm::source::dataset;
use offsets::Offsets;
use table::Table;

pub(super) use packed::BINARY;

/// Maximum size of one row in bytes.
const LONGEST: u64 = 8 << 20;
/// UTF-8 byte order mark.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// Index of the start of each row of each file; the rows themselves stay on disk.
pub struct Rows {
    parts: Vec<Part>,
    /// Number of the first row of each part.
    starts: Vec<usize>,
    len: usize,
}

/// One file.
struct Part {
    path: PathBuf,
    file: File,
    format: FileFormat,
    /// Start of each row, and end of the last one.
    offsets: Offsets,
}

/// Format of a file, with the line number of each row if rows are not one per line.
enum FileFormat {
    /// One JSON object per line.
    Lines,
    /// A JSON array of objects.
    Array(Offsets),
    /// Comma- or tab-separated values.
    Table(Table),
    /// One JSON object per line, converted from a parquet file.
    Parquet,
}

impl Rows {
    /// Opens a file, all data files of a folder, or the files that match a glob pattern, in name order. Compressed
    /// files and parquet files are unpacked once, into a temporary file that is removed when the program ends.
    ///
    /// # Errors
    /// If a file cannot be read or is damaged; the error names the file and the place.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_all(&dataset::expand(path)?)
    }

    /// Opens `files` and numbers their rows consecutively.
    ///
    /// # Errors
    /// The same as for [`Self::open`].
    pub fn open_all(files: &[PathBuf]) -> Result<Self> {
        let mut rows = Self { parts: Vec::new(), starts: Vec::new(), len: 0 };
        for path in files {
            let part = Part::open(path).with_context(|| format!("cannot read the data set {}", path.display()))?;
            rows.starts.push(rows.len);
            rows.len += part.offsets.len() - 1;
            rows.parts.push(part);
        }
        Ok(rows)
    }

    /// Returns the number of rows, blank lines included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the names of the files, for messages.
    pub fn name(&self) -> String {
        match self.parts.as_slice() {
            [] => "(no file)".to_owned(),
            [one] => one.path.display().to_string(),
            [first, rest @ ..] => format!("{} and {} more files", first.path.display(), rest.len()),
        }
    }

    /// Returns row `i`; `None` for a blank line.
    ///
    /// # Errors
    /// If the row is not a JSON object, or can no longer be read. The error does not include the location; see
    /// [`Self::place`].
    pub fn get(&self, i: usize) -> Result<Option<Value>> {
        let (part, i) = self.part(i);
        part.get(i)
    }

    /// Returns the file and the line of row `i`, for messages.
    pub fn place(&self, i: usize) -> String {
        let (part, i) = self.part(i);
        part.place(i)
    }

    fn part(&self, i: usize) -> (&Part, usize) {
        // Empty parts start at the same row as the next part; the last part with that start has the row.
        let part = self.starts.partition_point(|start| *start <= i) - 1;
        (&self.parts[part], i - self.starts[part])
    }
}

impl Part {
    fn open(path: &Path) -> Result<Self> {
        let name = path.to_string_lossy().to_lowercase();
        let (file, name) = packed::unpacked(File::open(path)?, &name)?;
        let mut head = vec![0; 4096];
        let read = file.read_at(&mut head, 0)?;
        head.truncate(read);
        if head.starts_with(b"PAR1") || name.ends_with(".parquet") {
            let file = packed::parquet(file)?;
            let offsets = offsets::lines(&file, 0)?;
            return Ok(Self { path: path.to_owned(), file, format: FileFormat::Parquet, offsets });
        }
        refuse_binary(&head)?;
        let begin = if head.starts_with(MARK) { MARK.len() as u64 } else { 0 };
        let (format, offsets) = if name.ends_with(".csv") || name.ends_with(".tsv") {
            let (table, offsets) = Table::index(&file, begin, if name.ends_with(".tsv") { b'\t' } else { b',' })?;
            (FileFormat::Table(table), offsets)
        } else {
            Self::json(&file, begin, &name, &head)?
        };
        Ok(Self { path: path.to_owned(), file, format, offsets })
    }

    /// Indexes a file of JSON lines or a JSON array.
    fn json(file: &File, begin: u64, name: &str, head: &[u8]) -> Result<(FileFormat, Offsets)> {
        let first = head[begin as usize..].iter().find(|byte| !byte.is_ascii_whitespace());
        if first == Some(&b'[') {
            match array::index(file, begin) {
                Ok((lines, offsets)) => return Ok((FileFormat::Array(lines), offsets)),
                // JSON lines whose first line is a list.
                Err(_) if name.ends_with("l") => {}
                Err(error) => return Err(error),
            }
        }
        let offsets = offsets::lines(file, begin)?;
        if name.ends_with(".json") && first == Some(&b'{') {
            let mut line = String::new();
            let mut reader = BufReader::new(Positioned { file, at: begin }).take(LONGEST);
            let complete = reader.read_line(&mut line).is_ok()
                && (line.trim().is_empty() || serde_json::from_str::<Value>(&line).is_ok());
            ensure!(
                complete,
                "it begins with an object of several lines; a JSON file must hold a list of objects, [{{…}}, {{…}}], or one object a line"
            );
        }
        Ok((FileFormat::Lines, offsets))
    }

    fn get(&self, i: usize) -> Result<Option<Value>> {
        let (start, end) = (self.offsets.get(i), self.offsets.get(i + 1));
        if end - start > LONGEST {
            bail!("the row has {} bytes, the limit is {LONGEST}; split it, or leave it out", end - start);
        }
        let mut bytes = vec![0; (end - start) as usize];
        self.file.read_exact_at(&mut bytes, start).context("the row can no longer be read")?;
        let text = std::str::from_utf8(&bytes).map_err(|_| anyhow!("not UTF-8; write the file again in UTF-8"))?;
        match &self.format {
            FileFormat::Table(table) => table.row(text),
            FileFormat::Array(_) => {
                let value = serde_json::Deserializer::from_str(text).into_iter().next();
                object(value.context("the element is empty")?, text)
            }
            FileFormat::Lines | FileFormat::Parquet => {
                // Concatenated files may contain byte order marks.
                let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
                if text.is_empty() { Ok(None) } else { object(serde_json::from_str(text), text) }
            }
        }
    }

    fn place(&self, i: usize) -> String {
        let path = self.path.display();
        match &self.format {
            FileFormat::Lines => format!("{path}:{}", i + 1),
            FileFormat::Parquet => format!("{path}, row {}", i + 1),
            FileFormat::Array(lines) => format!("{path}:{}", lines.get(i)),
            FileFormat::Table(table) => {
                // Blank lines before a record are counted as part of it.
                let (start, end) = (self.offsets.get(i), self.offsets.get(i + 1));
                let mut bytes = vec![0; (end - start).min(4096) as usize];
                let read = self.file.read_at(&mut bytes, start).unwrap_or(0);
                let blank = bytes[..read].iter().take_while(|byte| byte.is_ascii_whitespace());
                let blank = blank.filter(|byte| **byte == b'\n').count() as u64;
                format!("{path}:{}", table.line(i) + blank)
            }
        }
    }
}

/// Checks that a parsed row is an object; `text` is its source, used for hints.
fn object(read: serde_json::Result<Value>, text: &str) -> Result<Option<Value>> {
    let value = read.map_err(|error| {
        let words = error.to_string();
        if words.contains("surrogate") || words.contains("hex escape") {
            return anyhow!(
                "not JSON: it holds half of a surrogate pair, such as \\ud83d alone, which is not a character ({words}); the text was cut inside an emoji: write it again from the complete text"
            );
        }
        // Python's json module writes these.
        let number = ["NaN", "Infinity"].into_iter().find(|name| words.contains("expected value") && text.contains(name));
        let hint = number.map_or(String::new(), |name| format!("; {name} is not a number of JSON, write null"));
        anyhow!("not JSON: {words}{hint}")
    })?;
    if value.is_object() { Ok(Some(value)) } else { bail!("not a JSON object, but {}", super::described(&value)) }
}

/// Refuses files in known binary formats.
fn refuse_binary(head: &[u8]) -> Result<()> {
    let wide = head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff");
    ensure!(!wide, "it is UTF-16; write it again in UTF-8");
    for (magic, what, remedy) in [
        (&b"ARROW1"[..], "an Arrow file", "save it as parquet (datasets: Dataset.to_parquet)"),
        (b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack it, or save it as CSV"),
        (b"BZh", "compressed by bzip2", "unpack it, or compress it with gzip or zstd"),
        (b"\xfd7zXZ\0", "compressed by xz", "unpack it, or compress it with gzip or zstd"),
        (b"SQLite format 3\0", "an SQLite database", "export it as CSV or JSON lines"),
    ] {
        ensure!(!head.starts_with(magic), "it is {what}, which is not read; {remedy}");
    }
    ensure!(
        !head.contains(&0),
        "it is not text, since it holds zero bytes; data files are JSON lines, JSON arrays, CSV or parquet"
    );
    Ok(())
}

/// Reader that starts at an offset, independent of the file's own position.
struct Positioned<'a> {
    file: &'a File,
    at: u64,
}

impl Read for Positioned<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read_at(buffer, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests;
