//! Rows of a file, found by number and read when they are wanted: JSON lines, plain or gzipped, and parquet.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use parquet::column::page::Page;
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

use crate::quiet;

/// Most bytes of one row.
const LONGEST: u64 = 8 << 20;
/// Bytes that may be unpacked of one, and bytes that may be unpacked in any case: text packs ten to one, what is made to
/// fill a disk a thousand to one.
const MOST_UNPACKED: (u64, u64) = (200, 1 << 30);

/// An index of where each row begins; the rows themselves stay on the disk.
pub struct Rows {
    path: PathBuf,
    file: File,
    /// Where each row begins, and where the last one ends.
    offsets: Offsets,
}

/// Numbers in blocks: a list that doubles when it is full would take three times their size for a moment.
struct Offsets(Vec<Vec<u64>>);

impl Offsets {
    const BLOCK: usize = 1 << 16;

    fn push(&mut self, offset: u64) {
        match self.0.last_mut() {
            Some(block) if block.len() < Self::BLOCK => block.push(offset),
            _ => self.0.push(vec![offset]),
        }
    }

    fn len(&self) -> usize {
        let last = self.0.last().map_or(0, Vec::len);
        self.0.len().saturating_sub(1) * Self::BLOCK + last
    }

    fn get(&self, i: usize) -> u64 {
        self.0[i / Self::BLOCK][i % Self::BLOCK]
    }
}

impl Rows {
    /// Opens a `.jsonl`, `.jsonl.gz` or `.parquet` file. What is compressed is unpacked once, into a temporary file
    /// that goes away with the program.
    ///
    /// # Errors
    /// Names the file that cannot be read, and where it is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let cannot = || format!("cannot read the data set {}", path.display());
        let file = File::open(path).with_context(cannot)?;
        let name = path.to_string_lossy();
        let (ratio, least) = MOST_UNPACKED;
        let most = file.metadata().with_context(cannot)?.len().saturating_mul(ratio).max(least);
        let file = if name.ends_with(".gz") {
            spool(|out| unpack(file, out, most)).with_context(cannot)?
        } else if name.ends_with(".parquet") {
            spool(|out| parquet_rows(file, out, most)).with_context(cannot)?
        } else {
            file
        };
        let offsets = index(&file).with_context(cannot)?;
        Ok(Self { path: path.to_owned(), file, offsets })
    }

    /// Rows, blank lines included: a row's number is that of its line, from zero.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Row `i`; `None` for a blank line.
    ///
    /// # Errors
    /// What is no JSON object, or can no longer be read. Does not name the place: see [`Self::place`].
    pub fn get(&self, i: usize) -> Result<Option<Value>> {
        let (start, end) = (self.offsets.get(i), self.offsets.get(i + 1));
        if end - start > LONGEST {
            bail!("the row has {} bytes, the limit is {LONGEST}; split it, or leave it out", end - start);
        }
        let mut bytes = vec![0; (end - start) as usize];
        self.file.read_exact_at(&mut bytes, start).context("the row can no longer be read")?;
        let text = std::str::from_utf8(&bytes).map_err(|_| anyhow!("not UTF-8"))?.trim();
        if text.is_empty() {
            return Ok(None);
        }
        let value: Value = serde_json::from_str(text).map_err(|error| anyhow!("not JSON: {error}"))?;
        if value.is_object() { Ok(Some(value)) } else { bail!("not a JSON object") }
    }

    /// Where row `i` stands, for errors.
    pub fn place(&self, i: usize) -> String {
        format!("{}:{}", self.path.display(), i + 1)
    }
}

/// A temporary file without a name, filled by `fill`.
fn spool(fill: impl FnOnce(&mut BufWriter<&File>) -> Result<()>) -> Result<File> {
    let file = tempfile::tempfile().context("cannot make a temporary file to unpack it into")?;
    let mut out = BufWriter::new(&file);
    let filled = fill(&mut out).and_then(|()| Ok(out.flush()?));
    drop(out);
    filled.map_err(|error| {
        let full = |cause: &(dyn std::error::Error + 'static)| {
            cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::StorageFull)
        };
        if !error.chain().any(full) {
            return error;
        }
        let place = std::env::temp_dir();
        error.context(format!(
            "it is unpacked into a temporary file, and {} is full; make room there, or set TMPDIR to another folder",
            place.display()
        ))
    })?;
    Ok(file)
}

/// Unpacks at most `most` bytes.
fn unpack(file: File, out: &mut BufWriter<&File>, most: u64) -> Result<()> {
    let unpacked = std::io::copy(&mut flate2::read::MultiGzDecoder::new(BufReader::new(file)).take(most + 1), out)?;
    ensure!(unpacked <= most, "{}", too_much(most));
    Ok(())
}

fn too_much(most: u64) -> String {
    format!(
        "it unpacks to more than {most} bytes, far more than text does; if that is meant, unpack it and name the .jsonl"
    )
}

/// Writes at most `most` bytes of rows. The parquet crate believes what a file says of itself, and panics where that cannot be.
fn parquet_rows(file: File, out: &mut BufWriter<&File>, most: u64) -> Result<()> {
    let read = || -> Result<()> {
        let reader =
            SerializedFileReader::new(file).map_err(|error| anyhow!("not a readable parquet file: {error}"))?;
        let refused = |error| anyhow!("not a readable parquet file: {error}");
        for group in 0..reader.num_row_groups() {
            let group = reader.get_row_group(group).map_err(refused)?;
            for column in 0..group.num_columns() {
                let first = group.get_column_page_reader(column).and_then(|mut pages| pages.get_next_page());
                // Room for so many values is made before any is read.
                if let Some(Page::DictionaryPage { buf, num_values, .. }) = first.map_err(refused)? {
                    ensure!(
                        num_values as usize <= buf.len(),
                        "a dictionary of {} bytes says that it has {num_values} values",
                        buf.len()
                    );
                }
            }
        }
        let rows = reader.get_row_iter(None).map_err(|error| anyhow!("its columns cannot be read: {error}"))?;
        let mut written = 0;
        for (i, row) in rows.enumerate() {
            let row = row.map_err(|error| anyhow!("row {} cannot be read: {error}", i + 1))?;
            let line = serde_json::to_vec(&row.to_json_value())?;
            written += line.len() as u64 + 1;
            ensure!(written <= most, "{}", too_much(most));
            out.write_all(&line)?;
            out.write_all(b"\n")?;
        }
        Ok(())
    };
    quiet::catch(read).unwrap_or_else(|| Err(anyhow!("not a readable parquet file: its parts contradict each other")))
}

/// Where the lines of `file` begin, and where it ends.
fn index(file: &File) -> Result<Offsets> {
    let (mut offsets, mut at) = (Offsets(vec![vec![0]]), 0);
    let mut reader = BufReader::with_capacity(1 << 20, Positioned { file, at: 0 });
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            break;
        }
        for (i, _) in buffer.iter().enumerate().filter(|(_, byte)| **byte == b'\n') {
            offsets.push(at + i as u64 + 1);
        }
        let read = buffer.len();
        at += read as u64;
        reader.consume(read);
    }
    if offsets.get(offsets.len() - 1) != at {
        offsets.push(at);
    }
    Ok(offsets)
}

/// Reads from the beginning whatever the file's own position is.
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
mod tests {
    use std::sync::Arc;

    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    fn check(name: &str, bytes: &[u8], expected: &[Result<Option<&str>, &str>]) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let rows = Rows::open(&path).unwrap();
        assert_eq!(rows.len(), expected.len());
        for (i, expected) in expected.iter().enumerate() {
            match (rows.get(i), expected) {
                (Ok(row), Ok(text)) => {
                    assert_eq!(row.as_ref().map(|row| row["a"].as_str().unwrap()), *text);
                }
                (Err(error), Err(words)) => assert!(error.to_string().contains(words), "{error}"),
                (got, expected) => panic!("row {i}: {got:?}, not {expected:?}"),
            }
        }
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    #[test]
    fn rows_beyond_a_block_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("many.jsonl");
        let count = 2 * Offsets::BLOCK + 1;
        let text: String = (0..count).map(|i| format!("{{\"a\": {i}}}\n")).collect();
        std::fs::write(&path, text).unwrap();
        let rows = Rows::open(&path).unwrap();
        assert_eq!(rows.len(), count);
        for i in [0, Offsets::BLOCK - 2, Offsets::BLOCK - 1, Offsets::BLOCK, Offsets::BLOCK + 1, count - 1] {
            assert_eq!(rows.get(i).unwrap().unwrap()["a"], i);
        }
    }

    #[test]
    fn rows_are_read_by_number() {
        let text = b"{\"a\": \"x\"}\n\n{\"a\": \"y\"}\nnope\n[1]\n{\"a\": \"last\"}";
        let expected =
            [Ok(Some("x")), Ok(None), Ok(Some("y")), Err("not JSON"), Err("not a JSON object"), Ok(Some("last"))];
        check("plain.jsonl", text, &expected);
        check("packed.jsonl.gz", &gzip(text), &expected);
        check("empty.jsonl", b"", &[]);
        check("bytes.jsonl", b"\xff\n{\"a\": \"x\"}\n", &[Err("UTF-8"), Ok(Some("x"))]);
    }

    #[test]
    fn a_row_beyond_the_limit_is_refused_unread() {
        let long = format!("{{\"a\": \"{}\"}}\n{{\"a\": \"x\"}}\n", "x".repeat(LONGEST as usize));
        check("long.jsonl", long.as_bytes(), &[Err("the row has 8388618 bytes, the limit is 8388608"), Ok(Some("x"))]);
    }

    #[test]
    fn what_is_packed_to_fill_a_disk_is_refused() {
        let packed = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(packed.path(), gzip(&vec![b'\n'; 1 << 20])).unwrap();
        let unpacked = |most| spool(|out| unpack(File::open(packed.path()).unwrap(), out, most));
        let error = unpacked((1 << 20) - 1).unwrap_err().to_string();
        assert!(error.contains("more than 1048575 bytes"), "{error}");
        assert_eq!(unpacked(1 << 20).unwrap().metadata().unwrap().len(), 1 << 20);
    }

    /// A parquet file with one column `a`, the same in each of `rows`.
    fn parquet_file(text: &str, rows: usize) -> Vec<u8> {
        let schema = parse_message_type("message rows { required binary a (utf8); }").unwrap();
        let mut writer = SerializedFileWriter::new(Vec::new(), Arc::new(schema), Arc::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&vec![ByteArray::from(text); rows], None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.into_inner().unwrap()
    }

    #[test]
    fn parquet_that_is_packed_to_fill_a_disk_is_refused() {
        let packed = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(packed.path(), parquet_file("many times", 1 << 16)).unwrap();
        assert!(packed.path().metadata().unwrap().len() < 4096);
        let unpacked = |most| spool(|out| parquet_rows(File::open(packed.path()).unwrap(), out, most));
        let line = r#"{"a":"many times"}"#.len() as u64 + 1;
        let error = unpacked((line << 16) - 1).unwrap_err().to_string();
        assert!(error.contains("it unpacks to more than"), "{error}");
        assert_eq!(unpacked(line << 16).unwrap().metadata().unwrap().len(), line << 16);
    }

    /// Each byte of a sound file changed in turn: it is read, or refused with one error.
    #[test]
    fn a_damaged_parquet_file_is_refused_and_nothing_panics() {
        let sound = parquet_file("x", 3);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.parquet");
        let mut refused = 0;
        for (i, flip) in (0..sound.len()).flat_map(|i| [0x01, 0x40, 0xff].map(|flip| (i, flip))) {
            let mut bytes = sound.clone();
            bytes[i] ^= flip;
            std::fs::write(&path, bytes).unwrap();
            refused += u32::from(Rows::open(&path).is_err());
        }
        assert!(refused > 100, "{refused}");
    }

    #[test]
    fn damaged_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let half = gzip(&b"{\"a\": \"x\"}\n".repeat(100));
        for (name, bytes) in [("half.jsonl.gz", &half[..half.len() / 2]), ("no.parquet", b"PAR1 nothing".as_slice())] {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let error = format!("{:#}", Rows::open(&path).err().unwrap());
            assert!(error.contains(name), "{error}");
        }
    }
}
